r"""The KKT system of a convex quadratic program, as pure functions of tensors.

Problem:     min ½ zᵀQz + pᵀz   subject to   A z = b  (dual ν),   G z ≤ h  (dual λ ≥ 0).
Lagrangian:  L = ½ zᵀQz + pᵀz + νᵀ(Az − b) + λᵀ(Gz − h).
Conditions:  Qz + p + Aᵀν + Gᵀλ = 0,   Az − b = 0,   λ ∘ (Gz − h) = 0,   λ ≥ 0,   Gz ≤ h.

Where strict complementarity holds, the rows of the third condition are either Gz − h = 0 (active) or λ = 0. Stacking
the rows as E = [A; G], f = [b; h], y = (ν, λ) and writing E_a for E with its inactive rows set to zero, every linear
system of this package (the solution itself, its adjoint, its tangent, and theirs again) is the one symmetric system

    Q u_z + E_aᵀ u_y = r_z,      E_a u_z = r_y on active rows,      u_y = 0 on inactive rows,

solved with one Cholesky factor of Q and one of the Schur complement E_a Q⁻¹ E_aᵀ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import NotPositiveDefiniteError

_LARGE = 500_000  # entries of all matrices times their size, from which it pays on a CPU to factor active rows alone


class KKTResidual(NamedTuple):
    """The left-hand sides of the five conditions at a point; all zero at a solution."""

    stationarity: Tensor  # (*B, n) Qz + p + Aᵀν + Gᵀλ
    equality: Tensor  # (*B, n_eq) Az − b
    inequality: Tensor  # (*B, n_ineq) max(Gz − h, 0)
    dual: Tensor  # (*B, n_ineq) max(−λ, 0)
    complementarity: Tensor  # (*B, n_ineq) λ ∘ (Gz − h)


class Factor(NamedTuple):
    """Cholesky factors of the KKT system on an active set; leading dimensions broadcast.

    The Schur complement of the active rows, D E_a Q⁻¹ E_aᵀ D with ones on the diagonal of inactive rows, has the factor
    [[C_e, 0], [Xᵀ, C_i]], equality rows first. Where r < n_ineq, C_i is that of the active inequalities alone, in their
    order, with ones on the diagonal of what is left.
    """

    chol_q: Tensor  # (*B, n, n): Q = L Lᵀ
    chol_eq: Tensor  # (*B, n_eq, n_eq): C_e
    across: Tensor  # (*B, n_eq, n_ineq): X; its inactive columns do not count
    chol_ineq: Tensor  # (*B, r, r): C_i; r = n_ineq, or less
    scale: Tensor  # (*B, m): D, which gives the rows of D E Q⁻¹ Eᵀ D unit diagonal
    active: Tensor  # (*B, m): 1 on equality rows and active inequality rows, else 0

    @property
    def places(self) -> Tensor:  # (*B, r)
        """The inequality that each row of C_i belongs to; where there are fewer active ones, any others follow."""
        return _first_active(self.active[..., self.chol_eq.shape[-1] :], self.chol_ineq.shape[-1])

    def whole(self) -> Factor:
        """The same with a row of C_i for every inequality."""
        if self.chol_ineq.shape[-1] == self.across.shape[-1]:
            return self
        return self._replace(chol_ineq=spread_out(self.chol_ineq, self.active[..., self.chol_eq.shape[-1] :]))

    def take(self, index: Tensor) -> Factor:
        """Keep some programs, all with one batch dimension; what they share stays shared."""
        return Factor(*(part if part.shape[0] == 1 else part[index] for part in self))

    def put(self, batch: int, index: Tensor, part: Factor) -> Factor:
        """Replace the factors of the programs `index`, all with one batch dimension; what both share stays shared."""

        def merge(old: Tensor, new: Tensor, is_data: bool) -> Tensor:
            # what belongs to the data stays shared; of a single program the rest may be its own, with a ridge
            if old.shape[0] == 1 and new.shape[0] == 1 and batch > 1 and (is_data or index.numel() > 1):
                return old
            return old.expand(batch, *old.shape[1:]).index_copy(0, index, new.expand(index.numel(), *new.shape[1:]))

        alike = self.chol_ineq.shape[-1] == part.chol_ineq.shape[-1]
        old, new = (self, part) if alike else (self.whole(), part.whole())
        return Factor(*map(merge, old, new, (True, False, False, False, True, False)))


EVENT_NDIM = (2, 2, 2, 2, 1, 1)  # trailing dimensions of the fields of `Factor`


class Reduced(NamedTuple):
    """The dual form: E z − f = (t − S y) / scale with y = scale ∘ (dual), z eliminated; then ν eliminated too."""

    chol_q: Tensor  # (N or 1, n, n)
    lowered: Tensor  # (N or 1, n): L⁻¹p, so that z⁰ = −L⁻ᵀL⁻¹p is the minimum without constraints
    half: Tensor  # (N or 1, n, m): L⁻¹EᵀD
    schur: Tensor  # (N or 1, m, m): S = D E Q⁻¹ Eᵀ D, unit diagonal
    scale: Tensor  # (N or 1, m): the diagonal of D
    violation: Tensor  # (N or 1, m): t = D (E z⁰ − f), distances in the norm of Q; zero where it is only rounding
    free_norm: Tensor  # (N or 1,): |z⁰| in the norm of Q
    touches: Tensor  # (N or 1, m): 1, but 0 on rows of E that are zero
    height: Tensor  # (N or 1, m): D |f|, no less than the smallest number there is
    chol_eq: Tensor  # (N or 1, n_eq, n_eq): S_ee = C_e C_eᵀ
    across: Tensor  # (N or 1, n_eq, n_ineq): X = C_e⁻¹ S_ei
    projected: Tensor  # (N or 1, n_ineq, n_ineq): R = S_ii − XᵀX
    dependent: Tensor  # (N or 1,) bool: equality rows depend on each other, and C_e has a ridge


def _first_active(chosen: Tensor, width: int) -> Tensor:  # (*B, n_ineq) -> (*B, width)
    """Give the positions of active inequalities, in their order; behind the last of them any others."""
    return torch.argsort(chosen, dim=-1, descending=True, stable=True)[..., :width]


def spread_out(chol: Tensor, chosen: Tensor) -> Tensor:  # (*B, r, r), (*B, n_ineq) -> (*B, n_ineq, n_ineq)
    """Give a factor on active inequalities a row for every inequality, with ones on the diagonal of inactive ones."""
    r, n_ineq = chol.shape[-1], chosen.shape[-1]
    if r == n_ineq:
        return chol
    spread = torch.nn.functional.one_hot(_first_active(chosen, r), n_ineq).to(chol.dtype)  # (*B, r, n_ineq)
    full = spread.mT @ chol @ spread
    full.diagonal(dim1=-2, dim2=-1).add_(1.0 - spread.sum(-2))
    return full


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:  # (*B, m, n), (*B, n) -> (*B, m)
    """Multiply a matrix with a vector, batched."""
    return transposed_matvec(matrix.mT, vector)  # batched products of rows are several times faster than of columns


def transposed_matvec(matrix: Tensor, vector: Tensor) -> Tensor:  # (*B, m, n), (*B, m) -> (*B, n)
    """Multiply a transposed matrix with a vector, batched."""
    if matrix.ndim == 3 and vector.ndim == 2:
        if matrix.shape[0] == 1:  # one matrix for all vectors
            return torch.mm(vector, matrix.squeeze(0))
        if matrix.shape[0] == vector.shape[0]:
            return torch.bmm(vector.unsqueeze(-2), matrix).squeeze(-2)
    return (vector.unsqueeze(-2) @ matrix).squeeze(-2)


def outer(left: Tensor, right: Tensor) -> Tensor:  # (*B, m), (*B, n) -> (*B, m, n)
    """Outer product, batched."""
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def largest(vector: Tensor) -> Tensor:  # (*B, m) -> (*B,)
    """Largest magnitude; zero where there are no entries."""
    return vector.abs().amax(-1) if vector.shape[-1] else vector.new_zeros(vector.shape[:-1])


def cholesky_solve(factor: Tensor, vector: Tensor) -> Tensor:  # (*B, n, n), (*B, n) -> (*B, n)
    """Solve L Lᵀ x = vector; two triangular solves, since `torch.cholesky_solve` copies its factor first."""
    return triangular_solve(factor, triangular_solve(factor, vector), transposed=True)


def triangular_solve(factor: Tensor, vector: Tensor, *, transposed: bool = False) -> Tensor:
    """Solve L x = vector, or Lᵀ x = vector."""
    shared = factor.ndim == 3 and factor.shape[0] == 1 and vector.shape[0] != 1  # one matrix, many right-hand sides
    lower, right = (factor.squeeze(0), vector.mT) if shared else (factor, vector.unsqueeze(-1))
    solution = torch.linalg.solve_triangular(lower.mT if transposed else lower, right, upper=transposed)
    return solution.mT if shared else solution.squeeze(-1)


def residual(
    Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor, z: Tensor, nu: Tensor, lam: Tensor
) -> KKTResidual:
    """Evaluate the KKT conditions at a point; every argument broadcasts over leading dimensions."""
    excess = matvec(G, z) - h
    return KKTResidual(
        stationarity=matvec(Q, z) + p + transposed_matvec(A, nu) + transposed_matvec(G, lam),
        equality=matvec(A, z) - b,
        inequality=excess.clamp(min=0),
        dual=(-lam).clamp(min=0),
        complementarity=lam * excess,
    )


def jacobian(Q: Tensor, A: Tensor, G: Tensor, h: Tensor, z: Tensor, lam: Tensor) -> Tensor:
    r"""Form ∂F/∂(z, ν, λ) of F = (stationarity, Az − b, λ∘(Gz − h)) densely: to learn from and to test with.

        [   Q        Aᵀ     Gᵀ        ]
        [   A        0      0         ]
        [ diag(λ)G   0   diag(Gz − h) ]

    Returns: (*B, n + n_eq + n_ineq, n + n_eq + n_ineq).
    """
    n_eq, n_ineq = A.shape[-2], G.shape[-2]
    batch = torch.broadcast_shapes(*(t.shape[:-2] for t in (Q, A, G)), *(t.shape[:-1] for t in (h, z, lam)))

    def zeros(rows: int, columns: int) -> Tensor:
        return z.new_zeros(*batch, rows, columns)

    def full(matrix: Tensor) -> Tensor:
        return matrix.expand(*batch, *matrix.shape[-2:])

    rows = [
        [full(Q), full(A.mT), full(G.mT)],
        [full(A), zeros(n_eq, n_eq), zeros(n_eq, n_ineq)],
        [full(lam.unsqueeze(-1) * G), zeros(n_ineq, n_eq), full(torch.diag_embed(matvec(G, z) - h))],
    ]
    return torch.cat([torch.cat(row, dim=-1) for row in rows], dim=-2)


def reduce(chol_q: Tensor, p: Tensor, E: Tensor, f: Tensor, n_eq: int, ridge: float) -> Reduced:
    """Eliminate z and ν: a triangular solve for all rows, a product, and the same again for the equality rows."""
    lowered = triangular_solve(chol_q, p)
    free = -triangular_solve(chol_q, lowered, transposed=True)
    half = torch.linalg.solve_triangular(chol_q, E.mT, upper=False)  # L⁻¹Eᵀ, (N or 1, n, m)
    length = torch.linalg.vector_norm(half, dim=-2)
    there = length > 0
    scale = torch.where(there, length, 1.0).reciprocal()
    half = half * scale.unsqueeze(-2)
    schur = half.mT @ half
    chol_eq, across, projected = schur[:, :n_eq, :n_eq], schur[:, :n_eq, n_eq:], schur
    dependent = there.new_zeros(schur.shape[0])
    if n_eq:
        corner = chol_eq
        chol_eq, positive = _cholesky(corner)
        eye = torch.eye(n_eq, dtype=schur.dtype, device=schur.device)
        chol_eq = torch.where(positive[:, None, None], chol_eq, torch.linalg.cholesky_ex(corner + ridge * eye)[0])
        across = torch.linalg.solve_triangular(chol_eq, across, upper=False)
        projected = torch.baddbmm(schur[:, n_eq:, n_eq:], across.mT, across, alpha=-1)
        dependent = positive.logical_not()
    violation = scale * (matvec(E, free) - f)
    free_norm = torch.linalg.vector_norm(lowered, dim=-1)
    touches = there.to(schur.dtype)
    height = (scale * f).abs_().clamp_(min=torch.finfo(schur.dtype).tiny)
    known = torch.addcmul(height, touches, free_norm.unsqueeze(-1))
    violation = violation * (violation.abs() > 32 * torch.finfo(schur.dtype).eps * known)
    return Reduced(
        chol_q,
        lowered,
        half,
        schur,
        scale,
        violation,
        free_norm,
        touches,
        height,
        chol_eq,
        across,
        projected,
        dependent,
    )


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factor matrices of unit diagonal; also tell where they are positive definite to working precision, (N,)."""
    return _judged(*torch.linalg.cholesky_ex(matrix))


def _judged(factor: Tensor, info: Tensor) -> tuple[Tensor, Tensor]:
    """Judge the outcome of `cholesky_ex`."""
    if not factor.shape[-1]:
        return factor, info == 0
    least = factor.diagonal(dim1=-2, dim2=-1).amin(-1)
    return factor, torch.gt(least > least_pivot(factor) ** 0.5, info)  # info is 0 where there is a factor


def least_pivot(matrix: Tensor) -> float:
    """Say below what a pivot of a matrix of unit diagonal is only rounding."""
    return 16 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps


def crowded(chosen: Tensor) -> bool:
    """Tell whether factoring the rows of each program that are chosen, (N, m), alone is worth finding out how many."""
    count, m = chosen.shape
    return chosen.is_cpu and count * m**3 > _LARGE


def block(matrix: Tensor, rows: Tensor) -> Tensor:  # (N or 1, m, m), (N, r) -> (N, r, r)
    """Take rows and the same columns out of square matrices."""
    m = matrix.shape[-1]
    first = rows * m
    if matrix.shape[0] != 1:
        first = first + torch.arange(0, matrix.numel(), m * m, device=rows.device).unsqueeze(-1)
    return matrix.take(first.unsqueeze(-1) + rows.unsqueeze(-2))


def factorise(
    reduced: Reduced, active: Tensor, made: tuple[Tensor, Tensor] | None = None, *, narrow: bool = False
) -> tuple[Factor, Tensor]:
    """Factor the Schur complement on the active rows; also tell where they do not depend on each other, (N,).

    Args:
        made: the outcome of `cholesky_ex` for the active inequalities, where it is known.
        narrow: leave inactive inequalities out of large factors; one host synchronisation.
    """
    chosen = active[:, reduced.chol_eq.shape[-1] :]
    if made is not None:
        chol_ineq, positive = _judged(*made)
    elif narrow and crowded(chosen):
        width = max(checks.host_int(chosen.sum(-1).amax()), 1)
        rows = _first_active(chosen, width)
        there = chosen.gather(-1, rows)
        masked = block(reduced.projected, rows).mul_(there.unsqueeze(-1)).mul_(there.unsqueeze(-2))
        masked.diagonal(dim1=-2, dim2=-1).add_(1.0 - there)
        chol_ineq, positive = _cholesky(masked)
    else:
        masked = (reduced.projected * chosen.unsqueeze(-1)).mul_(chosen.unsqueeze(-2))
        masked.diagonal(dim1=-2, dim2=-1).add_(1.0 - chosen)
        chol_ineq, positive = _cholesky(masked)
    if active.shape[-1] > reduced.chol_q.shape[-1]:  # more rows than unknowns, whatever rounding makes of the pivots
        positive = positive & (active.sum(-1) <= reduced.chol_q.shape[-1])
    factor = Factor(reduced.chol_q, reduced.chol_eq, reduced.across, chol_ineq, reduced.scale, active)
    return factor, positive > reduced.dependent if reduced.chol_eq.shape[-1] else positive


def factorise_with_ridge(reduced: Reduced, active: Tensor, ridge: float) -> Factor:
    """Factor the Schur complement on the active rows plus a ridge, which is definite whatever the rows."""
    n_eq = reduced.chol_eq.shape[-1]
    masked = (reduced.schur * active.unsqueeze(-1)).mul_(active.unsqueeze(-2))
    masked.diagonal(dim1=-2, dim2=-1).add_(1.0 - active + ridge)
    whole, _ = torch.linalg.cholesky_ex(masked)
    blocks = (whole[:, :n_eq, :n_eq], whole[:, n_eq:, :n_eq].mT, whole[:, n_eq:, n_eq:])
    return Factor(reduced.chol_q, *blocks, reduced.scale, active)


def schur_solve(factor: Factor, vector: Tensor) -> Tensor:  # (N, m) -> (N, m)
    """Solve with the Schur complement on the active rows, in scaled units; inactive rows give zero."""
    n_eq = factor.chol_eq.shape[-1]
    if n_eq == 0:
        return _solve_active(factor, factor.active * vector)
    sizes = [n_eq, factor.across.shape[-1]]
    right_eq, right_ineq = vector.split(sizes, dim=-1)
    _, chosen = factor.active.split(sizes, dim=-1)
    first = triangular_solve(factor.chol_eq, right_eq)
    second = chosen * (right_ineq - transposed_matvec(factor.across, first))
    y_ineq = _solve_active(factor, second)
    y_eq = triangular_solve(factor.chol_eq, first - matvec(factor.across, y_ineq), transposed=True)
    return torch.cat([y_eq, y_ineq], dim=-1)


def _solve_active(factor: Factor, right: Tensor) -> Tensor:  # (N, n_ineq) -> (N, n_ineq)
    """Solve with C_i; `right` is zero on inactive rows."""
    if factor.chol_ineq.shape[-1] == right.shape[-1]:
        return cholesky_solve(factor.chol_ineq, right)
    places = factor.places.expand(right.shape[0], -1)
    return torch.zeros_like(right).scatter(-1, places, cholesky_solve(factor.chol_ineq, right.gather(-1, places)))


def solve_once(factor: Factor, E: Tensor, r_z: Tensor, r_y: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the active-set system with the factors alone."""
    step = cholesky_solve(factor.chol_q, r_z)
    u_y = factor.scale * schur_solve(factor, factor.scale * (matvec(E, step) - r_y))
    return step - cholesky_solve(factor.chol_q, transposed_matvec(E, u_y)), u_y


def solve(
    factor: Factor,
    Q: Tensor,
    E: Tensor,
    r_z: Tensor,
    r_y: Tensor,
    r_bound: Tensor | None,
    refine: int,
    *,
    project: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve the active-set system and refine against the matrices themselves; no bounds, so u_bound is zero.

    `project` is there for the other form: where rows depend on each other, the ridge of this factor does it.
    """
    u_z, u_y = solve_once(factor, E, r_z, r_y)
    for _ in range(refine):
        left_z = r_z - matvec(Q, u_z) - transposed_matvec(E, u_y)
        left_y = factor.active * (r_y - matvec(E, u_z))
        step_z, step_y = solve_once(factor, E, left_z, left_y)
        u_z, u_y = u_z + step_z, u_y + step_y
    return u_z, u_y, torch.zeros_like(u_z)


def condition(factor: Factor) -> Tensor:  # -> (N,)
    """Estimate the condition from the pivots of both factors: a lower bound, cheap and of the right order mostly."""
    worst = _spread(factor.chol_q)
    for part in (factor.chol_eq, factor.chol_ineq):
        if part.shape[-1]:
            worst = torch.maximum(
                worst, _spread(part, one=part is factor.chol_ineq and part.shape[-1] < factor.across.shape[-1])
            )
    return worst


def _spread(factor: Tensor, *, one: bool = False) -> Tensor:  # (N, n, n) -> (N,)
    """Compare the largest pivot with the smallest; `one`: a pivot of 1 is left out."""
    least, most = torch.aminmax(factor.diagonal(dim1=-2, dim2=-1), dim=-1)
    if one:
        least, most = least.clamp(max=1.0), most.clamp(min=1.0)
    return (most / least) ** 2


def check_definite(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Factor Q, (N or 1, n, n); also tell where it is positive definite to working precision, (N or 1,)."""
    factor, info = torch.linalg.cholesky_ex(Q)
    floor = 10 * Q.shape[-1] * torch.finfo(Q.dtype).eps
    relative = factor.diagonal(dim1=-2, dim2=-1) ** 2 / Q.diagonal(dim1=-2, dim2=-1)
    return factor, torch.gt(relative.amin(-1) > floor, info)  # info is 0 where there is a factor


def convex(Q: Tensor, batch: torch.Size, rounding: float) -> Tensor:
    """Refuse Q, (N or 1, n, n), with a negative eigenvalue beyond rounding; one host synchronisation, mostly.

    Q + τI is positive definite where Q is semidefinite to rounding, τ = 64 n eps |Q|, |Q| its largest row sum. Where
    the data had been rounded more coarsely before, what their rounding made negative is lifted to zero.

    Returns: Q, or Q + a multiple of the identity of the size of the data's rounding.

    Raises:
        NotPositiveDefiniteError: names the problem and the smallest eigenvalue.
    """
    n = Q.shape[-1]
    if Q.shape[0] == 0:
        return Q
    size = Q.abs().sum(-1).amax(-1)
    shift = 64 * n * torch.finfo(Q.dtype).eps * size
    shifted = Q.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(torch.where(size > 0, shift, 1.0).unsqueeze(-1))
    _, info = torch.linalg.cholesky_ex(shifted)
    if checks.host_bool((info == 0).all()):
        return Q
    bad = info != 0
    if rounding > torch.finfo(Q.dtype).eps:
        index = bad.nonzero().squeeze(-1)
        least = torch.linalg.eigvalsh(Q[index])[:, 0]
        lift = torch.zeros_like(size).index_copy(0, index, shift[index] - least)
        bad = bad & (lift > n * rounding * size)
        if not bool(bad.any()):
            return Q + torch.diag_embed(lift.unsqueeze(-1).expand(-1, n))
    first = Q[bad.nonzero()[0, 0]]
    smallest = float(torch.linalg.eigvalsh(first)[0])
    shared = Q.shape[0] == 1
    where = "" if shared else checks.index_of(bad.reshape(batch))
    count = "" if shared else f"; {int(bad.sum())} of {bad.numel()} problems"
    raise NotPositiveDefiniteError(
        f"Q{where} is not positive semidefinite (smallest eigenvalue {smallest:.3g}, |Q| {float(first.abs().max()):.3g}"
        f"{count}), so the program is not convex. If it should be, add a small multiple of the identity, "
        "Q + 1e-6 * torch.eye(n), or build Q as L Lᵀ."
    )


def magnitude(reduced: Reduced, z_norm: Tensor) -> Tensor:  # (N,) -> (N, m)
    """Bound the terms of each row E z − f, scaled, for a point of that length in the norm of Q; never zero."""
    return torch.addcmul(reduced.height, reduced.touches, z_norm.unsqueeze(-1))


def relative_residual(
    reduced: Reduced, n_eq: int, dual: Tensor, longest_dual: Tensor, gradient: Tensor, gap: Tensor, z_norm: Tensor
) -> Tensor:
    """Measure the KKT residual relative to the data, (N,): blind to units, row by row, 0 where all data are zero.

    From gradient = Qz + p + Eᵀy, gap = D(Ez − f), dual = D⁻¹y, its length and z_norm = |z|, all lengths in the norm of
    Q: stationarity relative to the longer of z and z⁰ (the minimum without constraints); each row of Ez − f relative to
    its own terms; the sign of λ to the largest dual; complementarity, row by row, to both.
    """
    tiny = torch.finfo(gap.dtype).tiny
    # z is known to rounding of z⁰ only, which is allowed a little beyond the terms of the row itself
    over = gap / magnitude(reduced, torch.maximum(z_norm, 1e-5 * reduced.free_norm))
    lam = dual / longest_dual.clamp(min=tiny).unsqueeze(-1)
    off = torch.linalg.vector_norm(triangular_solve(reduced.chol_q, gradient), dim=-1)
    off = off / torch.maximum(z_norm, reduced.free_norm).clamp_(min=tiny)
    parts = [off.unsqueeze(-1)]
    if n_eq:
        parts.append(over[:, :n_eq].abs())
        over, lam = over[:, n_eq:], lam[:, n_eq:]
    parts += [over, -lam, (over * lam).abs_()]
    return torch.cat(parts, dim=-1).amax(-1).nan_to_num_(nan=torch.inf, posinf=torch.inf)


def symmetric(matrix: Tensor) -> Tensor:
    """Take the symmetric part."""
    return (0.5 * matrix).add(matrix.mT, alpha=0.5)


def unexpand(tensor: Tensor, event_ndim: int, batch: torch.Size) -> Tensor:
    """Flatten the batch to one dimension: (N, ...), or (1, ...) where every problem shares the same memory."""
    event = tensor.shape[tensor.ndim - event_ndim :]
    strides = tensor.stride()[: tensor.ndim - event_ndim]
    sizes = tensor.shape[: tensor.ndim - event_ndim]
    if batch.numel() and all(stride == 0 or size == 1 for stride, size in zip(strides, sizes, strict=True)):
        for _ in sizes:
            tensor = tensor.select(0, 0)
        return tensor.unsqueeze(0)
    return tensor.expand((*batch, *event)).reshape((batch.numel(), *event))


def expand(tensor: Tensor, event_ndim: int, batch: torch.Size) -> Tensor:
    """Undo `unexpand`: (N, ...) or (1, ...) to (*batch, ...); what is shared stays one memory."""
    event = tensor.shape[tensor.ndim - event_ndim :]
    if tensor.shape[0] == batch.numel():
        return tensor.reshape((*batch, *event))
    return tensor.squeeze(0).expand((*batch, *event))
