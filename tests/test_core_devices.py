"""The core on a device that is not the CPU, and how often it makes the host wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import implicit_layers as il

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def step(z: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(z @ A) + b


def bowl(z: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return 0.5 * ((z - b) ** 2).sum(-1) + torch.log(torch.cosh(z @ A)).sum(-1)


SOLVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "newton": lambda z, A, b: il.root(lambda z, A, b: z - step(z, A, b), z, A, b).value,
    "gmres": lambda z, A, b: (
        il.root(
            lambda z, A, b: z - step(z, A, b),
            z,
            A,
            b,
            solver=il.Newton(linear_solver=il.GMRES()),
            linear_solver=il.GMRES(),
        ).value
    ),
    "anderson": lambda z, A, b: il.fixed_point(step, z, A, b).value,
    "plain": lambda z, A, b: (
        il.fixed_point(step, z, A, b, solver=il.FixedPointIteration(), linear_solver=il.Neumann()).value
    ),
    "minimum": lambda z, A, b: il.argmin(bowl, z, A, b).value,
    "lbfgs": lambda z, A, b: il.argmin(bowl, z, A, b, solver=il.LBFGS(), linear_solver=il.ConjugateGradient()).value,
    "descent": lambda z, A, b: il.argmin(bowl, z, A, b, solver=il.GradientDescent(step=0.2)).value,
    "attached": lambda z, A, b: il.attach_gradient(lambda z, A, b: z - step(z, A, b), z, A, b),
}
every_solve = pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES.keys())


@every_solve
def test_stays_on_the_device(solve: Callable[..., Tensor], fake_device: Any):
    A, b = 0.2 * rand(3, 3), rand(4, 3, seed=1)
    z0 = torch.zeros(4, 3, dtype=F64)
    for _ in range(200):
        z0 = step(z0, A, b)  # a solution of all but the minima, so that it can be attached to as well
    A_, b_ = fake_device(A).requires_grad_(), fake_device(b).requires_grad_()
    z = solve(fake_device(z0), A_, b_)
    grads = torch.autograd.grad(z.sum(), (A_, b_))
    A.requires_grad_(), b.requires_grad_()
    want = solve(z0, A, b)
    assert z.device == fake_device.device and all(g.device == fake_device.device for g in grads)
    assert torch.allclose(z.cpu(), want, atol=1e-12)
    for got, reference in zip(grads, torch.autograd.grad(want.sum(), (A, b)), strict=True):
        assert torch.allclose(got.cpu(), reference, atol=1e-12)


def test_the_report_stays_on_the_device(fake_device: Any):
    z = torch.tensor([[2.0], [0.0]], dtype=F64)
    report = il.check_ift(lambda z, t: z * z - t, fake_device(z), fake_device(z**2))
    assert report.ok.device == fake_device.device
    assert report.ok.cpu().tolist() == [True, False]


def test_host_synchronisations_are_bounded(host_syncs: Any):
    A, b = (0.2 * rand(3, 3)).requires_grad_(), rand(64, 3, seed=1).requires_grad_()
    z0 = torch.zeros(64, 3, dtype=F64)
    with host_syncs() as syncs:
        z, info = il.root(lambda z, A, b: z - step(z, A, b), z0, A, b)
    steps = int(info.iterations.max())
    assert syncs.count <= 3 * steps + 6, syncs  # a step: is any left, is any step unusable, has any to be halved
    with host_syncs() as syncs:
        torch.autograd.grad(z.sum(), (A, b))
    assert syncs.count <= 1, syncs  # the certificate
    with host_syncs() as syncs:
        _, info = il.fixed_point(step, z0, A, b)
    assert syncs.count <= int(info.iterations.max()) + 4, syncs
    with host_syncs() as syncs:
        il.attach_gradient(lambda z, A, b: z - step(z, A, b), z.detach(), A, b)
    assert syncs.count == 0, syncs
