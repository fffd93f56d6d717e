"""An uncertainty set learned through the robust program earns more at the same risk; it prints both.

A workshop plans six products, x >= 0, for the prices p of the day: max p'x over a_i'x <= 1, four
machines whose usages a_i are random. It wants a plan that overloads a machine on 5 % of days. A robust
linear program with an ellipsoid for each machine has such plans. Usually its shape is the covariance
of the data; but half of the products vary much without harm (some days are easy), the others less and
with harm. Here shape and centre are parameters of a layer like any others: the gradient of profit and
overload goes through the solution of the program.

    python examples/09_robust_layer.py [--seed N] [--quick]
"""

import argparse

import torch
from torch import Tensor, nn

from implicitdl.robust import Ellipsoid, RobustLP

PRODUCTS, MACHINES, TARGET = 6, 4, 0.05


def days(count: int, usual: Tensor) -> Tensor:
    """Usage of each machine by each product.  # (count, MACHINES, PRODUCTS)"""
    half = PRODUCTS // 2
    easy = (torch.rand(count, MACHINES, half) < 0.3).double()  # at times much less than usual
    hard = (0.25 * torch.randn(count, MACHINES, PRODUCTS - half)).exp()  # at times much more
    return usual * torch.cat([1.2 - easy, hard], 2)


class Plan(nn.Module):
    """Prices -> the best plan that holds for all usages in the machines' ellipsoids."""

    def __init__(self, samples: Tensor):
        super().__init__()
        off = samples - samples.mean(0)
        covariance = torch.einsum("sik,sil->ikl", off, off) / len(samples)
        self.register_buffer("mean", samples.mean(0))
        self.shape = nn.Parameter(2 * torch.linalg.cholesky(covariance))
        self.centre = nn.Parameter(torch.zeros(MACHINES, PRODUCTS))

    def program(self, prices: Tensor) -> RobustLP:
        sets = Ellipsoid(shape=self.shape, centre=self.centre)
        return RobustLP(-prices, self.mean, torch.ones(MACHINES), uncertainty=sets, low=0.0)

    def forward(self, prices: Tensor) -> Tensor:
        return self.program(prices).solve().value


def overload(x: Tensor, usage: Tensor) -> Tensor:
    """max_i a_i'x - 1, by plan and day.  # (plans, days)"""
    return torch.einsum("sik,pk->psi", usage, x).amax(-1) - 1


def risk(x: Tensor, usage: Tensor) -> float:
    """The share of days on which a machine is overloaded."""
    return (overload(x, usage) > 0).double().mean().item()


def calibrate(plan: Plan, prices: Tensor, usage: Tensor) -> None:
    """Scale all ellipsoids so that the data known meet the target."""
    low, high = 0.0, 2.0
    with torch.no_grad():
        shape = plan.shape.clone()
        for _ in range(9):
            middle = 0.5 * (low + high)
            plan.shape.copy_(middle * shape)
            low, high = (middle, high) if risk(plan(prices), usage) > TARGET else (low, middle)
        plan.shape.copy_(high * shape)


def train(plan: Plan, prices: Tensor, usage: Tensor, steps: int) -> None:
    """Profit up, risk to the target: its price rises while there is too much of it."""
    optimizer, toll = torch.optim.Adam(plan.parameters(), lr=0.01), 1.0
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        x = plan(prices)
        over = overload(x, usage[torch.randint(len(usage), (300,))])
        optimizer.zero_grad()
        smooth = torch.sigmoid(over / 0.02).mean()  # for over > 0, which has no gradient
        (toll * smooth - (prices * x).sum(1).mean()).backward()
        optimizer.step()
        schedule.step()
        toll = max(0.0, toll + 2.0 * ((over > 0).double().mean().item() - TARGET))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(arguments.seed)
    usual = 0.5 + torch.rand(MACHINES, PRODUCTS)
    known, new = days(1_000, usual), days(20_000, usual)
    prices, prices_new = (0.5 + torch.rand(count, PRODUCTS) for count in (48, 200))

    def report(name: str, x: Tensor) -> tuple[float, float]:
        profit, share = (prices_new * x).sum(1).mean().item(), risk(x, new)
        print(f"{name:<28} profit {profit:.4f}, overloaded on {100 * share:5.2f} % of new days")
        return profit, share

    plan = Plan(known)
    _, nominal = report("no uncertainty", plan.program(prices_new).scaled(0.0).solve().value)
    calibrate(plan, prices, known)
    before, _ = report("covariance, sized for 5 %", plan(prices_new))
    train(plan, prices, known, 30 if arguments.quick else 200)
    calibrate(plan, prices, known)
    after, share = report("learned, sized for 5 %", plan(prices_new))
    print(f"learned: {100 * (after / before - 1):+.1f} % profit at the same risk")
    program, x = plan.program(prices_new), plan(prices_new).detach()
    attacked = program.sample(50, boundary=True).violation(x).max().item()
    worst = program.worst_case(x).violation(x).max().item()
    print(f"attack from the learned sets, overload: random {attacked:.1e}, worst {worst:.1e}")
    assert max(attacked, worst) < 1e-7 and after > before
    assert nominal > 5 * TARGET and 0.5 * TARGET < share < 1.5 * TARGET


if __name__ == "__main__":
    main()
