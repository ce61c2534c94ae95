r"""The verified active-set solve: from a guess of the active rows to a solution exact to rounding, or to nothing.

One linear solve on the guessed set gives a point; its own signs tell whether the set was right. Where they do not, the
set is corrected by them (active rows with a negative dual leave, violated rows enter) and the solve repeated.

Source: Hintermüller, Ito & Kunisch (2003), SIAM J. Optim. 13(3), for the correction rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers.kkt import quadratic
from implicit_layers.solution import Status

_RIDGE = 1e-10  # on the unit diagonal of the Schur complement, where active rows depend on each other
REFINE = 1  # refinement steps on a factor without ridge
REFINE_DEPENDENT = 6  # with the ridge: each step gains a factor ridge / (smallest non-zero eigenvalue)
_FAR = 1e6  # how many times farther than every single constraint the nearest feasible point may lie


class Program(NamedTuple):
    """A batch of programs with rows stacked, E = [A; G], f = [b; h]; leading dimension N, or 1 for what is shared."""

    Q: Tensor  # (N or 1, n, n)
    p: Tensor  # (N or 1, n)
    E: Tensor  # (N or 1, m, n)
    f: Tensor  # (N or 1, m)
    n_eq: int
    reduced: quadratic.Reduced

    def take(self, index: Tensor) -> Program:
        """Keep the programs of `index`; what the batch shares stays shared."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor[index]

        Q, p, E, f, n_eq, reduced = self
        return Program(pick(Q), pick(p), pick(E), pick(f), n_eq, quadratic.Reduced(*map(pick, reduced)))


class ActiveSetPoint(NamedTuple):
    """What one solve on a guessed active set gives, one entry a program."""

    z: Tensor  # (k, n)
    y: Tensor  # (k, m): (nu, lam), lam >= 0
    factor: quadratic.Factor
    residual: Tensor  # (k,) relative KKT residual
    accepted: Tensor  # (k,) bool
    corrected: Tensor  # (k, m): the active set that the signs ask for


def solve_on(
    program: Program, active: Tensor, y: Tensor, *, tol: float, sign_tol: float, ridge: float = 0.0
) -> ActiveSetPoint:
    """Solve on the active rows, refined from the duals `y`, and judge the answer by its KKT conditions."""
    Q, p, E, f, n_eq, reduced = program
    factor, positive = quadratic.factorise(reduced.chol_q, reduced.schur, reduced.scale, active, ridge)
    y = active * y
    z = reduced.free - quadratic.cholesky_solve(reduced.chol_q, quadratic.transposed_matvec(E, y))
    for _ in range(1 + (REFINE_DEPENDENT if ridge else REFINE)):
        left_z = -(quadratic.matvec(Q, z) + p + quadratic.transposed_matvec(E, y))
        left_y = active * (f - quadratic.matvec(E, z))
        step_z, step_y = quadratic.solve_once(factor, E, left_z, left_y)
        z, y = z + step_z, y + step_y
    dual = y / reduced.scale
    slack = reduced.scale * (f - quadratic.matvec(E, z))
    unit = sign_tol * torch.maximum(quadratic.largest(dual), quadratic.largest(reduced.violation)).unsqueeze(-1)
    inequality = torch.arange(active.shape[-1], device=active.device) >= n_eq
    leave = inequality & (active > 0) & (dual < -unit)
    enter = inequality & (active == 0) & (slack < -unit)
    y = torch.where(inequality, y.clamp(min=0.0), y)
    residual = quadratic.relative_residual(Q, p, E, f, n_eq, z, y, reduced.free)
    accepted = positive & ~(leave | enter).any(-1) & (residual <= tol)
    corrected = torch.where(leave, 0.0, torch.where(enter, 1.0, active))
    return ActiveSetPoint(z, y, factor, residual, accepted, corrected)


class Answers:
    """The answers of a batch, filled in as programs are settled."""

    def __init__(self, program: Program, batch: int) -> None:
        n, m = program.Q.shape[-1], program.E.shape[-2]
        like = program.reduced.schur
        self.z = like.new_zeros(batch, n)
        self.y = like.new_zeros(batch, m)
        self.chol_schur = torch.eye(m, dtype=like.dtype, device=like.device).repeat(batch, 1, 1)
        self.active = like.new_zeros(batch, m)
        self.residual = like.new_full((batch,), torch.inf)
        self.iterations = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.status = torch.full((batch,), int(Status.NOT_CONVERGED), dtype=torch.int8, device=like.device)
        self.degenerate = torch.zeros(batch, dtype=torch.bool, device=like.device)

    def settle(
        self, program: Program, index: Tensor, active: Tensor, y: Tensor, *, tol: float, sign_tol: float, rounds: int
    ) -> Tensor:
        """Solve the programs of `index`, correcting their active sets; returns the positions not settled."""
        left = torch.arange(index.shape[0], device=index.device)
        for round_ in range(rounds):
            point = solve_on(program, active, y, tol=tol, sign_tol=sign_tol)
            self._keep(index[left], point, point.accepted, last=False)
            rest = (~point.accepted).nonzero().squeeze(-1)
            left = left[rest]
            if not rest.numel() or round_ + 1 == rounds:
                break
            program, active, y = program.take(rest), point.corrected[rest], point.y[rest]
        return left

    def settle_dependent(self, program: Program, index: Tensor, active: Tensor, y: Tensor, *, tol: float) -> None:
        """Settle programs whose active rows depend on each other, by a ridge refined away; the rest have failed."""
        point = solve_on(program, active, y, tol=tol, sign_tol=1e-7, ridge=_RIDGE)
        self.degenerate[index] = point.accepted
        self._keep(index, point, torch.isfinite(point.residual), last=True)
        dual = (y if program.n_eq < y.shape[-1] else point.y) / program.reduced.scale
        length = (dual * quadratic.matvec(program.reduced.schur, dual)).sum(-1).clamp(min=0.0).sqrt()
        depth = (dual * program.reduced.violation).sum(-1)
        far = _FAR * quadratic.largest(program.reduced.violation)
        proven = ~point.accepted & (depth > 0) & (depth >= far * length)
        self.status[index] = torch.where(proven, int(Status.INFEASIBLE), self.status[index].int()).to(torch.int8)

    def _keep(self, index: Tensor, point: ActiveSetPoint, where: Tensor, *, last: bool) -> None:
        """Write down the points that are accepted (or, at the last try, finite)."""
        rows = where.nonzero().squeeze(-1)
        to = index[rows]
        self.z[to] = point.z[rows]
        self.y[to] = point.y[rows]
        self.chol_schur[to] = point.factor.chol_schur[rows]
        self.active[to] = point.factor.active[rows]
        self.residual[to] = point.residual[rows]
        done = torch.where(point.accepted[rows], int(Status.CONVERGED), int(Status.NOT_CONVERGED))
        self.status[to] = done.to(torch.int8)
