"""Safeguarded Newton for one number a problem: the shift c of the scores at which Σᵢ f(vᵢ + c) equals a given total.

f is any increasing map of one score with values in [0, cap]; the bracket is always valid, and it is halved
wherever Newton does not halve the error, so that kinks, infinite slopes and underflow only cost time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicit_layers import checks

MAX_ITER = 200
Elementwise = Callable[[Tensor], Tensor]


def pivots(x: Tensor, total: Tensor, cap: float) -> tuple[Tensor, Tensor]:  # (*B, n), (*B, 1) -> (*B, 1), (*B, 1)
    """The score at which an upper, and the one at which a lower bound of c is known: ranks ⌈total/cap⌉ and ⌊·⌋ + 1."""
    n = x.shape[-1]
    if cap == float("inf"):
        top = x.amax(-1, keepdim=True)
        return top, top
    most = checks.host_int((total / cap).max()) + 1 if checks.readable(x, total) and total.numel() else n
    ordered = x.topk(most, -1).values if 0 < most <= n // 4 else x.sort(-1, descending=True).values
    last = ordered.shape[-1] - 1
    upper, lower = (total / cap).ceil().sub(1).clamp(0, last), (total / cap).floor().clamp(0, last)
    return ordered.gather(-1, upper.long()), ordered.gather(-1, lower.long())


def shift(
    primal: Elementwise,  # f
    weight: Elementwise,  # f' as a function of f
    slope: Elementwise,  # the inverse of f
    v: Tensor,  # (*B, n), the score of rank ⌈total/cap⌉ is zero
    below: Tensor,  # (*B, 1), the score of rank ⌊total/cap⌋ + 1
    total: Tensor,  # (*B, 1), in (0, cap · number of finite scores)
    cap: float,
) -> Tensor:  # (*B, 1)
    """The shift c, to rounding.

    The entries from rank j = ⌈total/cap⌉ on hold at least total − (j − 1) cap, so the largest of them has its share;
    the first m + 1 = ⌊total/cap⌋ + 1 hold at most the total, so the smallest of them has no more than its share.
    """
    eps = torch.finfo(v.dtype).eps
    ranks = total / cap if cap < float("inf") else torch.zeros_like(total)
    j, m = ranks.ceil().clamp(min=1), ranks.floor()
    finite = v.isfinite().sum(-1, keepdim=True)
    left = (total - (j - 1) * cap) if cap < float("inf") else total
    low = slope((left / (finite - j + 1).clamp(min=1)).clamp(max=cap * (1 - eps)))
    high = slope(total / (m + 1)) - below
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    c = 0.5 * (low + high)
    accept, last = 8 * eps * total.abs(), torch.full_like(c, float("inf"))
    done = torch.zeros_like(c, dtype=torch.bool)
    for _ in range(MAX_ITER):
        y = primal(v + c)
        excess = y.sum(-1, keepdim=True) - total
        low, high = torch.where(excess < 0, c, low), torch.where(excess > 0, c, high)
        inside = (y > 0) & (y < cap)
        rate = torch.where(inside, weight(torch.where(inside, y, 0.5 * min(cap, 1.0))), 0.0).sum(-1, keepdim=True)
        newton = c - excess / rate
        usable = (newton >= low) & (newton <= high) & (excess.abs() < 0.5 * last)  # NaN and infinity compare false
        settled = excess.abs() <= accept
        closed = ~((high - low) > 2 * eps * torch.maximum(low.abs(), high.abs()))
        done = done | settled | closed | excess.isnan()
        if checks.host_bool(done.all()):
            break
        c = torch.where(done, c, torch.where(usable, newton, 0.5 * (low + high)))
        last = excess.abs()
    return c
