"""The citizenship table of the README: what it says of our layers is checked here."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from adapters import ADAPTERS, OURS
from citizenship import CHECKS

# An arbitrary closure cannot be seen into: there the call raises, with the reason.
REFUSED = (
    "forward mode",
    "vmap over inputs",
    "vmap over parameters",
    "jacrev",
    "per-sample",
    "torch.compile",
    "torch.export",
)


@pytest.fixture(autouse=True)
def float32_by_default():
    """As the processes that a check starts have it."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "title"),
    [
        pytest.param(
            name,
            title,
            # Two processes that import everything: one layer of the three stands for all.
            marks=[pytest.mark.slow] * (title.startswith("Distributed") and name != OURS[0]),
        )
        for name in OURS
        for title in CHECKS
    ],
)
def test_the_table_is_true(name, title):
    if name == "EquilibriumLayer" and title.startswith(REFUSED):
        with pytest.raises(Exception, match="EquilibriumLayer|closure|Observed exception"):
            CHECKS[title](ADAPTERS[name])
        return
    ok, note = CHECKS[title](ADAPTERS[name])
    assert ok, f"{name}, {title}: {note}"
