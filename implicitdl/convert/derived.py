"""Activations that are affine functions of others: they become blocks of these."""

from typing import Any

import torch
import torch.nn.functional as F

from .. import activations
from ..operators import Live, read
from .builder import Refused, Trace, Value, weight_of
from .functions import _add, _sub
from .registry import register

_RELU = activations.ReLU()


@register(torch.abs, "abs", "__abs__", torch.absolute, "absolute")
def _abs(trace: Trace, input: Value) -> Value:
    """|x|, a leaky ReLU of slope -1."""
    return trace.activate(input, activations.LeakyReLU(negative_slope=-1.0))


@register(F.prelu, torch.prelu)
def _prelu(trace: Trace, input: Value, weight: Any) -> Value:
    """relu(x) - a relu(-x), with a slope a that may be trained, one or one a channel."""
    a = weight_of(weight)
    x = trace.state(input)
    ones = (1,) * max(len(x.shape) - 1, 0)
    if read(a).numel() not in (1, x.shape[0] if x.shape else 1):
        raise Refused(f"PReLU with {read(a).numel()} slopes for a sample of shape {x.shape}")
    below = trace.activate(trace.scale(x, -1.0), _RELU)
    slope = Live(lambda: -(read(a).view(-1, *ones)))
    return trace.add(trace.activate(x, _RELU), trace.scale(below, slope))


@register(torch.maximum, "maximum", torch.max, "max")
def _maximum(trace: Trace, x: Any, y: Any = None, *more: Any, **options: Any) -> Any:
    """y + relu(x - y)."""
    if y is None or isinstance(y, int) or more or options:
        raise Refused("the largest of many entries; take max-pooling over windows")
    y = trace.state(y) if isinstance(y, Value) else y
    return _add(trace, trace.activate(_sub(trace, x, y), _RELU), y)


@register(torch.minimum, "minimum", torch.min, "min")
def _minimum(trace: Trace, x: Any, y: Any = None, *more: Any, **options: Any) -> Any:
    """y - relu(y - x)."""
    if y is None or isinstance(y, int) or more or options:
        raise Refused("the smallest of many entries; take max-pooling of minus x over windows")
    y = trace.state(y) if isinstance(y, Value) else y
    return _sub(trace, y, trace.activate(_sub(trace, y, x), _RELU))


@register(F.hardsigmoid)
def _hardsigmoid(trace: Trace, input: Value, inplace: bool = False) -> Value:
    """x / 6 + 1/2, clipped to [0, 1]."""
    z = _add(trace, trace.scale(input, 1 / 6), 0.5)
    return trace.activate(z, activations.HardTanh(low=0.0, high=1.0))


@register(F.logsigmoid)
def _logsigmoid(trace: Trace, input: Value) -> Value:
    """-softplus(-x)."""
    z = trace.activate(trace.scale(input, -1.0), activations.Softplus())
    return trace.scale(z, -1.0)


@register(F.selu, torch.selu, torch.selu_)
def _selu(trace: Trace, input: Value, inplace: bool = False) -> Value:
    """lambda ELU_alpha(x), with the constants of Klambauer et al. (2017)."""
    elu = trace.activate(input, activations.ELU(alpha=1.6732632423543772848170429916717))
    return trace.scale(elu, 1.0507009873554804934193349852946)


@register(F.celu, torch.celu, torch.celu_)
def _celu(trace: Trace, input: Value, alpha: float = 1.0, inplace: bool = False) -> Value:
    """alpha ELU(x / alpha)."""
    elu = trace.activate(trace.scale(input, 1 / alpha), activations.ELU())
    return trace.scale(elu, alpha)


@register(F.tanhshrink)
def _tanhshrink(trace: Trace, input: Value) -> Value:
    """x - tanh(x)."""
    x = trace.state(input)
    return trace.add(x, trace.scale(trace.activate(x, activations.Tanh()), -1.0))
