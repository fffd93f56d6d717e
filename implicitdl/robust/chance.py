"""Linear programs whose rows are random, each to hold with high probability."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..solution import Solution
from .base import UncertaintySet, finite, tensor
from .families import Family, Gaussian
from .programs import RobustLP
from .sets import Ball, Ellipsoid


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Means and covariances of random rows, and how well they are known.

    For every x, the true mean of d'x is at most mean'x + shift ||factor'x|| + radius ||x||, and its
    standard deviation at most ||factor'x||.

    Args:
        mean: # (..., m, k)
        factor: L with L L' the covariance.  # (..., m, k, r)
        shift, radius: >= 0, the error of the mean.  # numbers or (..., m)
    """

    mean: Tensor
    factor: Tensor
    shift: "float | Tensor" = 0.0
    radius: "float | Tensor" = 0.0

    def __post_init__(self) -> None:
        mean = tensor("mean", self.mean, 2, "(..., m, k)")
        factor = tensor("factor", self.factor, 2, "(..., m, k, r)")
        if factor.shape[-2] != mean.shape[-1]:
            raise ValueError(
                f"factor: got shape {tuple(factor.shape)}, expected (..., m, {mean.shape[-1]}, r) "
                f"beside a mean of shape {tuple(mean.shape)}."
            )
        for name in ("shift", "radius"):
            value = tensor(name, getattr(self, name), 0, "(..., m)", [mean])
            if bool((value < 0).any()):
                raise ValueError(f"{name}: got {float(value.min()):.6g}, expected numbers >= 0.")
            object.__setattr__(self, name, value)

    @classmethod
    def from_samples(
        cls, samples: Tensor, *, confidence: float | None = None,
        bound: "float | Tensor | None" = None, centre: Tensor | None = None,
    ) -> "Moments":  # fmt: skip
        """Estimates, and what has to be added for them to hold with a confidence.

        Without `confidence` the estimates themselves. With it, and probability at least `confidence`
        over the samples, for each row: the true mean and covariance are within what is returned,
        for all x at once,

        - of normal samples (no `bound`): the mean by Hotelling's T^2; the covariance by the least
          singular value of a Gaussian matrix, Sigma <= S (N - 1) / (sqrt(N - 1) - sqrt(k) -
          sqrt(2 ln(2/delta)))^2 with delta = 1 - confidence;
        - of samples of any law with ||d - centre|| <= bound: ||mean - estimate|| <= e_1 = R/sqrt(N)
          (1 + sqrt(2 ln(2/delta))), by McDiarmid's inequality, and Sigma <= S + (e_2 + 2
          ||estimate - centre|| e_1) I, e_2 = R^2/sqrt(N) (1 + sqrt(ln(2/delta))). Safe, and large.

        Args:
            samples: # (N, ..., m, k)
            confidence: in (0, 1), of each row.
            bound: R.  # a number or (..., m)
            centre: known beforehand, not from the samples; None for 0.  # (..., m, k)

        Raises:
            ValueError: too few samples for the correction, or one beyond the bound.

        Reference:
            Calafiore, El Ghaoui (2006), section 4, for the plan; Davidson, Szarek (2001), theorem
            II.13, for the singular value; Shawe-Taylor, Cristianini (2003) for bounds of the second
            kind.
        """
        tensor("samples", samples, 3, "(N, ..., m, k)")
        N, k = samples.shape[0], samples.shape[-1]
        if N < 2:
            raise ValueError(f"samples: got {N}, expected at least 2.")
        mean = samples.mean(0)
        off = (samples - mean).movedim(0, -2)
        factor = torch.linalg.qr(off, mode="r").R.mT / math.sqrt(N - 1)
        if confidence is None:
            return cls(mean=mean, factor=factor)
        if not 0 < confidence < 1:
            raise ValueError(f"confidence: got {confidence}, expected a number in (0, 1).")
        log = math.log(2 / (1 - confidence))
        if bound is None:
            from scipy.special import fdtri

            root = math.sqrt(N - 1) - math.sqrt(k) - math.sqrt(2 * log)
            if root <= 0:
                least = math.ceil((math.sqrt(k) + math.sqrt(2 * log)) ** 2) + 2
                raise ValueError(
                    f"samples: got {N} of dimension {k}, expected at least {least} for a confidence "
                    f"of {confidence}."
                )
            inflation = math.sqrt(N - 1) / root
            hotelling = k * (N - 1) / (N - k) * float(fdtri(k, N - k, (1 + confidence) / 2))
            shift = math.sqrt(hotelling / N)
            # In lengths of the inflated factor, which is what they are added to.
            return cls(mean=mean, factor=inflation * factor, shift=shift / inflation)
        R = torch.as_tensor(bound, dtype=samples.dtype, device=samples.device)
        middle = torch.zeros_like(mean) if centre is None else centre
        far = torch.linalg.vector_norm(samples - middle, dim=-1)
        if bool((far > R * (1 + 1e-9)).any()):
            raise ValueError(
                f"bound: got {float(R.max()):.6g}, but a sample is {float(far.max()):.6g} from the "
                "centre; expected a bound that all data keep."
            )
        e1 = R / math.sqrt(N) * (1 + math.sqrt(2 * log))
        e2 = R * R / math.sqrt(N) * (1 + math.sqrt(log))
        more = e2 + 2 * torch.linalg.vector_norm(mean - middle, dim=-1) * e1
        covariance = off.mT @ off / N + torch.diag_embed(more[..., None].expand(mean.shape))
        return cls(
            mean=mean, factor=torch.linalg.cholesky(covariance), radius=e1.expand(more.shape)
        )


@dataclass(frozen=True, eq=False)
class Frequency:
    """How often rows were violated in a simulation.

    Attributes:
        rate: the share.  # (*batch, m)
        low, high: the Clopper-Pearson interval of each probability, at `confidence`.
        joint_rate, joint_low, joint_high: of any row being violated.  # (*batch,)
        confidence: of each interval.
        draws: how many.
    """

    rate: Tensor
    low: Tensor
    high: Tensor
    joint_rate: Tensor
    joint_low: Tensor
    joint_high: Tensor
    confidence: float
    draws: int


@dataclass(frozen=True, eq=False)
class ChanceConstrainedLP:
    """min c'x over Prob{a_i'x <= b_i} >= 1 - eps_i for each row i, a_i random.

    With kappa of the family of laws, the row is mean_i'x + kappa_i ||factor_i'x|| <= b_i: a robust
    row over an ellipsoid, exactly for the laws that the family says, an upper bound for `Bounded`.

    Args:
        c: # (*batch, n)
        moments: of the rows a_i, k = n; or of (a_i, b_i), k = n + 1.
        b: with k = n; None with k = n + 1.  # (*batch, m)
        eps: in (0, 1/2]; above, the feasible set is not convex.  # a number or (*batch, m)
        family: which laws the rows may have; see `implicitdl.robust.families`.
        joint: all rows hold together with probability 1 - eps, by Bonferroni's inequality: each is
            given eps / m. Safe for any dependence between rows, and the more cautious the more rows
            there are. eps is then a number or (*batch,).
        certain, equality, low, high: as in `RobustLP`.

    Raises:
        ValueError, TypeError: data that do not fit together, eps outside (0, 1/2].

    Example:
        >>> import torch
        >>> from implicitdl.robust import ChanceConstrainedLP, Moments
        >>> rows = Moments(mean=torch.ones(1, 2), factor=0.1 * torch.eye(2)[None])
        >>> program = ChanceConstrainedLP(-torch.ones(2), rows, torch.ones(1), eps=0.05, low=0.0)
        >>> program.solve().value
        tensor([0.4479, 0.4479])

    Reference:
        Calafiore, El Ghaoui (2006), "On distributionally robust chance-constrained linear programs",
        theorems 2.1 to 3.1.
    """

    c: Tensor
    moments: Moments
    b: Tensor | None = None
    _: KW_ONLY
    eps: "float | Tensor"
    family: Family = Gaussian()  # noqa: RUF009 (frozen, without state)
    joint: bool = False
    certain: "tuple[Tensor, Tensor] | None" = None
    equality: "tuple[Tensor, Tensor] | None" = None
    low: "float | Tensor | None" = None
    high: "float | Tensor | None" = None

    def __post_init__(self) -> None:
        tensor("c", self.c, 1, "(..., n)")
        if not isinstance(self.moments, Moments):
            raise TypeError(f"moments: got {type(self.moments).__name__}, expected Moments.")
        if not isinstance(self.family, Family):
            raise TypeError(
                f"family: got {self.family!r}, expected one of implicitdl.robust.families, "
                "Gaussian() for example."
            )
        n, (m, k) = self.c.shape[-1], self.moments.mean.shape[-2:]
        if k not in (n, n + 1) or (k == n) == (self.b is None):
            raise ValueError(
                f"moments: got rows of dimension {k}, b {'missing' if self.b is None else 'given'}, "
                f"expected {n} and b, or {n + 1} for (a_i, b_i) without b."
            )
        eps = tensor("eps", self.eps, 0, "(..., m)", [self.c])
        if bool(((eps <= 0) | (eps > 0.5)).any()):
            bad = eps.detach()[(eps <= 0) | (eps > 0.5)].flatten()[0]
            raise ValueError(
                f"eps: got {float(bad):.6g}, expected numbers in (0, 1/2]: for larger ones the set of "
                "feasible x is not convex."
            )
        if not self.joint and eps.dim() and eps.shape[-1] not in (1, m):
            raise ValueError(f"eps: got shape {tuple(eps.shape)}, expected (..., {m}), one a row.")
        object.__setattr__(self, "eps", eps)

    @property
    def row_eps(self) -> Tensor:
        """The probability of violation that each row is allowed.  # broadcasts against (*batch, m)"""
        eps = torch.as_tensor(self.eps)
        return eps[..., None] / self.moments.mean.shape[-2] if self.joint else eps

    @property
    def kappa(self) -> Tensor:
        """Standard deviations that are kept from each limit.  # broadcasts against (*batch, m)"""
        return self.family.kappa(self.row_eps, self.moments.factor.shape[-1])

    def robust(self) -> RobustLP:
        """The robust program that is equivalent, for its radii, attacks and cvxpy form."""
        M = self.moments
        n = self.c.shape[-1]
        b = M.mean[..., n] if self.b is None else self.b
        length = (self.kappa + M.shift)[..., None, None].to(M.factor)
        U: UncertaintySet = Ellipsoid(shape=length * M.factor)
        if bool((torch.as_tensor(M.radius) > 0).any()):
            U = U + Ball(radius=M.radius, dimension=M.mean.shape[-1])
        return RobustLP(
            self.c, M.mean[..., :n], b, uncertainty=U, certain=self.certain, equality=self.equality,
            low=self.low, high=self.high,
        )  # fmt: skip

    def solve(self, **options: Any) -> Solution:
        """The solution, differentiable with respect to all data, both moments and eps.

        Args:
            options: of `RobustLP.solve`: `solver`, `on_failure`, `order`, `start`.

        Returns:
            As `RobustLP.solve`; `stats` has `kappa` and `joint`, `"Bonferroni"` or None.

        Raises:
            InfeasibleError: no x satisfies the rows with these probabilities.
        """
        solution = self.robust().solve(**options)
        joint = "Bonferroni" if self.joint else None
        return replace(
            solution, stats={**solution.stats, "kappa": self.kappa.detach(), "joint": joint}
        )

    def simulate(
        self, x: Tensor, draws: int = 10_000, *, law: "Family | Tensor | None" = None,
        confidence: float = 0.99, tol: float = 1e-7, generator: torch.Generator | None = None,
    ) -> Frequency:  # fmt: skip
        """How often random rows violate their limit at x.

        Args:
            x: # (*batch, n)
            draws: how many.
            law: a family, whose draws are scaled by the moments; or the rows themselves, new data
                for example, (draws, *batch, m, k); None for the program's own family: its worst law
                for x where one is known.
            confidence: of the Clopper-Pearson intervals.
            tol: a row is violated where it is above its limit by more than this times 1 + |limit|.
            generator: of the random numbers.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence: got {confidence}, expected a number in (0, 1).")
        M, n = self.moments, self.c.shape[-1]
        with torch.no_grad():
            v = x if self.b is not None else torch.nn.functional.pad(x, (0, 1), value=-1.0)
            limit = torch.zeros((), dtype=x.dtype) if self.b is None else self.b
            if isinstance(law, Tensor):
                finite("law", law)
                rows, draws = law, law.shape[0]
            else:
                family = self.family if law is None else law
                pulled = (M.factor.mT @ v[..., None, :, None])[..., 0]  # (..., m, r)
                size = torch.linalg.vector_norm(pulled, dim=-1, keepdim=True)
                first = torch.zeros_like(pulled)
                first[..., 0] = 1.0
                away = torch.where(size > 0, pulled / size.clamp_min(1e-300), first)
                w = family.draw(draws, away, self.row_eps.to(away), generator)
                rows = M.mean + (M.factor @ w[..., None])[..., 0]
            got = (rows * v[..., None, :]).sum(-1)  # (draws, ..., m)
            if self.b is None:
                size = (rows[..., n]).abs()
                broken = got > tol * (1 + size)
            else:
                broken = got - limit > tol * (1 + limit.abs())
            count, any_ = broken.sum(0), broken.any(-1).sum(0)
        low, high = clopper_pearson(count, draws, confidence)
        joint = clopper_pearson(any_, draws, confidence)
        return Frequency(
            rate=count / draws, low=low, high=high, joint_rate=any_ / draws, joint_low=joint[0],
            joint_high=joint[1], confidence=confidence, draws=draws,
        )  # fmt: skip


def clopper_pearson(count: Tensor, draws: int, confidence: float = 0.99) -> tuple[Tensor, Tensor]:
    """The exact interval of a probability that was seen `count` times in `draws`.

    Args:
        count: # (...)
        draws: how many.
        confidence: with at least this probability the interval holds the true one.

    Reference:
        Clopper, Pearson (1934), "The use of confidence or fiducial limits".
    """
    from scipy.special import betaincinv

    k = count.detach().cpu().double().numpy()
    tail = (1 - confidence) / 2
    low = betaincinv(k.clip(1), draws - k + 1, tail) * (k > 0)
    high = betaincinv(k + 1, (draws - k).clip(1), 1 - tail)
    high = high * (k < draws) + (k >= draws)
    dtype = torch.get_default_dtype()
    return tuple(torch.as_tensor(t).to(count.device, dtype) for t in (low, high))  # type: ignore[return-value]


class ChanceConstrainedLayer(nn.Module):
    """A chance-constrained program whose moments and eps are learned: c, b in, x out.

    Parameters are the mean, the factor of the covariance, and the logit of 2 eps.

    Args:
        moments: where to start.
        eps: where to start, in (0, 1/2).  # a number or (m,)
        family, joint: as in `ChanceConstrainedLP`.
        learn: which of "mean", "factor" and "eps" are parameters; the others are constants.
        constraints: `certain`, `equality`, `low`, `high` as in `ChanceConstrainedLP`.

    Example:
        >>> import torch
        >>> from implicitdl.robust import ChanceConstrainedLayer, Moments
        >>> rows = Moments(mean=torch.ones(1, 2), factor=0.1 * torch.eye(2)[None])
        >>> layer = ChanceConstrainedLayer(rows, eps=0.05, low=0.0)
        >>> x = layer(-torch.ones(3, 2), torch.ones(3, 1))  # three programs
        >>> x.sum().backward()
        >>> x.shape, layer.factor.grad.shape
        (torch.Size([3, 2]), torch.Size([1, 2, 2]))
    """

    mean: Tensor
    factor: Tensor
    logit: Tensor
    shift: Tensor
    radius: Tensor

    def __init__(
        self, moments: Moments, *, eps: "float | Tensor", family: Family | None = None,
        joint: bool = False, learn: Sequence[str] = ("mean", "factor", "eps"), **constraints: Any,
    ):  # fmt: skip
        super().__init__()
        unknown = set(learn) - {"mean", "factor", "eps"}
        if unknown:
            raise ValueError(
                f"learn: got {sorted(unknown)}, expected names among 'mean', 'factor', 'eps'."
            )
        eps = tensor("eps", eps, 0, "(..., m)", [moments.mean])
        if bool(((eps <= 0) | (eps >= 0.5)).any()):
            raise ValueError(f"eps: got {eps.tolist()}, expected numbers in (0, 1/2).")
        self.family, self.joint, self.constraints = family or Gaussian(), joint, constraints
        values = {"mean": moments.mean, "factor": moments.factor, "logit": torch.logit(2 * eps)}
        for name, value in values.items():
            value = value.detach().clone()
            if name.replace("logit", "eps") in learn:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        for name in ("shift", "radius"):
            self.register_buffer(name, torch.as_tensor(getattr(moments, name)).detach().clone())

    @property
    def eps(self) -> Tensor:
        """What is allowed now, in (0, 1/2)."""
        return 0.5 * torch.sigmoid(self.logit)

    def program(self, c: Tensor, b: Tensor | None = None) -> ChanceConstrainedLP:
        """The programs that the layer solves, for their solutions, simulations and radii."""
        moments = Moments(mean=self.mean, factor=self.factor, shift=self.shift, radius=self.radius)
        return ChanceConstrainedLP(
            c, moments, b, eps=self.eps, family=self.family, joint=self.joint, **self.constraints
        )

    def forward(self, c: Tensor, b: Tensor | None = None) -> Tensor:
        """The solutions.  # (*batch, n), (*batch, m) -> (*batch, n)"""
        return self.program(c, b).solve().value

    def extra_repr(self) -> str:
        """The family and whether rows hold jointly."""
        return f"family={self.family}, joint={self.joint}"
