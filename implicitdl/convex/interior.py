"""The homogeneous self-dual embedding of a batch of cone programs, by an interior-point method.

    0     = P x + A'y + G'z + q tau
    0     = A x - b tau
    0     = G x + s - h tau
    0     = x'P x / tau + q'x + b'y + h'z + kappa,      (s, z) in K x K,  tau, kappa >= 0

has a solution with tau > 0, from which x / tau is optimal, or with kappa > 0, from which a proof
follows that no x is feasible, or that the objective has no bound. Steps are Mehrotra's, in Nesterov
and Todd's scaling W; the normal equations have P + G'W^-2 G + A'A and its Schur complement in A, by
Cholesky. An instance that is done leaves the batch once a quarter of it is done.

Reference: Goulart, Chen (2024), "Clarabel: an interior-point solver for conic programs with quadratic
objectives"; Vandenberghe (2010).
"""

import functools

import torch
from torch import Tensor

from .cones import divide, longest_step, multiply, scaling
from .program import Program, cholesky, cholesky_solve, size_of


class State:
    """Where the embedding stands: x, y, z, s, tau and kappa, views of one tensor.

    Args:
        data: # (batch, n + p + 2 M + 2)
        sizes: (n, p, M).
    """

    def __init__(self, data: Tensor, sizes: tuple[int, int, int]):
        self.data, self.sizes = data, sizes
        n, p, M = sizes
        self.x, self.y, self.z, self.s, self.tau, self.kappa = data.split([n, p, M, M, 1, 1], 1)

    def point(self) -> Tensor:
        """(x, y, s - z) / tau, where the optimality conditions are looked at."""
        return torch.cat([self.x, self.y, self.s - self.z], 1) / self.tau

    def select(self, index: Tensor) -> "State":
        """Some of the instances."""
        return State(self.data[index], self.sizes)


SOLVED, INFEASIBLE, UNBOUNDED, GOING, BROKEN = range(5)
_GONE = 1e-13


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
    whole, v = program, start(program) if v is None else v
    state, rows = State(v.data.clone(), v.sizes), torch.arange(program.batch, device=v.data.device)
    outcome, steps = torch.full_like(rows, GOING), torch.zeros_like(rows)
    r = Residuals(program, v)
    now = _outcome(program, v, r, tol, proof)  # of the instances `rows`, which v consists of
    for count in range(max_steps + 1):
        going = now == GOING
        left = int(going.sum())
        if left <= 0.75 * rows.numel() or count == max_steps:
            state.data[rows], outcome[rows] = v.data, now
            if not left or count == max_steps:
                break
            keep = torch.nonzero(going).flatten()
            v, program, rows = v.select(keep), program.select(keep), rows[keep]
            r, now, going = Residuals(program, v), now[keep], going[keep]
        steps[rows] += going
        step, alpha = _direction(program, v, r)
        # A step of NaN moves nothing.
        ok = torch.isfinite(step.sum(1)) & torch.isfinite(alpha)
        alpha = torch.where(ok & going, alpha, 0.0)[:, None]
        v = State(torch.where(alpha > 0, v.data + alpha * step, v.data), v.sizes)
        r = Residuals(program, v)
        new = _outcome(program, v, r, tol, proof)
        now = torch.where(going, torch.where(ok, new, BROKEN), now)
    stuck = torch.nonzero((outcome == GOING) | (outcome == BROKEN)).flatten()
    if proof and stuck.numel():
        found, hit = _proved(whole.select(stuck), state.select(stuck), proof)
        state.data[stuck] = torch.where(hit[:, None], found.data, state.data[stuck])
        outcome[stuck] = torch.where(hit, INFEASIBLE, outcome[stuck])
    return state, outcome, steps


def _proved(program: Program, v: State, proof: float) -> tuple[State, Tensor]:
    """States whose y and z fulfil A'y + G'z = 0 to rounding, and which of them prove that no x is
    feasible: near the border of infeasibility the steps' own rounding hides it."""
    G, A = program.rows
    p, H = program.b.shape[1], G.square(program.batch)
    if p:
        H += program.gram
    L, _ = cholesky(H, 4 * torch.finfo(H.dtype).eps)
    y, z = v.y, v.z
    for _ in range(2):
        back = G.back(z) + A.back(y) if p else G.back(z)
        move = cholesky_solve(L, back[:, None])[:, 0]
        z = z - G.times(move)
        y = y - A.times(move) if p else y
    back = G.back(z) + A.back(y) if p else G.back(z)
    down = -(_dot(program.h, z) + _dot(program.b, y))[:, 0]
    inside = program.cones.depth(z) >= 0
    hit = inside & (v.kappa > v.tau)[:, 0] & (down > 0) & (size_of(back) < proof * down)
    return State(torch.cat([v.x, y, z, v.s, v.tau, v.kappa], 1), v.sizes), hit


class Factor:
    """K(x, y, z) = (t1, t2, t3) with K = [P A' G'; A 0 0; G 0 -F^-1], by Cholesky.

    Args:
        program: without a graph.
        H: G'F G, which is written on.
    """

    def __init__(self, program: Program, H: Tensor):
        self.program = program
        self.p = program.b.shape[1]
        if program.P is not None:
            H += program.P
        if self.p:
            H += program.gram
        self.H, eps = H, 4 * torch.finfo(H.dtype).eps
        self.L, self.play = cholesky(H, eps)
        if self.p:
            A = program.A
            rows = A.mT.expand(H.shape[0], -1, -1) if A.dim() == 2 else A.mT
            self.Y = torch.linalg.solve_triangular(self.L, rows, upper=False)
            self.LS, _ = cholesky(self.Y.mT @ self.Y, eps)

    def solve(self, t1: Tensor, t2: Tensor, Ft3: Tensor) -> tuple[Tensor, Tensor]:
        """x and y for rows t1 (batch, k, n), t2 (batch, k, p), F t3 (batch, k, M)."""
        G, A = self.program.rows
        rhs = t1 + G.back(Ft3)
        rhs = rhs + A.back(t2) if self.p else rhs
        x, y = self._solve(rhs, t2)
        if rhs.dtype == torch.float32:
            return x, y
        # Late in the iteration the entries of H differ by the square of those of W, and what was
        # added to its diagonal is no longer small.
        left = rhs - x @ self.H + self.play[..., None] * x
        if not self.p:
            return x + self._solve(left, t2)[0], y
        dx, dy = self._solve(left - A.back(y), t2 - A.times(x))
        return x + dx, y + dy

    def _solve(self, rhs: Tensor, t2: Tensor) -> tuple[Tensor, Tensor]:
        """x and y with H x + A'y = rhs, A x = t2."""
        if not self.p:
            return cholesky_solve(self.L, rhs), t2
        f = torch.linalg.solve_triangular(self.L, rhs.mT, upper=False)
        y = cholesky_solve(self.LS, f.mT @ self.Y - t2)
        x = torch.linalg.solve_triangular(self.L.mT, f - self.Y @ y.mT, upper=True).mT
        return x, y


def start(program: Program) -> State:
    """x, y, z of the program with K a whole space and ||s||^2 / 2 added; s and z shifted into K."""
    K = program.cones
    G, h = program.rows[0], program.h[:, None]
    factor = Factor(program, G.square(program.batch))
    x, y = factor.solve(-program.q[:, None], program.b[:, None], h)
    z = (G.times(x) - h)[:, 0]
    e = K.unit(program.q)

    def inside(u: Tensor) -> Tensor:
        depth = K.depth(u)[:, None]
        size = size_of(u).clamp_min(1.0)[:, None]
        return torch.where(depth > 1e-3 * size, u, u + (1 + (-depth).clamp_min(0)) * e)

    one = program.q.new_ones(program.batch, 1)
    data = torch.cat([x[:, 0], y[:, 0], inside(z), inside(-z), one, one], 1)
    return State(data, program.sizes)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)[..., None]


class Residuals:
    """The residuals of the embedding and the products that they consist of."""

    def __init__(self, program: Program, v: State):
        G, A = program.rows
        self.Px, self.back = program.quadratic(v.x), G.back(v.z)
        self.Gx = G.times(v.x)
        self.linear, self.support = _dot(program.q, v.x), _dot(program.h, v.z)
        self.Ax = self.r2 = v.y
        if program.b.shape[1]:
            self.back = self.back + A.back(v.y)  # A'y + G'z
            self.Ax = A.times(v.x)
            self.r2 = self.Ax - program.b * v.tau
            self.support = self.support + _dot(program.b, v.y)
        self.r1 = torch.addcmul(self.Px + self.back, program.q, v.tau)
        self.r3 = torch.addcmul(self.Gx + v.s, program.h, v.tau, value=-1)
        self.xPx = _dot(v.x, self.Px)
        self.r4 = self.xPx / v.tau + self.linear + self.support + v.kappa


def quality(program: Program, v: State) -> Tensor:
    """The error of x / tau as a solution: of feasibility, of stationarity, of the gap, relative."""
    return _quality(program, v, Residuals(program, v))


def _quality(program: Program, v: State, r: Residuals) -> Tensor:
    t = v.tau[:, 0]
    primal, scale_p = size_of(r.r3), torch.maximum(size_of(v.s), size_of(v.x)) / t
    scale_p = torch.maximum(scale_p, size_of(program.h))
    if program.b.shape[1]:
        primal = torch.maximum(primal, size_of(r.r2))
        scale_p = torch.maximum(scale_p, size_of(program.b))
    scale_d = torch.maximum(size_of(r.Px), size_of(v.z)) / t
    scale_d = torch.maximum(size_of(program.q), scale_d)
    half = 0.5 * (r.xPx / v.tau)
    cost = ((half + r.linear) / v.tau)[:, 0]
    bound = -((half + r.support) / v.tau)[:, 0]
    gap = (cost - bound).abs() / (1 + torch.minimum(cost.abs(), bound.abs()))
    worst = torch.maximum(primal / (t * (1 + scale_p)), size_of(r.r1) / (t * (1 + scale_d)))
    return torch.maximum(worst, gap)


def _outcome(program: Program, v: State, r: Residuals, tol: float, proof: float) -> Tensor:
    """What each instance's state proves."""
    solved = _quality(program, v, r) < tol
    out = torch.where(solved, SOLVED, GOING)
    # A certificate of infeasibility is scaled to h'z + b'y = -1, one of unboundedness to q'x = -1.
    # It is asked to be far better than the solution would be: kappa has taken over from tau.
    late = (v.kappa > v.tau)[:, 0] & ~solved
    if not bool(late.any()):
        return out
    down = -r.support[:, 0]
    infeasible = late & (down > 0) & (size_of(r.back) < proof * down)
    fall = -r.linear[:, 0]
    ray = torch.maximum(size_of(r.Px), size_of(r.Gx + v.s))
    if program.b.shape[1]:
        ray = torch.maximum(ray, size_of(r.Ax))
    unbounded = late & (fall > 0) & (ray < proof * fall)
    # Where tau is gone and nothing is proved, further steps do not change that.
    out = torch.where(late & (v.tau < _GONE * v.kappa)[:, 0], BROKEN, out)
    out = torch.where(unbounded, UNBOUNDED, out)
    return torch.where(infeasible, INFEASIBLE, out)


def _direction(program: Program, v: State, r: Residuals) -> tuple[Tensor, Tensor]:
    """Mehrotra's step, as `State.data`, and how much of it to take: an affine step tells how much to
    centre, and its second-order term."""
    K, G = program.cones, program.rows[0]
    tau, kappa, p = v.tau, v.kappa, program.b.shape[1]
    W = scaling(K, v.s, v.z)
    inverse, F = W.mapped(torch.reciprocal), W.mapped(lambda e: e**-2)
    lam = W(v.z)
    factor = Factor(program, G.normal(F))
    mu = (_dot(v.s, v.z) + tau * kappa) / (K.degree + 1)
    slope = torch.addcmul(program.q, r.Px, 2 / tau)
    # Right-hand sides: what tau moves, and the affine step, whose cone part is -lam o lam.
    top = torch.stack([-program.q, -r.r1], 1)
    middle = torch.stack([program.b, -r.r2], 1)
    scaled = inverse(torch.stack([program.h, r.r3], 1))
    g3 = torch.stack([scaled[:, 0], lam - scaled[:, 1]], 1)
    X, Y = factor.solve(top, middle, inverse(g3))
    Z = inverse(G.times(X)) - g3  # W z

    def gain(x: Tensor, y: Tensor, wz: Tensor) -> Tensor:
        out = _dot(slope, x) + _dot(scaled[:, 0], wz)
        return out + _dot(program.b, y) if p else out

    def finish(
        x: Tensor, y: Tensor, wz: Tensor, u: Tensor, keep: Tensor | float, rk: Tensor
    ) -> tuple[Tensor, ...]:
        dtau = (-keep * r.r4 - rk / tau - gain(x, y, wz)) / below
        dx = torch.addcmul(x, X[:, 0], dtau)
        dy = torch.addcmul(y, Y[:, 0], dtau) if p else y
        wdz = torch.addcmul(wz, Z[:, 0], dtau)
        return dx, dy, wdz, u - wdz, dtau, (rk - kappa * dtau) / tau

    below = gain(X[:, 0], Y[:, 0], Z[:, 0]) - r.xPx / tau**2 - kappa / tau
    _, _, wz, ws, dtau, dkappa = finish(X[:, 1], Y[:, 1], Z[:, 1], -lam, 1.0, -tau * kappa)
    reach = functools.partial(_reach, program, lam, v)
    alpha = reach(wz, ws, dtau, dkappa).clamp(max=1.0)[:, None]
    sigma = (1 - alpha).clamp_min(0) ** 3
    # Centred and corrected: lam o (W^-1 ds + W dz) = -lam o lam - (W^-1 ds_a) o (W dz_a) + sigma mu e
    target = sigma * mu * K.unit(lam) - multiply(K, ws, wz)
    u = divide(K, lam, target) - lam
    rk = sigma * mu - tau * kappa - dtau * dkappa
    keep = 1 - sigma
    g = -torch.addcmul(u, keep, scaled[:, 1])
    a, b = factor.solve(
        (-keep * r.r1)[:, None], (-keep * r.r2)[:, None], inverse(g)[:, None]
    )  # fmt: skip
    wz = inverse(G.times(a[:, 0])) - g
    dx, dy, wz, ws, dtau, dkappa = finish(a[:, 0], b[:, 0], wz, u, keep, rk)
    alpha = (0.99 * reach(wz, ws, dtau, dkappa)).clamp(max=1.0)
    return torch.cat([dx, dy, inverse(wz), W(ws), dtau, dkappa], 1), alpha


def _reach(
    program: Program, lam: Tensor, v: State, wz: Tensor, ws: Tensor, dtau: Tensor, dkappa: Tensor
) -> Tensor:
    """The longest step that leaves neither K nor the half-lines of tau and kappa."""
    K = program.cones
    t = longest_step(K, lam[:, None], torch.stack([wz, ws], 1)).amin(1)
    # -d / a is 1 over the step: of a half-line the largest of it and 0 is what counts.
    ends = torch.cat([dtau, dkappa], 1) / torch.cat([v.tau, v.kappa], 1)
    return torch.minimum(t, 1 / (-ends).amax(1).clamp_min(0))
