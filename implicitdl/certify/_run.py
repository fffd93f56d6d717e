"""A long run over many samples: its results on disk, its share of the work, its progress."""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators import read, weights
from ._graph import as_model, known


class State:
    """Results by sample, on disk where asked."""

    NAMES = ("correct", "certified", "broken", "done", "margins", "seconds")

    def __init__(self, samples: int, classes: int, device: torch.device):
        flags = {
            name: torch.zeros(samples, dtype=torch.bool, device=device) for name in self.NAMES[:4]
        }
        self.correct, self.certified, self.broken, self.done = flags.values()
        self.margins = torch.full((samples, classes), math.nan, dtype=torch.float64, device=device)
        self.seconds = torch.zeros(samples, dtype=torch.float64, device=device)
        self.parts: dict[str, float] = {}
        self.refused: dict[str, str] = {}  # method -> why it does not apply

    def clock(self, name: str) -> "Clock":
        """A block whose seconds count for `name`."""
        return Clock(self.parts, name)

    def write(self, file: str, mark: str) -> None:
        """All of it at once: a run that is cut off leaves the old file or the new one."""
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name).cpu().contiguous() for name in self.NAMES}
        header = {"run": mark, "refused": json.dumps(self.refused)}
        save_file(tensors, file + ".new", metadata=header)
        os.replace(file + ".new", file)

    def read(self, file: str, mark: str) -> None:
        """What a run that was cut off had done.

        Raises:
            ValueError: the file is of another run.
        """
        from safetensors import SafetensorError, safe_open

        folder = os.path.dirname(file) or "."
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"path: {file}: there is no folder {folder}.")
        if not os.path.exists(file):
            return
        try:
            with safe_open(file, "pt") as held:
                header = held.metadata() or {}
                if header.get("run") != mark:
                    raise ValueError(
                        f"path: {file} holds the results of another run (other weights, data or "
                        "options); choose another file or delete it."
                    )
                for name in self.NAMES:
                    getattr(self, name).copy_(held.get_tensor(name))
                refused = json.loads(header["refused"])
                self.refused.update({str(key): str(value) for key, value in refused.items()})
        except (SafetensorError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"path: {file} is no file of `certify_accuracy` ({error}); choose another one."
            ) from error

    def gather(self) -> None:
        """The shares of all processes together: each sample was done by one."""
        import torch.distributed as dist

        done = self.done.clone()
        for name in self.NAMES:
            t = getattr(self, name)
            shape = (-1,) + (1,) * (t.dim() - 1)
            mine = torch.where(
                done.view(shape), t.double(), torch.zeros_like(t, dtype=torch.double)
            )
            if name == "margins":
                seen = torch.isnan(mine).double()
                infinite = torch.isinf(mine).double()
                mine = mine.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
                for part in (mine, seen, infinite):
                    dist.all_reduce(part)
                mine = torch.where(infinite > 0, math.inf, torch.where(seen > 0, math.nan, mine))
            else:
                dist.all_reduce(mine)
            t.copy_(mine.to(t.dtype))


class Clock:
    """Adds the seconds of a block to those of its name."""

    def __init__(self, parts: dict[str, float], name: str):
        self.parts, self.name = parts, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.parts[self.name] = self.parts.get(self.name, 0.0) + time.perf_counter() - self.start


def share_of_work() -> tuple[int, int]:
    """(rank, number of processes)."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shown(batches: Sequence[Tensor], progress: bool) -> Iterable[Tensor]:
    """The batches, with a bar where asked."""
    if not progress:
        return batches
    try:
        from tqdm import tqdm
    except ImportError:
        return _counted(batches)
    return tqdm(batches, desc="certify", unit="batch")


def _counted(batches: Sequence[Tensor]) -> Iterable[Tensor]:
    for k, batch in enumerate(batches, start=1):
        yield batch
        sys.stderr.write(f"\rcertify: {k} of {len(batches)} batches")
        sys.stderr.flush()
    sys.stderr.write("\n")


def fingerprint(model: Any, u: Tensor, labels: Tensor, *rest: Any) -> str:
    """Of the weights, the data and all options, so that no file is read for another run."""
    mark = hashlib.sha256(repr(rest).encode())
    graph, _ = known(model)
    for node in graph.nodes:
        terms = [(j, repr(M.op)) for j, M in node.row.terms]
        mark.update(repr((node.name, node.parts, node.natural, terms)).encode())
    whole = as_model(model)
    if whole.structure is None:
        own = [getattr(whole, name) for name in "ABCDbd"] + [read(w) for w in weights(whole.phi)]
    else:
        own = [read(w) for w in weights(whole.structure)]
    for t in (u, labels, *own):
        mark.update(f"{t.dtype}{tuple(t.shape)}".encode())
        mark.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()
