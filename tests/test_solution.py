"""What a solve returns: outcomes, errors, and the words that a user reads."""

import pickle

import pytest
import torch

from implicitdl import ConvergenceError, ImplicitDLError, NotWellPosedError, Solution, Status
from implicitdl.solution import ConvergenceWarning, check_on_failure, unknown_name


def solution(*statuses, residual=None, value=None):
    m = len(statuses)
    return Solution(
        value=torch.zeros(m, 2) if value is None else value,
        codes=torch.tensor([s.code for s in statuses], dtype=torch.long),
        residual=torch.full((m,), 0.5) if residual is None else torch.tensor(residual),
        steps=torch.arange(m) + 3,
    )


GOOD, LIMIT, NAN = Status.CONVERGED, Status.MAX_STEPS, Status.NONFINITE


def test_statuses_go_from_best_to_worst():
    assert [s.code for s in Status] == list(range(len(Status)))
    assert list(Status) == [
        GOOD, Status.STALLED, LIMIT, Status.DIVERGED, Status.INFEASIBLE, Status.UNBOUNDED, NAN,
    ]  # fmt: skip


def test_what_is_derived_from_the_codes():
    s = solution(GOOD, NAN, LIMIT)
    assert s.converged.tolist() == [True, False, False]
    assert s.status is NAN and s.statuses == [GOOD, NAN, LIMIT]
    assert solution(GOOD, GOOD).status is GOOD
    empty = solution()
    assert empty.status is GOOD and empty.statuses == [] and empty.check() is empty


@pytest.mark.parametrize("on_failure", ["raise", "warn", "return"])
def test_success_passes_through(on_failure):
    s = solution(GOOD, GOOD)
    assert s.check(on_failure) is s


def test_a_failure_raises_with_everything_in_it():
    value = torch.zeros(12, 2, requires_grad=True) * 1
    statuses = [GOOD, LIMIT, GOOD, NAN, *[LIMIT] * 8]
    residual = [0.5, 3.0, 0.1, torch.inf, *[7.0] * 8]
    s = solution(*statuses, residual=residual, value=value)
    with pytest.raises(ConvergenceError) as caught:
        s.check()
    error = caught.value
    assert isinstance(error, RuntimeError) and isinstance(error, ImplicitDLError)
    assert error.solution.statuses == statuses and not error.solution.value.requires_grad
    text = str(error)
    assert "10 of 12 samples" in text and "index 1, 3, 4, 5, 6, 7, 8, 9, ..." in text
    assert "within 14 steps" in text and "inf, expected below 1" in text
    assert LIMIT.value in text and NAN.value in text and Status.DIVERGED.value not in text
    assert "below 1. " + LIMIT.value in text  # the advice of those that failed, worst last


def test_the_worst_residual_is_that_of_the_failed():
    with pytest.raises(ConvergenceError, match=r"residual 4\.2, expected") as caught:
        solution(GOOD, LIMIT, LIMIT, residual=[0.9, 4.2, 2.0]).check()
    assert "(index 1, 2)" in str(caught.value)
    with pytest.raises(ConvergenceError, match="residual inf"):
        solution(LIMIT, residual=[torch.nan]).check()


def test_batched_shapes_are_flattened_in_the_message():
    s = solution(GOOD, GOOD, LIMIT, GOOD)
    s = Solution(
        s.value.view(2, 2, 2), s.codes.view(2, 2), s.residual.view(2, 2), s.steps.view(2, 2)
    )
    with pytest.raises(ConvergenceError, match="1 of 4 samples .*index 2"):
        s.check()
    assert s.statuses[2] is LIMIT and s.converged.shape == (2, 2)


def test_warn_and_return():
    s = solution(GOOD, LIMIT, residual=[0.5, 9.0])
    with pytest.warns(ConvergenceWarning, match="1 of 2 samples .*residual 9"):
        assert s.check("warn") is s
    assert s.check("return") is s
    with pytest.raises(ValueError, match="Did you mean 'raise'"):
        s.check("raises")
    with pytest.raises(ValueError, match="on_failure: got 'ignore'"):
        solution(GOOD).check("ignore")  # also where there is nothing to complain of
    for name in ("raise", "warn", "return"):
        check_on_failure(name)


def test_unknown_names():
    error = unknown_name("flavour", "vanila", ["vanilla", "lemon"])
    assert isinstance(error, ValueError)
    assert str(error) == (
        "flavour: got 'vanila', expected one of 'lemon', 'vanilla'. Did you mean 'vanilla'?"
    )
    assert "Did you mean" not in str(unknown_name("flavour", "zzz", ["vanilla", "lemon"]))
    assert "got 3," in str(unknown_name("flavour", 3, ["a"]))


def test_errors_say_what_they_are():
    error = NotWellPosedError("no", margin=-0.5)
    assert error.margin == -0.5 and isinstance(error, ValueError | ImplicitDLError)
    assert issubclass(NotWellPosedError, ImplicitDLError) and issubclass(
        NotWellPosedError, ValueError
    )
    assert ConvergenceError("no").solution is None


def test_solutions_are_frozen_and_pickle():
    s = solution(GOOD, LIMIT)
    with pytest.raises(AttributeError):
        s.codes = None
    again = pickle.loads(pickle.dumps(s))
    assert again.statuses == s.statuses and torch.equal(again.steps, s.steps)


def test_a_warning_points_at_the_callers_line():
    from implicitdl import ImplicitLayer
    from implicitdl.solvers import Picard

    layer = ImplicitLayer(2, 1, 3, solver=Picard(max_steps=1))
    with pytest.warns(ConvergenceWarning) as caught:
        layer.solve(torch.ones(1, 2), on_failure="warn")
    assert caught[0].filename == __file__


def test_solutions_are_not_compared_by_tensors():
    a, b = (Solution(*(torch.zeros(3) for _ in range(4))) for _ in range(2))
    assert a != b and len({a, b}) == 2
