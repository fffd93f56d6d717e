"""What a linear operator offers, and the tensors it is made of."""

import abc
import dataclasses
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Entries of the largest matrix that `dense` makes unless it is told otherwise: 512 MiB in float64.
DENSE_LIMIT = 1 << 26
REGISTRY: dict[str, type["Operator"]] = {}


class Live:
    """A tensor that is read anew at each use: a module's parameter, or what is computed from some.

    An operator that holds one follows the module when it is trained, and builds the graph from the
    weight to the parameters afresh on each call, so that gradients can be taken again and again.

    A deep copy of what holds it holds the tensor as it is then.

    Args:
        read: returns the tensor.
        cheap: whether that takes no computation.
    """

    __slots__ = ("cheap", "read")

    def __init__(self, read: Callable[[], Tensor], *, cheap: bool = False):
        self.read, self.cheap = read, cheap

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        now = self.read()
        return now.detach().clone().requires_grad_(now.requires_grad)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a model that reads the parameters of a network cannot be pickled: use model.save(), or "
            "copy.deepcopy(model), which has tensors of its own"
        )

    def __call__(self) -> Tensor:
        return self.read()


Weight = Tensor | Live


def read(weight: Weight) -> Tensor:
    """The tensor as it is now."""
    return weight if isinstance(weight, Tensor) else weight.read()


class Operator(abc.ABC):
    """M: x -> M x, linear, from tensors of one shape to tensors of another, a sample a row.

    A member is a frozen dataclass that says how it is applied and what |M| is; the transpose, norms
    and the matrix follow. It is registered under its class name, which is how files refer to it.

    Attributes:
        in_shape, out_shape: of one sample, without the batch.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            REGISTRY[cls.__name__] = cls

    @abc.abstractmethod
    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """M x + bias.  # (m, *in_shape) -> (m, *out_shape), bias broadcasts against out_shape"""

    @abc.abstractmethod
    def abs(self) -> "Operator":
        """|M|, entry by entry; of a product or sum of operators, |M1| |M2| or |M1| + |M2|, which is
        an upper bound (equal where no terms cancel)."""

    @property
    @abc.abstractmethod
    def cost(self) -> int:
        """Multiplications for one sample; 0 where entries are only moved or added."""

    identity = False  # whether M x = x
    zero = False  # whether M x = 0
    diagonal = False  # whether M scales every entry by itself

    @property
    def light(self) -> bool:
        """Whether applying it costs nothing, or a pass over its output at the most."""
        return self.cost <= math.prod(self.out_shape)

    def transpose(self, g: Tensor) -> Tensor:
        """M^T g.  # (m, *out_shape) -> (m, *in_shape)"""
        zero = g.new_zeros(g.shape[0], *self.in_shape)
        return torch.func.vjp(self.apply, zero)[1](g)[0]

    def norm(self, order: float = math.inf) -> float:
        """The operator norm induced by the infinity norm, or the 1-norm, from above.

        It is max_i sum_j |M_ij|, computed from `abs()` in one product, in float64, rounded up.

        Args:
            order: `math.inf` (largest row sum of |M|) or 1 (largest column sum).

        Raises:
            ValueError: another order.
        """
        if order not in (1, math.inf):
            raise ValueError(f"order: got {order!r}, expected math.inf or 1.")
        kind = next(self.tensors(), torch.empty(0)).new_ones((), dtype=torch.float64)
        with torch.no_grad():
            size = rebuilt(self, lambda w: read(w).detach().double()).abs()
            if order == 1:
                sums = size.transpose(kind.expand(1, *self.out_shape))
            else:
                sums = size.apply(kind.expand(1, *self.in_shape))
        # Each is a sum of at most so many terms >= 0, and is off by as many roundings at the most.
        terms = max(math.prod(self.in_shape), math.prod(self.out_shape)) + 4
        return float(sums.amax()) * (1 + terms * 2.0**-52) if sums.numel() else 0.0

    def dense(
        self,
        limit: int = DENSE_LIMIT,
        *,
        dtype: torch.dtype | None = None,
        device: "torch.device | None" = None,
    ) -> Tensor:
        """The matrix, of samples flattened.  # (prod(out_shape), prod(in_shape))

        Args:
            limit: how many entries it may have.
            dtype, device: for operators without tensors of their own.

        Raises:
            ValueError: it would have more; the message says how many.
        """
        rows, columns = math.prod(self.out_shape), math.prod(self.in_shape)
        require_small(rows, columns, limit)
        own = next(self.tensors(), torch.empty(0, dtype=dtype, device=device))
        kind: dict[str, Any] = {"dtype": dtype or own.dtype, "device": device or own.device}
        step = max(1, min(columns, (1 << 22) // max(1, rows + columns)))
        parts = []
        for start in range(0, columns, step):
            size = min(step, columns - start)
            unit = torch.zeros(size, columns, **kind)
            unit[range(size), range(start, start + size)] = 1.0
            image = self.apply(unit.view(size, *self.in_shape))
            parts.append(image.reshape(size, rows))
        return torch.cat(parts).mT if parts else torch.zeros(rows, 0, **kind)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it holds, as they are now."""
        return map(read, weights(self))

    @property
    def matrix(self) -> Tensor | None:
        """The matrix that it multiplies the last dimension by, where that is all; else None."""
        return None

    def as_module(self, bias: Tensor | None) -> nn.Module | None:
        """A module of torch that computes M x + bias with parameters of its own, if there is one."""
        return None

    def __repr__(self) -> str:
        return f"{self.label} {_shape(self.in_shape)} -> {_shape(self.out_shape)}"

    @property
    def label(self) -> str:
        """Its kind in a word or two, for reports and pictures."""
        return type(self).__name__.lower()


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "1"


def require_small(rows: int, columns: int, limit: int) -> None:
    """Refuse a matrix that nobody would want in memory.

    Raises:
        ValueError: it has more than `limit` entries.
    """
    if rows * columns > limit:
        raise ValueError(
            f"dense: the matrix would be {rows} x {columns}, {rows * columns:.3g} entries, more "
            f"than the limit of {limit:.3g}; pass dense(limit=...) to make it all the same."
        )


def rebuilt(thing: Any, change: Callable[[Weight], Any]) -> Any:
    """The same object with each tensor in it, and in what it is made of, replaced by change(it).

    A tensor that occurs several times is changed once: what shared a weight shares the new one.

    Args:
        thing: an operator, or any frozen dataclass, tuple or dict of such.
        change: from a tensor or `Live` to what stands in its place.
    """
    known: dict[int, Any] = {}

    def new(part: Any) -> Any:
        if isinstance(part, Tensor | Live):
            if id(part) not in known:
                known[id(part)] = change(part)
            return known[id(part)]
        if isinstance(part, tuple):
            items = tuple(map(new, part))
            return part if all(map(operator.is_, part, items)) else items
        if isinstance(part, dict):
            return {key: new(value) for key, value in part.items()}
        if not dataclasses.is_dataclass(part):
            return part
        fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
        changed = {name: new(value) for name, value in fields.items()}
        if all(changed[name] is fields[name] for name in fields):
            return part
        return dataclasses.replace(part, **changed)  # type: ignore[type-var]

    return new(thing)


def weights(thing: Any) -> list[Weight]:
    """The tensors that an object is made of, in the order of `rebuilt`, each once."""
    found: list[Weight] = []

    def see(weight: Weight) -> Weight:
        found.append(weight)
        return weight

    rebuilt(thing, see)
    return found


def added(y: Tensor, bias: Tensor | None) -> Tensor:
    """y + bias."""
    return y if bias is None else y + bias
