"""The problems of `convex.py`, and how every package that takes them is called.

A case is data and what they mean: to the native solver as (P, q, G, h, A, b, K), to cvxpylayers as a
problem with parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitdl.convex import ConeProgram, Cones

Call = Callable[..., Tensor]


@dataclass
class Case:
    """A batch of problems.

    Attributes:
        name: for the table.
        data: what is differentiated in, each with a batch dimension.
        native: data -> (P, q, G, h, A, b, K).
        cvxpy: () -> (problem, parameters, variable, data -> values of the parameters).
        n: variables.
    """

    name: str
    data: dict[str, Tensor]
    native: Callable[..., tuple[Any, ...]]
    cvxpy: Callable[[], tuple[Any, list[Any], Any, Callable[..., tuple[Tensor, ...]]]]
    n: int

    @property
    def batch(self) -> int:
        """The number of instances."""
        return next(iter(self.data.values())).shape[0]


def quadratic(batch: int, n: int) -> Case:
    """min x'P x / 2 + q'x over G x <= h, n rows, about half of them active."""
    L, x, G = torch.randn(batch, n, n), torch.randn(batch, n, 1), torch.randn(batch, n, n)
    data = {
        "P": L @ L.mT / n + 0.1 * torch.eye(n),
        "q": 3 * torch.randn(batch, n),
        "G": G,
        "h": (G @ x)[..., 0] + torch.rand(batch, n),
    }

    def modelled() -> tuple[Any, list[Any], Any, Callable[..., tuple[Tensor, ...]]]:
        import cvxpy as cp

        v, root, q = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n)
        G, h = cp.Parameter((n, n)), cp.Parameter(n)
        problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(root @ v) + q @ v), [G @ v <= h])
        values = lambda P, q, G, h: (torch.linalg.cholesky(P).mT, q, G, h)
        return problem, [root, q, G, h], v, values

    def native(P: Tensor, q: Tensor, G: Tensor, h: Tensor) -> tuple[Any, ...]:
        return P, q, G, h, None, None, Cones(n)

    return Case(f"QP, n = m = {n}", data, native, modelled, n)


def robust(batch: int, n: int = 20, m: int = 20) -> Case:
    """min c'x over a_i'x + ||P_i x|| <= b_i and |x| <= 5: m cones of dimension n + 1."""
    data = {
        "c": torch.randn(batch, n),
        "A": torch.randn(batch, m, n),
        "P": 0.075 * torch.randn(batch, m, n, n),
        "b": 1 + torch.rand(batch, m),
    }
    box = torch.cat([torch.eye(n), -torch.eye(n)])

    def native(c: Tensor, A: Tensor, P: Tensor, b: Tensor) -> tuple[Any, ...]:
        batch = c.shape[0]
        cones = torch.cat([A[:, :, None], -P], 2).flatten(1, 2)
        G = torch.cat([box.expand(batch, -1, -1), cones], 1)
        right = torch.cat([b[..., None], b.new_zeros(batch, m, n)], 2).flatten(1)
        h = torch.cat([b.new_full((batch, 2 * n), 5.0), right], 1)
        return None, c, G, h, None, None, Cones(2 * n, (n + 1,) * m)

    def modelled() -> tuple[Any, list[Any], Any, Callable[..., tuple[Tensor, ...]]]:
        import cvxpy as cp

        x, c, A, b = cp.Variable(n), cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m)
        Ps = [cp.Parameter((n, n)) for _ in range(m)]
        rows = [A[i] @ x + cp.norm(Ps[i] @ x) <= b[i] for i in range(m)]
        problem = cp.Problem(cp.Minimize(c @ x), [*rows, x <= 5, x >= -5])
        return problem, [c, A, b, *Ps], x, lambda c, A, P, b: (c, A, b, *P.unbind(1))

    return Case(f"robust LP, n = m = {n}", data, native, modelled, n)


def linear(batch: int, n: int = 40, p: int = 20) -> Case:
    """min c'x over A x = b, x >= 0, feasible and bounded."""
    A, x, y = torch.randn(batch, p, n), torch.rand(batch, n), torch.randn(batch, p)
    x[:, p:] = 0.0
    slack = torch.rand(batch, n)
    slack[:, :p] = 0.0
    data = {
        "c": (y[:, None] @ A)[:, 0] + slack,
        "A": A,
        "b": (A @ x[..., None])[..., 0],
    }

    def native(c: Tensor, A: Tensor, b: Tensor) -> tuple[Any, ...]:
        return None, c, -torch.eye(n), c.new_zeros(n), A, b, Cones(n)

    def modelled() -> tuple[Any, list[Any], Any, Callable[..., tuple[Tensor, ...]]]:
        import cvxpy as cp

        v, c, A, b = cp.Variable(n), cp.Parameter(n), cp.Parameter((p, n)), cp.Parameter(p)
        return cp.Problem(cp.Minimize(c @ v), [A @ v == b, v >= 0]), [c, A, b], v, lambda *t: t

    return Case(f"LP, n = {n}, {p} equalities", data, native, modelled, n)


def portfolio(batch: int, n: int = 40, factors: int = 10) -> Case:
    """max mu'x over sum x = 1, x >= 0 and ||F x|| <= sigma: a simplex and one cone."""
    F = torch.randn(batch, factors, n) / factors**0.5 * (0.5 + torch.rand(batch, 1, n))
    equal = F.mean(2).norm(dim=1)  # the risk of equal shares, which the bound allows
    data = {"mu": torch.rand(batch, n), "F": F, "sigma": 1.2 * equal}

    def native(mu: Tensor, F: Tensor, sigma: Tensor) -> tuple[Any, ...]:
        batch = mu.shape[0]
        zero = mu.new_zeros(batch, 1, n)
        G = torch.cat([-torch.eye(n).expand(batch, -1, -1), zero, -F], 1)
        h = torch.cat([mu.new_zeros(batch, n), sigma[:, None], mu.new_zeros(batch, factors)], 1)
        ones = mu.new_ones(1, n)
        return None, -mu, G, h, ones, mu.new_ones(1), Cones(n, (factors + 1,))

    def modelled() -> tuple[Any, list[Any], Any, Callable[..., tuple[Tensor, ...]]]:
        import cvxpy as cp

        x, mu, F = cp.Variable(n), cp.Parameter(n), cp.Parameter((factors, n))
        sigma = cp.Parameter(nonneg=True)
        rules = [cp.sum(x) == 1, x >= 0, cp.norm(F @ x) <= sigma]
        return cp.Problem(cp.Maximize(mu @ x), rules), [mu, F, sigma], x, lambda *t: t

    return Case(f"portfolio, n = {n}", data, native, modelled, n)


def ours(case: Case) -> Call:
    """This library's layer."""

    def call(*data: Tensor) -> Tensor:
        *parts, K = case.native(*data)
        return ConeProgram(K)(*parts)

    return call


def cvxpylayer(case: Case, solver: str | None = None, **arguments: Any) -> Call:
    """cvxpylayers with these solver arguments."""
    from cvxpylayers.torch import CvxpyLayer

    problem, parameters, variable, values = case.cvxpy()
    options = {} if solver is None else {"solver": solver}
    layer = CvxpyLayer(problem, parameters, [variable], **options)
    return lambda *data: layer(*values(*data), solver_args=dict(arguments))[0]


def qpth(case: Case) -> Call:
    """qpth, for quadratic programs."""
    from qpth.qp import QPFunction

    none, solve = torch.empty(0), QPFunction(verbose=-1)
    return lambda P, q, G, h: solve(P, q, G, h, none, none)


def proxsuite(case: Case) -> Call:
    """proxsuite's layer, for quadratic programs."""
    from proxsuite.torch.qplayer import QPFunction

    solve = QPFunction(structural_feasibility=True)
    n, batch = case.n, case.batch
    none, free, low = torch.zeros(batch, 0, n), torch.zeros(batch, 0), -1e20

    def call(P: Tensor, q: Tensor, G: Tensor, h: Tensor) -> Tensor:
        x: Tensor = solve(P, q, none, free, G, torch.full_like(h, low), h)[0]
        return x

    return call


def moreau(case: Case) -> Call:
    """Moreau's own torch interface, for quadratic programs: min x'P x / 2 + q'x, A x + s = b."""
    import moreau as package
    from moreau.torch import Solver

    n = case.n

    def dense(rows: int) -> tuple[Tensor, Tensor]:
        return torch.arange(0, rows * n + 1, n), torch.arange(n).repeat(rows)

    solver = Solver(
        n, n, *dense(n), *dense(n), package.Cones(num_nonneg_cones=n),
        package.Settings(batch_size=case.batch),
    )  # fmt: skip

    def call(P: Tensor, q: Tensor, G: Tensor, h: Tensor) -> Tensor:
        x: Tensor = solver.solve(P.flatten(1), G.flatten(1), q, h).x
        return x

    return call


def competitors(case: Case) -> dict[str, Call]:
    """Those that are installed and take the problem."""
    found: dict[str, Call] = {"implicitdl": ours(case)}
    makers: dict[str, Callable[[], Call]] = {
        "cvxpylayers, default": lambda: cvxpylayer(case),
        "cvxpylayers, Clarabel dense": lambda: cvxpylayer(
            case, solve_method="Clarabel", mode="dense"
        ),
        "cvxpylayers, Moreau": lambda: cvxpylayer(case, "MOREAU"),
    }
    if set(case.data) == {"P", "q", "G", "h"}:
        makers |= {
            "qpth": lambda: qpth(case),
            "proxsuite": lambda: proxsuite(case),
            "Moreau": lambda: moreau(case),
        }
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:  # noqa: BLE001 - not installed, or not for this problem
            print(f"{case.name}: {name} left out ({type(error).__name__}: {error})")
    return found
