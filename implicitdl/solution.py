"""What every solve returns, and how it fails."""

import difflib
import enum
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


class Status(enum.Enum):
    """Outcome of one sample's solve, from best to worst. The value is the advice a user reads."""

    CONVERGED = "converged"
    STALLED = (
        "The residual stopped falling at the rounding level of this dtype. Loosen `rtol`, or "
        "solve in float64."
    )
    MAX_STEPS = (
        "The step limit was reached. Raise `max_steps`, loosen `rtol`, try another solver, or "
        "check that the equation is well-posed (`implicitdl.wellposed.certificate`)."
    )
    DIVERGED = (
        "The iterates grew without bound or turned to NaN: the map expands, or a step of the solver "
        "broke down. Check the map with `implicitdl.wellposed.certificate`, or use `Newton` or a "
        "monotone splitting."
    )
    INFEASIBLE = (
        "No point satisfies the constraints; `stats['certificate']` has a combination of them that "
        "is a contradiction. Relax a constraint that it weighs."
    )
    UNBOUNDED = (
        "The objective falls without bound along the direction in `stats['certificate']`. Bound the "
        "variables that it moves, or add a quadratic term."
    )
    NONFINITE = (
        "The input of the solve, or its first evaluation, holds NaN or infinite values (or such as "
        "overflow)."
    )

    @property
    def code(self) -> int:
        """Position in the list of outcomes, as stored in `Solution.codes`."""
        return _CODES[self]


_CODES = {status: code for code, status in enumerate(Status)}
_BY_CODE = list(Status)


class ImplicitDLError(Exception):
    """Base of every error that implicitdl defines."""


class ConvergenceError(ImplicitDLError, RuntimeError):
    """A solve failed for some samples. The whole result, good samples included, is `.solution`."""

    def __init__(self, message: str, solution: "Solution | None" = None):
        super().__init__(message)
        self.solution = solution


class NotWellPosedError(ImplicitDLError, ValueError):
    """The equation has no unique solution, or none that can be certified; see `.margin`."""

    def __init__(self, message: str, margin: float | None = None):
        super().__init__(message)
        self.margin = margin


class InfeasibleError(ImplicitDLError, ValueError):
    """Programs of a batch have no solution: `.instances` says which, `.certificate` proves it."""

    def __init__(self, message: str, certificate: Tensor | None = None, instances: Any = None):
        super().__init__(message)
        self.certificate = certificate
        self.instances = instances


class ConversionError(ImplicitDLError, TypeError):
    """A network, or a part of it, is not of the form of an implicit model; see `.module_path`."""

    def __init__(self, message: str, module_path: str = ""):
        super().__init__(message)
        self.module_path = module_path


class ConvergenceWarning(UserWarning):
    """Shown instead of the error where the caller asked for `on_failure="warn"`."""


def unknown_name(what: str, got: object, valid: Iterable[str]) -> ValueError:
    """The error for a name that is not in a list, with the nearest one that is.

    Args:
        what: the argument's name.
        got: what was passed.
        valid: the names that would have been accepted.
    """
    valid = sorted(valid)
    near = difflib.get_close_matches(str(got), valid, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{what}: got {got!r}, expected one of {', '.join(map(repr, valid))}.{hint}")


def listed(values: Iterable[object]) -> str:
    """Up to eight of them with commas, and dots where there are more."""
    every = list(values)
    return ", ".join(map(str, every[:8])) + (", ..." if len(every) > 8 else "")


def _outside() -> int:
    """The stack level of the first caller that is not in this package, seen from a caller."""
    frame, level = sys._getframe(1), 1
    package = __name__.partition(".")[0]
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    return level


_ON_FAILURE = ("raise", "warn", "return")


def check_on_failure(on_failure: str) -> None:
    """Refuse anything but the three ways to treat a failed solve."""
    if on_failure not in _ON_FAILURE:
        raise unknown_name("on_failure", on_failure, _ON_FAILURE)


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of a solve, one entry a sample.

    Attributes:
        value: the best iterate found; for a failed sample still the best, never an average with
            NaN.  # (*batch, n)
        codes: outcome of each sample, an index into `list(Status)`.  # (*batch,)
        residual: ||f(x) - x|| / (atol + rtol ||f(x)||) in the root-mean-square norm, which does
            not grow with dimension; under 1 means converged, infinite where nothing finite was
            seen.  # (*batch,)
        steps: evaluations of f that each sample took part in while unfinished.  # (*batch,)
        error_bound: a-posteriori bound on the distance to the exact equilibrium, rounding included,
            in the norm that the well-posedness certificate names; infinite for a sample without a
            finite value; None where none is certified.  # (*batch,)
        image: f(value), where the solver still has it; a constant.  # (*batch, n)
        stats: what the solver has to say: `solver`, `reason`, `evaluations`, `trajectory`.
    """

    value: Tensor
    codes: Tensor
    residual: Tensor
    steps: Tensor
    error_bound: Tensor | None = None
    image: Tensor | None = None
    stats: Mapping[str, Any] = field(default_factory=dict)

    @property
    def converged(self) -> Tensor:
        """Which samples reached the tolerance.  # (*batch,) bool"""
        return self.codes == Status.CONVERGED.code

    @property
    def status(self) -> Status:
        """The worst outcome in the batch; an empty batch has converged."""
        return _BY_CODE[int(self.codes.max())] if self.codes.numel() else Status.CONVERGED

    @property
    def statuses(self) -> list[Status]:
        """The outcome of each sample, the batch flattened."""
        return [_BY_CODE[code] for code in self.codes.flatten().tolist()]

    def check(self, on_failure: str = "raise") -> "Solution":
        """Return self if every sample converged; else raise, warn, or return anyway.

        Args:
            on_failure: `"raise"` (ConvergenceError holding this solution), `"warn"`, `"return"`.

        Raises:
            ConvergenceError: a sample failed; the message names the samples by index.
            ValueError: `on_failure` is none of the three.
        """
        check_on_failure(on_failure)
        if on_failure == "return" or self.status is Status.CONVERGED:
            return self
        message = self._failure()
        if on_failure == "raise":
            raise ConvergenceError(message, replace(self, value=self.value.detach()))
        warnings.warn(message, ConvergenceWarning, stacklevel=_outside())
        return self

    def _failure(self) -> str:
        """Which samples failed, how far they got, and what to do, in one paragraph."""
        codes = self.codes.flatten()
        bad = torch.nonzero(codes != Status.CONVERGED.code).flatten()
        shown = listed(bad.tolist())
        worst = float(
            self.residual.flatten()[bad].nan_to_num(nan=torch.inf, posinf=torch.inf).max()
        )
        advice = " ".join(_BY_CODE[c].value for c in sorted(set(codes[bad].tolist())))
        return (
            f"{bad.numel()} of {codes.numel()} samples did not converge (index {shown}) within "
            f"{int(self.steps.max())} steps: worst scaled residual {worst:.2g}, expected below 1. "
            f"{advice}"
        )
