"""Work that processes share: sums over what each of them has, by torch.distributed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What each process of a group has of the problem: samples, rows, or all of it.

    Where `shard` is None nothing is communicated.

    Attributes:
        shard: "samples", "rows" or None.
        group: of torch.distributed; None for all processes.
    """

    shard: str | None = None
    group: Any = None

    def _sum(self, t: Tensor) -> Tensor:
        from torch import distributed

        distributed.all_reduce(t, group=self.group)
        return t

    def over_samples(self, *parts: Tensor) -> list[Tensor]:
        """Sums over the processes that hold other samples; in one call."""
        if self.shard != "samples":
            return list(parts)
        flat = self._sum(torch.cat([t.reshape(-1).double() for t in parts]))
        pieces = flat.split([t.numel() for t in parts])
        return [piece.view(t.shape) for piece, t in zip(pieces, parts, strict=True)]

    def total(self, t: Tensor) -> Tensor:
        """The sum of t over the processes that hold other samples, in its own dtype."""
        return self._sum(t.clone()) if self.shard == "samples" else t

    def own(self, rows: int) -> slice:
        """The rows that this process solves."""
        if self.shard != "rows":
            return slice(0, rows)
        from torch import distributed

        rank, size = distributed.get_rank(self.group), distributed.get_world_size(self.group)
        return slice(rank * rows // size, (rank + 1) * rows // size)

    def whole(self, part: Tensor, rows: int) -> Tensor:
        """The rows of all processes."""
        if self.shard != "rows":
            return part
        full = part.new_zeros(rows, *part.shape[1:])
        full[self.own(rows)] = part
        return self._sum(full)

    def agree(self, error: Exception | None, failure: type[Exception] | None = None) -> None:
        """Raise where any process has an error, in all of them: none waits for another for ever.

        Args:
            error: of this process.
            failure: errors of that kind are raised as such in the others, too, any other as a
                ValueError.
        """
        if self.shard is not None:
            from torch import distributed

            # The number of the process; beyond their count where it is a failure.
            here, size = 0, distributed.get_world_size(self.group)
            if error is not None:
                here = distributed.get_rank(self.group) + 1
                here += size * (failure is not None and isinstance(error, failure))
            device = "cuda" if distributed.get_backend(self.group) == "nccl" else "cpu"
            found = torch.tensor([float(here)], device=device)
            distributed.all_reduce(found, op=distributed.ReduceOp.MAX, group=self.group)
            first = int(found) - 1
            if error is None and first >= size and failure is not None:
                error = failure(f"process {first - size} found no solution; see its own error.")
            elif error is None and first >= 0:
                error = ValueError(
                    f"data: process {first} refused what it was given; see its own error."
                )
        if error is not None:
            raise error

    def together(self, work: Callable[[], T], failure: type[Exception] | None = None) -> T:
        """What work returns, which waits for no other process; an error of one is raised in all.

        Args:
            work: of this process alone.
            failure: see `agree`.
        """
        found: list[T] = []
        error: Exception | None = None
        try:
            found.append(work())
        except Exception as failed:  # noqa: BLE001 - the others are told before it is raised
            error = failed
        self.agree(error, failure)
        return found[0]


def require_initialised(shard: str) -> None:
    """Raise where there is nobody to share with."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            f"shard: got {shard!r}, but torch.distributed is not initialised: call "
            "torch.distributed.init_process_group first, under torchrun."
        )
