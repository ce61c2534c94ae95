"""The core against closed forms, scipy, unrolled autograd and finite differences, and under every transform."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import implicit_layers as il

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def spd(*shape: int, seed: int = 0) -> Tensor:
    X = rand(*shape, shape[-1], seed=seed)
    return X @ X.mT + torch.eye(shape[-1], dtype=F64)


# ---- closed forms -----------------------------------------------------------------------------------------------


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


class Cell(nn.Module):
    def __init__(self, n: int, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n, dtype=F64)
        with torch.no_grad():
            self.linear.weight.copy_(rand(n, n, seed=seed) / (3 * n**0.5))
            self.linear.bias.copy_(rand(n, seed=seed + 1))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)

    def residual(self, z: Tensor, x: Tensor) -> Tensor:
        return z - torch.tanh(nn.functional.linear(z, self.linear.weight, self.linear.bias) + x)


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


def unroll(cell: Cell, z: Tensor, x: Tensor) -> Tensor:
    for _ in range(200):
        z = cell(z, x)
    return z


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


# ---- every transform, for every operation -----------------------------------------------------------------------

A0 = 0.4 * rand(3, 3)
LINEAR = {"dense": None, "iterative": il.GMRES(), "svd": il.LeastSquares()}


def by_root(A: Tensor, b: Tensor, linear: il.Direct | None = None) -> Tensor:
    return il.root(residual, torch.zeros_like(b), A, b, linear_solver=linear).value


def residual(z: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return z + 0.5 * torch.tanh(z @ A.mT) - b


def by_fixed_point(A: Tensor, b: Tensor, linear: il.Direct | None = None) -> Tensor:
    return il.fixed_point(
        lambda z, A, b: b - 0.5 * torch.tanh(z @ A.mT), torch.zeros_like(b), A, b, linear_solver=linear
    ).value


def by_argmin(A: Tensor, b: Tensor, linear: il.Direct | None = None) -> Tensor:
    return il.argmin(
        lambda z, A, b: 0.5 * ((z - b) ** 2).sum(-1) + torch.log(torch.cosh(z @ A.mT)).sum(-1) + 0.1 * (z**4).sum(-1),
        torch.zeros_like(b),
        A,
        b,
        linear_solver=linear,
    ).value


def by_attaching(A: Tensor, b: Tensor, linear: il.Direct | None = None) -> Tensor:
    z = il.root(residual, torch.zeros_like(b), A, b).value
    return il.attach_gradient(residual, z, A, b, linear_solver=linear)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "root": by_root,
    "fixed_point": by_fixed_point,
    "argmin": by_argmin,
    "attach_gradient": by_attaching,
}
every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


@every_operation
@pytest.mark.parametrize("linear", LINEAR.values(), ids=LINEAR.keys())
def test_gradcheck(operation: Callable[..., Tensor], linear: il.Direct | None):
    A, b = A0.clone().requires_grad_(), rand(2, 3, seed=1).requires_grad_()

    def f(A: Tensor, b: Tensor) -> Tensor:
        return operation(A, b, linear)

    assert gradcheck(f, (A, b), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@every_operation
def test_gradgradcheck(operation: Callable[..., Tensor]):
    A, b = A0.clone().requires_grad_(), rand(2, 3, seed=1).requires_grad_()
    assert gradgradcheck(operation, (A, b), check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


def test_gradgradcheck_without_forming_the_jacobian():
    A, b = A0.clone().requires_grad_(), rand(2, 3, seed=1).requires_grad_()
    assert gradgradcheck(lambda A, b: by_root(A, b, il.GMRES(tol=1e-13)), (A, b))
    assert gradgradcheck(lambda A, b: by_argmin(A, b, il.ConjugateGradient(tol=1e-13)), (A, b))


@every_operation
def test_functional_transforms_agree(operation: Callable[..., Tensor]):
    b = rand(5, 3, seed=1)
    A = A0.expand(5, 3, 3) + 0.1 * rand(5, 3, 3, seed=3)
    loop = torch.stack([operation(a, c) for a, c in zip(A, b, strict=True)])
    assert torch.allclose(vmap(operation)(A, b), loop, atol=1e-11)
    assert torch.allclose(vmap(operation, in_dims=(None, 0))(A0, b), operation(A0, b), atol=1e-11)
    assert torch.allclose(
        vmap(operation, in_dims=(1, None), out_dims=1)(A.movedim(0, 1), b[0])[:, 2], operation(A[2], b[0]), atol=1e-11
    )
    J = jacrev(operation, argnums=(0, 1))(A[0], b[0])
    for j, k in zip(J, jacfwd(operation, argnums=(0, 1))(A[0], b[0]), strict=True):
        assert torch.allclose(j, k, atol=1e-12)
    h = 1e-6
    bumped = (operation(A[0], b[0] + h) - operation(A[0], b[0] - h)) / (2 * h)
    assert torch.allclose(J[1].sum(-1), bumped, atol=1e-8)
    _, tangent = jvp(lambda b: operation(A[0], b), (b[0],), (torch.ones(3, dtype=F64),))
    _, pull = vjp(lambda b: operation(A[0], b), b[0])
    assert torch.allclose(tangent, J[1].sum(-1), atol=1e-12)
    assert torch.allclose(pull(torch.ones(3, dtype=F64))[0], J[1].sum(0), atol=1e-12)
    per_sample = vmap(grad(lambda A, b: operation(A, b).pow(2).sum()), in_dims=(None, 0))(A0, b)
    alone = torch.stack([grad(lambda A, c=c: operation(A, c).pow(2).sum())(A0) for c in b])
    assert torch.allclose(per_sample, alone, atol=1e-11)
    assert torch.allclose(per_sample.sum(0), grad(lambda A: operation(A, b).pow(2).sum())(A0), atol=1e-11)
    assert torch.allclose(vmap(jacrev(operation, argnums=1))(A, b)[0], J[1], atol=1e-11)


@every_operation
def test_hessians_in_every_order_agree(operation: Callable[..., Tensor]):
    b = rand(3, seed=1)

    def f(A: Tensor) -> Tensor:
        return operation(A, b).pow(3).sum()

    reference = torch.autograd.functional.hessian(f, A0)
    for second in (hessian(f), jacrev(jacrev(f)), jacrev(jacfwd(f)), jacfwd(jacrev(f)), jacfwd(jacfwd(f))):
        assert torch.allclose(second(A0), reference, atol=1e-11)
    many = vmap(hessian(lambda b: operation(A0, b).pow(3).sum()))(rand(4, 3, seed=1))
    assert torch.allclose(many[1], hessian(lambda b: operation(A0, b).pow(3).sum())(rand(4, 3, seed=1)[1]), atol=1e-10)


def test_constants_made_under_a_transform_may_be_captured():
    def f(p: Tensor) -> Tensor:  # q and r are wrapped by every transform around, though they do not depend on p
        q = torch.ones(4, dtype=F64) * 2
        r = torch.exp(q)
        return il.argmin(
            lambda w, p: 0.5 * (q * p * w * w).sum() - (r * w).sum() * p**3, torch.zeros(4, dtype=F64), p
        ).value

    p, r = torch.tensor(0.5, dtype=F64), torch.exp(torch.tensor(2.0, dtype=F64))
    for first in (
        jacrev(f),
        jacfwd(f),
        lambda p: jvp(f, (p,), (p / p,))[1],
        lambda p: vjp(f, p)[1](torch.ones(4, dtype=F64))[0] / 4,
    ):
        assert torch.allclose(first(p), r * p)
    for second in (jacrev(jacrev(f)), jacfwd(jacfwd(f)), jacfwd(jacrev(f)), jacrev(jacfwd(f)), hessian(f)):
        assert torch.allclose(second(p), r)
    assert torch.allclose(vmap(jacfwd(jacrev(f)))(torch.stack([p, 2 * p])), r)


def test_third_derivatives():
    def f(theta: Tensor) -> Tensor:
        return il.root(lambda z, t: z**3 - t, torch.ones((), dtype=F64), theta).value

    theta = torch.tensor(2.0, dtype=F64)
    exact = 1 / 3 * -2 / 3 * -5 / 3 * 2.0 ** (-8 / 3)
    for third in (grad(grad(grad(f))), jacfwd(jacfwd(jacfwd(f))), jacfwd(grad(jacfwd(f)))):
        assert abs(third(theta) - exact) < 1e-10


def test_vectorised_jacobians_of_autograd():
    b = rand(3, seed=1)
    reference = jacrev(by_root)(A0, b)
    for strategy in ("reverse-mode", "forward-mode"):
        J = torch.autograd.functional.jacobian(lambda A: by_root(A, b), A0, vectorize=True, strategy=strategy)
        assert torch.allclose(J, reference, atol=1e-12)


def test_ensemble_of_modules_under_vmap():
    cells = [Cell(3, seed=s) for s in range(4)]
    stacked = torch.func.stack_module_state(cells)[0]
    x = rand(2, 3, seed=9)

    def f(parameters: dict[str, Tensor]) -> Tensor:
        return il.fixed_point(
            lambda z, p, x: functional_call(cells[0], p, (z, x)), torch.zeros_like(x), parameters, x
        ).value

    got = vmap(f)(stacked)
    for cell, z in zip(cells, got, strict=True):
        assert torch.allclose(z, unroll(cell, torch.zeros_like(x), x), atol=1e-10)


@every_operation
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_compiled_gives_the_eager_numbers(operation: Callable[..., Tensor]):
    def model(A: Tensor, b: Tensor) -> Tensor:
        return torch.sin(operation(torch.relu(A) - 0.1, b * 2)).sum()

    A, b = A0.clone().requires_grad_(), rand(4, 3, seed=1).requires_grad_()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(compiled(A, b), model(A, b), rtol=1e-12)
    got, want = torch.autograd.grad(compiled(A, b), (A, b)), torch.autograd.grad(model(A, b), (A, b))
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-12)


def test_checkpointed_gives_the_same_numbers():
    b = rand(4, 3, seed=1).requires_grad_()

    def model(b: Tensor) -> Tensor:
        return by_argmin(A0, b * 2).sin().sum()

    (got,) = torch.autograd.grad(checkpoint(model, b, use_reentrant=False), b)
    (want,) = torch.autograd.grad(model(b), b)
    assert torch.equal(got, want)


def test_root_vjp_and_jvp_are_the_derivatives():
    cell, x = Cell(3), rand(4, 3, seed=2)
    z = unroll(cell, torch.zeros_like(x), x).detach()
    theta = {"cell": cell, "x": x, "steps": 3, "mask": torch.tensor([1, 0])}

    def F(z: Tensor, t: dict) -> Tensor:
        return z - t["cell"](z, t["x"])

    g = rand(4, 3, seed=3)
    pulled = il.root_vjp(F, z, theta, g)
    x_ = x.clone().requires_grad_()
    wanted = torch.autograd.grad(
        (g * unroll(cell, torch.zeros_like(x), x_)).sum(), [x_, cell.linear.weight, cell.linear.bias]
    )
    assert torch.allclose(pulled["x"], wanted[0], atol=1e-10)
    assert torch.allclose(pulled["cell"]["linear.weight"], wanted[1], atol=1e-10)
    assert torch.allclose(pulled["cell"]["linear.bias"], wanted[2], atol=1e-10)
    assert pulled["steps"] is None and pulled["mask"] is None
    t = {"x": rand(4, 3, seed=4), "cell": {"linear.bias": rand(3, seed=5)}}
    pushed = il.root_jvp(F, z, theta, t)
    assert torch.allclose((pushed * g).sum(), (t["x"] * wanted[0]).sum() + (t["cell"]["linear.bias"] * wanted[2]).sum())
    assert torch.allclose(
        il.root_vjp(residual, z, (A0, x), g)[1], il.root_vjp(lambda z, b: residual(z, A0, b), z, x, g)
    )


# ---- batches, dtypes, modes --------------------------------------------------------------------------------------


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
            solver=il.GradientDescent(step=1e-3, tol=0.0, max_iter=iterations),
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


# ---- the user's solver -------------------------------------------------------------------------------------------


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


# ---- failure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_failure", ["warn", "ignore"])
def test_failed_problems_get_zero_gradient_and_spoil_nothing(on_failure: str):
    good = torch.tensor([[4.0], [9.0]], dtype=F64)
    t = torch.tensor([[4.0], [-1.0], [9.0], [torch.nan]], dtype=F64, requires_grad=True)
    shared = torch.ones((), dtype=F64, requires_grad=True)

    def solve(t: Tensor, s: Tensor, policy: str) -> il.Solution:
        return il.root(lambda z, t, s: z * z - t * s, torch.ones_like(t), t, s, on_failure=policy)

    if on_failure == "warn":
        with pytest.warns(il.ConvergenceWarning, match="2 of 4 problems"):
            z, info = solve(t, shared, on_failure)
    else:
        z, info = solve(t, shared, on_failure)
    g, gs = torch.autograd.grad(z.sum(), (t, shared), create_graph=True)
    alone = good.clone().requires_grad_()
    shared_alone = torch.ones((), dtype=F64, requires_grad=True)
    g_alone, gs_alone = torch.autograd.grad(
        solve(alone, shared_alone, "raise").value.sum(), (alone, shared_alone), create_graph=True
    )
    assert info.converged.tolist() == [True, False, True, False]
    assert (g[[1, 3]] == 0).all()
    assert torch.equal(g[[0, 2]], g_alone)
    assert torch.equal(gs, gs_alone)
    (h,) = torch.autograd.grad(g[[0, 2]].sum() + gs, t)
    assert (h[[1, 3]] == 0).all()
    assert torch.allclose(h[[0, 2]], torch.autograd.grad(g_alone.sum() + gs_alone, alone)[0])


def test_failed_problems_have_zero_tangents():
    def solve(t: Tensor) -> Tensor:
        return il.root(lambda z, t: z * z - t, torch.ones_like(t), t, on_failure="ignore").value

    t = torch.tensor([[4.0], [-1.0]], dtype=F64)
    _, tangent = jvp(solve, (t,), (torch.ones_like(t),))
    assert torch.allclose(tangent, torch.tensor([[0.25], [0.0]], dtype=F64))
    assert torch.allclose(vmap(grad(lambda t: solve(t).sum()))(t), torch.tensor([[0.25], [0.0]], dtype=F64))


def test_no_root_raises_and_names_the_problem():
    t = torch.tensor([[4.0], [-1.0]])
    with pytest.raises(il.ConvergenceError, match=r"1 of 2 problems did not converge \(.*index 1"):
        il.root(lambda z, t: z * z - t, torch.ones(2, 1), t)


@pytest.mark.parametrize("linear", [None, il.GMRES()], ids=["dense", "iterative"])
def test_coupled_problems_never_get_a_wrong_gradient(linear: il.GMRES | None):
    C = torch.eye(4, dtype=F64) + 0.3 * rand(4, 4).abs()
    exact = torch.linalg.solve(C.T, torch.eye(4, dtype=F64))
    for rows in (slice(None), slice(0, 1)):
        x = rand(4, 3, seed=1).requires_grad_()
        z = il.attach_gradient(lambda z, x: C @ z - x, torch.linalg.solve(C, x.detach()), x, linear_solver=linear)
        try:
            (g,) = torch.autograd.grad(z[rows].sum(), x)
        except il.SingularAdjointError as error:
            assert "batch_dims=0" in str(error)
        else:
            assert torch.allclose(g, exact[:, rows].sum(1, keepdim=True).expand(4, 3), atol=1e-6)


COUPLING = torch.eye(4, dtype=F64) + 0.3 * rand(4, 4).abs()
COUPLED = {
    "attach_gradient": lambda x: il.attach_gradient(lambda z, x: COUPLING @ z - x, torch.ones(4, 3, dtype=F64), x),
    "fixed_point": lambda x: (
        il.fixed_point(lambda z, x: 0.1 * torch.tanh(COUPLING @ z) + x, torch.ones(4, 3, dtype=F64), x).value
    ),
}


@pytest.mark.parametrize("solve", COUPLED.values(), ids=COUPLED.keys())
def test_coupled_problems_raise_with_the_default(solve: Callable[[Tensor], Tensor]):
    x = torch.ones(4, 3, dtype=F64, requires_grad=True)
    with pytest.raises(il.SingularAdjointError, match="batch_dims=0"):
        solve(x)[0].sum().backward()
    with pytest.raises(il.SingularAdjointError, match="tangent"):
        jvp(solve, (x.detach(),), (rand(4, 3),))


@pytest.mark.parametrize("matrix", [[[0.1, 0.2], [0.2, 0.4]], [[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
def test_singular_jacobian_raises(matrix: list[list[float]]):
    M = torch.tensor(matrix, dtype=F64)
    x = torch.zeros(2, dtype=F64, requires_grad=True)
    z = il.attach_gradient(lambda z, x: M @ z - x, torch.zeros(2, dtype=F64), x)
    with pytest.raises(il.SingularAdjointError, match="singular"):
        z[0].backward()


def test_singular_jacobian_with_minimum_norm():
    M = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=F64)
    x = torch.ones(2, dtype=F64, requires_grad=True)
    z = il.attach_gradient(lambda z, x: M @ (z - x), x.detach(), x, linear_solver=il.LeastSquares())
    J = torch.stack([torch.autograd.grad(z[i], x, retain_graph=True)[0] for i in range(2)])
    assert torch.allclose(J, M / 2)


def test_a_singular_neighbour_whose_output_is_not_used_does_no_harm():
    t = torch.tensor([[4.0], [0.0]], dtype=F64, requires_grad=True)
    z = il.attach_gradient(lambda z, t: z * z - t, t.detach().sqrt(), t)
    (g,) = torch.autograd.grad(z[0].sum(), t)
    assert torch.allclose(g, torch.tensor([[0.25], [0.0]], dtype=F64))


def test_singular_adjoint_follows_the_policy():
    t = torch.tensor([[4.0], [0.0]], dtype=F64, requires_grad=True)

    def solve(policy: str) -> Tensor:
        return il.root(lambda z, t: z * z - t, t.detach().sqrt(), t, on_failure=policy).value.sum()

    with pytest.raises(il.SingularAdjointError, match="1 of 2 problems"):
        solve("raise").backward()
    with pytest.warns(il.ConvergenceWarning, match="singular"):
        (g,) = torch.autograd.grad(solve("warn"), t)
    assert torch.allclose(g, torch.tensor([[0.25], [0.0]], dtype=F64))
    (g,) = torch.autograd.grad(solve("ignore"), t)
    assert torch.allclose(g, torch.tensor([[0.25], [0.0]], dtype=F64))


def test_badly_scaled_rows_are_no_singularity():
    D = torch.tensor([1e8, 1e-8], dtype=F64)
    t = torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(il.root(lambda z, t: D * (z**3 - t), torch.ones(2, dtype=F64), t).value.sum(), t)
    assert torch.allclose(g, t.detach() ** (-2 / 3) / 3, rtol=1e-10)


def test_no_strict_minimum_raises():
    x = torch.ones(2, 2, dtype=F64, requires_grad=True)
    saddle = torch.tensor([1.0, -1.0], dtype=F64)
    z = il.argmin(lambda z, x: (saddle * (z - x) ** 2).sum(-1), x.detach(), x, solver=il.LBFGS()).value
    with pytest.raises(il.NotPositiveDefiniteError, match=r"index \[0\]"):
        z.sum().backward()


def test_nan_from_downstream_is_passed_on():
    t = torch.tensor([[4.0], [9.0]], dtype=F64, requires_grad=True)
    z = il.root(lambda z, t: z * z - t, torch.ones_like(t), t).value
    (g,) = torch.autograd.grad(z, t, torch.tensor([[torch.nan], [1.0]], dtype=F64))
    assert g[0].isnan() and abs(g[1] - 1 / 6) < 1e-12


def test_agreed_truncation():
    x = rand(3, seed=1).requires_grad_()
    W = 0.3 * torch.eye(3, dtype=F64)

    def solve(linear: il.Neumann) -> Tensor:
        return il.fixed_point(lambda z, x: W @ z + x, torch.zeros(3, dtype=F64), x, linear_solver=linear).value

    with pytest.raises(il.SingularAdjointError, match="max_iter"):
        solve(il.Neumann(max_iter=3)).sum().backward()
    (g,) = torch.autograd.grad(solve(il.Neumann(max_iter=3, tol=float("inf"))).sum(), x)
    assert torch.allclose(g, torch.full((3,), 1 + 0.3 + 0.09, dtype=F64))


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_captured_tensors_are_refused():
    w = torch.ones((), requires_grad=True)
    linear, z0 = nn.Linear(2, 2), torch.ones(2)
    for function in (lambda z: z - w, lambda z: z - linear(z)):
        with pytest.raises(il.CapturedTensorError, match="theta"):
            il.root(function, z0)
    with pytest.raises(il.CapturedTensorError):
        il.fixed_point(lambda z: 0.5 * z + w, z0)
    with pytest.raises(il.CapturedTensorError):
        il.argmin(lambda z: ((z - w) ** 2).sum(), z0)
    with pytest.raises(il.CapturedTensorError):
        il.attach_gradient(lambda z: z - w, z0)


def test_captured_tensors_are_refused_under_transforms():
    a = torch.tensor(4.0)

    def solve(a: Tensor) -> Tensor:
        return il.root(lambda z: z * z - a, torch.tensor(1.0)).value

    def inner(a: Tensor) -> Tensor:
        return jvp(
            lambda b: il.root(lambda z, b: z * z - a * b, torch.tensor(1.0), b).value, (a * 0 + 2,), (a * 0 + 1,)
        )[1]

    for attempt in (
        lambda: grad(solve)(a),
        lambda: jvp(solve, (a,), (a,)),
        lambda: vmap(solve)(a.expand(3)),
        lambda: jvp(inner, (a,), (a,)),
        lambda: grad(lambda a: grad(lambda b: il.root(lambda z, b: z - a * b, torch.tensor(1.0), b).value)(a))(a),
    ):
        with pytest.raises(il.CapturedTensorError):
            attempt()


def test_bad_arguments():
    z = torch.ones(2, 3)
    with pytest.raises(il.DtypeError, match="floating"):
        il.root(lambda z: z, torch.ones(2, dtype=torch.int64))
    with pytest.raises(il.DtypeError, match=r"torch\.Tensor"):
        il.root(lambda z: z, [1.0])
    with pytest.raises(il.DtypeError, match="complex"):
        il.root(lambda z: z, torch.ones(2, dtype=torch.complex64))
    with pytest.raises(il.DtypeError, match=r"float64.*float32"):
        il.root(lambda z, a: z * a, z, z.double())
    with pytest.raises(il.ShapeError, match=r"\(2, 3\).*got \(\)"):
        il.root(lambda z: z.sum(), z)
    with pytest.raises(il.ShapeError, match="expand"):
        il.root(lambda z, b: z - b, z[0], z)
    with pytest.raises(il.ShapeError, match="tensor"):
        il.root(lambda z: 1.0, z)
    with pytest.raises(il.ShapeError, match="one value a problem"):
        il.argmin(lambda z: z.sum(), z)
    with pytest.raises(il.ShapeError, match="batch_dims"):
        il.root(lambda z: z, z, batch_dims=3)
    with pytest.raises(il.NonFiniteError, match=r"\[1, 0\]"):
        il.root(lambda z, a: z * a, z, torch.tensor([[1.0], [torch.nan]]))
    with pytest.raises(il.DeviceError, match="meta"):
        il.root(lambda z, a: z, z, torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="on_failure"):
        il.root(lambda z: z, z, on_failure="nan")
    with pytest.raises(TypeError, match="callable"):
        il.root(z, z)
    with pytest.raises(TypeError, match="solver"):
        il.root(lambda z: z, z, solver="newton")
    with pytest.raises(TypeError, match="linear_solver"):
        il.root(lambda z: z, z, linear_solver="lu")
    with pytest.raises(TypeError, match="use Newton"):
        il.root(lambda z: z, z, solver=il.LBFGS())
    with pytest.raises(TypeError, match="does not minimise"):
        il.argmin(lambda z: z.sum(-1), z, solver=il.Anderson())
    with pytest.raises(TypeError, match="fixed points"):
        il.fixed_point(lambda z: z, z, solver=il.LBFGS())
    with pytest.raises(il.ShapeError, match="grad_z"):
        il.root_vjp(lambda z, b: z - b, z, z, z[0])
    with pytest.raises(il.ShapeError, match="tangent"):
        il.root_jvp(lambda z, b: z - b, z, z, z[0])


def test_the_start_gets_no_gradient_and_nothing_is_changed():
    z0, b = torch.ones(2, 3, dtype=F64, requires_grad=True), rand(2, 3, seed=1).requires_grad_()
    before = z0.detach().clone(), b.detach().clone()
    z = il.root(residual, z0, A0, b).value
    z.sum().backward()
    assert z0.grad is None and b.grad is not None
    assert torch.equal(z0, before[0]) and torch.equal(b, before[1])


def test_running_statistics_are_left_alone():
    norm = nn.BatchNorm1d(3, dtype=F64)
    x = rand(5, 3)
    il.fixed_point(lambda z, m, x: 0.1 * m(z) + x, torch.zeros(5, 3, dtype=F64), norm, x, batch_dims=0)
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, torch.zeros(3, dtype=F64))


def test_same_tensor_twice_and_tied_weights():
    t = torch.tensor([2.0], dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(il.root(lambda z, a, b: z * z - a * b, torch.ones(1, dtype=F64), t, t).value, t)
    assert torch.allclose(g, torch.ones(1, dtype=F64))
    cell, other = Cell(3), Cell(3, seed=4)
    other.linear.weight = cell.linear.weight
    weight, before = cell.linear.weight, dict(cell.named_parameters())
    x = rand(2, 3)

    def both(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * (cell(z, x) + other(z, x))

    for step, theta in (
        (lambda z, c, d, x: 0.5 * (c(z, x) + d(z, x)), (cell, other)),
        (lambda z, c, d, e, x: 0.5 * (torch.tanh(e(z) + x) + d(z, x)), (cell, other, cell.linear)),
        (lambda z, c, d, e, x: 0.5 * (c(z, x) + d(z, x)), (cell, other, cell)),
    ):
        z = il.fixed_point(step, torch.zeros_like(x), *theta, x).value
        (got,) = torch.autograd.grad(z.sum(), weight)
        (want,) = torch.autograd.grad(unroll(both, torch.zeros_like(x), x).sum(), weight)
        assert torch.allclose(got, want, atol=1e-10)
        assert all(a is b for a, b in zip(before.values(), cell.parameters(), strict=True))


def test_theta_that_does_not_matter_gets_zero():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    ga, gb = torch.autograd.grad(il.root(lambda z, a, b: z - a, torch.zeros(2), a, b).value.sum(), (a, b))
    assert torch.equal(ga, torch.ones(2)) and torch.equal(gb, torch.zeros(2))


def test_bilevel_a_root_inside_an_argmin():
    def outer(z: Tensor, t: Tensor) -> Tensor:
        w = il.root(lambda w, z, t: w**3 + w - z - t, torch.zeros_like(z), z, t).value
        return ((w - 1) ** 2).sum(-1) + 0.1 * (z**2).sum(-1)

    t = rand(2, 2, seed=1).requires_grad_()
    assert gradcheck(lambda t: il.argmin(outer, torch.zeros(2, 2, dtype=F64), t).value, t)


@pytest.mark.parametrize("thing", [il.Newton(), il.Anderson(memory=3), il.LBFGS(), il.GMRES(tol=1e-3), il.Direct()])
def test_settings_are_values(thing: object):
    assert copy.deepcopy(thing) == thing == pickle.loads(pickle.dumps(thing))
    with pytest.raises(AttributeError):
        thing.tol = 1.0


def test_a_planted_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch):
    true = il.Direct.solve
    monkeypatch.setattr(il.Direct, "solve", lambda self, *a, **k: 1.001 * true(self, *a, **k))
    b = rand(2, 3, seed=1).requires_grad_()
    z = il.attach_gradient(residual, by_root(A0, b, il.GMRES()).detach(), A0, b)
    with pytest.raises(il.SingularAdjointError):
        z.sum().backward()
