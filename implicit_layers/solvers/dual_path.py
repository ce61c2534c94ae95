r"""Strictly convex programs in the dual form: an m x m interior point, ended by a verified active set.

With Q = L Lᵀ and z eliminated, the slack s = h − Gz is an affine function of the inequality dual, s = R λ + w, with R
the Schur complement of the constraints projected off the equalities. The program is the complementarity problem

    s = R λ + w,   λ ≥ 0,   s ≥ 0,   λ ∘ s = 0,

and an iteration is one Cholesky factorisation of R + diag(s/λ) with two right-hand sides. Rows are scaled to unit
diagonal, so the iteration is blind to the units of z, of the cost and of every row.

The interior point is only a way to find which rows are active; the answer is the verified solve on them (`active_set`).
So the solution is exact to rounding and its factor is the one that the derivatives need: the last interior-point
factor would be far too inaccurate for them.

Source: Mehrotra (1992), SIAM J. Optim. 2(4); Nocedal & Wright (2006), chapter 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.kkt import quadratic
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
    inside = (path.w >= 0.0).all(-1).nonzero().squeeze(-1)  # no inequality is violated without inequalities
    if inside.numel():
        equalities = path.equality.expand(inside.shape[0], -1)
        part = program.take(inside)
        left = answers.settle(part, path.index[inside], equalities, equalities, tol=tol, sign_tol=1e-12)
        path.keep(_without(path.index.shape[0], inside, left))
    if path.index.numel():
        path.begin()
    for phase in _PHASES:
        if not path.index.numel():
            return
        path.advance(phase.measure, max_iter)
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
        half = quadratic.triangular_solve(reduced.chol_eq, reduced.violation[:, :n_eq])
        w = quadratic.transposed_matvec(reduced.across, half) - reduced.violation[:, n_eq:]
        violation = (-w).amax(-1)
        self.unit = torch.where(violation > 0, violation, 1.0)[:, None]
        self.w = (w / self.unit).expand(batch, -1)
        self.unit = self.unit.expand(batch, -1)
        self.s = self.lam = self.w
        self.equality = torch.cat([self.R.new_ones(1, n_eq), self.R.new_zeros(1, self.R.shape[-1])], dim=-1)  # (1, m)
        self.iterations = torch.zeros(batch, dtype=torch.int64, device=self.R.device)
        self.stuck = torch.zeros(batch, dtype=torch.bool, device=self.R.device)

    def begin(self) -> None:
        """Choose the first λ and s, well off zero."""
        shifted = self.R.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(1.0)
        near = self.w.clamp(max=1.0)  # a row far from its bound must not move the others
        start = quadratic.cholesky_solve(torch.linalg.cholesky_ex(shifted)[0], -near)
        highest = start.amax(-1)
        margin = torch.where(highest > 0, highest, 1.0)[:, None]
        self.s = (-start).clamp(min=0.0) + margin + (self.w - near)
        self.lam = start.clamp(min=0.0) + margin * (margin / self.s)  # rows far from their bound start centred

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the programs only."""
        self.program = self.program.take(rows)
        self.R = self.program.reduced.projected
        for name in ("index", "unit", "w", "lam", "s", "iterations", "stuck"):
            setattr(self, name, getattr(self, name)[rows])

    def active(self, *, balanced: bool) -> Tensor:  # (k, m)
        """Guess the active rows: all equalities, and inequalities whose dual outweighs their slack.

        Balanced, each is measured by the largest of its kind, which is right for ill-conditioned programs; otherwise
        by no less than 1, which is right where all slacks vanish. Slacks beyond the largest violation do not count.
        """
        floor = 0.0 if balanced else 1.0
        dual_scale = self.lam.amax(-1, keepdim=True).clamp(min=floor)
        slack_scale = self.s.clamp(max=1.0).amax(-1, keepdim=True).clamp(min=floor)
        guess = (self.lam * slack_scale > self.s * dual_scale).to(self.lam.dtype)
        return torch.cat([guess.new_ones(guess.shape[0], self.program.n_eq), guess], dim=-1)

    def duals(self) -> Tensor:  # (k, m)
        """Give the duals of all rows, unscaled: ν from the equality rows for the λ at hand."""
        n_eq, reduced = self.program.n_eq, self.program.reduced
        lam = self.unit * self.lam
        right = reduced.violation[:, :n_eq] - quadratic.matvec(reduced.schur[:, :n_eq, n_eq:], lam)
        return reduced.scale * torch.cat([quadratic.cholesky_solve(reduced.chol_eq, right), lam], dim=-1)

    def advance(self, target: float, max_iter: int) -> None:
        """Iterate until the duality measure of every program is below `target`, or it is stuck."""
        rows: Tensor | None = None  # the programs at work; None: all of them
        R, w, lam, s, count, stuck = self.R, self.w, self.lam, self.s, self.iterations, self.stuck
        while True:
            measure = (lam * s).mean(-1)
            infeasibility = quadratic.matvec(R, lam) + w - s
            off = (infeasibility.abs() / s.clamp(min=1.0)).amax(-1)
            reached = (measure <= target) & (off <= 1e-2 * target**0.5)
            running = ~reached & ~stuck & (count < max_iter)
            at_work = checks.host_int(running.sum())
            if at_work == 0 or at_work <= 0.75 * running.shape[0]:
                if rows is None:
                    self.lam, self.s, self.iterations, self.stuck = lam, s, count, stuck
                else:
                    self.lam[rows], self.s[rows], self.iterations[rows], self.stuck[rows] = lam, s, count, stuck
                if at_work == 0:
                    return
                pick = running.nonzero().squeeze(-1)
                rows = pick if rows is None else rows[pick]
                R = R if R.shape[0] == 1 else R[pick]
                w, lam, s, count, stuck = w[pick], lam[pick], s[pick], count[pick], stuck[pick]
                measure, infeasibility, running = measure[pick], infeasibility[pick], running[pick]
            lam, s, ok = _step(R, lam, s, measure, infeasibility, running)
            count = count + running
            stuck = stuck | (running & ~ok)


def _step(
    R: Tensor, lam: Tensor, s: Tensor, measure: Tensor, infeasibility: Tensor, running: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one predictor–corrector step where `running`; also returns where the step was long enough to go on."""
    ratio = s / lam
    matrix = R.expand(lam.shape[0], -1, -1).clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(ratio)
    chol, info = torch.linalg.cholesky_ex(matrix)
    right = -s - infeasibility
    d_lam = quadratic.cholesky_solve(chol, right)
    d_s = -s - ratio * d_lam
    length = _longest(lam, d_lam, s, d_s).clamp(max=1.0)[:, None]
    affine = ((lam + length * d_lam) * (s + length * d_s)).mean(-1)
    centre = (affine / measure) ** 3 * measure
    correction = (centre[:, None] - d_lam * d_s) / lam
    d_lam = quadratic.cholesky_solve(chol, right + correction)
    d_s = correction - s - ratio * d_lam
    length = (_TO_BOUNDARY * _longest(lam, d_lam, s, d_s)).clamp(max=1.0)
    ok = (info == 0) & (length > _SHORTEST)
    length = torch.where(running & ok, length, 0.0)[:, None]
    move = length > 0
    return torch.where(move, lam + length * d_lam, lam), torch.where(move, s + length * d_s, s), ok


def _longest(lam: Tensor, d_lam: Tensor, s: Tensor, d_s: Tensor) -> Tensor:  # (k, m) x 4 -> (k,)
    """Step length to the boundary of λ, s ≥ 0; NaN steps give length NaN, which no comparison accepts."""
    steepest = torch.maximum(-d_lam / lam, -d_s / s).amax(-1)
    return 1.0 / steepest.clamp(min=torch.finfo(lam.dtype).tiny)
