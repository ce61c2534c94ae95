"""The core against closed forms, scipy, unrolled autograd and finite differences; batches, dtypes, modes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, jacrev, vjp, vmap

import implicit_layers as il
from tests.implicit_problems import A0, F64, Cell, by_argmin, by_root, every_operation, rand, residual, unroll


def test_square_root_of_a_number():
    theta = torch.tensor(4.0, dtype=F64, requires_grad=True)
    z = il.root(lambda z, t: z * z - t, torch.tensor(1.0, dtype=F64), theta).value
    (g,) = torch.autograd.grad(z, theta, create_graph=True)
    (h,) = torch.autograd.grad(g, theta)
    assert z.shape == ()
    assert abs(z.item() - 2) < 1e-12
    assert abs(g.item() - 0.25) < 1e-12
    assert abs(h.item() + 1 / 32) < 1e-12


def test_kepler_equation():
    M, e = torch.linspace(0, 3, 7, dtype=F64), torch.tensor(0.7, dtype=F64)
    M.requires_grad_(), e.requires_grad_()
    E = il.root(lambda E, M, e: E - e * torch.sin(E) - M, M.detach(), M, e, batch_dims=1).value
    gM, ge = torch.autograd.grad(E.sum(), (M, e))
    slope = 1 - e * torch.cos(E)
    assert torch.allclose(E - e * torch.sin(E), M, atol=1e-12)
    assert torch.allclose(gM, 1 / slope, rtol=1e-10)
    assert torch.allclose(ge, (torch.sin(E) / slope).sum(), rtol=1e-10)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_linear_system_and_its_derivatives(batch: tuple[int, ...]):
    A, b = rand(*batch, 4, 4) + 4 * torch.eye(4, dtype=F64), rand(*batch, 4, seed=1)
    A.requires_grad_(), b.requires_grad_()
    w = rand(*batch, 4, seed=2)
    z = il.root(lambda z, A, b: (A @ z.unsqueeze(-1)).squeeze(-1) - b, torch.zeros_like(b), A, b).value
    gA, gb = torch.autograd.grad((w * z).sum(), (A, b))
    with torch.no_grad():
        inverse = torch.stack([a.inverse() for a in A.reshape(-1, 4, 4)]).reshape(A.shape)
        u = (inverse.mT @ w.unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(z, (inverse @ b.unsqueeze(-1)).squeeze(-1), rtol=1e-10)
        assert torch.allclose(gb, u, rtol=1e-10)
        assert torch.allclose(gA, -u.unsqueeze(-1) * z.unsqueeze(-2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [il.Newton(), il.LBFGS(), il.GradientDescent()], ids=lambda s: type(s).__name__)
def test_ridge_regression(solver: il.Newton):
    X, y, penalty = rand(20, 5), rand(20, seed=1), torch.tensor(0.7, dtype=F64, requires_grad=True)

    def objective(w: Tensor, X: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
        return 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * penalty * (w * w).sum()

    w = il.argmin(objective, torch.zeros(5, dtype=F64), X, y, penalty, solver=solver).value
    G = X.mT @ X + penalty.detach() * torch.eye(5, dtype=F64)
    exact = torch.linalg.solve(G, X.mT @ y)
    J = torch.stack([torch.autograd.grad(w[i], penalty, retain_graph=True)[0] for i in range(5)])
    assert torch.allclose(w, exact, atol=1e-8)
    assert torch.allclose(J, -torch.linalg.solve(G, exact), atol=1e-8)


@pytest.mark.parametrize("solver", [il.Newton(), il.LBFGS()], ids=lambda s: type(s).__name__)
def test_logistic_regression_against_scipy(solver: il.Newton):
    X, y = rand(30, 4), (rand(30, seed=1) > 0).to(F64)

    def solve_by_scipy(penalty: float) -> np.ndarray:
        A, t = X.numpy(), y.numpy()

        def value(w: np.ndarray) -> tuple[float, np.ndarray]:
            s = A @ w
            p = 1 / (1 + np.exp(-s))
            return float(np.logaddexp(0, s).sum() - t @ s + 0.5 * penalty * w @ w), A.T @ (p - t) + penalty * w

        return scipy.optimize.minimize(value, np.zeros(4), jac=True, method="BFGS", options={"gtol": 1e-9}).x

    def objective(w: Tensor, penalty: Tensor) -> Tensor:
        s = X @ w
        return nn.functional.softplus(s).sum() - y @ s + 0.5 * penalty * (w @ w)

    penalty = torch.tensor(0.5, dtype=F64, requires_grad=True)
    w = il.argmin(objective, torch.zeros(4, dtype=F64), penalty, solver=solver).value
    J = jacrev(lambda p: il.argmin(objective, torch.zeros(4, dtype=F64), p, solver=solver).value)(penalty.detach())
    h = 1e-4
    assert np.abs(w.detach().numpy() - solve_by_scipy(0.5)).max() < 1e-8
    assert np.abs(J.numpy() - (solve_by_scipy(0.5 + h) - solve_by_scipy(0.5 - h)) / (2 * h)).max() < 1e-5


WAYS = {
    "module in theta": lambda c, z, x: il.fixed_point(lambda z, c, x: c(z, x), z, c, x).value,
    "module in a dict": lambda c, z, x: il.fixed_point(lambda z, t: t["c"](z, t["x"][0]), z, {"c": c, "x": [x]}).value,
    "module as function": lambda c, z, x: il.fixed_point(c, z, x).value,
    "method of a module": lambda c, z, x: il.root(c.residual, z, x).value,
    "attributes": lambda c, z, x: (
        il.root(lambda z, c, x: z - torch.tanh(z @ c.linear.weight.T + c.linear.bias + x), z, c, x).value
    ),
    "attached": lambda c, z, x: il.attach_gradient(c.residual, unroll(c, z, x).detach(), x),
}


@pytest.mark.parametrize("way", WAYS)
def test_equilibrium_cell_against_unrolled_autograd(way: str):
    cell, x = Cell(5), rand(7, 5, seed=5).requires_grad_()
    wanted = [x, *cell.parameters()]
    w = rand(7, 5, seed=6)
    reference = torch.autograd.grad((w * unroll(cell, torch.zeros_like(x), x)).sum(), wanted)
    z = WAYS[way](cell, torch.zeros(7, 5, dtype=F64), x)
    for a, b in zip(torch.autograd.grad((w * z).sum(), wanted), reference, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.floats(-3, 3), st.floats(0.1, 3), st.floats(-5, 5))
def test_cubic_root_against_finite_differences(a: float, b: float, c: float):
    theta = torch.tensor([a, b, c], dtype=F64)

    def solve(t: Tensor) -> Tensor:  # increasing in z: one real root
        return il.root(lambda z, t: z**3 + t[1] * z + t[2] + t[0], torch.zeros((), dtype=F64), t).value

    J = jacrev(solve)(theta)
    h = 1e-5
    for i in range(3):
        e = torch.zeros(3, dtype=F64)
        e[i] = h
        assert abs(J[i] - (solve(theta + e) - solve(theta - e)) / (2 * h)) < 1e-6 * (1 + abs(J[i]))


@every_operation
def test_batch_is_the_loop_over_its_elements(operation: Callable[..., Tensor]):
    b = rand(2, 3, 3, seed=1).requires_grad_()
    z = operation(A0, b)
    alone = torch.stack([operation(A0, c) for c in b.reshape(-1, 3)]).reshape(z.shape)
    assert torch.allclose(z, alone, atol=1e-11)
    (g,) = torch.autograd.grad(z.pow(2).sum(), b, retain_graph=True)
    (h,) = torch.autograd.grad(alone.pow(2).sum(), b)
    assert torch.allclose(g, h, atol=1e-11)


@every_operation
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (1, 3), (3,)])
def test_empty_and_single_batches(operation: Callable[..., Tensor], shape: tuple[int, ...]):
    b, A = torch.full(shape, 0.3, dtype=F64, requires_grad=True), A0.clone().requires_grad_()
    z = operation(A, b)
    gA, gb = torch.autograd.grad(z.sum(), (A, b))
    assert z.shape == b.shape == gb.shape
    assert gA.shape == A.shape
    if b.numel() == 0:
        assert (gA == 0).all()


@pytest.mark.parametrize("operate", [il.root, il.fixed_point, il.attach_gradient], ids=lambda f: f.__name__)
def test_no_unknowns(operate: Callable[..., object]):
    x = torch.zeros(3, 0, requires_grad=True)
    result = operate(lambda z, x: z - x if operate is not il.fixed_point else x + 0 * z, torch.zeros(3, 0), x)
    value = result if isinstance(result, Tensor) else result.value
    assert value.shape == (3, 0)
    value.sum().backward()
    assert x.grad is not None and x.grad.shape == (3, 0)


@every_operation
def test_strided_input_and_gradient(operation: Callable[..., Tensor]):
    b = rand(3, 8, seed=1)[:, ::2].T[:, :3]  # (4, 3), neither rows nor columns next to each other
    assert not b.is_contiguous()
    g = rand(3, 4, seed=2).T
    got = vjp(lambda b: operation(A0.T, b), b)[1](g)[0]
    want = vjp(lambda b: operation(A0.T.contiguous(), b), b.contiguous())[1](g.contiguous())[0]
    assert torch.allclose(got, want, atol=1e-12)


@every_operation
def test_float32_is_near_float64(operation: Callable[..., Tensor]):
    b = rand(4, 3, seed=1)
    double = vjp(lambda A: operation(A, b), A0)
    single = vjp(lambda A: operation(A, b.float()), A0.float())
    assert single[0].dtype == torch.float32
    assert torch.allclose(single[0].double(), double[0], atol=2e-5)
    assert torch.allclose(single[1](b.float())[0].double(), double[1](b)[0], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    b = rand(4, 3, seed=1).to(dtype).requires_grad_()
    z = by_root(A0.to(dtype), b)
    (g,) = torch.autograd.grad(z.sum(), b)
    exact = by_root(A0.to(dtype).double(), b.detach().double())
    assert z.dtype == g.dtype == dtype
    assert (z.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_autocast_does_not_reach_the_solve():
    cell, x = Cell(4).float(), rand(3, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = il.fixed_point(cell, torch.zeros(3, 4), x.bfloat16()).value
        g = torch.autograd.grad(z.sum(), cell.linear.weight)[0]
    want = il.fixed_point(cell, torch.zeros(3, 4), x.bfloat16().float()).value
    assert z.dtype == torch.float32
    assert torch.equal(z, want)
    assert torch.equal(g, torch.autograd.grad(want.sum(), cell.linear.weight)[0])


def test_inference_mode_and_no_grad():
    b = rand(2, 3, seed=1)
    want = by_argmin(A0, b)
    with torch.no_grad():
        assert torch.equal(by_argmin(A0, b), want)
        assert torch.equal(il.fixed_point(lambda z, x: Cell(3)(z, x), b, b).value, il.fixed_point(Cell(3), b, b).value)
    with torch.inference_mode():
        assert torch.equal(by_argmin(A0.clone(), b.clone()), want)


def test_the_whole_tensor_as_one_coupled_problem():
    C = torch.eye(4, dtype=F64) + 0.3 * rand(4, 4).abs()
    x = rand(4, 3, seed=1).requires_grad_()
    z = il.root(lambda z, x: C @ z - x, torch.zeros(4, 3, dtype=F64), x, batch_dims=0).value
    w = rand(4, 3, seed=2)
    (g,) = torch.autograd.grad((w * z).sum(), x)
    assert torch.allclose(g, torch.linalg.solve(C.T, w), atol=1e-11)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(st.integers(-8, 8), st.integers(-8, 8))
def test_units_do_not_matter(unit_of_z: int, unit_of_f: int):
    s, r = 10.0**unit_of_z, 10.0**unit_of_f
    theta = torch.tensor([[2.0, 3.0], [0.5, 1.0]], dtype=F64)

    def solve(theta: Tensor) -> Tensor:
        return il.root(lambda z, t: r * ((z / s) ** 3 - t), torch.full((2, 2), s, dtype=F64), theta).value

    assert torch.allclose(solve(theta) / s, theta ** (1 / 3), rtol=1e-11)
    J = grad(lambda t: solve(t).sum())(theta)
    assert torch.allclose(J / s, theta ** (-2 / 3) / 3, rtol=1e-9)


def test_warm_start_at_the_solution_stays_there():
    b = rand(4, 3, seed=1)
    first = il.root(residual, torch.zeros_like(b), A0, b)
    again = il.root(residual, first.value, A0, b)
    assert (again.info.iterations <= 1).all() and again.info.converged.all()
    assert torch.allclose(again.value, first.value, rtol=1e-12)


def test_saved_memory_does_not_grow_with_the_iterations():
    def saved_bytes(solve: Callable[[], Tensor]) -> int:
        seen: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            z = solve()
        assert z.requires_grad
        return sum(seen.values())

    b = rand(2, 3, seed=1).requires_grad_()
    step = il.GradientDescent(step=1e-3, tol=1.0)

    def descend(iterations: int) -> Tensor:
        return il.argmin(
            lambda z, b: ((z - b) ** 2).sum(-1),
            torch.zeros_like(b),
            b,
            solver=il.GradientDescent(step=1e-3, tol=1e-300, max_iter=iterations),
            on_failure="ignore",
        ).value

    assert step.tol == 1.0
    assert saved_bytes(lambda: descend(2)) == saved_bytes(lambda: descend(100)) < 1000


def test_many_unknowns_never_form_the_jacobian(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: object) -> Tensor:
        raise AssertionError("the Jacobian was formed")

    monkeypatch.setattr("implicit_layers.jacobian.Jacobian.dense", refuse)
    n = 20_000  # dense: 3.2 GB
    b = torch.linspace(-1, 1, n, dtype=F64).requires_grad_()
    calls = 0

    def F(z: Tensor, b: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return z + 0.1 * torch.tanh(z + z.roll(1)) - b

    z = il.root(F, torch.zeros_like(b), b).value
    w = torch.cos(torch.arange(n, dtype=F64))
    (g,) = torch.autograd.grad(w @ z, b)
    assert calls < 100
    slope = 0.1 * (1 - torch.tanh(z + z.roll(1)) ** 2).detach()
    u = g  # Jᵀ u = w
    assert torch.allclose(u + slope * u + (slope * u).roll(-1), w, atol=1e-8)
    m = il.argmin(lambda z, b: ((z - b) ** 2).sum() + 0.1 * (z - z.roll(1)).pow(4).sum(), torch.zeros_like(b), b).value
    assert torch.autograd.grad(m.sum(), b)[0].shape == (n,)


def by_bisection(f: Callable[..., Tensor], z0: Tensor, *theta: Tensor) -> Tensor:
    low, high = z0 - 10, z0 + 10
    for _ in range(80):
        middle = 0.5 * (low + high)
        below = f(middle, *theta) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 0.5 * (low + high)


def test_any_callable_solves():
    def solve(t: Tensor) -> Tensor:
        return il.root(lambda z, t: z**3 + z - t, torch.zeros_like(t), t, solver=by_bisection).value

    t = torch.tensor([1.0, 2.0, 10.0], dtype=F64)
    J = jacrev(solve)(t)
    assert torch.allclose(J.diagonal(), 1 / (3 * solve(t) ** 2 + 1), atol=1e-10)
    assert torch.allclose(vmap(grad(solve))(t), J.diagonal(), atol=1e-10)  # called once for every element


def test_a_callable_gets_theta_as_it_was_given():
    seen = []

    def solver(f: Callable[..., Tensor], z0: Tensor, pair: tuple[Tensor, Tensor], cell: Cell) -> Tensor:
        seen.append((type(pair), type(cell)))
        z = z0
        for _ in range(100):
            z = z - 0.9 * f(z, pair, cell)
        return z

    cell, x = Cell(3), rand(2, 3).requires_grad_()
    z = il.root(lambda z, p, c: z - c(z, p[0] + p[1]), torch.zeros(2, 3, dtype=F64), (x, x), cell, solver=solver).value
    assert seen == [(tuple, Cell)]
    assert torch.allclose(z, unroll(cell, torch.zeros_like(z), 2 * x), atol=1e-10)
    torch.autograd.grad(z.sum(), [x, *cell.parameters()])


def test_a_callable_that_does_not_solve_is_found_out():
    with pytest.raises(il.ConvergenceError, match="residual"):
        il.root(lambda z, t: z * z - t, torch.ones(2), torch.ones(2) * 2, solver=lambda f, z, t: t.sqrt() + 1e-2)
    with pytest.raises(il.ShapeError, match="solver must return z"):
        il.root(lambda z: z, torch.ones(2), solver=lambda f, z: z[:1])
    with pytest.raises(il.DtypeError, match="solver must return a tensor"):
        il.root(lambda z: z, torch.ones(2), solver=lambda f, z: z.double())
