"""Linear models against the worst law of a Wasserstein ball, as scikit-learn estimators.

Needs scikit-learn: `pip install "implicitdl[sklearn]"`. Features are taken as they are: the radius is
a distance in their units, so scale them first.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..solution import ConvergenceError
from ._checks import features_of, number, samples_of
from ._fits import fit, risk
from ._losses import CLASSIFICATION, REGRESSION, Ball, Fit, LinearLoss, linear_loss
from ._worst import WorstDistribution, worst

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.model_selection import KFold, StratifiedKFold
    from sklearn.utils.multiclass import check_classification_targets, type_of_target
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:  # pragma: no cover - the message is all there is
    raise ImportError(
        "the Wasserstein estimators need scikit-learn, which is not installed: "
        'pip install "implicitdl[sklearn]".'
    ) from error

_NORMS: dict[Any, float] = {1: 1.0, 2: 2.0, np.inf: np.inf, "inf": np.inf}


class _Wasserstein(BaseEstimator):  # type: ignore[misc]
    """What both share: parameters, coordinates of the metric, the fit, the choice of the radius."""

    loss: str
    radius: Any
    p: Any
    label_price: float
    metric: Any
    fit_intercept: bool

    def _loss(self) -> LinearLoss:
        raise NotImplementedError

    def _ball(self, radius: float) -> Ball:
        price = self.label_price
        if (
            isinstance(price, bool)
            or not isinstance(price, int | float | np.number)
            or not price >= 0
        ):
            raise ValueError(f"label_price: got {price!r}, expected a number >= 0, or inf.")
        if self._loss().regression and price == 0:
            raise ValueError(
                "label_price: got 0, expected a number > 0, or inf: targets that move for nothing "
                "make every risk infinite."
            )
        return Ball(radius, _NORMS[self.p], float(price))

    def _checked(self, losses: Sequence[str]) -> None:
        if self.loss not in losses:
            names = ", ".join(map(repr, losses))
            raise ValueError(f"loss: got {self.loss!r}, expected one of {names}.")
        known = isinstance(self.p, int | float | str | np.number) and not isinstance(self.p, bool)
        if not known or self.p not in _NORMS:
            raise ValueError(f"p: got {self.p!r}, expected 1, 2 or inf.")
        if isinstance(self.radius, str):
            if self.radius != "cv":
                raise ValueError(f"radius: got {self.radius!r}, expected a number >= 0 or 'cv'.")
        elif isinstance(self.radius, bool) or not isinstance(self.radius, int | float | np.number):
            raise TypeError(f"radius: got {self.radius!r}, expected a number >= 0 or 'cv'.")
        elif not 0 <= self.radius < math.inf:
            raise ValueError(f"radius: got {self.radius}, expected a finite number >= 0.")

    def _roots(self, d: int) -> tuple[np.ndarray, np.ndarray]:
        """M^(1/2) and M^(-1/2) of the metric."""
        if self.metric is None:
            return np.eye(d), np.eye(d)
        M = np.asarray(self.metric, dtype=np.float64)
        if M.shape != (d, d) or not np.isfinite(M).all():
            raise ValueError(f"metric: got shape {M.shape}, expected finite numbers ({d}, {d}).")
        if not np.allclose(M, M.T, rtol=1e-8, atol=1e-10 * np.abs(M).max()):
            raise ValueError("metric: got a matrix that is not symmetric, expected one that is.")
        value, V = np.linalg.eigh(0.5 * (M + M.T))
        if value.min() <= 0:
            raise ValueError(
                f"metric: got a smallest eigenvalue of {value.min():.3g}, expected a positive definite "
                "matrix."
            )
        root = np.sqrt(value)
        return (V * root) @ V.T, (V / root) @ V.T

    def _fit(self, X: np.ndarray, y: np.ndarray) -> None:
        X, y = X.astype(np.float64), y.astype(np.float64)
        loss = self._loss()
        self._root, self._inverse = self._roots(X.shape[1])
        moved = X if self.metric is None else X @ self._root
        self.radius_ = self._chosen(moved, y, loss) if self.radius == "cv" else float(self.radius)
        found = fit(moved, y, loss, self._ball(self.radius_), bool(self.fit_intercept))
        self._keep(found)
        self._data = moved, y

    def _keep(self, found: Fit) -> None:
        theta = found.theta if self.metric is None else self._root @ found.theta
        self.coef_, self.intercept_ = theta, found.b
        self._theta = found.theta
        self.worst_risk_, self.price_, self.gap_ = found.risk, found.lam, found.gap
        self.n_iter_, self.method_ = max(found.steps, 1), found.method

    def _chosen(self, X: np.ndarray, y: np.ndarray, loss: LinearLoss) -> float:
        """The radius of the least mean loss on the folds left out."""
        radii = self.radii  # type: ignore[attr-defined]
        if radii is None:
            # A unit: the radius at which theta = 0 becomes best, about.
            spread = float(np.sqrt(np.mean(X.var(0)))) or 1.0
            radii = spread * np.logspace(-4, 0, 9)
        radii = np.asarray(radii, dtype=np.float64)
        if radii.ndim != 1 or len(radii) == 0 or not (np.isfinite(radii) & (radii >= 0)).all():
            raise ValueError("radii: expected a list of finite numbers >= 0.")
        count = self.cv  # type: ignore[attr-defined]
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 2:
            raise ValueError(f"cv: got {count!r}, expected an integer >= 2.")
        kind = KFold if loss.regression else StratifiedKFold
        folds = list(kind(count, shuffle=True, random_state=0).split(X, y))
        if not loss.regression and any(len(np.unique(y[train])) < 2 for train, _ in folds):
            raise ValueError(
                f"cv: got {count} folds, of which one leaves a single class to train on; there are too "
                "few samples of the other."
            )
        scores = np.empty((len(radii), count))
        for i, r in enumerate(radii):
            for j, (train, test) in enumerate(folds):
                try:
                    got = fit(
                        X[train], y[train], loss, self._ball(float(r)), bool(self.fit_intercept)
                    )
                except ConvergenceError:  # such as no radius and separable classes
                    scores[i, j] = math.inf
                    continue
                scores[i, j] = loss.value(X[test] @ got.theta + got.b, y[test]).mean()
        self.cv_radii_, self.cv_losses_ = radii, scores
        if not np.isfinite(scores.mean(1)).any():
            raise ConvergenceError(
                "radii: no candidate could be fitted to all folds; take larger ones."
            )
        return float(radii[scores.mean(1).argmin()])

    def worst_case_risk(self, radius: "float | None" = None) -> float:
        """The worst mean loss over the ball around the training data, for the fitted model.

        Args:
            radius: another radius than that of the fit.

        Raises:
            ValueError: a negative radius.
        """
        check_is_fitted(self)
        r = self.radius_ if radius is None else number("radius", radius, 0)
        X, y = self._data
        return risk(X, y, self._loss(), self._ball(float(r)), self._theta, self.intercept_)[0]

    def worst_distribution(
        self, radius: "float | None" = None, tol: float = 1e-6
    ) -> WorstDistribution:
        """A law of the ball that attains the worst-case risk, or nearly where none does.

        Args:
            radius: another radius than that of the fit.
            tol: where the supremum is only approached (the logistic loss: its slope is 1 only at
                infinity), the relative gap that is left.

        Returns:
            WorstDistribution; its `loss` is evaluated at its points and `distance` is the cost of the
            plan.

        Raises:
            ValueError: a negative radius, or tol outside (0, 1).
        """
        if not 0 < number("tol", tol, -math.inf) < 1:
            raise ValueError(f"tol: got {tol}, expected a number in (0, 1).")
        value = self.worst_case_risk(radius)
        r = self.radius_ if radius is None else float(radius)
        X, y = self._data
        ball = self._ball(r)
        found = worst(X, y, self._loss(), ball, self._theta, self.intercept_, value, tol)
        labels = found.y if self._loss().regression else self._named(found.y)
        points = found.X if self.metric is None else found.X @ self._inverse
        return WorstDistribution(
            points, labels, found.weights, found.origin, found.distance, found.loss, found.risk
        )

    def _named(self, y: np.ndarray) -> np.ndarray:
        return y

    def _score(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = features_of(self, X)
        out: np.ndarray = X @ self.coef_ + self.intercept_
        return out


class WassersteinClassifier(ClassifierMixin, _Wasserstein):  # type: ignore[misc]
    """min over theta, b of the worst mean loss over laws within a Wasserstein distance of the data.

    The cost of moving a sample is ||M^(1/2) (x - x')||_p, and `label_price` more if its label flips.
    With fixed labels the worst mean is mean l(y (theta'x + b)) + radius ||M^(-1/2) theta||_q,
    1/p + 1/q = 1.

    Args:
        loss: "logistic" or "hinge".
        radius: of the ball, >= 0, in the units of the features; "cv" for the one of `radii` with the
            least mean loss under cross-validation.
        p: 1, 2 or inf, of the norm that moves features.
        label_price: what a flipped label costs, in the units of the radius; inf: labels are fixed.
        metric: M, symmetric and positive definite; None for the identity.  # (d, d)
        fit_intercept: whether there is a b.
        radii: candidates for "cv"; None for nine from 1e-4 to 1 times the features' spread.
        cv: folds.

    Attributes:
        coef_, intercept_: theta and b.
        classes_: the two labels.
        radius_: the radius of the fit.
        worst_risk_: the worst mean loss.
        gap_: how far it is above the least possible at most, proved by a feasible point of the dual;
            a fit with more than a relative 1e-6 (and 1e-10 of the risk of theta = 0) is an error.
        method_: how it was solved.

    Example:
        >>> import numpy as np
        >>> from implicitdl.dro import WassersteinClassifier
        >>> X, y = np.array([[-1.0], [-2.0], [1.0], [2.0]]), np.array([0, 0, 1, 1])
        >>> model = WassersteinClassifier(loss="hinge", radius=0.1).fit(X, y)
        >>> worst = model.worst_distribution()
        >>> bool(abs(worst.loss - model.worst_risk_) < 1e-6), bool(worst.distance <= 0.1 + 1e-9)
        (True, True)

    Reference:
        Shafieezadeh-Abadeh, Kuhn, Mohajerin Esfahani (2019), "Regularization via mass
        transportation", section 3.2.
    """

    def __init__(
        self, loss: str = "logistic", *, radius: Any = 0.1, p: Any = 2,
        label_price: float = np.inf, metric: Any = None, fit_intercept: bool = True,
        radii: Any = None, cv: int = 5,
    ):  # fmt: skip
        self.loss, self.radius, self.p, self.label_price = loss, radius, p, label_price
        self.metric, self.fit_intercept, self.radii, self.cv = metric, fit_intercept, radii, cv

    def _loss(self) -> LinearLoss:
        return linear_loss(self.loss)

    def _named(self, y: np.ndarray) -> np.ndarray:
        named: np.ndarray = self.classes_[(y > 0).astype(int)]
        return named

    def fit(self, X: Any, y: Any) -> "WassersteinClassifier":
        """Fit to X of shape (samples, features) and two labels y; returns self.

        Raises:
            ValueError: X or y are not finite, of other shapes, or y has not two classes; a parameter
                is out of range.
            ConvergenceError: there is no minimum (a radius of 0 and separable classes), or the fit
                is not proved to be one.
        """
        self._checked(CLASSIFICATION)
        X, y = samples_of(self, X, y)
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) > 2:
            kind = type_of_target(y, input_name="y")
            raise ValueError(
                f"Only binary classification is supported. The type of the target is {kind}; wrap the "
                "estimator in sklearn.multiclass.OneVsRestClassifier."
            )
        if len(self.classes_) < 2:
            raise ValueError(f"y: got the one class {self.classes_[0]!r}, expected two classes.")
        self._fit(X, 2.0 * index - 1.0)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """theta'x + b.  # (samples,)"""
        return self._score(X)

    def predict(self, X: Any) -> np.ndarray:
        """The label on whose side x is.  # (samples,)"""
        above = self._score(X) > 0
        return np.asarray(self.classes_[above.astype(int)])

    def predict_proba(self, X: Any) -> np.ndarray:
        """1 / (1 + e^-score), which means a probability for the logistic loss.  # (samples, 2)"""
        score = self._score(X).astype(np.float64)
        upper = 0.5 * (1 + np.tanh(0.5 * score))
        return np.stack([1 - upper, upper], 1)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class WassersteinRegressor(RegressorMixin, _Wasserstein):  # type: ignore[misc]
    """min over theta, b of the worst mean loss over laws within a Wasserstein distance of the data.

    The cost of moving a sample is ||M^(1/2) (x - x')||_p + label_price |y - y'|. With
    N = max(||M^(-1/2) theta||_q, 1 / label_price) the worst mean is

        mean |r| + radius N                      "absolute", distance of order 1
        mean huber(r) + radius delta N           "huber", order 1
        (sqrt(mean r^2) + radius N)^2            "squares", order 2

    Args:
        loss: "squares", "absolute" or "huber".
        radius: of the ball, >= 0, a distance in the units of the features (for squares, the square
            root of the radius in the squared cost); "cv" for the one of `radii` with the least mean
            loss under cross-validation.
        p: 1, 2 or inf, of the norm that moves features.
        label_price: what moving a target by 1 costs; inf: targets are fixed.
        metric: M, symmetric and positive definite; None for the identity.  # (d, d)
        delta: of Huber's loss, r^2 / 2 for |r| <= delta.
        fit_intercept: whether there is a b.
        radii, cv: as in `WassersteinClassifier`.

    Attributes:
        coef_, intercept_, radius_, worst_risk_, gap_, method_: as in `WassersteinClassifier`.

    Reference:
        Shafieezadeh-Abadeh, Kuhn, Mohajerin Esfahani (2019), section 3.1; Blanchet, Kang, Murthy
        (2019), "Robust Wasserstein profile inference", proposition 2.
    """

    def __init__(
        self, loss: str = "squares", *, radius: Any = 0.1, p: Any = 2,
        label_price: float = np.inf, metric: Any = None, delta: float = 1.0,
        fit_intercept: bool = True, radii: Any = None, cv: int = 5,
    ):  # fmt: skip
        self.loss, self.radius, self.p, self.label_price = loss, radius, p, label_price
        self.metric, self.delta, self.fit_intercept = metric, delta, fit_intercept
        self.radii, self.cv = radii, cv

    def _loss(self) -> LinearLoss:
        return linear_loss(self.loss, float(self.delta))

    def fit(self, X: Any, y: Any) -> "WassersteinRegressor":
        """Fit to X of shape (samples, features) and y of shape (samples,); returns self.

        Raises:
            ValueError: X or y are not finite or of other shapes; a parameter is out of range.
            ConvergenceError: the fit is not proved to be the minimum.
        """
        self._checked(REGRESSION)
        number("delta", self.delta, 0, open_low=True)
        X, y = samples_of(self, X, y, y_numeric=True)
        self._fit(X, np.asarray(y, dtype=np.float64))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """theta'x + b.  # (samples,)"""
        return self._score(X)
