"""WRM: training for the worst law of a Wasserstein ball, with a certificate that is computed.

With the cost c(z, z0) = sum_j w_j (z_j - z0_j)^2, plus k where the label differs, and the surrogate

    phi_gamma(z0) = sup over z of  l(z) - gamma c(z, z0),

for every rho >= 0, all laws Q with W_c(Q, P) <= rho satisfy

    E_Q l <= gamma rho + E_P phi_gamma,

with equality at rho_hat = E_P c(T(z), z), T(z) the maximiser. In coordinates sqrt(w) z the gradient of
l is L_zz-Lipschitz; where 2 gamma > L_zz the inner problem is strongly concave, z <- z0 + grad l(z) /
(2 gamma) contracts to its maximiser by L_zz / (2 gamma), and where its gradient has length r the
maximum is at most r^2 / (2 (2 gamma - L_zz)) above. (Mind the convention: no half in the cost.)

P is the law of the data that are passed: what differs between them and the population is not part
of the bound.

Reference:
    Sinha, Namkoong, Duchi (2018), "Certifying some distributional robustness with principled
    adversarial training", algorithm 1, proposition 1, theorem 3.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import ImplicitModel
from ..solution import unknown_name
from ..solvers import Anderson, FixedPointSolver
from ._ascent import Worst, ascend, like
from ._checks import finite, labels_of, number
from .smoothness import OutputLoss, Smoothness, smoothness


def _cross_entropy(y: Tensor, target: Tensor) -> Tensor:
    if not target.is_floating_point():
        target = labels_of("labels", target, tuple(target.shape), y.shape[1])
    return F.cross_entropy(y, target, reduction="none")


_LOSSES = {"cross_entropy": OutputLoss(_cross_entropy, math.sqrt(2), 0.5, pairs=True)}
_EXACT = 1e-10  # tolerance of the solves of implicit layers inside a certificate
_MARGIN = 1e-8  # of a certificate, for those solves and for rounding


@dataclass(frozen=True, eq=False)
class Certificate:
    """What is proved of the mean loss near the data, or, where `is_certificate` is False, guessed.

    Attributes:
        bound: gamma rho + mean upper bound of the surrogate, at rho = radius^2, or at rho_hat where
            no radius was asked for.
        rho_hat: mean cost of the worst-case inputs, where the bound is tight up to the inner error.
        inner_error: mean over the samples of what the inner maxima may be above what was found.
        L_zz: the Lipschitz constant of the loss's gradient by the input, from the weights.
        is_certificate: whether the bound is proved.
        gamma: the multiplier.
        rho: where `bound` is evaluated.
        attained: mean loss at the worst-case inputs, which are a law of cost rho_hat.
        nominal: mean loss of the data.
        reason: why it is no certificate, else "".
    """

    bound: float
    rho_hat: float
    inner_error: float
    L_zz: float
    is_certificate: bool
    gamma: float
    rho: float
    attained: float
    nominal: float
    reason: str = ""

    def at(self, radius: float) -> float:
        """The bound for another radius with the same gamma: gamma radius^2 + E phi_gamma."""
        radius = number("radius", radius, 0)
        return self.bound + self.gamma * (radius * radius - self.rho)

    def __iter__(self) -> Iterator[Any]:
        """bound, rho_hat, inner_error, L_zz, is_certificate."""
        return iter((self.bound, self.rho_hat, self.inner_error, self.L_zz, self.is_certificate))


class WassersteinTraining(nn.Module):
    """min over theta of E phi_gamma: the loss at worst-case inputs, with a gradient by Danskin.

    Args:
        model: any module, (m, *shape) -> (m, q); implicit layers included.
        loss: "cross_entropy"; an `OutputLoss`, which says what is known of its derivatives; or a
            function (outputs, targets) -> (m,), for which no certificate exists.
        gamma: the multiplier of the cost, > 0; give this or `radius`.
        radius: of the ball, a distance (rho = radius^2); gamma is then moved while training until
            the worst-case inputs are that far.
        cost: w, one weight a feature, > 0; inf fixes a feature; None for ones.  # shape of one input
        label_price: k > 0, in the units of the cost; inf: labels are fixed.
        steps: most ascent steps in `forward`.
        tol: a sample is done where its gradient is `tol` of the one it started with.

    Raises:
        ValueError: a gamma that is not positive, a negative radius, both or none of them, a cost that
            is not positive.

    Example:
        >>> import torch
        >>> from implicitdl.dro import WassersteinTraining
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ELU(), torch.nn.Linear(8, 2))
        >>> training = WassersteinTraining(net, gamma=2.0)
        >>> u, labels = torch.randn(16, 4), torch.randint(2, (16,))
        >>> training(u, labels).backward()
        >>> training.certificate((u, labels)).is_certificate
        True
    """

    log_gamma: Tensor
    cost: "Tensor | None"

    def __init__(
        self, model: "nn.Module | ImplicitModel", loss: Any = "cross_entropy", *,
        gamma: float | None = None, radius: float | None = None, cost: "Tensor | None" = None,
        label_price: float = math.inf, steps: int = 15, tol: float = 1e-2,
    ):  # fmt: skip
        super().__init__()
        if (gamma is None) == (radius is None):
            raise ValueError("gamma, radius: got both or none, expected one of them.")
        self.radius = None if radius is None else number("radius", radius, 0)
        start = 1.0 if gamma is None else number("gamma", gamma, 0, open_low=True)
        if self.radius == 0:
            raise ValueError("radius: got 0, expected a number > 0; without a ball train as usual.")
        if isinstance(loss, str):
            if loss not in _LOSSES:
                raise unknown_name("loss", loss, _LOSSES)
            loss = _LOSSES[loss]
        elif not isinstance(loss, OutputLoss):
            if not callable(loss):
                raise TypeError(f"loss: got {type(loss).__name__}, expected a name or a function.")
            loss = OutputLoss(loss, math.inf, math.inf)
        if not math.isinf(label_price):
            label_price = number("label_price", label_price, 0, open_low=True)
        if cost is not None:
            cost = torch.as_tensor(cost, dtype=torch.get_default_dtype())
            bad = torch.nonzero(~(cost > 0))
            if len(bad):
                at = tuple(bad[0].tolist())
                raise ValueError(
                    f"cost: got {float(cost[at]):.6g} at index {at}, expected weights > 0; inf fixes a "
                    "feature."
                )
        _whole("steps", steps)
        self.model, self.loss, self.label_price = model, loss, float(label_price)
        self.steps, self.tol = steps, number("tol", tol, 0, 0.5, open_low=True)
        self.register_buffer("cost", cost)
        self.register_buffer("log_gamma", torch.tensor(math.log(start), dtype=torch.float64))

    @property
    def gamma(self) -> float:
        """The multiplier as it is now."""
        return math.exp(float(self.log_gamma))

    def forward(self, u: Tensor, labels: Tensor) -> Tensor:
        """mean phi_gamma over a batch, to be minimised.

        Args:
            u: # (m, *shape)
            labels: # (m,)

        Returns:
            A number with the gradient by the parameters of the model, that of the loss at T(z). With
            `radius`, gamma radius^2 is part of it, and in training mode gamma follows.
        """
        worst = self.worst(u, labels)
        outputs = self.model(worst.inputs)
        losses = self.loss.function(outputs, worst.labels)
        total = (losses - self.gamma * worst.costs).mean()
        if self.radius is not None:
            rho = self.radius**2
            total = total + self.gamma * rho
            if self.training:
                # d/dgamma of gamma rho + E phi is rho - rho_hat: too far means too cheap.
                far = float(worst.costs.mean()) / rho
                self.log_gamma += 0.3 * max(-1.0, min(1.0, math.log(max(far, 1e-6))))
        return total

    def worst(self, u: Tensor, labels: Tensor) -> Worst:
        """The worst-case inputs (and labels) of a batch, at the present gamma."""
        u, labels = self._accept(u, labels)
        self._fits(u)
        with _steady(self.model):
            return ascend(
                self.model, self.loss, u, labels, self.gamma, self._root(u), self.label_price,
                self.steps, self.tol, math.inf,
            )  # fmt: skip

    def smoothness(self, example: Tensor) -> Smoothness:
        """L_zz of the loss by the input in the coordinates of the cost, from the weights.

        Args:
            example: one input or a few.  # (m, *shape)
        """
        model = _exact(self.model)
        example = example[:1].double()
        root = self._root(example)
        scale = None if root is None else root.flatten().reciprocal().expand(example[0].numel())
        return smoothness(model, example, self.loss, scale)

    def certificate(
        self, data: Any, *, gamma: float | None = None, radius: float | None = None,
        on_failure: str = "raise", steps: int = 300, tol: float = 1e-5,
    ) -> Certificate:  # fmt: skip
        """A bound of the mean loss over all laws near the data.

        The model is copied in float64, its solves are tightened, and L_zz is computed from its weights.

        Args:
            data: (inputs, labels), or batches of such.
            gamma: the multiplier; the module's own where None, or, with a radius, the best one that is
                proved to be concave.
            radius: where the bound is wanted; None for sqrt(rho_hat).
            on_failure: "raise" or "return", where gamma is too small to be proved.
            steps, tol: of the ascent, as in the constructor.

        Returns:
            Certificate. For a network that is not smooth (ReLU), or whose L_zz is not known, it is a
            heuristic and says so.

        Raises:
            ValueError: gamma is too small for the inner problem to be proved concave; the message says
                the smallest that works. A negative radius, or NaN.
        """
        if on_failure not in ("raise", "return"):
            raise unknown_name("on_failure", on_failure, ("raise", "return"))
        rho = None if radius is None else number("radius", radius, 0) ** 2
        if gamma is not None:
            gamma = number("gamma", gamma, 0, open_low=True)
        _whole("steps", steps)
        tol = number("tol", tol, 0, 0.5, open_low=True)
        batches = [self._accept(*batch) for batch in _batches(data)]
        batches = [(u.double(), y) for u, y in batches]
        found = self.smoothness(batches[0][0])
        L = found.L_zz
        model = _tight(_exact(self.model))
        least = 0.5 * L * (1 + 1e-3)

        def at(gamma: float) -> tuple[Tensor, ...]:
            parts = [
                ascend(
                    model, self.loss, u, y, gamma, self._root(u), self.label_price, steps, tol, L
                )
                for u, y in batches
            ]
            names = ("losses", "costs", "surrogate", "upper")
            return tuple(torch.cat([getattr(p, name) for p in parts]) for name in names)

        if gamma is None:
            gamma = self.gamma
            if rho is not None:
                gamma = _best_gamma(at, rho, gamma, least if math.isfinite(L) else 0.0)
        smooth = math.isfinite(L)
        concave = smooth and 2 * gamma > L
        reason = found.reason
        if smooth and not concave:
            reason = (
                f"gamma: got {gamma:.6g}, at which the inner problem is not proved concave (L_zz = "
                f"{L:.6g}); the smallest that works is {0.5 * L * (1 + 1e-5):.6g}."
            )
            if on_failure == "raise":
                raise ValueError(reason + " Pass on_failure='return' for a bound that is a guess.")
        losses, costs, surrogate, upper = at(gamma)
        rho_hat = float(costs.mean())
        level = rho_hat if rho is None else rho
        value = float(upper.mean()) if concave else float(surrogate.mean())
        with torch.no_grad():
            nominal = torch.cat([self.loss.function(model(u), y) for u, y in batches]).mean()
        bound = gamma * level + value
        return Certificate(
            bound=bound + _MARGIN * (1 + abs(bound)), rho_hat=rho_hat,
            inner_error=float((upper - surrogate).mean()) if concave else math.inf, L_zz=L,
            is_certificate=concave, gamma=gamma, rho=level, attained=float(losses.mean()),
            nominal=float(nominal), reason=reason,
        )  # fmt: skip

    def attack(
        self, data: Any, radius: float, *, steps: int = 60, gamma: float | None = None
    ) -> Worst:
        """A law within the radius whose mean loss is large: a bound from below of the worst case.

        The multiplier is moved until the inputs found are farther than the radius, and bisected;
        inputs are then pulled back so that their mean cost is at most radius^2.

        Args:
            data: (inputs, labels), one batch.
            radius: > 0.
            steps: of each ascent.
            gamma: where the search of the multiplier begins, in small steps: that of a certificate
                for about this radius saves half of it. The module's own, in large steps, where None.

        Raises:
            ValueError: a radius, steps or gamma that is not positive, more than one batch, or NaN.
        """
        rho = number("radius", radius, 0, open_low=True) ** 2
        _whole("steps", steps)
        stride = 2.0 if gamma is None else 1.1
        gamma = self.gamma if gamma is None else number("gamma", gamma, 0, open_low=True)
        batches = _batches(data)
        if len(batches) != 1:
            raise ValueError(f"data: got {len(batches)} batches, expected one, (inputs, labels).")
        u, y = self._accept(*batches[0])
        self._fits(u)
        root = self._root(u)
        with _steady(self.model):
            return self._attacked(u, y, root, rho, gamma, stride, steps)

    def _attacked(
        self, u: Tensor, y: Tensor, root: "Tensor | None", rho: float, gamma: float, stride: float,
        steps: int,
    ) -> Worst:  # fmt: skip
        """The search of `attack` for the multiplier."""
        low: float | None = None
        high: float | None = None
        best: Worst | None = None
        for _ in range(24):
            got = ascend(
                self.model, self.loss, u, y, gamma, root, self.label_price, steps, 1e-3, math.inf
            )
            far = float(got.costs.mean())
            pulled = got if far <= rho else self._pulled(got, u, y, root, rho)
            if best is None or float(pulled.losses.mean()) > float(best.losses.mean()):
                best = pulled
            if far > rho:
                low = gamma
            else:
                high = gamma
            if low is None or high is None:
                gamma = gamma / stride if low is None else gamma * stride
                stride = min(stride * stride, 2.0)
            else:
                gamma = math.sqrt(low * high)
                if high < 1.02 * low:
                    break
        assert best is not None  # the first turn made one
        return best

    def _pulled(self, got: Worst, u: Tensor, y: Tensor, root: "Tensor | None", rho: float) -> Worst:
        """The same directions with a mean cost of rho; flipped labels go back first."""
        flipped = got.labels != y
        inputs = torch.where(like(flipped, u), u, got.inputs)
        move = inputs - u
        size = (move if root is None else torch.where(root.isinf(), 0.0, move * root)).flatten(1)
        cost = (size * size).sum(1)
        share = math.sqrt(min(1.0, rho / max(float(cost.mean()), 1e-300)))
        inputs = u + share * move
        with torch.no_grad():
            losses = self.loss.function(self.model(inputs), y)
        zero = torch.zeros_like(losses)
        return dataclasses.replace(
            got, inputs=inputs, labels=y, losses=losses, costs=cost * share**2,
            surrogate=losses, residual=zero, upper=losses,
        )  # fmt: skip

    def _fits(self, u: Tensor) -> None:
        """Whether the model takes this dtype."""
        if isinstance(self.model, ImplicitModel):
            kinds = {self.model.dtype}
        else:
            kinds = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        if (
            len(kinds) == 1
            and u.dtype not in kinds
            and not torch.is_autocast_enabled(u.device.type)
        ):
            (kind,) = kinds
            raise ValueError(
                f"u: got {u.dtype}, expected {kind} as the model's weights; convert one with .to()."
            )

    def _root(self, u: Tensor) -> "Tensor | None":
        """sqrt(w), in the shape of one input."""
        return None if self.cost is None else self.cost.to(u).sqrt()

    def _accept(self, u: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(u, Tensor) or not u.is_floating_point() or u.dim() < 2 or not len(u):
            got = f"{u.dtype} {tuple(u.shape)}" if isinstance(u, Tensor) else type(u).__name__
            raise ValueError(f"u: got {got}, expected a floating tensor (m, *shape), m >= 1.")
        finite("u", u)
        if self.cost is not None and self.cost.shape != u.shape[1:]:
            raise ValueError(
                f"cost: got shape {tuple(self.cost.shape)}, expected {tuple(u.shape[1:])}, as one input."
            )
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            labels = labels_of("labels", labels, (len(u),), None)
        elif not isinstance(labels, Tensor) or len(labels) != len(u):
            raise ValueError(f"labels: expected a tensor of {len(u)} targets, one a sample.")
        elif math.isfinite(self.label_price):
            raise ValueError("label_price: got a finite one, expected integer labels to flip.")
        else:
            finite("labels", labels)
        return u.detach(), labels


def _whole(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected an integer >= 1.")


def _batches(data: Any) -> list[tuple[Tensor, Tensor]]:
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor):
        return [(data[0], data[1])]
    if not isinstance(data, Iterable):
        raise TypeError(f"data: got {type(data).__name__}, expected (inputs, labels) or batches.")
    batches = [(batch[0], batch[1]) for batch in data]
    if not batches:
        raise ValueError("data: got no batches, expected one at least.")
    return batches


def _exact(model: Any) -> Any:
    """A copy in float64 and evaluation mode whose implicit layers are solved nearly exactly."""
    if isinstance(model, ImplicitModel):
        if model.dtype == torch.float64:
            return model
        with torch.no_grad():
            dense = model.dense()
            parts = {name: getattr(dense, name).detach().double() for name in "ABCDbd"}
        return ImplicitModel(**parts, phi=dense.phi)
    twin: nn.Module = copy.deepcopy(model).double().eval()
    for part in twin.modules():
        holder: Any = part
        solver = getattr(holder, "solver", None)
        if isinstance(solver, FixedPointSolver):
            with contextlib.suppress(TypeError, ValueError, AttributeError):
                holder.solver = dataclasses.replace(solver, rtol=_EXACT, atol=_EXACT)
    for p in twin.parameters():
        p.requires_grad_(False)
    return twin


def _tight(model: Any) -> Any:
    """An ImplicitModel's map with loops solved nearly exactly; inputs of any shape are flattened."""
    if not isinstance(model, ImplicitModel) or model.structure is not None:
        return model
    options: dict[str, Any] = {}
    if bool(torch.tril(model.A.detach()).any()):
        options["solver"] = Anderson(rtol=_EXACT, atol=_EXACT)
    return lambda u: model(u.flatten(1), **options)


@contextlib.contextmanager
def _steady(model: Any) -> Iterator[None]:
    """Layers whose outputs depend on the batch or on chance, as in evaluation for a while.

    An ascent on part of a batch would move running means, and climb another function each step.
    """
    kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    parts = list(model.modules()) if isinstance(model, nn.Module) else []
    moved = [m for m in parts if isinstance(m, kinds) and m.training]
    for m in moved:
        m.training = False
    try:
        yield
    finally:
        for m in moved:
            m.training = True


def _best_gamma(at: Any, rho: float, start: float, least: float) -> float:
    """The gamma >= least of the least gamma rho + E phi: where rho_hat = rho, or the end."""
    low = max(least, 1e-12)
    if least > 0 and float(at(low)[1].mean()) <= rho:
        return low  # at the end inputs are not farther than rho: more gamma only costs
    high = max(start, 2 * low)
    for _ in range(60):
        if float(at(high)[1].mean()) <= rho:
            break
        low, high = high, 4 * high
    for _ in range(25):
        middle = math.sqrt(low * high)
        if float(at(middle)[1].mean()) > rho:
            low = middle
        else:
            high = middle
        if high < 1.01 * low:  # the bound is flat there
            break
    return high
