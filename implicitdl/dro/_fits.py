"""Linear models that are best against the worst law of a Wasserstein ball, in closed form.

With cost ||x - x'||_p for the features, 1/p + 1/q = 1, and a loss of slope L in the residual,

    sup over W_1(Q, P) <= r of E_Q loss = E_P loss + r L ||theta||_q            labels fixed,
    ... = E_P loss + r L max(||theta||_q, 1/k)                                   targets move at price k,
    ... = min over lam >= ||theta||_q of r lam + E_P max(l(m), l(-m) - k lam)    labels flip at price k,
    sup over W_2(Q, P) <= r of (E_Q residual^2)^(1/2) = (E_P residual^2)^(1/2) + r max(||theta||_q, 1/k).

Reference:
    Shafieezadeh-Abadeh, Kuhn, Mohajerin Esfahani (2019), theorems 4, 11 and 14 and corollaries; Blanchet,
    Kang, Murthy (2019), propositions 2 and 3 (squares).
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..solution import ConvergenceError
from . import _corners as corners
from ._face import on_face
from ._last import by_cones
from ._losses import Ball, Fit, LinearLoss
from ._newton import constant, newton
from ._pieces import Got, by_pieces
from ._proof import lower, multipliers
from ._squares import squares

Array = np.ndarray
_NEAR = 1e-6  # proved relative gap of a fit
_NOTHING = 1e-10  # of the risk at theta = 0, which is as good as a risk of 0
_ROUNDING = 2e-15
_TOO_MANY = 10**7  # numbers in X, for the cone program of the last resort


def fit(X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool) -> Fit:
    """The minimiser, with a proof.

    Args:
        X: # (n, d), float64
        y: # (n,)
        loss: the loss.
        ball: the ball; features already in the coordinates in which the cost is a norm.
        intercept: whether there is a b.

    Raises:
        ConvergenceError: the risk has no minimum (a ball of radius 0 and separable classes), or the
            methods failed to prove it to a relative 1e-6.
    """
    if ball.radius == 0:
        return _no_ball(X, y, loss, ball, intercept)
    if loss.order == 2:
        found = squares(X, y, ball, intercept)
        return _good(_again(X, y, loss, ball, found), float(np.mean(y * y)))
    quick = None
    if ball.q == 2:
        with contextlib.suppress(ConvergenceError, ArithmeticError, np.linalg.LinAlgError):
            quick = _quick(X, y, loss, ball, intercept)
    if quick is not None and quick.gap <= _NEAR * quick.risk:
        return quick
    return _slow(X, y, loss, ball, intercept, quick)


def _good(found: Fit, at_zero: float) -> Fit:
    """The fit, or an error where its proof is too weak."""
    if found.gap <= _NEAR * found.risk + _NOTHING * at_zero:
        return found
    raise ConvergenceError(
        f"the fit did not converge: the risk is {found.risk:.6g}, which is proved only to "
        f"{found.gap:.1e}; scale features and targets to similar sizes, or, if classes "
        "are separable, take a larger radius."
    )


@np.errstate(all="ignore")
def _quick(X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool) -> "Fit | None":
    """With a 2-norm, and where flips and moves of targets are not worth their price; else None."""
    if not loss.smooth:
        return _corners(X, y, loss, ball, intercept)
    found = newton(X, y, loss, ball, intercept)
    length = float(np.linalg.norm(found.theta))
    u = X @ found.theta + found.b
    if math.isfinite(ball.flip):
        if loss.regression and length < 1 / ball.flip:
            return None
        if not loss.regression and float((y * u).max()) > ball.flip * length:
            return None
    return _proved(X, y, loss, ball, intercept, found, multipliers(u, y, loss))


def _proved(
    X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool, found: Fit,
    dual: list[tuple[Array, Array]], least: float = 0.0,
) -> Fit:  # fmt: skip
    """The fit with the gap that its multipliers prove, or a lower bound known before."""
    enough = found.risk * (1 - 0.1 * _NEAR)
    if least < enough:
        low = lower(X, y, loss, ball, intercept, found.theta, found.risk, dual, enough)
        least = max(least, low)
    # The bound and the risk are sums with rounding.
    return replace(found, gap=max(found.risk - least, 0.0) + _ROUNDING * found.risk)


def _slow(
    X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool, quick: "Fit | None"
) -> Fit:
    """By the interior-point method or a cone program, in units in which numbers are near 1."""
    d = X.shape[1]
    given = X, y, loss, ball
    centre = X.mean(0) if intercept else np.zeros(d)
    noise = 8 * np.finfo(np.float64).eps * np.abs(X).max(0)
    X = X - centre
    if intercept:  # columns that are constant but for rounding
        X[:, np.abs(X).max(0) <= noise] = 0.0
    s = math.sqrt(float(np.mean(X * X))) or 1.0
    middle, t = 0.0, 1.0
    if loss.regression:
        middle = float(np.median(y)) if intercept else 0.0
        t = float(np.mean(np.abs(y - middle))) or 1.0
    X, y = X / s, (y - middle) / t
    # theta' = s theta / t, so all lengths of features and prices of labels change with their units.
    flip = ball.flip * t / s
    inner = Ball(ball.radius / s, ball.p, flip)
    whole = t
    if loss.regression and loss.smooth:
        loss, whole = replace(loss, delta=loss.delta / t, slope=loss.slope / t), t * t
    at_zero = risk(X, y, loss, inner, np.zeros(d), constant(y, loss) if intercept else 0.0)[0]
    least = 0.0 if quick is None else max(quick.risk - quick.gap, 0.0) / whole
    done, endless = None, False
    for method in (_by_newton, _by_pieces, *_FACES, _by_last, *_FACES):
        with contextlib.suppress(ConvergenceError, ArithmeticError, np.linalg.LinAlgError):
            got = method(X, y, loss, inner, intercept, done)
            if got is None:
                continue
            theta, b, steps, name, dual = got
            if inner.radius == 0 and not loss.regression and loss.smooth:
                endless = endless or bool((y * (X @ theta + b) > 0).all())
                if endless:
                    break
            value, lam = risk(X, y, loss, inner, theta, b)
            if not math.isfinite(value):
                continue
            now = Fit(theta, b, lam, value, math.inf, steps, name)
            now = _proved(X, y, loss, inner, intercept, now, dual, least)
            least = max(least, now.risk - now.gap)
            if done is None or now.risk < done.risk:
                done = now
            done = replace(done, gap=max(done.risk - least, 0.0) + _ROUNDING * done.risk)
            if done.gap <= _NEAR * done.risk:
                break
    if endless:
        raise ConvergenceError(
            "the fit did not converge: of a radius of 0 and separable classes there is no minimum: take "
            "a radius > 0."
        )
    if done is None:
        raise ConvergenceError(
            "the fit did not converge: no method found a finite risk; scale features and targets."
        )
    theta = done.theta * t / s
    b = middle + t * done.b - float(centre @ theta)
    found = Fit(
        theta, b if intercept else 0.0, done.lam * t / s, done.risk * whole, done.gap * whole,
        done.steps, done.method,
    )  # fmt: skip
    return _good(_again(*given, found), at_zero * whole)


def _again(X: Array, y: Array, loss: LinearLoss, ball: Ball, found: Fit) -> Fit:
    """With the risk of the theta and b that are returned, on the data that were given."""
    value, lam = risk(X, y, loss, ball, found.theta, found.b)
    proved = found.risk - found.gap
    return replace(found, risk=value, lam=lam, gap=max(value - proved, 0.0) + _ROUNDING * value)


@np.errstate(all="ignore")
def _by_newton(
    X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool, _: "Fit | None"
) -> "Got | None":
    """Where the 2-norm, or no norm, makes all smooth."""
    if not loss.smooth or not (ball.q == 2 or ball.radius == 0):
        return None
    found = newton(X, y, loss, ball, intercept)
    u = X @ found.theta + found.b
    return found.theta, found.b, found.steps, found.method, multipliers(u, y, loss)


def _by_face(rel: float) -> "Callable[..., Got | None]":
    """From the best fit so far, of smooth losses with norms that are linear on faces."""

    @np.errstate(all="ignore")
    def method(
        X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool, near: "Fit | None"
    ) -> "Got | None":
        if near is None or not loss.smooth or ball.q == 2 or not ball.radius:
            return None
        found = on_face(X, y, loss, ball, intercept, near.theta, near.b, rel)
        if found is None:
            return None
        theta, b, steps = found
        dual = multipliers(X @ theta + b, y, loss)
        return theta, b, near.steps + steps, near.method, dual

    return method


_FACES = tuple(_by_face(rel) for rel in (1e-5, 1e-3, 1e-8))


def _by_pieces(
    X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool, _: "Fit | None"
) -> "Got | None":
    return by_pieces(X, y, loss, ball, intercept)


def _by_last(
    X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool, _: "Fit | None"
) -> "Got | None":
    if X.size > _TOO_MANY:
        return None
    found = by_cones(X, y, loss, ball, intercept)
    if found is None:
        return None
    theta, b, a = found
    return theta, b, 1, "cone program", multipliers(X @ theta + b, y, loss, a)


def _no_ball(X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool) -> Fit:
    """Of radius 0: no norm of theta counts, so the fit is in the features' principal directions.

    Columns that are constant but for rounding, and directions that are a combination of others, get
    no weight: the best theta there is not determined.
    """
    n, d = X.shape
    mean = X.mean(0) if intercept else np.zeros(d)
    off = X - mean
    spread = np.sqrt((off * off).mean(0))
    keep = spread > 8 * np.finfo(np.float64).eps * np.abs(X).max(0)
    if intercept and not keep.all():
        mean = np.where(keep, mean, X.mean(0))
    U, size, Vt = np.linalg.svd(off[:, keep] / spread[keep], full_matrices=False)
    rank = int((size > 1e-12 * (size[0] if len(size) else 0.0)).sum())
    Z = U[:, :rank] * math.sqrt(n)
    inner = Ball(0.0, 2.0, math.inf)
    if rank == 0:
        Z = np.zeros((n, 1))
    if loss.order == 2:
        found = squares(Z, y, inner, intercept)
    else:
        found = _slow(Z, y, loss, inner, intercept, None)
    theta = np.zeros(d)
    if rank:
        back = Vt[:rank].T @ (found.theta / size[:rank]) * math.sqrt(n)
        theta[keep] = back / spread[keep]
    b = found.b - float(mean @ theta) if intercept else 0.0
    found = _again(X, y, loss, ball, replace(found, theta=theta, b=b))
    return _good(found, float(loss.value(np.zeros(n), y).mean()))


def risk(
    X: Array, y: Array, loss: LinearLoss, ball: Ball, theta: Array, b: float
) -> tuple[float, float]:
    """The worst-case risk of any theta and b, and the multiplier of the radius.

    Where labels flip it is a minimum over lam, found by sorting the margins.
    """
    u = X @ theta + b
    length = float(np.linalg.norm(theta, ball.q))
    if loss.order == 2:
        size = length if loss.regression and math.isinf(ball.flip) else max(length, 1 / ball.flip)
        root = math.sqrt(float(np.mean((y - u) ** 2))) + ball.radius * size
        return root * root, size
    nominal = float(loss.value(u, y).mean())
    if loss.regression:
        size = max(length, 0.0 if math.isinf(ball.flip) else 1 / ball.flip)
        return nominal + ball.radius * loss.slope * size, size
    if math.isinf(ball.flip) or ball.radius == 0:
        return nominal + ball.radius * length, length
    lam = _price(y * u, loss, ball, length)
    m = y * u
    worse = np.maximum(
        loss.value(m, np.ones_like(m)), loss.value(-m, np.ones_like(m)) - ball.flip * lam
    )
    return float(worse.mean()) + ball.radius * lam, lam


def _price(m: Array, loss: LinearLoss, ball: Ball, length: float) -> float:
    """The best lam >= length: flips cost k/n each and there is r to spend.

    A sample flips where its gain l(-m) - l(m) is above k lam, so lam is the gain of the first sample
    that the budget does not reach, over k.
    """
    one = np.ones_like(m)
    gain = np.sort(loss.value(-m, one) - loss.value(m, one))[::-1]
    if ball.flip == 0:
        return length
    affordable = ball.radius * len(m) / ball.flip
    first = math.floor(affordable)
    last = gain[first] if first < len(m) else 0.0
    return max(length, float(last) / ball.flip)


def _corners(X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool) -> "Fit | None":
    """By active sets, where flips and moves of targets are not worth their price; else None."""
    one = np.ones(len(y))
    middle = float(np.median(y)) if intercept and loss.regression else 0.0
    c, s, low = (y - middle, -one, -1.0) if loss.regression else (one, -y, 0.0)
    found = corners.solve(X, c, s, low, 1.0, ball.radius, intercept)
    if found is None or not found.gap <= 1e-7 * (abs(found.value) + 1e-12):
        return None
    length = float(np.linalg.norm(found.theta))
    b = found.b + middle
    if math.isfinite(ball.flip):
        if loss.regression and length < 1 / ball.flip:
            return None
        if not loss.regression:
            u = X @ found.theta + b
            gain = loss.value(-u, y) - loss.value(u, y)
            if float(gain.max()) > ball.flip * length:
                return None
    return Fit(found.theta, b, length, found.value, found.gap, found.steps, "active set")
