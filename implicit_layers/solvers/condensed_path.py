r"""The central path of any convex quadratic program, followed with one n x n Cholesky factor an iteration.

Rows and bounds are one cone: slacks s = o − C z with C = [G; −I; I], o = (h, −lb, ub), and duals λ. A step of
Mehrotra's method is taken next to the present point (proximal terms ρ on z and δ on the duals), so its matrix

    H = Q + ρ I + Aᵀ A/δ + Cᵀ diag(1/(s/λ + δ)) C

is positive definite for every Q ≥ 0, whatever rows depend on each other and whether or not there is an interior.

Source: Pougkakiotis & Gondzio (2021), An interior point–proximal method of multipliers, Comput. Optim. Appl. 78;
Mehrotra (1992), SIAM J. Optim. 2(4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers.kkt import condensed, quadratic
from implicit_layers.kkt.program import Point, Program, judge

_TO_BOUNDARY = 0.995
_SHORTEST = 1e-8  # a shorter step means that the iteration is stuck
# The proximal terms shrink with λ∘s; ρ stays small, since curvature below it is followed slowly.
_RHO = {torch.float64: (1e-10, 1e-9), torch.float32: (1e-5, 1e-5)}
_DELTA = {torch.float64: (1e-9, 1e-5), torch.float32: (1e-5, 1e-5)}
_PATIENCE = 12  # so many iterations without gain, too


class State(NamedTuple):
    """Where the path is, one entry a program, in scaled units; duals times `balance`."""

    point: Tensor  # (k, n + 2c + n_eq): z, s, λ, ν side by side, so that a step is one operation
    offset: Tensor  # (k, c): o of the cone, 0 where there is no constraint
    there: Tensor  # (k, c): 1 where there is a constraint, else 0
    share: Tensor  # (k, 1): 1 over the number of constraints
    free: Tensor  # (k, n): 1, but 0 where an unknown is pinned
    balance: Tensor  # (k, 1): what makes duals about as large as slacks
    caution: Tensor  # (k,): factor on ρ and δ, raised where the Cholesky factor breaks down
    iterations: Tensor  # (k,) int64
    stuck: Tensor  # (k,) bool
    best: Tensor  # (k,): the smallest merit so far
    since: Tensor  # (k,) int64: iterations since it was last made smaller

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cut the point into z, s, λ and ν."""
        n, c = self.free.shape[-1], self.there.shape[-1]
        z, s, lam, nu = self.point.split([n, c, c, self.point.shape[-1] - n - 2 * c], dim=-1)
        return z, s, lam, nu

    @property
    def z(self) -> Tensor:  # (k, n)
        """The unknowns."""
        return self.parts[0]

    @property
    def s(self) -> Tensor:  # (k, c)
        """Slacks of the cone, 1 where there is no constraint."""
        return self.parts[1]

    @property
    def lam(self) -> Tensor:  # (k, c)
        """Their duals, 0 where there is no constraint."""
        return self.parts[2]

    @property
    def nu(self) -> Tensor:  # (k, n_eq)
        """The duals of the equalities."""
        return self.parts[3]

    def take(self, index: Tensor) -> State:
        """Keep some programs."""
        return State(*(field[index] for field in self))

    def put(self, index: Tensor, part: State) -> State:
        """Write back what `take` took."""
        return State(*(field.index_copy(0, index, new) for field, new in zip(self, part, strict=True)))


def split_rows(program: Program, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cut a vector of rows into equalities and inequalities."""
    equalities, inequalities = rows.split([program.n_eq, rows.shape[-1] - program.n_eq], dim=-1)
    return equalities, inequalities


def split_cone(program: Program, cone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a vector of the cone of programs with bounds: inequality rows, lower bounds, upper bounds."""
    n = program.Q.shape[-1]
    rows, lower, upper = cone.split([cone.shape[-1] - 2 * n, n, n], dim=-1)
    return rows, lower, upper


def cone_image(program: Program, z: Tensor, rows: Tensor | None = None) -> Tensor:  # -> (k, c)
    """Multiply C z; `rows` is E z where it is known."""
    _, image = split_rows(program, quadratic.matvec(program.E, z) if rows is None else rows)
    return torch.cat([image, -z, z], dim=-1) if program.bounded else image


def _cone_offset(program: Program, batch: int) -> tuple[Tensor, Tensor]:
    """Give o and where there are constraints, (k, c) each."""
    parts, there = [split_rows(program, program.f)[1]], [split_rows(program, program.rows)[1]]
    if program.bounded:
        parts += [-program.lb, program.ub]
        there += [program.has_lb, program.has_ub]

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.expand(batch, -1) for t in tensors], dim=-1)

    present = join(there)
    return torch.where(present, join(parts), 0.0), present.to(program.p.dtype)


def duals(program: Program, state: State) -> tuple[Tensor, Tensor]:
    """Give y and the signed dual of the bounds, scaled units."""
    y, bound = _split(program, state.nu, state.lam)
    return y / state.balance, bound / state.balance


def _split(program: Program, nu: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the duals of the cone: (k, m) of all rows, (k, n) of the bounds."""
    if not program.bounded:
        return _joined(nu, lam), nu.new_zeros(1, 1).expand(nu.shape[0], program.Q.shape[-1])
    rows, lower, upper = split_cone(program, lam)
    return _joined(nu, rows), upper - lower


def _joined(equalities: Tensor, inequalities: Tensor) -> Tensor:
    """Undo `split_rows`."""
    return torch.cat([equalities, inequalities], dim=-1) if equalities.shape[-1] else inequalities


def point(program: Program, state: State) -> Point:
    """Judge the state as a solution."""
    return judge(program, state.z, *duals(program, state))


def start(program: Program, batch: int) -> State:
    """Begin at the regularised minimum on the equalities, inside the bounds, with slacks and duals well off zero."""
    dtype, device = program.p.dtype, program.p.device
    n, n_eq = program.Q.shape[-1], program.n_eq
    p = program.p.expand(batch, n)
    size_q, size_p = quadratic.largest(program.Q.flatten(-2)), quadratic.largest(program.p)
    sides = [t.abs().amax(-1) for t in (program.f, program.lb, program.ub) if t.shape[-1]]
    side = torch.stack(torch.broadcast_tensors(*sides)).amax(0)
    side = torch.where(side > 0, torch.maximum(program.units.least, side.clamp(max=1.0)), 1.0)
    steep = torch.maximum(size_q, size_p / side)
    balance = torch.where(steep > 0, steep, 1.0).reciprocal().expand(batch).unsqueeze(-1)
    _, delta = condensed.regularisation(dtype)
    equality = (program.inequality().logical_not()).to(dtype)
    weight = (equality / (delta + program.compliance)).expand(batch, -1)
    free = (program.pinned.logical_not()).to(dtype).expand(batch, n)
    held = torch.where(program.pinned, program.lb, 0.0).expand(batch, n)
    H = condensed.assemble(program, weight, torch.ones_like(p), free, balance)
    chol, _ = torch.linalg.cholesky_ex(H)
    pull = quadratic.transposed_matvec(program.E, weight * (program.f - quadratic.matvec(program.E, held)))
    z = held + free * quadratic.cholesky_solve(chol, free * (pull - balance * (p + quadratic.matvec(program.Q, held))))
    z = torch.where(program.has_lb, torch.maximum(z, program.lb), z)
    z = torch.where(program.has_ub, torch.minimum(z, program.ub), z)
    offset, there = _cone_offset(program, batch)
    slack = there * (offset - cone_image(program, z))
    gradient = balance * (quadratic.matvec(program.Q, z) + p)
    unit = side.expand(batch).unsqueeze(-1)
    margin = torch.maximum(quadratic.largest(slack.clamp(max=0.0)).unsqueeze(-1), 0.1 * unit)
    margin = torch.maximum(margin, 0.1 * quadratic.largest(z).unsqueeze(-1).clamp(max=1e3 * unit))
    if program.bounded:  # stay well inside narrow boxes
        n_ineq = program.E.shape[-2] - n_eq
        width = torch.where(program.has_lb & program.has_ub, 0.5 * (program.ub - program.lb), torch.inf)
        width = width.expand(batch, n)
        width = torch.cat([slack.new_full((batch, n_ineq), torch.inf), width, width], dim=-1)
        least_slack = torch.minimum(margin, width)
    else:
        least_slack = margin.expand_as(slack)
    s = torch.where(there > 0, torch.maximum(slack, least_slack), 1.0)
    height = torch.maximum(quadratic.largest(gradient).unsqueeze(-1), 0.1 * unit)
    lam = there * torch.where(there > 0, height * margin / s, 0.0).clamp(max=1e3 * height)
    return State(
        torch.cat([z, s, lam, p.new_zeros(batch, n_eq)], dim=-1),
        offset,
        there,
        1.0 / there.sum(-1, keepdim=True).clamp(min=1.0),
        free,
        balance,
        p.new_ones(batch),
        torch.zeros(batch, dtype=torch.int64, device=device),
        torch.zeros(batch, dtype=torch.bool, device=device),
        p.new_full((batch,), torch.inf),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


class Progress(NamedTuple):
    """How far a state is, its judgement, and what a step needs of it."""

    measure: Tensor  # (k,): mean of λ∘s relative to the units of the program
    infeasibility: Tensor  # (k,): of the linear equations, relative
    product: Tensor  # (k, c): λ∘s
    total: Tensor  # (k, 1): its sum
    slope: Tensor  # (k, n): stationarity
    row_gap: Tensor  # (k, n_eq): Az − c∘ν − b
    cone_gap: Tensor  # (k, c): o − C z + c∘λ − s

    def take(self, index: Tensor) -> Progress:
        """Keep some programs."""
        return Progress(*(field[index] for field in self))


def progress(program: Program, state: State) -> Progress:
    """Measure complementarity and infeasibility of a state."""
    units, n_eq, balance = program.units, program.n_eq, state.balance
    z, s, lam, nu = state.parts
    y, bound = _split(program, nu, lam)
    curved, image = quadratic.matvec(program.Q, z), quadratic.matvec(program.E, z)
    pulled = quadratic.transposed_matvec(program.E, y)
    largest = quadratic.largest
    dual = torch.maximum(largest(curved), units.dual).mul_(balance.squeeze(-1))
    dual = torch.maximum(dual, largest(pulled))
    slope = torch.addcmul(pulled, balance, curved.add_(program.p))
    if program.bounded:
        dual = torch.maximum(dual, largest(bound))
        slope = slope.add_(bound).mul_(state.free)
    length = torch.linalg.vector_norm(z, dim=-1)
    unit = torch.maximum(length, units.least)
    product = lam * s
    total = product.sum(-1, keepdim=True)
    measure = (total * state.share).squeeze(-1) / (dual * unit)
    gap = (state.offset - s).sub_(cone_image(program, z, image))
    row_gap, _ = split_rows(program, image)
    if program.elastic:
        yielded = program.compliance * y / balance
        of_rows, of_cone = split_rows(program, yielded)
        gap = gap + torch.nn.functional.pad(of_cone, (0, s.shape[-1] - of_cone.shape[-1]))
        row_gap = row_gap - of_rows
    gap = gap.mul_(state.there)
    off = largest(slope) / dual
    if gap.shape[-1]:
        off = torch.maximum(off, largest(gap / torch.maximum(s, unit.unsqueeze(-1))))
    if n_eq:
        side, _ = split_rows(program, program.f)
        row_gap = row_gap - side
        terms = side.abs() + torch.maximum(length, 1e-5 * units.primal).unsqueeze(-1)
        off = torch.maximum(off, largest(row_gap / terms))
    return Progress(measure, off, product, total, slope, row_gap, gap)


def mean_product(state: State) -> Tensor:  # -> (k,)
    """Average λ∘s over the constraints that are there."""
    _, s, lam, _ = state.parts
    return ((lam * s).sum(-1, keepdim=True) * state.share).squeeze(-1)


def step(program: Program, state: State, running: Tensor, reached: Progress, barrier: Tensor | None = None) -> State:
    """Take one predictor–corrector step where `running`; towards λ∘s = barrier (k, 1) where that is given.

    The predictor's length and what it leaves of λ∘s as in `dual_path`: with a = Δλ/λ, a + Δs/s = −1.
    """
    point, _, there, share, free, balance, caution, iterations, stuck, best, since = state
    _, s, lam, _ = state.parts
    product, total, slope, row_gap, cone_gap = reached[2:]
    (batch, n), n_eq = free.shape, program.n_eq
    rho_range, delta_range = _RHO[s.dtype], _DELTA[s.dtype]
    near = 1e-2 * reached.measure
    rho = near.clamp(*rho_range).mul_(caution).unsqueeze(-1)
    delta = near.clamp(*delta_range).mul_(caution).unsqueeze(-1)
    soft_e, soft = delta, delta
    if program.elastic:
        compliance = program.compliance.expand(-1, program.E.shape[-2]) / balance
        of_rows, rows_c = split_rows(program, compliance)
        soft_e = delta + of_rows
        soft = delta + torch.nn.functional.pad(rows_c, (0, s.shape[-1] - rows_c.shape[-1]))

    safe = lam + (1.0 - there)
    W = there / torch.addcdiv(soft, s, safe)
    weight_e = (1.0 / soft_e).expand(batch, n_eq)
    diagonal, W_rows = rho.expand(batch, n), W
    if program.bounded:
        W_rows, W_lower, W_upper = split_cone(program, W)
        diagonal = rho + W_lower + W_upper
    weight = _joined(weight_e, W_rows)
    H = condensed.assemble(program, weight, diagonal, free if program.bounded else None, balance)
    chol, info = torch.linalg.cholesky_ex(H)

    def direction(wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (k, c) to changes of z, λ and A z
        pushed = W * wanted
        w_y, w_bound = _split(program, -weight_e * row_gap if n_eq else row_gap, pushed)
        right = quadratic.transposed_matvec(program.E, w_y).sub_(slope)
        if program.bounded:
            right = right.add_(w_bound).mul_(free)
        d_z = quadratic.cholesky_solve(chol, right)
        if program.bounded:
            d_z = d_z * free
        moved = quadratic.matvec(program.E, d_z)
        return d_z, (cone_image(program, d_z, moved) * W).sub_(pushed), split_rows(program, moved)[0]

    if not s.shape[-1]:
        push = product
    elif barrier is None:
        _, d_lam, _ = direction(cone_gap + s)
        a = d_lam / safe
        bend = torch.addcmul(a, a, a)
        steepest = bend.amax(-1, keepdim=True).clamp_(min=0.0).add_(0.25).sqrt_().add_(0.5)
        bend *= product
        left = torch.addcdiv(total, bend.sum(-1, keepdim=True), steepest)
        left = torch.addcdiv(total, left, steepest, value=-1.0) / total.clamp(min=torch.finfo(s.dtype).tiny)
        centre = (left.clamp_(0.0, 1.0) ** 3).mul_(total).mul_(share)
        push = torch.addcmul(bend.sub_(product), there, centre)  # what λΔs + sΔλ has to be
    else:
        push = there * barrier - product
    d_z, d_lam, moved = direction(torch.addcdiv(cone_gap, push, safe, value=-1.0))
    d_s = torch.addcmul(push, s, d_lam, value=-1.0).div_(safe)
    change = [d_z, d_s, d_lam]
    if n_eq:
        change.append((moved + row_gap).mul_(weight_e))
    if s.shape[-1]:
        lowest = torch.minimum(d_lam / safe, d_s / s).amin(-1)
        sound = torch.gt(lowest > -torch.inf, info)  # info is 0 where there is a factor; NaN is never greater
    else:
        lowest, sound = torch.zeros_like(caution), (info == 0) & torch.isfinite(d_z).all(-1)
    ok = sound & (lowest > -_TO_BOUNDARY / _SHORTEST)
    move = running & ok
    length = lowest.clamp(max=-_TO_BOUNDARY).unsqueeze(-1)
    there_to = torch.addcdiv(point, torch.cat(change, dim=-1), length, value=-_TO_BOUNDARY)
    moderate = (caution * torch.where(sound, 0.3, 100.0)).clamp_(min=1.0)
    moderate = torch.where(running, moderate, caution)
    merit = torch.maximum(reached.measure, reached.infeasibility)
    gains = merit < 0.9 * best
    since = torch.where(gains, 0, since + running)
    if barrier is None:
        stuck = stuck | (since > _PATIENCE)
    helpless = (sound | (moderate > 1e8)) > ok  # a step that is too short, or none in spite of all caution
    return state._replace(
        point=torch.where(move.unsqueeze(-1), there_to, point),
        caution=moderate,
        iterations=iterations + running,
        stuck=stuck | (running & helpless),
        best=torch.where(gains, merit, best),
        since=since,
    )
