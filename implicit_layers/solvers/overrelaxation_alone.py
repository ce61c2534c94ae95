"""One transport plan by the over-relaxed iterations of `overrelaxation`, what is known of their pace kept on the host.

A small problem is overhead alone, so a look at the error is a dozen small operations and one read. A large one is
exponentials and memory traffic, so where float32 will do for K, it is made and, far from the answer, read in that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.solvers.overrelaxation import (
    AIM,
    FIRST,
    LATE,
    LOST,
    NEAR,
    ROUND,
    SLOWEST,
    WIDE,
    WORSE,
    Scaled,
    kernel,
)

_LARGE = 2**16  # entries of K from which reading fewer bytes pays for a copy of it
_WIDE_SINGLE = 25.0  # what WIDE is in float32
_SINGLE = 2e-6  # error that float32 can see


class _Pace(NamedTuple):
    """What is known of the convergence; `overrelaxation` has the same for many problems, as tensors."""

    omega: float | None = None  # None before anything is known
    since: int = 0  # looks since ω was changed
    error: float = math.inf
    least: float = math.inf  # the least error so far
    rate: float = 0.0  # to be expected of the iterations to come

    def after(self, count: int, error: float, slope: float) -> _Pace:
        """What `count` iterations tell; `slope` is the rate of the last plain iteration."""
        least = min(self.least, error)
        if self.omega is None:
            omega = _best(slope)
            return _Pace(omega, 0, error, least, omega - 1)
        omega, rate = self.omega, self.omega - 1
        observed = (error / self.error) ** (1 / count)
        if self.since >= 1 and observed < 1:  # the first look after a change sees what the change has stirred up
            if self.since >= 2 and observed > omega - 0.98:
                omega = max(omega, _best((observed + omega - 1) ** 2 / (observed * omega**2)))
                return _Pace(omega, 0, error, least, omega - 1)
            rate = max(observed, omega - 1)
        return _Pace(omega, self.since + 1, error, least, rate)

    def missing(self, goal: float) -> float:
        """How many more iterations it will take, by the rate."""
        if self.error <= goal or not 0 < self.rate < 1:
            return 0.0
        return math.log(goal / self.error) / math.log(self.rate)


class _Look(NamedTuple):
    """What one look at the iterates tells."""

    error: float  # Σ|P1 − a| + Σ|Pᵀ1 − b|, inf where it is no number
    slope: float  # the rate of the last plain iteration
    width: float  # the largest |log v|
    far: float  # the largest relative error of a column


class _Iterates:
    """K and the factors of the plan, in one dtype; where rows or columns may be absent, 1 stands for them."""

    def __init__(self, K: Tensor, a: Tensor, b: Tensor, odd: bool) -> None:
        self.K, self.KT, self.a, self.b = K, K.mT, a, b
        self.no_row = (a <= 0).to(a.dtype) if odd else None
        self.no_column = (b <= 0).to(b.dtype) if odd else None
        self.base: Tensor | None = None  # the part of ψ that K holds
        self.exact = True  # whether the rows have their sums
        self.off: Tensor | None = None  # ()-shaped: the error of the columns, once it was looked at

    def start(self, v: Tensor) -> None:
        """Go on from v, with the rows exact."""
        self.v = self.old = v
        self.t = self._rows()
        self.u = self.a / self.t
        self.s = torch.mv(self.KT, self.u)
        self.exact, self.off = True, None

    def _rows(self) -> Tensor:
        return torch.mv(self.K, self.v) if self.no_row is None else torch.addmv(self.no_row, self.K, self.v)

    def advance(self, count: int, omega: float | None, linear: bool) -> None:
        """That many iterations; plain ones leave the rows exact."""
        for _ in range(count):
            wanted = self.b / _with(self.s, self.no_column)
            if omega is None:
                self.old, self.v = self.v, wanted
                self.t = self._rows()
                self.u = self.a / self.t
            else:
                self.v = _relaxed(self.v, wanted, omega, linear, self.no_column)
                self.t = self._rows()
                self.u = _relaxed(self.u, self.a / self.t, omega, linear, self.no_row)
            self.s = torch.mv(self.KT, self.u)
        self.exact = omega is None

    def look(self, plain: bool) -> _Look:
        """Read what the iterations, plain ones or not, have come to."""
        columns, there = self.v * self.s, _with(self.v, self.no_column)
        ratio = _with(columns, self.no_column) / _with(self.b, self.no_column)
        self.off = torch.linalg.vector_norm(columns.sub_(self.b), 1)
        numbers = [self.off, *torch.aminmax(ratio), *torch.aminmax(there)]
        if plain:
            before = there / _with(self.old, self.no_column)
            numbers += [torch.dot(self.b, x.log().square_()) for x in (ratio, before)]
        else:
            numbers.append(torch.linalg.vector_norm((self.u * self.t).sub_(self.a), 1))
        error, low, high, narrow, wide, *rest = checks.host_floats(*numbers)
        error += 0.0 if plain else rest[0]
        slope = math.sqrt(rest[0] / rest[1]) if plain and rest[0] >= 0 and rest[1] > 0 else math.nan
        width = max(abs(math.log(narrow)), abs(math.log(wide))) if narrow > 0 and wide < math.inf else math.inf
        return _Look(error if math.isfinite(error) else math.inf, slope, width, max(high - 1, 1 - low))

    def finished(self) -> Tensor:  # ()
        """Make the rows exact, and tell the error of the columns."""
        if not self.exact or self.off is None:
            self.start(self.v)
            self.off = torch.linalg.vector_norm((self.v * self.s).sub_(self.b), 1)
        return self.off

    def psi(self) -> Tensor:
        """Give log v, with what K holds of it."""
        growth = _with(self.v, self.no_column).log()
        return growth if self.base is None else self.base + growth

    def absorb(self, L: Tensor, odd: bool) -> None:
        """Put all of ψ into K."""
        self.base = self.psi()
        _, self.K = kernel(L + self.base, odd)
        self.KT = self.K.mT
        self.start(torch.ones_like(self.v))


class _Progress(NamedTuple):
    """Where the iterations are, and what the last look told."""

    pace: _Pace
    used: int
    seen: _Look | None = None

    def through(
        self, work: _Iterates, goal: float, max_iter: int, patience: float, wide: float, L: Tensor | None, odd: bool
    ) -> _Progress:
        """Iterate to the goal, or to where there is no patience; v beyond `wide` goes into K, made anew of L."""
        pace, used, seen = self
        count = FIRST if seen is None else max(1, math.ceil(pace.missing(goal)))
        limit = math.inf
        while used < max_iter:
            count = min(count, ROUND, max_iter - used)
            plain = pace.omega is None
            work.advance(count, pace.omega, seen is not None and seen.far < NEAR)
            used += count
            seen = work.look(plain)
            if seen.error == math.inf or seen.width >= 2 * wide:
                break
            pace = pace.after(count, seen.error, seen.slope)
            if seen.error > WORSE * pace.least or seen.error <= goal:
                break
            longest = pace.missing(goal)
            if limit == math.inf:
                limit = used + LATE * longest + 2 * ROUND
            if longest > min(patience if seen.error < 1e-2 else 4 * patience, max_iter - used):
                break
            if used > limit and longest > ROUND:
                break
            count = max(2, math.ceil(longest))
            if seen.width > wide:
                if L is None:
                    break
                work.absorb(L, odd)
        return _Progress(pace, used, seen)


def scale_alone(
    L: Tensor,  # (*B, n, m)
    a: Tensor,  # (*B, n)
    b: Tensor,  # (*B, m)
    mass: Tensor,  # (*B, 1)
    tol: float,
    max_iter: int,
    odd: bool,
    spread: float,
    patience: float,
    rounded: bool = False,
) -> Scaled:
    """Iterate until it is done, or needs more iterations than there is patience; see `overrelaxation.scale`.

    There is one problem in *B, which the shapes of what is returned keep. `rounded`: L may
    be rounded to float32, and its exponentials are no problem there.
    """
    batch, (n, m) = L.shape[:-2], L.shape[-2:]
    L_one, a_one, b_one = L.reshape(n, m), a.reshape(n), b.reshape(m)
    aim, state, v = AIM * tol, _Progress(_Pace(), 0), None
    if rounded and not odd and n * m >= _LARGE:
        single = L.float().exp_()
        top, plan = torch.zeros_like(a), single.double()
        work = _Iterates(single.reshape(n, m), a_one.float(), b_one.float(), odd)
        work.start(torch.ones_like(work.b))
        state = state.through(work, max(aim, _SINGLE), max_iter, patience, _WIDE_SINGLE, None, odd)
        if state.seen is not None and state.seen.width < 2 * _WIDE_SINGLE and state.seen.error < math.inf:
            state, v = state._replace(pace=state.pace._replace(since=0, least=math.inf)), work.v.double()
        else:  # float32 was not enough
            state = _Progress(_Pace(), state.used)
    else:
        top, plan = kernel(L, odd)
    K = plan.reshape(n, m)
    work = _Iterates(K, a_one, b_one, odd)
    work.start(torch.ones_like(b_one) if v is None else v)
    state = state.through(work, aim, max_iter, patience, WIDE, L_one, odd)
    seen = state.seen
    error = math.inf if seen is None else seen.error
    P = phi = None
    if odd or spread >= LOST or work.base is not None or error > tol:
        residual = b.new_full(batch, error)
    else:
        residual = work.finished().reshape(batch)
        u = work.u.reshape(a.shape) * mass
        P, phi = plan.mul_(u.unsqueeze(-1)).mul_(work.v), u.log() - top
    psi = work.psi().reshape(b.shape)
    psi = torch.where(psi.isfinite() & (b > 0), psi, 0.0) if P is None else psi
    return Scaled(psi, torch.full(batch, state.used, device=b.device), residual, P, phi)


def _with(x: Tensor, absent: Tensor | None) -> Tensor:
    """x, and 1 where it is absent."""
    return x if absent is None else x + absent


def _relaxed(x: Tensor, wanted: Tensor, omega: float, linear: bool, absent: Tensor | None) -> Tensor:
    """From x to what is wanted, and beyond by ω − 1."""
    if linear:
        return torch.lerp(x, wanted, omega)
    return x * (_with(wanted, absent) / _with(x, absent)) ** omega


def _best(eta: float) -> float:
    """The ω for a plain rate η."""
    return 2 / (1 + math.sqrt(1 - min(max(eta, 0.0), SLOWEST))) if math.isfinite(eta) else 1.0
