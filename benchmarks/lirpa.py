"""Bounds by auto_LiRPA 0.3, in an environment of its own, for `certify.py --lirpa PYTHON`.

PyPI's 0.3 wants numpy below 2 and names that torch has dropped since; the two are put back here:

    python -m venv ENV && ENV/bin/pip install torch==2.13.0 "numpy<2"
    ENV/bin/pip install --no-deps auto_LiRPA==0.3 appdirs packaging pyyaml tqdm graphviz sortedcontainers

    ENV/bin/python benchmarks/lirpa.py IN.npz OUT.npz

IN has weights w0, b0, w1, ... of a ReLU network, inputs u and a radius; OUT the bounds by interval and
crown and the seconds of each call after the first.
"""

import sys
import time
import warnings

import numpy as np
import torch
import torch.onnx.symbolic_helper as helper
from torch import nn

warnings.simplefilter("ignore")
helper._set_opset_version = lambda version: None
torch._C.Node.__getitem__ = lambda node, key: getattr(node, node.kindOf(key))(key)

from auto_LiRPA import BoundedModule, BoundedTensor
from auto_LiRPA.perturbations import PerturbationLpNorm


def main(source: str, target: str) -> None:
    """Bound and time."""
    torch.set_num_threads(1)
    data = np.load(source)
    layers: list[nn.Module] = []
    for k in range(sum(name.startswith("w") for name in data.files)):
        w, b = torch.tensor(data[f"w{k}"]), torch.tensor(data[f"b{k}"])
        layer = nn.Linear(w.shape[1], w.shape[0], dtype=w.dtype)
        layer.weight.data, layer.bias.data = w, b
        layers += [layer, nn.ReLU()]
    net, u = nn.Sequential(*layers[:-1]), torch.tensor(data["u"])
    bounded = BoundedModule(net, torch.empty_like(u))
    ball = PerturbationLpNorm(norm=np.inf, eps=float(data["radius"]))
    out = {}
    for name, method in (("interval", "IBP"), ("crown", "backward")):
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            with torch.no_grad():
                low, high = bounded.compute_bounds(x=(BoundedTensor(u, ball),), method=method)
            seconds.append(time.perf_counter() - start)
        out |= {f"{name} low": low.numpy(), f"{name} high": high.numpy(), name: seconds[1:]}
    np.savez(target, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
