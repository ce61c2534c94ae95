r"""A proof that no point is feasible, for programs whose rows can be broken at a price.

    min ½ Σ (tᵣ/ωᵣ)²   subject to   E x = f + t (first n_eq rows),   E x ≤ f + t (the others),   0 ≤ x ≤ u

always has a solution, and its duals y = t/ω² are zero only where the rows have a common point. Elsewhere they are the
Farkas certificate: with z, v, w ≥ 0 the duals of x ≥ 0, x ≤ u and of the inequalities, Eᵀy = z − v and

    fᵀy + uᵀv = −Σ (tᵣ/ωᵣ)² < 0.

A primal-dual interior point of m×m systems (Mehrotra): (E Θ Eᵀ + diag(ω² + s/w)) dy = r with Θ = (z/x + v/(u − x))⁻¹.
It only proposes y; whether y is a proof is for the caller to say, by its products with the data.

Source: Nocedal & Wright (2006), chapters 14 and 16; Farkas' lemma.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.kkt.quadratic import matvec, transposed_matvec
from implicit_layers.kkt.schur import Factor, factorise, gram

_MOST = 80  # iterations; 10 to 25 are usual
_TO_BOUNDARY = 0.99
_SHORTEST = 1e-10  # a shorter step means that the iteration is stuck
_MET = 1e-11  # rows broken by less than this, relative to ω, are met
_REFINE = 3  # refinement steps of a linear solve


class _Point(NamedTuple):
    """Primal and dual variables, or a change of them; every product is positive where its mask is true."""

    x: Tensor  # (N, n)
    z: Tensor  # (N, n): of x ≥ 0
    v: Tensor  # (N, n): of x ≤ u
    s: Tensor  # (N, m): the slack of an inequality
    y: Tensor  # (N, m): of the rows; of an inequality it is also w, the dual of s ≥ 0

    def moved(self, length: Tensor, step: _Point) -> _Point:
        """Go along a step; where the length is zero it may be anything."""
        return _Point(*(torch.where(length > 0, old + length * new, old) for old, new in zip(self, step, strict=True)))


class _Elastic(NamedTuple):
    """The programs, and which of their constraints are there."""

    E: Tensor  # (N or 1, m, n): columns of entries that can only be zero are zero
    f: Tensor  # (N, m)
    u: Tensor  # (N, n): one where there is no bound
    unit: Tensor  # (N, m): ω
    there: Tensor  # (N, n) bool: may be more than zero
    bounded: Tensor  # (N, n) bool
    inequality: Tensor  # (m,) bool
    total: Tensor  # (N,): how many products there are

    def room(self, x: Tensor) -> Tensor:
        """How far entries are from their bound; one where there is none."""
        return torch.where(self.bounded, self.u - x, 1.0)

    def mean(self, at: _Point) -> Tensor:  # -> (N, 1)
        """The mean of the products."""
        entry = torch.where(self.there, at.x * at.z, 0.0) + torch.where(self.bounded, self.room(at.x) * at.v, 0.0)
        slack = torch.where(self.inequality, at.s * at.y, 0.0)
        return ((entry.sum(-1) + slack.sum(-1)) / self.total.clamp(min=1)).unsqueeze(-1)

    def theta(self, at: _Point) -> Tensor:  # -> (N, n)
        """The curvature that the products leave to the entries of x, inverted."""
        return torch.where(self.there, 1 / (at.z / at.x + at.v / self.room(at.x)), 0.0)

    def factorise(self, at: _Point) -> Factor:
        """Factor the system of the duals."""
        elastic = self.unit**2 + torch.where(self.inequality, at.s / _positive(at.y), 0.0)
        null = self.E.new_zeros(1, self.E.shape[-2], self.E.shape[-2])
        return factorise(gram(self.E, self.theta(at), elastic), torch.ones_like(elastic), null)

    def step(self, factor: Factor, at: _Point, low: Tensor, high: Tensor, slack: Tensor) -> _Point:
        """Meet the rows and the dual equation, and change the products x z, (u − x) v and s w by these."""
        room, w, theta = self.room(at.x), _positive(at.y), self.theta(at)
        broken = matvec(self.E, at.x) + at.s - self.f - self.unit**2 * at.y
        pulled = transposed_matvec(self.E, at.y) - at.z + at.v - low / at.x + torch.where(self.bounded, high / room, 0)
        y = factor.solve(broken - matvec(self.E, theta * pulled) + torch.where(self.inequality, slack / w, 0), _REFINE)
        x = -theta * (transposed_matvec(self.E, y) + pulled)
        z = torch.where(self.there, (low - at.z * x) / at.x, 0.0)
        v = torch.where(self.bounded, (high + at.v * x) / room, 0.0)
        s = torch.where(self.inequality, (slack - at.s * y) / w, 0.0)
        return _Point(x, z, v, s, y)

    def longest(self, at: _Point, step: _Point) -> Tensor:  # -> (N, 1)
        """How much of the step leaves all factors of the products positive; one at most."""
        ratios = [
            torch.where(self.there, -step.x / at.x, 0.0),
            torch.where(self.there, -step.z / _positive(at.z), 0.0),
            torch.where(self.bounded, step.x / self.room(at.x), 0.0),
            torch.where(self.bounded, -step.v / _positive(at.v), 0.0),
            torch.where(self.inequality, -step.s / _positive(at.s), 0.0),
            torch.where(self.inequality, -step.y / _positive(at.y), 0.0),
        ]
        return 1 / torch.cat(ratios, dim=-1).amax(-1, keepdim=True).clamp(min=1.0)


def contradicted(
    E: Tensor,  # (N or 1, m, n)
    f: Tensor,  # (N, m)
    ub: Tensor,  # (N, n): inf where there is none
    inequality: Tensor,  # (m,) bool
    start: Tensor,  # (N, n): x > 0 of the size to expect
    unit: Tensor,  # (N, m): ω > 0
    proof: Callable[[Tensor], Tensor],  # (N, m) -> (N,) bool
) -> Tensor:  # -> (N,) bool
    """Tell which programs have a certificate that `proof` takes."""
    there = ub > 0
    bounded = torch.isfinite(ub) & there
    u = torch.where(bounded, ub, 1.0)
    count = there.sum(-1) + bounded.sum(-1) + inequality.sum()
    elastic = _Elastic(E * there.unsqueeze(-2).to(E.dtype), f, u, unit, there, bounded, inequality, count)
    x = torch.where(there, torch.where(bounded, torch.minimum(start, 0.5 * u), start), 1.0)
    z, v = torch.where(there, 1 / x, 0.0), torch.where(bounded, 1 / elastic.room(x), 0.0)
    at = _Point(x, z, v, torch.where(inequality, unit, 0.0), torch.where(inequality, 1 / unit, 0.0))
    proven = torch.zeros_like(count, dtype=torch.bool)
    done = count == 0
    for _ in range(_MOST):
        if checks.host_bool(done.all()):
            break
        factor, mean, room = elastic.factorise(at), elastic.mean(at), elastic.room(at.x)
        products = at.x * at.z, room * at.v, at.s * at.y
        affine = elastic.step(factor, at, *(-product for product in products))
        less = elastic.mean(at.moved(elastic.longest(at, affine), affine))
        target = mean * (less / mean).clamp(0.0, 1.0) ** 3
        second = affine.x * affine.z, -affine.x * affine.v, affine.s * affine.y
        step = elastic.step(factor, at, *(target - p - q for p, q in zip(products, second, strict=True)))
        length = _TO_BOUNDARY * elastic.longest(at, step)
        stuck = done | ~torch.stack([part.sum(-1) for part in step]).isfinite().all(0) | ~(length[:, 0] > _SHORTEST)
        at = at.moved(torch.where(stuck.unsqueeze(-1), 0.0, length), step)
        proven = proven | (~done & proof(at.y))
        broken = (matvec(elastic.E, at.x) + at.s - f).abs() / unit
        done = done | stuck | proven | (broken.amax(-1) <= _MET)
    return proven


def _positive(x: Tensor) -> Tensor:
    """x, or one where it is not positive."""
    return torch.where(x > 0, x, 1.0)
