r"""Sorting and ranking as linear programs over the permutahedron, regularised so that they have derivatives.

    ranks(x)   = argmax_y ⟨x, y⟩   over the permutations y of (1, 2, …, n)
    sorted(x)  = argmax_y ⟨ρ, y⟩   over the permutations y of x,  with ρ = (1, 2, …, n)

Both are piecewise constant or linear with jumps. With −τ/2 ‖y‖² added they are the projections of x/τ and ρ/τ, which
are continuous, differentiable almost everywhere, and equal to the hard ones for small enough τ > 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_layers.projections.door import Rows, Rule, enforce, finite, poisoned, rows, some_entries
from implicit_layers.projections.permutations import onto_permutahedron


def soft_rank(
    x: Tensor,
    dim: int = -1,
    *,
    temperature: Tensor | float = 1.0,
    descending: bool = False,
    mask: Tensor | None = None,
) -> Tensor:  # (*, n, *) -> (*, n, *)
    r"""Rank scores, softly: 1 for the smallest, n for the largest.

    Problem:  y* = argmax_y ⟨x, y⟩ − τ/2 ‖y‖²  over the convex hull of the permutations of (1, 2, …, n).

    Args:
        x: scores, n of them along `dim`.
        dim: the axis of the scores.
        temperature: τ > 0, in the unit of the scores: a number, or a tensor that broadcasts with `x` and has size 1
            along `dim`. Once τ is below every gap between scores, y* are the hard ranks and the gradient is zero; once
            it is large, all ranks approach (n + 1)/2.
        descending: 1 for the largest instead.
        mask: boolean, broadcasts with `x`; entries where it is false count as absent: they have rank 0, with zero
            gradient, and the m others have the ranks from 1 to m.

    Returns:  y*, with the dtype and device of `x`, its shape broadcast with the one of `temperature`. Ties share ranks.
    Gradient: on a block B of scores that are nearer than τ allows: ∂y/∂x = (I − 11ᵀ/|B|)/τ; to τ too. Any order.
              Where blocks only just touch, one generalised Jacobian.
    Raises:   ArgumentError: τ is not positive, or `mask` leaves no entry.  NonFiniteError: x is not finite.
              DtypeError, DeviceError, ShapeError: arguments that do not fit each other, or an empty axis.
    Cost:     O(n log² n) time, O(n) memory, no loop over the batch.
    Source:   Blondel, Teboul, Berthet & Djolonga (2020), Fast differentiable sorting and ranking, arXiv:2002.08871.

    >>> soft_rank(torch.tensor([2.9, 0.1, 1.2]), temperature=0.5)
    tensor([3., 1., 2.])
    >>> soft_rank(torch.tensor([2.9, 0.1, 1.2]), temperature=2.0)
    tensor([2.7500, 1.3500, 1.9000])
    """
    points, tau, kept = _scores(x, dim, temperature, mask)
    sign = -1.0 if descending else 1.0
    ranks = torch.arange(1, points.x.shape[-1] + 1, dtype=points.x.dtype, device=points.x.device)
    first = None if kept is None else ranks <= kept.sum(-1, keepdim=True)
    return points.back(onto_permutahedron(sign * points.x, ranks, tau, kept=kept, kept_w=first))


def soft_sort(
    x: Tensor,
    dim: int = -1,
    *,
    temperature: Tensor | float = 1.0,
    descending: bool = False,
    mask: Tensor | None = None,
) -> Tensor:  # (*, n, *) -> (*, n, *)
    r"""Sort scores, softly.

    Problem:  y* = argmax_y ⟨ρ, y⟩ − τ/2 ‖y‖²  over the convex hull of the permutations of x, with ρ = (1, 2, …, n).

    Args:
        x: scores, n of them along `dim`.
        dim: the axis of the scores.
        temperature: τ > 0, in the inverse unit of the scores: a number, or a tensor that broadcasts with `x` and has
            size 1 along `dim`. Once 1/τ is above every gap between neighbours, y* are the sorted scores; once τ is
            large, all entries approach the mean of x.
        descending: from large to small.
        mask: boolean, broadcasts with `x`; entries where it is false count as absent, with zero gradient: the m others
            are sorted into the first m places, and the last ones are 0.

    Returns:  y*, with the dtype and device of `x`, its shape broadcast with the one of `temperature`; in order.
    Gradient: a block B of sorted places gets the mean of its scores, so ∂y/∂x = 11ᵀ/|B| there; to τ too. Any order.
              Where blocks only just touch, or scores of different blocks tie, one generalised Jacobian.
    Raises:   as `soft_rank`.
    Cost:     O(n log² n) time, O(n) memory, no loop over the batch.
    Source:   Blondel, Teboul, Berthet & Djolonga (2020), Fast differentiable sorting and ranking, arXiv:2002.08871.

    >>> soft_sort(torch.tensor([2.9, 0.1, 1.2]), temperature=0.5)
    tensor([0.1000, 1.2000, 2.9000])
    >>> soft_sort(torch.tensor([2.9, 0.1, 1.2]), temperature=1.0)
    tensor([0.4000, 1.4000, 2.4000])
    """
    points, tau, kept = _scores(x, dim, temperature, mask)
    places = torch.arange(1, points.x.shape[-1] + 1, dtype=points.x.dtype, device=points.x.device)
    first = None if kept is None else places <= kept.sum(-1, keepdim=True)
    places = (places.flip(0) if descending else places) / tau
    return points.back(onto_permutahedron(places, points.x, kept=first, kept_w=kept))


def _scores(
    x: Tensor, dim: int, temperature: Tensor | float, mask: Tensor | None
) -> tuple[Rows, Tensor, Tensor | None]:
    """Scores, temperature and mask, checked."""
    points, kept = rows(x, dim).masked(mask)
    tau = points.parameter("temperature", temperature)
    n = points.x.shape[-1]
    must = f"must be positive and finite, and {n}/temperature finite too"
    rule = Rule("temperature", tau, lambda v: (v > 0) & v.isfinite() & (n / v).isfinite(), must)
    rules = (rule, *some_entries(kept))
    enforce(finite("x", points.x), *rules)
    return points._replace(x=poisoned(points.x, *rules)), tau, kept
