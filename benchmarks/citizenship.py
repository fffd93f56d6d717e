"""What an implicit layer may be asked to do inside a PyTorch program, and what happens then.

    python benchmarks/citizenship.py [--quick] [--rows WORD] [--columns WORD] [--out DIR]

A row is a property, a column a layer; each cell is a check that is run, in a child process with a
time limit (some peers hang), and says yes, no (with the number that is wrong) or what was raised.
The checks are plain functions `check(adapter) -> (ok, note)`, collected in CHECKS; an Adapter
knows how to build a small model of one column. The tests import both for our three columns.
"""

import argparse
import copy
import functools
import io
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.distributed as dist
from _harness import in_child, machine, machine_line, table, write_results
from adapters import ADAPTERS, COLUMNS, Adapter
from judging import (
    Outcome,
    difference,
    differences,
    flat,
    function,
    gradient,
    inputs,
    judge,
    loss,
    percent,
    relative,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

Check = Callable[..., Outcome]
CHECKS: dict[str, Check] = {}


def row(title: str) -> Callable[[Check], Check]:
    """Register a check as the row of that title."""

    def register(check: Check) -> Check:
        @functools.wraps(check)
        def seeded(adapter: Adapter, **options: Any) -> Outcome:
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a warning is no outcome: the numbers are judged
                return check(adapter, **options)

        CHECKS[title] = seeded
        return seeded

    return register


# --- derivatives


def _gradcheck(model: nn.Module, u: Tensor) -> Outcome:
    call, parameters = function(model)
    at = [x.requires_grad_() for x in (u, *parameters)]
    if gradcheck(call, at, raise_exception=False, fast_mode=True):
        return True, ""
    found = torch.autograd.grad(loss(call, *at), at, allow_unused=True)
    errors, offset = [], 0  # of each argument on its own: a wrong dA must not hide behind dC
    expected = differences(lambda *x: loss(call, *x), at)
    for x, g in zip(at, found, strict=True):
        part = expected[offset : offset + x.numel()]
        errors.append(relative(flat([g], [x]), part))
        offset += x.numel()
    return False, f"wrong: {percent(max(errors))}"


@row("gradcheck (float64), constraint inactive")
def check_gradcheck_inactive(adapter: Adapter) -> Outcome:
    return _gradcheck(adapter.build(), inputs(adapter, 2))


@row("gradcheck (float64), constraint active")
def check_gradcheck(adapter: Adapter) -> Outcome:
    return _gradcheck(adapter.build(active=True), inputs(adapter, 2))


@row("gradgradcheck (float64), constraint active")
def check_gradgradcheck(adapter: Adapter) -> Outcome:
    call, parameters = function(adapter.build(active=True))
    at = [x.requires_grad_() for x in (inputs(adapter, 2), *parameters)]

    def gradient(*x: Tensor, create_graph: bool = False) -> Tensor:
        found = torch.autograd.grad(loss(call, *x), x, allow_unused=True, create_graph=create_graph)
        return flat(list(found), list(x))

    along = [torch.randn_like(x) for x in at]
    product = gradient(*at, create_graph=True) @ flat(list(along), at)
    got = flat(list(torch.autograd.grad(product, at, allow_unused=True)), at)
    error = relative(got, difference(gradient, at, along))
    if error > 1e-5:
        return False, f"wrong: {percent(error)}"
    return gradgradcheck(call, at, raise_exception=False, fast_mode=True), "gradgradcheck"


@row("forward mode (torch.func.jvp)")
def check_forward_mode(adapter: Adapter) -> Outcome:
    call, parameters = function(adapter.build(active=True))
    at = [inputs(adapter), *parameters]
    along = [torch.randn_like(x) for x in at]
    _, got = jvp(call, tuple(at), tuple(along))
    return judge(relative(got, difference(call, at, along)), 1e-6)


@row("vmap over inputs")
def check_vmap_inputs(adapter: Adapter) -> Outcome:
    model = adapter.build()
    u = inputs(adapter, 6).view(3, 2, -1)
    got = vmap(model)(u)
    return judge(relative(got, torch.stack([model(x) for x in u])), 1e-8)


@row("vmap over parameters")
def check_vmap_parameters(adapter: Adapter) -> Outcome:
    models = [adapter.build(seed=seed) for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    u = inputs(adapter)
    got = vmap(lambda p, b: functional_call(models[0], (p, b), (u,)))(parameters, buffers)
    return judge(relative(got, torch.stack([model(u) for model in models])), 1e-8)


@row("jacrev")
def check_jacrev(adapter: Adapter) -> Outcome:
    model = adapter.build()
    u = inputs(adapter, 1)
    got = jacrev(model)(u)[0, :, 0]  # (outputs, inputs)
    columns = [
        difference(model, [u], [torch.eye(adapter.inputs, dtype=u.dtype)[j : j + 1]])[0]
        for j in range(adapter.inputs)
    ]
    return judge(relative(got, torch.stack(columns, dim=1)), 1e-6)


@row("per-sample gradients, vmap(grad)")
def check_per_sample(adapter: Adapter) -> Outcome:
    model = adapter.build()
    u = inputs(adapter)
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, p, (x[None],)).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, u)
    names, own = list(parameters), list(model.parameters())
    rows = []
    for x in u:
        each = torch.autograd.grad(model(x[None]).square().sum(), own, allow_unused=True)
        rows.append(flat(list(each), own))
    together = torch.cat([got[k].reshape(len(u), -1) for k in names], dim=1)
    return judge(relative(together, torch.stack(rows)), 1e-7)


# --- autograd's habits


@row("gradients in eval mode")
def check_eval_mode(adapter: Adapter) -> Outcome:
    model, u = adapter.build(), inputs(adapter)
    expected = gradient(model.train(), u)
    return judge(relative(gradient(model.eval(), u), expected), 1e-8)


@row("two forwards before one backward")
def check_two_forwards(adapter: Adapter) -> Outcome:
    model, u = adapter.build(), inputs(adapter)
    parameters = list(model.parameters())
    single = [
        torch.autograd.grad(model(x).sum(), parameters, allow_unused=True) for x in (u, 2 * u)
    ]
    expected = sum(flat(list(g), parameters) for g in single)
    both = model(u).sum() + model(2 * u).sum()
    got = flat(list(torch.autograd.grad(both, parameters, allow_unused=True)), parameters)
    return judge(relative(got, expected), 1e-9)


@row("repeated backward with retain_graph")
def check_retain_graph(adapter: Adapter) -> Outcome:
    model, u = adapter.build(), inputs(adapter)
    parameters = list(model.parameters())
    loss = model(u).square().sum()
    first, second = (
        flat(list(torch.autograd.grad(loss, parameters, retain_graph=keep)), parameters)
        for keep in (True, False)
    )
    return judge(relative(second, first), 1e-12)


@row("bf16 autocast, solved in at least float32")
def check_autocast(adapter: Adapter) -> Outcome:
    model = adapter.build(dtype=torch.float32, tight=False)
    u = inputs(adapter, dtype=torch.float32)
    expected = adapter.state(model, u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = adapter.state(model, u)
        y = model(u)
    y.float().square().sum().backward()
    if not all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters()):
        return False, "gradients not finite"
    if torch.finfo(x.dtype).eps > torch.finfo(torch.float32).eps:
        return False, f"solved in {str(x.dtype).removeprefix('torch.')}"
    return judge(relative(x, expected), 1e-4)


@row("backward pass inside bf16 autocast")
def check_autocast_backward(adapter: Adapter) -> Outcome:
    model = adapter.build(dtype=torch.float32, tight=False)
    u = inputs(adapter, 5, torch.float32)
    parameters = list(model.parameters())
    value = model(u).square().sum()
    expected = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(value, parameters, allow_unused=True)
    return judge(relative(flat(list(got), parameters), flat(list(expected), parameters)), 1e-2)


@row("gradient of loss x 1e-8 is gradient x 1e-8")
def check_scale(adapter: Adapter) -> Outcome:
    model = adapter.build(dtype=torch.float32, tight=False)
    u = inputs(adapter, dtype=torch.float32)
    return judge(relative(gradient(model, u, 1e-8) * 1e8, gradient(model, u)), 1e-4)


# --- copies, files, compilers, processes


@row("deepcopy, after a forward pass")
def check_deepcopy(adapter: Adapter) -> Outcome:
    model, u = adapter.build(), inputs(adapter)
    before = model(u).detach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    return torch.equal(twin(u), before), "the copy's output differs"


@row("pickle")
def check_pickle(adapter: Adapter) -> Outcome:
    model, u = adapter.build(), inputs(adapter)
    twin = pickle.loads(pickle.dumps(model))
    return torch.equal(twin(u), model(u)), "the copy's output differs"


@row("state_dict round trip")
def check_state_dict(adapter: Adapter) -> Outcome:
    model, other, u = adapter.build(), adapter.build(seed=1), inputs(adapter)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return torch.equal(other(u), model(u)), "the restored output differs"


@row("torch.compile(fullgraph=True), forward and backward")
def check_compile(adapter: Adapter, backend: str = "aot_eager") -> Outcome:
    model, u = adapter.build(), inputs(adapter)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    error = relative(compiled(u), model(u))
    if error > 1e-9:
        return False, f"wrong: {percent(error)}"
    return judge(relative(gradient(compiled, u), gradient(model, u)), 1e-9)


@row("torch.export of an inference graph")
def check_export(adapter: Adapter) -> Outcome:
    model, u = adapter.build().eval(), inputs(adapter)
    with torch.no_grad():
        program = torch.export.export(model, (u,))
        return judge(relative(program.module()(2 * u), model(2 * u)), 1e-9)


@row("DistributedDataParallel, two gloo processes")
def check_ddp(adapter: Adapter) -> Outcome:
    model, u = adapter.build(), inputs(adapter, 4)
    model(u).square().sum(-1).mean().backward()
    expected = flat([p.grad for p in model.parameters()], list(model.parameters()))
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=_ddp_worker, args=(rank, folder, adapter.name), daemon=True)
            for rank in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(100)
        for worker in workers:
            if worker.exitcode is None:
                worker.kill()
                return False, "hangs"
        said = Path(folder, "error")
        if said.exists():
            raise RuntimeError(said.read_text())
        got = torch.load(Path(folder, "gradient"), weights_only=True)
    return judge(relative(got, expected), 1e-6)


def _ddp_worker(rank: int, folder: str, name: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    adapter = ADAPTERS[name]
    try:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        model = nn.parallel.DistributedDataParallel(adapter.build())
        half = inputs(adapter, 4)[2 * rank : 2 * rank + 2]
        model(half).square().sum(-1).mean().backward()
        if rank == 0:
            parameters = list(model.parameters())
            torch.save(flat([p.grad for p in parameters], parameters), Path(folder, "gradient"))
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:  # noqa: BLE001 - reported by the parent
        Path(folder, "error").write_text(f"{type(error).__name__}: {error}")


# --- honesty


@row("NaN in one sample leaves the others bit-identical")
def check_nan(adapter: Adapter) -> Outcome:
    model = adapter.build(dtype=torch.float32, tight=False)
    u = inputs(adapter, 5, torch.float32)
    expected = adapter.state(model, u)
    ill = u.clone()
    ill[1] = torch.nan
    got = adapter.state(model, ill)
    others = [0, 2, 3, 4]
    if torch.equal(got[others], expected[others]):
        return True, ""
    return False, f"wrong: {percent(relative(got[others], expected[others]))}"


@row("a solve that stops short raises")
def check_stops_short(adapter: Adapter) -> Outcome:
    model = adapter.build(dtype=torch.float32, tight=False, steps=2)
    try:
        model(inputs(adapter, 5, torch.float32))
    except Exception as error:  # noqa: BLE001 - its kind is judged
        return True, type(error).__name__
    return False, "returns a value"


@row("a misspelt option is refused")
def check_misspelt(adapter: Adapter) -> Outcome:
    try:
        adapter.misspelt()
    except (TypeError, ValueError) as error:
        return True, type(error).__name__
    return False, "silently ignored"


@row("two models with different tolerances do not interfere")
def check_interference(adapter: Adapter) -> Outcome:
    model, u = adapter.build(), inputs(adapter)
    before = model(u).detach()
    adapter.build(dtype=torch.float32, tight=False, steps=2)
    return judge(relative(model(u).detach(), before), 0.0)


# --- the table

LIMIT = {"DistributedDataParallel, two gloo processes": 120.0}
INDUCTOR = "torch.compile(fullgraph=True), inductor"


def outcome(check: Check, adapter: Adapter, limit: float = 25.0) -> dict[str, str]:
    """Run one check in a child: {"outcome": yes | no | raises | hangs, "note": why}."""
    kind, value = in_child(lambda: check(adapter), limit)
    if kind == "ok":
        ok, note = value
        return {"outcome": "yes", "note": ""} if ok else {"outcome": "no", "note": note}
    if kind == "raises":
        words = re.sub(r"(?:/[\w.+-]+)+/", "", " ".join(str(value).split()))  # no paths
        return {"outcome": "raises", "note": words[:160]}
    return {"outcome": kind, "note": f"{value}"}


def cell(results: Mapping[str, Mapping[str, str]], adapters: list[Adapter]) -> str:
    """The first adapter's outcome; the others of the same column where they differ."""
    texts = [_text(results[a.name]) for a in adapters]
    differing = [
        f"{a.variant}: {t}" for a, t in zip(adapters[1:], texts[1:], strict=True) if t != texts[0]
    ]
    return "; ".join([texts[0], *differing])


def _text(result: Mapping[str, str]) -> str:
    note = result["note"]
    if result["outcome"] == "yes":
        return "yes"
    if result["outcome"] == "raises":
        return f"raises ({note[:40].strip()})".replace("|", "/")
    if result["outcome"] == "hangs":
        return "hangs"
    return f"no ({note})" if note else "no"


def main(argv: list[str] | None = None) -> int:
    """Run every cell, print the table, write results/citizenship.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave the inductor compiler out")
    parser.add_argument("--rows", default="", help="only rows whose title contains this")
    parser.add_argument("--columns", default="", help="only columns whose name contains this")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(argv)

    checks = {k: c for k, c in CHECKS.items() if options.rows in k}
    if not options.quick and options.rows in INDUCTOR and shutil.which("g++"):
        checks[INDUCTOR] = functools.partial(check_compile, backend="inductor")
    columns = {k: v for k, v in COLUMNS.items() if options.columns.lower() in k.lower()}
    absent = {k: why for k, v in columns.items() if (why := v[0].missing())}
    for name, why in absent.items():
        print(f"{name}: not installed ({why}); its column is left empty")

    start, results, rows = time.perf_counter(), {}, []
    for title, check in checks.items():
        results[title], texts = {}, []
        for name, adapters in columns.items():
            if name in absent:
                texts.append("not installed")
                continue
            for adapter in adapters:
                limit = 180.0 if title == INDUCTOR else LIMIT.get(title, 30.0)
                results[title][adapter.name] = outcome(check, adapter, limit)
            texts.append(cell(results[title], adapters))
        rows.append([title, *texts])
        print(f"{title}: " + " | ".join(texts), flush=True)

    # Only now may torch compute here: the children are forked from a parent without its threads.
    facts = machine()
    text = table(["", *columns], rows)
    notes = "\n".join(f"- {a.name}: {a.about}" for v in columns.values() for a in v)
    markdown = (
        f"# PyTorch citizenship\n\n{machine_line(facts)}. Every cell is a check that ran; "
        f"{time.perf_counter() - start:.0f} s.\n\n{text}\n\n{notes}\n"
    )
    print("\n" + markdown)
    write_results("citizenship", {"machine": facts, "cells": results}, markdown, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
