"""A wrong gradient, planted to see that a test catches it."""

from collections.abc import Callable

import torch
from torch import Tensor


def planted(solve: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """The solver y = solve(x) with the gradient backward(y, g)."""

    class Planted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = solve(x)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            return backward(y, g)

    return Planted.apply
