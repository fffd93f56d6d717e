"""A recurrent network whose cell is an equilibrium."""

from typing import Any

import torch
from torch import Tensor, nn

from ..model import ImplicitModel, cast, check_input
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

    Raises:
        TypeError: an option that `ImplicitLayer` does not have, or `batch_first` is no bool.
        ValueError: a size that is no positive integer, or options that do not fit together.

    Example:
        >>> import torch, implicitdl
        >>> rnn = implicitdl.ImplicitRNN(3, 4, state_features=8)
        >>> output, last = rnn(torch.randn(7, 2, 3))  # 7 steps of 2 sequences
        >>> output.shape, last.shape
        (torch.Size([7, 2, 4]), torch.Size([1, 2, 4]))
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
        for name, size in {"input_size": input_size, "hidden_size": hidden_size}.items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}: got {size!r}, expected an integer >= 1.")
        if not isinstance(batch_first, bool):
            raise TypeError(f"batch_first: got {batch_first!r}, expected True or False.")
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
            TypeError: input or h0 is no tensor.
            ValueError: input or h0 has another shape, dtype or device than expected, or there are no
                time steps.
        """
        input = cast(input, self.cell.B)
        time, shape = self._checked(input)
        if h0 is None:
            h = input.new_zeros(shape)
        else:
            h0 = cast(h0, self.cell.B)
            check_input(h0, self.hidden_size, self.cell.B, "h0")
            if tuple(h0.shape) != (1, *shape):
                raise ValueError(f"h0: got shape {tuple(h0.shape)}, expected {(1, *shape)}.")
            h = h0[0]
        with torch.autocast(self.cell.B.device.type, enabled=False):
            A = self.cell._weight()  # once for all steps
        outputs = []
        for u in input.unbind(time):
            joint = self.cell._accept(torch.cat([u, h.to(u.dtype)], dim=-1))
            h = self.cell.readout(self.cell.state(joint, A), joint)
            outputs.append(h)
        return torch.stack(outputs, dim=time), h[None]

    def _checked(self, input: Tensor) -> tuple[int, tuple[int, ...]]:
        """The dimension of time, and the shape of h."""
        check_input(input, self.input_size, self.cell.B, "input")
        shape = tuple(input.shape)
        if len(shape) not in (2, 3):
            rows = "batch, time" if self.batch_first else "time, batch"
            raise ValueError(
                f"input: got shape {shape}, expected ({rows}, {self.input_size}) or, for one "
                f"sequence, (time, {self.input_size})."
            )
        time = 1 if len(shape) == 3 and self.batch_first else 0
        if shape[time] == 0:
            raise ValueError(f"input: got shape {shape}, expected at least one time step.")
        return time, (*shape[:time], *shape[time + 1 : -1], self.hidden_size)

    def certificate(self, **options: Any) -> Certificate:
        """What can be proved of the cell, at every time step: its A is the same at all of them.

        Args:
            options: of `implicitdl.wellposed.certificate`.
        """
        return self.cell.certificate(**options)

    def model(self) -> ImplicitModel:
        """The cell as an ImplicitModel from (u_t, h_(t-1)), side by side, to h_t, its tensors still
        connected to the parameters."""
        return self.cell.model()
