"""The states of a structured model: block by block, loops by a fixed point each.

A block that reads only blocks before it is evaluated once, by the operations that the network had,
and differentiated by autograd. A loop is an equation of its own,

    x_k = phi_k( sum over j in the loop of A_kj x_j + v_k ),

with v from the blocks before it; its solution is attached by the engine that all solves share.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..activations import Blocks
from ..implicit import Adjoint, Equation, Implicit, equilibrium, fixed_point
from ..maps import AffineMap, inside_transform
from ..operators import Space, read, weights
from ..solution import Solution
from ..solvers import Auto, FixedPointSolver
from .structure import AnyRow, Block, Structure, grid_of

# A loop is solved with the matrix of its blocks where that costs at most so many times more.
_DENSE_FACTOR = 2
_DENSE_STATES = 4096


@dataclass(frozen=True, kw_only=True)
class Options:
    """How loops are solved; None where the loop's own way is to be used."""

    solver: FixedPointSolver | None = None
    adjoint: Adjoint = field(default_factory=Implicit)
    on_failure: str = "raise"


def run(
    structure: Structure,
    u: Tensor,
    options: Options | None = None,
    *,
    keep: bool = False,
    start: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor | None], list[Solution]]:
    """y, the blocks of the state, and the solution of each loop.

    Args:
        structure: the model.
        u: inputs.  # (m, *input_shape)
        options: of the loops.
        keep: whether blocks that nobody reads any more are kept.
        start: of the blocks, for loops.
    """
    options = options or Options()
    values: list[Tensor | None] = [None] * len(structure.blocks) + [u]
    solutions = []
    loops = set(structure.loops)
    for component, over in structure.plan:
        if component in loops:
            solutions.append(_solve(structure, component, values, options, start))
        else:
            (k,) = component
            block = structure.blocks[k]
            values[k] = block.phi.natural(block.row(values))
        if not keep:
            for j in over:
                values[j] = None
    return structure.output(values), values, solutions


def _solve(
    structure: Structure,
    component: tuple[int, ...],
    values: list[Tensor | None],
    options: Options,
    start: list[Tensor] | None,
) -> Solution:
    """The fixed point of one component; its blocks are put among the values."""
    blocks = [structure.blocks[k] for k in component]
    inside = set(component)
    pairs = [block.row.split(inside) for block in blocks]
    # What comes from outside is the network's, as autocast would have it; the loop is not.
    rests = [rest(values) for _, rest in pairs]
    with torch.autocast(rests[0].device.type, enabled=False):
        x0 = None if start is None else [start[k] for k in component]
        if (own := own_matrix(blocks, component)) is not None:
            solution, states = _solve_dense(blocks, own, rests, options, x0)
        else:
            solution, states = _solve_blocks(
                blocks, component, [loop for loop, _ in pairs], rests, len(values), options, x0
            )
    for k, state in zip(component, states, strict=True):
        values[k] = state
    return solution


def own_matrix(blocks: list[Block], component: tuple[int, ...]) -> Tensor | None:
    """The matrix of a loop, where products with it are about as cheap as with its blocks."""
    if not all(block.phi.symmetric for block in blocks):
        return None
    if len(blocks) == 1:
        row = blocks[0].row.flat()
        inside = [op for j, op in row.terms if j == component[0]]
        # A layer's own: also where it acts on the last of several dimensions.
        if len(inside) == 1 and (M := inside[0].matrix) is not None:
            return M
    n = sum(block.size for block in blocks)
    cost = sum(op.cost for _, op in _inside(blocks, component))
    if n > _DENSE_STATES or n * n > _DENSE_FACTOR * cost:
        return None
    return loop_grid(blocks, component).dense(limit=1 << 62)


def _inside(blocks: list[Block], component: tuple[int, ...]) -> list[Any]:
    return [t for block in blocks for t in block.row.flat().terms if t[0] in component]


def loop_grid(blocks: list[Block], component: tuple[int, ...]) -> Any:
    """The diagonal block of A that a loop is."""
    at = {k: i for i, k in enumerate(component)}
    rows = tuple(Space(b.name, b.row.shape, b.size) for b in blocks)
    columns = tuple(Space(b.name, b.shape, b.size) for b in blocks)
    equations = [b.row.split(set(component))[0].moved(lambda j: at[j]) for b in blocks]
    return grid_of(rows, columns, equations, False)


def _solve_dense(
    blocks: list[Block],
    A: Tensor,
    rests: list[Tensor],
    options: Options,
    x0: list[Tensor] | None,
) -> tuple[Solution, list[Tensor]]:
    """x = phi(A x + v) with one matrix."""
    work = torch.promote_types(A.dtype, torch.float32)
    if len(blocks) == 1 and A.shape[0] == blocks[0].shape[-1]:
        v = rests[0].reshape(-1, A.shape[0])
        phi, equation = blocks[0].phi, blocks[0].equation
        start = None if x0 is None else x0[0].reshape(v.shape)
    else:
        v = torch.cat([rest.flatten(1) for rest in rests], 1)
        phi = Blocks(parts=tuple(part for block in blocks for part in block.parts))
        equation = None
        start = None if x0 is None else torch.cat([x.flatten(1) for x in x0], 1)
    A, v = A.to(work), v.to(work)
    if equation is None:
        equation = Equation(phi, contraction=_contraction(A, phi))
    plain = options.solver is None and isinstance(options.adjoint, Implicit) and start is None
    if (inside_transform() or torch.compiler.is_compiling()) and plain:  # which hide values
        if torch.compiler.is_compiling() and not equation.spec:
            equation = equation.with_spec()
        x, none = equilibrium(A, v, equation), v.new_zeros(0)
        return Solution(x, none, none, none), _apart(x, rests)
    solver = options.solver or equation.solver
    f = AffineMap(A, v, phi, equation.contraction, equation.monotone, equation.acyclic)
    if start is not None:
        start = start.to(work)
    solution = options.adjoint.run(f, start, solver).check(options.on_failure)
    return solution, _apart(solution.value, rests)


def _contraction(A: Tensor, phi: Any) -> float | None:
    """||A||_inf times the Lipschitz constant, where that is below 1."""
    if inside_transform() or torch.compiler.is_compiling():
        return None
    norm = float(A.detach().abs().sum(1).amax())
    kappa = norm * phi.infinity_lipschitz if norm else 0.0
    return kappa if kappa < 1 else None


def _apart(x: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The blocks of x, in the shapes and dtype of `like`."""
    if len(like) == 1:
        return [x.reshape(like[0].shape).to(like[0].dtype)]
    parts = x.split([math.prod(z.shape[1:]) for z in like], 1)
    return [part.reshape(z.shape).to(z.dtype) for part, z in zip(parts, like, strict=True)]


def _solve_blocks(
    blocks: list[Block],
    component: tuple[int, ...],
    loops: list[AnyRow],
    rests: list[Tensor],
    count: int,
    options: Options,
    x0: list[Tensor] | None,
) -> tuple[Solution, list[Tensor]]:
    """The same with operators: the blocks flattened into one vector for the solver."""
    sizes = [math.prod(block.shape) for block in blocks]
    like = next(iter(weights(tuple(loops))), None)
    if like is not None:  # under autocast the rests may be of another dtype than the loop
        rests = [rest.to(read(like).dtype) for rest in rests]

    def f(x: Tensor) -> Tensor:
        own: list[Tensor | None] = [None] * count
        own[-1] = x  # for the size of the batch alone
        for k, block, part in zip(component, blocks, x.split(sizes, 1), strict=True):
            own[k] = part.reshape(-1, *block.shape)
        images = [
            block.phi.natural(loop(own) + rest).flatten(1)
            for block, loop, rest in zip(blocks, loops, rests, strict=True)
        ]
        return images[0] if len(images) == 1 else torch.cat(images, 1)

    if x0 is None:
        with torch.no_grad():
            x0 = [b.phi.natural(rest) for b, rest in zip(blocks, rests, strict=True)]
    start = torch.cat([x.flatten(1) for x in x0], 1)
    solution = fixed_point(
        f, start, solver=options.solver or Auto(), adjoint=options.adjoint,
        on_failure=options.on_failure, contraction=_block_contraction(blocks, component),
    )  # fmt: skip
    parts = solution.value.split(sizes, 1)
    return solution, [p.reshape(-1, *b.shape) for p, b in zip(parts, blocks, strict=True)]


def _block_contraction(blocks: list[Block], component: tuple[int, ...]) -> float | None:
    """max_k Lip(phi_k) sum_j ||A_kj||_inf, where that is below 1."""
    with torch.no_grad():
        norms = loop_grid(blocks, component).norms().sum(1).tolist()
    kappa = max(
        norm * block.phi.infinity_lipschitz if norm else 0.0
        for norm, block in zip(norms, blocks, strict=True)
    )
    return kappa if kappa < 1 else None
