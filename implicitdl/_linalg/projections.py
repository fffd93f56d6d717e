"""Euclidean projections onto l1 balls, matrix measures, simplices and cones, batched by rows."""

import torch
from torch import Tensor


def _soft_level(size: Tensor, weights: Tensor, radius: Tensor, free: Tensor | None) -> Tensor:
    """theta >= 0 with [c - theta] + sum_j w_j (size_j - theta w_j)_+ = radius; 0 if inside.

    The bracketed term, with c = `free`, is there only where `free` is given. The left side is
    convex, decreasing and piecewise linear in theta, so Newton's method from 0 climbs to the root
    without ever passing it and ends, exactly, when the set of active entries repeats. It takes a
    few passes over the data where a sort takes tens.

    Args:
        size: |W|, (rows, n).
        weights: w >= 0, (rows, n) or (1, n).
        radius: (rows, 1).
        free: c, (rows, 1), or None.

    Reference:
        Michelot 1986, J. Optim. Theory Appl. 50 (the iteration); Condat 2016 (its cost).
    """
    total = radius if free is None else radius - free
    extra = 0.0 if free is None else 1.0
    with torch.no_grad():
        usable = weights > 0
        # One active entry already asks for theta >= (w_j size_j - total) / (w_j^2 + extra).
        tiny = torch.finfo(size.dtype).tiny
        start = (weights * size - total) / (weights * weights + extra).clamp_min(tiny)
        theta = torch.where(usable, start, 0.0).amax(-1, keepdim=True).clamp_min(0)
        if free is not None:
            theta = torch.maximum(theta, -total)
        squares = weights * weights
        excess, active = torch.empty_like(size), torch.empty_like(size)
        for _ in range(
            size.shape[-1] + 1
        ):  # the active set can only shrink; about five in practice
            torch.mul(weights, theta, out=excess)
            torch.sub(size, excess, out=excess).clamp_min_(0)
            torch.sign(excess, out=active)
            slope = active.mul_(squares).sum(-1, keepdim=True).add_(extra)
            gap = excess.mul_(weights).sum(-1, keepdim=True).sub_(total).sub_(extra * theta)
            step = torch.where(slope > 0, gap / slope.clamp_min(tiny), 0.0)
            moved = theta + step.clamp_min_(0)
            if bool((moved <= theta).all()):
                break
            theta = moved
        active = (size >= theta * weights) & usable
        found = active.any(-1, keepdim=True) | (free is not None)
    # The same level once more, from the active entries alone, so that it has a gradient. Rounding
    # can leave no entry where the radius is 0 (or below the rounding of W): keep theta there.
    level = _level(size, weights, active, total, free is not None)
    return torch.where(found, level, theta).clamp_min(0)


def _level(size: Tensor, weights: Tensor, active: Tensor, total: Tensor, free: bool) -> Tensor:
    """The root of the linear piece on which exactly the `active` entries are non-zero."""
    kept = weights * active
    numerator = (kept * size).sum(-1, keepdim=True) - total
    denominator = (kept * weights).sum(-1, keepdim=True) + (1 if free else 0)
    return numerator / denominator.clamp_min(torch.finfo(size.dtype).tiny)


def project_l1(
    W: Tensor,  # (..., n)
    radius: float | Tensor,  # broadcasts against (...)
    weights: Tensor | None = None,  # broadcasts against (..., n), >= 0
) -> Tensor:
    """argmin_P ||P - W||_2 over sum_j w_j |P_j| <= r, for every row at once.

    Args:
        W: Rows to project, (..., n).
        radius: r >= 0, a number or one per row (...).
        weights: w >= 0, (n,) or (..., n); None for ones. A zero weight leaves its entry free.

    Returns:
        The projections (..., n); the identity inside, differentiable almost everywhere.

    Raises:
        ValueError: A radius or weight is negative.

    Reference:
        Duchi, Shalev-Shwartz, Singer and Chandra 2008, figure 1; Pardalos and Kovoor 1990.
    """
    radius = torch.as_tensor(radius, dtype=W.dtype, device=W.device)
    if bool((radius < 0).any()):
        raise ValueError(f"radius must be >= 0: got {float(radius.min())}, an empty ball")
    if weights is None:
        weights = torch.ones((), dtype=W.dtype, device=W.device)
    elif bool((weights < 0).any()):
        raise ValueError(f"weights must be >= 0: got {float(weights.min())}")
    if W.shape[-1] == 0:
        return W
    n = W.shape[-1]
    weights = weights.to(W.dtype).expand(W.shape if weights.dim() > 1 else (1, n)).reshape(-1, n)
    rows = W.reshape(-1, n)
    radius = radius.expand(W.shape[:-1]).reshape(-1, 1)
    bound = _soft_level(rows.abs(), weights, radius, None) * weights
    return (rows - rows.clamp(min=-bound, max=bound)).reshape(W.shape)


def project_matrix_measure(
    W: Tensor,  # (..., n, n)
    gamma: float,
    weights: Tensor | None = None,  # (n,) > 0
) -> Tensor:
    """argmin_P ||P - W||_F over P_ii + sum_{j != i} |P_ij| v_j / v_i <= gamma for every row i.

    The diagonal enters linearly, so KKT gives P_ii = W_ii - theta_i and off it the soft threshold
    at theta_i v_j / v_i, with one multiplier a row found as for the l1 ball.

    Args:
        W: Matrices (..., n, n).
        gamma: Bound on the matrix measure mu_{inf, v}.
        weights: v > 0 (n,); None for ones.

    Returns:
        The projections, the identity inside.
    """
    n = W.shape[-1]
    if n == 0:
        return W
    eye = torch.eye(n, dtype=W.dtype, device=W.device)
    v = torch.ones(n, dtype=W.dtype, device=W.device) if weights is None else weights.to(W.dtype)
    w = ((v[None, :] / v[:, None]) * (1 - eye)).expand(W.shape)
    off = W * (1 - eye)
    diagonal = W.diagonal(dim1=-2, dim2=-1).reshape(-1, 1)
    radius = torch.full_like(diagonal, gamma)
    theta = _soft_level(off.abs().reshape(-1, n), w.reshape(-1, n), radius, diagonal)
    theta = theta.reshape(*W.shape[:-1], 1)
    return W - off.clamp(min=-theta * w, max=theta * w) - theta * eye


def project_simplex(
    W: Tensor,  # (..., n)
    total: float | Tensor = 1.0,
) -> Tensor:
    """argmin_P ||P - W||_2 over P >= 0, sum_j P_j = total, for every row at once.

    Args:
        W: Rows (..., n), n >= 1.
        total: Sum of each projected row, > 0; broadcasts against (...).

    Returns:
        The projections (..., n), differentiable almost everywhere.

    Reference:
        Duchi et al. 2008, figure 1.
    """
    total = torch.as_tensor(total, dtype=W.dtype, device=W.device)[..., None]
    W = W - W.amax(-1, keepdim=True).detach()  # the same projection, without cancellation
    with torch.no_grad():
        u = W.sort(dim=-1, descending=True).values
        k = torch.arange(1, W.shape[-1] + 1, dtype=W.dtype, device=W.device)
        active = (u * k > u.cumsum(-1) - total).sum(-1, keepdim=True).clamp_min(1)
        cut = u.gather(-1, active - 1)
    chosen = (cut <= W).to(W.dtype)
    theta = ((chosen * W).sum(-1, keepdim=True) - total) / chosen.sum(-1, keepdim=True)
    return (W - theta).clamp_min(0)


def project_second_order_cone(
    t: Tensor,  # (...)
    x: Tensor,  # (..., n)
) -> tuple[Tensor, Tensor]:
    """Nearest (s, y) to (t, x) with ||y||_2 <= s, for every row at once.

    Args:
        t: Heights (...).
        x: Vectors (..., n).

    Returns:
        s (...) and y (..., n): (t, x) itself inside, 0 in the polar cone, and otherwise
        s = (t + ||x||)/2, y = s x/||x||.

    Reference:
        Parikh and Boyd 2014, section 6.3.2.
    """
    length = torch.linalg.vector_norm(x, dim=-1)
    safe = torch.where(length > 0, length, torch.ones_like(length))
    half = (t + length) / 2
    inside, polar = length <= t, length <= -t
    s = torch.where(inside, t, torch.where(polar, torch.zeros_like(t), half))
    scale = torch.where(polar, torch.zeros_like(t), half / safe)
    y = torch.where(inside[..., None], x, scale[..., None] * x)
    return s, y
