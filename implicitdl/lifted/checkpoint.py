"""A training as a file: safetensors with everything the next epoch depends on, JSON in its header.

Nothing in it is executed. Everything is checked against what the training expects before any of it
is used.
"""

import contextlib
import hashlib
import json
import os
from typing import Any

import torch
from torch import Tensor

from .report import Report

_FORMAT = "implicitdl.lifted"
_VERSION = 1


def fingerprint(*tensors: Tensor | None) -> str:
    """A hash of shapes, dtypes and numbers, by which a file knows its data again."""
    digest = hashlib.blake2b(digest_size=16)
    for t in tensors:
        digest.update(b"none" if t is None else f"{t.dtype}{tuple(t.shape)}".encode())
        if t is not None:
            digest.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_path(path: "str | os.PathLike[str]") -> str:
    """The path as text, if a file can be written there.

    Raises:
        TypeError, FileNotFoundError, IsADirectoryError: it cannot.
    """
    try:
        name = os.fspath(path)
    except TypeError:
        raise TypeError(f"checkpoint: got {path!r}, expected a path or None.") from None
    folder = os.path.dirname(name) or "."
    if os.path.isdir(name):
        raise IsADirectoryError(f"checkpoint: {name} is a folder, expected the path of a file.")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"checkpoint: {name}: there is no folder {folder}.")
    return name


def save(
    name: str, options: dict[str, Any], report: Report, now: dict[str, Tensor],
    best: dict[str, Tensor],
) -> None:  # fmt: skip
    """Write all of it; a file that was there is replaced in one move, or stays as it was."""
    from safetensors.torch import save_file

    header = {"version": _VERSION, "options": options, "history": report.history()}
    tensors = {f"now/{key}": t for key, t in now.items()}
    tensors |= {f"best/{key}": t for key, t in best.items()}
    plain = {key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()}
    part = f"{name}.part"
    try:
        save_file(plain, part, metadata={_FORMAT: json.dumps(header)})
        os.replace(part, name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


def load(
    name: str, options: dict[str, Any], report: Report, now: dict[str, Tensor],
    best: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """What the file holds, if it is one of this training; the report is filled in.

    Args:
        name: of the file.
        options: those of this training, which the file must have been written with.
        report: an empty one.
        now, best: tensors of the names, shapes and dtypes that are expected.

    Raises:
        ValueError: another file, another version, other options or data, or tensors that do not
            fit; the message says which.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(name, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(_FORMAT)
            if text is None:
                raise ValueError("no checkpoint of lifted training")
            header = json.loads(text)
            expected = {f"now/{key}": t for key, t in now.items()}
            expected |= {f"best/{key}": t for key, t in best.items()}
            _check_header(header, options)
            if set(file.keys()) != set(expected):
                odd = sorted(set(file.keys()) ^ set(expected))[:4]
                raise ValueError(f"its tensors are others than expected: {odd}")
            found = {}
            for key, like in expected.items():
                t = file.get_tensor(key)
                if t.shape != like.shape or t.dtype != like.dtype:
                    raise ValueError(
                        f"{key} is {t.dtype} {tuple(t.shape)}, expected {like.dtype} "
                        f"{tuple(like.shape)}"
                    )
                found[key] = t.to(like.device)
            _fill(report, header["history"])
    except SafetensorError as error:
        raise ValueError(f"checkpoint {name}: not a safetensors file ({error}).") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"checkpoint {name}: {error}. Take another path, or remove the file to start anew."
        ) from error
    split: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}}
    for key, t in found.items():
        kind, own = key.split("/", 1)
        split[kind][own] = t
    return split["now"], split["best"]


def _check_header(header: Any, options: dict[str, Any]) -> None:
    if not isinstance(header, dict) or header.get("version") != _VERSION:
        got = header.get("version") if isinstance(header, dict) else header
        raise ValueError(f"version {got!r}, expected {_VERSION}")
    written = header.get("options")
    wanted = json.loads(json.dumps(options))
    if written != wanted:
        written = written if isinstance(written, dict) else {}
        keys = [k for k in {*wanted, *written} if wanted.get(k) != written.get(k)]
        shown = "; ".join(
            f"{k}: {written.get(k)!r} in the file, {wanted.get(k)!r} here"
            for k in sorted(keys, key=lambda k: (k != "method", k))[:4]
        )
        raise ValueError(f"it was written by another training ({shown})")


def _fill(report: Report, history: Any) -> None:
    """The history, whose entries must be numbers and of one length."""
    series = ("objective", "loss", "feasibility", "accuracy", "validation", "seconds")
    lengths = set()
    for key in series:
        values = history[key]
        if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
            raise ValueError(f"its history of {key} is no list of numbers")
        lengths.add(len(values))
    rows = history["penalties"]
    good = isinstance(rows, list) and all(
        isinstance(row, list) and all(isinstance(v, int | float) for v in row) for row in rows
    )
    lengths.add(len(rows) if good else -1)
    if len(lengths) != 1 or -1 in lengths:
        raise ValueError("the parts of its history differ in length")
    best = history["best"]
    if type(best) is not int or not -1 <= best < lengths.pop():
        raise ValueError(f"its best epoch is {best!r}")
    details = history["details"]
    if not isinstance(details, dict):
        raise TypeError("its details are no mapping")
    for key in (*series, "penalties"):
        setattr(report, key, history[key])
    report.best = best
    report.details.clear()  # the process writes to the same mapping
    report.details.update(details)
