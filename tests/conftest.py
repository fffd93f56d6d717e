"""The same ground under every test: float64, fixed seeds, one thread, no display."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# The tensors of the tests are small: a second thread only waits for the first.
torch.set_num_threads(1)
# Also for the tensors that parametrize lists make while tests are collected.
torch.set_default_dtype(torch.float64)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seeds and global torch settings before each test, and again after one that changed them."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    threads = torch.get_num_threads()
    yield
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(threads)


@pytest.fixture
def float32() -> Iterator[None]:
    """The default dtype that a user has, for tests of what a user types and sees."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def pytest_configure(config: pytest.Config) -> None:
    """A helper module's asserts are worth the same report as a test's."""
    for module in ("problems", "conformance"):
        pytest.register_assert_rewrite(module)
