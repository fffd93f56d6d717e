"""Which inputs can move which outputs, and by how much at most."""

from typing import Any

import torch
from torch import Tensor

from ._graph import known
from ._region import INPUT


def sensitivity(model: Any) -> Tensor:
    """S = |C| (I - |A|)^-1 |B| + |D|: |y(u) - y(u0)| <= S |u - u0| for all inputs.  # (q, p)

    For slopes in [0, L] it is |C| K^-1 |B| + |D| with K = diag(1/L - a_ii) - |A off its diagonal|,
    which is no larger, and also there for some A with ||A|| > 1. S_ij = 0 says that input j cannot
    move output i. As a certificate it is loose; it is a map of influence, and chooses the inputs of
    a sparse attack.

    Args:
        model: as in `bounds`.

    Returns:
        S in float64, computed to rounding.

    Raises:
        TypeError: no model.
        ValueError: K of a loop is no M-matrix.

    Example:
        >>> import torch, implicitdl
        >>> from implicitdl.certify import sensitivity
        >>> f = implicitdl.ImplicitModel(torch.tensor([[0.5]]), torch.eye(1), torch.eye(1))
        >>> sensitivity(f).round(decimals=6)
        tensor([[2.]], dtype=torch.float64)

    Reference:
        El Ghaoui, Gu, Travacca, Askari, Tsai (2021), theorem 3.1 and section 4.2.
    """
    with torch.no_grad():
        graph, loops = known(model)
        moves: list[Tensor] = []  # (p, size): how far each input moves each state
        eye = torch.eye(graph.inputs, dtype=graph.example.dtype, device=graph.example.device)

        def through(row: Any) -> Tensor:
            total = eye.new_zeros(graph.inputs, row.rows)
            for j, M in row.terms:
                total = total + M.sized(eye if j == INPUT else moves[j])
            return total

        for node, loop in zip(graph.nodes, loops, strict=True):
            load = through(node.row)
            if not node.entrywise:  # the largest of a block's pre-activations moves all its states
                load = load.amax(-1, keepdim=True)
            if loop is None:
                moves.append((node.lipschitz * load).expand(-1, node.size))
                continue
            if loop.weights is None:
                raise ValueError(
                    f"model: the loop of {node.name} has ||A||_inf L = "
                    f"{float(loop.size.sum(1).max()) * loop.slope:.4g} and K = I/L - |A| is no "
                    "M-matrix, so that no sensitivity matrix exists; use bounds(method='lipschitz') "
                    "or 'crown'."
                )
            moves.append(loop.moved(load.expand(-1, node.size)))
        return through(graph.output).mT.contiguous()
