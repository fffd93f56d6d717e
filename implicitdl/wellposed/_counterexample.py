"""Search for two solutions of x = phi(A x + b) with one b. Nothing is returned unverified.

In z = A x + b the equation is G(z) = z - A phi(z) = b. Where det G' has different signs at two
points, G folds somewhere between them, and next to a fold every b on one side has two preimages.
For entrywise phi the points are vertices of the slope box, found by flipping one slope at a time:
det is affine in each slope, so the factor of every flip is known from one inverse. This decides
piecewise linear phi: two adjacent orthants of opposite orientation are folded onto each other.
"""

from fractions import Fraction

import numpy as np

from ._conditions import P_LIMIT, Component, vertex_determinants

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # b, x1, x2


def refute_component(p: Component, seed: int) -> Pair | None:
    """(b, x1, x2) with two verified, clearly distinct equilibria of one component, or None."""
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        if p.entrywise:
            spots = _slope_points(p)
            pair = _singular_vertex(p, spots)
            if pair is not None:
                return pair
            ends = _opposite_vertices(p, spots, rng)
        else:
            ends = _opposite_samples(p, rng)
        return None if ends is None else _fold(p, *ends, rng)


def refute_whole(whole: Component, p: Component, pair: Pair, seed: int) -> Pair | None:
    """Extend two equilibria of one component to two of the whole state, verified again.

    States upstream get an input for which z = 0 solves their equation. States downstream see two
    different inputs; they must have an equilibrium under both.
    """
    n, inner = len(whole.a), p.states
    if len(inner) == n:
        return pair
    b_inner, x1_inner, x2_inner = pair
    reads, seen = whole.a != 0, np.zeros(n, dtype=bool)
    seen[inner] = True
    while True:  # the states that read, directly or not, from the component
        same_node = np.bincount(whole.node, weights=reads[:, seen].any(1)) > 0
        more = seen | same_node[whole.node]
        if (more == seen).all():
            break
        seen = more
    down = np.flatnonzero(seen & ~np.isin(np.arange(n), inner))
    up = np.flatnonzero(~seen)
    x = np.zeros((2, n))
    x[:, up] = whole.call(np.zeros(n))[up]
    x[0, inner], x[1, inner] = x1_inner, x2_inner
    b = np.zeros(n)
    b[up] = -(whole.a[np.ix_(up, up)] @ x[0, up])
    b[inner] = b_inner - whole.a[np.ix_(inner, up)] @ x[0, up]
    rng = np.random.default_rng(seed)
    jump = whole.a[np.ix_(down, inner)] @ (x2_inner - x1_inner)
    low = 1 + 2 * np.abs(jump).max(initial=0.0)
    part = whole.sub(down)
    fixed = np.concatenate([inner, up])
    load = whole.a[np.ix_(down, fixed)] @ x[:, fixed].T  # (down, 2)
    with np.errstate(all="ignore"):
        for target in (-low, 0.0, low, None):
            if len(down) == 0:
                return _accepted(whole, b, x)
            z = rng.normal(size=len(down)) if target is None else np.full(len(down), target)
            own = part.a @ part.call(z)
            b[down] = z - own - load[:, 0]
            x[0, down] = part.call(z)
            z2 = _newton(part, b[down] + load[:, 1], z + load[:, 1] - load[:, 0])
            if z2 is None:
                continue
            x[1, down] = part.call(z2)
            found = _accepted(whole, b, x)
            if found is not None:
                return found
    return None


def _accepted(p: Component, b: np.ndarray, x: np.ndarray) -> Pair | None:
    found = _verified(p, b, b + p.a @ x[0], b + p.a @ x[1])
    if found is None and p.phi.homogeneous and len(b) <= 64 and all(_exact(p, b, y) for y in x):
        return b, x[0], x[1]
    return found


def _slope_points(p: Component) -> tuple[np.ndarray, np.ndarray]:
    """For each state, a z where its slope is smallest and one where it is largest."""
    grid = np.concatenate([np.linspace(-8, 8, 641), [-40.0, -15.0, 15.0, 40.0]])
    n = len(p.a)
    d = p.slopes(np.repeat(grid[:, None], n, axis=1))
    # Ties, as in every piecewise linear phi, go to the point nearest to |z| = 1.
    tie = 1e-9 * np.abs(np.abs(grid) - 1)[:, None]
    return grid[(d + tie).argmin(0)], grid[(d - tie).argmax(0)]


def _opposite_vertices(p: Component, spots, rng) -> tuple[np.ndarray, np.ndarray] | None:
    """Two points z that differ in one state, with opposite signs of det(I - D(z) A)."""
    z_low, z_high = spots
    d_low, d_high = p.slopes(np.stack([z_low, z_high]))
    n, a = len(p.a), p.a
    if n <= P_LIMIT:
        value, vertices = vertex_determinants(p)
        code = np.arange(len(value))
        for k in range(n):
            other = code ^ (1 << (n - 1 - k))
            both = value * value[other]
            best = int(both.argmin())
            if both[best] < 0:
                ends = [np.where(vertices[v], z_high, z_low) for v in (best, other[best])]
                if _sign(p, ends[0]) * _sign(p, ends[1]) < 0:
                    return ends[0], ends[1]
        return None
    for trial in range(12 if n > 128 else 40):
        share = (1.0, 0.5, 0.0)[trial] if trial < 3 else rng.uniform()
        high = rng.uniform(size=n) < share
        for flip in range(2 * n):
            if flip % 50 == 0:
                d = np.where(high, d_high, d_low)
                try:
                    inverse = np.linalg.inv(np.eye(n) - d[:, None] * a)
                except np.linalg.LinAlgError:
                    break
            delta = np.where(high, d_low - d_high, d_high - d_low)
            factor = 1 - delta * np.einsum("ij,ji->i", a, inverse)
            i = int(factor.argmin())
            if factor[i] < 0:
                z = np.where(high, z_high, z_low)
                other = z.copy()
                other[i] = z_low[i] if high[i] else z_high[i]
                if _sign(p, z) * _sign(p, other) < 0:
                    return z, other
                break
            if not 0 < factor[i] < 1 - 1e-9:
                break
            inverse += np.outer(inverse[:, i], (delta[i] / factor[i]) * (a[i] @ inverse))
            high[i] = ~high[i]
    return None


def _opposite_samples(p: Component, rng) -> tuple[np.ndarray, np.ndarray] | None:
    """Two random points with opposite signs of det G'."""
    n = len(p.a)
    kept: dict[float, np.ndarray] = {}
    for trial in range(200 if n <= 128 else 40):
        z = rng.normal(size=n) * 10.0 ** rng.uniform(-2, 1) if trial else np.zeros(n)
        kept.setdefault(_sign(p, z), z)
        if 1.0 in kept and -1.0 in kept:
            return kept[1.0], kept[-1.0]
    return None


def _slope_matrix(p: Component, z: np.ndarray) -> np.ndarray:
    step = p.a * p.slopes(z) if p.entrywise else p.a @ p.jacobian(z)
    return np.eye(len(z)) - step


def _sign(p: Component, z: np.ndarray) -> float:
    return float(np.linalg.slogdet(_slope_matrix(p, z))[0])


def _fold(p: Component, z1: np.ndarray, z2: np.ndarray, rng) -> Pair | None:
    """Two preimages of one b, on the two sides of the fold between z1 and z2."""
    start = _sign(p, z1)
    low, high = 0.0, 1.0
    for _ in range(50):
        mid = (low + high) / 2
        low, high = (mid, high) if _sign(p, z1 + mid * (z2 - z1)) == start else (low, mid)
    z = z1 + low * (z2 - z1)
    # At a smooth fold the two preimages lie along the null vector; at a kink, across it.
    m = _slope_matrix(p, z)
    null = rng.normal(size=len(z))
    shift = 1e-13 * np.abs(m).max() * np.eye(len(z))
    for _ in range(3):
        null = np.linalg.solve(m + shift, null)
        null = null / np.abs(null).max()
    across = (z2 - z1) / np.abs(z2 - z1).max()
    for s in (4.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.03, 0.01):
        for direction in (null, across):
            for side in (s, -s):
                first = z + side * direction
                b = first - p.a @ p.call(first)
                second = _newton(p, b, z - side * direction)
                if second is not None:
                    found = _verified(p, b, first, second)
                    if found is not None:
                        return found
    return None


def _singular_vertex(p: Component, spots) -> Pair | None:
    """A line of equilibria where I - D A is singular; exact arithmetic only (see `_exact`)."""
    n = len(p.a)
    if not p.phi.homogeneous or n > 64:
        return None
    null_space = np.linalg.svd(np.eye(n) - p.hi[:, None] * p.a)
    if null_space[1][-1] > 1e-12 * max(1.0, null_space[1][0]):
        return None
    w = null_space[2][-1]
    w = np.round(w / np.abs(w).max(), 10)
    x1, x2 = 2.0 + w, 2.0 + w / 2
    b = x1 - p.a @ x1
    return (b, x1, x2) if all(_exact(p, b, x) for x in (x1, x2)) else None


def _exact(p: Component, b: np.ndarray, x: np.ndarray) -> bool:
    """Whether x = phi(A x + b) without any rounding, for x where phi is the identity."""
    if not (p.call(x) == x).all():
        return False
    exact = [Fraction(float(t)) for t in x]
    for row, shift, value in zip(p.a, b, exact, strict=True):
        total = sum(Fraction(float(c)) * t for c, t in zip(row, exact, strict=True))
        if total + Fraction(float(shift)) != value:
            return False
    return True


def _newton(p: Component, b: np.ndarray, z: np.ndarray, steps: int = 40) -> np.ndarray | None:
    """Semismooth Newton for z - A phi(z) = b with step halving; None where it fails."""
    r = z - p.a @ p.call(z) - b
    for _ in range(steps):
        size = np.abs(r).max(initial=0.0)
        if not np.isfinite(size):
            return None
        if size <= 1e-13 * (1 + np.abs(z).max(initial=0.0)):
            return z
        try:
            step = np.linalg.solve(_slope_matrix(p, z), r)
        except np.linalg.LinAlgError:
            return None
        t, moved = 1.0, False
        while t > 1e-3 and not moved:
            trial = z - t * step
            r_trial = trial - p.a @ p.call(trial) - b
            moved = np.abs(r_trial).max() < size
            t /= 2
        if not moved:
            return z if size <= 1e-11 * (1 + np.abs(z).max()) else None
        z, r = trial, r_trial
    return None


def _verified(p: Component, b: np.ndarray, z1: np.ndarray, z2: np.ndarray) -> Pair | None:
    """(b, x1, x2) if both are solutions beyond doubt and clearly distinct."""
    states = []
    for z in (z1, z2):
        x = p.call(z)
        residual = p.call(p.a @ x + b) - x
        try:
            # How far the exact solution is: one Newton step from here.
            step = np.linalg.solve(_slope_matrix(p, z), z - p.a @ x - b)
        except np.linalg.LinAlgError:
            return None
        if not np.isfinite(step).all():
            return None
        size = 1 + np.abs(x).max()
        if np.abs(residual).max() > 1e-11 * size or np.abs(residual).max() > 1e-10:
            return None
        states.append((x, np.abs(step).max(), size))
    (x1, step1, size1), (x2, step2, size2) = states
    distance = np.abs(x1 - x2).max()
    away = np.abs(z1 - z2).max()
    if distance < 1e-4 * max(size1, size2) or max(step1, step2) > 1e-6 * away:
        return None
    return b, x1, x2
