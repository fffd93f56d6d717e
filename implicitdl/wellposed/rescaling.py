"""Perron-Frobenius well-posed matrices, brought into the infinity-norm ball without any change."""

import torch
from torch import Tensor

from .._linalg import perron, resolvent_vector
from ..solution import NotWellPosedError
from ._base import number


def rescale(A: Tensor, kappa: float | None = None) -> tuple[Tensor, Tensor]:
    """A' = S A S^-1 with ||A'||_inf <= kappa < 1 and S = diag(s): the same model, x' = S x.

    For positively homogeneous phi (ReLU, leaky ReLU) the model with A' = S A S^-1, B' = S B,
    b' = S b, C' = C S^-1 has the same outputs. With v = (kappa I - |A|)^-1 1 and s = 1/v, the row
    sums of |A'| are kappa - 1/v_i: v > 0 exists exactly if lambda_pf(|A|) < kappa, nilpotent A
    (feedforward networks, whose Perron vector has zeros) included.

    Args:
        A: Square matrix (n, n).
        kappa: Bound to reach, in (lambda_pf(|A|), 1); None for (1 + lambda_pf)/2. The closer it
            is to lambda_pf, the further apart the entries of s.

    Returns:
        (A', s): A' (n, n), differentiable in A with s held constant; s (n,), geometric mean 1.

    Raises:
        NotWellPosedError: lambda_pf(|A|) >= kappa; carries `.margin` = kappa - lambda_pf.
        ValueError: kappa is not in (0, 1), A is not square, or s leaves the range of the dtype.
        TypeError: kappa is no number, or A no tensor.

    Reference:
        El Ghaoui, Gu, Travacca, Askari and Tsai 2021, theorem 4.2.
    """
    if not isinstance(A, Tensor):
        raise TypeError(f"A: got {type(A).__name__}, expected a tensor (n, n)")
    if A.dim() != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"A: got shape {tuple(A.shape)}, expected a square matrix (n, n)")
    if not bool(A.isfinite().all()):
        raise ValueError(f"A: {int((~A.isfinite()).sum())} entries are NaN or infinite")
    if kappa is not None:
        kappa = number("kappa", kappa, 0.0, 1.0)
    if A.shape[0] == 0:
        return A, A.new_zeros(0)
    size = A.detach().abs().to(torch.float64)
    root = perron(size).root
    target = (1 + root) / 2 if kappa is None else kappa
    # Aim a little lower, so that the row sums stay below kappa after rounding to A's dtype.
    aim = target - min(64 * torch.finfo(A.dtype).eps * target, (target - root) / 2)
    v = resolvent_vector(size, aim) if root < min(aim, 1.0) else None
    if v is None and root < target:
        raise ValueError(
            f"the scaling for kappa={target:.4g} overflows float64, with lambda_pf(|A|) = "
            f"{root:.4g}: pass a larger kappa < 1"
        )
    if v is None:
        raise NotWellPosedError(
            f"lambda_pf(|A|) = {root:.6g}, expected less than kappa = {min(target, 1.0):.6g}: "
            "raise kappa towards 1, or bring A into `PerronFrobenius(kappa=...)` first",
            margin=min(target, 1.0) - root,
        )
    v = v / v.log().mean().exp()
    s = (1 / v).to(A.dtype)
    if not bool((s.isfinite() & (s > torch.finfo(A.dtype).tiny)).all()):
        raise ValueError(
            f"the scaling runs from {float((1 / v).min()):.3g} to {float((1 / v).max()):.3g}, more "
            f"than {A.dtype} can hold: pass a larger kappa < 1 (got {target:.4g}) or use float64"
        )
    return A * (v[None, :] / v[:, None]).to(A.dtype), s
