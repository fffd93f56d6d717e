"""A robust portfolio promises less and loses less in bad years; it prints promises and what came.

Mean returns are estimated badly: over one or two years their error is larger than they are. With
the mean somewhere in an ellipsoid mu + r (S/T)^(1/2) u, ||u|| <= 1 (S/T is the covariance of the
error), the best guaranteed return is

    max over x >= 0, sum x = 1 of    mu'x - r ||(S/T)^(1/2) x||,

a robust linear program; r counts standard errors. The worst case drawn is that of the largest r. All radii r and all years are solved as one batch, then held for the
following year. Data: the daily S&P 500 prices that come with skfolio where it is installed (stocks
that are large today: all returns flatter), or a CSV of prices (a header with the names, a date first
in each line), or else made-up ones.

    python examples/08_portfolio.py [--data prices.csv] [--out portfolio.png] [--seed N] [--quick]
"""

import argparse
import csv
import gzip
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from implicitdl import plot
from implicitdl.robust import Ellipsoid, RobustLP

DAYS = 252  # of trading in a year


def read(path: Path) -> Tensor:
    """Prices, one row a day; columns that are not complete are left out.  # (days, assets)"""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    rows = [row[1:] for row in csv.reader(text.splitlines())][1:]
    prices = torch.tensor([[float(cell or "nan") for cell in row] for row in rows]).double()
    return prices[:, (prices > 0).all(0)]


def made_up(years: int) -> Tensor:
    """Prices of 12 assets that follow one market, with normal returns."""
    market = 0.0004 + 0.01 * torch.randn(years * DAYS, 1).double()
    own = 0.015 * torch.randn(years * DAYS, 12).double()
    return (1 + market * torch.linspace(0.5, 1.5, 12) + own).cumprod(0)


def prices(path: Path | None) -> tuple[Tensor, str]:
    """Prices, and where they are from."""
    if path is not None:
        return read(path), str(path)
    skfolio = importlib.util.find_spec("skfolio")
    if skfolio is not None:
        bundled = Path(skfolio.origin).parent / "datasets" / "data" / "sp500_dataset.csv.gz"
        if bundled.exists():
            return read(bundled), "S&P 500 stocks, from skfolio"
    print("MADE-UP prices: no --data given, skfolio not installed (pip install skfolio)")
    return made_up(20), "made-up prices"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="CSV of prices")
    parser.add_argument("--out", type=Path, default=Path("portfolio.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the last ten years, fewer radii")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    value, label = prices(arguments.data)
    known, radii = 2 * DAYS, torch.linspace(0, 4, 9 if arguments.quick else 33).double()
    if len(value) <= known + DAYS:
        parser.error(f"--data: got {len(value)} days of prices, expected more than {known + DAYS}")
    returns = value[1:] / value[:-1] - 1
    windows = returns.unfold(0, known + DAYS, DAYS).movedim(2, 1)  # (years, days, assets)
    windows = windows[-8:] if arguments.quick else windows
    past, future = windows[:, :known], windows[:, known:]

    mu = DAYS * past.mean(1)  # (years, assets)
    off = past - past.mean(1, keepdim=True)
    S = DAYS**2 * off.mT @ off / (known - 1)
    n = mu.shape[1]
    ones = torch.ones(1, n, dtype=torch.float64)
    none = torch.zeros(0, n, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    program = RobustLP(
        -mu,
        *none,
        objective=Ellipsoid.of_covariance(S / known),
        low=0.0,
        equality=(ones, ones[0, :1]),
    )
    x = program.trade_off(radii, on_failure="raise").value  # (radii, years, assets)
    estimated = (mu * x).sum(-1)
    error = program.objective.support(x)  # h(x), for r = 1
    came = DAYS * (future.mean(1) * x).sum(-1)

    print(f"{label}: {n} assets, {len(mu)} times two years to estimate and one to hold")
    print("radius   estimated   guaranteed   the year after   worst year   (% a year)")
    guaranteed = estimated - radii[:, None] * error
    for k in range(0, len(radii), len(radii) // 8):
        row = [100 * t[k].mean() for t in (estimated, guaranteed, came)] + [100 * came[k].min()]
        print(f"{radii[k]:6.1f}" + "{:12.1f}{:13.1f}{:17.1f}{:13.1f}".format(*row))
    worst = (estimated - radii[-1] * error).mean(1)
    figure = plot.trade_off(
        radii, 100 * estimated.mean(1), 100 * worst, also={"the year after": 100 * came.mean(1)},
        label="return (% a year)",
    )  # fmt: skip
    print(f"drawn: {plot.save(figure, arguments.out)}")

    # Attack: of random means on the ellipsoid none is worse than guaranteed, and one is as bad.
    attacked = program.scaled(radii[:, None])
    seen = -(attacked.sample(100, boundary=True).c * x).sum(-1)
    assert (seen > guaranteed - 1e-9).all()
    reached = -(attacked.worst_case(x).c * x).sum(-1)
    assert torch.allclose(reached, guaranteed)
    assert torch.allclose(x.sum(-1), torch.ones(()).double()) and (x > -1e-9).all()
    assert (worst.diff() > -1e-9).all() and (estimated.mean(1).diff() < 1e-9).all()


if __name__ == "__main__":
    main()
