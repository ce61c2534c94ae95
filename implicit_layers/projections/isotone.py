r"""Isotonic regression: the projection onto the cone of ordered vectors, batched without a loop over the batch.

The solution is constant on blocks of neighbours, each the weighted mean of its block. Blocks are found on detached
values in float64; then the means are written down again in plain operations, so that autograd gives every derivative.

To find the blocks, neighbouring solutions are merged, two into one: of single entries, of pairs, and so on, until one
is left. Where two ordered pieces meet, the last entries of the left one and the first ones of the right one are pooled
at one value v,

    Σ_left w (y − v)₊ = Σ_right w (v − y)₊,

and nothing else changes. The number of steps depends on n alone: log₂ n merges, whatever the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_layers.projections.door import (
    enforce,
    finite,
    headroom,
    kept_within,
    poisoned,
    positive,
    rows,
    some_entries,
)


def isotonic(
    x: Tensor,
    dim: int = -1,
    *,
    weight: Tensor | float = 1.0,
    decreasing: bool = False,
    mask: Tensor | None = None,
) -> Tensor:  # (*, n, *) -> (*, n, *)
    r"""Project onto the ordered vectors: isotonic regression.

    Problem:  y* = argmin_y ½ Σᵢ wᵢ (yᵢ − xᵢ)²  subject to  y₁ ≤ y₂ ≤ … ≤ yₙ  (≥ with `decreasing`).
    Solution: y* is constant on blocks of neighbours, where it is the weighted mean of x.

    Args:
        x: points, n entries along `dim`.
        dim: the axis of the entries.
        weight: w > 0: a number, or a tensor that broadcasts with `x`, of size n or 1 along `dim`.
        decreasing: order from large to small.
        mask: boolean, broadcasts with `x`; entries where it is false count as absent: y = 0 there, with zero gradient,
            and those before and after them are neighbours.

    Returns:  y*, with the dtype and device of `x`, the shapes broadcast.
    Gradient: on a block B with mean m, ∂yᵢ/∂xⱼ = wⱼ/Σ_B w and ∂yᵢ/∂wⱼ = (xⱼ − m)/Σ_B w for i, j in B; zero across
              blocks. Neighbouring blocks of one value count as one block: where they only just touch, this is one
              generalised Jacobian. Any order.
    Raises:   ArgumentError: a weight is not positive and finite, or `mask` leaves no entry.
              NonFiniteError: x is not finite.
              DtypeError, DeviceError, ShapeError: arguments that do not fit each other, or an empty axis.
    Cost:     O(n log² n) time, O(n) memory, in log₂ n steps for the whole batch; the blocks are found in float64.
    Source:   Best & Chakravarti (1990), Active set algorithms for isotonic regression, doi:10.1007/BF01580873.

    >>> isotonic(torch.tensor([1.0, 3.0, 2.0, 4.0]))
    tensor([1.0000, 2.5000, 2.5000, 4.0000])
    """
    points, kept = rows(x, dim).masked(mask)
    w = points.parameter("weight", weight, entries=True)
    if kept is not None:
        w = torch.where(kept, w, 1.0)
    enforce(finite("x", points.x), positive("weight", w), *some_entries(kept))
    z = poisoned(points.x, *some_entries(kept))
    z = -z if decreasing else z
    if kept is None:
        z, w = torch.broadcast_tensors(z, w)
        y = _means(z, w, None)
    else:
        z, w, kept = torch.broadcast_tensors(z, w, kept)
        order, back = front(kept)
        y = _means(z.gather(-1, order), w.gather(-1, order), kept.gather(-1, order)).gather(-1, back)
        y = torch.where(kept, y, 0 * z.detach())  # zero, or NaN where all of a point is
    return points.back(-y if decreasing else y)


def _means(z: Tensor, w: Tensor, real: Tensor | None) -> Tensor:  # (*B, n) each -> (*B, n)
    """The nondecreasing regression, with its derivative."""
    block = blocks(headroom(z) * z.detach(), w.detach(), real)
    part = headroom(w) * w
    y = block_sums(part / block_sums(part, block) * z, block)  # shares first, so that no sum is larger than z
    return kept_within(y, y.detach().cummax(-1).values)  # equal means may differ by rounding


def front(kept: Tensor) -> tuple[Tensor, Tensor]:  # (*B, n) -> (*B, n), (*B, n)
    """The order in which the entries that count come first, each kind in its own order; and the way back."""
    order = kept.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices
    return order, order.argsort(-1)


def block_sums(x: Tensor, block: Tensor) -> Tensor:  # (*B, n), (*B, n) -> (*B, n)
    """The sum over the block of each entry."""
    return torch.zeros_like(x).scatter_add(-1, block, x).gather(-1, block)


def blocks(x: Tensor, w: Tensor, real: Tensor | None = None) -> Tensor:  # (*B, n) each -> (*B, n) int64
    """The number of the block of each entry of the nondecreasing regression of x; where not `real`, one at the end."""
    x, w = x.to(torch.float64), w.to(torch.float64)
    if real is not None:  # entries that no other one is larger than change nothing
        x = torch.where(real, x, torch.where(real, x, -torch.inf).amax(-1, keepdim=True))
    apart = _regression(x, w).diff(dim=-1) != 0
    if real is not None:
        apart = apart | (real.narrow(-1, 0, real.shape[-1] - 1) & ~real.narrow(-1, 1, real.shape[-1] - 1))
    return torch.nn.functional.pad(apart.cumsum(-1), (1, 0))


def _regression(x: Tensor, w: Tensor) -> Tensor:  # (*B, n), (*B, n) -> (*B, n)
    """Isotonic regression in as many merges as the length asks for; entries of one block are equal bit by bit."""
    n = x.shape[-1]
    length = 1 << (n - 1).bit_length()
    if length > n:  # entries that no other one is larger than change nothing
        shape = (*x.shape[:-1], length - n)
        x = torch.cat([x, x.amax(-1, keepdim=True).expand(shape)], -1)
        w = torch.cat([w, w.new_ones(shape)], -1)
    size = 1
    while size < length:
        pairs = (length // (2 * size), 2, size)
        x = _merged(x.unflatten(-1, pairs), w.unflatten(-1, pairs)).flatten(-3)
        size *= 2
    return x.narrow(-1, 0, n)


def _merged(y: Tensor, w: Tensor) -> Tensor:  # (*B, 2, m), (*B, 2, m) -> (*B, 2, m)
    """One ordered piece from two: pool what is out of order where they meet."""
    m = y.shape[-1]
    left, right = y.select(-2, 0).flip(-1), y.select(-2, 1)  # both start where they meet
    w_left, w_right = w.select(-2, 0).flip(-1), w.select(-2, 1)
    sum_left, sum_right = _from_zero(w_left * left), _from_zero(w_right * right)
    mass_left, mass_right = _from_zero(w_left), _from_zero(w_right)
    # a left entry is pooled if, at its level, the right ones lack more than the left ones have above it
    lower = torch.searchsorted(packed(right), packed(left))
    above = sum_left.narrow(-1, 1, m) - left * mass_left.narrow(-1, 1, m)
    below = left * mass_right.gather(-1, lower) - sum_right.gather(-1, lower)
    p = (above < below).sum(-1, keepdim=True)
    some_sum, some_mass = sum_left.gather(-1, p), mass_left.gather(-1, p)
    mean = (some_sum + sum_right.narrow(-1, 0, m)) / (some_mass + mass_right.narrow(-1, 0, m))  # with q = 0..m−1
    q = (right < mean).sum(-1, keepdim=True)
    v = (some_sum + sum_right.gather(-1, q)) / (some_mass + mass_right.gather(-1, q))
    pooled = (p > 0) & (q > 0)
    left = torch.where(pooled, torch.minimum(left, v), left)
    right = torch.where(pooled, torch.maximum(right, v), right)
    return torch.stack([left.flip(-1), right], -2)


def _from_zero(t: Tensor) -> Tensor:
    """Sums of the first 0, 1, 2, ... entries."""
    return torch.nn.functional.pad(t.cumsum(-1), (1, 0))


def packed(t: Tensor) -> Tensor:
    """A contiguous copy; under vmap, `contiguous()` takes the layout of one element for that of all."""
    return t.clone(memory_format=torch.contiguous_format)
