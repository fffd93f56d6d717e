"""How fast the gradient of a loss by the input may change: a bound, computed from the weights.

For y = C x + D u + d, x = phi(s), s = A x + B u + b, and a loss l of y with gradient g and Hessian H,
the Hessian by u at any input is, with J = ds/du, Phi' = diag phi'(s) and v the adjoint state,

    J' diag(v * phi''(s)) J  +  Y' H Y,      (I - A Phi') J = B,   (I - A'Phi') v = C'g,   Y = dy/du.

Converted networks are of this form with A strictly block-triangular, implicit layers with loops. So,
level by level of the states,

    L_zz <= sum over k of  sup|phi_k''|  max_i |v_ki|  ||J_k||^2  +  ||Y' H Y||.

||J_k|| follows forwards and |v_k| backwards by norms: products of spectral norms along a chain, and
in a loop the least of 1 / (1 - L ||A||_2), ||(I - L|A|)^-1||_2 (a Perron-Frobenius contraction) and
1 + ||A||_2 L / m (strong monotonicity). |v_ki| is bounded entry by entry, which is the step that
beats the plain product rule: in an output row only differences of classes count. Of up to a few
hundred states `_sector` then bounds all levels at once, J' W J with W = diag(sup|phi''| sup|v_i|) and
|v_i|, knowing that Phi' is one diagonal matrix; this is less by an order where there are loops.

Reference:
    Sinha, Namkoong, Duchi (2018), "Certifying some distributional robustness", proposition 5 (for
    chains); Szegedy et al. (2014), section 4.3 (products of norms); El Ghaoui et al. (2021).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._linalg import strong_components
from ..activations import Activation
from ..convert import to_implicit
from ..layers import ImplicitLayer, MonotoneLayer
from ..layers.base import altered
from ..model import ImplicitModel
from ..solution import ConversionError
from ._sector import LIMIT, together

_OUTWARD = 1 + 1e-9  # of every norm, for rounding
_LIMIT = 6000  # states whose matrices are treated densely


@dataclass(frozen=True)
class OutputLoss:
    """A loss of the outputs y, one a sample, and what is known of its derivatives.

    Attributes:
        function: (y, target) -> losses.  # (m, q), (m, ...) -> (m,)
        gradient: sup ||dl/dy||_2.
        hessian: sup ||d2l/dy2||_2.
        pairs: whether dl/dy is a convex combination of differences e_j - e_target, times at most 1,
            and d2l/dy2 a covariance of unit vectors, as for the softmax cross-entropy: then rows
            C_j - C_k count, which is less than norms of C.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    gradient: float
    hessian: float
    pairs: bool = False

    def __post_init__(self) -> None:
        for name in ("gradient", "hessian"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"{name}: got {value!r}, expected a number >= 0, or inf.")


@dataclass(frozen=True)
class Smoothness:
    """A bound of how fast the gradient by the input changes, and what it is made of.

    Attributes:
        L_zz: the Lipschitz constant of the gradient, infinite where there is none.
        product: the bound by products of norms alone, for comparison.
        lipschitz: the Lipschitz constant of the outputs, in the 2-norm.
        levels: what each level of states adds by norms; empty where norms prove nothing.
        reason: why L_zz is infinite, else "".
    """

    L_zz: float
    product: float
    lipschitz: float
    levels: tuple[float, ...] = ()
    reason: str = ""


def smoothness(
    network: "nn.Module | ImplicitModel", example: Tensor, loss: OutputLoss,
    scale: "Tensor | None" = None,
) -> Smoothness:  # fmt: skip
    """L_zz of the loss of a network by its input.

    Args:
        network: any module that `to_implicit` converts, `ImplicitLayer` and `MonotoneLayer`, an
            `ImplicitModel`, or a sequence of such.
        example: one input or a few.  # (m, p)
        loss: the loss of the outputs.
        scale: u = scale * z, and the derivatives are those by z.  # (p,)

    Returns:
        Smoothness; `L_zz` is infinite, with a reason, for networks that are not smooth or that
        cannot be converted.
    """
    if math.isinf(loss.gradient) or math.isinf(loss.hessian):
        return _none("nothing is known of the loss's derivatives; declare them in an `OutputLoss`")
    with torch.no_grad():
        try:
            model = as_model(network, example)
            dense = model.dense(limit=_LIMIT * _LIMIT)
            if not _same(network, model, example):
                return _none("the network computes something else than its layers' weights say")
        except (ConversionError, ValueError, TypeError) as error:
            return _none(f"the network cannot be converted: {str(error).splitlines()[0]}")
        # Norms of a few matrices, once: on the processor wherever the network is.
        A, B, C, D = (getattr(dense, name).detach().double().cpu() for name in "ABCD")
        if scale is not None:
            B, D = B * scale.to(B), D * scale.to(D)
        parts = [(phi, size) for phi, size in dense.phi.parts]
        for phi, _ in parts:
            if math.isinf(phi.curvature):
                return _none(f"{phi} is not smooth; take ELU, Softplus, Tanh, SiLU or GELU")
        A, B, C, D, parts = _without_linear(A, B, C, D, parts)
        found, entries = _bound(A, B, C, D, parts, loss)
        if not 0 < len(A) <= LIMIT:
            return found
        facts = [(*phi.slope, phi.curvature) for phi, n in parts for _ in range(n)]
        low, top, bend = torch.tensor(facts, dtype=A.dtype).unbind(1)
        bound, lipschitz = together(
            A,
            B,
            C,
            D,
            low,
            top,
            bend,
            _depths(A)[0],
            entries,
            loss.gradient,
            loss.hessian,
            loss.pairs,
        )
        if bound < found.L_zz:
            lipschitz = min(lipschitz, found.lipschitz)
            return Smoothness(bound, found.product, lipschitz, found.levels)
        return found


def _same(network: Any, model: ImplicitModel, example: Tensor) -> bool:
    """Whether both have the same outputs, which a method that was replaced may undo."""
    if network is model or isinstance(network, ImplicitModel):
        return True
    # A point of no symmetry beside it: at 0 many maps are 0.
    random = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    example = torch.cat([example, example + random.to(example)])
    ours, theirs = (f(example).flatten(1).double() for f in (model, network))
    size = 1 + float(theirs.abs().max())
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= 1e-3 * size


def as_model(network: "nn.Module | ImplicitModel", example: Tensor) -> ImplicitModel:
    """The network as one ImplicitModel, layers with loops included.

    Raises:
        ConversionError: a part has no known conversion.
        TypeError: a module has hooks, or a layer a `forward` of its own.
    """
    if isinstance(network, ImplicitModel):
        return network
    kinds = (ImplicitLayer, MonotoneLayer)
    layers = [m for m in network.modules() if isinstance(m, kinds)]
    changed = next((what for m in layers if (what := altered(m, *kinds))), None)
    if changed is not None:
        raise TypeError(f"a module has {changed}, which the weights do not show")
    if isinstance(network, kinds):
        return network.model()
    if not layers or not isinstance(network, nn.Sequential) or altered(network, nn.Sequential):
        return to_implicit(network, example)
    result, u = None, example
    for child in network:
        piece = as_model(child, u)
        result = piece if result is None else piece @ result
        u = child(u)
    return result


def _without_linear(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor, parts: "list[tuple[Activation, int]]"
) -> "tuple[Tensor, Tensor, Tensor, Tensor, list[tuple[Activation, int]]]":
    """Linear states x_S = (I - A_SS)^-1 (A_SN x_N + B_S u) written into the rows that read them.

    The norm of a product is less than the product of the norms.
    """
    linear = [phi.linear and phi.slope == (1.0, 1.0) for phi, size in parts for _ in range(size)]
    S = torch.tensor(linear, dtype=torch.bool)
    if not bool(S.any()):
        return A, B, C, D, parts
    N = ~S
    eye = torch.eye(int(S.sum()), dtype=A.dtype)
    inner, info = torch.linalg.inv_ex(eye - A[S][:, S])
    if int(info):
        return A, B, C, D, parts
    states, inputs = inner @ A[S][:, N], inner @ B[S]
    link, out = A[N][:, S], C[:, S]
    rest = [(phi, n) for phi, n in parts if not (phi.linear and phi.slope == (1.0, 1.0))]
    return (
        A[N][:, N] + link @ states, B[N] + link @ inputs, C[:, N] + out @ states, D + out @ inputs, rest
    )  # fmt: skip


def _none(reason: str) -> Smoothness:
    return Smoothness(math.inf, math.inf, math.inf, (), reason)


def _norm(M: Tensor) -> float:
    """The spectral norm, rounded up."""
    return float(torch.linalg.matrix_norm(M, 2)) * _OUTWARD if M.numel() else 0.0


@dataclass(frozen=True, eq=False)
class _Level:
    """States that are computed together.

    Attributes:
        states: their numbers.
        slope: largest |phi'|.
        bend: sup |phi''| of each.  # (size,)
        gain: ||(I - A Phi')^-1||_2 of the loops among them; 1 without one.
        spread: (I - L|A'|)^-1, which bounds the adjoint entry by entry; None where it does not.
    """

    states: Tensor
    slope: float
    bend: Tensor
    gain: float
    spread: "Tensor | None"


def _depths(A: Tensor) -> tuple[Tensor, Tensor]:
    """How many strongly connected components are below each state, and whether it is in a loop."""
    n = A.shape[0]
    depth = torch.zeros(n, dtype=torch.long)
    read = A.cpu() != 0
    loops = torch.zeros(n, dtype=torch.bool)
    for component in strong_components(read):
        index = torch.from_numpy(component.astype("int64"))
        outside = read[index].any(0)
        outside[index] = False
        below = depth[outside]
        depth[index] = int(below.max()) + 1 if below.numel() else 0
        loops[index] = len(index) > 1 or bool(read[index, index])
    return depth, loops


def _levels(A: Tensor, parts: Sequence[tuple[Activation, int]]) -> "list[_Level] | None":
    """The strongly connected components by depth; None where a loop is not bounded."""
    n, (depth, loops) = A.shape[0], _depths(A)
    slopes, low, bend = [], [], []
    for phi, size in parts:
        slopes += [phi.lipschitz] * size
        low += [phi.slope[0]] * size
        bend += [phi.curvature] * size
    slope, least, bends = (torch.tensor(x, dtype=A.dtype) for x in (slopes, low, bend))
    out = []
    for k in range(int(depth.max()) + 1 if n else 0):
        states = torch.nonzero(depth == k).flatten()
        top = float(slope[states].max())
        gain, spread = 1.0, None
        if bool(loops[states].any()):
            own = A[states][:, states]
            found = _loop(own, slope[states], float(least[states].min()) >= 0)
            if found is None:
                return None
            gain, spread = found
        out.append(_Level(states, top, bends[states], gain, spread))
    return out


def _loop(A: Tensor, slope: Tensor, monotone: bool) -> "tuple[float, Tensor | None] | None":
    """A bound of ||(I - A Phi')^-1||_2, and the entrywise one of its transpose."""
    n, top = A.shape[0], float(slope.max())
    eye = torch.eye(n, dtype=A.dtype)
    size, gains, spread = _norm(A), [], None
    if top * size < 1:
        gains.append(1 / (1 - top * size))
    # |(I - A Phi')^-1| <= (I - |A| L)^-1 where that is nonnegative, i.e. where |A| L contracts.
    K = eye - A.abs() * slope
    inverse, info = torch.linalg.inv_ex(K)
    if int(info) == 0 and bool((inverse >= -1e-12).all()) and bool((inverse.sum(0) > 0).all()):
        v = torch.linalg.solve(K, torch.ones(n, dtype=A.dtype))
        if bool((v > 0).all()) and bool((K @ v > 0.5).all()):  # v proves it
            # (I - A'Phi')^-1 is bounded by (I - |A'| L)^-1.
            transposed = eye - A.mT.abs() * slope
            spread = torch.linalg.inv(transposed).clamp_min(0) * _OUTWARD
            gains.append(max(_norm(inverse), _norm(spread)))
    if monotone:
        # I - A with smallest symmetric eigenvalue m, slopes in [0, L], L <= 1 after scaling by L.
        m = float(torch.linalg.eigvalsh(eye / top - 0.5 * (A + A.mT))[0]) - 1e-9
        if m > 0:
            gains.append(1 + size / m)
    return (min(gains) * _OUTWARD, spread) if gains else None


def _bound(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor, parts: Sequence[tuple[Activation, int]],
    loss: OutputLoss,
) -> tuple[Smoothness, "Tensor | None"]:  # fmt: skip
    """The bound by norms, and what it knows of |v_i|."""
    levels = _levels(A, parts)
    if levels is None:
        return _none(
            "a loop of the network is not proved to be well-posed with a bounded inverse"
        ), None
    # Forwards: ||J_k||, J = ds/du.
    jacobian: list[float] = []
    for k, level in enumerate(levels):
        into = _norm(B[level.states])
        for j in range(k):
            block = A[level.states][:, levels[j].states]
            if bool(block.any()):
                into += _norm(block) * levels[j].slope * jacobian[j]
        jacobian.append(level.gain * into)
    outer = sum(
        (_norm(C[:, e.states]) * e.slope * j for e, j in zip(levels, jacobian, strict=True))
    )
    lipschitz = float(outer + _norm(D))

    # Backwards: ||v_k||_2 and |v_ki|, v = dl/dx.
    q = C.shape[0]
    rows = None
    if loss.pairs and q <= 64:
        first, second = torch.triu_indices(q, q, 1)
        rows = C[first] - C[second]
    entries = A.new_zeros(len(A))
    lengths: list[float] = [0.0] * len(levels)
    adjoint: list[float] = [0.0] * len(levels)
    coarse: list[float] = [0.0] * len(levels)
    for k in reversed(range(len(levels))):
        level = levels[k]
        block = C[:, level.states]
        if rows is not None:
            pair = rows[:, level.states]
            entry = pair.abs().amax(0) if len(pair) else block.new_zeros(block.shape[1])
            length = float(torch.linalg.vector_norm(pair, dim=1).max()) if len(pair) else 0.0
        else:
            entry = torch.linalg.vector_norm(block, dim=0) * loss.gradient
            length = _norm(block) * loss.gradient
        length = min(length, _norm(block) * loss.gradient) * _OUTWARD
        plain = _norm(block) * loss.gradient
        for j in range(k + 1, len(levels)):
            link = A[levels[j].states][:, level.states]
            if bool(link.any()):
                through = levels[j].slope * lengths[j]
                entry = entry + torch.linalg.vector_norm(link, dim=0) * through
                length += _norm(link) * through
                plain += _norm(link) * levels[j].slope * coarse[j]
        if level.gain > 1:
            own = A[level.states][:, level.states]
            total = level.gain * length
            columns = torch.linalg.vector_norm(own, dim=0) * level.slope
            through_norm = entry + columns * total
            if level.spread is not None:
                through_norm = torch.minimum(through_norm, level.spread @ entry)
            entry, length, plain = through_norm, total, level.gain * plain
        lengths[k], coarse[k] = length, plain
        entries[level.states] = entry.clamp_max(length) * _OUTWARD
        adjoint[k] = float((entries[level.states] * level.bend).max())

    terms = [a * j * j for a, j in zip(adjoint, jacobian, strict=True)]
    direct = loss.hessian * lipschitz**2
    if rows is not None and len(rows):
        # The variance of y_j along a direction is at most a quarter of the squared range.
        pair_lipschitz = torch.linalg.vector_norm(D[first] - D[second], dim=1)
        for level, size in zip(levels, jacobian, strict=True):
            far = torch.linalg.vector_norm(rows[:, level.states], dim=1)
            pair_lipschitz = pair_lipschitz + far * level.slope * size
        direct = min(direct, 0.25 * float(pair_lipschitz.max()) ** 2)
    product = loss.hessian * lipschitz**2
    product += math.fsum(
        float(e.bend.max()) * v * j * j for e, v, j in zip(levels, coarse, jacobian, strict=True)
    )
    total = (math.fsum(terms) + direct) * _OUTWARD
    return Smoothness(min(total, product), product, lipschitz, tuple(terms)), entries
