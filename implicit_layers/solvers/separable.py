r"""The solve of any separable regularised argmax over the (capped) simplex: one equation for one number a problem.

    yᵢ = primal((xᵢ − ν)/τ),   Σᵢ yᵢ = k,   0 ≤ y ≤ cap

A regulariser is any object with the attributes of `Maps`. Each has a key, by which an operation that takes only
tensors and plain values can find it again.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from implicit_layers.solvers.shift import pivots, shift


class Maps(Protocol):
    """What the solve needs of a regulariser; see `regularizers.Regularizer`."""

    @property
    def primal(self) -> Callable[[Tensor], Tensor]:
        """The inverse of the slope."""

    @property
    def weight(self) -> Callable[[Tensor], Tensor]:
        """One over the second derivative, as a function of y."""

    @property
    def slope(self) -> Callable[[Tensor], Tensor]:
        """The derivative, as a function of y."""

    @property
    def cap(self) -> float:
        """The largest value of an entry."""

    @property
    def solve(self) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """A better way than Newton, or None."""


_KNOWN: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def key_of(chosen: Maps, name: str) -> str:
    """Make a regulariser known; returns the key by which it is found as long as it lives."""
    key = name if name not in _KNOWN else f"{name}, number {next(_numbers)}"
    _KNOWN[key] = chosen
    return key


def known(key: str) -> Maps:
    """The regulariser with this key."""
    found: Maps = _KNOWN[key]
    return found


def solve(chosen: Maps, x: Tensor, total: Tensor, tau: Tensor) -> Tensor:  # (*B, n), (*B, 1), (*B, 1) -> (*B, n)
    """The y of scores x, −inf where masked."""
    if chosen.solve is not None:
        return chosen.solve(x, total, tau)
    top, most = x.amax(-1, keepdim=True), torch.finfo(x.dtype).max / 4
    pivot, below = pivots(x, total, chosen.cap)
    pivot = torch.where(pivot.isfinite(), pivot, top)
    v = torch.where(x.isneginf(), x, ((x - pivot) / tau).clamp(-most, most))
    below = torch.where(below.isfinite(), ((below - pivot) / tau).clamp(-most, most), 0.0)
    c = shift(chosen.primal, chosen.weight, chosen.slope, v, below, total, chosen.cap)
    y = chosen.primal(v + c)
    if chosen.cap < float("inf"):
        y = torch.where((total >= chosen.cap * x.isfinite().sum(-1, keepdim=True)) & x.isfinite(), chosen.cap, y)
    return torch.where(total == 0, 0.0, y)
