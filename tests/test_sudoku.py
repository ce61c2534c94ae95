"""The Sudoku task: its boards are what they claim, a short training learns, the committed result is good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import sudoku
from benchmarks.sudoku import (
    CELLS,
    DIGITS,
    RANK,
    RESULTS,
    TASKS,
    Boards,
    Rules,
    boards,
    data,
    one_hot,
    right,
    solutions,
)
from benchmarks.sudoku import train as trained


@pytest.fixture(scope="module")
def every() -> torch.Tensor:
    return solutions()


def rules() -> torch.Tensor:
    """The rules of the game as 64 equalities: one digit a cell, each digit once a row, column and block."""
    cell = torch.arange(CELLS * DIGITS).reshape(4, 4, DIGITS)
    groups = [cell[i, j] for i in range(4) for j in range(4)]
    for digit in range(DIGITS):
        groups += [cell[i, :, digit] for i in range(4)] + [cell[:, j, digit] for j in range(4)]
        groups += [cell[i : i + 2, j : j + 2, digit].flatten() for i in (0, 2) for j in (0, 2)]
    A = torch.zeros(len(groups), CELLS * DIGITS, dtype=torch.float64)
    for row, group in zip(A, groups, strict=True):
        row[group] = 1.0
    return A


def test_there_are_288_solved_boards(every):
    assert every.shape == (288, CELLS)
    assert len(torch.unique(every, dim=0)) == 288
    assert torch.equal(one_hot(every) @ rules().mT, torch.ones(288, 64, dtype=torch.float64))
    assert int(torch.linalg.matrix_rank(rules())) == RANK


def test_boards_have_one_solution_and_some_blanks(every):
    drawn = boards(40, every, every, seed=3)
    shown = drawn.given.reshape(-1, CELLS, DIGITS).sum(-1).bool()
    digits = drawn.solved.reshape(-1, CELLS, DIGITS).argmax(-1)
    for mask, answer in zip(shown, digits, strict=True):
        fitting = every[(every[:, mask] == answer[mask]).all(-1)]
        assert torch.equal(fitting, answer[None])
        assert 4 <= int((~mask).sum()) <= 12
    assert (~shown).sum(-1).unique().numel() > 4
    assert right(drawn.solved, drawn.solved) == 1.0
    assert right(drawn.given, drawn.solved) < 0.2


def test_the_same_seed_draws_the_same_boards_and_test_boards_are_of_other_solutions():
    first, second = data(60, 30, seed=5), data(60, 30, seed=5)
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True))
    known, unknown = ({tuple(row) for row in part.solved.tolist()} for part in first)
    assert not known & unknown


def test_the_rules_themselves_solve_the_boards(every):
    """So that a model which has learned them could be right everywhere; redundant rows left in."""
    drawn = boards(20, every, every, seed=4)
    for task in TASKS:
        model = Rules(task.epsilon, "least_norm", task.smoothing)
        model.B = torch.nn.Parameter(torch.eye(CELLS * DIGITS, dtype=torch.float64))
        model.M = torch.nn.Parameter(rules())
        model.w = torch.nn.Parameter(torch.log(torch.full((CELLS * DIGITS,), 0.25, dtype=torch.float64)))
        assert right(model(drawn.given).z, drawn.solved) == 1.0


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_short_training_learns(task):
    training, test = data(200, 20, seed=0)
    row = trained(task, training, test, steps=30, batch=20, seed=0, every=5)
    losses = [loss for _, loss, _ in row["curve"]]
    assert losses[-1] < 0.8 * losses[0]
    assert row["rank"] == RANK < row["rows"]
    assert row["solves_failed"] == 0


@pytest.mark.slow
def test_it_is_learned():
    training, test = data(2000, 200, seed=1)
    row = trained(TASKS[0], training, test, steps=TASKS[0].steps, batch=50, seed=1)
    assert row["test_right"] >= 0.95


def test_the_committed_result_is_good():
    result = json.loads((RESULTS / "sudoku.json").read_text(encoding="utf-8"))
    *rows, contrast = result["rows"]
    assert [row["problem"] for row in rows] == [task.name for task in TASKS]
    assert contrast["test_right"] < min(row["test_right"] for row in rows)
    for row in rows:
        assert row["test_right"] >= 0.99
        assert row["test_boards"] >= 1000
        assert row["rank"] < row["rows"]
        assert row["curve"][-1][1] < 0.1 * row["curve"][0][1]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert sudoku.main(["--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "sudoku-quick.json").read_text(encoding="utf-8"))
    assert result["quick"] and len(result["rows"]) == len(TASKS) + 1
    assert "unseen boards right" in capsys.readouterr().out


def test_right_counts_whole_boards():
    solved = one_hot(torch.arange(CELLS) % DIGITS).expand(2, -1)
    wrong = solved.clone()
    wrong[1, :DIGITS] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert right(wrong, solved) == 0.5
    assert Boards(wrong, solved).given.shape == (2, CELLS * DIGITS)
