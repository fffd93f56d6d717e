"""Checks of what users pass, with the messages they read."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..maps import inside_transform


def finite(name: str, value: Tensor) -> None:
    """Raise where a tensor has NaN or infinite entries, naming the first.

    Inside a transform of torch.func, which hides values, nothing is looked at, here and below.
    """
    if inside_transform():
        return
    bad = torch.nonzero(~torch.isfinite(value.detach()))
    if bad.shape[0]:
        at = tuple(bad[0].tolist())
        raise ValueError(
            f"{name}: got {float(value.detach()[at])} at index {at}, expected finite numbers."
        )


def finite_array(name: str, value: Any) -> None:
    """As `finite`, of an array; what holds no floating numbers is let through."""
    array = np.asarray(value)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        at = tuple(int(k) for k in np.argwhere(~np.isfinite(array))[0])
        got = "NaN" if np.isnan(array[at]) else str(array[at])
        raise ValueError(f"{name}: got {got} at index {at}, expected finite numbers.")


def samples_of(estimator: Any, X: Any, y: Any, **options: Any) -> Any:
    """X and y of a scikit-learn estimator's `fit`: finite, X floating."""
    from sklearn.utils.validation import validate_data

    finite_array("y", y)
    X, y = validate_data(
        estimator, X, y, dtype=[np.float64, np.float32], ensure_all_finite=False, **options
    )
    finite_array("X", X)
    return X, y


def features_of(estimator: Any, X: Any) -> Any:
    """X of its `predict`."""
    from sklearn.utils.validation import validate_data

    X = validate_data(
        estimator, X, reset=False, dtype=[np.float64, np.float32], ensure_all_finite=False
    )
    finite_array("X", X)
    return X


def losses_of(losses: Tensor, name: str = "losses") -> Tensor:
    """A floating tensor (..., n), n >= 1, without NaN, in float64."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        got = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(
            f"{name}: got {got}, expected a floating tensor (..., n), one loss a sample."
        )
    if losses.dim() == 0 or losses.shape[-1] == 0:
        raise ValueError(
            f"{name}: got shape {tuple(losses.shape)}, expected (..., n), n >= 1 losses; pass them "
            "before they are averaged (reduction='none')."
        )
    finite(name, losses)
    return losses.double()


def distribution(name: str, weights: "Tensor | None", like: Tensor, tol: float = 1e-6) -> Tensor:
    """Weights >= 0 that sum to one along the last dimension, in float64; uniform ones for None.

    Args:
        name: of the argument, for the message.
        weights: # broadcasts against `like`
        like: # (..., n)
        tol: allowed difference of the sum from one, which is then divided out.
    """
    n = like.shape[-1]
    if weights is None:
        return like.new_full((n,), 1.0 / n)
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"{name}: got {got}, expected a floating tensor (..., {n}).")
    if weights.shape[-1:] != (n,):
        raise ValueError(f"{name}: got shape {tuple(weights.shape)}, expected (..., {n}).")
    finite(name, weights)
    weights = weights.to(like.device, torch.float64)
    total = weights.sum(-1, keepdim=True)
    if inside_transform():
        return weights / total
    if bool((weights < 0).any()):
        raise ValueError(f"{name}: got {float(weights.min()):.6g}, expected numbers >= 0.")
    off = (total - 1).abs().max()
    if bool(off > tol):
        worst = total.flatten()[int((total - 1).abs().argmax())]
        raise ValueError(
            f"{name}: got weights that sum to {float(worst):.6g}, expected 1; divide them by their sum."
        )
    return weights / total


def number(
    name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False
) -> float:
    """A finite number in [low, high], or above low where that end is open."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value, good = value.item(), True
    if not good:
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number.")
    inside = (low < value if open_low else low <= value) and value <= high
    if not (inside and math.isfinite(value)):
        if high < math.inf:
            kind = f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"
        else:
            kind = f"a finite number {'>' if open_low else '>='} {low:g}"
        raise ValueError(f"{name}: got {value}, expected {kind}.")
    return float(value)


def labels_of(name: str, labels: Tensor, shape: tuple[int, ...], classes: "int | None") -> Tensor:
    """Whole numbers 0, ..., classes - 1 of this shape."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name}: got {got}, expected a tensor of integers.")
    if tuple(labels.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(labels.shape)}, expected {shape}.")
    labels = labels.long()
    if labels.numel() and not inside_transform():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (classes is not None and high >= classes):
            top = "" if classes is None else f" to {classes - 1}"
            raise ValueError(
                f"{name}: got {low if low < 0 else high}, expected numbers from 0{top}."
            )
    return labels
