"""A deep equilibrium of any module."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..implicit import Adjoint, fixed_point, get_adjoint
from ..solution import Solution
from ..solvers import FixedPointSolver, get_solver


class EquilibriumLayer(nn.Module):
    """z = f(z, u): a deep equilibrium of any module or function.

    Args:
        f: called as f(z, u); keeps shape and dtype of z and treats samples, the entries along
            dim 0, independently (no batch statistics).
        state_shape: shape of one sample's z; an integer n means (n,).
        solver: a solver or its name.
        adjoint: `"implicit"` is exact for first derivatives, `Implicit(order=2)` for second ones;
            deriving further raises.
        contraction: a factor that you know f contracts by in z, if you do: it is believed, and
            lets the solver take f(z) for the answer and Picard for the method.

    Whether z = f(z, u) has one solution is not known for a general f; a solve that does not
    converge raises. `torch.func` transforms, `torch.compile(fullgraph=True)` and `torch.export`
    cannot see through a closure and are refused with the reason.

    Example:
        >>> import torch, implicitdl
        >>> cell = torch.nn.Linear(8, 8)
        >>> layer = implicitdl.EquilibriumLayer(lambda z, u: torch.tanh(cell(z) / 2 + u), 8)
        >>> layer(torch.randn(3, 8)).shape
        torch.Size([3, 8])

    Reference:
        Bai, Kolter, Koltun (2019).
    """

    def __init__(
        self,
        f: "nn.Module | Callable[[Tensor, Tensor], Tensor]",
        state_shape: int | Sequence[int],
        *,
        solver: "str | FixedPointSolver" = "auto",
        adjoint: "str | Adjoint" = "implicit",
        contraction: float | None = None,
    ):
        super().__init__()
        if not callable(f):
            raise TypeError(f"f: got {type(f).__name__}, expected a callable f(z, u).")
        if contraction is not None and not 0 <= contraction < 1:
            raise ValueError(f"contraction: got {contraction}, expected a number in [0, 1).")
        self.f = f
        self.state_shape = (state_shape,) if isinstance(state_shape, int) else tuple(state_shape)
        if not all(isinstance(k, int) and k >= 1 for k in self.state_shape):
            raise ValueError(f"state_shape: got {state_shape!r}, expected positive integers.")
        self.solver, self.adjoint = get_solver(solver), get_adjoint(adjoint)
        self.contraction = contraction

    def forward(self, u: Tensor, z0: Tensor | None = None) -> Tensor:
        """The equilibrium for each sample of u.

        Args:
            u: inputs, samples along dim 0.  # (batch, *)
            z0: where to start; zeros by default.  # (batch, *state_shape)

        Raises:
            ConvergenceError: a sample did not converge.
        """
        return self.solve(u, z0).value

    def solve(
        self,
        u: Tensor,
        z0: Tensor | None = None,
        *,
        on_failure: str = "raise",
        record: bool = False,
    ) -> Solution:
        """The equilibrium with its residual, steps and statistics; arguments as in `forward`."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "EquilibriumLayer cannot be compiled into one graph or exported: its loop looks at "
                "values of an arbitrary f. Compile f itself, or use ImplicitLayer or MonotoneLayer."
            )
        if not isinstance(u, Tensor) or u.dim() == 0:
            got = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
            raise ValueError(f"u: got {got}, expected a tensor (batch, *).")
        with torch.autocast(u.device.type, enabled=False):
            if u.is_floating_point():
                u = u.to(torch.promote_types(u.dtype, torch.float32))
            if z0 is None:
                parameter = next(iter(self.parameters()), None)
                dtype = u.dtype if u.is_floating_point() else None
                z0 = u.new_zeros(
                    (u.shape[0], *self.state_shape),
                    dtype=dtype or (parameter.dtype if parameter is not None else torch.float32),
                )
            elif tuple(z0.shape) != (u.shape[0], *self.state_shape):
                raise ValueError(
                    f"z0: got shape {tuple(z0.shape)}, expected {(u.shape[0], *self.state_shape)}."
                )
            sick = ~torch.isfinite(u).reshape(u.shape[0], -1).all(dim=1) if u.numel() else None

            def f(z: Tensor) -> Tensor:
                out = self.f(z, u)
                # An infinite input may have a finite image (tanh), and is no answer all the same.
                if sick is not None and bool(sick.any()):
                    out = torch.where(sick.view(-1, *[1] * (out.dim() - 1)), torch.nan, out)
                return out

            return fixed_point(
                f, z0, solver=self.solver, adjoint=self.adjoint,
                on_failure=on_failure, record=record, contraction=self.contraction,
            )  # fmt: skip

    def extra_repr(self) -> str:
        """The options, as in the constructor."""
        return f"state_shape={self.state_shape}, solver={self.solver.name}, adjoint={self.adjoint}"
