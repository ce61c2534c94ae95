"""The problems that the tests of the core share: four operations, a cell, and its unrolled solution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import implicit_layers as il

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


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


def unroll(cell: Cell, z: Tensor, x: Tensor) -> Tensor:
    for _ in range(200):
        z = cell(z, x)
    return z


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
