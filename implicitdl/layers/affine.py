"""Layers of the form x = phi(A x + B u + b), y = C x + D u + d."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import wellposed
from ..activations import Activation
from ..implicit import Adjoint
from ..model import ImplicitModel
from ..solvers import FixedPointSolver
from ..wellposed import WellPosedSet, get_well_posed
from .base import AffineLayer
from .opened import opened


class ImplicitLayer(AffineLayer):
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

    mask: Tensor | None
    fixed: Tensor | None

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
        self.register_buffer("mask", None)  # which entries of W are parameters; None for all
        self.register_buffer("fixed", None)  # the others
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        if low_rank is None:
            self.W = nn.Parameter(torch.empty(n, n, **kind))
        else:
            self.L = nn.Parameter(torch.empty(n, low_rank, **kind))
            self.R = nn.Parameter(torch.empty(n, low_rank, **kind))
        self._prepare(**facts)
        self.reset_parameters()

    @classmethod
    def from_model(
        cls,
        model: ImplicitModel,
        *,
        trainable: "str | Tensor" = "all",
        well_posed: "str | WellPosedSet | None" = None,
        solver: "str | FixedPointSolver" = "auto",
        adjoint: "str | Adjoint" = "implicit",
    ) -> "ImplicitLayer":
        """A layer that starts as the model, with parameters of its own, and more of A to train.

        A converted network has a strictly block-triangular A: its layers in a row. What is zero in
        it are the skip connections (above the diagonal) and the feedback (on and below it) that the
        network does not have. Here they become parameters that start at zero.

        The states stand in reverse order of evaluation, so that A starts strictly upper triangular
        where the model has no loop. An A outside the set is rescaled into it, x' = S x, which leaves
        the map as it is, where the activation allows.

        Args:
            model: converted from a network, or given by matrices; its A must fit in memory.
            trainable: the entries of A that are parameters: `"all"`; `"upper"`, those between a
                block and all blocks evaluated before it; `"blocks"`, those of the blocks that are
                there; `"none"`; or a mask.  # (n, n) bool. B, C, D, b and d are always trained.
            well_posed: the set that A is kept in; None for `"strictly-upper"` where the trainable
                entries leave A without a loop, else `"perron-frobenius"`.
            solver, adjoint: as in the constructor.

        Raises:
            ValueError: an unknown choice; a mask of another shape; a set that does not fit the
                activation, that the model's A is not in and cannot be scaled into, or that does not
                keep zeros where a mask asks for them; or an A too large for a matrix.
            TypeError: model is no ImplicitModel.

        Example:
            >>> import torch, implicitdl
            >>> net = torch.nn.Sequential(
            ...     torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
            >>> u = torch.randn(5, 3)
            >>> layer = implicitdl.ImplicitLayer.from_model(implicitdl.to_implicit(net, u))
            >>> bool(torch.allclose(layer(u), net(u), atol=1e-6))
            True
        """
        if not isinstance(model, ImplicitModel):
            raise TypeError(f"model: got {type(model).__name__}, expected an ImplicitModel.")
        dense, mask, kept = opened(model, trainable, well_posed)
        layer = cls(
            dense.inputs, dense.outputs, dense.states, activation=dense.activation,
            well_posed=kept, solver=solver, adjoint=adjoint, dtype=dense.dtype,
            device=dense.device,
        )  # fmt: skip
        with torch.no_grad():
            layer.W.copy_(dense.A)
            for name in ("B", "C", "D", "b", "d"):
                getattr(layer, name).copy_(getattr(dense, name))
        if mask is not None:
            layer.register_buffer("mask", mask)
            layer.register_buffer("fixed", dense.A.detach().masked_fill(mask, 0.0))
        return layer

    def _weight(self) -> Tensor:
        """well_posed(W), with its gradient; W where the mask allows, else what it was."""
        work = torch.promote_types(self.B.dtype, torch.float32)
        W = self.W.to(work) if self.low_rank is None else self.L.to(work) @ self.R.to(work).mT
        if self.mask is not None and self.fixed is not None:
            W = torch.where(self.mask, W, self.fixed.to(work))
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


class MonotoneLayer(AffineLayer):
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
