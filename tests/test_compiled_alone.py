"""A program alone takes other code in the kernel than many side by side: same answers for every size and remainder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import implicit_layers as il
from tests.compiled_problems import draw, require_kernel, take_instructions

NUMBERS = [*range(1, 19), 24, 33]  # of unknowns: every remainder of a register, and of two


def answers(data: dict[str, Tensor]) -> list[Tensor]:
    """Point, multipliers and gradients, all by the kernel."""
    require_kernel()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in data.items()}
    rows = {name: leaf for name, leaf in leaves.items() if name not in ("Q", "p")}
    solution = il.solve_qp(leaves["Q"], leaves["p"], **rows, solver=il.InteriorPoint(backend="compiled"))
    parts = [solution.z, *(part for part in (solution.nu, solution.lam) if part is not None)]
    weighed = sum((part * torch.linspace(1, 2, part.shape[-1], dtype=part.dtype)).sum() for part in parts)
    gradients = torch.autograd.grad(weighed, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [solution.z.detach(), *(part.detach() for part in parts[1:]), *gradients]


def worst_of_sizes(n: int) -> float:
    """The largest difference of eight side by side and each of them alone, relative to the largest entry."""
    worst = 0.0
    for n_eq in {0, n // 3}:
        for n_ineq in (1, n, n + 3, 3 * n + 1):
            data = draw(n, n_ineq, n_eq, (8,), n + n_ineq, condition=10.0)
            together = answers(data)
            for i in (0, 5):
                alone = answers({name: tensor[i] for name, tensor in data.items()})
                for one, many in zip(alone, together, strict=True):
                    size = many.abs().max().clamp(min=1.0) if many.numel() else 1.0
                    worst = max(worst, float(((one - many[i]).abs() / size).max()) if one.numel() else 0.0)
    return worst


@pytest.mark.parametrize("n", NUMBERS)
def test_alone_as_side_by_side(n: int) -> None:
    assert worst_of_sizes(n) < 1e-12


@pytest.mark.parametrize("instructions", ["avx2", "basic"])
def test_with_lesser_instructions(instructions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their registers hold four and two numbers."""
    take_instructions(instructions, tmp_path, monkeypatch)
    assert max(map(worst_of_sizes, (1, 3, 6, 9, 15))) < 1e-12


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8, 9, 10, 11, 17, 26])
def test_programs_left_over(batch: int, shared: bool) -> None:
    """Where some of a call go side by side and the others one by one, each gets its own answer, in any order."""
    data = draw(5, 7, 2, (batch,), 3, condition=10.0, shared="QAG" if shared else "")
    whole = answers(data)
    for b in range(batch):
        single = {name: tensor if shared and name in "QAG" else tensor[b] for name, tensor in data.items()}
        for one, many in zip(answers(single)[:3], whole, strict=False):
            assert (one - many[b]).abs().max() < 1e-12


@pytest.mark.parametrize("where", [0, 3, 8, 9])
def test_hard_programs_left_over_or_not(where: int) -> None:
    """Infeasible rows, wherever they stand, are told of that program and of no other."""
    data = draw(4, 6, 0, (10,), 1, condition=10.0)
    data["G"][where, 1] = -data["G"][where, 0]
    data["h"][where, 1] = -data["h"][where, 0] - 1.0
    rows = {name: data[name] for name in ("G", "h")}
    solution = il.solve_qp(data["Q"], data["p"], **rows, on_failure="ignore")
    assert solution.info.converged.tolist() == [b != where for b in range(10)]
