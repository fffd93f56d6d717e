"""Everything that can be refused before any work is done."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .._samples import require_finite_samples, require_labels
from .._sharing import require_initialised
from ..convert import to_implicit
from ..model import ImplicitModel, Structure
from ..solution import ImplicitDLError, unknown_name
from ..wellposed import InfNormBall, PerronFrobenius
from .penalties import L1, LowRank, Penalty

_STATES = 20_000  # whose Gram matrix takes 3 GB


@dataclass(frozen=True, kw_only=True)
class Options:
    """The choices of `fit_states`, checked."""

    kappa: float
    penalty: Any  # Penalty | LowRank
    readout: Penalty
    upper: bool


def checked_options(
    kappa: Any, penalty: Any, readout: Any, connections: Any, shard: Any
) -> Options:
    """The choices, or the reason why not.

    Raises:
        ValueError, TypeError: see `fit_states`.
    """
    if isinstance(kappa, bool) or not isinstance(kappa, int | float) or not 0 < kappa < 1:
        raise ValueError(f"kappa: got {kappa!r}, expected a number in (0, 1).")
    if connections not in ("all", "upper"):
        raise unknown_name("connections", connections, ("all", "upper"))
    if shard not in (None, "samples", "rows"):
        raise unknown_name("shard", shard, ("samples", "rows"))
    if isinstance(penalty, int | float) and not isinstance(penalty, bool):
        penalty = L1(weight=penalty)
    if isinstance(readout, int | float) and not isinstance(readout, bool):
        readout = L1(weight=readout)
    if not isinstance(penalty, Penalty | LowRank):
        raise TypeError(
            f"penalty: got {penalty!r}, expected L1, Group, Perspective, LowRank or a number."
        )
    if readout is None:
        weight = getattr(penalty, "weight", 0.0)
        coupled = isinstance(penalty, LowRank) or penalty.couples_rows
        # An error of an output is the last: nothing that follows makes up for it.
        readout = L1(weight=0.0) if coupled else replace(penalty, weight=weight / 4)  # type: ignore[type-var]
    if not isinstance(readout, Penalty) or readout.couples_rows:
        raise TypeError(f"readout: got {readout!r}, expected L1, Perspective or a number.")
    low_rank = isinstance(penalty, LowRank)
    if low_rank and connections == "upper":
        raise ValueError(
            "connections: got 'upper' with LowRank, expected 'all': the triangle above the diagonal "
            "of L R^T has not the rank of L R^T."
        )
    if shard == "rows" and not low_rank and penalty.couples_rows:
        raise ValueError(
            f"shard: got 'rows' with {penalty}, which ties the rows to each other; take 'samples'."
        )
    if shard is not None:
        require_initialised(shard)
    return Options(
        kappa=float(kappa), penalty=penalty, readout=readout, upper=connections == "upper"
    )


def check_data(data: Any, least: int) -> None:
    """Inputs that states can be recorded at.

    Raises:
        TypeError: no tensor.
        ValueError: not floating, too few samples, or NaN or infinite numbers.
    """
    if not isinstance(data, Tensor):
        raise TypeError(f"data: got {type(data).__name__}, expected a tensor (samples, *input).")
    if data.dim() < 2 or len(data) < least or not data.is_floating_point():
        raise ValueError(
            f"data: got {data.dtype} of shape {tuple(data.shape)}, expected floating numbers "
            f"(samples, *input) with at least {least} samples."
        )
    require_finite_samples("data", data)


def converted(network: nn.Module, data: Tensor) -> tuple[ImplicitModel, Tensor]:
    """The network as a model, and the data in its dtype.

    Raises:
        ValueError: it does not take such data.
        ConversionError: it is not of the form of an implicit model.
    """
    floats = [t.dtype for t in network.parameters() if t.is_floating_point()]
    if floats and floats[0] != data.dtype:
        data = data.to(floats[0])
        require_finite_samples(f"data (in {floats[0]}, as the network)", data)
    try:
        return to_implicit(network, data[:1]), data
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ImplicitDLError):
            raise
        raise ValueError(
            f"data: the network does not take samples of shape {tuple(data.shape[1:])} in "
            f"{data.dtype} on {data.device}: {error}"
        ) from error


def check_samples(f: Structure, data: Tensor) -> Tensor:
    """The data in the model's dtype.

    Raises:
        ValueError: samples of another size.
    """
    if data[0].numel() != f.inputs:
        raise ValueError(
            f"data: got samples of shape {tuple(data.shape[1:])}, expected {f.inputs} numbers each, "
            f"of shape {tuple(f.input_shape)}, as the model reads."
        )
    if f.example is not None and f.example.dtype != data.dtype:
        data = data.to(f.example.dtype)
        require_finite_samples(f"data (in {f.example.dtype}, as the model)", data)
    return data


def check_targets(targets: Any, samples: int, outputs: int) -> None:
    """Labels (m,) in 0..q-1, or numbers (m, q).

    Raises:
        TypeError: no tensor.
        ValueError: another shape, or labels out of range.
    """
    if targets is None:
        return
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: got {type(targets).__name__}, expected a tensor of labels.")
    labels = not targets.is_floating_point()
    shape = (samples,) if labels else (samples, outputs)
    if tuple(targets.shape) != shape or targets.is_complex():
        raise ValueError(
            f"targets: got {targets.dtype} of shape {tuple(targets.shape)}, expected labels of shape "
            f"({samples},) or numbers of shape ({samples}, {outputs})."
        )
    if not labels:
        require_finite_samples("targets", targets)
        return
    require_labels("targets", targets, outputs, "the network")


def check_model(f: Structure, kappa: float) -> None:
    """A model whose states a layer with ||A||_inf <= kappa can have.

    Raises:
        ValueError: its activations are not of that kind, or it has too many states.
    """
    if not f.blocks:
        raise ValueError("network: it has no states; an affine map needs no implicit layer.")
    for block in f.blocks:
        if not block.phi.symmetric or block.row.shape != block.shape:
            raise ValueError(
                f"network: {block.name} is {block.phi}, whose Jacobian is not symmetric, expected "
                "activations that are gradients of functions; take average pooling for max-pooling, "
                "or fit what follows it as a network of its own."
            )
    wide = f.states + f.inputs
    if wide > _STATES:
        raise ValueError(
            f"network: {f.states} states and {f.inputs} inputs, whose Gram matrix would have "
            f"{wide**2:.2g} entries, expected at most {_STATES} together; fit a part of the network."
        )
    kept = PerronFrobenius if f.phi.entrywise else InfNormBall
    kept(kappa).check(f.phi)  # kappa times the Lipschitz constant is below 1
