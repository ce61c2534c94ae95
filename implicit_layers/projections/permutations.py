r"""The projection onto the permutahedron, the convex hull of all permutations of a vector, by isotonic regression.

With s the entries of x and w those of the vector, both in descending order, the projection is y = s − v, put back in
the order of x, where v is the decreasing isotonic regression of s − w. Soft sorting and ranking are this projection
(see `implicit_layers.softsort`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_layers.errors import ArgumentTypeError
from implicit_layers.projections.door import enforce, finite, headroom, poisoned, rows, some_entries
from implicit_layers.projections.isotone import block_sums, blocks, front, packed


def permutahedron(
    x: Tensor, w: Tensor, dim: int = -1, *, mask: Tensor | None = None
) -> Tensor:  # (*, n, *), (*, n, *) -> (*, n, *)
    r"""Project onto the permutahedron of w.

    Problem:  y* = argmin_y ½‖y − x‖²  subject to  y in the convex hull of all permutations of w.
    Solution: y* = x − v, with v the decreasing isotonic regression of sort(x) − sort(w), put back in the order of x.

    Args:
        x: points, n entries along `dim`.
        w: the vertex, in any order: a tensor that broadcasts with `x`, of size n along `dim`.
        dim: the axis of the entries.
        mask: boolean, broadcasts with `x`; where it is false, the entries of x and of w count as absent: y = 0, with
            zero gradient.

    Returns:  y*, with the dtype and device of `x`, the shapes broadcast.
    Gradient: to x and w. On a block B of the regression ∂y/∂x = I − 11ᵀ/|B|, and w of the same places gets 11ᵀ/|B|.
              Equal entries of x are no kink if those of w differ. Where blocks only just touch, they count as one:
              one generalised Jacobian. Any order.
    Raises:   NonFiniteError: x or w is not finite.  ArgumentError: `mask` leaves no entry.
              DtypeError, DeviceError, ShapeError: arguments that do not fit each other, or an empty axis.
    Cost:     O(n log² n) time, O(n) memory, no loop over the batch.
    Source:   Blondel, Teboul, Berthet & Djolonga (2020), Fast differentiable sorting and ranking, arXiv:2002.08871.

    >>> permutahedron(torch.tensor([0.0, 5.0, 0.5]), torch.tensor([1.0, 2.0, 3.0]))
    tensor([1.2500, 3.0000, 1.7500])
    """
    points, kept = rows(x, dim).masked(mask)
    if not isinstance(w, Tensor):
        raise ArgumentTypeError(f"w must be a tensor, got {type(w).__name__}")
    vertex = points.parameter("w", w, entries=True)
    if kept is not None:
        vertex = torch.where(kept, vertex, 0.0)
    enforce(finite("x", points.x), finite("w", vertex), *some_entries(kept))
    return points.back(onto_permutahedron(poisoned(points.x, *some_entries(kept)), vertex, kept=kept, kept_w=kept))


def onto_permutahedron(
    x: Tensor,  # (*B, n)
    w: Tensor,  # (*B, n)
    tau: Tensor | float = 1.0,  # (*B, 1)
    *,
    kept: Tensor | None = None,  # (*B, n) bool
    kept_w: Tensor | None = None,  # (*B, n) bool, as many in each row
) -> Tensor:  # (*B, n)
    """The projection of x/τ, for arguments that broadcast, the entries last; x is not divided, which may overflow.

    Of x the entries that are `kept` count, and of w those that are `kept_w`; the others of y are zero.
    """
    x, w = torch.broadcast_tensors(x, w) if isinstance(tau, float) else torch.broadcast_tensors(x, w, tau)[:2]
    order, w_order = _descending(x, kept), _descending(w, kept_w)
    small = headroom(x)
    s, w = small * x.gather(-1, order), small * w.gather(-1, w_order)
    real = None if kept is None else kept.expand(x.shape).gather(-1, order)
    s = s - s.detach().narrow(-1, 0, 1)  # the projection does not see a shift
    block = blocks((tau * w - s).detach(), torch.ones_like(s), real)
    size = block_sums(torch.ones_like(s), block)
    first = torch.searchsorted(packed(block), packed(block))
    gap = s - s.detach().gather(-1, first)  # subtracted first, so that nothing is lost where s is much larger than w
    y = (gap - block_sums(gap, block) / size) / tau / small + block_sums(w, block) / size / small
    y = y if real is None else torch.where(real, y, 0 * (s + w).detach())  # zero, or NaN where all of a point is
    return y.gather(-1, order.argsort(-1))


def _descending(t: Tensor, kept: Tensor | None) -> Tensor:  # (*B, n), (*B, n) -> (*B, n)
    """The order from large to small, of equal entries as they come; those that are not kept at the end."""
    order = t.detach().sort(dim=-1, descending=True, stable=True).indices
    if kept is None:
        return order
    return order.gather(-1, front(kept.expand(t.shape).gather(-1, order))[0])
