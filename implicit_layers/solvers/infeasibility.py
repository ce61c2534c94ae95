r"""Proofs that a program has no solution: no feasible point, or no end to the descent.

No feasible point: min ½|t|² subject to Az = b + t_e, Gz ≤ h + t_i, lb ≤ z ≤ ub always has a solution, and its duals
are t. Where t is not zero it proves the contradiction (Farkas): Eᵀt + bound = 0, fᵀt + ubᵀbound⁺ − lbᵀbound⁻ < 0.

No end: the projection d of −p on the cone {Qd = 0, Ad = 0, Gd ≤ 0, d ≥ 0 above a bound, d ≤ 0 below one}. Where d is
not zero, pᵀd = −|d|² < 0, and the objective falls along d for ever.

Both are programs of the same kind. What they say is checked here by its products with the data, so nothing depends on
how well they were solved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_layers.kkt import quadratic
from implicit_layers.kkt.program import Data, Program
from implicit_layers.solution import Status
from implicit_layers.solvers import condensed_solve
from implicit_layers.solvers.condensed_solve import Settings

_ROUNDING = 1e-13  # relative: a contradiction smaller than this is none
_FAR = 1e6  # how many times farther than the data say a feasible point would have to lie
_DESCENT = 1e-9  # cosine of the angle to −p below which a direction does not count as one of descent
_CONE = 1e-10  # relative: how well a direction has to stay in the cone


def reasons(data: Data, batch: int, settings: Settings) -> Tensor:  # -> (N,) int8, numbers of `Status`
    """Say why programs have no solution, as far as that can be proven."""
    settings = settings._replace(tol=1e-9, thorough=False)
    least = 1e-12 if data.p.dtype == torch.float64 else 1e-5  # what is relatively smaller may be rounding of the data
    data = data.to(torch.float64)
    infeasible, feasible = _contradiction(data, batch, least, settings)
    unbounded = feasible & _recession(data, batch, settings)
    reason = torch.where(unbounded, int(Status.UNBOUNDED), int(Status.NOT_CONVERGED))
    return torch.where(infeasible, int(Status.INFEASIBLE), reason).to(torch.int8)


def _contradiction(data: Data, batch: int, least: float, settings: Settings) -> tuple[Tensor, Tensor]:
    """Tell where the constraints contradict each other, and where they are known not to; (N,) bool each."""
    scaling = Program.of(data).scaling
    elastic = data._replace(
        Q=torch.zeros_like(data.Q[:1]),
        p=torch.zeros_like(data.p[:1]),
        compliance=(scaling.row**-2).expand(-1, data.E.shape[-2]),
    )
    program = Program.of(elastic)
    found = condensed_solve.solve(program, batch, settings)
    y, bound = found.y, found.bound
    upward, downward = bound.clamp(min=0.0), (-bound).clamp(min=0.0)
    reachable = program.has_ub | program.pinned, program.has_lb | program.pinned
    terms = torch.cat(
        [
            program.f * y,
            torch.where(reachable[0], program.ub * upward, 0.0),
            torch.where(reachable[1], -program.lb * downward, 0.0),
        ],
        dim=-1,
    )
    depth = -terms.sum(-1)
    off = quadratic.transposed_matvec(program.E, y) + bound
    off = off + torch.where(reachable[0], 0.0, upward) + torch.where(reachable[1], 0.0, downward)
    miss = torch.linalg.vector_norm(off, dim=-1)
    length = torch.linalg.vector_norm(y, dim=-1)
    held = (found.active > 0) | (y != 0)
    size = torch.maximum(torch.linalg.vector_norm(found.z, dim=-1), quadratic.largest(held * program.f))
    proven = (depth > _ROUNDING * terms.abs().sum(-1)) & (depth > _FAR * miss * size) & (length > 0)
    proven = proven & (length > least * size)
    solved = (found.residual <= settings.tol) & (length <= max(1e-9, least) * size)
    return proven, solved & ~proven


def _recession(data: Data, batch: int, settings: Settings) -> Tensor:  # -> (N,) bool
    """Tell where the objective decreases along a direction that never leaves the feasible set."""
    n_eq = data.n_eq
    original = Program.of(data)
    column = original.scaling.column
    n = data.Q.shape[-1]
    size = max(data.Q.shape[0], data.E.shape[0])
    rows = [data.E[:, :n_eq], data.Q, data.E[:, n_eq:]]
    E = torch.cat([part.expand(size, -1, -1) for part in rows], dim=-2)
    absent = torch.where(torch.isfinite(data.f[:, n_eq:]), 0.0, torch.inf)
    f = torch.cat([data.f.new_zeros(absent.shape[0], n_eq + n), absent], dim=-1)
    lb = None if data.lb is None else torch.where(torch.isfinite(data.lb), 0.0, -torch.inf)
    ub = None if data.ub is None else torch.where(torch.isfinite(data.ub), 0.0, torch.inf)
    cone = Data(torch.diag_embed(column**-2), data.p, E, f, lb, ub, n_eq + n)
    found = condensed_solve.solve(Program.of(cone), batch, settings)
    d = found.z * Program.of(cone).scaling.column / column  # in the units of the original program
    length = torch.linalg.vector_norm(d, dim=-1)
    slope = (original.p * d).sum(-1)
    image = torch.where(original.rows, quadratic.matvec(original.E, d), 0.0)
    outside = torch.where(original.inequality(), image.clamp(min=0.0), image.abs())
    below = torch.where(original.has_lb | original.pinned, (-d).clamp(min=0.0), 0.0)
    above = torch.where(original.has_ub | original.pinned, d.clamp(min=0.0), 0.0)
    curved = quadratic.matvec(original.Q, d)
    off = torch.maximum(quadratic.largest(torch.maximum(below, above).expand_as(d)), quadratic.largest(outside))
    flat = quadratic.largest(curved) <= 64 * n * torch.finfo(d.dtype).eps * length  # any curvature ends the descent
    descends = slope < -_DESCENT * torch.linalg.vector_norm(original.p, dim=-1) * length
    return (length > 0) & torch.isfinite(length) & descends & flat & (off <= _CONE * length)
