"""The arguments of a projection, checked and laid out so that the entries of one point are the last axis.

A projection has a point `x` and parameters. A parameter belongs to a whole point (a radius: size 1 along `dim`) or to
its entries (a normal: size n or 1 along `dim`); all of them broadcast with `x`. A mask leaves entries out: the point
that is projected has the others, y is zero where the mask is false, and so is the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeviceError,
    DtypeError,
    ImplicitLayersError,
    NonFiniteError,
    ShapeError,
)


class Rows(NamedTuple):
    """Points along the last axis, and the way back to the caller's layout."""

    x: Tensor  # (*B, n), in the dtype of the computation
    axis: int  # of the entries in the caller's layout, counted from the end
    ndim: int  # of the caller's x
    dtype: torch.dtype  # of the caller's x

    def parameter(self, name: str, value: Tensor | float, *, entries: bool = False) -> Tensor:
        """One parameter, with the axis of the entries last: (*B, 1), or (*B, n) if it belongs to `entries`.

        Raises:
            ArgumentTypeError, DtypeError, DeviceError, ShapeError: name the parameter.
        """
        if not isinstance(value, Tensor):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ArgumentTypeError(f"{name} must be a number or a tensor, got {value!r}")
            if math.isnan(value):
                raise NonFiniteError(f"{name} is nan")
            return torch.full((1,), value, dtype=self.x.dtype, device=self.x.device)
        if value.dtype in checks.HALF and self.dtype in checks.HALF:
            value = value.float()
        checks.floating_tensors(x=self.x, **{name: value})
        short = -self.axis - value.ndim
        value = value.reshape((1,) * short + tuple(value.shape)).movedim(self.axis, -1)
        n, size = self.x.shape[-1], value.shape[-1]
        if size != 1 and not (entries and size == n):
            wanted = f"1 or {n}, one for each entry" if entries else "1: one for each point"
            raise ShapeError(
                f"{name} has size {size} along dim={self.axis}, the axis of the entries; it must be {wanted}"
            )
        try:
            torch.broadcast_shapes(self.x.shape, value.shape)
        except RuntimeError:
            raise ShapeError(
                f"{name} of shape {tuple(value.movedim(-1, self.axis).shape)} does not broadcast with x of shape "
                f"{tuple(self.x.movedim(-1, self.axis).shape)}"
            ) from None
        return value

    def masked(self, mask: Tensor | None) -> tuple[Rows, Tensor | None]:
        """The points with zeros where the mask is false, and the mask of their shape, (*B, n).

        Raises:
            DtypeError, DeviceError, ShapeError: no boolean tensor, on another device, or it does not fit.
        """
        if mask is None:
            return self, None
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
            raise DtypeError(f"mask must be a boolean tensor, True for the entries that count, got {got}")
        if mask.device != self.x.device:
            raise DeviceError(f"mask is on {mask.device} but x is on {self.x.device}; move it: mask.to(x.device)")
        given = tuple(mask.shape)
        mask = mask.reshape((1,) * (-self.axis - mask.ndim) + given).movedim(self.axis, -1)
        n = self.x.shape[-1]
        try:
            shape = torch.broadcast_shapes(self.x.shape, mask.shape)
        except RuntimeError:
            shape = torch.Size()
        if not shape or shape[-1] != n:
            whole = tuple(self.x.movedim(-1, self.axis).shape) if self.ndim else ()
            raise ShapeError(f"mask of shape {given} does not broadcast with x of shape {whole}")
        mask = mask.expand(shape)
        return self._replace(x=torch.where(mask, self.x, 0.0)), mask

    def back(self, y: Tensor) -> Tensor:
        """The answer in the caller's layout and dtype."""
        y = y if self.axis == -1 else y.movedim(-1, self.axis)
        return (y.squeeze(-1) if self.ndim == 0 and y.ndim == 1 else y).to(self.dtype)


def rows(x: Tensor, dim: int) -> Rows:
    """The points, with the axis of the entries last; a 0-d tensor is one point of one entry.

    Raises:
        DtypeError, ArgumentTypeError, ShapeError: no floating-point tensor, no such axis, or an empty one.
    """
    checks.floating_tensors(x=x)
    axis = checks.axis_from_end(x, dim, "a point needs at least one")
    points = x.movedim(axis, -1) if x.ndim else x.unsqueeze(0)
    return Rows(points.float() if x.dtype in checks.HALF else points, axis, x.ndim, x.dtype)


class Rule(NamedTuple):
    """What the values of an argument must satisfy, and what to say where they do not."""

    name: str
    values: Tensor
    holds: Callable[[Tensor], Tensor]  # elementwise
    must: str  # "must be positive"
    error: type[ImplicitLayersError] = ArgumentError


def finite(name: str, values: Tensor) -> Rule:
    """No NaN and no infinity."""
    return Rule(name, values, torch.isfinite, "must be finite", NonFiniteError)


def positive(name: str, values: Tensor) -> Rule:
    """Positive and finite."""
    return Rule(name, values, lambda v: (v > 0) & v.isfinite(), "must be positive and finite")


def some_entries(mask: Tensor | None) -> tuple[Rule, ...]:
    """A mask leaves at least one entry of every point."""
    if mask is None:
        return ()
    left = mask.sum(-1, keepdim=True)
    return (Rule("mask", left, lambda v: v > 0, "must leave at least one entry of each point"),)


def poisoned(x: Tensor, *rules: Rule) -> Tensor:  # (*B, n) -> (*B, n)
    """The points, NaN where a rule is broken that the host could not check; for use after `enforce`."""
    if checks.readable(x, *(rule.values for rule in rules)):
        return x
    for rule in rules:
        good = rule.holds(rule.values.detach())
        x = checks.poisoned(x, good.all(-1, keepdim=True) if good.ndim else good)
    return x


def enforce(*rules: Rule) -> None:
    """Refuse values that break a rule: one host synchronisation, none where the host may not look.

    Raises:
        NonFiniteError, ArgumentError: name the argument and the first offending index (the axis of the entries last).
    """
    if not checks.readable(*(rule.values for rule in rules)):
        return
    values = [rule.values.detach() for rule in rules]
    if checks.host_bool(torch.stack([r.holds(v).all() for r, v in zip(rules, values, strict=True)]).all()):
        return
    for rule, value in zip(rules, values, strict=True):
        bad = ~rule.holds(value)
        if bool(bad.any()):
            raise rule.error(
                f"{rule.name}{checks.index_of(bad)} {rule.must}, got {float(value[bad][0]):g} "
                f"({int(bad.sum())} of {bad.numel()})"
            )


def kept_within(y: Tensor, lower: Tensor | float, upper: Tensor | None = None) -> Tensor:
    """Take rounding beyond the bounds away from the value, and leave the derivative alone."""
    plain = y.detach()
    bounded = plain.clamp(min=lower) if isinstance(lower, (int, float)) else torch.maximum(plain, lower.detach())
    if upper is not None:
        bounded = torch.minimum(bounded, upper.detach())
    return y + (bounded - plain)
