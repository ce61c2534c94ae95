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
    "a hidden copy to the CPU": lambda x: x + x.cpu(),
    "gather": lambda x: x.gather(0, torch.zeros(1, dtype=torch.long)),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_devices_raises(name, fake_device):
    x = fake_device(double(3))
    with pytest.raises(RuntimeError, match=r"device"):
        MIXING[name](x)


def test_reading_a_value_raises(fake_device):
    x = fake_device(double(3))
    with pytest.raises(RuntimeError):
        bool(x[0] > 0)
    with pytest.raises(RuntimeError):
        x.tolist()


def test_our_own_question_is_answered(fake_device):
    checks.finite(x=fake_device(double(3)))
    with pytest.raises(ValueError, match="one value"):
        checks.host_bool(fake_device(double(3)) > 0)


def test_sound_code_runs_forward_backward_and_transformed(fake_device):
    Q, p = fake_device(double(2, 3, 3), requires_grad=True), fake_device(double(2, 3), requires_grad=True)
    factor, info = torch.linalg.cholesky_ex(Q.mT @ Q + torch.eye(3, dtype=Q.dtype, device=Q.device))
    z = torch.cholesky_solve(p.unsqueeze(-1), factor).squeeze(-1)
    grad_Q, grad_p = torch.autograd.grad(z.sum(), (Q, p))
    assert z.device == grad_Q.device == grad_p.device == info.device == fake_device.device
    assert z.shape == (2, 3) and grad_Q.shape == Q.shape and grad_p.dtype == torch.float64
    jacobian = torch.func.vmap(torch.func.jacrev(torch.sin))(p.detach())
    assert jacobian.shape == (2, 3, 3) and jacobian.device == fake_device.device


def test_strides_and_modules_move(fake_device):
    assert fake_device(torch.zeros(3, 2).mT).stride() == (1, 2)
    linear = fake_device.module(torch.nn.Linear(3, 2))
    linear(fake_device(torch.zeros(4, 3))).sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.device == fake_device.device


def test_one_thread():
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


@pytest.mark.parametrize("again", [1, 2])
def test_every_test_starts_from_the_same_seed(again):
    torch_draw = torch.rand(1).item()
    assert torch_draw == pytest.approx(0.4962566, abs=1e-6)
