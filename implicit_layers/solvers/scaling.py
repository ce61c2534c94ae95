r"""Transport plans with given marginals: P = exp(L + φ ⊕ ψ) with P1 = a and Pᵀ1 = b.

Sinkhorn's scaling first, over-relaxed (see `overrelaxation`). Where its rate of convergence says that this will take
long, Newton on the semi-dual: with φ(ψ) that gives the rows their sums, ψ has the convex objective −⟨a, φ(ψ)⟩ − ⟨b, ψ⟩
with gradient Pᵀ1 − b and Hessian S = diag(c) − Pᵀ diag(1/a) P. Far from the answer it follows a path from L = 0, where
P = a bᵀ/Σa, to L, one step back to the path and one along its tangent for each factorisation.

Source: Sinkhorn & Knopp (1967); Brauer, Clason, Lorenz & Wirth (2017), arXiv:1710.06635, for Newton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.kkt import balance
from implicit_layers.solution import Status
from implicit_layers.solvers.homotopy import LONGER, choose, shortened
from implicit_layers.solvers.overrelaxation import scale
from implicit_layers.solvers.overrelaxation_alone import scale_alone

_NEWTON_FIXED, _NEWTON_SIZE = 35.0, 7.0  # a Newton step costs as much as 35 + (the smaller side)/7 iterations; measured
_NEWTON_STEPS = 4.0  # as many there are near the answer
_NEAR, _STRAY = 0.3, 0.6  # relative errors between which the path is followed
_STEP = 20.0  # the largest change of a potential in one step: parts of a plan that hardly touch ask for any change
_TRIALS = 30
_IDLE = 20  # Newton steps without any gain after which rounding is all that is left
_OFFSET, _SMALL = 2.0, 60.0  # how large L may be to be rounded: next to its spread, and at all
_LOST, _BACK = 12, 0.02  # steps after which a move along the path has led astray, and how much of it is tried next
_NEWTON_LIMIT = 500  # a problem that takes more Newton steps than this will not be solved


class Plans(NamedTuple):
    """What a solve returns, one entry a problem."""

    P: Tensor  # (*B, n, m)
    phi: Tensor  # (*B, n), zero for rows of zeros
    psi: Tensor  # (*B, m), zero for columns of zeros
    status: Tensor  # (*B,) int8
    iterations: Tensor  # (*B,) int64
    residual: Tensor  # (*B,): Σ|P1 − a| + Σ|Pᵀ1 − b| over Σa


class Range(NamedTuple):
    """How far the data of all problems reach."""

    spread: float  # the largest L without the least, inf where an entry is forbidden
    least: float  # the smallest mass
    largest: float  # |L|

    @staticmethod
    def of(L: Tensor, a: Tensor, b: Tensor) -> Range:
        """Look, once."""
        if not L.numel():
            return Range(0.0, 1.0, 0.0)
        low, high, least = checks.host_floats(*torch.aminmax(L), torch.minimum(a.amin(), b.amin()))
        return Range(high - low if low > -math.inf else math.inf, least, max(abs(low), abs(high)))


class _Plan(NamedTuple):
    """The plan that a ψ gives, its rows exact."""

    P: Tensor  # (N, n, m)
    phi: Tensor  # (N, n)
    columns: Tensor  # (N, m): Pᵀ1
    value: Tensor  # (N,): the semi-dual objective


def _plan(L: Tensor, a: Tensor, b: Tensor, psi: Tensor) -> _Plan:
    """Normalise the rows of exp(L + ψ)."""
    logits = L + psi.unsqueeze(-2)
    top = logits.amax(-1)
    top = torch.where(torch.isfinite(top), top, 0.0)
    P = (logits - top.unsqueeze(-1)).exp_()
    total = P.sum(-1)
    there = (a > 0) & (total > 0)
    factor = torch.where(there, a / torch.where(there, total, 1.0), 0.0)
    P = P.mul_(factor.unsqueeze(-1))
    phi = torch.where(there, torch.where(there, factor, 1.0).log() - top, 0.0)
    return _Plan(P, phi, P.sum(-2), -(a * phi).sum(-1) - (b * psi).sum(-1))


def _taken(mask: Tensor, new: _Plan, old: _Plan) -> _Plan:
    """The new plans where the mask is true."""
    return _Plan(*(choose(mask, x, y) for x, y in zip(new, old, strict=True)))


def _error(plan: _Plan, a: Tensor, b: Tensor) -> Tensor:  # (N,)
    """How far the marginals are off, relative to the mass."""
    mass = a.sum(-1)
    off = (plan.P.sum(-1) - a).abs().sum(-1) + (plan.columns - b).abs().sum(-1)
    return off / torch.where(mass > 0, mass, 1.0)


def _relative(plan: _Plan, b: Tensor) -> Tensor:  # (N,)
    """The largest relative error of a column."""
    return ((plan.columns - b).abs() / torch.where(b > 0, b, 1.0)).amax(-1)


@dataclass(frozen=True)
class Scaling:
    """Sinkhorn's iterations, and Newton's where they are slow.

    Attributes:
        tol:      error of the marginals in the sum norm, relative to the mass.
        max_iter: cap on scaling iterations and Newton steps together.
        rounded:  whether L may be rounded to float32 where it is large, as if the costs were rounded once more.
    """

    tol: float
    max_iter: int
    rounded: bool = False

    def solve(self, L: Tensor, a: Tensor, b: Tensor, known: Range | None = None) -> Plans:
        """Solve all problems: L (*B, n, m), a (*B, n), b (*B, m), with the plan's mass that of a, to which b is scaled.

        −inf in L forbids an entry. `known`: the range of the data, where it has been looked at.
        """
        mass, other = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
        if L.shape[-1] > L.shape[-2]:
            found = self._solve(L.mT, b, a, other, mass, mass, known)
            return found._replace(P=found.P.mT, phi=found.psi, psi=found.phi)
        return self._solve(L, a, b, mass, other, mass, known)

    def _solve(
        self, L: Tensor, a: Tensor, b: Tensor, sum_a: Tensor, sum_b: Tensor, mass: Tensor, known: Range | None
    ) -> Plans:
        """The same with the smaller side second, the sums (*B, 1) and the mass that the plan is to have."""
        known = Range.of(L, a, b) if known is None else known
        forbidden, missing = known.spread == math.inf, known.least <= 0
        batch = L.shape[:-2]
        if batch.numel() != 1:
            flat = (x.reshape(batch.numel(), *x.shape[len(batch) :]) for x in (L, a, b, sum_a, sum_b, mass))
            L, a, b, sum_a, sum_b, mass = flat
        rows = columns = None
        if missing:
            rows, columns = a > 0, b > 0
            sum_a, sum_b = (torch.where(x > 0, x, 1.0) for x in (sum_a, sum_b))
            L = L.masked_fill(~(rows.unsqueeze(-1) & columns.unsqueeze(-2)), -torch.inf)
        a, b = a / sum_a, b / sum_b
        patience = _NEWTON_STEPS * (_NEWTON_FIXED + L.shape[-1] / _NEWTON_SIZE)
        problem = (L, a, b, mass, self.tol, self.max_iter, forbidden or missing, known.spread, patience)
        rounded = self.rounded and known.largest <= min(_OFFSET * known.spread, _SMALL)
        scaled = scale_alone(*problem, rounded=rounded) if batch.numel() == 1 else scale(*problem)
        P, phi, psi, iterations, residual = scaled.P, scaled.phi, scaled.psi, scaled.iterations, scaled.error
        infeasible = None
        if P is None or phi is None:
            if batch.numel() == 1:
                L, a, b, psi = (x.reshape(1, *x.shape[len(batch) :]) for x in (L, a, b, psi))
                iterations, residual, mass = iterations.reshape(1), residual.reshape(1), mass.reshape(1, 1)
            slow = residual > self.tol
            infeasible = torch.zeros_like(slow)
            if checks.host_bool(slow.any()):
                index = slow.nonzero().squeeze(-1)
                some = L[index], a[index], b[index]
                better, steps, none = self._newton(*some, psi[index], iterations[index], forbidden)
                psi[index], iterations[index], infeasible[index] = better, steps, none
            plan = _plan(L, a, b, psi)
            P, phi = plan.P.mul_(mass.unsqueeze(-1)), plan.phi + torch.where(mass > 0, mass, 1.0).log()
            residual = _error(plan, a, b)
            residual = torch.where(torch.isnan(residual), torch.inf, residual)
        # NaN is not converged
        status = (~(residual <= self.tol)).to(torch.int8)
        if infeasible is not None:
            status = torch.where(infeasible, int(Status.INFEASIBLE), status).to(torch.int8)
        phi, psi = balance.without_gauge(phi, psi, rows, columns)
        found = Plans(P, phi, psi, status, iterations, residual)
        if residual.shape == batch:
            return found
        return Plans(*(x.reshape((*batch, *x.shape[1:])) for x in found))

    def _newton(
        self, L: Tensor, a: Tensor, b: Tensor, psi: Tensor, iterations: Tensor, forbidden: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Newton on the semi-dual, from ψ or along the path: ψ, iterations, which have no plan."""
        columns = b > 0
        open_, flat = torch.isfinite(L), torch.where(torch.isfinite(L), L, 0.0)

        def on_path(gamma: Tensor) -> Tensor:
            return torch.where(open_, gamma[:, :, None] * flat, -torch.inf)

        plan = _plan(L, a, b, psi)
        start = torch.where(columns, torch.where(columns, b, 1.0).log(), 0.0)
        near = (_relative(plan, b) <= _NEAR).unsqueeze(-1)
        psi = torch.where(near, psi, start)
        gamma = near.to(b.dtype)
        plan = _plan(on_path(gamma), a, b, psi)
        reach = torch.ones_like(gamma)
        rho, error = _relative(plan, b), _error(plan, a, b)
        none = torch.zeros_like(rho, dtype=torch.bool)
        budget = (self.max_iter - iterations).clamp(max=_NEWTON_LIMIT)
        if forbidden:
            none = (
                none
                | contradicted(open_, a, b, torch.zeros_like(b))
                | contradicted(open_.mT, b, a, torch.zeros_like(a))
            )
        done = none | (budget <= 0)
        steps, idle = torch.zeros_like(iterations), torch.zeros_like(iterations)
        best, farthest = error.clone(), gamma[:, 0].clone()
        # where the path was left last, and by how much: a plan far from it may look near, since no error is above 1
        last_psi, last_gamma, last_move = psi, gamma, torch.zeros_like(gamma)
        longer = torch.full_like(gamma, LONGER)  # how the step along the path grows, less with each time it led astray
        since, turn = torch.zeros_like(iterations), 0
        while not checks.host_bool(done.all()):
            steps += ~done
            excess = b - plan.columns
            system = balance.Balance.of(plan.P)
            _, newton = system.solve(torch.zeros_like(a), excess, same_sums=True)
            longest = newton.abs().amax(-1, keepdim=True)
            newton = newton * torch.where(longest > _STEP, _STEP / torch.where(longest > _STEP, longest, 1.0), 1.0)
            following = (rho <= _NEAR).unsqueeze(-1) & (gamma < 1)
            turned = plan.P * flat
            turned = turned - plan.P * torch.where(a > 0, turned.sum(-1) / torch.where(a > 0, a, 1.0), 0.0).unsqueeze(
                -1
            )
            _, tangent = system.solve(torch.zeros_like(a), -turned.sum(-2), same_sums=True)
            ahead = torch.where(following, torch.minimum(1 - gamma, reach), 0.0)
            length = torch.ones_like(gamma)
            good = (gamma[:, 0] >= 1) & (error <= self.tol)
            waiting = ~done
            before = psi, gamma
            for trial in range(_TRIALS):
                moved = torch.where(columns, psi + length * newton + ahead * tangent, 0.0)
                further = gamma + ahead
                there = _plan(on_path(further), a, b, moved)
                new_rho, new_error = _relative(there, b), _error(there, a, b)
                slope = -(excess * (moved - psi)).sum(-1)
                noise = 1e-13 * ((a * plan.phi).abs().sum(-1) + (b * psi).abs().sum(-1))
                fine = there.value <= plan.value + 1e-4 * slope + noise
                fine = torch.where(ahead[:, 0] > 0, new_rho <= _STRAY, fine | (new_rho <= 0.5 * rho))
                fine = torch.where(good, new_error < error, fine)
                take = waiting & fine
                pick = take.unsqueeze(-1)
                stop = waiting & good & (~fine | (new_error > 0.25 * error))
                psi, gamma = torch.where(pick, moved, psi), torch.where(pick, further, gamma)
                reach = torch.where(pick & (ahead > 0), longer * ahead, reach)
                plan = _taken(take, there, plan)
                rho, error = torch.where(take, new_rho, rho), torch.where(take, new_error, error)
                done = done | stop
                waiting = waiting & ~fine & ~done
                if not checks.host_bool(waiting.any()):
                    break
                shrinking = ahead > 0
                length, ahead = shortened(length, ahead, gamma, trial)
                reach = torch.where(waiting.unsqueeze(-1) & shrinking, ahead.clamp(min=1e-6), reach)
            if forbidden:
                none = none | (~done & (contradicted(open_, a, b, newton) | contradicted(open_, a, b, psi)))
            gained = (error < best) | (gamma[:, 0] > farthest)
            idle = torch.where(gained, 0, idle + 1)
            best, farthest = torch.minimum(best, error), gamma[:, 0]
            done = done | none | (steps >= budget) | (idle >= _IDLE)
            left = gamma > before[1]
            last_psi, last_gamma = torch.where(left, before[0], last_psi), torch.where(left, before[1], last_gamma)
            last_move = torch.where(left, gamma - before[1], last_move)
            since, turn = torch.where(left[:, 0], 0, since + 1), turn + 1
            lost = ~done & (since >= _LOST) & (last_move[:, 0] > 0)
            if turn >= _LOST and checks.host_bool(lost.any()):
                pick = lost.unsqueeze(-1)
                psi, gamma = torch.where(pick, last_psi, psi), torch.where(pick, last_gamma, gamma)
                reach, longer = torch.where(pick, _BACK * last_move, reach), torch.where(pick, 2.0, longer)
                plan = _taken(lost, _plan(on_path(gamma), a, b, psi), plan)
                rho, error = _relative(plan, b), _error(plan, a, b)
                last_move = torch.where(pick, 0.0, last_move)
                since, idle = torch.where(lost, 0, since), torch.where(lost, 0, idle)
        return psi, iterations + steps, none


def contradicted(open_: Tensor, a: Tensor, b: Tensor, direction: Tensor) -> Tensor:  # (N,) bool
    """Whether some columns ask for more than the rows that may serve them have (Hall's condition fails).

    A set of columns can get no more than the rows hold that may serve any of them. The sets that are asked are those of
    the largest entries of a direction in which the semi-dual keeps falling.
    """
    found = torch.zeros_like(b[:, 0], dtype=torch.bool)
    spread = direction.amax(-1, keepdim=True) - direction.amin(-1, keepdim=True)
    for share in (0.5, 0.1, 0.9, 0.0):  # the last: all columns
        chosen = (direction >= direction.amin(-1, keepdim=True) + share * spread).to(b.dtype) * (b > 0)
        served = (open_ & (chosen > 0).unsqueeze(-2)).any(-1).to(a.dtype)
        found = found | ((b * chosen).sum(-1) > (1 + 1e-9) * (a * served).sum(-1))
    return found
