"""What README.md says of measurements is what the results say."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import convert
import readme


def test_the_tables_of_the_readme_are_those_of_the_results():
    text = (readme.ROOT / "README.md").read_text()
    assert readme.filled(text) == text, "run python benchmarks/readme.py"
    for name in readme.SECTIONS:
        assert f"<!-- {name} -->\n\n<!-- end" not in text


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="expected the marks"):
        readme.filled("nothing")


@pytest.mark.parametrize("name", ["MLP", "LeNet"])
def test_a_converted_network_is_as_exact_as_the_benchmark_asks(name):
    for what, off in convert.accuracy(name).items():
        assert off <= convert.TARGETS[what]


def test_the_dense_iteration_computes_the_network():
    net, u = convert.NETWORKS["MLP"].build(3, torch.float64)
    picard = convert.Picard(convert.to_implicit(net, u).dense())
    torch.testing.assert_close(picard(u), net(u))
    assert picard.products == 3  # a layer a product, and one that finds nothing to change


def test_a_missed_target_is_reported():
    cell = {"network": "MLP", "batch": 64, "mode": "forward", "ratio": 1.21}
    space = {"network": "MLP", "ratio": float("nan")}
    exact = {"MLP": {"outputs": 1e-13, "gradients": 1e-9}}
    assert convert.missed([cell, cell | {"batch": 1}], exact, [space]) == [
        "MLP, batch 64, forward, time: 1.21, target 1.2",
        "MLP, gradients: 1e-09, target 1e-10",
        "MLP, peak memory: nan, target 1.5",
    ]
