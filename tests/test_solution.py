"""What a solve returns, and how it fails."""

import dataclasses
import pickle

import pytest
import torch

from implicitdl.solution import (
    ConvergenceError,
    ConvergenceWarning,
    ImplicitDLError,
    NotWellPosedError,
    Solution,
    Status,
    check_on_failure,
    unknown_name,
)


def solution(*statuses, shape=None):
    codes = torch.tensor([s.code for s in statuses], dtype=torch.long)
    residual = torch.where(codes == 0, 0.5, 40.0)
    shape = shape or codes.shape
    return Solution(
        value=torch.randn(*shape, 2, requires_grad=True) * 1,
        codes=codes.view(shape),
        residual=residual.view(shape),
        steps=torch.full(shape, 9),
    )


def test_status_codes_are_positions_from_best_to_worst():
    assert [s.code for s in Status] == [0, 1, 2, 3, 4]
    assert list(Status)[0] is Status.CONVERGED
    assert all(len(s.value) > 20 for s in Status if s is not Status.CONVERGED)


def test_the_worst_sample_speaks_for_the_batch():
    mixed = solution(Status.CONVERGED, Status.MAX_STEPS, Status.STALLED, Status.CONVERGED)
    assert mixed.status is Status.MAX_STEPS
    assert mixed.converged.tolist() == [True, False, False, True]
    assert mixed.statuses[1:3] == [Status.MAX_STEPS, Status.STALLED]
    assert solution().status is Status.CONVERGED
    square = solution(*[Status.CONVERGED] * 3, Status.DIVERGED, shape=(2, 2))
    assert square.status is Status.DIVERGED and square.statuses[3] is Status.DIVERGED


def test_check_returns_self_or_raises_with_everything_in_it():
    good = solution(Status.CONVERGED, Status.CONVERGED)
    for how in ("raise", "warn", "return"):
        assert good.check(how) is good
    bad = solution(Status.CONVERGED, Status.MAX_STEPS, Status.NONFINITE)
    assert bad.check("return") is bad
    with pytest.raises(ConvergenceError) as caught:
        bad.check()
    message = str(caught.value)
    assert "2 of 3" in message and "1, 2" in message and "within 9 steps" in message
    assert "residual 40, expected below 1" in message
    assert Status.MAX_STEPS.value in message and Status.NONFINITE.value in message
    assert Status.DIVERGED.value not in message
    assert torch.equal(caught.value.solution.value, bad.value)
    assert not caught.value.solution.value.requires_grad  # no graph is kept alive by an error
    with pytest.warns(ConvergenceWarning, match="2 of 3"):
        assert bad.check("warn") is bad


def test_a_nan_residual_is_reported_as_infinite_and_long_lists_are_cut():
    bad = solution(*[Status.NONFINITE] * 12)
    bad = dataclasses.replace(bad, residual=torch.full((12,), torch.nan))
    with pytest.raises(ConvergenceError, match=r"index 0, 1, 2, 3, 4, 5, 6, 7, \.\.\..*inf"):
        bad.check()


def test_error_family():
    for error in (ConvergenceError, NotWellPosedError):
        assert issubclass(error, ImplicitDLError)
    assert issubclass(ConvergenceError, RuntimeError) and issubclass(NotWellPosedError, ValueError)
    assert NotWellPosedError("x", margin=-0.5).margin == -0.5
    assert ConvergenceError("x").solution is None


def test_unknown_names():
    error = unknown_name("colour", "bleu", ["blue", "red"])
    assert str(error) == "colour: got 'bleu', expected one of 'blue', 'red'. Did you mean 'blue'?"
    assert "Did you mean" not in str(unknown_name("colour", "zzz", ["blue", "red"]))
    for how in ("raise", "warn", "return"):
        check_on_failure(how)
    with pytest.raises(ValueError, match="on_failure: got 'rise'.*Did you mean 'raise'"):
        check_on_failure("rise")
    with pytest.raises(ValueError, match="on_failure"):
        solution(Status.CONVERGED).check("ignore")


def test_solutions_are_frozen_and_travel():
    good = solution(Status.CONVERGED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        good.value = None
    good = dataclasses.replace(good, value=good.value.detach())
    assert torch.equal(pickle.loads(pickle.dumps(good)).value, good.value)
