"""Sets made of sets: Minkowski sums, intersections, linear images."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..convex import Cones
from .base import UncertaintySet, shared, tensor
from .conic import Conic, wide


@dataclass(frozen=True, kw_only=True, eq=False)
class _OfParts(UncertaintySet):
    """What sets have in common that are made of others of one dimension."""

    parts: tuple[UncertaintySet, ...]
    own: ClassVar[dict[str, int]] = {}

    def __post_init__(self) -> None:
        if not self.parts or not all(isinstance(p, UncertaintySet) for p in self.parts):
            raise TypeError(f"parts: got {self.parts!r}, expected uncertainty sets.")
        sizes = [p.dimension for p in self.parts]
        if len(set(sizes)) > 1:
            raise ValueError(f"parts: got sets of dimensions {sizes}, expected one dimension.")

    @property
    def dimension(self) -> int:
        return self.parts[0].dimension


@dataclass(frozen=True, kw_only=True, eq=False)
class Sum(_OfParts):
    """{z_1 + ... + z_p : z_i in U_i}, with h = h_1 + ... + h_p.

    Args:
        parts: U_1, ..., U_p, of one dimension.
    """

    def members(self) -> Conic:
        # z and z_1, ..., z_{p-1}; the last is what is left.
        p, eye = len(self.parts), _eye(self)
        zero = torch.zeros_like(eye)
        own = [wide([eye if j == i + 1 else zero for j in range(p)]) for i in range(p - 1)]
        last = wide([eye, *[-eye] * (p - 1)])
        pairs = zip(self.parts, [*own, last], strict=True)
        return Conic.meet([part.members().pulled(M) for part, M in pairs]).hidden(
            (p - 1) * self.dimension
        )

    def epigraph(self) -> Conic:
        return self.widened().counterpart(1)

    def counterpart(self, m: int) -> Conic:
        self._fits_rows(m)
        # t_1, ..., t_{p-1}, m each, are ours; the last is what is left of t.
        k, p = self.dimension, len(self.parts)
        wide_eye = torch.eye(k + m * p, dtype=self.dtype, device=self.device)
        v, ts = wide_eye[:k], wide_eye[k:].split(m)
        last = ts[0] - sum(ts[1:], torch.zeros_like(ts[0]))
        pairs = zip(self.parts, [*ts[1:], last], strict=True)
        out = [part.counterpart(m).pulled(torch.cat([v, t])) for part, t in pairs]
        return Conic.meet(out).hidden(m * (p - 1))

    def _support(self, v: Tensor) -> Tensor:
        out = self.parts[0]._support(v)
        for part in self.parts[1:]:
            out = out + part._support(v)
        return out

    def _worst(self, v: Tensor) -> Tensor:
        out = self.parts[0]._worst(v)
        for part in self.parts[1:]:
            out = out + part._worst(v)
        return out

    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        # Independent for each set of the batch, also where a part is shared by all.
        draws = [p.expand(*self.lead).sample(n, generator=generator) for p in self.parts]
        return torch.stack(draws).sum(0)

    def _scaled(self, r: Tensor) -> "Sum":
        return Sum(parts=tuple(r * part for part in self.parts))

    def _moved(self, shift: Tensor) -> "Sum":
        return Sum(parts=(self.parts[0] + shift, *self.parts[1:]))

    def blocks(self, m: int) -> "Sum":
        return Sum(parts=tuple(part.blocks(m) for part in self.parts))

    def _summands(self) -> tuple[UncertaintySet, ...]:
        return self.parts


@dataclass(frozen=True, kw_only=True, eq=False)
class Intersection(_OfParts):
    """{z : z in every U_i}, with h(v) = inf of h_1(v_1) + ... + h_p(v_p) over v_1 + ... + v_p = v.

    The formula asks for a point inside all sets that are not polyhedral (Rockafellar 1970, corollary
    16.4.1): sets that only touch are reported as not solved, or bounded from above.

    Args:
        parts: U_1, ..., U_p, of one dimension.
    """

    def members(self) -> Conic:
        return Conic.meet([part.members() for part in self.parts])

    def epigraph(self) -> Conic:
        # (v, t) and (v_i, t_i) of all but the last part, which takes what is left.
        p, k = len(self.parts), self.dimension + 1
        eye = torch.eye(k * p, dtype=self.dtype, device=self.device)
        own = eye.split(k)
        last = own[0] - sum(own[1:], torch.zeros_like(own[0]))
        pairs = zip(self.parts, [*own[1:], last], strict=True)
        return Conic.meet([part.epigraph().pulled(M) for part, M in pairs]).hidden(k * (p - 1))

    def _excess(self, z: Tensor) -> Tensor:
        out = self.parts[0]._excess(z)
        for part in self.parts[1:]:
            out = torch.maximum(out, part._excess(z))
        return out

    def require_nonempty(self) -> None:
        zero = torch.zeros(self.dimension, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            if not bool(self.contains(zero, 0.0).all()):
                self._solved(zero)

    def _scaled(self, r: Tensor) -> UncertaintySet:
        # r (U & V) = r U & r V also for r = 0, where both are the origin, unless a part is unbounded.
        return Intersection(parts=tuple(r * part for part in self.parts))

    def _moved(self, shift: Tensor) -> "Intersection":
        return Intersection(parts=tuple(part + shift for part in self.parts))

    def _factors(self) -> tuple[UncertaintySet, ...]:
        return self.parts


@dataclass(frozen=True, kw_only=True, eq=False)
class Image(UncertaintySet):
    """{shift + factor * matrix z : z in U}, with h(v) = shift'v + factor h_U(matrix'v).

    Args:
        of: U, of dimension r.
        matrix: None for the identity.  # (..., k, r)
        factor: >= 0; None for 1.  # (...)
        shift: None for 0.  # (..., k)
    """

    of: UncertaintySet
    matrix: Tensor | None = None
    factor: Tensor | None = None
    shift: Tensor | None = None
    own: ClassVar[dict[str, int]] = {"matrix": 2, "factor": 0, "shift": 1}

    def __post_init__(self) -> None:
        if self.matrix is not None:
            r = tensor("M", self.matrix, 2, "(..., k, r)").shape[-1]
            if r != self.of.dimension:
                raise ValueError(
                    f"M @ U: got M of shape {tuple(self.matrix.shape)}, expected "
                    f"(..., k, {self.of.dimension}), the dimension of the {type(self.of).__name__}."
                )
        if self.shift is not None:
            tensor("shift", self.shift, 1, "(..., k)")
        self.lead  # noqa: B018 (the leading dimensions must broadcast)

    @property
    def dimension(self) -> int:
        return self.of.dimension if self.matrix is None else self.matrix.shape[-2]

    def members(self) -> Conic:
        # z = shift + factor * matrix z'
        k, r = self.dimension, self.of.dimension
        eye = torch.eye(k, dtype=self.dtype, device=self.device)
        M = (
            torch.eye(r, dtype=self.dtype, device=self.device)
            if self.matrix is None
            else self.matrix
        )
        if self.factor is not None:
            M = self.factor[..., None, None] * M
        inner = self.of.members()
        inner = inner.pulled(torch.cat([eye.new_zeros(r, k), eye.new_ones(r).diag()], 1))
        tie = Conic.of(
            Cones(0), eye.new_zeros(0, k + r), A=wide([eye, -M]),
            b=eye.new_zeros(k) if self.shift is None else self.shift,
        )  # fmt: skip
        return Conic.meet([inner, tie]).hidden(r)

    def epigraph(self) -> Conic:
        return self.widened().counterpart(1)

    def counterpart(self, m: int) -> Conic:
        self._fits_rows(m)
        k = self.dimension
        zero = torch.zeros(k, dtype=self.dtype, device=self.device)
        shift = zero if self.shift is None else self.shift
        factor = zero.new_ones(()) if self.factor is None else self.factor
        each = self.of.lead[-1:] == (m,) or (
            self.matrix is not None and self.matrix.shape[:-2][-1:] == (m,)
        )
        if not each or m == 1:
            # One (v, s) with h_U(matrix'v) <= s for all rows.
            inner, M = self.of, self.matrix
            e = inner.epigraph()
            if inner.lead:
                e = e.spread()
            if M is not None and M.dim() > 2:
                M = M.squeeze(-3)
            return shared(e if M is None else e.pulled(_beside(M.mT)), shift, factor, m)
        e = self.of.epigraph()
        if self.matrix is not None:
            e = e.pulled(_beside(self.matrix.mT))
        # (v, t, s): h_U(matrix'v) <= s and shift'v + factor s <= t
        rows = [shift, -zero.new_ones(1), factor[..., None]]
        lead = torch.broadcast_shapes(*(t.shape[:-1] for t in rows))
        G = torch.cat([t.expand(*lead, t.shape[-1]) for t in rows], -1)[..., None, :]
        head = torch.eye(k + 1, k + 2, dtype=self.dtype, device=self.device)
        head[k] = head[k].roll(1)
        both = Conic.meet([e.pulled(head), Conic.of(Cones(1), G)]).hidden(1)
        return both.expanded(self.lead).spread()

    def _support(self, v: Tensor) -> Tensor:
        out = self.of._support(self._pulled(v))
        if self.factor is not None:
            # 0 times an unbounded set is the origin
            out = self.factor * torch.where((self.factor == 0) & torch.isinf(out), 0.0, out)
        return out if self.shift is None else out + (self.shift * v).sum(-1)

    def _worst(self, v: Tensor) -> Tensor:
        z = self.of._worst(self._pulled(v))
        return self._pushed(z)

    def _pulled(self, v: Tensor) -> Tensor:
        return v if self.matrix is None else (self.matrix.mT @ v[..., None])[..., 0]

    def _pushed(self, z: Tensor) -> Tensor:
        if self.matrix is not None:
            z = (self.matrix @ z[..., None])[..., 0]
        if self.factor is not None:
            z = self.factor[..., None] * z
        return z if self.shift is None else z + self.shift

    def _excess(self, z: Tensor) -> Tensor:
        if self.matrix is not None or (self.factor is not None and bool((self.factor == 0).any())):
            return super()._excess(z)
        if self.shift is not None:
            z = z - self.shift
        if self.factor is None:
            return self.of._excess(z)
        return self.factor * self.of._excess(z / self.factor[..., None])

    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self._pushed(self.of.expand(*self.lead).sample(n, generator=generator))

    def _scaled(self, r: Tensor) -> "Image":
        return Image(
            of=self.of, matrix=self.matrix, factor=r if self.factor is None else r * self.factor,
            shift=None if self.shift is None else r[..., None] * self.shift,
        )  # fmt: skip

    def _moved(self, shift: Tensor) -> "Image":
        return Image(
            of=self.of, matrix=self.matrix, factor=self.factor,
            shift=shift if self.shift is None else self.shift + shift,
        )  # fmt: skip


def _eye(U: UncertaintySet) -> Tensor:
    return torch.eye(U.dimension, dtype=U.dtype, device=U.device)


def _beside(M: Tensor) -> Tensor:
    """M with one more coordinate, which it keeps."""
    out = torch.nn.functional.pad(M, (0, 1, 0, 1))
    corner = torch.zeros(out.shape[-2:], dtype=M.dtype, device=M.device)
    corner[-1, -1] = 1.0
    return out + corner
