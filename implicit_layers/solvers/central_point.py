r"""A point on the central path, to rounding: the smooth neighbour of a program's solution.

    min ½ zᵀQz + pᵀz − μ Σ log s   subject to   A z = b,   s the slacks of all inequalities and bounds,

whose conditions are those of the program with λ∘s = μ in the place of 0. Its derivative is that of a program whose
inequalities all hold, each with compliance s/λ (and each bound with stiffness λ/s), so the same linear system serves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.kkt.program import Data, Program
from implicit_layers.solvers import condensed_path

_SHRINK = 0.1  # of λ∘s in one step, on the way to μ


class BarrierPoint(NamedTuple):
    """A point on the central path and what its derivative needs, in the units of the data."""

    z: Tensor  # (N, n)
    y: Tensor  # (N, m)
    bound: Tensor  # (N, n): λ_ub − λ_lb
    active: Tensor  # (N, m): 1 on rows that are there
    fixed: Tensor  # (N, n): not 0 where lb == ub
    compliance: Tensor  # (N, m): that of the data, and s/λ on inequality rows
    stiffness: Tensor  # (N, n): λ/s of both bounds together
    stiffness_lb: Tensor  # (N, n)
    stiffness_ub: Tensor  # (N, n)
    converged: Tensor  # (N,) bool
    iterations: Tensor  # (N,) int64
    residual: Tensor  # (N,): of the perturbed conditions, relative


def solve(data: Data, batch: int, mu: Tensor, max_iter: int, check_every: int) -> BarrierPoint:
    """Follow the central path down to μ and stay there until nothing changes any more."""
    program = Program.of(data)
    column, row, cost = program.scaling
    state = condensed_path.start(program, batch)
    eps = torch.finfo(mu.dtype).eps
    tol, good = 64 * eps, 1e5 * eps
    target = mu.unsqueeze(-1) * cost * state.balance
    residual, best = mu.new_full((batch,), torch.inf), state
    for count in range(max_iter + 1):
        reached = condensed_path.progress(program, state)
        off = (state.there * (state.lam * state.s - target) / target).abs()
        off = off.amax(-1) if off.shape[-1] else torch.zeros_like(residual)
        now = torch.maximum(reached.infeasibility, off)
        better = now < residual
        residual = torch.where(better, now, residual)
        best = best._replace(
            point=torch.where(better.unsqueeze(-1), state.point, best.point),
            iterations=torch.where(better, state.iterations, best.iterations),
        )
        running = (residual > tol) & state.stuck.logical_not()
        if count == max_iter or (check_every and count % check_every == 0 and not checks.host_bool(running.any())):
            break
        mean = condensed_path.mean_product(state).unsqueeze(-1)
        state = condensed_path.step(program, state, running, reached, torch.maximum(target, _SHRINK * mean))
    state = best
    y, bound = condensed_path.duals(program, state)
    bound = torch.where(program.pinned, -program.gradient(state.z, y), bound)
    z, y, bound = program.unscaled(state.z, y, bound)
    n, n_eq = z.shape[-1], program.n_eq
    lam = state.lam / state.balance
    ratio = torch.where(state.there > 0, state.s / torch.where(state.there > 0, lam, 1.0), 0.0)
    rows, *bounds = condensed_path.split_cone(program, ratio) if program.bounded else (ratio,)
    soft = torch.cat([ratio.new_zeros(batch, n_eq), rows], dim=-1) * cost / row**2
    own = torch.zeros_like(soft) if data.compliance is None else data.compliance
    pinned = program.pinned.expand(batch, n)
    fixed = torch.where(pinned, torch.where(bound < 0, -1.0, 1.0), 0.0).to(z.dtype)
    if program.bounded:
        lower, upper = (
            torch.where(part > 0, 1.0 / torch.where(part > 0, part, 1.0), 0.0) / (cost * column**2) for part in bounds
        )
    else:
        lower = upper = torch.zeros_like(z)
    return BarrierPoint(
        z=z,
        y=y,
        bound=bound,
        active=program.rows.expand(batch, -1).to(z.dtype),
        fixed=fixed,
        compliance=soft + own,
        stiffness=lower + upper,
        stiffness_lb=lower,
        stiffness_ub=upper,
        converged=residual <= good,
        iterations=state.iterations,
        residual=residual,
    )
