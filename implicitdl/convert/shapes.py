"""Converters of what moves entries about: views, slices, joins, padding."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..model.structure import Constant, Row
from ..operators import read
from .builder import Refused, Trace, Value
from .functions import _constant, _dim
from .registry import register


def _sizes(sizes: Sequence[Any]) -> list[int]:
    given = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    return [int(n) for n in given]


@register(torch.reshape, "reshape", "view")
def _reshape(trace: Trace, input: Value, *shape: Any, **named: Any) -> Value:
    new = _sizes(shape or (named["shape"],))
    count = trace.batch * math.prod(input.shape)
    if -1 in new:
        rest = math.prod(n for n in new if n != -1)
        new = [count // max(rest, 1) if n == -1 else n for n in new]
    if not new or new[0] != trace.batch:
        raise Refused(
            f"a reshape of {(trace.batch, *input.shape)} to {tuple(new)} does not keep the batch "
            "dimension first"
        )
    return trace.reshape(input, tuple(new[1:]))


@register("view_as", "reshape_as")
def _reshape_as(trace: Trace, input: Value, other: Value) -> Value:
    return trace.reshape(input, other.shape)


@register(torch.flatten, "flatten")
def _flatten(trace: Trace, input: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    if start_dim == 0 and len(input.shape) == 0:
        return input
    start, end = _dim(input, start_dim), _dim(input, end_dim)
    s = input.shape
    return trace.reshape(input, (*s[:start], math.prod(s[start : end + 1]), *s[end + 1 :]))


@register(torch.unflatten, "unflatten")
def _unflatten(trace: Trace, input: Value, dim: int, sizes: Sequence[int]) -> Value:
    at, s = _dim(input, dim), input.shape
    new = list(sizes)
    if -1 in new:
        new[new.index(-1)] = s[at] // -math.prod(new)
    return trace.reshape(input, (*s[:at], *new, *s[at + 1 :]))


@register(torch.squeeze, "squeeze")
def _squeeze(trace: Trace, input: Any, dim: Any = None) -> Any:
    if isinstance(input, tuple):  # the states of a recurrent network, one a layer
        return input[0] if dim in (0, None) and len(input) == 1 else _not_layers()
    s = input.shape
    if dim is None:
        if trace.batch == 1:
            raise Refused("squeeze() without a dimension would take the batch of one along")
        return trace.reshape(input, tuple(n for n in s if n != 1))
    dims = {_dim(input, d) for d in ((dim,) if isinstance(dim, int) else dim)}
    return trace.reshape(input, tuple(n for i, n in enumerate(s) if i not in dims or n != 1))


def _not_layers() -> Any:
    raise Refused(
        "the states of a recurrent network are taken one layer at a time, as h[-1]; anything else "
        "works across samples"
    )


@register(torch.unsqueeze, "unsqueeze")
def _unsqueeze(trace: Trace, input: Value, dim: int) -> Value:
    at = _dim(input, dim, extra=1)
    return trace.reshape(input, (*input.shape[:at], 1, *input.shape[at:]))


@register(torch.permute, "permute")
def _permute(trace: Trace, input: Value, *dims: Any) -> Value:
    order = _sizes(dims)
    rank = len(input.shape) + 1
    full = [d % rank for d in order]
    if full[0] != 0:
        raise Refused("permute moves the batch dimension; keep it first (batch_first=True)")
    return _moved(trace, input, [d - 1 for d in full[1:]])


def _moved(trace: Trace, x: Value, order: list[int]) -> Value:
    return x if order == list(range(len(order))) else trace.gather(x, "permute", *order)


@register(torch.transpose, torch.swapaxes, "transpose", "swapaxes")
def _transpose(trace: Trace, input: Value, dim0: int, dim1: int) -> Value:
    a, b = _dim(input, dim0), _dim(input, dim1)
    order = list(range(len(input.shape)))
    order[a], order[b] = order[b], order[a]
    return _moved(trace, input, order)


@register(getattr)
def _attribute(trace: Trace, input: Value, name: str) -> Value:
    if name == "mT":
        return _transpose(trace, input, -2, -1)
    raise Refused(f"the attribute .{name} of a tensor")


@register(torch.movedim, "movedim")
def _movedim(trace: Trace, input: Value, source: int, destination: int) -> Value:
    a, b = _dim(input, source), _dim(input, destination)
    order = [i for i in range(len(input.shape)) if i != a]
    order.insert(b, a)
    return _moved(trace, input, order)


@register("expand")
def _expand(trace: Trace, input: Value, *sizes: Any) -> Value:
    new = _sizes(sizes)
    own = (trace.batch, *input.shape)
    extra = len(new) - len(own)
    full = [own[i - extra] if n == -1 else n for i, n in enumerate(new)]
    if extra or full[0] != trace.batch:
        raise Refused("expand with more dimensions moves the batch; unsqueeze(1) first")
    return trace.gather(input, "expand", *full[1:])


@register("repeat", torch.tile, "tile")
def _repeat(trace: Trace, input: Value, *sizes: Any) -> Value:
    times = _sizes(sizes)
    if len(times) != len(input.shape) + 1 or times[0] != 1:
        raise Refused("repeat must keep the batch dimension as it is")
    return trace.gather(input, "repeat", *times[1:])


@register(torch.flip, "flip")
def _flip(trace: Trace, input: Value, *dims: Any) -> Value:
    return trace.gather(input, "flip", *(_dim(input, d) for d in _sizes(dims)))


@register(torch.roll, "roll")
def _roll(trace: Trace, input: Value, shifts: Any, dims: Any = None) -> Value:
    if dims is None:
        raise Refused("roll without dimensions works across samples")
    given = (dims,) if isinstance(dims, int) else tuple(dims)
    by = (shifts,) if isinstance(shifts, int) else tuple(shifts)
    return trace.gather(input, "roll", by, tuple(_dim(input, d) for d in given))


@register(F.pad)
def _pad(trace: Trace, input: Value, pad: Any, mode: str = "constant", value: Any = None) -> Value:
    pad = tuple(pad)
    if len(pad) > 2 * len(input.shape):
        raise Refused("padding of the batch dimension")
    if mode != "constant" or not value:
        return trace.gather(input, "pad", pad, mode)
    if not math.isfinite(value):
        raise Refused(f"padding with {value}; max-pooling has a padding of its own")
    # pad(x - value) + value: the border is value, the rest x.
    return trace.shift(trace.gather(trace.shift(input, -value), "pad", pad, mode), value)


@register(F.pixel_shuffle, torch.pixel_shuffle)
def _shuffle(trace: Trace, input: Value, upscale_factor: int) -> Value:
    return trace.gather(input, "pixel_shuffle", upscale_factor)


@register(F.channel_shuffle, torch.channel_shuffle)
def _channels(trace: Trace, input: Value, groups: int) -> Value:
    c, *size = input.shape
    apart = trace.reshape(input, (groups, c // groups, *size))
    mixed = trace.gather(apart, "permute", 1, 0, *range(2, len(size) + 2))
    return trace.reshape(mixed, input.shape)


@register(F.pixel_unshuffle, torch.pixel_unshuffle)
def _unshuffle(trace: Trace, input: Value, downscale_factor: int) -> Value:
    return trace.gather(input, "pixel_unshuffle", downscale_factor)


@register(torch.cat, torch.concat, torch.concatenate)
def _cat(trace: Trace, tensors: Any, dim: int = 0) -> Value:
    values = _values(trace, tensors)
    at = _dim(values[0], dim)
    return trace.join(values, at)


def _values(trace: Trace, tensors: Any) -> list[Value]:
    """Tensors to be joined, constants among them as values without a source."""
    first = next(t for t in tensors if isinstance(t, Value))
    out = []
    for t in tensors:
        if not isinstance(t, Value):
            t, _ = _constant(trace, t, tuple(read(t).shape[1:]))
            t = Value(Row(tuple(read(t).shape), (), (Constant(t),)))
        if len(t.shape) != len(first.shape):
            raise Refused(f"tensors of {len(t.shape) + 1} and {len(first.shape) + 1} dimensions")
        out.append(t)
    return out


@register(torch.stack)
def _stack(trace: Trace, tensors: Any, dim: int = 0) -> Value:
    values = _values(trace, tensors)
    return _cat(trace, [_unsqueeze(trace, v, dim) for v in values], dim)


def _slice(trace: Trace, x: Value, at: int, start: int, stop: int) -> Value:
    index = [(None, None, None)] * at + [(start, stop, None)]
    return trace.gather(x, "index", *index)


@register(torch.narrow, "narrow")
def _narrow(trace: Trace, input: Value, dim: int, start: int, length: int) -> Value:
    at = _dim(input, dim)
    start = start % input.shape[at] if start < 0 else start
    return _slice(trace, input, at, start, start + length)


@register(torch.select, "select")
def _select(trace: Trace, input: Value, dim: int, index: int) -> Value:
    at = _dim(input, dim)
    return trace.gather(input, "index", *[(None, None, None)] * at, index)


@register(torch.split, "split", torch.split_with_sizes)
def _split(trace: Trace, input: Value, size: Any, dim: int = 0) -> tuple[Value, ...]:
    at = _dim(input, dim)
    length = input.shape[at]
    sizes = (
        list(size)
        if not isinstance(size, int)
        else [min(size, length - i) for i in range(0, length, size)]
    )
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(_slice(trace, input, at, e - n, e) for n, e in zip(sizes, ends, strict=True))


@register(torch.chunk, "chunk")
def _chunk(trace: Trace, input: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    return _split(trace, input, -(-input.shape[_dim(input, dim)] // chunks), dim)


@register(torch.unbind, "unbind")
def _unbind(trace: Trace, input: Value, dim: int = 0) -> tuple[Value, ...]:
    return tuple(_select(trace, input, dim, i) for i in range(input.shape[_dim(input, dim)]))


@register(operator.getitem)
def _getitem(trace: Trace, input: Any, index: Any) -> Any:
    if isinstance(input, tuple | list):
        return input[index] if isinstance(index, int | slice) else _not_layers()
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(not (p is None or p is Ellipsis or type(p) is int or isinstance(p, slice))
           for p in parts):  # fmt: skip
        raise Refused("indexing by tensors, lists or flags; use slices and numbers")
    used = sum(p is not None and p is not Ellipsis for p in parts)
    rank = len(input.shape) + 1
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (rank - used)
    if (
        not parts
        or not isinstance(parts[0], slice)
        or parts[0] not in (slice(None), slice(0, None))
    ):
        raise Refused("indexing of the batch dimension, across samples")
    arguments = [(p.start, p.stop, p.step) if isinstance(p, slice) else p for p in parts[1:]]
    if not arguments or all(a == (None, None, None) for a in arguments):
        return input
    return trace.gather(input, "index", *arguments)
