r"""Strictly convex programs in the dual form: an m x m interior point, ended by a verified active set.

With Q = L Lᵀ and z eliminated, the slack s = h − Gz is an affine function of the inequality dual, s = R λ + w, with R
the Schur complement of the constraints projected off the equalities. The program is the complementarity problem

    s = R λ + w,   λ ≥ 0,   s ≥ 0,   λ ∘ s = 0,

and an iteration is one Cholesky factorisation of R + diag(s/λ) with two right-hand sides. Rows are scaled to unit
diagonal, so the iteration is blind to the units of z, of the cost and of every row.

The interior point is only a way to find which rows are active; the answer is the verified solve on them (`active_set`).
So the solution is exact to rounding and its factor is the one that the derivatives need: the last interior-point
factor would be far too inaccurate for them. Where there are not many more rows than unknowns, a cheaper way is tried
first (`dual_search`), and the interior point goes on with the programs for which that does not end.

Source: Mehrotra (1992), SIAM J. Optim. 2(4); Nocedal & Wright (2006), chapter 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.kkt import quadratic
from implicit_layers.solvers import dual_search
from implicit_layers.solvers.active_set import Answers, Program


class _Phase(NamedTuple):
    """How far to follow the central path before trying the active set, and how."""

    measure: float  # duality measure to reach
    tol: float  # relative residual to accept, where the solver's own is larger
    sign_tol: float  # on the signs of duals and slacks
    refine: int  # refinement steps of the active-set solve
    balanced: bool  # how the active rows are guessed
    dependent: bool  # whether to look for active rows that depend on each other


_PHASES = (
    _Phase(1e-3, 1e-12, 1e-14, 1, balanced=True, dependent=False),
    _Phase(1e-6, 1e-12, 1e-14, 1, balanced=False, dependent=False),
    _Phase(1e-9, 1e-12, 1e-13, 2, balanced=True, dependent=False),
    _Phase(1e-12, 1e-11, 1e-12, 4, balanced=False, dependent=True),
    _Phase(1e-15, 1.0, 1e-10, 4, balanced=True, dependent=True),
)
_FEW_ROWS = 1.5  # inequality rows for each unknown, up to which a search mostly ends
_TO_BOUNDARY = 0.995
_SHORTEST = 1e-8  # a shorter step means that the iteration is stuck


def solve(program: Program, batch: int, *, tol: float, max_iter: int, start: Tensor | None = None) -> Answers:
    """Solve a batch of programs with Q positive definite and all of f finite; `start`: active rows to try first."""
    answers = Answers(program, batch)
    if batch:
        if program.E.shape[-2] == program.n_eq:
            _solve_equalities(program, answers, tol)
        else:
            _solve_inequalities(program, answers, tol, max_iter, start)
    return answers


def _solve_equalities(program: Program, answers: Answers, tol: float) -> None:
    """One solve; where the rows depend on each other, one more with a ridge."""
    index = torch.arange(answers.z.shape[0], device=answers.z.device)
    every = torch.ones_like(answers.y)
    left = answers.settle(program, index, every, answers.y, tol=tol, sign_tol=0.0, refine=3, rounds=1)
    if left.numel():
        part, every = program.take(left), every[left]
        still = answers.settle_dependent(part, left, every, answers.y[left], tol=tol)
        part = part.take(still)
        contradiction = part.reduced.violation.expand(still.shape[0], -1) * part.reduced.scale
        answers.give_up(part, left[still], every[still], contradiction, tol=tol)


def _solve_inequalities(program: Program, answers: Answers, tol: float, max_iter: int, start: Tensor | None) -> None:
    """Follow the central path in phases; after each, settle what can be settled and go on with the rest."""
    path = _CentralPath(program, answers.z.shape[0])
    if start is not None:
        first = _PHASES[0]
        zero, tol_first = torch.zeros_like(start), min(tol, first.tol)
        left = answers.settle(
            program, path.index, start, zero, tol=tol_first, sign_tol=first.sign_tol, refine=first.refine
        )
        path.keep(left)
        program = path.program
    if path.index.numel() and path.w.shape[-1] <= _FEW_ROWS * program.Q.shape[-1]:
        _settle_found(path, answers, tol, max_iter)
        if not path.index.numel():
            return
    inside = path.inside[path.index].nonzero().squeeze(-1)
    if inside.numel():
        equalities = path.equality.expand(inside.shape[0], -1)
        part = path.program.take(inside)
        left = answers.settle(part, path.index[inside], equalities, equalities, tol=tol, sign_tol=1e-12)
        path.keep(_without(path.index.shape[0], inside, left))
    if path.index.numel():
        path.begin()
    for phase in _PHASES:
        if not path.index.numel():
            return
        path.advance(phase.measure, max_iter)
        answers.steps = path.steps
        if path.index.shape[0] == answers.iterations.shape[0]:
            answers.iterations = path.iterations
        else:
            answers.iterations[path.index] = path.iterations
        guess, duals = path.active(balanced=phase.balanced), path.duals()
        left = answers.settle(
            path.program,
            path.index,
            guess,
            duals,
            tol=min(tol, phase.tol),
            sign_tol=phase.sign_tol,
            refine=phase.refine,
        )
        guess, duals = guess[left], duals[left]
        path.keep(left)
        if phase.dependent and left.numel():
            left = answers.settle_dependent(path.program, path.index, guess, duals, tol=tol)
            guess, duals = guess[left], duals[left]
            path.keep(left)
    if path.index.numel():
        answers.give_up(path.program, path.index, guess, duals, tol=tol)


def _settle_found(path: _CentralPath, answers: Answers, tol: float, max_iter: int) -> None:
    """Search for the active sets from nothing, settle those found and go on with the rest."""
    first, program, index = _PHASES[0], path.program, path.index
    held, rounds, ended, made = dual_search.search(path.R, path.w, max_iter)
    rounds = rounds.masked_fill_(path.inside[index], 0)  # nothing is held there
    if ended is not None:
        if not ended.numel():
            return
        program, index, held, rounds = program.take(ended), index[ended], held[ended], rounds[ended]
    guess = path.with_equalities(held)
    answers.iterations[index] = rounds
    left = answers.settle(
        program,
        index,
        guess,
        guess,
        tol=min(tol, first.tol),
        sign_tol=first.sign_tol,
        refine=first.refine,
        rounds=1,
        made=made,
        strict=True,  # rows without dual and slack may be duplicates, or one side of a slab
    )
    path.keep(left if ended is None else _without(path.index.shape[0], ended, left))


def _without(count: int, tried: Tensor, left: Tensor) -> Tensor:
    """Say which of `count` positions remain when those tried are settled but for the ones left."""
    remain = torch.ones(count, dtype=torch.bool, device=tried.device)
    remain[tried] = False
    remain[tried[left]] = True
    return remain.nonzero().squeeze(-1)


class _CentralPath:
    """Iterates λ, s > 0 of the programs not yet settled, in units in which the largest violation −w is 1."""

    def __init__(self, program: Program, batch: int) -> None:
        self.program = program
        self.index = torch.arange(batch, device=program.Q.device)
        reduced, n_eq = program.reduced, program.n_eq
        self.R = reduced.projected
        w = -reduced.violation[:, n_eq:]
        if n_eq:
            half = quadratic.triangular_solve(reduced.chol_eq, reduced.violation[:, :n_eq])
            w = quadratic.transposed_matvec(reduced.across, half) + w
        least = w.amin(-1, keepdim=True)
        self.unit = torch.where(least < 0, -least, 1.0)
        self.w = (w / self.unit).expand(batch, -1)
        self.unit = self.unit.expand(batch, -1)
        self.inside = (least >= 0.0).squeeze(-1).expand(batch)  # no inequality is violated without inequalities
        self.point = torch.stack((self.w, self.w))  # (2, k, m_ineq): λ and s
        self.equality = torch.cat([self.R.new_ones(1, n_eq), self.R.new_zeros(1, self.R.shape[-1])], dim=-1)  # (1, m)
        self.iterations = torch.zeros(batch, dtype=torch.int64, device=self.R.device)
        self.alive = torch.ones(batch, dtype=torch.bool, device=self.R.device)  # False: the iteration is stuck
        self.steps = 0  # the most iterations of any program

    def begin(self) -> None:
        """Choose the first λ and s, well off zero."""
        shifted = self.R.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(1.0)
        near = self.w.clamp(max=1.0)  # a row far from its bound must not move the others
        below = quadratic.cholesky_solve(torch.linalg.cholesky_ex(shifted)[0], near)
        lowest = below.amin(-1, keepdim=True)
        margin = torch.where(lowest < 0, -lowest, 1.0)
        slack = below.clamp(min=0.0)
        s = slack + margin + (self.w - near)
        self.point = torch.stack((torch.addcdiv(slack - below, margin, s / margin), s))  # rows far off start centred

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the programs only."""
        if rows.shape[0] == self.index.shape[0]:  # positions increase, so these are all of them
            return
        if not rows.shape[0]:
            self.index = self.index[:0]
            return
        self.program = self.program.take(rows)
        self.R = self.program.reduced.projected
        self.point = self.point[:, rows]
        for name in ("index", "unit", "w", "iterations", "alive"):
            setattr(self, name, getattr(self, name)[rows])

    def active(self, *, balanced: bool) -> Tensor:  # (k, m)
        """Guess the active rows: all equalities, and inequalities whose dual outweighs their slack.

        Balanced, each is measured by the largest of its kind, which is right for ill-conditioned programs; otherwise
        by no less than 1, which is right where all slacks vanish. Slacks beyond the largest violation do not count.
        """
        lam, s = self.point.unbind()
        dual_scale = lam.amax(-1, keepdim=True)
        slack_scale = s.amax(-1, keepdim=True).clamp(max=1.0)
        if not balanced:
            dual_scale, slack_scale = dual_scale.clamp(min=1.0), slack_scale.clamp(min=1.0)
        guess = torch.gt(lam * slack_scale, s * dual_scale).to(lam.dtype)
        return self.with_equalities(guess)

    def with_equalities(self, held: Tensor) -> Tensor:  # (k, m_ineq) -> (k, m)
        """Put the equality rows, which are active, before the inequalities."""
        if not self.program.n_eq:
            return held
        return torch.cat([held.new_ones(held.shape[0], self.program.n_eq), held], dim=-1)

    def duals(self) -> Tensor:  # (k, m)
        """Give the duals of all rows, unscaled: ν from the equality rows for the λ at hand."""
        n_eq, reduced = self.program.n_eq, self.program.reduced
        lam = self.unit * self.point[0]
        if not n_eq:
            return reduced.scale * lam
        right = reduced.violation[:, :n_eq] - quadratic.matvec(reduced.schur[:, :n_eq, n_eq:], lam)
        return reduced.scale * torch.cat([quadratic.cholesky_solve(reduced.chol_eq, right), lam], dim=-1)

    def advance(self, target: float, max_iter: int) -> None:
        """Iterate until the duality measure of every program is below `target`, or it is stuck.

        Infeasibility is looked at only once a measure is low enough; as long as all go on, nothing is masked.
        """
        rows: Tensor | None = None  # the programs at work; None: all of them
        R, m, tol = self.R, self.w.shape[-1], 1e-2 * target**0.5
        w, point = self.w.unsqueeze(-1), self.point.unsqueeze(-1)  # columns throughout: (k, m, 1), (2, k, m, 1)
        count, alive = self.iterations[:, None, None], self.alive[:, None, None]
        more = 0  # iterations of all at work that are not in their counts yet
        while True:
            lam, s = point.unbind()
            product = lam * s
            total = product.sum(-2, keepdim=True)
            right = _right(R, w, lam)
            running = alive > (total <= target * m)
            everyone = self.steps < max_iter and checks.host_int(running.sum()) == running.shape[0]
            if not everyone:
                count, more = count + more, 0
                off = ((right + s) / s.clamp(min=1.0)).abs_().amax(-2, keepdim=True)
                running = alive > ((total <= target * m) & (off <= tol))
                running = running & (count < max_iter)
                at_work = checks.host_int(running.sum())
                everyone = at_work == running.shape[0]
            if not everyone and (at_work == 0 or at_work <= 0.75 * running.shape[0]):
                self._write(rows, point, count, alive)
                if at_work == 0:
                    return
                pick = running.flatten().nonzero().squeeze(-1)
                rows = pick if rows is None else rows[pick]
                R = R if R.shape[0] == 1 else R[pick]
                w, point, count, alive = w[pick], point[:, pick], count[pick], alive[pick]
                product, total, right = product[pick], total[pick], right[pick]
                everyone = True
            point, ok = _step(R, point, product, total, right, None if everyone else running)
            if everyone:
                alive, more = ok, more + 1
            else:
                alive, count = torch.where(running, ok, alive), count + running
            self.steps += 1

    def _write(self, rows: Tensor | None, point: Tensor, count: Tensor, alive: Tensor) -> None:
        """Write down where the programs of `rows` are."""
        if rows is None:
            self.point, self.iterations, self.alive = point.squeeze(-1), count.flatten(), alive.flatten()
        else:
            self.point[:, rows], self.iterations[rows] = point.squeeze(-1), count.flatten()
            self.alive[rows] = alive.flatten()


def _right(R: Tensor, w: Tensor, lam: Tensor) -> Tensor:  # (k or 1, m, m), (k, m, 1) x 2 -> (k, m, 1)
    """Form −(R λ + w)."""
    if R.shape[0] == 1 and lam.shape[0] != 1:  # one matrix for all vectors
        return torch.addmm(w.squeeze(-1), lam.squeeze(-1), R.squeeze(0), beta=-1.0, alpha=-1.0).unsqueeze(-1)
    return torch.baddbmm(w.mT, lam.mT, R, beta=-1.0, alpha=-1.0).mT  # as rows, which is faster


def _step(
    R: Tensor, point: Tensor, product: Tensor, total: Tensor, right: Tensor, running: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Take one predictor–corrector step where `running` (None: everywhere); also where it was long enough to go on.

    With a = Δλ/λ and b = Δs/s the predictor has a + b = −1. So it may go 1/t of its length, t the largest of −a and
    1 + a = ½ + √(¼ + a(1 + a)), and what it leaves of Σ λs is 1 − 1/t − Σ λs a(1 + a)/(t² Σ λs).
    """
    lam, s = point.unbind()
    matrix = R.clone() if R.shape[0] == lam.shape[0] else R.repeat(lam.shape[0], 1, 1)
    matrix.diagonal(dim1=-2, dim2=-1).add_((s / lam).squeeze(-1))
    chol, info = torch.linalg.cholesky_ex(matrix)
    upper = chol.mT

    def solve(column: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(chol, column, upper=False)
        return torch.linalg.solve_triangular(upper, half, upper=True)

    a = solve(right) / lam
    bend = torch.addcmul(a, a, a)
    steepest = bend.amax(-2, keepdim=True).clamp_(min=0.0).add_(0.25).sqrt_().add_(0.5)
    bend *= product
    left = torch.addcdiv(total, bend.sum(-2, keepdim=True), steepest)
    left = torch.addcdiv(total, left, steepest, value=-1.0).div_(total)
    push = bend.addcmul_(left**3, total, value=1.0 / lam.shape[-2])  # centre − ΔλΔs, to be λΔs + sΔλ + λs
    change = torch.empty_like(point)
    of_lam, of_s = change.unbind()
    torch.div(solve(torch.addcdiv(right, push, lam)), lam, out=of_lam)
    torch.addcdiv(torch.rsub(of_lam, -1.0), push, product, out=of_s)
    lowest = change.amin((0, -2)).unsqueeze(-1)
    ok = torch.gt(lowest > -_TO_BOUNDARY / _SHORTEST, info[:, None, None])  # NaN is never greater
    move = ok if running is None else running & ok
    there = torch.addcdiv(point, change.mul_(point), lowest.clamp(max=-_TO_BOUNDARY), value=-_TO_BOUNDARY)
    return torch.where(move, there, point), ok
