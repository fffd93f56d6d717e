"""Certificates of structured models: block by block, with no matrix where there is no loop."""

import math

import torch
from torch import Tensor

from .. import wellposed
from .._linalg import perron
from ..activations import Activation, Blocks
from ..operators import read, rebuilt
from ..wellposed import Certificate
from .evaluate import loop_grid
from .structure import Structure

# A loop of at most so many states is certified with its matrix, which knows more conditions.
_DENSE_STATES = 2048


def certificate(f: Structure, *, refute: bool = True, seed: int = 0) -> Certificate:
    """What can be proved of x = phi(A x + b), component by component.

    A is well-posed if and only if each diagonal block of its block-triangular form is; one without
    a loop always is.
    """
    if not f.loops:
        return Certificate(
            status="well-posed", condition="strictly block-triangular", margin=1.0,
            reason=f"{len(f.blocks)} blocks and no loop: one sweep is the solution",
        )  # fmt: skip
    first = [0]
    for block in f.blocks:
        first.append(first[-1] + block.size)
    parts = []
    for component in f.loops:
        states = tuple(i for k in component for i in range(first[k], first[k + 1]))
        parts.append(_of_loop(f, component, states, refute, seed))
    worst = min(parts, key=lambda c: ({"ill-posed": 0, "unknown": 1}.get(c.status, 2), c.margin))
    names = sorted({c.condition for c in parts})
    whole = len(parts) == 1
    loops = f"{len(parts)} of {len(f.components)} components have a loop"
    if worst.well_posed:
        condition = names[0] if len(names) == 1 else "block-triangular: " + ", ".join(names)
        return Certificate(
            status="well-posed", condition=condition, margin=worst.margin,
            components=tuple(parts), reason=f"{loops}; each is well-posed by its own condition",
        )  # fmt: skip
    blocks = ", ".join(f.blocks[k].name for k in f.loops[parts.index(worst)])
    return Certificate(
        status=worst.status, margin=worst.margin, components=tuple(parts),
        equilibria=worst.equilibria if whole or worst.status == "ill-posed" else None,
        reason=f"{loops}; the one of {blocks}: {worst.reason}", states=worst.states,
    )  # fmt: skip


def _of_loop(
    f: Structure, component: tuple[int, ...], states: tuple[int, ...], refute: bool, seed: int
) -> Certificate:
    blocks = [f.blocks[k] for k in component]
    grid = loop_grid(blocks, component)
    with torch.no_grad():
        grid = rebuilt(grid, lambda w: read(w).detach().double())
        phi = Blocks(parts=tuple(part for block in blocks for part in block.parts))
        if len(states) <= _DENSE_STATES and phi.symmetric:
            proof = wellposed.certificate(
                grid.dense(), phi, refute=refute, seed=seed,
                sizes=tuple(b.size for b in blocks) if len(blocks) > 1 else None,
            )  # fmt: skip
        else:
            proof = _by_norms(grid.norms(), [block.phi for block in blocks])
    return Certificate(**{**vars(proof), "states": states})


def _by_norms(norms: Tensor, phis: list[Activation]) -> Certificate:
    """N_kj = Lip(phi_k) ||A_kj||_inf has a Perron root below 1.

    Reference: El Ghaoui et al. (2021), theorem 3.1 (block-Lipschitz activations).
    """
    lipschitz = torch.tensor([phi.infinity_lipschitz for phi in phis], dtype=torch.float64)
    if not bool(torch.isfinite(lipschitz).all()):
        return Certificate(
            status="unknown", margin=-math.inf,
            reason="an activation has no known Lipschitz constant in the infinity norm",
        )  # fmt: skip
    # A row sum of m terms is off by m roundings at the most; m is below 2^26 in all that fits.
    N = lipschitz[:, None] * norms * (1 + 2.0**-26)
    root = float(perron(N).root)
    if root < 1:
        return Certificate(
            status="well-posed", condition="block norm matrix", margin=1 - root,
            reason=f"the norms of the blocks have Perron root {root:.4g} < 1",
        )  # fmt: skip
    return Certificate(
        status="unknown", margin=1 - root,
        reason=f"the norms of the blocks have Perron root {root:.4g}, expected below 1, and the "
        "loop is too large, or its activation too general, for the other conditions",
    )  # fmt: skip
