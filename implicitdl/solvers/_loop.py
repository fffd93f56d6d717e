"""Fixed-point solvers: z = f(z), one independent problem a row. They know nothing of gradients.

The loop in `FixedPointSolver.solve` is the only one: stopping, per-sample freezing, best-so-far,
compaction of the batch, the recorded trajectory and the statistics are written there, once. A new
solver writes `init` and `step`.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..maps import AffineMap, LinearRows, RowMap, inside_transform
from ..solution import Solution, Status, unknown_name

Map = AffineMap | RowMap | LinearRows

# Default relative tolerances: about thirty roundings of float32; in float64 below what finite
# differences in a gradient check resolve.
_RTOL = {torch.float32: 4e-6, torch.float64: 1e-12}


@dataclass(frozen=True, kw_only=True)
class FixedPointSolver(abc.ABC):
    """Finds z with z = f(z).

    A sample has converged when  rms(f(z) - z) < atol + rtol rms(f(z)).

    Args:
        rtol: relative tolerance; None means 4e-6 in float32 and 1e-12 in float64.
        atol: absolute tolerance, in the units of z. The default only ends the iterations of a
            sample whose solution is zero.
        max_steps: evaluations of f at most.

    A subclass writes `init` (its state before the first step) and `step` (next iterate, f there,
    next state); every tensor in its state has the samples along dimension -2, or is a vector of
    them, so that `take` can pick some.
    """

    rtol: float | None = None
    atol: float = 1e-30
    max_steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not isinstance(value, int | float | None) or isinstance(value, bool):
                raise TypeError(
                    f"{type(self).__name__}: {name}={value!r}, expected a number, got "
                    f"{type(value).__name__}."
                )
        if self.rtol is not None and not 0 < self.rtol < 1:
            raise ValueError(f"{type(self).__name__}: rtol={self.rtol}, expected 0 < rtol < 1.")
        if not 0 <= self.atol < math.inf:
            raise ValueError(f"{type(self).__name__}: atol={self.atol}, expected atol >= 0.")
        if type(self.max_steps) is not int or self.max_steps < 1:
            raise ValueError(
                f"{type(self).__name__}: max_steps={self.max_steps!r}, expected an integer >= 1."
            )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            _REGISTRY[cls.__name__] = cls

    def init(self, f: Map, z: Tensor, fz: Tensor) -> Any:
        """The state before the first step."""
        return None

    def begin(self, f: Map, z: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        """The first iterate, f at it, and the state; z None: a start of the solver's own choice."""
        if z is None:
            z = f.start()
        fz = f(z)
        return z, fz, self.init(f, z, fz)

    @abc.abstractmethod
    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """The next iterate, f at it, and the next state, from z and fz = f(z).  # all (m, n)"""

    def take(self, state: Any, rows: Tensor) -> Any:
        """The state of some of the samples: every tensor in it is indexed along its dimension
        -2 (vectors), so that (m, n) and (memory, m, n) buffers both work."""
        if isinstance(state, Tensor):
            return state.index_select(-2, rows) if state.dim() > 1 else state.index_select(0, rows)
        if isinstance(state, tuple):
            return tuple(self.take(part, rows) for part in state)
        return state

    def steps(
        self, f: Map, z: Tensor, fz: Tensor, state: Any, most: int, work: int, k: int
    ) -> tuple[Tensor, Tensor, Any, int]:
        """As many steps as come before the next look, `most` at most; and how many."""
        z, fz, state = self.step(f, z, fz, state)
        return z, fz, state, 1

    def exact(self, state: Any) -> bool:
        """Whether the f(z) that `step` returns was evaluated, not got from a recurrence that rounds
        on its own; if not, what looks converged is checked against f itself."""
        return True

    def overwrites(self, state: Any) -> bool:
        """Whether the next steps write into the buffers of z and f(z)."""
        return False

    def describe(self, state: Any) -> dict[str, Any]:
        """What to add to the statistics."""
        return {"solver": self.name}

    def tolerance(self, dtype: torch.dtype) -> float:
        """`rtol`, or what None means for that dtype."""
        return self.rtol if self.rtol is not None else _RTOL.get(dtype, 4e-6)

    def look(self, k: int, work: int, state: Any) -> bool:
        """Whether to look at convergence after k evaluations; `work` is the cost of one, in
        multiply-adds. A look costs a few passes over the batch and, on a GPU, a stall."""
        return True

    def solve(
        self,
        f: "Callable[[Tensor], Tensor] | Map",
        z0: Tensor | None = None,
        *,
        record: bool = False,
    ) -> Solution:
        """Solve z = f(z) from z0.

        Args:
            f: a map of rows (`AffineMap`), or any callable (batch, *) -> (batch, *) whose rows
                are independent.
            z0: where to start; None, for an `AffineMap`, leaves it to the solver.  # (batch, *)
            record: keep every iterate in `stats["trajectory"]`.  # (steps, batch, *)

        Returns:
            Solution. Nothing is raised for a sample that fails: `.check()` does that.
        """
        if inside_transform() and isinstance(f, AffineMap) and _hidden(f.v, f.A):
            raise RuntimeError(
                "A solve was called inside a torch.func transform (vmap, grad, jacrev, ...), which "
                "hides the values that it looks at. Call the layer itself, with "
                "adjoint='implicit', or `implicitdl.implicit.equilibrium`."
            )
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            if z0 is None:
                if not isinstance(f, AffineMap):
                    raise ValueError("z0: got None, expected a start: only an AffineMap has one.")
                return self._solve(f, None, [] if record else None)
            rows = f if isinstance(f, AffineMap | RowMap | LinearRows) else RowMap(f, z0.shape)
            z = z0.detach()
            if z.dim() == 2:
                return self._solve(rows, z, [] if record else None)
            z = z.reshape(z0.shape[0], math.prod(z0.shape[1:]))
            solution = self._solve(rows, z, [] if record else None)
        image = solution.image
        stats = {**solution.stats}
        if record:
            frames = stats["trajectory"]
            stats["trajectory"] = frames.view(len(frames), *z0.shape)
        return replace(
            solution,
            value=solution.value.view(z0.shape),
            image=None if image is None else image.view(z0.shape),
            stats=stats,
        )

    def _solve(self, f: Map, z: Tensor | None, record: "list[Tensor] | None") -> Solution:
        m, n = f.v.shape if z is None else z.shape
        if m == 0 or n == 0:
            progress = _Progress(self, f.v.detach() if z is None else z)
            return progress.solution({"solver": self.name, "evaluations": 0}, record)
        z, fz, state = self.begin(f, z)
        progress = _Progress(self, z)
        # An infinite input may have a finite image (tanh), and is no answer all the same.
        if isinstance(f, AffineMap) and not math.isfinite(f.v.sum()):
            progress.poison = (f.v * 0).sum(dim=1)
        work = n * n * m
        k = 1
        while True:
            if record is not None:
                record.append(progress.scatter(z))
            if (k >= self.max_steps or self.look(k, work, state)) and progress.look(
                z, fz, k, None if self.exact(state) else f, self.overwrites(state)
            ):
                break
            if k >= self.max_steps:
                break
            # Where products are cheap a smaller batch pays only in a long solve.
            keep = progress.compaction() if work > 1 << 22 or k > 32 else None
            if keep is not None and (smaller := f.select(keep)) is not None:
                f, z, fz = smaller, z[keep], fz[keep]
                state = self.take(state, keep)
                progress.compact(keep)
            most = self.max_steps - k if record is None else 1
            z, fz, state, taken = self.steps(f, z, fz, state, most, work, k)
            k += taken
        return progress.solution({**self.describe(state), "evaluations": k}, record)

    @property
    def name(self) -> str:
        """The class name, as in `stats["solver"]`."""
        return type(self).__name__

    def to_config(self) -> dict[str, Any]:
        """The solver as plain values, for files and compiled graphs."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}


_REGISTRY: dict[str, type[FixedPointSolver]] = {}


def from_config(config: dict[str, Any]) -> FixedPointSolver:
    """The solver that `to_config` described.

    Raises:
        ValueError: the name or an option is unknown.
    """
    options = dict(config)
    cls = _REGISTRY.get(options.pop("name", ""))
    if cls is None:
        raise unknown_name("solver", config.get("name"), _REGISTRY)
    valid = {f.name for f in fields(cls)}
    for key in options:
        if key not in valid:
            raise unknown_name(f"option of {cls.__name__}", key, valid)
    return cls(**options)


def get_solver(solver: "str | FixedPointSolver", **options: Any) -> FixedPointSolver:
    """A solver from its name or itself.

    Args:
        solver: `"auto"`, `"picard"`, `"anderson"`, `"broyden"`, `"newton"`,
            `"forward_backward"`, `"peaceman_rachford"`, the name of a solver class of yours, or
            an instance.
        options: for a name, its arguments.
    """
    if isinstance(solver, FixedPointSolver):
        return replace(solver, **options) if options else solver
    names = {_plain(name): name for name in _REGISTRY}
    if not isinstance(solver, str) or _plain(solver) not in names:
        raise unknown_name("solver", solver, (_snake(name) for name in _REGISTRY))
    return from_config({"name": names[_plain(solver)], **options})


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _snake(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


class _Progress:
    """What is known of each sample so far: outcome, best iterate, residual, steps.

    The answer of a sample depends on its own iterates and on the schedule of looks, never on the
    values of its batch-mates. Its rows go on being computed after it has finished, until the
    batch is compacted, but what was recorded for it stands.

    As long as every sample is finite and time is short, little is written down (`plain`);
    `_catch_up` writes down the rest, one entry a sample.
    """

    # A batch shrinks to a multiple of this many rows: below, BLAS switches to kernels that round
    # differently, and a sample's last bits would depend on how many others are still running.
    ROWS = 16
    # Evaluations without gain, and how close to the tolerance, that are taken for rounding. Longer
    # than `Auto` lets one solver run, so that the next one has its turn.
    PATIENCE, NEAR = 250, 1e3

    def __init__(self, solver: FixedPointSolver, z: Tensor):
        m, n = z.shape
        self.rtol = solver.tolerance(z.dtype)
        # The smallest normal number keeps an exact zero from being 0/0.
        self.floor = solver.atol * math.sqrt(n) + torch.finfo(z.dtype).tiny
        self.value = z
        self.image: Tensor | None = None  # f(value), kept as long as all is plain
        self.residual: Tensor | None = None  # None before the first look
        self.done: Tensor | None = None  # who has converged, where some have and some have not
        self.steps: Any = 0  # one number, as long as all samples have the same
        self.rows: Tensor | None = None  # samples still in the running batch; None for all
        self.running = self.total = m  # how many of them are unfinished, of how many
        self.poison: Tensor | None = None  # NaN for samples that are wrong from the start
        self.plain = True
        self.early: tuple[Tensor, int] | None = None  # the residual at some early look, and when
        self.codes = self.active = self.mark = self.gain = z.new_empty(0)

    def scaled(self, z: Tensor, fz: Tensor) -> Tensor:
        """rms(f(z) - z) / (atol + rtol rms(f(z))): a tolerance means the same at every n."""
        change = torch.linalg.vector_norm(fz - z, dim=1)
        unit = torch.linalg.vector_norm(fz, dim=1).mul_(self.rtol).add_(self.floor)
        return change.div_(unit).add_(unit, alpha=0)  # NaN where a square overflowed

    def look(self, z: Tensor, fz: Tensor, k: int, exact: Map | None, overwritten: bool) -> bool:
        """Record where every running sample stands; True when none is left."""
        residual = self.scaled(z, fz)
        before, done = self.residual, self.done
        now = residual if done is None else torch.where(done, before, residual)
        low, high = _range(now if exact is None else residual)
        if exact is not None:
            if not low >= 1:
                fz = exact(z)
                residual = torch.where(residual < 1, self.scaled(z, fz), residual)
            now = residual if done is None else torch.where(done, before, residual)
            low, high = _range(now)
        # A NaN compares false.
        if not (self.plain and high < torch.inf and k <= self.PATIENCE and self.poison is None):
            return self._sort_out(residual, z, fz, k)
        if high >= 1 and overwritten:
            z, fz = z.clone(), fz.clone() if low < 1 else None
        keep = done
        if high >= 1 and before is not None and float((now - before).amax()) > 0:
            keep = now >= before  # of those who have converged, too, what is known stands
            now = torch.minimum(now, before)
        self.steps = k if done is None else torch.where(done, self.steps, k)
        if keep is None:
            self.value, self.image = z, fz
        else:
            self.value = torch.where(keep[:, None], self.value, z)
            both = self.image is not None and fz is not None
            self.image = torch.where(keep[:, None], self.image, fz) if both else None
        self.residual = now
        if self.early is None and k >= 32:
            self.early = now, k
        if high < 1:
            self.running = 0
            return True
        if low < 1:
            self.done = now < 1
            self.running = self.total - int(self.done.sum())
        return False

    def _rescaled(self, residual: Tensor, z: Tensor, fz: Tensor) -> Tensor:
        """The residual where squares overflow, which is no infinite value: only z and f(z)
        themselves say that a sample is lost."""
        unit = torch.maximum(z.abs().amax(dim=1), fz.abs().amax(dim=1))
        change = torch.linalg.vector_norm((fz / unit[:, None] - z / unit[:, None]), dim=1)
        size = torch.linalg.vector_norm(fz / unit[:, None], dim=1)
        ratio = change / (size * self.rtol + self.floor / unit)
        ratio = torch.where(change < torch.inf, ratio.clamp(max=torch.finfo(z.dtype).max), change)
        overflow = ~torch.isfinite(residual) & (unit < torch.inf)
        return torch.where(overflow, ratio, residual)

    def _catch_up(self) -> None:
        """Write down, one entry a sample, what the plain looks left out."""
        z, m = self.value, self.total
        if self.residual is None:
            self.residual = z.new_full((m,), torch.inf)
        if not isinstance(self.steps, Tensor):
            self.steps = torch.full((m,), self.steps, device=z.device)
        if self.running == 0 or z.numel() == 0:
            self.codes = torch.full((m,), Status.CONVERGED.code, device=z.device)
            return
        self.codes = torch.full((m,), Status.MAX_STEPS.code, device=z.device)
        if self.done is None:
            self.active = torch.ones(m, dtype=torch.bool, device=z.device)
        else:
            self.active = ~self.done
            self.codes.masked_fill_(self.done, Status.CONVERGED.code)
        # The residual when it last fell by a hundredth, and when that was.
        self.mark, self.gain = self.residual, self.steps
        if self.early is not None:
            then, k = self.early
            self.gain = torch.where(self.residual < 0.99 * then, self.steps, k)
        self.plain, self.image, self.done = False, None, None

    def _sort_out(self, residual: Tensor, z: Tensor, fz: Tensor, k: int) -> bool:
        """The bookkeeping in full: some samples end, well or badly, and others go on."""
        first = self.residual is None
        if self.plain:
            self._catch_up()
        if not bool(torch.isfinite(residual).all()):
            residual = self._rescaled(residual, z, fz)
        if self.poison is not None:
            residual, self.poison = residual + self.poison, None
        rows = self.rows
        pick = (lambda t: t) if rows is None else (lambda t: t[rows])
        active, best, codes = pick(self.active), pick(self.residual), pick(self.codes)
        done, lost = active & (residual < 1), active & ~torch.isfinite(residual)
        better = active & (residual < best)  # False for NaN
        # No gain for `PATIENCE` evaluations, close to the tolerance: rounding is in the way.
        mark, gain = pick(self.mark), pick(self.gain)
        gained = active & (residual < 0.99 * mark)
        mark, gain = torch.where(gained, residual, mark), torch.where(gained, k, gain)
        best = torch.where(better, residual, best)
        stuck = active & ~done & (k - gain > self.PATIENCE) & (best < self.NEAR)
        blame = Status.NONFINITE if first else Status.DIVERGED
        for which, status in ((done, Status.CONVERGED), (lost, blame), (stuck, Status.STALLED)):
            codes = torch.where(which, status.code, codes)
        steps = torch.where(active, k, pick(self.steps))
        value = torch.where(better[:, None], z, pick(self.value))
        active = active & ~(done | lost | stuck)
        new = {"value": value, "residual": best, "codes": codes, "steps": steps}
        new |= {"gain": gain, "mark": mark}
        for name, t in {**new, "active": active}.items():
            if rows is None:
                setattr(self, name, t)
            else:
                getattr(self, name)[rows] = t
        self.running = int(active.sum())
        return self.running == 0

    def compaction(self) -> Tensor | None:
        """Which rows of the running batch to keep, once at least half of it is done."""
        total = self.total if self.rows is None else self.rows.numel()
        room = -(-self.running // self.ROWS) * self.ROWS
        if total <= 2 * self.ROWS or 2 * room > total:
            return None
        if self.plain:
            self._catch_up()
        active = self.active if self.rows is None else self.active[self.rows]
        # Unfinished rows first; finished ones fill up to the multiple.
        return torch.argsort(active, descending=True, stable=True)[:room]

    def compact(self, keep: Tensor) -> None:
        """The running batch is now these rows of what it was."""
        if self.rows is None:
            self.value = self.value.clone()
        self.rows = keep if self.rows is None else self.rows[keep]

    def scatter(self, z: Tensor) -> Tensor:
        """The running iterates, finished samples standing still: one frame of the trajectory."""
        if self.plain:
            return (
                z.clone() if self.done is None else torch.where(self.done[:, None], self.value, z)
            )
        frame = self.value.clone()
        frame[self.rows if self.rows is not None else slice(None)] = z
        return torch.where(self.active[:, None], frame, self.value)

    def solution(self, stats: dict[str, Any], record: "list[Tensor] | None") -> Solution:
        """What the loop found."""
        if self.plain:
            self._catch_up()
        if self.value.numel() == 0:
            self.residual.zero_()
        if record is not None:
            stats["trajectory"] = torch.stack([*record, self.value])
        return Solution(
            self.value, self.codes, self.residual, self.steps, image=self.image, stats=stats
        )


def _hidden(*tensors: Tensor) -> bool:
    return any(map(torch._C._functorch.is_batchedtensor, tensors))


def _range(t: Tensor) -> tuple[float, float]:
    """The least and the largest entry; NaN, twice, where there is one."""
    if t.numel() == 1:
        value = t.item()
        return value, value
    low, high = torch.aminmax(t)
    return low.item(), high.item()
