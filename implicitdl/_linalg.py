"""Shared tensor mathematics: Perron roots, strong components, projections onto l1 balls and cones.

Plain functions on tensors. Nothing here knows of activations, models or solvers.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


class Perron(NamedTuple):
    """The Perron root of a non-negative matrix, with eigenvectors and a rigorous bracket."""

    root: float  # max eigenvalue, the upper end of the bracket
    lower: float  # lower <= true root <= root, up to rounding of one matrix-vector product
    right: Tensor  # (n,) M v = root v, v >= 0, max 1
    left: Tensor  # (n,) M' u = root u, u >= 0, max 1


def strong_components(mask: Tensor | np.ndarray) -> list[np.ndarray]:
    """Strongly connected components of `x_i depends on x_j where mask[i, j]`, in evaluation order.

    Args:
        mask: Boolean matrix (n, n); `mask[i, j]` says that state i reads state j.

    Returns:
        Index arrays. A component reads only from itself and from the components before it.
    """
    from scipy.sparse import csr_matrix  # slow to import: not at `import implicitdl`
    from scipy.sparse.csgraph import connected_components

    mask = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask, dtype=bool)
    n = mask.shape[0]
    if n == 0:
        return []
    if mask.all():
        return [np.arange(n)]
    count, label = connected_components(csr_matrix(mask), directed=True, connection="strong")
    # Order the components by Kahn's algorithm on the quotient graph: scipy promises no order.
    rows, cols = np.nonzero(mask)
    # An edge (read, reader) between components, as one sorted number: grouped by what is read.
    edges = np.sort(label[cols].astype(np.int64) * count + label[rows])
    edges = edges[np.diff(edges, prepend=-1) > 0]  # numpy's unique hashes, many times slower
    read, reader = edges // count, edges % count
    read, reader = read[read != reader], reader[read != reader]
    waiting = np.bincount(reader, minlength=count)
    start = np.searchsorted(read, np.arange(count + 1))
    ready = list(np.flatnonzero(waiting == 0)[::-1])
    order: list[int] = []
    while ready:
        c = ready.pop()
        order.append(c)
        readers = reader[start[c] : start[c + 1]]
        waiting[readers] -= 1
        ready.extend(readers[waiting[readers] == 0])
    members = np.argsort(label, kind="stable")
    ends = np.searchsorted(label[members], np.arange(count + 1))
    return [members[ends[c] : ends[c + 1]] for c in order]


def perron(M: Tensor, tol: float = 1e-12) -> Perron:
    """Perron root of M >= 0 with right and left eigenvectors: max{|lambda|} over the spectrum.

    For every v > 0 the root lies in [min_i (Mv)_i/v_i, max_i (Mv)_i/v_i] (Collatz, Wielandt), so
    each iterate brings a proof with it. The power method on M + shift I is tried first; where it
    is slow (periodic or nearly reducible M) the strong components are separated and Noda's
    inverse iteration v <- (mu I - M)^{-1} v, mu = max_i (Mv)_i/v_i, converges quadratically with
    mu decreasing to the root. No eigenvalue of a non-normal matrix is ever computed, so a
    nilpotent matrix with huge entries has root 0 and not eps^(1/n).

    Args:
        M: Non-negative matrix (n, n), any float dtype; computed in float64.
        tol: Relative width of the bracket at which to stop.

    Returns:
        A `Perron` tuple; its vectors are float64 on M's device.

    Reference:
        Noda 1971, Numer. Math. 17; Berman and Plemmons 1994, chapter 2.
    """
    a = M.detach().to(torch.float64).cpu().numpy()
    n = a.shape[0]
    if n == 0:
        empty = torch.zeros(0, dtype=torch.float64, device=M.device)
        return Perron(0.0, 0.0, empty, empty)
    root, lower, right = _power(a, tol)
    if root is not None:
        _, _, left = _power(a.T, tol)
        if left is not None:
            return Perron(root, lower, *(torch.from_numpy(x).to(M.device) for x in (right, left)))
    blocks = strong_components(a != 0)
    parts = [_noda(a[np.ix_(c, c)], tol) for c in blocks]
    root = max(p[0] for p in parts)
    # The lower bound of any one component is a lower bound of the root.
    lower = max(p[1] for p in parts)
    right = _extend(a, blocks, parts, root, 2)
    left = _extend(a.T, blocks[::-1], parts[::-1], root, 3)
    return Perron(root, lower, *(torch.from_numpy(x).to(M.device) for x in (right, left)))


def _power(a: np.ndarray, tol: float, steps: int = 40):
    """Shifted power iteration from the all-ones vector; (None, None, None) if it is slow."""
    v = np.ones(a.shape[0])
    shift = 0.0
    for _ in range(steps):
        w = a @ v
        ratio = w / v
        low, high = ratio.min(), ratio.max()
        if not np.isfinite(high):
            break
        if high - low <= tol * high:
            return float(high), float(low), v / v.max()
        if low <= 0.0:  # a shift makes the iteration aperiodic; without need it only slows it
            shift = 0.25 * high
        v = w + shift * v
        v /= v.max()
        if v.min() < 1e-200:
            break
    return None, None, None


def _noda(a: np.ndarray, tol: float) -> tuple[float, float, np.ndarray, np.ndarray]:
    """(root, lower, right, left) of an irreducible non-negative matrix."""
    from scipy.linalg import lu_factor, lu_solve, matrix_balance

    n = a.shape[0]
    if n == 1:
        return float(a[0, 0]), float(a[0, 0]), np.ones(1), np.ones(1)
    scale = a.max()
    # Work on B = V^-1 a V with the current vector v on the diagonal of V: B's row sums are the
    # Collatz-Wielandt ratios, and the solves stay accurate however far apart the entries of v lie.
    # Balancing first saves the many steps spent far from the root on, say, an uneven cycle.
    B, (v, _) = matrix_balance(a / scale, permute=False, separate=True)
    root, bottom, floor, best, ones = np.inf, 0.0, 0.0, v, np.ones(n)
    with np.errstate(all="ignore"):
        for _ in range(80):
            rows = B.sum(1)
            low, high = float(rows.min()), float(rows.max())
            if not high < root:
                break  # rounding has stopped the descent
            slow = high - low > 0.25 * (root - bottom)
            root, bottom, best = high, max(low, bottom), v
            floor = max(floor, bottom)
            if high - low <= tol * high:
                break
            y = None
            if slow:
                # Far from the root, try half-way: a positive solution proves that it lies above.
                half = (floor + high) / 2
                y = _m_solve(B, half, ones)
                floor = half if y is None else floor
            if y is None:
                y = _m_solve(B, high * (1 + 4 * EPS), ones)
            if y is None:
                break
            v, B = v * y, B * (y / y[:, None])
        # The left vector: inverse iteration just above the root, which is now known.
        B = (a / scale) * (best / best[:, None])
        factor = lu_factor(root * (1 + 1e-11) * np.eye(n) - B, check_finite=False)
        w = ones
        for _ in range(6):
            w = np.abs(lu_solve(factor, w, trans=1, check_finite=False))
            w = w / w.max()
    left = w / best
    return scale * root, scale * bottom, best / best.max(), left / left.max()


def _m_solve(B: np.ndarray, mu: float, rhs: np.ndarray) -> np.ndarray | None:
    """(mu I - B)^{-1} rhs scaled to maximum 1, or None where it is not positive: mu <= the root."""
    try:
        y = np.linalg.solve(mu * np.eye(len(rhs)) - B, rhs)
    except np.linalg.LinAlgError:
        return None
    return y / y.max() if np.isfinite(y).all() and y.min() > 0 else None


def _extend(a, blocks, parts, root: float, which: int) -> np.ndarray:
    """Non-negative eigenvector of a reducible matrix, from the eigenvectors of its components.

    Take a component c with the largest root that no other such component reads. The vector is c's
    own on c, and on the components that read c the solution of (root I - M_uu) v_u = M_uc v_c.
    """
    v = np.zeros(a.shape[0])
    close = root * (1 - 1e-10)
    last = max(k for k, p in enumerate(parts) if p[0] >= close)
    v[blocks[last]] = parts[last][which]
    for k in range(last + 1, len(blocks)):
        c = blocks[k]
        load = a[c] @ v
        if load.any():
            m = root * np.eye(len(c)) - a[np.ix_(c, c)]
            v[c] = np.abs(np.linalg.solve(m, load))
    return v / v.max()


def resolvent_vector(M: Tensor, kappa: float) -> Tensor | None:
    """v = (kappa I - M)^{-1} 1 for M >= 0: v > 0 and M v = kappa v - 1, if the root is < kappa.

    The solve walks the strong components in order, so that a nilpotent M is solved by additions
    and multiplications of non-negative numbers alone and every entry of v is accurate.

    Args:
        M: Non-negative matrix (n, n).
        kappa: Upper bound to certify for the Perron root of M.

    Returns:
        v (n,) in float64, solved for kappa less a few rounding units, with `M v < kappa v`
        checked with a rounding allowance, or None where the Perron root is not below kappa (or
        v overflows).

    Reference:
        Berman and Plemmons 1994, chapter 6 (non-singular M-matrices, condition I27).
    """
    from scipy.linalg import LinAlgError, lu_factor, lu_solve

    a = M.detach().to(torch.float64).cpu().numpy()
    n = a.shape[0]
    v = np.zeros(n)
    # Where v is huge, M v = kappa v - 1 leaves no slack that rounding respects: aim lower.
    aim = kappa * (1 - 16 * n * EPS)
    with np.errstate(all="ignore"):
        for c in strong_components(a != 0):
            rhs = 1.0 + a[c] @ v
            m = aim * np.eye(len(c)) - a[np.ix_(c, c)]
            try:
                if len(c) == 1:
                    v[c] = rhs / m[0, 0]
                else:
                    v[c] = lu_solve(lu_factor(m, check_finite=False), rhs, check_finite=False)
            except (LinAlgError, ValueError):
                return None
            if not (np.isfinite(v[c]).all() and (v[c] > 0).all()):
                return None
        if not ((a @ v) * (1 + 4 * n * EPS) < kappa * v).all():
            return None
    return torch.from_numpy(v).to(M.device)


@torch.library.custom_op("implicitdl::perron_root", mutates_args=())
def _perron_op(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = M.shape[:-2], M.shape[-1]
    parts = [perron(m) for m in M.reshape(-1, n, n)]
    root = M.new_tensor([p.root for p in parts]).reshape(batch)
    right = M.new_empty(len(parts), n)
    left = M.new_empty(len(parts), n)
    for k, p in enumerate(parts):
        right[k], left[k] = p.right, p.left
    return root, right.reshape(*batch, n), left.reshape(*batch, n)


@_perron_op.register_fake
def _(M):
    return M.new_empty(M.shape[:-2]), M.new_empty(M.shape[:-1]), M.new_empty(M.shape[:-1])


@_perron_op.register_vmap
def _(info, in_dims, M):
    return _perron_op(M.movedim(in_dims[0], 0)), (0, 0, 0)


class _PerronRoot(torch.autograd.Function):
    """The gradient of the root; the operator above keeps the search out of compiled graphs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _perron_op(M)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, g_root: Tensor, *_):
        return _root_gradient(g_root, *ctx.saved_tensors)


def _root_gradient(g_root: Tensor, M: Tensor, root: Tensor, right: Tensor, left: Tensor) -> Tensor:
    """g u v' / u'v, differentiable in M where a second derivative is being built."""
    if torch.is_grad_enabled():
        # A second derivative is being built: make the eigenvectors functions of M, correct to
        # first order, by one Newton step with a constant Jacobian. Only then is a solve needed.
        right = _attached_vector(M, root, right, left)
        left = _attached_vector(M.mT, root, left, right.detach())
    inner = (left * right).sum(-1)
    return (g_root / inner)[..., None, None] * left[..., :, None] * right[..., None, :]


def _attached_vector(M: Tensor, root: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """v + (group inverse) (M v - root v): value v, first derivative that of the eigenvector."""
    n = v.shape[-1]
    inner = (u * v).sum(-1)[..., None, None]
    spectral = v[..., :, None] * u[..., None, :] / inner  # the projector onto the eigenspace
    eye = torch.eye(n, dtype=v.dtype, device=v.device)
    shifted = (root[..., None, None] * eye - M).detach() + root[..., None, None] * spectral
    flow = (M @ v[..., None]).squeeze(-1)
    flow = flow - (spectral @ flow[..., None]).squeeze(-1)
    step = torch.linalg.solve(shifted, flow)
    return v + (step - step.detach())


def perron_root(M: Tensor) -> Tensor:
    """Differentiable Perron root lambda(M), M >= 0: d lambda = u' dM v / u'v.

    Args:
        M: Non-negative matrices (..., n, n).

    Returns:
        The roots (...), with first and second derivatives (where the root is simple), under
        autograd, `torch.func.grad`, `vmap` and `torch.compile`.
    """
    return _PerronRoot.apply(M)[0]


def _soft_level(size: Tensor, weights: Tensor, radius: Tensor, free: Tensor | None) -> Tensor:
    """theta >= 0 with [c - theta] + sum_j w_j (size_j - theta w_j)_+ = radius; 0 if inside.

    The bracketed term, with c = `free`, is there only where `free` is given. The left side is
    convex, decreasing and piecewise linear in theta, so Newton's method from 0 climbs to the root
    without ever passing it and ends, exactly, when the set of active entries repeats. It takes a
    few passes over the data where a sort takes tens.

    Args:
        size: |W|, (rows, n).
        weights: w >= 0, (rows, n) or (1, n).
        radius: (rows, 1).
        free: c, (rows, 1), or None.

    Reference:
        Michelot 1986, J. Optim. Theory Appl. 50 (the iteration); Condat 2016 (its cost).
    """
    total = radius if free is None else radius - free
    extra = 0.0 if free is None else 1.0
    with torch.no_grad():
        usable = weights > 0
        # One active entry already asks for theta >= (w_j size_j - total) / (w_j^2 + extra).
        tiny = torch.finfo(size.dtype).tiny
        start = (weights * size - total) / (weights * weights + extra).clamp_min(tiny)
        theta = torch.where(usable, start, 0.0).amax(-1, keepdim=True).clamp_min(0)
        if free is not None:
            theta = torch.maximum(theta, -total)
        squares = weights * weights
        excess, active = torch.empty_like(size), torch.empty_like(size)
        for _ in range(
            size.shape[-1] + 1
        ):  # the active set can only shrink; about five in practice
            torch.mul(weights, theta, out=excess)
            torch.sub(size, excess, out=excess).clamp_min_(0)
            torch.sign(excess, out=active)
            slope = active.mul_(squares).sum(-1, keepdim=True).add_(extra)
            gap = excess.mul_(weights).sum(-1, keepdim=True).sub_(total).sub_(extra * theta)
            step = torch.where(slope > 0, gap / slope.clamp_min(tiny), 0.0)
            moved = theta + step.clamp_min_(0)
            if bool((moved <= theta).all()):
                break
            theta = moved
        active = (size >= theta * weights) & usable
        found = active.any(-1, keepdim=True) | (free is not None)
    # The same level once more, from the active entries alone, so that it has a gradient. Rounding
    # can leave no entry where the radius is 0 (or below the rounding of W): keep theta there.
    level = _level(size, weights, active, total, free is not None)
    return torch.where(found, level, theta).clamp_min(0)


def _level(size: Tensor, weights: Tensor, active: Tensor, total: Tensor, free: bool) -> Tensor:
    """The root of the linear piece on which exactly the `active` entries are non-zero."""
    kept = weights * active
    numerator = (kept * size).sum(-1, keepdim=True) - total
    denominator = (kept * weights).sum(-1, keepdim=True) + (1 if free else 0)
    return numerator / denominator.clamp_min(torch.finfo(size.dtype).tiny)


def project_l1(
    W: Tensor,  # (..., n)
    radius: float | Tensor,  # broadcasts against (...)
    weights: Tensor | None = None,  # broadcasts against (..., n), >= 0
) -> Tensor:
    """argmin_P ||P - W||_2 over sum_j w_j |P_j| <= r, for every row at once.

    Args:
        W: Rows to project, (..., n).
        radius: r >= 0, a number or one per row (...).
        weights: w >= 0, (n,) or (..., n); None for ones. A zero weight leaves its entry free.

    Returns:
        The projections (..., n); the identity inside, differentiable almost everywhere.

    Raises:
        ValueError: A radius or weight is negative.

    Reference:
        Duchi, Shalev-Shwartz, Singer and Chandra 2008, figure 1; Pardalos and Kovoor 1990.
    """
    radius = torch.as_tensor(radius, dtype=W.dtype, device=W.device)
    if bool((radius < 0).any()):
        raise ValueError(f"radius must be >= 0: got {float(radius.min())}, an empty ball")
    if weights is None:
        weights = torch.ones((), dtype=W.dtype, device=W.device)
    elif bool((weights < 0).any()):
        raise ValueError(f"weights must be >= 0: got {float(weights.min())}")
    if W.shape[-1] == 0:
        return W
    n = W.shape[-1]
    weights = weights.to(W.dtype).expand(W.shape if weights.dim() > 1 else (1, n)).reshape(-1, n)
    rows = W.reshape(-1, n)
    radius = radius.expand(W.shape[:-1]).reshape(-1, 1)
    bound = _soft_level(rows.abs(), weights, radius, None) * weights
    return (rows - rows.clamp(min=-bound, max=bound)).reshape(W.shape)


def project_matrix_measure(
    W: Tensor,  # (..., n, n)
    gamma: float,
    weights: Tensor | None = None,  # (n,) > 0
) -> Tensor:
    """argmin_P ||P - W||_F over P_ii + sum_{j != i} |P_ij| v_j / v_i <= gamma for every row i.

    The diagonal enters linearly, so KKT gives P_ii = W_ii - theta_i and off it the soft threshold
    at theta_i v_j / v_i, with one multiplier a row found as for the l1 ball.

    Args:
        W: Matrices (..., n, n).
        gamma: Bound on the matrix measure mu_{inf, v}.
        weights: v > 0 (n,); None for ones.

    Returns:
        The projections, the identity inside.
    """
    n = W.shape[-1]
    if n == 0:
        return W
    eye = torch.eye(n, dtype=W.dtype, device=W.device)
    v = torch.ones(n, dtype=W.dtype, device=W.device) if weights is None else weights.to(W.dtype)
    w = ((v[None, :] / v[:, None]) * (1 - eye)).expand(W.shape)
    off = W * (1 - eye)
    diagonal = W.diagonal(dim1=-2, dim2=-1).reshape(-1, 1)
    radius = torch.full_like(diagonal, gamma)
    theta = _soft_level(off.abs().reshape(-1, n), w.reshape(-1, n), radius, diagonal)
    theta = theta.reshape(*W.shape[:-1], 1)
    return W - off.clamp(min=-theta * w, max=theta * w) - theta * eye


def project_simplex(
    W: Tensor,  # (..., n)
    total: float | Tensor = 1.0,
) -> Tensor:
    """argmin_P ||P - W||_2 over P >= 0, sum_j P_j = total, for every row at once.

    Args:
        W: Rows (..., n), n >= 1.
        total: Sum of each projected row, > 0; broadcasts against (...).

    Returns:
        The projections (..., n), differentiable almost everywhere.

    Reference:
        Duchi et al. 2008, figure 1.
    """
    total = torch.as_tensor(total, dtype=W.dtype, device=W.device)[..., None]
    with torch.no_grad():
        u = W.sort(dim=-1, descending=True).values
        k = torch.arange(1, W.shape[-1] + 1, dtype=W.dtype, device=W.device)
        active = (u * k > u.cumsum(-1) - total).sum(-1, keepdim=True).clamp_min(1)
        cut = u.gather(-1, active - 1)
    chosen = (cut <= W).to(W.dtype)
    theta = ((chosen * W).sum(-1, keepdim=True) - total) / chosen.sum(-1, keepdim=True)
    return (W - theta).clamp_min(0)


def project_second_order_cone(
    t: Tensor,  # (...)
    x: Tensor,  # (..., n)
) -> tuple[Tensor, Tensor]:
    """Nearest (s, y) to (t, x) with ||y||_2 <= s, for every row at once.

    Args:
        t: Heights (...).
        x: Vectors (..., n).

    Returns:
        s (...) and y (..., n): (t, x) itself inside, 0 in the polar cone, and otherwise
        s = (t + ||x||)/2, y = s x/||x||.

    Reference:
        Parikh and Boyd 2014, section 6.3.2.
    """
    length = torch.linalg.vector_norm(x, dim=-1)
    safe = torch.where(length > 0, length, torch.ones_like(length))
    half = (t + length) / 2
    inside, polar = length <= t, length <= -t
    s = torch.where(inside, t, torch.where(polar, torch.zeros_like(t), half))
    scale = torch.where(polar, torch.zeros_like(t), half / safe)
    y = torch.where(inside[..., None], x, scale[..., None] * x)
    return s, y
