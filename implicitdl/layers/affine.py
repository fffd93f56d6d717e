"""Layers of the form x = phi(A x + B u + b), y = C x + D u + d."""

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
from ..wellposed import WellPosedSet, get_well_posed


class _AffineLayer(nn.Module, abc.ABC):
    """What layers of the form x = phi(A x + B u + b), y = C x + D u + d share.

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
        self._options = get_activation(activation), get_solver(solver), get_adjoint(adjoint)
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


class ImplicitLayer(_AffineLayer):
    """y = C x + D u + d at x = phi(A x + B u + b), A kept where the equation is well-posed.

    A is `well_posed(W)`, differentiated through, with W a free parameter, so any optimiser may be
    used. W starts with entries uniform in +-kappa/n: rows of A then have half the length they may
    have, the first solves take a handful of steps, and no row starts on the boundary.

    Args:
        in_features: width p of the input.
        out_features: width q of the output.
        state_features: number n of states.
        activation: a name, an `Activation`, or `Blocks` of them.
        well_posed: a `WellPosedSet`, or its name: `"inf-norm"`, `"perron-frobenius"`,
            `"matrix-measure"`, `"monotone"`, `"strictly-upper"`; None leaves A free, and a solve
            that fails then raises.
        bias: whether b and d are there.
        direct: whether D is there.
        low_rank: r < n for W = L R^T, which scales 2 n r numbers; only for sets that scale rows
            or the whole (`"inf-norm"`, `"perron-frobenius"`), so that A keeps its rank.
        solver: `"auto"`, another name or a solver; its tolerances decide the accuracy.
        adjoint: `"implicit"` (exact), or another `Adjoint`.
        dtype, device: of the parameters.

    Example:
        >>> import torch, implicitdl
        >>> layer = implicitdl.ImplicitLayer(4, 2, state_features=8)
        >>> layer(torch.randn(3, 4)).shape
        torch.Size([3, 2])

    Reference:
        El Ghaoui, Gu, Travacca, Askari, Tsai (2021), equations 1 and 2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        state_features: int,
        *,
        activation: "str | Activation" = "relu",
        well_posed: "str | WellPosedSet | None" = "inf-norm",
        bias: bool = True,
        direct: bool = True,
        low_rank: int | None = None,
        solver: "str | FixedPointSolver" = "auto",
        adjoint: "str | Adjoint" = "implicit",
        dtype: torch.dtype | None = None,
        device: "str | torch.device | None" = None,
    ):
        super().__init__(
            in_features, out_features, state_features, activation=activation, bias=bias,
            direct=direct, solver=solver, adjoint=adjoint, dtype=dtype, device=device,
        )  # fmt: skip
        n = state_features
        self.well_posed = None if well_posed is None else get_well_posed(well_posed)
        facts: dict[str, Any] = {}
        if self.well_posed is not None:
            self.well_posed.require_states(n)
            self.well_posed.check(self.activation)
            declared = self.well_posed.facts(self.activation)
            facts = {
                "contraction": declared["contraction"],
                "monotone": declared["strongly_monotone"],
                "acyclic": declared["acyclic"],
            }
        if low_rank is not None:
            if type(low_rank) is not int or not 1 <= low_rank < n:
                raise ValueError(f"low_rank: got {low_rank!r}, expected an integer in 1..{n - 1}.")
            if self.well_posed is not None and not self.well_posed.keeps_rank:
                raise ValueError(
                    f"low_rank: {self.well_posed} does not keep the rank of W; use 'inf-norm', "
                    "'perron-frobenius' or well_posed=None."
                )
        self.low_rank = low_rank
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        if low_rank is None:
            self.W = nn.Parameter(torch.empty(n, n, **kind))
        else:
            self.L = nn.Parameter(torch.empty(n, low_rank, **kind))
            self.R = nn.Parameter(torch.empty(n, low_rank, **kind))
        self._prepare(**facts)
        self.reset_parameters()

    def _weight(self) -> Tensor:
        """well_posed(W), with its gradient."""
        work = torch.promote_types(self.B.dtype, torch.float32)
        W = self.W.to(work) if self.low_rank is None else self.L.to(work) @ self.R.to(work).mT
        return W if self.well_posed is None else self.well_posed(W)

    def reset_parameters(self) -> None:
        """Initialise all parameters, W small."""
        super().reset_parameters()
        n = self.state_features
        kappa = float(getattr(self.well_posed, "kappa", 0.9))
        with torch.no_grad():
            if self.low_rank is None:
                self.W.uniform_(-kappa / n, kappa / n)
            else:
                # Entries of L R^T then have the deviation that the uniform entries would have.
                scale = math.sqrt(kappa / n / math.sqrt(3 * self.low_rank))
                self.L.normal_(0.0, scale)
                self.R.normal_(0.0, scale)

    def extra_repr(self) -> str:
        """The sizes, as in the constructor."""
        rank = "" if self.low_rank is None else f", low_rank={self.low_rank}"
        return super().extra_repr() + rank


class MonotoneLayer(_AffineLayer):
    """y = C x + D u + d at x = phi(A x + B u + b) with A = (1 - m) I - P^T P + S - S^T.

    I - A is strongly monotone with constant m whatever P and S are, so that every input has
    exactly one equilibrium, without any bound on the size of A.

    Args:
        in_features, out_features, state_features, activation, bias, direct, solver, adjoint,
            dtype, device: as in `ImplicitLayer`; the slopes of the activation must be >= 0 and
            (1 - margin) times the largest below 1.
        margin: m > 0.

    Reference:
        Winston, Kolter (2020), proposition 1 and theorem 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        state_features: int,
        *,
        margin: float = 0.1,
        activation: "str | Activation" = "relu",
        bias: bool = True,
        direct: bool = True,
        solver: "str | FixedPointSolver" = "auto",
        adjoint: "str | Adjoint" = "implicit",
        dtype: torch.dtype | None = None,
        device: "str | torch.device | None" = None,
    ):
        super().__init__(
            in_features, out_features, state_features, activation=activation, bias=bias,
            direct=direct, solver=solver, adjoint=adjoint, dtype=dtype, device=device,
        )  # fmt: skip
        self.well_posed = wellposed.Monotone(margin)
        self.well_posed.check(self.activation)
        self.margin = margin
        n = state_features
        self.P = nn.Parameter(torch.empty(n, n, dtype=dtype, device=device))
        self.S = nn.Parameter(torch.empty(n, n, dtype=dtype, device=device))
        declared = self.well_posed.facts(self.activation)
        self._prepare(monotone=declared["strongly_monotone"])
        self.reset_parameters()

    def _weight(self) -> Tensor:
        """(1 - m) I - P^T P + S - S^T."""
        work = torch.promote_types(self.B.dtype, torch.float32)
        P, S = self.P.to(work), self.S.to(work)
        eye = torch.eye(self.state_features, dtype=work, device=P.device)
        return (1 - self.margin) * eye - P.mT @ P + S - S.mT

    def reset_parameters(self) -> None:
        """Initialise all parameters: P with variance 1/n, so that A starts near -m I on average and
        ||A|| is of the order of 1 at every width; S with a quarter of it."""
        super().reset_parameters()
        n = self.state_features
        with torch.no_grad():
            self.P.normal_(0.0, math.sqrt(1 / n))
            self.S.normal_(0.0, 0.5 * math.sqrt(1 / n))

    def extra_repr(self) -> str:
        """The sizes, as in the constructor."""
        return f"{super().extra_repr()}, margin={self.margin}"
