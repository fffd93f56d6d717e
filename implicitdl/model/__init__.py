"""The algebra of implicit models: x = phi(A x + B u + b),  y = C x + D u + d.

Reference: El Ghaoui, Gu, Travacca, Askari, Tsai (2021), section 3 and appendix on composition.
"""

import functools
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import activations, wellposed
from ..activations import Activation, Blocks
from ..implicit import Adjoint as AdjointType
from ..implicit import Equation
from ..maps import inside_transform
from ..solution import Solution
from ..solvers import FixedPointSolver
from . import files
from .states import accept, cast, check_input, solve_state, state_alone

__all__ = ["ImplicitModel", "accept", "cast", "check_input", "solve_state", "stack"]


def _in_full_precision(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, outside autocast: a model's blocks keep its dtype."""

    @functools.wraps(operator)
    def wrapped(self: "ImplicitModel", *args: Any) -> Any:
        device = self.A.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return operator(self, *args)
        with torch.autocast(device, enabled=False):
            return operator(self, *args)

    return wrapped


@dataclass(frozen=True, eq=False)
class ImplicitModel:
    """x = phi(A x + B u + b), y = C x + D u + d: one equation and one affine map.

    Immutable. Operators assemble new models from the blocks of old ones, so gradients flow back to
    the tensors that a model was made of:

        g @ f           cascade, u -> f -> g
        f + g           the outputs of both, added
        stack(f, g)     the outputs of both, one after the other
        f.feedback(K)   the loop u = v + K y closed

    Args:
        A: state to state.  # (n, n)
        B: input to state.  # (n, p)
        C: state to output.  # (q, n)
        D: input to output; zeros by default.  # (q, p)
        b, d: biases; zeros by default.  # (n,), (q,)
        phi: an activation, `Blocks` of them, or a name.

    Raises:
        TypeError: one of A, B, C, D, b, d is no tensor.
        ValueError: shapes, dtypes or devices do not fit together, or phi is unknown.

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitModel
        >>> f = ImplicitModel(torch.tensor([[0.5]]), torch.eye(1), torch.eye(1))
        >>> f(torch.tensor([[1.0], [-1.0]])).round(decimals=4)
        tensor([[2.],
                [0.]])
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    b: Tensor | None = None
    d: Tensor | None = None
    phi: Any = "relu"  # Activation | str; `Blocks` once the model is made

    def __post_init__(self) -> None:
        for name in "ABC":
            t = getattr(self, name)
            if not isinstance(t, Tensor):
                raise TypeError(f"ImplicitModel: {name} is {type(t).__name__}, expected a matrix.")
            if t.dim() != 2:
                raise ValueError(f"ImplicitModel: {name} is {tuple(t.shape)}, expected a matrix.")
        n, p, q = self.A.shape[0], self.B.shape[1], self.C.shape[0]
        shapes = {"A": (n, n), "B": (n, p), "C": (q, n), "D": (q, p), "b": (n,), "d": (q,)}
        for name, shape in shapes.items():
            t = getattr(self, name)
            if t is None:
                t = self.A.new_zeros(shape)
                object.__setattr__(self, name, t)
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"ImplicitModel: {name} is {type(t).__name__}, expected a tensor {shape}."
                )
            if tuple(t.shape) != shape:
                raise ValueError(
                    f"ImplicitModel: {name} has shape {tuple(t.shape)}, expected {shape} "
                    f"(n={n} states from A, p={p} inputs from B, q={q} outputs from C)."
                )
            if t.dtype != self.A.dtype or t.device != self.A.device:
                raise ValueError(
                    f"ImplicitModel: {name} is {t.dtype} on {t.device}, expected {self.A.dtype} "
                    f"on {self.A.device} as A."
                )
        if not self.A.is_floating_point():
            raise ValueError(f"ImplicitModel: A is {self.A.dtype}, expected a floating dtype.")
        if n == 0:
            raise ValueError(
                "ImplicitModel: A is (0, 0), expected at least one state; an affine map y = D u + d "
                "has one that C does not read: A = B = C = 0."
            )
        phi = activations.get_activation(self.phi)
        if not isinstance(phi, Blocks):
            phi = Blocks.of(phi, n)
        if phi.size != n:
            raise ValueError(
                f"ImplicitModel: phi is for {phi.size} states, expected {n} as A has rows."
            )
        object.__setattr__(self, "phi", phi)

    @property
    def states(self) -> int:
        """n, the number of states."""
        return self.A.shape[0]

    @property
    def inputs(self) -> int:
        """p, the number of inputs."""
        return self.B.shape[1]

    @property
    def outputs(self) -> int:
        """q, the number of outputs."""
        return self.C.shape[0]

    @property
    def activation(self) -> Activation:
        """phi, unwrapped where it is one activation for all states."""
        parts = self.phi.parts
        return parts[0][0] if len(parts) == 1 else self.phi

    def __repr__(self) -> str:
        return (
            f"ImplicitModel(states={self.states}, inputs={self.inputs}, outputs={self.outputs}, "
            f"phi={self.activation}, {str(self.A.dtype).removeprefix('torch.')})"
        )

    # ---- what it computes ------------------------------------------------------------------------

    def solve(
        self,
        u: Tensor,
        *,
        x0: Tensor | None = None,
        solver: "str | FixedPointSolver" = "auto",
        adjoint: "str | AdjointType" = "implicit",
        on_failure: str = "raise",
        record: bool = False,
    ) -> Solution:
        """The state x = phi(A x + B u + b).

        Args:
            u: inputs.  # (*batch, p)
            x0: a state to start from.  # (*batch, n)
            solver, adjoint, on_failure, record: as in `implicitdl.fixed_point`.

        Returns:
            Solution; `value` is the state  # (*batch, n), differentiable in A, B, b and u, in at
            least float32. Where ||A||_inf times the Lipschitz constant of phi is below 1, or A is
            strictly triangular, `error_bound` bounds its distance to the exact equilibrium, in the
            norm of `certificate(refute=False)`.

        Raises:
            ConvergenceError: a sample did not converge and `on_failure="raise"`.
            TypeError: u or x0 is no tensor.
            ValueError: u or x0 has another width, dtype or device than the model, or an option is
                unknown.
        """
        return self._solve(u, True, x0, solver, adjoint, on_failure, record)

    def _solve(
        self, u: Tensor, certify: bool, x0: Tensor | None = None,
        solver: "str | FixedPointSolver" = "auto", adjoint: "str | AdjointType" = "implicit",
        on_failure: str = "raise", record: bool = False,
    ) -> Solution:  # fmt: skip
        """`solve`; the error bound costs a certificate and a product in float64."""
        u = accept(u, self.inputs, self.A)
        with torch.autocast(u.device.type, enabled=False):
            A, v = self._equation_at(u)
            facts = self._facts()
            bound = None
            if certify and facts and (facts["contraction"] is not None or facts["acyclic"]):
                proof = wellposed.certificate(A.detach(), self.activation, refute=False)
                bound = proof.error_bound if proof.constant is not None else None
            equation = Equation(self.activation, **facts)
            return solve_state(A, v, equation, x0, solver, adjoint, on_failure, record, bound)

    def _equation_at(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """A and v = B u + b in the dtype of the solve."""
        work = torch.promote_types(self.A.dtype, torch.float32)
        return self.A.to(work), functional.linear(u.to(work), self.B.to(work), self.b.to(work))

    def __call__(self, u: Tensor, **options: Any) -> Tensor:
        """y = C x + D u + d at the state x of `solve`.  # (*batch, q)

        Args:
            u: inputs.  # (*batch, p)
            options: of `solve`.

        Raises:
            ConvergenceError, TypeError, ValueError: as `solve`.
        """
        u = accept(u, self.inputs, self.A)
        if inside_transform() and not options:  # which hides the values that a Solution holds
            x = state_alone(*self._equation_at(u), Equation(self.activation))
        else:
            x = self._solve(u, False, **options).value
        return functional.linear(x.to(self.C.dtype), self.C, self.d) + functional.linear(u, self.D)

    def certificate(self, **options: Any) -> "wellposed.Certificate":
        """What can be proved of x = phi(A x + b): see `implicitdl.wellposed.certificate`."""
        return wellposed.certificate(self.A, self.phi, **options)

    def _facts(self) -> dict[str, Any]:
        """What the solver may rely on, from the cheap conditions alone."""
        A = self.A.detach().to(torch.promote_types(self.A.dtype, torch.float32))
        if inside_transform():  # values cannot be looked at
            return {}
        acyclic = self.phi.entrywise and not bool(torch.tril(A).any())
        norm = float(A.abs().sum(1).amax()) if self.states else 0.0
        # `lipschitz` is about the 2-norm where phi couples states, and says nothing in this one.
        kappa = norm * self.phi.infinity_lipschitz if norm else 0.0
        return {"contraction": kappa if kappa < 1 else None, "acyclic": acyclic}

    # ---- the algebra -----------------------------------------------------------------------------

    @_in_full_precision
    def __matmul__(self, f: "ImplicitModel") -> "ImplicitModel":
        """The cascade u -> f -> self; its states are those of self, then those of f.

        Raises:
            TypeError: f is no ImplicitModel.
            ValueError: f has another number of outputs than self has inputs, or another dtype or
                device.
        """
        if not isinstance(f, ImplicitModel):
            return NotImplemented
        g = self
        _together("g @ f", g, f)
        if g.inputs != f.outputs:
            raise ValueError(
                f"g @ f: f has {f.outputs} outputs, g takes {g.inputs} inputs; they must be equal."
            )
        zero = f.A.new_zeros(f.states, g.states)
        return ImplicitModel(
            A=torch.cat([torch.cat([g.A, g.B @ f.C], 1), torch.cat([zero, f.A], 1)]),
            B=torch.cat([g.B @ f.D, f.B]),
            C=torch.cat([g.C, g.D @ f.C], 1),
            D=g.D @ f.D,
            b=torch.cat([g.b + g.B @ f.d, f.b]),
            d=g.d + g.D @ f.d,
            phi=Blocks(parts=g.phi.parts + f.phi.parts),
        )

    def __add__(self, g: "ImplicitModel") -> "ImplicitModel":
        """y_f + y_g for the same input.

        Raises:
            TypeError: g is no ImplicitModel.
            ValueError: inputs, outputs, dtypes or devices differ.
        """
        if not isinstance(g, ImplicitModel):
            return NotImplemented
        f = self
        _together("f + g", f, g)
        if (f.inputs, f.outputs) != (g.inputs, g.outputs):
            raise ValueError(
                f"f + g: f maps {f.inputs} -> {f.outputs}, g maps {g.inputs} -> {g.outputs}; "
                "inputs and outputs must agree."
            )
        return ImplicitModel(
            A=torch.block_diag(f.A, g.A),
            B=torch.cat([f.B, g.B]),
            C=torch.cat([f.C, g.C], 1),
            D=f.D + g.D,
            b=torch.cat([f.b, g.b]),
            d=f.d + g.d,
            phi=Blocks(parts=f.phi.parts + g.phi.parts),
        )

    @_in_full_precision
    def feedback(self, K: Tensor) -> "ImplicitModel":
        """The loop u = v + K y closed: the model from v to y.

        With M = (I - D K)^-1 the outputs are y = M (C x + D v + d), so A' = A + B K M C and so on.
        Whether the new A is well-posed is for `certificate()` to say.

        Args:
            K: output to input.  # (p, q)

        Raises:
            TypeError: K is no tensor.
            ValueError: K has another shape, dtype or device, or I - D K is singular.
        """
        if not isinstance(K, Tensor):
            raise TypeError(f"feedback: K is {type(K).__name__}, expected a matrix.")
        if tuple(K.shape) != (self.inputs, self.outputs):
            raise ValueError(
                f"feedback: K has shape {tuple(K.shape)}, expected {(self.inputs, self.outputs)}."
            )
        if (K.dtype, K.device) != (self.A.dtype, self.A.device):
            raise ValueError(
                f"feedback: K is {K.dtype} on {K.device}, expected {self.A.dtype} on "
                f"{self.A.device} as A; convert with .to()."
            )
        work = torch.promote_types(K.dtype, torch.float32)  # no inverse in half precision
        eye = torch.eye(self.outputs, dtype=work, device=K.device)
        M, info = torch.linalg.inv_ex(eye - self.D.to(work) @ K.to(work))
        M = M.to(K.dtype)
        if bool(info) or not bool(torch.isfinite(M).all()):
            raise ValueError(
                "feedback: I - D K is singular, the outputs are not determined. Change K or D."
            )
        BKM = self.B @ K @ M
        return replace(
            self,
            A=self.A + BKM @ self.C,
            B=self.B + BKM @ self.D,
            C=M @ self.C,
            D=M @ self.D,
            b=self.b + BKM @ self.d,
            d=M @ self.d,
        )

    def rescale(self, kappa: float | None = None) -> "ImplicitModel":
        """The same input-output map with ||A||_inf <= kappa < 1, x' = S x.

        Args:
            kappa: bound to reach; None for halfway between the Perron root of |A| and 1.

        Raises:
            NotWellPosedError: the Perron root of |A| is not below kappa.
            ValueError: phi is not positively homogeneous, so that S does not pass through it.
        """
        if not self.phi.homogeneous:
            raise ValueError(
                f"rescale: {self.activation} is not positively homogeneous, phi(S z) is not "
                "S phi(z). Only ReLU, leaky ReLU and the identity can be rescaled."
            )
        A, s = wellposed.rescale(self.A, kappa)
        return replace(self, A=A, B=s[:, None] * self.B, C=self.C / s, b=s * self.b)

    def permute(self, order: Sequence[int] | Tensor) -> "ImplicitModel":
        """The same map with its states in another order: state i of the result is order[i] here.

        Raises:
            ValueError: not a permutation, or one that takes a softmax block apart.
        """
        given = order.tolist() if isinstance(order, Tensor) else order
        given = list(given) if isinstance(given, Iterable) else [given]
        try:
            new = [-1 if isinstance(i, bool) else operator.index(i) for i in given]
        except TypeError:
            new = [-1]
        if sorted(new) != list(range(self.states)):
            shown = ", ".join(map(repr, given[:8])) + (", ..." if len(given) > 8 else "")
            raise ValueError(
                f"permute: got [{shown}], expected a permutation of 0..{self.states - 1}."
            )
        at = torch.tensor(new, device=self.A.device)
        return replace(
            self,
            A=self.A[at][:, at],
            B=self.B[at],
            C=self.C[:, at],
            b=self.b[at],
            phi=_permuted(self.phi, new),
        )

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write the model as safetensors, its activation in the JSON header.

        Raises:
            FileNotFoundError: the folder is not there.
            IsADirectoryError: the path is that of a folder.
            ValueError: the activation cannot be written so that `load` finds it again.
        """
        files.save(self, path)

    @staticmethod
    def load(
        path: "str | os.PathLike[str]", device: "str | torch.device" = "cpu"
    ) -> "ImplicitModel":
        """Read what `save` wrote; everything is checked before a model is made.

        Raises:
            FileNotFoundError: there is no such file.
            IsADirectoryError: the path is that of a folder.
            ValueError: not such a file, another version, or tensors that do not fit; the message
                names the file. Or a device that is not to be had.
        """
        device = files.checked_device(device)
        try:
            return ImplicitModel(**files.load(path, device))
        except (ValueError, TypeError) as error:
            start = "" if os.fspath(path) in str(error) else f"{os.fspath(path)}: "
            raise ValueError(f"{start}{error}") from error

    @staticmethod
    def from_torchidl(
        state_dict: dict[str, Tensor],
        *,
        kappa: float | None = 0.99,
        bias: bool = False,
        phi: "Activation | str" = "relu",
    ) -> "ImplicitModel":
        """The model that torchidl's `ImplicitModel` computes with this state.

        There a matrix M with ||M||_inf > kappa is scaled as a whole to kappa on every call: A, or
        with `is_low_rank` first L and R^T and then their product. Here what it computes with is
        stored.

        Args:
            state_dict: with A (or L and R), B, C and, unless it was made with `no_D`, D.
            kappa: the bound that the torchidl model was made with; None for its upper triangular
                variant, which keeps what is strictly above the diagonal and scales nothing.
            bias: whether it was made with `bias=True`: the last column of B and D is then b and d.
            phi: its activation.

        Raises:
            ValueError: a matrix is missing.
        """
        A, B, C, D, b, d = files.from_torchidl(state_dict, kappa, bias)
        return ImplicitModel(A, B, C, D, b, d, phi)


def stack(f: ImplicitModel, g: ImplicitModel) -> ImplicitModel:
    """(y_f, y_g) for the same input.

    Raises:
        TypeError: one of them is no ImplicitModel.
        ValueError: their inputs, dtypes or devices differ.
    """
    for model in (f, g):
        if not isinstance(model, ImplicitModel):
            raise TypeError(f"stack: got {type(model).__name__}, expected two ImplicitModels.")
    _together("stack", f, g)
    if f.inputs != g.inputs:
        raise ValueError(f"stack: f takes {f.inputs} inputs, g {g.inputs}; they must be equal.")
    return ImplicitModel(
        A=torch.block_diag(f.A, g.A),
        B=torch.cat([f.B, g.B]),
        C=torch.block_diag(f.C, g.C),
        D=torch.cat([f.D, g.D]),
        b=torch.cat([f.b, g.b]),
        d=torch.cat([f.d, g.d]),
        phi=Blocks(parts=f.phi.parts + g.phi.parts),
    )


def _together(what: str, f: ImplicitModel, g: ImplicitModel) -> None:
    """Refuse to promote or to move one of two models without a word."""
    if (f.A.dtype, f.A.device) != (g.A.dtype, g.A.device):
        raise ValueError(
            f"{what}: got {f.A.dtype} on {f.A.device} and {g.A.dtype} on {g.A.device}, expected one "
            "dtype and device; convert the tensors of one model with .to()."
        )


def _permuted(phi: Blocks, order: list[int]) -> Blocks:
    """The activations of the permuted states, runs of the same one merged."""
    owner = [block for block, (_, size) in enumerate(phi.parts) for _ in range(size)]
    runs: list[list[int]] = []  # [block, length]
    for state in order:
        if runs and runs[-1][0] == owner[state]:
            runs[-1][1] += 1
        else:
            runs.append([owner[state], 1])
    for block, length in runs:
        member, size = phi.parts[block]
        if not member.entrywise and length != size:
            raise ValueError(f"permute: the {size} states of a {member} block must stay together.")
    return Blocks(parts=tuple((phi.parts[block][0], length) for block, length in runs))
