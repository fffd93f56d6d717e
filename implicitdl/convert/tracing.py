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


def value(node: fx.Node) -> Any:
    """What the node is at the example."""
    return node.meta[_VALUE]


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

    def __bool__(self) -> bool:
        self.tracer.refuse(
            "it branches on a value of its input; a converted network does the same for all inputs"
        )
        return False

    def _number(self, *_: Any) -> Any:
        self.tracer.refuse("it takes a number out of a tensor (.item() and the like)")

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
                node.meta[_VALUE] = attribute(self.root, target)
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
            node.meta[_VALUE] = self._evaluate(node)
            if any(n in self._input for n in node.all_input_nodes):
                self._input.add(node)
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


def record(module: nn.Module, example: Tensor, leaf: Callable[[nn.Module], bool]) -> fx.Graph:
    """The functions that the module calls on its input, and what each node is at the example.

    Raises:
        Untraceable: what it does depends on the values of its input, or is no use of tensors.
    """
    tracer = Tracer(example, leaf)
    before = set(vars(module))
    try:
        graph = tracer.trace(module)
    except Untraceable:
        raise
    except Exception as error:  # of the network's own code, which did not expect a proxy
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Untraceable(reason, tracer.last) from error
    finally:
        constants = {n: getattr(module, n) for n in set(vars(module)) - before}
        for name in constants:  # fx leaves tensors that it has met on the module
            delattr(module, name)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in constants:
            node.meta[_VALUE] = constants[node.target]
            node.meta["constant"] = True
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not in_place(node):
            graph.erase_node(node)
    return graph


def in_place(node: fx.Node) -> bool:
    """Whether the node writes its result into its first argument."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    if node.kwargs.get("inplace") or node.target in (operator.iadd, operator.isub, operator.imul):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")
