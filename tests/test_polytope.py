"""`entropic_lp` against closed forms, its own optimality conditions, the generic core and linear programming."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, nnls
from torch import Tensor

import implicit_layers as il
from implicit_layers.kkt.schur import SchurSolve
from tests.differences import first_order

DOUBLE = torch.float64


def normal(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)


def data(seed: int, batch: tuple[int, ...] = (), n: int = 12, n_eq: int = 3, n_ineq: int = 4) -> dict[str, Tensor]:
    """A bounded polytope around a positive point."""
    draw = normal(seed)
    point = draw(*batch, n).sigmoid()
    A, G = draw(*batch, n_eq, n), draw(*batch, n_ineq, n)
    A[..., 0, :] = 1.0
    h = (G @ point[..., None])[..., 0] + 0.2 * draw(*batch, n_ineq).sigmoid()
    return {"c": draw(*batch, n), "A": A, "b": (A @ point[..., None])[..., 0], "G": G, "h": h}


def stationarity(x, *, c, A, b, G=None, h=None, ub=None, tau=1.0) -> float:
    """How far c − τ(log x + 1) is from the cone of the normals of the constraints that hold at x."""
    x, c, A, b = (t.detach().double() for t in (x, c, A, b))
    assert (x > 0).all()
    torch.testing.assert_close(A @ x, b, rtol=1e-9, atol=1e-9)
    normals = [A.mT, -A.mT]
    if G is not None:
        assert (G @ x <= h + 1e-8).all()
        normals.append(G[(h - G @ x) < 1e-8].mT)
    if ub is not None:
        assert (x <= ub + 1e-12).all()
        normals.append(torch.eye(len(x), dtype=DOUBLE)[:, x >= ub - 1e-12])
    force = c - tau * (x.log() + 1)
    return nnls(torch.cat(normals, -1).numpy(), force.numpy())[1]


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.03])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 7)], ids=str)
def test_with_one_row_of_ones_it_is_softmax(shape, tau):
    c = normal(0)(*shape).requires_grad_()
    x = il.entropic_lp(
        c, A=torch.ones(1, shape[-1], dtype=DOUBLE), b=torch.ones(1, dtype=DOUBLE), temperature=tau
    ).value
    expected = (c / tau).softmax(-1)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-14)
    weights = normal(1)(*shape)
    found, closed = (torch.autograd.grad((weights * y).sum(), c)[0] for y in (x, expected))
    torch.testing.assert_close(found, closed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 4.0, 10.0, 20.0])
def test_gradient_truth_at_every_spread_of_the_scores(spread):
    tau = 0.05
    c = (spread * tau * normal(3)(8, 10)).requires_grad_()
    x = il.entropic_lp(c, A=torch.ones(1, 10, dtype=DOUBLE), b=torch.ones(1, dtype=DOUBLE), temperature=tau).value
    g = normal(4)(8, 10)
    (found,) = torch.autograd.grad((g * x).sum(), c)
    y = (c.detach() / tau).softmax(-1)
    exact = (y.unsqueeze(-1) * y.unsqueeze(-2) * (g.unsqueeze(-1) - g.unsqueeze(-2))).sum(-1) / tau  # no cancellation
    assert ((found - exact).norm(dim=-1) <= 1e-10 * exact.norm(dim=-1)).all()


@pytest.mark.parametrize("tau", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_equalities_agree_with_the_generic_core(seed, tau):
    d = data(seed)
    leaves = [d[k].clone().requires_grad_() for k in ("c", "A", "b")]
    x = il.entropic_lp(leaves[0], A=leaves[1], b=leaves[2], temperature=tau).value

    def primal(y, c, A):
        return ((c - y @ A) / tau - 1).exp()

    def residual(y, c, A, b):
        return A @ primal(y, c, A) - b

    # a start next to the answer, whose duals are the least-squares solution of stationarity
    y0 = torch.linalg.lstsq(d["A"].mT, (d["c"] - tau * (x.detach().log() + 1)).unsqueeze(-1)).solution[:, 0]
    twins = [t.detach().clone().requires_grad_() for t in leaves]
    y = il.root(residual, y0 + 1e-4, *twins).value
    expected = primal(y, *twins[:2])
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-10)
    g = normal(9)(12)
    found, wanted = (torch.autograd.grad((g * z).sum(), at) for z, at in ((x, leaves), (expected, twins)))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.03])
@pytest.mark.parametrize("seed", range(6))
def test_hard_inequalities_and_bounds_meet_the_optimality_conditions(seed, tau):
    d = data(seed, (3,))
    ub = 0.9 + 0.2 * normal(seed + 50)(12).sigmoid()
    solution = il.entropic_lp(**d, ub=ub, temperature=tau)
    for i in range(3):
        one = {k: v[i] for k, v in d.items()}
        assert stationarity(solution.value[i], **one, ub=ub, tau=tau) < 1e-7


@pytest.mark.parametrize("tau", [1.0, 0.05])
def test_entropic_slack_is_a_program_with_more_variables(tau):
    d, ub = data(7), torch.full((12,), 1.3, dtype=DOUBLE)
    x = il.entropic_lp(**d, ub=ub, temperature=tau, slack="entropic").value
    n, m = 12, 4
    A = torch.zeros(3 + m + n, n + m + n, dtype=DOUBLE)
    A[:3, :n], A[3 : 3 + m, :n], A[3 : 3 + m, n : n + m] = d["A"], d["G"], torch.eye(m, dtype=DOUBLE)
    A[3 + m :, :n], A[3 + m :, n + m :] = torch.eye(n, dtype=DOUBLE), torch.eye(n, dtype=DOUBLE)
    c = torch.cat([d["c"], torch.zeros(m + n, dtype=DOUBLE)])
    lifted = il.entropic_lp(c, A=A, b=torch.cat([d["b"], d["h"], ub]), temperature=tau).value
    torch.testing.assert_close(x, lifted[:n], rtol=1e-8, atol=1e-10)
    assert (d["G"] @ x < d["h"]).all() and (x < ub).all()


def test_bounds_with_entropic_slack_are_fermi_dirac():
    c, tau, k = normal(2)(9), 0.3, 3.5
    one = torch.ones(1, 9, dtype=DOUBLE)
    x = il.entropic_lp(c, A=one, b=torch.tensor([k], dtype=DOUBLE), ub=1.0, temperature=tau, slack="entropic").value
    low, high = torch.tensor(-50.0, dtype=DOUBLE), torch.tensor(50.0, dtype=DOUBLE)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if ((c - middle) / tau).sigmoid().sum() > k else (low, middle)
    torch.testing.assert_close(x, ((c - low) / tau).sigmoid(), rtol=1e-9, atol=1e-10)


def test_without_constraints_it_is_the_exponential():
    c = normal(5)(4, 6)
    torch.testing.assert_close(il.entropic_lp(c, temperature=0.5).value, (c / 0.5 - 1).exp())
    torch.testing.assert_close(il.entropic_lp(c, ub=0.2).value, (c - 1).exp().clamp(max=0.2))
    torch.testing.assert_close(il.entropic_lp(c, ub=2.0, slack="entropic").value, 2 * c.sigmoid())


def test_scores_are_maximised():
    A, b = torch.ones(1, 3), torch.ones(1)
    assert il.entropic_lp(torch.tensor([0.0, 5.0, 0.0]), A=A, b=b).value.argmax() == 1


# --- small temperatures, large programs -------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("positive", [False, True])
def test_few_iterations_at_small_temperatures_from_cold(positive, tau):
    d = data(11, (16,), n=20, n_eq=5)
    A = d["A"].sigmoid() if positive else d["A"]
    b = (A @ normal(12)(16, 20).sigmoid()[..., None])[..., 0]
    solution = il.entropic_lp(d["c"], A=A, b=b, temperature=tau)
    assert solution.info.iterations.max() <= 60
    assert solution.info.residual.max() <= 1e-11
    for i in range(16):
        best = linprog(-d["c"][i].numpy(), A_eq=A[i].numpy(), b_eq=b[i].numpy())
        value = float(d["c"][i] @ solution.value[i])
        mass = solution.value[i]
        entropy = float(-(mass * mass.clamp(min=1e-300).log()).sum())
        assert value <= -best.fun + 1e-8
        assert value >= -best.fun - tau * (abs(entropy) + 20 * math.e)  # the bias is of the order of τ


def test_bounds_at_small_temperatures():
    d = data(13, (8,), n=20, n_eq=5, n_ineq=6)
    for slack in ("hard", "entropic"):
        solution = il.entropic_lp(**d, ub=1.2, temperature=0.01, slack=slack)
        assert solution.info.residual.max() <= 1e-10


def box_program(scale, seed=0, batch=20, n=12, m=3):
    draw = normal(seed)
    A, inside = draw(batch, m, n).abs(), 0.1 + 0.8 * draw(batch, n).sigmoid()
    return scale * draw(batch, n), A, (A @ inside.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4, 5e4])
def test_hard_bounds_at_ten_thousandths_of_the_spread(scale):
    c, A, b = box_program(scale)
    x, info = il.entropic_lp(c, A=A, b=b, ub=1.0)
    assert bool(info.converged.all())
    for i in range(5):
        best = linprog(-c[i], A_eq=A[i], b_eq=b[i], bounds=(0, 1))
        assert -12 <= float(c[i] @ x[i]) + best.fun <= 1e-6 * scale  # the entropy is worth no more than n/e each way


def test_hard_bounds_beside_larger_scores_give_up_early_and_say_so():
    for scale in (1e6, 1e8, 1e12):
        c, A, b = box_program(scale)
        info = il.entropic_lp(c, A=A, b=b, ub=1.0, on_failure="ignore").info
        assert not bool(info.converged.any()) and int(info.iterations.max()) <= 200
        with pytest.raises(il.ConvergenceError, match="raise the temperature"):
            il.entropic_lp(c, A=A, b=b, ub=1.0)


def test_hundred_thousand_variables():
    draw = normal(14)
    A = draw(5, 100_000)
    A[0] = 1.0
    c = draw(100_000).requires_grad_()
    solution = il.entropic_lp(c, A=A, b=A @ draw(100_000).sigmoid(), temperature=0.3)
    assert solution.info.converged
    (grad,) = torch.autograd.grad((solution.value * draw(100_000)).sum(), c)
    torch.testing.assert_close(A @ grad, torch.zeros(5, dtype=DOUBLE), rtol=0, atol=1e-6)  # x stays on the rows


def test_no_tensor_is_quadratic_in_the_variables():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            sizes = [
                t.numel() for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, Tensor)
            ]
            largest = max([largest, *sizes])
            return result

    d = data(15, n=3000, n_eq=4, n_ineq=0)
    c = d["c"].requires_grad_()
    with Watch():
        il.entropic_lp(c, A=d["A"], b=d["b"], temperature=0.5).value.square().sum().backward()
    assert largest <= 4 * 3000


# --- degenerate programs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_verdicts_are_those_of_linear_programming(tau):
    draw = normal(16)
    A, b, c = draw(24, 12, 20), draw(24, 12), draw(24, 20)
    A[:, 0], b[:, 0] = 1.0, 5.0
    b[::2] = (A[::2] @ draw(12, 20).sigmoid()[..., None])[..., 0]
    solution = il.entropic_lp(c, A=A, b=b, temperature=tau, on_failure="ignore")
    infeasible = [linprog(-c[i].numpy(), A_eq=A[i].numpy(), b_eq=b[i].numpy()).status == 2 for i in range(24)]
    assert 3 < sum(infeasible) < 21
    assert [s == il.Status.INFEASIBLE for s in solution.info.status.tolist()] == infeasible
    assert solution.info.converged.tolist() == [not bad for bad in infeasible]


def infeasible_batch() -> dict[str, Tensor]:
    d = data(17, (3,))
    d["h"] = d["h"].clone()
    d["G"][1, 0], d["h"][1, 0] = 1.0, 0.5 * float(d["b"][1, 0])  # Σx ≤ half of what Σx must be
    return d


def test_an_infeasible_problem_raises_and_says_which():
    with pytest.raises(il.InfeasibleError, match=r"entropic_lp: 1 of 3 problems has no feasible point.*index 1"):
        il.entropic_lp(**infeasible_batch())


def test_an_infeasible_problem_leaves_its_neighbours_alone():
    d = infeasible_batch()
    leaves = {k: v.clone().requires_grad_() for k, v in d.items()}
    with pytest.warns(il.ConvergenceWarning, match="zero gradient"):
        solution = il.entropic_lp(**leaves, on_failure="warn")
    assert solution.info.status.tolist() == [0, int(il.Status.INFEASIBLE), 0]
    assert solution.value.isfinite().all()
    g = normal(18)(3, 12)
    found = torch.autograd.grad((g * solution.value).sum(), list(leaves.values()))
    assert all((grad[1] == 0).all() for grad in found)
    for i in (0, 2):
        one = {k: v[i].clone().requires_grad_() for k, v in d.items()}
        x = il.entropic_lp(**one).value
        torch.testing.assert_close(solution.value[i], x, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            [grad[i] for grad in found], list(torch.autograd.grad((g[i] * x).sum(), list(one.values())))
        )


@pytest.mark.parametrize(
    ("A", "b", "ub"),
    [
        ([[1.0, 1.0]], [-1.0], None),
        ([[1.0, 1.0], [1.0, 1.0]], [1.0, 1.001], None),
        ([[1.0, 1.0]], [2.5], 1.0),
        ([[0.0, 0.0]], [1.0], None),
        ([[1.0, 1.0]], [1.0], -1.0),
        ([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [1.0, 1.0, 2.1], None),
    ],
)
@pytest.mark.parametrize("slack", ["hard", "entropic"])
def test_contradictions_in_the_rows(A, b, ub, slack):
    c = torch.tensor([0.3, -0.2], dtype=DOUBLE)
    rows = {"A": torch.tensor(A, dtype=DOUBLE), "b": torch.tensor(b, dtype=DOUBLE)}
    with pytest.raises(il.InfeasibleError):
        il.entropic_lp(c, **rows, ub=ub, slack=slack)


def test_entries_that_can_only_be_zero_are_zero():
    A = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 2.0, 1.0]], dtype=DOUBLE)
    b = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    c = normal(19)(4).requires_grad_()
    x = il.entropic_lp(c, A=A, b=b).value
    torch.testing.assert_close(x[:2], c[:2].softmax(-1))
    assert (x[2:] == 0).all()
    (grad,) = torch.autograd.grad(x[0], c)
    y = c.detach()[:2].softmax(-1)
    torch.testing.assert_close(grad, torch.stack([y[0] * y[1], -y[0] * y[1], *torch.zeros(2, dtype=DOUBLE)]))


def test_a_boundary_that_only_the_rows_together_imply():
    A = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=DOUBLE)
    c = normal(20)(3).requires_grad_()
    x = il.entropic_lp(c, A=A, b=torch.ones(2, dtype=DOUBLE)).value
    torch.testing.assert_close(x[:2], c[:2].softmax(-1), rtol=1e-9, atol=1e-9)
    assert x[2] < 1e-9
    (grad,) = torch.autograd.grad(x[0], c)
    y = c.detach()[:2].softmax(-1)
    torch.testing.assert_close(grad[:2], torch.stack([y[0] * y[1], -y[0] * y[1]]), rtol=1e-7, atol=1e-8)


def test_entries_that_a_combination_of_rows_forces_to_zero_are_as_small_as_is_promised():
    A = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=DOUBLE)
    c = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE, requires_grad=True)
    x = il.entropic_lp(c, A=A, b=torch.ones(2, dtype=DOUBLE)).value
    exact = torch.tensor([1.0, 0.0, 0.0], dtype=DOUBLE)
    torch.testing.assert_close(x.detach(), exact, rtol=0, atol=2e-10)
    for entry in x:
        assert torch.autograd.grad(entry, c, retain_graph=True)[0].abs().max() < 2e-10


def test_redundant_rows_change_nothing():
    d = data(21, n_ineq=0)
    A, b = d["A"], d["b"]
    more = torch.cat([A, A[:1] + 2 * A[1:2], -A[2:]]), torch.cat([b, b[:1] + 2 * b[1:2], -b[2:]])
    gradients = []
    for rows, right in ((A, b), more):
        c, right = d["c"].clone().requires_grad_(), right.clone().requires_grad_()
        x = il.entropic_lp(c, A=rows, b=right, temperature=0.3).value
        gradients.append((x.detach(), *torch.autograd.grad((normal(22)(12) * x).sum(), (c, right))))
    torch.testing.assert_close(gradients[0][:2], gradients[1][:2], rtol=1e-8, atol=1e-9)
    # a change of b that keeps the rows consistent
    db = normal(23)(3)
    spread = torch.cat([db, db[:1] + 2 * db[1:2], -db[2:]])
    torch.testing.assert_close(gradients[0][2] @ db, gradients[1][2] @ spread, rtol=1e-8, atol=1e-9)
    # and the one of least norm: nothing along what the rows cannot tell apart
    null = torch.linalg.svd(more[0].mT)[2][3:]
    assert (null @ gradients[1][2]).abs().max() < 1e-8


def test_a_weakly_active_inequality_is_announced():
    c = torch.tensor([0.0, 0.0], dtype=DOUBLE, requires_grad=True)
    A, b = torch.ones(1, 2, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)
    G, h = torch.tensor([[1.0, 0.0]], dtype=DOUBLE), torch.tensor([0.5], dtype=DOUBLE)
    x = il.entropic_lp(c, A=A, b=b, G=G, h=h).value
    torch.testing.assert_close(x, torch.full((2,), 0.5, dtype=DOUBLE))
    with pytest.warns(il.DegenerateGradientWarning, match="only just active"):
        torch.autograd.grad(x[0], c)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.autograd.grad(il.entropic_lp(c, A=A, b=b, G=G, h=h + 0.1).value[0], c)


def test_a_problem_that_takes_too_long_says_so():
    d = data(24)
    with pytest.raises(il.ConvergenceError, match="2 of 2 iterations"):
        il.entropic_lp(**d, temperature=0.01, max_iter=2)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_kept(dtype):
    c = normal(25)(3, 5).to(dtype).requires_grad_()
    A, b = torch.ones(1, 5, dtype=dtype), torch.ones(1, dtype=dtype)
    x = il.entropic_lp(c, A=A, b=b).value
    assert x.dtype == dtype
    torch.testing.assert_close(x.double(), c.detach().double().softmax(-1), rtol=8e-3, atol=1e-3)
    assert torch.autograd.grad(x.sum(), c)[0].dtype == dtype


def test_arguments_are_refused_by_name():
    c, A, b = torch.zeros(3), torch.ones(1, 3), torch.ones(1)
    with pytest.raises(il.ShapeError, match="A was given without b"):
        il.entropic_lp(c, A=A)
    with pytest.raises(il.ShapeError, match="A must have shape"):
        il.entropic_lp(c, A=torch.ones(1, 4), b=b)
    with pytest.raises(il.ShapeError, match="b must have shape"):
        il.entropic_lp(c, A=A, b=torch.ones(2))
    with pytest.raises(il.ShapeError, match="ub must have shape"):
        il.entropic_lp(c, A=A, b=b, ub=torch.ones(2))
    with pytest.raises(il.ShapeError, match="c must have shape"):
        il.entropic_lp(torch.zeros(0))
    with pytest.raises(il.DtypeError, match=r"A is torch\.float64"):
        il.entropic_lp(c, A=A.double(), b=b)
    with pytest.raises(il.NonFiniteError, match=r"c\[1\] is nan"):
        il.entropic_lp(torch.tensor([0.0, math.nan, 0.0]), A=A, b=b)
    with pytest.raises(ValueError, match=r"ub.* is nan"):
        il.entropic_lp(c, A=A, b=b, ub=math.nan)
    with pytest.raises(ValueError, match="slack must be one of"):
        il.entropic_lp(c, A=A, b=b, slack="soft")
    for temperature in (0.0, -1.0, math.nan, torch.tensor(0.0), torch.tensor([[1.0], [-2.0]])):
        with pytest.raises(ValueError, match="temperature"):
            il.entropic_lp(c, A=A, b=b, temperature=temperature)
    with pytest.raises(il.ShapeError, match="temperature must be 0-d or"):
        il.entropic_lp(c, A=A, b=b, temperature=torch.ones(3))
    with pytest.raises(il.ShapeError, match="do not broadcast"):
        il.entropic_lp(torch.zeros(2, 3), A=A, b=torch.ones(3, 1))


def test_one_temperature_a_problem():
    c, tau = normal(26)(4, 5), torch.tensor([[0.2], [0.5], [1.0], [3.0]], dtype=DOUBLE)
    A, b = torch.ones(1, 5, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)
    torch.testing.assert_close(il.entropic_lp(c, A=A, b=b, temperature=tau).value, (c / tau).softmax(-1))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(-3, 3), st.floats(-6, 6))
def test_any_scale_of_rows_and_any_shift_of_scores(seed, power, shift):
    d = data(seed, n=8, n_eq=2, n_ineq=2)
    expected = il.entropic_lp(**d, temperature=0.5).value
    scale = torch.tensor([10.0**power, 1.0], dtype=DOUBLE)
    moved = {
        "c": d["c"] + shift * d["A"][0],  # a shift along a row changes only its multiplier
        "A": d["A"] * scale[:, None],
        "b": d["b"] * scale,
        "G": d["G"] * scale[:, None],
        "h": d["h"] * scale,
    }
    torch.testing.assert_close(il.entropic_lp(**moved, temperature=0.5).value, expected, rtol=1e-7, atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.2, 0.05]))
def test_permuted_problems_have_permuted_solutions(seed, tau):
    d = data(seed, n=9)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(9))
    x = il.entropic_lp(**d, temperature=tau).value
    d = {k: v[..., order] if k in ("c", "A", "G") else v for k, v in d.items()}
    torch.testing.assert_close(il.entropic_lp(**d, temperature=tau).value, x[order], rtol=1e-7, atol=1e-9)


def test_a_wrong_derivative_of_the_system_would_be_seen(monkeypatch):
    d = data(27, n_ineq=0)
    tensors = tuple(d[k].requires_grad_() for k in ("c", "A", "b"))

    def call(c, A, b):
        return il.entropic_lp(c, A=A, b=b).value

    assert first_order(call, tensors)
    right = SchurSolve.apply
    monkeypatch.setattr(SchurSolve, "apply", lambda *args: 1.3 * right(*args))
    with pytest.raises(RuntimeError):
        first_order(call, tensors)


def test_constraints_that_rounding_breaks_are_no_solution():
    A, b = torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    c = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for tau in (1.0, 0.1, 0.05, 0.03, 0.02, 0.015, 0.01):
        value, info = il.entropic_lp(c, A=A, b=b, temperature=tau, on_failure="ignore")
        off = float((A @ value - b).abs().max())
        assert bool(info.converged) == (off <= 2e-8)
        # by hand: x1 x2 = exp(1/tau - 2) and x1 - x2 = 1
        exact = 0.5 + math.sqrt(0.25 + math.exp(1 / tau - 2))
        assert not info.converged or abs(float(value[0]) - exact) <= 1e-9 * exact
    assert off > 0.1
    with pytest.raises(il.errors.ConvergenceError, match="without its entropy the program is probably unbounded"):
        il.entropic_lp(c, A=A, b=b, temperature=0.02)


def test_scores_of_any_size_on_the_simplex_give_softmax():
    generator = torch.Generator().manual_seed(2)
    ones, b = torch.full((1, 6), 2.0, dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    for size in (1e6, 1e10, 1e15, 1e30):
        c = size * torch.randn(5, 6, dtype=torch.float64, generator=generator)
        value, info = il.entropic_lp(c, A=ones, b=b)
        assert int(info.iterations.max()) < 100
        torch.testing.assert_close(value, c.softmax(-1), rtol=0, atol=1e-12)
    tie = torch.tensor([1e12, 1e12, 0.0], dtype=torch.float64, requires_grad=True)
    value = il.entropic_lp(tie, A=ones[:, :3], b=b).value
    torch.testing.assert_close(value, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(value[0], tie)
    torch.testing.assert_close(gradient, torch.tensor([0.25, -0.25, 0.0], dtype=torch.float64), rtol=0, atol=1e-10)


def test_an_overflow_says_so():
    with pytest.raises(il.errors.ConvergenceError, match=r"overflows torch.float32: an entry is about exp"):
        il.entropic_lp(torch.tensor([1.0, 300.0]))


def test_under_autocast_half_scores_go_with_float32_constraints():
    c, A, b = torch.tensor([0.0, 1.0]), torch.ones(1, 2), torch.ones(1)
    layer = il.nn.EntropicLP(A=A, b=b, ub=torch.tensor([1.0, 0.6]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = (c.unsqueeze(0) @ torch.eye(2))[0]
        assert half.dtype == torch.bfloat16
        x, y = il.entropic_lp(half, A=A, b=b).value, layer(half)
    torch.testing.assert_close(x, c.softmax(-1))
    torch.testing.assert_close(y, torch.tensor([0.4, 0.6]))


def test_active_rows_that_are_given_twice_warn_in_the_backward_pass():
    c = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    row, h = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    once = il.entropic_lp(c, G=row, h=h).value
    twice = il.entropic_lp(c, G=torch.cat([row, 3 * row]), h=torch.cat([h, 3 * h])).value
    torch.testing.assert_close(twice, once, rtol=1e-9, atol=1e-12)
    (expected,) = torch.autograd.grad(once[0], c)
    with pytest.warns(il.errors.DegenerateGradientWarning, match="depend on each other"):
        (found,) = torch.autograd.grad(twice[0], c)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


# --- programs that contradict themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize("slack", ["hard", "entropic"])
@pytest.mark.parametrize(
    "rows",
    [
        {"A": [[1.0] * 6], "b": [1.0], "G": [[1.0] * 6], "h": [0.5]},
        {"G": [[1.0] * 6, [-1.0] * 6], "h": [0.5, -1.0]},
        {"A": [[1.0] * 6, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]], "b": [1.0, 1.1]},
        {"A": [[1.0] * 6, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]], "b": [1.0, 5.1]},
        {"A": [[1.0] * 6, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]], "b": [1.0, 5.0 + 1e-6]},
    ],
    ids=["a row against its bound", "two inequalities", "a part above the whole", "a mean above all", "by a millionth"],
)
def test_plain_contradictions_are_proven_before_the_iterations_run_out(rows, slack):
    rows = {name: torch.tensor(value, dtype=DOUBLE) for name, value in rows.items()}
    c = torch.zeros(6, dtype=DOUBLE)
    with pytest.raises(il.InfeasibleError):
        il.entropic_lp(c, **rows, slack=slack)
    assert il.entropic_lp(c, **rows, slack=slack, on_failure="ignore").info.iterations <= 60


def on_the_boundary(seed: int) -> dict[str, Tensor]:
    """Rows that a point with many zeros meets exactly."""
    draw = normal(seed)
    n, n_eq, n_ineq = 4 + seed % 9, 1 + seed % 3, seed % 4
    A, G = draw(n_eq, n), draw(n_ineq, n)
    if seed % 2:
        A, G = A.round(), G.round()
    A[0] = 1.0
    point = draw(n).abs() * (draw(n) > 0.3)
    point[0] += 0.5
    return {"A": A, "b": A @ point, "G": G, "h": G @ point}


@pytest.mark.parametrize("first", range(0, 60, 12))
def test_a_feasible_program_is_never_called_infeasible_and_one_that_is_not_always_is(first):
    for seed in range(first, first + 12):
        rows = on_the_boundary(seed)
        draw = normal(1000 + seed)
        n = rows["A"].shape[-1]
        c = draw(n)
        slack = ("hard", "entropic")[seed // 2 % 2]
        # after one iteration everything is asked whether it has a point
        info = il.entropic_lp(c, **rows, slack=slack, max_iter=1, on_failure="ignore").info
        assert info.status != int(il.Status.INFEASIBLE), seed
        combination = draw(rows["A"].shape[0])
        above = combination @ rows["A"] + draw(n).clamp(min=0.0)  # times x ≥ 0 it is no less than combination @ b
        size = above.abs().max()
        for margin in (1e-6, 1e-3, 1.0):
            below = combination @ rows["b"] - margin * rows["b"].abs().max() * size
            worse = rows | {
                "G": torch.cat([rows["G"], above.unsqueeze(0) / size]),
                "h": torch.cat([rows["h"], below.unsqueeze(0) / size]),
            }
            parts = {"A_eq": worse["A"], "b_eq": worse["b"], "A_ub": worse["G"], "b_ub": worse["h"]}
            assert linprog(np.zeros(n), **{k: v.numpy() for k, v in parts.items()}).status == 2
            info = il.entropic_lp(c, **worse, slack=slack, max_iter=1, on_failure="ignore").info
            assert info.status == int(il.Status.INFEASIBLE), (seed, margin)


def test_a_point_far_beyond_the_right_hand_sides_of_other_rows_is_not_taken_for_none():
    # x2 must be 5e7, in a row of its own; the first block is on the boundary
    A = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=DOUBLE)
    b = torch.tensor([1.0, 1.0, 5e7], dtype=DOUBLE)
    info = il.entropic_lp(torch.zeros(3, dtype=DOUBLE), A=A, b=b, max_iter=1, on_failure="ignore").info
    assert info.status == int(il.Status.NOT_CONVERGED)


def test_a_contradiction_that_takes_long_leaves_its_neighbours_alone():
    A = torch.ones(2, 6, dtype=DOUBLE)
    A[1] = torch.arange(6, dtype=DOUBLE)
    b = torch.tensor([[1.0, 2.5], [1.0, 5.1], [1.0, 4.0]], dtype=DOUBLE)
    c = normal(40)(6)
    x, info = il.entropic_lp(c, A=A, b=b, on_failure="ignore")
    assert info.status.tolist() == [0, int(il.Status.INFEASIBLE), 0]
    for i in (0, 2):
        torch.testing.assert_close(x[i], il.entropic_lp(c, A=A, b=b[i]).value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("slack", ["hard", "entropic"])
@pytest.mark.parametrize("ratio", [1e4, 1e8, 1e12])
def test_every_row_is_met_relative_to_its_own_size(ratio, slack):
    b = torch.tensor([1 / ratio, 1.0, ratio], dtype=DOUBLE)
    x = il.entropic_lp(torch.zeros(3, dtype=DOUBLE), A=torch.eye(3, dtype=DOUBLE), b=b, slack=slack).value
    torch.testing.assert_close(x, b, rtol=1e-9, atol=0)
    c = normal(41)(6)
    A = torch.zeros(2, 6, dtype=DOUBLE)
    A[0, :3], A[1, 3:] = 1.0, 1.0
    x = il.entropic_lp(c, A=A, b=b[[0, 2]], slack=slack).value
    torch.testing.assert_close(x[:3], c[:3].softmax(-1) / ratio, rtol=1e-9, atol=0)
    torch.testing.assert_close(x[3:], c[3:].softmax(-1) * ratio, rtol=1e-9, atol=0)


def test_a_small_row_beside_a_large_one_that_shares_its_entries():
    A, b = torch.eye(3, dtype=DOUBLE), torch.tensor([1e-8, 1.0, 1e8], dtype=DOUBLE)
    A[2] = 1.0
    x, info = il.entropic_lp(torch.zeros(3, dtype=DOUBLE), A=A, b=b)
    torch.testing.assert_close(x[:2], b[:2], rtol=1e-9, atol=0)
    assert info.residual <= 1e-12
