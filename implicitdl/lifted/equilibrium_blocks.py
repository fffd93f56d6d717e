"""Blocks of an implicit model: the equation x = phi(A x + B u + b) itself becomes the penalty.

    J = (1/m) sum_k [ loss(y_k, C x_k + D u_k + d) + mu D(x_k, A x_k + B u_k + b) ] + regularisation

(A, B, b) and (C, D, d) are convex fits of rows, A's rows in l1 balls; each x is descended by proximal
gradient on g(x) = F(A x + v) - <x, A x + v> + loss / mu, which is smooth with constant
L = beta ||A||^2 + 2 ||A|| + beta_loss ||C||^2 / mu, not convex in general.

Reference: El Ghaoui et al. (2021), section 6; Tsai et al. (2022) for the rows.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .._linalg import resolvent_vector
from .._sharing import Sharing
from ..wellposed import InfNormBall, PerronFrobenius
from .chain import require_whole
from .penalties import Loss, Penalty
from .rows import Region, Rows, fit_rows
from .running import Process, model_tensors, restore
from .states import descend


class EquilibriumBlocks(Process):
    """Sweeps over the states and weights of an `ImplicitLayer`."""

    model: Any

    def __init__(
        self, model: Any, loss: Loss, penalty: Penalty, rows: Rows, mu: float, growth: float,
        counts: tuple[int, int, bool, float], sharing: Sharing,
    ):  # fmt: skip
        kept = getattr(model, "well_posed", None)
        if not isinstance(kept, InfNormBall | PerronFrobenius):
            raise ValueError(  # noqa: TRY004 - a choice that does not fit, of the right type
                f"model: its A is kept in {kept}, expected 'inf-norm' or 'perron-frobenius', sets "
                "of independent rows; `lifted.local` trains the others."
            )
        if model.low_rank is not None or model.mask is not None:
            raise ValueError(
                "model: got one with low_rank or a mask, expected a full A, whose rows are convex "
                "programs; `lifted.local` trains the others."
            )
        if not penalty.divergence:
            raise ValueError(f"penalty: got {penalty}, expected 'fenchel' for an implicit model.")
        if rows.radius is not None:
            raise ValueError("rows: got a radius, expected None: the layer's own set bounds A.")
        penalty.check(model.activation)
        self.model, self.loss, self.penalty, self.rows = model, loss, penalty, rows
        self.mu, self.growth, self.kept = mu, growth, kept
        self.phi = model.activation
        self.state_steps, self.weight_steps, self.trace, self.damping = counts
        self.sharing = sharing
        self.details: dict[str, Any] = {}
        self.trained = {
            "states": True,
            "readout": require_whole("C, D and d", (model.C, model.D, model.d)),
            "equation": require_whole("A, B and b", (model.W, model.B, model.b)),
        }
        if not (self.trained["readout"] or self.trained["equation"]):
            raise ValueError("model: all of its parameters are frozen, expected one to train.")

    def outputs(self, u: Tensor) -> int:
        """How many the layer has for such inputs."""
        if u.shape[1:] != (self.model.in_features,):
            raise ValueError(
                f"data: got samples of shape {tuple(u.shape[1:])}, expected "
                f"({self.model.in_features},)."
            )
        return self.model.out_features

    @torch.no_grad()
    def start(self, u: Tensor, y: Tensor, labels: bool) -> None:
        """A in its set, and the states at the equilibrium."""
        self.u, self.y, self.labels = u, y, labels
        self.count = int(self.sharing.total(u.new_tensor([len(y)], dtype=torch.float64)))
        if self.trained["equation"]:
            self.model.W.copy_(self.model.A)
        self.x = self.model.state(u)

    # (A, B, b) and (C, D, d) side by side, without what the layer does not have

    def _equation(self) -> Tensor:
        m = self.model
        parts = [m.W, m.B] + ([] if m.b is None else [m.b[:, None]])
        return torch.cat(parts, 1).detach()

    def _readout(self) -> Tensor:
        m = self.model
        parts = [m.C] + ([] if m.D is None else [m.D]) + ([] if m.d is None else [m.d[:, None]])
        return torch.cat(parts, 1).detach()

    def _regressors(self, direct: bool) -> Tensor:
        one = [] if self.model.b is None else [self.x.new_ones(len(self.x), 1)]
        return torch.cat([self.x] + ([self.u] if direct else []) + one, 1)

    def _regions(self) -> tuple[Region, Region]:
        """Of (A, B, b), without A's balls, and of (C, D, d)."""
        n, p = self.model.state_features, self.model.in_features
        width = n + (0 if self.model.D is None else p)
        first = Region.of(self.rows, self._equation(), n + p)
        return first, Region.of(self.rows, self._readout(), width)

    def _ball(self) -> Region:
        """Of (A, B, b), with A's balls."""
        first, n = self._regions()[0], self.model.state_features
        v = self._weights()
        ball = torch.zeros_like(first.l1)
        ball[:n] = v
        return Region(l1=first.l1, ridge=first.ridge, radius=self.kept.kappa * v, ball=ball)

    def _weights(self) -> Tensor:
        """v > 0 with |A| v <= kappa v: the rows of A may then move in {|A'| v <= kappa v}, a subset
        of the Perron-Frobenius set that A is inside of. Ones for the inf-norm ball."""
        A = self.model.W.detach()
        if isinstance(self.kept, InfNormBall):
            return A.new_ones(len(A))
        if self.kept.weights is not None:
            return self.kept.weights.to(A)
        kappa, eps = self.kept.kappa, torch.finfo(A.dtype).eps
        # On the boundary there is no such v: take one of a bound that is a little larger. A step
        # that is then taken ends inside, and where none goes down A stays as it is.
        bounds = (kappa * (1 + slack) for slack in (0.0, 64 * eps, 1e4 * eps, eps**0.5, 1e-2))
        found = (resolvent_vector(A.abs(), bound) for bound in bounds)
        v = next((v for v in found if v is not None), None)
        if v is None:
            raise ValueError(f"model: A is outside {self.kept}; bring it back with `.project(A)`.")
        return (v / v.mean()).to(A)

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Loss and penalty of each sample, mu included."""
        z = self._regressors(True) @ self._equation().mT
        out = self._regressors(self.model.D is not None) @ self._readout().mT
        return self.loss.value(self.y, out), self.mu * self.penalty.value(self.phi, self.x, z)

    @torch.no_grad()
    def objective(self) -> float:
        """J."""
        loss, penalty = self._parts()
        first, second = self._regions()
        extra = first.value(self._equation()) + second.value(self._readout())
        return float(self._mean(loss + penalty) + extra)

    def _mean(self, values: Tensor) -> float:
        """Over the samples of all processes."""
        return float(self.sharing.total(values.double().sum().reshape(1))) / self.count

    @torch.no_grad()
    def epoch(self, number: int) -> dict[str, Any]:
        """States, readout, equation."""
        if number > 0:
            self.mu *= self.growth
        steps = []
        for name, step in (("states", self._states), ("readout", self._fit_readout),
                           ("equation", self._fit_equation)):  # fmt: skip
            if self.trained[name]:
                step()
            if self.trace:
                steps.append([name, self.objective()])
        if self.trace:
            self.details["steps"] = steps
        loss, penalty = self._parts()
        free = self.model.state(self.u)
        off, size = self._mean((self.x - free).pow(2).sum(1)), self._mean(free.pow(2).sum(1))
        share = math.nan
        if self.labels:
            out = self.model.readout(free, self.u)
            share = self._mean(out.argmax(1) == self.y.argmax(1))
        return {
            "objective": self.objective(),
            "loss": self._mean(loss),
            "penalties": [self._mean(penalty)],
            "feasibility": math.sqrt(off / (size or 1.0)),
            "accuracy": share,
        }

    def _states(self) -> None:
        m, phi = self.model, self.phi
        A, C = m.W.detach(), m.C.detach()
        x0 = torch.zeros_like(self.x)
        v = torch.nn.functional.linear(self.u, m.B, m.b).detach()
        rest = m.readout(x0, self.u).detach()

        def value(x: Tensor) -> Tensor:
            z = torch.addmm(v, x, A.mT)
            out = torch.addmm(rest, x, C.mT)
            return phi.divergence(x, z) + self.loss.value(self.y, out) / self.mu

        def step(x: Tensor, L: float) -> Tensor:
            z = torch.addmm(v, x, A.mT)
            top = self.loss.residual(self.y, torch.addmm(rest, x, C.mT)) / self.mu
            slope = (phi(z) - x) @ A - z + top @ C
            return self.penalty.minimise(phi, x0, L * x - slope, L)

        a, c = (float(torch.linalg.matrix_norm(t, 2)) for t in (A, C))
        beta = phi.slope[1]
        L = 1.001 * (beta * a * a + 2 * a + self.loss.curvature * c * c / self.mu)
        sigma = self.penalty.strong(phi)
        x = descend(self.x, step, value, L, sigma, self.state_steps)
        # Where extrapolation went up, plain steps, which go down for every smooth g.
        self.x = descend(x, step, value, L, 0.0, 1)

    def _fit_readout(self) -> None:
        m = self.model
        region = self._regions()[1]
        theta = fit_rows(
            self._readout(),
            self._regressors(m.D is not None),
            lambda z: self.loss.value(self.y, z).sum(),
            lambda z: self.loss.residual(self.y, z),
            self.loss.curvature,
            region,
            weight=1.0 / self.count,
            add_up=self.sharing.total,
            steps=self.weight_steps,
            damping=self.damping,
        )
        n, p = m.state_features, m.in_features
        m.C.copy_(theta[:, :n])
        if m.D is not None:
            m.D.copy_(theta[:, n : n + p])
        if m.d is not None:
            m.d.copy_(theta[:, -1])

    def _fit_equation(self) -> None:
        m = self.model
        theta = fit_rows(
            self._equation(),
            self._regressors(True),
            lambda z: self.mu * self.penalty.value(self.phi, self.x, z).sum(),
            lambda z: self.mu * self.penalty.residual(self.phi, self.x, z),
            self.mu * self.penalty.curvature(self.phi),
            self._ball(),
            weight=1.0 / self.count,
            add_up=self.sharing.total,
            steps=self.weight_steps,
            damping=self.damping,
        )
        n, p = m.state_features, m.in_features
        m.W.copy_(theta[:, :n])
        m.B.copy_(theta[:, n : n + p])
        if m.b is not None:
            m.b.copy_(theta[:, -1])

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, states, mu."""
        found = model_tensors(self.model) | {"state": self.x}
        found["mu"] = torch.tensor(self.mu, dtype=torch.float64)
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Parameters, states, mu."""
        restore(self.model, tensors)
        self.x = tensors["state"].clone()
        self.mu = float(tensors["mu"])
