"""What is shown runs: every example, every python block of the README, every docstring example."""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import MODULES, ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
)
MAX_LINES = 120
_BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(script: Path, folder: Path, *arguments: str) -> str:
    """Runs a script as a user does, in an empty folder; returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
        timeout=300,
    )
    said = f"{script.name} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    assert "Warning" not in done.stderr, said
    return done.stdout


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    """It fits on two pages, says what it shows in its first line, and prints a number."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert re.match(r"\d\d_[a-z_0-9]+\.py", path.name), "examples are numbered: 01_first_layer.py"
    assert ast.get_docstring(ast.parse(text)), "the first line states the claim"
    printed = run(path, tmp_path, "--quick")
    assert re.search(r"\d", printed), f"got no number in {printed!r}"


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks(page, tmp_path):
    """The blocks of a page run one after another, as one program.

    Everything else becomes empty lines, so that a traceback names the line of the page.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = list(_BLOCK.finditer(text))
    if page == "README.md":
        assert blocks, "the README shows code"
    script = ""
    for block in blocks:
        script += "\n" * (text.count("\n", 0, block.start(1)) - script.count("\n")) + block[1]
    path = tmp_path / f"{Path(page).name}.py"
    path.write_text(script, encoding="utf-8")
    run(path, tmp_path)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, float32):
    """In float32, torch's default, since that is what a reader who types them gets."""
    module = importlib.import_module(name)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(optionflags=options)
    report: list[str] = []
    for test in doctest.DocTestFinder().find(module, name):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
