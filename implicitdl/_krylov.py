"""A batched Krylov method for (I - J) x = b, one system a row."""

from collections.abc import Callable

import torch
from torch import Tensor


def gcr(
    operator: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    rtol: float,
    max_steps: int,
    memory: int = 20,
) -> tuple[Tensor, int]:
    """Generalised conjugate residuals for operator(x) = b: |b - operator(x)| <= rtol |b| per row.

    In exact arithmetic the iterates of GMRES, restarted every `memory` steps, for any operator
    whose symmetric part is definite. Directions are kept with their images orthonormal, so there
    is no small system to solve and a finished row simply takes steps of length zero.

    Args:
        operator: a linear map applied row by row.  # (m, n) -> (m, n)
        b: right-hand sides.  # (m, n)
        rtol: relative residual at which a row is finished.
        max_steps: products with the operator at most.
        memory: directions kept before a restart.

    Returns:
        The solutions and the number of products spent. What was reached is for the caller to
        measure: a Newton step is good enough whenever it lowers the residual.

    Reference: Eisenstat, Elman, Schultz (1983), section 2.
    """
    m, n = b.shape
    memory = min(memory, n, max_steps)
    tiny = torch.finfo(b.dtype).tiny
    x, r = torch.zeros_like(b), b.clone()
    target = rtol * torch.linalg.vector_norm(b, dim=1)
    directions, images = b.new_empty(memory, m, n), b.new_empty(memory, m, n)
    for step in range(max_steps):
        slot = step % memory
        p, q = r, operator(r)
        if slot:
            past = images[:slot].permute(1, 2, 0)  # (m, n, slot)
            # Twice is enough: one pass loses orthogonality to half the digits.
            for _ in range(2):
                h = torch.bmm(q[:, None], past)
                q = torch.baddbmm(q[:, None], h, past.mT, alpha=-1)[:, 0]
                p = torch.baddbmm(p[:, None], h, directions[:slot].permute(1, 0, 2), alpha=-1)[:, 0]
        scale = torch.linalg.vector_norm(q, dim=1, keepdim=True).clamp_min(tiny)
        q, p = torch.div(q, scale, out=images[slot]), torch.div(p, scale, out=directions[slot])
        length = torch.linalg.vecdot(q, r)[:, None]
        running = torch.linalg.vector_norm(r, dim=1, keepdim=True) > target[:, None]
        length = torch.where(running, length, 0.0)  # a finished row stays as it is
        x = torch.addcmul(x, length, p)
        r = torch.addcmul(r, length, q, value=-1)
        if not bool((torch.linalg.vector_norm(r, dim=1) > target).any()):
            return x, step + 1
    return x, max_steps
