r"""What `DualNewton` starts from: rows of one size, entries that can only be zero, a centre, dependent rows."""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.kkt.quadratic import matvec
from implicit_layers.kkt.schur import dependent
from implicit_layers.solution import Status
from implicit_layers.solvers.dual_newton import Dual, DualNewton, Maps, Programs

_SURE = 1e-12  # relative size of what rounding may hide in one row


def solve(
    theta: Tensor,  # (N, n)
    E: Tensor,  # (N or 1, m, n)
    f: Tensor,  # (N, m)
    ub: Tensor,  # (N, n)
    n_eq: int,
    *,
    entropic: bool,
    solver: DualNewton,
    maps: Maps | None = None,
) -> tuple[Dual, Tensor]:
    """Solve the programs as they come; also the projection on dependent equality rows, (N or 1, m, m)."""
    if f.shape[-1] == 0:
        return _unconstrained(theta, E, f, ub, entropic, maps)
    inequality = torch.arange(f.shape[-1], device=f.device) >= n_eq
    largest = E.abs().amax(-1)
    scale = torch.where((largest > 0) & ~(inequality & entropic), largest, 1.0)
    rows, right = E / scale.unsqueeze(-1), f / scale
    null = torch.zeros(E.shape[0], f.shape[-1], f.shape[-1], dtype=E.dtype, device=E.device)
    if n_eq:
        null[:, :n_eq, :n_eq] = dependent(rows[:, :n_eq])
    ub, impossible = _forced(rows, right, ub, inequality)
    theta, lifted = _lowered(theta, rows, ub, inequality)
    start, usual = _centre(rows, right, ub, entropic), None
    if maps is not None:
        level = torch.where(ub > 0, torch.minimum((start - 1).exp(), 0.5 * ub), 0.5)
        start, usual = maps.slope(level), maps.weights(level)
    programs = Programs(theta, rows, right, ub, scale, n_eq, entropic, maps, usual)
    dual = solver.solve(programs, start, null, impossible)
    dual = dual._replace(eta=dual.eta + lifted / scale)
    back = null
    if n_eq:  # the duals of the caller's own rows
        back = torch.zeros_like(null)
        back[:, :n_eq, :n_eq] = dependent(E[:, :n_eq])
        dual = dual._replace(eta=dual.eta - matvec(back, dual.eta))
    return dual, back


def _lowered(theta: Tensor, E: Tensor, ub: Tensor, inequality: Tensor) -> tuple[Tensor, Tensor]:
    """Take the largest score off all of them, where an equality row of one number makes that a mere change of its dual.

    Next to a vertex of the simplex θ − Eᵀη would cancel all digits otherwise. Returns the scores and the dual's change.
    """
    level = (E[..., :1] == E).all(-1) & (E[..., 0] != 0) & ~inequality
    first = level & (level.cumsum(-1) == 1)
    top = torch.where(ub > 0, theta, -torch.inf).amax(-1, keepdim=True)
    top = torch.where(level.any(-1, keepdim=True) & torch.isfinite(top), top, 0.0)
    return theta - top, first * E[..., 0] * top  # the entries are ±1


def _unconstrained(
    theta: Tensor, E: Tensor, f: Tensor, ub: Tensor, entropic: bool, maps: Maps | None
) -> tuple[Dual, Tensor]:
    """Without rows the scores are all there is."""
    x = Programs(theta, E, f, ub.clamp(min=0.0), f[:1], 0, entropic, maps).at(theta, f).x
    impossible = (ub < 0).any(-1)
    status = torch.where(impossible, int(Status.INFEASIBLE), int(Status.CONVERGED)).to(torch.int8)
    zero = torch.zeros_like(theta[:, 0])
    dual = Dual(x, f, f, status, torch.zeros_like(status, dtype=torch.int64), zero, torch.zeros_like(impossible))
    return dual, torch.zeros(1, 0, 0, dtype=E.dtype, device=E.device)


def _forced(E: Tensor, f: Tensor, ub: Tensor, inequality: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds that the rows imply one by one: which entries can only be zero, and which programs have no point.

    A row that is never negative and must be zero leaves only zeros where it has entries; every round may free another
    row to do so.
    """
    impossible = (ub < 0).any(-1)
    ub = ub.clamp(min=0.0)
    rounding = _SURE * f.abs()
    for _ in range(f.shape[-1] + 1):
        least, most = (_extreme(E, ub, sign) for sign in (-1.0, 1.0))
        impossible = impossible | ((f < least - rounding) | (~inequality & (f > most + rounding))).any(-1)
        low = (least == 0) & (f <= 0) & (f >= 0)  # nothing but zero will do
        high = (most == 0) & (f == 0) & ~inequality
        zero = (low.unsqueeze(-1) & (E > 0)) | (high.unsqueeze(-1) & (E < 0))
        new = zero.any(-2) & (ub > 0)
        if not checks.host_bool(new.any()):
            break
        ub = torch.where(new, 0.0, ub)
    return ub, impossible


def _extreme(E: Tensor, ub: Tensor, sign: float) -> Tensor:  # (N or 1, m, n), (N, n) -> (N, m)
    """The least (−1) or the largest (+1) value of each row over the box 0 ≤ x ≤ u."""
    part = (sign * E).clamp(min=0.0)
    bounded = torch.isfinite(ub)
    unbounded = matvec((part > 0).to(E.dtype), (~bounded).to(E.dtype)) > 0
    return sign * torch.where(unbounded, torch.inf, matvec(part, torch.where(bounded, ub, 0.0)))


def _centre(E: Tensor, f: Tensor, ub: Tensor, entropic: bool) -> Tensor:  # -> (N, n)
    """Where the path of scores starts: all entries of the one size that the rows ask for, below the bounds."""
    total = E.abs().sum(-1)
    asked = (f != 0) & (total > 0)
    logs = torch.where(asked, (f.abs() / torch.where(total > 0, total, 1.0)).clamp(min=1e-300).log(), 0.0)
    count = asked.sum(-1, keepdim=True)
    level = torch.where(count > 0, logs.sum(-1, keepdim=True) / count.clamp(min=1), -1.0)
    bounded = torch.isfinite(ub) & (ub > 0)
    bound = torch.where(bounded, ub, 1.0)
    if entropic:
        share = (level.exp() / bound).clamp(1e-12, 0.5)
        return torch.where(bounded, torch.logit(share), level + 1).expand_as(ub)
    return torch.where(bounded, torch.minimum(level, (bound / 2).log()), level) + 1
