"""The core where it must fail: problems without solution or derivative, and arguments that are refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import grad, jvp, vmap

import implicit_layers as il
from tests.implicit_problems import A0, F64, Cell, by_root, rand, residual, unroll


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
