"""Convex programs under `torch.func`: vmap, grad, jvp and what is made of them.

A transform hides values, and the solver looks at them. So the solve and the solve with the derivative
of the optimality conditions are functions that a transform calls with what it hides uncovered; vmap
makes its own dimension part of the batch. The rest is plain tensor operations.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..implicit import Limit
from ..solution import Status
from .cones import Cones
from .newton import Inverse
from .program import Program

# (program without its tensors' graph) -> w, codes, error, steps
Solver = Callable[[Program], tuple[Tensor, Tensor, Tensor, Tensor]]


def root(
    program: Program, solver: Solver, order: int, on_failure: str
) -> tuple[Program, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The program, harmless where it has no solution; w = (x, y, s - z), differentiable; codes,
    error, steps and what was found before it was made differentiable."""
    found, codes, error, steps = _Points.apply(program.cones, solver, *_data(program))
    failed = codes != Status.CONVERGED.code
    program = program.tamed(failed)
    fixed = _data(program.detached())
    w = torch.where(failed[:, None], program.trivial(), found)
    at = w
    for _ in range(order):
        w = w + _Chord.apply(
            -program.residual(w), order, (program.cones, on_failure), at, failed, *fixed
        )
    return program, w, codes, error, steps, found


def _data(program: Program) -> tuple[Tensor | None, ...]:
    return program.P, program.q, program.G, program.h, program.A, program.b


def _program(data: tuple[Tensor | None, ...], cones: Cones) -> Program:
    P, q, G, h, A, b = data
    assert q is not None and G is not None and h is not None and A is not None and b is not None
    return Program(P, q, G, h, A, b, cones)


# Which of the tensors of a program have a batch dimension whatever they are, and the dimensions that
# one of the others has with it.
_OWN = (None, 2, None, 2, None, 2)


def _folded(
    size: int, dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...], own: Any
) -> list[Tensor | None]:
    """vmap's dimension and the batch as one dimension, for what has either of them.

    Args:
        size: of vmap's dimension.
        dims: where each tensor has it.
        tensors: those tensors.
        own: for each the dimensions that it has with a batch, or None for a matrix that may have
            none.
    """
    batch = next(
        t.shape[0 if d is None else int(d == 0)]
        for t, d, k in zip(tensors, dims, own, strict=True)
        if t is not None and k is not None
    )
    out = []
    for t, d, k in zip(tensors, dims, own, strict=True):
        if t is None or (d is None and k is None and t.dim() == 2):
            out.append(t)
            continue
        t = t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
        if k is None and t.dim() == 3:  # shared by the batch
            t = t[:, None].expand(-1, batch, -1, -1)
        out.append(t.flatten(0, 1))
    return out


def _unfolded(size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.unflatten(0, (size, -1)) for t in tensors)


class _Points(torch.autograd.Function):
    """The solutions, as constants."""

    @staticmethod
    def forward(cones: Any, solver: Solver, *data: Tensor | None) -> Any:
        with torch.no_grad():
            return solver(_program(tuple(data), cones).detached())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return (None,) * 8

    @staticmethod
    def jvp(ctx: Any, *t: Any) -> Any:
        return None, None, None, None

    @staticmethod
    def vmap(info: Any, dims: Any, cones: Any, solver: Solver, *data: Tensor | None) -> Any:
        found = _Points.apply(cones, solver, *_folded(info.batch_size, dims[2:], data, _OWN))
        return _unfolded(info.batch_size, *found), (0, 0, 0, 0)


class _Chord(torch.autograd.Function):
    """r -> J^-1 r at r = 0: free forward, a solve backward, a solve in forward mode.

    `how` is (K, on_failure), as `Inverse` takes them.
    """

    @staticmethod
    def forward(r: Tensor, order: int, how: Any, *fixed: Tensor | None) -> Tensor:
        return torch.zeros_like(r)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        r, ctx.order, ctx.how, *fixed = inputs
        ctx.save_for_backward(r, *fixed)
        ctx.save_for_forward(r, *fixed)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        r, *fixed = ctx.saved_tensors
        u = _Solve.apply(g, True, ctx.how, *fixed)
        return Limit.apply(u, r, ctx.order - 1), *(None,) * (2 + len(fixed))

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        r, *fixed = ctx.saved_tensors
        return Limit.apply(_Solve.apply(t, False, ctx.how, *fixed), r, ctx.order - 1)

    @staticmethod
    def vmap(info: Any, dims: Any, r: Tensor, order: int, how: Any, *fixed: Any) -> Any:
        size = info.batch_size
        rows = _folded(size, (dims[0], *dims[3:]), (r, *fixed), (2, 2, 1, *_OWN))
        return _unfolded(size, _Chord.apply(rows[0], order, how, *rows[1:]))[0], 0


class _Solve(torch.autograd.Function):
    """b -> J^-1 b or J^-T b, J constant; linear, so its derivative is the transposed solve."""

    @staticmethod
    def forward(
        b: Tensor, back: bool, how: Any, w: Tensor, failed: Tensor, *data: Tensor | None
    ) -> Tensor:
        K, on_failure = how
        return Inverse(_program(data, K), w, failed, on_failure).apply(b, back)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.back, ctx.how, *fixed = inputs
        ctx.save_for_backward(*fixed)
        ctx.save_for_forward(*fixed)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        u = _Solve.apply(g, not ctx.back, ctx.how, *ctx.saved_tensors)
        return u, *(None,) * (2 + len(ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return _Solve.apply(t, ctx.back, ctx.how, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, dims: Any, b: Tensor, back: bool, how: Any, *fixed: Any) -> Any:
        size = info.batch_size
        rows = _folded(size, (dims[0], *dims[3:]), (b, *fixed), (2, 2, 1, *_OWN))
        return _unfolded(size, _Solve.apply(rows[0], back, how, *rows[1:]))[0], 0
