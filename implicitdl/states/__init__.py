"""Training an implicit model from the states of a trained network: convex, row by row, no gradients.

A network is run once; x are its states, z its pre-activations, u its inputs and y its outputs. Then

    min over A, B, b   1/2 ||Z - X A' - U B' - 1 b'||^2 + R(A, B)   over   ||A||_inf <= kappa

is one small convex program a row. With a diagonal scaling of the states first the network's own
weights are in the ball, so that exact matching is among the candidates. The states of the new model
are found anew before C, D and d are fitted to y.

Reference: Tsai, Decugis, El Ghaoui, Atamturk 2024 (state-driven implicit models); El Ghaoui, Gu,
Travacca, Askari and Tsai 2021, section 5 (compression as matching of states).
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ImplicitLayer
from ..model import ImplicitModel, Structure
from ..model.wiring import structured
from . import assembly, fitting
from .checks import (
    check_data,
    check_model,
    check_samples,
    check_targets,
    checked_options,
    converted,
)
from .penalties import L1, Group, LowRank, Penalty, Perspective
from .recording import Sharing, exact
from .report import FitReport, scores
from .rows import RowProgram, RowSolution

__all__ = [
    "L1",
    "FitReport",
    "Group",
    "LowRank",
    "Penalty",
    "Perspective",
    "RowProgram",
    "RowSolution",
    "fit_states",
]


def fit_states(
    network: "nn.Module | ImplicitModel",
    data: Tensor,  # (m, *input)
    targets: Tensor | None = None,  # (m,) labels, or (m, q)
    *,
    kappa: float = 0.5,
    penalty: "Penalty | LowRank | float" = 1e-3,
    readout: "Penalty | float | None" = None,
    connections: str = "all",
    refit: bool = True,
    shard: str | None = None,
    group: Any = None,
) -> tuple[ImplicitLayer, FitReport]:
    """An implicit layer with ||A||_inf <= kappa that has the states and outputs of a network.

    Biases are matched like everything else; no hooks are needed. Where the activations are not
    positively homogeneous the scaling cannot be absorbed, and the ball is that of a weighted norm
    (`PerronFrobenius(kappa, weights=v)`), with the same guarantee. States that the output does not
    see are left out.

    With `torch.distributed` initialised the work may be shared. `shard="samples"`: each process
    passes its own samples, and only Gram matrices are added up. `shard="rows"`: each passes all
    samples and solves its share of the rows, which are then put together. All return the same.

    Args:
        network: anything that `to_implicit` converts, in eval mode; or an ImplicitModel.
        data: inputs to record the states at, in any floating dtype; a few thousand do.
        targets: labels or numbers, for the report alone.
        kappa: the bound on A, in (0, 1). A smaller one costs no accuracy where the states can be
            scaled, and makes the equilibrium quicker to find.
        penalty: `L1`, `Group`, `Perspective`, `LowRank`, or a number, the weight of `L1`.
        readout: of C and D; None for that of A and B with a quarter of its weight, or for none with
            `Group` and `LowRank`.
        connections: "all"; or "upper" for no feedback, states read only those evaluated before
            them, and A has no loop where the network has none.
        refit: least squares on the support in the end, without the penalty's shrinkage; of all
            solutions the shortest, in units of deviations.
        shard: None, "samples" or "rows".
        group: of torch.distributed; None for all processes.

    Returns:
        The layer, in the network's dtype, and the report.

    Raises:
        ValueError: data with NaN (the sample is named) or that the network does not take, targets of
            the wrong shape, labels out of range, kappa outside (0, 1), an unknown choice, or activations that no bound kappa < 1
            makes well-posed.
        TypeError: data or targets are no tensors, or the penalty is none.
        ConversionError: the network is not of the form of an implicit model.
        ConvergenceError: the states are too nearly dependent for so small a weight, or kappa is so
            near to 1 that the states of the new layer were not found; in any process, in all.

    Example:
        >>> import torch, implicitdl
        >>> from implicitdl.states import fit_states
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> layer, report = fit_states(net, torch.randn(100, 4), penalty=1e-4)
        >>> bool(layer.A.abs().sum(1).max() <= 0.5), report.agreement > 0.95
        (True, True)
    """
    options = checked_options(kappa, penalty, readout, connections, shard)
    sharing = Sharing(shard=shard, group=group)

    def accepted() -> tuple[Structure, Tensor]:
        check_data(data, least=1 if shard == "samples" else 2)
        model, samples = network, data
        if not isinstance(model, ImplicitModel):
            model, samples = converted(model, samples)
        f = structured(model)
        samples = check_samples(f, samples)
        check_model(f, options.kappa)
        check_targets(targets, len(samples), f.outputs)
        return f, samples

    f, data = sharing.together(accepted)
    with torch.no_grad():
        double = exact(f)
        fitted = fitting.fit(double, data, options, refit, sharing)
        layer = assembly.layer(fitted, f, options.kappa)
        before, after, agreement = scores(double, layer, data, targets, sharing)
    numbers = network.parameters() if isinstance(network, nn.Module) else []
    report = FitReport.of(layer, fitted, sum(t.numel() for t in numbers) or None)
    return layer, report.scored(before, after, agreement)
