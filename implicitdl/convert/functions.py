"""Converters of the functions and methods of torch that are affine, or activations."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations
from ..operators import Convolution, Live, Pooling, Weight, read
from .builder import Refused, Trace, Value, weight_of
from .registry import register

# ---- helpers ---------------------------------------------------------------------------------------


def _rank(x: Value) -> int:
    return len(x.shape) + 1


def _dim(x: Value, dim: int, *, extra: int = 0) -> int:
    """The dimension of a sample that a dimension of the batch stands for.

    Raises:
        Refused: it is the batch dimension.
    """
    rank = _rank(x) + extra
    if not -rank <= dim < rank:
        raise Refused(f"dimension {dim} of a tensor with {rank}")
    if dim % rank == 0:
        raise Refused("it works along the batch dimension, across samples")
    return dim % rank - 1


def _dims(x: Value, dim: "int | Sequence[int] | None") -> tuple[int, ...]:
    if dim is None:
        raise Refused("it reduces all dimensions, the batch among them")
    given = (dim,) if isinstance(dim, int) else tuple(dim)
    return tuple(sorted(_dim(x, d) for d in given))


def _tuple(value: Any, count: int) -> tuple[int, ...]:
    return (
        (value,) * count
        if isinstance(value, int)
        else tuple(value) * (count if len(value) == 1 else 1)
    )


def _number(x: Any) -> bool:
    return isinstance(x, int | float)


def _constant(trace: Trace, x: Any, shape: tuple[int, ...]) -> tuple[Weight, tuple[int, ...]]:
    """A constant as it broadcasts against a sample, and the shape that both broadcast to."""
    own = tuple(read(x).shape)
    if len(own) > len(shape) + 1:
        raise Refused(f"a constant of shape {own} against a tensor of {len(shape) + 1} dimensions")
    if len(own) == len(shape) + 1:
        t = read(x)
        if own[0] not in (1, trace.batch) or bool((t != t[:1]).any()):
            raise Refused(f"a constant of shape {own} with a number for each sample")
        drop = x
        x = Live(lambda: read(drop)[0]) if isinstance(x, Live) else x[0]
        own = own[1:]
    return x, tuple(torch.broadcast_shapes(own, shape))


def _expanded(trace: Trace, x: Value, shape: tuple[int, ...]) -> Value:
    return x if x.shape == shape else trace.gather(x, "expand", *shape)


# ---- products with weights -------------------------------------------------------------------------


@register(F.linear)
def _linear(trace: Trace, input: Value, weight: Any, bias: Any = None) -> Value:
    return trace.linear(input, weight_of(weight), None if bias is None else weight_of(bias))


@register(torch.matmul, operator.matmul, torch.mm, "matmul", "mm", "__matmul__")
def _matmul(trace: Trace, input: Any, other: Any) -> Value:
    x, y = input, other
    if not isinstance(x, Value):
        return _from_the_left(trace, x, y)
    weight_of(y)
    if read(y).dim() != 2 or not x.shape:
        raise Refused(f"a product with a constant of shape {tuple(read(y).shape)}")
    return trace.linear(x, Live(lambda: read(y).mT) if isinstance(y, Live) else y.mT)


def _from_the_left(trace: Trace, W: Weight, x: Value) -> Value:
    """W x along the last dimension but one."""
    rank = len(x.shape)
    if read(W).dim() != 2 or rank < 2:
        raise Refused("the input stands on the right of a matrix product, across samples")
    order = [*range(rank - 2), rank - 1, rank - 2]
    turned = trace.gather(x, "permute", *order)
    return trace.gather(trace.linear(turned, W), "permute", *order)


@register(torch.addmm)
def _addmm(trace: Trace, input: Any, mat1: Value, mat2: Any, *, beta: float = 1,
           alpha: float = 1) -> Value:  # fmt: skip
    y = trace.scale(_matmul(trace, mat1, mat2), alpha)
    return _add(trace, y, input, alpha=beta)


def _cell(phi: activations.Activation, *targets: Any) -> None:
    """h' = phi(W_ih x + b_ih + W_hh h + b_hh), torch's recurrent cell."""

    def convert(trace: Trace, input: Value, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None,
                b_hh: Any = None) -> Value:  # fmt: skip
        z = trace.linear(input, w_ih, b_ih)
        if isinstance(hx, Value):
            z = trace.add(z, trace.linear(hx, w_hh))
        else:
            z = _add(trace, z, Live(lambda: F.linear(read(hx), read(w_hh))))
        return trace.activate(z if b_hh is None else trace.shift(z, b_hh), phi)

    register(*targets)(convert)


_cell(activations.Tanh(), torch.rnn_tanh_cell)
_cell(activations.ReLU(), torch.rnn_relu_cell)


def _convolve(
    trace: Trace, x: Value, weight: Any, bias: Any, transposed: bool, stride: Any, padding: Any,
    dilation: Any, groups: int, output_padding: Any = 0,
) -> Value:  # fmt: skip
    w = weight_of(weight)
    spatial = read(w).dim() - 2
    if len(x.shape) != spatial + 1:
        raise Refused(f"a convolution in {spatial} dimensions of a sample of shape {x.shape}")
    options: dict[str, Any] = {
        "stride": _tuple(stride, spatial),
        "padding": padding if isinstance(padding, str) else _tuple(padding, spatial),
        "dilation": _tuple(dilation, spatial),
        "groups": groups,
        "transposed": transposed,
    }
    if transposed:
        options["output_padding"] = _tuple(output_padding, spatial)
    probe = Convolution(read(w).to("meta"), x.shape, (), **options)
    image = probe.apply(torch.empty(1, *x.shape, device="meta", dtype=trace.dtype))
    y = trace.apply(Convolution(w, x.shape, tuple(image.shape[1:]), **options), x)
    if bias is None:
        return y
    b, ones = weight_of(bias), (1,) * spatial
    return trace.shift(y, Live(lambda: read(b).view(-1, *ones)))


@register(F.conv1d, F.conv2d, F.conv3d)
def _conv(
    trace: Trace, input: Value, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    return _convolve(trace, input, weight, bias, False, stride, padding, dilation, groups)


@register(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _conv_transpose(
    trace: Trace, input: Value, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    return _convolve(trace, input, weight, bias, True, stride, padding, dilation, groups,
                     output_padding)  # fmt: skip


@register(F.batch_norm)
def _batch_norm(
    trace: Trace, input: Value, running_mean: Any, running_var: Any, weight: Any = None,
    bias: Any = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Value:  # fmt: skip
    if training or running_mean is None:
        raise Refused(
            "batch normalisation by the statistics of the batch couples the samples; call eval() "
            "first (and keep track_running_stats=True)"
        )
    given = [weight_of(t) for t in (running_mean, running_var)]
    more = [None if t is None else weight_of(t) for t in (weight, bias)]
    ones = (1,) * (len(input.shape) - 1)

    def factor() -> Tensor:
        s = (read(given[1]) + eps).rsqrt()
        return (s if more[0] is None else s * read(more[0])).view(-1, *ones)

    def shift() -> Tensor:
        t = -read(given[0]).view(-1, *ones) * factor()
        return t if more[1] is None else t + read(more[1]).view(-1, *ones)

    return trace.shift(trace.scale(input, Live(factor)), Live(shift))


# ---- sums and products with constants --------------------------------------------------------------


@register(torch.add, operator.add, operator.iadd, "add", "add_", "__add__", "__radd__", "__iadd__")
def _add(trace: Trace, input: Any, other: Any, *, alpha: float = 1) -> Any:
    x, y = input, other
    if isinstance(y, Value):
        y = trace.scale(y, alpha)
        if not isinstance(x, Value):
            x, y = y, x
    elif alpha != 1:
        factor = y
        y = Live(lambda: read(factor) * alpha) if not _number(y) else y * alpha
    if isinstance(y, Value):
        shape = tuple(torch.broadcast_shapes(x.shape, y.shape))
        return trace.add(_expanded(trace, x, shape), _expanded(trace, y, shape))
    if _number(y):
        return trace.shift(x, float(y))
    y, shape = _constant(trace, y, x.shape)
    return trace.shift(_expanded(trace, x, shape), y)


@register(torch.sub, operator.sub, operator.isub, torch.subtract, "sub", "sub_", "__sub__")
def _sub(trace: Trace, input: Any, other: Any, *, alpha: float = 1) -> Any:
    return _add(trace, input, other, alpha=-alpha)


@register(torch.rsub, "__rsub__", "rsub")
def _rsub(trace: Trace, x: Any, y: Any) -> Any:
    return _sub(trace, y, x)


@register(torch.neg, operator.neg, torch.negative, "neg", "__neg__")
def _neg(trace: Trace, x: Value) -> Value:
    return trace.scale(x, -1.0)


@register(torch.mul, operator.mul, operator.imul, torch.multiply, "mul", "mul_", "__mul__",
          "__rmul__")  # fmt: skip
def _mul(trace: Trace, input: Any, other: Any) -> Value:
    x, y = input, other
    if not isinstance(x, Value):
        x, y = y, x
    if _number(y):
        return trace.scale(x, y)
    y, shape = _constant(trace, weight_of(y), x.shape)
    return trace.scale(_expanded(trace, x, shape), y)


@register(torch.div, operator.truediv, operator.itruediv, torch.true_divide, "div", "div_",
          "__truediv__")  # fmt: skip
def _div(trace: Trace, input: Any, other: Any, *, rounding_mode: Any = None) -> Value:
    x, y = input, other
    if not isinstance(x, Value):
        raise Refused("a division by a state is not affine")
    if rounding_mode is not None:
        raise Refused("a division that rounds is not continuous")
    if _number(y):
        return trace.scale(x, 1.0 / y)
    divisor = weight_of(y)
    return _mul(trace, x, Live(lambda: 1.0 / read(divisor)))


# ---- activations -----------------------------------------------------------------------------------


def _activation(make: Callable[..., activations.Activation], *targets: Any) -> None:
    """An activation with its arguments, whether or not it works in place."""

    def convert(trace: Trace, input: Value, *args: Any, inplace: bool = False, **kw: Any) -> Value:
        return trace.activate(input, make(*args, **kw))

    register(*targets)(convert)


_activation(lambda: activations.ReLU(), F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_")
_activation(lambda: activations.HardTanh(low=0.0, high=6.0), F.relu6)
_activation(
    lambda slope=0.01: activations.LeakyReLU(negative_slope=slope),
    torch._C._nn.leaky_relu,
)
_activation(
    lambda negative_slope=0.01: activations.LeakyReLU(negative_slope=negative_slope), F.leaky_relu
)
_activation(lambda alpha=1.0: activations.ELU(alpha=alpha), F.elu)
_activation(lambda: activations.Sigmoid(), F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_")
_activation(lambda: activations.Tanh(), F.tanh, torch.tanh, "tanh", "tanh_")
_activation(
    lambda min_val=-1.0, max_val=1.0: activations.HardTanh(low=min_val, high=max_val), F.hardtanh
)
_activation(lambda: activations.SiLU(), F.silu)
_activation(lambda lambd=0.5: activations.SoftShrink(threshold=lambd), F.softshrink)


@register(F.softplus)
def _softplus(trace: Trace, input: Value, beta: float = 1.0, threshold: float = 20.0) -> Value:
    # log(1 + exp(beta z)) / beta, and z where beta z is beyond the threshold.
    phi = activations.Softplus(threshold=float(threshold))
    return trace.scale(trace.activate(trace.scale(input, beta), phi), 1.0 / beta)


@register(F.gelu)
def _gelu(trace: Trace, input: Value, approximate: str = "none") -> Value:
    if approximate != "none":
        raise Refused(
            f"GELU(approximate={approximate!r}) is another function than GELU, whose slopes are not "
            "known here; register it as an Activation"
        )
    return trace.activate(input, activations.GELU())


@register(torch.clamp, torch.clip, "clamp", "clip", "clamp_")
def _clamp(trace: Trace, input: Value, min: Any = None, max: Any = None) -> Value:
    if not all(t is None or _number(t) for t in (min, max)):
        raise Refused("clamp with tensors as bounds")
    low, high = (-math.inf if min is None else min), (math.inf if max is None else max)
    if math.isfinite(low) and math.isfinite(high):
        return trace.activate(input, activations.HardTanh(low=float(low), high=float(high)))
    if math.isfinite(low):  # relu(z - low) + low
        return _add(trace, trace.activate(_add(trace, input, -low), activations.ReLU()), low)
    if math.isfinite(high):  # high - relu(high - z)
        return _rsub(trace, trace.activate(_rsub(trace, input, high), activations.ReLU()), high)
    return input


@register(F.softmax, torch.softmax, "softmax")
def _softmax(trace: Trace, input: Value, dim: int | None = None, *_: Any, dtype: Any = None,
             **__: Any) -> Value:  # fmt: skip
    if dim is None:
        raise Refused("softmax without a dimension")
    at, last = _dim(input, dim), len(input.shape) - 1
    if at != last:
        order = [i for i in range(last + 1) if i != at] + [at]
        back = [order.index(i) for i in range(last + 1)]
        moved = trace.activate(trace.gather(input, "permute", *order), activations.Softmax())
        return trace.gather(moved, "permute", *back)
    return trace.activate(input, activations.Softmax())


# ---- pooling ---------------------------------------------------------------------------------------


def _pool(trace: Trace, x: Value, method: str, spatial: int, *arguments: Any) -> Value:
    if len(x.shape) != spatial + 1:
        raise Refused(f"pooling in {spatial} dimensions of a sample of shape {x.shape}")
    return trace.apply(Pooling(x.shape, method, arguments), x)


def _register_pooling(spatial: int) -> None:
    average = f"avg_pool{spatial}d"
    adaptive = f"adaptive_avg_pool{spatial}d"

    @register(getattr(F, average))
    def _(trace: Trace, input: Value, kernel_size: Any, stride: Any = None, padding: Any = 0,
          ceil_mode: bool = False, count_include_pad: bool = True,
          divisor_override: Any = None) -> Value:  # fmt: skip
        kernel = _tuple(kernel_size, spatial)
        given = kernel if stride is None or stride == () else _tuple(stride, spatial)
        more = () if spatial == 1 else (divisor_override,)
        return _pool(trace, input, average, spatial, kernel, given, _tuple(padding, spatial),
                     ceil_mode, count_include_pad, *more)  # fmt: skip

    @register(getattr(F, adaptive))
    def _(trace: Trace, input: Value, output_size: Any) -> Value:
        size = (output_size,) * spatial if isinstance(output_size, int | None) else output_size
        full = tuple(n if s is None else s for s, n in zip(size, input.shape[1:], strict=True))
        return _pool(trace, input, adaptive, spatial, full if spatial > 1 else full[0])

    @register(getattr(F, f"max_pool{spatial}d"), getattr(torch, f"max_pool{spatial}d"))
    def _(trace: Trace, input: Value, kernel_size: Any, stride: Any = None, padding: Any = 0,
          dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False) -> Value:  # fmt: skip
        if return_indices:
            raise Refused("max-pooling with return_indices=True: indices are not continuous")
        kernel = _tuple(kernel_size, spatial)
        return _max_pool(trace, input, spatial, kernel,
                         kernel if stride is None or stride == () else _tuple(stride, spatial),
                         _tuple(padding, spatial), _tuple(dilation, spatial), ceil_mode)  # fmt: skip

    @register(getattr(F, f"adaptive_max_pool{spatial}d"))
    def _(trace: Trace, input: Value, output_size: Any, return_indices: bool = False) -> Value:
        size = (output_size,) * spatial if isinstance(output_size, int | None) else output_size
        own = input.shape[1:]
        full = tuple(n if s is None else s for s, n in zip(size, own, strict=True))
        if return_indices or any(n % s for s, n in zip(full, own, strict=True)):
            raise Refused(f"adaptive max-pooling of {own} to {full}: expected windows of one size")
        kernel = tuple(n // s for s, n in zip(full, own, strict=True))
        none = (0,) * spatial
        return _max_pool(trace, input, spatial, kernel, kernel, none, (1,) * spatial, False)


def _max_pool(
    trace: Trace, x: Value, spatial: int, kernel: tuple[int, ...], stride: tuple[int, ...],
    padding: tuple[int, ...], dilation: tuple[int, ...], ceil_mode: bool,
) -> Value:  # fmt: skip
    if len(x.shape) != spatial + 1:
        raise Refused(f"pooling in {spatial} dimensions of a sample of shape {x.shape}")
    phi = activations.MaxPool(
        shape=x.shape, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation,
        ceil_mode=bool(ceil_mode),
    )  # fmt: skip
    return trace.activate(x, phi)


for _spatial in (1, 2, 3):
    _register_pooling(_spatial)


@register(torch.mean, "mean")
def _mean(trace: Trace, input: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return trace.apply(Pooling(input.shape, "mean", (_dims(input, dim), keepdim)), input)


@register(torch.sum, "sum")
def _sum(trace: Trace, input: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return trace.apply(Pooling(input.shape, "sum", (_dims(input, dim), keepdim)), input)


@register(F.interpolate, F.upsample)
def _interpolate(
    trace: Trace, input: Value, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: bool = False,
) -> Value:  # fmt: skip
    if mode not in ("nearest", "linear", "bilinear", "trilinear", "area") or antialias:
        raise Refused(f"interpolation of mode {mode!r} with antialias={antialias}")
    spatial = len(input.shape) - 1
    if size is None:
        factors = (scale_factor,) * spatial if _number(scale_factor) else tuple(scale_factor)
        exact = [n * s for n, s in zip(input.shape[1:], factors, strict=True)]
        if any(float(e) != int(e) for e in exact):
            raise Refused(f"interpolation of {input.shape} by {scale_factor}, not to whole sizes")
        full = tuple(int(e) for e in exact)
    else:
        full = _tuple(size, spatial)
    if mode == "nearest":
        return trace.gather(input, "nearest", *full)
    return trace.apply(Pooling(input.shape, "interpolate", (full, mode, align_corners)), input)


# ---- nothing at all, in evaluation -----------------------------------------------------------------


@register(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
          F.feature_alpha_dropout, torch.dropout)  # fmt: skip
def _dropout(trace: Trace, input: Value, p: float = 0.5, training: bool = True,
             inplace: bool = False) -> Value:  # fmt: skip
    if training and p > 0:
        raise Refused("dropout in training is random; call eval() first")
    return input


@register("contiguous", "clone", "requires_grad_", torch.clone, "cpu")
def _same(trace: Trace, input: Value, *_: Any, **__: Any) -> Value:
    return input


@register("to", "type", "float", "double", "type_as")
def _cast(trace: Trace, input: Value, *args: Any, **kwargs: Any) -> Value:
    if (trace.known.dtype, trace.known.device) == (trace.dtype, trace.device):
        return input
    raise Refused("it changes the dtype or device between layers")


@register("new_zeros", "new_ones", "new_full", "new_empty", torch.zeros_like, torch.ones_like,
          torch.full_like)  # fmt: skip
def _filled(trace: Trace, input: Any, *args: Any, **kwargs: Any) -> Any:
    """A constant, which has the shape of the input and none of its values."""
    return trace.known
