"""A structured model as plain data and tensors: what `files` writes and reads.

Everything is a name with arguments that are numbers, names and lists; a tensor is its number in the
file. What is read is checked by the constructors and then by one evaluation at zero.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import activations
from ..activations import Activation
from ..implicit import Equation
from ..operators import REGISTRY, Operator, Weight, read, weights
from ..solution import unknown_name
from .structure import Block, Constant, Join, Row, Structure

_ROWS: dict[str, type] = {"Row": Row, "Join": Join, "Constant": Constant}


def described(f: Structure) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The structure as plain data, and the tensors that it names.

    Raises:
        TypeError: an activation or a solver cannot be described.
    """
    numbers: dict[int, int] = {}
    tensors: dict[str, Tensor] = {}

    def plain(part: Any) -> Any:
        if isinstance(part, Weight):
            if id(part) not in numbers:
                numbers[id(part)] = len(numbers)
                tensors[f"t{numbers[id(part)]}"] = read(part).detach().clone().contiguous()
            return {"tensor": numbers[id(part)]}
        if isinstance(part, tuple):
            return [plain(item) for item in part]
        if part is None or isinstance(part, bool | int | float | str):
            return part
        names = [field.name for field in dataclasses.fields(part) if field.init]
        return {"is": type(part).__name__} | {name: plain(getattr(part, name)) for name in names}

    blocks = [
        {
            "name": block.name,
            "row": plain(block.row),
            "phi": block.phi.to_config(),
            "shape": list(block.shape),
            "equation": None if block.equation is None else block.equation.with_spec().spec,
        }
        for block in f.blocks
    ]
    data = {"blocks": blocks, "output": plain(f.output), "input_shape": list(f.input_shape)}
    return data, tensors


def restored(data: Any, tensor: Callable[[str], Tensor]) -> Structure:
    """The structure that `described` described.

    Args:
        data: plain data, from anywhere.
        tensor: the tensor of a name; raises where there is none.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: it describes none, or one that cannot be
            evaluated.
    """
    known: dict[int, Tensor] = {}

    def made(part: Any) -> Any:
        if isinstance(part, list):
            return tuple(made(item) for item in part)
        if not isinstance(part, dict):
            return part
        if "tensor" in part:
            number = part["tensor"]
            if type(number) is not int:
                raise ValueError(f"tensor: got {number!r}, expected its number.")
            if number not in known:
                known[number] = tensor(f"t{number}")
            return known[number]
        cls = _ROWS.get(part["is"]) or REGISTRY.get(part["is"])
        if cls is None:
            raise unknown_name("operator", part["is"], REGISTRY)
        return cls(**{name: made(value) for name, value in part.items() if name != "is"})

    blocks = tuple(
        Block(
            str(block["name"]),
            _row(made(block["row"])),
            activations.from_config(block["phi"]),
            _shape(block["shape"]),
            None if block["equation"] is None else Equation.from_spec(block["equation"]),
        )
        for block in data["blocks"]
    )
    f = Structure(blocks, _row(made(data["output"])), _shape(data["input_shape"]))
    _check(f)
    return f


def _row(row: Any) -> Any:
    if not isinstance(row, Row | Join):
        raise TypeError(f"got {type(row).__name__}, expected a row of terms.")
    parts = row.parts if isinstance(row, Join) else ()
    for part in parts:
        _row(part)
    for term in getattr(row, "terms", ()):
        source, op = term
        if type(source) is not int or not isinstance(op, Operator):
            raise TypeError(
                f"got the term {term!r}, expected the number of a block and an operator."
            )
    return row


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or any(type(n) is not int or n < 1 for n in shape):
        raise ValueError(f"got shape {shape!r}, expected positive integers.")
    return tuple(shape)


def _check(f: Structure) -> None:
    """Every source is there, every term fits its row, every state its block."""
    if not f.blocks:
        raise ValueError("got no blocks, expected at least one.")
    for k, row in [*enumerate(b.row for b in f.blocks), (-1, f.output)]:
        for j, op in row.flat().terms:
            if not -1 <= j < len(f.blocks):
                raise ValueError(f"block {k} reads block {j} of {len(f.blocks)}.")
            source = f.input_shape if j == -1 else f.blocks[j].shape
            if (op.in_shape, op.out_shape) != (source, row.shape):
                raise ValueError(f"block {k} reads {source} through {op!r}, expected {row.shape}.")
    dtypes = {read(w).dtype for w in weights(f)}
    if len(dtypes) > 1 or any(not d.is_floating_point for d in dtypes):
        raise ValueError(f"got tensors of {sorted(map(str, dtypes))}, expected one floating dtype.")
    for k, block in enumerate(f.blocks):
        phi: Activation = block.phi
        equation = block.equation
        if equation is not None and (equation.phi != phi or not _numbers(equation)):
            raise ValueError(f"block {k}: got facts of a loop that are not those of {phi}.")
        if phi.natural_shape(block.row.shape) != block.shape:
            raise ValueError(f"block {k}: {phi} makes {block.shape} of {block.row.shape}.")
    # Each row once, at zero: a loop may be ill-posed without being ill-formed.
    like = f.example if f.example is not None else torch.empty(0)
    values = [like.new_zeros(1, *block.shape) for block in f.blocks]
    values.append(like.new_zeros(1, *f.input_shape))
    with torch.no_grad():
        for block in f.blocks:
            z = block.row(values)
            shapes = tuple(z.shape[1:]), tuple(block.phi.natural(z).shape[1:])
            if shapes != (block.row.shape, block.shape):
                raise ValueError(f"{block.name}: it has shapes {shapes}, expected "
                                 f"{(block.row.shape, block.shape)}.")  # fmt: skip
        y = f.output(values)
    if tuple(y.shape[1:]) != f.output_shape:
        raise ValueError(f"its output is {tuple(y.shape[1:])}, expected {f.output_shape}.")


def _numbers(equation: Equation) -> bool:
    """Whether the facts are what they can be."""
    for name in ("contraction", "monotone"):
        value = getattr(equation, name)
        if value is not None and not (isinstance(value, float | int) and 0 <= value < 1e300):
            return False
    return isinstance(equation.acyclic, bool)
