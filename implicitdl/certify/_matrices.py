"""The nodes of a model given by matrices: its strongly connected components, by depth."""

import numpy as np
import torch
from torch import Tensor

from .._linalg import strong_components
from ..activations import Activation
from ..model import ImplicitModel
from ..model.structure import INPUT
from ._nodes import Affine, Graph, Linear, Node, finite


def graph_of_matrices(model: ImplicitModel, tensors: dict[str, Tensor]) -> Graph:
    """A loop a node; states without one that stand at the same depth share a node.

    Args:
        model: for its activations, sizes, and the zeros of A.
        tensors: its matrices as they are to be used, by name.

    Raises:
        ValueError: an activation couples states that other states of its loop feed back to.
    """
    A, B, C, D, b, d = (tensors[name] for name in "ABCDbd")
    groups = _groups(model, A)
    where: dict[int, tuple[int, int]] = {}
    for k, (states, _) in enumerate(groups):
        for position, i in enumerate(states):
            where[i] = (k, position)
    indices = [torch.tensor(states, device=A.device) for states, _ in groups]
    nodes = []
    for k, (states, looped) in enumerate(groups):
        rows = indices[k]
        terms = [(INPUT, Linear.of_matrix(B[rows]))] if bool((B[rows] != 0).any()) else []
        for j in range(k):
            M = A[rows][:, indices[j]]
            if bool((M != 0).any()):
                terms.append((j, Linear.of_matrix(M)))
        row = Affine(tuple(terms), b[rows])
        parts, natural = _activation(model, states, looped)
        own = A[rows][:, rows] if looped else None
        name = f"x{k + 1}" if len(groups) > 1 else "x"
        node = Node(name, row, own, parts, natural, len(states))
        finite(row, node)
        nodes.append(node)
    terms = [(j, Linear.of_matrix(C[:, rows])) for j, rows in enumerate(indices)]
    terms = [(j, M) for j, M in terms if bool((M.matrix != 0).any())]
    if bool((D != 0).any()):
        terms.append((INPUT, Linear.of_matrix(D)))
    output = Affine(tuple(terms), d)
    finite(output, None)
    order = tuple(i for states, _ in groups for i in states)
    return Graph(
        tuple(nodes), output, model.inputs, model.outputs, A.new_empty(0), order, model.states
    )


def _groups(model: ImplicitModel, A: Tensor) -> list[tuple[list[int], bool]]:
    """(states, whether they loop) in evaluation order."""
    n = model.states
    mask = (A.detach() != 0).cpu().numpy()
    tie = np.zeros(n, dtype=np.int64)  # which activation block a state is coupled by; 0 for none
    start = 0
    for number, (phi, size) in enumerate(model.phi.parts, start=1):
        if not phi.entrywise:
            tie[start : start + size] = number
        start += size
    tied = (tie[:, None] == tie[None]) & (tie > 0)[:, None]
    components = [c.tolist() for c in strong_components(mask | tied)]
    looped = [bool(mask[np.ix_(c, c)].any()) for c in components]
    home = np.empty(n, dtype=np.int64)
    depth: list[int] = []
    for k, c in enumerate(components):
        home[c] = k
        read = np.unique(home[np.flatnonzero(mask[c].any(0))])
        depth.append(max((depth[j] + 1 for j in read.tolist() if j != k), default=0))
    groups: list[tuple[int, list[int], bool]] = []
    flat: dict[int, list[int]] = {}
    for c, loop, level in zip(components, looped, depth, strict=True):
        if loop or tie[c[0]]:
            groups.append((level, sorted(c), loop))
        else:
            flat.setdefault(level, []).extend(c)
    groups += [(level, sorted(states), False) for level, states in flat.items()]
    return [(states, loop) for _, states, loop in sorted(groups, key=lambda g: g[0])]


def _activation(
    model: ImplicitModel, states: list[int], looped: bool
) -> tuple[tuple[tuple[Activation, int], ...], tuple[Activation, tuple[int, ...]] | None]:
    """The activation of some states."""
    owner: list[tuple[Activation, int]] = []
    for number, (phi, size) in enumerate(model.phi.parts):
        owner += [(phi, number)] * size
    mine = [owner[i] for i in states]
    coupled = {number: phi for phi, number in mine if not phi.entrywise}
    if coupled:
        phi = next(iter(coupled.values()))
        size = model.phi.parts[next(iter(coupled))][1]
        if len(coupled) > 1 or size != len(states):
            raise ValueError(
                f"model: a loop of {len(states)} states contains {phi}, which couples {size} of "
                "them, and others; no bound here covers it."
            )
        shape = getattr(phi, "shape", (size,))
        if phi.natural_shape(tuple(shape)) != (size,) and looped:
            raise ValueError(f"model: a loop through {phi}; no bound here covers it.")
        if phi.natural_shape(tuple(shape)) != (size,):  # as many states as the larger image has
            return (), (_Flat(of=phi), (size,))
        return (), (phi, (size,))
    parts: list[tuple[Activation, int]] = []
    for phi, _ in mine:
        if parts and parts[-1][0] == phi:
            parts[-1] = (phi, parts[-1][1] + 1)
        else:
            parts.append((phi, 1))
    return tuple(parts), None


class _Flat(Activation, register=False):
    """A block activation on its states flattened, zeros where it returns fewer."""

    def __init__(self, of: Activation):
        self.of = of

    entrywise = False
    symmetric = False

    @property
    def slope(self) -> tuple[float, float]:
        return self.of.slope

    @property
    def size(self) -> int | None:
        return self.of.size

    @property
    def infinity_lipschitz(self) -> float:
        return self.of.infinity_lipschitz

    @property
    def isotone(self) -> bool:
        """Whether larger entries in give no smaller entries out."""
        return self.of.isotone

    def __call__(self, z: Tensor) -> Tensor:
        return self.of(z)
