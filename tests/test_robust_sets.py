"""Uncertainty sets: every support function against cvxpy, against its dual, and by sampling."""

import math

import cvxpy as cp
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from implicitdl.robust import (
    Ball,
    Box,
    Budget,
    Ellipsoid,
    Hull,
    Image,
    Intersection,
    Polytope,
    Sum,
    UncertaintySet,
)
from implicitdl.robust.conic import Conic
from implicitdl.solution import InfeasibleError

K = 3


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positive(*shape, seed=0):
    return 0.2 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def polytope(lead=(), k=K, seed=0):
    """A bounded one, with the origin inside."""
    eye = torch.eye(k).expand(*lead, k, k)
    F = torch.cat([normal(*lead, 4, k, seed=seed), eye, -eye], -2)
    return Polytope(F=F, g=positive(*lead, 4 + 2 * k, seed=seed))


def lens(lead=()):
    centre = 0.3 * normal(*lead, K, seed=4)
    low, high = -positive(*lead, K, seed=5), positive(*lead, K, seed=6)
    return Ball(radius=1.0, centre=centre) & Box(low=low, high=high)


# Each makes a set, or a batch of sets of leading dimensions `lead`.
SETS = {
    "box": lambda *l: Box(low=-positive(*l, K), high=positive(*l, K, seed=1)),
    "ball1": lambda *l: Ball(radius=positive(*l), norm=1, centre=normal(*l, K)),
    "ball2": lambda *l: Ball(radius=positive(*l), centre=normal(*l, K)),
    "ballinf": lambda *l: Ball(radius=positive(*l), norm="inf", dimension=K),
    "ellipsoid": lambda *l: Ellipsoid(shape=normal(*l, K, K), centre=normal(*l, K, seed=1)),
    "flat": lambda *l: Ellipsoid(shape=normal(*l, K, 2)),
    "budget": lambda *l: Budget(
        budget=1 + positive(*l), scale=positive(*l, K, seed=1), centre=normal(*l, K, seed=2)
    ),
    "hull": lambda *l: Hull(points=normal(*l, 6, K)),
    "polytope": lambda *l: polytope(l),
    "sum": lambda *l: SETS["ball2"](*l) + SETS["box"](*l) + SETS["hull"](*l),
    "intersection": lambda *l: lens(l),
    "scaled": lambda *l: positive(*l, seed=7) * polytope(l) + normal(*l, K, seed=8),
    "image": lambda *l: normal(*l, 2, K, seed=9) @ polytope(l),
    "deep": lambda *l: (
        (normal(2, K, seed=9) @ (lens(l) + SETS["budget"](*l))) & Ball(radius=3.0, dimension=2)
    ) + torch.ones(2),
}  # fmt: skip
sets = pytest.mark.parametrize("name", SETS)


def constraints(U, z):
    """The set's definition in cvxpy's own atoms: a derivation that shares nothing with `members`."""
    n = {k: t.numpy() for k, t in U._tensors().items()}
    centre = n.get("centre", 0.0)
    match U:
        case Box():
            return [z >= n["low"], z <= n["high"]]
        case Ball():
            return [cp.norm(z - centre, U.norm) <= n["radius"]]
        case Ellipsoid():
            u = cp.Variable(n["shape"].shape[1])
            return [z == centre + n["shape"] @ u, cp.norm(u) <= 1]
        case Budget():
            u = cp.Variable(U.dimension)
            ball = [cp.norm(u, "inf") <= 1, cp.norm(u, 1) <= n["budget"]]
            return [z == centre + cp.multiply(n["scale"], u), *ball]
        case Hull():
            w = cp.Variable(len(n["points"]), nonneg=True)
            return [z == n["points"].T @ w, cp.sum(w) == 1]
        case Polytope():
            return [n["F"] @ z <= n["g"]]
        case Sum():
            parts = [cp.Variable(U.dimension) for _ in U.parts]
            return [
                z == sum(parts),
                *(c for p, x in zip(U.parts, parts, strict=True) for c in constraints(p, x)),
            ]
        case Intersection():
            return [c for part in U.parts for c in constraints(part, z)]
        case Image():
            w = cp.Variable(U.of.dimension)
            image = (n["matrix"] @ w if "matrix" in n else w) * n.get("factor", 1.0)
            return [z == image + n.get("shift", 0.0), *constraints(U.of, w)]
    raise AssertionError(U)


def minimum(objective, limits):
    return cp.Problem(cp.Minimize(objective), limits).solve(solver=cp.CLARABEL)


@sets
def test_support_is_the_maximum_over_the_set(name):
    U = SETS[name]()
    v = normal(U.dimension, seed=11)
    h = float(U.support(v))
    z = cp.Variable(U.dimension)
    assert h == pytest.approx(-minimum(-v.numpy() @ z, constraints(U, z)), abs=1e-6)
    assert h == pytest.approx(-minimum(-v.numpy() @ z, U.as_cvxpy(z)), abs=1e-6)
    t, limits = U.support_cvxpy(v.numpy())
    assert h == pytest.approx(minimum(t, limits), abs=1e-6)


@sets
def test_epigraph_by_hand_is_the_conic_dual(name):
    """`epigraph` and `counterpart` are written by hand for most sets; duality derives them again."""
    U = SETS[name]()
    v = normal(U.dimension, seed=12)
    h = U.support(v)
    x = torch.cat([v, torch.zeros(1)])
    up = torch.nn.functional.one_hot(torch.tensor(U.dimension), U.dimension + 1).to(v)
    rows = U.counterpart(2)
    forms = [U.members().dual(), U.epigraph()]
    for form in forms:  # the least t with (v, t) in the set
        line = form.pulled(up[:, None], x)
        found, _ = line.minimise(torch.ones(1))
        torch.testing.assert_close(found.value[0, 0], h, atol=1e-7, rtol=1e-7)
    both = torch.cat([torch.zeros(U.dimension, 2), torch.eye(2)])
    found, _ = rows.pulled(both, torch.cat([v, torch.zeros(2)])).minimise(torch.ones(2))
    torch.testing.assert_close(found.value[0, :2], h.expand(2), atol=1e-7, rtol=1e-7)


@sets
def test_counterpart_of_a_set_for_each_row(name):
    m = 3
    U = SETS[name](m)
    v = normal(U.dimension, seed=13)
    h = U.support(v)
    assert h.shape == (m,)
    both = torch.cat([torch.zeros(U.dimension, m), torch.eye(m)])
    form = U.counterpart(m)
    assert form.lead == ()
    found, _ = form.pulled(both, torch.cat([v, torch.zeros(m)])).minimise(torch.ones(m))
    torch.testing.assert_close(found.value[0, :m], h, atol=1e-7, rtol=1e-7)


@sets
def test_worst_is_a_member_that_attains_the_support(name):
    U = SETS[name](2)
    v = normal(4, 2, U.dimension, seed=14)
    z = U.worst(v)
    torch.testing.assert_close((v * z).sum(-1), U.support(v), atol=1e-8, rtol=1e-8)
    assert U.contains(z, 1e-7).all()
    # A step beyond, the way v points, is outside: the test of membership can fail.
    assert not U.contains(z + 0.05 * v / v.norm(dim=-1, keepdim=True), 1e-3).any()


@sets
def test_no_sample_exceeds_the_support(name):
    U = SETS[name](2)
    g = torch.Generator().manual_seed(15)
    v = normal(20, 1, 2, U.dimension, seed=16)
    h = U.support(v)
    for boundary in (False, True):
        z = U.sample(30, boundary=boundary, generator=g)
        assert z.shape == (30, 2, U.dimension)
        assert U.contains(z, 1e-6).all()
        assert ((v * z).sum(-1) <= h + 1e-7).all()
    # And the extreme ones come near it.
    near = (v * z).sum(-1).amax(1)
    assert (near >= h[:, 0] - 0.5 * (h + U.support(-v))[:, 0]).all()


@sets
def test_a_batch_is_its_members(name):
    U = SETS[name](2)
    v = normal(2, U.dimension, seed=17)
    both = U.support(v)
    for i in range(2):
        torch.testing.assert_close(U.row(i).support(v[i]), both[i], atol=1e-9, rtol=1e-9)
    assert U.lead == (2,) and U.row(0).lead == ()
    wide = U.widened()
    assert wide.lead == (2, 1)
    torch.testing.assert_close(wide.support(v[:, None])[:, 0], both, atol=1e-9, rtol=1e-9)


@sets
def test_bounds_are_the_smallest_box(name):
    U = SETS[name](2)
    low, high = U.bounds()
    z = U.sample(40, boundary=True)
    assert (z >= low - 1e-7).all() and (z <= high + 1e-7).all()
    eye = torch.eye(U.dimension)
    torch.testing.assert_close(U.worst(eye[0])[..., 0], high[..., 0], atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(U.worst(-eye[1])[..., 1], low[..., 1], atol=1e-7, rtol=1e-7)


# Each with the tensors that it is made of, to be learned.
LEARNED = {
    "box": (lambda a, b: Box(low=a, high=b), -positive(K), positive(K, seed=1)),
    "ball1": (lambda r, c: Ball(radius=r, norm=1, centre=c), positive(), normal(K)),
    "ball2": (lambda r, c: Ball(radius=r, centre=c), positive(), normal(K)),
    "ballinf": (lambda r, c: Ball(radius=r, norm="inf", centre=c), positive(), normal(K)),
    "ellipsoid": (lambda L, c: Ellipsoid(shape=L, centre=c), normal(K, K), normal(K, seed=1)),
    "covariance": (
        lambda L, r: Ellipsoid.of_covariance(L @ L.mT + torch.eye(K), r), normal(K, K), positive()
    ),
    "budget": (
        lambda g, s, c: Budget(budget=g, scale=s, centre=c),
        1 + positive(), positive(K, seed=1), normal(K, seed=2),
    ),
    "hull": (lambda p: Hull(points=p), normal(6, K)),
    "polytope": (lambda F, g: Polytope(F=F, g=g), polytope().F, polytope().g),
    "intersection": (
        lambda r, a, b: Ball(radius=r, dimension=K) & Box(low=a, high=b),
        torch.tensor(1.0), -positive(K), positive(K, seed=1),
    ),
    "image": (
        lambda M, r, s, g: r * (M @ Polytope(F=polytope().F, g=g)) + s,
        normal(K, K), positive(), normal(K, seed=3), polytope().g,
    ),
    "sum": (
        lambda L, g: Ellipsoid(shape=L) + Polytope(F=polytope().F, g=g), normal(K, K), polytope().g
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_of_the_support_in_v_and_in_every_tensor(name):
    make, *tensors = LEARNED[name]
    inputs = [t.clone().requires_grad_() for t in (normal(K, seed=18), *tensors)]
    assert gradcheck(lambda v, *t: make(*t).support(v), inputs, eps=1e-5, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["box", "ball2", "ellipsoid", "budget", "hull"])
def test_second_derivatives_of_closed_forms(name):
    make, *tensors = LEARNED[name]
    inputs = [t.clone().requires_grad_() for t in (normal(K, seed=18), *tensors)]
    assert gradgradcheck(lambda v, *t: make(*t).support(v).square(), inputs)


def test_a_solved_support_has_one_derivative_and_says_so():
    v = normal(K, seed=18).requires_grad_()
    (g,) = torch.autograd.grad(lens().support(v).square(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="order"):
        torch.autograd.grad(g.sum(), v)


@pytest.mark.parametrize("name", LEARNED)
def test_worst_is_the_gradient_of_the_support(name):
    make, *tensors = LEARNED[name]
    U, v = make(*tensors), normal(K, seed=18).requires_grad_()
    (g,) = torch.autograd.grad(U.support(v), v)
    torch.testing.assert_close(g, U.worst(v.detach()), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("budget", [0.0, 1.0, 2.0, 3.0, 7.0])
def test_a_whole_budget_has_a_one_sided_derivative(budget):
    v, scale = torch.tensor([3.0, -1.0, 2.0]), torch.ones(3)
    g = torch.tensor(budget, requires_grad=True)
    h = Budget(budget=g, scale=scale).support(v)
    expected = {0.0: 0.0, 1.0: 3.0, 2.0: 5.0, 3.0: 6.0, 7.0: 6.0}[budget]
    slope = {0.0: 0.0, 1.0: 3.0, 2.0: 2.0, 3.0: 1.0, 7.0: 0.0}[budget]
    h.backward()
    assert h.item() == expected and g.grad.item() == slope


def test_a_budget_has_all_its_vertices():
    """Each choice of floor(budget) entries and signs is a member, not just some of them."""
    U = Budget(budget=2.0, scale=torch.ones(3))
    vertices = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3)
    allowed = vertices.abs().sum(-1) <= 2
    assert (U.contains(vertices) == allowed).all() and allowed.sum() == 19
    torch.testing.assert_close(U.support(vertices), (vertices @ vertices[allowed].T).amax(-1))


@pytest.mark.parametrize("name", ["box", "ball1", "ball2", "ballinf", "ellipsoid", "budget"])
def test_nothing_is_nan_at_zero(name):
    make, *tensors = LEARNED[name]
    tensors = [t.clone().requires_grad_() for t in tensors]
    v = torch.zeros(K, requires_grad=True)
    U = make(*tensors)
    (U.support(v) + U.worst(v).sum()).backward()
    assert all(torch.isfinite(t.grad).all() for t in (v, *tensors) if t.grad is not None)
    assert U.contains(U.worst(torch.zeros(K))).all()


def test_algebra_is_that_of_support_functions():
    U, V, v = polytope(), lens(), normal(5, K, seed=19)
    M, r, shift = normal(K, K, seed=20), torch.tensor(0.7), normal(K, seed=21)
    h = U.support
    torch.testing.assert_close((U + V).support(v), h(v) + V.support(v))
    torch.testing.assert_close((M @ U).support(v), h(v @ M))
    torch.testing.assert_close((r * U).support(v), r * h(v))
    torch.testing.assert_close((U * 0.7).support(v), r * h(v))
    torch.testing.assert_close((U + shift).support(v), h(v) + v @ shift)
    torch.testing.assert_close((shift + U).support(v), h(v) + v @ shift)
    torch.testing.assert_close((2.0 * (r * U + shift)).support(v), 2 * (r * h(v) + v @ shift))
    assert ((U & V).support(v) <= torch.minimum(h(v), V.support(v)) + 1e-9).all()
    assert len((U + V + U).parts) == 3 and len((U & V & U).parts) == 4  # flat
    for W in (U, V, Ball(radius=1.0, dimension=K), U + V, M @ U):
        nothing = 0.0 * W
        assert nothing.support(v).abs().max() < 1e-12
        assert nothing.contains(torch.zeros(K)) and not nothing.contains(torch.ones(K))


@pytest.mark.parametrize(
    "name", ["box", "ball1", "ball2", "ballinf", "ellipsoid", "budget", "hull", "polytope", "sum"]
)
def test_blocks_are_projections(name):
    m, k = 3, 2
    make = {
        "box": lambda: Box(low=-positive(6), high=positive(6, seed=1)),
        "ball1": lambda: Ball(radius=0.5, norm=1, centre=normal(6)),
        "ball2": lambda: Ball(radius=0.5, centre=normal(6)),
        "ballinf": lambda: Ball(radius=0.5, norm="inf", dimension=6),
        "ellipsoid": lambda: Ellipsoid(shape=normal(6, 6), centre=normal(6, seed=1)),
        "budget": lambda: Budget(budget=1.5, scale=positive(6)),
        "hull": lambda: Hull(points=normal(5, 6)),
        "polytope": lambda: polytope(k=6),
        "sum": lambda: polytope(k=6) + Ball(radius=0.5, dimension=6),
    }[name]
    U, v = make(), normal(m, k, seed=22)
    parts = U.blocks(m)
    assert parts.lead == (m,) and parts.dimension == k
    whole = torch.zeros(m, m, k)
    whole[range(m), range(m)] = v
    torch.testing.assert_close(parts.support(v), U.support(whole.flatten(1)), atol=1e-8, rtol=1e-8)
    with pytest.raises(ValueError, match="m: got 4"):
        U.blocks(4)


def test_an_unbounded_polytope_says_so():
    U = Polytope(F=torch.tensor([[-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), g=torch.ones(3))
    v = torch.tensor([[1.0, 0.3], [-1.0, 0.5], [0.0, -2.0]])
    torch.testing.assert_close(U.support(v), torch.tensor([math.inf, 1.5, 2.0]))
    assert torch.isinf(U.bounds()[1][0])
    with pytest.raises(InfeasibleError, match="unbounded along v .index .0.") as caught:
        U.worst(v)
    assert caught.value.instances.tolist() == [0]


def test_an_empty_set_is_refused_and_named():
    F, g = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0, 1.0], [-1.0, 0.0], [2.0, -1.0]])
    U = Polytope(F=F, g=g)  # the second asks for z <= -1 and z >= 0
    with pytest.raises(InfeasibleError, match="Polytope: got an empty set .index .1.") as caught:
        U.support(torch.ones(1))
    assert caught.value.instances.tolist() == [1]
    far = Ball(radius=1.0, dimension=2) & Ball(radius=1.0, centre=torch.full((2,), 3.0))
    with pytest.raises(InfeasibleError, match="empty"):
        far.require_nonempty()
    (Ball(radius=1.0, dimension=2) & Ball(radius=1.0, centre=torch.ones(2))).require_nonempty()


def test_a_set_of_ones_own_needs_only_its_members():
    """The dual, the maximiser and the membership test come from the conic description alone."""
    from dataclasses import dataclass

    from implicitdl.convex import Cones

    @dataclass(frozen=True, kw_only=True, eq=False)
    class Cone(UncertaintySet):
        height: torch.Tensor  # {(t, z): ||z|| <= t <= height}
        own = {"height": 0}  # noqa: RUF012

        @property
        def dimension(self):
            return 3

        def members(self):
            G = torch.cat([torch.tensor([[1.0, 0.0, 0.0]]), -torch.eye(3)])
            h = torch.cat([self.height[..., None], torch.zeros(3)])
            return Conic.of(Cones(1, (3,)), G, h)

    height, v = torch.tensor(2.0, requires_grad=True), torch.tensor([0.5, 3.0, 4.0])
    U = Cone(height=height)
    h = U.support(v)
    h.backward()
    torch.testing.assert_close(h.detach(), torch.tensor(11.0))
    torch.testing.assert_close(height.grad, torch.tensor(5.5))
    torch.testing.assert_close(U.worst(v).detach(), torch.tensor([2.0, 1.2, 1.6]))
    assert U.contains(torch.tensor([1.0, 0.6, 0.79])) and not U.contains(torch.tensor([1.0, 1, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_v(dtype):
    v = normal(K).to(dtype)
    for name in ("box", "ball1", "budget", "polytope", "deep"):
        U = SETS[name]()
        w = v[: U.dimension]
        assert U.support(w).dtype == U.worst(w).dtype == dtype
        torch.testing.assert_close(
            U.support(w).double(), U.support(w.double()), atol=1e-5, rtol=1e-5
        )


def test_numbers_are_exact_whatever_the_default_dtype(float32):
    U = 0.7 * Ball(radius=0.1, dimension=K)
    assert (
        U.support(torch.ones(K)).dtype == U.sample(2).dtype == U.bounds()[0].dtype == torch.float32
    )
    v = torch.ones(K, dtype=torch.float64)
    assert float(U.support(v)) == pytest.approx(0.07 * math.sqrt(K), rel=1e-15)
    box = Box(low=-torch.ones(K), high=torch.ones(K))
    assert (0.3 * box).low.dtype == (box + U).sample(2).dtype == torch.float32


def test_an_empty_batch_of_directions():
    assert polytope().support(torch.zeros(0, K)).shape == (0,)
    assert Ball(radius=1.0, dimension=K).worst(torch.zeros(0, K)).shape == (0, K)


def test_dimensions_of_sets_and_directions_broadcast():
    U = Box(low=-positive(2, 1, K), high=positive(3, K))
    assert U.lead == (2, 3)
    assert U.support(normal(5, 1, 1, K)).shape == (5, 2, 3)
    assert U.sample(7).shape == (7, 2, 3, K) and U.bounds()[0].shape == (2, 3, K)
    assert U.expand(4, 2, 3).lead == (4, 2, 3)


def test_samples_of_a_sum_are_independent_in_a_batch():
    U = Ball(radius=1.0, dimension=K) + Box(low=-positive(2, K), high=positive(2, K))
    z = U.sample(5)
    assert not torch.allclose(z[:, 0], z[:, 1], atol=1e-2)


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: Box(low=torch.ones(2), high=torch.zeros(2)), ValueError, "low: got entries up to 1"),
        (lambda: Box(low=torch.zeros(2), high=torch.ones(3)), ValueError, "low of 2, high of 3"),
        (lambda: Box(low=0.0, high=torch.ones(3)), TypeError, "low: got float"),
        (
            lambda: Box(low=torch.zeros(2), high=torch.tensor([1.0, math.nan])),
            ValueError, r"high: got nan at index \(1,\)",
        ),
        (lambda: Ball(radius=-1.0, dimension=2), ValueError, "radius: got -1"),
        (lambda: Ball(radius=1.0), ValueError, "dimension: got 0"),
        (lambda: Ball(radius=1.0, norm=3, dimension=2), ValueError, "norm: got 3"),
        (lambda: Ellipsoid(shape=torch.ones(2)), ValueError, "shape: got shape"),
        (lambda: Ellipsoid(shape=torch.ones(2, 2, dtype=torch.int)), TypeError, "torch.int32"),
        (lambda: Ellipsoid.of_covariance(-torch.eye(2)), ValueError, "not positive definite"),
        (lambda: Budget(budget=-1.0, scale=torch.ones(2)), ValueError, "budget: got -1"),
        (lambda: Budget(budget=1.0, scale=-torch.ones(2)), ValueError, "scale: got -1"),
        (lambda: Polytope(F=torch.ones(3, 2), g=torch.ones(2)), ValueError, "F of 3, g of 2"),
        (lambda: Hull(points=torch.ones(0, 2)), ValueError, "at least one point"),
        (lambda: -1.0 * Ball(radius=1.0, dimension=2), ValueError, "r [*] U: got -1"),
        (lambda: torch.ones(2, 3) @ Ball(radius=1.0, dimension=2), ValueError, "M @ U: got M of shape"),
        (
            lambda: Ball(radius=1.0, dimension=2) + Ball(radius=1.0, dimension=3),
            ValueError, r"dimensions \[2, 3\]",
        ),
        (lambda: Ball(radius=1.0, dimension=2) & 3, TypeError, "unsupported operand"),
        (lambda: Ball(radius=1.0, dimension=2).support(torch.ones(3)), ValueError, "v: got shape"),
        (lambda: Ball(radius=1.0, dimension=2).support([1.0, 2.0]), TypeError, "v: got list"),
        (
            lambda: Ball(radius=torch.ones(3), dimension=2).support(torch.ones(4, 2)),
            ValueError, "v: got leading dimensions",
        ),
        (lambda: Ball(radius=1.0, dimension=2).sample(-1), ValueError, "n: got -1"),
        (
            lambda: Ball(radius=torch.ones(3), dimension=2).as_cvxpy(None),
            ValueError, "cvxpy's problems are not batched",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(make, error, text):
    with pytest.raises(error, match=text):
        make()
