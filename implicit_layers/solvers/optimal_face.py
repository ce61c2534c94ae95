r"""Where the minimiser is not unique: the one of least Euclidean norm.

The minimisers are the feasible points with the same Qz, on the rows and bounds that have a positive dual. Their point
nearest to zero, the limit of the minimisers of ½ zᵀQz + pᵀz + ε|z|²/2 for ε → 0, is a strictly convex program again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.kkt import condensed, quadratic
from implicit_layers.kkt.program import Data, Program, judge
from implicit_layers.solvers import condensed_solve
from implicit_layers.solvers.condensed_solve import Outcome, Settings

_POSITIVE = 1e-9  # relative size from which a dual counts as positive


class Held(NamedTuple):
    """The rows and bounds that all minimisers satisfy with equality."""

    rows: Tensor  # (k, m) bool
    coordinates: Tensor  # (k, n) bool


def held(program: Program, outcome: Outcome) -> Held:
    """Tell which rows and bounds have a dual that is clearly positive."""
    at = judge(program, outcome.z, outcome.y, outcome.bound)
    threshold = (_POSITIVE if outcome.z.dtype == torch.float64 else 1e-4) * at.dual_unit
    rows = ~program.inequality() | (outcome.y > threshold)
    return Held(rows, program.pinned | (outcome.bound.abs() > threshold))


def doubtful(program: Program, outcome: Outcome, singular: Tensor) -> Tensor:  # -> (N,) bool
    """Tell where the minimiser may be another: undetermined by what is active, or held by something without a dual."""
    sure = held(program, outcome)
    idle = ((outcome.active > 0) & ~sure.rows).any(-1) | ((outcome.fixed != 0) & ~sure.coordinates).any(-1)
    return (singular & 1 > 0) | idle


def undetermined(program: Program, sure: Held) -> Tensor:  # -> (k,) bool
    """Tell where curvature and the held constraints leave a direction free."""
    dtype = program.p.dtype
    factor = condensed.factorise_scaled(
        program, sure.rows.to(dtype), sure.coordinates.to(dtype), program.p.new_zeros(1, 1)
    )
    return condensed.examined(program, factor, ask=True).singular & 1 > 0


def nearest(
    data: Data, program: Program, outcome: Outcome, singular: Tensor, settings: Settings
) -> tuple[Outcome, Tensor]:
    """Move to the minimiser of least norm; also tells where the minimiser is not unique, (k,) bool."""
    sure = held(program, outcome)
    z, _, _ = program.unscaled(outcome.z, outcome.y, outcome.bound)
    problem = _projection(data, sure, z)
    scaled = Program.of(problem)
    found = condensed_solve.solve(scaled, z.shape[0], settings)
    n_eq, m = data.n_eq, data.E.shape[-2]
    moved = found.z * scaled.scaling.column / program.scaling.column
    at = judge(program, moved, outcome.y, outcome.bound)
    tol = settings.tol if z.dtype != torch.float64 else min(settings.tol, 1e-9)
    better = (found.residual <= tol) & (at.residual <= torch.maximum(10 * outcome.residual, moved.new_tensor(tol)))
    far = torch.linalg.vector_norm(moved - outcome.z, dim=-1) > 1e-7 * torch.linalg.vector_norm(outcome.z, dim=-1)
    far = far | (singular & 1 > 0)
    added = held(scaled, found)
    last = found.active.shape[-1] - (m - n_eq)
    rows = torch.cat([sure.rows[:, :n_eq], sure.rows[:, n_eq:] | (added.rows & (found.active > 0))[:, last:]], dim=-1)
    tight = added.coordinates & (found.fixed != 0)
    fixed = torch.where(sure.coordinates, outcome.fixed, torch.where(tight, found.fixed, 0.0))
    change = (better & far).unsqueeze(-1)
    result = outcome._replace(
        z=torch.where(change, moved, outcome.z),
        active=torch.where(change, rows.to(moved.dtype), outcome.active),
        fixed=torch.where(change, fixed, outcome.fixed),
        residual=torch.where(change.squeeze(-1), at.residual, outcome.residual),
    )
    return result, far & better


def _projection(data: Data, sure: Held, z: Tensor) -> Data:
    """Write the projection of zero on the face of minimisers as a program."""
    k, n = z.shape
    n_eq, dtype = data.n_eq, z.dtype
    equalities = data.E[:, :n_eq].expand(k, -1, -1)
    inequalities = data.E[:, n_eq:].expand(k, -1, -1)
    rows = sure.rows[:, n_eq:]
    tight = inequalities * rows.unsqueeze(-1).to(dtype)
    blocks = [equalities, tight]
    sides = [quadratic.matvec(equalities, z), quadratic.matvec(tight, z)]  # the point at hand satisfies them exactly
    if checks.host_bool((data.Q != 0).any()):
        blocks.append(data.Q.expand(k, -1, -1))
        sides.append(quadratic.matvec(data.Q, z))
    count = sum(block.shape[-2] for block in blocks)
    blocks.append(inequalities)
    loose = torch.where(rows, torch.inf, data.f[:, n_eq:])
    sides.append(loose)
    lb = z.new_full((1, n), -torch.inf) if data.lb is None else data.lb
    ub = z.new_full((1, n), torch.inf) if data.ub is None else data.ub
    lb = torch.where(sure.coordinates, z, lb)
    ub = torch.where(sure.coordinates, z, ub)
    bounded = data.lb is not None or data.ub is not None
    identity = torch.eye(n, dtype=dtype, device=z.device).unsqueeze(0)
    return Data(
        identity,
        z.new_zeros(1, n),
        torch.cat(blocks, dim=-2),
        torch.cat(sides, dim=-1),
        lb if bounded else None,
        ub if bounded else None,
        count,
    )
