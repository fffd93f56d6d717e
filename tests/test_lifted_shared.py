"""`lifted.blocks` by several processes that share the samples: the answer of one."""

import math
import os
import tempfile

import pytest
import torch
from torch import nn

from implicitdl import ImplicitLayer, lifted

CASES = ("network", "balls", "implicit")


def setting():
    g = torch.Generator().manual_seed(3)
    u = torch.randn(91, 5, generator=g)
    labels = (u @ torch.randn(5, 3, generator=g)).argmax(1)
    return u, labels


def model(case):
    torch.manual_seed(1)
    if case == "implicit":
        return ImplicitLayer(5, 3, state_features=8)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def trained(case, u, labels, **options):
    net = model(case)
    rows = lifted.Rows(radius=3.0, l1=1e-3) if case == "balls" else lifted.Rows(ridge=1e-4)
    report = lifted.blocks(net, u, labels, rows=rows, sweeps=3, state_steps=4, **options)
    numbers = [report.objective, report.loss, report.feasibility, report.accuracy]
    return {k: t.detach().clone() for k, t in net.state_dict().items()}, torch.tensor(numbers)


def shared(rank, size, folder):
    from torch import distributed

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    try:
        u, labels = setting()
        own = slice(rank * 60 // size, 91 if rank == size - 1 else (rank + 1) * 60 // size)
        found = {c: trained(c, u[own], labels[own], shard="samples") for c in CASES}
        # Validation samples of its own, few and other ones in each process: all must choose alike.
        mine = slice(0, 20 - 15 * (rank > 0)) if rank != size - 1 else slice(60, 91)
        held = (u[mine], labels[mine])
        found["validated"] = trained(
            "network", u[own], labels[own], shard="samples", validation=held, keep="best",
            checkpoint=f"{folder}/run",
        )  # fmt: skip
        bad = u[own].clone()
        if rank == size - 1:
            bad[3] = math.nan
        try:
            trained("network", bad, labels[own], shard="samples")
            refused = "not at all"
        except ValueError as error:
            refused = str(error)
        torch.save((found, refused), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def compare(size):
    import torch.multiprocessing as processes

    u, labels = setting()
    alone = {c: trained(c, u, labels) for c in CASES}
    held = (
        torch.cat([u[:20], *[u[:5]] * (size - 2), u[60:]]),
        torch.cat([labels[:20], *[labels[:5]] * (size - 2), labels[60:]]),
    )
    alone["validated"] = trained("network", u, labels, validation=held, keep="best")
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(shared, (size, folder), nprocs=size)
        for rank in range(size):
            assert os.path.exists(os.path.join(folder, f"run.{rank}"))
            found, refused = torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=True)
            for case, (state, numbers) in found.items():
                torch.testing.assert_close(numbers, alone[case][1], rtol=1e-10, atol=1e-10)
                for key, value in state.items():
                    torch.testing.assert_close(
                        value, alone[case][0][key], rtol=1e-10, atol=1e-10, msg=f"{case} {key}"
                    )
            assert ("3" in refused) if rank == size - 1 else (f"process {size - 1}" in refused)


def test_two_processes_give_the_answer_of_one():
    compare(2)


@pytest.mark.slow
def test_four_processes_give_the_answer_of_one():
    compare(4)


def test_what_cannot_be_shared_is_refused():
    u, labels = setting()
    with pytest.raises(ValueError, match="init_process_group"):
        lifted.blocks(model("network"), u, labels, shard="samples")
    with pytest.raises(ValueError, match="samples"):
        lifted.blocks(model("network"), u, labels, shard="rows")
