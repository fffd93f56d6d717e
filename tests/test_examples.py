"""What is shown runs: every example, every python block of the README, every docstring example."""

import ast
import contextlib
import doctest
import importlib
import re
import runpy
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


def run(script: Path, folder: Path, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a script as `python script` would, in an empty folder; returns what it printed.

    In this process, where torch and the rest are loaded, with warnings as errors as in every test.
    """
    argv = sys.argv
    sys.argv = [str(script), *arguments]
    try:
        with contextlib.chdir(folder):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = argv
    return capfd.readouterr().out


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path, float32, capfd):
    """It fits on two pages, says what it shows in its first line, and prints a number."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert re.match(r"\d\d_[a-z_0-9]+\.py", path.name), "examples are numbered: 01_first_layer.py"
    assert ast.get_docstring(ast.parse(text)), "the first line states the claim"
    printed = run(path, tmp_path, capfd, "--quick")
    assert re.search(r"\d", printed), f"got no number in {printed!r}"


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks(page, tmp_path, float32, capfd):
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
    run(path, tmp_path, capfd)


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
