"""What an activation does to an interval, and the two lines that enclose it there.

Only facts that an activation declares are used: its slope range, its range, whether it acts entry by
entry, is monotone or homogeneous. Where nothing sharper is known, phi between two points of a grid
is enclosed by its slope range, so that every enclosure is a proof and not a plot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import Activation
from ._nodes import EPS, Node

GRID = 33  # points of an interval at which a general activation is evaluated
_ULP = 16 * EPS  # relative error of an evaluation of phi, generously


@dataclass(frozen=True, eq=False)
class Lines:
    """lower_slope z + lower_offset <= phi(z) <= upper_slope z + upper_offset on [low, high].

    Attributes:
        least, most: where `free`, any lower slope between them is valid, with offset 0.
    """

    lower_slope: Tensor  # (m, n)
    lower_offset: Tensor
    upper_slope: Tensor
    upper_offset: Tensor
    free: Tensor  # (m, n) bool
    least: Tensor
    most: Tensor


def image(node: Node, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """An interval that contains phi of [low, high], rounded outward.  # (m, rows) -> (m, size)"""
    if node.natural is not None:
        return _coupled_image(node, low, high)
    parts = [n for _, n in node.parts]
    pairs = zip(node.parts, low.split(parts, -1), high.split(parts, -1), strict=True)
    images = [_entry_image(phi, a, b) for (phi, _), a, b in pairs]
    return torch.cat([a for a, _ in images], -1), torch.cat([b for _, b in images], -1)


def _entry_image(phi: Activation, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    if phi.monotone:
        a, b = phi(low), phi(high)
        if phi.homogeneous:  # products with 0, 1 or a slope: relative rounding alone
            return a - _ULP * a.abs(), b + _ULP * b.abs()
    else:
        _, values, step = _grid(phi, low, high)
        lo, hi = phi.slope
        # Between two points phi lies above both cones of its slope range.
        bend = 0.5 * step * max(abs(lo), abs(hi))
        a, b = values.amin(-1) - bend, values.amax(-1) + bend
    size = torch.maximum(a.abs(), b.abs()) + 1.0
    return _in_range(phi, a - _ULP * size, b + _ULP * size)


def _in_range(phi: Activation, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    lo, hi = phi.range
    return a.clamp(min=lo, max=hi), b.clamp(min=lo, max=hi)


def _coupled_image(node: Node, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    phi = node.natural[0]
    if phi.isotone:  # larger entries in, no smaller entries out
        a, b = node.phi(low), node.phi(high)
        return a - _ULP * a.abs(), b + _ULP * b.abs()
    if not phi.infinity_lipschitz < float("inf"):
        raise ValueError(
            f"method: the activation {phi} of block {node.name} declares no Lipschitz constant in "
            "the infinity norm; no bound covers it. Declare `infinity_lipschitz`."
        )
    # |phi(z) - phi(z0)| <= L max |z - z0|, over the states that phi couples.
    shape = node.natural[1]
    middle, half = (low + high) / 2, (high - low) / 2
    rows = half.reshape(-1, *shape)
    own = rows.amax(-1, keepdim=True).expand(rows.shape) if phi.size is None else None
    center = node.phi(middle)
    if own is not None and center.shape == half.shape:  # along the last dimension
        reach = own.reshape(half.shape)
    else:
        reach = half.amax(-1, keepdim=True).expand(center.shape)
    reach = phi.infinity_lipschitz * reach * (1 + _ULP) + _ULP * (1 + center.abs())
    return _in_range(phi, center - reach, center + reach)


def _grid(phi: Activation, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points, values, and the length of a cell.  # (..., GRID), (..., GRID), (...)"""
    t = torch.linspace(0, 1, GRID, dtype=low.dtype, device=low.device)
    points = low[..., None] + (high - low)[..., None] * t
    points[..., -1] = high
    return points, phi(points), (high - low) * (1 + 8 * EPS) / (GRID - 1)


def lines(node: Node, low: Tensor, high: Tensor, below: Tensor, above: Tensor) -> Lines:
    """The two lines of each state.

    Args:
        low, high: of z.  # (m, rows)
        below, above: of x = phi(z); what is enclosed where phi couples states.  # (m, size)
    """
    if node.natural is not None:
        zero = torch.zeros_like(below)
        return Lines(zero, below, zero, above, zero.bool(), zero, zero)
    sizes = [n for _, n in node.parts]
    found = [
        _homogeneous(phi, a, b) if phi.homogeneous else _general(phi, a, b)
        for (phi, _), a, b in zip(
            node.parts, low.split(sizes, -1), high.split(sizes, -1), strict=True
        )
    ]
    if len(found) == 1:
        return found[0]
    names = Lines.__dataclass_fields__
    return Lines(*(torch.cat([getattr(f, name) for f in found], -1) for name in names))


def _homogeneous(phi: Activation, low: Tensor, high: Tensor) -> Lines:
    """phi(z) = a z for z >= 0 and b z below: exact but for the chord of an unstable entry."""
    one = low.new_ones(())
    a, b = float(phi(one)), -float(phi(-one))
    unstable = (low < 0) & (high > 0)
    width = torch.where(unstable, high - low, 1.0)
    # Of two numbers `where` makes a tensor of the default dtype, in which a slope may be rounded.
    rising = torch.full_like(low, a)
    slope = torch.where(low >= 0, rising, b)
    # A chord a little higher at both ends than the exact one.
    chord = (a * high - b * low) / width
    end = torch.maximum(high.abs(), low.abs())
    rise = 8 * EPS * (abs(a) + abs(b)) * end
    steep, flat = max(a, b), min(a, b)
    # The nearer of the two slopes, as CROWN chooses it.
    adaptive = torch.where(high > -low, rising, b)
    outer = torch.where(unstable, chord, slope)
    inner = torch.where(unstable, adaptive, slope)
    offset = torch.where(unstable, a * high - chord * high, 0.0)
    zero = torch.zeros_like(low)
    least, most = torch.full_like(low, flat), torch.full_like(low, steep)
    if a >= b:  # convex: the chord is above
        up = torch.where(unstable, offset + rise, 0.0)
        return Lines(inner, zero, outer, up, unstable & (a > b), least, most)
    down = torch.where(unstable, offset - rise, 0.0)
    return Lines(outer, down, inner, zero, torch.zeros_like(unstable), least, most)


def _general(phi: Activation, low: Tensor, high: Tensor) -> Lines:
    """Two lines of the chord's slope k, as far apart as phi - k z asks for on a grid.

    Between grid points phi - k z changes at a rate in [lo - k, hi - k]; in the middle of a cell of
    length h it is therefore at most h max(hi - k, k - lo) / 2 beyond the values at its ends.
    """
    points, values, step = _grid(phi, low, high)
    width = high - low
    lo, hi = phi.slope
    safe = torch.where(width > 1e-9, width, 1.0)
    slope = torch.where(width > 1e-9, (values[..., -1] - values[..., 0]) / safe, 0.0)
    slope = slope.clamp(lo, hi)
    gap = values - slope[..., None] * points
    bend = 0.5 * step * torch.maximum(hi - slope, slope - lo)
    size = _ULP * (1 + values.abs().amax(-1) + slope.abs() * points.abs().amax(-1))
    lower, upper = gap.amin(-1) - bend - size, gap.amax(-1) + bend + size
    none = torch.zeros_like(low, dtype=torch.bool)
    return Lines(slope, lower, slope, upper, none, slope, slope)
