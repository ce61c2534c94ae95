r"""Newton on the dual of an entropy-regularised linear program, along a path of scores that starts at a centre.

    max θᵀx + H(x)   subject to   E x = f (first n_eq rows),   E x ≤ f (the others),   0 ≤ x ≤ u

has x = ψ(t) entry by entry with t = θ − Eᵀη, and the dual objective D(η) = fᵀη + Σᵢ Ψ(tᵢ) with Ψ' = ψ, ∇D = f − E x,
∇²D = E W Eᵀ with W = diag ψ'(t). Only t is stored, never log x of a rounded x, and x stays positive by itself.

    hard slack       ψ(t) = min(exp(t − 1), u);   rows of E x ≤ f have η ≥ 0, and η = 0 where there is slack
    entropic slack   ψ(t) = u σ(t) for finite u;  a row's slack is s = exp(−η − 1) and is added to E x

Any other separable strictly concave term in place of H gives another ψ (`Maps`), and the same iterations.

With θ far apart (small temperatures) Newton from a cold start crawls, so the scores move to θ from flat ones, γ from
0 to 1: every iteration is one factorisation, one Newton step back to the path, and one step along its tangent, as long
as the constraints are still met to within a factor. Where D has no minimum, the iterates run off along a direction
that proves that no point is feasible (`Programs.contradicted`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.kkt.quadratic import matvec, transposed_matvec
from implicit_layers.kkt.schur import factorise, gram
from implicit_layers.solution import Status
from implicit_layers.solvers import elastic
from implicit_layers.solvers.homotopy import LONGER, choose, shortened

_NEAR = 0.3  # relative residual from which on the path is followed
_CLOSE = 0.1  # and the Newton decrement, relative to the curvature
_STRAY, _STRAY_SMOOTH = 0.6, 0.1  # the most that a step along the path may leave; sigmoids hide much of it
_PER_SCORE = 0.003  # iterations that hard bounds ask for at least, per unit of the spread of the scores; measured
_LONG = 40  # iterations from which on a problem is asked, once, whether it has a feasible point at all
_HOPELESS = 200  # iterations after which a problem is given up that asks for more than there are
_DAMPING = 1e-2  # curvature lent to entries at their bounds, relative to the residual and to that without bounds
_SMALL = 1e-3  # residual from which on a smaller one is progress, whatever rounding makes of the objective
_TRIALS = 40  # of the line search
_FLOOR = 1e-5  # rows smaller than this, next to the largest that they share entries with, are judged by it
_PROOF = 1e-10  # relative size from which on a gap is a contradiction and not rounding
_FAR = 1e8  # an entry this many times larger than the right-hand sides of its rows is none
_ABSOLUTE = 1e-8  # the most that a row of entries up to one may be off, relative to 1 + |f|, however large x is
_SAME_ROWS = 1e-13  # eigenvalue of unit rows' inner products from which on the rows are independent
_WEAK = 1e-9  # relative size below which a dual and a slack are both zero


class Maps(Protocol):
    """A regulariser Σ φ(xᵢ), to be subtracted, in place of −H."""

    def primal(self, t: Tensor, /) -> Tensor:
        """The inverse of φ'."""

    def value(self, x: Tensor, /) -> Tensor:
        """φ."""

    def slope(self, x: Tensor, /) -> Tensor:
        """φ', inside the bounds of x."""

    def weights(self, x: Tensor, /) -> Tensor:
        """1/φ'', zero where x is at a bound."""


class Point(NamedTuple):
    """The primal at some duals, and what Newton needs of it."""

    x: Tensor  # (N, n)
    weight: Tensor  # (N, n): ψ'(t)
    slack: Tensor  # (N, m): the slack that has entropy, else 0
    excess: Tensor  # (N, m): E x + slack − f = −∇D
    size: Tensor  # (N, m): |E| x + slack + |f|, what the excess is measured against
    value: Tensor  # (N,): D
    lent: Tensor  # (N, n): a weight in reserve, for where too few entries have one


class Sizes(NamedTuple):
    """How large a solution may be expected to be."""

    entries: Tensor  # (N, n)
    rows: Tensor  # (N, m): their terms


class Programs(NamedTuple):
    """A batch of programs, rows of largest entry one; leading dimension N, or 1 for an E that all share."""

    theta: Tensor  # (N, n)
    E: Tensor  # (N or 1, m, n)
    f: Tensor  # (N, m)
    ub: Tensor  # (N, n), inf where there is none, 0 where the constraints leave nothing else
    scale: Tensor  # (N or 1, m): what the rows were divided by
    n_eq: int
    entropic: bool
    maps: Maps | None = None  # None: entropy
    usual: Tensor | None = None  # (N, n): the weights at the start

    def inequality(self) -> Tensor:  # (m,)
        """Which rows are inequalities."""
        return torch.arange(self.f.shape[-1], device=self.f.device) >= self.n_eq

    def at(self, t: Tensor, eta: Tensor) -> Point:  # (N, n), (N, m)
        """Evaluate at t = θ − Eᵀη for the θ of the path."""
        if self.maps is not None:
            return self._at(self.maps, t, eta)
        bounded = torch.isfinite(self.ub)
        u = torch.where(bounded, self.ub, 0.0)
        free = (t - 1).exp()
        if self.entropic:
            share = torch.sigmoid(t)
            x = torch.where(bounded, u * share, free)
            weight = torch.where(bounded, u * share * torch.sigmoid(-t), free)
            potential = torch.where(bounded, u * torch.nn.functional.softplus(t), free)
        else:
            capped = bounded & (free > u)
            x = torch.where(capped, u, free)
            weight = torch.where(capped, 0.0, free)
            above = t - 1 - u.clamp(min=torch.finfo(u.dtype).tiny).log()
            potential = torch.where(capped, u * (1 + above), free)
        slack = torch.zeros_like(eta)
        value = (self.f * eta).sum(-1) + potential.sum(-1)
        if self.entropic and self.n_eq < eta.shape[-1]:
            exponential = torch.where(self.inequality(), (-eta / self.scale - 1).exp(), 0.0)
            slack = exponential / self.scale
            value = value + exponential.sum(-1)
        excess = matvec(self.E, x) + slack - self.f
        size = matvec(self.E.abs(), x) + slack + self.f.abs()
        return Point(x, weight, slack, excess, size, value, x)

    def _at(self, maps: Maps, t: Tensor, eta: Tensor) -> Point:  # (N, n), (N, m)
        """The same for another regulariser than entropy: Ψ(t) = t x − φ(x)."""
        free = maps.primal(t)
        capped = free >= self.ub
        x = torch.where(capped, self.ub, free)
        weight = torch.where(capped, 0.0, maps.weights(x))
        possible = self.ub > 0
        inside = torch.where(possible, x, 1.0)
        potential = torch.where(possible, t * inside - maps.value(inside), 0.0)
        excess = matvec(self.E, x) - self.f
        size = matvec(self.E.abs(), x) + self.f.abs()
        lent = weight if self.usual is None else torch.where(possible, torch.maximum(weight, self.usual), 0.0)
        return Point(x, weight, torch.zeros_like(eta), excess, size, (self.f * eta).sum(-1) + potential.sum(-1), lent)

    def residual(self, point: Point, eta: Tensor, sizes: Sizes) -> Tensor:  # (N,)
        """Measure the largest violation, row by row relative to the terms of the row."""
        largest = torch.minimum(point.size.amax(-1, keepdim=True), sizes.rows)
        size = torch.maximum(point.size, torch.minimum(_FLOOR * largest, 1 + self.f.abs()))  # as in `broken`
        relative = point.excess / size.clamp(min=torch.finfo(size.dtype).tiny)
        if not self.entropic:  # an inequality with slack must have no dual; the dual is in the unit of log x
            relative = torch.where(self.inequality() & (relative < 0), torch.minimum(-relative, eta), relative)
        return torch.where(torch.isnan(relative), torch.inf, relative.abs()).amax(-1)

    def broken(self, point: Point) -> Tensor:  # (N,)
        """Measure the largest violation relative to 1 + |f|: where x is huge, small next to x need not be small."""
        excess = point.excess.abs()
        if not self.entropic:
            excess = torch.where(self.inequality(), point.excess.clamp(min=0.0), excess)
        return torch.where(torch.isnan(excess), torch.inf, excess / (1 + self.f.abs())).amax(-1)

    def sizes(self) -> Sizes:
        """What the right-hand sides and bounds say of the size of a solution.

        Rows that share no entry, not even by way of other rows, are programs of their own and have a size of their own.
        """
        touched = (self.E != 0).to(self.E.dtype)
        together = touched @ touched.mT
        for _ in range(self.f.shape[-1].bit_length()):
            together = ((together @ together) > 0).to(self.E.dtype)
        rows = (together * self.f.abs().unsqueeze(-2)).amax(-1).maximum(self.f.abs())
        entries = transposed_matvec(touched, rows) / touched.sum(-2).clamp(min=1)  # of rows that have the same size
        return Sizes(torch.minimum(entries, self.ub), rows)

    def contradicted(self, direction: Tensor, sizes: Sizes) -> Tensor:  # (N, m) -> (N,) bool
        """Whether the direction d proves that no point is feasible (Farkas).

        For 0 ≤ x ≤ u with E x = f (≤ f where d ≥ 0):  fᵀd ≥ (Eᵀd)ᵀx ≥ −Σ uᵢ max(0, −(Eᵀd)ᵢ). Where the left-hand
        side is smaller than the right, by more than rounding, there is no such x. An entry without a bound must have
        (Eᵀd)ᵢ ≥ 0; where it is negative, x would have to be larger than the gap over it, which no data of this size ask
        for.
        """
        d = torch.where(self.inequality(), direction.clamp(min=0.0), direction)
        d = d / d.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(d.dtype).tiny)
        pulled, terms = transposed_matvec(self.E, d), transposed_matvec(self.E.abs(), d.abs())
        bounded = torch.isfinite(self.ub)
        falls = (-pulled).clamp(min=0.0)
        reach = (torch.where(bounded, self.ub, 0.0) * falls).sum(-1)
        gap = -(self.f * d).sum(-1) - reach
        noise = _PROOF * ((sizes.rows * d.abs()).sum(-1) + reach)
        open_falls = torch.where(bounded, 0.0, (falls - 8 * torch.finfo(d.dtype).eps * terms).clamp(min=0.0))
        far = _FAR * (sizes.entries * open_falls).amax(-1) <= gap
        return (gap > noise) & far & torch.isfinite(gap)

    def hopeless(self, index: Tensor, start: Tensor) -> Tensor:  # (k,), (N, n) -> (k,) bool
        """Whether the programs of `index` are proven to have no feasible point, by those whose rows can be broken."""
        some = self._take(index)
        sizes = some.sizes()
        unit = torch.where(sizes.rows > 0, sizes.rows, 1.0)
        x = torch.minimum(start[index].clamp(min=torch.finfo(unit.dtype).tiny), _positive(sizes.entries))

        def proof(y: Tensor) -> Tensor:
            return some.contradicted(y, sizes)

        return elastic.contradicted(some.E, some.f, some.ub, some.inequality(), x, unit, proof)

    def _take(self, index: Tensor) -> Programs:
        """Keep some programs; what all share stays shared."""

        def pick(t: Tensor) -> Tensor:
            return t if t.shape[0] == 1 else t[index]

        usual = None if self.usual is None else pick(self.usual)
        theta, E, f, ub, scale = (pick(t) for t in self[:5])
        return Programs(theta, E, f, ub, scale, self.n_eq, self.entropic, self.maps, usual)


class Dual(NamedTuple):
    """What a solve returns, one entry a program; duals in the unit of the caller's rows divided by the temperature."""

    x: Tensor  # (N, n)
    eta: Tensor  # (N, m)
    active: Tensor  # (N, m): 1 on rows that hold with equality or have an entropic slack, else 0
    status: Tensor  # (N,) int8
    iterations: Tensor  # (N,) int64
    residual: Tensor  # (N,)
    weak: Tensor  # (N,) bool: some inequality has neither a dual nor a slack, or held rows depend on each other


@dataclass(frozen=True)
class DualNewton:
    """Follow the path from flat scores to the given ones.

    Attributes:
        tol:      relative residual of the constraints, row by row.
        max_iter: cap on the factorisations.
    """

    tol: float
    max_iter: int

    def solve(
        self,
        programs: Programs,
        start: Tensor,  # (N, n)
        null: Tensor,  # (N or 1, m, m)
        impossible: Tensor,  # (N,) bool
    ) -> Dual:
        """Solve all programs but the impossible; `start` is t at the centre, `null` projects on what no x feels."""
        theta, E, f, ub, scale, _, entropic, _, _ = programs
        batch = f.shape[0]
        inequality = programs.inequality()
        away = theta - start
        eta, gamma = torch.zeros_like(f), f.new_zeros(batch, 1)
        reach = torch.ones_like(gamma)  # of the next step along the path
        shortest = (1e-2 / away.abs().amax(-1, keepdim=True).clamp(min=1e-2)).clamp(max=1e-6)
        sizes = programs.sizes()
        point = programs.at(start, eta)
        rho = programs.residual(point, eta, sizes)
        damping = torch.zeros_like(gamma)
        stray = torch.where(torch.isfinite(ub).any(-1) & entropic, _STRAY_SMOOTH, _STRAY)
        iterations = torch.zeros(batch, dtype=torch.int64, device=f.device)
        capped = (torch.isfinite(ub) & (ub > 0)).any(-1) & (not entropic)
        needed = torch.where(capped, _PER_SCORE * away.abs().amax(-1), 0.0)
        budget = torch.where(needed > self.max_iter, min(_HOPELESS, self.max_iter), self.max_iter)
        infeasible = impossible | programs.contradicted(-matvec(null, f), sizes)
        done, asked = infeasible.clone(), torch.zeros_like(infeasible)
        centre = point.x
        for count in range(self.max_iter):
            if checks.host_bool(done.all()):
                break
            if count == _LONG:
                asked = ~done
                infeasible = infeasible | self._hopeless(programs, asked, centre)
                done = done | infeasible
            iterations += ~done
            excess = point.excess
            bound = inequality & (eta <= rho.clamp(max=1e-3).unsqueeze(-1)) & (excess < 0)
            if entropic:
                bound = torch.zeros_like(bound)
            kept = torch.where(bound, 0.0, 1.0)
            good = (gamma[:, 0] >= 1) & (rho <= self.tol)
            share = torch.maximum(damping, _DAMPING * rho.clamp(max=1.0).unsqueeze(-1))
            weight = torch.maximum(point.weight, torch.where(good.unsqueeze(-1), 0.0, share) * point.lent)
            system = gram(E, weight, point.slack / scale)
            factor = factorise(system, kept, null)
            newton = torch.where(bound, excess / _positive(system.diagonal(dim1=-2, dim2=-1)), factor.solve(excess))
            mass = point.weight.sum(-1) + point.slack.sum(-1)
            decrement = (excess * torch.where(bound, 0.0, newton)).sum(-1)
            on_path = ((rho <= _NEAR) & (decrement <= _CLOSE * mass) & (gamma[:, 0] < 1)).unsqueeze(-1)
            tangent = factor.solve(kept * matvec(E, point.weight * away))
            lost = ~done & (rho > _NEAR)
            proofs = programs.contradicted(newton, sizes) | programs.contradicted(eta + newton, sizes)
            infeasible = infeasible | (lost & proofs)
            done = done | infeasible
            ahead = torch.where(on_path, torch.minimum(1 - gamma, reach), 0.0)
            length = torch.ones_like(gamma)
            waiting = ~done
            for trial in range(_TRIALS):
                moved = eta + length * newton + ahead * tangent
                if not entropic:
                    moved = torch.where(inequality, moved.clamp(min=0.0), moved)
                further = gamma + ahead
                there = programs.at(start + further * away - transposed_matvec(E, moved), moved)
                error = programs.residual(there, moved, sizes)
                slope = -(excess * (moved - eta)).sum(-1)
                noise = 1e-13 * ((f * eta).abs().sum(-1) + point.value.abs())
                fine = torch.isfinite(there.value) & (there.value <= point.value + 1e-4 * slope + noise)
                fine = torch.where(ahead[:, 0] > 0, error <= stray, fine | (error <= 0.5 * rho.clamp(max=_SMALL)))
                fine = torch.where(good, error < rho, fine)
                take = waiting & fine
                stop = waiting & good & (~fine | (error > 0.25 * rho))
                pick = take.unsqueeze(-1)
                eta, gamma = torch.where(pick, moved, eta), torch.where(pick, further, gamma)
                reach = torch.where(pick & (ahead > 0), LONGER * ahead, reach)
                point = Point(*(choose(take, new, old) for new, old in zip(there, point, strict=True)))
                rho = torch.where(take, error, rho)
                done = done | stop
                waiting = waiting & ~fine & ~done
                if not checks.host_bool(waiting.any()):
                    break
                shrinking = ahead > 0
                length, ahead = shortened(length, ahead, gamma, trial)
                reach = torch.where(waiting.unsqueeze(-1) & shrinking, torch.maximum(ahead, shortest), reach)
            done = done | (iterations >= budget)
            jammed = length < 0.2
            damping = torch.where(jammed, (10 * damping).clamp(min=1e-3), 0.1 * damping)
        failed = ~((gamma[:, 0] >= 1) & (rho <= self.tol))
        infeasible = infeasible | self._hopeless(programs, failed & ~infeasible & ~asked, centre)
        broken = programs.broken(point)
        rho = torch.where(broken > max(self.tol, _ABSOLUTE), torch.maximum(rho, broken), rho)
        solved = (gamma[:, 0] >= 1) & (rho <= self.tol) & (broken <= max(self.tol, _ABSOLUTE)) & ~infeasible
        status = torch.where(solved, int(Status.CONVERGED), int(Status.NOT_CONVERGED))
        status = torch.where(infeasible, int(Status.INFEASIBLE), status).to(torch.int8)
        eta = eta - matvec(null, eta)
        held = ~inequality | (eta > 0) if not entropic else torch.ones_like(f, dtype=torch.bool)
        tight = point.excess.abs() <= _WEAK * point.size
        weak = inequality & ~torch.tensor(entropic, device=f.device) & tight & (eta <= _WEAK)
        kinked = weak.any(-1)
        if not entropic and checks.host_bool((inequality & held).any()):
            kinked = kinked | _dependent(E, held, null)
        return Dual(point.x, eta / scale, held.to(f.dtype), status, iterations, rho, kinked)

    @staticmethod
    def _hopeless(programs: Programs, asked: Tensor, centre: Tensor) -> Tensor:  # (N,), (N, n) -> (N,) bool
        """Which of those asked about are proven infeasible."""
        verdict = torch.zeros_like(asked)
        if checks.host_bool(asked.any()):
            index = asked.nonzero().squeeze(-1)
            verdict[index] = programs.hopeless(index, centre)
        return verdict


def _dependent(E: Tensor, held: Tensor, null: Tensor) -> Tensor:  # (N or 1, m, n), (N, m), (N or 1, m, m) -> (N,)
    """Whether the held rows depend on each other, other than equality rows among themselves."""
    length = torch.linalg.vector_norm(E, dim=-1, keepdim=True)
    unit = E / _positive(length) * held.unsqueeze(-1)
    gaps = torch.diag_embed(torch.where((length[..., 0] > 0) & held, 0.0, 1.0).to(E.dtype))
    vanish = torch.linalg.eigvalsh(unit @ unit.mT + gaps) <= _SAME_ROWS * E.shape[-2]
    empty = (held & (length[..., 0] == 0)).sum(-1)  # rows of zeros, which `null` counts too
    known = null.diagonal(dim1=-2, dim2=-1).sum(-1).round()
    return vanish.sum(-1) + empty > known


def _positive(x: Tensor) -> Tensor:
    """x, or one where it is zero."""
    return torch.where(x > 0, x, 1.0)
