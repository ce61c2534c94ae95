"""Over-relaxed scaling against plain iterations in the log domain: the same plan, in fewer steps, at any range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import implicit_layers as il
from implicit_layers.solvers import overrelaxation, overrelaxation_alone, scaling
from implicit_layers.solvers.overrelaxation_alone import scale_alone

DOUBLE = torch.float64


def data(seed: int, n: int, m: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(batch, k, 2, generator=generator, dtype=DOUBLE) for k in (n, m))
    a, b = (torch.randn(batch, k, generator=generator, dtype=DOUBLE).softmax(-1) for k in (n, m))
    return torch.cdist(x, y).square(), a, b


def plain(L: Tensor, a: Tensor, b: Tensor, tol: float) -> tuple[Tensor, int]:
    """Sinkhorn in the log domain until the columns are right, and how many iterations that took."""
    f = torch.zeros_like(a)
    for used in range(1, 20001):
        g = b.log() - (L + f.unsqueeze(-1)).logsumexp(-2)
        f = a.log() - (L + g.unsqueeze(-2)).logsumexp(-1)
        P = (L + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()
        if float((P.sum(-2) - b).abs().sum(-1).max()) <= tol:
            return P, used
    raise AssertionError("plain iterations did not converge")


def run(L: Tensor, a: Tensor, b: Tensor, tol: float = 1e-10, patience: float = 1e4) -> overrelaxation.Scaled:
    scale = scale_alone if len(L) == 1 else overrelaxation.scale
    return scale(L, a, b, a.sum(-1, keepdim=True), tol, 10000, False, float(L.max() - L.min()), patience)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.03])
@pytest.mark.parametrize(("n", "m"), [(12, 9), (20, 20), (7, 1), (1, 1)])
def test_the_plan_is_that_of_plain_iterations(n, m, tau, batch):
    C, a, b = data(n + m, n, m, batch)
    found = run(-C / tau, a, b)
    expected, _ = plain(-C / tau, a, b, 1e-12)
    assert found.P is not None and found.phi is not None
    torch.testing.assert_close(found.P, expected, rtol=0, atol=1e-10)
    again = (-C / tau + found.phi.unsqueeze(-1) + found.psi.unsqueeze(-2)).exp()
    torch.testing.assert_close(again, found.P, rtol=1e-10, atol=0)
    assert found.error.shape == found.iterations.shape == (batch,) and bool((found.error <= 1e-10).all())


def test_it_takes_fewer_iterations_where_plain_ones_are_slow():
    C, a, b = data(0, 30, 30)
    _, slow = plain(-C / 0.02, a, b, 1e-12)
    found = run(-C / 0.02, a, b)
    assert slow > 150 and int(found.iterations) < slow / 2


def test_ranges_that_the_kernel_cannot_hold():
    """Rows and columns shifted by thousands: ψ is absorbed or Newton goes on, and the plan does not see the shift."""
    C, a, b = data(4, 8, 8)
    C, a, b = C[0], a[0], b[0]
    expected = il.sinkhorn(C, a, b, temperature=0.1).value
    generator = torch.Generator().manual_seed(5)
    for size in (1e1, 1e3, 1e5):
        rows, columns = (size * torch.randn(8, generator=generator, dtype=DOUBLE) for _ in range(2))
        solution = il.sinkhorn(C + rows.unsqueeze(-1) + columns, a, b, temperature=0.1)
        assert bool(solution.info.converged) and bool(solution.value.isfinite().all())
        torch.testing.assert_close(solution.value, expected, rtol=0, atol=1e-8 + 1e-14 * size)


def test_a_problem_does_not_see_its_neighbours():
    C, a, b = data(6, 10, 10, 4)
    scale = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=DOUBLE)[:, None, None]
    together = il.sinkhorn(C, a, b, temperature=scale)
    for i in range(4):
        alone = il.sinkhorn(C[i], a[i], b[i], temperature=float(scale[i]))
        torch.testing.assert_close(together.value[i], alone.value, rtol=0, atol=1e-9)
    assert torch.equal(together.value, il.sinkhorn(C, a, b, temperature=scale).value)  # and twice the same bits


def test_it_gives_up_early_and_says_so():
    C, a, b = data(7, 20, 20)
    found = run(-C / 1e-3, a, b, patience=30.0)
    assert found.P is None and float(found.error) > 1e-10 and int(found.iterations) < 1000
    empty = run_empty()
    assert empty.psi.shape == (0, 5) and empty.iterations.shape == (0,)


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.03, 0.01])
def test_one_problem_goes_as_two_of_it_do(tau):
    C, a, b = data(9, 30, 25)
    alone = run(-C / tau, a, b)
    twice = run(*(torch.cat([t, t]) for t in (-C / tau, a, b)))
    assert twice.iterations.tolist() == [int(alone.iterations)] * 2
    assert alone.P is not None and twice.P is not None
    torch.testing.assert_close(twice.P, alone.P.expand(2, -1, -1), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(twice.psi, alone.psi.expand(2, -1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("tau", "offset"), [(1.0, 0.0), (0.1, 0.0), (0.05, 0.0), (0.1, 512.0), (0.01, 0.0)])
def test_large_float32_costs_are_rounded_once_at_most(monkeypatch, tau, offset):
    """Plan and gradient are those of the float32 costs, to what rounding them moves; an offset is no reason to."""
    C, a, b = (t[0].float() for t in data(10, 280, 260))
    C = (C * 2**12).round() / 2**12 + offset  # the same differences with the offset
    made = []
    exact = overrelaxation_alone.kernel
    monkeypatch.setattr(overrelaxation_alone, "kernel", lambda *args: made.append(1) or exact(*args))
    weights = torch.randn(280, 260, generator=torch.Generator().manual_seed(11))
    found = []
    for dtype, tol in ((torch.float32, 1e-6), (DOUBLE, 1e-13)):
        made.clear()
        leaves = [t.to(dtype).requires_grad_() for t in (C, a, b)]
        solution = il.sinkhorn(*leaves, temperature=tau, tol=tol)
        assert bool(made) == (dtype == DOUBLE or offset > 0 or tau < 0.02)
        assert bool(solution.info.residual <= tol)
        grads = torch.autograd.grad(solution.value, leaves, weights.to(dtype))
        found.append([t.detach().double() for t in (solution.value, *grads)])
    for single, double in zip(*found, strict=True):
        assert float((single - double).norm() / double.norm()) < 1e-7


@pytest.mark.parametrize("ends", [(-26, 26), (-55, 35)])
def test_where_float32_is_not_enough_float64_goes_on(ends):
    """Potentials that are wide, or too wide, for float32: float64 goes on from there, or begins, with the same plan."""
    C, a, b = (t[0] for t in data(12, 270, 260))
    L = -C / 0.1 - torch.linspace(*ends, 260, dtype=DOUBLE)
    solver = scaling.Scaling(1e-8, 10000, rounded=True)
    assert float(L.abs().max()) < 60
    plan = solver.solve(L, a, b)
    assert float(plan.residual) <= 1e-8
    expected = il.sinkhorn(C, a, b, temperature=0.1).value
    torch.testing.assert_close(plan.P, expected, rtol=1e-4, atol=1e-9)


def run_empty() -> overrelaxation.Scaled:
    C, a, b = data(8, 6, 5, 2)
    return overrelaxation.scale(C[:0], a[:0], b[:0], a[:0, :1], 1e-9, 100, False, 0.0, 10.0)
