"""The rules that keep the library small: imports one way, short files, few names, no surprises."""

import ast
import importlib
import inspect
import os
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "implicitdl"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in FILES
)

# A module, or a folder of that name, imports only from lines above its own.
ORDER = (
    "_linalg",
    "_krylov",
    "solution",
    "_sharing",
    "_samples",
    "activations",
    "operators",
    "maps",
    "solvers",
    "implicit",
    "wellposed",
    "model",
    "convert",
    "layers",
    "convex",
    "lifted",
    "states",
    "compress",
    "robust",
    "certify",
    "dro",
    "estimators",
    "_data",
    "_train",
    "plot",
    "_demo",
    "__main__",
)
# These may import the package as a user does, and everything in it.
ENTRY_POINTS = ("_demo", "__main__")
MAX_LINES = 500
MAX_NAMES = 25
MAX_IMPORT_SECONDS = 0.3
LAZY = ("cvxpy", "cvxpylayers", "diffcp", "matplotlib", "sklearn", "scipy", "tqdm")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def unit(path: Path) -> str:
    """The line of ORDER that a file belongs to: its own name or that of its folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path: Path, source: ast.Module) -> Iterator[tuple[int, str]]:
    """(line number, line of ORDER) of every import of this package, those in functions included.

    The package itself, `from implicitdl import x` or `from . import x`, counts as the unit x where
    x is a module, and as "__init__" otherwise.
    """
    units = {unit(file) for file in FILES}
    here = ("implicitdl", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            targets = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "implicitdl":
                inside = len(target) > 1 and target[1] in units
                yield node.lineno, target[1] if inside else "__init__"


def test_the_check_of_imports_sees_every_form():
    source = ast.parse(
        "import implicitdl\n"
        "import implicitdl.solvers.picard as p\n"
        "from implicitdl import solvers, fixed_point\n"
        "from . import maps\n"
        "from ..solution import Solution\n"
        "def f():\n    from ..solvers._loop import Map\n"
        "from numpy import linalg\n"
    )
    found = sorted(imported_units(PACKAGE / "solvers" / "picard.py", source))
    assert found == [
        (1, "__init__"),
        (2, "solvers"),
        (3, "__init__"),
        (3, "solvers"),
        (4, "solvers"),  # `from .` in solvers/picard.py is the folder solvers
        (5, "solution"),
        (7, "solvers"),
    ]
    top = ast.parse("from . import maps, Solution\nfrom .solution import Solution\n")
    found = sorted(imported_units(PACKAGE / "layers.py", top))
    assert found == [(1, "__init__"), (1, "maps"), (2, "solution")]


@pytest.mark.parametrize("path", FILES, ids=short)
def test_imports_go_one_way(path):
    own = unit(path)
    if own == "__init__":
        return  # the map of the package: it stands below everything
    assert own in ORDER, f"{short(path)}: give {own!r} its line in ORDER"
    rank = ORDER.index(own)
    for line, other in imported_units(path, tree(path)):
        where = f"{short(path)}:{line}: {own} imports {other}"
        if other == "__init__":
            assert own in ENTRY_POINTS, f"{where}, the package itself: import from the module"
        else:
            assert other in ORDER, f"{where}, which has no line in ORDER"
            assert ORDER.index(other) <= rank, f"{where}, which stands below it"


@pytest.mark.parametrize("path", FILES, ids=short)
def test_files_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{short(path)}: {lines} lines; make it a folder of one concept each"


def test_few_names_at_top_level():
    package = importlib.import_module("implicitdl")
    names = package.__all__
    assert 0 < len(names) <= MAX_NAMES
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(package, name, None) is not None, f"{name} is in __all__ but not there"
    public = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("implicitdl")
    }
    assert public <= set(names), f"public but not in __all__: {sorted(public - set(names))}"


def public_definitions(module: object, name: str) -> Iterator[tuple[str, object]]:
    """Public functions and classes that a module defines itself, and the classes' methods."""
    for key, value in vars(module).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isclass(value):
            yield key, value
            for member, found in vars(value).items():
                found = getattr(found, "__func__", found)  # class and static methods
                if not member.startswith("_") and (
                    inspect.isfunction(found) or isinstance(found, property)
                ):
                    yield f"{key}.{member}", getattr(value, member)
        elif inspect.isfunction(value):
            yield key, value


@pytest.mark.parametrize("name", MODULES)
def test_public_things_have_docstrings(name):
    module = importlib.import_module(name)
    assert module.__doc__ and module.__doc__.strip(), f"{name} has no docstring"
    missing = []
    for key, value in public_definitions(module, name):
        # A dataclass without a docstring gets its own signature as one.
        text = inspect.getdoc(value) or ""
        if not text.strip() or (inspect.isclass(value) and text.startswith(f"{key}(")):
            missing.append(key)
    assert not missing, f"{name}: no docstring on {', '.join(missing)}"


@pytest.mark.parametrize("name", MODULES)
def test_public_arguments_are_annotated(name):
    module = importlib.import_module(name)
    bare = []
    for key, value in public_definitions(module, name):
        function = inspect.unwrap(value) if callable(value) else None
        if inspect.isclass(value):
            function = vars(value).get("__init__")
        if not inspect.isfunction(function) or function.__module__ == "typing":
            continue  # a Protocol's __init__ is typing's own
        for argument in inspect.signature(function).parameters.values():
            if argument.annotation is argument.empty and argument.name not in ("self", "cls"):
                bare.append(f"{key}({argument.name})")
    assert not bare, f"{name}: no annotation on {', '.join(bare)}"


def leaf_activations() -> set[str]:
    """The activations that a type test would name; `Blocks` is a container, not one of these."""
    activations = importlib.import_module("implicitdl.activations")
    base = activations.Activation
    return {
        key
        for key, value in vars(activations).items()
        if inspect.isclass(value)
        and issubclass(value, base)
        and key not in ("Activation", "Blocks")
    }


def type_tests(source: ast.Module) -> Iterator[tuple[int, str]]:
    """(line number, class name) of every isinstance, issubclass, `type(x) is C` and `case C()`."""
    for node in ast.walk(source):
        tested: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("isinstance", "issubclass") and len(node.args) == 2:
                tested = [node.args[1]]
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(
                isinstance(s, ast.Call) and isinstance(s.func, ast.Name) and s.func.id == "type"
                for s in sides
            ):
                tested = sides
        elif isinstance(node, ast.MatchClass):
            tested = [node.cls]
        for expression in tested:
            for part in ast.walk(expression):
                if isinstance(part, ast.Name):
                    yield node.lineno, part.id
                elif isinstance(part, ast.Attribute):
                    yield node.lineno, part.attr


@pytest.mark.parametrize("path", FILES, ids=short)
def test_activations_are_read_never_recognised(path):
    if unit(path) == "convert":
        return  # the one place that translates torch's modules, by type
    names = leaf_activations()
    assert "ReLU" in names
    found = [f"{short(path)}:{n}: {name}" for n, name in type_tests(tree(path)) if name in names]
    assert not found, f"declare a fact instead of testing the type: {found}"


def test_the_check_of_type_tests_sees_every_form():
    source = ast.parse(
        "isinstance(phi, (nn.Tanh, ReLU))\n"
        "type(phi) is act.ELU\n"
        "match phi:\n    case SiLU():\n        pass\n"
        "isinstance(phi, int | GELU)\n"
    )
    assert {(1, "Tanh"), (1, "ReLU"), (2, "ELU"), (4, "SiLU"), (6, "GELU")} <= set(
        type_tests(source)
    )


def dangerous_calls(source: ast.Module) -> Iterator[tuple[int, str]]:
    """Calls that run what a string or a file says."""
    for node in ast.walk(source):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names]
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from ((node.lineno, m) for m in modules if m in ("pickle", "dill", "marshal"))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "compile", "__import__", "os.system", "torch.load"):
                yield node.lineno, called
            if any(k.arg == "shell" for k in node.keywords):
                yield node.lineno, "shell="


@pytest.mark.parametrize("path", FILES, ids=short)
def test_nothing_runs_code_from_strings_or_files(path):
    found = [f"{short(path)}:{line}: {what}" for line, what in dangerous_calls(tree(path))]
    assert not found, found


def test_the_check_of_dangerous_calls_sees_them_and_only_them():
    bad = "eval('1')\nimport pickle\ntorch.load(f)\nfrom pickle import load\n"
    assert sorted(line for line, _ in dangerous_calls(ast.parse(bad))) == [1, 2, 3, 4]
    assert not list(dangerous_calls(ast.parse("model.eval()\nre.compile('x')\njson.load(f)\n")))


# Built from pieces, so that this file passes its own test.
_MACHINE_PATH = re.compile(
    "|".join(rf"(?<![\w.])/{folder}/" for folder in ("work", "tmp", "home", "root", "Users", "opt"))
    + r"|\b[A-Z]:\\\\?(?:Users|Temp)"
)


def kept_files() -> list[Path]:
    """Text files that belong to the repository: the sources, and what stands beside them."""
    folders = ("implicitdl", "tests", "examples", "benchmarks", ".ci", "docs")
    suffixes = (".py", ".md", ".toml", ".txt", ".json", "")
    inside = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    found = [p for p in (*ROOT.glob("*"), *inside) if p.is_file() and p.suffix in suffixes]
    cache = re.compile(r"__pycache__|\.\w+_cache")
    return sorted(p for p in found if not any(map(cache.fullmatch, p.parts)) and p.name != ".git")


def test_no_path_of_one_machine():
    found = []
    for path in kept_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if _MACHINE_PATH.search(line) and path.name != Path(__file__).name:
                found.append(f"{short(path)}:{number}: {line.strip()[:80]}")
    assert not found, found


_MEASURE = f"""
import sys, time
import torch
before = set(sys.modules)
wall, cpu = time.perf_counter(), time.process_time()
import implicitdl
print(min(time.perf_counter() - wall, time.process_time() - cpu))
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(" ".join(sorted(new & set({LAZY!r}))))
"""


def in_new_process(code: str, cache: Path) -> list[str]:
    # Compiled files are kept, as they are where a package is installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_import_is_quick_and_brings_nothing_heavy(tmp_path):
    """`import implicitdl` costs under 0.3 s beyond torch; heavy packages wait until they are used.

    The lower of wall and processor time, and the median of three processes after one that may have
    to compile the files: a busy machine does not fail this test.
    """
    _, heavy = in_new_process(_MEASURE, tmp_path)
    assert heavy == "", f"import implicitdl also imports {heavy}: import inside functions"
    seconds = [float(in_new_process(_MEASURE, tmp_path)[0]) for _ in range(3)]
    assert statistics.median(seconds) < MAX_IMPORT_SECONDS, seconds


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_version_is_said_once():
    package = importlib.import_module("implicitdl")
    version = project()["version"]
    assert getattr(package, "__version__", version) == version
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(version)}\b", changes, re.MULTILINE)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^\s=]+", line) for line in wanted)
    return {name.lower().replace("_", "-"): v for name, v in (line.split("==") for line in wanted)}


def test_every_dependency_has_a_tested_version():
    metadata = project()
    extras = metadata["optional-dependencies"]
    wanted = metadata["dependencies"] + [x for key in ("demo", "test") for x in extras[key]]
    wanted += extras["plot"] + extras["lint"]
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in wanted}
    assert names - {"implicitdl"} <= set(pins())
    assert pins()["torch"] == "2.13.0"


def test_installed_versions_are_the_tested_ones_in_ci():
    """What ran in CI is what constraints.txt says (a local build tag such as +cpu aside)."""
    from importlib.metadata import PackageNotFoundError, version

    differing = {}
    for name, pinned in pins().items():
        try:
            installed = version(name).partition("+")[0]
        except PackageNotFoundError:
            installed = "not installed"
        if installed != pinned:
            differing[name] = f"{installed}, not {pinned}"
    if differing and not os.environ.get("IMPLICITDL_CI"):
        pytest.skip(f"other versions than the tested ones, which is allowed here: {differing}")
    assert not differing, differing


DEMO = 'pip install -c constraints.txt -e ".[demo]" && python -m implicitdl demo'
TESTS = 'pip install -c constraints.txt -e ".[test]" && python -m pytest'


def test_readme_has_the_two_commands_and_ci_runs_the_second():
    lines = [line.strip() for line in (ROOT / "README.md").read_text("utf-8").splitlines()]
    assert lines.count(DEMO) == 1 and lines.count(TESTS) == 1
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script and "&& python -m pytest" not in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_command_line_is_installed():
    assert project()["scripts"] == {"implicitdl": "implicitdl.__main__:main"}
    main = importlib.import_module("implicitdl.__main__").main
    assert callable(main)
