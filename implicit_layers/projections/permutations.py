r"""The projection onto the permutahedron, the convex hull of all permutations of a vector, by isotonic regression.

With s the entries of x and w those of the vector, both in descending order, the projection is y = s − v, put back in
the order of x, where v is the decreasing isotonic regression of s − w. Soft sorting and ranking are this projection
(see `implicit_layers.softsort`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_layers.errors import ArgumentTypeError
from implicit_layers.projections.door import enforce, finite, rows
from implicit_layers.projections.isotone import block_sums, blocks, packed


def permutahedron(x: Tensor, w: Tensor, dim: int = -1) -> Tensor:  # (*, n, *), (*, n, *) -> (*, n, *)
    r"""Project onto the permutahedron of w.

    Problem:  y* = argmin_y ½‖y − x‖²  subject to  y in the convex hull of all permutations of w.
    Solution: y* = x − v, with v the decreasing isotonic regression of sort(x) − sort(w), put back in the order of x.

    Args:
        x: points, n entries along `dim`.
        w: the vertex, in any order: a tensor that broadcasts with `x`, of size n along `dim`.
        dim: the axis of the entries.

    Returns:  y*, with the dtype and device of `x`, the shapes broadcast.
    Gradient: to x and w. On a block B of the regression ∂y/∂x = I − 11ᵀ/|B|, and w of the same places gets 11ᵀ/|B|.
              Equal entries of x are no kink if those of w differ. Where blocks only just touch, they count as one:
              one generalised Jacobian. Any order.
    Raises:   NonFiniteError: x or w is not finite.
              DtypeError, DeviceError, ShapeError: arguments that do not fit each other, or an empty axis.
    Cost:     O(n log² n) time, O(n) memory, no loop over the batch.
    Source:   Blondel, Teboul, Berthet & Djolonga (2020), Fast differentiable sorting and ranking, arXiv:2002.08871.

    >>> permutahedron(torch.tensor([0.0, 5.0, 0.5]), torch.tensor([1.0, 2.0, 3.0]))
    tensor([1.2500, 3.0000, 1.7500])
    """
    points = rows(x, dim)
    if not isinstance(w, Tensor):
        raise ArgumentTypeError(f"w must be a tensor, got {type(w).__name__}")
    vertex = points.parameter("w", w, entries=True)
    enforce(finite("x", points.x), finite("w", vertex))
    return points.back(onto_permutahedron(points.x, vertex))


def onto_permutahedron(x: Tensor, w: Tensor, tau: Tensor | float = 1.0) -> Tensor:  # (*B, n), (*B, n) -> (*B, n)
    """The projection of x/τ, for arguments that broadcast, the entries last; x is not divided, which may overflow."""
    x, w = torch.broadcast_tensors(x, w) if isinstance(tau, float) else torch.broadcast_tensors(x, w, tau)[:2]
    order = x.detach().sort(dim=-1, descending=True, stable=True).indices
    s = x.gather(-1, order)
    w = w.gather(-1, w.detach().sort(dim=-1, descending=True, stable=True).indices)
    s = s - s.detach().narrow(-1, 0, 1)  # the projection does not see a shift
    block = blocks((tau * w - s).detach(), torch.ones_like(s))
    size = block_sums(torch.ones_like(s), block)
    first = torch.searchsorted(packed(block), packed(block))
    gap = s - s.detach().gather(-1, first)  # subtracted first, so that nothing is lost where s is much larger than w
    y = (gap - block_sums(gap, block) / size) / tau + block_sums(w, block) / size
    return y.gather(-1, order.argsort(-1))
