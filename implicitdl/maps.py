"""Maps z -> f(z) whose rows are independent samples, and what a solver may ask of them.

A solver is given rows z  # (m, n)  and asks a map for three things:

    f(z, out=None)          the values                                    # (m, n)
    f.linearize(z)          J = df/dz at z, row by row: `jvp`, `vjp`, `dense`
    f.select(index)         the same map for some of the rows, or None where that cannot be had

`AffineMap` is the one with structure, x = phi(A x + v): linearising it costs nothing, its adjoint
is another AffineMap, and it carries the facts that solvers choose by. What a solver computes from A
alone (`Factors`) is shared by the solve, its adjoint and its tangents.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .activations import Activation


def inside_transform() -> bool:
    """Whether a torch.func transform is at work, which hides values."""
    return torch._C._are_functorch_transforms_active()


@dataclass(frozen=True, kw_only=True)
class Scaled(Activation, register=False):
    """The linear activation w -> P_d w, the Jacobian of `phi` at a point where it is d.

    It turns a linearised equilibrium back into an equilibrium, w = P_d (A w + c), so that the
    adjoint and the tangent of a solve are solved by the same code as the solve itself. `d` has one
    row a sample, so it belongs to the rows it was made from.
    """

    phi: Activation
    d: Tensor  # (m, n)
    _shrink: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def slope(self) -> tuple[float, float]:  # type: ignore[override]
        """The range of `phi` itself: d was drawn from it."""
        return self.phi.slope

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        """Whether P_d is diagonal."""
        return self.phi.entrywise

    @property
    def cheap_prox(self) -> bool:  # type: ignore[override]
        """Where P_d is diagonal."""
        return self.phi.entrywise

    homogeneous = True
    linear = True

    def __call__(self, z: Tensor) -> Tensor:
        return self.phi.product(self.d, z)

    def call_(self, z: Tensor) -> Tensor:
        """P_d z, in place where P_d is diagonal."""
        return z.mul_(self.d) if self.entrywise else z.copy_(self.phi.product(self.d, z))

    def derivative(self, z: Tensor) -> Tensor:
        """d, wherever: the map is linear."""
        return self.d

    def derivative_at(self, x: Tensor) -> Tensor:
        """d, wherever."""
        return self.d

    def product(self, d: Tensor, w: Tensor) -> Tensor:
        """P_d w."""
        return self.phi.product(d, w)

    def prox(self, v: Tensor, t: float | Tensor = 1.0) -> Tensor:
        """argmin_x t (x^2/d - x^2)/2 + (x - v)^2/2 = v d / (d + t (1 - d)), for d in [0, 1]."""
        if t not in self._shrink:  # every step of a splitting asks for the same
            self._shrink[t] = self.d / (self.d + t * (1 - self.d))
        return v * self._shrink[t]

    def rows(self, index: Tensor) -> "Scaled":
        """The same for some of the samples."""
        return replace(self, d=self.d[index], _shrink={})


class Dominant(NamedTuple):
    """A = U V^T + E with U the direction that A maps to most, as far as a few products find it.

    V = A^T U, so that E = (I - U U^T) A: for an A of rank one E is zero. The estimates are no
    bounds: solvers choose by them, nothing is certified by them.
    """

    U: Tensor  # (n,) of length one
    V: Tensor  # (n,)
    UV: Tensor  # (n,) U_i V_i
    rate: float  # ||A w|| / ||w|| after two steps of the power method: about A's spectral radius
    rest: float  # ||E w|| / ||w|| at a w orthogonal to U: about that of E
    spread: float  # sum |U_i V_i| >= |V^T D U| for every diagonal D with entries in [-1, 1]


class Factors:
    """What solvers compute from A alone: found when first asked for, and kept.

    `mT` is the same for A^T, as the adjoint equation needs it, and shares the inverses.
    """

    def __init__(self, A: Tensor, partner: "Factors | None" = None):
        self.A, self._version = A, _version(A)
        self._partner = partner
        self._first: Tensor | None = None
        self._gain: float | None = None
        self._dominant: dict[bool, Dominant] = {}  # quick or not
        self._norm: float | None = None
        self._inverse: dict[float, Tensor] = {}

    def of(self, A: Tensor) -> bool:
        """Whether they are those of A as it is now: the same memory, not written to since."""
        own = self.A
        if own is not A and inside_transform():  # memory is not to be looked at there
            return False
        same = own is A or (
            own.data_ptr() == A.data_ptr() and (own.shape, own.stride()) == (A.shape, A.stride())
        )
        return same and self._version == _version(A)

    @property
    def mT(self) -> "Factors":
        """The factors of A^T."""
        if self._partner is None:
            self._partner = Factors(self.A.mT, self)
        return self._partner

    def gain(self) -> float:
        """||A p|| / ||p|| for a probe p with some of every direction: one product."""
        if self._gain is None:
            p, size = _probe(self.A.shape[0], self.A.dtype, self.A.device)
            self._first = torch.mv(self.A, p)
            self._gain = float(torch.linalg.vector_norm(self._first)) / size
        return self._gain

    def dominant(self, quick: bool = False) -> Dominant:
        """Three steps of the power method, a product with A^T, and one with what is left.

        Args:
            quick: two steps and no product with what is left, of which the probe then has to tell:
                for few samples, where such a product costs as much as one with all of them.
        """
        if False in self._dominant:  # the better one
            return self._dominant[False]
        if quick not in self._dominant:
            A = self.A
            tiny = torch.finfo(A.dtype).tiny
            first = self._first
            if first is None:
                first = torch.mv(A, _probe(A.shape[0], A.dtype, A.device)[0])
            w, size = first, torch.linalg.vector_norm(first)
            for _ in range(1 if quick else 2):
                w = torch.mv(A, w / size.clamp_min(tiny))
                size = torch.linalg.vector_norm(w)
            U = w
            U = U / size.clamp_min(tiny)
            V = torch.mv(A.mT, U)
            UV = U * V
            # Of the first iterate, what U does not explain holds all the other directions.
            w = torch.addcmul(first, U, torch.dot(U, first), value=-1)
            if quick:  # E p, and what p has besides its mean
                after, w = w, _probe(A.shape[0], A.dtype, A.device)[0]
                w = w - w.mean()
            else:
                after = torch.addcmul(torch.mv(A, w), U, torch.dot(V, w), value=-1)
            sizes = [torch.linalg.vector_norm(t) for t in (first, w, after)]
            sizes = [size, *sizes, torch.linalg.vector_norm(UV, 1)]
            rate, whole, before, rest, spread = torch.stack(sizes).tolist()
            # What rounding leaves of an exact eigenvector says nothing about the rest.
            noise = 10 * torch.finfo(A.dtype).eps * whole
            rest = rest / before if before > noise else 0.0
            self._dominant[quick] = Dominant(U, V, UV, rate, rest, spread)
        return self._dominant[quick]

    def norm(self) -> float:
        """||I - A||_2 from below, by the power method."""
        if self._norm is None:
            A = self.A
            w, _ = _probe(A.shape[0], A.dtype, A.device)
            for _ in range(3):
                w = w / torch.linalg.vector_norm(w).clamp_min(torch.finfo(A.dtype).tiny)
                last = w = w - torch.mv(A, w)
                w = w - torch.mv(A.mT, w)
            self._norm = float(torch.linalg.vector_norm(last))
        return self._norm

    def resolvent(self, alpha: float) -> Tensor:
        """(I + alpha (I - A))^-1, for I - A monotone and alpha > 0.  # (n, n)"""
        if alpha not in self._inverse:
            if self._partner is not None and alpha in self._partner._inverse:
                self._inverse[alpha] = self._partner._inverse[alpha].mT
            else:
                eye = torch.eye(self.A.shape[0], dtype=self.A.dtype, device=self.A.device)
                self._inverse[alpha] = monotone_inverse((1 + alpha) * eye - alpha * self.A)
        return self._inverse[alpha]


@functools.lru_cache(maxsize=64)
def _probe(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, float]:
    """A vector with some of every direction, and most of the Perron vector of an A >= 0; and its
    length."""
    uniform = np.random.default_rng(0).random(n)  # torch's would not be drawn under vmap
    with torch.inference_mode(False):
        probe = (0.5 + uniform) / n**0.5
        return torch.from_numpy(probe).to(device, dtype), float(np.linalg.norm(probe))


def _version(A: Tensor) -> int | None:
    return None if A.is_inference() else A._version


def monotone_inverse(M: Tensor) -> Tensor:
    """M^-1 for M with a positive definite symmetric part, by halves.

    Every Schur complement then is positive definite too, so no pivots are needed, and most of the
    work is in products, which are several times faster than an LU with its solves.

    Reference: Golub, Van Loan (1979), "Unsymmetric positive definite linear systems".
    """
    n = M.shape[0]
    if n <= 96:
        return torch.linalg.inv(M)
    h = n // 2
    P = monotone_inverse(M[:h, :h])
    QP = M[h:, :h] @ P
    S = monotone_inverse(torch.addmm(M[h:, h:], QP, M[:h, h:], alpha=-1))
    PR = P @ M[:h, h:]
    out = torch.empty_like(M)
    out[h:, h:] = S
    torch.mm(S, QP, out=out[h:, :h]).neg_()
    torch.mm(PR, S, out=out[:h, h:]).neg_()
    torch.addmm(P, PR, out[h:, :h], alpha=-1, out=out[:h, :h])
    return out


def times(rows: Tensor, M: Tensor) -> Tensor:
    """Each row times M, or times that of its group of consecutive rows.  # M (n, n) or (k, n, n)"""
    if M.dim() == 2:
        return rows @ M
    return (rows.reshape(M.shape[0], -1, M.shape[-1]) @ M).view_as(rows)


@dataclass(frozen=True, eq=False)
class AffineMap:
    """f(z) = phi(z A^T + v), one sample a row: the implicit model with its input folded into v.

    Attributes:
        A: the weight, one for all samples  # (n, n), or one for each of k groups of consecutive
            samples  # (k, n, n) with m a multiple of k.
        v: B u + b.  # (m, n)
        phi: the activation.
        contraction: a certified factor of f in some norm, if there is one.
        monotone: a certified m > 0 with (A + A^T)/2 <= (1 - m) I, if there is one.
        acyclic: A is strictly triangular up to a permutation, so that n steps are exact.
        factors: what was computed from A before, where A is one matrix.
    """

    A: Tensor
    v: Tensor
    phi: Activation
    contraction: float | None = None
    monotone: float | None = None
    acyclic: bool = False
    factors: Factors | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.A.dim() == 2 and (self.factors is None or not self.factors.of(self.A)):
            object.__setattr__(self, "factors", Factors(self.A))
        object.__setattr__(self, "_At", self.A.mT)

    def affine(self, z: Tensor, out: Tensor | None = None) -> Tensor:
        """z A^T + v.  # (m, n) -> (m, n)"""
        At = self._At  # type: ignore[attr-defined]
        if At.dim() == 2:
            return torch.addmm(self.v, z, At, out=out)
        result = self.v + times(z, At)
        return result if out is None else out.copy_(result)

    def __call__(self, z: Tensor, out: Tensor | None = None) -> Tensor:
        s = self.affine(z, out)
        # In place only where no graph is recorded.
        if out is not None or not torch.is_grad_enabled():
            return self.phi.call_(s)
        return self.phi(s)

    def start(self) -> Tensor:
        """Where to start when nothing is known: phi(v)."""
        return self.phi(self.v)

    def linearize(self, z: Tensor) -> "LinearizedAffine":
        """J = P_d A with d = phi'(z A^T + v)."""
        return LinearizedAffine(self.A, self.phi, self.phi.derivative(self.affine(z)))

    def select(self, index: Tensor) -> "AffineMap | None":
        """The map of some of the samples; None where A differs between samples."""
        if self.A.dim() != 2:
            return None
        return replace(self, v=self.v[index], phi=self.phi.rows(index))


@dataclass(frozen=True, eq=False)
class LinearizedAffine:
    """J = P_d A."""

    A: Tensor
    phi: Activation
    d: Tensor

    def jvp(self, w: Tensor) -> Tensor:
        """P_d A w."""
        return self.phi.product(self.d, times(w, self.A.mT))

    def vjp(self, w: Tensor) -> Tensor:
        """A^T P_d w."""
        return times(self.phi.product(self.d, w), self.A)

    def dense(self) -> Tensor:
        """P_d A, a matrix a sample.  # (m, n, n)"""
        m, n = self.d.shape
        A = (
            self.A.expand(m, n, n)
            if self.A.dim() == 2
            else (self.A.repeat_interleave(m // self.A.shape[0], dim=0))
        )
        if self.phi.entrywise:
            return self.d[..., None] * A
        return self.phi.product(self.d[:, None], A.mT).mT


@dataclass(frozen=True, eq=False)
class RowMap:
    """Any callable (batch, *) -> (batch, *) with independent rows, seen as rows of one length."""

    f: Callable[[Tensor], Tensor]
    shape: torch.Size
    contraction: float | None = None
    monotone: None = None
    acyclic: bool = False

    @staticmethod
    def of(f: "Callable[[Tensor], Tensor] | RowMap", shape: torch.Size, *facts: Any) -> "RowMap":
        """f as rows, unless it is that already."""
        return f if isinstance(f, RowMap) else RowMap(f, shape, *facts)

    def __call__(self, z: Tensor, out: Tensor | None = None) -> Tensor:
        # Rows or the caller's own shape: the solvers use one, the chord steps the other.
        before = _version(z)
        out = self.f(z.reshape(self.shape))
        if _version(z) != before:
            raise ValueError(
                "f wrote into its argument, expected it to leave z alone: a solver compares f(z) "
                "with z. Use out-of-place operations (inplace=False in torch.nn modules)."
            )
        return out.reshape(z.shape)

    def linearize(self, z: Tensor, graph: tuple[Tensor, Tensor] | None = None) -> "LinearizedRows":
        """J by automatic differentiation."""
        return LinearizedRows(self, z, graph)

    def select(self, index: Tensor) -> None:
        """A closure is bound to its batch: it has no smaller one."""
        return


class LinearizedRows:
    """J of a callable at a constant z: a recorded graph, used as often as asked for.

    Args:
        f: the callable.
        z: where.  # (m, n)
        graph: a leaf z and f there, recorded before, in any shape; else f is evaluated.
    """

    def __init__(self, f: RowMap, z: Tensor, graph: tuple[Tensor, Tensor] | None = None):
        with torch.enable_grad():
            if graph is None:
                self.z = z.detach().requires_grad_()
                self.value = f(self.z)
            else:
                self.z, value = graph
                self.value = value.reshape(z.shape)
        self.shape = z.shape
        self._jvp: tuple[Tensor, Tensor] | None = None

    def vjp(self, w: Tensor) -> Tensor:
        """J^T w."""
        if not self.value.requires_grad:  # f does not depend on z at all
            return torch.zeros_like(w)
        (out,) = torch.autograd.grad(
            self.value, self.z, w, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return out.reshape(self.shape)

    def jvp(self, w: Tensor) -> Tensor:
        """J w: the vjp of the vjp, which is linear in its cotangent; its graph is kept."""
        if not self.value.requires_grad:
            return torch.zeros_like(w)
        if self._jvp is None:
            with torch.enable_grad():
                cotangent = torch.zeros_like(self.value).requires_grad_()
                (product,) = torch.autograd.grad(
                    self.value, self.z, cotangent, create_graph=True, allow_unused=True,
                    materialize_grads=True,
                )  # fmt: skip
            self._jvp = cotangent, product
        cotangent, product = self._jvp
        if not product.requires_grad:  # f does not depend on z at all
            return torch.zeros_like(w)
        (out,) = torch.autograd.grad(
            product, cotangent, w, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return out

    def dense(self) -> Tensor:
        """J, column by column.  # (m, n, n)"""
        eye = torch.eye(self.shape[1], dtype=self.z.dtype, device=self.z.device)
        return torch.stack([self.jvp(e.expand(self.shape)) for e in eye], dim=-1)


@dataclass(frozen=True, eq=False)
class LinearRows:
    """u -> op(u) + b, rows independent, with the transposed operator known: an adjoint equation."""

    op: Callable[[Tensor], Tensor]
    transposed_op: Callable[[Tensor], Tensor]
    b: Tensor
    contraction: float | None = None
    monotone: None = None
    acyclic: bool = False

    def __call__(self, z: Tensor, out: Tensor | None = None) -> Tensor:
        return self.op(z) + self.b

    def linearize(self, z: Tensor) -> "LinearRows":
        """The operator itself, everywhere."""
        return self

    def jvp(self, w: Tensor) -> Tensor:
        """op(w)."""
        return self.op(w)

    def vjp(self, w: Tensor) -> Tensor:
        """op^T(w)."""
        return self.transposed_op(w)

    def dense(self) -> Tensor:
        """The matrix, column by column.  # (m, n, n)"""
        eye = torch.eye(self.b.shape[1], dtype=self.b.dtype, device=self.b.device)
        return torch.stack([self.op(e.expand_as(self.b).contiguous()) for e in eye], dim=-1)

    def select(self, index: Tensor) -> None:
        """The operator is bound to its batch."""
        return
