"""Defects found in other layers for quadratic programs, each with the test that this package passes.

Where qpth is installed its defect is shown in the same test, so that a repaired qpth is noticed. The others (QPLayer of
proxsuite 0.8.0, SCQPTH, qpax, osqpth, moreau, pounce) are described; `benchmarks/bad_inputs.py` runs some of them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

import implicit_layers as il
from implicit_layers.testing import check_gradients, random_qp

NONE = torch.Tensor()


def tensor(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def qpth(*arguments: Tensor, **settings: object) -> Tensor | None:
    """What qpth returns, None where it is not installed."""
    if find_spec("qpth") is None:
        return None
    return importlib.import_module("qpth.qp").QPFunction(verbose=-1, **settings)(*arguments)


def qpth_fails(*arguments: Tensor, match: str | None) -> bool:
    """Whether qpth refuses with this message, true where it is not installed."""
    if find_spec("qpth") is None:
        return True
    with pytest.raises((RuntimeError, ValueError), match=match):
        qpth(*arguments)
    return True


def differences(loss: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """The gradient of a loss by central differences."""
    with torch.no_grad():
        moves = step * torch.eye(at.numel(), dtype=at.dtype).reshape(-1, *at.shape)
        return torch.stack([(loss(at + move) - loss(at - move)) / (2 * step) for move in moves]).reshape(at.shape)


# --- D1: qpth averages the gradient of a shared parameter over the batch ----------------------------------------------


def test_d1_gradients_of_shared_parameters_are_sums() -> None:
    Q, p, _, _, G, h, *_ = random_qp(4, 3, active=0.5, seed=1)
    costs = p + 0.01 * torch.randn(5, 4, dtype=torch.float64)
    for name in ("Q", "G", "h"):
        leaf = {"Q": Q, "G": G, "h": h}[name].clone().requires_grad_()
        data = {"Q": Q, "G": G, "h": h, name: leaf}
        (summed,) = torch.autograd.grad(il.solve_qp(p=costs, **data).z.sum(), leaf)
        single = [torch.autograd.grad(il.solve_qp(p=cost, **data).z.sum(), leaf)[0] for cost in costs]
        torch.testing.assert_close(summed, torch.stack(single).sum(0))
        theirs = qpth(data["Q"], costs, data["G"], data["h"], NONE, NONE)
        if theirs is not None:
            (averaged,) = torch.autograd.grad(theirs.sum(), leaf)
            torch.testing.assert_close(averaged, summed / 5, rtol=1e-3, atol=1e-4)


# --- D2: qpth divides by a step of zero and stops at a wrong point ----------------------------------------------------


def test_d2_a_dual_that_does_not_move_is_no_obstacle() -> None:
    Q, p, G, h = torch.eye(2).double(), tensor(0.0, -1.0), -torch.eye(2).double(), tensor(0.0, 0.0)
    torch.testing.assert_close(il.solve_qp(Q, p, G=G, h=h).z, tensor(0.0, 1.0))
    torch.testing.assert_close(il.solve_qp(Q, p, lb=tensor(0.0, 0.0)).z, tensor(0.0, 1.0))
    theirs = qpth(Q, p, G, h, NONE, NONE)
    if theirs is not None:
        torch.testing.assert_close(theirs, tensor([0.0, 0.5]), rtol=0.0, atol=1e-3)


# --- D3: qpth returns numbers, and a gradient, for an infeasible program ----------------------------------------------


def test_d3_an_infeasible_program_raises_or_is_marked() -> None:
    Q, p = torch.eye(1).double(), tensor(0.5).requires_grad_()
    G, h = tensor([1.0], [-1.0]), tensor(1.0, -2.0)
    with pytest.raises(il.InfeasibleError):
        il.solve_qp(Q, p, G=G, h=h)
    with pytest.raises(il.InfeasibleError):
        il.solve_qp(Q, p, lb=tensor(2.0), ub=tensor(1.0))
    solution = il.solve_qp(Q, p, G=G, h=h, on_failure="ignore")
    assert int(solution.info.status) == il.Status.INFEASIBLE
    (gradient,) = torch.autograd.grad(solution.z.sum(), p)
    assert gradient.abs().max() == 0.0
    theirs = qpth(Q, p, G, h, NONE, NONE)
    if theirs is not None:
        assert torch.isfinite(theirs).all()
        assert torch.isfinite(torch.autograd.grad(theirs.sum(), p)[0]).all()


# --- D4: qpth wants inequalities, a positive definite Q, independent equalities, a batch and finite h -----------------


def test_d4_equalities_only_no_constraints_and_an_empty_batch() -> None:
    Q, p, A, b, G, h, *_ = random_qp(3, 2, 1, batch=(4,), seed=2)
    z = il.solve_qp(Q, p, A=A, b=b).z
    torch.testing.assert_close((A @ z[..., None]).squeeze(-1), b)
    torch.testing.assert_close((Q @ il.solve_qp(Q, p).z[..., None]).squeeze(-1), -p)
    assert il.solve_qp(Q[:0], p[:0], A=A[:0], b=b[:0], G=G[:0], h=h[:0]).z.shape == (0, 3)
    assert qpth_fails(Q, p, NONE, NONE, A, b, match="not enough values to unpack")
    assert qpth_fails(Q, p, NONE, NONE, NONE, NONE, match="not enough values to unpack")
    assert qpth_fails(Q[:0], p[:0], G[:0], h[:0], A[:0], b[:0], match=None)


def test_d4_linear_programs_and_semidefinite_q() -> None:
    G, h = torch.cat([torch.eye(2), -torch.eye(2)]).double(), tensor(2.0, 3.0, 0.0, 0.0)
    p = tensor(-1.0, -4.0)
    for Q in (torch.zeros(2, 2).double(), tensor([1.0, 0.0], [0.0, 0.0])):
        expected = tensor(2.0, 3.0) if float(Q.sum()) == 0 else tensor(1.0, 3.0)
        torch.testing.assert_close(il.solve_qp(Q, p, G=G, h=h).z, expected)
        torch.testing.assert_close(il.solve_qp(Q, p, lb=tensor(0.0, 0.0), ub=tensor(2.0, 3.0)).z, expected)
        assert qpth_fails(Q, p, G, h, NONE, NONE, match="Q is not SPD")


@pytest.mark.filterwarnings("ignore::implicit_layers.errors.DegenerateGradientWarning")
def test_d4_a_duplicated_equality_row() -> None:
    Q, p, A, b, G, h, *_ = random_qp(4, 2, 1, seed=3)
    p = p.clone().requires_grad_()
    once = il.solve_qp(Q, p, A=A, b=b, G=G, h=h).z
    twice = il.solve_qp(Q, p, A=A.repeat(2, 1), b=b.repeat(2), G=G, h=h).z
    torch.testing.assert_close(twice, once)
    expected, found = (torch.autograd.grad(z[0], p)[0] for z in (once, twice))
    torch.testing.assert_close(found, expected)
    assert qpth_fails(Q, p, G, h, A.repeat(2, 1), b.repeat(2), match="lu_factor")


def test_d4_an_infinite_h_is_a_row_that_is_not_there() -> None:
    Q, p, _, _, G, h, *_ = random_qp(4, 3, batch=(2,), active=0.7, seed=4)
    free = h.clone()
    free[0, 1] = math.inf
    z = il.solve_qp(Q, p, G=G, h=free).z
    torch.testing.assert_close(z[0], il.solve_qp(Q[0], p[0], G=G[0, [0, 2]], h=h[0, [0, 2]]).z)
    torch.testing.assert_close(z[1], il.solve_qp(Q[1], p[1], G=G[1], h=h[1]).z)
    theirs = qpth(Q, p, G, free, NONE, NONE)
    assert theirs is None or theirs[0].isnan().all()


# --- D5: qpth's second derivatives fail with an obscure error, or are silently wrong ----------------------------------


def test_d5_second_derivatives() -> None:
    Q, p, _, _, G, h, *_ = random_qp(3, 2, active=0.5, seed=5)
    check_gradients(lambda Q, p, G, h: il.solve_qp(Q, p, G=G, h=h).z, Q, p, G, h)

    def twice(layer: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = Q.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.sum(), leaf)[0]

    ours = twice(lambda Q: il.solve_qp(Q, p, G=G, h=h).z)
    if find_spec("qpth") is not None:
        theirs = twice(lambda Q: qpth(Q, p, G, h, NONE, NONE))
        assert (theirs - ours).abs().max() > 0.1 * ours.abs().max()


# --- D6: QPLayer's gradient with respect to the inequality duals is wrong ---------------------------------------------


def test_d6_duals_have_the_right_gradient() -> None:
    Q, p, _, _, G, h, *_ = random_qp(3, 2, active=1.0, seed=6)
    leaf = h.clone().requires_grad_()
    solution = il.solve_qp(Q, p, G=G, h=leaf)
    assert (solution.lam > 0).all()  # both rows active
    weights = tensor(0.7, -1.3)
    (found,) = torch.autograd.grad((weights * solution.lam).sum(), leaf)
    torch.testing.assert_close(
        found, differences(lambda h: (weights * il.solve_qp(Q, p, G=G, h=h).lam).sum(), h), rtol=1e-6, atol=1e-8
    )


# --- D7: QPLayer rounds float64 gradients to float32 ------------------------------------------------------------------


def test_d7_gradients_have_the_precision_of_the_data() -> None:
    Q, p, A, b, G, h, *_ = random_qp(5, 4, 1, active=0.5, seed=7)
    leaves = [leaf.clone().requires_grad_() for leaf in (Q, p, A, b, G, h)]
    Q_, p_, A_, b_, G_, h_ = leaves
    gradients = torch.autograd.grad(il.solve_qp(Q_, p_, A=A_, b=b_, G=G_, h=h_).z.sum(), leaves)
    for gradient in gradients:
        assert gradient.dtype == torch.float64
        assert (gradient != gradient.float().double()).any()


# --- D8, D16: QPLayer and moreau return a point for infeasible, unbounded, nonconvex and NaN data ---------------------


def test_d8_d16_what_has_no_solution_raises() -> None:
    eye, zero, p = torch.eye(2).double(), torch.zeros(2, 2).double(), tensor(-1.0, -4.0)
    positive = {"G": -eye, "h": tensor(0.0, 0.0)}
    with pytest.raises(il.UnboundedError):
        il.solve_qp(zero, p, **positive)
    with pytest.raises(il.UnboundedError):
        il.solve_qp(zero, p)
    with pytest.raises(il.NotPositiveDefiniteError):
        il.solve_qp(eye * tensor(1.0, -1.0), p, **positive)
    with pytest.raises(il.NonFiniteError, match="p"):
        il.solve_qp(eye, tensor(math.nan, 1.0), **positive)
    with pytest.raises(il.NonFiniteError, match="lb"):
        il.solve_qp(eye, p, lb=tensor(math.nan, 0.0))
    with pytest.raises(il.InfeasibleError):
        il.solve_qp(eye, p, A=tensor([1.0, 1.0], [1.0, 1.0]), b=tensor(1.0, 2.0))


def test_d8_neighbours_of_what_has_no_solution_are_untouched() -> None:
    zero, p = torch.zeros(2, 2).double(), tensor([-1.0, -4.0], [1.0, 4.0], [-1.0, 2.0]).requires_grad_()
    solution = il.solve_qp(zero, p, lb=tensor(0.0, 0.0), ub=tensor(math.inf, 3.0), on_failure="ignore")
    assert solution.info.status.tolist() == [il.Status.UNBOUNDED, il.Status.CONVERGED, il.Status.UNBOUNDED]
    torch.testing.assert_close(solution.z[1], tensor(0.0, 0.0))


def test_d16_transforms_work() -> None:
    Q, p, A, b, G, h, *_ = random_qp(3, 2, 1, active=0.5, seed=16)

    def z(p: Tensor) -> Tensor:
        return il.solve_qp(Q, p, A=A, b=b, G=G, h=h).z

    jacobian = torch.func.jacrev(z)(p)
    torch.testing.assert_close(torch.func.jacfwd(z)(p), jacobian)
    torch.testing.assert_close(torch.func.jvp(z, (p,), (torch.ones_like(p),))[1], jacobian.sum(-1))
    torch.testing.assert_close(torch.func.vmap(z)(p.expand(2, 3)), z(p).expand(2, 3))


# --- D9: QPLayer sums a shared parameter's gradient in one mode and averages it in the other --------------------------


@pytest.mark.filterwarnings("ignore::implicit_layers.errors.DegenerateGradientWarning")
def test_d9_both_modes_sum() -> None:
    Q, p, _, _, G, h, *_ = random_qp(3, 2, active=1.0, seed=9)
    costs = p + 0.01 * torch.randn(4, 3, dtype=torch.float64)
    for mode in ("raise", "nearest"):
        leaf = G.clone().requires_grad_()
        (summed,) = torch.autograd.grad(il.solve_qp(Q, costs, G=leaf, h=h, infeasible=mode).z.sum(), leaf)
        single = [
            torch.autograd.grad(il.solve_qp(Q, cost, G=leaf, h=h, infeasible=mode).z.sum(), leaf)[0] for cost in costs
        ]
        torch.testing.assert_close(summed, torch.stack(single).sum(0))


# --- D10: SCQPTH's gradients are wrong unless the constraint matrix has full column rank ------------------------------


@pytest.mark.parametrize(("n_ineq", "active"), [(3, 0.0), (3, 0.7), (8, 0.4)])
def test_d10_any_number_of_rows(n_ineq: int, active: float) -> None:
    Q, p, _, _, G, h, *_ = random_qp(4, n_ineq, active=active, seed=10)
    lower = h - 50.0  # two-sided rows, as SCQPTH states them

    def loss(Q: Tensor, p: Tensor, G: Tensor, h: Tensor) -> Tensor:
        return il.solve_qp(Q, p, G=torch.cat([G, -G]), h=torch.cat([h, -lower])).z.square().sum()

    data = [Q, p, G, h]
    leaves = [leaf.clone().requires_grad_() for leaf in data]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    for i, (found, at) in enumerate(zip(gradients, data, strict=True)):
        expected = differences(lambda value, i=i: loss(*data[:i], value, *data[i + 1 :]), at)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


# --- D11: an old typing error in dL/dG shows where the duals are not 1 ------------------------------------------------


def test_d11_the_gradient_in_g_where_duals_differ_from_one() -> None:
    """z = (h, −p₂, …) on one active row with λ = 2: qpax's elastic mode was off by up to 44 %, within its tolerance."""
    Q, G, h = torch.eye(3).double(), tensor([1.0, 0.5, -0.3]), tensor(0.4)
    weights, lam = tensor(0.3, -1.1, 0.8), 2.0
    z = tensor(0.4, 0.2, 1 / 3)
    h = (G @ z).detach()
    p = -(z + lam * G[0])
    solution = il.solve_qp(Q, p, G=G, h=h)
    torch.testing.assert_close(solution.lam, tensor(2.0))

    def loss(G: Tensor) -> Tensor:
        return (weights * il.solve_qp(Q, p, G=G, h=h).z).sum()

    leaf = G.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(found, differences(loss, G), rtol=1e-6, atol=1e-8)


# --- D12, D13: osqpth and dQP keep settings that they never use, or use for something else ----------------------------


def test_d12_d13_settings_reach_the_solver() -> None:
    Q, p, _, _, G, h, *_ = random_qp(20, 30, active=0.4, seed=12)
    usual = int(il.solve_qp(Q, p, G=G, h=h).info.iterations)
    assert usual > 2
    for most in (1, 2):
        solution = il.solve_qp(Q, p, G=G, h=h, solver=il.InteriorPoint(max_iter=most), on_failure="ignore")
        assert int(solution.info.iterations) <= most
    with pytest.raises(il.ConvergenceError, match=r"tol 1\.0e-30"):
        il.solve_qp(Q, p, G=G, h=h, solver=il.InteriorPoint(tol=1e-30))


# --- D15: Alt-Diff and BPQP give a gradient to one parameter, and iterate without an end ------------------------------


def test_d15_every_parameter_gets_its_gradient() -> None:
    Q, p, A, b, G, h, *_ = random_qp(4, 3, 1, active=0.5, seed=15)

    def outputs(*data: Tensor) -> tuple[Tensor, ...]:
        Q, p, A, b, G, h = data
        solution = il.solve_qp(Q, p, A=A, b=b, G=G, h=h)
        return solution.z, solution.nu, solution.lam, solution.s

    check_gradients(outputs, Q, p, A, b, G, h, second=False)


# --- D17: pounce's second derivatives take the duals for constants ----------------------------------------------------


def test_d17_second_derivatives_in_matrices_with_duals_that_move() -> None:
    Q, p, A, b, G, h, *_ = random_qp(3, 2, 1, active=1.0, seed=17)
    check_gradients(lambda Q, A, G: il.solve_qp(Q, p, A=A, b=b, G=G, h=h).z, Q, A, G)
