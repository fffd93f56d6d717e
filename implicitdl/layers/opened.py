"""Which entries of a network's A are there, and which may be opened for training."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model import ImplicitModel
from ..model.wiring import arranged, layered
from ..operators import Grid, read, rebuilt
from ..solution import unknown_name
from ..wellposed import WellPosedSet, get_well_posed

if TYPE_CHECKING:
    from ..model import Structure

_CHOICES = ("all", "upper", "blocks", "none")


def opened(
    model: ImplicitModel, trainable: "str | Tensor", well_posed: "str | WellPosedSet | None"
) -> tuple[ImplicitModel, Tensor | None, WellPosedSet]:
    """The model as matrices in reverse order of evaluation and inside the set, the mask of the
    trainable entries (None for all), and the set."""
    if not model.phi.symmetric:
        raise ValueError(
            "model: it has max-pooling, whose states have no equation of the form of a layer; open "
            "what follows it, as a model of its own."
        )
    structure = model.structure if model.structure is not None else layered(model)
    order = [k for component in structure.components for k in component][::-1]
    structure = arranged(structure, order)
    dense = ImplicitModel(structure=structure).dense()
    mask = _mask(structure, trainable, dense.A)
    acyclic = mask is not None and not bool((mask | (dense.A != 0)).tril().any())
    if well_posed is None:
        well_posed = "strictly-upper" if acyclic else "perron-frobenius"
    kept = get_well_posed(well_posed)
    A = dense.A.detach()
    if not kept.contains(A):
        if dense.phi.homogeneous and dense.phi.entrywise and hasattr(kept, "kappa"):
            dense = dense.rescale(float(kept.kappa))  # type: ignore[arg-type]
        else:
            raise ValueError(
                f"well_posed: A of the model is not in {kept} (margin {float(kept.margin(A)):.3g}), "
                f"and {dense.activation} does not allow to scale it into it; take "
                "'perron-frobenius', which every network without loops is in."
            )
    if mask is not None and bool(mask.any()) and not acyclic:
        frozen = bool((dense.A.detach()[~mask] != 0).any())
        if frozen or not kept.keeps_rank:  # such a set scales rows, or moves every entry
            raise ValueError(
                f"well_posed: {kept} changes entries of A that the mask keeps, once A leaves it; "
                "take 'inf-norm' or 'perron-frobenius' and let the mask have all entries that are "
                "not zero."
            )
    return dense, mask, kept


def _mask(structure: "Structure", trainable: "str | Tensor", A: Tensor) -> Tensor | None:
    if isinstance(trainable, Tensor):
        if trainable.dtype != torch.bool or trainable.shape != A.shape:
            raise ValueError(
                f"trainable: got {trainable.dtype} {tuple(trainable.shape)}, expected a mask "
                f"torch.bool {tuple(A.shape)}."
            )
        return trainable.to(A.device).clone()
    if trainable not in _CHOICES:
        raise unknown_name("trainable", trainable, _CHOICES)
    if trainable == "all":
        return None
    if trainable == "none":
        return torch.zeros_like(A, dtype=torch.bool)
    there = _there(structure.A).to(A.device)
    if trainable == "blocks":
        return there
    number = torch.cat(
        [torch.full((block.size,), k) for k, block in enumerate(structure.blocks)]
    ).to(A.device)
    return there | (number[:, None] < number[None, :])


def _there(A: Grid) -> Tensor:
    """Where an entry of A may be other than zero, whatever its weights are."""
    ones = rebuilt(A, lambda weight: torch.ones_like(read(weight), dtype=torch.float64))
    return ones.abs().dense(dtype=torch.float64) != 0
