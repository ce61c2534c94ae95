r"""α-entmax for α > 2: first the support, then Newton in its smallest entry.

    yᵢ = (q − γᵢ)₊^{1/δ},   γᵢ = δ (max x − xᵢ)/τ,   δ = α − 1 > 1,   Σy = 1

An entry just above zero has an unbounded slope in q: a q that is right to all its digits is not enough. With w the
smallest entry of the support and Dᵢ = δ (xᵢ − x_w)/τ, differences of the scores themselves,

    F(w) = Σᵢ (w^δ + Dᵢ)^{1/δ} = Σᵢ ‖(w, Dᵢ^{1/δ})‖_δ = 1

is convex, and its slope is between 1 and the number k of entries, so w is as right as the sum is. Every term at w = 1/k
is at least 1/k: from there Newton comes down to the root without passing it. The k largest scores are the support for
the largest k with F(0) < 1, found by halving. Everything is in float64: the differences of two scores are then exact
for narrower dtypes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks

MAX_ITER = 64  # convergence is quadratic: about six


class Steep(NamedTuple):
    """The entries that can differ from zero, in descending order."""

    y: Tensor  # (R, K), zero off the support
    order: Tensor  # (R, K), their columns
    size: Tensor  # (R, 1), the size of the support
    end: Tensor  # (R, 1), the tempered score at which it ends, counted from the largest


def solve(x: Tensor, tau: Tensor | float, delta: Tensor | float, watch: bool) -> Steep:
    """Find the support of the rows of x (R, n), and y on it; τ and δ = α − 1 ≥ 1 are numbers or (R, 1)."""
    tau, delta = (s.double() if isinstance(s, Tensor) else s for s in (tau, delta))
    best, order = _largest(x, tau, delta, watch)
    best = best.double()
    place = _last(best, tau, delta)
    pivot = best.gather(-1, place)
    reach = _gaps(best, pivot, tau, delta) ** (1 / delta)
    inside = torch.arange(best.shape[-1], device=x.device) <= place
    w, y = _newton(reach, inside, place + 1, delta, watch)
    end = (pivot - best.narrow(-1, 0, 1)) / tau - w**delta / delta
    return Steep((y / y.sum(-1, keepdim=True)).to(x.dtype), order, place + 1, end.to(x.dtype))


def _largest(x: Tensor, tau: Tensor | float, delta: Tensor | float, watch: bool) -> tuple[Tensor, Tensor]:
    """The scores that may be chosen, γ < 1, in descending order, and their columns; all where none may look."""
    if not watch or x.numel() == 0:
        ordered = x.sort(-1, descending=True)
        return ordered.values, ordered.indices
    near = _gaps(x.detach().amax(-1, keepdim=True), x, tau, delta) < 1 + 1e-6
    width = max(checks.host_int(near.sum(-1).max()), 1)
    found = x.topk(width, dim=-1)
    return found.values, found.indices


def _gaps(upper: Tensor, lower: Tensor, tau: Tensor | float, delta: Tensor | float) -> Tensor:
    """The tempered differences δ (upper − lower)₊/τ; zero for equal scores, infinite for a masked lower one."""
    return (upper.double() - lower.double()).clamp(min=0) * delta / tau


def _last(best: Tensor, tau: Tensor | float, delta: Tensor | float) -> Tensor:
    """The place of the smallest entry of the support: the last with F(0) < 1."""
    width = best.shape[-1]
    place = torch.zeros(best.shape[0], 1, dtype=torch.long, device=best.device)
    step = 1 << max(width.bit_length() - 1, 0)
    while step:
        later = place + step
        pivot = best.gather(-1, later.clamp(max=width - 1))
        total = (_gaps(best, pivot, tau, delta) ** (1 / delta)).sum(-1, keepdim=True)
        place = torch.where((later < width) & (total < 1), later, place)
        step //= 2
    return place


def _newton(
    reach: Tensor, inside: Tensor, count: Tensor, delta: Tensor | float, watch: bool
) -> tuple[Tensor, Tensor]:  # (R, K), (R, K), (R, 1)
    """The w with F(w) = 1, and the entries."""
    eps, tiny = torch.finfo(reach.dtype).eps, torch.finfo(reach.dtype).tiny
    reach = torch.where(inside | reach.isnan(), reach, 0.0)
    w = 1 / count.to(reach.dtype)
    y = reach
    for _ in range(MAX_ITER if watch else MAX_ITER // 4):
        longer = torch.maximum(reach, w)
        ratio = (torch.minimum(reach, w) / longer) ** delta
        y = torch.where(inside | reach.isnan(), longer * (ratio.log1p() / delta).exp(), 0.0)
        slope = torch.where(inside, torch.where(reach > w, ratio, 1.0) / (1 + ratio) * (y / w), 0.0)
        moved = (w - (y.sum(-1, keepdim=True) - 1) / slope.sum(-1, keepdim=True)).clamp(min=tiny)
        more = w - moved > eps
        if watch and not checks.host_bool(more.any()):
            break
        w = torch.where(more | moved.isnan(), moved, w)
    return w, y
