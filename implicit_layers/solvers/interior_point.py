r"""The solver of convex quadratic programs: which form suits, what became of every problem, what a derivative needs.

    min ½ zᵀQz + pᵀz   subject to   A z = b,   G z ≤ h,   lb ≤ z ≤ ub

The dual form eliminates z and works on m x m matrices: for strictly convex programs without bounds and not many more
rows than unknowns. The condensed form eliminates the duals and works on n x n matrices: for everything else. Both
follow a central path only to find what is active, and the dual form only where a guess corrected by its own signs does
not; the answer is a verified solve on that, exact to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentError
from implicit_layers.kkt import condensed, quadratic
from implicit_layers.kkt.program import ActiveSet, Data, Program
from implicit_layers.solution import Degeneracy, SolveInfo, Status
from implicit_layers.solvers import (
    active_set,
    central_point,
    compiled,
    condensed_solve,
    dual_path,
    infeasibility,
    optimal_face,
)
from implicit_layers.solvers.central_point import BarrierPoint
from implicit_layers.solvers.condensed_solve import Outcome

_MANY_ROWS = 2.5  # inequality rows for each unknown, beyond which the condensed form is faster

# Above which residual an answer may be one of a program that has none, far out, where everything is small relative to
# the point; and above which residual relative to the data it is none without a proof.
_SUSPECT = {torch.float64: (2e-12, 1e-6), torch.float32: (2e-6, 1e-3)}
_LONG = 20  # iterations of the dual form, beyond which the condensed form has a try too
_POOR = 1e-12  # a residual of the dual form above which the condensed form has a try
_ORDINARY = 1e50  # the largest entry of a row, and the inverse of the smallest, of which the dual form takes squares
_STEEP = 1e8  # a condition of its factors above which digits are lost that the residual does not show


class QPResult(NamedTuple):
    """Points, duals, active sets, factor and outcome of a batch of programs, in one batch dimension."""

    z: Tensor  # (N, n)
    y: Tensor  # (N, m): (nu, lam)
    bound: Tensor  # (N, n): λ_ub − λ_lb
    active: Tensor  # (N, m): 1 on rows held in the end
    fixed: Tensor  # (N, n): +1 at ub, -1 at lb, 0 free
    factor: quadratic.Factor | condensed.Factor
    degenerate: Tensor  # (N,) int8: whether and why the derivative is not unique, flags of `Degeneracy`
    condition: Tensor  # (N,): estimated condition of the scaled KKT system on the active set; inf where singular
    info: SolveInfo

    def put(self, data: Data, index: Tensor, part: QPResult) -> QPResult:
        """Replace what was found for the programs `index` of `data`; factors of two forms all become condensed ones."""

        def merge(old: Tensor, new: Tensor) -> Tensor:
            return old.index_copy(0, index, new.to(old.dtype))

        z, y, bound, active, fixed = (merge(a, b) for a, b in zip(self[:5], part[:5], strict=True))
        alike = self.factor.active.shape[-1] == part.factor.active.shape[-1]  # bounds are rows of some
        if alike and isinstance(self.factor, quadratic.Factor) and isinstance(part.factor, quadratic.Factor):
            factor: quadratic.Factor | condensed.Factor = self.factor.put(self.z.shape[0], index, part.factor)
        else:
            factor = condensed.factorise(data, active, fixed, ask=True)
        info = SolveInfo(*(merge(a, b) for a, b in zip(self.info, part.info, strict=True)))
        degenerate, condition = merge(self.degenerate, part.degenerate), merge(self.condition, part.condition)
        return QPResult(z, y, bound, active, fixed, factor, degenerate, condition, info)

    def take(self, index: Tensor) -> QPResult:
        """Keep the programs of `index`, but for the factor, which stays whole."""
        info = SolveInfo(*(field[index] for field in self.info))
        return self._replace(
            z=self.z[index],
            y=self.y[index],
            bound=self.bound[index],
            active=self.active[index],
            fixed=self.fixed[index],
            degenerate=self.degenerate[index],
            condition=self.condition[index],
            info=info,
        )


@dataclass(frozen=True)
class InteriorPoint:
    """Predictor–corrector interior point with a verified active-set end, for convex quadratic programs.

    All programs of a batch advance in the same tensors on the device of the data; those that have ended are taken out.
    Programs with equalities only, or without constraints, are one linear solve and no iteration.

    Args:
        tol: largest relative KKT residual of an accepted answer, by default 1e-8 for float64 data, 2e-6 for float32
            data, and 1e-5 for what is solved in float32; answers usually are at rounding, far below it.
        max_iter: cap on the interior-point iterations, and on the rounds of the search before them.
        check_every: ask the host every so many iterations which programs have converged. 0: never, no host
            synchronisation at all: all max_iter iterations and a fixed number of active-set rounds, the condensed
            form, no search for certificates of infeasibility.
        precision: "mixed": solve in float64 whatever the data; "native": solve float32 data in float32.
        form: "dual", "condensed", or "auto" by kind and shape.
        backend: "torch"; "compiled", the kernel for small and medium programs on the CPU, an error where the package
            was built without one; "auto", the kernel where there is one. What it does not settle, and programs that it
            is not made for, go to the tensors of PyTorch; both give the same answers.

    Raises: ArgumentError, ArgumentTypeError: a setting is out of its range.
    Cost:   an iteration is one Cholesky factorisation of an (n_ineq, n_ineq) matrix a program in the dual form, of an
            (n, n) matrix in the condensed form, and in the kernel where there are bounds; and a host synchronisation
            every `check_every`.
    """

    tol: float | None = None
    max_iter: int = 60
    check_every: int = 1
    precision: Literal["mixed", "native"] = "mixed"
    form: Literal["auto", "dual", "condensed"] = "auto"
    backend: Literal["auto", "compiled", "torch"] = "auto"

    def __post_init__(self) -> None:
        checks.stopping(self.tol, self.max_iter)
        checks.whole("check_every", self.check_every, least=0)
        for name, value, among in (
            ("precision", self.precision, ("mixed", "native")),
            ("form", self.form, ("auto", "dual", "condensed")),
            ("backend", self.backend, ("auto", "compiled", "torch")),
        ):
            if value not in among:
                raise ArgumentError(f"{name} must be one of {among}, got {value!r}")
        if self.check_every == 0 and self.form == "dual":
            raise ArgumentError("form='dual' asks the host how far it is; with check_every=0 use form='condensed'")

        if self.backend == "compiled":
            compiled.required()

    def tolerance(self, dtype: torch.dtype) -> float:
        """Give the tolerance for data of a dtype: no smaller than what their own rounding leaves of a residual."""
        if self.tol is not None:
            return self.tol
        if dtype == torch.float64:
            return 1e-8
        return 1e-5 if self.precision == "native" else 2e-6

    @torch.no_grad()
    def solve(self, data: Data, batch: int, begin: ActiveSet | None = None, *, tol: float | None = None) -> QPResult:
        """Solve a batch of programs; no data are refused here, Q is taken as symmetric.

        `begin`: an active set to try first; what it does not settle is solved from nothing. Not with check_every=0.
        `tol`: by default that of the dtype of `data`.
        """
        if tol is not None:
            self = replace(self, tol=tol)
        if self.precision == "mixed":
            data = data.to(torch.float64)
        if self.check_every and data.p.dtype == torch.float64 and self.form != "condensed":
            chol_q = self._dual_form_applies(data)
            if chol_q is not None:
                return self._solve_dual(data, batch, chol_q, begin)
        return self._solve_condensed(data, batch, begin)

    @torch.no_grad()
    def solve_barrier(self, data: Data, batch: int, barrier: Tensor | float) -> BarrierPoint:
        """Find the minimiser of ½ zᵀQz + pᵀz − μ Σ log(slack of every inequality and bound) on A z = b.

        `barrier` is μ > 0, a number or (N,). No Q is refused, and no certificate looked for where there is none.
        """
        if self.precision == "mixed":
            data = data.to(torch.float64)
        mu = torch.as_tensor(barrier, dtype=data.p.dtype, device=data.p.device).expand(batch)
        return central_point.solve(data, batch, mu, self.max_iter, self.check_every)

    def _dual_form_applies(self, data: Data) -> Tensor | None:
        """Tell whether the dual form solves these programs, and well: the factor of Q, or None."""
        n, m = data.Q.shape[-1], data.E.shape[-2]
        if data.compliance is not None or (self.form == "auto" and m - data.n_eq > _MANY_ROWS * n):
            return None
        chol_q, definite = quadratic.check_definite(data.Q)
        suits = definite.all() & (data.f - data.f == 0).all()  # which only finite numbers satisfy
        sizes = torch.cat([data.E.abs().amax(-1).flatten(), data.Q.diagonal(dim1=-2, dim2=-1).flatten()])
        suits = suits & ((sizes <= 0) | ((sizes * _ORDINARY > 1.0) & (sizes < _ORDINARY))).all()
        for bound in (data.lb, data.ub):
            suits = suits if bound is None else suits & torch.isinf(bound).all()
        return chol_q if checks.host_bool(suits) else None

    def _solve_dual(self, data: Data, batch: int, chol_q: Tensor, begin: ActiveSet | None) -> QPResult:
        """Solve in the dual form; where it fails or does poorly, try other ways before giving up."""
        tol = self.tolerance(data.p.dtype)
        program = dual_program(data, chol_q)
        start = None if begin is None else begin.active
        result, poor, steps = self._answer_dual(program, data, batch, start)
        if steps > _LONG:
            poor = poor | (result.info.iterations > _LONG)
        poor = poor & (result.info.status != int(Status.INFEASIBLE))
        odd = poor | (result.degenerate == int(Degeneracy.WEAK))
        if not batch or not checks.host_bool(odd.any()):
            return result
        index = odd.nonzero().squeeze(-1)
        if data.n_eq:
            result = self._recentre(program, data, result, index)
        before = result.degenerate
        result = self._take_ties_in(program, data, result, index)
        poor = poor & (result.degenerate == before)
        index = poor.nonzero().squeeze(-1)
        if not index.numel():
            return result
        if self.form != "dual":
            result = self._rescue(data, batch, result, index)
            result = self._take_ties_in(program, data, result, index)
        part = data.take(index)
        found = _roughness(part, result.z[index], result.y[index], 4 * torch.finfo(data.p.dtype).eps / tol)
        info = result.info
        residual = torch.maximum(info.residual[index], found)
        lost = info.converged[index] & (residual > tol)
        status = torch.where(lost, int(Status.NOT_CONVERGED), info.status[index]).to(torch.int8)
        return result._replace(
            info=info._replace(
                status=info.status.index_copy(0, index, status),
                converged=info.converged.index_copy(0, index, status == int(Status.CONVERGED)),
                residual=info.residual.index_copy(0, index, residual),
            )
        )

    def _answer_dual(
        self, program: active_set.Program, data: Data, batch: int, start: Tensor | None
    ) -> tuple[QPResult, Tensor, int]:
        """Solve in the dual form; also where that has gone poorly, (N,) bool, and the most iterations."""
        tol = self.tolerance(data.p.dtype)
        answers = dual_path.solve(program, batch, tol=tol, max_iter=self.max_iter, start=start)
        factor = answers.factor(program)
        degenerate, residual, iterations = answers.degenerate.to(torch.int8), answers.residual, answers.iterations
        converged = answers.status == int(Status.CONVERGED)
        condition = quadratic.condition(factor).expand(batch)
        if answers.dependent:
            condition = torch.where(degenerate & int(Degeneracy.DEPENDENT) > 0, torch.inf, condition)
        info = SolveInfo(answers.status, converged, iterations, residual)
        zero = torch.zeros_like(answers.z)
        result = QPResult(answers.z, answers.y, zero, answers.active, zero, factor, degenerate, condition, info)
        poor = (torch.maximum(residual, _roughness(data, answers.z, answers.y)) > _POOR) | (condition > _STEEP)
        if tol < _POOR:
            poor = poor | (residual > tol)
        if answers.surrendered:
            poor = poor | converged.logical_not()
        return result, poor, answers.steps

    def _take_ties_in(self, program: active_set.Program, data: Data, result: QPResult, index: Tensor) -> QPResult:
        """Where rows without a dual are on the span of those with one, none of them is more active than the others."""
        index = index[result.degenerate[index] == int(Degeneracy.WEAK)]
        if not index.numel():
            return result
        part, found = program.take(index), result.take(index)
        ties = active_set.tied(part, found.active, found.z)
        rows = ties.any(-1).nonzero().squeeze(-1)
        if not rows.numel():
            return result
        index, part, found = index[rows], part.take(rows), found.take(rows)
        active = torch.where(ties[rows], 1.0, found.active)
        y = active_set.shared_duals(part, active, found.y)
        residual = part.residual(found.z, y)
        factor = quadratic.factorise_with_ridge(part.reduced, active, active_set.RIDGE)
        found = found._replace(
            y=y,
            active=active,
            degenerate=torch.full_like(found.degenerate, int(Degeneracy.DEPENDENT)),
            condition=torch.full_like(found.condition, torch.inf),
            info=found.info._replace(residual=residual),
        )
        good = (residual <= min(self.tolerance(data.p.dtype), _POOR)).nonzero().squeeze(-1)
        return result.put(data, index[good], found.take(good)._replace(factor=factor.take(good)))

    def _recentre(self, program: active_set.Program, data: Data, result: QPResult, index: Tensor) -> QPResult:
        """Solve some programs again, seen from the minimum on their equalities.

        Around that point z₁, ν₁ the program is one in z − z₁ and ν − ν₁ with the cost Qz₁ + p + Aᵀν₁ and the sides
        f − Ez₁. Where the equalities hold a long p, that cost is little more than rounding, and the minimum without
        constraints, whose rounding hides what is active, no longer far.
        """
        before = torch.maximum(
            result.info.residual[index], _roughness(data.take(index), result.z[index], result.y[index])
        )
        weak = result.degenerate[index] == int(Degeneracy.WEAK)
        wanted = (before > _POOR) | result.info.converged[index].logical_not() | weak
        if not checks.host_bool(wanted.any()):
            return result
        index, before, weak = index[wanted], before[wanted], weak[wanted]
        part, old, n_eq = program.take(index), data.take(index), data.n_eq
        equalities = (torch.arange(data.E.shape[-2], device=data.E.device) < n_eq).to(data.p.dtype)
        equalities = equalities.expand(index.shape[0], -1)
        tol = self.tolerance(data.p.dtype)
        centre = active_set.solve_on(
            part, equalities, equalities, tol=tol, sign_tol=torch.inf, refine=active_set.REFINE_DEPENDENT
        )
        z, y = torch.nan_to_num(centre.z), torch.nan_to_num(centre.y * equalities)
        cost, side = part.gradient(z, y), old.f - quadratic.matvec(old.E, z)
        moved = old._replace(p=cost, f=side)
        around, _, _ = self._answer_dual(dual_program(moved, part.reduced.chol_q), moved, index.shape[0], None)
        z, y = z + around.z, y + around.y
        residual = part.residual(z, y)
        after = torch.maximum(residual, _roughness(old, z, y))
        better = result.info.converged[index].logical_not() | (after < 0.1 * before)
        better = better | (weak & (around.degenerate == 0) & (after <= before.clamp(min=_POOR)))
        better = better & around.info.converged
        if not checks.host_bool(better.any()):
            return result
        around = around._replace(z=z, y=y, info=around.info._replace(residual=residual))
        return result.put(data, index[better], around.take(better)._replace(factor=around.factor.take(better)))

    def _rescue(self, data: Data, batch: int, result: QPResult, index: Tensor) -> QPResult:
        """Solve some programs again in the condensed form; where that is better, all go on in it."""
        part = data.take(index)
        again = self._solve_condensed(part, index.shape[0])
        old = torch.maximum(result.info.residual[index], _roughness(part, result.z[index], result.y[index]))
        new = torch.maximum(again.info.residual, _roughness(part, again.z, again.y))
        tried = (result.info.iterations[index] > _LONG) | (again.condition < 0.1 * result.condition[index])
        better = again.info.converged & ((new < 0.1 * old) | (tried & (new <= torch.clamp(old, min=_POOR))))
        better = better | (~result.info.converged[index] & (again.info.status != int(Status.NOT_CONVERGED)))
        if not checks.host_bool(better.any()):
            return result
        return result.put(data, index[better], again.take(better))

    def _solve_condensed(self, data: Data, batch: int, begin: ActiveSet | None = None) -> QPResult:
        """Solve in the condensed form."""
        tol = self.tolerance(data.p.dtype)
        program = Program.of(data)
        settings = condensed_solve.Settings(tol, self.max_iter, self.check_every)
        outcome = condensed_solve.solve(program, batch, settings, begin)
        outcome, factor = condensed_solve.polished(program, outcome, settings)
        plural = torch.zeros_like(outcome.exact)
        suspicious, far = _SUSPECT[program.p.dtype]
        near = outcome.absolute <= far
        converged = (outcome.residual <= tol) & (near | (self.check_every > 0))
        status = torch.where(converged, int(Status.CONVERGED), int(Status.NOT_CONVERGED)).to(torch.int8)
        status = torch.where(data.impossible(batch), int(Status.INFEASIBLE), status).to(torch.int8)
        if self.check_every and batch:
            suspect = (outcome.residual > min(tol, suspicious)) | ~near | ~converged
            suspect = suspect & (status != int(Status.INFEASIBLE))
            if checks.host_bool(suspect.any()):
                index = suspect.nonzero().squeeze(-1)
                why = infeasibility.reasons(data.take(index), index.shape[0], settings)
                why = torch.where(why == int(Status.NOT_CONVERGED), status[index], why)
                status = status.index_copy(0, index, why)
            solved = status == int(Status.CONVERGED)
            outcome, factor, plural = _least_norm(data, program, outcome, factor, solved, settings)
        converged = status == int(Status.CONVERGED)
        z, y, bound = program.unscaled(outcome.z, outcome.y, outcome.bound)
        dependent = factor.singular & 2 > 0
        if data.compliance is None:  # more of them than unknowns, whatever rounding makes of the factor
            dependent = dependent | (outcome.active.sum(-1) + (outcome.fixed != 0).sum(-1) > data.Q.shape[-1])
        degenerate = outcome.weak * int(Degeneracy.WEAK)
        degenerate = degenerate + dependent * int(Degeneracy.DEPENDENT)
        degenerate = degenerate + (plural | (factor.singular & 1 > 0)) * int(Degeneracy.PRIMAL)
        info = SolveInfo(status, converged, outcome.iterations, outcome.residual)
        condition = torch.where(dependent, torch.inf, condensed.condition(program, factor))
        return QPResult(z, y, bound, outcome.active, outcome.fixed, factor, degenerate.to(torch.int8), condition, info)


def dual_program(data: Data, chol_q: Tensor) -> active_set.Program:
    """Eliminate z."""
    Q, p, E, f, _, _, n_eq, _ = data
    return active_set.Program(Q, p, E, f, n_eq, quadratic.reduce(chol_q, p, E, f, n_eq, active_set.RIDGE))


def _roughness(data: Data, z: Tensor, y: Tensor, beyond: float = 0.0) -> Tensor:  # -> (N,)
    """Measure stationarity relative to its largest term, and rows relative to the length of theirs.

    `beyond`: the share of |p|/|Q| by which z may be longer than it is.
    """
    tiny = torch.finfo(z.dtype).tiny
    terms = torch.stack(
        (quadratic.matvec(data.Q, z), data.p.expand_as(z), quadratic.transposed_matvec(data.E, y)),
    )
    stationarity = quadratic.largest(terms.sum(0)) / terms.abs_().amax((0, -1)).clamp_(min=tiny)
    if not y.shape[-1]:
        return stationarity
    over = quadratic.matvec(data.E, z).sub_(data.f)
    over[:, : data.n_eq].abs_()
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    if beyond:
        free = quadratic.largest(data.p) / quadratic.largest(data.Q.flatten(-2)).clamp_(min=tiny)
        length = length + beyond * free.unsqueeze(-1)
    reach = torch.addcmul(data.f.abs(), torch.linalg.vector_norm(data.E, dim=-1), length).clamp_(min=tiny)
    return torch.maximum(stationarity, over.div_(reach).amax(-1))


def _least_norm(
    data: Data,
    program: Program,
    outcome: Outcome,
    factor: condensed.Factor,
    solved: Tensor,
    settings: condensed_solve.Settings,
) -> tuple[Outcome, condensed.Factor, Tensor]:
    """Where the minimiser is not unique, go to that of least norm; also tells where, (N,) bool."""
    plural = torch.zeros_like(outcome.exact)
    doubtful = solved & optimal_face.doubtful(program, outcome, factor.singular)
    if not checks.host_bool(doubtful.any()):
        return outcome, factor, plural
    index = doubtful.nonzero().squeeze(-1)
    part, some = program.take(index), outcome.take(index)
    free = optimal_face.undetermined(part, optimal_face.held(part, some)).nonzero().squeeze(-1)
    if not free.numel():
        return outcome, factor, plural
    index, part, some = index[free], part.take(free), some.take(free)
    moved, other = optimal_face.nearest(data.take(index), part, some, factor.singular[index], settings)
    plural[index] = other
    outcome = outcome.replace(index, moved)
    return outcome, condensed_solve.factored(program, outcome, ask=True), plural
