"""Calling a structured model: inputs in the network's shape or flat, one sample or many."""

import math
from typing import Any

import torch
from torch import Tensor

from ..implicit import Adjoint as AdjointType
from ..implicit import get_adjoint
from ..operators import read
from ..solution import Solution, Status, check_on_failure
from ..solvers import FixedPointSolver, get_solver
from .evaluate import Options, run
from .structure import Structure

_PLAIN = Options()


def call(f: Structure, u: Tensor, **options: Any) -> Tensor:
    """y at the input u, in the network's output shape where u has its input shape, else flat."""
    rows, batch, natural = _rows(f, u)
    y = run(f, rows, _options(**options) if options else _PLAIN)[0]
    if natural and len(batch) == 1:
        return y
    return y.reshape(*batch, *f.output_shape) if natural else y.reshape(*batch, f.outputs)


def solve(
    f: Structure,
    u: Tensor,
    x0: Tensor | None,
    solver: "str | FixedPointSolver",
    adjoint: "str | AdjointType",
    on_failure: str,
    record: bool,
) -> Solution:
    """The state as one vector; see `ImplicitModel.solve`."""
    if record:
        raise ValueError(
            "record: a structured model has no iterates of its whole state, expected record=False; "
            "write it as matrices first: model.dense()."
        )
    rows, batch, _ = _rows(f, u)
    m, n = rows.shape[0], f.states
    start = None
    if x0 is not None:
        if not isinstance(x0, Tensor) or x0.shape != (*batch, n):
            got = tuple(x0.shape) if isinstance(x0, Tensor) else type(x0).__name__
            raise ValueError(f"x0: got {got}, expected {(*batch, n)}.")
        parts = x0.reshape(m, n).split([block.size for block in f.blocks], 1)
        start = [s.block(part) for s, part in zip(f.A.columns, parts, strict=True)]
    options = _options(solver=solver, adjoint=adjoint, on_failure="return")
    _, values, loops = run(f, rows, options, keep=True, start=start)
    states = [s.flat(x) for s, x in zip(f.A.columns, values, strict=False)]
    codes = rows.new_full((m,), Status.CONVERGED.code, dtype=torch.long)
    residual = rows.new_zeros(m)
    steps = torch.ones_like(codes)
    for loop in loops:
        share = loop.codes.numel() // m  # an equation on each of several positions
        codes = torch.maximum(codes, loop.codes.view(m, share).amax(1).to(codes.dtype))
        residual = torch.maximum(residual, loop.residual.view(m, share).amax(1).to(residual.dtype))
        steps = steps + loop.steps.view(m, share).amax(1)
    value = torch.cat(states, 1)
    sick = ~torch.isfinite(value).all(1)
    codes = codes.masked_fill(sick, Status.NONFINITE.code)
    residual = residual.masked_fill(sick, torch.inf)
    tried = [loop.stats.get("solver", "") for loop in loops]
    return Solution(
        value=value.view(*batch, n),
        codes=codes.view(batch),
        residual=residual.view(batch),
        steps=steps.view(batch),
        stats={"solver": "one sweep" + "".join(f", {name} in a loop" for name in tried)},
    ).check(on_failure)


def _options(
    solver: "str | FixedPointSolver" = "auto",
    adjoint: "str | AdjointType" = "implicit",
    on_failure: str = "raise",
) -> Options:
    check_on_failure(on_failure)
    chosen = get_solver(solver)
    own = chosen == get_solver("auto")  # a loop that was a layer keeps that layer's solver
    return Options(
        solver=None if own else chosen, adjoint=get_adjoint(adjoint), on_failure=on_failure
    )


def _rows(f: Structure, u: Tensor) -> tuple[Tensor, tuple[int, ...], bool]:
    """u as (m, *input_shape), its batch dimensions, and whether it came in the network's shape."""
    own = f.input_shape
    if not isinstance(u, Tensor):
        raise TypeError(f"u: got {type(u).__name__}, expected a tensor (*batch, {_text(own)}).")
    probe = f.probe
    if probe is not None:
        like = read(probe)
        if u.device != like.device:
            raise ValueError(
                f"u: got a tensor on {u.device}, expected {like.device} where the weights are."
            )
        if u.dtype != like.dtype and not torch.is_autocast_enabled(u.device.type):
            raise ValueError(
                f"u: got {u.dtype}, expected {like.dtype} as the weights; convert with .to()."
            )
    rank = len(own)
    flat = u.dim() > 0 and u.shape[-1] == math.prod(own)
    # (1, L) may be one sample of one channel, or a batch of one flat sample: it is a batch.
    natural = u.dim() >= rank and u.shape[u.dim() - rank :] == own
    if natural and not (flat and u.dim() == rank > 1):
        batch = u.shape[: u.dim() - rank]
        return (u if len(batch) == 1 else u.reshape(-1, *own)), batch, True
    if flat:
        return u.reshape(-1, *own), u.shape[:-1], False
    raise ValueError(
        f"u: got shape {tuple(u.shape)}, expected (*batch, {_text(own)})"
        + (f" or (*batch, {math.prod(own)})." if rank != 1 else ".")
    )


def _text(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
