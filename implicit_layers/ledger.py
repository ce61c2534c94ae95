"""Exact multiplication of integers by a momentum 0 ≤ μ < 1: what is lost is written down, so that it can be undone.

Real numbers are held as integers here, whole multiples of a power of two, so that their sums are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from implicit_layers import checks

LIMIT = 2**61  # entries are below it, so that their sums fit

_WORD = 2**63  # a signed integer is below it
_RICH = 2**48  # a buffer with digits above this is put aside rather than filled further


@lru_cache
def fraction(momentum: float) -> Fraction:
    """The nearest n/d with n d below 2⁶²: products of remainders by n or d are exact."""
    return Fraction(momentum).limit_denominator(2**31 - 1)


def scales(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """2^e and 2^−e in float64, exactly, for |e| ≤ 1000."""
    e = exponent.to(torch.int64)
    return ((e + 1023) << 52).view(torch.float64), ((1023 - e) << 52).view(torch.float64)


def whole(x: Tensor, scale: Tensor) -> Tensor:
    """x·scale rounded to integers; what does not fit, or is no number, becomes 2⁶¹, which is above the limit."""
    limit = float(LIMIT)
    return (x.double() * scale).round_().nan_to_num_(limit, limit, limit).clamp_(-limit, limit).to(torch.int64)


@dataclass
class Ledger:
    """v ← μ v on integers, rounded, and back: the digits that it loses, one buffer an entry, full ones put aside.

    With μ = n/d, 0 ≤ h < d and w = ⌊(n v + h)/d⌋, the c integers v of one w are told apart by a digit of base c, 1
    (nothing to store) or more: for μ = 0.9 two v in ten need one bit. Another h in every step rounds without bias, so
    that no v gets stuck where each step costs a digit. Without momentum the whole v is put aside.
    """

    momentum: Fraction
    digits: Tensor  # int64, the buffer of every entry
    aside: list[Tensor] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # digits in each buffer that was put aside, and in the last
    bound: int = 1  # every buffer is below it
    count: int = field(init=False)  # of digits in all

    def __post_init__(self) -> None:
        self.lengths = self.lengths or [0]
        self.count = sum(self.lengths)

    def multiply(self, v: Tensor) -> Tensor:
        """μ v, rounded; waits for the device once in 15 steps at most where μ ≥ ½."""
        n, d = self.momentum.as_integer_ratio()
        if n == 0:
            self.aside.append(v)
            return torch.zeros_like(v)
        if n == d:
            return v
        base = -(-d // n)
        if self.bound * base > _WORD:
            self.bound = checks.host_int(self.digits.amax()) + 1 if self.digits.numel() else 1
            if self.bound > min(_RICH, _WORD // base):
                self.aside.append(self.digits)
                self.lengths.append(0)
                self.digits, self.bound = torch.zeros_like(v), 1
        self.count += 1
        quotient = v.div(d, rounding_mode="floor")
        w = quotient * n + ((v - quotient * d) * n + self._offset()).div_(d, rounding_mode="floor")
        first, count = self._preimages(w)
        self.digits = self.digits * count + (v - first)
        self.bound *= base
        self.lengths[-1] += 1
        return w

    def divide(self, w: Tensor) -> Tensor:
        """The v that `multiply` was given last."""
        n, d = self.momentum.as_integer_ratio()
        if n == 0:
            return self.aside.pop()
        if n == d:
            return w
        if self.lengths[-1] == 0:
            self.digits = self.aside.pop()
            self.lengths.pop()
        self.lengths[-1] -= 1
        first, count = self._preimages(w)
        rest = self.digits.div(count, rounding_mode="floor")
        digit = self.digits - rest * count
        self.digits = rest
        self.count -= 1
        return first + digit

    def _offset(self) -> int:
        """h, different in every step and spread evenly."""
        return self.count * 0x9E3779B97F4A7C15 % 2**64 * self.momentum.denominator >> 64

    def _preimages(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The first v with ⌊(n v + h)/d⌋ = w, ⌈(w d − h)/n⌉, and how many there are: until that of w + 1."""
        n, d = self.momentum.as_integer_ratio()
        quotient = w.div(n, rounding_mode="floor")
        scaled = (w - quotient * n) * d + (n - 1 - self._offset())
        below = scaled.div(n, rounding_mode="floor")
        above = scaled.add_(d).div_(n, rounding_mode="floor")
        return quotient * d + below, above - below
