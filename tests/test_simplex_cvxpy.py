"""Softmax is the solution of the program that its docstring states, as a general solver finds it."""

import cvxpy
import pytest
import torch

import implicit_layers as il

TIGHT = {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}


@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_a_cone_solver_finds_softmax(n, temperature):
    x = 2 * torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    y = cvxpy.Variable(n)
    objective = cvxpy.Maximize(x.numpy() @ y + temperature * cvxpy.sum(cvxpy.entr(y)))
    problem = cvxpy.Problem(objective, [cvxpy.sum(y) == 1, y >= 0])
    problem.solve(solver=cvxpy.CLARABEL, **TIGHT)
    for method in ("closed", "newton", "kkt"):
        got = il.softmax(x, temperature=temperature, method=method)
        torch.testing.assert_close(got, torch.from_numpy(y.value), rtol=0, atol=3e-5)  # √(2 · 1e-10 / τ), τ = 0.2
        value = float(x @ got + temperature * torch.special.entr(got).sum())
        assert value >= problem.value - 1e-7 * (1 + abs(value))
        assert abs(value - temperature * float(torch.logsumexp(x / temperature, 0))) < 1e-12 * (1 + abs(value))
