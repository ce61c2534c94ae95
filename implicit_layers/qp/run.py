"""From the data of a batch of programs to everything that a solve leaves, and the linear solve of its derivative.

Plain functions of tensors, without derivatives of their own: `derivative` gives them theirs, `operators` makes them
single operations for the compiler.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks, transforms
from implicit_layers.eager import uncompiled
from implicit_layers.errors import DegenerateGradientWarning, NotPositiveDefiniteError, warn
from implicit_layers.kkt import condensed, quadratic
from implicit_layers.kkt.program import ActiveSet, Data, relative_residual
from implicit_layers.qp.arguments import Program, refuse_values
from implicit_layers.qp.value import optimal_value, slacks
from implicit_layers.solution import Degeneracy, OnFailure, QPInfo, SolveInfo, Status, report_failure
from implicit_layers.solvers import active_set, compiled, interior_point
from implicit_layers.solvers.active_set import REFINE, REFINE_DEPENDENT
from implicit_layers.solvers.interior_point import InteriorPoint, QPResult

Gradient = Literal["exact", "least_norm", "smoothed"]

KKT_EVENT_NDIM = (2, 2, 2, 1, 1, 1, 1, 0)  # of Q, A, G, the four right-hand sides and `degenerate`
_FACTORS: dict[int, tuple[Any, tuple[int, ...]]] = {
    len(form._fields): (form, events)
    for form, events in ((quadratic.Factor, quadratic.EVENT_NDIM), (condensed.Factor, condensed.EVENT_NDIM))
}
_NO_INSIDE = (
    'gradient="smoothed" needs a point that satisfies every inequality strictly, not by a hair: without one take '
    'gradient="least_norm". Else raise max_iter or rescale the data.'
)
DIFFERENTIABLE = 6  # fields of an `Outcome`, from the first on
_SINGLE = 14  # fields of an `Outcome` that are one tensor
_ACTIVE_SET = (1, 1)  # a factor that is not one yet: active rows and fixed unknowns


def factor_event_ndim(count: int) -> tuple[int, ...]:
    """Trailing dimensions of the tensors of a factor, which their number gives away."""
    return _ACTIVE_SET if count == len(_ACTIVE_SET) else _FACTORS[count][1]


class Settings(NamedTuple):
    """What a solve needs besides tensors."""

    solver: InteriorPoint
    on_failure: OnFailure = "raise"
    gradient: Gradient = "exact"
    smoothing: float = 0.0
    checked: bool = False  # whether the values of the arguments are known to be fit
    begin: ActiveSet | None = None  # what to try first
    plain: bool = False  # whether all data are known to be ordinary tensors
    settled: compiled.Settled | None = None  # what the compiled kernel has made of the data, where it was asked already
    elastic: bool = False  # whether rows may be off by their duals, at the price ½|Az − b|² + ½|max(Gz − h, 0)|²

    @property
    def synchronises(self) -> bool:
        """Whether values may be read back to the host."""
        return self.solver.check_every > 0


class Outcome(NamedTuple):
    """What a solve leaves, one entry a problem."""

    z: Tensor  # (*B, n)
    nu: Tensor  # (*B, n_eq)
    lam: Tensor  # (*B, n_ineq)
    bound: Tensor  # (*B, n) λ_ub − λ_lb, or (*B, 0) without bounds
    s: Tensor  # (*B, n_ineq) h − Gz
    value: Tensor  # (*B,) ½ zᵀQz + pᵀz
    pull_lb: Tensor  # like `bound`: the share of a change of lb that the unknown's own condition sees
    pull_ub: Tensor  # like `bound`: the same for ub
    degenerate: Tensor  # (*B,) int8, see `Degeneracy`
    condition: Tensor  # (*B,)
    status: Tensor  # (*B,) int8, see `solution.Status`
    converged: Tensor  # (*B,) bool
    iterations: Tensor  # (*B,) int64
    residual: Tensor  # (*B,)
    smooth: tuple[Tensor, ...]  # (z, nu, lam) where the derivative is taken instead of at the solution, or nothing
    factor: tuple[Tensor, ...]  # the fields of a `quadratic.Factor` or a `condensed.Factor`, or an active set

    @property
    def info(self) -> QPInfo:
        """How the solve went."""
        return QPInfo(self.status, self.converged, self.iterations, self.residual, self.degenerate, self.condition)

    @staticmethod
    def of(gradient: Gradient, tensors: tuple[Tensor, ...]) -> Outcome:
        """Take the tensors of `flat` apart again."""
        end = _SINGLE + (3 if gradient == "smoothed" else 0)
        fields: tuple[Any, ...] = (*tensors[:_SINGLE], tensors[_SINGLE:end], tensors[end:])
        return Outcome(*fields)

    def flat(self) -> tuple[Tensor, ...]:
        """All tensors in a row."""
        *single, smooth, factor = self
        return *single, *smooth, *factor


@uncompiled
def run(settings: Settings, *tensors: Tensor | None, factor: bool = True) -> Outcome:
    """Solve a batch of programs; the tensors are those of `arguments.Program`.

    Without `factor` the active set is kept instead of the factor on it, so that the sizes of what is returned do not
    depend on how the programs were solved.
    """
    program = Program(*tensors)  # type: ignore[arg-type]
    solver, batch = settings.solver, program.batch
    settled = settled_by_the_kernel(settings, program, batch) if settings.settled is None else settings.settled
    if settled is not None and settled.number < batch.numel():
        settled = _without_ties(settled, program, batch)
    if settled is not None and settled.number == batch.numel():
        return _outcome(settled, factor)
    if settings.synchronises and not settings.checked:
        refuse_values({name: t for name, t in zip(Program._fields, program, strict=True) if t is not None})
    dtype, n_eq = program.p.dtype, program.b.shape[-1]
    bounded = program.lb is not None or program.ub is not None
    with transforms.full_precision(program.p.device):
        data = _flat(program, batch, dtype if solver.precision == "native" else torch.float64)
        if settings.elastic:
            data = data._replace(compliance=data.p.new_ones(1, 1).expand(1, data.E.shape[-2]))
        if settled is not None and settled.number:
            data, result = _solve_the_rest(settings, data, batch, dtype, settled)
        else:
            data, result = _solve_despite_rounding(settings, data, batch, dtype)
        z, y, bound = (t.to(dtype) for t in (result.z, result.y, result.bound))
        residual = result.info.residual
        if dtype != result.z.dtype:  # judge what is returned, not what was rounded away
            rounded = relative_residual(data, *(t.to(result.z.dtype) for t in (z, y, bound)))
            residual = torch.maximum(residual, rounded)
        smooth, pulls, made, central = _derivative_at(settings, data, batch.numel(), result, factor)
    reached = torch.cat((z, y, bound) if bounded else (z, y), dim=-1).abs_().amax(-1)
    representable = (reached < torch.inf) & central
    status, converged = result.info.status, result.info.converged & representable
    status = status.masked_fill(result.info.converged > representable, int(Status.NOT_CONVERGED))

    def shaped(tensor: Tensor) -> Tensor:  # forward-mode differentiation refuses outputs that are views
        return tensor.to(dtype).reshape(*batch, *tensor.shape[1:]).clone()

    if bounded:
        bound, pull_lb, pull_ub = map(shaped, (bound, *pulls))
    else:
        bound, pull_lb, pull_ub = (z.new_empty(*batch, 0) for _ in range(3))
    z = shaped(z)
    with transforms.full_precision(z.device):
        s, value = slacks(z, program.G, program.h), optimal_value(z, program.Q, program.p)
    outcome = Outcome(
        z,
        shaped(y[:, :n_eq]),
        shaped(y[:, n_eq:]),
        bound,
        s,
        value,
        pull_lb,
        pull_ub,
        (result.degenerate * converged).reshape(batch),
        result.condition.to(dtype).reshape(batch),
        status.reshape(batch),
        converged.reshape(batch),
        result.info.iterations.reshape(batch),
        residual.to(dtype).reshape(batch),
        tuple(shaped(t) for t in smooth),
        tuple(quadratic.expand(t, k, batch) for t, k in zip(made, factor_event_ndim(len(made)), strict=True)),
    )
    report_failure(
        outcome.info,
        settings.on_failure,
        what="solve_qp",
        tol=solver.tolerance(dtype),
        max_iter=solver.max_iter,
        advice=_NO_INSIDE if settings.gradient == "smoothed" else "",
    )
    return outcome


def settled_by_the_kernel(
    settings: Settings,
    program: Program,
    batch: torch.Size,
    structure: compiled.Structure | None = None,
    zeros: bool = False,
) -> compiled.Settled | None:
    """What the compiled kernel can do, where it is wanted and may be used; NaN and infinities it leaves alone."""
    Q, p, A, b, G, h, lb, ub = program
    solver, dtype = settings.solver, p.dtype
    if solver.backend == "torch" or not settings.synchronises or solver.form == "condensed" or settings.elastic:
        return None
    if settings.gradient == "smoothed":
        return None
    if dtype == torch.float32 and solver.precision == "native":
        return None
    data, bounded = (Q, p, A, b, G, h), lb is not None or ub is not None
    if structure is None:
        if not compiled.fits(Q, A, G, bounded) or not batch.numel():
            return None
        if not (settings.plain or checks.plain(*(t for t in program if t is not None))):
            return None
    begin, tol = settings.begin, solver.tolerance(dtype)
    start = None if begin is None else torch.cat(begin, dim=-1) if bounded else begin.active
    options: dict[str, Any] = {"tol": tol, "max_iter": solver.max_iter, "start": start}
    return compiled.solve(batch, data, bounds=(lb, ub), **options, known=structure, zeros=zeros)


def _without_ties(settled: compiled.Settled, program: Program, batch: torch.Size) -> compiled.Settled:
    """Leave those weak programs whose rows without a dual depend on those with one to the other solvers.

    With bounds they stay, with the derivative to one side.
    """
    weak = (settled.done & (settled.weak > 0)).reshape(-1).nonzero().squeeze(-1)
    if weak.numel() and settled.bound is None:
        part = _flat(program, batch, torch.float64).take(weak)
        z, active = (t.reshape(batch.numel(), t.shape[-1])[weak].double() for t in (settled.z, settled.factor.active))
        chol_q, _ = torch.linalg.cholesky_ex(part.Q)
        reduced = interior_point.dual_program(part, chol_q)
        ties = active_set.tied(reduced, active, z, torch.finfo(program.p.dtype).eps)
        settled.done.view(-1)[weak] = ties.any(-1).logical_not()
    return settled._replace(number=int(settled.done.sum()))


def _outcome(settled: compiled.Settled, factor: bool) -> Outcome:
    """The outcome where every problem is settled."""
    z, nu, lam, bound, s, value, pull_lb, pull_ub, *_ = settled
    if bound is None or pull_lb is None or pull_ub is None:
        bound, pull_lb, pull_ub = (z.new_empty(*z.shape[:-1], 0) for _ in range(3))
    return Outcome(
        z,
        nu,
        lam,
        bound,
        s,
        value,
        pull_lb,
        pull_ub,
        settled.weak,
        settled.condition,
        torch.zeros_like(settled.weak),
        settled.done,
        settled.iterations,
        settled.residual,
        (),
        tuple(settled.factor) if factor else tuple(_active_set(settled)),
    )


def _active_set(settled: compiled.Settled) -> ActiveSet:
    """What is active, in the dtype of the factor."""
    active = settled.factor.active
    if settled.pull_lb is None or settled.pull_ub is None:
        return ActiveSet(active, torch.zeros_like(settled.z, dtype=active.dtype))
    rows = settled.nu.shape[-1] + settled.lam.shape[-1]
    return ActiveSet(active[..., :rows].contiguous(), (settled.pull_ub - settled.pull_lb).to(active.dtype))


def _solve_the_rest(
    settings: Settings, data: Data, batch: torch.Size, dtype: torch.dtype, settled: compiled.Settled
) -> tuple[Data, QPResult]:
    """Solve what the kernel left; see `_solve_despite_rounding`."""
    count = batch.numel()

    def flat(tensor: Tensor) -> Tensor:
        return tensor.reshape(count, *tensor.shape[len(batch) :])

    z, y = flat(settled.z).to(data.p.dtype), flat(torch.cat([settled.nu, settled.lam], dim=-1)).to(data.p.dtype)
    done = flat(settled.done)
    active, fixed = map(flat, _active_set(settled))
    bound = torch.zeros_like(z) if settled.bound is None else flat(settled.bound).to(z)
    info = SolveInfo(flat(torch.zeros_like(settled.weak)), done, flat(settled.iterations), flat(settled.residual).to(z))
    factor = quadratic.Factor(
        *(quadratic.unexpand(t, k, batch) for t, k in zip(settled.factor, quadratic.EVENT_NDIM, strict=True))
    )
    if settled.bound is None:  # with bounds all go on in the other form
        factor = factor.whole()
    result = QPResult(z, y, bound, active, fixed.to(z), factor, flat(settled.weak), flat(settled.condition).to(z), info)
    index = done.logical_not().nonzero().squeeze(-1)
    part = data.take(index)
    some = settings if settings.begin is None else settings._replace(begin=settings.begin.take(index))
    try:
        moved, rest = _solve_despite_rounding(some, part, torch.Size([index.numel()]), dtype)
    except NotPositiveDefiniteError:
        quadratic.convex(data.Q, batch, torch.finfo(dtype).eps)  # names the problem by its place in the whole batch
        raise
    data = data if moved is part else data.put(count, index, moved)
    return data, result.put(data, index, rest)


def _solve_despite_rounding(
    settings: Settings, data: Data, batch: torch.Size, dtype: torch.dtype
) -> tuple[Data, QPResult]:
    """Solve; data that were rounded before they came are solved as long as others within that rounding could be.

    Returns: the data that were solved, and how.
    """
    solver, count, rounding = settings.solver, batch.numel(), torch.finfo(dtype).eps
    tol = solver.tolerance(dtype)
    result = solver.solve(data, count, settings.begin, tol=tol)
    if not settings.synchronises:
        return data, result
    if isinstance(result.factor, condensed.Factor):  # the other proves Q definite
        Q = quadratic.convex(data.Q, batch, rounding)
        if Q is not data.Q:
            data = data._replace(Q=Q)
            result = solver.solve(data, count, settings.begin, tol=tol)
    if rounding <= torch.finfo(data.p.dtype).eps or checks.host_bool(result.info.converged.all()):
        return data, result
    moved = _nearest(solver, data, count, result, rounding, tol)
    if moved is not data:
        data, result = moved, solver.solve(moved, count, tol=tol)
    if checks.host_bool(result.info.converged.all()):
        return data, result
    coarse = replace(solver, precision="native", form="auto").solve(data.to(dtype), count)
    better = (coarse.info.converged & result.info.converged.logical_not()).nonzero().squeeze(-1)
    return data, result.put(data, better, coarse.take(better))


def _nearest(solver: InteriorPoint, data: Data, batch: int, result: QPResult, rounding: float, tol: float) -> Data:
    """Move right-hand sides and costs that have no solution to the nearest that have, where that is only rounding."""
    Q, p, E, f, lb, ub, n_eq, _ = data
    status = result.info.status
    infeasible, unbounded = status == int(Status.INFEASIBLE), status == int(Status.UNBOUNDED)
    if checks.host_bool(infeasible.any()):
        elastic = data._replace(Q=torch.zeros_like(Q), p=torch.zeros_like(p), compliance=torch.ones_like(f[:1]))
        nearest = solver.solve(elastic, batch, tol=tol)
        terms = f.abs() + quadratic.matvec(E.abs(), nearest.z.abs())
        small = infeasible & (nearest.y.abs() <= 4 * E.shape[-2] * rounding * terms).all(-1)
        if checks.host_bool(small.any()):
            data = data._replace(f=f + torch.where(small.unsqueeze(-1), nearest.y, 0.0))
    if checks.host_bool(unbounded.any()):  # −p onto the directions without end: what is left of p has none
        size = max(Q.shape[0], E.shape[0])
        rows = torch.cat([part.expand(size, -1, -1) for part in (E[:, :n_eq], Q, E[:, n_eq:])], dim=-2)
        sides = torch.where(torch.isfinite(f[:, n_eq:]), 0.0, torch.inf)
        sides = torch.cat([sides.new_zeros(sides.shape[0], n_eq + Q.shape[-1]), sides], dim=-1)
        below = None if lb is None else torch.where(torch.isfinite(lb), 0.0, -torch.inf)
        above = None if ub is None else torch.where(torch.isfinite(ub), 0.0, torch.inf)
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).unsqueeze(0)
        end = solver.solve(Data(eye, p, rows, sides, below, above, n_eq + Q.shape[-1]), batch, tol=tol)
        small = unbounded & (quadratic.largest(end.z) <= 4 * Q.shape[-1] * rounding * quadratic.largest(p))
        if checks.host_bool(small.any()):
            data = data._replace(p=p + torch.where(small.unsqueeze(-1), end.z, 0.0))
    return data


def _derivative_at(
    settings: Settings, data: Data, batch: int, result: QPResult, factor: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor], tuple[Tensor, ...], Tensor]:
    """Say where the derivative is taken, which bounds pull how, with what factor, and whether there is such a point."""
    if settings.gradient != "smoothed":
        sides = (
            (result.fixed < 0, result.fixed > 0) if data.lb is not None or data.ub is not None else (result.fixed,) * 2
        )
        pulls = (sides[0].to(result.z.dtype), sides[1].to(result.z.dtype))
        return (), pulls, tuple(result.factor) if factor else (result.active, result.fixed), result.info.converged
    point = settings.solver.solve_barrier(data, batch, settings.smoothing)
    whole = torch.where(point.stiffness > 0, point.stiffness, 1.0)
    pulls = (
        torch.where(point.fixed != 0, point.fixed < 0, point.stiffness_lb / whole),
        torch.where(point.fixed != 0, point.fixed > 0, point.stiffness_ub / whole),
    )
    made = condensed.factorise(data, point.active, point.fixed, compliance=point.compliance, stiffness=point.stiffness)
    smooth = (point.z, point.y[:, : data.n_eq], point.y[:, data.n_eq :])
    return smooth, pulls, tuple(made), point.converged


@uncompiled
def solve_kkt(settings: Settings, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Solve the KKT system on the active set, K u = r.

    Args: Q, A, G, r_z, r_nu, r_lam, r_bound, degenerate and the tensors of a factor.
    """
    Q, A, G, r_z, r_nu, r_lam, r_bound, degenerate, *factor = tensors
    batch, dtype, n_eq = r_z.shape[:-1], r_z.dtype, r_nu.shape[-1]
    refine, project = REFINE_DEPENDENT, True
    if settings.gradient == "exact" and settings.synchronises:
        project = _warn_of_degeneracy(degenerate)
        refine = REFINE_DEPENDENT if project else REFINE
    with transforms.full_precision(r_z.device):
        parts = [quadratic.unexpand(t, k, batch) for t, k in zip(factor, factor_event_ndim(len(factor)), strict=True)]
        compute = parts[0].dtype
        Q, A, G = (quadratic.unexpand(t, 2, batch).to(compute) for t in (Q, A, G))
        E = stack_rows(A, G)
        right_z, right_y, right_bound = (
            t.reshape(batch.numel(), t.shape[-1]).to(compute) for t in (r_z, torch.cat([r_nu, r_lam], dim=-1), r_bound)
        )
        Q = quadratic.symmetric(Q)
        if len(parts) == len(_ACTIVE_SET):
            form, made = condensed, condensed.factorise(_matrices(Q, E, n_eq), *parts, ask=settings.synchronises)
        else:
            kind, _ = _FACTORS[len(parts)]
            form, made = (quadratic if kind is quadratic.Factor else condensed), kind(*parts)
        held = right_bound if right_bound.shape[-1] else None
        if form is quadratic and held is not None and parts[-1].shape[-1] > E.shape[-2]:  # bounds are rows here
            eye = torch.eye(Q.shape[-1], dtype=compute, device=Q.device).unsqueeze(0)
            E, right_y, held = stack_rows(E, eye), torch.cat([right_y, held], dim=-1), None
        u_z, u_y, u_bound = form.solve(made, Q, E, right_z, right_y, held, refine, project=project)
        if held is None:
            u_y, u_bound = u_y.split([n_eq + r_lam.shape[-1], right_bound.shape[-1]], dim=-1)
    u_nu, u_lam = u_y.to(dtype).reshape(*batch, u_y.shape[-1]).split([n_eq, r_lam.shape[-1]], dim=-1)
    return (
        u_z.to(dtype).reshape(r_z.shape).clone(),
        u_nu.clone(),
        u_lam.clone(),
        u_bound.to(dtype).reshape(r_bound.shape).clone(),
    )


def _flat(program: Program, batch: torch.Size, dtype: torch.dtype) -> Data:
    """Bring the batch to one dimension, stack the rows and take the symmetric part of Q."""
    Q, p, A, b, G, h, lb, ub = program
    Q, p, A, b, G, h = (
        quadratic.unexpand(t, k, batch).to(dtype) for t, k in ((Q, 2), (p, 1), (A, 2), (b, 1), (G, 2), (h, 1))
    )
    lower, upper = (None if t is None else quadratic.unexpand(t, 1, batch).to(dtype) for t in (lb, ub))
    if lower is not None and upper is not None:  # bounds that cross by rounding only hold at one value
        near = 4 * torch.finfo(program.p.dtype).eps * torch.maximum(lower.abs(), upper.abs())
        crossed = (lower > upper) & (lower - upper <= near)
        middle = 0.5 * (lower + upper)
        lower, upper = torch.where(crossed, middle, lower), torch.where(crossed, middle, upper)
    f = stack_rows(b.unsqueeze(-1), h.unsqueeze(-1)).squeeze(-1)
    return Data(quadratic.symmetric(Q), p, stack_rows(A, G), f, lower, upper, b.shape[-1])


def _matrices(Q: Tensor, E: Tensor, n_eq: int) -> Data:
    """A program of which only the matrices count."""
    return Data(Q, Q.new_zeros(1, Q.shape[-1]), E, Q.new_zeros(1, E.shape[-2]), None, None, n_eq)


def stack_rows(A: Tensor, G: Tensor) -> Tensor:
    """Stack the rows of A and G, both flattened: (N or 1, m, n)."""
    if A.shape[-2] == 0 or G.shape[-2] == 0:
        return G if A.shape[-2] == 0 else A
    size = max(A.shape[0], G.shape[0])
    return torch.cat([A.expand(size, -1, -1), G.expand(size, -1, -1)], dim=-2)


def _warn_of_degeneracy(degenerate: Tensor) -> bool:
    """Say which problems have no unique derivative; returns whether there are any."""
    if not checks.host_bool(degenerate.any()):
        return False
    for flag, what in _DEGENERATE.items():
        where = (degenerate & int(flag)) != 0
        if checks.host_bool(where.any()):
            first = f" (first: index {checks.index_of(where)})" if where.ndim else ""
            warn(
                f"solve_qp: {int(where.sum())} of {where.numel()} problems{first} have {what}. "
                'Pass gradient="least_norm" to take that derivative without this warning, or gradient="smoothed".',
                DegenerateGradientWarning,
            )
    return True


_DEGENERATE = {
    Degeneracy.DEPENDENT: (
        "active constraints that depend on each other, so that duals and derivatives are not unique; the derivative "
        "of least norm is used. Remove duplicated or redundant rows"
    ),
    Degeneracy.WEAK: (
        "a constraint that is only just active (its dual and its slack are both zero), where the solution has a kink; "
        "the derivative to one side is used"
    ),
    Degeneracy.PRIMAL: (
        "more than one minimiser; the one of least norm is returned, and directions in which it would jump get no "
        "derivative"
    ),
}
