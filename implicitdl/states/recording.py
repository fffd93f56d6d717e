"""What is kept of a trained network's states: means, and one Gram matrix.

The states are computed in float64, a few thousand samples at a time, and summed up; processes that
hold other samples add their sums, in one call of torch.distributed that does not grow with them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._sharing import Sharing
from ..model import ImplicitModel, Structure
from ..model.evaluate import run
from ..operators import read, rebuilt
from ..solution import ConvergenceError

_CHUNK = 1 << 19  # numbers of a chunk of samples: it stays in the cache


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Of features F and targets Z over all samples.

    Attributes:
        count: of samples.
        mean, aim: the means of F and Z.  # (d,), (r,)
        gram: (F - mean)'(F - mean).  # (d, d)
        cross: (Z - aim)'(F - mean).  # (r, d)
        energy: sum (z - aim)^2.  # (r,)
    """

    count: int
    mean: Tensor
    aim: Tensor
    gram: Tensor
    cross: Tensor
    energy: Tensor

    def about(self, mean: Tensor, aim: Tensor, count: int) -> "Moments":
        """The same sums about other means, to be added to those of other samples."""
        f, z = self.mean - mean, self.aim - aim
        return Moments(
            count=count, mean=mean, aim=aim,
            gram=self.gram + self.count * torch.outer(f, f),
            cross=self.cross + self.count * torch.outer(z, f),
            energy=self.energy + self.count * z * z,
        )  # fmt: skip


def gather(
    batches: Iterator[tuple[Tensor, Tensor]], sharing: Sharing, sizes: tuple[int, int], like: Tensor
) -> Moments:
    """The moments of all batches (F, Z) of all processes.

    Sums about the mean of each batch are joined about the common one (Chan, Golub and LeVeque 1979):
    nothing is lost to cancellation, and one pass does.

    Args:
        batches: features (m, d) and targets (m, r).
        sharing: with other processes.
        sizes: (d, r), for a process without samples.
        like: dtype and device.
    """
    d, r = sizes
    total = Moments(
        count=0, mean=like.new_zeros(d), aim=like.new_zeros(r), gram=like.new_zeros(d, d),
        cross=like.new_zeros(r, d), energy=like.new_zeros(r),
    )  # fmt: skip

    def own() -> Moments:
        found = total
        for F, Z in batches:
            found = _joined(found, _moments(F, Z))
        if not bool(torch.isfinite(found.gram).all() and torch.isfinite(found.energy).all()):
            raise ValueError(
                "network: its states or outputs at the data are not finite numbers, or their squares "
                "are not, in float64; scale the data or the weights down."
            )
        return found

    total = sharing.together(own, ConvergenceError)
    counts, first, second = sharing.over_samples(
        like.new_tensor([total.count]), total.count * total.mean, total.count * total.aim
    )
    count = int(counts[0])
    if sharing.shard != "samples":
        return total
    moved = total.about(first / count, second / count, count)
    gram, cross, energy = sharing.over_samples(moved.gram, moved.cross, moved.energy)
    return Moments(
        count=count, mean=moved.mean, aim=moved.aim, gram=gram, cross=cross, energy=energy
    )


def _moments(F: Tensor, Z: Tensor) -> Moments:
    mean, aim = F.mean(0), Z.mean(0)
    (f, f_high, f_low), (z, z_high, z_low) = _split(F - mean), _split(Z - aim)
    mixed = f_high.mT @ f_low
    return Moments(
        count=len(F), mean=mean, aim=aim,
        gram=f_high.mT @ f_high + (mixed + mixed.mT + f_low.mT @ f_low),
        cross=z_high.mT @ f_high + (z_high.mT @ f_low + z_low.mT @ f),
        energy=z.square().sum(0),
    )  # fmt: skip


def _split(f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f, its leading 20 bits, column by column, and the rest.

    Products of leading bits are summed without rounding, 4096 of them, and the others are a millionth
    as large: a Gram matrix of parts is rounded as if it were one number, whatever the order of samples.

    Reference: Ozaki, Ogita, Oishi and Rump 2012 (error-free splitting of matrix products).
    """
    shift = 1.5 * torch.exp2(f.abs().amax(0).clamp_min(1e-280).log2().ceil() + 33)
    high = (f + shift) - shift
    return f, high, f - high


def _joined(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    mean = (a.count * a.mean + b.count * b.mean) / count
    aim = (a.count * a.aim + b.count * b.aim) / count
    left, right = a.about(mean, aim, count), b.about(mean, aim, count)
    return Moments(
        count=count, mean=mean, aim=aim, gram=left.gram + right.gram,
        cross=left.cross + right.cross, energy=left.energy + right.energy,
    )  # fmt: skip


def exact(structure: Structure) -> Structure:
    """The same in float64, its tensors copied."""
    return rebuilt(structure, lambda w: read(w).detach().double())  # type: ignore[no-any-return]


def chunks(f: Structure, data: Tensor) -> Iterator[Tensor]:
    """The samples in float64 and in the network's shape, some hundreds or thousands at a time."""
    width = 2 * f.states + f.inputs + f.outputs
    for part in data.split(min(4096, max(64, _CHUNK // width))):
        yield part.detach().double().reshape(len(part), *f.input_shape)


@torch.no_grad()
def teacher(structure: Structure, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x, z, y) of a structured model: states, pre-activations and outputs, flattened.

    Args:
        structure: in float64, its states as many as its pre-activations.
        u: inputs.  # (m, *input_shape)
    """
    y, values, _ = run(structure, u, keep=True)
    blocks = structure.blocks
    x = [values[k].flatten(1) for k in range(len(blocks))]
    z = [block.row(values).flatten(1) for block in blocks]
    return torch.cat(x, 1), torch.cat(z, 1), y.flatten(1)


@torch.no_grad()
def contraction_weights(structure: Structure, kappa: float) -> Tensor | None:
    """v > 0 with |A| v <= kappa v, A the state matrix: (kappa I - |A|) v = 1, block by block.

    Rows of S A S^-1, S = diag(1/v), then have length below kappa: the network's own weights are in
    the ball, and its states can be matched exactly. None where lambda_pf(|A|) >= kappa, or where v
    leaves the range of numbers.
    """
    if structure.loops:
        from .._linalg import resolvent_vector

        A = ImplicitModel(structure=structure).A.dense(dtype=torch.float64).abs()
        v = resolvent_vector(A, kappa)
        return None if v is None else _usable(v.to(A))
    count = len(structure.blocks)
    like = structure.example
    one = torch.zeros((), dtype=torch.float64, device=None if like is None else like.device)
    parts: list[Tensor | None] = [None] * count
    for (k,) in structure.components:
        row, load = structure.blocks[k].row.flat(), one
        for j, op in row.terms:
            if j >= 0:
                load = load + op.abs().apply(parts[j])
        parts[k] = ((1 + load) / kappa).expand(1, *row.shape)
    return _usable(torch.cat([t.reshape(-1) for t in parts]))  # type: ignore[union-attr]


def found_at(where: object, solve: Callable[[], Tensor]) -> Tensor:
    """States of the new model, or what to do where there are none.

    Raises:
        ConvergenceError: the bound on A is so near to 1 that they were not found.
    """
    try:
        return solve()
    except ConvergenceError as error:
        raise ConvergenceError(
            f"kappa: the states of the new layer, in {where}, were not found to the solver's "
            f"tolerance; a smaller kappa makes them easier to find. {error}",
            error.solution,
        ) from error


def _usable(v: Tensor) -> Tensor | None:
    good = bool((v > 0).all() and torch.isfinite(v).all())
    return v / v.log().mean().exp() if good and math.isfinite(float(v.sum())) else None


def evaluation_order(structure: Structure) -> Tensor:
    """The number of the component that each state is evaluated in.  # (n,)"""
    number = [0] * len(structure.blocks)
    for step, component in enumerate(structure.components):
        for k in component:
            number[k] = step
    return torch.tensor(
        [number[k] for k, block in enumerate(structure.blocks) for _ in range(block.size)]
    )
