"""The scikit-learn door: scikit-learn's own checks, and what its users do with an estimator."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import check_estimator

from implicitdl.estimators import (
    ImplicitClassifier,
    ImplicitRegressor,
    LiftedClassifier,
    LiftedRegressor,
)

SMALL = {"states": 8, "epochs": 25, "batch_size": 32, "random_state": 0}
# scikit-learn itself warns of checks that it leaves out.
LEAVES_OUT = pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")


@LEAVES_OUT
@pytest.mark.parametrize(
    "estimator",
    [
        ImplicitClassifier(8, epochs=8, learning_rate=0.03, random_state=0),
        pytest.param(
            ImplicitRegressor(8, epochs=8, learning_rate=0.03, random_state=0),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            LiftedClassifier((8,), epochs=10, learning_rate=0.03, random_state=0),
            marks=pytest.mark.slow,
        ),
        LiftedRegressor((8,), epochs=10, learning_rate=0.03, random_state=0),
    ],
    ids=lambda e: type(e).__name__,
)
def test_checks_of_scikit_learn(estimator):
    check_estimator(estimator)


def test_pipeline_and_search():
    X, y = load_breast_cancer(return_X_y=True)
    pipeline = make_pipeline(MinMaxScaler(), ImplicitClassifier(**{**SMALL, "epochs": 12}))
    search = GridSearchCV(pipeline, {"implicitclassifier__states": [2, 8]}, cv=2).fit(X, y)
    assert search.best_score_ > 0.94
    names = np.array(["benign", "malignant"])[y]
    model = ImplicitClassifier(**SMALL).fit(X, names)
    assert set(model.predict(X)) == {"benign", "malignant"}
    p = model.predict_proba(X)
    np.testing.assert_allclose(p.sum(1), 1.0)
    np.testing.assert_array_equal(model.classes_[p.argmax(1)], model.predict(X))


def test_lifted_estimators():
    X, y = load_breast_cancer(return_X_y=True)
    model = LiftedClassifier((16,), epochs=15, random_state=0)
    assert cross_val_score(model, X, y, cv=2).mean() > 0.94
    hard = LiftedClassifier((16, 8), activation="hardtanh", epochs=15, random_state=0)
    assert hard.fit(X, y).score(X, y) > 0.94
    X, y = load_diabetes(return_X_y=True)
    model = LiftedRegressor((16,), epochs=20, weight_decay=0.1, random_state=0)
    assert cross_val_score(model, X, y, cv=2).mean() > 0.35
    with pytest.raises(ValueError, match="GELU"):
        LiftedRegressor((4,), activation="gelu").fit(X, y)
    with pytest.raises(ValueError, match="hidden"):
        LiftedRegressor((0,)).fit(X, y)


def test_regression():
    X, y = load_diabetes(return_X_y=True)
    model = ImplicitRegressor(states=10, epochs=15, weight_decay=0.1, random_state=0)
    assert cross_val_score(model, X, y, cv=3).mean() > 0.35  # a linear fit has 0.49
    two = model.fit(X, np.stack([y, -2 * y], 1)).predict(X)
    assert two.shape == (len(X), 2)
    single = X.astype(np.float32)
    assert model.fit(single, y.astype(np.float32)).predict(single).dtype == np.float32


def test_the_global_generator_is_left_alone_and_seeds_decide():
    X, y = load_diabetes(return_X_y=True)
    X, y = X[:60], y[:60]
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    a, b = (ImplicitRegressor(**SMALL).fit(X, y).predict(X) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "change, match",
    [
        ({"states": 0}, "states: got 0"),
        ({"epochs": 1.5}, "epochs: got 1.5"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"activation": "relish"}, "relish"),
    ],
)
def test_bad_parameters(change, match):
    X, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    with pytest.raises(ValueError, match=match):
        ImplicitClassifier(**{**SMALL, **change}).fit(X, y)


def test_bad_data():
    X = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(ValueError, match="one class"):
        ImplicitClassifier().fit(X, np.zeros(20))
    X[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        ImplicitClassifier().fit(X, np.arange(20) % 2)


def test_constant_features_are_left_alone():
    """The deviation of a column of 0.1 is rounding, by which nothing may be divided."""
    generator = np.random.default_rng(0)
    X = np.column_stack([generator.normal(size=(80, 3)), np.full(80, 0.1)])
    y = (X[:, 0] > 0).astype(int)
    for kind in (ImplicitClassifier(**SMALL), LiftedClassifier(8, epochs=20, random_state=0)):
        model = kind.fit(X, y)
        assert model.scale_[3] == 1.0
        moved = X + np.array([0.0, 0.0, 0.0, 1e-6])
        assert np.abs(model.decision_function(moved) - model.decision_function(X)).max() < 1e-4


def test_numbers_of_numpy_and_one_width_are_taken():
    X, y = load_breast_cancer(return_X_y=True)
    X, y = X[:80, :5], y[:80]
    grid = {"epochs": np.arange(2, 4), "batch_size": np.array([32, 64])}
    GridSearchCV(ImplicitClassifier(np.int64(4)), grid, cv=2).fit(X, y)
    GridSearchCV(LiftedClassifier(np.int32(6)), grid, cv=2).fit(X, y)
    LiftedClassifier((np.int64(4), 3), epochs=1).fit(X, y)
    for hidden in (0, (4, 0), 2.5, "wide", True):
        with pytest.raises(ValueError, match="hidden"):
            LiftedClassifier(hidden, epochs=1).fit(X, y)
