"""Closed-form Wasserstein fits: against cvxpy, attained by laws of the ball, through scikit-learn."""

import math

import cvxpy as cp
import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from implicitdl import dro
from implicitdl.dro import _corners, _fits, _pieces
from implicitdl.dro._fits import fit, risk
from implicitdl.dro._losses import Ball, linear_loss
from implicitdl.solution import ConvergenceError

LEAVES_OUT = pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
CLASSES, NUMBERS = ("hinge", "logistic"), ("absolute", "huber", "squares")
INF = math.inf


def problem(loss, n=50, d=4, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * np.exp(0.5 * rng.normal(size=d)) + 1
    y = X @ rng.normal(size=d) + rng.standard_t(3, size=n)
    return X, (np.sign(y - np.median(y) + 1e-9) if loss in CLASSES else y)


def reference(X, y, loss, r, q, k):
    """The same minimum written for a modelling language."""
    n, d = X.shape
    theta, b, lam = cp.Variable(d), cp.Variable(), cp.Variable()
    u, rules = X @ theta + b, [cp.norm(theta, q) <= lam]
    m = cp.multiply(y, u)
    if loss in NUMBERS:
        rules += [lam >= 1 / k]
        mean = {
            "absolute": lambda: cp.sum(cp.abs(y - u)) / n,
            "huber": lambda: cp.sum(cp.huber(y - u, 1.0)) / 2 / n,
            "squares": lambda: cp.norm(y - u) / math.sqrt(n),
        }[loss]()
    else:
        of = (lambda m: cp.pos(1 - m)) if loss == "hinge" else (lambda m: cp.logistic(-m))
        each = of(m) if math.isinf(k) else cp.maximum(of(m), of(-m) - k * lam)
        mean = cp.sum(each) / n
    value = cp.Problem(cp.Minimize(mean + r * lam), rules).solve(solver="CLARABEL")
    return value**2 if loss == "squares" else value


# The reference may be less accurate than what is compared with it.
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.parametrize("k", [INF, 0.8, 0.1])
@pytest.mark.parametrize("p", [1.0, 2.0, INF])
@pytest.mark.parametrize("loss", CLASSES + NUMBERS)
def test_least_risk_is_that_of_a_convex_solver(loss, p, k):
    X, y = problem(loss)
    for r in (0.02, 0.3):
        ball = Ball(r, p, k)
        found = fit(X, y, linear_loss(loss), ball, True)
        expected = reference(X, y, loss, r, ball.q, k)
        assert found.risk == pytest.approx(expected, rel=2e-6, abs=2e-7)
        again, _ = risk(X, y, linear_loss(loss), ball, found.theta, found.b)
        assert found.risk == pytest.approx(again, rel=1e-9)
        assert 0 <= found.gap <= 1e-6 * (1 + found.risk)


@pytest.mark.parametrize("p", [2.0, INF])
@pytest.mark.parametrize("loss", ("hinge", "absolute"))
def test_working_sets_and_active_sets_end_where_the_whole_problem_does(loss, p, monkeypatch):
    X, y = problem(loss, n=4000, d=5)
    ball = Ball(0.05, p, INF)
    quick = fit(X, y, linear_loss(loss), ball, True)
    monkeypatch.setattr(_pieces, "DIRECT", 10**6)
    whole = _fits._slow(X, y, linear_loss(loss), ball, True, None)
    assert quick.risk == pytest.approx(whole.risk, rel=2e-8)
    assert quick.method != whole.method
    assert quick.gap <= 1e-7 * (1 + quick.risk)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("loss", ("hinge", "absolute"))
def test_active_sets_are_exact(loss, intercept, monkeypatch):
    """The gap is rounding, all samples at once or first a tenth, which then are put right."""
    X, y = problem(loss, n=3000, d=8, seed=3)
    ball = Ball(0.03, 2.0, INF)
    found = fit(X, y, linear_loss(loss), ball, intercept)
    assert found.method == "active set" and found.gap <= 1e-10 * found.risk
    again, _ = risk(X, y, linear_loss(loss), ball, found.theta, found.b)
    assert found.risk == pytest.approx(again, rel=1e-13)
    for size in (2000, 250):  # 250: the fit to a tenth is itself begun with a tenth
        monkeypatch.setattr(_corners, "_AT_ONCE", size)
        other = fit(X, y, linear_loss(loss), ball, intercept)
        assert other.method == "active set" and other.steps != found.steps
        assert other.risk == pytest.approx(found.risk, rel=1e-9)
        np.testing.assert_allclose(other.theta, found.theta, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "kind", ["copies", "whole numbers", "scales", "means", "collinear", "wide"]
)
@pytest.mark.parametrize("loss", ("hinge", "absolute"))
def test_active_sets_of_awkward_data(loss, kind):
    """Ties at corners, and matrices that single precision cannot hold: the same minimum."""
    X, y = problem(loss, n=40 if kind == "wide" else 300, d=60 if kind == "wide" else 4)
    if kind == "copies":
        X, y = np.repeat(X[:60], 5, 0), np.repeat(y[:60], 5)
    elif kind == "whole numbers":
        X, y = np.round(X), np.round(y)
    elif kind == "scales":
        X = X * np.array([1e-4, 1.0, 1e4, 1.0])
    elif kind == "means":
        X = X + 1e5
    elif kind == "collinear":
        X[:, 1] = X[:, 0] + 1e-9 * X[:, 2]
    ball = Ball(0.05, 2.0, INF)
    found = fit(X, y, linear_loss(loss), ball, True)
    whole = _fits._slow(X, y, linear_loss(loss), ball, True, None)
    assert found.risk == pytest.approx(whole.risk, rel=1e-7)
    assert 0 <= found.gap <= 1e-6 * (1 + found.risk)


@pytest.mark.parametrize("loss", CLASSES + NUMBERS)
def test_no_intercept_and_radius_zero(loss):
    X, y = problem(loss)
    found = fit(X, y, linear_loss(loss), Ball(0.1, 2.0, INF), False)
    assert found.b == 0.0
    free = fit(X, y, linear_loss(loss), Ball(0.0, 2.0, INF), True)
    nominal = linear_loss(loss).value(X @ free.theta + free.b, y).mean()
    assert free.risk == pytest.approx(nominal, rel=1e-8)
    rng = np.random.default_rng(1)
    for _ in range(20):  # no step from the minimum goes down
        theta = free.theta + 1e-3 * rng.normal(size=4)
        assert linear_loss(loss).value(X @ theta + free.b, y).mean() >= nominal - 1e-12


def test_everything_is_constant_under_a_large_radius():
    for loss in CLASSES + NUMBERS:
        X, y = problem(loss)
        for intercept in (True, False):
            found = fit(X, y, linear_loss(loss), Ball(100.0, 2.0, INF), intercept)
            assert np.abs(found.theta).max() < 1e-5
            if loss in ("hinge", "absolute"):
                assert found.steps == 0 and found.gap == 0
                b = cp.Variable()
                r = cp.pos(1 - cp.multiply(y, b)) if loss == "hinge" else cp.abs(y - b)
                best = cp.Problem(cp.Minimize(cp.sum(r) / len(y))).solve(solver="CLARABEL")
                none = linear_loss(loss).value(np.zeros(len(y)), y).mean()
                assert found.risk == pytest.approx(best if intercept else none, rel=1e-6)


@pytest.mark.parametrize("p", [1, 2, "inf"])
@pytest.mark.parametrize("k", [INF, 2.0, 0.3, 0.0])
@pytest.mark.parametrize("loss", CLASSES + NUMBERS)
def test_the_worst_distribution_attains_the_risk(loss, k, p):
    if loss in NUMBERS and k == 0.0:
        return
    X, y = problem(loss)
    M = np.diag([1.0, 2.0, 0.5, 1.0])
    M[0, 1] = M[1, 0] = 0.3
    kind = dro.WassersteinClassifier if loss in CLASSES else dro.WassersteinRegressor
    for metric in (None, M):
        model = kind(loss, radius=0.3, p=p, label_price=k, metric=metric).fit(X, y)
        for r in (None, 0.05, 1.5):
            w = model.worst_distribution(r)
            radius = 0.3 if r is None else r
            assert w.distance <= radius * (1 + 1e-9)
            assert w.weights.min() >= 0 and w.weights.sum() == pytest.approx(1.0)
            assert -1e-9 <= w.gap / (1 + w.risk) <= 2e-6
            # Its loss and its cost once more, from what the user gets.
            u = w.X @ model.coef_ + model.intercept_
            assert (w.weights * linear_loss(loss).value(u, w.y)).sum() == pytest.approx(w.loss)
            move = w.X - X[w.origin]
            move = move if metric is None else move @ model._root
            cost = np.linalg.norm(move, math.inf if p == "inf" else p, axis=1)
            if math.isfinite(k):
                cost = cost + k * (
                    np.abs(w.y - y[w.origin]) if loss in NUMBERS else w.y != y[w.origin]
                )
            order = 2 if loss == "squares" else 1
            assert (w.weights * cost**order).sum() ** (1 / order) <= radius * (1 + 1e-9)


@pytest.mark.parametrize("loss", CLASSES + NUMBERS)
def test_no_law_of_the_ball_is_worse(loss):
    """Random plans of the allowed cost, and the gradient's direction, stay below the risk."""
    X, y = problem(loss)
    kind = dro.WassersteinClassifier if loss in CLASSES else dro.WassersteinRegressor
    model = kind(loss, radius=0.3).fit(X, y)
    rng, order = np.random.default_rng(0), 2 if loss == "squares" else 1
    for trial in range(60):
        step = rng.normal(size=X.shape) if trial % 2 else -np.outer(y, model.coef_)
        step *= rng.exponential(size=(len(X), 1)) ** rng.integers(0, 4)
        size = (np.linalg.norm(step, axis=1) ** order).mean() ** (1 / order)
        u = (X + step * 0.3 / size) @ model.coef_ + model.intercept_
        assert linear_loss(loss).value(u, y).mean() <= model.worst_risk_ + 1e-9


@LEAVES_OUT
@pytest.mark.parametrize(
    "estimator",
    [
        dro.WassersteinClassifier(),
        dro.WassersteinClassifier("hinge", p="inf"),
        dro.WassersteinRegressor(),
        dro.WassersteinRegressor("huber"),
        dro.MomentClassifier(),
        dro.MomentRegressor(),
    ],
    ids=str,
)
def test_checks_of_scikit_learn(estimator):
    check_estimator(estimator)


def test_pipelines_searches_and_the_choice_of_the_radius():
    X, y = load_breast_cancer(return_X_y=True)
    names = np.array(["benign", "malignant"])[y]
    pipeline = make_pipeline(StandardScaler(), dro.WassersteinClassifier())
    key = "wassersteinclassifier__radius"
    search = GridSearchCV(pipeline, {key: [1e-3, 1e-1]}, cv=2).fit(X, names)
    assert search.best_score_ > 0.94
    scaled = StandardScaler().fit_transform(X)
    model = dro.WassersteinClassifier(radius="cv", radii=[1e-3, 1e-2, 10.0], cv=3).fit(
        scaled, names
    )
    assert model.radius_ in (1e-3, 1e-2) and model.cv_losses_.shape == (3, 3)
    assert model.radius_ == model.cv_radii_[model.cv_losses_.mean(1).argmin()]
    p = model.predict_proba(scaled)
    np.testing.assert_array_equal(model.classes_[p.argmax(1)], model.predict(scaled))
    assert set(model.worst_distribution().y) <= {"benign", "malignant"}


def test_mahalanobis_metric_is_a_change_of_coordinates():
    X, y = problem("hinge")
    M = np.diag([4.0, 1.0, 9.0, 1.0])
    a = dro.WassersteinClassifier("hinge", radius=0.2, metric=M).fit(X, y)
    b = dro.WassersteinClassifier("hinge", radius=0.2).fit(X * np.sqrt(np.diag(M)), y)
    assert a.worst_risk_ == pytest.approx(b.worst_risk_, rel=1e-8)
    np.testing.assert_allclose(a.coef_, b.coef_ * np.sqrt(np.diag(M)), rtol=1e-3, atol=1e-5)


def test_moments_of_classes():
    """The hyperplane's margin is kappa deviations of both, and a two-point law attains the error."""
    X, y = load_breast_cancer(return_X_y=True)
    X = (X - X.mean(0))[:, :6] / X.std(0)[:6]
    model = dro.MomentClassifier().fit(X, y)
    for k, sign in ((0, -1), (1, 1)):
        part = X[y == k]
        mean = part.mean(0) @ model.coef_ + model.intercept_
        deviation = (part @ model.coef_).std()
        assert sign * mean / deviation == pytest.approx(model.kappa_, rel=1e-5)
    alpha = model.kappa_**2 / (1 + model.kappa_**2)
    assert model.accuracy_ == pytest.approx(alpha, rel=1e-6)
    # Mass alpha at a, 1 - alpha on the hyperplane: of this mean and deviation.
    k = model.kappa_
    points, mass = np.array([-k, 1 / k]), np.array([1 - alpha, alpha])
    assert mass @ points == pytest.approx(0, abs=1e-9) and mass @ points**2 == pytest.approx(1)
    rng = np.random.default_rng(0)
    for _ in range(50):  # no other hyperplane has a larger kappa
        theta = model.coef_ + 0.1 * np.abs(model.coef_).max() * rng.normal(size=6)
        gap = X[y == 1].mean(0) - X[y == 0].mean(0)
        sizes = sum((X[y == c] @ theta).std() for c in (0, 1))
        assert gap @ theta / sizes <= k + 1e-6
    better = [
        dro.MomentClassifier(family=f).fit(X, y).accuracy_
        for f in ("symmetric", "unimodal", "gaussian")
    ]
    assert alpha < better[0] < better[1] < better[2] < 1
    worse = dro.MomentClassifier(mean_error=0.1, covariance_error=0.1).fit(X, y)
    assert worse.kappa_ < model.kappa_ - 0.1


def test_moments_of_a_regression():
    X, y = load_diabetes(return_X_y=True)
    plain = dro.MomentRegressor().fit(X, y)
    expected = np.linalg.lstsq(np.column_stack([X, np.ones(len(X))]), y, rcond=None)[0]
    np.testing.assert_allclose(plain.coef_, expected[:-1], rtol=1e-6)
    low, high = plain.predict_interval(X)
    assert np.mean((low <= y) & (y <= high)) >= 0.9
    S = np.cov(np.column_stack([X, y]).T, bias=True)
    robust = dro.MomentRegressor(covariance_error=1e-3).fit(X, y)
    v = np.append(robust.coef_, -1)
    worst = S + 1e-3 * np.outer(v, v) / (v @ v)  # within the Frobenius ball, and attained
    assert math.sqrt(v @ worst @ v) == pytest.approx(robust.sigma_, rel=1e-9)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"radius": -0.1}, "radius: got -0.1"),
        ({"radius": math.nan}, "radius: got nan"),
        ({"radius": "auto"}, "radius: got 'auto'"),
        ({"loss": "hinges"}, "loss: got 'hinges'"),
        ({"p": 3}, "p: got 3"),
        ({"label_price": -1.0}, "label_price: got -1"),
        ({"metric": -np.eye(4)}, "positive definite"),
        ({"metric": np.eye(3)}, r"shape \(3, 3\)"),
        ({"radius": "cv", "radii": [-1.0]}, "radii"),
        ({"radius": "cv", "cv": 1}, "cv: got 1"),
    ],
)
def test_bad_parameters(change, match):
    X, y = problem("hinge")
    with pytest.raises(ValueError, match=match):
        dro.WassersteinClassifier(**change).fit(X, y)


def test_bad_data():
    X, y = problem("hinge")
    with pytest.raises(ValueError, match="one class"):
        dro.WassersteinClassifier().fit(X, np.ones(len(y)))
    with pytest.raises(ValueError, match="OneVsRestClassifier"):
        dro.WassersteinClassifier().fit(X, np.arange(len(y)) % 3)
    with pytest.raises(ConvergenceError, match="separable"):
        dro.WassersteinClassifier(radius=0.0).fit(X[:4], np.array([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="label_price: got 0"):
        dro.WassersteinRegressor(label_price=0.0).fit(X, y)
    with pytest.raises(ValueError, match="delta: got 0"):
        dro.WassersteinRegressor("huber", delta=0.0).fit(X, y)
    with pytest.raises(ValueError, match="radius: got -1"):
        dro.WassersteinClassifier().fit(X, y).worst_distribution(-1.0)
    model = dro.WassersteinRegressor().fit(X, y)
    X[2, 1] = math.nan
    for kind in (dro.WassersteinClassifier, dro.WassersteinRegressor, dro.MomentClassifier):
        with pytest.raises(ValueError, match=r"X: got NaN at index \(2, 1\)"):
            kind().fit(X, y)
    with pytest.raises(ValueError, match=r"X: got NaN at index \(2, 1\)"):
        model.predict(X)
    X[2, 1], y[3] = 0.0, -math.inf
    with pytest.raises(ValueError, match=r"y: got -inf at index \(3,\)"):
        dro.MomentRegressor().fit(X, y)
