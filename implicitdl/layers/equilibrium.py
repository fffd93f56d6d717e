"""A deep equilibrium of any module."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..implicit import Adjoint, fixed_point, get_adjoint, refuse_transforms
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

    The parameters of f are those of the layer only where f is an `nn.Module`: those that a function
    closes over get gradients, but no optimiser, `.to()` or `state_dict` of the layer sees them.

    Example:
        >>> import torch, implicitdl
        >>> class Cell(torch.nn.Linear):
        ...     def forward(self, z, u):
        ...         return torch.tanh(super().forward(z) / 2 + u)
        >>> layer = implicitdl.EquilibriumLayer(Cell(8, 8), 8)
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
        shape = tuple(state_shape) if isinstance(state_shape, Sequence) else (state_shape,)
        self.state_shape = shape
        if not all(type(k) is int and k >= 1 for k in shape):
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
            ValueError: u or z0 has another shape or dtype than f takes.
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
        refuse_transforms("EquilibriumLayer")
        least = 2 if isinstance(u, Tensor) and u.is_floating_point() else 1  # tokens are scalars
        if not isinstance(u, Tensor) or u.dim() < least:
            got = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
            raise ValueError(
                f"u: got {got}, expected a batch (batch, *): one sample is u[None], a batch of "
                "scalars u[:, None]."
            )
        own = next((p.dtype for p in self.parameters() if p.is_floating_point()), None)
        with torch.autocast(u.device.type, enabled=False):
            u = self._accept(u, own)
            if z0 is None:
                dtype = u.dtype if u.is_floating_point() else own or torch.float32
                z0 = u.new_zeros((u.shape[0], *self.state_shape), dtype=dtype)
            elif tuple(z0.shape) != (u.shape[0], *self.state_shape):
                raise ValueError(
                    f"z0: got shape {tuple(z0.shape)}, expected {(u.shape[0], *self.state_shape)}."
                )
            sick = None
            if u.is_floating_point() and not bool(torch.isfinite(u).all()):
                # An infinite input may have a finite image (tanh), and is no answer all the same;
                # and f is shown a zero for it, so that no NaN gets into the gradients of others.
                sick = ~torch.isfinite(u).flatten(1).all(dim=1)
                u = u.masked_fill(sick.view(-1, *[1] * (u.dim() - 1)), 0.0)

            def f(z: Tensor) -> Tensor:
                out = self.f(z, u)
                if sick is not None:
                    out = out.masked_fill(sick.view(-1, *[1] * (out.dim() - 1)), torch.nan)
                return out

            return fixed_point(
                f, z0, solver=self.solver, adjoint=self.adjoint,
                on_failure=on_failure, record=record, contraction=self.contraction,
            )  # fmt: skip

    @staticmethod
    def _accept(u: Tensor, own: torch.dtype | None) -> Tensor:
        """u in the dtype of the solve, which is that of the module, at least float32."""
        if own is not None and own != torch.promote_types(own, torch.float32):
            raise ValueError(
                f"f: its parameters are {own}, in which a fixed point cannot be found to any useful "
                "accuracy; expected float32 or float64. Keep f in float32: under autocast the solve "
                "runs in float32, too."
            )
        if not u.is_floating_point():
            return u
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        if own is not None and u.dtype != own:
            raise ValueError(
                f"u: got {u.dtype}, expected {own} as the parameters of f; convert with .to()."
            )
        return u

    def extra_repr(self) -> str:
        """The options, as in the constructor."""
        return f"state_shape={self.state_shape}, solver={self.solver.name}, adjoint={self.adjoint}"
