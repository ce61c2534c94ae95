r"""The verified end of the condensed form: from a guess of what is active to a solution exact to rounding, or nothing.

One linear solve on the guessed rows and bounds, refined against the true matrices, gives a point, whose own signs
tell whether the guess was right. Rows that depend on each other and directions without curvature do no harm: the
refinement then ends at a point next to where it started.

Source: Hintermüller, Ito & Kunisch (2003), SIAM J. Optim. 13(3), for the correction rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers.kkt import condensed, quadratic
from implicit_layers.kkt.condensed import Factor
from implicit_layers.kkt.program import Point, Program, judge
from implicit_layers.solvers import condensed_path
from implicit_layers.solvers.condensed_path import State

WEAK = 1e-11  # relative size below which a dual or a slack counts as zero, in float64


class Guess(NamedTuple):
    """What may be active, and a point to start from; scaled units."""

    active: Tensor  # (k, m)
    fixed: Tensor  # (k, n): +1 at ub, -1 at lb, 0 free
    z: Tensor  # (k, n)
    y: Tensor  # (k, m)

    def take(self, index: Tensor) -> Guess:
        """Keep some programs."""
        return Guess(*(field[index] for field in self))


class End(NamedTuple):
    """What one solve on a guess gives, one entry a program."""

    at: Point  # with duals of the right sign
    guess: Guess  # what was tried
    factor: Factor
    accepted: Tensor  # (k,) bool
    weak: Tensor  # (k,) bool: some inequality or bound has neither a dual nor a slack
    corrected: Guess  # what the signs ask for


def guess(program: Program, state: State, *, balanced: bool, near: bool) -> Guess:
    """Guess what is active: constraints whose dual outweighs their slack; `near`: start from the state.

    Balanced, each is measured by the largest of its kind; otherwise as they are.
    """
    batch = state.z.shape[0]
    lam, s = state.lam, state.s
    if balanced and lam.shape[-1]:
        lam = lam / lam.amax(-1, keepdim=True).clamp(min=torch.finfo(lam.dtype).tiny)
        reach = torch.maximum(quadratic.largest(state.z), program.units.least).unsqueeze(-1)
        s = s / torch.minimum(s.amax(-1, keepdim=True), reach)
    held = (state.there > 0) & (lam > s)
    rows = condensed_path.split_cone(program, held)[0] if program.bounded else held
    active = torch.cat([held.new_ones(batch, program.n_eq), rows], dim=-1).to(s.dtype)
    fixed = torch.zeros_like(state.z)
    if program.bounded:
        _, lower, upper = condensed_path.split_cone(program, held)
        _, pull, push = condensed_path.split_cone(program, lam)
        upper = upper & (lower.logical_not() | (push >= pull))
        fixed = torch.where(upper, 1.0, torch.where(lower, -1.0, 0.0)).to(s.dtype)
        fixed = torch.where(program.pinned & (fixed == 0), 1.0, fixed)
    if not near:
        return Guess(active, fixed, torch.zeros_like(state.z), torch.zeros_like(active))
    y, _ = condensed_path.duals(program, state)
    return Guess(active, fixed, state.z, y)


def factor_on(program: Program, tried: Guess) -> Factor:
    """Factor the system of a guess."""
    return condensed.factorise_scaled(
        program, tried.active, (tried.fixed != 0).to(tried.active.dtype), tried.active.new_zeros(1, 1)
    )


def solve_on(
    program: Program, tried: Guess, *, tol: float, sign_tol: float, refine: int, factor: Factor | None = None
) -> End:
    """Solve on the guess, and judge the answer by its KKT conditions; `factor`: that of the guess, if it is there."""
    active, fixed = tried.active, tried.fixed
    free = (fixed == 0).to(active.dtype)
    zero = active.new_zeros(1, 1)
    factor = factor_on(program, tried) if factor is None else factor
    ones = factor._replace(column=zero + 1.0, row=zero + 1.0)
    z = torch.where(fixed > 0, program.ub, torch.where(fixed < 0, program.lb, tried.z))
    y = active * tried.y

    def image(v_z: Tensor, v_y: Tensor) -> tuple[Tensor, Tensor]:
        return condensed.scaled_image(program, factor, v_z, v_y)

    left = -free * program.gradient(z, y)
    rows = active * (program.f - quadratic.matvec(program.E, z) + program.compliance * y)
    d_z, d_y = condensed.refined(ones, program.E, image, left, rows, refine)
    z, y = z + d_z, y + d_y
    bound = -(1.0 - free) * program.gradient(z, y)
    raw = judge(program, z, y, bound)
    inequality = program.inequality() & program.rows
    weak_tol = WEAK if z.dtype == torch.float64 else 1e-5
    leave = inequality & (active > 0) & (y < -sign_tol * raw.dual_unit)
    enter = inequality & (active == 0) & (raw.gap > sign_tol * raw.terms)
    weak = (inequality & (y.abs() <= weak_tol * raw.dual_unit) & (raw.gap.abs() <= weak_tol * raw.terms)).any(-1)
    corrected = torch.where(leave, 0.0, torch.where(enter, 1.0, active))
    wrong = (leave | enter).any(-1)
    new_fixed = fixed
    y = torch.where(inequality, y.clamp(min=0.0), y)
    if program.bounded:
        loose = (fixed != 0) & program.pinned.logical_not() & (fixed * bound < -sign_tol * raw.dual_unit)
        above = (fixed == 0) & program.has_ub & (z - program.ub > sign_tol * raw.bound_terms)
        below = (fixed == 0) & program.has_lb & (program.lb - z > sign_tol * raw.bound_terms)
        new_fixed = torch.where(loose, 0.0, torch.where(above, 1.0, torch.where(below, -1.0, fixed)))
        wrong = wrong | (loose | above | below).any(-1)
        at_ub = program.has_ub & ((z - program.ub).abs() <= weak_tol * raw.bound_terms)
        at_lb = program.has_lb & ((z - program.lb).abs() <= weak_tol * raw.bound_terms)
        weak = weak | ((at_ub | at_lb) & (bound.abs() <= weak_tol * raw.dual_unit)).any(-1)
        bound = torch.where(program.pinned, bound, fixed * (fixed * bound).clamp(min=0.0))
        z = torch.where(program.has_lb, torch.maximum(z, program.lb), z)
        z = torch.where(program.has_ub, torch.minimum(z, program.ub), z)
        fixed = torch.where(program.pinned, torch.where(bound < 0, -1.0, 1.0), fixed)
    at = judge(program, z, y, bound)
    accepted = wrong.logical_not() & (at.residual <= tol)
    done = Guess(active, fixed, z, y)
    sane = torch.isfinite(z).all(-1, keepdim=True) & torch.isfinite(y).all(-1, keepdim=True)
    again = Guess(
        torch.where(sane, corrected, active),
        torch.where(sane, new_fixed, fixed),
        torch.where(sane, z, tried.z),
        torch.where(sane, y, tried.y),
    )
    return End(at, done, factor, accepted, weak, again)
