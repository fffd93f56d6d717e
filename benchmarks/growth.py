"""How time and peak memory grow with n, batch and 1/(1 - kappa), around one base point."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _harness import duration, in_child, peak_memory, table
from peers import Setting, competitors
from problems import make
from search import Search, measure

BASE = {"n": 512, "batch": 64, "kappa": 0.9}
GROWTH = {"n": (64, 512, 2048), "batch": (1, 64, 256), "kappa": (0.5, 0.9, 0.99)}
GROWING = ("implicitdl", "torchdeq anderson tuned", "torchdeq fixed_point_iter", "torchidl")


def memory_of(name: str, n: int, batch: int, kappa: float) -> float:
    """MiB that forward and backward need at the peak, called in a fresh process."""
    problem = make(f"nonneg-{kappa}", n, batch)
    who = next(c for c in competitors() if c.name == name)
    picard = "anderson" not in name
    steps = int(math.log(1e-5) / math.log(kappa) * 1.2) + 10 if picard else 100
    problem.__dict__["exact"] = (problem.v.double(), problem.g.double(), problem.A)
    setting = Setting(
        forward=1e-5,
        backward=1e-5,
        forward_steps=steps,
        backward_steps=steps,
        options=who.candidates(problem)[0],
    )
    make_small = make(f"nonneg-{kappa}", 8, 2)
    make_small.__dict__["exact"] = (make_small.v.double(), make_small.g.double(), make_small.A)
    who.run(make_small, setting, True)()  # code and libraries are loaded, threads started
    return peak_memory(who.run(problem, setting, True))


def memory_table(points: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, list[float]]:
    """Peaks for every point and competitor, each measured in a process of its own.

    The processes are forked by a helper that has imported torch and computed nothing.
    """
    jobs = [(name, p["n"], p["batch"], p["kappa"]) for p in points for name in names]
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import growth, json\n"
        f"print(json.dumps(growth.forked_memory({jobs!r})))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=600
    )
    if said.returncode:
        raise RuntimeError(said.stderr[-500:])
    flat = json.loads(said.stdout.splitlines()[-1])
    width = len(names)
    return {
        name: [math.nan if x is None else x for x in flat[j::width]] for j, name in enumerate(names)
    }


def forked_memory(jobs: Sequence[tuple[str, int, int, float]]) -> list[float | None]:
    """`memory_of` each job in a forked child; None where it failed."""
    for package in ("torchdeq", "torchidl", "implicitdl"):
        try:
            __import__(package)
        except ImportError:
            continue
    answers = [in_child(lambda job=job: memory_of(*job), 60) for job in jobs]
    return [value if kind == "ok" else None for kind, value in answers]


def growth(search: Search, names: Sequence[str], quick: bool) -> tuple[str, dict[str, Any]]:
    """Tables of time and peak memory against n, batch and 1/(1 - kappa), around one base point."""
    points: list[dict[str, Any]] = []
    for key, values in GROWTH.items():
        if quick and key != "kappa":
            continue
        for value in values:
            point = BASE | {key: value}
            if point not in points:
                points.append(point)
    who = [c for c in competitors() if c.name in names and not c.missing()]
    seconds: dict[str, list[float]] = {c.name: [] for c in who}
    for point in points:
        problem = make(f"nonneg-{point['kappa']}", point["n"], point["batch"])
        cell = measure(problem, True, who, search, 0.4 if quick else 2.0)
        for result in cell.results:
            seconds[result.name].append(math.nan if result.missed else result.seconds)
    peaks = memory_table(points, [c.name for c in who])
    text = []
    for key, values in GROWTH.items():
        rows = []
        for value in values:
            point = BASE | {key: value}
            if point not in points:
                continue
            i = points.index(point)
            label = (
                f"1/(1 - kappa) = {1 / (1 - value):.0f}" if key == "kappa" else f"{key} = {value}"
            )
            cells = [f"{duration(seconds[c.name][i])}, {peaks[c.name][i]:.1f} MiB" for c in who]
            rows.append([label, *cells])
        if rows and not (quick and key != "kappa"):
            text.append(table(["", *(c.name for c in who)], rows))
    data = {"points": points, "seconds": seconds, "peak_mib": peaks}
    return "\n\n".join(text), data
