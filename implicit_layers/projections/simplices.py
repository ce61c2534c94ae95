r"""Projections onto simplices: the simplex itself, the capped simplex, and the L1 ball that is made of them.

    y = clip(x − t, 0, u)   with the threshold t that makes Σy right.

The threshold is found on detached values, without iterating: f(t) = Σ clip(x − t, 0, u) is piecewise linear, its
breakpoints are sorted, and its values there are sums of terms that are never negative. That tells which entries are
free (0 < y < u). On the free entries the solution is linear in everything, so it is written down again in plain
operations; autograd does the rest, to any order, forward and backward. At a kink (an entry at 0 or u that is about to
leave it) such an entry is not free: of all elements of the generalised Jacobian, the one of fewest free entries.

Without caps there is a faster way where values may be looked at, the monotone Newton of `sparsemax`, which sorts
nothing (`solvers.entmax_newton`); its derivative needs the support alone (`_Onto`). Traced and transformed functions
take the way through the sort, which has no loop that depends on the data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from implicit_layers import checks, scores, transforms
from implicit_layers.legacy_vmap import modernised
from implicit_layers.projections.door import Rule, enforce, finite, kept_within, poisoned, positive, rows, some_entries
from implicit_layers.regularizers import tangent
from implicit_layers.solvers import entmax_newton


def simplex(
    x: Tensor, dim: int = -1, *, radius: Tensor | float = 1.0, mask: Tensor | None = None
) -> Tensor:  # (*, n, *) -> (*, n, *)
    r"""Project onto the simplex.

    Problem:  y* = argmin_y ½‖y − x‖²  subject to  y ≥ 0, Σy = r.
    Solution: y* = max(x − t, 0), with t such that Σy = r.

    Args:
        x: points, n entries along `dim`.
        dim: the axis of the entries.
        radius: r > 0: a number, or a tensor that broadcasts with `x` and has size 1 along `dim`.
        mask: boolean, broadcasts with `x`; entries where it is false count as absent: y = 0, with zero gradient.

    Returns:  y*, with the dtype and device of `x`, its shape broadcast with the one of `radius`; exact zeros.
    Gradient: with m the indicator of the support {y > 0}: ∂y/∂x = diag(m) − m mᵀ/Σm, ∂y/∂r = m/Σm. Where the support
              changes this is one generalised Jacobian. Any order.
    Raises:   ArgumentError: r is not positive and finite, or `mask` leaves no entry.  NonFiniteError: x is not finite.
              DtypeError, DeviceError, ShapeError: arguments that do not fit each other, or an empty axis.
    Cost:     O(n) an iteration without sorting, three to ten iterations, as `sparsemax`; O(n log n) in torch.compile
              and under torch.func. O(n) memory.
    Source:   Held, Wolfe & Crowder (1974); Duchi et al. (2008), doi:10.1145/1390156.1390191.

    >>> simplex(torch.tensor([0.0, 1.0, 0.9]))
    tensor([0.0000, 0.5500, 0.4500])
    """
    points, kept = rows(x, dim).masked(mask)
    r = points.parameter("radius", radius)
    rules = (positive("radius", r), *some_entries(kept))
    enforce(finite("x", points.x), *rules)
    return points.back(_onto_simplex(poisoned(points.x, *rules), r, kept))


def _onto_simplex(x: Tensor, r: Tensor, kept: Tensor | None = None) -> Tensor:  # (*B, n), (*B, 1), (*B, n) -> (*B, n)
    """The projection of rows, by the fastest way that is open."""
    if not checks.readable(x, r):
        return _by_sorting(x, r, kept)
    if kept is not None:
        x = torch.where(kept, x, -torch.inf)
    y: Tensor = _Onto.apply(*torch.broadcast_tensors(x, r)[:1], r)
    return y


class _Onto(torch.autograd.Function):
    """(x (*B, n), r (*B or less, 1)) to y, by Newton; −inf masks an entry. Derivatives need the support alone."""

    @staticmethod
    def forward(x: Tensor, r: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        one = r.numel() == 1 and checks.host_bool(r == 1)
        radius = 1.0 if one else r.expand(*x.shape[:-1], 1).reshape(-1, 1)
        y = entmax_newton.solve(flat, flat.amax(-1, keepdim=True), radius, 2.0).y
        return (y if one else y.mul_(radius)).reshape(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.radius_shape = inputs[1].shape
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return None, None

        needs_r, shape = ctx.needs_input_grad[1], ctx.radius_shape

        def work(y: Tensor, grad: Tensor) -> list[Tensor | None]:
            m = (y > 0).to(y.dtype)
            mean = (m * grad).sum(-1, keepdim=True) / m.sum(-1, keepdim=True) if needs_r else None
            return [tangent(m, grad), None if mean is None else mean.sum_to_size(shape)]

        grad_x, grad_r = modernised(work, (*ctx.saved_tensors, grad))
        return grad_x, grad_r

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor | None, d_r: Tensor | None) -> Tensor:
        with transforms.forward_mode():
            (y,) = transforms.primals(ctx.saved_tensors)
            m = (y > 0).to(y.dtype)
            moved = torch.zeros_like(y) if d_x is None else tangent(m, torch.where(y > 0, d_x, 0.0))
            return moved if d_r is None else moved + m / m.sum(-1, keepdim=True) * d_r

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, r: Tensor) -> tuple[Tensor, int]:
        x, r = transforms.map_to_front(info.batch_size, in_dims, (x, r))
        ones = (1,) * (x.ndim - r.ndim)
        return _Onto.apply(x, r.reshape(r.shape[0], *ones, *r.shape[1:])), 0


def _by_sorting(x: Tensor, r: Tensor, kept: Tensor | None = None) -> Tensor:  # (*B, n), (*B, 1), (*B, n) -> (*B, n)
    """Shift the support by −t, whose entries share what is missing or too much."""
    if kept is None:
        top = x.detach().amax(-1, keepdim=True)
        z = x - top  # the projection does not see a shift
        free = _support(z.detach(), r.detach())
    else:
        top = torch.where(kept, x.detach(), -torch.inf).amax(-1, keepdim=True)
        z = torch.where(kept, x - top, -r.detach())  # so low that its share is zero
        free = _support(z.detach(), r.detach()) & kept
    excess = (torch.where(free, z, 0.0).sum(-1, keepdim=True) - r) / free.sum(-1, keepdim=True)
    return kept_within(torch.where(free, z - excess, top - top), 0.0)  # top − top is zero, or NaN if x has one


def _support(z: Tensor, r: Tensor) -> Tensor:  # (*B, n), (*B, 1) -> (*B, n) bool
    """The entries above the threshold: those at which Σ max(z − t, 0) has not reached r yet."""
    ordered = z.sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1], dtype=z.dtype, device=z.device)
    mass = (count * -ordered.diff(dim=-1)).cumsum(
        -1, dtype=torch.float64
    )  # at the second largest entry, the third, ...
    inside = (mass < r).sum(-1, keepdim=True)
    return z >= ordered.expand(*inside.shape[:-1], -1).gather(-1, inside)


def l1_ball(
    x: Tensor, dim: int = -1, *, radius: Tensor | float = 1.0, mask: Tensor | None = None
) -> Tensor:  # (*, n, *) -> (*, n, *)
    r"""Project onto the L1 ball around zero.

    Problem:  y* = argmin_y ½‖y − x‖²  subject to  Σ|y| ≤ r.
    Solution: y* = x where Σ|x| ≤ r, else sign(x) · simplex(|x|, r): soft thresholding.

    Args:     x, dim, radius, mask: as for `simplex`.
    Returns:  y*, with the dtype and device of `x`, its shape broadcast with the one of `radius`; exact zeros outside.
    Gradient: inside and on the boundary ∂y/∂x = I, ∂y/∂r = 0; outside, with s the signs on the support {y ≠ 0} and
              zero elsewhere: ∂y/∂x = diag(|s|) − s sᵀ/Σ|s|, ∂y/∂r = s/Σ|s|. Any order.
    Raises:   as `simplex`.
    Cost:     as `simplex`.
    Source:   Duchi et al. (2008), doi:10.1145/1390156.1390191.

    >>> l1_ball(torch.tensor([1.0, -2.0, 0.25]), radius=1.0)
    tensor([ 0., -1.,  0.])
    """
    points, kept = rows(x, dim).masked(mask)
    r = points.parameter("radius", radius)
    rules = (positive("radius", r), *some_entries(kept))
    enforce(finite("x", points.x), *rules)
    x = poisoned(points.x, *rules)  # zeros where it is masked: they stay
    plain = x.detach()
    outside = plain.abs().sum(-1, keepdim=True) > r.detach()
    sign = plain.sign()
    return points.back(torch.where(outside, sign * _onto_simplex(sign * x, r), x))


def capped_simplex(
    x: Tensor, k: Tensor | float, dim: int = -1, *, cap: Tensor | float = 1.0, mask: Tensor | None = None
) -> Tensor:  # (*, n, *) -> (*, n, *)
    r"""Project onto the capped simplex: k is shared out and no entry gets more than its cap.

    Problem:  y* = argmin_y ½‖y − x‖²  subject to  0 ≤ y ≤ u, Σy = k.
    Solution: y* = clip(x − t, 0, u), with t such that Σy = k.

    Args:
        x: points, n entries along `dim`.
        k: 0 ≤ k ≤ Σu, not necessarily whole: a number, or a tensor that broadcasts with `x`, of size 1 along `dim`; one
            of integers will do.
        dim: the axis of the entries.
        cap: u ≥ 0, finite: a number, or a tensor that broadcasts with `x`, of size n or 1 along `dim`.
        mask: boolean, broadcasts with `x`; entries where it is false count as absent: y = 0, with zero gradient.

    Returns:  y*, with the dtype and device of `x`, the shapes broadcast; exactly 0 and u outside the free entries.
    Gradient: with m the indicator of the free entries 0 < y < u:  ∂y/∂x = diag(m) − m mᵀ/Σm,  ∂y/∂k = m/Σm, and a
              capped entry i has ∂yᵢ/∂uᵢ = 1 and takes 1/Σm from the free ones. With no free entry (a vertex, as for
              well separated x and whole k) ∂y/∂x = 0, and y has two one-sided derivatives in k: their mean is taken
              (half for the next entry to leave 0, half for the next to leave its cap). Any order.
    Raises:   ArgumentError: k is outside [0, Σu], where Σ goes over the entries that are not masked; a cap is negative
              or infinite; `mask` leaves no entry.  NonFiniteError: x is not finite.
              DtypeError, DeviceError, ShapeError: arguments that do not fit each other, or an empty axis.
    Cost:     O(n log n) time, O(n) memory.
    Source:   Wang & Lu (2015), Projection onto the capped simplex, arXiv:1503.01002.

    >>> capped_simplex(torch.tensor([3.0, 1.0, 0.5, -1.0]), 2)
    tensor([1.0000, 0.7500, 0.2500, 0.0000])
    """
    points, kept = rows(x, dim).masked(mask)
    total = points.parameter("k", scores.floating_count(k, x))
    u = points.parameter("cap", cap, entries=True)
    u = u.expand(*u.shape[:-1], points.x.shape[-1])
    if kept is not None:  # an entry with a cap of zero is as good as absent
        top = torch.where(kept, points.x.detach(), -torch.inf).amax(-1, keepdim=True)
        points = points._replace(x=torch.where(kept, points.x, torch.where(top.isneginf(), 0.0, top)))
        u = torch.where(kept, u, 0.0)
    most = u.detach().sum(-1, keepdim=True)
    most = most * (1 + 16 * torch.finfo(u.dtype).eps)  # n caps of 0.1 do not add up to 0.1 n in floating point
    every_k, most = torch.broadcast_tensors(total.detach(), most)
    rules = (
        *some_entries(kept),
        Rule("cap", u, lambda v: (v >= 0) & v.isfinite(), "must be finite and not negative"),
        Rule("k", every_k, lambda v: (v >= 0) & (v <= most), "must be between 0 and the sum of the caps"),
    )
    enforce(finite("x", points.x), *rules)
    return points.back(_onto_capped_simplex(poisoned(points.x, *rules), total, u))


def _onto_capped_simplex(x: Tensor, k: Tensor, u: Tensor) -> Tensor:  # (*B, n), (*B, 1), (*B, n) -> (*B, n)
    """Shift the free entries by −t; u for the capped ones, 0 elsewhere."""
    top = x.detach().amax(-1, keepdim=True)
    z = x - top
    plain, caps = z.detach().double(), u.detach().double()  # to tell apart what is near a bound and what is at it
    t, error = _capped_threshold(plain, k.detach().double(), caps)
    y = plain - t
    free = (y > error) & (y < caps - error)
    capped = (2 * y >= caps) & free.logical_not()
    rest = k - torch.where(capped, u, 0.0).sum(-1, keepdim=True)  # for the free entries
    count = free.sum(-1, keepdim=True)
    excess = (torch.where(free, z, 0.0).sum(-1, keepdim=True) - rest) / count.clamp(min=1)
    at_vertex = torch.where(capped, u, 0.0) + _next_to_move(y, caps, capped).to(x.dtype) * rest
    bound = torch.where(count > 0, torch.where(capped, u, 0.0), at_vertex)
    return kept_within(torch.where(free, z - excess, bound + (top - top)), 0.0, u)


def _capped_threshold(z: Tensor, k: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The t with Σ clip(z − t, 0, u) = k, and its rounding error: both (*B, 1)."""
    z, u = torch.broadcast_tensors(z, u)
    points, order = torch.cat([z, z - u], -1).sort(-1, descending=True)
    slopes = torch.where(order < z.shape[-1], 1.0, -1.0).to(z.dtype).cumsum(-1)  # entries that move, below each point
    gaps = -points.diff(dim=-1)
    mass = torch.nn.functional.pad((slopes.narrow(-1, 0, gaps.shape[-1]) * gaps).cumsum(-1), (1, 0))
    piece = ((mass < k).sum(-1, keepdim=True) - 1).clamp(min=0)
    start, filled, slope = (t.expand(*piece.shape[:-1], -1).gather(-1, piece) for t in (points, mass, slopes))
    t = start - (k - filled) / slope.clamp(min=1)
    error = 8 * torch.finfo(z.dtype).eps * (t.abs() + k)
    return t, error


def _next_to_move(y: Tensor, u: Tensor, capped: Tensor) -> Tensor:
    """How a vertex shares a change of k: the mean of its two one-sided derivatives; it adds up to 1."""
    wide = u > 0
    rising = _shares(y, wide & capped.logical_not())  # the largest entry at zero is the next to leave it
    falling = _shares(u - y, capped & wide)  # the capped entry nearest to its cap is the next to leave it
    ways = rising.sum(-1, keepdim=True) + falling.sum(-1, keepdim=True)
    return (rising + falling) / ways.clamp(min=1)


def _shares(height: Tensor, among: Tensor) -> Tensor:
    """Equal shares for the highest of the chosen entries; zeros if none is chosen."""
    height = height.masked_fill(among.logical_not(), -torch.inf)
    first = (height == height.amax(-1, keepdim=True)) & among
    return first.double() / first.sum(-1, keepdim=True).clamp(min=1)
