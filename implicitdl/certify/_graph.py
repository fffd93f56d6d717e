"""The nodes of a model: of a layer, of matrices, or of blocks; kept from call to call.

What is kept of a model is used again only where every weight is, number by number, what it was: a
version counter does not see what is written through `.data` or shared memory, and comparing costs
far less than a bound.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..layers import ImplicitLayer, MonotoneLayer
from ..layers.base import altered
from ..model import ImplicitModel
from ..model.structure import INPUT, Row, Structure, fitted
from ..operators import Weight, read, rebuilt, weights
from ._loops import Loop
from ._matrices import graph_of_matrices
from ._nodes import Affine, Graph, Linear, Node, finite

KEPT = 1 << 22  # numbers in the weights of a model whose nodes are kept


def as_model(model: Any) -> ImplicitModel:
    """The ImplicitModel of a layer or of a model.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, ImplicitModel):
        return model
    if isinstance(model, ImplicitLayer | MonotoneLayer):
        what = altered(model, ImplicitLayer, MonotoneLayer)
        if what is not None:
            raise TypeError(
                f"model: a {type(model).__name__} that has {what} is another function than its matrices "
                "say; pass `model.model()` for that of the matrices."
            )
        return model.model()
    raise TypeError(
        f"model: got {type(model).__name__}, expected an ImplicitModel, an ImplicitLayer or a "
        "MonotoneLayer; a network is converted first, implicitdl.to_implicit(network, u)."
    )


def graph_of(model: Any, *, dtype: torch.dtype = torch.float64, detach: bool = True) -> Graph:
    """The nodes of a model, its tensors in `dtype`.

    Raises:
        TypeError: no model.
        ValueError: NaN or infinite weights.
    """

    def cast(w: Weight) -> Tensor:
        t = read(w)
        t = t.detach() if detach else t
        return t.to(dtype) if t.is_floating_point() else t

    return _graph(as_model(model), dtype, cast)


def _graph(whole: ImplicitModel, dtype: torch.dtype, cast: Callable[[Weight], Tensor]) -> Graph:
    if whole.structure is None:
        return graph_of_matrices(whole, {name: cast(getattr(whole, name)) for name in "ABCDbd"})
    f = whole.structure
    f = rebuilt(f, cast)
    like = torch.empty(0, dtype=dtype, device=whole.device)
    start, at = [], 0
    for block in f.blocks:
        start.append(at)
        at += block.size
    nodes: list[Node] = []
    order: list[int] = []
    number = {INPUT: INPUT}
    for component in f.components:
        looped = component in f.loops
        members = sorted(component)
        node, own = _node(f, tuple(members), looped, like, number)
        nodes.append(node)
        for k in members:
            length = math.prod(f.blocks[k].shape)
            order += range(start[k], start[k] + length)
            number[k] = len(nodes) - 1
        finite(own, node)
    output = _affine([f.output.flat()], None, like, _located(f, number))
    finite(output, None)
    return Graph(tuple(nodes), output, f.inputs, f.outputs, like, tuple(order), whole.states)


# ---- kept from call to call ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Known:
    """A model's nodes in float64 with what is known of its loops, both for reading alone.

    Attributes:
        sources: what weights are read from.
        weights: the numbers that the nodes were made of.
        parts: the activations.
    """

    graph: Graph
    loops: "tuple[Loop | None, ...]"
    sources: list[Weight]
    weights: tuple[Tensor, ...]
    parts: tuple[tuple[Any, int], ...]

    def fits(self, weights: list[Tensor], parts: tuple[tuple[Any, int], ...]) -> bool:
        """Whether these are the same, number by number."""
        return (
            len(weights) == len(self.weights)
            and len(parts) == len(self.parts)
            and all(a is b and n == k for (a, n), (b, k) in zip(parts, self.parts, strict=True))
            and all(
                a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
                for a, b in zip(weights, self.weights, strict=True)
            )
        )


_KNOWN: "weakref.WeakKeyDictionary[Any, Known]" = weakref.WeakKeyDictionary()


def known(model: Any) -> "tuple[Graph, tuple[Loop | None, ...]]":
    """The nodes in float64 and their loops; those of the last call where no weight has changed.

    Raises:
        TypeError, ValueError: as `graph_of`.
    """
    whole = as_model(model)
    key = model if whole.structure is None else whole.structure
    kept = _KNOWN.get(key)
    made_of: list[Weight]
    if whole.structure is None:  # the tensors of a layer are computed anew
        made_of = [*(getattr(whole, name) for name in "ABCDbd"), *weights(whole.phi)]
    else:
        made_of = weights(whole.structure) if kept is None else kept.sources
    now = [read(w).detach() for w in made_of]
    if kept is not None and kept.fits(now, whole.phi.parts):
        return kept.graph, kept.loops
    _KNOWN.pop(key, None)
    own = tuple(t.clone() for t in now)
    at = {id(w): t for w, t in zip(made_of, own, strict=True)}

    def cast(w: Weight) -> Tensor:
        t = at[id(w)]
        return t.double() if t.is_floating_point() else t

    graph = _graph(whole, torch.float64, cast)
    loops = tuple(None if node.A is None else Loop(node) for node in graph.nodes)
    if sum(t.numel() for t in own) <= KEPT:
        sources = [] if whole.structure is None else made_of
        _KNOWN[key] = Known(graph, loops, sources, own, whole.phi.parts)
    return graph, loops


# ---- blocks ----------------------------------------------------------------------------------------


def _located(f: Structure, number: dict[int, int]) -> Callable[[int], tuple[int, int, int]]:
    """Block -> (node, where it starts in the node, length of the node)."""
    members: dict[int, list[int]] = {}
    for k, node in number.items():
        if k != INPUT:
            members.setdefault(node, []).append(k)

    def find(j: int) -> tuple[int, int, int]:
        if j == INPUT:
            return INPUT, 0, f.inputs
        own = sorted(members[number[j]])
        sizes = {k: math.prod(f.blocks[k].shape) for k in own}
        return number[j], sum(sizes[k] for k in own if k < j), sum(sizes.values())

    return find


def _affine(
    rows: list[Row], inside: "set[int] | None", like: Tensor, find: Callable[[int], Any]
) -> Affine:
    """Rows, one after the other, as one affine map of what is outside the loop."""
    bias = []
    for row in rows:
        t = like.new_zeros(row.shape)
        for constant in row.constants:
            t = t + fitted(constant, row.shape)(like).expand(row.shape)
        bias.append(t.flatten())
    whole = torch.cat(bias)
    terms: list[tuple[int, Linear]] = []
    single = len(rows) == 1
    at = 0
    for row, t in zip(rows, bias, strict=True):
        for j, op in row.terms:
            if inside is not None and j in inside:
                continue
            node, start, length = find(j)
            M = Linear.of(op, like)
            if not single or length != M.columns:  # placed among the states of a component
                if M.matrix is None:
                    M = replace(M, matrix=op.dense().to(like))
                full = like.new_zeros(len(whole), length)
                full[at : at + len(t), start : start + M.columns] = M.matrix
                M = Linear.of_matrix(full)
            terms.append((node, M))
        at += len(t)
    return Affine(tuple(terms), whole)


def _node(
    f: Structure,
    members: tuple[int, ...],
    looped: bool,
    like: Tensor,
    number: dict[int, int],
) -> tuple[Node, Affine]:
    blocks = [f.blocks[k] for k in members]
    rows = [block.row.flat() for block in blocks]
    find = _located(f, number)
    name = ", ".join(block.name for block in blocks)
    size = sum(math.prod(block.shape) for block in blocks)
    coupled = [block for block in blocks if not block.phi.entrywise]
    A = None
    if looped:
        if len(blocks) > 1 and coupled or any(b.row.shape != b.shape for b in blocks):
            raise ValueError(
                f"model: the loop of {name} has an activation that couples states of several "
                "blocks; no bound here covers it."
            )
        offset, at = {}, 0
        for k, block in zip(members, blocks, strict=True):
            offset[k] = at
            at += math.prod(block.shape)
        A = like.new_zeros(size, size)
        for k, row in zip(members, rows, strict=True):
            for j, op in row.terms:
                if j in offset:
                    M = op.dense()
                    A = A + _placed(M, offset[k], offset[j], size)
    affine = _affine(rows, set(members) if looped else None, like, find)
    natural = (blocks[0].phi, blocks[0].row.shape) if coupled else None
    parts: tuple[tuple[Activation, int], ...] = ()
    if natural is None:
        parts = tuple(part for block in blocks for part in block.phi.blocks(math.prod(block.shape)))
    return Node(name, affine, A, parts, natural, size), affine


def _placed(M: Tensor, row: int, column: int, size: int) -> Tensor:
    if M.shape == (size, size):
        return M
    pad = (column, size - column - M.shape[1], row, size - row - M.shape[0])
    return torch.nn.functional.pad(M, pad)
