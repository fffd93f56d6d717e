"""Solving x = relu(A x + v) and differentiating it, beside torchidl and every torchdeq solver.

    python benchmarks/implicit_layer.py [--quick] [--solvers] [--problems NAMES] [--out DIR]

Float32, forward, and forward with exact backward. The benchmark judges everybody itself, against
float64: the largest relative residual of a sample must be at most 1e-5, the relative error of dA
and that of every row of dv at most 1e-4. Everybody runs at the loosest of its own tolerances
that meets this, found before the clock starts; who misses at every tolerance is shown with the
number that was missed and is no "fastest peer". Then all are timed in turns.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _harness import (
    duration,
    geometric_mean,
    machine,
    machine_line,
    table,
    write_results,
)
from growth import BASE, GROWING, growth
from peers import AS_IT_COMES, TOLD, TUNED, competitors
from problems import EXTRA, NAMES, make
from search import GRADIENT, MODES, RESIDUAL, Cell, Result, Search, measure

# --- the report


def describe(result: Result | None) -> str:
    return "none" if result is None else f"{result.name}, {duration(result.seconds)}"


def times(cell: Cell, tier: int = TUNED) -> str:
    """The ratio as text: with > where the peers were stopped."""
    ratio = cell.ratio(tier)
    if math.isinf(ratio):
        return "only ours"
    return "-" if math.isnan(ratio) else f"{'> ' * cell.bounded(tier)}{ratio:.2f}"


TIERS = {
    TUNED: "all that stop by themselves",
    AS_IT_COMES: "untuned ones only",
    TOLD: "also told the number of steps",
}


def summary(cells: Sequence[Cell]) -> tuple[str, dict[str, Any]]:
    """Geometric means of the ratios, wins, and every row that was lost."""
    lines, data = [], {}
    groups: dict[str, Callable[[Cell], bool]] = {
        "all": lambda c: True,
        "at 0.99": lambda c: c.problem.endswith("0.99"),
        "forward": lambda c: c.mode == MODES[0],
        "forward + backward": lambda c: c.mode == MODES[1],
    }
    problems = dict.fromkeys(c.problem for c in cells)
    groups |= {name: lambda c, name=name: c.problem == name for name in problems}
    rows = []
    for name, chosen in groups.items():
        some = [c for c in cells if chosen(c)]
        by = {tier: [c.ratio(tier) for c in some] for tier in TIERS}
        alone = sum(math.isinf(x) for x in by[TUNED])
        means = {tier: geometric_mean(by[tier]) for tier in TIERS}
        floor = geometric_mean(c.ours().seconds / c.floor() for c in some if not c.ours().missed)
        data[name] = {TIERS[tier]: means[tier] for tier in TIERS}
        data[name] |= {"cells": len(some), "only ours": alone, "times the floor": floor}
        texts = [f"{means[tier]:.2f}" for tier in TIERS]
        rows.append([name, len(some), *texts, alone, f"{floor:.1f}"])
    header = ["fastest accurate peer / ours", "cells", *TIERS.values()]
    lines.append(table([*header, "only ours solves", "ours / floor"], rows))
    lost = [c for c in cells if c.ratio() < 1]
    missed = [c for c in cells if c.ours().missed]
    lines.append(
        f"\n{len(cells) - len(lost)} of {len(cells)} cells won or level, {len(lost)} lost; "
        f"not solved by implicitdl: {len(missed)}."
    )
    for c in lost:
        lines.append(
            f"- lost: {c.problem}, n={c.n}, batch={c.batch}, {c.mode}: {c.ratio():.2f} "
            f"({describe(c.ours())}; {describe(c.peer())})"
        )
    for c in missed:
        lines.append(f"- not solved: {c.problem}, n={c.n}, batch={c.batch}, {c.mode}: "
                     f"{c.ours().missed}")  # fmt: skip
    told = [c for c in cells if c.ratio(TOLD) < 1 <= c.ratio()]
    lines.append(f"- slower than a peer told its number of steps beforehand: {len(told)} more.")
    data["lost"] = [[c.problem, c.n, c.batch, c.mode, c.ratio()] for c in lost]
    return "\n".join(lines), data


def short(cells: Sequence[Cell]) -> str:
    """One row a cell: ours, the fastest accurate peer, the ratios, the floor."""
    rows = []
    for c in cells:
        mine = c.ours()
        rows.append([
            c.problem, c.n, c.batch, c.mode,
            mine.missed or duration(mine.seconds),
            f"{mine.residual:.0e}" if c.mode == MODES[0] else f"{max(mine.dA, mine.dv):.0e}",
            describe(c.peer()), times(c), times(c, AS_IT_COMES),
            f"{c.best_products} / {mine.products}",
            f"{mine.seconds / c.floor():.1f}" if not mine.missed else "-",
            f"{mine.seconds / c.own_floor():.1f}" if math.isfinite(c.own_floor()) else "-",
        ])  # fmt: skip
    header = ["problem", "n", "batch", "mode", "implicitdl", "error", "fastest accurate peer",
              "ratio", "ratio, untuned", "products best / ours", "x floor", "x own products"]  # fmt: skip
    return table(header, rows)


def full(cells: Sequence[Cell]) -> str:
    """Everybody's time in every cell, or what was missed."""
    names = [r.name for r in cells[0].results]
    rows = []
    for c in cells:
        texts = [r.missed or duration(r.seconds) for r in c.results]
        rows.append([c.problem, c.n, c.batch, c.mode, *texts])
    return table(["problem", "n", "batch", "mode", *names], rows)


def main(argv: list[str] | None = None) -> int:
    """Measure every cell, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes, under two minutes")
    parser.add_argument("--solvers", action="store_true", help="a row for each of our solvers")
    parser.add_argument("--problems", default=",".join(NAMES), help=f"of {NAMES + EXTRA}")
    parser.add_argument("--n", default="", help="sizes, with commas")
    parser.add_argument("--batch", default="", help="batch sizes, with commas")
    parser.add_argument("--minutes", type=float, help="time for the whole run")
    parser.add_argument("--no-growth", action="store_true", help="leave the growth tables out")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(argv)

    sizes = [int(x) for x in options.n.split(",") if x] or (
        [64, 512] if options.quick else [64, 512, 2048]
    )
    batches = [int(x) for x in options.batch.split(",") if x] or (
        [64] if options.quick else [1, 64, 256]
    )
    names = [x for x in options.problems.split(",") if x]
    minutes = options.minutes or (0.9 if options.quick else 12.5)
    reserve = 0 if options.no_growth else (15 if options.quick else 100)
    end = time.perf_counter() + 60 * minutes - reserve

    who = competitors(options.solvers)
    for one in who:
        if why := one.missing():
            print(f"{one.name}: not installed ({why}); its rows are left out")
    who = [one for one in who if not one.missing()]
    tiny = make("nonneg-0.5", 8, 2)
    for one in who:  # imports, and the first call of everything, happen off the clock
        Search().find(one, tiny, True, 60.0)
    facts = machine()
    print(machine_line(facts), flush=True)

    plan = [(name, n, batch) for name in names for n in sizes for batch in batches]
    # Time goes where a solve is long, but every cell gets some.
    weights = {cell: 0.25 + (cell[1] ** 2 * max(cell[2], 16) / 2**30) ** 0.5 for cell in plan}
    search, cells = Search(), []
    for position, cell in enumerate(plan):
        problem = make(*cell)
        problem.exact  # noqa: B018 - the reference is computed here, off the clock
        for gradient in (False, True):
            rest = sum(weights[c] for c in plan[position:]) - weights[cell] * gradient / 3
            part = (2 / 3 if gradient else 1 / 3) * weights[cell] / rest
            budget = min(max((end - time.perf_counter()) * part, 0.3), 30.0)
            result = measure(problem, gradient, who, search, budget)
            cells.append(result)
            mine = result.ours()
            print(
                f"{cell[0]:>12} n={cell[1]:<4} batch={cell[2]:<3} {result.mode:<18} "
                f"ours {mine.missed or duration(mine.seconds):>9}  "
                f"peer {describe(result.peer()):<36} ratio {times(result)} "
                f"(untuned {times(result, AS_IT_COMES)})",
                flush=True,
            )
    parts = [f"# Implicit layers: speed at equal accuracy\n\n{machine_line(facts)}; float32."]
    parts.append(
        f"Judged in float64: residual of every sample <= {RESIDUAL:g}, error of dA and of every "
        f"row of dv <= {GRADIENT:g}. A ratio is the time of the fastest peer that reaches this "
        "over ours. Floor: seconds of one product A x at this shape times the products of the "
        "best Krylov method (GMRES from zero, told the active set); the second count is the "
        "evaluations in our own forward solve."
    )
    text, means = summary(cells)
    parts += [text, short(cells), "Everybody:", full(cells)]
    grown: dict[str, Any] = {}
    if not options.no_growth:
        wanted = GROWING if not options.quick else GROWING[:2]
        text, grown = growth(search, wanted, options.quick)
        base = ", ".join(f"{k} = {v}" for k, v in BASE.items())
        parts += [f"Growth of time and peak memory, forward + backward, around {base}:", text]
    markdown = "\n\n".join(parts)
    print("\n" + markdown)
    data = {
        "machine": facts,
        "accuracy": {"residual": RESIDUAL, "gradient": GRADIENT},
        "summary": means,
        "cells": [dataclasses.asdict(c) | {"floor": c.floor(), "ratio": c.ratio()} for c in cells],
        "growth": grown,
    }
    write_results("implicit_layer", data, markdown, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
