"""Training through degenerate programs: where a layer that thresholds its active set stands still, this one arrives.

osqpth's first backward took every row with a slack below a tolerance for active, and OptNet's Sudoku stalled with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import implicit_layers as il

EPS = 1e-5  # of the threshold that is the bad example
TARGET = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)  # the second stays at its bound
START = torch.tensor([1e-6, 0.5, 1e-6, 1e-7], dtype=torch.float64)  # inside, nearer to the bounds than EPS


class _Thresholded(torch.autograd.Function):
    """The projection on z ≥ 0 with the derivative of an active set by threshold: no entry below EPS moves."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        z = x.clamp(min=0.0)
        ctx.save_for_backward(z)
        return z

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (z,) = ctx.saved_tensors
        return torch.where(z < EPS, 0.0, grad)


def projection(gradient: str, smoothing: float = 1e-3) -> Callable[[Tensor], Tensor]:
    """The same projection as a quadratic program, min ½|z|² − xᵀz with z ≥ 0."""
    n = len(TARGET)
    Q, lb = torch.eye(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    return lambda x: il.solve_qp(Q, -x, lb=lb, gradient=gradient, smoothing=smoothing).z


def descend(layer: Callable[[Tensor], Tensor], start: Tensor, steps: int = 60, lr: float = 0.3) -> Tensor:
    """Gradient descent on ½|z − target|², from where x is at a kink or nearly so."""
    x = start.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", il.DegenerateGradientWarning)
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(0.5 * (layer(x) - TARGET).square().sum(), x)
            x = (x - lr * gradient).detach().requires_grad_()
        return layer(x).detach()


REACHED = TARGET.clamp(min=0.0)


@pytest.mark.parametrize("gradient", ["exact", "least_norm", "smoothed"])
def test_a_start_beside_the_bounds_is_left(gradient: str) -> None:
    stalled = descend(_Thresholded.apply, START)
    assert (stalled - REACHED).abs().max() > 1.9
    torch.testing.assert_close(descend(projection(gradient), START), REACHED, rtol=0.0, atol=1e-2)


def test_a_start_on_the_bounds_is_left_by_the_smoothed_derivative() -> None:
    """At λ = s = 0 the derivative to one side may be zero; that of a point on the central path is a half."""
    on = torch.zeros_like(START)
    assert (descend(_Thresholded.apply, on) == 0.0).all()
    torch.testing.assert_close(descend(projection("smoothed"), on), REACHED, rtol=0.0, atol=1e-2)


def test_a_linear_program_learns_its_cost_by_the_smoothed_derivative() -> None:
    """At a vertex the solution does not move with the cost: the exact derivative is zero, the smoothed one is not."""
    n, target = 6, 3
    simplex = {"A": torch.ones(1, n, dtype=torch.float64), "b": torch.ones(1, dtype=torch.float64)}
    Q, lb = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    wanted = torch.nn.functional.one_hot(torch.tensor(target), n).double()
    first = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
    chosen = {}
    for gradient in ("exact", "smoothed"):
        cost = first.clone().requires_grad_()
        for _ in range(40):
            z = il.solve_qp(Q, cost, **simplex, lb=lb, gradient=gradient, smoothing=0.2).z
            (step,) = torch.autograd.grad(0.5 * (z - wanted).square().sum(), cost)
            cost = (cost - 0.3 * step).detach().requires_grad_()
        chosen[gradient] = int(z.argmax())
        if gradient == "exact":
            torch.testing.assert_close(cost.detach(), first, rtol=0.0, atol=1e-12)
    assert chosen == {"exact": 0, "smoothed": target}


def test_redundant_rows_do_not_stall_the_learning_of_a_right_hand_side() -> None:
    """Three copies of one equality: the shared right-hand side is learned, by the derivative of least norm."""
    A = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, 2.0, 0.0]], dtype=torch.float64)
    Q, p = torch.eye(3, dtype=torch.float64), torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    level = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(60):
        z = il.solve_qp(Q, p, A=A, b=A[:, 0] * level, gradient="least_norm").z
        (step,) = torch.autograd.grad(0.5 * (z[0] - 1.0).square(), level)
        level = (level - step).detach().requires_grad_()
    torch.testing.assert_close(z[0].detach(), torch.tensor(1.0, dtype=torch.float64), rtol=0.0, atol=1e-4)
