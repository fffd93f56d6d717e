"""Who converts what: by the type of a module, by a function of torch, by a tensor's method."""

from collections.abc import Callable
from typing import Any

from torch import nn

Converter = Callable[..., Any]

MODULES: dict[type[nn.Module], Converter] = {}
FUNCTIONS: dict[Any, Converter] = {}
METHODS: dict[str, Converter] = {}


def register(*targets: Any) -> Callable[[Converter], Converter]:
    """Register a converter for a module class, a function of torch, or a tensor's method by name.

    A module's converter is called with the `Trace`, the module and its inputs; a function's with
    the `Trace` and the arguments of the call. Inputs that depend on the network's input are
    `Value`s, and so is what a converter returns. A later registration replaces an earlier one.

    Args:
        targets: classes of `nn.Module` (subclasses that keep their `forward` are meant, too),
            functions, names.

    Raises:
        TypeError: a target is none of these.

    Example:
        >>> import torch, implicitdl
        >>> from implicitdl import convert
        >>> class Doubled(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.einsum("bi->bi", x) * 2
        >>> @convert.register(Doubled)
        ... def _(trace, module, x):
        ...     return trace.scale(x, 2.0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), Doubled())
        >>> implicitdl.to_implicit(net, torch.ones(1, 3)).states
        4
    """
    for target in targets:
        if isinstance(target, nn.Module) or not (isinstance(target, str) or callable(target)):
            raise TypeError(
                f"register: got {target!r}, expected a module class, a function of torch, or the "
                "name of a tensor's method."
            )

    def decorate(converter: Converter) -> Converter:
        for target in targets:
            if isinstance(target, str):
                METHODS[target] = converter
            elif isinstance(target, type) and issubclass(target, nn.Module):
                MODULES[target] = converter
            else:
                FUNCTIONS[target] = converter
        return converter

    return decorate


def of_module(module: nn.Module) -> Converter | None:
    """The converter of its class, or of one that it derives from and has its `forward` from."""
    for cls in type(module).__mro__:
        if cls in MODULES:
            own = "forward" not in vars(module) and type(module).forward is cls.forward
            return MODULES[cls] if own else None
    return None
