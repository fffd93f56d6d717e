"""Finding everybody's setting, judging what comes back, and timing in turns.

A competitor runs at the loosest of its own tolerances that meets the accuracy asked for; it is
found before the clock starts, the same way for us and for peers.
"""

import dataclasses
import math
import time
from collections.abc import Sequence

import torch
from _harness import TimeUp, deadline, duration, interleaved, median, seconds_of
from peers import TUNED, Competitor, Setting
from problems import Problem

RESIDUAL, GRADIENT = 1e-5, 1e-4
TOLERANCES = (1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7)
FIRST = 1  # where the search starts: 3e-5, since what stops at t returns better than t
MODES = ("forward", "forward + backward")


@dataclasses.dataclass
class Result:
    """What one competitor did in one cell."""

    name: str
    ours: bool
    tier: int  # see peers.py
    setting: Setting | None = None
    seconds: float = math.nan  # median; of the untimed attempt where it missed
    repetitions: int = 0
    residual: float = math.inf
    dA: float = math.nan
    dv: float = math.nan
    products: int | None = None
    missed: str = ""  # why it does not count
    stopped: bool = False  # it was still running after `seconds`: its time is larger

    def judge(self, gradient: bool) -> bool:
        """Whether the accuracy asked for was reached."""
        good = self.residual <= RESIDUAL
        return good and (not gradient or (self.dA <= GRADIENT and self.dv <= GRADIENT))


def attempt(
    who: Competitor, problem: Problem, setting: Setting, gradient: bool, limit: float
) -> Result:
    """Solve once and judge the answer; TimeUp passes through."""
    result = Result(who.name, who.ours, who.tier, setting)
    deadline.set(limit)
    try:
        call = who.run(problem, setting, gradient)
        start = time.perf_counter()
        answer = call()
        result.seconds = time.perf_counter() - start
        if result.seconds < 0.05:  # the first call is warm-up
            start = time.perf_counter()
            answer = call()
            result.seconds = time.perf_counter() - start
    finally:
        deadline.clear()
    result.residual = problem.residual(answer[0])
    result.products = who.products()
    if gradient:
        result.dA, result.dv = problem.errors(answer[1], answer[2])
    return result


class Search:
    """The loosest setting of each competitor that reaches the accuracy, cell by cell."""

    def __init__(self) -> None:
        self.rungs: dict[tuple, tuple[int, int]] = {}
        self.options: dict[tuple, tuple] = {}

    def find(self, who: Competitor, problem: Problem, gradient: bool, limit: float) -> Result:
        """The result of the untimed attempt at the setting that was found."""
        if why := who.missing():
            return Result(who.name, who.ours, who.tier, missed=f"not installed ({why})")
        chosen = self.options.get((who.name, *problem.key))
        candidates = [chosen] if chosen is not None else who.candidates(problem)
        best: Result | None = None
        failed = Result(who.name, who.ours, who.tier, missed="nothing to tune")
        end = time.perf_counter() + 2 * limit
        for options in candidates:
            if time.perf_counter() > end:
                break
            bound = limit if best is None else min(limit, 2 * best.seconds + 0.05)
            result = self._climb(who, problem, gradient, bound, options)
            if result.missed:
                if not failed.setting or _worse(failed, result):
                    failed = result
            elif best is None or result.seconds < best.seconds:
                best = result
        if best is not None:
            self.options[(who.name, *problem.key)] = best.setting.options
        return best or failed

    def _climb(
        self, who: Competitor, problem: Problem, gradient: bool, limit: float, options: tuple
    ) -> Result:
        """Tighten the tolerance that is to blame until the answer is accurate enough."""
        key = (who.name, *problem.key, gradient, options)
        # In the larger batches of the same problem the search goes on where it ended.
        f, b = self.rungs.get(key, (FIRST, 0))
        last = Result(who.name, who.ours, who.tier)
        end = time.perf_counter() + 3 * limit
        while f < len(TOLERANCES) and b < len(TOLERANCES):
            setting = Setting(forward=TOLERANCES[f], backward=TOLERANCES[b], options=options)
            try:
                last = attempt(who, problem, setting, gradient, limit)
            except TimeUp:
                last.setting, last.seconds, last.missed = setting, limit, f"> {duration(limit)}"
                last.stopped = True
                return last
            except Exception as error:  # noqa: BLE001 - an outcome like any other
                last.missed = f"{type(error).__name__}: {str(error)[:60]}"
                last.setting = setting
                return last
            if last.judge(gradient):
                self.rungs[key] = f, b
                last.setting = who.trimmed(setting)
                return last
            if not math.isfinite(last.residual):
                break
            if time.perf_counter() > end:
                break
            # What is too large falls about as the tolerance does, so several steps may be taken at
            # once; never one more than that, so that nobody is made to solve better than needed.
            if last.residual > RESIDUAL:
                f += _steps_down(last.residual / RESIDUAL)
            elif last.dv <= GRADIENT:
                f += _steps_down(last.dA / GRADIENT)
            else:
                b += _steps_down(last.dv / GRADIENT)
        last.missed = _shortfall(last, gradient)
        return last


def _steps_down(excess: float) -> int:
    return max(1, int(2 * math.log10(min(excess, 1e3))))


def _worse(a: Result, b: Result) -> bool:
    """Whether b says more than a about how a competitor failed: stopped, then closest."""
    if a.stopped or b.stopped:  # the shortest time that a candidate was given bounds them all
        return b.stopped and (not a.stopped or b.seconds < a.seconds)
    return not math.isfinite(a.residual) or b.residual < a.residual


def _shortfall(result: Result, gradient: bool) -> str:
    if not math.isfinite(result.residual):
        return "NaN or diverged"
    if result.residual > RESIDUAL:
        return f"residual {result.residual:.1e}"
    return f"gradient {max(result.dA, result.dv):.1e}" if gradient else ""


@dataclasses.dataclass
class Cell:
    """One problem, size and mode: everybody's result, and the floor."""

    problem: str
    n: int
    batch: int
    mode: str
    results: list[Result]
    product: float  # seconds of one product at this shape
    best_products: int  # of the best Krylov method

    def ours(self) -> Result:
        return next(r for r in self.results if r.ours)

    def peer(self, tier: int = TUNED) -> Result | None:
        """The fastest peer, up to that tier, that reaches the accuracy."""
        good = [r for r in self.results if not r.ours and not r.missed and r.tier <= tier]
        return min(good, key=lambda r: r.seconds, default=None)

    def ratio(self, tier: int = TUNED) -> float:
        """Time of the fastest accurate peer over ours; infinite where every peer has missed.

        A peer that was stopped counts with the time that it had by then, so the ratio may be too
        small, never too large; `bounded` says so.
        """
        times = [x for x in (self._accurate(tier), self._stopped(tier)) if x is not None]
        mine = self.ours()
        if all(r.ours for r in self.results):
            return math.nan
        if mine.missed:
            return 0.0 if times else math.nan
        return min(times) / mine.seconds if times else math.inf

    def bounded(self, tier: int = TUNED) -> bool:
        """Whether the ratio is only a lower bound: who was stopped may be the fastest."""
        accurate, stopped = self._accurate(tier), self._stopped(tier)
        return stopped is not None and (accurate is None or stopped < accurate)

    def _accurate(self, tier: int) -> float | None:
        peer = self.peer(tier)
        return None if peer is None else peer.seconds

    def _stopped(self, tier: int) -> float | None:
        times = [r.seconds for r in self.results if r.stopped and not r.ours and r.tier <= tier]
        return min(times, default=None)

    def floor(self) -> float:
        return self.product * self.best_products

    def own_floor(self) -> float:
        """The floor with the products that our forward solve did; forward only."""
        count = self.ours().products
        return math.nan if count is None or self.mode != MODES[0] else count * self.product


def measure(
    problem: Problem, gradient: bool, who: Sequence[Competitor], search: Search, budget: float
) -> Cell:
    """Find everybody's setting, then time all accurate ones in turns within the budget."""
    start, results = time.perf_counter(), []
    best = math.inf  # of the peers so far: who takes much longer need not be waited for
    for one in who:
        if one.ours:
            limit = 60.0
        else:
            # With nobody to compare with, long enough to show that ours is several times faster.
            mine = max([r.seconds for r in results if r.ours and not r.missed], default=0.0)
            limit = max(8 * mine, 1.0) if mine < 0.5 else 3 * mine
            if math.isfinite(best):
                limit = max((3 if best < 0.5 else 1.5) * best, 0.2)
        result = search.find(one, problem, gradient, limit)
        if not result.missed and not one.ours and one.tier <= TUNED:
            best = min(best, result.seconds)
        results.append(result)
    runs = {
        one.name: one.run(problem, r.setting, gradient)
        for one, r in zip(who, results, strict=True)
        if not r.missed
    }
    for call in runs.values():  # warm
        if best < budget / 4 or not math.isfinite(best):
            call()
    left = max(budget - (time.perf_counter() - start), budget / 2)
    known = {r.name: r.seconds for r in results if not r.missed and not r.ours}
    times = interleaved(runs, left, known=known)
    for result in results:
        if result.name in times:
            result.seconds = median(times[result.name])
            result.repetitions = len(times[result.name])
    out, z = torch.empty_like(problem.v), problem.v.clone()
    product = seconds_of(lambda: torch.addmm(problem.v, z, problem.A.mT, out=out))
    tolerance = RESIDUAL if not gradient else GRADIENT
    return Cell(
        problem.name,
        problem.n,
        problem.batch,
        MODES[gradient],
        results,
        product,
        problem.products(tolerance, gradient),
    )
