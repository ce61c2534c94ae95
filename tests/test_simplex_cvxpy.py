"""Each member of the family solves the program that its docstring states, as a general solver finds it."""

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


PROGRAMS = {
    "sparsemax": (il.sparsemax, lambda y: cvxpy.sum_squares(y) / 2, 1.0, None),
    "entmax 2": (lambda x, **more: il.entmax(x, 2.0, **more), lambda y: cvxpy.sum_squares(y) / 2, 1.0, None),
    "entmax 1.5": (il.entmax, lambda y: cvxpy.sum(cvxpy.power(y, 1.5)) / 0.75, 1.0, None),
    "top-k, euclidean": (
        lambda x, **more: il.soft_top_k(x, 1.7, regulariser="euclidean", **more),
        lambda y: cvxpy.sum_squares(y) / 2,
        1.7,
        1.0,
    ),
    "top-k, entropy": (
        lambda x, **more: il.soft_top_k(x, 1.7, **more),
        lambda y: -cvxpy.sum(cvxpy.entr(y)) - cvxpy.sum(cvxpy.entr(1 - y)),
        1.7,
        1.0,
    ),
}


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("member", PROGRAMS)
def test_a_cone_solver_finds_the_other_members(member, temperature):
    function, phi, total, cap = PROGRAMS[member]
    x = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = cvxpy.Variable(6)
    constraints = [cvxpy.sum(y) == total, y >= 0] + ([] if cap is None else [y <= cap])
    problem = cvxpy.Problem(cvxpy.Maximize(x.numpy() @ y - temperature * phi(y)), constraints)
    problem.solve(solver=cvxpy.CLARABEL, **TIGHT)
    got = function(x, temperature=temperature)
    quadratic = "entropy" not in member and "1.5" not in member  # a cone solver is sharper on these
    torch.testing.assert_close(got, torch.from_numpy(y.value), rtol=0, atol=1e-8 if quadratic else 3e-5)
