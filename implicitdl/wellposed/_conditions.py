"""The sufficient conditions for well-posedness, each with the norm and error constant it gives."""

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .._linalg import EPS, balanced, perron, resolvent_vector
from ..activations import Activation

P_LIMIT = 12  # all 2^n principal minors are enumerated up to this many states


@dataclass(kw_only=True)
class Evidence:
    """What one condition says of one component."""

    condition: str
    margin: float
    holds: bool = False
    contraction: float | None = None
    norm: str = ""
    weights: np.ndarray | None = None
    groups: np.ndarray | None = None
    constant: float | None = None
    reason: str = ""


class Component:
    """A diagonal block of A with the activation restricted to its states."""

    def __init__(self, a: np.ndarray, phi: Activation, sizes: tuple[int, ...] | None):
        self.a, self.phi, self.sizes, self.width = a, phi, sizes, len(a)
        self.states = np.arange(len(a))
        parts = phi.blocks(self.width)
        count = [n for _, n in parts]
        self.lo = np.repeat([part.slope[0] for part, _ in parts], count)
        self.hi = np.repeat([part.slope[1] for part, _ in parts], count)
        self.own = np.repeat(
            [part.entrywise for part, _ in parts], count
        )  # acts on its entry alone
        # States that phi couples are one node of the graph.
        first = np.diff(np.repeat(np.arange(len(parts)), count), prepend=-1) > 0
        self.node = np.cumsum(first | self.own) - 1
        self._facts()

    def _facts(self) -> None:
        self.entrywise = bool(self.own.all())
        self.lipschitz = np.maximum(np.abs(self.lo), np.abs(self.hi))
        self.loopless = self.node.max(initial=0) == 0 and not self.a.any()

    def sub(self, local: np.ndarray) -> "Component":
        """The diagonal block of the states `local`, numbered within this component."""
        if len(local) == len(self.states):
            return self
        part = copy.copy(self)
        part.a = np.ascontiguousarray(self.a[np.ix_(local, local)])
        for name in ("states", "lo", "hi", "own"):
            setattr(part, name, getattr(self, name)[local])
        part.node = np.unique(self.node[local], return_inverse=True)[1]
        part._facts()
        return part

    def through(self, load: np.ndarray) -> np.ndarray:
        """Entrywise bound of |J z| for |z| <= load: L_i |z_i|, or the 2-norm within a block."""
        if self.entrywise:
            return self.lipschitz * load
        squares = np.bincount(self.node, weights=load * load)
        return self.lipschitz * np.where(self.own, load, np.sqrt(squares)[self.node])

    def call(self, z: np.ndarray) -> np.ndarray:
        """phi on these states."""
        with torch.no_grad():
            return self.phi(self._embed(z)).numpy()[..., self._index()]

    def slopes(self, z: np.ndarray) -> np.ndarray:
        """phi' at z (..., n), for entrywise states."""
        with torch.no_grad():
            return self.phi.derivative(self._embed(z)).numpy()[..., self._index()]

    def jacobian(self, z: np.ndarray) -> np.ndarray:
        """The symmetric Jacobian of phi at z (n,), dense only where phi couples states."""
        with torch.no_grad():
            if self.entrywise:
                return np.diag(self.slopes(z))
            d = self.phi.derivative(self._embed(z))
            basis = torch.eye(len(d), dtype=torch.float64)[self.states]
            return self.phi.product(d, basis).numpy()[:, self.states]

    def _index(self) -> np.ndarray | slice:
        return slice(None) if self.phi.size is None else self.states

    def _embed(self, z: np.ndarray) -> torch.Tensor:
        if self.phi.size is None:
            return torch.from_numpy(np.ascontiguousarray(z))
        full = torch.zeros(*z.shape[:-1], self.width, dtype=torch.float64)
        full[..., torch.from_numpy(self.states)] = torch.from_numpy(np.ascontiguousarray(z))
        return full


# Beyond, squares and sums overflow in float64, and a condition may end in an exception.
LARGE = 1e150


def prove(p: Component, quick: bool = False) -> Evidence | None:
    """The first condition that holds; else the evidence that came closest.

    Args:
        p: The component.
        quick: Try only the conditions whose Perron-Frobenius form covers all components at once,
            and return None where they fail.
    """
    if p.loopless:
        n = len(p.states)
        return Evidence(
            condition="strictly block-triangular", margin=1.0, holds=True, contraction=0.0,
            norm="infinity norm", weights=np.ones(n), groups=None, constant=1.0,
            reason="no loop: one evaluation is the solution",
        )  # fmt: skip
    conditions: tuple[Callable[[Component], Evidence | None], ...] = (_infinity, _perron)
    if not quick:
        conditions += (_block_norm, _measure, _monotone, _p_matrix)
    tried: list[Evidence] = []
    for condition in conditions:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what overflows is no evidence
            try:
                evidence = condition(p)
            except (ValueError, np.linalg.LinAlgError):
                if np.abs(p.a).max() < LARGE:
                    raise
                evidence = None
        if evidence is None or np.isnan(evidence.margin):
            continue
        if evidence.holds:
            return evidence
        tried.append(evidence)
    if quick:
        return None
    # The margins of different conditions are all slacks below 1; the largest came closest.
    best = max(tried, key=lambda e: e.margin)
    listed = ", ".join(f"{e.condition} {e.margin:.3g}" for e in tried)
    best.margin = min(best.margin, 0.0)
    best.reason = f"no sufficient condition holds (margins: {listed})" + _excuses(p)
    return best


def _excuses(p: Component) -> str:
    if not p.entrywise:
        return "; Perron-Frobenius, matrix measure and P-matrix need an entrywise activation"
    if (p.lo < 0).any():
        return "; strong monotonicity needs slopes >= 0"
    return ""


def _contractive(name: str, p: Component, v: np.ndarray, c: float) -> Evidence:
    n = len(v)
    c = c * (1 + 4 * n * EPS)  # rounding of a dot product of n terms, twice over
    plain = bool((v == v[0]).all())
    e = Evidence(condition=name, margin=1 - c, norm=f"{'' if plain else 'weighted '}infinity norm")
    if c < 1:
        e.holds, e.contraction, e.weights, e.constant = True, c, v, 1 / (1 - c)
    return e


def _infinity(p: Component) -> Evidence | None:
    """max_i L_i sum_j |A_ij| < 1."""
    if p.entrywise:
        bound = p.lipschitz * np.abs(p.a).sum(1)
    else:
        known = infinity_lipschitz(p.phi, p.width)
        if known is None:
            return None
        bound = known[p.states] * np.abs(p.a).sum(1)
    return _contractive("infinity norm", p, np.ones(len(p.a)), float(bound.max()))


def infinity_lipschitz(phi: Activation, width: int) -> np.ndarray | None:
    """Lipschitz constants from infinity to infinity norm, one a state, if all are declared.

    The slope of a block activation bounds the 2-norm of its Jacobian only, so such a phi must
    declare `infinity_lipschitz` itself (for softmax 1/2: row i of its Jacobian has the absolute
    sum 2 p_i (1 - p_i)).
    """
    out: list[float] = []
    for part, n in phi.blocks(width):
        bound = part.infinity_lipschitz
        if bound == float("inf"):
            return None
        out += [float(bound)] * n
    return np.array(out)


def _perron(p: Component) -> Evidence | None:
    """lambda_pf(diag(L) |A|) < 1: some weighted infinity norm is below 1."""
    if not p.entrywise:
        return None
    m = p.lipschitz[:, None] * np.abs(p.a)
    return _weighted("Perron-Frobenius", p, m, lambda v: float(((m @ v) / v).max()))


def _weighted(
    name: str, p: Component, m: np.ndarray, factor: Callable[[np.ndarray], float]
) -> Evidence:
    """Find v > 0 with m v < v, and use the better of two for the factor wanted."""
    tensor = torch.from_numpy(m)
    pf = perron(tensor)
    e = Evidence(condition=name, margin=1 - pf.root)
    if not pf.lower < 1 or (m.diagonal() >= 1).any():
        return e
    kappa = pf.root + 0.1 * (1 - pf.root) if pf.root < 1 else 1.0
    candidates = [pf.right.numpy()]
    # A reducible or badly scaled matrix has no usable eigenvector, but always this vector.
    v = resolvent_vector(tensor, kappa)
    if v is not None:
        candidates.append((v / v.max()).numpy())
    best = e
    for v in candidates:
        if v.min() > 1e-150 and (m @ v * (1 + 4 * len(v) * EPS) < v).all():
            found = _contractive(name, p, v, factor(v))
            if found.holds and not (best.holds and best.contraction <= found.contraction):
                best = found
    return best


def _block_norm(p: Component) -> Evidence:
    """lambda_pf(N) < 1, N_kl = L_k ||A_kl||_2 over blocks; one block where no sizes are given."""
    n = len(p.a)
    if p.sizes is None:
        group = np.zeros(n, dtype=np.int64)
    else:
        group = np.repeat(np.arange(len(p.sizes)), p.sizes)[p.states]
        group = np.unique(group, return_inverse=True)[1]
    scaled = p.lipschitz[:, None] * p.a
    if not p.entrywise:
        splits = any(len(np.unique(group[p.node == k])) > 1 for k in np.unique(p.node))
        if splits:  # the blocks of phi must not be cut
            group = np.zeros(n, dtype=np.int64)
    choices = [group]
    if not p.entrywise and group.max() == 0 and p.node.max() > 0:
        choices.append(p.node)
    best = None
    for g in choices:
        e = _norm_matrix(p, scaled, g)
        if best is None or e.margin > best.margin:
            best = e
    return best


def _norm_matrix(p: Component, scaled: np.ndarray, group: np.ndarray) -> Evidence:
    count = int(group.max()) + 1
    index = [np.flatnonzero(group == k) for k in range(count)]
    norms = np.zeros((count, count))
    for k, i in enumerate(index):
        for j, col in enumerate(index):
            norms[k, j] = _spectral(scaled[np.ix_(i, col)])
    scale = np.ones(len(p.a))
    if count == 1 and p.entrywise:
        # A diagonal change of variables may shrink the 2-norm; powers of 2, so without rounding.
        even, d = balanced(scaled)
        alternative = _spectral(even)
        if alternative < norms[0, 0]:
            norms[0, 0], scale = alternative, d
    e = _weighted("block norm matrix", p, norms, lambda v: float(((norms @ v) / v).max()))
    if e.holds:
        e.groups = group
        # A group's entries are measured in the 2-norm, then divided by the group's weight.
        e.weights = e.weights[group] * scale
        e.norm = "2-norm" if count == 1 and (scale == 1).all() else "weighted block 2-norm"
    return e


def _spectral(a: np.ndarray) -> float:
    """||a||_2, rounded up."""
    from scipy.linalg import eigh

    n = max(a.shape)
    unit = float(np.abs(a).max()) if a.size else 0.0
    if not 0 < unit < np.inf:
        return unit
    a = a / unit  # squares neither overflow nor vanish
    if min(a.shape) <= 1:
        return unit * float(np.linalg.norm(a)) * (1 + 4 * n * EPS)
    gram = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
    top = eigh(gram, eigvals_only=True, subset_by_index=[len(gram) - 1] * 2)[0]
    size = np.sqrt(max(top, 0.0) + 16 * n * EPS * np.abs(gram).sum(1).max())
    return unit * float(size) * (1 + 4 * EPS)


def _measure(p: Component) -> Evidence | None:
    """d A_ii + |d| sum_{j != i} |A_ij| v_j / v_i < 1 for every slope d in [lo_i, hi_i].

    Divided by 1 - d A_ii > 0 this reads T v < v with T_ij = max_d |d| / (1 - d A_ii) |A_ij|, whose
    best weights are again a Perron vector. With slopes in [0, 1] and d = 1 it is
    mu_{inf, v}(A) < 1. The map x -> phi(A x + b) - x then has one-sided Lipschitz constant
    c - 1 < 0 in the norm, c the left side's maximum, hence one zero and |e| <= |residual|/(1 - c).
    """
    if not p.entrywise:
        return None
    diagonal = p.a.diagonal()
    ends = [p.lo, p.hi]
    gap = np.minimum(1 - ends[0] * diagonal, 1 - ends[1] * diagonal)
    gap = gap - 4 * EPS * (1 + np.abs(p.lipschitz * diagonal))
    if gap.min() <= 0:
        return Evidence(condition="matrix measure", margin=float(gap.min()))
    off = np.abs(p.a)
    np.fill_diagonal(off, 0.0)
    ratio = np.maximum(*(np.abs(d) / (1 - d * diagonal) for d in ends))

    def factor(v: np.ndarray) -> float:
        rows = (off @ v) / v
        values = [d * diagonal + np.abs(d) * rows for d in ends]
        # Where lo <= 0 <= hi one of the two ends gives at least 0, the value at d = 0.
        c = float(np.max(values))
        size = float(np.max(p.lipschitz * (np.abs(diagonal) + rows)))
        return c + 8 * len(v) * EPS * (1 + size)

    e = _weighted("matrix measure", p, ratio[:, None] * off, factor)
    if e.holds:
        e.contraction = None  # the continuous-time flow contracts, Picard need not
    return e


def _monotone(p: Component) -> Evidence | None:
    """sym(I - S^-1 H A S) >= m I, H = diag(hi): error constant (1 + ||I - S^-1 H A S||_2)/m.

    phi with slopes in [0, hi] is the gradient of a convex function whose gradient is firmly
    non-expansive after division by hi, in every norm ||S^-1 x||_2 with S constant on its blocks.
    """
    from scipy.linalg import eigh

    if (p.lo < 0).any():
        return None
    n = len(p.a)
    scaled = p.hi[:, None] * p.a
    candidates = [np.ones(n)]
    if p.entrywise and n <= 1024:
        candidates.append(balanced(p.a)[1])
    if p.entrywise and 1 < n <= 96:
        candidates.append(_diagonal_stability(scaled))
    best = Evidence(condition="strong monotonicity", margin=-np.inf)
    for s in candidates:
        shifted = np.eye(n) - scaled * (s / s[:, None])
        symmetric = (shifted + shifted.T) / 2
        bottom = eigh(symmetric, eigvals_only=True, subset_by_index=[0, 0])[0]
        size = np.abs(shifted)
        m = float(bottom) - 16 * n * EPS * (1 + float((size + size.T).sum(1).max()))
        if m > best.margin:
            best = Evidence(condition="strong monotonicity", margin=m)
            if m > 0:
                best.holds, best.weights = True, s / s.max()
                best.groups = np.zeros(n, dtype=np.int64)
                best.constant = (1 + _spectral(shifted)) / m * (1 + 1e-12)
                best.norm = "2-norm" if (s == 1).all() else "weighted 2-norm"
                break
    return best


def _diagonal_stability(a: np.ndarray, steps: int = 60) -> np.ndarray:
    """Weights s that nearly minimise the largest eigenvalue of sym(S^-1 a S).

    A log-sum-exp of all eigenvalues stands in for the largest; since the answer is checked
    afterwards, a local minimum is good enough.
    """
    from scipy.linalg import matrix_balance
    from scipy.optimize import minimize

    n = len(a)
    start = np.log(matrix_balance(a, permute=False, separate=True)[1][0])

    def top(t: np.ndarray) -> tuple[float, np.ndarray]:
        scaled = a * np.exp(t[None, :] - t[:, None])
        value, vectors = np.linalg.eigh((scaled + scaled.T) / 2)
        width = 0.02 * max(1e-12, value[-1] - value[0])
        soft = np.exp((value - value[-1]) / width)
        total = soft.sum()
        weight = (vectors * (soft / total)) @ vectors.T * scaled
        return value[-1] + width * np.log(total), weight.sum(0) - weight.sum(1)

    bounds = [(-20.0, 20.0)] * n
    start = np.clip(start - start.mean(), -20, 20)
    found = minimize(
        top, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps}
    )
    return np.exp(found.x - found.x.max())


def vertex_determinants(p: Component) -> tuple[np.ndarray, np.ndarray]:
    """det(I - D A), rows shortened to length 1, for all D with d_i in {lo_i, hi_i}; and which D.

    Shortened rows make the determinants at most 1 and their rounding errors absolute.
    """
    n = len(p.a)
    vertices = np.array(list(itertools.product((0, 1), repeat=n)), dtype=bool)
    d = np.where(vertices, p.hi, p.lo)
    m = np.eye(n) - d[:, :, None] * p.a
    length = np.linalg.norm(m, axis=2, keepdims=True)
    return np.linalg.det(m / np.maximum(length, 1.0)), vertices


def _p_matrix(p: Component) -> Evidence | None:
    """det(I - D A) of one sign at all vertices D of the slope box.

    The determinant is affine in each d_i, so one sign at the vertices is one sign, bounded away
    from 0, on the whole box: every generalised Jacobian of x - phi(A x + b) is invertible, with
    bounded inverse, and the map is a homeomorphism (Clarke, Hadamard). For ReLU the determinants
    are the principal minors of I - A: this is the P-matrix condition, necessary and sufficient.
    """
    n = len(p.a)
    if not p.entrywise or n > P_LIMIT:
        return None
    value, _ = vertex_determinants(p)
    sign = 1.0 if value[0] > 0 else -1.0
    # LU with partial pivoting, its growth factor at the worst case 2^(n-1), rows of length 1.
    allowance = 8 * n**2.5 * EPS * 2.0 ** (n - 1)
    margin = float((sign * value).min())
    e = Evidence(condition="P-matrix", margin=margin, holds=margin > allowance)
    if e.holds:
        e.reason = "all determinants of I - D A have one sign; this gives no error constant"
    return e
