"""The command line: a report that is right, and one line where it cannot be had."""

import copy
import gzip
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import implicitdl
from implicitdl import __version__, _data, _demo
from implicitdl.__main__ import main
from implicitdl._demo import conversion
from implicitdl._demo.report import Context, Section, table
from implicitdl._train import standardized

PICTURES = (
    "training.png",
    "convergence.png",
    "matrix.png",
    "blocks.png",
    "robust.png",
    "attack.png",
    "penalties.png",
    "certified.png",
    "sensitivity.png",
    "attacked.png",
    "certificate.png",
)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m implicitdl ARGUMENTS`, as a user types it."""
    command = [sys.executable, "-W", "error", "-m", "implicitdl", *arguments]
    # Also where the package is tested from its folder, without having been installed.
    env = {**os.environ, "PYTHONPATH": str(Path(implicitdl.__file__).parents[1])}
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG file, every chunk of which is there."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def write_mnist(folder: Path, train: int = 60, test: int = 20) -> Path:
    """A small data set in MNIST's format: the label is where the bright column stands."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, samples, pack in (("train", train, gzip.compress), ("t10k", test, bytes)):
        labels = np.arange(samples, dtype=np.uint8) % 10
        images = generator.integers(0, 60, (samples, 12, 10), dtype=np.uint8)
        images[np.arange(samples), :, labels] = 255
        end = ".gz" if pack is gzip.compress else ""
        header = struct.pack(">IIII", 0x803, *images.shape)
        (folder / f"{part}-images-idx3-ubyte{end}").write_bytes(pack(header + images.tobytes()))
        header = struct.pack(">II", 0x801, samples)
        (folder / f"{part}-labels-idx1-ubyte{end}").write_bytes(pack(header + labels.tobytes()))
    return folder


def number(pattern: str, text: str) -> float:
    """The number that the pattern's group finds."""
    found = re.search(pattern, text)
    assert found, f"{pattern!r} not found in:\n{text}"
    return float(found.group(1).replace(",", ""))


def test_quick_demo_end_to_end(tmp_path: Path) -> None:
    done = run("demo", "--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "not a terminal: no progress bar, no warning"
    text = done.stdout
    assert number(r"implicit, 64 states +([\d.]+) %", text) > 85
    assert number(r"explicit, 64-\S+ +([\d.]+) %", text) > 85
    mine, rival = (number(rf"{m}, .*? ([\d,]+) parameters", text) for m in ("implicit", "explicit"))
    assert abs(mine - rival) < 0.02 * mine
    assert "well-posed" in text
    factor = number(r"contraction factor ([\d.]+)", text)
    assert number(r"margin ([\d.]+)", text) == pytest.approx(1 - factor, abs=1e-3)
    assert factor <= 0.95 + 1e-6
    assert "359 of 359 solved" in text
    residual, bound = (
        number(r"at most ([\d.e+-]+), states", text),
        number(r"x\*\| at most (\S+),", text),
    )
    assert 0 < residual < 1e-4
    assert bound == pytest.approx(residual / (1 - factor), rel=0.1)
    width = number(r"explicit, 64-(\d+)-", text)
    assert f"{2 * width:.0f}, its hidden neurons, in 2 blocks" in text
    assert "well-posed, by the condition strictly block-triangular" in text
    largest = number(r"float64 .* of outputs up to (\S+)", text)
    assert 1 < largest < 1000
    assert number(r"float32 +largest difference (\S+)", text) <= 1e-5 * largest
    assert number(r"float64 +largest difference (\S+)", text) <= 1e-13 * largest
    for name in PICTURES:
        width, height = picture_size(tmp_path / "implicitdl-demo" / name)
        assert width > 600 and height > 400
        assert name in text


@pytest.mark.usefixtures("float32")
def test_demo_reads_mnist_files_and_repeats_itself(tmp_path: Path, capsys) -> None:
    raw = write_mnist(tmp_path / "MNIST" / "raw")
    reports = []
    for _ in range(2):
        options = ["--epochs", "2", "--states", "7", "--seed", "3", "--out", str(tmp_path / "o")]
        assert main(["demo", "--data", str(tmp_path), *options]) == 0
        reports.append(re.sub(r"\d+\.\d s", "", capsys.readouterr().out))
    assert reports[0] == reports[1]
    assert "seed 3" in reports[0] and "implicit, 7 states" in reports[0]
    assert "2 epochs" in reports[0] and "20 to test, 12 x 10 pixels" in reports[0]
    assert {p.name for p in (tmp_path / "o").iterdir()} == set(PICTURES)
    assert raw.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--nonsense"], "unknown argument '--nonsense'"),
        (["extra"], "unknown argument 'extra'"),
        (["--epochs", "0"], "--epochs: got '0', expected a whole number from 1"),
        (["--epochs", "two"], "--epochs: got 'two'"),
        (["--epochs"], "expected one argument"),
        (["--states", "-3"], "--states: got '-3'"),
        (["--states", "1000000"], "to 4096"),
        (["--seed", "-1"], "--seed: got '-1'"),
        (["--seed", "1.5"], "--seed: got '1.5'"),
        (["--data", "/no/such\nfolder"], "--data: /no/such folder"),
        (["--data", ""], "--data"),
        (["--data", "EMPTY"], "without MNIST files"),
        (["--data", "FILE"], "got a file, expected a folder"),
        (["--out", "FILE"], "--out"),
        (["--out", "FILE/deeper"], "--out"),
        (["--out", "/proc/nothing"], "--out"),
    ],
)
def test_a_wrong_option_gets_one_line_and_status_2(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("")
    with pytest.raises(SystemExit) as caught:
        main(["demo", *arguments])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1 and output.err.endswith("\n")
    assert output.err.startswith("implicitdl demo: error: ")
    assert expected in output.err


def test_the_process_ends_with_status_2_and_no_traceback(tmp_path: Path) -> None:
    done = run("demo", "--data", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "nowhere: got nothing there" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_damaged_data_is_named(tmp_path: Path, capsys) -> None:
    raw = write_mnist(tmp_path / "raw")
    path = raw / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--data", str(tmp_path)])
    assert str(path) in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["demo"])
    error = capsys.readouterr().err
    assert "matplotlib, scikit-learn, tqdm" in error and 'pip install "implicitdl[demo]"' in error


def test_unknown_command(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["dmeo"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'dmeo'" in error and "demo" in error


def test_interrupt_ends_quietly(monkeypatch, capsys) -> None:
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("implicitdl.__main__._demo", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["demo"])
    assert capsys.readouterr().err == "implicitdl demo: interrupted\n"


def test_version_and_help(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"implicitdl {__version__}\n"
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = capsys.readouterr().out
    for option in ("--data", "--seed", "--out", "--epochs", "--states", "--quick"):
        assert option in text


def test_chapters_are_written_one_after_the_other(tmp_path: Path) -> None:
    context = Context(data=None, out=tmp_path)  # type: ignore[arg-type]
    first, second = Section(title="One"), Section(title="Two", pictures=[Path("a.png")])
    first.add("label", "x", "y")
    written: list[str] = []
    got = _demo.run(context, chapters=[lambda c: first, lambda c: second], write=written.append)
    assert got == [first, second]
    assert written[0] == "One\n---\n  label  x\n         y\n"
    assert "pictures  a.png" in written[1]


def test_a_chapter_is_given_the_models_of_those_before(tmp_path: Path) -> None:
    context = Context(data=None, out=tmp_path)  # type: ignore[arg-type]
    one, two = torch.nn.Linear(1, 1), torch.nn.Linear(2, 2)
    seen: list[dict[str, torch.nn.Module]] = []

    def training(name: str, model: torch.nn.Module):
        def chapter(context: Context) -> Section:
            seen.append(dict(context.models))
            return Section(title=name, models={name: model})

        return chapter

    chapters = [training("one", one), training("two", two), training("three", one)]
    _demo.run(context, chapters=chapters, write=lambda text: None)
    assert seen == [{}, {"one": one}, {"one": one, "two": two}]
    assert context.models == {}
    with pytest.raises(ValueError, match=r"got \[\], expected 'explicit'"):
        _demo.run(context, chapters=[conversion.chapter])


@pytest.mark.usefixtures("float32")
def test_the_chapter_on_conversion_measures_and_does_not_train(tmp_path: Path, monkeypatch) -> None:
    """What it prints is the difference that there is, and the network stays as it was given."""
    data = _data.digits(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 5), torch.nn.ReLU(), torch.nn.Linear(5, 10))
    before = copy.deepcopy(network.state_dict())
    context = Context(data=data, out=tmp_path, models={"explicit": network})
    text = str(conversion.chapter(context))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(value.dtype == torch.float32 for value in network.state_dict().values())
    assert "5, its hidden neurons, in 1 block\n" in text
    expected = network(standardized(data).test_images).abs().max().item()
    assert number(r"float32 .* of outputs up to (\S+)", text) == pytest.approx(expected, abs=0.05)
    picture_size(tmp_path / "blocks.png")

    def wrong(module: torch.nn.Module, example: torch.Tensor) -> implicitdl.ImplicitModel:
        other = copy.deepcopy(module)
        other[2].bias.data[3] += 0.25
        return implicitdl.to_implicit(other, example)

    monkeypatch.setattr(conversion, "to_implicit", wrong)
    text = str(conversion.chapter(context))
    for kind in ("float32", "float64"):
        assert number(rf"{kind} +largest difference (\S+)", text) == 0.25


def test_tables_line_up() -> None:
    assert table([("a", "1", "x"), ("bbb", "22", "yy")]) == ["a      1    x", "bbb   22   yy"]
