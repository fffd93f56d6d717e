"""Equations out of operations: what a converter works with."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..activations import Activation, Identity
from ..model.structure import INPUT, AnyRow, Block, Constant, Join, Row, Structure
from ..model.wiring import free
from ..operators import Dense, Gather, Live, Operator, Scale, Weight, product, rebuilt
from ..operators import Identity as Unchanged


class Value:
    """A tensor of the network as an affine function of states and input, not yet a state itself.

    Attributes:
        row: the function.
        shape: without the batch.
        origin: the path of the module with the last weights on the way to it, for names.
    """

    __slots__ = ("origin", "row")

    def __init__(self, row: AnyRow, origin: str = ""):
        self.row = row
        self.origin = origin

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.row.shape

    def __repr__(self) -> str:
        return f"Value{self.shape}"


class Refused(Exception):
    """Why an operation is not of the form of an implicit model."""


class Trace:
    """Collects the blocks of a model; a converter gets it with the module and its input.

    The input is a `Value`, and so is what the converter returns. `apply` puts an operator behind a
    value, `add` adds values, `shift` adds a bias, `activate` makes states of it.

    Attributes:
        batch: of the example that the network was recorded with.
        dtype, device: of the example.
    """

    def __init__(self, example: Tensor, network: "nn.Module | None" = None):
        self.batch = example.shape[0]
        self.dtype, self.device = example.dtype, example.device
        self.input = Value(_one(INPUT, Unchanged(tuple(example.shape[1:]))))
        self._blocks: list[Block] = []
        self._names: dict[str, int] = {}
        self._own: dict[int, Live] = {}
        for part in () if network is None else network.modules():
            for name in (*part._parameters, *part._buffers):
                t = getattr(part, name)
                if isinstance(t, Tensor):
                    self._own[id(t)] = live(part, name)
        self.path = ""  # of the module whose operation is being converted
        self.function = ""  # its name, where the module is the user's own
        self.known: Any = None  # what the operation's result is at the example

    # ---- what converters call --------------------------------------------------------------------

    def apply(self, op: Operator, x: Value) -> Value:
        """op x. A sum, or what has cost a product already, becomes states first: it is then computed
        once, whoever reads it."""
        if x.shape != op.in_shape:
            raise Refused(f"got shape {x.shape} for {op!r}")
        row = x.row
        if (
            isinstance(row, Join)
            or len(row.terms) != 1
            or not op.light
            and (row.constants or not row.terms[0][1].light)
        ):
            row = self.state(x).row
        ((source, own),) = row.terms
        constants = tuple(self._behind(op, c, row.shape) for c in row.constants)
        origin = x.origin if op.light else self.path
        return Value(Row(op.out_shape, ((source, product(op, own)),), constants), origin)

    def linear(self, x: Value, weight: Weight, bias: Weight | None = None) -> Value:
        """W x + b on the last dimension."""
        y = self.apply(Dense(weight, x.shape[:-1]), x)
        return y if bias is None else self.shift(y, bias)

    def scale(self, x: Value, factor: "float | Weight") -> Value:
        """s x with a number, or a tensor that broadcasts against a sample."""
        if isinstance(factor, Tensor | Live):
            return self.apply(Scale(factor, x.shape), x)
        factor = float(factor)
        if factor == 1.0:
            return x
        return self.apply(Scale(None, x.shape, factor), x)

    def shift(self, x: Value, bias: "Weight | float") -> Value:
        """x + b with a number, or a tensor that broadcasts against a sample."""
        if isinstance(x.row, Join):
            x = self.state(x)
        row = x.row.flat()
        row = replace(row, constants=(*row.constants, Constant(bias)))
        return Value(row, x.origin)

    def add(self, *values: Value) -> Value:
        """The sum of values of one shape."""
        shapes = {x.shape for x in values}
        if len(shapes) > 1:
            raise Refused(f"a sum of values of shapes {sorted(shapes)}, expected one shape")
        rows = [(self.state(x) if isinstance(x.row, Join) else x).row.flat() for x in values]
        terms = tuple(term for row in rows for term in row.terms)
        # The costly term first: a bias may be part of its product.
        ordered = tuple(sorted(terms, key=lambda term: term[1].light))
        constants = tuple(c for row in rows for c in row.constants)
        return Value(Row(rows[0].shape, ordered, constants), _last(values))

    def join(self, values: list[Value], dim: int) -> Value:
        """Values one after the other along a dimension of a sample."""
        rest = {(*x.shape[:dim], *x.shape[dim + 1 :]) for x in values}
        if len(rest) > 1 or len({len(x.shape) for x in values}) > 1:
            raise Refused(f"values of shapes {[x.shape for x in values]} joined along {dim}")
        if len(values) == 1:
            return values[0]
        return Value(Join(dim, tuple(x.row for x in values)), _last(values))

    def activate(self, x: Value, phi: Activation, name: str = "") -> Value:
        """The states phi(x)."""
        if not name and self.function:  # a functional call in the user's code: after its weights
            name = f"{x.origin or self.path}.{self.function}".lstrip(".")
        return self._block(
            Block(self._named(name), x.row, phi, phi.natural_shape(x.shape)), x.origin
        )

    def state(self, x: Value, name: str = "") -> Value:
        """x as states, unless it is one block already, its entries moved about at the most."""
        return x if free(x.row) else self.activate(x, Identity(), name)

    def equilibrium(self, layer: Any, x: Value) -> Value:
        """The states of x = phi(A x + B u + b) of an implicit layer, at the input u."""
        u = self.state(x)
        ((source, op),) = u.row.flat().terms
        lead, n = x.shape[:-1], layer.B.shape[0]
        own = len(self._blocks)
        terms = (
            (own, Dense(Live(lambda: layer.A), lead)),
            (source, product(Dense(live(layer, "B"), lead), op)),
        )
        bias = () if layer.b is None else (Constant(live(layer, "b")),)
        row = Row((*lead, n), terms, bias)
        block = Block(self._named(""), row, layer.activation, (*lead, n), layer.equation)
        return self._block(block, self.path)

    def gather(self, x: Value, method: str, *arguments: Any) -> Value:
        """Entries moved about; see `operators.Gather`."""
        return self.apply(Gather(x.shape, method, arguments), x)

    def reshape(self, x: Value, shape: tuple[int, ...]) -> Value:
        """A sample in another shape."""
        return x if x.shape == shape else self.gather(x, "reshape", *shape)

    # ---- the model -------------------------------------------------------------------------------

    def structure(self, output: Value) -> Structure:
        """The blocks, the last one first, as the paper writes them."""
        if not self._blocks:  # an affine network: a model has at least one state
            output = self.activate(output, Identity(), "linear")
        count = len(self._blocks)

        def where(j: int) -> int:
            return j if j == INPUT else count - 1 - j

        blocks = tuple(replace(b, row=b.row.moved(where)) for b in reversed(self._blocks))
        structure = Structure(blocks, output.row.moved(where), self.input.shape)
        # A converter may pass the module's tensors themselves: they, too, are read at each use.
        return rebuilt(structure, lambda w: self._own.get(id(w), w))

    def _block(self, block: Block, origin: str) -> Value:
        self._blocks.append(block)
        return Value(_one(len(self._blocks) - 1, Unchanged(block.shape)), origin)

    def _named(self, name: str) -> str:
        name = name or self.path or "x"
        self._names[name] = self._names.get(name, 0) + 1
        return name if self._names[name] == 1 else f"{name}#{self._names[name]}"

    def _behind(self, op: Operator, constant: Constant, shape: tuple[int, ...]) -> Constant:
        if not constant.factors and not isinstance(op, Scale):
            constant = constant.after(Gather(shape, "expand", shape))
        return constant.after(op)


def _last(values: "tuple[Value, ...] | list[Value]") -> str:
    return next((x.origin for x in reversed(values) if x.origin), "")


def _one(source: int, op: Operator) -> Row:
    return Row(op.out_shape, ((source, op),))


def live(module: nn.Module, name: str, change: Callable[[Tensor], Tensor] | None = None) -> Live:
    """The module's tensor of that name, read at each use, so that it may be trained or replaced."""
    if change is None:
        return Live(
            lambda: getattr(module, name),
            cheap=name in module._parameters or name in module._buffers,
        )
    return Live(lambda: change(getattr(module, name)))


def weight_of(x: Any) -> Weight:
    """A tensor, or one read at each use.

    Raises:
        Refused: it is a state: products of states are not affine.
    """
    if isinstance(x, Value):
        raise Refused(
            "a product of two states (attention, gates, normalisation by statistics of the input "
            "...) is not of the form x = phi(A x + B u + b)"
        )
    return x
