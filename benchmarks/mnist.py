"""An implicit classifier on MNIST, beside an explicit network of the same number of parameters.

    python benchmarks/mnist.py --data DIR

Both models are trained by one recipe, which was chosen on held-out images of the training file.
Test images are read once a run, after training. Prints a table and writes
results/mnist.json and results/mnist.md.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from implicitdl import _data
from implicitdl._train import (
    Recipe,
    accuracy,
    matched_mlp,
    parameter_count,
    standardized,
    train,
)
from implicitdl.layers import ImplicitLayer
from implicitdl.wellposed import InfNormBall

STATES = 100
KAPPA = 0.95
AIM = {"accuracy": 0.985, "seconds": 180.0}


def build(name: str, data: _data.Dataset) -> torch.nn.Module:
    """The model of that name, with fresh parameters."""
    ball = InfNormBall(kappa=KAPPA)
    implicit = ImplicitLayer(data.features, data.classes, STATES, well_posed=ball)
    if name == "implicit":
        return implicit
    return matched_mlp(data.features, data.classes, parameter_count(implicit))


def measure(name: str, data: _data.Dataset, recipe: Recipe, seed: int) -> dict:
    """Train one model with one seed, then look at the test images."""
    torch.manual_seed(seed)
    model = build(name, data)
    start, cpu = time.perf_counter(), time.process_time()
    history = train(model, data, recipe, seed=seed, validate=False)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    run = {
        "model": name,
        "seed": seed,
        "parameters": parameter_count(model),
        "seconds": seconds,
        "cpu seconds": cpu,
        "loss": history["loss"][-1],
        "validation accuracy": accuracy(model, data.validation_images, data.validation_labels),
        "test accuracy": accuracy(model, data.test_images, data.test_labels),
    }
    if name == "implicit":
        certificate = model.certificate()
        with torch.no_grad():
            solution = model.solve(data.test_images)
        run["certificate"] = {
            "status": certificate.status,
            "condition": certificate.condition,
            "margin": certificate.margin,
            "contraction": certificate.contraction,
            "norm": certificate.norm,
        }
        run["solver"] = {
            "name": str(solution.stats.get("solver", "")),
            "solved": int(solution.converged.sum()),
            "median steps": float(solution.steps.double().median()),
            "most steps": int(solution.steps.max()),
            "largest error bound": (
                None if solution.error_bound is None else float(solution.error_bound.max())
            ),
        }
    return run


def machine() -> dict:
    """What the numbers depend on, without the machine's name."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def summary(runs: list[dict]) -> dict:
    """Mean and spread over the seeds, for each model."""
    result = {}
    for name in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == name]
        shares = [run["test accuracy"] for run in mine]
        result[name] = {
            "parameters": mine[0]["parameters"],
            "mean test accuracy": statistics.fmean(shares),
            "standard deviation": statistics.stdev(shares) if len(shares) > 1 else 0.0,
            "mean validation accuracy": statistics.fmean(r["validation accuracy"] for r in mine),
            "longest seconds": max(run["seconds"] for run in mine),
        }
    return result


def report(result: dict) -> str:
    """The result as Markdown."""
    where, recipe = result["machine"], result["recipe"]
    lines = [
        "# MNIST, 100 states",
        "",
        f"{where['cpu']}, {where['threads']} thread(s) on {where['cores']} cores; Python {where['python']}, torch "
        + f"{where['torch']}. {recipe['epochs']} epochs, batches of {recipe['batch_size']}, "
        + f"{result['images']['train']:,} training images, "
        + f"{result['images']['validation']:,} for validation. The recipe was chosen on held-out "
        + "images of the training file; the test images were read after training.",
        "",
        "| model | seed | parameters | validation | test | training | CPU |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['model']} | {r['seed']} | {r['parameters']:,} | "
        f"{100 * r['validation accuracy']:.2f} % | {100 * r['test accuracy']:.2f} % | "
        f"{r['seconds']:.0f} s | {r['cpu seconds']:.0f} s |"
        for r in result["runs"]
    ]
    lines += ["", "| model | test, mean | standard deviation | longest training |"]
    lines += ["|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {100 * s['mean test accuracy']:.2f} % | "
        f"{100 * s['standard deviation']:.2f} % | {s['longest seconds']:.0f} s |"
        for name, s in result["summary"].items()
    ]
    lines.append("")
    for run in result["runs"]:
        if "certificate" in run:
            c, s = run["certificate"], run["solver"]
            factor = "none" if c["contraction"] is None else f"{c['contraction']:.4g}"
            bound = s["largest error bound"]
            lines.append(
                f"- seed {run['seed']}: A is {c['status']} ({c['condition']}, margin "
                f"{c['margin']:.4g}, contraction factor {factor}); {s['name']} solved "
                f"{s['solved']:,} of {result['images']['test']:,} test images in "
                f"{s['median steps']:.0f} steps (median), {s['most steps']} at most"
                + ("" if bound is None else f", error at most {bound:.1e}")
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the benchmark; the status is 1 where the full one misses its aim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of MNIST files")
    parser.add_argument("--quick", action="store_true", help="one seed, three epochs")
    parser.add_argument("--seeds", type=int, help="how many (default: 3)")
    parser.add_argument("--epochs", type=int, help="passes over the training images")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    seeds = (1 if arguments.quick else 3) if arguments.seeds is None else arguments.seeds
    epochs = arguments.epochs
    if epochs is None:
        epochs = 3 if arguments.quick else Recipe().epochs
    recipe = Recipe(epochs=epochs)
    if min(seeds, epochs) < 1:
        parser.error(f"got {seeds} seeds and {epochs} epochs, expected at least one of each")
    try:
        data = standardized(_data.mnist(arguments.data))
    except _data.DataError as error:
        parser.error(str(error))
    runs = []
    for seed in range(seeds):
        for name in ("implicit", "explicit"):
            run = measure(name, data, recipe, seed)
            runs.append(run)
            print(
                f"{name}  seed {seed}  test {100 * run['test accuracy']:.2f} %  "
                f"{run['seconds']:.0f} s",
                flush=True,
            )
    result = {
        "machine": machine(),
        "quick": arguments.quick,
        "recipe": {**vars(recipe), "warp": vars(recipe.warp), "kappa": KAPPA, "states": STATES},
        "images": {
            part: len(getattr(data, f"{part}_images")) for part in ("train", "validation", "test")
        },
        "summary": summary(runs),
        "runs": runs,
    }
    text = report(result)
    print("\n" + text)
    name = "mnist_quick" if arguments.quick else "mnist"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (arguments.out / f"{name}.md").write_text(text)
    if arguments.quick:
        return 0
    reached = result["summary"]["implicit"]
    met = (
        reached["mean test accuracy"] >= AIM["accuracy"]
        and reached["longest seconds"] <= AIM["seconds"]
    )
    print(
        f"aim: mean test accuracy of {100 * AIM['accuracy']:.1f} % within {AIM['seconds']:.0f} s: "
        + ("reached" if met else "missed")
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
