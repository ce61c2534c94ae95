"""`solve_qp` beside a general cone solver: the grid of sizes, the duals with their signs, the gradients."""

from __future__ import annotations

import cvxpy
import numpy as np
import pytest
import torch
from torch import Tensor

import implicit_layers as il
from implicit_layers.testing import QPProblem, random_qp

SIZES = [(1, 1, 0), (5, 0, 3), (10, 10, 0), (20, 20, 5), (50, 50, 10), (100, 100, 50)]
TIGHT = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}


def by_cvxpy(Q: np.ndarray, p: np.ndarray, A: np.ndarray, b: np.ndarray, G: np.ndarray, h: np.ndarray) -> list:
    """z, ν, λ of one program; the duals of L = ½zᵀQz + pᵀz + νᵀ(Az − b) + λᵀ(Gz − h)."""
    z = cvxpy.Variable(len(p))
    constraints = [left @ z == right for left, right in [(A, b)] if len(right)]
    constraints += [left @ z <= right for left, right in [(G, h)] if len(right)]
    objective = 0.5 * cvxpy.quad_form(z, cvxpy.psd_wrap(0.5 * (Q + Q.T))) + p @ z
    cvxpy.Problem(cvxpy.Minimize(objective), constraints).solve(solver=cvxpy.CLARABEL, **TIGHT)
    duals = iter(constraint.dual_value for constraint in constraints)
    return [z.value, *(next(duals) if len(right) else np.zeros(0) for right in (b, h))]


def solve(problem: QPProblem | tuple[Tensor, ...]) -> il.QPSolution:
    Q, p, A, b, G, h = problem[:6]
    return il.solve_qp(Q, p, A=A, b=b, G=G, h=h)


def compare(size: tuple[int, int, int], seeds: range) -> None:
    """One batch of ours holds all the seeds."""
    problems = [random_qp(*size, seed=seed) for seed in seeds]
    together = tuple(torch.stack(parts) for parts in zip(*problems, strict=True))
    solution = solve(together)
    for i, problem in enumerate(problems):
        theirs = by_cvxpy(*(tensor.numpy() for tensor in problem[:6]))
        for ours, expected in zip((solution.z[i], solution.nu[i], solution.lam[i]), theirs, strict=True):
            assert np.abs(ours.numpy() - expected).max(initial=0.0) <= 1e-6, seeds[i]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_solutions_and_duals_are_those_of_clarabel(size: tuple[int, int, int]) -> None:
    compare(size, range(3))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_solutions_and_duals_are_those_of_clarabel_over_twenty_seeds(size: tuple[int, int, int]) -> None:
    compare(size, range(20))


@pytest.mark.parametrize("size", [(1, 1, 0), (4, 0, 2), (3, 3, 0), (4, 4, 1)], ids=str)
def test_gradients_are_the_differences_of_clarabel(size: tuple[int, int, int]) -> None:
    """Every input, every output: central differences of a weighted sum of z, ν, λ."""
    problem = random_qp(*size, condition=10.0, active=0.5, seed=4)
    leaves = [tensor.clone().requires_grad_() for tensor in problem[:6]]
    parts = solve(tuple(leaves))[:3]
    cosines = [torch.cos(torch.arange(1.0, part.numel() + 1, dtype=part.dtype)) for part in parts]
    gradients = torch.autograd.grad(sum((w * y).sum() for w, y in zip(cosines, parts, strict=True)), leaves)
    data, step = [tensor.numpy() for tensor in problem[:6]], 2e-5

    def value(k: int, moved: np.ndarray) -> float:
        outputs = by_cvxpy(*data[:k], moved, *data[k + 1 :])
        return sum(float(w.numpy() @ y) for w, y in zip(cosines, outputs, strict=True))

    for k, gradient in enumerate(gradients):
        for index in np.ndindex(*gradient.shape):
            change = np.zeros(gradient.shape)
            change[index] = step
            difference = (value(k, data[k] + change) - value(k, data[k] - change)) / (2 * step)
            assert abs(float(gradient[index]) - difference) <= 1e-6 * max(1.0, abs(difference)), (k, index)


def test_projection_onto_the_simplex() -> None:
    x = torch.randn(6, dtype=torch.float64)
    eye, one = torch.eye(6, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    ours = il.solve_qp(eye, -x, A=one.expand(1, 6), b=one, G=-eye, h=torch.zeros(6, dtype=torch.float64)).z
    y = cvxpy.Variable(6)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(y - x.numpy())), [y >= 0, cvxpy.sum(y) == 1])
    problem.solve(solver=cvxpy.CLARABEL, **TIGHT)
    assert np.abs(ours.numpy() - y.value).max() <= 1e-7
