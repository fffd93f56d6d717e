"""Activations of whole blocks of states."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._base import INF, Activation, kl


@dataclass(frozen=True, kw_only=True)
class Softmax(Activation):
    """phi(z) = e^z / sum e^z over the last dimension, F = logsumexp; D = KL(x || phi(z)).

    J = diag(p) - p p' has eigenvalues in [0, 1/2] and infinity norm max 2 p (1 - p) <= 1/2.
    Points off the simplex by more than the square root of the rounding unit count as outside.
    """

    slope = (0.0, 0.5)
    range = (0.0, 1.0)
    entrywise = False
    infinity_lipschitz = 0.5

    def __call__(self, z: Tensor) -> Tensor:
        return torch.softmax(z, -1)

    def derivative(self, z: Tensor) -> Tensor:
        return torch.softmax(z, -1)

    def derivative_at(self, x: Tensor) -> Tensor:
        return x

    def product(self, d: Tensor, w: Tensor) -> Tensor:
        return d * (w - (d * w).sum(-1, keepdim=True))

    def potential(self, z: Tensor) -> Tensor:  # (..., n) -> (..., 1)
        return torch.logsumexp(z, -1, keepdim=True)

    def conjugate(self, x: Tensor) -> Tensor:  # (..., n) -> (..., 1)
        value = torch.xlogy(x, x.clamp(min=0.0)).sum(-1, keepdim=True)
        return value.masked_fill(self._outside(x), INF)

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        inside = x.clamp(min=0.0)
        value = kl(inside, inside - 1, torch.log_softmax(z, -1)).sum(-1)
        return value.masked_fill(self._outside(x)[..., 0], INF)

    @staticmethod
    def _outside(x: Tensor) -> Tensor:
        off = (x.sum(-1, keepdim=True) - 1).abs() > math.sqrt(torch.finfo(x.dtype).eps)
        return off | (x < 0).any(-1, keepdim=True)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        # t log x + (1 - t) x = v + mu entry by entry, with mu such that sum x = 1. Both this, in
        # y = log x <= 0, and sum x as a function of mu are of one curvature: Newton's method from
        # mu = 1 - t - max v, where some x is 1, descends without safeguards.
        self._check_prox(t)
        t = torch.as_tensor(t, dtype=v.dtype, device=v.device)
        with torch.no_grad():
            v0, s = v.detach(), t.detach()
            mu = 1 - s - v0.amax(-1, keepdim=True)
            y = ((v0 + mu) / s).clamp(max=0.0)
            for _ in range(40):
                for _ in range(4):
                    x = y.exp()
                    y = y - (s * y + (1 - s) * x - v0 - mu) / (s + (1 - s) * x)
                    y = y.clamp(max=0.0)
                x = y.exp()
                rate = (x / (s + (1 - s) * x)).sum(-1, keepdim=True)
                mu = mu - (x.sum(-1, keepdim=True) - 1) / rate
            z = (v0 - (1 - s) * y.exp()) / s
        for _ in range(2):  # Newton for t z + (1 - t) phi(z) = v, by Sherman and Morrison
            p = torch.softmax(z, -1)
            scale = t + (1 - t) * p
            r = (t * z + (1 - t) * p - v) / scale
            lift = (1 - t) * (p * r).sum(-1, keepdim=True)
            z = z - r - p / scale * (lift / (t * (p / scale).sum(-1, keepdim=True)))
        return torch.softmax(z, -1)


@dataclass(frozen=True, kw_only=True)
class Blocks(Activation):
    """phi = (phi_1, ..., phi_k), one activation for each block of states along the last dimension.

    Slope and range are the hulls of the parts'. Nested Blocks are flattened.

    Args:
        parts: pairs (activation, number of states).

    Example:
        >>> import torch
        >>> from implicitdl.activations import Blocks, ReLU, Tanh
        >>> phi = Blocks(parts=((ReLU(), 2), (Tanh(), 1)))
        >>> phi(torch.tensor([-1.0, 2.0, 0.0]))
        tensor([0., 2., 0.])
    """

    parts: tuple[tuple[Activation, int], ...]
    _runs: ClassVar[tuple[tuple[Activation, int], ...]]

    def __post_init__(self) -> None:
        flat: list[tuple[Activation, int]] = []
        for phi, n in self.parts:
            if not isinstance(phi, Activation):
                raise TypeError(f"Blocks: got {phi!r} in parts, expected an Activation")
            if type(n) is not int or n < 1:
                raise ValueError(f"Blocks: got size {n!r} for {phi}, expected a positive integer")
            if isinstance(phi, Blocks) and phi.size != n:
                raise ValueError(f"Blocks: a nested part of {phi.size} states got size {n}")
            if phi.size not in (None, n):
                raise ValueError(f"Blocks: {phi} is for {phi.size} states, got size {n}")
            flat.extend(phi.parts if isinstance(phi, Blocks) else [(phi, n)])
        if not flat:
            raise ValueError("Blocks: got no parts, expected at least one (activation, size)")
        object.__setattr__(self, "parts", tuple(flat))
        # Equal neighbours are evaluated together, for fewer kernels, where phi is entrywise.
        runs: list[tuple[Activation, int]] = []
        for phi, n in flat:
            if runs and phi.entrywise and runs[-1][0] == phi:
                runs[-1] = (phi, runs[-1][1] + n)
            else:
                runs.append((phi, n))
        object.__setattr__(self, "_runs", tuple(runs))

    @classmethod
    def of(cls, phi: Activation, n: int) -> "Blocks":
        """phi on all n states."""
        return cls(parts=((phi, n),))

    @property
    def size(self) -> int:
        """The number of states."""
        return sum(n for _, n in self.parts)

    def blocks(self, n: int) -> tuple[tuple[Activation, int], ...]:
        """The parts."""
        if n != self.size:
            raise ValueError(f"Blocks: got {n} states, expected {self.size}, the sum of its parts")
        return self.parts

    @property
    def slope(self) -> tuple[float, float]:
        return _hull(phi.slope for phi, _ in self.parts)

    @property
    def range(self) -> tuple[float, float]:
        return _hull(phi.range for phi, _ in self.parts)

    @property
    def infinity_lipschitz(self) -> float:
        return max(phi.infinity_lipschitz for phi, _ in self.parts)

    @property
    def cheap_prox(self) -> bool:
        return all(phi.cheap_prox for phi, _ in self.parts)

    @property
    def homogeneous(self) -> bool:
        return all(phi.homogeneous for phi, _ in self.parts)

    @property
    def linear(self) -> bool:
        return all(phi.linear for phi, _ in self.parts)

    @property
    def entrywise(self) -> bool:
        return all(phi.entrywise for phi, _ in self.parts)

    @property
    def curvature(self) -> float:
        return max(phi.curvature for phi, _ in self.parts)

    @property
    def isotone(self) -> bool:
        return all(phi.isotone for phi, _ in self.parts)

    @property
    def symmetric(self) -> bool:
        return all(phi.symmetric for phi, _ in self.parts)

    def _split(self, *tensors: Tensor) -> Iterable[tuple[Any, ...]]:
        """(phi, its slice of each tensor) for each run."""
        phis, sizes = zip(*self._runs, strict=True)
        for tensor in tensors:
            if tensor.shape[-1:] != (self.size,):
                raise ValueError(
                    f"Blocks: got shape {tuple(tensor.shape)}, expected a last dimension of "
                    f"{self.size} = {' + '.join(str(n) for _, n in self.parts)}"
                )
        return zip(phis, *(tensor.split(list(sizes), -1) for tensor in tensors), strict=True)

    def __call__(self, z: Tensor) -> Tensor:
        return _cat([phi(zi) for phi, zi in self._split(z)])

    def call_(self, z: Tensor) -> Tensor:
        for phi, zi in self._split(z):
            phi.call_(zi)
        return z

    def derivative(self, z: Tensor) -> Tensor:
        return _cat([phi.derivative(zi) for phi, zi in self._split(z)])

    def derivative_at(self, x: Tensor) -> Tensor | None:
        parts = [phi.derivative_at(xi) for phi, xi in self._split(x)]
        return None if any(part is None for part in parts) else _cat(parts)

    def product(self, d: Tensor, w: Tensor) -> Tensor:
        return _cat([phi.product(di, wi) for phi, di, wi in self._split(d, w)])

    def potential(self, z: Tensor) -> Tensor:  # one entry for a whole softmax, else one a state
        return _cat([phi.potential(zi) for phi, zi in self._split(z)])

    def conjugate(self, x: Tensor) -> Tensor:
        return _cat([phi.conjugate(xi) for phi, xi in self._split(x)])

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        return sum(phi.divergence(xi, zi) for phi, xi, zi in self._split(x, z))

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        self._check_prox(t)
        if isinstance(t, Tensor) and t.shape[-1:] == v.shape[-1:]:  # a step for each state
            return _cat([phi.prox(vi, ti) for phi, vi, ti in self._split(v, t)])
        return _cat([phi.prox(vi, t) for phi, vi in self._split(v)])

    def to_config(self) -> dict[str, Any]:
        return {"name": "Blocks", "parts": [[phi.to_config(), n] for phi, n in self.parts]}


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, -1)


def _hull(intervals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    lows, highs = zip(*intervals, strict=True)
    return (min(lows), max(highs))
