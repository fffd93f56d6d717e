"""The X-steps: each sample's state of one block, by accelerated proximal gradient with restarts.

    min_x  pen(x, p) + g(x),      g(x) = ratio * pen_above(t, W x + b)

With q = L x - grad g(x) a step is argmin_x pen(x, p) + L |x|^2 / 2 - <q, x>, which stays in the
range of phi. pen is sigma-strongly convex in x, so constant momentum (1 - r) / (1 + r), r^2 = sigma /
(sigma + L), is the fastest; a sample whose step turns against its direction starts anew.

Reference: Beck, Teboulle (2009); Nesterov (2013), section 4; O'Donoghue, Candes (2015).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def descend(
    x: Tensor,  # (m, *)
    step: Callable[[Tensor, float], Tensor],
    value: Callable[[Tensor], Tensor],
    L: float,
    sigma: float,
    steps: int,
    *,
    certain: bool = True,
) -> Tensor:
    """A few steps down from x; a sample's value never rises.

    Args:
        x: where to start, in the range of phi.
        step: proximal gradient step at a point, for a constant L.
        value: of each sample.  # (m, *) -> (m,)
        L: Lipschitz constant of grad g, or, where it is not `certain`, a first guess.
        sigma: strong convexity of the other part; 0 leaves out the momentum.
        steps: how many.
        certain: whether L is.
    """
    start, shape = value(x), (-1, *[1] * (x.dim() - 1))
    if not certain:
        return _guarded(x, step, value, L, steps, start)
    root = math.sqrt(sigma / (sigma + L)) if sigma > 0 else 1.0
    pull = (1 - root) / (1 + root)
    point, old = x, x
    for _ in range(steps):
        new = step(point, L)
        change = new - old
        ahead = torch.linalg.vecdot((point - new).flatten(1), change.flatten(1)) <= 0
        point = torch.addcmul(new, change, (pull * ahead.to(x.dtype)).view(shape))
        old = new
    return torch.where((value(old) <= start).view(shape), old, x)


def _guarded(
    x: Tensor, step: Callable[[Tensor, float], Tensor], value: Callable[[Tensor], Tensor],
    L: float, steps: int, now: Tensor,
) -> Tensor:  # fmt: skip
    """Plain steps, each kept by the samples that it takes down; L doubles where it fails some."""
    shape = (-1, *[1] * (x.dim() - 1))
    for _ in range(steps):
        new = step(x, L)
        after = value(new)
        better = after <= now
        x = torch.where(better.view(shape), new, x)
        now = torch.where(better, after, now)
        if not bool(better.all()):
            L = 2.0 * L + 1e-12
    return x
