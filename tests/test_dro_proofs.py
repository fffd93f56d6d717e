"""The gap of a Wasserstein fit is a proof: hard fits, awkward units, and dual points of any kind."""

import math
import warnings

import cvxpy as cp
import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes

from implicitdl import dro
from implicitdl.dro import _fits
from implicitdl.dro._fits import fit, risk
from implicitdl.dro._losses import Ball, linear_loss
from implicitdl.dro._proof import lower
from implicitdl.solution import ConvergenceError

INF = math.inf
LOSSES = ("hinge", "logistic", "absolute", "huber", "squares")


def reference(X, y, loss, r, p, k, intercept):
    """theta and b of the same minimum, by a modelling language; None where it fails."""
    n, d = X.shape
    theta, b, lam = cp.Variable(d), cp.Variable(), cp.Variable()
    u = X @ theta + (b if intercept else 0.0)
    rules = [cp.norm(theta, {1.0: "inf", 2.0: 2, INF: 1}[p]) <= lam]
    m = cp.multiply(y, u)
    if loss in ("hinge", "logistic"):
        of = (lambda m: cp.pos(1 - m)) if loss == "hinge" else (lambda m: cp.logistic(-m))
        each = of(m) if math.isinf(k) else cp.maximum(of(m), of(-m) - k * lam)
        mean = cp.sum(each) / n
    else:
        rules += [lam >= 1 / k]
        mean = {
            "absolute": lambda: cp.sum(cp.abs(y - u)) / n,
            "huber": lambda: cp.sum(cp.huber(y - u, 1.0)) / 2 / n,
            "squares": lambda: cp.norm(y - u) / math.sqrt(n),
        }[loss]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cp.Problem(cp.Minimize(mean + r * lam), rules).solve(solver="CLARABEL")
        except cp.SolverError:
            return None
    return None if theta.value is None else (theta.value, float(b.value or 0.0))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_other_fit_is_below_what_is_proved(loss):
    """Few and many samples, every norm, flips or none, all sizes of the radius and of the features."""
    done = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n, d = int(rng.choice([3, 10, 30, 60])), int(rng.choice([1, 3, 8, 20]))
        X = rng.normal(size=(n, d))
        u = X @ rng.normal(size=d)
        y = u + rng.choice([0.0, 0.5, 2.0]) * rng.normal(size=n)
        if loss in ("hinge", "logistic"):
            y = np.sign(y)
            y[0], y[1] = 1.0, -1.0
        p, k = float(rng.choice([1, 2, INF])), float(rng.choice([INF, 0.3, 3.0]))
        r = float(rng.choice([1e-4, 1e-2, 0.1, 1.0, 1e3]))
        scale, intercept = float(10.0 ** rng.choice([-5, 0, 0, 4])), bool(rng.random() < 0.7)
        ball = Ball(r * scale, p, k * scale)
        try:
            found = fit(X * scale, y, linear_loss(loss), ball, intercept)
        except ConvergenceError:
            continue
        done += 1
        again, _ = risk(X * scale, y, linear_loss(loss), ball, found.theta, found.b)
        assert found.risk == pytest.approx(again, rel=1e-10)
        assert found.gap <= 1.1e-6 * found.risk + 1e-9
        other = reference(X, y, loss, r, p, k, intercept)
        if other is None:
            continue
        theta, b = other
        value, _ = risk(X * scale, y, linear_loss(loss), ball, theta / scale, b)
        assert value >= found.risk - found.gap - 1e-12 * (1 + value)
    assert done >= 29


@pytest.mark.parametrize("loss", LOSSES[:4])
def test_any_multipliers_give_a_lower_bound(loss):
    rng = np.random.default_rng(0)
    for trial in range(60):
        n, d = int(rng.choice([4, 30])), int(rng.choice([1, 6]))
        X, y = rng.normal(size=(n, d)) + 1, rng.normal(size=n)
        if loss in ("hinge", "logistic"):
            y = np.where(np.arange(n) % 3 == 0, -1.0, 1.0)
        kind = linear_loss(loss)
        r = 0.1 if trial % 2 else 10.0
        ball = Ball(r, float(rng.choice([1, 2, INF])), float(rng.choice([INF, 0.5, 2.0])))
        intercept = bool(trial % 3)
        best = fit(X, y, kind, ball, intercept)
        size = 10.0 ** rng.integers(-3, 2)
        dual = [(size * rng.normal(size=n), size * rng.normal(size=n))]
        low = lower(X, y, kind, ball, intercept, best.theta, best.risk, dual, INF)
        assert 0 <= low <= best.risk * (1 + 1e-12)


@pytest.mark.parametrize("seed, n, d, k, r, p", [(10, 60, 20, 0.3, 1e-4, 1.0), (252, 60, 8, INF, 1e-4, 1.0)])  # fmt: skip
def test_logistic_fits_with_a_small_radius_are_optimal(seed, n, d, k, r, p):
    rng = np.random.default_rng(seed)
    rng.choice([20, 30, 60]), rng.choice([2, 5, 8, 20])
    X = rng.normal(size=(n, d))
    u = X @ rng.normal(size=d)
    y = np.sign(u + rng.choice([0, 0.5, 2]) * rng.normal(size=n))
    found = fit(X, y, linear_loss("logistic"), Ball(r, p, k), True)
    theta, b = reference(X, y, "logistic", r, p, k, True)
    other, _ = risk(X, y, linear_loss("logistic"), Ball(r, p, k), theta, b)
    assert found.risk <= other * (1 + 1e-6)
    assert found.gap <= 1e-6 * found.risk


@pytest.mark.parametrize("constant", [0.0, 0.1, 0.3, 1e-3, 1e3])
@pytest.mark.parametrize("loss", LOSSES)
def test_constant_features_count_for_nothing_without_a_ball(loss, constant):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(80, 4))
    y = X[:, 0] + rng.normal(size=80)
    y = np.sign(y) if loss in LOSSES[:2] else y
    other = fit(X, y, linear_loss(loss), Ball(0.0, 2.0, INF), True)
    more = np.column_stack([X, np.full(80, constant), X[:, 0]])
    for p in (2.0, INF):
        found = fit(more, y, linear_loss(loss), Ball(0.0, p, INF), True)
        assert found.theta[4] == 0.0 and np.abs(found.theta).max() < 10
        assert found.risk == pytest.approx(other.risk, rel=1e-7)
        own = linear_loss(loss).value(more @ found.theta + found.b, y).mean()
        assert found.risk == pytest.approx(own, rel=1e-12)
        assert found.gap <= 1e-6 * found.risk
    small = fit(more, y, linear_loss(loss), Ball(1e-9, INF, INF), True)
    assert np.abs(small.theta).max() < 10


@pytest.mark.parametrize("radius", [0.0, 1e-3, 0.01, 0.1])
def test_huber_with_targets_in_hundreds(radius):
    X, y = load_diabetes(return_X_y=True)
    for delta in (0.1, 1.0, 10.0):
        model = dro.WassersteinRegressor("huber", radius=radius, delta=delta).fit(X, y)
        assert model.gap_ <= 1e-6 * model.worst_risk_
        off = np.abs(y - model.predict(X))
        inner = np.minimum(off, delta)
        own = (inner * (off - inner / 2)).mean() + radius * delta * np.linalg.norm(model.coef_)
        assert model.worst_risk_ == pytest.approx(own, rel=1e-10)


def test_units_change_nothing():
    """Least squares and others with all of X, y, radius and prices in other units."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(60, 3))
    y = X @ [1, 2, 0.0] + rng.normal(size=60)
    for loss in ("squares", "absolute", "huber"):
        for p in (1.0, INF):
            for r in (1e-4, 1.0, 1e5):
                for k in (INF, 1.0):
                    base = fit(X, y, linear_loss(loss, 1.0), Ball(r, p, k), True)
                    for s, t in ((1e-3, 1e5),):
                        kind, ball = linear_loss(loss, t), Ball(r * s, p, k * s / t)
                        found = fit(X * s, y * t, kind, ball, True)
                        whole = t if loss == "absolute" else t * t
                        assert found.risk == pytest.approx(base.risk * whole, rel=2e-6)
                        assert found.gap <= 1e-6 * found.risk


def test_a_weak_proof_is_an_error(monkeypatch):
    """A method that stops too early is not believed, and the next one is asked."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 3))
    y = np.sign(X[:, 0] + rng.normal(size=40))
    ball, loss = Ball(0.05, INF, 0.5), linear_loss("logistic")
    good = fit(X, y, loss, ball, True)

    def early(X, y, loss, ball, intercept):
        return np.zeros(3), 0.0, 1, "early", [(np.full(40, 0.5), np.zeros(40))]

    monkeypatch.setattr(_fits, "by_pieces", early)
    found = fit(X, y, loss, ball, True)
    assert found.method == "cone program" and found.risk == pytest.approx(good.risk, rel=1e-6)
    monkeypatch.setattr(_fits, "by_cones", lambda *_: None)
    with pytest.raises(ConvergenceError, match="proved only to"):
        fit(X, y, loss, ball, True)


def test_the_radius_by_cross_validation_leaves_out_what_has_no_fit():
    X, y = load_breast_cancer(return_X_y=True)
    X = X[:150, :20] / X[:150, :20].std(0)
    model = dro.WassersteinClassifier(radius="cv", radii=[0.0, 0.01, 100.0], p=np.inf, cv=3)
    model.fit(X, y[:150])
    assert model.radius_ == 0.01 and np.isfinite(model.cv_losses_[1:]).all()
    model.set_params(radii=[0.0])
    with pytest.raises(ConvergenceError, match="take larger ones"):
        model.fit(np.arange(12.0)[:, None], np.arange(12) >= 6)
    with pytest.raises(ValueError, match="single class"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(np.arange(12.0)[:, None], np.arange(12) >= 11)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda X, y: dro.WassersteinClassifier(p=[2]).fit(X, y), "p: got"),
        (lambda X, y: dro.WassersteinRegressor("huber", delta="a").fit(X, y), "delta: got str"),
        (lambda X, y: dro.MomentClassifier(family=[1]).fit(X, y), "family"),
        (lambda X, y: dro.WassersteinClassifier().fit(X, y).worst_distribution("a"), "radius"),
    ],
)
def test_parameters_of_another_type(make, match):
    X = np.random.default_rng(0).normal(size=(20, 2))
    with pytest.raises((TypeError, ValueError), match=match):
        make(X, np.arange(20) % 2)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_moments_do_not_depend_on_a_feature_s_unit(scale):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 4)) @ rng.normal(size=(4, 4))
    y = np.arange(40) % 2
    X[y == 1] += rng.normal(size=4)
    expected = dro.MomentClassifier().fit(X, y)
    unit = np.array([1, scale, 1, 1])
    found = dro.MomentClassifier().fit(X * unit, y)
    assert found.kappa_ == pytest.approx(expected.kappa_, rel=1e-8)
    np.testing.assert_allclose(found.coef_ * unit, expected.coef_, rtol=1e-5)
