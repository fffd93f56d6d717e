"""Chapter 3: a linear program solved as if its data were certain, attacked, and solved robustly."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import plot
from ..robust import Ellipsoid, RobustLP
from .report import Context, Section, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RADII = torch.linspace(0.0, 2.0, 21, dtype=torch.float64)
_SHARE = 0.95  # of the nominal profit


def chapter(context: Context) -> Section:
    """Solve, attack, draw.

    Args:
        context: what the user asked for.

    Returns:
        The section.
    """
    generator = torch.Generator().manual_seed(context.seed)
    program = _workshop()
    nominal, robust = program.scaled(0.0).solve().value, program.solve().value
    count = 1_000 if context.quick else 10_000
    plans = {"nominal": nominal, "robust": robust}
    rows = [("", "profit", "broken by", "worst excess", "radius it bears")]
    for name, x in plans.items():
        broken = (program.sample(count, generator=generator).violation(x) > 1e-9).any(-1)
        rows.append(
            (
                f"{name} plan",
                f"{-float(program.c @ x):.3f}",
                f"{100 * float(broken.double().mean()):.1f} %",
                f"{float(program.worst_case(x).violation(x).max()):+.4f}",
                f"{float(program.radius(x)):.4f}",
            )
        )
    share = float((program.c @ robust) / (program.c @ nominal))
    bears = float(program.largest_radius(cost=_SHARE * (program.c @ nominal)).stats["radius"])

    section = Section(title="A linear program, max p'x over A x <= b, when A is not known exactly")
    section.add(
        "program",
        "two products, x >= 0; the usage of each of three machines, a row of A, lies in an ellipsoid",
        "a plan is robust where no machine is overloaded for any usage in its ellipsoid",
    )
    section.add("attack", f"{count:,} usages of each ellipsoid, then the worst one", *table(rows))
    section.add(
        "price",
        f"{100 * (1 - share):.1f} % of the nominal profit; with {100 * _SHARE:.0f} % of it, a plan "
        f"bears a radius of {bears:.4f} at most",
    )
    figures = {
        "robust.png": plot.feasible(
            program, radii=(0.0, 0.5, 1.0), points=_labelled(plans), window=(-0.4, 5.4, -0.4, 5.0)
        ),
        "attack.png": _attack(program, plans, 100, generator),
    }
    for file, figure in figures.items():
        section.pictures.append(plot.save(figure, context.out / file))
    return section


def _workshop() -> RobustLP:
    """Two products on three machines, of which each product depends on one that is erratic."""
    profit = torch.tensor([3.0, 2.5], dtype=torch.float64)
    usage = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.5, 1.4]], dtype=torch.float64)
    spread = torch.tensor([[0.45, 0.1], [0.1, 0.35], [0.15, 0.25]], dtype=torch.float64)
    return RobustLP(
        -profit, usage, torch.tensor([10.0, 9.0, 9.2], dtype=torch.float64), low=0.0,
        uncertainty=Ellipsoid(shape=torch.diag_embed(spread)),
    )  # fmt: skip


def _labelled(plans: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name} plan": x for name, x in plans.items()}


def _attack(
    program: RobustLP, plans: dict[str, Tensor], count: int, generator: torch.Generator
) -> "Figure":
    """The picture of violations by the size of the attack."""
    attacked = program.scaled(_RADII)
    lines, dots = {}, {}
    draws = attacked.sample(count, generator=generator)
    for name, x in _labelled(plans).items():
        lines[name] = attacked.violation(x).amax(-1)
        dots[name] = draws.violation(x).amax((0, -1))
    return plot.attack(_RADII, lines, sampled=dots)
