"""Every operation of the core under every transform."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import implicit_layers as il
from tests.differences import first_order, second_order
from tests.implicit_problems import A0, F64, LINEAR, Cell, by_argmin, by_root, every_operation, rand, residual, unroll


@every_operation
@pytest.mark.parametrize("linear", LINEAR.values(), ids=LINEAR.keys())
def test_gradcheck(operation: Callable[..., Tensor], linear: il.Direct | None):
    A, b = A0.clone().requires_grad_(), rand(2, 3, seed=1).requires_grad_()

    def f(A: Tensor, b: Tensor) -> Tensor:
        return operation(A, b, linear)

    assert first_order(f, (A, b), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@every_operation
def test_gradgradcheck(operation: Callable[..., Tensor]):
    A, b = A0.clone().requires_grad_(), rand(2, 3, seed=1).requires_grad_()
    assert second_order(operation, (A, b), check_forward_ad=True, check_batched_grad=True)


def test_gradgradcheck_without_forming_the_jacobian():
    A, b = A0.clone().requires_grad_(), rand(2, 3, seed=1).requires_grad_()
    assert second_order(lambda A, b: by_root(A, b, il.GMRES(tol=1e-13)), (A, b))
    assert second_order(lambda A, b: by_argmin(A, b, il.ConjugateGradient(tol=1e-13)), (A, b))


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
