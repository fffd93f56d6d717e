"""The command line: `python -m implicitdl`, also installed as `implicitdl`."""

import argparse
import difflib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__

_EXTRAS = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}


class _Refused(Exception):
    """What the user asked for cannot be done; the message is the line to print."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {line} (see {self.prog} --help)\n")


def _whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a whole number from {low} to {high}"
            )
        return value

    return parse


def _parser() -> tuple[_Parser, _Parser]:
    parser = _Parser(
        prog="implicitdl", description="Implicit deep learning for PyTorch.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"implicitdl {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train an implicit classifier of handwritten digits and report on it",
        description=(
            "Trains an implicit classifier of handwritten digits beside an explicit network of "
            "the same number of parameters; prints accuracies, the well-posedness certificate "
            "and what the solver did; converts the explicit network; writes pictures."
        ),
        allow_abbrev=False,
    )
    option = demo.add_argument
    option("--data", metavar="DIR", type=Path, help="folder of MNIST files (default: the digits "
           "that come with scikit-learn)")  # fmt: skip
    option("--out", metavar="DIR", type=Path, default=Path("implicitdl-demo"),
           help="folder for the pictures (default: %(default)s)")  # fmt: skip
    option("--seed", metavar="N", type=_whole(0, 2**63 - 1), default=0,
           help="of everything random (default: %(default)s)")  # fmt: skip
    option("--epochs", metavar="N", type=_whole(1, 10_000), help="passes over the training images")
    option("--states", metavar="N", type=_whole(1, 4096), help="size of the implicit state")
    option("--quick", action="store_true", help="a few seconds instead of a good result")
    return parser, demo


def _demo(arguments: argparse.Namespace) -> None:
    """Check everything that can be wrong, then train."""
    needed = [m for m in _EXTRAS if not (m == "sklearn" and arguments.data)]
    if missing := [_EXTRAS[m] for m in needed if importlib.util.find_spec(m) is None]:
        raise _Refused(f'needs {", ".join(missing)}: pip install "implicitdl[demo]"')
    from . import _data
    from ._demo import run
    from ._demo.report import Context

    try:
        data = _data.mnist(arguments.data) if arguments.data else _data.digits(arguments.seed)
    except _data.DataError as error:
        raise _Refused(f"argument --data: {error}") from error
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        probe = arguments.out / ".implicitdl-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _Refused(
            f"argument --out: {arguments.out}: got {error.strerror or error}, expected a folder "
            "that can be written to, or made"
        ) from error
    print(f"implicitdl {__version__}, demo, seed {arguments.seed}\n", flush=True)
    run(
        Context(
            data=data,
            out=arguments.out,
            seed=arguments.seed,
            epochs=arguments.epochs,
            states=arguments.states,
            quick=arguments.quick,
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        The exit status, 0. What cannot be done ends in SystemExit with status 2 and one line on
        stderr.
    """
    parser, demo = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    asked = demo if arguments.command == "demo" else parser
    if unknown:
        valid = [o for action in asked._actions for o in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], valid, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        asked.error(f"unknown argument {unknown[0]!r}{hint}")
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        _demo(arguments)
    except _Refused as error:
        asked.error(str(error))
    except KeyboardInterrupt:
        asked.exit(130, f"{asked.prog}: interrupted\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
