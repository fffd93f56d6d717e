"""Everything that can be refused before any work is done."""

import math
from typing import Any

import torch
from torch import Tensor

from .._samples import require_finite_samples, require_labels
from .penalties import Loss


def check_inputs(data: Any, like: Tensor, name: str = "data") -> Tensor:
    """Inputs (m, *input), finite, in the dtype and on the device of the model's parameters.

    Raises:
        TypeError: no tensor.
        ValueError: another dtype or device, no samples, or NaN or infinite numbers.
    """
    if not isinstance(data, Tensor):
        raise TypeError(f"{name}: got {type(data).__name__}, expected a tensor (samples, *input).")
    if data.dim() < 2 or len(data) < 1 or not data.is_floating_point():
        raise ValueError(
            f"{name}: got {data.dtype} of shape {tuple(data.shape)}, expected floating numbers "
            "(samples, *input) with at least one sample."
        )
    if data.dtype != like.dtype or data.device != like.device:
        raise ValueError(
            f"{name}: got {data.dtype} on {data.device}, expected {like.dtype} on {like.device} as "
            "the model's parameters; convert with .to()."
        )
    require_finite_samples(name, data)
    return data.detach()


def check_targets(
    targets: Any, samples: int, outputs: int, loss: Loss, like: Tensor, name: str = "targets"
) -> Tensor:
    """The targets as rows: labels one-hot.  # (m,) or (m, q) -> (m, q)

    Raises:
        TypeError: no tensor.
        ValueError: another shape, labels out of range, or, for cross-entropy, numbers that are no
            probabilities.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"{name}: got {type(targets).__name__}, expected a tensor.")
    labels = not (targets.is_floating_point() or targets.is_complex())
    shape = (samples,) if labels else (samples, outputs)
    if tuple(targets.shape) != shape or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(
            f"{name}: got {targets.dtype} of shape {tuple(targets.shape)}, expected integer labels "
            f"of shape ({samples},) or floating numbers of shape ({samples}, {outputs})."
        )
    if labels:
        require_labels(name, targets, outputs, "the model")
        one_hot = torch.nn.functional.one_hot(targets.long(), outputs)
        return one_hot.to(like.device, like.dtype)
    require_finite_samples(name, targets)
    rows = targets.detach().to(like.device, like.dtype)
    if not loss.phi.entrywise:
        off = ((rows.sum(1) - 1).abs() > 1e-4) | (rows < 0).any(1)
        if bool(off.any()):
            first = int(off.nonzero()[0])
            raise ValueError(
                f"{name}: row {first} sums to {float(rows[first].sum()):.6g} with smallest entry "
                f"{float(rows[first].min()):.6g}, expected probabilities of the {outputs} classes "
                "for the cross-entropy; take loss='squared' for other numbers."
            )
    return rows


def check_number(name: str, value: Any, low: float = 0.0, *, zero: bool = False) -> float:
    """A finite number above `low`, or, with `zero`, at least that.

    Raises:
        ValueError: it is none.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < low or (value == low and not zero):
        raise ValueError(
            f"{name}: got {value!r}, expected a number {'>=' if zero else '>'} {low:g}."
        )
    return float(value)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """An integer of at least `least`.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or value < least:
        raise ValueError(f"{name}: got {value!r}, expected an integer >= {least}.")
    return value
