"""A recurrent network whose cell is an equilibrium."""

from typing import Any

import torch
from torch import Tensor, nn

from ..model import ImplicitModel
from ..wellposed import Certificate
from .affine import ImplicitLayer


class ImplicitRNN(nn.Module):
    """h_t = ImplicitLayer([u_t, h_{t-1}]): a recurrent net whose cell is an equilibrium.

    Shapes and names are those of `nn.RNN` with one layer.

    Args:
        input_size: width of u_t.
        hidden_size: width of h_t.
        state_features: states of the cell.
        batch_first: whether sequences are (batch, time, features).
        options: further arguments of the cell, an `ImplicitLayer`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        state_features: int,
        *,
        batch_first: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.batch_first = batch_first
        self.cell = ImplicitLayer(input_size + hidden_size, hidden_size, state_features, **options)

    def forward(self, input: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All hidden states and the last.

        Args:
            input: (time, batch, input_size), (batch, time, input_size) with `batch_first`, or
                one sequence (time, input_size).
            h0: (1, batch, hidden_size), or (1, hidden_size) for one sequence; zeros by default.

        Returns:
            (output, h_n), shaped as the arguments.

        Raises:
            ConvergenceError: a sample did not converge at some time step.
            TypeError, ValueError: input or h0 is no tensor, or of another shape.
        """
        if not isinstance(input, Tensor):
            raise TypeError(f"input: got {type(input).__name__}, expected a tensor.")
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"input: got shape {tuple(input.shape)}, expected (time, batch, {self.input_size})"
                f" or (time, {self.input_size}); with batch_first the batch comes first."
            )
        batched = input.dim() == 3
        if input.shape[1 if batched and self.batch_first else 0] == 0:
            raise ValueError(
                f"input: got shape {tuple(input.shape)}, expected at least one time step."
            )
        steps = input.unbind(1 if batched and self.batch_first else 0)
        shape = (*input.shape[1:-1], self.hidden_size)
        if batched and self.batch_first:
            shape = (input.shape[0], self.hidden_size)
        if h0 is not None and tuple(h0.shape) != (1, *shape):
            raise ValueError(f"h0: got shape {tuple(h0.shape)}, expected {(1, *shape)}.")
        h = input.new_zeros(shape) if h0 is None else h0[0]
        A = self.cell._weight()  # once for all steps
        outputs = []
        for u in steps:
            joint = self.cell._accept(torch.cat([u, h.to(u.dtype)], dim=-1))
            h = self.cell.readout(self.cell.state(joint, A), joint)
            outputs.append(h)
        time = 1 if batched and self.batch_first else 0
        return torch.stack(outputs, dim=time), h[None]

    def certificate(self, **options: Any) -> Certificate:
        """What can be proved of the cell: see `implicitdl.wellposed.certificate`."""
        return self.cell.certificate(**options)

    def model(self) -> ImplicitModel:
        """The cell as an ImplicitModel from (u_t, h_(t-1)) to h_t."""
        return self.cell.model()
