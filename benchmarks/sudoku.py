"""OptNet's 4×4 Sudoku, the rules learned from boards: `python -m benchmarks.sudoku [--quick] [--out FOLDER]`.

A board is one-hot, 64 numbers, blanks zero. The layer is min ½ε|z|² − boardᵀz subject to A z = A exp(w), z ≥ 0, with A
and w learned from nothing but solved boards: once as a quadratic program (ε = 0.1, OptNet's) and once as a linear one
(ε = 0). A has 64 rows, one for every rule of the game, and rank 40, as the rules have: A = M B with M and B random at
the start. So 24 of the equalities are redundant at every step and are left in. qpth cannot take them and OptNet removes
them beforehand.

The linear program is trained with the smoothed derivative: at a vertex the exact one sees only the constraints that
meet there and learns more slowly, as a third row shows. The solution is that of the linear program in either case.

The boards have one solution each. Those to test with belong to solutions of which no board was trained with.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import implicit_layers as il
from benchmarks.run import RESULTS, save

CELLS, DIGITS = 16, 4
ROWS, RANK = (
    64,
    40,
)  # of the rules: 16 cells, 4 rows, columns and blocks for each of 4 digits, of which 40 are independent
TRAINING_SOLUTIONS = 230  # of 288; boards of the others are for the test


# --- boards -----------------------------------------------------------------------------------------------------------


def solutions() -> Tensor:  # (288, 16)
    """All solved boards, each digit once in every row, column and block, in lexicographic order."""
    rows = list(itertools.permutations(range(DIGITS)))
    found = []
    for four in itertools.product(rows, repeat=4):
        if any(len({row[j] for row in four[:i]}) < i for i in (2, 3, 4) for j in range(4)):
            continue
        blocks = [(four[i][j], four[i][j + 1], four[i + 1][j], four[i + 1][j + 1]) for i in (0, 2) for j in (0, 2)]
        if all(len(set(block)) == 4 for block in blocks):
            found.append([digit for row in four for digit in row])
    return torch.tensor(found)


def one_hot(boards: Tensor) -> Tensor:  # (*B, 16) -> (*B, 64)
    return nn.functional.one_hot(boards, DIGITS).flatten(-2).double()


class Boards(NamedTuple):
    """Boards with blanks and what belongs into them, both one-hot."""

    given: Tensor  # (N, 64)
    solved: Tensor  # (N, 64)


def boards(count: int, answers: Tensor, every: Tensor, seed: int) -> Boards:
    """Draw a solution, then blank cells in random order, 4 to 12 of them, as long as no second solution fits."""
    generator = torch.Generator().manual_seed(seed)
    given, solved = [], []
    for _ in range(count):
        answer = answers[int(torch.randint(len(answers), (), generator=generator))]
        wanted = int(torch.randint(4, 13, (), generator=generator))
        shown = torch.ones(CELLS, dtype=torch.bool)
        for cell in torch.randperm(CELLS, generator=generator).tolist():
            shown[cell] = False
            if int((every[:, shown] == answer[shown]).all(-1).sum()) > 1:
                shown[cell] = True
            if int((~shown).sum()) == wanted:
                break
        given.append((one_hot(answer).reshape(CELLS, DIGITS) * shown[:, None]).flatten())
        solved.append(one_hot(answer))
    return Boards(torch.stack(given), torch.stack(solved))


def right(z: Tensor, solved: Tensor) -> float:
    """The share of boards with every cell right, the largest entry of a cell being its digit."""
    digits = (part.reshape(-1, CELLS, DIGITS).argmax(-1) for part in (z, solved))
    return float(torch.eq(*digits).all(-1).double().mean())


# --- the model --------------------------------------------------------------------------------------------------------


class Rules(nn.Module):
    """The program above; `epsilon` 0.1 or 0."""

    def __init__(self, epsilon: float, gradient: str, smoothing: float) -> None:
        super().__init__()
        self.epsilon, self.gradient, self.smoothing = epsilon, gradient, smoothing
        self.B = nn.Parameter(torch.rand(RANK, CELLS * DIGITS, dtype=torch.float64))
        self.M = nn.Parameter(torch.randn(ROWS, RANK, dtype=torch.float64) / RANK**0.5)
        self.w = nn.Parameter(torch.zeros(CELLS * DIGITS, dtype=torch.float64))

    def forward(self, given: Tensor, on_failure: str = "raise") -> il.QPSolution:
        A, n = self.M @ self.B, CELLS * DIGITS
        Q = self.epsilon * torch.eye(n, dtype=torch.float64)
        return il.solve_qp(
            Q, -given, A=A, b=A @ self.w.exp(), lb=torch.zeros(n, dtype=torch.float64),
            gradient=self.gradient, smoothing=self.smoothing, on_failure=on_failure,
        )  # fmt: skip


class Task(NamedTuple):
    """One row of the result."""

    name: str
    epsilon: float
    gradient: str
    smoothing: float
    lr: float
    steps: int


TASKS = (
    Task("quadratic program, Q = 0.1 I", 0.1, "exact", 1e-3, 0.02, 600),
    Task("linear program, Q = 0", 0.0, "smoothed", 1e-2, 0.05, 600),
)
CONTRAST = Task("linear program, exact derivative", 0.0, "exact", 1e-2, 0.05, 600)


def train(
    task: Task, training: Boards, test: Boards, *, steps: int, batch: int, seed: int, every: int = 25
) -> dict[str, Any]:
    """Adam on the mean squared error; the loss curve, with the share of 200 test boards right along it."""
    torch.manual_seed(seed)
    model = Rules(task.epsilon, task.gradient, task.smoothing)
    optimizer = torch.optim.Adam(model.parameters(), lr=task.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.1 * task.lr)
    order = torch.Generator().manual_seed(seed)
    curve: list[list[float]] = []
    start, mean, failed = time.perf_counter(), 0.0, 0
    for step in range(1, steps + 1):
        chosen = torch.randint(len(training.given), (batch,), generator=order)
        with warnings.catch_warnings():  # at a vertex the derivative is one of several, which is the point here
            warnings.simplefilter("ignore", il.DegenerateGradientWarning)
            solution = model(training.given[chosen], "ignore")
            loss = (solution.z - training.solved[chosen]).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
        failed += int((~solution.info.converged).sum())
        mean = loss.item() if step == 1 else 0.9 * mean + 0.1 * loss.item()
        if step % every == 0 or step == steps:
            with torch.no_grad():
                z = model(test.given[:200], "ignore").z
            curve.append([step, float(f"{mean:.3g}"), round(right(z, test.solved[:200]), 4)])
    with torch.no_grad():
        found = model(test.given, "ignore")
        A = model.M @ model.B
    return {
        "problem": task.name, "gradient": task.gradient, "steps": steps, "batch": batch, "lr": task.lr,
        "boards": len(training.given), "test_boards": len(test.given), "rows": ROWS,
        "rank": int(torch.linalg.matrix_rank(A)), "test_right": right(found.z, test.solved),
        "test_mse": float((found.z - test.solved).square().mean()),
        "solves_failed": failed + int((~found.info.converged).sum()),
        "seconds": round(time.perf_counter() - start, 1), "curve": curve,
    }  # fmt: skip


def data(count: int, test_count: int, seed: int) -> tuple[Boards, Boards]:
    """Boards to train and to test with, of different solutions."""
    every = solutions()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    known, unknown = every[order[:TRAINING_SOLUTIONS]], every[order[TRAINING_SOLUTIONS:]]
    return boards(count, known, every, seed + 1), boards(test_count, unknown, every, seed + 2)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.sudoku", description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="a few steps on few boards, to see that it runs")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--batch", type=int, default=50)
    arguments.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = arguments.parse_args(argv)
    count, test_count = (100, 20) if options.quick else (9000, 1000)
    training, test = data(count, test_count, options.seed)
    rows: list[dict[str, Any]] = []
    for task in (*TASKS, CONTRAST):
        steps = 6 if options.quick else task.steps
        row = train(task, training, test, steps=steps, batch=options.batch, seed=options.seed)
        rows.append(row)
        print(
            f"{row['problem']}: {row['test_right']:.1%} of {row['test_boards']} unseen boards right, "
            f"mean squared error {row['test_mse']:.1e}, {row['seconds']:.0f} s",
            flush=True,
        )
    print(save(options.out, "sudoku", options.quick, rows, options.seed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
