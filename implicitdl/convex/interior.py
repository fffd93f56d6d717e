"""The homogeneous self-dual embedding of a batch of cone programs, by an interior-point method.

    0     = P x + A'y + G'z + q tau
    0     = A x - b tau
    0     = G x + s - h tau
    0     = x'P x / tau + q'x + b'y + h'z + kappa,      (s, z) in K x K,  tau, kappa >= 0

has a solution with tau > 0, from which x / tau is optimal, or with kappa > 0, from which a proof
follows that no x is feasible, or that the objective has no bound. Steps are Mehrotra's, in Nesterov
and Todd's scaling; with W^-1 G = T the normal equations have P + T'T + A'A and its Schur complement
in A, by Cholesky. An instance that is done no longer moves.

Reference: Goulart, Chen (2024), "Clarabel: an interior-point solver for conic programs with quadratic
objectives"; Vandenberghe (2010).
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .cones import Scaling, divide, longest_step, multiply
from .program import Program, product, transposed


@dataclass
class State:
    """Where the embedding stands."""

    x: Tensor
    y: Tensor
    z: Tensor
    s: Tensor
    tau: Tensor  # (batch, 1)
    kappa: Tensor

    def point(self) -> Tensor:
        """(x, y, s - z) / tau, where the optimality conditions are looked at."""
        return torch.cat([self.x, self.y, self.s - self.z], 1) / self.tau

    def select(self, index: Tensor) -> "State":
        """Some of the instances."""
        return State(*(getattr(self, f.name)[index] for f in fields(self)))


SOLVED, INFEASIBLE, UNBOUNDED, GOING, BROKEN = range(5)


def solve(
    program: Program, tol: float, proof: float, max_steps: int, v: State | None = None
) -> tuple[State, Tensor, Tensor]:
    """The state, the outcome of each instance, and its steps.

    Args:
        program: without a graph.
        tol: of residuals and gap, relative, at which an instance is solved.
        proof: of the certificates that it cannot be.
        max_steps: most steps.
        v: a state to go on from.
    """
    batch, q = program.batch, program.q
    outcome = torch.full((batch,), GOING, device=q.device)
    steps = torch.zeros_like(outcome)
    v = _start(program) if v is None else v
    for _ in range(max_steps):
        r = Residuals(program, v)
        now = _outcome(program, v, r, tol, proof)
        outcome = torch.where(outcome == GOING, now, outcome)
        going = outcome == GOING
        if not bool(going.any()):
            break
        steps += going
        step = _direction(program, v, r)
        alpha = step.alpha * going
        ok = torch.isfinite(alpha) & step.finite
        outcome = torch.where(going & ~ok, BROKEN, outcome)
        alpha = torch.where(ok, alpha, 0.0)[:, None]

        v = _moved(v, step, alpha)
    else:
        now = _outcome(program, v, Residuals(program, v), tol, proof)
        outcome = torch.where(outcome == GOING, now, outcome)
    return v, outcome, steps


def _moved(v: State, step: "Step", alpha: Tensor) -> State:
    """v + alpha step, where alpha is not zero: a step of NaN moves nothing."""
    names = [f.name for f in fields(v)]
    pairs = [(getattr(v, name), getattr(step, name)) for name in names]
    return State(*(torch.where(alpha > 0, a + alpha * d, a) for a, d in pairs))


class Factor:
    """K(x, y, z) = (t1, t2, t3) with K = [P A' G'; A 0 0; G 0 -W W], by Cholesky."""

    def __init__(self, program: Program, T: Tensor):
        self.program, self.T = program, T
        A, P = program.A, program.P
        H = T.mT @ T
        if P is not None:
            H = H + P
        self.p = program.b.shape[1]
        if self.p:
            H = H + A.mT @ A
        size = H.diagonal(dim1=-2, dim2=-1)
        eps = 4 * torch.finfo(H.dtype).eps
        size += eps * size.amax(-1, keepdim=True).clamp_min(1.0)
        self.L = torch.linalg.cholesky_ex(H)[0]
        if self.p:
            rows = A.mT.expand(H.shape[0], -1, -1) if A.dim() == 2 else A.mT
            self.Y = torch.linalg.solve_triangular(self.L, rows, upper=False)
            S = self.Y.mT @ self.Y
            d = S.diagonal(dim1=-2, dim2=-1)
            d += eps * d.amax(-1, keepdim=True).clamp_min(1.0)
            self.LS = torch.linalg.cholesky_ex(S)[0]

    def solve(self, t1: Tensor, t2: Tensor, t3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and W z for columns t1 (batch, n, k), t2 (batch, p, k), t3 = W^-1 (...)."""
        rhs = t1 + self.T.mT @ t3
        if self.p:
            A = self.program.A
            rhs = rhs + A.mT @ t2
            f = torch.linalg.solve_triangular(self.L, rhs, upper=False)
            y = torch.cholesky_solve(self.Y.mT @ f - t2, self.LS)
            x = torch.linalg.solve_triangular(self.L.mT, f - self.Y @ y, upper=True)
        else:
            y = t2
            x = torch.cholesky_solve(rhs, self.L)
        return x, y, self.T @ x - t3


def _start(program: Program) -> State:
    """x, y, z of the program with K a whole space and ||s||^2 / 2 added; s and z shifted into K."""
    K = program.cones
    batch, (n, _, M) = program.batch, program.sizes
    G = program.G if program.G.dim() == 3 else program.G.expand(batch, M, n)
    factor = Factor(program, G)
    x, y, z = factor.solve(-program.q[..., None], program.b[..., None], program.h[..., None])
    x, y, z = x[..., 0], y[..., 0], z[..., 0]
    e = K.unit(program.q)

    def inside(u: Tensor) -> Tensor:
        depth = K.depth(u)[:, None]
        size = u.abs().amax(1, keepdim=True).clamp_min(1.0) if M else 1.0
        return torch.where(depth > 1e-3 * size, u, u + (1 + (-depth).clamp_min(0)) * e)

    one = program.q.new_ones(batch, 1)
    return State(x, y, inside(z), inside(-z), one, one.clone())


class Residuals:
    """The residuals of the embedding and the products that they consist of."""

    def __init__(self, program: Program, v: State):
        self.Px = program.quadratic(v.x)
        self.back = transposed(program.A, v.y) + transposed(program.G, v.z)  # A'y + G'z
        self.Ax, self.Gx = product(program.A, v.x), product(program.G, v.x)
        self.r1 = self.Px + self.back + program.q * v.tau
        self.r2 = self.Ax - program.b * v.tau
        self.r3 = self.Gx + v.s - program.h * v.tau
        self.xPx = _dot(v.x, self.Px)
        self.linear = _dot(program.q, v.x)
        self.support = _dot(program.b, v.y) + _dot(program.h, v.z)
        self.r4 = self.xPx / v.tau + self.linear + self.support + v.kappa


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def _size(t: Tensor) -> Tensor:
    return t.abs().amax(1) if t.shape[1] else t.new_zeros(t.shape[0])


def quality(program: Program, v: State) -> Tensor:
    """The error of x / tau as a solution: of feasibility, of stationarity, of the gap, relative."""
    return _quality(program, v, Residuals(program, v))


def _quality(program: Program, v: State, r: Residuals) -> Tensor:
    t = v.tau[:, 0]
    primal = torch.maximum(_size(r.r3), _size(r.r2)) / t
    dual = _size(r.r1) / t
    scale_p = 1 + torch.maximum(torch.maximum(_size(program.h), _size(program.b)),
                                torch.maximum(_size(v.s), _size(v.x)) / t)  # fmt: skip
    scale_d = 1 + torch.maximum(_size(program.q), torch.maximum(_size(r.Px), _size(v.z)) / t)
    cost = (0.5 * r.xPx / v.tau**2 + r.linear / v.tau)[:, 0]
    bound = (-0.5 * r.xPx / v.tau**2 - r.support / v.tau)[:, 0]
    gap = (cost - bound).abs() / (1 + torch.minimum(cost.abs(), bound.abs()))
    return torch.maximum(torch.maximum(primal / scale_p, dual / scale_d), gap)


def _outcome(program: Program, v: State, r: Residuals, tol: float, proof: float) -> Tensor:
    """What each instance's state proves."""
    solved = _quality(program, v, r) < tol
    # A certificate of infeasibility is scaled to h'z + b'y = -1, one of unboundedness to q'x = -1.
    # It is asked to be far better than the solution would be: kappa has taken over from tau.
    late = (v.kappa > v.tau)[:, 0]
    down = -r.support[:, 0]
    infeasible = late & (down > 0) & (_size(r.back) < proof * down)
    fall = -r.linear[:, 0]
    ray = torch.maximum(_size(r.Px), torch.maximum(_size(r.Ax), _size(r.Gx + v.s)))
    unbounded = late & (fall > 0) & (ray < proof * fall)
    out = torch.full_like(solved, GOING, dtype=torch.long)
    out = torch.where(unbounded, UNBOUNDED, out)
    out = torch.where(infeasible, INFEASIBLE, out)
    return torch.where(solved, SOLVED, out)


@dataclass
class Step:
    """A direction and how far to go."""

    x: Tensor
    y: Tensor
    z: Tensor
    s: Tensor
    tau: Tensor
    kappa: Tensor
    alpha: Tensor
    finite: Tensor


def _direction(program: Program, v: State, r: Residuals) -> Step:
    """Mehrotra's step: an affine one tells how much to centre, and its second-order term."""
    K = program.cones
    r1, r2, r3, r4, Px, xPx = r.r1, r.r2, r.r3, r.r4, r.Px, r.xPx
    tau, kappa = v.tau, v.kappa
    W = Scaling(K, v.s, v.z)
    lam = W.lam
    factor = Factor(program, W.solve_rows(program.G, program.mirrored))
    mu = (_dot(v.s, v.z) + tau * kappa) / (K.degree + 1)
    # Columns: what tau moves, and the affine step, whose cone part is -lam o lam.
    g3 = W.solve(program.h)
    slope = 2 * Px / tau + program.q

    def gain(x: Tensor, y: Tensor, wz: Tensor) -> Tensor:
        return _dot(slope, x) + _dot(program.b, y) + _dot(g3, wz)

    scaled = W.solve(r3)
    t1 = torch.stack([-program.q, -r1], 2)
    t2 = torch.stack([program.b, -r2], 2)
    t3 = torch.stack([g3, lam - scaled], 2)
    X, Y, Z = factor.solve(t1, t2, t3)
    c = X[..., 0], Y[..., 0], Z[..., 0]
    below = gain(*c) - xPx / tau**2 - kappa / tau

    def finish(a: tuple[Tensor, ...], u: Tensor, keep: Tensor, rk: Tensor) -> tuple[Tensor, ...]:
        dtau = (-keep * r4 - rk / tau - gain(*a)) / below
        dx, dy, wdz = (m + dtau * k for m, k in zip(a, c, strict=True))
        wds = u - wdz  # W^-1 ds
        return dx, dy, wdz, wds, dtau, (rk - kappa * dtau) / tau

    one = torch.ones_like(tau)
    affine = finish((X[..., 1], Y[..., 1], Z[..., 1]), -lam, one, -tau * kappa)

    def reach(wdz: Tensor, wds: Tensor, dtau: Tensor, dkappa: Tensor) -> Tensor:
        t = torch.minimum(longest_step(K, lam, wdz), longest_step(K, lam, wds))
        for a, d in ((tau, dtau), (kappa, dkappa)):
            t = torch.minimum(t, torch.where(d < 0, -a / d, torch.inf)[:, 0])
        return t

    alpha = reach(*affine[2:]).clamp(max=1.0)[:, None]
    sigma = (1 - alpha).clamp_min(0) ** 3
    # Centred and corrected: lam o (W^-1 ds + W dz) = -lam o lam - (W^-1 ds_a) o (W dz_a) + sigma mu e
    target = sigma * mu * K.unit(lam) - multiply(K, affine[3], affine[2])
    u = divide(K, lam, target) - lam
    rk = sigma * mu - tau * kappa - affine[4] * affine[5]
    keep = 1 - sigma
    a = factor.solve(
        (-keep * r1)[..., None], (-keep * r2)[..., None], (-keep * scaled - u)[..., None]
    )
    dx, dy, wdz, wds, dtau, dkappa = finish(tuple(t[..., 0] for t in a), u, keep, rk)
    alpha = (0.99 * reach(wdz, wds, dtau, dkappa)).clamp(max=1.0)
    dz, ds = W.solve(wdz), W.times(wds)
    finite = torch.stack([torch.isfinite(t).all(1) for t in (dx, dy, dz, ds, dtau, dkappa)]).all(0)
    return Step(dx, dy, dz, ds, dtau, dkappa, alpha, finite)
