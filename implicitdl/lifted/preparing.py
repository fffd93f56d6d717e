"""What all trainers do before they start: the module behind a model, validation, choices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ImplicitLayer
from ..model import ImplicitModel
from ..solution import unknown_name
from ..wellposed import InfNormBall, PerronFrobenius
from .checks import check_inputs, check_targets
from .penalties import Loss
from .running import scores


def checked_keep(keep: str | None, validation: Any) -> str:
    """The choice, or the default."""
    if keep not in (None, "best", "last"):
        raise unknown_name("keep", keep, ("best", "last"))
    return keep or ("last" if validation is None else "best")


def module_of(model: Any, kept: bool = False) -> nn.Module:
    """The module that is trained: a layer of its own for an ImplicitModel, whose A, where it is to
    be `kept` well-posed, is so in the smallest of two sets that it is in."""
    if not isinstance(model, ImplicitModel):
        return model
    if model.structure is not None:
        raise ValueError(
            "model: got a structured ImplicitModel, expected one of matrices: train the network "
            "that it was made from, or pass `model.dense()`."
        )
    like: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    own: Any = None
    if kept:
        A = model.A.detach()
        sets = (InfNormBall(), PerronFrobenius())
        own = next((s for s in sets if s.contains(A, 0.0)), None)
        if own is None:
            raise ValueError(
                f"model: A is neither in {sets[0]} nor in {sets[1]} (margin "
                f"{float(sets[1].margin(A)):.3g}), expected one that stays well-posed in training."
            )
    layer = ImplicitLayer(
        model.inputs, model.outputs, model.states, activation=model.activation, well_posed=own,
        **like,
    )  # fmt: skip
    with torch.no_grad():
        layer.W.copy_(model.A)
        for name in ("B", "C", "D", "b", "d"):
            getattr(layer, name).copy_(getattr(model, name))
    return layer


def as_model(layer: Any) -> ImplicitModel:
    """The layer's matrices as they are now."""
    found = layer.model()
    parts = {name: getattr(found, name).detach().clone() for name in "ABCDbd"}
    return ImplicitModel(**parts, phi=found.phi)


def held_out(
    model: nn.Module, validation: Any, u: Tensor, y: Tensor, loss: Loss,
    add_up: Callable[[Tensor], Tensor] = lambda t: t,
) -> Callable[[], float] | None:  # fmt: skip
    """The score of the model on the validation samples, of all processes where `add_up` adds up."""
    if validation is None:
        return None
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise TypeError("validation: expected a pair (inputs, targets).")
    held = check_inputs(validation[0], u, "validation data")
    if held.shape[1:] != u.shape[1:]:
        raise ValueError(
            f"validation data: got samples of shape {tuple(held.shape[1:])}, expected "
            f"{tuple(u.shape[1:])} as data."
        )
    wanted = check_targets(validation[1], len(held), y.shape[1], loss, u, "validation targets")
    labels = not validation[1].is_floating_point()

    def score() -> float:
        value, share = scores(model, held, wanted, loss, labels, add_up)
        return share if labels else -value

    return score
