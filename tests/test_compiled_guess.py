"""The kernel guesses the active rows by a few sweeps and corrects them; where that fails it takes the central path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import implicit_layers as il
from benchmarks import problems
from implicit_layers.solution import Status
from tests.compiled_problems import both, disagreement, draw, require_kernel

ROUNDS = 6  # the most corrections of a guess, see csrc/measures.h
KERNEL = il.InteriorPoint(backend="compiled")


@pytest.fixture(autouse=True)
def kernel() -> None:
    require_kernel()


def rows_of(problem: problems.QP) -> dict[str, Tensor]:
    return {name: getattr(problem, name) for name in ("Q", "p", "A", "b", "G", "h")}


@pytest.mark.parametrize("size", [(1, 1, 0), (3, 2, 1), (10, 10, 0), (20, 20, 5), (30, 45, 0), (50, 50, 10)], ids=str)
def test_ordinary_programs_take_few_rounds(size: tuple[int, int, int]) -> None:
    one, two = both(rows_of(problems.dense(*size, 37, seed=1)))
    assert all(error < 1e-11 for error in disagreement(one, two).values())
    assert two.solution is not None
    rounds = two.solution.info.iterations.double()
    assert rounds.mean() < 4 and (rounds <= ROUNDS).double().mean() > 0.9, rounds


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_the_nearest_point_of_a_box_is_found_at_once(batch: int) -> None:
    """With Q diagonal one sweep is exact: the unknowns do not feel each other."""
    torch.manual_seed(batch)
    scale, c = 0.1 + torch.rand(batch, 12, dtype=torch.float64), torch.randn(batch, 12, dtype=torch.float64)
    lb, ub = -torch.rand(batch, 12, dtype=torch.float64), torch.rand(batch, 12, dtype=torch.float64)
    solution = il.solve_qp(torch.diag_embed(scale), -scale * c, lb=lb, ub=ub, solver=KERNEL)
    torch.testing.assert_close(solution.z, c.clamp(lb, ub), rtol=1e-14, atol=1e-14)
    outside = ((c < lb) | (c > ub)).any(-1)
    assert torch.equal(solution.info.iterations, outside.long())


def test_bounds_alone_take_few_rounds() -> None:
    data = draw(30, 0, 0, (21,), 4, condition=10.0)
    half = torch.full((21, 30), 0.05, dtype=torch.float64)
    one, two = both({**data, "lb": -half, "ub": 2 * half})
    assert all(error < 1e-11 for error in disagreement(one, two).values())
    assert two.solution is not None
    assert two.solution.info.iterations.max() <= ROUNDS
    assert ((two.solution.lam_lb > 0) | (two.solution.lam_ub > 0)).double().mean() > 0.3, "the bounds matter"


def test_where_the_guess_fails_the_central_path_is_taken() -> None:
    """Side by side with programs whose guess is right, and alone."""
    hard = rows_of(problems.ill_conditioned(20, 20, 5, 12, seed=3))
    easy = rows_of(problems.dense(20, 20, 5, 12, seed=3))
    mixed = {name: torch.stack((hard[name], easy[name]), 1).flatten(0, 1) for name in hard}
    one, two = both(mixed)
    assert all(error < 1e-7 for error in disagreement(one, two).values())  # what the condition leaves
    assert two.solution is not None
    iterations = two.solution.info.iterations
    assert (iterations[::2] > ROUNDS).any(), "some are beyond the guess"
    assert (iterations[1::2] <= ROUNDS).all()
    assert two.solution.info.residual.max() < 1e-12
    for i in range(24):
        alone = il.solve_qp(solver=KERNEL, **{name: tensor[i] for name, tensor in mixed.items()})
        torch.testing.assert_close(alone.z, two.solution.z[i], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_rounds_than_iterations_are_allowed(most: int) -> None:
    data = rows_of(problems.dense(20, 20, 5, 40, seed=2))
    whole = il.solve_qp(solver=KERNEL, **data)
    solver = il.InteriorPoint(backend="compiled", max_iter=most)
    short = il.solve_qp(solver=solver, on_failure="ignore", **data)
    within = whole.info.iterations <= most
    assert 0 < within.sum() < 40
    assert torch.equal(short.info.converged[within], within[within])
    assert (short.info.iterations <= most).all()
    good = short.info.status == int(Status.CONVERGED)
    torch.testing.assert_close(short.z[good], whole.z[good], rtol=1e-11, atol=1e-11)
