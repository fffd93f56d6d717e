"""Batched convex programs against cvxpylayers, and qpth where it is installed, in one run.

Every competitor is timed forward and backward, in turns, and judged here: the error of the
optimality conditions, and the gradient against that of a float64 solve to rounding. A competitor that
is wrong stays in the table with its errors; ratios are to the fastest that is right.

    python benchmarks/convex.py [--quick] [--out DIR]
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _harness as harness
import torch
from torch import Tensor

from implicitdl.convex import ConeProgram, Cones, QuadraticProgram

RIGHT = 1e-4  # relative error of x and of the gradient that counts as right


def quadratic(batch: int, n: int) -> dict[str, Any]:
    """min x'P x / 2 + q'x over G x <= h, n rows, about half of them active."""
    L = torch.randn(batch, n, n)
    x = torch.randn(batch, n, 1)
    G = torch.randn(batch, n, n)
    data = {
        "P": L @ L.mT / n + 0.1 * torch.eye(n),
        "q": 3 * torch.randn(batch, n),
        "G": G,
        "h": (G @ x)[..., 0] + torch.rand(batch, n),
    }
    return {"name": f"QP, n = m = {n}", "batch": batch, "data": data, "n": n}


def robust(batch: int, n: int = 20, m: int = 20) -> dict[str, Any]:
    """min c'x over a_i'x + ||P_i x|| <= b_i and |x| <= 5: m cones of dimension n + 1."""
    data = {
        "c": torch.randn(batch, n),
        "A": torch.randn(batch, m, n),
        "P": 0.075 * torch.randn(batch, m, n, n),
        "b": 1 + torch.rand(batch, m),
    }
    return {"name": f"robust LP, n = m = {n}", "batch": batch, "data": data, "n": n}


def ours(case: dict[str, Any]) -> Callable[..., Tensor]:
    """This library's layer."""
    n = case["n"]
    if "G" in case["data"]:
        layer: Any = QuadraticProgram()
        return lambda P, q, G, h: layer(P, q, G, h)
    m = case["data"]["A"].shape[1]
    layer = ConeProgram(Cones(2 * n, (n + 1,) * m))
    box = torch.cat([torch.eye(n), -torch.eye(n)])

    def call(c: Tensor, A: Tensor, P: Tensor, b: Tensor) -> Tensor:
        batch = c.shape[0]
        cones = torch.cat([A[:, :, None], -P], 2).flatten(1, 2)
        G = torch.cat([box.expand(batch, -1, -1), cones], 1)
        zero = b.new_zeros(batch, m, n)
        right = torch.cat([b[..., None], zero], 2).flatten(1)
        h = torch.cat([b.new_full((batch, 2 * n), 5.0), right], 1)
        return layer(None, c, G, h)

    return call


def cvxpylayer(case: dict[str, Any], arguments: dict[str, Any]) -> Callable[..., Tensor]:
    """cvxpylayers with these solver arguments."""
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    n = case["n"]
    x = cp.Variable(n)
    if "G" in case["data"]:
        root, q = cp.Parameter((n, n)), cp.Parameter(n)
        G, h = cp.Parameter((n, n)), cp.Parameter(n)
        problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(root @ x) + q @ x), [G @ x <= h])
        layer = CvxpyLayer(problem, [root, q, G, h], [x])

        def call(P: Tensor, q: Tensor, G: Tensor, h: Tensor) -> Tensor:
            return layer(torch.linalg.cholesky(P).mT, q, G, h, solver_args=dict(arguments))[0]

        return call
    m = case["data"]["A"].shape[1]
    c, A, b = cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m)
    Ps = [cp.Parameter((n, n)) for _ in range(m)]
    rows = [A[i] @ x + cp.norm(Ps[i] @ x) <= b[i] for i in range(m)]
    problem = cp.Problem(cp.Minimize(c @ x), [*rows, x <= 5, x >= -5])
    layer = CvxpyLayer(problem, [c, A, b, *Ps], [x])

    def robust_call(c: Tensor, A: Tensor, P: Tensor, b: Tensor) -> Tensor:
        return layer(c, A, b, *P.unbind(1), solver_args=dict(arguments))[0]

    return robust_call


def qpth(case: dict[str, Any]) -> Callable[..., Tensor]:
    """qpth, for quadratic programs."""
    from qpth.qp import QPFunction

    none = torch.empty(0)
    solve = QPFunction(verbose=-1)
    return lambda P, q, G, h: solve(P, q, G, h, none, none)


def competitors(case: dict[str, Any]) -> dict[str, Callable[..., Tensor]]:
    """Those that are installed and take the problem."""
    found: dict[str, Callable[..., Tensor]] = {"implicitdl": ours(case)}
    right = {"solve_method": "Clarabel", "mode": "dense"}
    makers: dict[str, Callable[[], Callable[..., Tensor]]] = {
        "cvxpylayers, default": lambda: cvxpylayer(case, {}),
        "cvxpylayers, Clarabel dense": lambda: cvxpylayer(case, right),
    }
    if "G" in case["data"]:
        makers["qpth"] = lambda: qpth(case)
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name}: left out ({error})")
    return found


def exact(case: dict[str, Any], w: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Solution and gradient of w'x: ours, which the tests hold to finite differences and Clarabel."""
    data = [t.clone().requires_grad_() for t in case["data"].values()]
    x = ours(case)(*data)
    return x.detach(), list(torch.autograd.grad((w * x).sum(), data))


def measure(case: dict[str, Any], budget: float) -> list[dict[str, Any]]:
    """A row a competitor: errors, and medians of forward and backward, timed in turns.

    Args:
        case: the problem.
        budget: seconds for each competitor, of which every one gets a repetition at least.
    """
    w = torch.randn(case["batch"], case["n"])
    x_exact, g_exact = exact(case, w)
    runs = competitors(case)
    rows = [
        {"problem": case["name"], "batch": case["batch"], "competitor": name, "failed": "",
         "error": float("nan"), "gradient error": float("nan"), "times": [], "spent": 0.0}
        for name in runs
    ]  # fmt: skip
    for _ in range(20):
        for row, call in zip(rows, runs.values(), strict=True):
            if row["failed"] or (row["times"] and row["spent"] > budget):
                continue
            data = [t.clone().requires_grad_() for t in case["data"].values()]
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
            row["gradient error"] = max(map(_relative, g, g_exact))
    for row in rows:
        times = row.pop("times")
        row["repetitions"] = len(times)
        row["forward"], row["backward"] = (
            (harness.median([t[i] for t in times]) for i in (0, 1))
            if times
            else (float("nan"),) * 2
        )
    return rows


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().amax() / b.abs().amax().clamp_min(1e-12))


def table(rows: list[dict[str, Any]]) -> str:
    """One line a competitor; ratios of its time to ours."""
    base = {(r["problem"], r["batch"]): r for r in rows if r["competitor"] == "implicitdl"}
    lines = []
    for r in rows:
        own = base[r["problem"], r["batch"]]
        wrong = not (r["error"] < RIGHT and r["gradient error"] < RIGHT)
        lines.append((
            r["problem"], r["batch"], r["competitor"],
            harness.duration(r["forward"]), harness.duration(r["backward"]),
            f"{r['forward'] / own['forward']:.2f}", f"{r['backward'] / own['backward']:.2f}",
            f"{r['error']:.0e}", f"{r['gradient error']:.0e}",
            r["failed"] or ("not right" if wrong else ""),
        ))  # fmt: skip
    header = ("problem", "batch", "", "forward", "backward", "forward / ours", "backward / ours",
              "error of x", "error of gradient", "")  # fmt: skip
    return harness.table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batches of 64, under 2 minutes")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    facts = harness.machine()
    print(harness.machine_line(facts))
    cases = [quadratic(64, 20), quadratic(64, 50), robust(64)]
    if not arguments.quick:
        cases += [quadratic(64, 100), quadratic(512, 20), quadratic(512, 50), quadratic(1, 500),
                  robust(512)]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows += measure(case, 4.0 if arguments.quick else 12.0)
        print(table(rows[-len(competitors(case)) :]), flush=True)
    text = f"{harness.machine_line(facts)}; float64, medians.\n\n{table(rows)}\n"
    name = "convex_quick" if arguments.quick else "convex"
    harness.write_results(name, {"machine": facts, "rows": rows}, text, arguments.out)


if __name__ == "__main__":
    main()
