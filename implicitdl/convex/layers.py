"""Convex programs as layers: their data in, their solution out."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..solution import Solution, unknown_name
from .cones import Cones
from .program import Program
from .solver import ConeSolver, solve


class ConeProgram(nn.Module):
    """argmin_x 1/2 x'P x + q'x over G x + s = h, A x = b, s in K.

    K is a product of the nonnegative cone and second-order cones, in that order along h. Every datum
    may have a batch dimension or be shared by all instances; instances are independent: one that is
    infeasible neither stops nor changes the others.

    Args:
        cones: K.
        solver: how it is solved.
        on_failure: `"raise"` (InfeasibleError, ConvergenceError), `"warn"`, `"return"`, or `"nan"`:
            the value of an instance that was not solved is NaN in all but the first, and so is the
            gradient of a loss that reads it.
        order: how many derivatives are exact; one more raises.

    Example:
        >>> import torch
        >>> from implicitdl.convex import ConeProgram, Cones
        >>> layer = ConeProgram(Cones(second_order=(3,)))  # min q'x over ||x|| <= 1
        >>> q = torch.tensor([[3.0, 4.0]])
        >>> G = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])
        >>> layer(None, q, G, torch.tensor([1.0, 0.0, 0.0])).round(decimals=4)
        tensor([[-0.6000, -0.8000]])

    Reference:
        Agrawal, Amos, Barratt, Boyd, Diamond, Kolter (2019), "Differentiable convex optimization
        layers"; for the derivative, Busseti, Moursi, Boyd (2019), "Solution refinement at regular
        points of conic problems".
    """

    def __init__(
        self,
        cones: Cones,
        *,
        solver: ConeSolver | None = None,
        on_failure: str = "raise",
        order: int = 1,
    ):
        super().__init__()
        if on_failure not in ("raise", "warn", "return", "nan"):
            raise unknown_name("on_failure", on_failure, ("raise", "warn", "return", "nan"))
        if not isinstance(cones, Cones):
            raise TypeError(f"cones: got {type(cones).__name__}, expected Cones(...).")
        if solver is not None and not isinstance(solver, ConeSolver):
            raise TypeError(f"solver: got {type(solver).__name__}, expected a ConeSolver or None.")
        self.cones, self.solver, self.on_failure = cones, solver or ConeSolver(), on_failure
        if type(order) is not int or order < 1:
            raise ValueError(f"order: got {order!r}, expected an integer >= 1.")
        self.order = order

    def forward(
        self, P: Tensor | None, q: Tensor, G: Tensor | None = None, h: Tensor | None = None,
        A: Tensor | None = None, b: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The solution x.  # (batch, n), or (n,) where no datum has a batch dimension

        Args:
            P: positive semidefinite, or a ValueError; its symmetric part is taken; None for zero.  # (n, n) or
                (batch, n, n)
            q: # (n,) or (batch, n)
            G, h: # (M, n) or (batch, M, n); (M,) or (batch, M)
            A, b: # (p, n) or (batch, p, n); (p,) or (batch, p)

        Raises:
            InfeasibleError: an instance has no feasible point, or no bound.
            ConvergenceError: an instance was not solved to the tolerance.
            ValueError: shapes, dtypes or devices do not fit together.
        """
        return self.solve(P, q, G, h, A, b).value

    def solve(
        self, P: Tensor | None, q: Tensor, G: Tensor | None = None, h: Tensor | None = None,
        A: Tensor | None = None, b: Tensor | None = None, *, start: Solution | None = None,
    ) -> Solution:  # fmt: skip
        """The solution with all that is known of it.

        Args:
            P, q, G, h, A, b: as in `forward`.
            start: the Solution of nearby programs, of the same sizes, to start from.

        Returns:
            Solution: `value` is x; `residual` the error of the optimality conditions over the
            tolerance; `stats` has `objective`, `dual` (of G x + s = h), `equality_dual`, `slack`,
            `error`, and `certificate`: for an infeasible instance (0, y, -z) with A'y + G'z = 0 and
            b'y + h'z < 0, for an unbounded one (x, 0, s) with P x = 0, A x = 0, G x + s = 0 and
            q'x < 0. All but the last two are differentiable.
        """
        program, single = accept(P, q, G, h, A, b, self.cones)
        solution = solve(
            program, self.solver, on_failure=self.on_failure, order=self.order, start=start
        )
        return _single(solution) if single else solution

    def extra_repr(self) -> str:
        """The cones."""
        return f"{self.cones}, on_failure={self.on_failure!r}"


class QuadraticProgram(ConeProgram):
    """argmin_x 1/2 x'P x + q'x over G x <= h, A x = b.

    Args:
        solver, on_failure, order: as in `ConeProgram`.

    Example:
        >>> import torch
        >>> from implicitdl.convex import QuadraticProgram
        >>> layer = QuadraticProgram()  # the nearest point to v with x <= 1
        >>> v = torch.tensor([[2.0, 0.5]], requires_grad=True)
        >>> x = layer(torch.eye(2), -v, torch.eye(2), torch.ones(2))
        >>> x.sum().backward()
        >>> x.detach().round(decimals=4), v.grad.round(decimals=4)
        (tensor([[1.0000, 0.5000]]), tensor([[0., 1.]]))

    Reference:
        Amos, Kolter (2017), "OptNet: differentiable optimization as a layer in neural networks".
    """

    def __init__(self, **options: Any):
        super().__init__(Cones(), **options)

    def solve(
        self, P: Tensor | None, q: Tensor, G: Tensor | None = None, h: Tensor | None = None,
        A: Tensor | None = None, b: Tensor | None = None, *, start: Solution | None = None,
    ) -> Solution:  # fmt: skip
        """As `ConeProgram.solve`, with K the nonnegative cone of as many rows as G has."""
        cones = Cones(0 if h is None else h.shape[-1])
        program, single = accept(P, q, G, h, A, b, cones)
        solution = solve(
            program, self.solver, on_failure=self.on_failure, order=self.order, start=start
        )
        return _single(solution) if single else solution


class LinearProgram(QuadraticProgram):
    """argmin_x c'x over G x <= h, A x = b.

    The solution of a linear program is a vertex: as a function of c its derivative is zero almost
    everywhere and undefined where the vertex changes. With smoothing, smoothing / 2 ||x||^2 is added
    to the objective: the solution is then Lipschitz in c with constant 1 / smoothing, unique, and at
    most smoothing / 2 times the largest squared length of a feasible point from optimal.

    Args:
        smoothing: >= 0.
        solver, on_failure, order: as in `ConeProgram`.
    """

    def __init__(self, *, smoothing: float = 0.0, **options: Any):
        super().__init__(**options)
        if not 0 <= smoothing < math.inf:
            raise ValueError(f"smoothing: got {smoothing}, expected a finite number >= 0.")
        self.smoothing = smoothing

    def forward(  # type: ignore[override]
        self, c: Tensor, G: Tensor | None = None, h: Tensor | None = None,
        A: Tensor | None = None, b: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The solution x; arguments as in `ConeProgram.forward`, c in place of q."""
        return self.solve(c, G, h, A, b).value

    def solve(  # type: ignore[override]
        self, c: Tensor, G: Tensor | None = None, h: Tensor | None = None,
        A: Tensor | None = None, b: Tensor | None = None, *, start: Solution | None = None,
    ) -> Solution:  # fmt: skip
        """As `ConeProgram.solve`; the objective is that of the smoothed program."""
        P = None
        if self.smoothing:
            P = self.smoothing * torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
        return super().solve(P, c, G, h, A, b, start=start)


def accept(
    P: Tensor | None, q: Tensor, G: Tensor | None, h: Tensor | None, A: Tensor | None,
    b: Tensor | None, cones: Cones,
) -> tuple[Program, bool]:  # fmt: skip
    """The program, and whether it is a single one without a batch dimension.

    Raises:
        TypeError, ValueError: the data do not fit together; the message says which.
    """
    if not isinstance(q, Tensor) or not q.is_floating_point() or q.dim() not in (1, 2):
        got = f"{q.dtype} {tuple(q.shape)}" if isinstance(q, Tensor) else type(q).__name__
        raise TypeError(f"q: got {got}, expected a floating tensor (n,) or (batch, n).")
    n = q.shape[-1]
    if not n:
        raise ValueError(f"q: got shape {tuple(q.shape)}, expected one variable at least.")
    data = {"P": P, "G": G, "h": h, "A": A, "b": b}
    for name, t in data.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, expected a tensor.")
        if (t.dtype, t.device) != (q.dtype, q.device):
            raise ValueError(
                f"{name}: got {t.dtype} on {t.device}, expected {q.dtype} on {q.device} as q."
            )
        least = 2 if name in "PGA" else 1
        if t.dim() not in (least, least + 1) or (name in "PGA" and t.shape[-1] != n):
            wanted = {"P": "(n, n)", "G": "(M, n)", "A": "(p, n)", "h": "(M,)", "b": "(p,)"}[name]
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}, expected {wanted} with n={n} from q, or one a "
                "batch of these."
            )
    if P is not None and P.shape[-2] != n:
        raise ValueError(f"P: got shape {tuple(P.shape)}, expected (..., {n}, {n}).")
    for left, right in (("G", "h"), ("A", "b")):
        M, v = data[left], data[right]
        if (M is None) != (v is None):
            raise ValueError(f"{left}, {right}: got one of them, expected both or none.")
        if M is None:
            data[left], data[right] = q.new_zeros(0, n), q.new_zeros(0)
        elif M.shape[-2] != v.shape[-1]:  # type: ignore[union-attr]
            raise ValueError(
                f"{left}, {right}: got {tuple(M.shape)} and {tuple(v.shape)}, "  # type: ignore[union-attr]
                "expected as many rows in both."
            )
    G, h, A, b = data["G"], data["h"], data["A"], data["b"]
    if h.shape[-1] != cones.size:  # type: ignore[union-attr]
        raise ValueError(
            f"h: got {h.shape[-1]} entries, expected {cones.size}, the size of {cones}."  # type: ignore[union-attr]
        )
    batches = {
        name: t.shape[0]
        for name, t in {"P": P, "q": q, "G": G, "h": h, "A": A, "b": b}.items()
        if t is not None and t.dim() == (3 if name in "PGA" else 2)
    }
    sizes = set(batches.values()) - ({1} if len(set(batches.values())) > 1 else set())
    if len(sizes) > 1:
        raise ValueError(f"batch: got {batches}, expected one size for all that have one.")
    batch = sizes.pop() if sizes else 1

    def rows(t: Tensor) -> Tensor:
        return t.expand(batch, -1) if t.dim() == 2 else t[None].expand(batch, -1)

    def matrix(t: Tensor | None) -> Tensor | None:
        return t[0] if t is not None and t.dim() == 3 and t.shape[0] == 1 != batch else t

    if P is not None:  # x'P x is that of the symmetric part, and so are its gradients
        P = 0.5 * (P + P.mT)
    program = Program(matrix(P), rows(q), matrix(G), rows(h), matrix(A), rows(b), cones)  # type: ignore[arg-type]
    return program, not batches


def _single(solution: Solution) -> Solution:
    """One instance, without its batch dimension."""
    stats = {
        key: t[0] if isinstance(t, Tensor) and key != "point" else t
        for key, t in solution.stats.items()
    }
    return replace(
        solution, value=solution.value[0], codes=solution.codes[0],
        residual=solution.residual[0], steps=solution.steps[0], stats=stats,
    )  # fmt: skip
