"""Every competitor of implicit_layer.py behind one interface, each at the best of its settings.

A competitor is asked for x, or for x and the gradient (dA, dv) of sum(g x), at a `Setting`: its own
tolerances of the forward and of the backward solve, and the numbers of steps that it may take.
What it returns is judged elsewhere. A peer that is not installed says so and is left out.

How each peer is treated, so that nobody is hobbled:

- torchdeq stops by its relative criterion, which is the benchmark's own residual; its numbers of
  steps are then cut to what it used, since it pays for every step that it was allowed.
- simple_fixed_point_iter has no stopping rule. As it comes it takes the number of steps that the
  certified contraction factor guarantees; "told" takes the number that this very problem needs,
  found beforehand. It has no step option for a backward solve (it raises TypeError there), so
  fixed_point_iter does that for it.
- torchidl multiplies by B in both passes; its fixed-point loops are called without that, and
  without the scaling of A, since A lies inside its ball already.
- "tuned" rows choose among options that the package has but does not choose by itself.
"""

import dataclasses
import functools
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _harness import deadline
from problems import Problem
from torch import Tensor

# What a competitor was given: nothing but tolerances; options that we searched for; the answer's
# number of steps, which nobody has before solving.
AS_IT_COMES, TUNED, TOLD = 0, 1, 2

Answer = tuple[Tensor, ...]  # (x,) or (x, dA, dv)
Run = Callable[[], Answer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a competitor is run with; tolerances by its own definition."""

    forward: float
    backward: float = 1e-4
    forward_steps: int = 20_000
    backward_steps: int = 20_000
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        extra = ", ".join(f"{k}={v}" for k, v in self.options)
        return f"{self.forward:.0e}/{self.backward:.0e}" + (f", {extra}" if extra else "")


class Competitor:
    """One row of the table. `ours` rows are compared with the fastest of the others."""

    ours = False

    def __init__(self, name: str, package: str = "", tier: int = AS_IT_COMES) -> None:
        self.name, self.package, self.tier = name, package, tier

    def missing(self) -> str:
        """Why this cannot run here, or nothing."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"no module named {self.package}"
        return ""

    def candidates(self, problem: Problem) -> list[tuple[tuple[str, Any], ...]]:
        """The options to choose from."""
        return [()]

    def run(self, problem: Problem, setting: Setting, gradient: bool) -> Run:
        """A call that solves once."""
        raise NotImplementedError

    def trimmed(self, setting: Setting) -> Setting:
        """The setting with steps cut to what the last call used."""
        return setting

    def products(self) -> int | None:
        """Evaluations of the map in the last forward solve, where they are known."""
        return None


# --- ours


def ours(
    A: Tensor, v: Tensor, problem: Problem, setting: Setting, solver: str
) -> Callable[[], Any]:
    """A call that solves x = relu(A x + v) as a layer does, with the facts that it certifies."""
    from implicitdl import activations, fixed_point, implicit, maps, solvers

    phi = activations.ReLU()
    facts = {"contraction": problem.contraction, "monotone": problem.monotone}
    forward = solvers.get_solver(solver, rtol=setting.forward)
    adjoint = implicit.Implicit(solver=solvers.get_solver(solver, rtol=setting.backward))
    return lambda: fixed_point(maps.AffineMap(A, v, phi, **facts), solver=forward, adjoint=adjoint)


class Ours(Competitor):
    """implicitdl; a failed solve raises, so it can be missing but not wrong."""

    ours = True

    def __init__(self, solver: str = "auto") -> None:
        super().__init__("implicitdl" if solver == "auto" else f"implicitdl {solver}")
        self.solver, self.solution = solver, None

    def run(self, problem: Problem, setting: Setting, gradient: bool) -> Run:
        A, v, g = _leaves(problem, gradient)
        solve = ours(A, v, problem, setting, self.solver)

        def call() -> Answer:
            with torch.set_grad_enabled(gradient):
                self.solution = solve()
            x = self.solution.value
            return (x, *torch.autograd.grad(x, (A, v), g)) if gradient else (x,)

        return call

    def products(self) -> int | None:
        return None if self.solution is None else self.solution.stats.get("evaluations")

    def chosen(self) -> str:
        """The solver that "auto" chose."""
        return "" if self.solution is None else str(self.solution.stats.get("solver", ""))


def _leaves(problem: Problem, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    A = problem.A.clone().requires_grad_(gradient)
    return A, problem.v.clone().requires_grad_(gradient), problem.g


# --- torchidl


@functools.cache
def _torchidl_class() -> Any:
    from torchidl import ImplicitFunction

    class Watched(ImplicitFunction):
        """Its own loops; the activation looks at the clock and counts."""

        calls = 0

        @staticmethod
        def phi(X: Tensor) -> Tensor:
            deadline.check()
            Watched.calls += 1
            return torch.clamp(X, min=0)

    class Solve(torch.autograd.Function):
        """ImplicitFunction.forward and .backward less the products with B."""

        @staticmethod
        def forward(ctx, A: Tensor, Z: Tensor) -> Tensor:
            X, _, _ = Watched.inn_pred(A, Z, torch.zeros_like(Z), Watched.mitr, Watched.tol)
            ctx.save_for_backward(A, Z, X)
            return X

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
            A, Z, X = ctx.saved_tensors
            D = Watched.dphi(A @ X + Z)
            V, _, _ = Watched.inn_pred_grad(A.T, D * grad, D, Watched.grad_mitr, Watched.grad_tol)
            return V @ X.T, V

    return Watched, Solve


class TorchIDL(Competitor):
    """torchidl's Picard iteration, columns as samples, stopped by the largest absolute change."""

    def __init__(self) -> None:
        super().__init__("torchidl", "torchidl")

    def run(self, problem: Problem, setting: Setting, gradient: bool) -> Run:
        function, solve = _torchidl_class()
        A, v, g = _leaves(problem, gradient)
        Z, G = v.detach().T.contiguous().requires_grad_(gradient), g.T.contiguous()
        # Its tolerance is an absolute one for all entries together: in units of the states.
        x, w, _ = problem.exact
        unit = float(x.square().mean(1).sqrt().min())
        grad_unit = float(w.square().mean(1).sqrt().min())

        def call() -> Answer:
            function.set_parameters(
                mitr=setting.forward_steps,
                grad_mitr=setting.backward_steps,
                tol=setting.forward * unit,
                grad_tol=setting.backward * grad_unit,
            )
            function.calls = 0
            with torch.set_grad_enabled(gradient):
                X = solve.apply(A, Z)
            if not gradient:
                return (X.T,)
            dA, dZ = torch.autograd.grad(X, (A, Z), G)
            return X.T, dA, dZ.T

        return call

    def products(self) -> int | None:
        return _torchidl_class()[0].calls


# --- torchdeq


class TorchDEQ(Competitor):
    """torchdeq: get_deq(f_solver=, b_solver=, ift=True) on z -> relu(z A' + v)."""

    def __init__(self, solver: str, tier: int = AS_IT_COMES) -> None:
        word = ("", " tuned", " told")[tier]
        super().__init__(f"torchdeq {solver}{word}", "torchdeq", tier)
        self.solver = solver
        self.used, self.used_backward = 0, 0

    def candidates(self, problem: Problem) -> list[tuple[tuple[str, Any], ...]]:
        if self.tier != TUNED:
            return [()]
        if self.solver == "anderson":
            chosen = [{"m": 3, "lam": 1e-8}, {"m": 6, "lam": 1e-8}, {"m": 6, "lam": 1e-12}]
            if not problem.contraction:
                chosen += [{"m": 10, "lam": 1e-10}, {"m": 6, "lam": 1e-8, "tau": 0.5}]
        elif self.solver == "broyden":
            chosen = [{"LBFGS_thres": 10}, {"LBFGS_thres": 30}]
        else:
            # Damping helps only where the plain iteration does not converge by itself.
            chosen = [] if problem.contraction else [{"tau": t} for t in (0.5, 0.25, 0.1, 0.03)]
        return [tuple(options.items()) for options in chosen]

    def limit(self, problem: Problem, options: dict[str, Any]) -> int:
        """Steps at most: Broyden keeps two states a step for the whole batch."""
        if self.solver != "broyden":
            return 20_000 if "fixed_point" in self.solver else 2000
        if "LBFGS_thres" in options:
            return 1000
        return max(20, min(500, int(2**30 / (8 * problem.batch * problem.n))))

    def simple_steps(self, problem: Problem, tolerance: float) -> int:
        """Steps for the solver that does not look at convergence."""
        if self.tier == TOLD:
            return picard_steps(problem, tolerance)
        kappa = problem.contraction
        return math.ceil(math.log(tolerance) / math.log(kappa)) if kappa else 1000

    def run(self, problem: Problem, setting: Setting, gradient: bool) -> Run:
        from torchdeq import get_deq
        from torchdeq.solver import get_solver, register_solver

        options = dict(setting.options)
        name = self.solver
        if options:  # the way that torchdeq has of giving options to its backward solver too
            name = f"benchmark {self.name}"
            register_solver(name, functools.partial(get_solver(self.solver), **options))
        limit = self.limit(problem, options)
        steps = min(setting.forward_steps, limit), min(setting.backward_steps, limit)
        simple = self.solver == "simple_fixed_point_iter"
        if simple:
            steps = self.simple_steps(problem, setting.forward), steps[1]
        deq = get_deq(
            f_solver=name,
            b_solver="fixed_point_iter" if simple else name,
            f_max_iter=steps[0],
            b_max_iter=steps[1],
            f_tol=setting.forward,
            b_tol=setting.backward,
            f_stop_mode="rel",
            b_stop_mode="rel",
            ift=True,
            no_stat=simple,
        ).train(gradient)
        A, v, g = _leaves(problem, gradient)
        At = A.mT
        last: dict[str, Any] = {}

        def f(z: Tensor) -> Tensor:
            deadline.check()
            out = torch.relu(torch.addmm(v, z, At))
            if out.requires_grad:  # its backward solver looks at no clock, and at f no more
                out.register_hook(lambda _: deadline.check())
            return out

        def f_simple(z: Tensor, tau: float = 1.0) -> Tensor:
            return f(z)

        def call() -> Answer:
            z0 = torch.zeros_like(v)
            with torch.set_grad_enabled(gradient), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                states, info = deq(
                    f_simple if simple else f, z0, backward_writer=lambda b: last.update(b)
                )
            x = states[-1]
            self.used = _steps(info)
            if not gradient:
                return (x,)
            gradients = torch.autograd.grad(x, (A, v), g)
            self.used_backward = _steps(last)
            return (x, *gradients)

        return call

    def trimmed(self, setting: Setting) -> Setting:
        return dataclasses.replace(
            setting,
            forward_steps=min(setting.forward_steps, self.used + 4),
            backward_steps=min(setting.backward_steps, self.used_backward + 4),
        )

    def products(self) -> int | None:
        return self.used


def _steps(info: dict[str, Any]) -> int:
    steps = info.get("nstep")
    return 0 if steps is None else int(steps.max())


@functools.lru_cache(maxsize=64)
def picard_steps(problem: Problem, tolerance: float) -> int:
    """Steps of the plain iteration to a relative change below the tolerance, found untimed.

    Raises:
        TimeUp: it was not found in the time that the competitor has for a solve.
    """
    x = torch.zeros_like(problem.v)
    for k in range(1, 20_001):
        deadline.check()
        y = torch.addmm(problem.v, x, problem.A.mT).relu_()
        change = (y - x).norm(dim=1) / y.norm(dim=1).clamp_min(1e-30)
        x = y
        if not bool((change > tolerance).any()) or not bool(y.isfinite().all()):
            return k
    return 20_000


def competitors(solvers: bool = False) -> list[Competitor]:
    """Ours first, then every peer in the order that finds a fast accurate one early.

    Args:
        solvers: add a row for each of our solvers.
    """
    rows: list[Competitor] = [Ours()]
    if solvers:
        names = ["picard", "newton_picard", "anderson", "broyden", "newton", "forward_backward",
                 "peaceman_rachford"]  # fmt: skip
        rows += [Ours(name) for name in names]
    rows += [
        TorchDEQ("anderson", TUNED),
        TorchDEQ("broyden", TUNED),
        TorchDEQ("anderson"),
        TorchDEQ("broyden"),
        TorchIDL(),
        TorchDEQ("simple_fixed_point_iter"),
        TorchDEQ("simple_fixed_point_iter", TOLD),
        TorchDEQ("fixed_point_iter", TUNED),
        TorchDEQ("fixed_point_iter"),
    ]
    return rows
