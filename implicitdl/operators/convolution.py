"""Convolutions as operators: their matrix, a Toeplitz one, is never made."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._base import Operator, Weight, read

_FORWARD: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


@dataclass(frozen=True, eq=False, repr=False)
class Convolution(Operator):
    """x -> w * x, in one, two or three dimensions, as torch's `conv` or `conv_transpose`.

    Args:
        weight: w.  # (out, in / groups, *kernel), or (in, out / groups, *kernel) where transposed
        in_shape, out_shape: of a sample, (channels, *size).
        stride, padding, dilation, groups: as in torch; padding with zeros, or "same" or "valid".
        transposed: whether it is `conv_transpose`.
        output_padding: of `conv_transpose`.
    """

    weight: Weight
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def cost(self) -> int:
        side = self.in_shape if self.transposed else self.out_shape
        return read(self.weight).numel() * math.prod(side[1:])

    @property
    def light(self) -> bool:
        """Never, though a depthwise one comes close."""
        return False

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        fused = beyond = None
        if bias is not None:
            # A number a channel goes into the convolution, anything else is added to it.
            if tuple(bias.shape) == (self.out_shape[0],) + (1,) * (len(self.out_shape) - 1):
                fused = bias.reshape(-1)
            else:
                beyond = bias
        spatial = len(self.in_shape) - 1
        options: Any
        if self.transposed:
            options = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
            y = _TRANSPOSED[spatial](x, read(self.weight), fused, *options)
        else:
            options = (self.stride, self.padding, self.dilation, self.groups)
            y = _FORWARD[spatial](x, read(self.weight), fused, *options)
        return y if beyond is None else y + beyond

    def abs(self) -> "Convolution":
        return replace(self, weight=read(self.weight).abs())

    def as_module(self, bias: Tensor | None) -> nn.Module | None:
        """A convolution of torch's, where the bias is one number a channel."""
        if bias is not None and bias.numel() != bias.shape[0]:
            return None
        weight = read(self.weight)
        spatial = weight.dim() - 2
        name = f"Conv{'Transpose' if self.transposed else ''}{spatial}d"
        options: dict[str, Any] = {
            "stride": self.stride, "padding": self.padding, "dilation": self.dilation,
            "groups": self.groups, "bias": bias is not None, "dtype": weight.dtype,
            "device": weight.device,
        }  # fmt: skip
        if self.transposed:
            options["output_padding"] = self.output_padding
        sizes = self.in_shape[0], self.out_shape[0], tuple(weight.shape[2:])
        layer = getattr(nn, name)(*sizes, **options)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias.flatten())
        return layer

    @property
    def label(self) -> str:
        kernel = "x".join(map(str, read(self.weight).shape[2:]))
        return f"{'transposed ' if self.transposed else ''}convolution {kernel}"
