"""Smaller models that compute nearly the same: pruned, sparse, of low rank; and how nearly, proved.

With x0 = phi(A x0 + B u + b) and x = phi(A_hat x + B_hat u + b_hat), phi entrywise with Lipschitz
constants G = diag(gamma) and lambda_pf(G |A_hat|) < 1,

    |x - x0| <= (I - G |A_hat|)^-1 G (|A_hat - A| |x0| + |B_hat - B| |u| + |b_hat - b|).

Reference: El Ghaoui, Gu, Travacca, Askari, Tsai (2021), section 5.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ._linalg import perron_root
from ._samples import require_finite_samples
from .layers import ImplicitLayer
from .model import ImplicitModel, Structure
from .model.structure import INPUT, Block, Constant, Row
from .model.wiring import layered
from .operators import Dense, LowRank, Operator, read, rebuilt
from .operators.sparse import Sparse
from .solution import NotWellPosedError
from .states import FitReport, Penalty, fit_states
from .states.assembly import chosen, reaching
from .states.checks import check_data, converted
from .wellposed import Certificate

__all__ = [
    "Compression",
    "ErrorBound",
    "error_bound",
    "low_rank",
    "prune",
    "remove",
    "running",
    "sparsify",
]

DENSITY = 0.1  # below it products with the entries alone are faster, on a CPU
_LARGE = 1 << 15  # entries below which a dense product costs little more than the call


@dataclass(frozen=True, kw_only=True, eq=False)
class ErrorBound:
    """How far a compressed model is from its original at some inputs, at most, entry by entry.

    Attributes:
        state, output: from the residual that the original's state leaves in the new equation,
            (I - G |A_hat|)^-1 |phi(A_hat x0 + B_hat u + b_hat) - x0|.  # (m, n), (m, q)
        paper_state, paper_output: the formula of the paper, never smaller.  # (m, n), (m, q)
    """

    state: Tensor
    output: Tensor
    paper_state: Tensor
    paper_output: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Compression:
    """A compressed model beside its original.

    Attributes:
        original: as matrices.
        model: as matrices, with the states of the original in their order and units.
        fast: the same map without states that nobody reads, products done by what is left.
        report: of `fit_states`, where that made it.
    """

    original: ImplicitModel = field(repr=False)
    model: ImplicitModel = field(repr=False)
    fast: ImplicitModel
    report: FitReport | None = field(default=None, repr=False)

    @property
    def entries(self) -> int:
        """Numbers of `fast` that are not zero."""
        return _numbers(self.fast)

    @property
    def multiplications(self) -> tuple[int, int]:
        """For one sample, a loop counted once: of the original's matrices, and of `fast`."""
        f = self.fast.structure
        return sum(t.numel() for t in _parts(self.original)[:4]), 0 if f is None else f.cost

    @property
    def share(self) -> float:
        """Their number over the numbers of the original that are not zero."""
        return self.entries / max(1, sum(int((t != 0).sum()) for t in _parts(self.original)))

    def certificate(self) -> Certificate:
        """Of the compressed model: see `ImplicitModel.certificate`."""
        return self.model.certificate()

    def error_bound(self, u: Tensor) -> ErrorBound:
        """See `error_bound`."""
        return error_bound(self.original, self.model, u)

    def __str__(self) -> str:
        before, after = self.multiplications
        return (
            f"{self.entries} numbers, {100 * self.share:.1f} % of the original's; "
            f"{self.fast.states} states of {self.original.states}; {after} multiplications a sample, "
            f"as matrices {before}\n{self.fast}"
        )


def _parts(model: ImplicitModel) -> tuple[Tensor, ...]:
    return model.A, model.B, model.C, model.D, model.b, model.d


def _numbers(model: ImplicitModel) -> int:
    """Numbers that it takes to write it down: entries of operators, and biases that are not zero."""
    f = model.structure
    if f is None:
        return sum(int((t != 0).sum()) for t in _parts(model))
    count = 0
    for row in (*(block.row for block in f.blocks), f.output):
        flat = row.flat()
        count += sum(int((t != 0).sum()) for _, op in flat.terms for t in op.tensors())
        like = torch.empty(0) if f.example is None else f.example
        count += sum(int((c(like) != 0).sum()) for c in flat.constants)
    return count


def as_matrices(model: "ImplicitModel | ImplicitLayer") -> ImplicitModel:
    """The model as matrices of its own, detached.

    Raises:
        TypeError: neither a model nor a layer.
        ValueError: its matrices are too large.
    """
    if isinstance(model, nn.Module) and hasattr(model, "model"):
        model = model.model()
    if not isinstance(model, ImplicitModel):
        raise TypeError(
            f"model: got {type(model).__name__}, expected an ImplicitModel or an ImplicitLayer; "
            "a network becomes one by implicitdl.to_implicit."
        )
    dense = model.dense()
    return rebuilt(dense, lambda w: read(w).detach().clone())  # type: ignore[no-any-return]


def prune(
    model: "ImplicitModel | ImplicitLayer", sparsity: float, data: Tensor | None = None
) -> Compression:
    """The model without the smallest entries of A, B, C and D.

    ||A||_inf can only fall, so that a model in the ball stays in it. With data, entries are ordered
    by what they contribute, |M_ij| times the deviation of what they multiply, over the deviation of
    what they are added to, and the mean of what is taken out goes into the biases; without, by |M_ij|.
    Among equals the first go, in the order A, B, C, D, row by row.

    Args:
        model: the original.
        sparsity: share of the entries that are not zero to be taken out, in [0, 1).
        data: inputs, at least two.  # (m, p)

    Raises:
        ValueError: sparsity is outside [0, 1), or data does not fit, has NaN or a single sample.
        TypeError: model is none, or data is no tensor.

    Example:
        >>> import torch, implicitdl
        >>> from implicitdl.compress import prune
        >>> small = prune(implicitdl.ImplicitLayer(6, 3, 10), 0.9)
        >>> small.model.A.abs().sum(1).max() < 0.95, small.share < 0.15
        (tensor(True), True)
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: got {sparsity!r}, expected a share in [0, 1).")
    original = as_matrices(model)
    matrices = (original.A, original.B, original.C, original.D)
    sizes = [t.abs() for t in matrices]
    means: tuple[Tensor, Tensor] | None = None
    if data is not None:
        check_data(data, least=2)
        u = _flat(data, original, "data").to(original.dtype)
        x = original.solve(u).value
        z = x @ original.A.mT + u @ original.B.mT
        y = x @ original.C.mT + u @ original.D.mT
        spread = [t.std(0) for t in (x, u, z, y)]
        into, out = spread[:2], [torch.where(t > 0, t, 1.0) for t in spread[2:]]
        sizes = [s * into[k % 2] / out[k // 2][:, None] for k, s in enumerate(sizes)]
        means = (x.mean(0), u.mean(0))
    every = torch.cat([s.flatten() for s in sizes])
    there = torch.cat([t.flatten() for t in matrices]).nonzero().flatten()
    order = every[there].argsort(stable=True)
    kept = torch.ones_like(every, dtype=torch.bool)
    kept[there[order[: int(sparsity * len(there))]]] = False
    masks = kept.split([t.numel() for t in matrices])
    A, B, C, D = (t * mask.view(t.shape) for t, mask in zip(matrices, masks, strict=True))
    b, d = original.b, original.d
    if means is not None:
        b = b + (original.A - A) @ means[0] + (original.B - B) @ means[1]
        d = d + (original.C - C) @ means[0] + (original.D - D) @ means[1]
    small = replace(original, A=A, B=B, C=C, D=D, b=b, d=d)
    return Compression(original=original, model=small, fast=running(small))


def _flat(u: Tensor, f: ImplicitModel, name: str) -> Tensor:
    """Samples with all numbers of each in a row; one without a dimension of samples is a sample."""
    u = u.detach()
    u = u[None] if u.dim() < 2 else u.flatten(1)
    if u.shape[1] != f.inputs:
        raise ValueError(
            f"{name}: got {u.shape[1]} numbers a sample, expected {f.inputs}, as the model reads."
        )
    return u


def low_rank(
    model: "ImplicitModel | ImplicitLayer", rank: int, kappa: float | None = None
) -> Compression:
    """A = L R^T by its leading singular vectors; rows that grew too long are scaled back.

    Args:
        model: the original.
        rank: r, below the number of states.
        kappa: bound on ||L R^T||_inf; None for ||A||_inf of the original, but below 1.

    Raises:
        ValueError: rank or kappa is out of range.
        TypeError: model is none.
    """
    original = as_matrices(model)
    n = original.states
    if type(rank) is not int or not 1 <= rank < max(n, 2):
        raise ValueError(f"rank: got {rank!r}, expected an integer in 1..{n - 1}.")
    if kappa is not None and not 0 < kappa < 1:
        raise ValueError(f"kappa: got {kappa}, expected a number in (0, 1).")
    left, values, right = torch.linalg.svd(original.A, full_matrices=False)
    root = values[:rank].sqrt()
    L, R = left[:, :rank] * root, right[:rank].mT * root
    limit = float(original.A.abs().sum(1).amax())
    slack = 1 - 4 * n * torch.finfo(original.dtype).eps
    aim = min(limit, 1.0) if kappa is None else kappa
    length = (L @ R.mT).abs().sum(1).clamp_min(torch.finfo(original.dtype).tiny)
    L = L * (aim * slack / length).clamp(max=1.0)[:, None]
    small = replace(original, A=L @ R.mT)
    return Compression(original=original, model=small, fast=running(small, factors=(L, R)))


def sparsify(
    model: "ImplicitModel | ImplicitLayer | nn.Module",
    data: Tensor,
    penalty: "Penalty | float" = 1e-2,
    *,
    kappa: float = 0.5,
    **options: object,
) -> Compression:
    """Fewer entries (`L1`, `Perspective`), or fewer states and features (`Group`), by matching states.

    Args:
        model: the original, or a network.
        data: inputs at which the states are matched.  # (m, *input)
        penalty: as in `fit_states`.
        kappa, options: of `fit_states`.

    Raises:
        ValueError, TypeError: as `fit_states`; or the penalty is `states.LowRank`.
    """
    if not isinstance(penalty, Penalty | int | float):
        raise TypeError(
            f"penalty: got {penalty!r}, expected L1, Group, Perspective or a number; `low_rank` cuts "
            "the rank."
        )
    source = model
    if isinstance(model, ImplicitLayer):
        source = model.model()
    elif isinstance(model, nn.Module):
        check_data(data, least=2)
        source, data = converted(model, data)
    original = as_matrices(source)  # type: ignore[arg-type]
    layer, report = fit_states(source, data, penalty=penalty, kappa=kappa, **options)  # type: ignore
    found = as_matrices(layer)
    # Back to the units of the original: x = scaling x_layer, states that are gone as zero rows.
    at, s = torch.tensor(report.states, device=found.device), report.scaling.to(found.A)
    A = torch.zeros_like(original.A)
    A[at[:, None], at[None, :]] = found.A * (s[:, None] / s)
    B, C, b = (torch.zeros_like(t) for t in (original.B, original.C, original.b))
    B[at], b[at], C[:, at] = found.B * s[:, None], found.b * s, found.C / s
    whole = replace(original, A=A, B=B, C=C, D=found.D, b=b, d=found.d)
    return Compression(original=original, model=whole, fast=running(found), report=report)


def remove(model: "ImplicitModel | ImplicitLayer") -> ImplicitModel:
    """The same map without states that are constant or that no output sees.

    State i is constant, phi(b_i), where row i of (A, B) is zero: it goes into the biases of those that
    read it. It is seen by nobody where column i of (A; C) is zero, or only states read it that are
    themselves seen by nobody. Features that column j of (B; D) does not read stay inputs.

    Args:
        model: with matrices that fit in memory.

    Raises:
        TypeError: model is none.
    """
    f = as_matrices(model)
    while True:
        still = f.phi.entrywise & ~((f.A != 0).any(1) | (f.B != 0).any(1))
        gone = still | ~reaching(f.A, f.C, f.phi)
        if bool(gone.all()):
            gone = gone.clone()
            gone[: f.phi.parts[0][1] if not f.phi.parts[0][0].entrywise else 1] = False
            still = still & gone
        if not bool(gone.any()):
            return f
        value = torch.where(still, f.phi(f.b), 0.0)
        kept = (~gone).nonzero().flatten()
        b, d = f.b + f.A @ value, f.d + f.C @ value
        f = ImplicitModel(
            f.A[kept][:, kept],
            f.B[kept],
            f.C[:, kept],
            f.D,
            b[kept],
            d,
            chosen(f.phi, f.states, kept),
        )


def running(
    model: "ImplicitModel | ImplicitLayer",
    density: float = DENSITY,
    factors: tuple[Tensor, Tensor] | None = None,
) -> ImplicitModel:
    """The same map with its zeros left out of the arithmetic.

    States that are constant or unseen go (`remove`); where A has no loop the states are evaluated layer
    by layer, else as one equation. A large block with a share of entries below `density` is
    multiplied by these alone (`operators.Sparse`), any other by its matrix.

    Args:
        model: with matrices that fit in memory.
        density: that share; blocks under 32,768 entries are small.
        factors: (L, R) with A = L R^T, to be multiplied by one after the other.  # (n, r), (n, r)

    Raises:
        TypeError: model is none.
        ValueError: density is no share.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density: got {density}, expected a share in [0, 1].")
    if factors is not None:
        f = as_matrices(model)
        blocks: Structure = _one_block(f, LowRank(*factors), density)
        return ImplicitModel(structure=blocks)
    f = remove(model)
    structure = layered(f)
    if structure.loops:
        return ImplicitModel(structure=_one_block(f, _operator(f.A, density), density))

    def row(old: Row) -> Row:
        terms = tuple(
            (j, _operator(op.dense(), density)) for j, op in old.terms if bool(op.dense().any())
        )
        return replace(old, terms=terms or old.terms[:1])

    return ImplicitModel(
        structure=Structure(
            tuple(replace(block, row=row(block.row.flat())) for block in structure.blocks),
            row(structure.output.flat()),
            structure.input_shape,
        )
    )


def _one_block(f: ImplicitModel, A: Operator, density: float) -> Structure:
    phi = f.activation if f.phi.entrywise else f.phi
    reads = ((0, A), (INPUT, _operator(f.B, density)))
    block = Block("x", Row((f.states,), reads, (Constant(f.b),)), phi, (f.states,))
    terms = [(0, _operator(f.C, density))]
    terms += [(INPUT, _operator(f.D, density))] if bool(f.D.any()) else []
    output = Row((f.outputs,), tuple(terms), (Constant(f.d),))
    return Structure((block,), output, (f.inputs,))


def _operator(W: Tensor, density: float) -> Operator:
    few = int((W != 0).sum()) < density * W.numel()
    return Sparse.of(W) if few and W.numel() >= _LARGE else Dense(W)


def error_bound(
    original: "ImplicitModel | ImplicitLayer",
    compressed: "ImplicitModel | ImplicitLayer",
    u: Tensor,  # (m, p)
) -> ErrorBound:
    """|x - x0| and |y - y0| of two models with the same states, entry by entry, at inputs u.

    Args:
        original: whose state x0 is found.
        compressed: with as many states, in the same order and units; lambda_pf(G |A_hat|) < 1.
        u: inputs.

    Returns:
        The bounds in float64, the solver's error included, rounded up.

    Raises:
        NotWellPosedError: lambda_pf(G |A_hat|) >= 1; carries `.margin`.
        ValueError: the models do not fit each other, u does not fit them or has NaN, or phi is not
            entrywise.
        ConvergenceError: the original has no state at some u.
    """
    f, g = (_double(as_matrices(model)) for model in (original, compressed))
    if (f.states, f.inputs, f.outputs, f.phi) != (g.states, g.inputs, g.outputs, g.phi):
        raise ValueError(f"compressed: got {g!r}, expected the states and phi of {f!r}.")
    if not f.phi.entrywise:
        raise ValueError(f"phi: {f.activation} couples states; the bound is for entrywise phi.")
    gamma = torch.cat([
        f.b.new_full((size,), part.lipschitz) for part, size in f.phi.parts
    ])  # fmt: skip
    size = gamma[:, None] * g.A.abs()
    root = float(perron_root(size))
    if not root < 1:
        raise NotWellPosedError(
            f"compressed: lambda_pf(G |A_hat|) = {root:.6g}, expected below 1; bring A into "
            "`wellposed.InfNormBall(kappa=...)` first.",
            margin=1 - root,
        )
    u = _flat(u, f, "u").double()
    require_finite_samples("u", u)
    x = f.solve(u).value
    y = x @ f.C.mT + u @ f.D.mT + f.d
    new = g.phi(x @ g.A.mT + u @ g.B.mT + g.b)
    # The solver left a residual in the original, too: it is part of the difference.
    own = (f.phi(x @ f.A.mT + u @ f.B.mT + f.b) - x).abs()
    dA, dB, dC, dD = ((getattr(g, k) - getattr(f, k)).abs() for k in "ABCD")
    first = gamma * (x.abs() @ dA.mT + u.abs() @ dB.mT + (g.b - f.b).abs()) + own
    eye = torch.eye(f.states, dtype=u.dtype, device=u.device)
    factor = torch.linalg.lu_factor(eye - size)

    def solved(right: Tensor) -> Tensor:
        return torch.linalg.lu_solve(*factor, right.mT.contiguous()).mT.clamp_min(0)

    terms = f.states + f.inputs + 8
    up = 1 + 8 * terms * torch.finfo(u.dtype).eps / (1 - root)
    small = 8 * terms * torch.finfo(u.dtype).eps * (x.abs() @ f.A.abs().mT + u.abs() @ f.B.abs().mT
                                                    + f.b.abs())  # fmt: skip
    # From x to the original's own equilibrium, where its matrix allows to say.
    back = gamma[:, None] * f.A.abs()
    drift = torch.zeros_like(x)
    if float(perron_root(back)) < 1:
        drift = torch.linalg.solve(eye - back, (own + small).mT).mT.clamp_min(0)
    state = (solved((new - x).abs() + small) + drift) * up
    paper = torch.maximum((solved(first + small) + drift) * up, state)
    direct = (x @ (g.C - f.C).mT + u @ (g.D - f.D).mT + (g.d - f.d)).abs()
    far = x.abs() @ dC.mT + u.abs() @ dD.mT + (g.d - f.d).abs()
    moved, seen = state @ g.C.abs().mT, paper @ g.C.abs().mT
    rounding = 8 * terms * torch.finfo(u.dtype).eps * (y.abs() + x.abs() @ f.C.abs().mT)
    loose = drift @ f.C.abs().mT + rounding
    return ErrorBound(
        state=state, output=(direct + moved + loose) * up,
        paper_state=paper, paper_output=(torch.maximum(far, direct) + seen + loose) * up,
    )  # fmt: skip


def _double(model: ImplicitModel) -> ImplicitModel:
    return rebuilt(model, lambda w: read(w).double())  # type: ignore[no-any-return]
