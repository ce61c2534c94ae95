"""The witnesses are watched too: they see what they claim to see, and nothing else."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from implicit_layers import checks


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


WAITING = {
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x[0]),
    "item": lambda x: x.sum().item(),
    "branch": lambda x: 1 if x[0] > 0 else 2,
    "nonzero": lambda x: x.nonzero(),
    "where with one argument": lambda x: torch.where(x > 0),
    "boolean index": lambda x: x[x > 0],
    "assignment to a boolean index": lambda x: x.clone().__setitem__(x > 0, x.new_ones(int(x.numel()))[x > 0]),
    "masked_select": lambda x: torch.masked_select(x, x > 0),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "unique": lambda x: torch.unique(x),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 3])),
    "cholesky": lambda x: torch.linalg.cholesky(torch.eye(3)),
    "solve": lambda x: torch.linalg.solve(torch.eye(3, dtype=x.dtype), x),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "in a backward pass": lambda x: torch.autograd.grad(_Waits.apply(x.requires_grad_()).sum(), x),
}
NOT_WAITING = {
    "arithmetic": lambda x: (x * 2 + 1).sum(),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "integer index": lambda x: x[torch.tensor([0, 1])],
    "cholesky_ex": lambda x: torch.linalg.cholesky_ex(torch.eye(3)),
    "a backward pass": lambda x: torch.autograd.grad((x.requires_grad_() ** 2).sum(), x),
    "vmap": lambda x: torch.func.vmap(torch.sin)(x),
    "repeat_interleave of a known size": lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 3]), output_size=6),
}


class _Waits(torch.autograd.Function):
    """The identity, whose backward pass reads a value."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return grad if grad[0] > 0 else grad.clone()


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_is_counted(name, host_syncs):
    x = double(3)
    with host_syncs() as syncs:
        WAITING[name](x)
    assert syncs.count >= 1
    assert "test_conftest.py" in repr(syncs)


@pytest.mark.parametrize("name", NOT_WAITING)
def test_nothing_else_is_counted(name, host_syncs):
    x = double(3)
    with host_syncs() as syncs:
        NOT_WAITING[name](x)
    assert syncs.count == 0, syncs


def test_waits_are_counted_one_by_one_and_only_inside(host_syncs):
    x = double(3)
    bool(x[0] > 0)
    with host_syncs() as syncs:
        for i in range(3):
            float(x[i])
    float(x[0])
    assert syncs.count == 3


def test_our_own_question_is_counted_once(host_syncs):
    with host_syncs() as syncs:
        checks.finite(Q=double(3, 3), p=double(3))
    assert syncs.count == 1, syncs


MIXING = {
    "add": lambda x: x + torch.zeros(3, dtype=torch.float64),
    "matmul": lambda x: torch.eye(3, dtype=torch.float64) @ x,
    "where": lambda x: torch.where(x > 0, x, torch.zeros(3, dtype=torch.float64)),
    "cat": lambda x: torch.cat([x, torch.zeros(3, dtype=torch.float64)]),
    "in place": lambda x: x.add_(torch.zeros(3, dtype=torch.float64)),
    "a hidden copy to the CPU": lambda x: x + x.cpu(),
    "gather": lambda x: x.gather(0, torch.zeros(1, dtype=torch.long)),
    "in a backward pass": lambda x: torch.autograd.grad(_Mixes.apply(x.requires_grad_()).sum(), x),
    "under vmap": lambda x: torch.func.vmap(lambda row: row + torch.zeros(1))(x.unsqueeze(-1)),
}


class _Mixes(torch.autograd.Function):
    """The identity, whose backward pass brings a tensor of the CPU."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return grad * torch.ones(3, dtype=grad.dtype)


@pytest.mark.parametrize("name", MIXING)
def test_mixing_devices_raises(name, fake_device):
    x = fake_device(double(3))
    with pytest.raises(RuntimeError, match=r"same device"):
        MIXING[name](x)


STAYING = {
    "a number": lambda x: 2.0 * x + 1,
    "a 0-d tensor of the CPU": lambda x: x * torch.tensor(2.0, dtype=x.dtype),
    "an index of the CPU": lambda x: x[torch.tensor([2, 0])],
    "a mask": lambda x: x[x > 0],
    "a view written to": lambda x: _written(x),
    "made there": lambda x: x + torch.ones(3, dtype=x.dtype, device=x.device),
    "made like it": lambda x: x + torch.ones_like(x) + x.new_ones(3),
    "made from a list": lambda x: x + torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype, device=x.device),
    "moved there": lambda x: x + torch.arange(3.0, dtype=x.dtype).to(x.device),
    "copied into": lambda x: torch.zeros_like(x).copy_(torch.arange(3.0, dtype=x.dtype)) + x,
    "cast": lambda x: x.float().double(),
    "factored": lambda x: torch.cholesky_solve(
        x.unsqueeze(-1), torch.linalg.cholesky_ex(torch.outer(x, x) + torch.eye(3, dtype=x.dtype, device=x.device))[0]
    ),
    "gradients": lambda x: _gradient(x),
    "vmap": lambda x: torch.func.vmap(torch.func.grad(lambda row: (row**3).sum()))(x.unsqueeze(-1)),
    "jacobians": lambda x: torch.func.jacfwd(torch.func.jacrev(lambda row: (row**3).sum()))(x),
}


def _written(x: Tensor) -> Tensor:
    x = x.clone()
    x[1:].mul_(3.0)
    x[0] = 7.0
    return x


def _gradient(x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    return torch.autograd.grad(grad.sum(), x)[0]


@pytest.mark.parametrize("name", STAYING)
def test_what_stays_on_the_device_is_computed(name, fake_device):
    x = double(3)
    y = STAYING[name](fake_device(x))
    assert y.device == fake_device.device
    assert y.cpu().device.type == "cpu"
    torch.testing.assert_close(y.cpu(), STAYING[name](x))


def test_values_can_be_read_back(fake_device, host_syncs):
    x = fake_device(torch.tensor([1.0, -2.0]))
    with host_syncs() as syncs:
        assert bool((x > -3).all()) and x.sum().item() == -1.0 and x.tolist() == [1.0, -2.0]
    assert syncs.count >= 3
    with pytest.raises(checks.NonFiniteError, match=r"x\[1\] is nan"):
        checks.finite(x=fake_device(torch.tensor([1.0, float("nan")])))


def test_our_own_check_sees_two_devices(fake_device):
    with pytest.raises(checks.DeviceError, match="p is on cpu but Q is on meta"):
        checks.floating_tensors(Q=fake_device(double(2, 2)), p=double(2))


def test_strides_and_modules_move(fake_device):
    assert fake_device(torch.zeros(2, 3).mT).stride() == (1, 3)
    linear = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    y = linear(x)
    moved = fake_device.module(linear)
    assert all(parameter.device == fake_device.device for parameter in moved.parameters())
    z = moved(fake_device(x))
    torch.testing.assert_close(z.cpu(), y)
    z.sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.device == fake_device.device


def test_one_thread():
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


@pytest.mark.parametrize("again", [1, 2])
def test_every_test_starts_from_the_same_seed(again):
    torch_draw = torch.rand(1).item()
    assert torch_draw == pytest.approx(0.4962566, abs=1e-6)
