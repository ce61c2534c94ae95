r"""Monotone Newton for α-entmax: no sort, no bracket, and at many classes only the few that can be chosen.

    Σᵢ exp_α(vᵢ + c) = 1,   v = (x − max x)/τ ≤ 0,   exp_α(u) = [1 + (α − 1)u]₊^{1/(α−1)}

At c = 0 the largest score alone gives the sum F ≥ 1. For 1 ≤ α ≤ 2, log_α F = (F^{α−1} − 1)/(α − 1) is convex and
increasing in c (a norm of positive parts; for α → 1 it is logsumexp(v) + c, a line), so Newton on it comes down to the
root without passing it, in a number of steps that grows with the logarithm of n over the precision. It needs one step
where all scores are equal. What is left of the sum at the end is rounding, and is divided out. For α > 2 see
`entmax_steep`.

Every subset of the scores has its own root, above the root of them all: what is not chosen at it is never chosen. So
rows of many classes are first solved for the largest score of each block, then narrowed to the entries that this leaves
over, where these are few, and all further work is done there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.solvers import entmax_steep

MAX_ITER = 100  # at most about log₄(n/eps) + 1 are needed, and two or three a bit beyond
_UNREADABLE_ITER = 48  # where values cannot be looked at
WIDE = 2048  # rows narrower than this stay as they are
_BLOCK = 32
_FEW = 0.25


class Chosen(NamedTuple):
    """The point of the simplex, and where its entries are."""

    y: Tensor  # (R, n)
    columns: Tensor  # (R, K), contains the support of each row; K = 0: not narrowed


def point(
    x: Tensor, top: Tensor, tau: Tensor | float, alpha: Tensor | float
) -> tuple[Tensor, Tensor]:  # (*B, n), (*B, 1), ... -> (*B, n), (*B, K)
    """`solve` for any leading dimensions."""
    batch, n = x.shape[:-1], x.shape[-1]
    count = batch.numel()
    tau, alpha = (s.reshape(count, 1) if isinstance(s, Tensor) else s for s in (tau, alpha))
    y, columns = solve(x.reshape(count, n), top.reshape(count, 1), tau, alpha)
    return y.reshape(x.shape), columns.reshape(*batch, columns.shape[-1])


def solve(x: Tensor, top: Tensor, tau: Tensor | float, alpha: Tensor | float) -> Chosen:
    """Find α-entmax of the rows of x (R, n) with maxima top (R, 1); τ and α are numbers or (R, 1)."""
    watch = checks.readable(x)
    if not isinstance(alpha, Tensor) and alpha > 2:
        return _steep(x, tau, alpha - 1, watch)
    columns = None
    if watch and x.shape[-1] >= WIDE and x.numel() > 0:
        columns = _narrow(x, _floor(x, top, tau, alpha))
    if columns is None:
        y = _weighed(x, top, tau, alpha, None, watch)[0]
        return Chosen(y, torch.empty(x.shape[0], 0, dtype=torch.long, device=x.device))
    padding = _padding(columns)
    y = _weighed(x.gather(-1, columns), top, tau, alpha, padding, watch)[0]
    y = torch.where(padding, y[:, :1], y)  # a padded place stands for the first one
    return Chosen(torch.zeros_like(x).scatter_(-1, columns, y), columns)


def _weighed(
    x: Tensor, top: Tensor, tau: Tensor | float, alpha: Tensor | float, padding: Tensor | None, watch: bool
) -> tuple[Tensor, Tensor]:
    """The point of the simplex, and the score at which it ends, as −(α − 1)(v + c) = 1."""
    most = torch.finfo(x.dtype).max ** 0.5
    v = x - top
    if isinstance(tau, Tensor) or tau != 1:
        v = v.div_(tau).masked_fill_(x.isneginf(), -most)  # a masked score over an infinite temperature is NaN
    v = v.clamp_(min=-most)  # so that no later product overflows
    if padding is not None:
        v = v.masked_fill_(padding, -most)
    if isinstance(alpha, Tensor):
        return _any(x if padding is None else x.masked_fill(padding, float("-inf")), v, tau, alpha - 1, watch)
    if alpha < 1.05:
        return _general(v, alpha - 1, watch)
    if alpha in (1.5, 2):
        return _power(v, 1 if alpha == 2 else 2, watch)
    return _any_power(v, alpha - 1, watch)


def _floor(x: Tensor, top: Tensor, tau: Tensor | float, alpha: Tensor | float) -> Tensor:
    """A score below which no entry is chosen, from the largest of every block."""
    whole = x.shape[-1] - x.shape[-1] % _BLOCK
    largest = x[:, :whole].unflatten(-1, (-1, _BLOCK)).amax(-1)
    end = _weighed(largest, top, tau, alpha, None, True)[1]
    eps = torch.finfo(x.dtype).eps
    return top + tau * (end - 64 * eps * (1 + end.abs())) - 4 * eps * top.abs()


def _power(v: Tensor, beta: int, watch: bool) -> tuple[Tensor, Tensor]:
    """The powers β = 1/(α − 1) that need no logarithm: 1 and 2."""
    z = v if beta == 1 else v.div_(beta)
    most = 1 + 4 * torch.finfo(z.dtype).eps
    t = z.new_full((z.shape[0], 1), -1.0)
    q = torch.empty_like(z)
    more = torch.ones_like(t, dtype=torch.bool)

    def positive_parts() -> tuple[Tensor, Tensor]:
        """The vector (z − t)₊, in place, and its β-norm."""
        part = torch.sub(z, t, out=q).relu_()
        if beta == 1:
            return part, part.sum(-1, keepdim=True)
        return part, torch.linalg.vector_norm(part, dim=-1, keepdim=True)

    for _ in range(MAX_ITER if watch else _UNREADABLE_ITER):
        q, norm = positive_parts()
        more = more & (norm > most)
        if watch and not checks.host_bool(more.any()):
            break
        if beta == 1:
            moved = t + (norm - 1) / q.sign_().sum(-1, keepdim=True)
        else:
            moved = t + (norm - 1) * norm / q.sum(-1, keepdim=True)
        more = more & (moved > t)
        t = torch.where(more, moved, t)
    else:
        q, norm = positive_parts()
    q.div_(norm)
    return (q if beta == 1 else q.square_()), t * beta


def _any_power(v: Tensor, delta: float, watch: bool) -> tuple[Tensor, Tensor]:
    """One α for all rows, between 1 and 2 and not near 1: one power an entry and iteration."""
    z, most = v.mul_(delta), 1 + 4 * torch.finfo(v.dtype).eps
    t = z.new_full((z.shape[0], 1), -1.0)
    q, w = torch.empty_like(z), torch.empty_like(z)
    more = torch.ones_like(t, dtype=torch.bool)

    def powers() -> tuple[Tensor, Tensor]:
        """The sum of the y = (z − t)₊^{1/δ}, left in q, and of the y^{1−δ}."""
        torch.sub(z, t, out=q).relu_()
        rate = torch.pow(q, (1 - delta) / delta, out=w).sum(-1, keepdim=True)
        return q.mul_(w).sum(-1, keepdim=True), rate

    for _ in range(MAX_ITER if watch else _UNREADABLE_ITER):
        total, rate = powers()
        more = more & (total > most)
        if watch and not checks.host_bool(more.any()):
            break
        norm = total**delta
        moved = t + (norm - 1) * total / (norm * rate)
        more = more & (moved > t)
        t = torch.where(more, moved, t)
    else:
        total, _ = powers()
    return q.div_(total), t / delta


def _general(v: Tensor, delta: Tensor | float, watch: bool) -> tuple[Tensor, Tensor]:
    """Any 1 ≤ α ≤ 2; rows may differ in it. The unknown is c."""
    eps = torch.finfo(v.dtype).eps
    d = (delta if isinstance(delta, Tensor) else v.new_full((1, 1), delta)).expand(v.shape[0], 1)
    limit = d < torch.finfo(v.dtype).tiny ** 0.5  # α = 1
    d = torch.where(limit, 1.0, d)
    scaled, c = d * v, torch.zeros_like(d)
    y, total = v, c
    for _ in range(MAX_ITER if watch else _UNREADABLE_ITER):
        r = (scaled + d * c).clamp(min=-1)  # q − 1 of each entry
        y = torch.where(limit, v + c, r.log1p() / d).exp()
        q = torch.where(limit, 1.0, 1 + r)
        total = y.sum(-1, keepdim=True)
        rate = torch.where(q > 0, y / q, 0.0).sum(-1, keepdim=True)
        log_total = total.log()
        above = torch.where(limit, log_total, torch.expm1(d * log_total) / d)
        slope = torch.where(limit, 1 / total, ((d - 1) * log_total).exp()) * rate
        moved = c - above / slope
        more = ((total - 1).abs() > 4 * eps) & (moved < c)  # false for NaN
        if watch and not checks.host_bool(more.any()):
            break
        c = torch.where(more, moved, c)
    return y / total, torch.where(limit, float("-inf"), -1 / d - c)


def _any(x: Tensor, v: Tensor, tau: Tensor | float, delta: Tensor, watch: bool) -> tuple[Tensor, Tensor]:
    """Rows of any α ≥ 1: what needs only one of the two ways takes it, others both."""
    steep = delta > 1
    if watch and not checks.host_bool(steep.any()):
        return _general(v, delta, watch)
    found = entmax_steep.solve(x, tau, torch.where(steep, delta, 1.0), watch)
    y = (0 * found.y.narrow(-1, 0, 1)).repeat(1, x.shape[-1]).scatter_(-1, found.order, found.y)  # NaN stays in all
    if watch and checks.host_bool(steep.all()):
        return y, found.end
    flat_y, flat_end = _general(v, torch.where(steep, 1.0, delta), watch)
    return torch.where(steep, y, flat_y), torch.where(steep, found.end, flat_end)


def _steep(x: Tensor, tau: Tensor | float, delta: float, watch: bool) -> Chosen:
    """One α > 2 for all rows; narrowed to the support where that is worth it."""
    found = entmax_steep.solve(x, tau, delta, watch)
    y = (0 * found.y.narrow(-1, 0, 1)).repeat(1, x.shape[-1]).scatter_(-1, found.order, found.y)  # NaN stays in all
    width = 0
    if watch and x.shape[-1] >= WIDE and x.numel() > 0:
        width = checks.host_int(found.size.max())
        width = width if width <= 2 * _FEW * x.shape[-1] else 0
    columns = found.order.narrow(-1, 0, width)
    filled = torch.arange(width, device=x.device) < found.size
    return Chosen(y, torch.where(filled, columns, found.order.narrow(-1, 0, 1)))


def _narrow(x: Tensor, floor: Tensor) -> Tensor | None:  # (R, n), (R, 1) -> (R, K)
    """The columns of the entries at or above the floor, each row padded with its first one; None if they are many."""
    rows, n = x.shape
    if checks.host_bool((x[:, ::_BLOCK] >= floor).sum(-1).max() * _BLOCK > _FEW * n):
        return None
    places = (x >= floor).reshape(-1).nonzero().squeeze(-1)
    ends = torch.arange(rows + 1, device=x.device) * n
    starts = torch.searchsorted(places, ends)
    counts = starts.diff()
    width = checks.host_int(counts.max())
    if width > 2 * _FEW * n or checks.host_int(counts.min()) == 0:  # none at all: a NaN
        return None
    slots = torch.arange(width, device=x.device)
    slots = torch.where(slots < counts.unsqueeze(-1), slots, 0) + starts[:-1].unsqueeze(-1)
    return places[slots] - ends[:-1].unsqueeze(-1)


def _padding(columns: Tensor) -> Tensor:  # (R, K) -> (R, K)
    """Which places only fill up their row."""
    repeated = columns == columns[:, :1]
    repeated[:, 0] = False
    return repeated
