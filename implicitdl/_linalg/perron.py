"""Perron roots and vectors of non-negative matrices, and the strong components that they need."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .compiling import reverse_only

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


def balanced(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """D^-1 a D with rows and columns of like size, and d: powers of 2, so without rounding."""
    from scipy.linalg import matrix_balance

    with np.errstate(all="ignore"):  # it casts the scales to integers, whatever they are
        B, (d, _) = matrix_balance(a, permute=False, separate=True)
    if not (np.isfinite(B).all() and np.isfinite(d).all() and (d > 0).all()):
        return a, np.ones(len(a))
    return B, d


def _noda(a: np.ndarray, tol: float) -> tuple[float, float, np.ndarray, np.ndarray]:
    """(root, lower, right, left) of an irreducible non-negative matrix."""
    from scipy.linalg import lu_factor, lu_solve

    n = a.shape[0]
    if n == 1:
        return float(a[0, 0]), float(a[0, 0]), np.ones(1), np.ones(1)
    scale = a.max()
    # Work on B = V^-1 a V with the current vector v on the diagonal of V: B's row sums are the
    # Collatz-Wielandt ratios, and the solves stay accurate however far apart the entries of v lie.
    # Balancing first saves the many steps spent far from the root on, say, an uneven cycle.
    B, v = balanced(a / scale)
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


def _pair(M: Tensor, p: Perron) -> tuple[Tensor, Tensor, Tensor]:
    """Right and left vectors that say how the root moves, and the states that they are about.

    Where several strong components have the largest root, the two vectors of the whole matrix
    belong to different ones, and u'v = 0, or mix them. Those of one of these components, with
    zeros elsewhere, are the derivative of its own root.
    """
    everything = torch.ones_like(p.right, dtype=torch.bool)
    if bool((M != 0).all()) or M.shape[-1] == 0:
        return p.right, p.left, everything
    # A component that all others read and that reads all others is the whole: vectors without a
    # zero, as the power method has them, mean a simple root only where there is one component.
    mixed = bool((p.right > 0).all() and (p.left > 0).all())
    if not mixed and float(p.left @ p.right) > 0:
        return p.right, p.left, everything
    blocks = strong_components(M != 0)
    if len(blocks) == 1:
        return p.right, p.left, everything
    for c in blocks:
        part = perron(M[c][:, c])
        if part.root >= p.root * (1 - 1e-10):
            break
    right, left = torch.zeros_like(p.right), torch.zeros_like(p.left)
    right[c], left[c] = part.right, part.left
    return right, left, right > 0


# In float64, whatever M is: entries of the vectors may be further apart than float32 reaches.
@torch.library.custom_op("implicitdl::perron_root", mutates_args=())
def _perron_op(M: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n = M.shape[:-2], M.shape[-1]
    parts = [perron(m) for m in M.reshape(-1, n, n)]
    root = M.new_tensor([p.root for p in parts], dtype=torch.float64).reshape(batch)
    right = M.new_empty(len(parts), n, dtype=torch.float64)
    left, own = torch.empty_like(right), torch.empty_like(right, dtype=torch.bool)
    for k, p in enumerate(parts):
        right[k], left[k], own[k] = _pair(M.reshape(-1, n, n)[k], p)
    shape = (*batch, n)
    return root, right.reshape(shape), left.reshape(shape), own.reshape(shape)


@_perron_op.register_fake
def _(M):
    root = M.new_empty(M.shape[:-2], dtype=torch.float64)
    right = M.new_empty(M.shape[:-1], dtype=torch.float64)
    return root, right, torch.empty_like(right), torch.empty_like(right, dtype=torch.bool)


@_perron_op.register_vmap
def _(info, in_dims, M):
    return _perron_op(M.movedim(in_dims[0], 0)), (0, 0, 0, 0)


class _PerronRootReverse(torch.autograd.Function):
    """The gradient of the root; the operator above keeps the search out of compiled graphs, which
    admit no rule for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(M: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _perron_op(M)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], *output)
        ctx.save_for_forward(inputs[0], *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, g_root: Tensor, *_):
        M = ctx.saved_tensors[0]
        return (g_root[..., None, None] * _root_gradient(*ctx.saved_tensors)).to(M.dtype)


class _PerronRoot(_PerronRootReverse):
    """With forward mode, too."""

    @staticmethod
    def jvp(ctx, dM: Tensor):
        return (_root_gradient(*ctx.saved_tensors) * dM).sum((-2, -1)), None, None, None


def _root_gradient(M: Tensor, root: Tensor, right: Tensor, left: Tensor, own: Tensor) -> Tensor:
    """u v' / u'v in float64, differentiable in M where a second derivative is being built."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        # A second derivative is being built: make the eigenvectors functions of M, correct to
        # first order, by one Newton step with a constant Jacobian. Only then is a solve needed.
        # Of a component among equals it is that of the component alone, whose root is simple.
        M = torch.where(own[..., :, None] & own[..., None, :], M, 0.0).to(torch.float64)
        right = _attached_vector(M, root, right, left)
        left = _attached_vector(M.mT, root, left, right.detach())
    inner = (left * right).sum(-1).clamp_min(torch.finfo(torch.float64).tiny)
    return left[..., :, None] * right[..., None, :] / inner[..., None, None]


def _attached_vector(M: Tensor, root: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """v + (group inverse) (M v - root v): value v, first derivative that of the eigenvector."""
    n = v.shape[-1]
    inner = (u * v).sum(-1)[..., None, None]
    spectral = v[..., :, None] * u[..., None, :] / inner  # the projector onto the eigenspace
    eye = torch.eye(n, dtype=v.dtype, device=v.device)
    # A nilpotent M has no derivative of its vectors; an identity keeps them as they are.
    least = torch.where(root > 0, root, 1.0)[..., None, None]
    shifted = (root[..., None, None] * eye - M).detach() + least * spectral
    shifted = torch.where((root > 0)[..., None, None], shifted, eye)
    flow = (M @ v[..., None]).squeeze(-1)
    flow = flow - (spectral @ flow[..., None]).squeeze(-1)
    step, _ = torch.linalg.solve_ex(shifted, flow)
    return v + (step - step.detach())


def perron_root(M: Tensor) -> Tensor:
    """Differentiable Perron root lambda(M), M >= 0: d lambda = u' dM v / u'v.

    Args:
        M: Non-negative matrices (..., n, n).

    Returns:
        The roots (...), with first and second derivatives, under autograd, forward mode,
        `torch.func`, `vmap` and `torch.compile`. Where several strong components have the largest
        root they are those of one of them: an element of Clarke's subdifferential.

    Raises:
        RuntimeError: Inside a compiled graph, under forward mode or a `torch.func` transform.
    """
    rule = _PerronRootReverse if reverse_only("A Perron root") else _PerronRoot
    return rule.apply(M)[0].to(M.dtype)
