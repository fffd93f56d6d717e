"""Linear models where only means and covariances are known, as scikit-learn estimators.

    classes:    max over theta of alpha,   Prob{x on its side} >= alpha for all laws of both classes
    regression: min over theta, b of the half width of a band that holds y with probability 1 - eps

A row that holds with probability alpha for all laws of mean m and covariance S keeps kappa(1 - alpha)
standard deviations (S^(1/2)) from its limit, kappa of the family of laws: `implicitdl.robust.families`.
Both classes then keep the same kappa, and the largest one solves

    1 / kappa = min ||S_+^(1/2) theta|| + ||S_-^(1/2) theta||   over   theta'(m_+ - m_-) = 1,

one second-order cone program. Errors of the moments add to it: nu of the means, in the metric of the
covariances, takes off kappa; rho of the covariances, in the Frobenius norm, adds rho I to both.

Reference:
    Lanckriet, El Ghaoui, Bhattacharyya, Jordan (2002), "A robust minimax approach to classification",
    theorem 2 and section 4; Calafiore, El Ghaoui (2006), theorem 3.1.
"""

import math
from typing import Any

import numpy as np
import torch

from ..convex import ConeProgram, Cones
from ..robust import AnyLaw, Family, Gaussian, Symmetric, SymmetricUnimodal
from ..solution import unknown_name
from ._checks import features_of, number, samples_of

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils.multiclass import check_classification_targets, type_of_target
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:  # pragma: no cover - the message is all there is
    raise ImportError(
        "the moment estimators need scikit-learn, which is not installed: "
        'pip install "implicitdl[sklearn]".'
    ) from error

_TRACE = 1e-10  # of each feature's variance, added to the covariances of both classes
_FAMILIES: dict[str, Family] = {
    "any": AnyLaw(),
    "symmetric": Symmetric(),
    "unimodal": SymmetricUnimodal(),
    "gaussian": Gaussian(),
}


def _family(name: str) -> Family:
    if not isinstance(name, str) or name not in _FAMILIES:
        raise unknown_name("family", name, _FAMILIES)
    return _FAMILIES[name]


def _error(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name}: got {value!r}, expected a number >= 0.")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value}, expected a finite number >= 0.")
    return float(value)


def _factor(X: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """R with R'R the covariance of the rows, plus diag(rho)."""
    off = (X - X.mean(0)) / math.sqrt(len(X))
    full = np.vstack([off, np.diag(np.sqrt(rho))])
    return np.asarray(np.linalg.qr(full, mode="r"))


class MomentClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The hyperplane whose worst probability of an error is least over all laws of these moments.

    Args:
        family: which laws: "any", "symmetric", "unimodal" (symmetric with one mode) or "gaussian".
            The hyperplane is the same; the probability that is promised differs.
        mean_error: nu >= 0, how far the true means may be, in standard deviations.
        covariance_error: rho >= 0, how far the true covariances may be, in the Frobenius norm.
            To both covariances 1e-10 of each feature's own variance is added in any case, so that
            classes which lie in a hyperplane have a solution; kappa is smaller by as much.

    Attributes:
        coef_, intercept_: theta and b.
        classes_: the two labels.
        kappa_: standard deviations between each mean and the hyperplane, after the errors.
        accuracy_: what every law of these moments and the family keeps, of each class.

    Example:
        >>> import numpy as np
        >>> from implicitdl.dro import MomentClassifier
        >>> X = np.array([[0.0, 1], [1, 0], [0, -1], [-1, 0], [4, 1], [5, 0], [4, -1], [3, 0]])
        >>> model = MomentClassifier().fit(X, np.repeat([0, 1], 4))
        >>> round(model.accuracy_, 3)  # kappa = 2 / sqrt(1/2): kappa^2 / (1 + kappa^2)
        0.889
    """

    def __init__(
        self, *, family: str = "any", mean_error: float = 0.0, covariance_error: float = 0.0
    ):
        self.family, self.mean_error, self.covariance_error = family, mean_error, covariance_error

    def fit(self, X: Any, y: Any) -> "MomentClassifier":
        """Fit to X of shape (samples, features) and two labels y; returns self.

        Raises:
            ValueError: X or y are not finite, of other shapes, or y has not two classes; a parameter
                is out of range.
        """
        family = _family(self.family)
        nu, rho = (
            _error("mean_error", self.mean_error),
            _error("covariance_error", self.covariance_error),
        )
        X, y = samples_of(self, X, y)
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) > 2:
            kind = type_of_target(y, input_name="y")
            raise ValueError(
                f"Only binary classification is supported. The type of the target is {kind}."
            )
        if len(self.classes_) < 2:
            raise ValueError(f"y: got the one class {self.classes_[0]!r}, expected two classes.")
        X = X.astype(np.float64)
        parts = [X[index == k] for k in (0, 1)]
        gap = parts[1].mean(0) - parts[0].mean(0)
        if not gap.any():  # no direction tells them apart
            self.coef_, self.intercept_ = np.zeros(X.shape[1]), 0.0
            self.kappa_, self.accuracy_, self.n_iter_ = 0.0, 0.0, 1
            return self
        # A trace of each feature's variance keeps a direction without any from length infinity.
        variance = X.var(0)
        variance[variance == 0] = 1.0
        factors = [_factor(part, rho + _TRACE * variance) for part in parts]
        theta, self.n_iter_ = self._solve(factors, gap)
        sizes = [float(np.linalg.norm(R @ theta)) for R in factors]
        kappa = float(theta @ gap) / sum(sizes)
        self.coef_ = theta
        self.intercept_ = -float(theta @ parts[1].mean(0)) + kappa * sizes[1]
        self.kappa_ = kappa - nu
        self.accuracy_ = 1 - _level(family, self.kappa_)
        return self

    def _solve(self, factors: list[np.ndarray], gap: np.ndarray) -> tuple[np.ndarray, int]:
        d = len(gap)
        # Every feature in units of its own, so that numbers of all sizes are as accurate.
        unit = np.sqrt(sum((R * R).sum(0) for R in factors))
        factors, gap = [R / unit for R in factors], gap / unit
        scale = sum(float(np.linalg.norm(R)) for R in factors)
        blocks, sizes = [], []
        for k, R in enumerate(factors):
            block = np.zeros((len(R) + 1, d + 2))
            block[0, d + k], block[1:, :d] = -1.0, -R / scale
            blocks.append(block)
            sizes.append(len(R) + 1)
        length = float(np.linalg.norm(gap))
        row = np.append(gap / length, [0.0, 0.0])[None]
        cost = np.append(np.zeros(d), [1.0, 1.0])
        c, G, A = (torch.from_numpy(t) for t in (cost, np.concatenate(blocks), row))
        h, one = torch.zeros(len(G), dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        with torch.no_grad():
            found = ConeProgram(Cones(0, tuple(sizes))).solve(None, c, G, h, A, one)
        theta: np.ndarray = found.value.numpy()[:d] / length / unit
        return theta, max(int(found.steps), 1)

    def decision_function(self, X: Any) -> np.ndarray:
        """theta'x + b.  # (samples,)"""
        check_is_fitted(self)
        X = features_of(self, X)
        out: np.ndarray = X @ self.coef_ + self.intercept_
        return out

    def predict(self, X: Any) -> np.ndarray:
        """The label on whose side x is.  # (samples,)"""
        above = self.decision_function(X) > 0
        return np.asarray(self.classes_[above.astype(int)])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class MomentRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Least squares with its worst cases over all laws of these moments, and bands that hold for them.

    theta, b minimise v'(S + rho I) v, v = (theta, -1), S the covariance of (x, y): the variance of the
    residual for the worst covariance within rho, hence also the narrowest band
    theta'x + b +- kappa sigma. The worst mean |residual| over all these laws is sigma, too.

    Args:
        confidence: 1 - eps, in (1/2, 1), of the bands.
        family: as in `MomentClassifier`; for two sides eps is split in halves, but for "any", where
            Chebyshev's inequality gives kappa = 1 / sqrt(eps).
        covariance_error: rho >= 0.
        fit_intercept: whether there is a b.

    Attributes:
        coef_, intercept_: theta and b.
        sigma_: the worst standard deviation of the residual.
        kappa_: of the band.
    """

    def __init__(
        self, *, confidence: float = 0.9, family: str = "any", covariance_error: float = 0.0,
        fit_intercept: bool = True,
    ):  # fmt: skip
        self.confidence, self.family = confidence, family
        self.covariance_error, self.fit_intercept = covariance_error, fit_intercept

    def fit(self, X: Any, y: Any) -> "MomentRegressor":
        """Fit to X of shape (samples, features) and y of shape (samples,); returns self.

        Raises:
            ValueError: X or y are not finite or of other shapes; a parameter is out of range.
        """
        family, rho = _family(self.family), _error("covariance_error", self.covariance_error)
        if not 0.5 < number("confidence", self.confidence, 0) < 1:
            raise ValueError(f"confidence: got {self.confidence}, expected a number in (1/2, 1).")
        X, y = samples_of(self, X, y, y_numeric=True)
        Z = np.column_stack([X, y]).astype(np.float64)
        centre = Z.mean(0) if self.fit_intercept else np.zeros(Z.shape[1])
        off = (Z - centre) / math.sqrt(len(Z))
        full = np.vstack([off, math.sqrt(rho) * np.eye(Z.shape[1])])
        d = X.shape[1]
        self.coef_ = np.linalg.lstsq(full[:, :d], full[:, d], rcond=1e-12)[0]
        self.intercept_ = float(centre[d] - centre[:d] @ self.coef_)
        self.sigma_ = float(np.linalg.norm(full[:, :d] @ self.coef_ - full[:, d]))
        eps = 1 - self.confidence
        if self.family == "any":
            self.kappa_ = 1 / math.sqrt(eps)
        else:
            self.kappa_ = float(family.kappa(torch.tensor(eps / 2, dtype=torch.float64), 1))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """theta'x + b.  # (samples,)"""
        check_is_fitted(self)
        X = features_of(self, X)
        out: np.ndarray = X @ self.coef_ + self.intercept_
        return out

    def predict_interval(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """Low and high ends of the band.  # (samples,) each"""
        middle = self.predict(X)
        width = self.kappa_ * self.sigma_
        return middle - width, middle + width


def _level(family: Family, kappa: float) -> float:
    """The eps with kappa(eps) = kappa, by bisection; 1 where even 1/2 asks for more."""
    if kappa <= float(family.kappa(torch.tensor(0.5, dtype=torch.float64), 1)):
        # Below kappa(1/2) only the one-sided Chebyshev bound of any law is used.
        return 1.0 if kappa <= 0 else 1 / (1 + kappa * kappa)
    low, high = 1e-300, 0.5
    for _ in range(400):
        middle = math.sqrt(low * high)
        if float(family.kappa(torch.tensor(middle, dtype=torch.float64), 1)) > kappa:
            low = middle
        else:
            high = middle
        if high <= low * (1 + 1e-12):
            break
    return high
