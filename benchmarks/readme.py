"""Copies the tables of `results/` into README.md, between the marks that are there for them.

    python benchmarks/readme.py [--check]

With --check nothing is written; the exit status is 1 where README.md says something else.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def tables(name: str) -> list[str]:
    """The markdown tables of a result, in order."""
    text = (RESULTS / f"{name}.md").read_text()
    return re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE)


def machine(name: str) -> str:
    """The line of a result that describes the machine."""
    lines = (RESULTS / f"{name}.md").read_text().splitlines()
    return next(line for line in lines[1:] if line and not line.startswith(("#", "|")))


def citizenship() -> str:
    """The whole table; of an error its kind."""
    rows = []
    for line in tables("citizenship")[0].strip().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        cells = [re.sub(r"raises \((\w+)[^;|]*", r"raises \1", cell) for cell in cells]
        rows.append(cells if set(line) - set("|-") else ["---"] * len(cells))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def benchmark() -> str:
    """The means and the lost cells; the cells themselves are in the results."""
    text = (RESULTS / "implicit_layer.md").read_text()
    counts = re.search(r"^\d+ of \d+ cells won.*$", text, flags=re.MULTILINE)
    lost = re.findall(r"^- lost: .*$", text, flags=re.MULTILINE)
    growth = tables("implicit_layer")[3:]
    parts = [machine("implicit_layer"), tables("implicit_layer")[0], counts[0] if counts else ""]
    if lost:
        parts.append("\n".join(lost))
    if growth:
        parts.append("Time and peak memory, forward + backward, growing from n = 512, batch = 64, "
                     "kappa = 0.9:")  # fmt: skip
        parts += growth
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def mnist() -> str:
    """The means."""
    return f"{machine('mnist')}\n\n{tables('mnist')[1]}"


def convert() -> str:
    """The ratios of times."""
    return f"{tables('convert')[0]}\n{machine('convert')}"


def lifted() -> str:
    """Test accuracy of three methods at the same processor time."""
    rows = json.loads((RESULTS / "lifted.json").read_text())["summary"]
    found = {(r["task"], r["method"]): r for r in rows}
    methods = ("Adam", "SGD", "local sweep", "Fenchel blocks")
    lines = ["| network | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for task in dict.fromkeys(task for task, method in found if method == "Adam"):
        cells = [found[task, m] for m in methods]
        shown = [f"{100 * r['accuracy']:.2f} +- {100 * r['deviation']:.2f}" for r in cells]
        lines.append(f"| {task} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def certify() -> str:
    """Classifiers trained for certificates, without times, which depend on what ran beside them."""
    lines = [line.strip("|").split("|") for line in tables("certify")[-1].strip().splitlines()]
    kept = [[cell.strip() for k, cell in enumerate(line) if k not in (1, 8)] for line in lines]
    kept[1] = ["---"] * len(kept[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in kept)


SECTIONS = {
    "convert": convert, "citizenship": citizenship, "benchmark": benchmark, "mnist": mnist,
    "lifted": lifted, "certify": certify,
}  # fmt: skip


def filled(text: str) -> str:
    """README.md with every section as the results have it."""
    for name, section in SECTIONS.items():
        mark, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, _, rest = text.partition(mark)
        _, _, after = rest.partition(end)
        if not after:
            raise ValueError(f"README.md: expected the marks {mark} and {end}.")
        text = f"{before}{mark}\n\n{section().strip()}\n\n{end}{after}"
    return text


def main(argv: list[str] | None = None) -> int:
    """Write README.md, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    path = ROOT / "README.md"
    old = path.read_text()
    new = filled(old)
    if options.check:
        if new != old:
            print(
                "README.md differs from the results; run python benchmarks/readme.py",
                file=sys.stderr,
            )
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
