"""From the matrices that were found to a layer that is in its set, exactly."""

import torch
from torch import Tensor

from ..activations import Activation, Blocks
from ..layers import ImplicitLayer
from ..model import Structure
from ..wellposed import InfNormBall, PerronFrobenius, WellPosedSet
from .fitting import Fitted


def reaching(A: Tensor, C: Tensor, phi: Activation) -> Tensor:
    """Which states the outputs read, themselves or through others.  # (n,) bool

    States that an activation couples stay together.
    """
    groups: list[int] = []
    for part, count in phi.blocks(A.shape[0]):
        first = groups[-1] + 1 if groups else 0
        groups += range(first, first + count) if part.entrywise else [first] * count
    group = torch.tensor(groups, device=A.device)
    found, reads = (C != 0).any(0), A != 0
    while True:
        new = found | reads[found].any(0)
        new = torch.isin(group, group[new])
        if bool((new == found).all()):
            return found
        found = new


def seen(A: Tensor, C: Tensor, phi: Activation) -> Tensor:
    """The numbers of these states; those of the first part of phi where there is none.  # (k,)"""
    found = reaching(A, C, phi)
    if not bool(found.any()):
        part, count = phi.blocks(A.shape[0])[0]
        found[: 1 if part.entrywise else count] = True
    return found.nonzero().flatten()


def chosen(phi: Activation, n: int, kept: Tensor) -> Activation:
    """phi on some of the states."""
    at = set(kept.tolist())
    parts, first = [], 0
    for part, count in phi.blocks(n):
        inside = sum(k in at for k in range(first, first + count))
        if inside:
            parts.append((part, inside))
        first += count
    blocks = Blocks(parts=tuple(parts))
    same = all(part == blocks.parts[0][0] for part, _ in blocks.parts)
    single = blocks.parts[0][0]
    return single if same and single.entrywise else blocks


def absorbs(found: Fitted) -> bool:
    """Whether the scaling goes into the matrices: phi(S z) = S phi(z)."""
    return found.phi.homogeneous and found.phi.entrywise


def layer(found: Fitted, f: Structure, kappa: float) -> ImplicitLayer:
    """The layer in the network's dtype, its rows in the ball as that dtype counts them."""
    kind = f.example if f.example is not None else found.A
    n = found.A.shape[0]
    kept = seen(found.A, found.C, found.phi)
    phi = chosen(found.phi, n, kept)
    v = found.v[kept]
    A, C = found.A[kept][:, kept], found.C[:, kept]
    B, b = found.B[kept], found.b[kept]
    L, R = (None, None) if found.L is None else (found.L[kept], found.R[kept])  # type: ignore[index]
    absorbed = absorbs(found)
    well_posed: WellPosedSet
    if absorbed or not found.scaled:
        well_posed = InfNormBall(kappa)
        A = A * (v / v[:, None])
        B, b, C = B / v[:, None], b / v, C * v
        if L is not None and R is not None:
            L, R = L / v[:, None], R * v[:, None]
        v = torch.ones_like(v)
    else:
        well_posed = PerronFrobenius(kappa, weights=v)
    _require_range(kind.dtype, A=A, B=B, C=C, b=b)
    # Rounding to the dtype, and sums of a row in float32 at least, stay below kappa.
    fine = torch.finfo(torch.promote_types(kind.dtype, torch.float32)).eps
    aim = kappa * (1 - torch.finfo(kind.dtype).eps - 4 * len(kept) * fine)
    rank = None if L is None or L.shape[1] >= len(kept) else L.shape[1]
    new = ImplicitLayer(
        B.shape[1], C.shape[0], len(kept), activation=phi, well_posed=well_posed,
        low_rank=rank, dtype=kind.dtype, device=kind.device,
    )  # fmt: skip
    shrink = (aim * v / (A.abs() * v).sum(1).clamp_min(1e-300)).clamp(max=1.0)[:, None]
    values = {"B": B, "b": b, "C": C, "D": found.D, "d": found.d}
    if rank is None:
        values["W"] = A * shrink
    else:
        balance = (L.norm() / R.norm()).sqrt()  # type: ignore[union-attr]
        values |= {"L": L * shrink / balance, "R": R * balance}
    for name, value in values.items():
        getattr(new, name).data.copy_(value)
    if rank is not None:  # the product of the rounded factors is rounded again
        length = ((new.L @ new.R.mT).detach().double().abs() * v).sum(1) / v
        new.L.data.mul_((aim / length.clamp_min(1e-300)).clamp(max=1.0)[:, None])
    return new


def _require_range(dtype: torch.dtype, **parts: Tensor) -> None:
    info = torch.finfo(dtype)
    for name, t in parts.items():
        size = t.abs()
        largest = float(size.amax()) if t.numel() else 0.0
        if not largest < info.max or 0 < largest < info.tiny:
            raise ValueError(
                f"network: the scaled {name} has entries of size {largest:.1e}, which {dtype} cannot "
                "hold; convert the network and the data to float64 first."
            )
