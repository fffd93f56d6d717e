"""The nearest matrix with lambda_pf(|A|) <= kappa, as near as local search finds it."""

import numpy as np
import torch
from torch import Tensor

from .._linalg import perron_root, project_l1, strong_components

# Entries of v further apart than e^60 change nothing in float32 and overflow the weights.
BOX = 30.0


def nearest_perron(a: Tensor, kappa: float) -> Tensor:
    """A local minimum of ||P - a|| over lambda_pf(|P|) <= kappa.

    What lies between strong components of a does not enter the root and stays as it is, exactly;
    each component of one state is clipped, which is exact, too. What remains are irreducible
    blocks, and the set is not convex there.

    Args:
        a: Square matrix (n, n) in float64.
        kappa: Bound on the Perron root, > 0.
    """
    p = a.clone()
    for c in strong_components(a != 0):
        rows, cols = torch.from_numpy(c)[:, None], torch.from_numpy(c)[None, :]
        block = a[rows, cols]
        if len(c) == 1:
            p[rows, cols] = block.clamp(-kappa, kappa)
        elif float(perron_root(block.abs())) > kappa:
            p[rows, cols] = _irreducible(block, kappa)
    return p


def _irreducible(a: Tensor, kappa: float) -> Tensor:
    """For every v > 0 the projection onto {|P| v <= kappa v} lies in the set, and the projection
    onto the set is one of these. The squared distance is minimised over log v; by the envelope
    theorem its gradient is (|P|' theta - kappa theta) v with the row multipliers theta. Where it
    vanishes, theta is a left Perron vector of |P| and a - P a normal of the set.
    """
    from scipy.optimize import minimize

    size = a.abs()

    def distance(log_v: np.ndarray) -> tuple[float, np.ndarray]:
        v = torch.from_numpy(log_v).to(a.device).exp()
        p = project_l1(a, kappa * v, v)
        # The multiplier of row i, from any entry that the threshold moved: |a| - |p| = t v.
        theta = ((size - p.abs()) / v).amax(-1)
        slope = (p.abs().mT @ theta - kappa * theta) * v
        return 0.5 * float(((a - p) ** 2).sum()), slope.cpu().numpy()

    first, *others = _starts(size)
    others.sort(key=lambda log_v: distance(log_v)[0])
    options = {"maxiter": 200 if len(a) <= 256 else 30}
    found = [
        minimize(distance, s, jac=True, method="L-BFGS-B", bounds=[(-BOX, BOX)] * len(a),
                 options=options)
        for s in (first, *others[:2])
    ]  # fmt: skip
    best = min(found, key=lambda f: float(f.fun))
    v = torch.from_numpy(best.x).to(a.device).exp()
    return project_l1(a, kappa * v, v)


def _starts(size: Tensor) -> list[np.ndarray]:
    """log v for a v that reaches the set by scaling, for v = 1, and for orders of the states.

    With v falling steeply along an order, P is all but triangular: each state may read those
    after it, and nothing else but a little of itself. The order is greedy: next comes the state
    that reads most of those left, less what they read of it.
    """
    n = len(size)
    eye = torch.eye(n, dtype=size.dtype, device=size.device)
    above = 1.01 * float(perron_root(size)) * eye - size
    v = torch.linalg.solve(above, torch.ones_like(size[:, 0])).clamp_min(1e-12)
    weight = ((size * (1 - eye)) ** 2).cpu().numpy()
    balance = weight.sum(0) - weight.sum(1)
    order = np.empty(n)
    for place in range(n):
        k = int(balance.argmin())
        order[k] = (n - 1) / 2 - place
        balance += weight[:, k] - weight[k]
        balance[k] = np.inf
    orders = [np.clip(gap * order, -BOX, BOX) for gap in (1.0, 3.0)]
    return [(v / v.max()).log().cpu().numpy(), np.zeros(n), *orders]
