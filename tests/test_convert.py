# ruff: noqa: PLC3002, S102 - programs in a line, and the recipe of an error message
"""Networks as implicit models: the same outputs, the same gradients, the same parameters."""

import collections
import copy
import json
import math
import pickle
import re
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from networks import (
    DenseNet,
    Fn,
    Inception,
    PreActivation,
    RandomNet,
    ResNet,
    RNNLoop,
    UNet,
    lenet,
    mlp,
    randomised,
    vgg,
)
from problems import randn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import implicitdl
from implicitdl import (
    ConversionError,
    ImplicitLayer,
    ImplicitModel,
    ImplicitRNN,
    MonotoneLayer,
    convert,
    stack,
    to_implicit,
)
from implicitdl.activations import Activation, ReLU, Tanh
from implicitdl.convert import registry
from implicitdl.model import evaluate
from implicitdl.operators import Dense
from implicitdl.solvers import Auto

TIGHT = Auto(rtol=1e-14, atol=1e-15)
SCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


# ---- helpers ---------------------------------------------------------------------------------------


def snapshot(net: nn.Module) -> dict:
    """What a module is made of: attributes, and every tensor with its version."""
    found: dict = {}
    for path, part in net.named_modules():
        found[path] = {name: id(value) for name, value in vars(part).items()}
    for path, t in [*net.named_parameters(), *net.named_buffers()]:
        found[path, "tensor"] = (id(t), t._version, t.requires_grad)
    return found


def close(a: Tensor, b: Tensor, allowed: float) -> None:
    """Of one shape and dtype, finite, and equal to `allowed` times the largest entry or 1."""
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape and a.dtype == b.dtype
    assert bool(b.isfinite().all())
    if b.numel():
        assert float((a - b).abs().max()) <= allowed * max(1.0, float(b.abs().max()))


def agree(f, g, v: Tensor, at=(), allowed: float = 1e-12, gradients: float = 1e-10) -> None:
    """f(v) = g(v), and so are the gradients of a random functional at v and at these tensors."""
    v = v.detach().clone().requires_grad_()
    got, expected = f(v), g(v.clone())  # which g may overwrite
    close(got, expected, allowed)
    w = randn(*expected.shape, seed=78).to(expected.dtype)
    pairs = [
        torch.autograd.grad((w * y).sum(), [v, *at], allow_unused=True) for y in (got, expected)
    ]
    for a, b in zip(*pairs, strict=True):
        if a is not None or b is not None:
            zero = torch.zeros_like(a if b is None else b)
            close(zero if a is None else a, zero if b is None else b, gradients)


def others(net: nn.Module, *shape: int, batch: int = 3) -> Tensor:
    """Inputs that the network was not converted with, nor with as many samples."""
    kind = next((p.dtype for p in net.parameters()), torch.get_default_dtype())
    return randn(batch, *shape, seed=5).to(kind)


def exact(
    net: nn.Module, *shape: int, scale: float = 1.0, gradients: float = 1e-10
) -> ImplicitModel:
    """The network converted at two samples; it computes the same at three others."""
    net = randomised(net)
    before = snapshot(net)
    model = to_implicit(net, scale * randn(2, *shape))
    assert snapshot(net) == before
    agree(model, net, scale * others(net, *shape), list(net.parameters()), gradients=gradients)
    assert model.inputs == math.prod(shape)
    return model


def cases(table: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


def conv_net(*layers: nn.Module) -> nn.Module:
    """For (1, 4, 4), (batch, 3) out."""
    return randomised(nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), *(layers or (nn.ReLU(),)),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3),
    ))  # fmt: skip


# ---- exactness: activations ------------------------------------------------------------------------

ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(), nn.LeakyReLU(0.3, inplace=True), nn.ELU(),
    nn.ELU(0.5, inplace=True), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Softplus(beta=2.0),
    nn.Softplus(beta=0.5, threshold=1.0), nn.Softplus(beta=3.0, threshold=2.0), nn.Hardtanh(),
    nn.Hardtanh(-0.3, 1.7, inplace=True), nn.ReLU6(), nn.ReLU6(inplace=True), nn.SiLU(),
    nn.SiLU(inplace=True), nn.GELU(), nn.Softshrink(), nn.Softshrink(0.2), nn.Softmax(-1),
    nn.Softmax(1), nn.PReLU(), nn.PReLU(6), nn.SELU(), nn.CELU(0.7), nn.Hardsigmoid(),
    nn.LogSigmoid(), nn.Tanhshrink(), nn.Identity(),
]  # fmt: skip


@pytest.mark.parametrize("phi", ACTIVATIONS, ids=repr)
def test_activations(phi):
    single = isinstance(
        phi, nn.CELU | nn.Hardsigmoid
    )  # whose backward has float32 constants in torch
    net = mlp(phi, copy.deepcopy(phi))
    exact(net, 3, scale=5.0, gradients=1e-7 if single else 1e-10)  # beyond thresholds and bounds


@pytest.mark.parametrize("phi", [
    nn.Softmax(1), nn.Softmax(-1), nn.Softmax(2), nn.Softmax2d(), nn.PReLU(3), nn.PReLU(), nn.Tanh(),
    nn.Softplus(2.0),
], ids=repr)  # fmt: skip
def test_activations_of_images(phi):
    net = nn.Sequential(nn.Conv2d(2, 3, 2), phi, nn.Conv2d(3, 2, 2))
    exact(net, 2, 5, 4, scale=3.0)


def test_softplus_is_linear_beyond_its_threshold():
    """There torch returns its argument, and the model the same."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Softplus(beta=2.0, threshold=4.0))
    model = to_implicit(net, randn(1, 1))
    u = torch.linspace(-60, 60, 1001)[:, None]
    assert torch.allclose(model(u), net(u), rtol=0, atol=1e-14)
    beyond = 2 * net[0](u) > 4.0
    assert bool(beyond.any()) and torch.equal(model(u)[beyond], net[0](u)[beyond])


# ---- exactness: architectures ----------------------------------------------------------------------

NETWORKS = {
    "lenet": (lenet, (1, 16, 16)),
    "vgg": (lambda: vgg(4, "M", 6, 6, "M", 8, "M"), (3, 16, 16)),
    "resnet": (lambda: ResNet(4), (3, 32, 32)),
    "preactivation": (PreActivation, (3, 8, 8)),
    "unet transposed": (lambda: UNet("transposed"), (2, 8, 8)),
    "unet nearest": (lambda: UNet("nearest"), (2, 8, 8)),
    "unet bilinear": (lambda: UNet("bilinear"), (2, 8, 8)),
    "unet corners": (lambda: UNet("corners"), (2, 8, 8)),
    "inception": (Inception, (3, 8, 8)),
    "densenet": (DenseNet, (3, 8, 8)),
    "one linear": (lambda: nn.Linear(3, 4), (3,)),
    "one activation": (nn.ReLU, (3,)),
    "nothing": (nn.Identity, (2, 3)),
    "a matrix of features": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3)),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.ReLU(), nn.Dropout1d()), (3,)),
    "module dict": (lambda: nn.ModuleDict({"a": nn.Linear(3, 2)})["a"], (3,)),
}  # fmt: skip


@cases(NETWORKS)
def test_networks(case):
    make, shape = case
    assert not exact(make(), *shape).structure.loops


@pytest.mark.slow
def test_a_resnet_18_of_full_width():
    exact(ResNet(64), 3, 32, 32)


# ---- exactness: layers -----------------------------------------------------------------------------

LAYERS = {
    "conv1d": (nn.Conv1d(2, 3, 3, stride=2, padding=2), (2, 7)),
    "conv2d": (nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 5, 6)),
    "conv3d": (nn.Conv3d(2, 2, 2, padding=1), (2, 3, 3, 4)),
    "dilated": (nn.Conv2d(2, 3, 3, dilation=2, padding=2), (2, 5, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "depthwise": (nn.Conv2d(3, 6, 3, groups=3, padding="same", bias=False), (3, 5, 5)),
    "valid": (nn.Conv1d(2, 2, 2, padding="valid"), (2, 5)),
    **{f"{mode} {k}d": (getattr(nn, f"Conv{k}d")(2, 2, 3, padding=1, padding_mode=mode), (2, *(4,) * k))
       for mode in ("reflect", "circular", "replicate") for k in (1, 2)},
    "circular 3d": (nn.Conv3d(1, 1, 3, padding=(1, 0, 2), padding_mode="circular"), (1, 4, 4, 4)),
    "reflect, uneven": (nn.Conv2d(1, 2, 3, padding=(2, 1), padding_mode="reflect"), (1, 4, 5)),
    "reflect same": (nn.Conv2d(1, 2, 5, padding="same", padding_mode="reflect"), (1, 5, 4)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)),
    "transposed 2d": (nn.ConvTranspose2d(4, 2, 3, stride=(2, 1), groups=2, dilation=2), (4, 3, 4)),
    "transposed 3d": (nn.ConvTranspose3d(2, 1, 2, stride=2, bias=False), (2, 2, 3, 2)),
    "norm 1d": (nn.BatchNorm1d(4), (4,)),
    "norm 1d of signals": (nn.BatchNorm1d(4, eps=0.1), (4, 3)),
    "norm 2d": (nn.BatchNorm2d(3, affine=False), (3, 2, 2)),
    "norm 3d": (nn.BatchNorm3d(2), (2, 2, 3, 2)),
    "norm of one channel": (nn.BatchNorm2d(1), (1, 3, 2)),
    "average 1d": (nn.AvgPool1d(3, 2, 1, ceil_mode=True), (2, 8)),
    "average 2d": (nn.AvgPool2d((2, 3), 2, (1, 1), ceil_mode=True, count_include_pad=False), (2, 5, 6)),
    "average 2d, padding counted": (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 6, 6)),
    "average 2d, divisor": (nn.AvgPool2d(2, divisor_override=3), (2, 5, 5)),
    "average 3d": (nn.AvgPool3d(2, 1, 1), (1, 3, 3, 4)),
    "adaptive average 1d": (nn.AdaptiveAvgPool1d(3), (2, 7)),
    "adaptive average 2d": (nn.AdaptiveAvgPool2d((None, 3)), (2, 4, 7)),
    "adaptive average 3d": (nn.AdaptiveAvgPool3d((2, None, 1)), (1, 3, 3, 4)),
    "max 1d": (nn.MaxPool1d(3, 2, 1, ceil_mode=True), (2, 8)),
    "max 2d": (nn.MaxPool2d((2, 3), (2, 1), (1, 1), dilation=(1, 2)), (2, 5, 6)),
    "max 2d, ceiling": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 6, 6)),
    "max 2d, more out than in": (nn.MaxPool2d(2, 1, 1), (2, 3, 3)),
    "max 3d": (nn.MaxPool3d(2, 1), (1, 3, 3, 4)),
    "adaptive max 1d": (nn.AdaptiveMaxPool1d(4), (2, 8)),
    "adaptive max 2d": (nn.AdaptiveMaxPool2d((2, None)), (2, 4, 6)),
    "adaptive max 3d": (nn.AdaptiveMaxPool3d(1), (2, 3, 2, 3)),
    "upsample 1d": (nn.Upsample(scale_factor=2, mode="linear"), (2, 4)),
    "upsample nearest": (nn.Upsample(size=(7, 5)), (2, 4, 3)),
    "upsample by 1.5": (nn.Upsample(scale_factor=1.5, mode="bilinear"), (2, 4, 6)),
    "upsample corners": (nn.UpsamplingBilinear2d(scale_factor=2), (1, 3, 4)),
    "upsample 3d": (nn.Upsample(scale_factor=(1, 2, 2), mode="trilinear"), (1, 2, 2, 3)),
    "pixel shuffle": (nn.PixelShuffle(2), (8, 2, 3)),
    "pixel unshuffle": (nn.PixelUnshuffle(2), (2, 4, 6)),
    "zero pad": (nn.ZeroPad2d((1, 0, 2, 1)), (2, 3, 3)),
    "constant pad": (nn.ConstantPad2d((1, 0, 2, -1), -0.7), (2, 3, 3)),
    "reflection pad": (nn.ReflectionPad2d((1, 2, 0, 1)), (2, 3, 3)),
    "replication pad": (nn.ReplicationPad3d(1), (1, 2, 2, 3)),
    "circular pad": (nn.CircularPad1d((2, 1)), (2, 3)),
    "flatten": (nn.Flatten(2), (2, 3, 4)),
    "unflatten": (nn.Unflatten(1, (2, 3)), (6, 2)),
}  # fmt: skip


@cases(LAYERS)
def test_layers(case):
    """Alone, and between two layers of states."""
    layer, shape = case
    exact(layer, *shape)
    image = randomised(layer)(randn(1, *shape))[0].numel()
    exact(nn.Sequential(Fn(lambda self, x: torch.tanh(x * self.s + 0.1), s=randn(*shape, seed=3)),
                        layer, nn.LeakyReLU(), nn.Flatten(), nn.Linear(image, 2)), *shape)  # fmt: skip


# ---- exactness: functions and methods --------------------------------------------------------------

X = (3, 4)  # the sample that these are given
FUNCTIONS = {
    "x.view(x.size(0), -1)": lambda self, x: x.view(x.size(0), -1),
    "x.view(len(x), 2, 6)": lambda self, x: x.view(len(x), 2, 6),
    "x.reshape(-1, 6, 2)": lambda self, x: x.reshape(-1, 6, 2),
    "x.reshape((x.shape[0], 4, 3))": lambda self, x: x.reshape((x.shape[0], 4, 3)),
    "torch.reshape": lambda self, x: torch.reshape(x, (x.shape[0], -1)),
    "view_as": lambda self, x: x.view_as(x.mT.reshape(x.shape)),
    "reshape_as": lambda self, x: x.reshape_as(x.mT),
    "flatten": lambda self, x: torch.flatten(x, 1) + x.flatten(start_dim=-2),
    "unflatten": lambda self, x: x.unflatten(-1, (2, -1)),
    "squeeze": lambda self, x: x.unsqueeze(1).unsqueeze(-1).squeeze(),
    "squeeze dims": lambda self, x: x[:, None, :, None].squeeze(-2).squeeze((1,)),
    "squeeze what is long": lambda self, x: x.squeeze(1),
    "unsqueeze": lambda self, x: torch.unsqueeze(x, -1),
    "permute": lambda self, x: x.permute(0, 2, 1) + torch.permute(x, (0, -1, 1)),
    "transpose": lambda self, x: x.transpose(1, 2) + x.transpose(-1, -2) + torch.transpose(x, 2, 1),
    "mT": lambda self, x: x.mT + x.swapaxes(1, -1),
    "movedim": lambda self, x: torch.movedim(x.unsqueeze(1), 3, 1),
    "expand": lambda self, x: x[:, :1].expand(-1, 5, 4),
    "expand one sample": lambda self, x: x[:, :, :1].expand(x.shape[0], -1, 2),
    "repeat": lambda self, x: x.repeat(1, 2, 3),
    "tile": lambda self, x: x.tile(1, 2, 1) + torch.tile(x, (1, 2, 1)),
    "x[:, -1]": lambda self, x: x[:, -1],
    "x[:, 1:3]": lambda self, x: x[:, 1:3],
    "x[..., ::2]": lambda self, x: x[..., ::2],
    "x[..., -1]": lambda self, x: x[..., -1],
    "x[:, :, -2:]": lambda self, x: x[:, :, -2:],
    "x[:, None, 0]": lambda self, x: x[:, None, 0],
    "x[:, -2:, ..., 0]": lambda self, x: x[:, -2:, ..., 0],
    "x[:, 0, None, 1:]": lambda self, x: x[:, 0, None, 1:],
    "x[:]": lambda self, x: x[:] + x[...],
    "narrow": lambda self, x: x.narrow(2, 1, 2) + torch.narrow(x, -1, 0, 2),
    "narrow from the end": lambda self, x: x.narrow(2, -2, 2),
    "select": lambda self, x: x.select(1, -1) + torch.select(x, -2, 0),
    "split": lambda self, x: torch.cat(x.split(3, dim=2)[::-1], 2),
    "split sizes": lambda self, x: torch.split(x, [1, 2], 1)[1],
    "split by name": lambda self, x: torch.split(x, split_size_or_sections=2, dim=1)[0],
    "chunk": lambda self, x: torch.cat(tuple(reversed(x.chunk(3, -1))), -1),
    "unpacked": lambda self, x: (lambda a, b: a - 2 * b)(*x.chunk(2, dim=2)),
    "unbind": lambda self, x: sum(k * t for k, t in enumerate(x.unbind(1), 1)),
    "stack": lambda self, x: torch.stack([x, 2 * x, x.relu()], dim=-1),
    "stack first": lambda self, x: torch.stack((x[:, 0], x[:, 2]), 1),
    "cat": lambda self, x: torch.cat((x, x.flip(1)), dim=-2),
    "concat": lambda self, x: torch.concat([x, x.relu()], 1),
    "cat of many": lambda self, x: torch.cat([x[:, i:i + 1] * (i + 1) for i in (2, 0, 1)], 1),
    "cat with a constant": lambda self, x: torch.cat([x, self.b.expand(x.shape[0], 1, 4)], 1),
    "flip": lambda self, x: x.flip(1, -1) + torch.flip(x, [2]),
    "roll": lambda self, x: x.roll(1, -1) + torch.roll(x, shifts=(1, -2), dims=(1, 2)),
    "pad zeros": lambda self, x: F.pad(x, (1, 2)),
    "pad many": lambda self, x: F.pad(x, [1, 0, 2, 1]),
    "pad and cut": lambda self, x: F.pad(x, (-1, 1, 0, -1)),
    "pad a value": lambda self, x: F.pad(x, (1, 2, 1, 0), "constant", -0.6),
    "pad reflect": lambda self, x: F.pad(x, (2, 1), mode="reflect"),
    "pad circular": lambda self, x: F.pad(x, (2, 1), mode="circular"),
    "pad replicate": lambda self, x: F.pad(x, (2, 1), mode="replicate"),
    "x + 1": lambda self, x: x + 1,
    "2 * x - 0.5": lambda self, x: 2 * x - 0.5,
    "1 - x / 3": lambda self, x: 1 - x / 3,
    "-x": lambda self, x: -x + torch.neg(x) / 2 + x.neg(),
    "x + b": lambda self, x: x + self.b,
    "b - s * x": lambda self, x: self.b - self.s * x,
    "x * row": lambda self, x: x * self.s[0] + self.b[0, 0],
    "x / s": lambda self, x: x / (1 + self.s**2),
    "broadcast to more": lambda self, x: x[:, :, :1] + self.s * x[:, :1, :1],
    "broadcast states": lambda self, x: x - x.mean(-1, keepdim=True) + x[:, 0, None],
    "add": lambda self, x: torch.add(x, self.b, alpha=2.0) + x.add(x.relu(), alpha=-0.5),
    "add by name": lambda self, x: torch.add(input=x, other=self.b),
    "sub": lambda self, x: torch.sub(x, x.relu(), alpha=0.3).sub(1.5),
    "rsub": lambda self, x: torch.rsub(x, self.b),
    "mul": lambda self, x: torch.mul(x, self.s).mul(0.5),
    "div": lambda self, x: torch.div(x, 4.0).div(1 + self.s.abs()),
    "a buffer of ones": lambda self, x: x + torch.ones(4),
    "positions": lambda self, x: torch.relu(x + torch.arange(4)) + torch.arange(3)[:, None],
    "one row a sample": lambda self, x: x + torch.full((x.shape[0], 1, 4), 0.3),
    "zeros like x": lambda self, x: torch.maximum(x, torch.zeros_like(x)),
    "new zeros": lambda self, x: x + x.new_ones(x.shape[0], 3, 4),
    "mean": lambda self, x: x.mean(-1) + torch.mean(x, 2),
    "mean of all": lambda self, x: x.mean((1, 2), keepdim=True),
    "mean by dim": lambda self, x: x.mean(dim=[-2, -1]),
    "sum": lambda self, x: x.sum(1) + torch.sum(x, dim=1),
    "matmul": lambda self, x: x @ self.W + torch.matmul(x, self.W),
    "matmul of rows": lambda self, x: torch.mm(x.flatten(1), self.V),
    "matrix times x": lambda self, x: self.M @ x,
    "linear": lambda self, x: F.linear(x, self.W.mT, self.W[0]),
    "a computed weight": lambda self, x: F.linear(x, torch.tanh(self.W.mT) * 2),
    "methods of activations": lambda self, x: x.relu() + x.tanh() + x.sigmoid() + x.softmax(-1),
    "functions of activations": lambda self, x: torch.relu(x) + F.elu(x, 0.3) + F.silu(x)
        + F.gelu(x) + torch.sigmoid(x) + F.leaky_relu(x, 0.2) + F.hardtanh(x, -0.2, 0.3),
    "more of them": lambda self, x: F.relu6(4 * x) + F.softplus(x, 2.0) + F.softshrink(x)
        + torch.softmax(x, 1) + F.selu(x) + F.logsigmoid(x),
    "clamp": lambda self, x: x.clamp(-0.3, 0.4) + torch.clamp(x, min=0.2) + x.clip(max=0.1),
    "abs": lambda self, x: x.abs() + torch.abs(x - 0.2),
    "maximum": lambda self, x: torch.maximum(x, self.b) + torch.minimum(x.flip(1), 2 * x),
    "max of two": lambda self, x: torch.max(x, x.flip(-1)) - torch.min(x, self.b),
    "dropout": lambda self, x: F.dropout(x, 0.4, self.training),
    "clone": lambda self, x: x.clone().contiguous(),
    "a cast to its own dtype": lambda self, x: x.to(self.W.dtype).double(),
    "pooling": lambda self, x: F.max_pool1d(x, 2) + F.avg_pool1d(x, 2),
    "adaptive": lambda self, x: F.adaptive_avg_pool1d(x, 2) + F.adaptive_max_pool1d(x, 2),
    "interpolate": lambda self, x: F.interpolate(x, scale_factor=2.0) + F.interpolate(x, 8, mode="linear"),
    "area": lambda self, x: F.interpolate(x, size=2, mode="area"),
    "conv": lambda self, x: F.conv1d(x, self.K, self.s[0, :2], padding=1),
    "conv transposed": lambda self, x: F.conv_transpose1d(x, self.K.transpose(0, 1), stride=2),
    "norm": lambda self, x: F.batch_norm(
        x, torch.ones(3), torch.full((3,), 0.7), self.s[:, 0], self.s[:, 1], eps=0.3),
    "test of a shape": lambda self, x: x if x.shape[1] == 3 and x.dim() == 3 else -x,
    "sizes": lambda self, x: x * x.size(1) + x.ndim - x.numel() / x.shape[0],
}  # fmt: skip


@cases(FUNCTIONS)
def test_functions(case):
    """On the input; on states that more is done to; and with what reads states after it."""
    parts = {
        "b": randn(1, 1, 4, seed=1), "s": randn(3, 4, seed=2), "W": randn(4, 5, seed=3),
        "V": randn(12, 2, seed=4), "K": randn(2, 3, 3, seed=5), "M": randn(2, 3, seed=6),
    }  # fmt: skip
    exact(Fn(case, **parts), *X)
    before = Fn(
        lambda self, x: torch.tanh(x * self.s + self.b), s=parts["s"], b=randn(3, 1, seed=8)
    )
    exact(nn.Sequential(before, Fn(case, **parts)), *X)
    image = Fn(case, **parts).eval()(randn(2, *X))[0].numel()
    after = nn.Sequential(
        Fn(lambda self, x: x.reshape(x.shape[0], image)), nn.Linear(image, 3), nn.Sigmoid()
    )
    exact(nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), Fn(case, **parts), after), *X)


WIDTHS = {
    "conv": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 1, bias=False), Fn(lambda self, x: x + self.b, b=randn(4, seed=1))
    ),
    "conv with a bias": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 1), Fn(lambda self, x: x + self.b, b=randn(4, seed=1))
    ),
    "norm": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), Fn(lambda self, x: x + self.b, b=randn(4, seed=1))
    ),
    "scale": lambda: Fn(
        lambda self, x: self.s * x.repeat(1, 2, 1, 1) + self.b, s=randn(4, 1, 1), b=randn(4, seed=1)
    ),
    "square": lambda: Fn(
        lambda self, x: self.s * x[..., :2, :2].repeat(1, 2, 1, 1) + self.b,
        s=randn(4, 1, 1), b=randn(2, 2, seed=1),
    ),
}  # fmt: skip


@cases(WIDTHS)
def test_as_many_columns_as_channels(case):
    """A constant a column is none a channel, though it has as many numbers."""
    exact(case(), 2, 4, 4)


# ---- exactness: recurrent networks -----------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"nonlinearity": "tanh"}, {"nonlinearity": "relu"}, {"num_layers": 3}, {"bidirectional": True},
    {"bias": False}, {"num_layers": 2, "bidirectional": True, "nonlinearity": "relu", "bias": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("what", ["output", "last state", "last step", "both ways", "alone"])
def test_recurrent_networks(options, what):
    torch.manual_seed(0)
    rnn = nn.RNN(3, 4, batch_first=True, **options)
    read = {
        "output": lambda self, x: self.rnn(x)[0],
        "last state": lambda self, x: torch.relu(self.rnn(x)[1][-1]),
        "last step": lambda self, x: self.rnn(x)[0][:, -1],
        "both ways": lambda self, x: torch.cat([self.rnn(x)[1][0], self.rnn(x)[1][-1]], 1),
    }
    if what == "alone":  # torch returns a pair, the model the outputs
        model = to_implicit(rnn, randn(2, 20, 3))
        agree(model, lambda v: rnn(v)[0], randn(3, 20, 3, seed=5), list(rnn.parameters()))
    else:
        model = exact(Fn(read[what], rnn=rnn), 20, 3)
    assert not model.structure.loops


STARTS = {
    "from nothing": None,
    "from zeros": lambda x: torch.zeros(x.shape[0], 4),
    "from zeros of its kind": lambda x: torch.zeros(x.size(0), 4, dtype=x.dtype, device=x.device),
    "from new zeros": lambda x: x.new_zeros(x.shape[0], 4),
    "from one row": lambda x: torch.full((1, 4), 0.5),
}


@cases(STARTS)
def test_a_recurrent_network_by_hand(case):
    model = exact(RNNLoop(case), 6, 3)
    assert not model.structure.loops and len(model.structure.blocks) >= 6


def test_cells_of_torch_in_a_loop():
    def loop(self, x):
        h = self.cell(x[:, 0])
        for t in range(1, x.shape[1]):
            h = self.cell(x[:, t], h)
        return h

    exact(Fn(loop, cell=nn.RNNCell(3, 4)), 5, 3)


# ---- exactness: layers of this library -------------------------------------------------------------


@pytest.mark.parametrize("phi", ["relu", "tanh", "softmax"])
def test_implicit_layers_inside_a_network(phi):
    options = {"activation": phi, "solver": TIGHT}
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), ImplicitLayer(4, 5, 6, **options), nn.ReLU(),
        MonotoneLayer(5, 4, 5, bias=False, direct=False, **options), nn.Linear(4, 2),
    )  # fmt: skip
    model = exact(net, 3)
    assert len(model.structure.loops) == 2 and model.certificate().well_posed
    exact(net, 5, 3)  # on each of five rows alike


def test_an_implicit_layer_with_a_skip_and_an_image_before():
    net = Fn(
        lambda self, x: self.a(torch.relu(self.c(x)).flatten(1)) + x.flatten(1)[:, :3],
        c=nn.Conv2d(1, 2, 2), a=ImplicitLayer(8, 3, 5, low_rank=2, solver=TIGHT),
    )  # fmt: skip
    assert len(exact(net, 1, 3, 3).structure.loops) == 1
    exact(ImplicitLayer(3, 2, 4, solver=TIGHT), 3)


def test_an_implicit_rnn():
    rnn = ImplicitRNN(3, 2, 4, batch_first=True, solver=TIGHT)
    model = exact(Fn(lambda self, x: self.rnn(x)[0], rnn=rnn), 4, 3)
    assert len(model.structure.loops) == 4
    exact(Fn(lambda self, x: self.rnn(x)[1][-1].relu(), rnn=rnn), 4, 3)


# ---- exactness: modules that are used again, in place, parametrised ---------------------------------


def test_modules_that_are_used_again():
    def twice(self, x):
        x = self.a(x)
        for _ in range(3):
            x = self.phi(self.b(x)) + x
        return self.b(x)

    net = Fn(twice, a=nn.Linear(3, 4), b=nn.Linear(4, 4), phi=nn.Tanh())
    model = exact(net, 3)
    names = [block.name for block in model.structure.blocks]
    assert len(set(names)) == len(names)
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    tied[2].weight = tied[0].weight
    exact(tied, 3)


IN_PLACE = {
    "x += y": lambda self, x: (lambda h: operator_iadd(h, x))(self.a(x)),
    "x += 1": lambda self, x: operator_iadd(self.a(x), 1.0).relu(),
    "x *= 2": lambda self, x: operator_imul(self.a(x), 2.0) + x,
    "relu_": lambda self, x: torch.relu_(self.a(x)) + x,
    "add_": lambda self, x: self.a(x).add_(x).mul_(0.5).tanh_(),
    "inplace=True": lambda self, x: F.relu(self.a(x), inplace=True) + F.elu(self.b(x), inplace=True),
    "read before": lambda self, x: (lambda h: (h + 1, h.mul_(3.0))[0] + h)(self.a(x)),
    "the input": lambda self, x: (x.mul_(2.0), self.a(x))[1] + x,
    "a discarded result": lambda self, x: (lambda h: (h.add_(1.0), self.b(h))[1])(self.a(x)),
    "a view": lambda self, x: (lambda h: h.view(x.shape[0], 3, 1).mul_(2.0).squeeze(-1))(self.a(x)),
}  # fmt: skip


def operator_iadd(x, y):
    x += y
    return x


def operator_imul(x, y):
    x *= y
    return x


@cases(IN_PLACE)
def test_operations_in_place(case):
    exact(Fn(case, a=nn.Linear(3, 3), b=nn.Linear(3, 3)), 3)


ALIASED = {
    "a view": lambda self, x: (lambda h: (h.view(x.shape[0], 3, 1).relu_(), h)[1])(self.a(x)),
    "a slice": lambda self, x: (lambda h: (h[:, 1:].relu_(), self.b(h))[1])(self.a(x)),
    "a chunk": lambda self, x: (lambda h: (h.split([1, 2], 1)[1].clamp_(min=0.0), h)[1])(self.a(x)),
    "a transpose": lambda self, x: (lambda h: (h.unsqueeze(1).mT.relu_(), h)[1])(self.a(x)),
    "what dropout returns": lambda self, x: (
        lambda h: F.relu(self.drop(h), inplace=True) + self.b(h))(self.a(x)),
    "what contiguous returns": lambda self, x: (lambda h: h.contiguous().relu_() + h)(self.a(x)),
    "a chain": lambda self, x: x.mul_(2.0).add_(1.0) + x,
    "a view of the input": lambda self, x: (x.flatten(1).relu_(), self.a(x))[1],
    "its view is read": lambda self, x: (
        lambda h: (lambda v: (h.relu_(), v)[1])(h.unsqueeze(1)))(self.a(x)),
}  # fmt: skip


@cases(ALIASED)
def test_aliases_in_place_are_followed_or_refused(case):
    """Also where the example does not tell: all that is rectified there is positive."""
    net = Fn(case, a=nn.Linear(3, 3), b=nn.Linear(3, 3), drop=nn.Dropout()).eval()
    with torch.no_grad():  # autograd itself refuses some of these
        net.a.weight.copy_(torch.eye(3))
        net.a.bias.zero_()
    v = randn(3, 3)
    for u in (randn(2, 3, seed=3), randn(2, 3).abs()):
        try:
            model = to_implicit(net, u)
        except ConversionError as error:
            assert "in place" in str(error) or "in-place" in str(error)
        else:
            with torch.no_grad():
                close(model(v), net(v.clone()), 1e-12)


@pytest.mark.parametrize("how", ["weight", "spectral", "orthogonal", "own"])
def test_parametrised_weights(how):
    class Doubled(nn.Module):
        def forward(self, W):
            return 2 * W.tanh()

    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Linear(4, 4)]
    if how == "own":
        for layer in layers:
            nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    else:
        name = {"weight": "weight_norm", "spectral": "spectral_norm", "orthogonal": "orthogonal"}
        layers = [getattr(parametrizations, name[how])(layer) for layer in layers]
    net = nn.Sequential(layers[0], nn.Tanh(), layers[1]).eval()
    model = exact(net, 3)
    assert any("original" in n for n, _ in net.named_parameters())
    v = others(net, 3)
    for _ in range(2):  # backward again and again, the graph to the originals is a new one
        got, expected = {}, {}
        for f, grads in ((model, got), (net, expected)):
            net.zero_grad()
            f(v).square().sum().backward()
            grads |= {n: p.grad.clone() for n, p in net.named_parameters()}
        for n, g in expected.items():
            close(got[n], g, 1e-10)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.ones_like(p))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("wrapped", [True, False])
def test_weights_that_a_hook_computes(wrapped):
    layer = nn.utils.weight_norm(nn.Linear(3, 2))
    net = nn.Sequential(layer, nn.ReLU()) if wrapped else layer
    model = to_implicit(net, randn(2, 3))
    assert isinstance(layer.weight, Tensor)  # not what the tracer put there
    agree(model, net, others(net, 3), list(net.parameters()))
    with torch.no_grad():
        layer.weight_g.mul_(3.0)
    agree(model, net, others(net, 3), list(net.parameters()))


@pytest.mark.parametrize("make, shape", [(conv_net, (1, 4, 4)), (lambda: RNNLoop(None), (4, 3))])
def test_a_trained_network_is_followed(make, shape):
    net = make()
    model = to_implicit(net, randn(2, *shape))
    v = others(net, *shape)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        before = model(v)
        optimizer.zero_grad()
        model(v).square().sum().backward()
        optimizer.step()
        assert not torch.allclose(model(v), before, atol=1e-6)
        agree(model, net, v, list(net.parameters()))
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.add_(0.5)
    net.load_state_dict({k: t * 1.1 for k, t in net.state_dict().items()})
    agree(model, net, v, list(net.parameters()))


# ---- random networks -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(220))
def test_random_networks(seed):
    """Values and gradients; and the equation that they come from, written as matrices or not."""
    net = RandomNet(seed, length=8 + seed % 9)
    before = snapshot(net)
    model = to_implicit(net, randn(2, *net.input_shape))
    assert snapshot(net) == before
    v, at = others(net, *net.input_shape), list(net.parameters())
    agree(model, net, v, at)
    y, flat = net(v).detach(), v.flatten(1)
    if seed % 4 == 0:
        x = model.solve(v).value
        z = model.A.apply(x) + model.B.apply(flat) + model.b.dense(like=x)
        close(model.phi(z), x, 1e-12)
        out = model.C.apply(x) + model.D.apply(flat) + model.d.dense(like=x)
        close(out, y.flatten(1), 1e-12)
    elif seed % 4 == 1:
        for grow in (1.0, math.inf):
            small = model.simplify(grow)
            assert len(small.structure.blocks) <= len(model.structure.blocks)
            agree(small, net, v, at)
    elif seed % 4 == 2:
        close(model.to_sequential()(v), y, 1e-12)
    elif model.states < 500:
        dense = model.dense()
        agree(lambda u: dense(u, solver=TIGHT),
              lambda u: net(u.view(-1, *net.input_shape)).flatten(1), flat, at, 1e-11, 1e-9)  # fmt: skip


def test_the_random_networks_have_all_there_is():
    """The generator reaches what it is meant to reach."""
    seen = collections.Counter()
    for seed in range(0, 220, 2):
        net = RandomNet(seed, length=8 + seed % 9)
        model = to_implicit(net, randn(2, *net.input_shape))
        for grid in (model.A, model.B, model.C):
            for op in grid.entries.values():
                seen.update(set(re.findall(r"[a-z_]{3,}", op.label)))
        seen.update(type(block.phi).__name__ for block in model.structure.blocks)
        seen["several readers"] += len(model.A.entries) >= len(model.structure.blocks)
    expected = (
        "dense", "scale", "convolution", "transposed", "place", "permute", "reshape", "index",
        "flip", "roll", "pad", "expand", "mean", "sum", "avg", "MaxPool", "Softmax", "ReLU", "Tanh",
        "several readers",
    )  # fmt: skip
    assert min(seen[kind] for kind in expected) >= 3, seen


# ---- inputs ----------------------------------------------------------------------------------------


def test_inputs_of_any_batch():
    net = conv_net()
    model = to_implicit(net, randn(2, 1, 4, 4))
    u = randn(2, 3, 4, 1, 4, 4)
    y = net(u.flatten(0, 2)).view(2, 3, 4, 3)
    close(model(u), y, 1e-12)
    close(model(u.flatten(-3)), y, 1e-12)
    close(model(u[0, 0, 0]), y[0, 0, 0], 1e-12)  # one sample
    close(model(u[0, 0, 0].flatten()), y[0, 0, 0], 1e-12)
    for m in (1, 5):
        close(model(u[0].flatten(0, 1)[:m]), y[0].flatten(0, 1)[:m], 1e-12)
    empty = u[0, 0, :0]
    assert model(empty).shape == (0, 3) == model(empty.flatten(1)).shape
    assert model.solve(empty).value.shape == (0, model.states)
    assert model.solve(u).value.shape == (2, 3, 4, model.states)
    assert model.solve(u[0, 0, 0]).value.shape == (model.states,)


def test_flat_inputs_give_flat_outputs():
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh())
    model = to_implicit(net, randn(1, 2, 5))
    u = randn(4, 2, 5)
    assert (model.inputs, model.outputs) == (10, 12)
    close(model(u), net(u), 1e-12)
    close(model(u.flatten(1)), net(u).flatten(1), 1e-12)
    close(model(u.view(2, 2, 10)), net(u).view(2, 2, 12), 1e-12)


def test_one_flat_sample_of_one_channel_is_a_batch_of_one():
    """(1, p) could be a sample of shape (1, p): it is one row, as (2, p) is two."""
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh())
    model = to_implicit(net, randn(2, 1, 6))
    u = randn(3, 6)
    for m in (1, 2, 3):
        assert model(u[:m]).shape == (m, 8) and model.solve(u[:m]).value.shape == (m, model.states)


def test_the_batch_of_the_example_does_not_matter():
    """Also an example of one sample, where nothing seems to mix samples."""
    for net, shape in ((ResNet(4, 1), (3, 32, 32)), (RNNLoop(None), (4, 3)), (UNet(), (2, 8, 8))):
        net = randomised(net)
        models = [to_implicit(net, randn(m, *shape)) for m in (1, 3)]
        v = others(net, *shape, batch=4)
        for model in models:
            close(model(v), net(v), 1e-12)
    for mixing in (
        lambda self, x: x.reshape(1, -1), lambda self, x: x.view(1, 3, 1).squeeze(),
        lambda self, x: x[:1],
    ):  # fmt: skip
        net = nn.Sequential(nn.Linear(3, 3), Fn(mixing))
        with pytest.raises(ConversionError):  # not the same map for two samples
            to_implicit(net, randn(1, 3))


def test_samples_do_not_touch_each_other():
    net = conv_net()
    model = to_implicit(net, randn(2, 1, 4, 4))
    u = randn(3, 1, 4, 4)
    ill = u.clone()
    ill[1] = torch.nan
    y = model(ill)
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], model(u)[[0, 2]])


@pytest.mark.parametrize("make, shape", [
    (conv_net, (1, 4, 4)), (lambda: UNet("bilinear"), (2, 8, 8)), (lambda: ResNet(4, 1), (3, 32, 32)),
    (lambda: mlp(nn.Softplus(2.0), nn.GELU()), (3,)),
    (lambda: nn.RNN(3, 2, batch_first=True), (4, 3)),
    (lambda: nn.Sequential(Fn(lambda self, x: (2 * x - 1).flatten(1)), nn.Linear(16, 2)), (1, 4, 4)),
    (lambda: nn.Sequential(Fn(lambda self, x: F.avg_pool2d(x - 0.5, 2)), nn.Conv2d(2, 3, 2)), (2, 4, 4)),
    (lambda: Fn(lambda self, x: (x + 1.0).permute(0, 2, 1) * self.s, s=torch.rand(1)), (2, 3)),
    (lambda: nn.Sequential(Fn(lambda self, x: (x + 1.0).permute(0, 2, 1)), nn.ReLU()), (2, 3)),
    (lambda: Fn(lambda self, x: torch.relu(self.s * x + 1.0), s=torch.rand(2, 1, 1)), (2, 3, 3)),
    (lambda: Fn(lambda self, x: torch.relu(self.s * x + 1.0), s=torch.rand(1, 1, 1)), (1, 3, 3)),
    (lambda: nn.Sequential(Fn(lambda self, x: F.pad(x, (1, 1), value=0.5) / 3), nn.Linear(5, 2)), (2, 3)),
    (lambda: nn.Sequential(nn.Conv1d(2, 2, 1), Fn(
        lambda self, x: F.interpolate(x + 1, scale_factor=2, mode="linear"))), (2, 3)),
    (lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), Fn(lambda self, x: 2 * x + 1)), (1, 3, 3)),
])  # fmt: skip
def test_float32(float32, make, shape):
    torch.manual_seed(0)
    net = randomised(make())
    u = torch.randn(2, *shape)
    expected = net(u)
    expected = expected[0] if isinstance(expected, tuple) else expected
    model = to_implicit(net, u)
    y = model(u)
    assert y.dtype == torch.float32 == model.solve(u).value.dtype
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert model.dtype == torch.float32 or not list(net.parameters())
    if model.states < 1000:
        torch.testing.assert_close(model.dense()(u.flatten(1)), y.flatten(1), rtol=1e-4, atol=1e-5)
    if list(net.parameters()):
        grads = torch.autograd.grad(y.sum(), list(net.parameters()), allow_unused=True)
        assert all(g is None or g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("u, kind, words", [
    (randn(2, 1, 4, 5), ValueError, "u: got shape (2, 1, 4, 5), expected (*batch, 1, 4, 4) or (*batch, 16)"),
    (randn(2, 15), ValueError, "u: got shape (2, 15), expected (*batch, 1, 4, 4) or (*batch, 16)"),
    (torch.zeros(()), ValueError, "u: got shape ()"),
    (randn(2, 16).float(), ValueError, "u: got torch.float32, expected torch.float64"),
    (torch.zeros(2, 16, dtype=torch.long), ValueError, "u: got torch.int64, expected torch.float64"),
    (torch.zeros(2, 16, device="meta"), ValueError, "u: got a tensor on meta, expected cpu"),
    ([[0.0] * 16], TypeError, "u: got list, expected a tensor (*batch, 1, 4, 4)"),
], ids=lambda v: "")  # fmt: skip
def test_inputs_that_do_not_fit(u, kind, words):
    model = to_implicit(conv_net(), randn(2, 1, 4, 4))
    for act in (model, model.solve):
        with pytest.raises(kind) as error:
            act(u)
        assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_options_that_do_not_fit():
    model = to_implicit(conv_net(), randn(2, 1, 4, 4))
    u = randn(2, 1, 4, 4)
    with pytest.raises(ValueError, match="solver"):
        model(u, solver="picardo")
    with pytest.raises(ValueError, match="adjoint"):
        model.solve(u, adjoint="implicite")
    with pytest.raises(ValueError, match="on_failure"):
        model(u, on_failure="ignore")
    with pytest.raises(TypeError):
        model(u, sover="auto")
    with pytest.raises(ValueError, match="record: a structured model"):
        model.solve(u, record=True)
    for x0 in (u, torch.zeros(2, model.states + 1), 0.0):
        with pytest.raises(ValueError, match=rf"x0: got .*expected \(2, {model.states}\)"):
            model.solve(u, x0=x0)
    close(model.solve(u, x0=torch.ones(2, model.states)).value, model.solve(u).value, 0.0)


@pytest.mark.parametrize("module, u, kind, words", [
    (torch.relu, randn(2, 3), TypeError, "module: got builtin_function_or_method"),
    (nn.ReLU(), [1.0], TypeError, "example_input: got list"),
    (nn.ReLU(), torch.zeros(()), ValueError, r"example_input: got shape \(\)"),
    (nn.ReLU(), torch.zeros(0, 3), ValueError, r"example_input: got shape \(0, 3\).*at least one"),
    (nn.Linear(3, 2), randn(2, 4), RuntimeError, "shapes cannot be multiplied"),  # its own error
    (nn.Linear(3, 2), randn(2, 3).float(), RuntimeError, "dtype"),
], ids=lambda v: "")  # fmt: skip
def test_examples_that_do_not_fit(module, u, kind, words):
    with pytest.raises(kind, match=words):
        to_implicit(module, u)


# ---- what does not convert -------------------------------------------------------------------------


def fn(function, **parts) -> nn.Module:
    return Fn(function, **parts)


PRODUCT = "product of (two )?states|multiplies states"
REFUSED = {
    "LayerNorm": (nn.LayerNorm(4), (4,), "", "normalises by statistics of the input"),
    "GroupNorm": (nn.GroupNorm(2, 4), (4, 3, 3), "", "normalises by statistics of the input"),
    "InstanceNorm": (nn.InstanceNorm2d(4), (4, 3, 3), "", "normalises by statistics of the input"),
    "RMSNorm": (nn.RMSNorm(4), (4,), "", "normalises by statistics of the input"),
    "normalize": (fn(lambda self, x: F.normalize(x)), (4,), "", "normalises by statistics"),
    "LSTM": (nn.LSTM(4, 3, batch_first=True), (5, 4), "", "gates"),
    "GRU": (nn.GRU(4, 3, batch_first=True), (5, 4), "", "gates"),
    "LSTMCell": (nn.LSTMCell(4, 3), (4,), "", "gates"),
    "MultiheadAttention": (
        fn(lambda self, x: self.mha(x, x, x)[0], mha=nn.MultiheadAttention(4, 2, batch_first=True)),
        (5, 4), ".mha", "attention"),
    "TransformerEncoderLayer": (
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (5, 4), "", "attention"),
    "attention": (
        fn(lambda self, x: F.scaled_dot_product_attention(x, x, x)), (5, 4), "", "attention"),
    "x * y": (fn(lambda self, x: x * x.tanh()), (4,), "", PRODUCT),
    "x @ y.T": (fn(lambda self, x: x @ x.mT), (4, 4), "", PRODUCT),
    "x / y": (fn(lambda self, x: x / x.exp()), (4,), "", "exp|division by a state"),
    "1 / x": (fn(lambda self, x: 1 / x), (4,), "", "division by a state|reciprocal"),
    "x ** 2": (fn(lambda self, x: x**2), (4,), "", r"pow\(\)"),
    "x.square()": (fn(lambda self, x: x.square()), (4,), "", r"square\(\)"),
    "linear of states": (fn(lambda self, x: F.linear(x, x[0])), (4,), "", "batch dimension"),
    "bilinear": (fn(lambda self, x: self.b(x, x), b=nn.Bilinear(4, 4, 2)), (4,), ".b", PRODUCT),
    "detach": (fn(lambda self, x: x + x.detach()), (4,), "", "stops gradients"),
    "data": (fn(lambda self, x: x.data + x), (4,), "", r"\.data"),
    "item": (fn(lambda self, x: x * x.sum().item()), (4,), "", r"number out of"),
    "float": (fn(lambda self, x: x * float(x.sum((0, 1)))), (4,), "", "number out of"),
    "a branch": (fn(lambda self, x: x if x.sum() > 0 else -x), (4,), "", "branches on a value"),
    "where": (fn(lambda self, x: torch.where(x > 0, x, 0.1 * x)), (4,), "", "gt|where|no converter"),
    "mean over samples": (fn(lambda self, x: x - x.mean(0)), (4,), "", "across samples"),
    "mean of all": (fn(lambda self, x: x - x.mean()), (4,), "", "the batch among them"),
    "sum over samples": (fn(lambda self, x: x + x.sum(0, keepdim=True)), (4,), "", "across samples"),
    "flatten(0, 1)": (fn(lambda self, x: x.flatten(0, 1)), (4, 2), "", "across samples"),
    "flatten()": (fn(lambda self, x: x.flatten()), (4,), "", "across samples"),
    "view(-1)": (fn(lambda self, x: x.view(-1)), (4,), "", "batch dimension first"),
    "view(-1, 4)": (fn(lambda self, x: x.view(-1, 4)), (2, 4), "", "batch dimension first"),
    "cumsum": (fn(lambda self, x: x.cumsum(0)), (4,), "", "cumsum"),
    "x[0]": (fn(lambda self, x: x + x[0]), (4,), "", "across samples"),
    "x[:1]": (fn(lambda self, x: x + x[:1]), (4,), "", "across samples"),
    "x[::2]": (fn(lambda self, x: x[::2]), (4,), "", "across samples"),
    "x[None]": (fn(lambda self, x: x[None].squeeze(0)), (4,), "", "across samples"),
    "x[[0, 1]]": (fn(lambda self, x: x[:, [0, 1]]), (4,), "", "slices and numbers"),
    "permute": (fn(lambda self, x: x.permute(1, 0)), (4,), "", "batch dimension"),
    "transpose": (fn(lambda self, x: x.transpose(0, 1)), (4,), "", "across samples"),
    "T": (fn(lambda self, x: x.T), (4,), None, r"\.T"),
    "flip": (fn(lambda self, x: x.flip(0)), (4,), "", "across samples"),
    "roll": (fn(lambda self, x: x.roll(1)), (4,), "", "across samples"),
    "stack": (fn(lambda self, x: torch.stack([x, x])), (4,), "", "across samples"),
    "cat": (fn(lambda self, x: torch.cat([x, x])), (4,), "", "across samples"),
    "chunk": (fn(lambda self, x: x.chunk(2)[0]), (4,), "", "across samples"),
    "unbind": (fn(lambda self, x: x.unbind()[0]), (4,), "", "across samples"),
    "repeat": (fn(lambda self, x: x.repeat(2, 1)), (4,), "", "batch dimension"),
    "expand": (fn(lambda self, x: x.expand(3, *x.shape)), (4,), "", "batch"),
    "softmax over samples": (nn.Softmax(0), (4,), "", "across samples"),
    "for row in x": (fn(lambda self, x: torch.stack([r for r in x])), (4,), "", "samples of a batch"),
    "matrix on the left": (fn(lambda self, x: torch.eye(2) @ x), (4,), "", "across samples"),
    "a number a sample": (fn(lambda self, x: x + torch.arange(2.0)[:, None]), (4,), "", "each sample"),
    "functional dropout": (fn(lambda self, x: F.dropout(x)), (4,), "", r"eval\(\)"),
    "norm by the batch": (
        fn(lambda self, x: F.batch_norm(x, None, None, training=True)), (4,), "", r"eval\(\)"),
    "norm without statistics": (
        nn.BatchNorm1d(4, track_running_stats=False), (4,), "", "statistics of the batch"),
    "a cast": (fn(lambda self, x: x.float()), (4,), "", "dtype"),
    "half": (fn(lambda self, x: x.half().double()), (4,), "", "half|dtype"),
    "numpy": (fn(lambda self, x: x + torch.from_numpy(x.numpy())), (4,), "", "number out of"),
    "random": (fn(lambda self, x: x + torch.randn(1, 4)), (4,), None, "random"),
    "Mish": (nn.Mish(), (4,), "", "no converter"),
    "GELU by tanh": (nn.GELU(approximate="tanh"), (4,), "", "approximate='tanh'"),
    "bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), (1, 3, 3), "", "bicubic"),
    "max of many": (fn(lambda self, x: x.max(1)[0]), (4,), "", "largest of many|max"),
    "max with indices": (
        fn(lambda self, x: F.max_pool1d(x, 2, return_indices=True)[0]), (2, 4), "", "indices"),
    "uneven adaptive max": (nn.AdaptiveMaxPool1d(3), (2, 7), "", "windows of one size"),
    "RNN, samples second": (
        fn(lambda self, x: self.rnn(x)[0], rnn=nn.RNN(4, 3)), (5, 4), ".rnn", "batch_first"),
    "RNN with a start": (
        fn(lambda self, x: self.rnn(x, torch.ones(1, 2, 3))[0], rnn=nn.RNN(4, 3, batch_first=True)),
        (5, 4), ".rnn", "initial state"),
    "two outputs": (fn(lambda self, x: (x, x)), (4,), None, "tuple, expected one tensor"),
    "no tensor": (fn(lambda self, x: 3.0), (4,), None, "float, expected one tensor"),
    "a constant": (fn(lambda self, x: torch.ones(2, 3)), (4,), None, "expected"),
}  # fmt: skip


@cases(REFUSED)
def test_what_is_refused(case):
    """Nested: the error has the path, the class, the reason, and the recipe for that class."""
    bad, shape, inner, reason = case
    net = nn.Sequential(nn.Sequential(collections.OrderedDict(front=nn.Tanh(), bad=bad))).eval()
    before = snapshot(net)
    with pytest.raises(ConversionError) as error:
        to_implicit(net, randn(2, *shape))
    text = str(error.value)
    assert re.search(reason, text), text
    assert snapshot(net) == before
    if inner is not None:
        path = f"0.bad{inner}"
        assert error.value.module_path == path
        kind = type(net.get_submodule(path)).__name__
        assert f"{path!r} ({kind}) cannot be converted" in text
        assert f"@implicitdl.convert.register({kind})" in text and "trace.linear" in text
    else:
        assert error.value.module_path == ""
    if inner == "":  # and alone
        with pytest.raises(ConversionError, match=reason) as error:
            to_implicit(bad.eval(), randn(2, *shape))
        assert error.value.module_path == ""
        assert f"the network ({type(bad).__name__})" in str(error.value)


@pytest.mark.parametrize("part", [
    nn.BatchNorm1d(4), nn.Dropout(0.1), nn.AlphaDropout(), nn.Dropout1d(),
    nn.RNN(4, 4, 2, batch_first=True, dropout=0.3),
], ids=repr)  # fmt: skip
def test_training_mode_is_refused_with_the_remedy(part):
    run = fn(lambda self, x: self.part(x)[0], part=part) if isinstance(part, nn.RNN) else part
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), run))
    path = "1.1.part" if isinstance(part, nn.RNN) else "1.1"
    shape = (3, 4) if isinstance(part, nn.RNN) else (4,)
    with pytest.raises(ConversionError, match=r"training mode.*eval\(\)") as error:
        to_implicit(net, randn(2, *shape))
    assert error.value.module_path == path and type(part).__name__ in str(error.value)
    exact(net.eval(), *shape)


def test_dropout_that_drops_nothing_may_train():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0), nn.ReLU()).train()
    u = randn(2, 3)
    close(to_implicit(net, u)(u), net(u), 1e-12)


def test_integers_are_refused():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with pytest.raises(ConversionError, match="torch.int64.*floating.*embedding"):
        to_implicit(net, torch.tensor([[1, 2], [3, 4]]))
    inner = nn.Sequential(
        nn.Linear(3, 2), fn(lambda self, x: self.e(x.long()), e=nn.Embedding(5, 3))
    )
    with torch.no_grad():
        inner[0].weight.zero_()
        inner[0].bias.fill_(1.0)
    with pytest.raises(ConversionError) as error:
        to_implicit(inner, randn(2, 3))
    assert error.value.module_path.startswith("1")


class Optional(nn.Module):
    """Arguments after the first keep their defaults."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, mask=None, *, features=False, scale=2.0):
        if features:
            return x, self.linear(x)
        y = self.linear(x) * scale
        return y if mask is None else y * mask


def test_arguments_with_defaults():
    exact(Optional(), 3)
    exact(nn.Sequential(Optional(), nn.ReLU()), 3)


def test_two_inputs_are_refused():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises((ConversionError, TypeError)):
        to_implicit(Two(), randn(2, 3))


def test_networks_in_a_container():
    """One tensor in a tuple, list or dictionary is that tensor."""
    net = nn.Linear(3, 2)
    for wrap in (lambda y: (y,), lambda y: [y], lambda y: {"logits": y}):
        whole = Fn(lambda self, x, wrap=wrap: wrap(self.l(x)), l=net)
        close(to_implicit(whole, randn(2, 3))(randn(4, 3)), net(randn(4, 3)), 1e-14)


@pytest.fixture
def registered():
    """Registrations of a test are taken back after it."""
    tables = (registry.MODULES, registry.FUNCTIONS, registry.METHODS)
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def test_the_recipe_for_an_affine_module(registered):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(randn(4, 3)), nn.Parameter(randn(4))

        def forward(self, x):
            return torch.relu(torch.einsum("oi,bi->bo", self.weight, x) + self.bias)

    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Mixed())
    with pytest.raises(ConversionError, match=r"einsum.*no converter") as error:
        to_implicit(net, randn(2, 3))
    assert error.value.module_path == "2"
    recipe = str(error.value).split("say how:\n")[1]
    space = {"implicitdl": implicitdl, "Mixed": Mixed, "ReLU": ReLU}
    exec("\n".join(line.removeprefix("    ") for line in recipe.splitlines()), space)
    # Its weights were read at the conversion, or are at each use: gradients reach them.
    agree(to_implicit(net, randn(2, 3)), net, others(net, 3), list(net.parameters()))


def test_the_recipe_for_an_activation(registered):
    @dataclass(frozen=True, kw_only=True)
    class Mish(Activation, register=False):
        slope = (-0.12, 1.1)

        def __call__(self, z):
            return F.mish(z)

    convert.register(nn.Mish)(lambda trace, module, x: trace.activate(x, Mish()))
    net = nn.Sequential(nn.Linear(3, 4), nn.Mish(), nn.Linear(4, 2))
    model = exact(net, 3)
    assert model.structure.blocks[-1].phi == Mish()
    convert.register(F.mish)(lambda trace, x, inplace=False: trace.activate(x, Mish()))
    del registry.MODULES[nn.Mish]
    exact(net, 3)
    convert.register("arctan")(lambda trace, x: trace.activate(x, Tanh()))
    with pytest.raises(ConversionError, match="differs from the network by"):  # a wrong converter
        to_implicit(nn.Sequential(fn(lambda self, x: x.arctan())), randn(2, 3))


@pytest.mark.parametrize("result, words", [
    (lambda trace, x: trace.gather(x, "flip", 0), "flip|differs|method|argument"),
    (lambda trace, x: trace.reshape(x, (2, 2)), "shape"),
    (lambda trace, x: trace.apply(Dense(randn(4, 3)), x), r"got shape \(4,\) for"),
    (lambda trace, x: None, "expected one tensor|None"),
    (lambda trace, x: trace.add(x, trace.reshape(x, (2, 2))), "shape"),
    (lambda trace, x: trace.join([x, trace.reshape(x, (2, 2))], 0), "shape|dimension"),
])  # fmt: skip
def test_converters_that_are_wrong_are_refused(registered, result, words):
    class Odd(nn.Module):
        def forward(self, x):
            return x.roll(1, 1)

    convert.register(Odd)(lambda trace, module, x: result(trace, x))
    with pytest.raises(ConversionError, match=words):
        to_implicit(nn.Sequential(Odd()), randn(2, 4))


def test_register_refuses_what_is_no_target():
    for target in (3, None, nn.ReLU()):
        if callable(target):
            continue
        with pytest.raises(TypeError, match="register: got"):
            convert.register(target)


# ---- the user's module -----------------------------------------------------------------------------


def test_the_module_is_left_as_it_was():
    """Attributes that forward writes, tensors that it makes, hooks, mode, gradients."""

    class Writer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last, self.kept = nn.Linear(3, 3), None, torch.ones(3)
            self.register_buffer("offset", torch.full((3,), 0.2))

        def forward(self, x):
            self.last = self.inner(x)
            self.fresh = self.last + self.kept
            return torch.relu(self.fresh + self.offset + torch.arange(3.0) + torch.tensor(0.5))

    for net in (Writer(), nn.Sequential(Writer(), nn.Linear(3, 2))):
        calls = []
        net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        net.train()
        state = copy.deepcopy(net.state_dict())
        net(randn(2, 3))
        names = {path: set(vars(part)) for path, part in net.named_modules()}
        model = to_implicit(net, randn(2, 3))
        assert {path: set(vars(part)) for path, part in net.named_modules()} == names
        for part in net.modules():
            kept = [v for v in vars(part).values() if not isinstance(v, dict | set | bool)]
            assert all(v is None or isinstance(v, Tensor | int) for v in kept), kept
        assert net.training and all(p.grad is None for p in net.parameters())
        for name, t in net.state_dict().items():
            assert torch.equal(t, state[name])
        agree(model, net, others(net, 3), list(net.parameters()))
        net(randn(2, 3)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        copy.deepcopy(net.state_dict())


def test_a_network_that_fails_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(3, 3), fn(lambda self, x: x * torch.tensor([1.0, 2.0, 3.0]) * x))
    before = snapshot(net)
    with pytest.raises(ConversionError):
        to_implicit(net, randn(2, 3))
    assert snapshot(net) == before


def test_the_example_is_left_as_it_was():
    u = randn(2, 3).requires_grad_()
    kept = u.detach().clone()
    model = to_implicit(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), u)
    assert torch.equal(u, kept) and u.grad is None
    model(u).sum().backward()
    assert torch.equal(u.detach(), kept) and u.grad is not None


# ---- structure -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that is computed."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and not t.is_meta]
        self.entries = max([self.entries, *sizes])
        return out


def test_a_resnet_keeps_its_structure():
    net = randomised(ResNet(8))
    u = randn(1, 3, 32, 32)
    with Largest() as own:
        net(u)
    with Largest() as seen:
        model = to_implicit(net, u)
        model(u)
    # Nothing is larger than what the network computes, or than a weight (which the check copies).
    weights = max(p.numel() for p in net.parameters())
    assert seen.entries <= max(2 * own.entries, u.numel(), weights)
    blocks = len(model.structure.blocks)
    assert blocks < 40 and len(model.A.entries) <= blocks + 8 and len(model.B.entries) == 1
    n = model.states
    assert n > 5_000 and not model.D.entries
    with pytest.raises(ValueError, match=f"dense: the matrix would be {n} x {n}, .*limit"):
        model.A.dense(limit=10**7)
    with pytest.raises(ValueError, match=f"{n} x {n}"):
        model.dense(limit=10**7)
    below = [(i, j) for i, j in model.A.entries if i >= j]
    assert not below and len(model.structure.components) == blocks
    names = {block.name for block in model.structure.blocks}
    assert {"relu", "maxpool", "layer1.0.relu"} <= names
    assert "ImplicitModel with" in str(model) and f"blocks={blocks}" in repr(model)
    norms = model.A.norms()
    assert norms.shape == (blocks, blocks) and int((norms > 0).sum()) == len(model.A.entries)


def test_what_costs_nothing_makes_no_states():
    moved = fn(lambda self, x: torch.relu((2 * x.permute(0, 2, 1).flatten(1)[:, 1:] - 1).flip(1)))
    assert exact(moved, 2, 3).states == 5
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2)
    )
    model = exact(net, 3)
    assert model.states == 4 and len(model.structure.blocks) == 1
    assert isinstance(exact(mlp(nn.ReLU(), nn.ReLU()), 3).A[0, 1], Dense)


def test_cost_is_that_of_the_network():
    net = mlp(nn.ReLU(), nn.Tanh())
    assert exact(net, 3).structure.cost == 3 * 6 + 6 * 6 + 6 * 2
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    assert exact(net, 2, 4, 4).structure.cost == 2 * 9 * 3 * 4 + 24


@cases(
    {name: NETWORKS[name] for name in ("lenet", "unet bilinear", "inception", "densenet", "resnet")}
)
def test_a_solution_satisfies_the_equation(case):
    make, shape = case
    net = randomised(make())
    model = to_implicit(net, randn(1, *shape))
    u = others(net, *shape)
    solution = model.solve(u)
    x, flat = solution.value, u.flatten(1)
    z = model.A.apply(x) + model.B.apply(flat) + model.b.dense(like=x)
    close(model.phi(z), x, 1e-12)
    close(model.C.apply(x) + model.D.apply(flat) + model.d.dense(like=x), net(u).flatten(1), 1e-12)
    assert bool(solution.converged.all()) and not solution.residual.any()
    for name, shape_ in (("A", (model.states,) * 2), ("B", (model.states, model.inputs)),
                         ("C", (model.outputs, model.states)), ("D", (model.outputs, model.inputs))):  # fmt: skip
        assert getattr(model, name).shape == shape_
    assert model.b.shape == (model.states,) and model.d.shape == (model.outputs,)


DENSE = {
    "mlp": (lambda: mlp(nn.ReLU(), nn.Tanh(), nn.Softmax(-1)), (3,)),
    "max-pool": (conv_net, (1, 4, 4)),
    "max-pool, more out than in": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 2), nn.MaxPool1d(2, 1, 1), nn.Conv1d(2, 1, 2)), (2, 5)),
    "rnn": (lambda: RNNLoop(None), (4, 3)),
    "softmax of rows": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2)), (3, 3)),
    "densenet": (DenseNet, (3, 3, 3)),
    "loop": (lambda: nn.Sequential(nn.Linear(3, 4), ImplicitLayer(4, 3, 5, solver=TIGHT)), (3,)),
}  # fmt: skip


@cases(DENSE)
def test_as_matrices(case):
    make, shape = case
    net = randomised(make())
    model = to_implicit(net, randn(2, *shape))
    dense = model.dense()
    assert dense.structure is None and all(isinstance(getattr(dense, k), Tensor) for k in "ABCDbd")

    def flat(u):
        return net(u.view(-1, *shape)).flatten(1)

    options = {"solver": TIGHT} if model.structure.loops else {}
    agree(lambda u: dense(u, **options), flat, others(net, *shape).flatten(1), list(net.parameters()),
          1e-11, 1e-9)  # fmt: skip
    if not model.structure.loops and model.phi.entrywise:
        assert not dense.A.tril().any()  # strictly upper, as the paper writes it
    again = dense.structured()
    close(again(others(net, *shape).flatten(1)), flat(others(net, *shape)), 1e-9)
    with pytest.raises(ValueError, match=f"{model.states} x {model.states}"):
        model.dense(limit=model.states**2 - 1)


# ---- the algebra -----------------------------------------------------------------------------------


def flat_model(p: int, q: int, seed: int = 0, phi: str = "tanh") -> ImplicitModel:
    """A model given by matrices, with a small loop, that gradients reach."""
    A = 0.3 * randn(5, 5, seed=seed) / 5
    parts = [A, randn(5, p, seed=seed + 1) / p**0.5, randn(q, 5, seed=seed + 2), randn(q, p, seed=seed + 3),
             randn(5, seed=seed + 4), randn(q, seed=seed + 5)]  # fmt: skip
    return ImplicitModel(*[t.requires_grad_() for t in parts], phi=phi)


def loop_of(m: ImplicitModel, u: Tensor) -> Tensor:
    x = torch.zeros(*u.shape[:-1], m.states)
    for _ in range(60):
        x = m.phi(x @ m.A.mT + u @ m.B.mT + m.b)
    return x @ m.C.mT + u @ m.D.mT + m.d


def tensors(*models: ImplicitModel) -> list[Tensor]:
    return [getattr(m, name) for m in models for name in "ABCDbd"]


@pytest.fixture
def pair():
    """Two converted networks and a model by matrices: (1, 4, 4) -> (2, 4, 4), 32 -> 3, 32 -> 3."""
    torch.manual_seed(3)
    f = randomised(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(3),
                                 nn.Conv2d(3, 2, 1)))  # fmt: skip
    g = randomised(nn.Sequential(nn.Unflatten(1, (2, 4, 4)), nn.MaxPool2d(2), nn.Flatten(),
                                 nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)))  # fmt: skip
    return f, to_implicit(f, randn(1, 1, 4, 4)), g, to_implicit(g, randn(1, 32)), flat_model(32, 3)


def at(*things) -> list[Tensor]:
    """What gradients are taken at."""
    found = []
    for thing in things:
        found += tensors(thing) if isinstance(thing, ImplicitModel) else list(thing.parameters())
    return found


def tight(model):
    return lambda u: model(u, solver=TIGHT)


def test_cascades(pair):
    f, F_, g, G, m = pair
    u = randn(3, 1, 4, 4, seed=9)
    whole = G @ F_
    agree(whole, lambda v: g(f(v).flatten(1)), u, at(f, g))
    assert whole.structure.input_shape == (1, 4, 4) and not whole.structure.loops
    assert whole.states >= F_.states + G.states
    agree(tight(m @ F_), lambda v: loop_of(m, f(v).flatten(1)), u, at(f, m), 1e-11, 1e-9)
    front = flat_model(3, 16, seed=20)
    agree(tight(F_ @ front), lambda v: f(loop_of(front, v).view(-1, 1, 4, 4)), randn(3, 3),
          at(f, front), 1e-11, 1e-9)  # fmt: skip
    both = m @ F_ @ front
    agree(tight(both), lambda v: loop_of(m, f(loop_of(front, v).view(-1, 1, 4, 4)).flatten(1)),
          randn(3, 3), at(f, front, m), 1e-11, 1e-9)  # fmt: skip
    u16 = randn(2, 3)
    close(both(u16), (m @ (F_ @ front))(u16), 1e-10)
    with pytest.raises(ValueError, match="f has 3 outputs, g takes 16 inputs"):
        F_ @ G


def test_the_order_of_states_in_a_cascade(pair):
    f, F_, _, G, _ = pair
    u = randn(2, 1, 4, 4)
    x = (G @ F_).solve(u).value
    close(x[:, : G.states], G.solve(f(u).flatten(1)).value, 1e-12)
    close(x[:, -F_.states :], F_.solve(u).value, 1e-12)
    below = [(i, j) for i, j in (G @ F_).A.entries if i >= j]
    assert not below  # still the later blocks first


def test_sums_and_stacks(pair):
    f, F_, g, G, m = pair
    u = randn(3, 32, seed=9)
    agree(G + G, lambda v: 2 * g(v), u, at(g))
    agree(tight(G + m), lambda v: g(v) + loop_of(m, v), u, at(g, m), 1e-11, 1e-9)
    agree(tight(m + G), lambda v: g(v) + loop_of(m, v), u, at(g, m), 1e-11, 1e-9)
    agree(
        tight(stack(G, m)), lambda v: torch.cat([g(v), loop_of(m, v)], 1), u, at(g, m), 1e-11, 1e-9
    )
    agree(
        tight(stack(m, G)), lambda v: torch.cat([loop_of(m, v), g(v)], 1), u, at(g, m), 1e-11, 1e-9
    )
    image = randn(3, 1, 4, 4, seed=9)
    agree(
        stack(F_, F_ + F_),
        lambda v: torch.cat([f(v).flatten(1), 2 * f(v).flatten(1)], 1),
        image,
        at(f),
    )
    h = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU())  # other shapes, as many numbers
    agree(F_ + to_implicit(h, image), lambda v: f(v) + h(v).view(-1, 2, 4, 4), image, at(f, h))
    agree(to_implicit(h, image) + F_, lambda v: f(v).flatten(1) + h(v), image, at(f, h))
    s = nn.Sequential(nn.Linear(16, 32), nn.Tanh())
    S = to_implicit(s, randn(1, 16))
    agree(S + F_, lambda v: s(v) + f(v.view(-1, 1, 4, 4)).flatten(1), randn(2, 16), at(f, s))
    agree(F_ + S, lambda v: f(v) + s(v.flatten(1)).view(-1, 2, 4, 4), image, at(f, s))
    agree(stack(F_, S), lambda v: torch.cat([f(v).flatten(1), s(v.flatten(1))], 1), image, at(f, s))
    with pytest.raises(ValueError, match="f maps 16 -> 32, g maps 32 -> 3"):
        F_ + G
    with pytest.raises(ValueError, match="stack: f takes 16 inputs, g 32"):
        stack(F_, G)
    single = to_implicit(copy.deepcopy(g).float(), randn(1, 32).float())
    for act in (lambda: G + single, lambda: stack(G, single), lambda: m + single):
        with pytest.raises(ValueError, match="torch.float32.*expected one dtype"):
            act()


def test_an_affine_network_and_sums_with_skips():
    a, b = nn.Linear(3, 4), fn(lambda self, x: self.s * x.flip(1) - 1, s=randn(3))
    A, B = to_implicit(a, randn(1, 3)), to_implicit(b, randn(1, 3))
    u = randn(3, 3)
    agree(A @ B, lambda v: a(b(v)), u, at(a, b))
    agree(stack(A, B), lambda v: torch.cat([a(v), b(v)], 1), u, at(a, b))
    agree((B + B) @ B, lambda v: 2 * b(b(v)), u, at(b))
    skip = fn(lambda self, x: x + torch.relu(self.l(x)), l=nn.Linear(3, 3))
    S = to_implicit(skip, u)
    assert S.D.entries
    agree(S @ S + B, lambda v: skip(skip(v)) + b(v), u, at(skip, b))


@pytest.mark.parametrize("kappa", [None, 0.9, 0.2])
def test_rescaling(kappa):
    torch.manual_seed(0)
    net = randomised(nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(),
        fn(lambda self, x: F.leaky_relu(self.c(x), 0.1) + x, c=nn.Conv2d(3, 3, 3, padding=1)),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2),
    ))  # fmt: skip
    model = exact(net, 1, 4, 4)
    small = model.rescale(kappa)
    agree(small, net, others(net, 1, 4, 4), list(net.parameters()))
    bound = 0.5 if kappa is None else kappa
    assert float(model.A.dense().detach().abs().sum(1).max()) > 1 > bound
    assert float(small.A.dense().detach().abs().sum(1).max()) <= bound + 1e-12
    assert small.A.norm() <= bound + 1e-12 and small.states == model.states
    close(small.dense()(randn(2, 16)), model(randn(2, 16)), 1e-11)


def test_rescaling_refuses():
    for net, words in ((mlp(nn.Tanh()), "Tanh.* not positively homogeneous"),
                       (nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)), "Softmax")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            to_implicit(net, randn(1, 3)).rescale()
    with pytest.raises(ValueError, match="not positively homogeneous entry by entry"):
        to_implicit(conv_net(), randn(1, 1, 4, 4)).rescale()  # max-pooling couples states
    relu = to_implicit(mlp(nn.ReLU()), randn(1, 3))
    for kappa in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="kappa: got"):
            relu.rescale(kappa)
    with pytest.raises(ValueError, match="rescale: a structured model with a loop"):
        to_implicit(ImplicitLayer(3, 2, 4), randn(1, 3)).rescale()


def test_permutations_of_blocks():
    net = fn(lambda self, x: torch.cat([self.a(x).relu(), self.b(x).tanh().flip(1)], 1),
             a=nn.Linear(3, 4), b=nn.Linear(3, 2))  # fmt: skip
    model = to_implicit(nn.Sequential(net, nn.Softmax(-1), nn.Linear(6, 2)), randn(1, 3))
    sizes = [block.size for block in model.structure.blocks]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    shuffled = [1, 2, 0] if len(sizes) == 3 else [*range(1, len(sizes)), 0]
    order = [i for k in shuffled for i in range(starts[k], starts[k] + sizes[k])]
    moved = model.permute(order)
    u = randn(3, 3)
    close(moved(u), model(u), 1e-14)
    close(moved.solve(u).value, model.solve(u).value[:, order], 1e-14)
    close(moved.dense().A, model.dense().A[order][:, order], 1e-14)
    close(moved.b.dense(), model.b.dense()[order], 1e-14)
    back = moved.permute(torch.tensor(order).argsort())
    assert [b.name for b in back.structure.blocks] == [b.name for b in model.structure.blocks]
    swapped = [1, 0, *range(2, model.states)]
    with pytest.raises(ValueError, match="keeps the states of a block together"):
        model.permute(swapped)
    with pytest.raises(ValueError, match="expected a permutation of 0"):
        model.permute([0] * model.states)


# ---- feedback --------------------------------------------------------------------------------------

FEEDBACK = {
    "D zero": lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1)),
    "D nonzero": lambda: fn(
        lambda self, x: self.b(torch.relu(self.a(x))) + self.c(x) + 0.1,
        a=nn.Conv2d(1, 3, 3, padding=1), b=nn.Conv2d(3, 1, 3, padding=1), c=nn.Conv2d(1, 1, 1)),
    "max-pool": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 1, 1)),
    "other shapes": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.LeakyReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1), nn.SiLU()),
    "joined": lambda: fn(
        lambda self, x: torch.cat([torch.tanh(self.a(x)), x], 1).mean(1, keepdim=True),
        a=nn.Conv2d(1, 2, 3, padding=1)),
}  # fmt: skip


@cases(FEEDBACK)
def test_feedback_is_the_fixed_point(case):
    torch.manual_seed(0)
    net = case()
    model = to_implicit(net, randn(1, 1, 6, 6))
    K = (randn(36, model.outputs, seed=50) / 150).requires_grad_()
    closed = model.feedback(K)
    v = randn(2, 1, 6, 6, seed=9)

    def loop(u):
        y = torch.zeros(2, model.outputs)
        for _ in range(80):
            y = net(u + (y @ K.mT).view(u.shape)).flatten(1)
        return y.view(2, *model.structure.output_shape)

    agree(tight(closed), loop, v, [K, *net.parameters()], 1e-11, 1e-8)
    assert closed.structure.input_shape == (1, 6, 6) and len(closed.structure.loops) == 1
    close(closed(v.flatten(1), solver=TIGHT), loop(v).flatten(1), 1e-11)
    proof = closed.certificate()
    assert proof.well_posed or proof.status == "unknown"
    after = flat_model(model.outputs, 2)
    close((after @ closed)(v, solver=TIGHT), loop_of(after, loop(v).flatten(1)), 1e-10)
    twice = closed + closed
    close(twice(v, solver=TIGHT), 2 * loop(v), 1e-11)


def test_a_loop_of_convolutions_is_solved_by_operators(monkeypatch):
    """No matrix of the loop is made; gradients are those of finite differences."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1))
    model = to_implicit(net, randn(1, 1, 6, 6))
    D = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    close_loop = to_implicit(
        nn.Sequential(nn.Flatten(), nn.Linear(36, 36, bias=False)), randn(1, 1, 6, 6)
    )
    assert close_loop.states == 36 and D.weight.numel() == 9
    K = 0.05 * randn(36, 36, seed=50)
    closed = model.feedback(K)
    structure = closed.structure
    (component,) = structure.loops
    assert evaluate.own_matrix([structure.blocks[k] for k in component], component) is None
    v, w = randn(2, 1, 6, 6, seed=9), randn(2, 1, 6, 6, seed=10)

    def loss():
        return (w * closed(v, solver=TIGHT)).sum()

    with Largest() as seen:
        closed(v)
    assert seen.entries < structure.states**2
    for p in net.parameters():
        (g,) = torch.autograd.grad(loss(), p)
        direction = randn(*p.shape, seed=3)
        values = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                p.add_(step * direction)
                values.append(float(loss()))
            p.add_(1e-5 * direction)
        slope = (values[0] - values[1]) / 2e-5
        assert float((g * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("dense", [False, True])
def test_second_derivatives_through_feedback(dense):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model = to_implicit(net, randn(1, 3))
    K = 0.1 * randn(3, 2, seed=4)
    closed = (model.dense() if dense else model).feedback(K)
    u = randn(2, 3).requires_grad_()

    def f(u, W):
        with_ = {"0.weight": W}
        del with_
        return closed(u, solver=TIGHT)

    assert torch.autograd.gradcheck(lambda u: closed(u, solver=TIGHT), u)
    assert torch.autograd.gradgradcheck(lambda u: closed(u, solver=TIGHT), u, atol=1e-4)


def test_feedback_of_feedback():
    """(f with K) with L is f with K + L."""
    net = fn(lambda self, x: torch.tanh(self.a(x)) + 0.2 * x, a=nn.Linear(3, 3))
    model = to_implicit(net, randn(1, 3))
    K, L = 0.1 * randn(3, 3, seed=1), 0.1 * randn(3, 3, seed=2)
    u = randn(4, 3)
    a = model.feedback(K).feedback(L)(u, solver=TIGHT)
    close(a, model.feedback(K + L)(u, solver=TIGHT), 1e-10)
    close(a, model.dense().feedback(K + L)(u, solver=TIGHT), 1e-10)


def test_feedback_refuses():
    model = to_implicit(conv_net(), randn(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"K has shape \(3, 16\), expected \(16, 3\)"):
        model.feedback(randn(3, 16))
    with pytest.raises(ValueError, match="K is torch.float32"):
        model.feedback(randn(16, 3).float())
    with pytest.raises(TypeError, match="K is list"):
        model.feedback([[0.0]])
    skip = to_implicit(fn(lambda self, x: x + self.a(x).relu(), a=nn.Linear(2, 2)), randn(1, 2))
    with pytest.raises(ValueError, match="I - D K is singular"):
        skip.feedback(torch.eye(2))


# ---- simplify --------------------------------------------------------------------------------------


def test_simplify_drops_what_no_output_sees():
    rnn = nn.RNN(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    net = Fn(lambda self, x: self.rnn(x)[1][0], rnn=rnn)  # the first layer, forward, alone
    model = exact(net, 5, 3)
    small = model.simplify()
    assert model.states > small.states == 20 and len(small.structure.blocks) == 5
    agree(small, net, others(net, 5, 3), list(net.parameters()))
    select = to_implicit(Fn(lambda self, x: x[:, 1:2]), randn(1, 4))
    assert (select @ model).simplify().states == 20


def test_simplify_merges_linear_states():
    first, second = nn.Linear(5, 30), nn.Linear(30, 4)
    net = nn.Sequential(first, second, nn.ReLU(), nn.Linear(4, 20), nn.Linear(20, 3))
    model = exact(net, 5)
    sizes = {block.size for block in model.structure.blocks}
    all_merged = model.simplify(math.inf)
    assert [block.size for block in all_merged.structure.blocks] == [4]
    agree(all_merged, net, others(net, 5), list(net.parameters()))
    kept = model.simplify()
    agree(kept, net, others(net, 5), list(net.parameters()))
    assert kept.structure.cost <= model.structure.cost and sizes >= {4}
    for grow in (0.5, -1.0, math.nan):
        with pytest.raises(ValueError, match="grow: got"):
            model.simplify(grow)


def test_simplify_minds_the_cost():
    """A convolution that three rows read stays a block; a permutation does not."""

    def branches(self, x):
        h = self.c(x)
        return torch.cat([torch.relu(d(h)) for d in self.d], 1)

    net = Fn(branches, c=nn.Conv2d(2, 4, 3), d=nn.ModuleList(nn.Conv2d(4, 1, 1) for _ in range(3)))
    model = exact(net, 2, 5, 5)
    small, all_merged = model.simplify(), model.simplify(math.inf)
    assert len(small.structure.blocks) == 4 and len(all_merged.structure.blocks) == 3
    assert all_merged.structure.cost > small.structure.cost
    for m in (small, all_merged):
        agree(m, net, others(net, 2, 5, 5), list(net.parameters()))


def test_simplify_keeps_loops_and_one_block():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Linear(4, 4), ImplicitLayer(4, 3, 5, solver=TIGHT), nn.Linear(3, 2)
    )
    model = exact(net, 3)
    small = model.simplify(math.inf)
    assert len(small.structure.loops) == 1 and len(small.structure.blocks) == 1
    agree(small, net, others(net, 3), list(net.parameters()))
    affine = exact(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 3).simplify(math.inf)
    assert affine.states >= 1
    linear_loop = to_implicit(nn.Linear(2, 2), randn(1, 2)).feedback(0.1 * randn(2, 2))
    u = randn(3, 2)
    close(linear_loop.simplify(math.inf)(u), linear_loop(u), 1e-9)
    m = flat_model(3, 2)
    close(m.simplify()(u @ randn(2, 3)), m(u @ randn(2, 3)), 1e-9)


# ---- back to torch ---------------------------------------------------------------------------------

EXPLICIT = {
    **{name: NETWORKS[name] for name in ("lenet", "vgg", "resnet", "unet bilinear", "densenet")},
    "mlp": (lambda: mlp(nn.ReLU(), nn.Tanh(), nn.Softplus(), nn.GELU()), (3,)),
    "rnn": (lambda: RNNLoop(None), (4, 3)),
    "conv": (conv_net, (1, 4, 4)),
    "transposed": (lambda: nn.Sequential(
        nn.ConvTranspose2d(2, 3, 3, 2, 1, 1), nn.ELU(0.4), nn.Conv2d(3, 2, 3, padding="same", groups=1),
        nn.AvgPool2d(2), nn.Hardtanh(-0.4, 0.4), nn.Upsample(scale_factor=2), nn.Flatten()), (2, 3, 3)),
    "constants": (lambda: nn.Sequential(
        fn(lambda self, x: (2 * x - 1) * self.s + self.b, s=randn(2, 1), b=randn(3)), nn.Tanh(),
        fn(lambda self, x: F.pad(x.flip(1), (1, 1), value=0.5) / 3)), (2, 3)),
    "rows": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2, bias=False)), (5, 3)),
    "affine": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (3,)),
    "nothing": (nn.Identity, (3,)),
}  # fmt: skip


@cases(EXPLICIT)
def test_back_to_torch(case):
    make, shape = case
    net = randomised(make())
    model = to_implicit(net, randn(1, *shape))
    explicit = model.to_sequential()
    v = others(net, *shape)
    y = net(v).detach()
    agree(explicit, net, v)
    own = list(explicit.parameters())
    theirs = {p.data_ptr() for p in [*net.parameters(), *net.buffers()]}
    assert all(p.is_leaf and p.requires_grad and p.data_ptr() not in theirs for p in own)
    twin = copy.deepcopy(explicit)
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in own)
    with torch.no_grad():
        for p in own:
            p.mul_(1.5)
    close(net(v), y, 0.0)
    close(model(v), y, 1e-12)
    close(twin(v), y, 1e-12)
    if own:
        assert not torch.allclose(explicit(v), y)
    explicit.load_state_dict(twin.state_dict())
    close(explicit(v), y, 1e-12)
    if own:
        explicit(v).square().sum().backward()
        assert any(bool(p.grad.any()) for p in own if p.grad is not None)
        torch.optim.SGD(explicit.parameters(), 0.1).step()
        assert not torch.allclose(explicit(v), y)
    single = explicit.float()(v.float())
    assert single.dtype == torch.float32


def test_a_chain_becomes_modules_of_torch():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3), nn.Tanh()
    )
    explicit = exact(net, 1, 4, 4).to_sequential()
    assert isinstance(explicit, nn.Sequential)
    assert [type(m) for m in explicit] == [type(m) for m in net]
    assert (
        torch.equal(explicit[0].weight, net[0].weight) and explicit[0].weight is not net[0].weight
    )


def test_loops_are_no_explicit_network():
    model = to_implicit(nn.Sequential(nn.Linear(3, 3), ImplicitLayer(3, 2, 4)), randn(1, 3))
    with pytest.raises(ValueError, match="to_sequential: 1 loops among the blocks .*expected none"):
        model.to_sequential()
    with pytest.raises(ValueError, match="to_sequential"):
        flat_model(3, 2).to_sequential()
    m = to_implicit(mlp(nn.ReLU()), randn(1, 3)).dense()
    close(m.to_sequential()(randn(2, 3)), m(randn(2, 3)), 1e-12)


# ---- certificates ----------------------------------------------------------------------------------


def test_a_network_is_well_posed_without_a_matrix():
    model = to_implicit(randomised(ResNet(8)), randn(1, 3, 32, 32))
    with Largest() as seen:
        proof = model.certificate()
    assert proof.well_posed and "strictly block-triangular" in proof.condition
    assert seen.entries < 100_000 and "no loop" in proof.reason


def test_loops_are_certified_one_by_one():
    net = nn.Sequential(nn.Linear(3, 4), ImplicitLayer(4, 4, 5), nn.ReLU(), MonotoneLayer(4, 2, 6))
    model = to_implicit(net, randn(1, 3))
    proof = model.certificate()
    assert proof.well_posed and len(proof.components) == 2
    sizes = sorted(len(c.states) for c in proof.components)
    assert sizes == [5, 6]
    first = {block.name: k for k, block in enumerate(model.structure.blocks)}
    starts = [sum(b.size for b in model.structure.blocks[:k]) for k in range(len(first))]
    for c in proof.components:
        k = starts.index(c.states[0])
        assert c.states == tuple(range(starts[k], starts[k] + model.structure.blocks[k].size))


def test_a_loop_of_large_gain_is_not_certified():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1))
    model = to_implicit(net, randn(1, 1, 5, 5))
    assert model.feedback(0.01 * randn(25, 25)).certificate().well_posed
    proof = model.feedback(50 * randn(25, 25)).certificate()
    assert not proof.well_posed and proof.status in ("unknown", "ill-posed")
    large = to_implicit(
        nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 1, 3, padding=1)),
        randn(1, 1, 40, 40),
    )  # beyond what a matrix is made for: by the norms of the blocks
    K = torch.eye(1600)
    assert large.feedback(1e-4 * K).certificate().condition == "block norm matrix"
    unknown = large.feedback(100 * K).certificate()
    assert unknown.status == "unknown" and unknown.margin < 0


def test_a_certified_loop_has_one_fixed_point():
    """Soundness: from any start, the same state."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.MaxPool2d(3, 1, 1), nn.Conv2d(2, 1, 1)
    )
    model = to_implicit(net, randn(1, 1, 4, 4)).feedback(0.05 * randn(16, 16))
    assert model.certificate().well_posed
    u = randn(2, 16)
    x = model.solve(u, solver=TIGHT).value
    for seed in range(3):
        x0 = 100 * randn(2, model.states, seed=seed)
        close(model.solve(u, x0=x0, solver=TIGHT).value, x, 1e-10)
    z = model.A.apply(x) + model.B.apply(u) + model.b.dense()
    close(model.phi(z), x, 1e-10)


# ---- transforms and compilers ----------------------------------------------------------------------


@SCRIPT
@pytest.mark.parametrize("make, shape", [
    (conv_net, (1, 4, 4)), (lambda: mlp(nn.Tanh(), nn.Softmax(-1)), (3,)),
    (lambda: nn.Sequential(nn.Linear(3, 4), ImplicitLayer(4, 2, 5, solver=TIGHT)), (3,)),
    (lambda: nn.RNN(3, 2, batch_first=True), (4, 3)),
])  # fmt: skip
def test_transforms(make, shape):
    net = randomised(make())
    model = to_implicit(net, randn(2, *shape))
    u = others(net, *shape)
    y = model(u)
    close(torch.func.vmap(model)(u), y, 1e-10)

    def loss(t):
        return model(t).square().sum()

    leaf = u.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf), leaf)
    close(torch.func.grad(loss)(u), g, 1e-9)
    close(torch.func.vmap(torch.func.grad(loss))(u), g, 1e-9)
    jacobian = torch.func.jacrev(model)(u[0])
    expected = torch.autograd.functional.jacobian(model, u[0])
    close(jacobian, expected, 1e-9)
    close(torch.func.jacfwd(model)(u[0]), expected, 1e-9)
    tangent = torch.func.jvp(model, (u,), (u.flip(0),))[1]
    close(tangent, torch.autograd.functional.jvp(model, u, u.flip(0))[1], 1e-9)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make, shape", [
    (conv_net, (1, 4, 4)), (lambda: RNNLoop(None), (4, 3)), (lambda: UNet("bilinear"), (2, 8, 8)),
])  # fmt: skip
def test_compiled_in_one_graph(make, shape, backend):
    net = randomised(make())
    model = to_implicit(net, randn(2, *shape))
    torch.compiler.reset()
    compiled = torch.compile(lambda u: 2 * model(u), fullgraph=True, backend=backend)
    agree(compiled, lambda u: 2 * net(u), others(net, *shape), list(net.parameters()))
    torch.compiler.reset()


def test_an_explicit_network_compiles_and_is_exported():
    net = fn(lambda self, x: torch.relu(self.a(x)) + x, a=nn.Linear(3, 3))
    u = randn(2, 3)
    explicit = to_implicit(net, u).to_sequential()
    torch.compiler.reset()
    compiled = torch.compile(explicit, fullgraph=True, backend="aot_eager")
    close(compiled(u), net(u), 1e-12)
    torch.compiler.reset()
    exported = torch.export.export(to_implicit(net, u).to_sequential(), (u,))
    close(exported.module()(u), net(u), 1e-12)


def test_a_loop_compiles_with_the_rest():
    net = nn.Sequential(nn.Linear(3, 4), ImplicitLayer(4, 2, 5))
    u = randn(2, 3)
    model = to_implicit(net, u)
    torch.compiler.reset()
    compiled = torch.compile(lambda t: model(t), fullgraph=True, backend="aot_eager")
    close(compiled(u), net(u), 1e-9)
    torch.compiler.reset()


# ---- memory ----------------------------------------------------------------------------------------


def test_states_that_nobody_reads_any_more_are_let_go():
    """Without gradients a deep network needs the memory of a few layers, not of all."""
    net = nn.Sequential(*[nn.Sequential(nn.Linear(50, 50), nn.Tanh()) for _ in range(30)])
    model = to_implicit(net, randn(1, 50))
    made: list[weakref.ref] = []
    alive: list[int] = []

    class Alive(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if "tanh" in str(function):
                made.append(weakref.ref(out))
                alive.append(sum(ref() is not None for ref in made))
            return out

    with torch.no_grad(), Alive():
        model(randn(64, 50))
    assert len(alive) == 30 and max(alive) <= 3


# ---- what a reader of the code found --------------------------------------------------------------


class Fn4(nn.Module):
    """A function of a linear layer's output, with a vector of its own."""

    def __init__(self, f):
        super().__init__()
        self.l, self.f, self.v = nn.Linear(3, 4), f, nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.f(self, self.l(x))


def test_a_zero_bias_hides_nothing():
    """A bias along the last dimension of an image as wide as it has channels."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.b = nn.Parameter(torch.zeros(8))

        def forward(self, x):
            return torch.relu(self.c(x) + self.b)

    net, u = Wide(), randn(4, 3, 8, 8)
    model = to_implicit(net, u)
    net.b.data.normal_()
    agree(model, net, u, list(net.parameters()))


def test_a_forward_of_its_own_is_not_overlooked():
    class Gated(ImplicitLayer):
        def __init__(self):
            super().__init__(4, 4, 5)
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, u):
            return super().forward(u) + self.gate * u

    with pytest.raises(ConversionError, match="a forward of its own.*ImplicitLayer") as error:
        to_implicit(nn.Sequential(nn.Linear(3, 4), Gated()), randn(2, 3))
    assert error.value.module_path == "1"
    net = nn.Sequential(nn.Linear(3, 4), ImplicitLayer(4, 4, 5))
    net[1].register_forward_hook(lambda m, i, o: 2 * o)
    with pytest.raises(ConversionError, match="forward hook"):
        to_implicit(net, randn(2, 3))
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())  # a hook on what is looked into is followed
    net[1].register_forward_hook(lambda m, i, o: 2 * o)
    agree(to_implicit(net, randn(2, 3)), net, randn(3, 3))


@pytest.mark.parametrize("f", [
    lambda self, h: h / h.shape[0], lambda self, h: h * len(h), lambda self, h: h / h.numel(),
    lambda self, h: h * 2 if h.shape[0] == 2 else h, lambda self, h: h.reshape(2, -1),
])  # fmt: skip
def test_a_batch_size_that_became_a_number_is_found(f):
    with pytest.raises(ConversionError, match="3 samples, 2 in the example"):
        to_implicit(Fn4(f), randn(2, 3))


def clamped(self, h):
    h[:, :2].clamp_(-30, 30)
    return h


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_write_through_a_view_is_found_where_the_example_shows_nothing(kind):
    with pytest.raises(ConversionError, match="in place"):
        to_implicit(Fn4(clamped).to(kind), randn(2, 3).to(kind))


def without_gradient(self, h):
    with torch.no_grad():
        return self.l(h[:, :3])


def hooked(self, h):
    h.register_hook(torch.neg)
    return h


@pytest.mark.parametrize("f, words", [
    (without_gradient, "no_grad"), (hooked, "register_hook|argument of type"),
])  # fmt: skip
def test_gradients_that_would_be_others_are_refused(f, words):
    with pytest.raises(ConversionError, match=words):
        to_implicit(Fn4(f), randn(2, 3))


def test_hooks_and_inexact_adjoints_are_refused():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    net[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(ConversionError, match="backward hook"):
        to_implicit(net, randn(2, 3))
    with pytest.raises(ConversionError, match="OneStep"):
        to_implicit(ImplicitLayer(3, 4, 5, adjoint="one_step"), randn(2, 3))
    with pytest.raises(ConversionError, match="any form"):
        deq = implicitdl.EquilibriumLayer(lambda z, u: torch.tanh(z / 2 + u), 4)
        to_implicit(nn.Sequential(nn.Linear(3, 4), deq), randn(2, 3))


def test_a_counter_among_the_buffers_stays_a_tensor():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(3, 4)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.steps += 1
            self.last = torch.relu(self.l(x))
            return self.last

    net = Counting()
    model = to_implicit(net, randn(2, 3))
    assert net.steps.item() == 0 and isinstance(net.state_dict()["steps"], Tensor)
    assert not hasattr(net, "last")
    agree(model, net, randn(3, 3), list(net.parameters()))


def test_a_state_of_nan_has_not_converged():
    net = randomised(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    model, u = to_implicit(net, randn(2, 3)), randn(3, 3)
    u[1] = torch.nan
    found = model.solve(u, on_failure="return")
    assert found.converged.tolist() == [True, False, True] and found.residual[1] == torch.inf
    with pytest.raises(implicitdl.ConvergenceError, match="index 1"):
        model.solve(u)


def test_a_deep_copy_owns_its_tensors():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model, u = to_implicit(net, randn(2, 3)), randn(3, 3)
    own = copy.deepcopy(model)
    before = own(u)
    net[0].weight.data.zero_()
    assert torch.equal(own(u), before) and not torch.equal(model(u), before)
    with pytest.raises(TypeError, match="save"):
        pickle.dumps(model)


def test_numbers_take_the_dtype_of_what_they_meet():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.l = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)

        def forward(self, x):
            h = F.avg_pool2d(F.pad(self.c(x) + 0.1, (1, 1), value=0.3), 2)
            return self.l(h[..., :2].flatten(1).relu())

    net = Shifted().float()
    model = to_implicit(net, randn(2, 1, 6, 6).float())
    u = randn(3, 1, 6, 6)
    agree(model, net, u.float(), allowed=1e-6, gradients=1e-6)
    net.double()
    agree(model, net, u)
    net.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(u.float()).dtype == net(u.float()).dtype == torch.bfloat16


def test_a_mask_keeps_what_it_freezes():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model = to_implicit(net, randn(2, 3))
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[7, 1] = True  # a feedback, with the network's own blocks frozen
    with pytest.raises(ValueError, match="mask"):
        ImplicitLayer.from_model(model, trainable=mask)
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[0, 5] = True
    layer = ImplicitLayer.from_model(model, trainable=mask)
    before = layer.A.detach().clone()
    with torch.no_grad():
        layer.W += 100.0
    assert torch.equal(layer.A[~mask], before[~mask]) and layer.A[0, 5] == before[0, 5] + 100


# ---- files -----------------------------------------------------------------------------------------


def saved(net, u, path):
    model = to_implicit(net, u)
    model.save(path)
    return model


def test_files_hold_structure_and_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    loops = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), ImplicitLayer(6, 3, 5), MonotoneLayer(3, 2, 4)
    )
    for net, u in ((ResNet(4, 1), randn(2, 3, 32, 32)), (UNet(), randn(2, 2, 8, 8)),
                   (loops, randn(2, 4))):  # fmt: skip
        net = randomised(net)
        model = saved(net, u, path)
        again = ImplicitModel.load(path)
        close(again(u), model(u), 1e-12)
        assert str(again) == str(model)
        assert [b.equation for b in again.structure.blocks] == [
            b.equation for b in model.structure.blocks
        ]
        for p in net.parameters():
            p.data.zero_()
        assert not torch.equal(again(u), model(u))  # the file's tensors are its own


def tampered(path, change):
    """The file with its header changed."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["implicitdl.ImplicitModel"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header["structure"], tensors)
    text = json.dumps(header)
    save_file(tensors, path, metadata={"implicitdl.ImplicitModel": text})


def a_term(structure):
    return structure["blocks"][0]["row"]["terms"][0]


@pytest.mark.parametrize("change", [
    lambda s, t: a_term(s).__setitem__(0, 7),
    lambda s, t: a_term(s).__setitem__(0, "u"),
    lambda s, t: a_term(s).__setitem__(1, {"is": "Live", "read": "os.system"}),
    lambda s, t: a_term(s).__setitem__(1, {"is": "Denser"}),
    lambda s, t: a_term(s).__setitem__(1, 3.0),
    lambda s, t: s["blocks"][0].__setitem__("shape", [5]),
    lambda s, t: s["blocks"][0].__setitem__("shape", [-1]),
    lambda s, t: s["blocks"][0]["phi"].__setitem__("name", "Shell"),
    lambda s, t: s.__setitem__("blocks", []),
    lambda s, t: s.__setitem__("input_shape", "3"),
    lambda s, t: s.__setitem__("output", None),
    lambda s, t: s.pop("output"),
    lambda s, t: t.pop("t0"),
    lambda s, t: t.__setitem__("t1", torch.zeros(17)),
    lambda s, t: t.__setitem__("t1", torch.zeros(4, dtype=torch.long)),
    lambda s, t: t.__setitem__("t1", torch.zeros(4, dtype=torch.float32)),
    lambda s, t: s["blocks"][0].__setitem__("equation", "{}"),
    lambda s, t: s["blocks"][0].__setitem__("equation", "not JSON"),
])  # fmt: skip
def test_tampered_files_are_refused(tmp_path, change):
    path = tmp_path / "model.safetensors"
    saved(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), randn(2, 3), path)
    tampered(path, change)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        ImplicitModel.load(path)
