"""`python -m benchmarks.train_gpu [--device cuda]`: train a classifier with a QP layer inside, alone or in parallel.

    python -m benchmarks.train_gpu --device cpu
    torchrun --nproc_per_node 2 -m benchmarks.train_gpu --device cpu      # two gloo processes
    torchrun --nproc_per_node 8 -m benchmarks.train_gpu --device cuda     # one GPU each, nccl

Every process has its own share of each batch; gradients are averaged over them (DistributedDataParallel). The data are
drawn here: points labelled by the largest of some random quadratic functions of them. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import implicit_layers as il
from implicit_layers.measure import relative_error

FEATURES, CLASSES = 16, 5
WARM_UP = 3  # steps that are not timed


class Classifier(nn.Module):
    """Linear, a quadratic program with learnable Q, A, G, linear, and the softmax linear program."""

    def __init__(self, n: int, n_ineq: int) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, n)
        self.layer = il.nn.QPLayer(n, n_eq=1, n_ineq=n_ineq)
        self.last = nn.Linear(n, CLASSES)
        self.softmax = il.nn.Softmax()

    def forward(self, x: Tensor) -> Tensor:
        return self.softmax(self.last(self.layer(self.first(x))))


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points x = N and the k of the largest xᵀ M_k x + ⟨m_k, x⟩; M = N/√d, m = N do not depend on the seed."""
    rule, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    M = torch.randn(CLASSES, FEATURES, FEATURES, generator=rule) / FEATURES**0.5
    m = torch.randn(CLASSES, FEATURES, generator=rule)
    x = torch.randn(count, FEATURES, generator=draw)
    return x, (torch.einsum("bi,kij,bj->bk", x, M, x) + x @ m.mT).argmax(-1)


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.train_gpu", description=__doc__.splitlines()[0])
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--batch", type=int, default=512, help="of all processes together")
    arguments.add_argument("--unknowns", type=int, default=32, help="of the QP")
    arguments.add_argument("--inequalities", type=int, default=16, help="of the QP")
    arguments.add_argument("--rate", type=float, default=3e-3)
    arguments.add_argument("--seed", type=int, default=0)
    return arguments


def train(options: argparse.Namespace) -> dict[str, Any]:
    """One training run in this process, with the others where torchrun has started some."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if options.batch % world:
        raise SystemExit(f"--batch {options.batch} must be a multiple of the {world} processes")
    torch.manual_seed(options.seed)
    model: nn.Module = Classifier(options.unknowns, options.inequalities).to(device)
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    optimiser = torch.optim.Adam(model.parameters(), lr=options.rate)
    share = options.batch // world
    losses: list[Tensor] = []
    start = time.perf_counter()
    for step in range(WARM_UP + options.steps):
        if step == WARM_UP:
            _wait(device)
            start = time.perf_counter()
        x, labels = data(options.batch, seed=1 + step)  # the same in every process, which takes its share
        mine = slice(rank * share, (rank + 1) * share)
        loss = nn.functional.nll_loss(model(x[mine].to(device)).clamp_min(1e-12).log(), labels[mine].to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    _wait(device)
    seconds = time.perf_counter() - start
    report = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": world,
        "torch": torch.__version__,
        "batch": options.batch,
        "steps": options.steps,
        "samples_per_second": round(options.batch * options.steps / seconds, 1),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "first_loss": round(float(torch.stack(losses[:5]).mean()), 5),
        "last_loss": round(float(torch.stack(losses[-5:]).mean()), 5),
        "parameters": round(float(sum(p.detach().double().square().sum() for p in model.parameters())), 6),
        "apart": _apart(model, world),
    }
    if world > 1:
        distributed.destroy_process_group()
    return report if rank == 0 else {}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _apart(model: nn.Module, world: int) -> float:
    """How far the parameters of the processes are apart, relative; zero if they learned the same."""
    mine = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    if world == 1:
        return 0.0
    every = [torch.empty_like(mine) for _ in range(world)]
    distributed.all_gather(every, mine)
    return max(relative_error([other], [every[0]]) for other in every)


def main(argv: Sequence[str] | None = None) -> int:
    report = train(parser().parse_args(argv))
    if report:
        print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    status = main()
    if "LOCAL_RANK" in os.environ:  # threads that gloo leaves behind abort an orderly end of the process now and then
        os._exit(status)
    raise SystemExit(status)
