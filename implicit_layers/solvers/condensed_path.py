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

    z: Tensor  # (k, n)
    nu: Tensor  # (k, n_eq)
    s: Tensor  # (k, c): slacks of the cone, 1 where there is no constraint
    lam: Tensor  # (k, c): their duals, 0 where there is no constraint
    there: Tensor  # (k, c): 1 where there is a constraint, else 0
    balance: Tensor  # (k, 1): what makes duals about as large as slacks
    caution: Tensor  # (k,): factor on ρ and δ, raised where the Cholesky factor breaks down
    iterations: Tensor  # (k,) int64
    stuck: Tensor  # (k,) bool
    best: Tensor  # (k,): the smallest merit so far
    since: Tensor  # (k,) int64: iterations since it was last made smaller

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
        return torch.cat([nu, lam], dim=-1), nu.new_zeros(1, 1).expand(nu.shape[0], program.Q.shape[-1])
    rows, lower, upper = split_cone(program, lam)
    return torch.cat([nu, rows], dim=-1), upper - lower


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
        z,
        p.new_zeros(batch, n_eq),
        s,
        lam,
        there,
        balance,
        p.new_ones(batch),
        torch.zeros(batch, dtype=torch.int64, device=device),
        torch.zeros(batch, dtype=torch.bool, device=device),
        p.new_full((batch,), torch.inf),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


class Progress(NamedTuple):
    """How far a state is: what a step needs, and its judgement."""

    measure: Tensor  # (k,): mean of λ∘s relative to the units of the program
    infeasibility: Tensor  # (k,): of the linear equations, relative

    def take(self, index: Tensor) -> Progress:
        """Keep some programs."""
        return Progress(*(field[index] for field in self))


def progress(program: Program, state: State) -> Progress:
    """Measure complementarity and infeasibility of a state."""
    z, units, n_eq = state.z, program.units, program.n_eq
    largest = quadratic.largest
    y, bound = _split(program, state.nu, state.lam)
    curved, image = quadratic.matvec(program.Q, z), quadratic.matvec(program.E, z)
    pulled = quadratic.transposed_matvec(program.E, y)
    stationarity = torch.where(program.pinned, 0.0, state.balance * (curved + program.p) + pulled + bound)
    balance = state.balance.squeeze(-1)
    parts = (balance * largest(curved), largest(pulled), largest(bound), balance * units.dual)
    dual = torch.stack(torch.broadcast_tensors(*parts)).amax(0)
    length = torch.linalg.vector_norm(z, dim=-1)
    unit = torch.maximum(length, units.least)
    measure = mean_product(state) / (dual * unit)
    yielded = program.compliance * y / state.balance
    f_eq, _ = split_rows(program, program.f)
    terms = f_eq.abs() + torch.maximum(length, 1e-5 * units.primal).unsqueeze(-1)
    rows = (split_rows(program, image - yielded)[0] - f_eq) / terms
    offset, _ = _cone_offset(program, z.shape[0])
    soft = torch.nn.functional.pad(split_rows(program, yielded)[1], (0, state.s.shape[-1] - yielded.shape[-1] + n_eq))
    off = state.there * (offset - cone_image(program, z, image) + soft - state.s)
    off = off / torch.maximum(state.s, unit.unsqueeze(-1))
    errors = (largest(stationarity) / dual, largest(rows), largest(off))
    return Progress(measure, torch.stack(torch.broadcast_tensors(*errors)).amax(0))


def mean_product(state: State) -> Tensor:  # -> (k,)
    """Average λ∘s over the constraints that are there."""
    return _mean(state, state.lam * state.s)


def _mean(state: State, products: Tensor) -> Tensor:  # (k, c) -> (k,)
    """Average over the constraints that are there; 0 where there are none."""
    return (state.there * products).sum(-1) / state.there.sum(-1).clamp(min=1.0)


def step(program: Program, state: State, running: Tensor, reached: Progress, barrier: Tensor | None = None) -> State:
    """Take one predictor–corrector step where `running`; towards λ∘s = barrier (k, 1) where that is given."""
    z, nu, s, lam, there, balance, caution, iterations, stuck, best, since = state
    measure = reached.measure
    n, n_eq, batch = z.shape[-1], program.n_eq, z.shape[0]
    n_ineq = program.E.shape[-2] - n_eq
    rho_range, delta_range = _RHO[z.dtype], _DELTA[z.dtype]
    near = 1e-2 * measure
    rho = (caution * near.clamp(*rho_range)).unsqueeze(-1)
    delta = (caution * near.clamp(*delta_range)).unsqueeze(-1)
    compliance = program.compliance.expand(-1, n_eq + n_ineq) / balance
    eq_c, rows_c = split_rows(program, compliance)
    cone_c = torch.nn.functional.pad(rows_c, (0, s.shape[-1] - n_ineq))
    free = (program.pinned.logical_not()).to(z.dtype).expand(batch, n)

    y, bound = _split(program, nu, lam)
    image = quadratic.matvec(program.E, z)
    pulled = quadratic.transposed_matvec(program.E, y)
    r_d = -free * (balance * (quadratic.matvec(program.Q, z) + program.p) + pulled + bound)
    r_e = split_rows(program, program.f - image)[0] + eq_c * nu
    offset, _ = _cone_offset(program, batch)
    r_i = there * (offset - cone_image(program, z, image) + cone_c * lam - s)
    safe = torch.where(there > 0, lam, 1.0)
    ratio = s / safe
    W = there / (ratio + delta + cone_c)
    weight_e = (1.0 / (delta + eq_c)).expand(batch, n_eq)
    diagonal = rho.expand(batch, n)
    W_rows = W
    if program.bounded:
        W_rows, W_lower, W_upper = split_cone(program, W)
        diagonal = diagonal + W_lower + W_upper
    H = condensed.assemble(program, torch.cat([weight_e, W_rows], dim=-1), diagonal, free, balance)
    chol, info = torch.linalg.cholesky_ex(H)

    def direction(r_c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wanted = r_i - r_c / safe
        w_y, w_bound = _split(program, weight_e * r_e, W * wanted)
        right = r_d + quadratic.transposed_matvec(program.E, w_y) + w_bound
        d_z = quadratic.cholesky_solve(chol, free * right)
        moved = quadratic.matvec(program.E, d_z)
        d_nu = weight_e * (split_rows(program, moved)[0] - r_e)
        d_lam = W * (cone_image(program, d_z, moved) - wanted)
        return d_z, d_nu, d_lam, there * (r_c - s * d_lam) / safe

    product = s * lam
    if barrier is None:
        mean = _mean(state, product)
        _, _, d_lam, d_s = direction(-product)
        length = _longest(state, d_lam, d_s).clamp(max=1.0).unsqueeze(-1)
        affine = _mean(state, (lam + length * d_lam) * (s + length * d_s))
        centre = ((affine / mean.clamp(min=torch.finfo(z.dtype).tiny)).clamp(0.0, 1.0) ** 3 * mean).unsqueeze(-1)
        r_c = there * (centre - product - d_lam * d_s)
    else:
        r_c = there * (barrier - product)
    d_z, d_nu, d_lam, d_s = direction(r_c)
    length = (_TO_BOUNDARY * _longest(state, d_lam, d_s)).clamp(max=1.0)
    sound = (info == 0) & torch.isfinite(d_z).all(-1) & torch.isfinite(d_lam).all(-1)
    ok = sound & (length > _SHORTEST)
    move = (running & ok).unsqueeze(-1)
    length = torch.where(move, length.unsqueeze(-1), 0.0)

    def forward(value: Tensor, change: Tensor) -> Tensor:
        return torch.where(move, value + length * change, value)

    broken = running & sound.logical_not()
    caution = torch.where(broken, caution * 100.0, torch.where(running, (caution * 0.3).clamp(min=1.0), caution))
    merit = torch.maximum(measure, reached.infeasibility)
    gains = merit < 0.9 * best
    best, since = torch.where(gains, merit, best), torch.where(gains, 0, since + running)
    stuck = stuck | (since > _PATIENCE) if barrier is None else stuck
    return State(
        forward(z, d_z),
        forward(nu, d_nu),
        forward(s, d_s),
        forward(lam, d_lam),
        there,
        balance,
        caution,
        iterations + running,
        stuck | (running & sound & ok.logical_not()) | (broken & (caution > 1e8)),
        best,
        since,
    )


def _longest(state: State, d_lam: Tensor, d_s: Tensor) -> Tensor:  # -> (k,)
    """Step length to the boundary of λ, s ≥ 0; NaN where a step is NaN, which no comparison accepts."""
    if state.s.shape[-1] == 0:
        return state.z.new_full((state.z.shape[0],), torch.inf)
    safe = torch.where(state.there > 0, state.lam, 1.0)
    steepest = torch.maximum(-d_lam / safe, -d_s / state.s).amax(-1)
    return 1.0 / steepest.clamp(min=torch.finfo(d_s.dtype).tiny)
