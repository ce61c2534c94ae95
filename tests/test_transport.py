"""`sinkhorn` against plain Sinkhorn iterations, unrolled autograd, `entropic_lp`, and assignment."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

import implicit_layers as il
from implicit_layers.kkt import balance
from tests.differences import first_order

DOUBLE = torch.float64


def normal(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)


def data(seed: int, n: int = 6, m: int = 5, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    draw = normal(seed)
    C = (draw(*batch, n, 1, 2) - draw(*batch, 1, m, 2)).square().sum(-1)
    return C, draw(*batch, n).softmax(-1), draw(*batch, m).softmax(-1)


def by_hand(C: Tensor, a: Tensor, b: Tensor, tau: Tensor | float, iterations: int) -> Tensor:
    """Sinkhorn in the log domain, as the papers write it."""
    L, f, g = -C / tau, torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(iterations):
        g = b.log() - (L + f.unsqueeze(-1)).logsumexp(-2)
        f = a.log() - (L + g.unsqueeze(-2)).logsumexp(-1)
    return (L + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()


def gradients(function, weights: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad((weights * function(*leaves)).sum(), leaves)


@pytest.mark.parametrize("tau", [10.0, 1.0, 0.3])
@pytest.mark.parametrize(("n", "m"), [(6, 5), (3, 8), (1, 4), (4, 1), (1, 1)])
def test_plain_iterations_and_their_unrolled_gradient(n, m, tau):
    C, a, b = data(1, n, m)
    weights, tau = normal(2)(n, m), torch.tensor(tau, dtype=DOUBLE)
    x, y = a.log(), b.log()

    def ours(C, x, y, tau):
        return il.sinkhorn(C, x.softmax(-1), y.softmax(-1), temperature=tau).value

    def theirs(C, x, y, tau):
        return by_hand(C, x.softmax(-1), y.softmax(-1), tau, 1500)

    torch.testing.assert_close(ours(C, x, y, tau), theirs(C, x, y, tau), rtol=1e-8, atol=1e-10)
    found, expected = (gradients(f, weights, C, x, y, tau) for f in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tau", [1.0, 0.2, 0.05])
@pytest.mark.parametrize(("n", "m"), [(4, 5), (5, 3)])
def test_it_is_entropic_lp_with_the_marginals_as_rows(n, m, tau):
    C, a, b = data(3, n, m)
    A = torch.cat([torch.eye(n, dtype=DOUBLE).repeat_interleave(m, 1), torch.eye(m, dtype=DOUBLE).repeat(1, n)])

    def program(C, a, b):
        return il.entropic_lp(-C.reshape(-1), A=A, b=torch.cat([a, b]), temperature=tau).value.reshape(n, m)

    def plan(C, a, b):
        return il.sinkhorn(C, a, b, temperature=tau).value

    torch.testing.assert_close(plan(C, a, b), program(C, a, b), rtol=1e-8, atol=1e-10)
    weights = normal(4)(n, m)  # both give the gradient of least norm
    torch.testing.assert_close(
        gradients(plan, weights, C, a, b), gradients(program, weights, C, a, b), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01, 0.001])
def test_any_temperature_in_few_iterations(tau):
    C, a, b = data(5, 40, 30, (4,))
    solution = il.sinkhorn(C, a, b, temperature=tau, max_iter=100)
    torch.testing.assert_close(solution.value.sum(-1), a, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(solution.value.sum(-2), b, rtol=1e-8, atol=1e-10)
    # stationarity: C + τ log P is a sum of potentials wherever P has not underflowed
    big = solution.value.clamp(min=1e-280)
    S = C + tau * big.log()
    for k in range(4):
        P = solution.value[k]
        i, j = divmod(int(P.argmax()), 30)
        cross = S[k] + S[k, i, j] - S[k, i : i + 1] - S[k, :, j : j + 1]
        seen = (P > 1e-200) & (P[i] > 1e-200) & (P[:, j : j + 1] > 1e-200)
        assert cross[seen].abs().max() < 1e-7


def test_small_temperatures_approach_the_assignment():
    C = normal(6)(12, 12)
    even = torch.full((12,), 1 / 12, dtype=DOUBLE)
    P = il.sinkhorn(C, even, even, temperature=1e-3).value
    rows, columns = linear_sum_assignment(C.numpy())
    assert (12 * P[rows, columns] > 0.99).all()


@pytest.mark.parametrize("n, m", [(3, 5), (4, 6)])
@pytest.mark.parametrize("exponent", [3, 4, 5])
def test_sides_of_different_length_at_small_temperatures_are_the_vertex_of_the_linear_program(n, m, exponent):
    """The path's first step used to jump to a saturated plan that no Newton step leaves: 4 of 6 stopped there."""
    a, b = np.full(n, 1 / n), np.full(m, 1 / m)
    rows = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    for seed in range(6):
        C = torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        P = il.sinkhorn(C, torch.from_numpy(a), torch.from_numpy(b), temperature=10.0**-exponent).value
        best = linprog(C.flatten().numpy(), A_eq=rows, b_eq=np.concatenate([a, b]), method="highs").fun
        assert -1e-9 < float((C * P).sum()) - best < 10.0**-exponent * math.log(n * m)


@pytest.mark.parametrize("tau", [0.5, 0.02])
def test_gradients_by_differences_where_newton_is_needed(tau):
    C, a, b = data(7, 8, 7)
    weights = normal(8)(8, 7)

    def loss(C, x, y):
        return (weights * il.sinkhorn(C, x.softmax(-1), y.softmax(-1), temperature=tau, tol=1e-12).value).sum()

    point = (C, a.log(), b.log())
    found = gradients(
        lambda *t: il.sinkhorn(t[0], t[1].softmax(-1), t[2].softmax(-1), temperature=tau).value, weights, *point
    )
    for k, tensor in enumerate(point):
        direction = normal(9 + k)(*tensor.shape)
        step = 1e-5 * tau
        up, down = ([*point[:k], tensor + s * direction, *point[k + 1 :]] for s in (step, -step))
        slope = (loss(*up) - loss(*down)) / (2 * step)
        torch.testing.assert_close((found[k] * direction).sum(), slope, rtol=1e-5, atol=1e-7)


def test_large_problems_are_solved_without_forming_the_system(monkeypatch):
    C, a, b = data(10, 9, 8)
    weights = normal(11)(9, 8)

    def plan(C, a, b):
        return il.sinkhorn(C, a, b, temperature=0.05).value

    expected = gradients(plan, weights, C, a, b)
    monkeypatch.setattr(balance, "DENSE_LIMIT", 4)
    torch.testing.assert_close(gradients(plan, weights, C, a, b), expected, rtol=1e-7, atol=1e-9)


def test_the_graph_does_not_grow_with_the_iterations():
    C, a, b = data(12, 20, 20)
    sizes, counts = [], []
    for tau in (2.0, 0.1, 0.005):
        kept = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal kept
            kept += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            solution = il.sinkhorn(C.clone().requires_grad_(), a, b, temperature=tau)
        sizes.append(kept)
        counts.append(int(solution.info.iterations))
    assert len(set(counts)) > 1
    assert len(set(sizes)) == 1
    assert sizes[0] < 6 * C.numel()


# --- marginals that are zero, unbalanced, negative; costs that forbid -------------------------------------------------


def test_zero_marginals_leave_the_problem_without_them():
    C, a, b = data(13)
    a, b = a.clone(), b.clone()
    a[2], b[0] = 0.0, 0.0
    a, b = a / a.sum(), b / b.sum()
    rows, columns = a > 0, b > 0
    weights = normal(14)(6, 5)

    def plan(C, a, b):
        return il.sinkhorn(C, a, b, temperature=0.3).value

    P = plan(C, a, b)
    assert (P[~rows] == 0).all() and (P[:, ~columns] == 0).all()
    small = [C[rows][:, columns], a[rows], b[columns]]
    torch.testing.assert_close(P[rows][:, columns], plan(*small))
    full = gradients(plan, weights, C, a, b)
    part = gradients(plan, weights[rows][:, columns], *small)
    torch.testing.assert_close([full[0][rows][:, columns], full[1][rows], full[2][columns]], list(part))
    assert (full[0][~rows] == 0).all()
    # the derivative to the side of mass that is yet to come
    step, da, db = 1e-6, torch.zeros_like(a), torch.zeros_like(b)
    da[2], db[0] = step, step
    slope = ((plan(C, a + da, b + db) - P) * weights).sum() / step
    torch.testing.assert_close(full[1][2] + full[2][0], slope, rtol=1e-4, atol=1e-4)
    pushed = torch.func.jvp(lambda a, b: (plan(C, a, b) * weights).sum(), (a, b), (da / step, db / step))[1]
    torch.testing.assert_close(pushed, full[1][2] + full[2][0])


def test_no_mass_at_all():
    C = data(15)[0].requires_grad_()
    P = il.sinkhorn(C, torch.zeros(6, dtype=DOUBLE), torch.zeros(5, dtype=DOUBLE)).value
    assert (P == 0).all()
    assert (torch.autograd.grad(P.sum(), C)[0] == 0).all()


def test_marginals_of_any_size():
    C, a, b = data(16)
    a, b = a.clone(), b.clone()
    a[0], b[1] = 1e-30, 1e-12
    a, b = a / a.sum(), b / b.sum()
    P = il.sinkhorn(C, a, b, temperature=0.1, tol=1e-13).value
    torch.testing.assert_close(P.sum(-1), a, rtol=1e-9, atol=1e-14)
    for factor in (1e-20, 1e20):
        torch.testing.assert_close(il.sinkhorn(C, factor * a, factor * b, temperature=0.1, tol=1e-13).value / factor, P)


def test_different_sums_are_refused():
    C, a, b = data(17, batch=(3,))
    b = b.clone()
    b[1] *= 1.01
    with pytest.raises(
        ValueError, match=r"different sums, 1 of a\[1\] and 1.01 of b\[1\], 0.01 apart .*\(1 of 3 problems\)"
    ):
        il.sinkhorn(C, a, b)
    il.sinkhorn(C.float(), a.float(), (1.01 * a.float()).sum(-1, keepdim=True) / 1.01 / 5 * torch.ones(5))  # rounding


def test_negative_and_infinite_data_are_refused():
    C, a, b = data(18)
    with pytest.raises(ValueError, match=r"a\[0\] is -"):
        il.sinkhorn(C, a - 2 * a[0] * torch.eye(6, dtype=DOUBLE)[0], b)
    with pytest.raises(il.NonFiniteError, match=r"C\[1, 2\] is nan"):
        il.sinkhorn(C.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(math.nan, dtype=DOUBLE)), a, b)
    with pytest.raises(il.NonFiniteError, match="b"):
        il.sinkhorn(C, a, b * math.inf)
    with pytest.raises(il.ShapeError, match="a must have shape"):
        il.sinkhorn(C, b, a)
    with pytest.raises(il.ShapeError, match="C must have shape"):
        il.sinkhorn(C[0], a, b)
    with pytest.raises(il.DtypeError, match=r"a is torch\.float64"):
        il.sinkhorn(C.float(), a, b)
    with pytest.raises(il.ShapeError, match="temperature"):
        il.sinkhorn(C, a, b, temperature=torch.ones(6, 1, dtype=DOUBLE))
    for temperature in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            il.sinkhorn(C, a, b, temperature=temperature)


def test_forbidden_entries():
    C, a, b = data(19)
    C = C.clone()
    C[0, 0] = C[3, 2] = math.inf
    dear = torch.where(C.isinf(), 1e4, C)

    def plan(C, a, b):
        return il.sinkhorn(C, a, b, temperature=0.3).value

    torch.testing.assert_close(plan(C, a, b), plan(dear, a, b))
    assert plan(C, a, b)[0, 0] == 0
    tau = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    P = il.sinkhorn(C, a, b, temperature=tau).value
    weights = normal(20)(6, 5)
    found = torch.autograd.grad((P * weights).sum(), tau)[0]
    expected = torch.autograd.grad((il.sinkhorn(dear, a, b, temperature=tau).value * weights).sum(), tau)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(plan, weights, C, a, b), gradients(plan, weights, dear, a, b))


@pytest.mark.parametrize("columns", [[0], [0, 1], [0, 1, 2, 3, 4]])
def test_mass_without_a_way_is_infeasible(columns):
    C, a, b = data(21, batch=(2,))
    C = C.clone()
    C[1][:4, columns] = math.inf  # only the last two rows may serve these columns
    b = b.clone()
    b[1] = torch.full((5,), 0.01, dtype=DOUBLE)
    b[1, columns] = 1.0
    b[1] /= b[1].sum()
    a = torch.full_like(a, 1 / 6)
    with pytest.raises(il.InfeasibleError, match="1 of 2"):
        il.sinkhorn(C, a, b)
    leaf = C.clone().requires_grad_()
    solution = il.sinkhorn(leaf, a, b, on_failure="ignore")
    assert solution.info.status.tolist() == [0, int(il.Status.INFEASIBLE)]
    alone = il.sinkhorn(C[0], a[0], b[0])
    torch.testing.assert_close(solution.value[0], alone.value, rtol=1e-9, atol=1e-12)
    (grad,) = torch.autograd.grad(solution.value.square().sum(), leaf)
    assert (grad[1] == 0).all()
    assert grad[0].abs().max() > 0


def test_costs_that_forbid_everything_are_infeasible():
    for n, m in ((1, 1), (3, 2), (2, 3)):
        C = torch.full((n, m), math.inf, dtype=DOUBLE)
        a, b = (torch.full((k,), 1 / k, dtype=DOUBLE) for k in (n, m))
        for costs in (C, torch.stack([C, torch.zeros_like(C)])):
            with pytest.raises(il.InfeasibleError):
                il.sinkhorn(costs, a, b)


def test_a_plan_may_be_changed_in_place():
    """What is returned is the caller's own memory, not a view that autograd guards."""
    C, a, b = data(24)
    for costs, rows, columns in ((C, a, b), (C.mT, b, a), (C.unsqueeze(0), a, b), (C.expand(2, 6, 5), a, b)):
        P = il.sinkhorn(costs.clone().requires_grad_(), rows, columns).value
        P.mul_(2.0)
        torch.testing.assert_close(P.sum(-1), 2 * rows.expand(P.shape[:-1]), rtol=1e-8, atol=1e-10)


def test_too_few_iterations_say_so():
    C, a, b = data(22)
    with pytest.raises(il.ConvergenceError, match="3 of 3 iterations"):
        il.sinkhorn(C, a, b, temperature=0.01, max_iter=3)
    with pytest.raises(il.ConvergenceError, match="the temperature, which may be too small"):
        il.sinkhorn(1e30 * C, a, b)


def test_costs_are_minimised_and_half_precision_is_kept():
    C = torch.tensor([[0.0, 3.0], [3.0, 0.0]], dtype=torch.bfloat16)
    half = torch.tensor([0.5, 0.5], dtype=torch.bfloat16)
    P = il.sinkhorn(C, half, half, temperature=0.5).value
    assert P.dtype == torch.bfloat16
    assert P[0, 0] > 0.4


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.1, 0.02]), st.floats(-100, 100))
def test_shifts_of_rows_and_permutations(seed, tau, shift):
    C, a, b = data(seed, 7, 6)
    P = il.sinkhorn(C, a, b, temperature=tau, tol=1e-11).value
    moved = C + shift * torch.arange(7, dtype=DOUBLE).unsqueeze(-1)
    torch.testing.assert_close(il.sinkhorn(moved, a, b, temperature=tau, tol=1e-11).value, P, rtol=1e-6, atol=1e-9)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(7))
    torch.testing.assert_close(
        il.sinkhorn(C[order], a[order], b, temperature=tau, tol=1e-11).value, P[order], rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(il.sinkhorn(C.mT, b, a, temperature=tau, tol=1e-11).value, P.mT, rtol=1e-6, atol=1e-9)


def test_a_wrong_derivative_would_be_seen(monkeypatch):
    C, a, b = data(23, 3, 4)

    def call(C, x, y):
        return il.sinkhorn(C, x.softmax(-1), y.softmax(-1)).value

    tensors = tuple(t.requires_grad_() for t in (C, a.log(), b.log()))
    assert first_order(call, tensors)
    right = balance.BalanceSolve.apply
    monkeypatch.setattr(balance.BalanceSolve, "apply", lambda *args: tuple(1.01 * t for t in right(*args)))
    with pytest.raises(RuntimeError):
        first_order(call, tensors)


def test_a_float32_softmax_in_float64_is_a_marginal_and_refusals_tell_the_numbers():
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(n, generator=generator).softmax(-1).double() for n in (7, 900))
    b = b * (1 + 4e-7)
    C = torch.rand(7, 900, generator=generator).double()
    P = il.sinkhorn(C, a, b).value
    torch.testing.assert_close(P.sum(-1), a, rtol=0, atol=1e-9)
    torch.testing.assert_close(P.sum(-2), b * (a.sum() / b.sum()), rtol=0, atol=1e-9)  # scaled to the mass of a
    half = torch.full((2,), 0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"1\.00001 of b, 1e-05 apart where 1e-06 is allowed"):
        il.sinkhorn(torch.zeros(2, 2).double(), half, half * (1 + 1e-5))


def test_under_autocast_half_costs_go_with_float32_marginals():
    C, half = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0.5, 0.5])
    weight = torch.eye(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        costs = C @ weight
        assert costs.dtype == torch.bfloat16
        P = il.sinkhorn(costs, half, half, temperature=0.5).value
        Q = il.nn.Sinkhorn(temperature=0.5, learn_temperature=True)(costs)
    for plan in (P, Q):
        torch.testing.assert_close(plan, il.sinkhorn(C, half, half, temperature=0.5).value)


def test_second_derivatives_beside_zero_marginals_are_right_in_the_costs_and_refused_in_the_marginals():
    generator = torch.Generator().manual_seed(4)
    C = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    a = torch.tensor([0.4, 0.0, 0.6], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.3, 0.2, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    G = torch.randn(3, 4, generator=generator, dtype=torch.float64)

    def value(C, a, b):
        return (il.sinkhorn(C, a, b, temperature=0.3, tol=1e-13).value.square() * G).sum()

    assert torch.autograd.gradgradcheck(lambda C: value(C, a.detach(), b.detach()), C)
    H = torch.func.hessian(value)(C.detach(), a.detach(), b.detach())
    rows, columns = torch.tensor([0, 2]), torch.tensor([0, 1, 3])
    part = C.detach()[rows][:, columns]

    def smaller(C):
        P = il.sinkhorn(C, a.detach()[rows], b.detach()[columns], temperature=0.3, tol=1e-13).value
        return (P.square() * G[rows][:, columns]).sum()

    expected = torch.zeros_like(H)
    there = torch.meshgrid(rows, columns, rows, columns, indexing="ij")
    expected[there] = torch.func.hessian(smaller)(part)
    torch.testing.assert_close(H, expected, rtol=1e-8, atol=1e-9)
    first = torch.autograd.grad(value(C, a, b), (C, a, b), create_graph=True)
    for gradient in first:
        with pytest.raises(il.SingularAdjointError, match="have marginals of zero"):
            torch.autograd.grad(gradient.sum(), (C, a, b), retain_graph=True)
    for outer, inner in itertools.product((torch.func.jacrev, torch.func.jacfwd), repeat=2):
        with pytest.raises(il.SingularAdjointError, match="have marginals of zero"):
            outer(inner(value, argnums=1), argnums=0)(C.detach(), a.detach(), b.detach())
    inside = torch.full((3,), 1 / 3, dtype=torch.float64), torch.full((4,), 0.25, dtype=torch.float64)
    torch.func.jacfwd(torch.func.jacrev(value, argnums=1), argnums=0)(C.detach(), *inside)  # nothing to refuse
