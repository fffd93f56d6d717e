"""A feed mix that meets its limits on 95 % of days costs a little more; it prints how much and checks.

Six ingredients are mixed to the least cost; protein and energy must not be below, fibre not above a
limit. Contents differ from lot to lot: a_i is random. Planned with the means, a limit that is met
exactly is missed on every second day. With Prob{a_i'x <= b_i} >= 1 - eps in its place, the row is

    mean_i'x + kappa ||Gamma_i^(1/2) x|| <= b_i,

a second-order cone: kappa = Phi^-1(1 - eps) where contents are normal, sqrt((1 - eps) / eps) where
nothing but mean and covariance is known. Both are checked by simulation: normal contents, skewed
ones, and the law that is worst for the mix; the intervals are Clopper and Pearson's, 99 %.

    python examples/11_blending.py [--seed N] [--quick]
"""

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from implicitdl.robust import AnyLaw, ChanceConstrainedLP, Frequency, Gaussian, Moments

# Per kg: price; protein (%), energy (MJ), fibre (%), of the usual order for such feeds.
INGREDIENTS = {
    "maize": (0.21, 8.5, 14.0, 2.3),
    "wheat": (0.24, 12.0, 13.2, 2.6),
    "barley": (0.20, 11.0, 12.0, 5.0),
    "soybean meal": (0.42, 46.0, 13.5, 5.5),
    "sunflower meal": (0.27, 34.0, 9.5, 20.0),
    "pea": (0.33, 21.5, 13.4, 5.8),
}
SPREAD = (0.08, 0.02, 0.10)  # standard deviation over mean, of protein, energy, fibre
LIMITS = (18.0, 12.8, 5.5)  # at least, at least, at most
SIGNS = torch.tensor([-1.0, -1.0, 1.0]).double()  # as rows a'x <= b
EPS = 0.05


def mix(**options) -> ChanceConstrainedLP:
    """Shares x >= 0 that add up to 1."""
    table = torch.tensor(list(INGREDIENTS.values())).double()
    price, contents = table[:, 0], table[:, 1:].mT  # (3, ingredients)
    deviations = torch.tensor(SPREAD).double()[:, None] * contents
    rows = Moments(mean=SIGNS[:, None] * contents, factor=torch.diag_embed(deviations))
    total = torch.ones(1, len(price)).double(), torch.ones(1).double()
    limits = SIGNS * torch.tensor(LIMITS).double()
    return ChanceConstrainedLP(price, rows, limits, low=0.0, equality=total, **options)


def skewed(program: ChanceConstrainedLP, draws: int) -> Tensor:
    """Rows of the same mean and covariance, exponential with the long tail where it does harm."""
    M = program.moments
    w = -1 - torch.log1p(-torch.rand(draws, *M.mean.shape, dtype=torch.float64))
    return M.mean + torch.diagonal(M.factor, dim1=-2, dim2=-1) * w


def shown(f: Frequency) -> str:
    """The row that is violated most, and its interval."""
    k = int(f.rate.argmax())
    return f"{100 * f.rate[k]:5.1f} [{100 * f.low[k]:4.1f}, {100 * f.high[k]:4.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer draws")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    draws = 20_000 if arguments.quick else 100_000
    plans = {
        "means alone": mix(eps=0.5),  # kappa = 0
        "normal": mix(eps=EPS),
        "normal, all rows": mix(eps=EPS, joint=True),
        "any law": mix(eps=EPS, family=AnyLaw()),
    }
    print(f"the worst row, % of {draws:,} days on which it is missed")
    print(
        f"{'planned for':<17}  kappa  price       normal contents        skewed ones      worst law"
    )
    checks, price = {}, {}
    for name, program in plans.items():
        x = program.solve().value
        kappa = abs(float(program.kappa.max()))
        price[name] = float(program.c @ x)
        # A limit kappa deviations away is missed with at most 1 / (1 + kappa^2); a law of two points
        # comes as near as one likes.
        worst = min(0.499, 0.98 / (1 + kappa**2))
        laws = {
            "normal": program.simulate(x, draws, law=Gaussian()),
            "skewed": program.simulate(x, law=skewed(program, draws)),
            "worst": replace(program, eps=worst, family=AnyLaw(), joint=False).simulate(x, draws),
        }
        checks[name] = laws
        print(f"{name:<17} {kappa:6.2f} {price[name]:6.4f}  "
              + "  ".join(shown(f) for f in laws.values()))  # fmt: skip
    joint = checks["normal, all rows"]["normal"]
    print(f"any row missed, with all rows planned together: {100 * joint.joint_rate:.2f} % "
          f"[{100 * joint.joint_low:.2f}, {100 * joint.joint_high:.2f}] (Bonferroni)")  # fmt: skip

    normal, safe = checks["normal"], checks["any law"]
    half = checks["means alone"]["normal"]
    assert bool(((half.low < 0.5) & (half.high > 0.5)).any()), "an active row, every second day"
    assert bool((normal["normal"].low <= EPS).all()) and bool((normal["worst"].low > EPS).any())
    assert all(bool((f.low <= EPS).all()) for f in safe.values())
    assert float(joint.joint_low) <= EPS
    assert price["means alone"] < price["normal"] < price["any law"]


if __name__ == "__main__":
    main()
