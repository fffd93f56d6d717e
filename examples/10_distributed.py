"""Two processes train a network by lifted blocks and fit its states; one gives the same to 1e-10.

Each process has its own samples, or all samples and its own rows. What they exchange are Gram
matrices and gradients of weights, of a size that does not grow with the samples, or the rows that
each has solved. The script starts itself under torchrun where it is not, which is the same as

    torchrun --nproc-per-node 2 examples/10_distributed.py

    python examples/10_distributed.py [--seed N] [--processes N] [--samples N] [--quick]
"""

import argparse
import os
import time

import torch
from torch import distributed, nn

from implicitdl import lifted
from implicitdl.states import fit_states


def teacher(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)
    )


def samples(seed: int, count: int) -> torch.Tensor:
    """Of a lower dimension than they have entries, as images are."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 15, generator=generator)
    mixing = torch.randn(15, 40, generator=generator)
    return torch.tanh(hidden @ mixing / 4) + 0.1 * torch.randn(count, 40, generator=generator)


def trained(seed: int, data: torch.Tensor, shard: str | None) -> nn.Sequential:
    """A smaller network, by a few sweeps of block descent; which process has which sample is no
    matter."""
    net = nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 2))
    torch.manual_seed(seed)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    lifted.blocks(net, data, (data[:, 0] > data[:, 1]).long(), sweeps=3, shard=shard)
    return net


def largest(one: nn.Module, other: nn.Module) -> float:
    """Difference of a parameter."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def work(seed: int, count: int) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    net, data = teacher(seed), samples(seed, count)
    own = data[rank * count // size : (rank + 1) * count // size]
    options = {"penalty": 0.02, "kappa": 0.5}

    def timed(job):
        distributed.barrier()
        start = time.perf_counter()
        return job(), time.perf_counter() - start

    blocks, first = timed(lambda: trained(seed, data, None))
    (layer, report), second = timed(lambda: fit_states(net, data, **options))
    jobs = {
        "blocks": (blocks, first, lambda: trained(seed, own, "samples")),
        "samples": (layer, second, lambda: fit_states(net, own, shard="samples", **options)[0]),
        "rows": (layer, second, lambda: fit_states(net, data, shard="rows", **options)[0]),
    }
    if rank == 0:
        print(report)
    for name, (alone, seconds, job) in jobs.items():
        together, shared = timed(job)
        off = torch.tensor(largest(alone, together))
        distributed.all_reduce(off, op=distributed.ReduceOp.MAX)
        if rank == 0:
            print(
                f"{size} processes, by {name}: largest difference {float(off):.0e}, {shared:.2f} s; "
                f"one process {seconds:.2f} s"
            )
        assert float(off) < 1e-10
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--quick", action="store_true", help="400 samples")
    arguments = parser.parse_args()
    count = 400 if arguments.quick else arguments.samples
    if "RANK" in os.environ:
        work(arguments.seed, count)
        return
    from torch.distributed import run

    options = ["--standalone", f"--nproc-per-node={arguments.processes}", __file__]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run.main([*options, f"--seed={arguments.seed}", f"--samples={count}"])


if __name__ == "__main__":
    main()
