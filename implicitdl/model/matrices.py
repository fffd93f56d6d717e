"""The algebra of models given by matrices: (A, B, C, D, b, d, phi) of the results.

Reference: El Ghaoui, Gu, Travacca, Askari, Tsai (2021), section 3 and appendix on composition.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import activations, wellposed
from ..activations import Blocks

if TYPE_CHECKING:
    from . import ImplicitModel


def checked(f: "ImplicitModel") -> dict[str, Any]:
    """D, b, d and phi as they are to be, where the user left them out.

    Raises:
        TypeError, ValueError: see `ImplicitModel`.
    """
    for name in "ABC":
        t = getattr(f, name)
        if not isinstance(t, Tensor):
            raise TypeError(f"ImplicitModel: {name} is {type(t).__name__}, expected a matrix.")
        if t.dim() != 2:
            raise ValueError(f"ImplicitModel: {name} is {tuple(t.shape)}, expected a matrix.")
    A = f.A
    n, p, q = A.shape[0], f.B.shape[1], f.C.shape[0]
    shapes = {"A": (n, n), "B": (n, p), "C": (q, n), "D": (q, p), "b": (n,), "d": (q,)}
    out: dict[str, Any] = {}
    for name, shape in shapes.items():
        t = getattr(f, name)
        if t is None:
            out[name] = t = A.new_zeros(shape)
        if not isinstance(t, Tensor):
            raise TypeError(
                f"ImplicitModel: {name} is {type(t).__name__}, expected a tensor {shape}."
            )
        if tuple(t.shape) != shape:
            raise ValueError(
                f"ImplicitModel: {name} has shape {tuple(t.shape)}, expected {shape} "
                f"(n={n} states from A, p={p} inputs from B, q={q} outputs from C)."
            )
        if t.dtype != A.dtype or t.device != A.device:
            raise ValueError(
                f"ImplicitModel: {name} is {t.dtype} on {t.device}, expected {A.dtype} "
                f"on {A.device} as A."
            )
    if not A.is_floating_point():
        raise ValueError(f"ImplicitModel: A is {A.dtype}, expected a floating dtype.")
    if n == 0:
        raise ValueError(
            "ImplicitModel: A is (0, 0), expected at least one state; an affine map y = D u + d "
            "has one that C does not read: A = B = C = 0."
        )
    phi = activations.get_activation(f.phi)
    if not isinstance(phi, Blocks):
        phi = Blocks.of(phi, n)
    if phi.size != n:
        raise ValueError(
            f"ImplicitModel: phi is for {phi.size} states, expected {n} as A has rows."
        )
    return {**out, "phi": phi}


def cascade(g: "ImplicitModel", f: "ImplicitModel") -> "ImplicitModel":
    """u -> f -> g."""
    zero = f.A.new_zeros(f.states, g.states)
    return replace(
        g,
        A=torch.cat([torch.cat([g.A, g.B @ f.C], 1), torch.cat([zero, f.A], 1)]),
        B=torch.cat([g.B @ f.D, f.B]),
        C=torch.cat([g.C, g.D @ f.C], 1),
        D=g.D @ f.D,
        b=torch.cat([g.b + g.B @ f.d, f.b]),
        d=g.d + g.D @ f.d,
        phi=Blocks(parts=g.phi.parts + f.phi.parts),
    )


def added(f: "ImplicitModel", g: "ImplicitModel") -> "ImplicitModel":
    """y_f + y_g."""
    return replace(
        f,
        A=torch.block_diag(f.A, g.A),
        B=torch.cat([f.B, g.B]),
        C=torch.cat([f.C, g.C], 1),
        D=f.D + g.D,
        b=torch.cat([f.b, g.b]),
        d=f.d + g.d,
        phi=Blocks(parts=f.phi.parts + g.phi.parts),
    )


def stacked(f: "ImplicitModel", g: "ImplicitModel") -> "ImplicitModel":
    """(y_f, y_g)."""
    return replace(
        f,
        A=torch.block_diag(f.A, g.A),
        B=torch.cat([f.B, g.B]),
        C=torch.block_diag(f.C, g.C),
        D=torch.cat([f.D, g.D]),
        b=torch.cat([f.b, g.b]),
        d=torch.cat([f.d, g.d]),
        phi=Blocks(parts=f.phi.parts + g.phi.parts),
    )


def closing(D: Tensor, K: Tensor) -> Tensor:
    """M = (I - D K)^-1.

    Raises:
        ValueError: I - D K is singular.
    """
    work = torch.promote_types(K.dtype, torch.float32)  # no inverse in half precision
    eye = torch.eye(D.shape[0], dtype=work, device=K.device)
    M, info = torch.linalg.inv_ex(eye - D.to(work) @ K.to(work))
    M = M.to(K.dtype)
    if bool(info) or not bool(torch.isfinite(M).all()):
        raise ValueError(
            "feedback: I - D K is singular, the outputs are not determined. Change K or D."
        )
    return M


def feedback(f: "ImplicitModel", K: Tensor) -> "ImplicitModel":
    """The loop u = v + K y closed: y = M (C x + D v + d) with M = (I - D K)^-1."""
    M = closing(f.D, K)
    BKM = f.B @ K @ M
    return replace(
        f,
        A=f.A + BKM @ f.C,
        B=f.B + BKM @ f.D,
        C=M @ f.C,
        D=M @ f.D,
        b=f.b + BKM @ f.d,
        d=M @ f.d,
    )


def rescaled(f: "ImplicitModel", kappa: float | None) -> "ImplicitModel":
    """The same map with ||A||_inf <= kappa, x' = S x."""
    A, s = wellposed.rescale(f.A, kappa)
    return replace(f, A=A, B=s[:, None] * f.B, C=f.C / s, b=s * f.b)


def permuted(f: "ImplicitModel", order: list[int]) -> "ImplicitModel":
    """The states in another order.

    Raises:
        ValueError: it takes a block activation apart.
    """
    at = torch.tensor(order, device=f.A.device)
    return replace(
        f, A=f.A[at][:, at], B=f.B[at], C=f.C[:, at], b=f.b[at], phi=_permuted(f.phi, order)
    )


def _permuted(phi: Blocks, order: list[int]) -> Blocks:
    """The activations of the permuted states, runs of the same one merged."""
    owner = [block for block, (_, size) in enumerate(phi.parts) for _ in range(size)]
    runs: list[list[int]] = []  # [block, length]
    for state in order:
        if runs and runs[-1][0] == owner[state]:
            runs[-1][1] += 1
        else:
            runs.append([owner[state], 1])
    for block, length in runs:
        member, size = phi.parts[block]
        if not member.entrywise and length != size:
            raise ValueError(f"permute: the {size} states of a {member} block must stay together.")
    return Blocks(parts=tuple((phi.parts[block][0], length) for block, length in runs))
