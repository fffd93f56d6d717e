"""Certified and attacked accuracy, and the radius up to which an answer is proved."""

import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..solution import unknown_name
from ._bounds import MARGIN, METHODS, OPTIONS, READS, options_of, stages
from ._graph import as_model
from ._margins import ball, margins, pair_rows
from ._run import State, fingerprint, share_of_work, shown
from .attacks import checked, margin_of, pgd, relaxation_attack, sparse_attack

ATTACKS = ("pgd", "relaxation", "sparse")


@dataclass(frozen=True, eq=False)
class Report:
    """What `certify_accuracy` found, sample by sample.

    Attributes:
        radius, norm, method: what was asked.
        correct, certified, broken: of each sample: right at the input, proved right over the
            region, shown wrong by an attack.  # (N,) bool
        margins: lower bounds of y_label - y_j for the samples that were bounded, from the last method
            that saw them; NaN for the others, infinite for the label.  # (N, q)
        seconds: of each sample.  # (N,)
        parts: seconds by what was done: "clean", an attack, a method.
        refused: method -> why it was left out.
    """

    radius: float
    norm: str
    method: tuple[str, ...]
    correct: Tensor
    certified: Tensor
    broken: Tensor
    margins: Tensor
    seconds: Tensor
    parts: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def clean_accuracy(self) -> float:
        """Share of right answers."""
        return _share(self.correct)

    @property
    def certified_accuracy(self) -> float:
        """Share of answers that are right all over the region, proved: a lower bound."""
        return _share(self.certified)

    @property
    def attacked_accuracy(self) -> float:
        """Share of right answers that no attack broke: an upper bound."""
        return _share(self.correct & ~self.broken)

    def __str__(self) -> str:
        return (
            f"{len(self.correct)} samples, {self.norm}-norm radius {self.radius:g}: clean "
            f"{100 * self.clean_accuracy:.2f} %, attacked {100 * self.attacked_accuracy:.2f} %, "
            f"certified {100 * self.certified_accuracy:.2f} % by {', '.join(self.method)}; "
            f"{1e3 * float(self.seconds.mean()) if len(self.seconds) else 0.0:.3g} ms a sample"
        )


def certify_accuracy(
    model: Any,
    data: "tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]",
    radius: float,
    norm: "str | int" = "inf",
    method: "str | Sequence[str]" = ("lipschitz", "interval", "crown"),
    *,
    attacks: Sequence[str] = ("pgd",),
    k: int | None = None,
    restarts: int = 1,
    pgd_steps: int = 20,
    clip: tuple[float, float] | None = None,
    batch_size: int = 256,
    progress: bool = False,
    path: "str | os.PathLike[str] | None" = None,
    seed: int = 0,
    **options: Any,
) -> Report:
    """Clean, attacked and certified accuracy of a classifier at one radius.

    A sample that is wrong, or that an attack breaks, is not bounded; the methods are tried in
    order on what is left. A method that does not apply to the model is left out, and all of them
    failing raises. Where `torch.distributed` is initialised, each process takes its share of the
    samples, and all return the whole report.

    Args:
        model: as in `bounds`.
        data: (inputs, labels), or batches of such.  # (N, p), (N,)
        radius: of the ball around each input.
        norm: "inf" or 2.
        method: one of `bounds`, or several, the cheap ones first.
        attacks: of "pgd", "relaxation" and "sparse".
        k: how many inputs the sparse attack may change.
        restarts, pgd_steps: of "pgd".
        clip: range of the inputs; attacks stay inside, and so does the region in the infinity norm.
        batch_size: samples at a time.
        progress: a bar (tqdm where it is installed, else a line on stderr).
        path: a safetensors file that is written after each batch and read at the start, so that a
            run that was cut off goes on. Each process has a file of its own.
        seed: of the attacks.
        options: of `bounds`: `refinements`, `steps`, `range_steps`, `sizes`, `seconds`, `solver`;
            each method gets those that it reads.

    Returns:
        `Report`.

    Raises:
        ValueError: unknown names, data that do not fit, no method that applies, or a file of
            another run.
    """
    u, labels = _joined(data)
    methods = (method,) if isinstance(method, str) else tuple(method)
    for name in methods:
        if name not in METHODS:
            raise unknown_name("method", name, METHODS)
    for name in options:
        if name not in OPTIONS:
            raise unknown_name("option", name, OPTIONS)
    for name, chosen in _stages(methods, options):
        options_of(name, **chosen)
    for name in attacks:
        if name not in ATTACKS:
            raise unknown_name("attacks", name, ATTACKS)
    if "sparse" in attacks and (type(k) is not int or k < 1):
        raise ValueError(f"k: got {k!r}, expected how many inputs the sparse attack may change.")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size!r}, expected an integer >= 1.")
    if not isinstance(radius, int | float) or not 0 <= radius < math.inf:
        raise ValueError(f"radius: got {radius!r}, expected a finite number >= 0.")
    q = as_model(model).outputs
    checked(u, labels, radius, norm, clip, q)
    rank, world = share_of_work()
    state = State(len(u), q, u.device)
    mark = fingerprint(
        model, u, labels, radius, norm, methods, attacks, k, restarts, pgd_steps, clip, seed,
        options, q,
    )  # fmt: skip
    file = None if path is None else f"{os.fspath(path)}" + (f".{rank}" if world > 1 else "")
    if file is not None:
        state.read(file, mark)
    own = torch.arange(rank, len(u), world, device=u.device)
    todo = own[~state.done[own]]
    refused = state.refused
    for index in shown(todo.split(batch_size), progress and rank == 0):
        if not len(index):
            continue
        began = time.perf_counter()
        _batch(
            model, u[index], labels[index], index, state, float(radius), norm, methods, attacks,
            k, restarts, pgd_steps, clip, seed, options, refused,
        )  # fmt: skip
        state.seconds[index] = (time.perf_counter() - began) / len(index)
        state.done[index] = True
        if file is not None:
            state.write(file, mark)
    if world > 1:
        state.gather()
    if methods and len(refused) == len(methods):
        raise ValueError("method: none applies to this model. " + " ".join(refused.values()))
    return Report(
        float(radius), str(norm), tuple(m for m in methods if m not in refused), state.correct,
        state.certified, state.broken, state.margins, state.seconds, state.parts, dict(refused),
    )  # fmt: skip


def _batch(
    model: Any, u: Tensor, labels: Tensor, index: Tensor, state: "State", radius: float,
    norm: "str | int", methods: tuple[str, ...], attacks: Sequence[str], k: int | None,
    restarts: int, pgd_steps: int, clip: tuple[float, float] | None, seed: int,
    options: dict[str, Any], refused: dict[str, str],
) -> None:  # fmt: skip
    clock = state.clock
    with clock("clean"), torch.no_grad():
        right = margin_of(model(u), labels) > 0
    state.correct[index] = right
    open_ = torch.nonzero(right).flatten()
    generator = torch.Generator(device=u.device).manual_seed(seed + int(index[0]))
    for name in attacks:
        if not len(open_):
            break
        few, own = u[open_], labels[open_]
        with clock(name):
            if name == "pgd":
                found = pgd(
                    model, few, own, radius, norm, steps=pgd_steps, restarts=restarts, clip=clip,
                    generator=generator,
                )  # fmt: skip
            elif name == "sparse":
                found = sparse_attack(model, few, own, radius, int(k or 0), clip=clip,
                                      generator=generator)  # fmt: skip
            else:
                found = relaxation_attack(model, few, own, radius, norm, clip=clip)
        state.broken[index[open_[found.success]]] = True
        open_ = open_[~found.success]
    for name, chosen in _stages(methods, options):
        if not len(open_) or name in refused:
            continue
        with clock(name):
            try:
                region = ball(u[open_], radius, norm, clip)
                low = margins(model, region, labels[open_], name, **chosen)
            except ValueError as error:
                refused[name] = str(error)
                continue
        state.margins[index[open_]] = low
        proved = (low > MARGIN).all(1)
        state.certified[index[open_[proved]]] = True
        open_ = open_[~proved]


def _stages(methods: tuple[str, ...], options: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The methods with the options that they read; lines in steps of growing cost, each for what is
    left."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in methods:
        own = {key: value for key, value in options.items() if key in (*READS[name], "solver")}
        if name != "crown":
            found.append((name, own))
            continue
        keys = ("refinements", "steps", "range_steps")
        counts = (own.get("refinements", 1), own.get("steps", 0), own.get("range_steps", 0))
        found += [(name, own | dict(zip(keys, stage, strict=True))) for stage in stages(*counts)]
    return found


def robust_radius(
    model: Any,
    u: Tensor,
    labels: Tensor,
    norm: "str | int" = "inf",
    method: str = "crown",
    *,
    most: float = 1.0,
    bisections: int = 12,
    pgd_steps: int = 40,
    restarts: int = 2,
    clip: tuple[float, float] | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """A bracket of the largest radius up to which the answer is right.

    Args:
        model, norm, clip: as in `certify_accuracy`.
        method, options: as in `bounds`.
        u: inputs.  # (m, p)
        labels: # (m,)
        most: the largest radius that is looked at.
        bisections: of both ends; each halves what is open.
        pgd_steps, restarts, seed: of the attack.

    Returns:
        (certified, attacked): the largest radius proved, 0 where the answer at u is wrong, and the
        smallest at which an attack succeeded, infinite where none did up to `most`.  # (m,) each

    Raises:
        TypeError, ValueError: as `bounds`; or arguments out of range.

    Example:
        >>> import torch, implicitdl
        >>> from implicitdl.certify import robust_radius
        >>> layer, u = implicitdl.ImplicitLayer(4, 3, 8), torch.randn(2, 4)
        >>> proved, broken = robust_radius(layer, u, torch.tensor([0, 2]))
        >>> bool((proved <= broken).all())
        True
    """
    checked(u, labels, most, norm, clip, as_model(model).outputs)
    if isinstance(most, bool) or not isinstance(most, int | float) or not most > 0:
        raise ValueError(f"most: got {most!r}, expected a positive number.")
    if type(bisections) is not int or bisections < 1:
        raise ValueError(f"bisections: got {bisections!r}, expected an integer >= 1.")
    if not len(u):
        raise ValueError("u: got no inputs, expected one at least.")
    m = len(u)
    kind: dict[str, Any] = {"dtype": torch.float64, "device": u.device}
    low, high = torch.zeros(m, **kind), torch.full((m,), float(most), **kind)

    def proved(r: Tensor) -> Tensor:
        found = margins(model, ball(u, r, norm, clip), labels, method, **options)
        return (found > MARGIN).all(1)

    whole = proved(high)
    low = torch.where(whole, high, low)
    for _ in range(bisections):
        middle = (low + high) / 2
        good = proved(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    with torch.no_grad():
        right = margin_of(model(u), labels) > 0
    certified = torch.where(right, low, 0.0)
    generator = torch.Generator(device=u.device).manual_seed(seed)
    below, above = certified.clone(), torch.full((m,), math.inf, **kind)
    top = torch.full((m,), float(most), **kind)
    for turn in range(bisections + 1):
        r = top if turn == 0 else torch.where(above.isfinite(), (below + above) / 2, top)
        found = pgd(model, u, labels, r.to(u.dtype), norm, steps=pgd_steps, restarts=restarts,
                    clip=clip, generator=generator)  # fmt: skip
        # What was found may lie well inside the ball.
        z = found.inputs.double() - u.double()
        size = z.abs().amax(1) if norm == "inf" else torch.linalg.vector_norm(z, dim=1)
        above = torch.where(found.success, torch.minimum(above, size), above)
        below = torch.where(found.success, below, torch.minimum(torch.maximum(below, r), above))
    return certified, torch.where(right, above, 0.0)


# ---- data -------------------------------------------------------------------------------------


def _joined(data: Any) -> tuple[Tensor, Tensor]:
    if (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(isinstance(t, Tensor) for t in data)
    ):
        u, labels = data
    else:
        try:
            pairs = [(u, labels) for u, labels in data]
        except (TypeError, ValueError):
            raise TypeError(
                f"data: got {type(data).__name__}, expected (inputs, labels) or batches of such."
            ) from None
        if not pairs:
            raise ValueError("data: got no batch, expected at least one.")
        u, labels = (torch.cat(list(t)) for t in zip(*pairs, strict=True))
    return u.flatten(1) if isinstance(u, Tensor) and u.dim() > 2 else u, labels


def _share(flags: Tensor) -> float:
    return float(flags.double().mean()) if len(flags) else math.nan


__all__ = ["Report", "ball", "certify_accuracy", "margins", "pair_rows", "robust_radius"]
