"""A line search for minimisation, one step length a problem, that works down to the rounding of the objective."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.solvers.problem import norm

_SUFFICIENT, _FLAT, _TRIALS = 1e-4, 0.9, 60

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]  # (*B, n) -> values (*B,), gradients (*B, n)


def rounding(value: Tensor, start: Tensor) -> Tensor:
    """A generous bound on the rounding of an objective: of its value, or of terms as large as it was at the start."""
    size = torch.maximum(value.abs(), 1e-6 * torch.nan_to_num(start.abs(), posinf=0.0))
    return torch.finfo(value.dtype).eps ** 0.4 * size


def wolfe_step(
    evaluate: Evaluate,
    y: Tensor,
    value: Tensor,
    g: Tensor,
    direction: Tensor,
    t: Tensor,
    active: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bracket and bisect until the weak Wolfe conditions hold: new points, values, gradients, and which moved.

    Where the change of the objective is within its rounding `noise`, its slope decides (the approximate Wolfe
    conditions of Hager & Zhang, 2005). A problem whose bracket shrinks to nothing takes the lowest point it has met.
    """
    slope = (g * direction).sum(-1)
    low, high = torch.zeros_like(t), torch.full_like(t, torch.inf)
    new_y, new_value, new_g = y, value, g
    fallback_y, fallback_value, fallback_g = y, value, g
    waiting = active & (slope < 0)
    for _ in range(_TRIALS):
        if not checks.host_bool(waiting.any()):
            break
        trial = torch.where(waiting[..., None], y + t[..., None] * direction, y)
        v, G = evaluate(trial)
        ahead = (G * direction).sum(-1)
        finite = torch.isfinite(v) & torch.isfinite(norm(G))
        decreased = v <= value + _SUFFICIENT * t * slope
        unclear = ((v - value).abs() <= noise) & (ahead <= (2 * _SUFFICIENT - 1) * slope)
        short = finite & (decreased | unclear)
        good = waiting & short & (ahead >= _FLAT * slope)
        new_y = torch.where(good[..., None], trial, new_y)
        new_value, new_g = torch.where(good, v, new_value), torch.where(good[..., None], G, new_g)
        better = waiting & finite & (v < fallback_value)
        fallback_y = torch.where(better[..., None], trial, fallback_y)
        fallback_value = torch.where(better, v, fallback_value)
        fallback_g = torch.where(better[..., None], G, fallback_g)
        waiting = waiting & ~good
        low, high = torch.where(waiting & short, t, low), torch.where(waiting & ~short, t, high)
        t = torch.where(torch.isinf(high), 2 * t, 0.5 * (low + high))
        # the bracket is down to neighbouring numbers
        waiting = waiting & (torch.isinf(high) | (high - low > 1e-14 * high))
    found = (new_y != y).any(-1)
    new_y = torch.where(found[..., None], new_y, fallback_y)
    new_value, new_g = torch.where(found, new_value, fallback_value), torch.where(found[..., None], new_g, fallback_g)
    return new_y, new_value, new_g, active & (new_y != y).any(-1)
