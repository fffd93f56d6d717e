"""Wald's maximin: the decision whose worst outcome is best, by duality or by cutting planes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..convex import Cones, ConeSolver
from ..solution import Solution, Status, check_on_failure
from .base import UncertaintySet
from .conic import Conic
from .programs import RobustLP


def maximin(
    payoff: Tensor, uncertainty: UncertaintySet, *,
    gain: Tensor | None = None, A: Tensor | None = None, b: Tensor | None = None,
    equality: "tuple[Tensor, Tensor] | None" = None,
    low: "float | Tensor | None" = None, high: "float | Tensor | None" = None,
    solver: ConeSolver | None = None, on_failure: str = "raise", order: int = 1,
) -> Solution:  # fmt: skip
    """max over x of min over z in U of x'Q z + g'x, over A x <= b, E x = d, low <= x <= high.

    The inner minimum is -h_U(-Q'x): by the dual of U this is one cone program. Where x and z range
    over simplices (a `Hull` of unit vectors) it is a matrix game, and x an optimal mixed strategy.

    Args:
        payoff: Q, of x and z.  # (*batch, n, k)
        uncertainty: U, of dimension k; leading dimensions (*batch).
        gain: g, what x earns without uncertainty; None for 0.  # (*batch, n)
        A, b, equality, low, high: as in `RobustLP`.
        solver, on_failure, order: as in `ConeProgram`.

    Returns:
        Solution: `value` is x; `stats["objective"]` what it guarantees; `stats["worst"]` a z that
        holds it to that. Differentiable with respect to all data and the set.

    Raises:
        InfeasibleError: no x, no bound, or no z.

    Example:
        >>> import torch
        >>> from implicitdl.robust import Hull, maximin
        >>> Q = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
        >>> simplex = (torch.ones(1, 3), torch.ones(1))
        >>> maximin(Q, Hull(points=torch.eye(3)), equality=simplex, low=0.0).value
        tensor([0.3333, 0.3333, 0.3333])

    Reference:
        Wald (1945), "Statistical decision functions which minimize the maximum risk".
    """
    if not isinstance(payoff, Tensor) or not payoff.is_floating_point() or payoff.dim() < 2:
        got = tuple(payoff.shape) if isinstance(payoff, Tensor) else type(payoff).__name__
        raise TypeError(f"payoff: got {got}, expected a floating tensor (..., n, k).")
    n = payoff.shape[-2]
    program = RobustLP(
        payoff.new_zeros(n) if gain is None else -gain,
        payoff.new_zeros(0, n) if A is None else A,
        payoff.new_zeros(0) if b is None else b,
        objective=-payoff @ uncertainty.to(payoff),
        equality=equality, low=low, high=high,
    )  # fmt: skip
    solution = program.solve(solver=solver, on_failure=on_failure, order=order)
    stats: dict[str, Any] = dict(solution.stats)
    stats["objective"] = -stats["objective"]
    v = -(payoff.mT @ solution.value.nan_to_num(0.0)[..., None])[..., 0]
    stats["worst"] = uncertainty.worst(v)
    return Solution(
        value=solution.value, codes=solution.codes, residual=solution.residual,
        steps=solution.steps, stats=stats,
    )  # fmt: skip


def maximin_oracle(
    worst: Callable[[Tensor], Tensor], x0: Tensor, *,
    low: "float | Tensor", high: "float | Tensor",
    A: Tensor | None = None, b: Tensor | None = None,
    equality: "tuple[Tensor, Tensor] | None" = None,
    tol: float = 1e-6, max_steps: int = 100, solver: ConeSolver | None = None,
    on_failure: str = "raise",
) -> Solution:  # fmt: skip
    """max over x of min over a family of concave payoffs, of which only the worst is ever seen.

    Kelley's cutting planes: each payoff at x_k with its gradient bounds the minimum from above, the
    best x for all bounds so far is tried next, and its payoff bounds the optimum from below.

    Args:
        worst: the payoff of the member of the family that is worst at x, (batch, n) -> (batch,);
            autograd gives its gradient, rows are independent.
        x0: where to start; need not be feasible.  # (batch, n)
        low, high: bounds on x, which this method needs.  # numbers or (*batch, n)
        A, b, equality: as in `RobustLP`, (batch, ...) or shared.
        tol: gap between the bounds at which an instance is solved, relative to 1 + |payoff|.
        max_steps: most calls of `worst`.
        solver: of the linear programs.
        on_failure: `"raise"`, `"warn"` or `"return"`.

    Returns:
        Solution, all constants: `value` the best x seen; `stats["objective"]` its worst payoff,
        `stats["bound"]` what no x exceeds.

    Reference:
        Kelley (1960), "The cutting-plane method for solving convex programs".
    """
    check_on_failure(on_failure)
    if not isinstance(x0, Tensor) or not x0.is_floating_point() or x0.dim() != 2:
        got = tuple(x0.shape) if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"x0: got {got}, expected a floating tensor (batch, n).")
    if not 0 < tol < 1 or type(max_steps) is not int or max_steps < 1:
        raise ValueError(
            f"tol, max_steps: got {tol}, {max_steps}, expected a number in (0, 1) and an integer >= 1."
        )
    batch, n = x0.shape
    base = RobustLP(
        x0.new_zeros(n), x0.new_zeros(0, n) if A is None else A, x0.new_zeros(0) if b is None else b,
        equality=equality, low=low, high=high,
    )  # fmt: skip
    with torch.no_grad():
        fixed = Conic.meet([*base._rows(), *base._certain()])
        x = fixed.minimise(x0.new_zeros(batch, n), solver=solver)[0].value  # raises where none is
        clear = fixed.pulled(torch.eye(n, n + 1, dtype=x0.dtype, device=x0.device))
        q = torch.nn.functional.pad(x0.new_zeros(n), (0, 1), value=-1.0)
        best, value = x, x0.new_full((batch,), -torch.inf)
        bound, steps = -value, torch.zeros(batch, dtype=torch.long, device=x0.device)
        slopes, offsets = x0.new_zeros(batch, 0, n + 1), x0.new_zeros(batch, 0)
        done = torch.zeros(batch, dtype=torch.bool, device=x0.device)
        for k in range(max_steps):
            # The middle of the feasible points known tells more than the given start where that is
            # infeasible; from then on, the optimum of the bounds.
            at = torch.where(_inside(base, x0)[:, None], x0, x) if k == 0 else x
            f, g = _cut(worst, at)
            better = (f > value) & ~done
            best, value = torch.where(better[:, None], at, best), torch.where(better, f, value)
            # t <= f + g'(x - at)
            slopes = torch.cat([slopes, torch.nn.functional.pad(-g, (0, 1), value=1.0)[:, None]], 1)
            offsets = torch.cat([offsets, (f - (g * at).sum(-1))[:, None]], 1)
            cuts = Conic.of(Cones(k + 1), slopes, offsets)
            found, _ = Conic.meet([clear, cuts]).minimise(q, solver=solver, on_failure="return")
            good = found.codes == Status.CONVERGED.code
            top = torch.where(good, -found.stats["objective"], torch.inf)
            bound = torch.where(done, bound, torch.minimum(bound, top))
            steps = steps + (~done).long()
            done = done | (bound - value <= tol * (1 + value.abs())) | ~good
            if bool(done.all()):
                break
            x = torch.where(good[:, None], found.value[:, :n], x)
    gap = (bound - value) / (tol * (1 + value.abs()))
    codes = torch.where(gap <= 1, Status.CONVERGED.code, Status.MAX_STEPS.code)
    return Solution(
        value=best, codes=codes, residual=gap, steps=steps,
        stats={"solver": "cutting planes", "objective": value, "bound": bound},
    ).check(on_failure)  # fmt: skip


def _cut(worst: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The payoff and its gradient, row by row."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        f = worst(at)
        if not isinstance(f, Tensor) or f.shape != x.shape[:1]:
            got = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
            raise ValueError(f"worst(x): got {got}, expected one payoff a row, ({x.shape[0]},).")
        if not f.requires_grad:
            raise ValueError("worst(x): got payoffs that autograd cannot differentiate, expected a "
                             "function of x in torch.")  # fmt: skip
        (g,) = torch.autograd.grad(f.sum(), at)
    if not bool(torch.isfinite(f).all() & torch.isfinite(g).all()):
        raise ValueError("worst(x): got NaN or infinite payoffs or gradients.")
    return f.detach(), g


def _inside(program: RobustLP, x: Tensor) -> Tensor:
    """Which rows satisfy all constraints."""
    good = (program.violation(x) <= 0).all(-1)
    for t, sign in ((program.low, 1.0), (program.high, -1.0)):
        if isinstance(t, Tensor):
            good = good & (sign * (x - t) >= 0).all(-1)
    if program.equality is not None:
        E, d = program.equality
        off = (E @ x[..., None])[..., 0] - d
        good = good & (off.abs() <= 1e-9).all(-1)
    return good
