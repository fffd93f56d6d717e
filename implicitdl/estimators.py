"""Implicit and lifted models as scikit-learn estimators, for pipelines and searches over parameters.

    from implicitdl.estimators import ImplicitClassifier

Needs scikit-learn: `pip install "implicitdl[sklearn]"`. Features are standardised with the mean and
the deviation of the training data; those of a constant feature are left alone. Work is in float32
where X is, else in float64.
"""

import itertools
import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import lifted
from .activations import get_activation
from .layers import ImplicitLayer

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:  # pragma: no cover - the message is all there is
    raise ImportError(
        "implicitdl.estimators needs scikit-learn, which is not installed: "
        'pip install "implicitdl[sklearn]".'
    ) from error


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """What both kinds of targets share: data in, standardised tensors, a trained network."""

    network_: nn.Module

    def _build(self, features: int, outputs: int, dtype: torch.dtype) -> nn.Module:
        raise NotImplementedError

    def _train(self, network: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        raise NotImplementedError

    def _network(self, X: np.ndarray, y: Tensor, outputs: int) -> None:
        """Fit everything that does not depend on the kind of target."""
        self._check_parameters()
        self.mean_, self.scale_ = X.mean(0), _spread(X)
        x = self._tensor(X)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))  # type: ignore[attr-defined]
        # The global generator draws the first weights, and is put back as it was.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            self.network_ = self._build(X.shape[1], outputs, x.dtype)
            self._train(self.network_, x, y.to(x.dtype) if y.is_floating_point() else y,
                        torch.Generator().manual_seed(seed))  # fmt: skip
        self.network_.eval()

    def _check_parameters(self) -> None:
        for name in ("states", "epochs", "batch_size"):
            value = getattr(self, name, 1)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected an integer >= 1.")
        rate = self.learning_rate  # type: ignore[attr-defined]
        if not 0 < rate < math.inf:
            raise ValueError(f"learning_rate: got {rate!r}, expected a positive number.")
        decay = self.weight_decay  # type: ignore[attr-defined]
        if not 0 <= decay < math.inf:
            raise ValueError(f"weight_decay: got {decay!r}, expected a number >= 0.")

    def _tensor(self, X: np.ndarray) -> Tensor:
        scaled = (X - self.mean_) / self.scale_
        return torch.from_numpy(np.ascontiguousarray(scaled, dtype=X.dtype))

    def _output(self, X: Any) -> Tensor:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        dtype = next(self.network_.parameters()).dtype
        with torch.no_grad():
            out: Tensor = self.network_(self._tensor(X).to(dtype))
            return out

    def _data(self, X: Any, y: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], **options)
        if len(X) < 2:
            raise ValueError(f"Got n_samples={len(X)}, expected 2 samples at least.")
        return X, y


class _Classifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    def fit(self, X: Any, y: Any) -> Any:
        """Fit to X of shape (samples, features) and labels y; returns self.

        Raises:
            ValueError: X or y are not finite, of other shapes, or y has one class only.
        """
        X, y = self._data(X, y)
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y: got the one class {self.classes_[0]!r}, expected two classes at least."
            )
        self._network(X, torch.from_numpy(index.astype(np.int64)), len(self.classes_))
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits, (samples, classes); of two classes their difference, (samples,)."""
        out = self._output(X).numpy()
        return out[:, 1] - out[:, 0] if len(self.classes_) == 2 else out

    def predict_proba(self, X: Any) -> np.ndarray:
        """The softmax of the logits.  # (samples, classes)"""
        p: np.ndarray = self._output(X).double().softmax(1).numpy()
        return p

    def predict(self, X: Any) -> np.ndarray:
        """The class of the largest logit.  # (samples,)"""
        index = self._output(X).argmax(1).numpy()
        return np.asarray(self.classes_[index])


class _Regressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    def fit(self, X: Any, y: Any) -> Any:
        """Fit to X of shape (samples, features) and y of shape (samples,) or (samples, targets);
        returns self. Targets are standardised inside.

        Raises:
            ValueError: X or y are not finite, or of other shapes.
        """
        X, y = self._data(X, y, multi_output=True, y_numeric=True)
        self._flat = y.ndim == 1
        y = np.asarray(y, dtype=X.dtype).reshape(len(y), -1)
        self.target_mean_, self.target_scale_ = y.mean(0), _spread(y)
        self._network(X, torch.from_numpy((y - self.target_mean_) / self.target_scale_), y.shape[1])
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predictions, of the shape that y had in `fit`."""
        out = self._output(X).numpy() * self.target_scale_ + self.target_mean_
        return out[:, 0] if self._flat else out

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _spread(X: np.ndarray) -> np.ndarray:
    """The standard deviation of each column; 1 for a constant one, whose deviation is rounding."""
    scale = X.std(0)
    noise = 8 * np.finfo(X.dtype).eps * np.abs(X).max(0)
    spread: np.ndarray = np.where(scale > noise, scale, np.ones_like(scale))
    return spread


def _adam(
    network: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator, epochs: int,
    batch_size: int, learning_rate: float, weight_decay: float,
) -> list[float]:  # fmt: skip
    """AdamW, one cosine down from the learning rate; the mean loss of each epoch."""
    loss_of = F.mse_loss if y.is_floating_point() else F.cross_entropy
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    batches = math.ceil(len(x) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
    curve = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            optimiser.zero_grad()
            loss = loss_of(network(x[rows]), y[rows])
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        curve.append(total / len(x))
    return curve


class _Implicit:
    """The parameters of implicit estimators, and their network."""

    def __init__(
        self, states: int = 50, *, activation: str = "relu", well_posed: str = "inf-norm",
        epochs: int = 60, batch_size: int = 64, learning_rate: float = 1e-2,
        weight_decay: float = 1e-3, random_state: Any = None,
    ):  # fmt: skip
        self.states, self.activation, self.well_posed = states, activation, well_posed
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.weight_decay, self.random_state = weight_decay, random_state

    def _build(self, features: int, outputs: int, dtype: torch.dtype) -> nn.Module:
        return ImplicitLayer(
            features, outputs, int(self.states), activation=self.activation,
            well_posed=self.well_posed, dtype=dtype,
        )  # fmt: skip

    def _train(self, network: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        self.loss_curve_ = _adam(
            network, x, y, generator, int(self.epochs), int(self.batch_size),
            float(self.learning_rate), float(self.weight_decay),
        )  # fmt: skip
        self.n_iter_ = int(self.epochs)


class ImplicitClassifier(_Implicit, _Classifier):
    """y = softmax(C x + D u + d) at x = phi(A x + B u + b), fitted by cross-entropy.

    Args:
        states: n, the length of x.
        activation: phi, by name.
        well_posed: the set that A stays in, by name, so that x exists and is unique.
        epochs: passes over the data.
        batch_size: samples a step.
        learning_rate: of AdamW, at the start of one cosine.
        weight_decay: of AdamW.
        random_state: an integer, a numpy RandomState, or None.

    Attributes:
        classes_: the labels.
        network_: the `ImplicitLayer`; it takes standardised features.
        mean_, scale_: of the features.
        loss_curve_: the mean loss of each epoch.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from implicitdl.estimators import ImplicitClassifier
        >>> X, y = load_iris(return_X_y=True)
        >>> bool(ImplicitClassifier(20, random_state=0).fit(X, y).score(X, y) > 0.95)
        True

    Reference:
        El Ghaoui, Gu, Travacca, Askari, Tsai (2021), equations 1 and 2.
    """


class ImplicitRegressor(_Implicit, _Regressor):
    """y = C x + D u + d at x = phi(A x + B u + b), fitted by least squares.

    Args:
        states, activation, well_posed, epochs, batch_size, learning_rate, weight_decay,
            random_state: as in `ImplicitClassifier`.

    Attributes:
        network_: the `ImplicitLayer`; it takes standardised features and gives standardised targets.
        mean_, scale_, target_mean_, target_scale_: of features and targets.
        loss_curve_: the mean loss of each epoch.
    """


class _Lifted:
    """The parameters of lifted estimators, and their network."""

    def __init__(
        self, hidden: "tuple[int, ...]" = (100,), *, activation: str = "relu",
        penalty: str = "fenchel", epochs: int = 60, batch_size: int = 64,
        learning_rate: float = 3e-3, weight_decay: float = 1e-3, random_state: Any = None,
    ):  # fmt: skip
        self.hidden, self.activation, self.penalty = hidden, activation, penalty
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.weight_decay, self.random_state = weight_decay, random_state

    def _build(self, features: int, outputs: int, dtype: torch.dtype) -> nn.Module:
        own = list(self.hidden) if isinstance(self.hidden, Iterable) else [self.hidden]
        if any(isinstance(w, bool) or not isinstance(w, Integral) or w < 1 for w in own):
            raise ValueError(f"hidden: got {self.hidden!r}, expected integers >= 1.")
        widths = [features, *map(int, own), outputs]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [lifted.Activate(get_activation(self.activation))] if i else []
            layers.append(nn.Linear(a, b, dtype=dtype))
        return nn.Sequential(*layers)

    def _train(self, network: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        self.report_ = lifted.local(
            network, x, y, loss="squared" if y.is_floating_point() else "cross_entropy",
            penalty=self.penalty, schedule="cosine", epochs=int(self.epochs),
            batch_size=int(self.batch_size), seed=generator.initial_seed() % 2**31,
            optimizer=torch.optim.AdamW(
                network.parameters(), lr=float(self.learning_rate),
                weight_decay=float(self.weight_decay),
            ),
        )  # fmt: skip
        self.n_iter_ = int(self.epochs)


class LiftedClassifier(_Lifted, _Classifier):
    """A feedforward network fitted by cross-entropy with `lifted.local`: no back-propagation.

    Args:
        hidden: widths of the hidden layers, or the width of the one.
        activation: by name; hard ones are trained, too.
        penalty: "fenchel", "quadratic" or "askari", as in `lifted.local`.
        epochs, batch_size, learning_rate, weight_decay, random_state: as in `ImplicitClassifier`.

    Attributes:
        classes_: the labels.
        network_: the `nn.Sequential`; it takes standardised features.
        mean_, scale_: of the features.
        report_: what `lifted.local` returned.

    Reference:
        Li et al. (2019), "Lifted proximal operator machines"; Gu, Askari, El Ghaoui (2020), "Fenchel
        lifted networks".
    """


class LiftedRegressor(_Lifted, _Regressor):
    """A feedforward network fitted by least squares with `lifted.local`.

    Args:
        hidden, activation, penalty, epochs, batch_size, learning_rate, weight_decay, random_state:
            as in `LiftedClassifier`.

    Attributes:
        network_: the `nn.Sequential`; it takes standardised features and gives standardised targets.
        mean_, scale_, target_mean_, target_scale_: of features and targets.
        report_: what `lifted.local` returned.
    """
