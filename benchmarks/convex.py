"""Batched convex programs against cvxpylayers, qpth, proxsuite and Moreau, in one run.

Every competitor is timed forward and backward, in turns, and judged here: the solution and the
gradient against a float64 solve to rounding, which is itself held to finite differences. A competitor
that is wrong stays in the table with its errors. Then warm starts along a training path, batches with
infeasible and unbounded instances, random problems against Clarabel, and the distance from the floor:
the factorisations and products that the steps consist of, at the rates measured here.

    python benchmarks/convex.py [--quick] [--out DIR]
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import _harness as harness
import torch
from convex_cases import Case, competitors, linear, ours, portfolio, quadratic, robust
from torch import Tensor

from implicitdl.convex import ConeProgram, Cones, LinearProgram, QuadraticProgram
from implicitdl.solution import Status

RIGHT = 1e-4  # relative error of x and of the gradient that counts as right
Row = dict[str, Any]


def exact(case: Case, w: Tensor) -> tuple[Tensor, list[Tensor], float]:
    """Solution, gradient of w'x, and how far its slope in a random direction is from a difference of
    two solutions."""
    data = [t.clone().requires_grad_() for t in case.data.values()]
    call = ours(case)
    x = call(*data)
    g = list(torch.autograd.grad((w * x).sum(), data))
    with torch.no_grad():
        eps, ts = 1e-6, [torch.randn_like(t) for t in data]
        if "P" in case.data and data[0].shape[-1] == data[0].shape[-2]:
            ts[0] = ts[0] + ts[0].mT if case.name.startswith("QP") else ts[0]
        up, down = ([d + s * eps * t for d, t in zip(data, ts, strict=True)] for s in (1, -1))
        difference = (w * (call(*up) - call(*down))).sum(1) / (2 * eps)
        slope = sum((a * t).reshape(case.batch, -1).sum(1) for a, t in zip(g, ts, strict=True))
        # The median over the batch: a few instances change their active rows within eps.
        off = ((difference - slope).abs() / (1 + difference.abs())).median()
    return x.detach(), g, float(off)


def measure(case: Case, budget: float) -> list[Row]:
    """A row a competitor: errors, and medians of forward and backward, timed in turns.

    Args:
        case: the problem.
        budget: seconds for each competitor, of which every one gets a repetition at least.
    """
    w = torch.randn(case.batch, case.n)
    x_exact, g_exact, off = exact(case, w)
    runs = competitors(case)
    rows: list[Row] = [
        {"problem": case.name, "batch": case.batch, "competitor": name, "failed": "",
         "error": float("nan"), "gradient error": float("nan"), "finite differences": off,
         "times": [], "spent": 0.0}
        for name in runs
    ]  # fmt: skip
    for _ in range(20):
        for row, call in zip(rows, runs.values(), strict=True):
            if row["failed"] or (row["times"] and row["spent"] > budget):
                continue
            data = [t.clone().requires_grad_() for t in case.data.values()]
            try:
                began = time.perf_counter()
                x = call(*data)
                middle = time.perf_counter()
                g = torch.autograd.grad((w * x).sum(), data)
                ended = time.perf_counter()
            except Exception as problem:  # noqa: BLE001 - whatever a peer raises is its row
                row["failed"] = type(problem).__name__
                continue
            row["times"].append((middle - began, ended - middle))
            row["spent"] += ended - began
            row["error"] = _relative(x.detach(), x_exact)
            # Relative to the largest entry of all: an LP's solution does not depend on c.
            size = max(float(t.abs().amax()) for t in g_exact)
            row["gradient error"] = max(
                float((a - e).abs().amax()) / size for a, e in zip(g, g_exact, strict=True)
            )
    for row in rows:
        times = row.pop("times")
        row["repetitions"] = len(times)
        row["forward"], row["backward"] = (
            (harness.median([t[i] for t in times]) for i in (0, 1))
            if times
            else (float("nan"),) * 2
        )
    return rows


def _times(M: Tensor, x: Tensor) -> Tensor:
    return (M @ x[..., None])[..., 0]


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().amax() / b.abs().amax().clamp_min(1e-12))


def table(rows: list[Row]) -> str:
    """One line a competitor; ratios of its time to ours."""
    base = {(r["problem"], r["batch"]): r for r in rows if r["competitor"] == "implicitdl"}
    lines = []
    for r in rows:
        own = base[r["problem"], r["batch"]]
        wrong = not (r["error"] < RIGHT and r["gradient error"] < RIGHT)
        mine = r is own
        lines.append((
            r["problem"], r["batch"], r["competitor"],
            harness.duration(r["forward"]), harness.duration(r["backward"]),
            f"{r['forward'] / own['forward']:.2f}", f"{r['backward'] / own['backward']:.2f}",
            "" if mine else f"{r['error']:.0e}", "" if mine else f"{r['gradient error']:.0e}",
            r["failed"] or ("not right" if wrong else ""),
        ))  # fmt: skip
    header = ("problem", "batch", "", "forward", "backward", "forward / ours", "backward / ours",
              "error of x", "error of gradient", "")  # fmt: skip
    return harness.table(header, lines)


# ---- what only we are asked ------------------------------------------------------------------------


def accuracy(cases: list[Case]) -> str:
    """Our own errors: the residuals of the optimality conditions, the gap, the gradient."""
    lines = []
    for case in cases:
        P, q, G, h, A, b, K = case.native(*case.data.values())
        found = ConeProgram(K).solve(P, q, G, h, A, b)
        x, z, y = found.value, found.stats["dual"], found.stats["equality_dual"]
        primal = (_times(G, x) + found.stats["slack"] - h).abs().amax()
        dual = q + _times(G.mT, z)
        gap = (found.stats["slack"] * z).sum(1).abs().amax()
        if P is not None:
            dual = dual + _times(P, x)
        if A is not None:
            dual = dual + _times(A.mT, y)
        w = torch.randn(case.batch, case.n)
        off = exact(case, w)[2]
        lines.append((
            case.name, case.batch, f"{primal:.0e}", f"{dual.abs().amax():.0e}", f"{gap:.0e}",
            f"{off:.0e}", f"{found.steps.double().mean():.1f}",
        ))  # fmt: skip
    header = ("problem", "batch", "primal residual", "dual residual", "gap",
              "gradient off differences", "steps")  # fmt: skip
    return harness.table(header, lines)


def warm(n: int, batch: int, change: float, budget: float) -> tuple[Any, ...]:
    """Twenty calls whose linear term moves by `change` each: from the last solution, and anew."""
    case = quadratic(batch, n)
    P, q, G, h = case.data.values()
    layer, qs = QuadraticProgram(), [q]
    for _ in range(20):
        qs.append(qs[-1] + change * qs[-1].abs().mean() * torch.randn_like(q))

    def cold() -> None:
        for at in qs[1:]:
            layer.solve(P, at, G, h)

    def from_last() -> None:
        last = first
        for at in qs[1:]:
            last = layer.solve(P, at, G, h, start=last)

    with torch.no_grad():
        first = layer.solve(P, q, G, h)
        runs = {"cold": cold, "warm": from_last}
        peers = {k: v for k, v in competitors(case).items() if k in ("qpth", "proxsuite", "Moreau")}
        for name, call in peers.items():
            runs[name] = lambda call=call: [call(P, at, G, h) for at in qs[1:]]  # type: ignore[misc]
        times = harness.interleaved(runs, budget, least=1)
    each = {name: harness.median(t) / 20 for name, t in times.items()}
    return (n, batch, f"{change:.1%}", *(harness.duration(each.get(k, float("nan"))) for k in (
        "warm", "cold", "qpth", "proxsuite", "Moreau")))  # fmt: skip


def impossible(batch: int, n: int) -> tuple[Any, ...]:
    """Of a batch of linear programs a tenth is made infeasible and a tenth unbounded."""
    case = linear(batch, n, n // 2)
    c, A, b = (t.clone() for t in case.data.values())
    G, h = torch.cat([-torch.eye(n), torch.ones(1, n)]), torch.zeros(batch, n + 1)
    h[:, n] = 1e3
    G = G.expand(batch, -1, -1).clone()
    tenth = batch // 10
    h[:tenth, n] = -1.0  # the sum of what is not negative
    far = slice(tenth, 2 * tenth)
    v = torch.rand(tenth, n) + 0.1  # a ray: A v = 0, c'v < 0
    A[far] -= (A[far] @ v[..., None]) @ v[:, None] / (v * v).sum(1)[:, None, None]
    b[far] = (A[far] @ torch.rand(tenth, n, 1))[..., 0]
    G[far, n], h[far, n] = 0.0, 1.0
    c[far] -= (1 + (c[far] * v).sum(1, keepdim=True)) * v / (v * v).sum(1, keepdim=True)
    layer = LinearProgram(on_failure="nan")
    found = layer.solve(c, G, h, A, b)
    clean = LinearProgram().solve(*(t[2 * tenth :] for t in (c, G, h, A, b)))
    same = (found.value[2 * tenth :] - clean.value).abs().amax()
    codes = found.codes
    lost = (codes[:tenth] != Status.INFEASIBLE.code).sum() + (
        codes[far] != Status.UNBOUNDED.code
    ).sum()
    wrong = (codes[2 * tenth :] != Status.CONVERGED.code).sum()
    return batch, n, 2 * tenth, int(lost), int(wrong), f"{float(same):.0e}"


def floor(case: Case) -> tuple[Any, ...]:
    """Forward time against the factorisations and products that its steps consist of."""
    P, q, G, h, A, b, K = case.native(*case.data.values())
    M, n, batch = h.shape[1], case.n, case.batch
    layer = ConeProgram(K)
    with torch.no_grad():
        found = layer.solve(P, q, G, h, A, b)
        steps = float(found.steps.double().mean())
        took = harness.seconds_of(lambda: layer.solve(P, q, G, h, A, b), 2.0, 3)
        H = torch.eye(n).expand(batch, n, n).contiguous()
        small, factor = torch.randn(batch, M, n, dtype=torch.float32), H.to(torch.float32)
        # The steps in float32, one Newton step in float64: G'F G and its factor.
        short = harness.seconds_of(lambda: (small.mT @ small, torch.linalg.cholesky_ex(factor)))
        large = torch.randn(batch, M, n)
        long = harness.seconds_of(lambda: (large.mT @ large, torch.linalg.cholesky_ex(H)))
    least = steps * short + long
    return (case.name, batch, f"{steps:.1f}", harness.duration(took), harness.duration(least),
            f"{took / least:.1f}", harness.duration(took / batch))  # fmt: skip


def zoo(count: int) -> tuple[str, int, int, float]:
    """Random problems of 2 to 12 variables against Clarabel: how many, how many of another status,
    and the largest difference of objectives, relative."""
    import clarabel
    import numpy as np
    import scipy.sparse as sp

    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    names = {"Solved": "CONVERGED", "PrimalInfeasible": "INFEASIBLE", "DualInfeasible": "UNBOUNDED"}
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    differs, worst = 0, 0.0
    for i in range(count):
        n, l, p = (int(torch.randint(k, m, (), generator=generator)) for k, m in
                   ((2, 13), (1, 15), (0, 3)))  # fmt: skip
        K = Cones(l, tuple([3, 5][: i % 3]))
        L = randn(n, n // 2 + 1)
        P = L @ L.mT * (i % 2)
        q, G, A, x = randn(n), randn(K.size, n), randn(p, n), randn(n)
        inside = K.project(randn(K.size)) + 0.1 * K.unit(q)
        h = G @ x + (inside if i % 5 else randn(K.size))
        b = A @ x
        found = ConeProgram(K, on_failure="nan").solve(P, q, G, h, A, b)
        kinds = [clarabel.ZeroConeT(p)] if p else []
        kinds += [clarabel.NonnegativeConeT(l), *map(clarabel.SecondOrderConeT, K.second_order)]
        rows = sp.csc_matrix(np.vstack([A.numpy(), G.numpy()]))
        upper = sp.triu(sp.csc_matrix(P.numpy())).tocsc()
        right = np.concatenate([b.numpy(), h.numpy()])
        other = clarabel.DefaultSolver(upper, q.numpy(), rows, right, kinds, settings).solve()
        name = names.get(str(other.status).removeprefix("Almost"), str(other.status))
        differs += name != found.status.name
        if name == "CONVERGED":
            off = abs(float(found.stats["objective"]) - other.obj_val) / (1 + abs(other.obj_val))
            worst = max(worst, off)
    return "LP, QP, SOCP", count, differs, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batches of 64, under 2 minutes")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    quick = arguments.quick
    facts = harness.machine()
    print(harness.machine_line(facts))
    cases = [quadratic(64, 20), quadratic(64, 50), robust(64), linear(64), portfolio(64)]
    if not quick:
        cases += [quadratic(64, 100), quadratic(512, 20), quadratic(512, 50), quadratic(1, 500),
                  robust(512)]  # fmt: skip
    rows: list[Row] = []
    for case in cases:
        rows += measure(case, 2.0 if quick else 10.0)
        own = [r for r in rows if (r["problem"], r["batch"]) == (case.name, case.batch)]
        print(table(own), flush=True)
    parts = [table(rows), accuracy(cases[:6])]
    print(parts[-1], flush=True)
    changes = (0.01,) if quick else (0.001, 0.01, 0.1)
    paths = [warm(n, 64, c, 4.0 if quick else 12.0) for n in (20, 100)[: 1 if quick else 2]
             for c in changes]  # fmt: skip
    parts.append(harness.table(
        ("n = m", "batch", "change a call", "from the last", "anew", "qpth", "proxsuite", "Moreau"),
        paths))  # fmt: skip
    print(parts[-1], flush=True)
    parts.append(harness.table(
        ("batch", "n", "made impossible", "not detected", "others touched", "others' change"),
        [impossible(100, 20), impossible(500, 40)]))  # fmt: skip
    kind, count, differs, worst = zoo(60 if quick else 300)
    parts.append(harness.table(
        ("random problems", "number", "other status than Clarabel", "largest difference"),
        [(kind, count, differs, f"{worst:.0e}")]))  # fmt: skip
    sizes = [(64, 20), (64, 50)] if quick else [
        (64, 20), (256, 20), (1024, 20), (64, 50), (256, 50), (64, 100), (256, 100)]  # fmt: skip
    growth = [floor(quadratic(*each)) for each in sizes] + [floor(robust(64))]
    parts.append(
        harness.table(
            ("problem", "batch", "steps", "forward", "floor", "ratio", "an instance"), growth
        )
    )
    print("\n\n".join(parts[-3:]), flush=True)
    notes = (
        "forward and backward: medians, timed in turns, all data batched and differentiated.",
        "our own accuracy; the gradient against differences of two solutions, median over the batch.",
        "a path of 20 calls, the linear term moving each time, time a call without gradients.",
        "batches of which a tenth is infeasible and a tenth unbounded.",
        "random problems against Clarabel, by status and objective.",
        "floor: the steps' products and factorisations at this machine's measured rates.",
    )
    body = "\n\n".join(f"{note}\n\n{part}" for note, part in zip(notes, parts, strict=True))
    text = f"{harness.machine_line(facts)}; float64.\n\n{body}\n"
    name = "convex_quick" if quick else "convex"
    harness.write_results(name, {"machine": facts, "rows": rows}, text, arguments.out)


if __name__ == "__main__":
    main()
