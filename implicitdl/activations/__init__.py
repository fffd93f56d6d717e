"""The nonlinearity phi of x = phi(A x + B u + b), together with the convex analysis it stands for.

Where phi is monotone it is the gradient of a convex potential F, and three more objects follow:

    F*(x)    = sup_z  x z - F(z)                                  the conjugate
    D(x, z)  = F(z) + F*(x) - x z >= 0,  zero iff x = phi(z)      the Fenchel divergence
    prox_t(v) = argmin_x  t g(x) + (x - v)^2 / 2,  g = F* - x^2/2  so that prox_1 = phi

Certificates read `slope` and `homogeneous`, lifted training `divergence`, monotone splittings
`prox`, and the solvers only `__call__`, `call_`, `derivative` and `product`.

Reference: Gu, Askari, El Ghaoui (2018), "Fenchel lifted networks"; Combettes and Pesquet (2020),
"Deep neural network structures solving variational inequalities" (phi as a proximity operator).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..solution import unknown_name
from ._base import REGISTRY, Activation, own_fields
from .blocks import Blocks, Softmax
from .piecewise import HardTanh, Identity, LeakyReLU, ReLU, SoftShrink
from .pooling import MaxPool
from .smooth import ELU, GELU, Sigmoid, SiLU, Softplus, Tanh

__all__ = [
    "ELU",
    "GELU",
    "Activation",
    "Blocks",
    "HardTanh",
    "Identity",
    "LeakyReLU",
    "MaxPool",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "SoftShrink",
    "Softmax",
    "Softplus",
    "Tanh",
    "as_module",
    "from_config",
    "get_activation",
]


def from_config(config: Mapping[str, Any]) -> Activation:
    """The activation that `to_config` described.

    Args:
        config: `{"name": class name, **parameters}`.

    Raises:
        ValueError: the name is not registered, or a parameter is unknown or out of range.
    """
    if not isinstance(config, Mapping) or "name" not in config:
        raise ValueError(f"config: got {config!r}, expected a mapping with a 'name'")
    values = {key: value for key, value in config.items() if key != "name"}
    name = config["name"]
    cls = REGISTRY.get(name) if isinstance(name, str) else None
    if cls is None:
        raise unknown_name("activation", name, REGISTRY)
    fields = {f.name: f for f in own_fields(cls)}
    for key in values:
        if not fields:
            raise ValueError(f"{cls.__name__}: got {key!r}, expected no parameters")
        if key not in fields:
            raise unknown_name(f"parameter of {cls.__name__}", key, fields)
    for key, f in fields.items():
        if key not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"config of {cls.__name__}: got no {key!r}, expected one")
    if "parts" in values and issubclass(cls, Blocks):
        try:
            values["parts"] = tuple((from_config(part), n) for part, n in values["parts"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"config of Blocks: got parts {values['parts']!r}") from error
    for key, value in values.items():
        if key != "parts":
            values[key] = _plain(cls.__name__, key, value, fields[key].type)
    return cls(**values)


def _plain(name: str, key: str, value: Any, kind: Any) -> Any:
    """A number, or, where the field is one of a flag or of whole numbers, such."""
    expected = "a number"
    if kind is bool:
        expected, good = "true or false", type(value) is bool
    elif kind == tuple[int, ...]:
        expected = "a list of integers"
        good = isinstance(value, list | tuple) and all(type(i) is int for i in value)
        value = tuple(value) if good else value
    else:
        good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good:
        raise ValueError(f"{name}: got {key}={value!r}, expected {expected}")
    return value


# What PyTorch calls them, beside every registered class name in any case and with or without "_".
_ALIASES = {"linear": Identity(), "swish": SiLU(), "relu6": HardTanh(low=0.0, high=6.0)}
_NAMES = "identity relu leaky_relu elu softplus sigmoid tanh hardtanh softshrink silu gelu softmax"
_MODULES: dict[type[nn.Module], Callable[[Any], Activation | None]] = {
    nn.Identity: lambda m: Identity(),
    nn.ReLU: lambda m: ReLU(),
    nn.ReLU6: lambda m: HardTanh(low=0.0, high=6.0),
    nn.LeakyReLU: lambda m: LeakyReLU(negative_slope=m.negative_slope),
    nn.ELU: lambda m: ELU(alpha=m.alpha),
    nn.Softplus: lambda m: Softplus() if m.beta == 1 and m.threshold >= 20 else None,
    nn.Sigmoid: lambda m: Sigmoid(),
    nn.Tanh: lambda m: Tanh(),
    nn.Hardtanh: lambda m: HardTanh(low=m.min_val, high=m.max_val),
    nn.Softshrink: lambda m: SoftShrink(threshold=m.lambd),
    nn.SiLU: lambda m: SiLU(),
    nn.GELU: lambda m: GELU() if m.approximate == "none" else None,
    nn.Softmax: lambda m: Softmax() if m.dim == -1 else None,
}


_BACK: dict[type[Activation], Callable[[Any], nn.Module]] = {
    Identity: lambda phi: nn.Identity(),
    ReLU: lambda phi: nn.ReLU(),
    LeakyReLU: lambda phi: nn.LeakyReLU(phi.negative_slope),
    ELU: lambda phi: nn.ELU(phi.alpha),
    Softplus: lambda phi: nn.Softplus(threshold=phi.threshold),
    Sigmoid: lambda phi: nn.Sigmoid(),
    Tanh: lambda phi: nn.Tanh(),
    HardTanh: lambda phi: nn.Hardtanh(phi.low, phi.high),
    SoftShrink: lambda phi: nn.Softshrink(phi.threshold),
    SiLU: lambda phi: nn.SiLU(),
    GELU: lambda phi: nn.GELU(),
    Softmax: lambda phi: nn.Softmax(-1),
    MaxPool: lambda phi: getattr(nn, f"MaxPool{len(phi.shape) - 1}d")(
        phi.kernel_size, phi.stride, phi.padding, phi.dilation, ceil_mode=phi.ceil_mode
    ),
}


def as_module(phi: Activation) -> nn.Module | None:
    """PyTorch's module that equals the activation on a block in its own shape; None if there is none.

    Args:
        phi: the activation.
    """
    make = _BACK.get(type(phi))
    return None if make is None else make(phi)


def get_activation(activation: "str | Activation | nn.Module") -> Activation:
    """The activation of that name, or equal to that PyTorch module, or the object itself.

    Args:
        activation: a name such as "relu" or "leaky_relu" (default parameters), an `Activation`, or
            an activation module of `torch.nn`.

    Raises:
        ValueError: unknown name, with the nearest valid one, or a module with no equal here.
        TypeError: anything else.
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, nn.Module):
        phi = _MODULES.get(type(activation), lambda m: None)(activation)
        if phi is None:
            raise ValueError(
                f"activation: got the module {activation}, which equals no Activation here; "
                "write it as a subclass of implicitdl.activations.Activation"
            )
        return phi
    if not isinstance(activation, str):
        raise TypeError(
            f"activation: got {activation!r}, expected a name, an Activation instance or an "
            "activation module"
        )
    key = activation.lower().replace("_", "").replace("-", "")
    if key in _ALIASES:
        return _ALIASES[key]
    classes = {name.lower().replace("_", ""): cls for name, cls in REGISTRY.items()}
    if key not in classes:
        own = [n for n, cls in REGISTRY.items() if not cls.__module__.startswith(__name__)]
        raise unknown_name("activation", activation, [*_NAMES.split(), *_ALIASES, *own])
    try:
        return classes[key]()
    except TypeError as error:
        raise ValueError(f"activation: {activation!r} has no default parameters: {error}") from None
