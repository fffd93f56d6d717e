"""The algebra of implicit models: x = phi(A x + B u + b),  y = C x + D u + d.

Reference: El Ghaoui, Gu, Travacca, Askari, Tsai (2021), section 3 and appendix on composition.
"""

import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import wellposed
from ..activations import Activation
from ..implicit import Adjoint as AdjointType
from ..implicit import Equation
from ..maps import inside_transform
from ..operators import DENSE_LIMIT
from ..solution import Solution
from ..solvers import FixedPointSolver
from . import blockwise, explicit, files, matrices, report, sweep, wiring
from .simplify import simplified
from .states import accept, cast, check_input, in_full_precision, solve_state, state_alone
from .structure import Structure

__all__ = ["ImplicitModel", "Structure", "accept", "cast", "check_input", "solve_state", "stack"]


@dataclass(frozen=True, eq=False)
class ImplicitModel:
    """x = phi(A x + B u + b), y = C x + D u + d: one equation and one affine map.

    Immutable. Operators assemble new models from the blocks of old ones, so gradients flow back to
    the tensors that a model was made of:

        g @ f           cascade, u -> f -> g
        f + g           the outputs of both, added
        stack(f, g)     the outputs of both, one after the other
        f.feedback(K)   the loop u = v + K y closed

    A model is given by matrices, or by blocks that are operators, as `to_implicit` makes it of a
    network. Then A, B, C and D are views, grids of operators that `dense()` alone turns into
    matrices; operators wire blocks to each other; and the state is found block by block, a loop
    among blocks as a small fixed point of its own. Such a model takes inputs in the network's shape,
    too, and answers in its shape.

    Args:
        A: state to state.  # (n, n)
        B: input to state.  # (n, p)
        C: state to output.  # (q, n)
        D: input to output; zeros by default.  # (q, p)
        b, d: biases; zeros by default.  # (n,), (q,)
        phi: an activation, `Blocks` of them, or a name.
        structure: the blocks, in place of all of the above.

    Raises:
        TypeError: one of A, B, C, D, b, d is no tensor, or is given beside a structure.
        ValueError: shapes, dtypes or devices do not fit together, or phi is unknown.

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitModel
        >>> f = ImplicitModel(torch.tensor([[0.5]]), torch.eye(1), torch.eye(1))
        >>> f(torch.tensor([[1.0], [-1.0]])).round(decimals=4)
        tensor([[2.],
                [0.]])
    """

    A: Any = None  # Tensor; `Grid` where there is a structure
    B: Any = None
    C: Any = None
    D: Any = None
    b: Any = None  # Tensor; `BlockVector` where there is a structure
    d: Any = None
    phi: Any = "relu"  # Activation | str; `Blocks` once the model is made
    structure: Structure | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.structure is not None:
            given = [n for n in "ABCDbd" if getattr(self, n) is not None]
            if given or self.phi != "relu":
                names = ", ".join(given or ["phi"])
                raise TypeError(
                    f"ImplicitModel: got {names} beside a structure, which has its own."
                )
            for name in (*"ABCDbd", "phi"):
                object.__setattr__(self, name, getattr(self.structure, name))
            return
        for name, value in matrices.checked(self).items():
            object.__setattr__(self, name, value)

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
    def dtype(self) -> torch.dtype:
        """Of its tensors; torch's default where it has none."""
        return torch.get_default_dtype() if self._like is None else self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where its tensors are; the CPU where it has none."""
        return torch.device("cpu") if self._like is None else self._like.device

    @property
    def _like(self) -> Tensor | None:
        return self.A if self.structure is None else self.structure.example

    @property
    def activation(self) -> Activation:
        """phi, unwrapped where it is one activation for all states."""
        parts = self.phi.parts
        return parts[0][0] if len(parts) == 1 else self.phi

    def __repr__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        if self.structure is not None:
            return (
                f"ImplicitModel(states={self.states}, inputs={self.inputs}, "
                f"outputs={self.outputs}, blocks={len(self.structure.blocks)}, {kind})"
            )
        return (
            f"ImplicitModel(states={self.states}, inputs={self.inputs}, outputs={self.outputs}, "
            f"phi={self.activation}, {kind})"
        )

    def __str__(self) -> str:
        """Of a structured model, its blocks, what each reads, and its certificate."""
        return repr(self) if self.structure is None else report.text(self.structure)

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
            least float32 (in the weights' dtype where the model is structured). Where ||A||_inf times the Lipschitz constant of phi is below 1, or A is
            strictly triangular, `error_bound` bounds its distance to the exact equilibrium, in the
            norm of `certificate(refute=False)`.

        Raises:
            ConvergenceError: a sample did not converge and `on_failure="raise"`.
            TypeError: u or x0 is no tensor.
            ValueError: u or x0 has another width, dtype or device than the model, or an option is
                unknown.
        """
        if self.structure is not None:
            return sweep.solve(self.structure, u, x0, solver, adjoint, on_failure, record)
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
        if self.structure is not None:
            return sweep.call(self.structure, u, **options)
        u = accept(u, self.inputs, self.A)
        if (
            inside_transform() and not options and self.phi.symmetric
        ):  # which hides the values that a Solution holds
            x = state_alone(*self._equation_at(u), Equation(self.activation))
        else:
            x = self._solve(u, False, **options).value
        return functional.linear(x.to(self.C.dtype), self.C, self.d) + functional.linear(u, self.D)

    def certificate(self, **options: Any) -> "wellposed.Certificate":
        """What can be proved of x = phi(A x + b): see `implicitdl.wellposed.certificate`.

        Of a structured model it is proved loop by loop, and takes the options `refute` and `seed`.
        """
        if self.structure is not None:
            return blockwise.certificate(self.structure, **options)
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

    @in_full_precision
    def __matmul__(self, f: "ImplicitModel") -> "ImplicitModel":
        """The cascade u -> f -> self; its states are those of self, then those of f.

        Raises:
            TypeError: f is no ImplicitModel.
            ValueError: f has another number of outputs than self has inputs, or another dtype or
                device.
        """
        if not isinstance(f, ImplicitModel):
            return NotImplemented
        _together("g @ f", self, f)
        if self.inputs != f.outputs:
            raise ValueError(
                f"g @ f: f has {f.outputs} outputs, g takes {self.inputs} inputs; they must be "
                "equal."
            )
        return _joined("cascade", self, f)

    def __add__(self, g: "ImplicitModel") -> "ImplicitModel":
        """y_f + y_g for the same input.

        Raises:
            TypeError: g is no ImplicitModel.
            ValueError: inputs, outputs, dtypes or devices differ.
        """
        if not isinstance(g, ImplicitModel):
            return NotImplemented
        _together("f + g", self, g)
        if (self.inputs, self.outputs) != (g.inputs, g.outputs):
            raise ValueError(
                f"f + g: f maps {self.inputs} -> {self.outputs}, g maps {g.inputs} -> "
                f"{g.outputs}; inputs and outputs must agree."
            )
        return _joined("added", self, g)

    @in_full_precision
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
        if (K.dtype, K.device) != (self.dtype, self.device):
            raise ValueError(
                f"feedback: K is {K.dtype} on {K.device}, expected {self.dtype} on "
                f"{self.device} as A; convert with .to()."
            )
        if self.structure is None:
            return matrices.feedback(self, K)
        return ImplicitModel(structure=wiring.feedback(self.structure, K))

    def rescale(self, kappa: float | None = None) -> "ImplicitModel":
        """The same input-output map with ||A||_inf <= kappa < 1, x' = S x.

        Args:
            kappa: bound to reach; None for halfway between the Perron root of |A| and 1.

        Raises:
            NotWellPosedError: the Perron root of |A| is not below kappa.
            ValueError: phi is not positively homogeneous entry by entry, so that S does not pass
                through it; or a structured model has a loop.
        """
        if not (self.phi.homogeneous and self.phi.entrywise):
            raise ValueError(
                f"rescale: {_shortened(self.activation)} is not positively homogeneous entry by "
                "entry, phi(S z) is not S phi(z). Only ReLU, leaky ReLU and the identity can be "
                "rescaled."
            )
        if self.structure is None:
            return matrices.rescaled(self, kappa)
        return ImplicitModel(structure=wiring.rescaled(self.structure, kappa))

    def permute(self, order: Sequence[int] | Tensor) -> "ImplicitModel":
        """The same map with its states in another order: state i of the result is order[i] here.

        Raises:
            ValueError: not a permutation, or one that takes a softmax block apart, or any block of
                a structured model.
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
        if self.structure is None:
            return matrices.permuted(self, new)
        return ImplicitModel(structure=wiring.permuted(self.structure, new))

    # ---- structure -------------------------------------------------------------------------------

    def structured(self) -> "ImplicitModel":
        """The same as blocks: itself, or a model of one block with the matrices as operators."""
        if self.structure is not None:
            return self
        return ImplicitModel(structure=wiring.structured(self))

    def dense(self, limit: int = DENSE_LIMIT) -> "ImplicitModel":
        """The same with A, B, C and D as matrices.

        Args:
            limit: how many entries each of them may have.

        Raises:
            ValueError: one would have more; the message says how many.
        """
        if self.structure is None:
            return self
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        A, B, C, D = (getattr(self, name).dense(limit, **kind) for name in "ABCD")
        b, d = self.b.dense(limit, like=like), self.d.dense(limit, like=like)
        return ImplicitModel(A, B, C, D, b, d, self.phi)

    def simplify(self, grow: float = 1.0) -> "ImplicitModel":
        """The same map without states that no output sees, and without linear ones.

        Args:
            grow: a linear block is written into the rows that read it where a sample then costs at
                most so many times the multiplications; `math.inf` leaves no linear block but loops.

        Raises:
            ValueError: grow is below 1.
        """
        if not grow >= 1:
            raise ValueError(f"grow: got {grow}, expected a factor of at least 1.")
        return ImplicitModel(structure=simplified(wiring.structured(self), grow))

    def to_sequential(self) -> torch.nn.Module:
        """An explicit module that computes the same, with parameters of its own.

        Layer by layer as `torch.nn.Sequential` of torch's own modules where each block reads only
        the one before it; else a module that evaluates block after block.

        Raises:
            ValueError: there is a loop: A is not strictly triangular in any order of the blocks.
        """
        return explicit.sequential(self)

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
    return _joined("stacked", f, g)


def _joined(how: str, f: ImplicitModel, g: ImplicitModel) -> ImplicitModel:
    """Two models joined: matrices where both are such, else blocks."""
    if f.structure is None and g.structure is None:
        return getattr(matrices, how)(f, g)
    joined = getattr(wiring, how)(wiring.structured(f), wiring.structured(g))
    return ImplicitModel(structure=joined)


def _together(what: str, f: ImplicitModel, g: ImplicitModel) -> None:
    """Refuse to promote or to move one of two models without a word."""
    if (f.dtype, f.device) != (g.dtype, g.device):
        raise ValueError(
            f"{what}: got {f.dtype} on {f.device} and {g.dtype} on {g.device}, expected one "
            "dtype and device; convert the tensors of one model with .to()."
        )


def _shortened(phi: Activation) -> str:
    text = str(phi)
    return text if len(text) < 200 else f"{text[:160]} ..."
