"""More threads or more processes change nothing but rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

THREADS = """
import sys, torch
from tests.operations import OPERATIONS
from tests.promises import leaves, pulled
assert torch.get_num_threads() == int(sys.argv[2])
torch.save({op.name: pulled(op, leaves(op, (300,), 11)) for op in OPERATIONS}, sys.argv[1])
"""

# Two processes with half the batch each, or one with all of it: the gradients that it ends with.
DISTRIBUTED = """
import os, sys, torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
import implicit_layers as il

out, rank, world, meeting = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
model = torch.nn.Sequential(
    torch.nn.Linear(5, 4),
    il.nn.QPLayer(4, n_eq=1, n_ineq=3),
    torch.nn.Linear(4, 3),
    il.nn.Softmax(learn_temperature=True),
)
x, target = torch.randn(8, 5), torch.randint(3, (8,))
if world > 1:
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    model = DistributedDataParallel(model)
for _ in range(2):  # a second step, since the hooks of the first leave a state
    model.zero_grad()
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    torch.nn.functional.nll_loss(model(x[mine]).log(), target[mine]).backward()
torch.save([p.grad for p in model.parameters()], out)
if world > 1:
    distributed.destroy_process_group()
    os._exit(0)  # threads that gloo leaves behind abort an orderly end of the process now and then
"""


def start(code: str, *arguments: object, threads: int = 1) -> subprocess.Popen[str]:
    """Run code in a new Python, from the root of the repository."""
    names = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **names}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    try:
        for process in processes:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


def test_two_threads_give_the_answers_of_one(tmp_path: Path) -> None:
    for threads in (1, 2):
        finish(start(THREADS, tmp_path / f"{threads}.pt", threads, threads=threads))
    one, two = (torch.load(tmp_path / f"{threads}.pt") for threads in (1, 2))
    for name, answer in one.items():
        torch.testing.assert_close(
            two[name], answer, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    meeting = tmp_path / "meeting"
    finish(start(DISTRIBUTED, tmp_path / "alone.pt", 0, 1, meeting))
    finish(*(start(DISTRIBUTED, tmp_path / f"{rank}.pt", rank, 2, meeting) for rank in (0, 1)))
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "0", "1"))
    assert all(bool(g.any()) for g in alone)
    torch.testing.assert_close(first, alone, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(second, alone, rtol=1e-9, atol=1e-12)
