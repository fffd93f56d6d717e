"""What every uncertainty set is: a support function, with a conic description behind it.

    h_U(v) = max over z in U of v'z

A constraint (a + z)'x <= b holds for all z in U exactly where a'x + h_U(x) <= b: programs, radii and
worst cases read nothing else of a set.
"""

import abc
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..convex import Cones
from ..solution import InfeasibleError, Solution, Status
from .conic import Conic


class UncertaintySet(abc.ABC):
    """A closed convex set U in R^k, or a batch of them, that can be learned.

    Sets are immutable, made of tensors whose leading dimensions broadcast; every result is
    differentiable with respect to them. Their algebra: `U + V` (Minkowski sum), `U + shift`,
    `r * U` with r >= 0, `M @ U` (linear image), `U & V` (intersection).

    A new kind of set is a frozen dataclass that names its tensors and says how many dimensions each
    has of its own in `own`, and gives `dimension` and `members`; all the rest follows, by the native
    solver where no closed form is written.
    """

    own: ClassVar[dict[str, int]] = {}

    @property
    @abc.abstractmethod
    def dimension(self) -> int:
        """k, the length of its vectors."""

    @abc.abstractmethod
    def members(self) -> Conic:
        """The set itself, in cones."""

    def epigraph(self) -> Conic:
        """{(v, t): h_U(v) <= t}, in cones."""
        return self.members().dual()

    # ---- the support function ----------------------------------------------------------------

    def support(self, v: Tensor) -> Tensor:
        """h_U(v) = max over z in U of v'z.  # (..., k) -> (...)

        Args:
            v: its leading dimensions broadcast against those of the set.

        Returns:
            The value, infinite where the set is unbounded along v. The gradient with respect to v is
            `worst(v)`.

        Raises:
            InfeasibleError: the set is empty.
        """
        v = self._checked("v", v)
        return self.to(v)._support(v)

    def worst(self, v: Tensor) -> Tensor:
        """A member that attains h_U(v): the data an adversary would choose.  # (..., k) -> (..., k)

        Where several do, one of them; for v = 0 the centre of a set that has one.

        Raises:
            InfeasibleError: the set is empty, or unbounded along v.
        """
        v = self._checked("v", v)
        return self.to(v)._worst(v)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest box around the set: low and high.  # (*lead, k) each"""
        eye = torch.eye(self.dimension, dtype=self.dtype, device=self.device)
        eye = eye.reshape(self.dimension, *(1,) * len(self.lead), self.dimension)
        return -self.support(-eye).movedim(0, -1), self.support(eye).movedim(0, -1)

    # ---- members -----------------------------------------------------------------------------

    def contains(self, z: Tensor, tol: float = 1e-6) -> Tensor:
        """Whether z is a member, up to tol in the set's own inequalities.  # (..., k) -> (...) bool

        Args:
            z: # (..., k)
            tol: for a set without a formula of its own, the largest entry of the distance.
        """
        z = self._checked("z", z)
        with torch.no_grad():
            return self.to(z)._excess(z) <= tol

    def sample(
        self, n: int, *, boundary: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """n members, to attack with.  # (n, *lead, k)

        Uniform for a `Box`, a `Ball` and a square `Ellipsoid`; of other sets, points between two that
        are worst for random directions.

        Args:
            n: how many.
            boundary: members that are worst for some direction.
            generator: of the random numbers.
        """
        if type(n) is not int or n < 0:
            raise ValueError(f"n: got {n!r}, expected an integer >= 0.")
        with torch.no_grad():
            if boundary:
                return self.worst(self._normal(n, generator))
            here: UncertaintySet = self.to(torch.empty((), dtype=self.dtype, device=self.device))
            return here._sample(n, generator)

    # ---- algebra -----------------------------------------------------------------------------

    def __add__(self, other: "UncertaintySet | Tensor") -> "UncertaintySet":
        from .combined import Sum

        if isinstance(other, UncertaintySet):
            return Sum(parts=(*self._summands(), *other._summands()))
        if isinstance(other, Tensor):
            return self._moved(self._checked("shift", other))
        return NotImplemented

    __radd__ = __add__

    def __mul__(self, r: "float | Tensor") -> "UncertaintySet":
        if not isinstance(r, int | float | Tensor):
            return NotImplemented
        dtype = _promoted(self._dtypes()) or torch.float64
        r = torch.as_tensor(r, dtype=dtype, device=self.device)
        if not bool((r >= 0).all() & torch.isfinite(r).all()):
            raise ValueError(
                f"r * U: got {float(r.min()):.6g} among r, expected finite numbers >= 0; "
                "`-torch.eye(k) @ U` mirrors a set."
            )
        return self._scaled(r)

    __rmul__ = __mul__

    def __rmatmul__(self, M: Tensor) -> "UncertaintySet":
        from .combined import Image

        return Image(of=self, matrix=M)

    def __and__(self, other: "UncertaintySet") -> "UncertaintySet":
        from .combined import Intersection

        if not isinstance(other, UncertaintySet):
            return NotImplemented
        return Intersection(parts=(*self._factors(), *other._factors()))

    def blocks(self, m: int) -> "UncertaintySet":
        """The projections on m equal runs of coordinates, as a batch.  # lead (*lead, m)

        The rows of a matrix whose entries, row by row, are in the set.
        """
        k = self._block_size(m)
        eye = torch.eye(m * k, dtype=self.dtype, device=self.device).reshape(m, k, m * k)
        return eye @ self.widened()

    # ---- for cvxpy ---------------------------------------------------------------------------

    def as_cvxpy(self, z: Any) -> list[Any]:
        """The cvxpy constraints that put z into the set, of constant data."""
        return self.members().as_cvxpy(z)

    def support_cvxpy(self, v: Any) -> tuple[Any, list[Any]]:
        """A cvxpy variable t and the constraints that make it at least h_U(v), v affine."""
        import cvxpy as cp

        t = cp.Variable()
        return t, self.epigraph().as_cvxpy(cp.hstack([v, t]))

    # ---- tensors -----------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.own if getattr(self, name) is not None}

    def _children(self) -> "list[UncertaintySet]":
        out: list[UncertaintySet] = []
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, UncertaintySet):
                out.append(value)
            elif isinstance(value, tuple):
                out.extend(value)
        return out

    def _mapped(self, change: Any, inner: Any) -> Any:
        """The same set with its tensors and the sets that it is made of changed."""
        new: dict[str, Any] = {
            name: change(t, self.own[name]) for name, t in self._tensors().items()
        }
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, UncertaintySet):
                new[f.name] = inner(value)
            elif isinstance(value, tuple):
                new[f.name] = tuple(map(inner, value))
        return replace(self, **new)  # type: ignore[type-var]

    @property
    def lead(self) -> torch.Size:
        """The leading dimensions: those of a batch of sets."""
        shapes = [t.shape[: t.dim() - self.own[name]] for name, t in self._tensors().items()]
        return torch.broadcast_shapes(*shapes, *(child.lead for child in self._children()))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its tensors; torch's default for a set made of numbers alone."""
        return _promoted(self._dtypes()) or torch.get_default_dtype()

    def _dtypes(self) -> list[torch.dtype]:
        # A number is exact in float64 until it meets the dtype of a program or a direction.
        found = [t.dtype for t in self._tensors().values() if t.dim()]
        return sum((child._dtypes() for child in self._children()), found)

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        found = next(iter(self._tensors().values()), None)
        return self._children()[0].device if found is None else found.device

    def to(self, like: Tensor) -> Any:
        """The same set in the dtype and on the device of a tensor."""
        return self._mapped(lambda t, _: t.to(like), lambda child: child.to(like))

    @property
    def requires_grad(self) -> bool:
        """Whether one of its tensors does."""
        own = any(t.requires_grad for t in self._tensors().values())
        return own or any(child.requires_grad for child in self._children())

    def widened(self) -> Any:
        """The same sets with one more leading dimension, of size 1, at the end."""
        return self._mapped(lambda t, own: t.unsqueeze(t.dim() - own), lambda c: c.widened())

    def expand(self, *lead: int) -> Any:
        """The same sets with these leading dimensions, as `Tensor.expand`."""
        return self._mapped(
            lambda t, own: t.expand((*lead, *t.shape[t.dim() - own :])), lambda c: c.expand(*lead)
        )

    def row(self, i: int) -> Any:
        """The i-th along the last leading dimension; the set itself where that has one entry."""

        def take(t: Tensor, own: int) -> Tensor:
            if t.dim() == own:
                return t
            at = t.dim() - own - 1
            return t.select(at, i if t.shape[at] > 1 else 0)

        return self._mapped(take, lambda child: child.row(i))

    # ---- what a member may do better ---------------------------------------------------------

    def _solved(self, v: Tensor) -> tuple[Solution, torch.Size]:
        """The maximiser and its multipliers, all failures but an unbounded direction raised."""
        solution, lead = self.members().minimise(-v)
        if bool((solution.codes == Status.INFEASIBLE.code).any()):
            raise _empty(self, solution)
        unbounded = solution.codes == Status.UNBOUNDED.code
        if bool(unbounded.any()):
            self.require_nonempty()  # an empty set can have a direction of this kind, too
        replace(solution, codes=solution.codes.masked_fill(unbounded, 0)).check()
        return solution, lead

    def _support(self, v: Tensor) -> Tensor:
        solution, lead = self._solved(v)
        value = -self.members().value(-v, solution, lead)
        unbounded = (solution.codes == Status.UNBOUNDED.code).reshape(lead)
        return torch.where(unbounded, torch.inf, value)

    def _worst(self, v: Tensor) -> Tensor:
        solution, lead = self._solved(v)
        unbounded = torch.nonzero(solution.codes == Status.UNBOUNDED.code).flatten()
        if unbounded.numel():
            raise InfeasibleError(
                f"worst: {type(self).__name__} is unbounded along v (index "
                f"{unbounded.tolist()[:8]} of the flattened batch): no member is the worst. Bound the "
                "set, by `U & Box(...)` for example.",
                certificate=solution.stats["certificate"][unbounded], instances=unbounded,
            )  # fmt: skip
        return solution.value[:, : self.dimension].reshape(*lead, self.dimension)

    def _excess(self, z: Tensor) -> Tensor:
        """How far z is from the set, 0 or below inside.  # (...)"""
        k = self.dimension
        eye = torch.eye(k, dtype=z.dtype, device=z.device)
        one = z.new_ones(k, 1)
        # (z', t) with z' in U and |z - z'| <= t
        near = Conic.of(
            Cones(2 * k),
            torch.cat([torch.cat([eye, -one], 1), torch.cat([-eye, -one], 1)]),
            torch.cat([z, -z], -1),
        )
        inside = self.members().pulled(torch.cat([eye, z.new_zeros(k, 1)], 1))
        q = z.new_zeros(k + 1)
        q[k] = 1.0
        solution, lead = Conic.meet([inside, near]).minimise(q)
        if bool((solution.codes == Status.INFEASIBLE.code).any()):
            raise _empty(self, solution)
        return solution.check().stats["objective"].reshape(lead)

    def require_nonempty(self) -> None:
        """Raise InfeasibleError where a set has no member."""
        for child in self._children():
            child.require_nonempty()

    def counterpart(self, m: int) -> Conic:
        """{(v, t_1, ..., t_m): h_i(v) <= t_i}, the sets being those along the last dimension of lead.

        One set for all i has one epigraph for all.  # lead (*lead[:-1])
        """
        self._fits_rows(m)
        e = self.epigraph()
        if not self.lead or self.lead[-1] == 1:
            zero = torch.zeros(self.dimension, dtype=self.dtype, device=self.device)
            return shared(e if not self.lead else e.spread(), zero, zero.new_ones(()), m)
        return e.spread()

    def _fits_rows(self, m: int) -> None:
        if self.lead and self.lead[-1] not in (1, m):
            raise ValueError(
                f"uncertainty: got sets of leading dimensions {tuple(self.lead)} for {m} rows, "
                f"expected them to broadcast against (*batch, {m}); a set for each instance that "
                "all its rows share has (batch, 1): see `widened()`."
            )

    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        ends = [self.worst(self._normal(n, generator)) for _ in range(2)]
        u = torch.rand(n, *self.lead, 1, generator=generator, dtype=self.dtype, device=self.device)
        return u * ends[0] + (1 - u) * ends[1]

    def _normal(self, n: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn(
            n, *self.lead, self.dimension,
            generator=generator, dtype=self.dtype, device=self.device,
        )  # fmt: skip

    def _scaled(self, r: Tensor) -> "UncertaintySet":
        from .combined import Image

        return Image(of=self, factor=r)

    def _moved(self, shift: Tensor) -> "UncertaintySet":
        from .combined import Image

        return Image(of=self, shift=shift)

    def _summands(self) -> "tuple[UncertaintySet, ...]":
        return (self,)

    def _factors(self) -> "tuple[UncertaintySet, ...]":
        return (self,)

    # ---- checks ------------------------------------------------------------------------------

    def _checked(self, name: str, v: Tensor) -> Tensor:
        if not isinstance(v, Tensor) or not v.is_floating_point():
            got = v.dtype if isinstance(v, Tensor) else type(v).__name__
            raise TypeError(
                f"{name}: got {got}, expected a floating tensor (..., {self.dimension})."
            )
        if v.dim() < 1 or v.shape[-1] != self.dimension:
            raise ValueError(
                f"{name}: got shape {tuple(v.shape)}, expected (..., {self.dimension}), the dimension "
                f"of this {type(self).__name__}."
            )
        try:
            torch.broadcast_shapes(v.shape[:-1], self.lead)
        except RuntimeError:
            raise ValueError(
                f"{name}: got leading dimensions {tuple(v.shape[:-1])}, expected them to broadcast "
                f"against {tuple(self.lead)}, those of the {type(self).__name__}."
            ) from None
        return v

    def _block_size(self, m: int) -> int:
        if type(m) is not int or m < 1 or self.dimension % m:
            raise ValueError(
                f"m: got {m!r}, expected a positive number that divides {self.dimension}, the "
                "dimension of the set."
            )
        return self.dimension // m


def shared(e: Conic, centre: Tensor, radius: Tensor, m: int) -> Conic:
    """{(v, t): centre_i'v + radius_i s <= t_i for an s with (v, s) in e}, radius >= 0.

    Args:
        e: of no dimension for the rows.
        centre: # (..., m or 1, k) or (k,)
        radius: # (..., m or 1) or ()
        m: how many rows.
    """
    k = e.G.shape[-1] - 1
    new: dict[str, Any] = {"dtype": e.G.dtype, "device": e.G.device}
    head = torch.eye(k + 1, k + m + 1, **new)  # (v, s) of (v, t, s)
    head[k] = 0
    head[k, k + m] = 1
    rows = [
        centre if centre.dim() > 1 else centre[None],
        -torch.eye(m, **new),
        (radius if radius.dim() else radius[None])[..., None],
    ]
    lead = torch.broadcast_shapes(*(t.shape[:-2] for t in rows))
    G = torch.cat([t.expand(*lead, m, t.shape[-1]) for t in rows], -1)
    return Conic.meet([e.pulled(head), Conic.of(Cones(m), G)]).hidden(1)


def tensor(name: str, value: Any, own: int, shape: str, like: Sequence[Any] = ()) -> Tensor:
    """A floating tensor of at least `own` dimensions without NaN, made of a number where own is 0.

    Args:
        name: of the argument, for the message.
        value: what was passed.
        own: how many dimensions it needs.
        shape: how it is written.
        like: other arguments, whose dtype a number takes; float64 where there is none.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and own == 0:
        first = next((t for t in like if isinstance(t, Tensor)), None)
        dtype = torch.float64 if first is None else first.dtype
        value = torch.tensor(value, dtype=dtype, device=None if first is None else first.device)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: got {got}, expected a floating tensor {shape}.")
    if value.dim() < own:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape}.")
    finite(name, value)
    return value


def _promoted(dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    out = dtypes[0] if dtypes else None
    for dtype in dtypes[1:]:
        out = torch.promote_types(out, dtype)
    return out


def nonnegative(name: str, t: Tensor) -> None:
    """Raise where a tensor has entries below 0."""
    if bool((t < 0).any()):
        raise ValueError(f"{name}: got {float(t.detach().min()):.6g}, expected numbers >= 0.")


def same(U: UncertaintySet, **sizes: int) -> None:
    """Raise where sizes that must agree do not."""
    if len(set(sizes.values())) > 1:
        got = ", ".join(f"{name} of {n}" for name, n in sizes.items())
        raise ValueError(f"{type(U).__name__}: got {got}, expected the same number.")


def eye(like: Tensor, n: int) -> Tensor:
    """The identity of size n, in the dtype and on the device of a tensor."""
    return torch.eye(n, dtype=like.dtype, device=like.device)


def finite(name: str, value: Tensor) -> None:
    """Raise where a tensor has NaN or infinite entries, naming the first."""
    bad = torch.nonzero(~torch.isfinite(value.detach()))
    if bad.shape[0]:  # of a number, the index has no entries
        at = tuple(bad[0].tolist())
        raise ValueError(
            f"{name}: got {float(value.detach()[at])} at index {at}, expected finite numbers."
        )


def _empty(U: UncertaintySet, solution: Solution) -> InfeasibleError:
    bad = torch.nonzero(solution.codes == Status.INFEASIBLE.code).flatten()
    return InfeasibleError(
        f"{type(U).__name__}: got an empty set (index {bad.tolist()[:8]} of the flattened batch), "
        "expected one with members: its constraints contradict each other, see `.certificate`.",
        certificate=solution.stats["certificate"][bad],
        instances=bad,
    )
