"""A torch.fx trace in which every shape is known.

torch.fx records which functions a module calls on its input; sizes are symbols to it, so that a
loop over time steps or a test of a shape ends the trace. Here each node is evaluated on the example
as soon as it is recorded, and a proxy answers questions about its shape with the numbers. What
depends on the *values* of the input cannot be traced, and is refused.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

_VALUE = "implicitdl_value"
_PATH = "implicitdl_path"
_WRITES = "implicitdl_writes"


def value(node: fx.Node) -> Any:
    """What the node is at the example."""
    return node.meta[_VALUE]


def writes(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors it writes into."""
    return node.meta.get(_WRITES, [])


def _version(known: Any) -> int:
    return known._version if isinstance(known, Tensor) and not known.is_inference() else 0


def path(node: fx.Node) -> str:
    """The path of the module that the node was recorded in; "" for the network itself."""
    return node.meta.get(_PATH, "")


class Untraceable(Exception):
    """What the trace cannot follow, and where."""

    def __init__(self, reason: str, module_path: str):
        super().__init__(reason)
        self.module_path = module_path


class _Proxy(fx.Proxy):
    """A proxy that knows its shape."""

    tracer: "Tracer"

    @property
    def shape(self) -> torch.Size:
        return value(self.node).shape

    @property
    def ndim(self) -> int:
        return value(self.node).ndim

    @property
    def dtype(self) -> torch.dtype:
        return value(self.node).dtype

    @property
    def device(self) -> torch.device:
        return value(self.node).device

    @property
    def is_cuda(self) -> bool:
        return value(self.node).is_cuda

    @property
    def is_nested(self) -> bool:
        return False

    @property
    def requires_grad(self) -> bool:
        return value(self.node).requires_grad

    def size(self, dim: int | None = None) -> Any:
        return value(self.node).size() if dim is None else value(self.node).size(dim)

    def dim(self) -> int:
        return value(self.node).dim()

    def numel(self) -> int:
        return value(self.node).numel()

    def is_floating_point(self) -> bool:
        return value(self.node).is_floating_point()

    def is_complex(self) -> bool:
        return value(self.node).is_complex()

    def __len__(self) -> int:
        return len(value(self.node))

    def __iter__(self) -> Iterator[Any]:
        known = value(self.node)
        if isinstance(known, Tensor) and self.tracer.reads_input(self.node):
            self.tracer.refuse("it iterates over the samples of a batch")
        return iter([operator.getitem(self, i) for i in range(len(known))])  # type: ignore[call-overload]

    def __iadd__(self, other: Any) -> Any:
        return self._within(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._within(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._within(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._within(operator.itruediv, other)

    def _within(self, function: Callable[..., Any], other: Any) -> Any:
        """In place, as it is on tensors: without this it would be recorded as out of place."""
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __bool__(self) -> bool:
        where = "its input" if self.tracer.reads_input(self.node) else "a parameter"
        self.tracer.refuse(
            f"it branches on a value of {where}; a converted network does the same for all"
        )
        return False

    def _number(self, *_: Any) -> Any:
        where = "its input" if self.tracer.reads_input(self.node) else "a parameter"
        self.tracer.refuse(f"it takes a number out of {where} (.item() and the like)")

    __int__ = __float__ = __index__ = item = tolist = numpy = _number


class Tracer(fx.Tracer):
    """Records a module at an example.

    Args:
        example: the input.  # (batch, *)
        leaf: whether a module is one node, or is looked into.
    """

    def __init__(self, example: Tensor, leaf: Callable[[nn.Module], bool]):
        super().__init__(param_shapes_constant=False)
        self.example = example
        self.leaf = leaf
        self.proxy_buffer_attributes = True
        self._input: set[fx.Node] = set()
        self.last = ""  # path of what was recorded last, for errors from elsewhere

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.leaf(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter(obj)

    def reads_input(self, node: fx.Node) -> bool:
        """Whether the node depends on the input."""
        return node in self._input

    def refuse(self, reason: str) -> None:
        """End the trace here.

        Raises:
            Untraceable: always.
        """
        raise Untraceable(reason, self.scope.module_path)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        if kind == "get_attr":  # made by fx itself for a tensor that the code holds, too
            with unpatched(self):
                known = attribute(self.root, target)
            # A copy, since what follows may write into it.
            node.meta[_VALUE] = known.detach().clone() if isinstance(known, Tensor) else known
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any,
                     **options: Any) -> fx.Proxy:  # fmt: skip
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **options)
        node = proxy.node
        self.last = target if kind == "call_module" else self.scope.module_path
        node.meta[_PATH] = self.last
        if kind == "placeholder":
            self._placeholder(node)
        elif kind not in ("output", "get_attr"):
            before = {n: _version(value(n)) for n in node.all_input_nodes}
            node.meta[_VALUE] = self._evaluate(node)
            node.meta[_WRITES] = [n for n, v in before.items() if _version(value(n)) != v]
            if any(n in self._input for n in node.all_input_nodes):
                self._input.add(node)
                if not torch.is_grad_enabled():
                    self.refuse("it works under torch.no_grad(), so that its gradients are not those "
                                "of the function that it computes")  # fmt: skip
        return proxy

    def _placeholder(self, node: fx.Node) -> None:
        if not self._input:
            node.meta[_VALUE] = self.example.detach().clone()
            self._input.add(node)
        elif node.args:  # an argument with a default
            node.meta[_VALUE] = node.args[0]
        else:
            self.refuse("its forward takes more than one input; expected one tensor")

    def _evaluate(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        with torch.no_grad(), unpatched(self):
            return called(self.root, node, args, kwargs)


@contextlib.contextmanager
def unpatched(tracer: Tracer) -> Iterator[None]:
    """Modules called inside are run, not recorded: fx has patched the way they are called."""
    recording, tracer.call_module = tracer.call_module, _run  # type: ignore[method-assign]
    lookup, tracer.getattr = tracer.getattr, _look  # type: ignore[method-assign]
    try:
        yield
    finally:
        tracer.call_module, tracer.getattr = recording, lookup  # type: ignore[method-assign]


def _run(m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _look(attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
    return attr_val


def called(root: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What the node is with these arguments."""
    target: Any = node.target
    if node.op == "get_attr":
        return attribute(root, target)
    if node.op == "call_module":
        return root.get_submodule(target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def attribute(root: nn.Module, target: str) -> Any:
    """The attribute of that path."""
    found: Any = root
    for name in target.split("."):
        found = getattr(found, name)
    return found


# Where nn.Module keeps what it holds.
_TABLES = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """What is done to the attributes of a module and its parts, and to its buffers, is undone."""
    parts = [
        (m, dict(vars(m)), [dict(getattr(m, name)) for name in _TABLES]) for m in module.modules()
    ]
    buffers = [(t, t.detach().clone()) for t in module.buffers()]
    try:
        yield
    finally:
        for m, own, tables in parts:
            vars(m).clear()
            vars(m).update(own)
            for name, table in zip(_TABLES, tables, strict=True):
                current = getattr(m, name)
                current.clear()
                current.update(table)
        with torch.no_grad():
            for t, before in buffers:
                if not torch.equal(t, before):
                    t.copy_(before)


def record(
    module: nn.Module,
    example: Tensor,
    leaf: Callable[[nn.Module], bool],
    known: Callable[[str], bool],
) -> fx.Graph:
    """The functions that the module calls on its input, and what each node is at the example.

    The module is left as it was, whatever it does to its own attributes meanwhile.

    Args:
        module: the network.
        example: an input.
        leaf: whether a module is one node, or is looked into.
        known: whether a tensor's method has no effect but its result.

    Raises:
        Untraceable: what it does depends on the values of its input, or is no use of tensors.
    """
    tracer = Tracer(example, leaf)
    try:
        with torch.enable_grad(), untouched(module):
            graph = tracer.trace(module)
    except Untraceable:
        raise
    except Exception as error:  # of the network's own code, which did not expect a proxy
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Untraceable(reason, tracer.last) from error
    for node in reversed(list(graph.nodes)):
        idle = node.op in ("get_attr", "call_function", "call_module") or (
            node.op == "call_method" and known(str(node.target))
        )
        if not node.users and idle and not writes(node):
            graph.erase_node(node)
    return graph
