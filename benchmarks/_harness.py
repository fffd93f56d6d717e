"""What the benchmarks share: the machine, interleaved timing, children with a time limit, tables.

A ratio between competitors timed in turns, in one run, counts; an absolute time on a shared
processor does not. Nothing here knows what is being measured.
"""

import contextlib
import json
import math
import os
import pickle
import platform
import select
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
if str(ROOT) not in sys.path:  # the source tree is measured, never an installed copy
    sys.path.insert(0, str(ROOT))


class TimeUp(Exception):
    """A competitor used up the time it was given."""


class Deadline:
    """A clock that competitors look at between two steps: `check` raises TimeUp past the limit."""

    def __init__(self) -> None:
        self.at = math.inf

    def set(self, seconds: float) -> None:
        self.at = time.perf_counter() + seconds

    def clear(self) -> None:
        self.at = math.inf

    def check(self) -> None:
        if time.perf_counter() > self.at:
            raise TimeUp


deadline = Deadline()


def machine() -> dict[str, Any]:
    """Describe the machine without naming it: processor, cores, memory, versions, threads."""
    model = platform.processor() or platform.machine()
    memory = None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
        total = Path("/proc/meminfo").read_text().split("MemTotal:", 1)[1].split()[0]
        memory = round(int(total) / 2**20, 1)
    except (OSError, StopIteration, IndexError):
        pass
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gib": memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """The machine's description as one line of text."""
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB; "
        f"Python {facts['python']}, torch {facts['torch']}, {facts['threads']} threads "
        f"(OMP_NUM_THREADS {facts['OMP_NUM_THREADS']})"
    )


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    budget: float,
    *,
    least: int = 3,
    most: int = 40,
    known: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Time every run in turns until the budget is used; returns seconds of each repetition.

    Each round starts at another competitor, so that a disturbance or a warm cache falls on
    nobody in particular. A run gets an equal share of the budget and then drops out; it gets
    `least` repetitions unless one of them is longer than its share.

    Args:
        runs: name -> a call without arguments.
        budget: seconds for all of them together.
        least: repetitions that a fast run is never refused.
        most: repetitions after which a run drops out.
        known: an earlier timing per name, counted for a run that is longer than its share.
    """
    share = budget / max(len(runs), 1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, seconds in (known or {}).items():
        if name in times and seconds > share / 2:
            times[name].append(seconds)
    names = list(runs)
    for turn in range(most):
        live = 0
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            spent, count = sum(times[name]), len(times[name])
            wanted = least if count == 0 or spent / count < share / 2 else 1
            if count >= wanted and (spent > share or count >= most):
                continue
            live += 1
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
        if not live:
            break
    return times


def median(values: Sequence[float]) -> float:
    """The median, or NaN of nothing."""
    return statistics.median(values) if values else math.nan


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log x)), or NaN of nothing."""
    logs = [math.log(x) for x in values if x > 0 and math.isfinite(x)]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def seconds_of(call: Callable[[], object], budget: float = 0.2, least: int = 5) -> float:
    """Median seconds of a call within a budget."""
    call()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < least or (time.perf_counter() < end and len(times) < 2000):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def in_child(call: Callable[[], Any], timeout: float) -> tuple[str, Any]:
    """Run a call in a forked child; ("ok", value), ("raises", text), ("hangs", s) or ("dies", n).

    The parent must not have started torch's threads, i.e. must not have computed anything large:
    a forked child of a process with an OpenMP pool can hang.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.setsid()  # so that a child's own processes end with it
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            answer = ("ok", call())
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the cell's outcome
            answer = ("raises", f"{type(error).__name__}: {error}")
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    answer = None
    with os.fdopen(read, "rb") as pipe:
        ready, _, _ = select.select([pipe], [], [], timeout)
        if ready:
            try:
                answer = pickle.load(pipe)
            except EOFError:
                answer = None
    if not ready:
        _end(child)
        os.waitpid(child, 0)
        return "hangs", timeout
    _, code = os.waitpid(child, 0)
    _end(child)
    return answer if answer is not None else ("dies", os.waitstatus_to_exitcode(code))


def _end(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def peak_memory(call: Callable[[], object]) -> float:
    """MiB by which the resident set rises above its level before the call, at its highest."""
    level = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present level
    except OSError:
        level = max(level, _status("VmHWM"))
    call()
    return max(_status("VmHWM") - level, 0.0)


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return math.nan


def duration(seconds: float | None) -> str:
    """A time with a unit that fits it."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table, its columns aligned so that it also reads as plain text."""
    cells = [[str(x) for x in header]] + [[str(x) for x in row] for row in rows]
    widths = [max(len(row[j]) for row in cells) for j in range(len(header))]
    lines = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)) + " |" for r in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def write_results(
    name: str, data: Mapping[str, Any], markdown: str, out: Path | None = None
) -> None:
    """Write NAME.json and NAME.md into the results folder."""
    folder = RESULTS if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(_plain(data), indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown.rstrip() + "\n")
    print(f"\nwritten: {name}.json and {name}.md in {folder.name}/")


def _plain(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else str(x)
    return x if isinstance(x, int | str | bool | None.__class__) else str(x)
