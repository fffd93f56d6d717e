"""What layers of the form x = phi(A x + B u + b), y = C x + D u + d share."""

import abc
import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import wellposed
from ..activations import Activation, get_activation
from ..implicit import Adjoint, Equation, Implicit, equilibrium, fixed_point, get_adjoint
from ..maps import inside_transform
from ..model import ImplicitModel, accept, solve_state
from ..solution import Solution
from ..solvers import FixedPointSolver, get_solver

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def altered(module: nn.Module, *kinds: type[nn.Module]) -> str | None:
    """What makes a module do something else than its class, one of `kinds`, says; None for nothing.

    torch's older weight_norm and its pruning are hooks, too.
    """
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "hooks"
    base = next((kind for kind in kinds if isinstance(module, kind)), None)
    return "a `forward` of its own" if base and type(module).forward is not base.forward else None


class AffineLayer(nn.Module, abc.ABC):
    """A layer of the form x = phi(A x + B u + b), y = C x + D u + d.

    A subclass keeps its own parameters for A and offers the property `A`.
    """

    in_features: int
    out_features: int
    state_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        state_features: int,
        *,
        activation: "str | Activation",
        bias: bool,
        direct: bool,
        solver: "str | FixedPointSolver",
        adjoint: "str | Adjoint",
        dtype: torch.dtype | None,
        device: "str | torch.device | None",
    ):
        super().__init__()
        sizes = {
            "in_features": in_features,
            "out_features": out_features,
            "state_features": state_features,
        }
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: got {size!r}, expected an integer >= 1.")
            setattr(self, name, size)
        phi = get_activation(activation)
        if not phi.symmetric:
            raise ValueError(
                f"activation: got {phi}, whose Jacobian is not symmetric, expected one that is the "
                "gradient of a function; write the map as an `EquilibriumLayer`."
            )
        self._options = phi, get_solver(solver), get_adjoint(adjoint)
        n, p, q = state_features, in_features, out_features
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        self.B = nn.Parameter(torch.empty(n, p, **kind))
        self.C = nn.Parameter(torch.empty(q, n, **kind))
        self.D = nn.Parameter(torch.empty(q, p, **kind)) if direct else None
        self.b = nn.Parameter(torch.empty(n, **kind)) if bias else None
        self.d = nn.Parameter(torch.empty(q, **kind)) if bias else None

    @property
    def A(self) -> Tensor:
        """The weight that the layer computes with.  # (n, n)"""
        return self._weight().to(self.B.dtype)

    @abc.abstractmethod
    def _weight(self) -> Tensor:
        """A, in at least float32: in half precision rounding would take it out of its set."""

    @property
    def activation(self) -> Activation:
        """phi. Fixed, since the set that A is kept in was chosen for it."""
        return self._options[0]

    @property
    def solver(self) -> FixedPointSolver:
        """How the equation is solved; may be assigned, as a name or a solver."""
        return self._options[1]

    @solver.setter
    def solver(self, solver: "str | FixedPointSolver") -> None:
        self._set(get_solver(solver), self.adjoint)

    @property
    def adjoint(self) -> Adjoint:
        """How gradients are computed; may be assigned, as a name or an `Adjoint`."""
        return self._options[2]

    @adjoint.setter
    def adjoint(self, adjoint: "str | Adjoint") -> None:
        self._set(self.solver, get_adjoint(adjoint))

    def _prepare(self, **facts: Any) -> None:
        """Freeze what does not change from call to call: activation, facts, solvers."""
        size = self.activation.size
        if size not in (None, self.state_features):
            raise ValueError(
                f"activation: got Blocks for {size} states, expected {self.state_features} "
                "(state_features)."
            )
        self._facts = facts
        self._set(self.solver, self.adjoint)

    def _set(self, solver: FixedPointSolver, adjoint: Adjoint) -> None:
        own = adjoint.solver if isinstance(adjoint, Implicit) else None
        equation = Equation(
            self.activation, **self._facts, solver=solver, adjoint_solver=own or solver
        )
        # An activation of the user's may have fields that JSON cannot hold: it is not compiled.
        with contextlib.suppress(TypeError, ValueError):
            equation = equation.with_spec()
        self._options = self.activation, solver, adjoint
        self.equation = equation

    def reset_parameters(self) -> None:
        """Initialise B, C, D, b, d.

        B as He for ReLU (variance 2/p): the states then have the size of the inputs before A adds
        anything. C by variance 1/n and D by 1/(4 p), so that at first the output comes through the
        states, and gradients reach A and B. Biases start at zero.
        """
        n, p = self.state_features, self.in_features
        with torch.no_grad():
            self.B.normal_(0.0, math.sqrt(2 / p))
            self.C.normal_(0.0, math.sqrt(1 / n))
            if self.D is not None:
                self.D.normal_(0.0, 0.5 * math.sqrt(1 / p))
            if self.b is not None:
                self.b.zero_()
                self.d.zero_()

    def forward(self, u: Tensor) -> Tensor:
        """y = C x + D u + d at the equilibrium x = phi(A x + B u + b).

        Args:
            u: inputs.  # (*, in_features)

        Returns:
            outputs.  # (*, out_features)

        Raises:
            ConvergenceError: a sample did not converge; the message names it.
            ValueError: u has another width, dtype or device than the layer.
        """
        u = self._accept(u)
        return self.readout(self.state(u), u)

    def _accept(self, u: Tensor) -> Tensor:
        """u, checked; under autocast, in the dtype of the weights."""
        return accept(u, self.in_features, self.B)

    def state(self, u: Tensor, A: Tensor | None = None) -> Tensor:
        """The equilibrium alone, in at least float32.  # (*, in_features) -> (*, n)"""
        with torch.autocast(u.device.type, enabled=False):
            A, v = self._equation_at(u, A)
            rows = v.reshape(-1, v.shape[-1])
            if isinstance(self.adjoint, Implicit):
                x = equilibrium(A, rows, self.equation)
            elif torch.compiler.is_compiling():
                raise RuntimeError(
                    f"A layer with adjoint={self.adjoint} cannot be compiled into one graph or "
                    "exported: only adjoint='implicit' is an operator. Leave out fullgraph=True."
                )
            else:
                x = fixed_point(
                    self.equation.map(A, rows), solver=self.solver, adjoint=self.adjoint
                ).value
            return x.reshape(v.shape)

    def _equation_at(self, u: Tensor, A: Tensor | None) -> tuple[Tensor, Tensor]:
        """A and v = B u + b in the dtype of the solve."""
        A = self._weight() if A is None else A
        work = torch.promote_types(A.dtype, torch.float32)
        b = None if self.b is None else self.b.to(work)
        return A.to(work), functional.linear(u.to(work), self.B.to(work), b)

    def readout(self, x: Tensor, u: Tensor) -> Tensor:
        """y = C x + D u + d.  # (*, n), (*, p) -> (*, q)"""
        y = functional.linear(x.to(self.C.dtype), self.C, self.d)
        return y if self.D is None else y + functional.linear(u, self.D)

    def solve(
        self,
        u: Tensor,
        *,
        x0: Tensor | None = None,
        on_failure: str = "raise",
        record: bool = False,
    ) -> Solution:
        """The state with all that is known of it: `layer.readout(solution.value, u)` is forward.

        Args:
            u: inputs.  # (*, in_features)
            x0: a state to start from, say that of a nearby input.  # (*, n)
            on_failure: `"raise"`, `"warn"` or `"return"`.
            record: keep the iterates in `stats["trajectory"]`.

        Returns:
            Solution whose `value` is the state, differentiable, and whose `error_bound` bounds its
            distance to the exact equilibrium in the norm of `certificate(refute=False)`.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "layer.solve looks at values and cannot be compiled into one graph; call the layer "
                "itself, or leave out fullgraph=True."
            )
        u = self._accept(u)
        with torch.autocast(u.device.type, enabled=False):
            sick = None
            if on_failure != "raise" and not bool(torch.isfinite(u).all()):
                # Zeros in their place: 0 * NaN would spoil the gradient of B for all samples.
                sick = ~torch.isfinite(u).all(dim=-1, keepdim=True)
                u = u.masked_fill(sick, 0.0)
            A, v = self._equation_at(u, None)
            if sick is not None:
                v = v.masked_fill(sick, torch.nan)
            bound = None
            if not inside_transform():
                proof = wellposed.certificate(A.detach(), self.activation, refute=False)
                bound = proof.error_bound if proof.constant is not None else None
            return solve_state(
                A, v, self.equation, x0, self.solver, self.adjoint, on_failure, record, bound
            )

    def certificate(self, **options: Any) -> "wellposed.Certificate":
        """What can be proved of the layer as it is now: see `wellposed.certificate`."""
        return wellposed.certificate(self.A.detach(), self.activation, **options)

    def model(self) -> ImplicitModel:
        """The layer as an ImplicitModel, its tensors still connected to the parameters."""
        return ImplicitModel(self.A, self.B, self.C, self.D, self.b, self.d, self.activation)

    def extra_repr(self) -> str:
        """The sizes, as in the constructor."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"state_features={self.state_features}, activation={self.activation}, "
            f"bias={self.b is not None}, direct={self.D is not None}, solver={self.solver.name}"
        )

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As in nn.Module, but with `strict` a state with keys missing or too many is refused
        before anything is loaded."""
        own = self.state_dict().keys()
        missing = [name for name in own if name not in state_dict]
        beyond = [name for name in state_dict if name not in own]
        if strict and (missing or beyond):
            parts = [f"Missing key(s) in state_dict: {', '.join(missing)}."] if missing else []
            parts += [f"Unexpected key(s): {', '.join(beyond)}."] if beyond else []
            raise RuntimeError(
                f"{type(self).__name__}: {' '.join(parts)} Expected {', '.join(own)}. Nothing was "
                "loaded; pass strict=False to load the rest."
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """As in nn.Module, but all or nothing: a shape that differs leaves the layer as it was."""
        own = {prefix + name: t for name, t in self.state_dict().items()}
        wrong = [
            f"{key}: got shape {tuple(state_dict[key].shape)}, expected {tuple(t.shape)}"
            for key, t in own.items()
            if key in state_dict and state_dict[key].shape != t.shape
        ]
        if wrong:
            error_msgs.extend(wrong)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
