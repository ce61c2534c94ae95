r"""The derivative of a regularised argmax in plain operations, for the compiler: no rule of our own that it must know.

The solution y is found unseen, and attached again by Newton steps on its optimality conditions

    (x − ν)/τ = u(y) on the support,   Σy = k:      y ← y + M (x/τ − u(y)),   M = diag(s) − s sᵀ/⟨s, 1⟩,   s = 1/u'(y)

which move nothing but carry the derivative: one step that of first order, m of them all up to order 2ᵐ − 1. What is
zero at the solution is made exactly zero, so y keeps every digit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicit_layers.eager import differentiations

Elementwise = Callable[[Tensor], Tensor]


def attached(
    y: Tensor,  # (*B, n), the solution, detached
    weights: Elementwise,  # s(y), zero where y does not move
    slopes: Elementwise,  # u(y)
    x: Tensor,  # (*B, n)
    tau: Tensor | float,  # (*B, 1)
) -> Tensor:  # (*B, n)
    """The solution with its derivatives in x, τ and what the weights and slopes depend on, as many as are asked for.

    Where y itself carries a derivative (that of its sum), it is taken along.
    """
    s = weights(y.detach()).detach()
    pivot = s.argmax(-1, keepdim=True)  # any shift will do; from here what moves is not far
    score = torch.where(s > 0, x - x.detach().gather(-1, pivot), 0.0) / tau
    for _ in range(differentiations().bit_length()):
        y = y + _tangent(weights(y), moving(score - slopes(y)), pivot)
    return y


def moving(x: Tensor) -> Tensor:
    """Zero, with the derivatives of x."""
    return x - x.detach()


def _tangent(s: Tensor, v: Tensor, pivot: Tensor) -> Tensor:  # (*B, n), (*B, n), (*B, 1) -> (*B, n)
    """M v, so written that its transpose, which the compiler makes, is as accurate: relative to the pivot, v = 0.

    The pivot's own share is what the others leave, so that a weight that outgrows all others is no factor.
    """
    others = torch.arange(s.shape[-1], device=s.device) != pivot
    total = s.sum(-1, keepdim=True)
    s = torch.where(others, s, 0.0)
    d = v - v.gather(-1, pivot)
    moved = s * (d - (s * d).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0))
    return torch.where(others, moved, -moved.sum(-1, keepdim=True))
