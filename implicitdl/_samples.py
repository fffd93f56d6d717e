"""Checks of samples and labels, before any work is done."""

import torch
from torch import Tensor

from .solution import listed


def require_finite_samples(name: str, t: Tensor) -> None:
    """Raise a ValueError that names the samples (along the first dimension) with NaN or infinity."""
    bad = (~torch.isfinite(t)).reshape(len(t), -1).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{name}: {len(bad)} of {len(t)} samples have NaN or infinite entries (sample "
            f"{listed(bad.tolist())}), expected finite numbers; leave these samples out."
        )


def require_labels(name: str, targets: Tensor, outputs: int, who: str) -> None:
    """Raise a ValueError that names the first label outside 0..outputs - 1; `who` has the outputs."""
    wrong = ((targets < 0) | (targets >= outputs)).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{name}: got the label {int(targets[first])} at sample {first}, expected labels "
            f"from 0 to {outputs - 1}, as {who} has {outputs} outputs."
        )
