"""Conformance of every operator: all that it answers is what its matrix says."""

import math
from dataclasses import dataclass

import problems
import pytest
import torch
import torch.nn.functional as F
from problems import rand
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from implicitdl import operators
from implicitdl.operators import (
    DENSE_LIMIT,
    REGISTRY,
    Convolution,
    Dense,
    Gather,
    Grid,
    Identity,
    Live,
    LowRank,
    Operator,
    Pooling,
    Product,
    Scale,
    Space,
    Sparse,
    Sum,
    Zero,
    product,
    read,
    rebuilt,
    total,
    weights,
)


def convolution(kind: type[nn.Module], i: int, o: int, kernel: int, *size: int, **options):
    """The operator of a module of torch on images of that size, and the module."""
    torch.manual_seed(0)
    module = kind(i, o, kernel, bias=False, **options)
    shape = (i, *size)
    out = tuple(module(torch.zeros(1, *shape)).shape[1:])
    more = (
        {"transposed": True, "output_padding": module.output_padding} if module.transposed else {}
    )
    return Convolution(
        module.weight.detach(), shape, out, module.stride, module.padding, module.dilation,
        module.groups, **more,
    )  # fmt: skip


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Also of no dimensions."""
    return problems.randn(math.prod(shape), seed=seed).view(shape)


def flat(x: Tensor) -> Tensor:
    """A sample a row, one of no dimensions too."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def live(weight: Tensor) -> Live:
    return Live(lambda: weight)


def grid(padded: bool) -> Grid:
    """Two rows of blocks by three columns, an entry a product and one a convolution."""
    sizes = (9, 15, 5) if padded else (8, 12, 4)
    columns = [Space(n, s, k) for n, s, k in zip("abc", ((2, 4), (12,), (4,)), sizes, strict=True)]
    rows = [Space("d", (3, 2), 7 if padded else 6), Space("e", (4,), 4)]
    entries = {
        (0, 0): convolution(nn.Conv1d, 2, 3, 3, 4),
        (1, 2): Scale(randn(4), (4,)),
        (0, 1): product(Gather((6,), "reshape", (3, 2)), Dense(randn(6, 12, seed=3))),
        (1, 1): LowRank(randn(4, 2), randn(12, 2, seed=1)),
    }
    return Grid(tuple(rows), tuple(columns), entries)


GATHERS = [
    ((2, 6), "reshape", (3, 4)),
    ((2, 3, 4), "permute", (2, 0, 1)),
    ((2, 3), "pad", ((1, 2), "constant")),
    ((2, 3), "pad", ((-1, 2, 1, 0), "constant")),
    ((2, 4), "pad", ((2, 1), "reflect")),
    ((2, 4), "pad", ((2, 1), "circular")),
    ((2, 3, 4), "pad", ((1, 1, 2, 0), "replicate")),
    ((4, 5), "index", ((1, 4, 2), (None, None, None))),
    ((4, 5), "index", (None, -1, (None, None, 2))),
    ((3,), "index", (2,)),
    ((3, 1), "expand", (2, 3, 4)),
    ((), "expand", (3,)),
    ((2, 3), "repeat", (2, 1)),
    ((2, 3), "place", (0, 1, 4)),
    ((2, 3), "place", (1, 0, 3)),
    ((2, 3, 4), "flip", (0, 2)),
    ((3, 4), "roll", ((1, -2), (0, 1))),
    ((2, 3), "nearest", (7,)),
    ((2, 3, 4), "nearest", (6, 2)),
    ((1, 2, 2, 2), "nearest", (4, 2, 3)),
    ((4, 2, 3), "pixel_shuffle", (2,)),
    ((1, 4, 6), "pixel_unshuffle", (2,)),
]
POOLINGS = [
    ((2, 7), "avg_pool1d", ((3,), (2,), (1,), True, True)),
    ((2, 7), "avg_pool1d", ((3,), (2,), (1,), True, False)),
    ((1, 5, 6), "avg_pool2d", ((2, 3), (2, 2), (1, 0), True, False, None)),
    ((1, 5, 6), "avg_pool2d", (2, 2, 0, False, True, 3)),
    ((1, 4, 3, 4), "avg_pool3d", (2, 1, 1)),
    ((2, 7), "adaptive_avg_pool1d", (3,)),
    ((2, 5, 6), "adaptive_avg_pool2d", ((2, 4),)),
    ((1, 4, 3, 5), "adaptive_avg_pool3d", (2,)),
    ((2, 3, 4), "mean", ((0, 2), False)),
    ((2, 3, 4), "mean", ((1,), True)),
    ((2, 3, 4), "sum", ((1, 2), False)),
    ((2, 3), "interpolate", ((5,), "linear", False)),
    ((1, 3, 3), "interpolate", ((6, 5), "bilinear", True)),
    ((1, 4, 4), "interpolate", ((2, 3), "bilinear", False)),
    ((1, 2, 2, 3), "interpolate", ((3, 4, 4), "trilinear", False)),
    ((1, 5, 4), "interpolate", ((2, 3), "area", None)),
]
W = randn(3, 5)
EXACT: list[Operator] = [
    Dense(W),
    Dense(W, lead=(2, 4)),
    Dense(live(W)),
    Sparse.of(W * (W > 0)),
    Sparse.of(torch.zeros(2, 3)),
    LowRank(randn(4, 2), randn(6, 2, seed=1)),
    Scale(randn(3, 1, 1), (3, 2, 4)),
    Scale(randn(3, 1, 1), (3, 2, 4), -2.0),
    Scale(randn(4), (3, 4)),
    Scale(randn(2, 3), (2, 3), 0.5),
    Scale(randn(), (2, 3)),
    Scale(None, (2, 3), -1.5),
    Scale(None, (2,)),
    Identity((2, 3)),
    Identity(()),
    Zero((2, 3), (4,)),
    convolution(nn.Conv1d, 2, 3, 3, 6, stride=2, padding=1),
    convolution(nn.Conv1d, 3, 3, 5, 5, padding="same"),
    convolution(nn.Conv2d, 2, 3, 3, 5, 4),
    convolution(nn.Conv2d, 4, 6, (3, 2), 5, 4, padding=(2, 0), dilation=(2, 1), groups=2),
    convolution(nn.Conv2d, 3, 3, 3, 4, 3, padding="same", dilation=2, groups=3),
    convolution(nn.Conv2d, 2, 2, 2, 4, 3, padding="valid", stride=(1, 2)),
    convolution(nn.Conv3d, 1, 2, 2, 3, 4, 3, stride=(1, 2, 1), padding=1),
    convolution(nn.ConvTranspose1d, 2, 3, 3, 4, stride=2, output_padding=1),
    convolution(nn.ConvTranspose2d, 4, 2, 3, 3, 2, stride=2, padding=1, output_padding=1, groups=2),
    convolution(nn.ConvTranspose2d, 2, 3, (2, 3), 3, 3, dilation=(2, 1)),
    convolution(nn.ConvTranspose3d, 2, 1, 2, 2, 3, 2, stride=(2, 1, 2)),
    *[Gather(*given) for given in GATHERS],
    *[Pooling(*given) for given in POOLINGS],
    grid(padded=False),
]
BOUNDED: list[Operator] = [
    product(Dense(W), Scale(randn(5), (5,)), Dense(randn(5, 4, seed=9))),
    product(convolution(nn.Conv2d, 2, 3, 3, 5, 4), Pooling((2, 6, 5), "avg_pool2d", (2, 1))),
    total(Dense(W), Dense(randn(3, 5, seed=5)), LowRank(randn(3, 1), randn(5, 1))),
    total(convolution(nn.Conv1d, 2, 2, 3, 6, padding=1), Identity((2, 6))),
    product(Dense(W), total(Identity((5,)), Dense(randn(5, 5)))),
    grid(padded=True),
]
EVERY = EXACT + BOUNDED
FLOATING = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def name(op: Operator) -> str:
    return repr(op).replace(" ", "_")


every = pytest.mark.parametrize("op", EVERY, ids=name)
exact = pytest.mark.parametrize("op", EXACT, ids=name)


def matrix(op: Operator) -> Tensor:
    """Column by column, one at a time."""
    units = torch.eye(math.prod(op.in_shape)).view(-1, *op.in_shape)
    return torch.stack([op.apply(unit[None])[0].flatten() for unit in units], 1)


def inputs(op: Operator, m: int = 3) -> tuple[Tensor, Tensor]:
    return randn(m, *op.in_shape, seed=11), randn(m, *op.out_shape, seed=12)


def close(a: Tensor, b: Tensor, allowed: float = 1e-13) -> None:
    torch.testing.assert_close(a, b, rtol=allowed, atol=allowed)


# ---- what is tested --------------------------------------------------------------------------------


def test_every_member_and_method_is_tested():
    own = {name for name, cls in REGISTRY.items() if cls.__module__.startswith("implicitdl.")}
    assert {type(op).__name__ for op in EVERY} == own
    for table, cls in ((operators.fixed._GATHER, Gather), (operators.fixed._POOLING, Pooling)):
        assert {op.method for op in EVERY if type(op) is cls} == set(table)


# ---- what each is asked for ------------------------------------------------------------------------


@every
def test_apply_is_the_product_with_the_matrix(op):
    x, g = inputs(op)
    M = op.dense()
    assert M.shape == (g[0].numel(), x[0].numel())
    close(M, matrix(op))
    y = op.apply(x)
    assert y.shape == g.shape
    close(flat(y), flat(x) @ M.mT)
    if "unshuffle" not in op.label:  # which torch does not do for no samples
        assert op.apply(x[:0]).shape == (0, *op.out_shape)
    close(op.apply(x[:1]), y[:1])


@every
def test_a_bias_is_added_as_it_broadcasts(op):
    """A number, one number a channel, one a column, one an entry, with and without a batch of one:
    where there are as many columns as channels, the shape alone tells which is meant."""
    x, _ = inputs(op)
    y, out = op.apply(x), op.out_shape
    shapes = [(), (1,), out, (1, *out)]
    if len(out) > 1:
        shapes += [(out[0],) + (1,) * (len(out) - 1), out[-1:], (1,) * (len(out) - 1) + out[-1:]]
    for k, shape in enumerate(shapes):
        bias = randn(*shape, seed=20 + k)
        close(op.apply(x, bias), y + bias)


@pytest.mark.parametrize("op", [
    Convolution(randn(3, 3, 1), (3, 3), (3, 3), (1,), (0,), (1,)),
    Convolution(randn(3, 2, 1, 1), (2, 4, 3), (3, 4, 3), (1, 1), (0, 0), (1, 1)),
    Scale(randn(3, 1), (3, 3)),
    Scale(randn(3, 1, 1), (3, 4, 3)),
    Scale(randn(4, 1, 1), (4, 2, 2)),
    Scale(randn(1, 1, 1), (1, 2, 3)),
    Dense(randn(3, 3), (3,)),
], ids=name)  # fmt: skip
def test_a_bias_with_as_many_numbers_as_there_are_channels(op):
    x, _ = inputs(op)
    y, out = op.apply(x), op.out_shape
    ones = (1,) * (len(out) - 1)
    shapes = [(out[0], *ones), out[-1:], (*ones, out[-1]), (out[0],) if out[0] == out[-1] else ()]
    shapes += [(2, 2), (1, 2, 2)] if out == (4, 2, 2) else []
    for k, shape in enumerate(shapes):
        bias = randn(*shape, seed=20 + k)
        close(op.apply(x, bias), y + bias)


@every
def test_a_number_as_bias_leaves_float32_alone(op):
    """Numbers are float64 without dimensions, so that they are not rounded."""
    op = rebuilt(op, lambda weight: read(weight).float())
    x = inputs(op)[0].float()
    y, bias = op.apply(x), torch.full((), 0.1)
    assert bias.dtype == torch.float64 and y.dtype == torch.float32
    got = op.apply(x, bias)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, y + 0.1)


@every
def test_transpose(op):
    x, g = inputs(op)
    close(flat(op.transpose(g)), flat(g) @ op.dense())
    assert op.transpose(g).shape == x.shape
    left = flat(op.apply(x) * g).sum(1)
    close(left, flat(x * op.transpose(g)).sum(1), 1e-12)
    with torch.no_grad():
        close(flat(op.transpose(g)), flat(g) @ op.dense())


@every
def test_absolute_values_and_norms(op):
    M = op.dense().abs()
    size = op.abs().dense()
    rows, columns = M.sum(1).max(), M.sum(0).max()
    bounds = (torch.tensor(op.norm()), torch.tensor(op.norm(1)))
    assert op.norm() == op.norm(math.inf) and type(op.norm()) is float
    if any(op is o for o in EXACT):
        close(size, M)
        close(torch.stack(bounds), torch.stack([rows, columns]))
    else:
        assert bool((size >= M - 1e-14).all())
        assert float(bounds[0] - rows) >= -1e-14 and float(bounds[1] - columns) >= -1e-14
        close(bounds[0], size.sum(1).max())
        close(bounds[1], size.sum(0).max())
    for order in (2, 0, "fro", None):
        with pytest.raises(ValueError, match="order: got .* expected math.inf or 1"):
            op.norm(order)


@every
def test_facts(op):
    x, _ = inputs(op)
    M = op.dense()
    square = M.shape[0] == M.shape[1] and op.in_shape == op.out_shape
    if op.identity:
        assert square and torch.equal(op.apply(x), x)
    if op.zero:
        assert not M.any()
    if op.diagonal:
        assert square and torch.equal(M, torch.diag(M.diagonal()))
    assert op.cost >= 0 and isinstance(op.label, str)
    assert repr(op).endswith(" -> " + ("x".join(map(str, op.out_shape)) or "1"))
    if isinstance(op, Gather):
        assert op.cost == 0 and bool(((M == 0) | (M == 1)).all())
        assert bool((M.sum(1) <= 1).all())
    if isinstance(op, Dense | Convolution):
        entries = int((matrix(rebuilt(op, lambda w: torch.ones_like(read(w)))) != 0).sum())
        within = op.cost >= entries if isinstance(op, Convolution) else op.cost == entries
        assert within and not op.light


@every
def test_the_matrix_is_refused_where_it_would_be_large(op):
    rows, columns = op.dense().shape
    if rows * columns < 2:
        return
    with pytest.raises(ValueError, match=f"would be {rows} x {columns}.*more than the limit"):
        op.dense(limit=rows * columns - 1)
    close(op.dense(limit=rows * columns), op.dense())


def test_a_large_matrix_is_refused_by_default():
    n = math.isqrt(DENSE_LIMIT) + 1
    with pytest.raises(ValueError, match=rf"{n} x {n}, 6.71e\+07 entries.*pass dense\(limit="):
        Identity((n,)).dense()
    wide = Convolution(randn(1, 1, 3), (1, 10000), (1, 10000), (1,), (1,), (1,))
    with pytest.raises(ValueError, match=r"10000 x 10000, 1e\+08"):
        wide.dense()
    assert float(wide.norm()) == pytest.approx(float(read(wide.weight).abs().sum()))
    tall = Convolution(randn(1, 1, 3), (1, 3000), (1, 3000), (1,), (1,), (1,))
    band = tall.dense()  # in several parts
    assert int((band != 0).sum()) == 3 * 3000 - 2
    close(band.diagonal(), read(tall.weight)[0, 0, 1].expand(3000))


def test_the_kind_of_a_matrix_without_weights():
    for op in (Identity((2,)), Gather((2, 2), "reshape", (4,)), Zero((2,), (3,))):
        assert op.dense(dtype=torch.float32).dtype == torch.float32
        assert op.dense().dtype == torch.float64
    assert Grid((Space("a", (2,)),), (Space("b", (3,)),), {}).dense(dtype=torch.float32).dtype == (
        torch.float32
    )
    assert Dense(W.float()).dense().dtype == torch.float32
    assert Scale(W[0].float(), (5,)).dense().dtype == torch.float32


# ---- gradients -------------------------------------------------------------------------------------


def held(op: Operator) -> list[Tensor]:
    return [read(w).detach().clone().requires_grad_() for w in weights(op)]


def with_weights(op: Operator, new: tuple[Tensor, ...]) -> Operator:
    table = dict(zip(map(id, weights(op)), new, strict=True))
    return rebuilt(op, lambda w: table[id(w)])


@every
def test_gradients_of_apply_and_transpose(op):
    x, g = (t[:2].clone().requires_grad_() for t in inputs(op))
    own = held(op)
    bias = randn(*op.out_shape, seed=4).requires_grad_()
    assert gradcheck(lambda x, b, *w: with_weights(op, w).apply(x, b), (x, bias, *own))
    assert gradcheck(lambda g, *w: with_weights(op, w).transpose(g), (g, *own))


@pytest.mark.parametrize("op", [
    Dense(W), Scale(randn(3, 1, 1), (3, 2, 2)), LowRank(randn(3, 2), randn(4, 2)),
    convolution(nn.Conv2d, 1, 2, 2, 3, 3), convolution(nn.ConvTranspose1d, 1, 2, 2, 3),
    Gather((2, 4), "pad", ((2, 1), "reflect")), Pooling((2, 5), "avg_pool1d", (2,)),
    BOUNDED[0], BOUNDED[3],
], ids=name)  # fmt: skip
def test_second_gradients(op):
    x, _ = (t[:2].clone().requires_grad_() for t in inputs(op))
    bias = randn(op.out_shape[0], *(1,) * (len(op.out_shape) - 1)).requires_grad_()
    assert gradgradcheck(lambda x, b, *w: with_weights(op, w).apply(x, b), (x, bias, *held(op)))


@FLOATING
@every
def test_transforms(op):
    x, g = inputs(op, 4)
    bias = randn(*op.out_shape, seed=5)
    close(torch.func.vmap(lambda t: op.apply(t[None], bias)[0])(x), op.apply(x, bias))
    close(torch.func.vmap(lambda t: op.transpose(t[None])[0])(g), op.transpose(g))
    jacobian = torch.func.jacrev(lambda t: op.apply(t[None])[0].flatten())(x[0])
    close(jacobian.reshape(op.dense().shape), op.dense())
    tangent = torch.func.jvp(lambda t: op.apply(t, bias), (x,), (x,))[1]
    close(tangent, op.apply(x))
    samples = torch.func.vmap(lambda t: op.apply(t, bias))(x[None].expand(2, *x.shape))
    close(samples, op.apply(x, bias).expand(2, *g.shape))


# ---- weights ---------------------------------------------------------------------------------------


def test_live_is_read_at_each_use():
    layer = nn.Linear(3, 2, bias=False)
    own = Live(lambda: 2 * layer.weight)
    reads = []
    op = product(Dense(Live(lambda: (reads.append(1), layer.weight)[1])), Scale(None, (3,), 2.0))
    x = randn(4, 3)
    before = op.apply(x)
    with torch.no_grad():
        layer.weight.mul_(-3.0)
    close(op.apply(x), -3 * before)
    assert len(reads) >= 2 and torch.equal(own(), 2 * layer.weight)
    layer.weight = nn.Parameter(randn(2, 3, seed=8))
    close(op.apply(x), x @ (2 * layer.weight).mT)
    for _ in range(2):  # the graph is a new one each time
        layer.weight.grad = None
        Dense(own).apply(x).sum().backward()
        close(layer.weight.grad, 2 * x.sum(0).expand(2, 3))
    assert torch.equal(read(own), own()) and read(W) is W


@every
def test_all_its_weights_may_be_live(op):
    own = held(op)
    turned = with_weights(op, tuple(Live(lambda t=t: t) for t in own))
    assert all(isinstance(w, Live) for w in weights(turned))
    x, g = inputs(op)
    for a, b in (
        (turned.apply(x), op.apply(x)), (turned.transpose(g), op.transpose(g)),
        (turned.dense(), op.dense()), (turned.abs().dense(), op.abs().dense()),
    ):  # fmt: skip
        close(a, b)
    assert turned.norm() == pytest.approx(op.norm()) and repr(turned) == repr(op)
    assert list(map(id, turned.tensors())) == list(map(id, own))


def test_what_shared_a_weight_shares_the_new_one():
    shared, other = randn(3, 3), Live(lambda: W)
    thing = (
        total(Dense(shared), product(Dense(shared), Dense(shared))),
        {"a": Scale(shared[0], (3,)), "b": Dense(other)},
        ("left alone", 3, None, Dense(other)),
    )
    calls = []

    def change(weight):
        calls.append(weight)
        return read(weight) + 1

    new = rebuilt(thing, change)
    assert len(calls) == 3 == len(weights(thing)) and weights(thing)[0] is shared
    first, second = new[0].terms
    assert first.weight is second.factors[0].weight is second.factors[1].weight
    assert torch.equal(first.weight, shared + 1)
    assert new[1]["b"].weight is new[2][3].weight and new[2][:3] == thing[2][:3]
    assert weights(rebuilt(thing, lambda weight: weight)) == weights(thing)
    whole = total(Dense(shared), Identity((3,)))
    assert rebuilt(whole, lambda weight: weight) is whole


# ---- products and sums -----------------------------------------------------------------------------


def test_products_leave_out_what_does_nothing():
    a, b, one = Dense(randn(2, 3)), Dense(randn(3, 4)), Identity((3,))
    whole = product(a, one, b)
    assert isinstance(whole, Product) and whole.factors == (a, b)
    assert product(whole, Identity((4,))).factors == (a, b) and product(one, one) is one
    assert product(a, one) is a and product(one) is one
    close(whole.dense(), a.dense() @ b.dense())
    nothing = product(a, Zero((5,), (3,)), Dense(randn(5, 2)))
    assert nothing.zero and (nothing.in_shape, nothing.out_shape) == ((2,), (2,))
    assert whole.cost == a.cost + b.cost and not whole.light
    assert product(Scale(None, (3,), 2.0), Gather((3,), "flip", (0,))).light
    with pytest.raises(ValueError, match=r"product: dense 3 -> 2 after dense 3 -> 2, expected \(3"):
        product(a, a)


def test_sums_leave_out_zeros():
    a, b, nothing = Dense(randn(2, 3)), Dense(randn(2, 3, seed=1)), Zero((3,), (2,))
    whole = total(total(a, nothing), b)
    assert isinstance(whole, Sum) and whole.terms == (a, b) and total(nothing, a) is a
    assert total(nothing, nothing).zero and total(a) is a
    close(whole.dense(), a.dense() + b.dense())
    assert whole.cost == a.cost + b.cost and not whole.light
    assert total(Scale(None, (3,), 2.0), Identity((3,))).light
    with pytest.raises(
        ValueError, match="total: dense 2 -> 2 beside dense 3 -> 2, expected the same"
    ):
        total(a, Dense(randn(2, 2)))


def test_bounds_are_equal_where_nothing_cancels():
    parts = [Dense(rand(3, 3)), Dense(rand(3, 3, seed=1))]
    for op in (product(*parts), total(*parts)):
        M = op.dense()
        close(op.abs().dense(), M)
        assert op.norm() == pytest.approx(float(M.sum(1).max()))
    gone = total(parts[0], Dense(-parts[0].weight))
    assert not gone.dense().any() and gone.norm() == pytest.approx(2 * parts[0].norm())


# ---- fixed operators -------------------------------------------------------------------------------


@pytest.mark.parametrize("cls, given", [(Gather, g) for g in GATHERS] + [(Pooling, p) for p in POOLINGS],
                         ids=str)  # fmt: skip
def test_methods_are_those_of_torch(cls, given):
    shape, method, arguments = given
    x, op = randn(2, *shape), cls(shape, method, arguments)
    assert op.out_shape == tuple(op.apply(x).shape[1:])
    own = {
        "flip": lambda t, *dims: t.flip([k + 1 for k in dims]),
        "permute": lambda t, *dims: t.permute(0, *(k + 1 for k in dims)),
        "reshape": lambda t, *sizes: t.reshape(2, *sizes),
        "repeat": lambda t, *times: t.repeat(1, *times),
        "roll": lambda t, by, dims: t.roll(by, [k + 1 for k in dims]),
        "mean": lambda t, dims, keep: t.mean([k + 1 for k in dims], keep),
        "sum": lambda t, dims, keep: t.sum([k + 1 for k in dims], keep),
        "nearest": lambda t, *size: F.interpolate(t, size, mode="nearest"),
        "interpolate": lambda t, size, mode, corners: F.interpolate(
            t, size, mode=mode, align_corners=corners
        ),
    }
    if method not in ("index", "expand", "place"):  # which are below
        function = own.get(method) or getattr(F, method)
        assert torch.equal(op.apply(x), function(x, *arguments))


def test_methods_of_its_own():
    x = randn(2, 4, 5)
    at = Gather((4, 5), "index", ((1, 4, 2), (None, None, None)))
    assert torch.equal(at.apply(x), x[:, 1:4:2, :])
    assert torch.equal(
        Gather((4, 5), "index", (None, -1, (None, None, 2))).apply(x), x[:, None, -1, ::2]
    )
    wide = Gather((3, 1), "expand", (2, 3, 4)).apply(x[:, :3, :1])
    assert torch.equal(wide, x[:, None, :3, :1].expand(2, 2, 3, 4))
    placed = Gather((4, 5), "place", (1, 2, 9)).apply(x)
    assert placed.shape == (2, 4, 9) and torch.equal(placed[..., 2:7], x)
    assert not placed[..., :2].any() and not placed[..., 7:].any()


@pytest.mark.parametrize("act, words", [
    (lambda: Gather((2,), "reshap", (2,)), "Did you mean 'reshape'"),
    (lambda: Gather((2,), "mean", ((0,), False)), "method: got 'mean'"),
    (lambda: Pooling((2,), "reshape", (2,)), "method: got 'reshape'"),
    (lambda: Pooling((2, 4), "max_pool1d", (2,)), "method: got 'max_pool1d'"),
    (lambda: Gather((2, 3), "reshape", (4,)), r"reshape: \(4,\) does not fit \(2, 3\)"),
    (lambda: Gather((2, 3), "permute", (0,)), "permute: .* does not fit"),
    (lambda: Gather((2, 3), "index", (5,)), "index: .* does not fit"),
    (lambda: Gather((2, 3), "roll", ((1,),)), "roll: .* does not fit"),
    (lambda: Gather((3, 2, 2), "pixel_shuffle", (2,)), "pixel_shuffle: .* does not fit"),
    (lambda: Gather((2, 3), "pad", ((3, 3), "reflect")), "pad: .* does not fit"),
    (lambda: Pooling((2, 3), "mean", ((4,), False)), "mean: .* does not fit"),
    (lambda: Pooling((3,), "avg_pool2d", (2,)), "avg_pool2d: .* does not fit"),
    # Dimensions are those of a sample: -1 would be the batch.
    (lambda: Gather((2, 3), "flip", (-1,)), "flip: .* does not fit"),
    (lambda: Gather((2, 3), "roll", ((1,), (-1,))), "roll: .* does not fit"),
    (lambda: Gather((2,), "repeat", (2, 3)), "repeat: .* does not fit"),
    (lambda: Pooling((2, 3), "mean", ((-1,), True)), "mean: .* does not fit"),
    (lambda: Pooling((2, 3), "sum", ((-1,), False)), "sum: .* does not fit"),
], ids=lambda v: "" if callable(v) else v)  # fmt: skip
def test_methods_and_arguments_that_do_not_fit(act, words):
    with pytest.raises(ValueError, match=words):
        act()


# ---- grids -----------------------------------------------------------------------------------------


def test_a_padded_space():
    s = Space("a", (2, 3), 8)
    x = randn(4, 2, 3)
    assert torch.equal(s.flat(x)[:, :6], flat(x)) and not s.flat(x)[:, 6:].any()
    assert torch.equal(s.block(s.flat(x)), x)
    assert Space("a", (2, 3)).size == 6 and Space("a", ()).size == 1
    with pytest.raises(ValueError, match="a: got size 5 for 6 entries"):
        Space("a", (2, 3), 5)


def test_the_blocks_of_a_grid():
    g = grid(padded=True)
    assert g.shape == (11, 29) and g.in_shape == (29,) and g.out_shape == (11,)
    assert g[0, 1] is g.entries[0, 1] is g[-2, -2] and g[1, 0].zero
    assert (g[1, 0].in_shape, g[1, 0].out_shape) == ((2, 4), (4,))
    M = g.dense()
    close(M[:6, 9:21], g[0, 1].dense())
    close(M[7:, 24:28], torch.diag(g[1, 2].dense().diagonal()))
    assert not M[6].any() and not M[:, 8].any() and not M[:, 21:24].any() and not M[:, 28].any()
    close(g.norms(), torch.tensor([[g[i, j].norm() for j in range(3)] for i in range(2)]))
    assert "2 x 3 blocks, 4 not" in repr(g)
    assert g.cost == sum(op.cost for op in g.entries.values())
    with pytest.raises(ValueError, match=r"entry \(0, 0\): got .*expected \(\(2, 4\), \(3, 2\)\)"):
        Grid(g.rows, g.columns, {(0, 0): Dense(W)})


def test_a_grid_without_entries_is_zero():
    g = Grid((Space("a", (2,)),), (Space("b", (3,)),), {})
    x = randn(4, 3)
    assert torch.equal(g.apply(x), torch.zeros(4, 2)) and torch.equal(g.dense(), torch.zeros(2, 3))
    assert torch.equal(g.transpose(x[:, :2]), torch.zeros(4, 3)) and g.norm() == 0.0
    assert torch.equal(g.apply(x, torch.ones(2)), torch.ones(4, 2))


# ---- members of others -----------------------------------------------------------------------------


def test_a_new_member_needs_three_methods():
    @dataclass(frozen=True, eq=False, repr=False)
    class _Difference(Operator):
        """x -> x_(i+1) - x_i."""

        n: int
        sign: float = -1.0
        cost = 0

        @property
        def in_shape(self):
            return (self.n,)

        @property
        def out_shape(self):
            return (self.n - 1,)

        def apply(self, x, bias=None):
            y = x[:, 1:] + self.sign * x[:, :-1]
            return y if bias is None else y + bias

        def abs(self):
            return _Difference(self.n, 1.0)

    op = _Difference(4)
    close(op.dense(), torch.diff(torch.eye(4), dim=0))
    close(op.transpose(randn(2, 3)), randn(2, 3) @ op.dense())
    assert (
        op.norm() == pytest.approx(2.0, rel=1e-14) == op.norm(1)
        and op.light
        and "_Difference" not in REGISTRY
    )
