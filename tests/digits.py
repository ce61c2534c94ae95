"""Entmax and its relatives in many digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath


def root(function: Callable[[Any], tuple[Any, Any]], low: Any, high: Any, width: Any) -> Any:
    """Where an increasing function changes its sign between two points, from above and to within the width.

    Newton's steps where they stay between the points, halving otherwise; what ends it is what ends bisection: the
    function is negative at one point, not at the other, and they are that close.

    Args:
        function: x -> its value and its slope.
    """
    x = (low + high) / 2
    for _ in range(5000):
        value, slope = function(x)
        low, high = (x, high) if value < 0 else (low, x)
        if high - low <= width:
            return high
        step = -value / slope if slope > 0 else mpmath.inf
        beyond = width / 4 if value < 0 else -width / 4  # over the root, so that the other point follows
        x = x + step + beyond
        if not low < x < high:
            x = (low + high) / 2
    raise AssertionError(f"no root between {low} and {high}")


def entmax(x: list[Any], alpha: float, k: float = 1, tau: float = 1, digits: int = 300) -> list[Any]:
    """yᵢ = [(α − 1)(xᵢ − ν)/τ]₊^{1/(α − 1)} with Σy = k, by its root in many digits; x are mpmath numbers."""
    with mpmath.workdps(digits):
        d, top = mpmath.mpf(alpha) - 1, max(x)

        def excess(q: Any) -> tuple[Any, Any]:
            inside = [p for p in (q - d * (top - v) / tau for v in x) if p > 0]
            powers = [p ** (1 / d) for p in inside]
            return sum(powers) - k, sum(y / p for y, p in zip(powers, inside, strict=True)) / d

        q = root(excess, mpmath.mpf(0), mpmath.mpf(k) ** d, mpmath.mpf(2) ** (-13 * digits // 4))
        return [max(q - d * (top - v) / tau, 0) ** (1 / d) for v in x]
