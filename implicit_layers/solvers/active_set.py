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
from implicit_layers.solution import Degeneracy, Status

RIDGE = 1e-10  # on the unit diagonal of the Schur complement, where active rows depend on each other
REFINE = 1  # refinement steps on a factor without ridge
REFINE_DEPENDENT = 6  # with the ridge: each step gains a factor ridge / (smallest non-zero eigenvalue)
_WEAK = 1e-11  # relative size below which a dual or a slack counts as zero
_TIGHT = 1e-11  # relative residual that consistent dependent rows must reach
_NEAR = 1e-3  # of the minimum without constraints: how far from a row z must be known to say that it is on it
_IN_SPAN = 1e-12  # what is left of a squared unit row without its part in the span of others, where it is rounding
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
            return tensor if tensor.shape[0] == 1 else tensor.index_select(0, index)

        Q, p, E, f, n_eq, reduced = self
        part = quadratic.Reduced(*map(pick, reduced._replace(projected=reduced.projected[:1])))
        projected = pick(reduced.projected) if n_eq else part.schur  # without equalities they are the same
        return Program(pick(Q), pick(p), pick(E), pick(f), n_eq, part._replace(projected=projected))

    def minimum(self, dual: Tensor) -> Tensor:  # (k, m) -> (k, n)
        """Minimise the Lagrangian for given duals, scaled: z = −Q⁻¹(p + Eᵀy)."""
        lowered = quadratic.matvec(self.reduced.half, dual).add_(self.reduced.lowered)
        return quadratic.triangular_solve(self.reduced.chol_q, lowered, transposed=True).neg_()

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:  # (k, n), (k, m) -> (k, n)
        """Evaluate Qz + p + Eᵀy."""
        curved = quadratic.matvec(self.Q, z).add_(self.p)  # sums that start with p or f would round more
        return curved.add_(quadratic.transposed_matvec(self.E, y))

    def gap(self, z: Tensor) -> Tensor:  # (k, n) -> (k, m)
        """Evaluate D(Ez − f)."""
        return quadratic.matvec(self.E, z).sub_(self.f).mul_(self.reduced.scale)

    def length(self, z: Tensor) -> Tensor:  # (k, n) -> (k,)
        """Measure |z| in the norm of Q."""
        return torch.linalg.vector_norm(quadratic.transposed_matvec(self.reduced.chol_q, z), dim=-1)

    def residual(self, z: Tensor, y: Tensor) -> Tensor:  # (k, n), (k, m) -> (k,)
        """Measure the relative KKT residual at a point."""
        dual = y / self.reduced.scale
        return quadratic.relative_residual(
            self.reduced,
            self.n_eq,
            dual,
            quadratic.largest(dual),
            self.gradient(z, y),
            self.gap(z),
            self.length(z),
        )


class ActiveSetPoint(NamedTuple):
    """What one solve on a guessed active set gives, one entry a program."""

    z: Tensor  # (k, n)
    y: Tensor  # (k, m): (nu, lam), lam >= 0
    factor: quadratic.Factor
    residual: Tensor  # (k,) relative KKT residual
    accepted: Tensor  # (k,) bool
    independent: Tensor  # (k,) bool: the active rows do not depend on each other
    weak: Tensor  # (k,) bool: some inequality has neither a dual nor a slack
    wrong: Tensor  # (k, m) bool: rows whose signs ask to be active where they are not, and the other way round

    def corrected(self, again: Tensor) -> Tensor:
        """Give the active sets that the signs ask for, of some programs."""
        return (self.wrong[again] != self.factor.active[again].bool()).to(self.z.dtype)


def solve_on(
    program: Program,
    active: Tensor,
    y: Tensor,
    *,
    tol: float,
    sign_tol: float,
    refine: int,
    ridge: bool = False,
    made: tuple[Tensor, Tensor] | None = None,
) -> ActiveSetPoint:
    """Solve on the active rows, with a ridge next to the duals `y`, and judge the answer by its KKT conditions.

    `made`: see `quadratic.factorise`.
    """
    n_eq, reduced = program.n_eq, program.reduced
    if ridge:  # next to the duals at hand; without a ridge there is one answer, and zero data must give exact zeros
        factor = quadratic.factorise_with_ridge(reduced, active, RIDGE)
        independent = torch.ones(active.shape[0], dtype=torch.bool, device=active.device)
        start = active * y / reduced.scale
        right = reduced.violation - quadratic.matvec(reduced.schur, start)
        dual = start + quadratic.schur_solve(factor, right)
    else:
        factor, independent = quadratic.factorise(reduced, active, made, narrow=True)
        dual = quadratic.schur_solve(factor, reduced.violation)
    z, y = program.minimum(dual), reduced.scale * dual
    for _ in range(refine):
        lowered = quadratic.triangular_solve(reduced.chol_q, program.gradient(z, y))
        over = quadratic.transposed_matvec(reduced.half, lowered)
        step = quadratic.schur_solve(factor, program.gap(z).sub_(over))
        lowered = lowered.add_(quadratic.matvec(reduced.half, step))  # rows hold better than y can be rounded
        z = z - quadratic.triangular_solve(reduced.chol_q, lowered, transposed=True)
        y = torch.addcmul(y, reduced.scale, step)
    dual = y / reduced.scale
    gradient, gap, length = program.gradient(z, y), program.gap(z), program.length(z)
    size = quadratic.magnitude(reduced, torch.maximum(length, reduced.free_norm))
    longest = quadratic.largest(dual)
    dual_size = torch.maximum(longest, (active * size).amax(-1)) if active.shape[-1] else longest
    of_dual = dual / dual_size.clamp_(min=torch.finfo(dual.dtype).tiny).unsqueeze(-1)
    of_gap = gap / size
    wrong = torch.lerp(of_gap, -of_dual, active) > sign_tol
    near = torch.hypot(of_dual, gap / _near(reduced, length))
    if n_eq:  # equalities are active, whatever the sign of their dual
        wrong[:, :n_eq] = False
        near = near[:, n_eq:]
    weak = near.amin(-1) <= _WEAK if near.shape[-1] else torch.zeros_like(independent)
    residual = quadratic.relative_residual(reduced, n_eq, dual, longest, gradient, gap, length)
    accepted = torch.gt(independent & (residual <= tol), wrong.any(-1))
    y[:, n_eq:].clamp_(min=0.0)
    return ActiveSetPoint(z, y, factor, residual, accepted, independent, weak, wrong)


def _near(reduced: quadratic.Reduced, length: Tensor) -> Tensor:  # (k,) -> (k, m)
    """Give the unit of slacks: the terms of a row at z itself, or what rounding of a far minimum leaves of them."""
    return quadratic.magnitude(reduced, torch.maximum(length, _NEAR * reduced.free_norm))


def tied(program: Program, active: Tensor, z: Tensor, rounding: float = 0.0) -> Tensor:  # -> (k, m) bool
    """Tell which inequalities hold with equality, without a dual, in the span of the active rows.

    `rounding`: relative size of an error of z.
    """
    reduced, m = program.reduced, active.shape[-1]
    held = active.unsqueeze(-1)
    within = reduced.schur * held
    masked = within * active.unsqueeze(-2)
    masked.diagonal(dim1=-2, dim2=-1).add_(1.0 - active)
    lowered = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(masked)[0], within, upper=False)
    rest = reduced.touches - (lowered**2).sum(-2)
    tight = program.gap(z).abs() <= max(_WEAK, 64 * rounding) * _near(reduced, program.length(z))
    inequality = torch.arange(m, device=z.device) >= program.n_eq
    alike = (reduced.schur.abs() * active.unsqueeze(-2)).amax(-1)
    parallel = alike >= 1.0 - _IN_SPAN  # however ill-conditioned the span
    return inequality & (active == 0) & tight & ((rest <= _IN_SPAN) | parallel) & (reduced.touches > 0)


def shared_duals(program: Program, active: Tensor, y: Tensor) -> Tensor:  # -> (k, m)
    """From duals y on some of the active rows towards those of least norm on all, which depend on each other.

    All the way where signs allow it, else half as far as they do.
    """
    reduced = program.reduced
    masked = (reduced.schur * active.unsqueeze(-1)).mul_(active.unsqueeze(-2))
    inverse = torch.linalg.pinv(masked, rtol=1e-11, hermitian=True)
    edge, least = y / reduced.scale, quadratic.matvec(inverse, reduced.violation)
    least = torch.where(least.abs() <= 1e-12 * quadratic.largest(least).unsqueeze(-1), 0.0, least)
    inequality = torch.arange(active.shape[-1], device=y.device) >= program.n_eq
    out = inequality & (least < 0)
    reach = torch.where(out, edge / torch.where(out, edge - least, 1.0), torch.inf).amin(-1, keepdim=True)
    share = torch.where(torch.isinf(reach), 1.0, 0.5 * reach)
    return reduced.scale * torch.lerp(edge, least, share)


class Answers:
    """The answers of a batch, filled in as programs are settled."""

    def __init__(self, program: Program, batch: int) -> None:
        n, m = program.Q.shape[-1], program.E.shape[-2]
        like = program.reduced.schur
        self.sizes = [n, m, m, 1, 1]
        self._take_apart(like.new_zeros(batch, sum(self.sizes)))
        self.residual.fill_(torch.inf)
        self.chol_eq, self.across = program.reduced.chol_eq, program.reduced.across
        self.chol_ineq: Tensor | None = None
        self.iterations = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.status = torch.full((batch,), int(Status.NOT_CONVERGED), dtype=torch.int8, device=like.device)
        self.steps = 0  # the most iterations of any program
        self.dependent = False  # whether the active rows of any program depend on each other
        self.surrendered = False  # whether any program was given up

    def _take_apart(self, found: Tensor) -> None:
        """Keep all that was found in one tensor, so that writing some programs down is one operation."""
        self.found = found
        self.z, self.y, self.active, residual, degenerate = found.split(self.sizes, dim=-1)
        self.residual, self.degenerate = residual.squeeze(-1), degenerate.squeeze(-1)  # the latter of `Degeneracy`

    def factor(self, program: Program) -> quadratic.Factor:
        """Give the factors on the active sets of all programs; that of a failed program is of no use."""
        reduced = program.reduced
        chol_ineq = self._room() if self.chol_ineq is None else self.chol_ineq
        return quadratic.Factor(reduced.chol_q, self.chol_eq, self.across, chol_ineq, reduced.scale, self.active)

    def _room(self) -> Tensor:
        """Make room for the factors, identities at first."""
        batch, n_ineq = self.y.shape[0], self.y.shape[1] - self.chol_eq.shape[-1]
        return _identities(batch, n_ineq, self.y)

    def settle(
        self,
        program: Program,
        index: Tensor,
        active: Tensor,
        y: Tensor,
        *,
        tol: float,
        sign_tol: float,
        refine: int = REFINE,
        rounds: int = 4,
        made: tuple[Tensor, Tensor] | None = None,
        strict: bool = False,
    ) -> Tensor:
        """Solve the programs of `index`, correcting their active sets; returns the positions not settled.

        Args:
            made: what is known of the factor on the first sets, see `quadratic.factorise`.
            strict: leave programs with a row that has neither a dual nor a slack.
        """
        every: Tensor | None = None  # the positions at work; None: all of them
        lost: list[Tensor] = []  # those whose active rows depend on each other
        for left in reversed(range(rounds)):
            point = solve_on(program, active, y, tol=tol, sign_tol=sign_tol, refine=refine, made=made)
            made = None
            if strict:
                point = point._replace(accepted=torch.gt(point.accepted, point.weak))
            good = point.accepted.nonzero().squeeze(-1)
            count = point.accepted.shape[0]
            if good.numel() == count:
                self._keep(index if every is None else index[every], point, None)
                break
            if good.numel():
                self._keep(index if every is None else index[every], point, good)
            again = torch.gt(point.independent, point.accepted).nonzero().squeeze(-1)
            if good.numel() + again.numel() < count:
                hopeless = (point.independent | point.accepted).logical_not().nonzero().squeeze(-1)
                lost.append(hopeless if every is None else every[hopeless])
            if not again.numel():
                break
            at = again if every is None else every[again]
            if not left:
                lost.append(at)
                break
            if again.numel() < count:
                program = program.take(again)
            every, active, y = at, point.corrected(again), point.y[again]
        if not lost:
            return index[:0]
        return lost[0] if len(lost) == 1 else torch.cat(lost).sort().values

    def settle_dependent(self, program: Program, index: Tensor, active: Tensor, y: Tensor, *, tol: float) -> Tensor:
        """Settle programs whose active rows depend on each other; returns the positions not settled.

        Where the rows agree (duplicates, vertices), a ridge that refinement takes away again gives duals next to `y`
        and derivatives of least norm. Where they do not (the two sides of a thin slab), only an independent choice of
        them, large duals first, can be active.
        """
        point = solve_on(program, active, y, tol=min(tol, _TIGHT), sign_tol=1e-7, refine=REFINE_DEPENDENT, ridge=True)
        self._keep_dependent(index, point, point.accepted)
        left = (~point.accepted).nonzero().squeeze(-1)
        if not left.numel():
            return left
        program, active, y = program.take(left), active[left], y[left]
        n, n_eq = program.Q.shape[-1], program.n_eq
        chosen = _independent_rows(program.reduced.schur, active, y / program.reduced.scale, n_eq, n)
        return left[self.settle(program, index[left], chosen, chosen * y, tol=tol, sign_tol=1e-10, refine=3)]

    def give_up(self, program: Program, index: Tensor, active: Tensor, y: Tensor, *, tol: float) -> None:
        """End with the programs that no active set settles: proven infeasible, good enough as they are, or failed."""
        point = solve_on(program, active, y, tol=tol, sign_tol=torch.inf, refine=REFINE_DEPENDENT, ridge=True)
        infeasible = _contradict(program, y)
        z = program.minimum(y / program.reduced.scale)
        residual = program.residual(z, y)
        better = residual < point.residual
        point = point._replace(
            z=torch.nan_to_num(torch.where(better.unsqueeze(-1), z, point.z)),
            y=torch.nan_to_num(torch.where(better.unsqueeze(-1), y, point.y)),
            residual=torch.minimum(residual, point.residual),
        )
        good = ~infeasible & (point.residual <= tol)
        self._keep_dependent(index, point, good)
        rows = (~good).nonzero().squeeze(-1)
        to = index[rows]
        self.surrendered = True
        self.z[to], self.y[to], self.residual[to] = point.z[rows], point.y[rows], point.residual[rows]
        failed = torch.where(infeasible, int(Status.INFEASIBLE), int(Status.NOT_CONVERGED))
        self.status[to] = failed[rows].to(torch.int8)

    def _keep_dependent(self, index: Tensor, point: ActiveSetPoint, where: Tensor) -> None:
        """Write down points on active rows that depend on each other, with the whole of their factor."""
        rows = where.nonzero().squeeze(-1)
        if not rows.numel():
            return
        self._keep(index, point, rows)
        self.dependent = True
        to, batch = index[rows], self.z.shape[0]
        self.degenerate[to] = int(Degeneracy.DEPENDENT)
        self.chol_eq = self.chol_eq.expand(batch, -1, -1).index_copy(0, to, point.factor.chol_eq[rows])
        self.across = self.across.expand(batch, -1, -1).index_copy(0, to, point.factor.across[rows])

    def _keep(self, index: Tensor, point: ActiveSetPoint, rows: Tensor | None) -> None:
        """Write down the points of some rows, all accepted; None: of all of them."""
        found = (point.z, point.y, point.factor.active, point.residual.unsqueeze(-1), point.weak.unsqueeze(-1))
        new = torch.cat(found, dim=-1)
        if rows is None and index.shape[0] == self.z.shape[0]:  # all at once, in their order: nothing to copy
            self.chol_ineq, self.status = point.factor.chol_ineq, torch.full_like(self.status, int(Status.CONVERGED))
            self._take_apart(new)
            return
        chol = point.factor.chol_ineq
        if rows is not None:
            index, chol, new = index[rows], chol[rows], new[rows]
        self._keep_factor(index, chol, new.split(self.sizes, dim=-1)[2])
        self.found[index] = new
        self.status[index] = int(Status.CONVERGED)

    def _keep_factor(self, index: Tensor, chol: Tensor, active: Tensor) -> None:
        """Write down factors on active inequalities, of all rows or without some inactive ones."""
        batch, n_eq = self.y.shape[0], self.chol_eq.shape[-1]
        kept = chol[:0] if self.chol_ineq is None else self.chol_ineq
        if active.shape[-1] - n_eq in (chol.shape[-1], kept.shape[-1]):
            chol = quadratic.spread_out(chol, active[:, n_eq:])
            if kept.shape[0]:
                kept = quadratic.spread_out(kept, self.active[:, n_eq:])
        size = max(chol.shape[-1], kept.shape[-1])
        kept = _widened(kept, size) if kept.shape[0] else _identities(batch, size, chol)
        kept[index] = _widened(chol, size)
        self.chol_ineq = kept


def _identities(count: int, size: int, like: Tensor) -> Tensor:  # (count, size, size)
    """Make factors of nothing that is active."""
    return torch.eye(size, dtype=like.dtype, device=like.device).repeat(count, 1, 1)


def _widened(chol: Tensor, size: int) -> Tensor:  # (k, r, r) -> (k, size, size)
    """Give factors more rows, of the identity."""
    r = chol.shape[-1]
    if r == size:
        return chol
    wider = _identities(chol.shape[0], size, chol)
    wider[:, :r, :r] = chol
    return wider


def _contradict(program: Program, y: Tensor) -> Tensor:  # -> (k,) bool
    """Tell where a combination of the constraints next to `y` proves that no point satisfies them all.

    A combination y of the rows (λ ≥ 0) with Eᵀy = 0 and fᵀy < 0 is such a proof. With rounding,
    yᵀ(E z⁰ − f) / |L⁻¹Eᵀy| bounds from below how far from z⁰ every feasible point lies; it counts as a proof where that
    is `_FAR` times farther than the farthest single constraint, and farther than z⁰ is long.
    """
    reduced = program.reduced
    inequality = torch.arange(y.shape[-1], device=y.device) >= program.n_eq
    violated = torch.where(inequality, reduced.violation.clamp(min=0.0), reduced.violation.abs())
    far = _FAR * torch.maximum(quadratic.largest(violated), torch.finfo(y.dtype).eps * reduced.free_norm)
    dual = _unit(torch.nan_to_num(y) / reduced.scale)
    support = (~inequality | (dual > 1e-6)).to(dual.dtype)
    factor = quadratic.factorise_with_ridge(reduced, support, RIDGE)
    proven = torch.zeros_like(dual.sum(-1), dtype=torch.bool)
    for _ in range(3):
        pulled = quadratic.transposed_matvec(program.E, reduced.scale * dual)
        length = torch.linalg.vector_norm(quadratic.triangular_solve(reduced.chol_q, pulled), dim=-1)
        depth = (dual * reduced.violation).sum(-1)
        rounding = 1e-14 * (dual.abs() * quadratic.magnitude(reduced, reduced.free_norm)).sum(-1)
        proven = proven | ((depth > rounding) & (depth >= far * length))
        dual = RIDGE * quadratic.schur_solve(factor, dual)  # towards Eᵀy = 0
        dual = _unit(torch.where(inequality, dual.clamp(min=0.0), dual))
    return proven


def _unit(vector: Tensor) -> Tensor:  # (k, m) -> (k, m)
    """Scale to largest magnitude 1."""
    return vector / quadratic.largest(vector).clamp(min=torch.finfo(vector.dtype).tiny).unsqueeze(-1)


def _independent_rows(schur: Tensor, active: Tensor, dual: Tensor, n_eq: int, most: int) -> Tensor:  # -> (k, m)
    """Choose at most so many active rows that do not depend on each other: equalities first, then large duals."""
    m = active.shape[-1]
    weight = torch.where(torch.arange(m, device=dual.device) < n_eq, torch.inf, active * dual)
    order = weight.argsort(-1, descending=True)  # (k, m)
    rest = schur.expand(active.shape[0], m, m)
    rest = rest.gather(-2, order.unsqueeze(-1).expand(-1, m, m)).gather(-1, order.unsqueeze(-2).expand(-1, m, m))
    wanted = active.gather(-1, order) > 0
    kept = torch.zeros_like(wanted)
    least = quadratic.least_pivot(schur)
    for j in range(m):  # Cholesky, one row after the other, leaving out rows whose pivot vanishes
        pivot = rest[:, j, j]
        kept[:, j] = wanted[:, j] & (pivot > least) & (kept.sum(-1) < most)
        column = torch.where(kept[:, j, None], rest[:, :, j] * pivot.clamp(min=least).rsqrt()[:, None], 0.0)
        rest = rest - quadratic.outer(column, column)
    return torch.zeros_like(active).scatter(-1, order, kept.to(active.dtype))
