"""certificate(A, phi): is x = phi(A x + b) uniquely solvable for every b? Proved, refuted, or open.

Throughout, two states x, y with the same b satisfy x - y = D A (x - y) + (residuals), where D is
diagonal with slopes of phi in [lo_i, hi_i] (symmetric, with eigenvalues in that range, for a block
activation). Each condition below excludes x != y for all such D, and bounds the error by the
residual. The state is first cut into the strongly connected components of "x_i depends on x_j":
A is well-posed if and only if each diagonal block is, so every component may have its own reason.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .._linalg import strong_components
from ..activations import Activation, get_activation
from ..solution import NotWellPosedError
from ._conditions import LARGE, Component, Evidence, prove
from ._counterexample import refute_component, refute_whole

_ADVICE = (
    "keep A in a set of `implicitdl.wellposed` (for instance `InfNormBall(kappa=0.95)`), or scale "
    "A down"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Certificate:
    """A proof that x = phi(A x + b) has one solution for every b, a refutation, or neither.

    The norm of all bounds is ||x||_v = max over groups g of ||x_g / v_g||_2; where `groups` is
    None every state is a group, and the norm is max_i |x_i| / v_i.

    Attributes:
        status: "well-posed" (proved), "ill-posed" (two equilibria are shown), or "unknown".
        condition: The sufficient condition that holds: "strictly block-triangular", "infinity
            norm", "Perron-Frobenius", "block norm matrix", "matrix measure", "strong
            monotonicity", "P-matrix", or "block-triangular: ..." where components differ.
        margin: Slack of that condition; where none holds, of the one that came closest (<= 0).
        contraction: Factor c < 1 by which x -> phi(A x + b) contracts in the norm, or None where
            Picard iteration need not converge.
        norm: The norm in words.
        weights: v > 0 (n,), or None where there is no error bound.
        groups: Group number of each state (n,), or None.
        constant: K with ||x - x*||_v <= K ||phi(A x + b) - x||_v for every x and b, or None.
        states: The states of A that this certificate is about.
        components: One certificate for each strongly connected component with a loop, in the
            order of evaluation; empty where one argument covers all.
        equilibria: (b, x1, x2), both solutions, where the status is "ill-posed".
        reason: Why, in words.
    """

    status: Literal["well-posed", "ill-posed", "unknown"]
    condition: str = ""
    margin: float
    contraction: float | None = None
    norm: str = ""
    weights: Tensor | None = field(default=None, repr=False)
    groups: Tensor | None = field(default=None, repr=False)
    constant: float | None = None
    states: tuple[int, ...] = field(default=(), repr=False)
    components: tuple["Certificate", ...] = field(default=(), repr=False)
    equilibria: tuple[Tensor, Tensor, Tensor] | None = field(default=None, repr=False)
    reason: str = ""

    @property
    def well_posed(self) -> bool:
        """Whether uniqueness and existence are proved."""
        return self.status == "well-posed"

    def __bool__(self) -> bool:
        raise TypeError(
            "a Certificate has three outcomes and no truth value: use `.well_posed`, `.status` "
            "or `.require()`"
        )

    def require(self) -> "Certificate":
        """Return self if well-posedness is proved.

        Raises:
            NotWellPosedError: It is refuted or not proved; carries `.margin`.
        """
        if not self.well_posed:
            raise NotWellPosedError(f"{self}\nTo be safe, {_ADVICE}.", margin=self.margin)
        return self

    def error_bound(self, residual: Tensor) -> Tensor:  # (..., n) -> (...)
        """||x - x*||_v <= K ||residual||_v, residual = phi(A x + b) - x.

        Args:
            residual: Residuals (..., n).

        Returns:
            The bounds (...) in float64, in the norm of `norm`, `weights` and `groups`; rounding
            of the residual itself is not included.

        Raises:
            NotWellPosedError: There is no error constant, because well-posedness is not proved
                or the proof (P-matrix, overflowing weights) gives none.
            ValueError: The residual has another number of states.
        """
        if self.constant is None or self.weights is None:
            raise NotWellPosedError(
                f"no error bound: {self.reason or self.status}; {_ADVICE}", margin=self.margin
            )
        n = self.weights.shape[0]
        if residual.shape[-1:] != (n,):
            raise ValueError(
                f"residual has shape {tuple(residual.shape)}, but this certificate is about "
                f"{n} states: pass phi(A x + b) - x of shape (batch, {n})"
            )
        if n == 0:
            return residual.new_zeros(residual.shape[:-1], dtype=torch.float64)
        return self.constant * self.measure(residual)

    def measure(self, x: Tensor) -> Tensor:  # (..., n) -> (...)
        """||x||_v, the norm in which the bounds hold, in float64: weights may span its range."""
        scaled = x.to(torch.float64) / self.weights.to(x.device)
        if self.groups is None:
            return scaled.abs().amax(-1)
        groups = self.groups.to(x.device)
        # Squares of entries scaled to at most 1 neither overflow nor vanish where they matter.
        top = scaled.abs().amax(-1, keepdim=True)
        unit = scaled / torch.where(top > 0, top, torch.ones_like(top))
        squares = unit.new_zeros(*unit.shape[:-1], int(groups.max()) + 1)
        squares = squares.index_add(-1, groups, unit * unit)
        return squares.amax(-1).sqrt() * top.squeeze(-1)

    def __str__(self) -> str:
        if self.status == "well-posed":
            text = f"well-posed by {self.condition} (margin {self.margin:.3g})"
            if self.contraction is not None:
                text += f": Picard contracts by {self.contraction:.4g} in the {self.norm}"
            elif self.constant is not None:
                text += f": error <= {self.constant:.4g} x residual in the {self.norm}"
            return text + (f"\n{self.reason}" if self.reason else "")
        if self.status == "ill-posed":
            _, x1, x2 = self.equilibria
            gap = float((x1 - x2).abs().max())
            return f"ill-posed: two equilibria for one b, {gap:.3g} apart\n{self.reason}"
        return (
            f"unknown: neither proved nor refuted (closest margin {self.margin:.3g})\n{self.reason}"
        )


def certificate(
    A: Tensor,
    phi: "Activation | str | nn.Module",
    *,
    refute: bool = True,
    sizes: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Certificate:
    """Prove or refute that x = phi(A x + b) has exactly one solution for every b.

    Conditions are tried in this order, per strongly connected component of A, all with the true
    slope range of phi: no loop at all, infinity norm, Perron-Frobenius, block norm matrix, matrix
    measure, strong monotonicity, P-matrix (up to 12 states, where it decides ReLU completely).
    All arithmetic is in float64 with an allowance for its rounding. Where none applies, two
    equilibria for one b are searched for and shown only after verification; failing that, the
    answer is "unknown".

    Args:
        A: Square matrix (n, n) of finite real numbers.
        phi: The activation, for n states: an `Activation`, its name, or a module of `torch.nn`.
        refute: Whether to search for two equilibria where no condition holds.
        sizes: Block sizes for the block norm matrix; None for one block a component (and the
            blocks of phi where it couples states).
        seed: Seed of the search; the outcome depends on nothing else.

    Returns:
        A `Certificate`.

    Raises:
        ValueError: A is not square or not finite, or does not fit phi or `sizes`.
        TypeError: A is not a real floating point tensor, phi no activation, or `sizes` no tuple.

    Example:
        >>> from implicitdl.activations import ReLU
        >>> print(certificate(torch.tensor([[-5.0]]), ReLU()).condition)
        matrix measure
        >>> print(certificate(torch.tensor([[2.0]]), ReLU()).status)
        ill-posed

    Reference:
        El Ghaoui, Gu, Travacca, Askari and Tsai 2021, theorems 2.8 and 3.1 (norms, Perron-
        Frobenius, blocks); Jafarpour, Davydov, Proskurnikov and Bullo 2021 (matrix measure);
        Winston and Kolter 2020 (monotone); Pang 1987 (error bound); Cottle, Pang and Stone 1992,
        theorem 3.3.7 (P-matrices).
    """
    phi = get_activation(phi)
    a = _validated(A, phi, sizes)
    n = a.shape[0]
    device = A.device
    if n == 0:
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        return Certificate(
            status="well-posed", condition="strictly block-triangular", margin=1.0, constant=1.0,
            contraction=0.0, norm="infinity norm", weights=empty, reason="there are no states",
        )  # fmt: skip
    whole = Component(a, phi, sizes)
    pieces = [whole.sub(s) for s in _evaluation_order(whole)]
    evidence: list[Evidence] = []
    proof = None
    if len(pieces) > 1 and not all(p.loopless for p in pieces):
        proof = prove(whole, quick=True)  # one norm for all components, the simplest answer
    if proof is None:
        evidence = [prove(piece) for piece in pieces]
        proof = _assemble(whole, pieces, evidence)
    if proof.holds:
        several = zip(evidence, pieces, strict=True) if len(evidence) > 1 else ()
        parts = tuple(_export(e, p, device) for e, p in several if not p.loopless)
        return _export(proof, whole, device, parts)
    return _open_case(whole, pieces, evidence, refute, seed, device)


def _validated(A: Tensor, phi: Activation, sizes: tuple[int, ...] | None) -> np.ndarray:
    if not isinstance(A, Tensor) or not A.is_floating_point():
        kind = A.dtype if isinstance(A, Tensor) else type(A).__name__
        raise TypeError(f"A: got {kind}, expected a real floating point tensor (n, n)")
    if A.dim() != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"A: got shape {tuple(A.shape)}, expected a square matrix (n, n)")
    a = A.detach().to(device="cpu", dtype=torch.float64).numpy()
    bad = int((~np.isfinite(a)).sum())
    if bad:
        raise ValueError(f"A: {bad} of {a.size} entries are NaN or infinite, expected finite ones")
    if phi.size not in (None, a.shape[0]):
        raise ValueError(f"A has {a.shape[0]} states, but {phi} is for {phi.size}")
    if sizes is not None and not isinstance(sizes, list | tuple):
        raise TypeError(f"sizes: got {sizes!r}, expected a tuple of block sizes")
    if sizes is not None and (sum(sizes) != a.shape[0] or min(sizes, default=1) < 1):
        raise ValueError(
            f"sizes: got {tuple(sizes)} with sum {sum(sizes)}, expected positive sizes that add "
            f"up to the {a.shape[0]} states of A"
        )
    return a


def _evaluation_order(whole: Component) -> list[np.ndarray]:
    """States of each strong component; those that phi couples stay together."""
    node, count = whole.node, whole.node.max() + 1
    mask = whole.a != 0
    if count < len(node):
        rows = np.zeros((count, mask.shape[1]), dtype=bool)
        np.logical_or.at(rows, node, mask)
        mask = np.zeros((count, count), dtype=bool)
        np.logical_or.at(mask.T, node, rows.T)
    order = strong_components(mask)
    if count == len(node):
        return order
    return [np.flatnonzero(np.isin(node, c)) for c in order]


def _assemble(whole: Component, pieces: list[Component], evidence: list[Evidence]) -> Evidence:
    """One norm for a block-triangular A from the norms of its diagonal blocks.

    With ||x|| = max_k ||x_k||_k / w_k and E_k <= K_k (R_k + N_k E) for the errors E and residuals
    R of the components, w_k >= 2 K_k (N w)_k gives E <= 2 max_k K_k R. If component k contracts
    by c_k, then K_k = 1/(1 - c_k) and the same weights give contraction max_k (1 + c_k)/2.
    """
    if len(pieces) == 1:
        return evidence[0]
    failed = [e for e in evidence if not e.holds]
    if failed:
        return min(failed, key=lambda e: e.margin)
    loops = [e for e, p in zip(evidence, pieces, strict=True) if not p.loopless]
    names = sorted({e.condition for e in loops})
    condition = "strictly block-triangular"
    if loops:
        condition = names[0] if len(names) == 1 else "block-triangular: " + ", ".join(names)
    n = len(whole.a)
    out = Evidence(
        condition=condition, margin=min((e.margin for e in loops), default=1.0), holds=True,
        reason=f"{len(loops)} of {len(pieces)} strongly connected components have a loop; each is "
        "well-posed by its own condition" if loops else "A has no loop: one sweep is the solution",
    )  # fmt: skip
    if any(e.weights is None or e.constant is None for e in evidence):
        return out
    v, groups, first = np.zeros(n), np.zeros(n, dtype=np.int64), 0
    contraction: float | None = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for e, p in zip(evidence, pieces, strict=True):
            # v is still zero on p and on what follows it.
            load = p.through(np.abs(whole.a[p.states]) @ v) / e.weights
            cross = _grouped(load, e.groups).max()
            weight = max(1.0, 2 * e.constant * cross)
            v[p.states] = weight * e.weights
            local = np.arange(len(p.states)) if e.groups is None else e.groups
            groups[p.states] = first + local
            first += local.max() + 1
            if contraction is not None:
                own = e.contraction
                contraction = None if own is None else max(contraction, own + cross / weight)
    if not (np.isfinite(v).all() and v.max() < 1e150):
        out.reason += "; the weights of an error bound would overflow"
        return out
    out.weights, out.constant = v, 2 * max(e.constant for e in evidence) * (1 + 1e-9)
    out.groups = None if first == n else groups
    out.contraction = None if contraction is None or contraction >= 1 else contraction * (1 + 1e-9)
    out.norm = "weighted infinity norm" if first == n else "weighted block norm"
    return out


def _grouped(x: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    if groups is None:
        return np.abs(x)
    return np.sqrt(np.bincount(groups, weights=x * x))


def _export(
    e: Evidence, p: Component, device: torch.device, parts: tuple[Certificate, ...] = ()
) -> Certificate:
    def tensor(x: np.ndarray | None) -> Tensor | None:
        return None if x is None else torch.from_numpy(np.ascontiguousarray(x)).to(device)

    return Certificate(
        status="well-posed" if e.holds else "unknown",
        condition=e.condition if e.holds else "",
        margin=e.margin,
        contraction=e.contraction,
        norm=e.norm,
        weights=tensor(e.weights),
        groups=tensor(e.groups),
        constant=e.constant,
        states=tuple(p.states.tolist()),
        components=parts,
        reason=e.reason,
    )


def _open_case(
    whole: Component,
    pieces: list[Component],
    evidence: list[Evidence],
    refute: bool,
    seed: int,
    device: torch.device,
) -> Certificate:
    """No condition covers all of A: try to show two equilibria of a component, then of A."""
    parts, found = [], None
    for e, p in zip(evidence, pieces, strict=True):
        part = _export(e, p, device)
        # The search is in exact and in plain arithmetic: neither holds what overflows.
        if not e.holds and refute and found is None and np.abs(p.a).max() < LARGE:
            pair = refute_component(p, seed)
            full = refute_whole(whole, p, pair, seed) if pair is not None else None
            if full is not None:
                found = _triple(full, device), p
                shown = _triple(pair, device)
                part = replace(part, status="ill-posed", equilibria=shown, reason="")
        if not p.loopless:
            parts.append(part)
    worst = min((e for e in evidence if not e.holds), key=lambda e: e.margin)
    if found is None:
        hint = "no second equilibrium was found either" if refute else "no refutation was tried"
        return Certificate(
            status="unknown", margin=worst.margin, reason=f"{worst.reason}; {hint}",
            states=tuple(whole.states.tolist()), components=tuple(parts),
        )  # fmt: skip
    equilibria, p = found
    where = "" if len(p.states) == len(whole.states) else f" (component of {len(p.states)} states)"
    return Certificate(
        status="ill-posed", margin=worst.margin, equilibria=equilibria, components=tuple(parts),
        states=tuple(whole.states.tolist()),
        reason=f"both residuals are at rounding level{where}; {_ADVICE}",
    )  # fmt: skip


def _triple(arrays: Any, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(b, x1, x2) as tensors."""
    b, x1, x2 = (torch.from_numpy(x).to(device) for x in arrays)
    return b, x1, x2
