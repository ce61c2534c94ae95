r"""α-entmax for α > 2: first the support, then Newton in its smallest entry.

    yᵢ = (q − γᵢ)₊^{1/δ},   γᵢ = δ (max x − xᵢ)/τ,   δ = α − 1 > 1,   Σy = 1

An entry just above zero has an unbounded slope in q: a q that is right to all its digits is not enough. With w the
smallest entry of the support and Dᵢ = δ (xᵢ − x_w)/τ, differences of the scores themselves,

    F(w) = Σᵢ (w^δ + Dᵢ)^{1/δ} = Σᵢ ‖(w, Dᵢ^{1/δ})‖_δ = 1

is convex, and its slope is between 1 and the number k of entries, so w is as right as the sum is. Every term at w = 1/k
is at least 1/k: from there Newton comes down to the root without passing it. The k largest scores are the support for
the largest k with F(0) < 1, found by halving, at first among a few scores. Everything is in float64: the differences of
two scores are then exact for narrower dtypes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks

MAX_ITER = 64  # convergence is quadratic: about six
_FEW = 8  # scores among which the support is looked for first


class Steep(NamedTuple):
    """The entries that can differ from zero, in descending order."""

    y: Tensor  # (R, K), zero off the support
    order: Tensor  # (R, K), their columns
    size: Tensor  # (R, 1), the size of the support
    end: Tensor  # (R, 1), the tempered score at which it ends, counted from the largest


def solve(x: Tensor, tau: Tensor | float, delta: Tensor | float, watch: bool) -> Steep:
    """Find the support of the rows of x (R, n), and y on it; τ and δ = α − 1 ≥ 1 are numbers or (R, 1)."""
    tau, delta = (s.double() if isinstance(s, Tensor) else s for s in (tau, delta))
    best, order, place, count = _support(x, tau, delta, watch)
    pivot = best.gather(-1, place)
    inside = torch.arange(best.shape[-1], device=x.device) < count
    w, y = _newton(_gaps(best, pivot, tau, delta), inside, count, delta, watch)
    end = (pivot - best.amax(-1, keepdim=True)) / tau - w**delta / delta
    return Steep((y / y.sum(-1, keepdim=True)).to(x.dtype), order, count, end.to(x.dtype))


def _support(
    x: Tensor, tau: Tensor | float, delta: Tensor | float, watch: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (R, K), (R, K), (R, 1), (R, 1)
    """The scores with the support in front, their columns, the place of its smallest entry, and its size.

    It is looked for among a few of the largest scores, then, unless it is all of them in every row, among more and
    more; among all that are sorted at once where none may look.
    """
    n, width = x.shape[-1], _FEW
    while watch and x.numel() > 0 and 2 * width < n:
        found = x.topk(width + 1, dim=-1)
        if not checks.host_bool(_reached(found.values, found.values.narrow(-1, width, 1), tau, delta).any()):
            best, order = found.values.narrow(-1, 0, width).double(), found.indices.narrow(-1, 0, width)
            break
        if width == _FEW:
            least, place = x.min(-1, keepdim=True)
            if checks.host_bool(_reached(x, least, tau, delta).all()):
                return x.double(), torch.arange(n, device=x.device).expand_as(x), place, torch.full_like(place, n)
        width *= 4
    else:
        ordered = x.sort(-1, descending=True)
        best, order = ordered.values.double(), ordered.indices
    place = _last(best, tau, delta, watch)
    return best, order, place, place + 1


def _gaps(upper: Tensor, lower: Tensor, tau: Tensor | float, delta: Tensor | float) -> Tensor:
    """The tempered differences δ (upper − lower)₊/τ; zero for equal scores, infinite for a masked lower one."""
    return (upper.double() - lower.double()).clamp_(min=0).mul_(delta).div_(tau)


def _reached(
    best: Tensor, pivot: Tensor, tau: Tensor | float, delta: Tensor | float, dtype: torch.dtype = torch.float64
) -> Tensor:  # (R, K), (R, 1) -> (R, 1)
    """Whether the support reaches down to the pivot, F(0) < 1; the differences are taken in float64 anyway."""
    gaps = _gaps(best, pivot, tau, delta).to(dtype)
    power = (1 / delta).to(dtype) if isinstance(delta, Tensor) else 1 / delta
    return gaps.pow_(power).sum(-1, keepdim=True) < 1


def _last(best: Tensor, tau: Tensor | float, delta: Tensor | float, watch: bool) -> Tensor:
    """The place of the smallest entry of the support: the last one that it reaches down to.

    Powers in float32 nearly always find it, at a quarter of the cost; those in float64 tell whether they did.
    """
    if not watch:
        return _halving(best, tau, delta, torch.float64)
    place = _halving(best, tau, delta, torch.float32)
    after = (place + 1).clamp(max=best.shape[-1] - 1)
    wrong = ~_reached(best, best.gather(-1, place), tau, delta) & (place > 0)
    wrong = wrong | (_reached(best, best.gather(-1, after), tau, delta) & (after > place))
    return _halving(best, tau, delta, torch.float64) if checks.host_bool(wrong.any()) else place


def _halving(best: Tensor, tau: Tensor | float, delta: Tensor | float, dtype: torch.dtype) -> Tensor:
    """The last place that the support reaches down to, with powers in this dtype."""
    width = best.shape[-1]
    place = torch.zeros(best.shape[0], 1, dtype=torch.long, device=best.device)
    step = 1 << max(width.bit_length() - 1, 0)
    while step:
        later = place + step
        pivot = best.gather(-1, later.clamp(max=width - 1))
        place = torch.where((later < width) & _reached(best, pivot, tau, delta, dtype), later, place)
        step //= 2
    return place


def _newton(
    gaps: Tensor, inside: Tensor, count: Tensor, delta: Tensor | float, watch: bool
) -> tuple[Tensor, Tensor]:  # (R, K), (R, K), (R, 1)
    """The w with F(w) = 1, and the entries."""
    eps, tiny = torch.finfo(gaps.dtype).eps, torch.finfo(gaps.dtype).tiny
    outside, tied = inside.logical_not() & gaps.isnan().logical_not(), gaps == 0
    gaps = gaps.masked_fill_(outside, torch.inf)  # whose rate is zero
    w = 1 / count.to(gaps.dtype)
    y, rate = torch.empty_like(gaps), torch.empty_like(gaps)
    for _ in range(MAX_ITER if watch else MAX_ITER // 4):
        torch.add(gaps, w**delta, out=rate)
        torch.pow(rate, 1 / delta, out=y)
        torch.div(y, rate, out=rate)
        torch.where(tied, w, y, out=y).masked_fill_(outside, 0.0)  # w^δ may underflow
        torch.where(tied, 1 / w ** (delta - 1), rate, out=rate).masked_fill_(outside, 0.0)
        slope = w ** (delta - 1) * rate.sum(-1, keepdim=True)
        moved = (w - (y.sum(-1, keepdim=True) - 1) / slope).clamp(min=tiny)
        more = w - moved > eps
        if watch and not checks.host_bool(more.any()):
            break
        w = torch.where(more | moved.isnan(), moved, w)
    return w, y
