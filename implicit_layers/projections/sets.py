r"""Projections onto sets of one formula: box, Euclidean ball, half-space, hyperplane.

Every one is written in plain PyTorch operations, so any derivative of any order comes from autograd. Where the formula
has a kink (the boundary of the set), the derivative is the one of the inside, or of the piece that the docstring names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentError, ArgumentTypeError, ShapeError
from implicit_layers.projections.door import Rows, Rule, enforce, finite, poisoned, positive, rows, some_entries


def box(x: Tensor, *, lb: Tensor | float | None = None, ub: Tensor | float | None = None) -> Tensor:  # (*) -> (*)
    r"""Project onto a box.

    Problem:  y* = argmin_y ½‖y − x‖²  subject to  lb ≤ y ≤ ub.
    Solution: y* = min(max(x, lb), ub), entry by entry. So there is no mask: no entry feels another one.

    Args:
        x: points of any shape.
        lb, ub: bounds, at least one of them: numbers, or tensors that broadcast with `x`; ±inf where there is none.

    Returns:  y*, with the dtype and device of `x` and the shape of all arguments broadcast.
    Gradient: 1 to `x` inside and on the boundary, 1 to the bound that is hit outside, 0 to the others. Any order.
    Raises:   ArgumentError: lb > ub somewhere, or no bound at all.  NonFiniteError: x is not finite, or a bound is NaN.
              DtypeError, DeviceError, ShapeError: arguments that do not fit each other.
    Cost:     O(n) time and memory.

    >>> box(torch.tensor([-2.0, 0.5, 3.0]), lb=0.0, ub=torch.tensor([1.0, 1.0, 2.0]))
    tensor([0.0000, 0.5000, 2.0000])
    """
    if lb is None and ub is None:
        raise ArgumentError("box: give lb, ub or both; without bounds there is nothing to project onto")
    checks.floating_tensors(x=x)
    work = x.float() if x.dtype in checks.HALF else x
    lower = _bound("lb", lb, x, work, -torch.inf)
    upper = _bound("ub", ub, x, work, torch.inf)
    try:
        torch.broadcast_shapes(work.shape, lower.shape, upper.shape)
    except RuntimeError:
        shapes = f"x {tuple(x.shape)}, lb {tuple(lower.shape)}, ub {tuple(upper.shape)}"
        raise ShapeError(f"box: the shapes do not broadcast: {shapes}") from None
    rule = Rule("ub - lb", upper.detach() - lower.detach(), lambda gap: gap >= 0, "must not be negative or NaN")
    enforce(finite("x", work), rule)
    if not checks.readable(work, rule.values):
        good = rule.holds(rule.values)
        work, lower, upper = (checks.poisoned(v, good) for v in (work, lower, upper))
    return torch.where(work < lower, lower, torch.where(work > upper, upper, work)).to(x.dtype)


def _bound(name: str, value: Tensor | float | None, x: Tensor, work: Tensor, absent: float) -> Tensor:
    """A bound as a tensor in the dtype of the computation."""
    if isinstance(value, Tensor):
        value = value.float() if value.dtype in checks.HALF and x.dtype in checks.HALF else value
        checks.floating_tensors(x=work, **{name: value})
        return value
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ArgumentTypeError(f"{name} must be a number, a tensor or None, got {value!r}")
    return torch.full((), absent if value is None else value, dtype=work.dtype, device=work.device)


def l2_ball(
    x: Tensor, dim: int = -1, *, radius: Tensor | float = 1.0, mask: Tensor | None = None
) -> Tensor:  # (*, n, *) -> (*, n, *)
    r"""Project onto the Euclidean ball around zero.

    Problem:  y* = argmin_y ½‖y − x‖²  subject to  ‖y‖₂ ≤ r.
    Solution: y* = x where ‖x‖ ≤ r, else r x/‖x‖.

    Args:
        x: points, n entries along `dim`.
        dim: the axis of the entries.
        radius: r > 0: a number, or a tensor that broadcasts with `x` and has size 1 along `dim`.
        mask: boolean, broadcasts with `x`; entries where it is false count as absent: y = 0, with zero gradient.

    Returns:  y*, with the dtype and device of `x`, its shape broadcast with the one of `radius`.
    Gradient: inside and on the sphere ∂y/∂x = I, ∂y/∂r = 0; outside, with u = x/‖x‖, ∂y/∂x = (r/‖x‖)(I − uuᵀ),
              ∂y/∂r = u. Any order.
    Raises:   ArgumentError: r is not positive and finite, or `mask` leaves no entry.  NonFiniteError: x is not finite.
              DtypeError, DeviceError, ShapeError: arguments that do not fit each other.
    Cost:     O(n) time and memory; x is scaled first, so the norm does not overflow.

    >>> l2_ball(torch.tensor([3.0, 4.0]), radius=2.0)
    tensor([1.2000, 1.6000])
    """
    points, kept = rows(x, dim).masked(mask)
    r = points.parameter("radius", radius)
    enforce(finite("x", points.x), positive("radius", r), *some_entries(kept))
    return points.back(_onto_ball(poisoned(points.x, *some_entries(kept)), r))


def _onto_ball(x: Tensor, r: Tensor) -> Tensor:  # (*B, n), (*B, 1) -> (*B, n)
    """Scale to the sphere what lies outside; what lies inside takes no part in the division."""
    top = x.detach().abs().amax(-1, keepdim=True)
    z = x / torch.where(top > 0, top, 1.0)
    norm = torch.linalg.vector_norm(z.detach(), dim=-1, keepdim=True)
    outside = norm > r.detach() / torch.where(top > 0, top, 1.0)
    z = torch.where(outside, z, 1.0)
    on_sphere = r * (z / torch.linalg.vector_norm(z, dim=-1, keepdim=True))
    return torch.where(outside, on_sphere, x)


def half_space(
    x: Tensor, dim: int = -1, *, normal: Tensor, offset: Tensor | float, mask: Tensor | None = None
) -> Tensor:  # (*, n, *) -> (*, n, *)
    r"""Project onto a half-space.

    Problem:  y* = argmin_y ½‖y − x‖²  subject to  aᵀy ≤ b.
    Solution: y* = x − max(aᵀx − b, 0) a/‖a‖².

    Args:
        x: points, n entries along `dim`.
        dim: the axis of the entries.
        normal: a ≠ 0: a tensor that broadcasts with `x`, of size n along `dim` (or 1: the same number n times).
        offset: b: a number, or a tensor that broadcasts with `x` and has size 1 along `dim`.
        mask: boolean, broadcasts with `x`; entries where it is false count as absent: y = 0, with zero gradient.

    Returns:  y*, with the dtype and device of `x`, the shapes broadcast.
    Gradient: to x, a and b, of the identity inside and on the boundary, of the projection onto the hyperplane outside.
              Any order.
    Raises:   ArgumentError: a normal is zero on the entries that count.  NonFiniteError: an argument is not finite.
              DtypeError, DeviceError, ShapeError: arguments that do not fit each other.
    Cost:     O(n) time and memory.

    >>> half_space(torch.tensor([2.0, 1.0]), normal=torch.tensor([1.0, 1.0]), offset=1.0)
    tensor([1., 0.])
    """
    points, a, b = _plane(x, dim, normal, offset, mask)
    return points.back(points.x - _beyond(points.x, a, b).relu() * a)


def hyperplane(
    x: Tensor, dim: int = -1, *, normal: Tensor, offset: Tensor | float, mask: Tensor | None = None
) -> Tensor:  # (*, n, *) -> (*, n, *)
    r"""Project onto a hyperplane.

    Problem:  y* = argmin_y ½‖y − x‖²  subject to  aᵀy = b.
    Solution: y* = x − (aᵀx − b) a/‖a‖².

    Args:     x, dim, normal, offset, mask: as for `half_space`.
    Returns:  y*, with the dtype and device of `x`, the shapes broadcast.
    Gradient: to x, a and b, everywhere smooth: ∂y/∂x = I − aaᵀ/‖a‖². Any order.
    Raises:   as `half_space`.
    Cost:     O(n) time and memory.

    >>> hyperplane(torch.tensor([0.0, 1.0]), normal=torch.tensor([1.0, 1.0]), offset=3.0)
    tensor([1., 2.])
    """
    points, a, b = _plane(x, dim, normal, offset, mask)
    return points.back(points.x - _beyond(points.x, a, b) * a)


def _beyond(x: Tensor, a: Tensor, b: Tensor) -> Tensor:  # (*B, n), (*B, n), (*B, 1) -> (*B, 1)
    """(aᵀx − b)/‖a‖² for max |a| = 1, halved as often as it takes for the sum not to overflow."""
    small = 0.5 ** (x.shape[-1].bit_length() + 2)
    gap = (a * (small * x)).sum(-1, keepdim=True) - small * b
    return gap / a.square().sum(-1, keepdim=True) / small


def _plane(
    x: Tensor, dim: int, normal: Tensor, offset: Tensor | float, mask: Tensor | None
) -> tuple[Rows, Tensor, Tensor]:
    """Points, normal and offset, the last two scaled to max |a| = 1, which leaves the plane where it is."""
    points, kept = rows(x, dim).masked(mask)
    if not isinstance(normal, Tensor):
        raise ArgumentTypeError(f"normal must be a tensor, got {type(normal).__name__}")
    a = points.parameter("normal", normal, entries=True)
    b = points.parameter("offset", offset)
    if kept is not None:
        a = torch.where(kept, a, 0.0)
    top = a.detach().abs().amax(-1, keepdim=True)
    enforce(
        finite("x", points.x),
        finite("normal", a),
        finite("offset", b),
        *some_entries(kept),
        Rule("max|normal|", top, lambda v: v > 0, "must be positive: a normal of zeros has no plane"),
    )
    a = a.expand(*a.shape[:-1], points.x.shape[-1])
    return points, a / top, b / top
