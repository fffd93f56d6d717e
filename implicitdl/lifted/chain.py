"""A feedforward network as a chain of stages x_{l+1} = phi_l(W_l x_l + b_l), read from its modules."""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from ..activations import Activation, get_activation
from ..layers.base import altered

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FIXED = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
_RANDOM = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_BEHIND = (nn.Flatten, nn.Identity, *_RANDOM)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_KNOWN = _LINEAR + _FIXED + _RANDOM + NORMS


class Activate(nn.Module):
    """An `Activation` as a module, for networks with one that torch has none of.

    Args:
        activation: a name or an `Activation`, hard ones included: lifted training evaluates it and
            never differentiates it.

    Example:
        >>> import torch
        >>> from implicitdl.lifted import Activate
        >>> Activate("relu")(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    def __init__(self, activation: "str | Activation"):
        super().__init__()
        self.activation = get_activation(activation)

    def forward(self, z: Tensor) -> Tensor:
        """phi(z)."""
        return self.activation(z)

    def extra_repr(self) -> str:
        """The activation."""
        return str(self.activation)


@dataclass(frozen=True, eq=False)
class Stage:
    """z = W x + b, a few modules in a row, and the activation behind them.

    Attributes:
        body: the affine modules.
        phi: the activation; None for the last stage, whose output goes into the loss.
        name: where it is in the network, for messages.
        linear: the one `nn.Linear` that the body is, apart from flattening in front of it; else
            None, and products with W^T come from automatic differentiation.
    """

    body: nn.Sequential
    phi: Activation | None
    name: str
    linear: nn.Linear | None

    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the body that are trained."""
        return [p for p in self.body.parameters() if p.requires_grad]

    def __call__(self, x: Tensor) -> Tensor:
        linear = self.linear
        if linear is None:
            return self.body(x)
        x = x if len(self.body) == 1 else x.flatten(1)
        return F.linear(x, linear.weight, linear.bias)

    def rows(self, x: Tensor) -> Tensor | None:
        """x as the rows that `linear` multiplies; None where it is something else that is."""
        if self.linear is None or (len(self.body) == 1 and x.dim() != 2):
            return None
        return x.flatten(1)

    def adjoint(self, r: Tensor, x: Tensor) -> Tensor:
        """W^T r, in the shape of x."""
        if self.linear is not None:
            return (r @ self.linear.weight.detach()).view_as(x)
        with torch.enable_grad():
            leaf = torch.zeros_like(x).requires_grad_()
            (out,) = torch.autograd.grad(self.body(leaf), leaf, r)
        return out

    def norm_bound(self, x: Tensor) -> float:
        """||W||_2 <= (||W||_1 ||W||_inf)^(1/2), by |W| and |W|^T at ones; for one dense layer the
        smaller of that and the largest singular value, rounded up."""
        sizes = {
            name: p.detach().abs() * (not name.endswith("bias"))
            for name, p in self.body.named_parameters()
        }
        with torch.enable_grad():
            ones = torch.ones_like(x[:1]).requires_grad_()
            out = functional_call(self.body, sizes, (ones,))
            (back,) = torch.autograd.grad(out, ones, torch.ones_like(out))
        bound = math.sqrt(float(out.detach().amax()) * float(back.amax()))
        if self.linear is not None:
            weight = self.linear.weight.detach()
            slack = 1 + 8 * max(weight.shape) * torch.finfo(weight.dtype).eps
            bound = min(bound, slack * float(torch.linalg.matrix_norm(weight, 2)))
        return bound

    @property
    def core(self) -> nn.Module | None:
        """The one module with parameters, for `blocks` and `admm`, which see a stage as a regression."""
        found = [m for m in self.body if isinstance(m, _LINEAR)]
        return found[0] if found else None

    def regressors(self, x: Tensor) -> Tensor:
        """What the core multiplies, one row a sample (a position of a sample, for a convolution)."""
        core = self.core
        for module in self.body:
            if module is core:
                break
            x = module(x)
        if isinstance(core, nn.Linear):
            return x.reshape(-1, x.shape[-1])
        assert isinstance(core, nn.Conv1d | nn.Conv2d)
        if isinstance(core, nn.Conv1d):
            x = x[:, :, None]
        one = isinstance(core, nn.Conv1d)
        options: Any = [
            (1, *t) if one and name != "padding" else ((0, *t) if one else t)
            for name, t in (("kernel_size", core.kernel_size), ("dilation", core.dilation),
                            ("padding", core.padding), ("stride", core.stride))
        ]  # fmt: skip
        patches = F.unfold(x, options[0], options[1], options[2], options[3])
        return patches.mT.reshape(-1, patches.shape[1])

    def as_rows(self, t: Tensor) -> Tensor:
        """Something of the shape of z, in the order of the regressors.  # (rows, outputs)"""
        core: Any = self.core
        if isinstance(core, nn.Linear):
            return t.reshape(-1, core.out_features)
        channels = core.out_channels
        return t.reshape(len(t), channels, -1).mT.reshape(-1, channels)

    def weights(self) -> Tensor:
        """(W, b) side by side, rows of outputs; without b where there is none."""
        core: Any = self.core
        W = core.weight.detach().flatten(1)
        return W if core.bias is None else torch.cat([W, core.bias.detach()[:, None]], 1)

    @torch.no_grad()
    def assign(self, theta: Tensor) -> None:
        """Write (W, b) back."""
        core: Any = self.core
        width = core.weight[0].numel()
        core.weight.copy_(theta[:, :width].reshape(core.weight.shape))
        if core.bias is not None:
            core.bias.copy_(theta[:, width])


class Chain:
    """The stages of an `nn.Sequential`, nested ones included.

    Args:
        model: modules of the usual kinds: linear, convolution, average pooling, flattening,
            activations; dropout and batch normalisation where a method takes them.
        dense: whether the method works on rows of regressors, which takes one linear module a
            stage and nothing but flattening after it.

    Raises:
        TypeError: a module is of no such kind; the message names it.
    """

    def __init__(self, model: nn.Module, dense: bool = False):
        if not isinstance(model, nn.Sequential):
            raise TypeError(
                f"model: got {type(model).__name__}, expected an nn.Sequential of linear, "
                "convolution, average pooling and activation modules, an ImplicitLayer or an "
                "ImplicitModel."
            )
        self.model, self.dense = model, dense
        self.stages: list[Stage] = []
        body: list[nn.Module] = []
        start = ""
        for name, module in _flat(model):
            _require_plain(name, module)
            phi = None if isinstance(module, _KNOWN) else _phi(module)
            if phi is None and not isinstance(module, _KNOWN):
                raise TypeError(
                    f"model: {name} is {module}, expected linear, convolution, average pooling, "
                    "flattening or an activation that is known here (wrap others in "
                    "`lifted.Activate`)."
                )
            if not body and phi is None:
                start = name
            if phi is None:
                body.append(module)
            else:
                self.stages.append(self._stage(body, phi, start or name))
                body, start = [], ""
        self.stages.append(self._stage(body, None, start or "output"))
        shared = [p for stage in self.stages for p in stage.body.parameters()]
        if not shared:
            raise ValueError("model: it has no parameters, expected something to train.")
        if not any(p.requires_grad for p in shared):
            raise ValueError("model: all of its parameters are frozen, expected one to train.")
        coarse = next((p.dtype for p in shared if torch.finfo(p.dtype).bits < 32), None)
        if dense and coarse is not None:
            raise TypeError(
                f"model: its parameters are {coarse}, expected float32 or float64, in which Gram "
                "matrices can be factored; `lifted.local` trains others."
            )
        if dense and len({id(p) for p in shared}) != len(shared):
            raise ValueError(
                "model: two layers share a weight, which only `lifted.local` can train."
            )

    def _stage(self, body: list[nn.Module], phi: Activation | None, name: str) -> Stage:
        cores: list[nn.Module] = [m for m in body if isinstance(m, _LINEAR)]
        # One flattening at most, and a full one.
        front = len(body) <= 2 and all(
            isinstance(m, nn.Flatten) and (m.start_dim, m.end_dim) == (1, -1) for m in body[:-1]
        )
        single = bool(body) and isinstance(body[-1], nn.Linear) and front and len(cores) == 1
        # The gradient of what a parametrisation is made from needs automatic differentiation.
        single = single and not is_parametrized(body[-1])
        if self.dense:
            _require_dense(body, cores, name)
        return Stage(nn.Sequential(*body), phi, name, body[-1] if single else None)  # type: ignore

    @property
    def random(self) -> bool:
        """Whether two evaluations in training mode differ."""
        return any(isinstance(m, _RANDOM) and m.p > 0 for m in self.model.modules())

    @torch.no_grad()
    def forward(self, u: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The states x_0 = u, x_1, ... and the pre-activations z_0, ..., the last the output."""
        states, before = [u], []
        for stage in self.stages:
            before.append(stage(states[-1]))
            if stage.phi is not None:
                states.append(stage.phi(before[-1]))
        return states, before

    def check(self, u: Tensor) -> int:
        """The number of outputs, after one evaluation of one sample.

        Raises:
            ValueError: the network does not take such inputs, or a softmax acts on an image.
        """
        training = self.model.training
        self.model.eval()
        try:
            _, before = self.forward(u[:1])
        except RuntimeError as error:
            raise ValueError(
                f"data: the model does not take samples of shape {tuple(u.shape[1:])}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        finally:
            self.model.train(training)
        for stage, z in zip(self.stages, before, strict=True):
            if stage.phi is not None and not stage.phi.entrywise and z.dim() > 2:
                raise ValueError(
                    f"model: {stage.phi} after {stage.name} acts on states of shape "
                    f"{tuple(z.shape[1:])}, expected a vector; flatten first."
                )
        if before[-1].dim() != 2:
            raise ValueError(
                f"model: its output has shape {tuple(before[-1].shape[1:])} a sample, expected a "
                "vector; end with nn.Flatten() or nn.Linear."
            )
        return before[-1].shape[1]


def _require_plain(name: str, module: nn.Module) -> None:
    """Refuse a module that does something else than its class says.

    Raises:
        TypeError: it has hooks (torch's older weight_norm and its pruning are hooks), or a `forward`
            of its own.
    """
    what = altered(module, nn.Sequential, *_KNOWN)
    if what is not None:
        raise TypeError(
            f"model: {name} is a {type(module).__name__} that has {what}, expected none: local "
            "gradients would not see it. torch.nn.utils.parametrize is followed by `lifted.local`."
        )


def require_whole(name: str, parameters: Iterable[Tensor | None]) -> bool:
    """Whether the parts of a block are trained, all or none of them.

    Raises:
        ValueError: some are frozen; the block is one convex program over all of them.
    """
    wanted = {p.requires_grad for p in parameters if p is not None}
    if len(wanted) > 1:
        raise ValueError(
            f"model: some parameters of {name} are frozen and some are not, expected all or none: "
            "they are fitted together; `lifted.local` trains any."
        )
    return wanted == {True}


def _flat(model: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    _require_plain(prefix or "the model", model)
    for name, module in model._modules.items():  # named_children leaves out repeated modules
        if isinstance(module, nn.Sequential):
            yield from _flat(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} ({type(module).__name__})", module


def _phi(module: nn.Module) -> Activation | None:
    if isinstance(module, Activate):
        return module.activation
    try:
        return get_activation(module)
    except ValueError:
        return None


def _require_dense(body: list[nn.Module], cores: list[nn.Module], name: str) -> None:
    """Refuse a stage that is no regression on rows."""
    behind = body[body.index(cores[0]) + 1 :] if cores else []
    core: Any = cores[0] if cores else None
    grouped = core is not None and getattr(core, "groups", 1) != 1
    padded = core is not None and (
        getattr(core, "padding_mode", "zeros") != "zeros"
        or isinstance(getattr(core, "padding", 0), str)
    )
    if core is not None:
        if is_parametrized(core):
            raise TypeError(
                f"model: the weights at {name} are parametrised, expected plain ones, which are fitted "
                "as they are; `lifted.local` follows parametrisations."
            )
        require_whole(name, core.parameters())
    wrong = (
        len(cores) > 1
        or any(isinstance(m, _RANDOM) and m.p > 0 for m in body)
        or any(isinstance(m, NORMS) for m in body)
        or isinstance(core, nn.Conv3d)
        or any(not isinstance(m, _BEHIND) for m in behind)
        or grouped
        or padded
    )
    if wrong:
        shown = ", ".join(type(m).__name__ for m in body)
        raise TypeError(
            f"model: the stage at {name} is ({shown}), expected one nn.Linear, nn.Conv1d or "
            "nn.Conv2d (one group, zero padding given as numbers) between two activations, with "
            "pooling in front of it and nothing but flattening behind; `lifted.local` takes more."
        )
