"""Any feedforward network as an implicit model.

x_l = phi_l(W_l x_{l-1} + b_l), l = 1..L, is x = phi(A x + B u + b) with x = (x_L, ..., x_1) and a
strictly upper block-triangular A. Skips, branches and joins are more blocks of A; a convolution, a
pooling, a permutation are blocks that are operators. What is computed is what the network computes,
in its order and at its cost.

Reference: El Ghaoui, Gu, Travacca, Askari, Tsai (2021), section 3 and appendix.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..model import ImplicitModel
from ..operators import Live, read
from ..solution import ConversionError
from . import derived, functions, modules, shapes  # which register what they convert  # noqa: F401
from .builder import Refused, Trace, Value, live
from .checking import check
from .registry import FUNCTIONS, METHODS, MODULES, of_module, register
from .tracing import Untraceable, called, path, record, untouched, value, writes

__all__ = ["ConversionError", "Trace", "Value", "live", "register", "to_implicit"]

_RANDOM = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def to_implicit(module: nn.Module, example_input: Tensor) -> ImplicitModel:
    """The implicit model that computes what a network computes: outputs, gradients, cost.

    The network is recorded by torch.fx at the example. Blocks are named by the paths of its
    modules, and read its parameters and buffers at each call: train the network, and the model
    follows; differentiate the model, and the gradients are those of the network's parameters.

    Covered are linear layers, convolutions, batch normalisation in eval mode, pooling, everything
    that moves, joins, adds or scales entries, the activations of `implicitdl.activations`, recurrent
    networks over a fixed length, and layers of this library. `convert.register` adds more.

    Args:
        module: the network, in eval mode where that matters.
        example_input: an input to record it with, of the dtype and on the device of the network;
            its first dimension is the batch, of any size.  # (batch, *)

    Returns:
        The model, structured; see `ImplicitModel`. It takes (batch, *) as the network does, and
        answers in the network's shape; or (batch, p) and (batch, q), flattened.

    Raises:
        ConversionError: a module or function is not of the form of an implicit model, or nobody has
            said how to convert it; `.module_path` says where. Or batch normalisation or dropout is
            in training mode, or the model does not reproduce the network at the example.
        TypeError: module is no module, or the example no tensor.
        ValueError: the example has no batch dimension or no samples.

    Example:
        >>> import torch, implicitdl
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> u = torch.randn(5, 3)
        >>> model = implicitdl.to_implicit(net, u)
        >>> model.states, bool(torch.equal(model(u), net(u)))
        (4, True)

    Reference:
        El Ghaoui, Gu, Travacca, Askari, Tsai (2021), section 3.
    """
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}, expected a torch.nn.Module.")
    if not isinstance(example_input, Tensor):
        raise TypeError(
            f"example_input: got {type(example_input).__name__}, expected a tensor (batch, *)."
        )
    if example_input.dim() == 0 or example_input.shape[0] == 0:
        raise ValueError(
            f"example_input: got shape {tuple(example_input.shape)}, expected (batch, *) with at "
            "least one sample."
        )
    if not example_input.is_floating_point():
        raise ConversionError(
            f"{_named(module, '')}: its input is {example_input.dtype}, expected a floating dtype: "
            "an implicit model is a continuous map of its input (convert what follows the "
            "embedding).", "",
        )  # fmt: skip
    _refuse_modes(module)
    with untouched(module):  # a network that fails fails with its own error
        try:
            with torch.no_grad():
                module(example_input.clone())
        except RuntimeError:  # it may need gradients
            with torch.enable_grad():
                module(example_input.clone())
    root = nn.Sequential(module)  # so that the network may itself have a converter
    trace = Trace(example_input, module)
    try:
        graph = record(root, example_input, _leaf, METHODS.__contains__)
    except Untraceable as error:
        raise _failure(module, str(error), _path(error.module_path)) from error
    output = _interpreted(module, root, graph, trace)
    model = ImplicitModel(structure=trace.structure(output))
    with untouched(module):
        check(module, model, example_input)
    return model


def _leaf(module: nn.Module) -> bool:
    return of_module(module) is not None


def _path(found: str) -> str:
    """The path in the user's module, which was wrapped."""
    return found.removeprefix("0").lstrip(".")


def _refuse_modes(module: nn.Module) -> None:
    """What makes a network random, couples its samples, or changes its gradients."""
    for name, part in module.named_modules():
        share = getattr(part, "dropout", 0)
        if isinstance(part, torch.jit.ScriptModule):
            raise ConversionError(
                f"{_named(module, name)} was compiled by torch.jit, which leaves nothing to record; "
                "convert the module that it was made of.", name,
            )  # fmt: skip
        known = next((cls for cls in type(part).__mro__ if cls in MODULES), None)
        if known is not None and of_module(part) is None:
            raise ConversionError(
                f"{_named(module, name)} has a forward of its own, which the converter of "
                f"{known.__name__} does not know: register one for {type(part).__name__}.", name,
            )  # fmt: skip
        random = isinstance(part, _RANDOM) or (isinstance(share, float) and share > 0)
        idle = isinstance(part, nn.modules.dropout._DropoutNd) and part.p == 0
        if part.training and random and not idle:
            raise ConversionError(
                f"{_named(module, name)} is in training mode, where the output is random or depends "
                "on the whole batch; call eval() on the network first.", name,
            )  # fmt: skip
        if part._backward_hooks or part._backward_pre_hooks:
            raise ConversionError(
                f"{_named(module, name)} has a backward hook, which changes gradients: those of the "
                "model would be others. Remove the hook first.", name,
            )  # fmt: skip
        if of_module(part) is not None and (part._forward_hooks or part._forward_pre_hooks):
            raise ConversionError(
                f"{_named(module, name)} has a forward hook, which its converter does not know. "
                "Remove the hook first.", name,
            )  # fmt: skip


def _interpreted(module: nn.Module, root: nn.Module, graph: fx.Graph, trace: Trace) -> Value:
    """The nodes of the graph, one after the other, as equations."""
    env: dict[fx.Node, Any] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        trace.path, trace.function = _place(module, node)
        trace.known = value(node) if node.op != "output" else None
        if node.op == "placeholder":
            env[node] = trace.input if not env else value(node)
            continue
        args, kwargs = (_filled(part, env) for part in (node.args, node.kwargs))
        if node.op == "output":
            return _output(module, args[0])
        if node.op == "get_attr":
            env[node] = _tensor(root, node)
        else:
            try:
                _refuse_aliases(node, order, env)
                if _any_value((args, kwargs)):
                    env[node] = _converted(root, node, args, kwargs, trace)
                else:
                    env[node] = _constant(root, node, args, kwargs)
            except Exception as error:
                where = _path(path(node))
                what = "" if node.op == "call_module" else f"{_function(node)}(): "
                known = isinstance(error, Refused | ValueError)
                kind = "" if known else f"its converter raised {type(error).__name__}: "
                function = None if node.op == "call_module" else _function(node)
                raise _failure(module, f"{what}{kind}{error}", where, function) from error
            for written in writes(node):
                env[written] = env[node]
    raise AssertionError("a graph ends with its output")


def _converted(root: nn.Module, node: fx.Node, args: Any, kwargs: Any, trace: Trace) -> Any:
    """What the converter of the node makes of it; as states, where several nodes read it."""
    if node.op == "call_module":
        part = root.get_submodule(str(node.target))
        result = of_module(part)(trace, part, *args, **kwargs)  # type: ignore[misc]
    else:
        table: dict[Any, Any] = METHODS if node.op == "call_method" else FUNCTIONS
        converter = table.get(node.target)
        if converter is None:
            raise Refused("no converter is registered for it")
        try:
            result = converter(trace, *args, **kwargs)
        except TypeError as error:
            raise Refused(f"called in a way that its converter does not know ({error})") from error
    if isinstance(result, Value):
        _same_shape(node, result, trace)
        if len(node.users) > 1:
            result = trace.state(result)
    return result


def _same_shape(node: fx.Node, result: Value, trace: Trace) -> None:
    known = value(node)
    if isinstance(known, Tensor) and tuple(known.shape) != (trace.batch, *result.shape):
        raise Refused(
            f"its result has shape {tuple(known.shape)}, the converter made "
            f"{(trace.batch, *result.shape)} of it"
        )
    if isinstance(known, Tensor) and known.dtype != trace.dtype:
        raise Refused(f"it changes the dtype to {known.dtype}")


def _refuse_aliases(node: fx.Node, order: dict[fx.Node, int], env: dict[fx.Node, Any]) -> None:
    """A write in place is followed where nothing else that is read later shares the memory.

    Raises:
        Refused: something does; or a tensor of the network itself is written into, and read.
    """
    for written in writes(node):
        if not isinstance(env[written], Value):
            if node.users:
                raise Refused("it writes into a tensor that does not depend on the input")
            continue
        memory = value(written).untyped_storage().data_ptr()
        for other in env:
            known = value(other)
            if other in (written, node) or not isinstance(known, Tensor):
                continue
            later = any(order[user] > order[node] for user in other.users)
            if later and known.untyped_storage().data_ptr() == memory:
                raise Refused(
                    f"it writes in place into memory that {other.name} reads under another name; "
                    "write it without in-place operations"
                )


def _filled(part: Any, env: dict[fx.Node, Any]) -> Any:
    """Arguments with nodes replaced by what they are."""
    if isinstance(part, fx.Node):
        return env[part]
    if isinstance(part, tuple):
        return tuple(_filled(p, env) for p in part)
    if isinstance(part, list):
        return [_filled(p, env) for p in part]
    if isinstance(part, dict):
        return {key: _filled(p, env) for key, p in part.items()}
    if isinstance(part, slice):
        return slice(*(_filled(p, env) for p in (part.start, part.stop, part.step)))
    return part


def _any_value(part: Any) -> bool:
    if isinstance(part, tuple | list):
        return any(map(_any_value, part))
    if isinstance(part, dict):
        return any(map(_any_value, part.values()))
    return isinstance(part, Value)


def _tensor(root: nn.Module, node: fx.Node) -> Any:
    """A parameter or buffer, read at each use; a tensor that the code made, as it is."""
    name = str(node.target)
    if not isinstance(value(node), Tensor) or not hasattr(root, name.split(".")[0]):
        return value(node)  # a tensor that the code made
    return Live(lambda: called(root, node, (), {}), cheap=True)


def _constant(root: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What is computed of parameters alone is computed anew at each use."""

    def tensors(part: Any) -> Any:
        if isinstance(part, Live):
            return read(part)
        if isinstance(part, tuple | list):
            return type(part)(map(tensors, part))
        return part

    def compute() -> Any:
        own = tensors(args)
        named = {key: tensors(part) for key, part in kwargs.items()}
        return called(root, node, own, named)

    return Live(compute) if isinstance(value(node), Tensor) else value(node)


def _output(module: nn.Module, result: Any) -> Value:
    if isinstance(result, dict) and len(result) == 1:
        (result,) = result.values()
    if isinstance(result, tuple | list) and len(result) == 1:
        (result,) = result
    recurrent = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], tuple)
    if recurrent and of_module(module) is not None:
        result = result[0]  # of a recurrent network alone, its outputs
    if not isinstance(result, Value):
        kind = type(result).__name__
        raise _failure(module, f"its output is {kind}, expected one tensor", "")
    return result


def _place(module: nn.Module, node: fx.Node) -> tuple[str, str]:
    """The module's path and, where that is not one of torch's, the function that is called in it."""
    where = _path(path(node))
    if node.op in ("call_module", "placeholder", "output"):
        return where, ""
    owner = type(module.get_submodule(where))
    torchs = owner.__module__.startswith("torch.nn.modules.") and where
    return where, "" if torchs else _function(node).strip("_")


def _function(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target))


def _named(module: nn.Module, where: str) -> str:
    """A module by its path and class."""
    kind = type(dict(module.named_modules()).get(where)).__name__
    return f"{where!r} ({kind})" if where else f"the network ({kind})"


def _failure(
    module: nn.Module, reason: str, where: str, function: str | None = None
) -> ConversionError:
    """The error with its recipe: for a module of torch's that is not affine, or for a function."""
    try:
        kind = type(module.get_submodule(where)).__name__
    except AttributeError:
        kind = type(module).__name__
    target, head = kind, "trace, module, x"
    body = "trace.activate(trace.linear(x, module.weight, module.bias), ReLU())"
    if function is not None and not where:  # in the network's own forward
        target, head, body = f"torch.{function}", "trace, x", "trace.activate(x, ReLU())"
    return ConversionError(
        f"{_named(module, where)} cannot be converted: {reason.rstrip('.')}.\n"
        "If it is affine, or has its nonlinearity in states of its own, say how:\n"
        f"    @implicitdl.convert.register({target})\n"
        f"    def _({head}):\n"
        f"        return {body}",
        where,
    )
