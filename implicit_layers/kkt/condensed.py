r"""The KKT system on an active set in its condensed form: one n x n Cholesky factor, for every convex program.

    Q u_z + Eᵀu_y + u_bound = r_z
    E u_z − c∘u_y = r_y on active rows,         u_y = 0 elsewhere
    u_z − u_bound/σ = r_bound where σ > 0,      u_z = r_bound on fixed coordinates,      u_bound = 0 elsewhere

(σ is infinite on fixed coordinates and zero on free ones, but for programs with a barrier.) In scaled units, and with
E_a the active rows, K this matrix and R = diag(ρ, −δ), one solve with K + R is one with the factor of

    H = Q + diag(σ) + ρ I + E_aᵀ diag(1/(δ + c)) E_a      (identity on fixed coordinates),

and each refinement against K itself takes the regularisation away by a factor of about δ over the smallest
eigenvalue that is not zero: fast, unless rows are nearly parallel or curvature nearly vanishes. Where they are, H is
formed with δ = 1 instead, which keeps every digit, and what is left of the rows by its Schur complement,

    (E_a H⁻¹ E_aᵀ + c) u_y = E_a H⁻¹(r_z + E_aᵀ r_y/(1 + c)) − r_y       (rows and u_y times √(1/(1 + c))),

whose eigenvalues lie between 0 and 1 (by QR of the factor of H on the rows): a sharp factor. Where K is singular, its
null space, which splits into directions of z and of y, is taken off the right-hand side and off the answer. That
leaves the solution of least norm of the part that can be solved: of z and y, as long as the columns differ in scale by
no more than 64 and the rows by no more than 16; beyond that, in the units of `program.equilibrate`.

Source: Friedlander & Orban (2012), A primal–dual regularized interior-point method for convex quadratic programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.kkt import quadratic
from implicit_layers.kkt.program import Data, Program

REFINE = 4  # refinement steps where nothing is singular, those of `solve` besides
_NULL = 1e-3  # the part of a made-up vector that must be in a null space for it to be there
_COLLECT = 6  # so many times a vector is brought to the null space
_CLEAN = 4  # steps that take the rest of the space off a vector of the null space
_SLOW = 0.03  # the share of an error that one refinement may leave; where it leaves more, the factor must be sharp
_FAINT = 1e-8  # what is left of the made-up vector where there is nothing slow in it
_ROUNDING = 16.0  # times size and eps: what keeps the sharp factors positive
Image = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # v to K v, in two parts


class Regularisation(NamedTuple):
    """The two small numbers on the diagonal, for a working precision."""

    rho: float
    delta: float


class Factor(NamedTuple):
    """The factor of H and what it was made with; leading dimension N or 1. `EVENT_NDIM` has the trailing dimensions."""

    chol: Tensor  # (N, n, n)
    column: Tensor  # (N or 1, n): the scaling of `program.Scaling`
    row: Tensor  # (N or 1, m)
    cost: Tensor  # (N or 1, 1)
    active: Tensor  # (N, m): 1 on rows that hold
    fixed: Tensor  # (N, n): 1 on coordinates that are fixed
    compliance: Tensor  # (N or 1, m or 1), scaled
    stiffness: Tensor  # (N or 1, n or 1): σ, scaled, 0 unless there is a barrier
    singular: Tensor  # (N,) int8: 1 where directions of z are undetermined, 2 where duals are, 3 where both
    delta: Tensor  # (N, 1): δ in H; 1 where the factor is sharp
    held: Tensor  # (N, k) int64: the rows of `schur`; no columns where no factor of the batch is sharp
    schur: Tensor  # (N, k, k): factor of the Schur complement of these rows; of no meaning where not sharp

    def take(self, index: Tensor) -> Factor:
        """Keep some programs; what the batch shares stays shared."""
        batch = self.active.shape[0]
        return Factor(*(part if part.shape[0] == 1 and batch != 1 else part[index] for part in self))

    def put(self, index: Tensor, part: Factor) -> Factor:
        """Replace the factors of some programs, without changing what belongs to the data."""
        batch, most = self.active.shape[0], part.held.shape[-1]
        room = self
        if self.held.shape[-1] != most:
            eye = torch.eye(most, dtype=part.schur.dtype, device=part.schur.device)
            held = torch.arange(most, device=part.held.device)
            room = self._replace(held=held.repeat(batch, 1), schur=eye.repeat(batch, 1, 1))
        return room._replace(**{name: getattr(room, name).index_copy(0, index, getattr(part, name)) for name in _OWN})

    @property
    def sharp(self) -> Tensor:  # (N, 1) bool
        """Where the factor is sharp."""
        return self.delta >= 1.0


EVENT_NDIM = (2, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 2)
_OWN = ("chol", "singular", "delta", "held", "schur")  # what looking closer at a system may change


def regularisation(dtype: torch.dtype) -> Regularisation:
    """Choose ρ and δ: the error of the factor, eps/δ, and that of the duals, δ over eigenvalues, both refined away."""
    return Regularisation(1e-7, 1e-6) if dtype == torch.float64 else Regularisation(1e-5, 1e-3)


def factorise(
    data: Data,
    active: Tensor,  # (N, m) 1 on rows that hold
    fixed: Tensor,  # (N, n) not 0 on coordinates that are fixed
    *,
    compliance: Tensor | None = None,  # (N or 1, m), instead of that of the data
    stiffness: Tensor | None = None,  # (N or 1, n): σ of coordinates that are not fixed
    ask: bool = False,
) -> Factor:
    """Factor the KKT system on an active set, from nothing else; no host synchronisation unless it may `ask`."""
    if compliance is not None:
        data = data._replace(compliance=compliance)
    program = Program.of(data, stiffness)
    column, _, cost = program.scaling
    zero = data.p.new_zeros(1, 1)
    scaled = zero if stiffness is None else stiffness * cost * column**2
    held = active.to(data.p.dtype)
    held = held * program.rows.to(held.dtype)
    return examined(program, factorise_scaled(program, held, (fixed != 0).to(held.dtype), scaled), ask=ask)


def factorise_scaled(program: Program, active: Tensor, fixed: Tensor, stiffness: Tensor) -> Factor:
    """Factor H; whether the system is singular, or asks for a sharp factor, is not looked at."""
    rho, delta = regularisation(program.p.dtype)
    weight = active / (delta + program.compliance)
    H = assemble(program, weight, (rho + stiffness).expand(fixed.shape), 1.0 - fixed)
    chol, _ = torch.linalg.cholesky_ex(H)
    batch = active.shape[0]
    singular = torch.zeros(batch, dtype=torch.int8, device=active.device)
    held = torch.zeros(batch, 0, dtype=torch.int64, device=active.device)
    parts = active.new_full((batch, 1), delta), held, active.new_zeros(batch, 0, 0)
    return Factor(chol, *program.scaling, active, fixed, program.compliance, stiffness, singular, *parts)


def sharpened(program: Program, factor: Factor, wanted: Tensor, *, ask: bool) -> Factor:
    """Make the wanted factors sharp, (N,) bool, unless singular; without asking the host with no more than n rows.

    The two regularisations left, of H and of the Schur complement, are of the size of rounding.
    """
    active, free, eps = factor.active, 1.0 - factor.fixed, torch.finfo(factor.chol.dtype).eps
    batch, m, n = active.shape[0], active.shape[-1], free.shape[-1]
    count = active.sum(-1)
    most = checks.host_int(count.amax()) if ask else min(m, n)
    place = torch.arange(m, dtype=active.dtype, device=active.device)
    held = (m * active - place).topk(most).indices  # what is active first, each in its order
    weight = active / (1.0 + program.compliance)
    H = assemble(program, weight, factor.stiffness.expand(batch, n), free)
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(_ROUNDING * n * eps * diagonal.amax(-1, keepdim=True))
    chol, failed_h = torch.linalg.cholesky_ex(H)
    root = weight.gather(-1, held).sqrt()
    rows = program.E.expand(batch, m, n).gather(-2, held.unsqueeze(-1).expand(batch, most, n))
    half = torch.linalg.solve_triangular(chol, (root.unsqueeze(-1) * rows * free.unsqueeze(-2)).mT, upper=False)
    soft = program.compliance.expand(batch, m).gather(-1, held).sqrt()
    below = torch.where(root > 0, soft + _ROUNDING * max(most, 1) * eps, 1.0)  # roots of the diagonal
    triangle = torch.linalg.qr(torch.cat([half, torch.diag_embed(below)], dim=-2), mode="r").R
    sharp = wanted & (failed_h == 0) & (factor.singular == 0) & (count <= most)
    each = sharp.unsqueeze(-1)
    return factor._replace(
        chol=torch.where(each.unsqueeze(-1), chol, factor.chol),
        delta=torch.where(each, 1.0, factor.delta),
        held=held,
        schur=torch.where(each.unsqueeze(-1), triangle.mT, torch.eye(most, dtype=half.dtype, device=half.device)),
    )


def assemble(
    program: Program, weight: Tensor, diagonal: Tensor, free: Tensor | None, curvature: Tensor | None = None
) -> Tensor:  # -> (N, n, n)
    """Form curvature·Q + Eᵀ diag(weight) E + diag, identity where not free; None: all is free."""
    Q, E = program.Q, program.E
    batch, n = diagonal.shape[0], diagonal.shape[-1]
    if E.shape[-2] == 0:
        H = (Q if curvature is None else Q * curvature.unsqueeze(-1)).expand(batch, n, n).clone()
    else:
        if E.shape[0] == 1 and batch != 1:  # one matrix for all: one long product, no copy of E
            H = ((E.mT * weight.unsqueeze(-2)).reshape(-1, E.shape[-2]) @ E.squeeze(0)).reshape(batch, n, n)
        else:
            H = torch.bmm(E.mT * weight.unsqueeze(-2), E)
        H = H + Q if curvature is None else torch.addcmul(H, Q, curvature.unsqueeze(-1))
    if free is not None:
        H = H.mul_(free.unsqueeze(-1)).mul_(free.unsqueeze(-2))
        diagonal = torch.where(free > 0, diagonal, 1.0)
    H.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return H


def solve_once(factor: Factor, E: Tensor, r_z: Tensor, r_y: Tensor) -> tuple[Tensor, Tensor]:
    """Solve with K + R, in scaled units but with E in its own; zero on what is fixed or inactive."""
    free = 1.0 - factor.fixed
    weight = factor.active / (factor.delta + factor.compliance)
    pulled = factor.column * quadratic.transposed_matvec(E, factor.row * weight * r_y)
    u_z = quadratic.cholesky_solve(factor.chol, pulled.add_(r_z).mul_(free)) * free
    rest = (factor.row * quadratic.matvec(E, factor.column * u_z)).sub_(r_y)
    u_y = weight * rest
    if not factor.held.shape[-1]:
        return u_z, u_y
    root = weight.sqrt().gather(-1, factor.held)
    part = root * quadratic.cholesky_solve(factor.schur, root * rest.gather(-1, factor.held))
    weighted = torch.zeros_like(u_y).scatter(-1, factor.held, part)
    pulled = factor.column * quadratic.transposed_matvec(E, factor.row * weighted)
    sharp_z = u_z - free * quadratic.cholesky_solve(factor.chol, free * pulled)
    sharp_y = (1.0 + factor.compliance) * weighted
    return torch.where(factor.sharp, sharp_z, u_z), torch.where(factor.sharp, sharp_y, u_y)


def refined(
    factor: Factor,
    E: Tensor,
    image: Image,
    r_z: Tensor,
    r_y: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Solve K u = r, all scaled, by generalised conjugate residuals with K + R as preconditioner.

    Where nothing is nearly singular the first steps are those of plain refinement; few small eigenvalues, which slow
    that down, take one step each. Two cycles, the second from the residual as it really is.
    """
    sizes = [r_z.shape[-1], r_y.shape[-1]]
    right = torch.cat([r_z, r_y], dim=-1)
    tiny = torch.finfo(right.dtype).tiny ** 0.5
    eps = torch.finfo(right.dtype).eps
    least = torch.where(factor.sharp, 4 * eps, 500 * eps)
    u = torch.zeros_like(right)
    for cycle, count in enumerate((steps, 2)):
        rest = right if cycle == 0 else right - torch.cat(image(*u.split(sizes, dim=-1)), dim=-1)
        directions: list[Tensor] = []
        for _ in range(count):
            step_z, step_y = solve_once(factor, E, *rest.split(sizes, dim=-1))
            both = torch.cat((step_z, step_y, *image(step_z, step_y)), dim=-1)  # a step and what K makes of it
            both = both.unflatten(-1, (2, right.shape[-1]))  # (N, 2, n + m)
            for earlier in directions:
                along = (earlier.narrow(-2, 1, 1) * both.narrow(-2, 1, 1)).sum(-1, keepdim=True)
                both = torch.addcmul(both, along, earlier, value=-1.0)
            of_step, length = torch.linalg.vector_norm(both, dim=-1).split(1, dim=-1)
            known = (length > least * of_step) & (length > tiny)  # else it is a step of rounding only
            inverse = torch.where(known, length.clamp(min=tiny).reciprocal(), 0.0)
            both = both * inverse.unsqueeze(-1)
            step, moved = both.unbind(-2)
            along = (moved * rest).sum(-1, keepdim=True)
            u, rest = torch.addcmul(u, along, step), torch.addcmul(rest, along, moved, value=-1.0)
            directions.append(both)
    s_z, s_y = u.split(sizes, dim=-1)
    return s_z, s_y


def null_part(factor: Factor, E: Tensor, image: Image, v_z: Tensor, v_y: Tensor) -> tuple[Tensor, Tensor]:
    """Project on the null space of K, scaled: collect it by (K + R)⁻¹R, then off with what K still sees."""
    n_z, n_y = torch.zeros_like(v_z), torch.zeros_like(v_y)
    for _ in range(_COLLECT):  # the factor of H is coarse where only ρ holds it
        d_z, d_y = _towards_null(factor, E, v_z - n_z, v_y - n_y)
        n_z, n_y = n_z + d_z, n_y + d_y
    off_z, off_y = refined(factor, E, image, *image(n_z, n_y), _CLEAN)
    for _ in range(2):  # rounding over ρ lies in the null space itself
        d_z, d_y = _towards_null(factor, E, off_z, off_y)
        off_z, off_y = off_z - d_z, off_y - d_y
    return n_z - off_z, n_y - off_y


def _towards_null(factor: Factor, E: Tensor, v_z: Tensor, v_y: Tensor, times: int = 2) -> tuple[Tensor, Tensor]:
    """Apply (K + R)⁻¹R, R that of factors that are not sharp."""
    rho, delta = regularisation(factor.chol.dtype)
    for _ in range(times):
        v_z, v_y = solve_once(factor, E, rho * v_z, -delta * v_y)
    return v_z, v_y


def examined(program: Program, factor: Factor, *, ask: bool) -> Factor:
    """Look whether systems are singular or nearly so, and make the factors of the latter sharp.

    Both show in what (K + R)⁻¹R, applied a few times, leaves of one fixed vector that no direction is likely to be
    orthogonal to. `ask`: look closer only at systems where the host sees that they may be.
    """
    plain = factor._replace(column=torch.ones_like(factor.column), row=torch.ones_like(factor.row))
    start = _start(factor)
    second = _towards_null(plain, program.E, *start)
    third = _towards_null(plain, program.E, *second, times=1)
    length, longer, longest = (torch.sqrt((z**2).sum(-1) + (y**2).sum(-1)) for z, y in (third, second, start))
    slow = (length > _SLOW * longer) & (longer > _FAINT * longest)
    if not ask:
        factor = factor._replace(singular=_nullity(program, plain, start))
        return sharpened(program, factor, slow, ask=False)
    if not checks.host_bool(slow.any()):
        return factor
    index = slow.nonzero().squeeze(-1)
    program, part = program.take(index), factor.take(index)
    nullity = _nullity(program, plain.take(index), (start[0][index], start[1][index]))
    return factor.put(index, sharpened(program, part._replace(singular=nullity), slow[index], ask=True))


def _start(factor: Factor) -> tuple[Tensor, Tensor]:
    """Make up a vector on what is free and active."""
    batch, n, m = factor.active.shape[0], factor.fixed.shape[-1], factor.active.shape[-1]
    v_z = (1.0 - factor.fixed) * _probe(n, factor.chol).expand(batch, n)
    return v_z, factor.active * _probe(m, factor.chol).expand(batch, m)


def _nullity(program: Program, plain: Factor, start: tuple[Tensor, Tensor]) -> Tensor:  # -> (N,) int8
    """Tell which systems are singular, and how; `plain` has units 1."""

    def image(s_z: Tensor, s_y: Tensor) -> tuple[Tensor, Tensor]:
        return scaled_image(program, plain, s_z, s_y)

    norm = torch.linalg.vector_norm
    n_z, n_y = null_part(plain, program.E, image, *start)
    primal, dual = (norm(n, dim=-1) > _NULL * norm(v, dim=-1) for n, v in zip((n_z, n_y), start, strict=True))
    least = 1e4 * torch.finfo(n_z.dtype).eps
    seen_z, _ = image(torch.zeros_like(n_z), n_y)
    curved, moved = image(n_z, torch.zeros_like(n_y))
    primal = primal & (norm(curved, dim=-1) + norm(moved, dim=-1) <= least * norm(n_z, dim=-1))
    dual = dual & (norm(seen_z, dim=-1) + norm(plain.compliance * n_y, dim=-1) <= least * norm(n_y, dim=-1))
    return primal.to(torch.int8) + 2 * dual.to(torch.int8)


def scaled_image(program: Program, factor: Factor, v_z: Tensor, v_y: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply K v, all scaled."""
    inside = quadratic.matvec(program.Q, v_z) + quadratic.transposed_matvec(program.E, v_y) + factor.stiffness * v_z
    rows = quadratic.matvec(program.E, v_z) - factor.compliance * v_y
    return (1.0 - factor.fixed) * inside, factor.active * rows


def _probe(size: int, like: Tensor) -> Tensor:  # -> (1, size)
    """Make up numbers between a half and one and a half, of both signs, without a generator."""
    place = torch.arange(1, size + 1, dtype=like.dtype, device=like.device)
    return (torch.sin(12.9898 * place + 0.1) * 43.7585).cos().unsqueeze(0) + 0.5 * torch.sin(place**2).sign()


def solve(
    factor: Factor,
    Q: Tensor,  # (N or 1, n, n)
    E: Tensor,  # (N or 1, m, n)
    r_z: Tensor,  # (N, n)
    r_y: Tensor,  # (N, m)
    r_bound: Tensor | None,  # (N, n); None: zero
    refine: int,
    *,
    project: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve the system on the active set, refined against the matrices themselves; see the head of this file.

    `project`: whether to take null spaces off where the factor says there are some; None: ask the host if any has.
    """
    column, row, cost = factor.column, factor.row, factor.cost
    free = 1.0 - factor.fixed
    pull = free * factor.stiffness / (cost * column**2)
    compliance = factor.compliance * cost / row / row
    at = torch.zeros_like(r_z) if r_bound is None else r_bound
    fixed_z = factor.fixed * at

    def image(u_z: Tensor, u_y: Tensor) -> tuple[Tensor, Tensor]:  # K u, scaled
        inside = quadratic.matvec(Q, u_z) + quadratic.transposed_matvec(E, u_y) + pull * u_z
        return free * cost * column * inside, factor.active * row * (quadratic.matvec(E, u_z) - compliance * u_y)

    def inner(s_z: Tensor, s_y: Tensor) -> tuple[Tensor, Tensor]:
        return image(column * s_z, row * s_y / cost)

    i_z, i_y = image(fixed_z, torch.zeros_like(r_y))
    right_z = free * cost * column * (r_z + pull * at) - i_z
    right_y = factor.active * row * r_y - i_y
    if project is None:
        project = checks.host_bool((factor.singular > 0).any())
    if project:
        right_z, right_y = _without_null(factor, E, inner, right_z, right_y)
    s_z, s_y = refined(factor, E, inner, right_z, right_y, REFINE + refine)
    if project:
        s_z, s_y = _without_null(factor, E, inner, s_z, s_y)
    u_z, u_y = torch.where(free > 0, column * s_z, fixed_z), row * s_y / cost
    reaction = r_z - quadratic.matvec(Q, u_z) - quadratic.transposed_matvec(E, u_y)
    return u_z, u_y, torch.where(free > 0, pull * (u_z - at), reaction)


def _without_null(factor: Factor, E: Tensor, image: Image, v_z: Tensor, v_y: Tensor) -> tuple[Tensor, Tensor]:
    """Take the null space off where there is one, in scaled units."""
    n_z, n_y = null_part(factor, E, image, v_z, v_y)
    primal, dual = (factor.singular & 1).unsqueeze(-1) > 0, (factor.singular & 2).unsqueeze(-1) > 0
    return torch.where(primal, v_z - n_z, v_z), torch.where(dual, v_y - n_y, v_y)


def condition(program: Program, factor: Factor, iterations: int = 4) -> Tensor:  # -> (N,)
    """Estimate |K| |K⁻¹| of the scaled system by a few power steps each: a lower bound; inf where it is singular."""
    plain = factor._replace(column=torch.ones_like(factor.column), row=torch.ones_like(factor.row))

    def image(v_z: Tensor, v_y: Tensor) -> tuple[Tensor, Tensor]:
        return scaled_image(program, factor, v_z, v_y)

    def inverse(v_z: Tensor, v_y: Tensor) -> tuple[Tensor, Tensor]:
        return solve_once(plain, program.E, v_z, v_y)

    sizes = []
    for apply in (image, inverse):
        v_z, v_y = _start(factor)
        for _ in range(iterations):
            length = torch.sqrt((v_z**2).sum(-1, keepdim=True) + (v_y**2).sum(-1, keepdim=True))
            length = torch.where(length > 0, length, 1.0)
            v_z, v_y = apply(v_z / length, v_y / length)
        size = torch.sqrt((v_z**2).sum(-1) + (v_y**2).sum(-1))
        sizes.append(size)
    estimate = (sizes[0] * sizes[1]).clamp(min=1.0)
    return torch.where((factor.singular > 0) | torch.isfinite(estimate).logical_not(), torch.inf, estimate)
