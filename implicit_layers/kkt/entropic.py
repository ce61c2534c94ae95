r"""The KKT system of the entropy-regularised LP on the simplex, whose solution is softmax.

    maximise ⟨x, y⟩ + τ H(y)   subject to   1ᵀy = 1,  y ≥ 0,      H(y) = −Σᵢ yᵢ log yᵢ

    L(y, u, v; x) = ⟨x, y⟩ + τ H(y) + u (1ᵀy − 1) + vᵀy

`u` belongs to the equality and is free in sign; `v ≥ 0` belongs to y ≥ 0. The sign of `u` is the one of the report
that this derivation corrects (a maximisation, with *plus* u), so u = τ (1 − logsumexp(x/τ)). The report calls the
scores θ and the point x; here they are `x` and `y`, as everywhere in this package.

The problem is concave and has interior points, so the KKT conditions are necessary and sufficient. The slope of the
entropy is infinite at y = 0, hence y > 0 and v = 0 at the solution: `v` is kept only to show where it goes.

Everything here is for teaching and testing: pure torch, leading batch dimensions *B, no checks at the door.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Temperature = Tensor | float  # a number, or a tensor that broadcasts to the batch (*B,)


class Point(NamedTuple):
    """A primal-dual point: y (*B, n) on the simplex, u (*B,) for 1ᵀy = 1, v (*B, n) for y ≥ 0."""

    y: Tensor
    u: Tensor
    v: Tensor


class Residual(NamedTuple):
    """What is left of each KKT equation: stationarity (*B, n), primal (*B,), complementarity (*B, n)."""

    stationarity: Tensor
    primal: Tensor
    complementarity: Tensor

    def flat(self) -> Tensor:  # -> (*B, 2n + 1)
        """All equations in one vector, in the order of the unknowns (y, u, v)."""
        return torch.cat([self.stationarity, self.primal.unsqueeze(-1), self.complementarity], -1)


class Blocks(NamedTuple):
    """A (2n+1) × (2n+1) matrix by blocks; rows and columns in the order y (n), u (1), v (n)."""

    yy: Tensor  # (*B, n, n)
    yu: Tensor  # (*B, n, 1)
    yv: Tensor  # (*B, n, n)
    uy: Tensor  # (*B, 1, n)
    uu: Tensor  # (*B, 1, 1)
    uv: Tensor  # (*B, 1, n)
    vy: Tensor  # (*B, n, n)
    vu: Tensor  # (*B, n, 1)
    vv: Tensor  # (*B, n, n)

    def dense(self) -> Tensor:  # -> (*B, 2n + 1, 2n + 1)
        """The whole matrix."""
        rows = (self[0:3], self[3:6], self[6:9])
        return torch.cat([torch.cat(row, -1) for row in rows], -2)


class ReducedBlocks(NamedTuple):
    """A (n+1) × (n+1) matrix by blocks; rows and columns in the order y (n), u (1)."""

    yy: Tensor  # (*B, n, n)
    yu: Tensor  # (*B, n, 1)
    uy: Tensor  # (*B, 1, n)
    uu: Tensor  # (*B, 1, 1)

    def dense(self) -> Tensor:  # -> (*B, n + 1, n + 1)
        """The whole matrix."""
        return torch.cat([torch.cat(self[0:2], -1), torch.cat(self[2:4], -1)], -2)


class Gradients(NamedTuple):
    """Gradients with respect to the scores, (*B, n), and to the temperature of each problem, (*B,)."""

    x: Tensor
    temperature: Tensor


class SeedSystem(NamedTuple):
    """The report's Eq. 4 and Eq. 6 at one point: the residual, its Jacobian, and the point itself."""

    point: Point
    residual: Residual
    jacobian: Blocks


def solution(x: Tensor, temperature: Temperature = 1.0) -> Point:  # (*B, n), (*B,) -> Point
    r"""The root of `residual`: y = softmax(x/τ), u = τ (1 − logsumexp(x/τ)), v = 0.

    Args:     x: finite scores.  temperature: τ > 0.
    Returns:  the primal-dual point.
    Cost:     O(n) time and memory.
    Source:   stationarity gives yᵢ = exp((xᵢ + u)/τ − 1); 1ᵀy = 1 then fixes u.

    >>> solution(torch.zeros(2, dtype=torch.float64)).y
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    tau = _per_problem(temperature, x)  # (*B, 1)
    scaled = x / tau
    u = tau.squeeze(-1) * (1 - scaled.logsumexp(-1))
    y = scaled.softmax(-1)
    return Point(y, u, torch.zeros_like(y))


def residual(point: Point, x: Tensor, temperature: Temperature = 1.0) -> Residual:  # Point, (*B, n), (*B,) -> Residual
    r"""The corrected KKT equations, zero at the solution and nowhere else with v ≥ 0.

        x − τ (log y + 1) + u 1 + v = 0     stationarity
        1ᵀy − 1                     = 0     primal feasibility: no multiplier in front of it
        diag(v) y                   = 0     complementary slackness

    Args:     point: y > 0, u, v.  x: scores.  temperature: τ > 0.
    Returns:  the left-hand sides.
    Cost:     O(n) time and memory.
    Source:   the gradients of the Lagrangian at the head of this file.

    >>> x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> bool(residual(solution(x), x).flat().abs().max() < 1e-15)
    True
    """
    y, u, v = point
    tau = _per_problem(temperature, y)
    return Residual(x - tau * (y.log() + 1) + u.unsqueeze(-1) + v, y.sum(-1) - 1, v * y)


def jacobian(point: Point, temperature: Temperature = 1.0) -> Blocks:  # Point, (*B,) -> Blocks
    r"""The derivative of `residual` with respect to (y, u, v), with D = diag(y).

            ⎡ −τ D⁻¹   1   I ⎤
        J = ⎢   1ᵀ     0   0 ⎥        det J = (−1)ⁿ τⁿ⁻¹ at the solution, for every x: never singular
            ⎣ diag(v)  0   D ⎦

    Args:     point: y > 0, u, v.  temperature: τ > 0.
    Returns:  the nine blocks.
    Cost:     O(n²) memory: for teaching and testing.
    Source:   the differential of `residual`.

    >>> J = jacobian(solution(torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64))).dense()
    >>> round(float(torch.linalg.det(J)), 9)
    -1.0
    """
    y, _, v = point
    tau = _per_problem(temperature, y)
    one, zero = torch.ones_like(y), torch.zeros_like(y)
    return Blocks(
        yy=_diagonal(-tau / y),
        yu=_column(one),
        yv=_diagonal(one),
        uy=_row(one),
        uu=_row(zero[..., :1]),
        uv=_row(zero),
        vy=_diagonal(v),
        vu=_column(zero),
        vv=_diagonal(y),
    )


def inverse(point: Point, temperature: Temperature = 1.0) -> Blocks:  # Point, (*B,) -> Blocks
    r"""The inverse of `jacobian`, block by block; no linear solver is called.

    At the solution (v = 0, 1ᵀy = 1), with S = (D − y yᵀ)/τ, it is

               ⎡ −S   y   (I − y 1ᵀ)/τ ⎤
        J⁻¹ =  ⎢  yᵀ  τ      −1ᵀ       ⎥        hence dy/dx = S, du/dx = −yᵀ, dv/dx = 0
               ⎣  0   0       D⁻¹      ⎦

    and at any other y > 0, v ≥ 0, with w = y/(τ + v), σ = 1ᵀw and T = diag(w) − w wᵀ/σ, it is

               ⎡   −T           w/σ            T D⁻¹          ⎤
        J⁻¹ =  ⎢  wᵀ/σ          1/σ         −(w/y)ᵀ/σ         ⎥
               ⎣ D⁻¹ diag(v) T  −(v/y)∘w/σ  D⁻¹ − D⁻¹ diag(v) T D⁻¹ ⎦

    Args:     point: y > 0, u, v ≥ 0.  temperature: τ > 0.
    Returns:  the nine blocks.
    Cost:     O(n²) memory and time.
    Source:   eliminate dv with the last row, then dy with the first: what is left for du is the number σ.

    >>> point = solution(torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64))
    >>> product = inverse(point).dense() @ jacobian(point).dense()
    >>> bool((product - torch.eye(7, dtype=torch.float64)).abs().max() < 1e-12)
    True
    """
    y, _, v = point
    tau = _per_problem(temperature, y)
    w = y / (tau + v)
    sigma = w.sum(-1, keepdim=True)  # (*B, 1)
    T = _diagonal(w) - _column(w) * _row(w / sigma)
    over_y, v_over_y = _row(1 / y), _column(v / y)
    return Blocks(
        yy=-T,
        yu=_column(w / sigma),
        yv=T * over_y,
        uy=_row(w / sigma),
        uu=_row(1 / sigma),
        uv=_row(-(w / y) / sigma),
        vy=v_over_y * T,
        vu=-v_over_y * _column(w / sigma),
        vv=_diagonal(1 / y) - v_over_y * T * over_y,
    )


def reduced_jacobian(y: Tensor, temperature: Temperature = 1.0) -> ReducedBlocks:  # (*B, n), (*B,) -> ReducedBlocks
    r"""The Jacobian in (y, u) alone, once v = 0 is known.

        J = [[−τ D⁻¹, 1], [1ᵀ, 0]]        det J = (−1)ⁿ τⁿ⁻¹ / Πᵢ yᵢ on the simplex

    Args:     y: a positive point.  temperature: τ > 0.
    Returns:  the four blocks.
    Cost:     O(n²) memory.
    Source:   the differential of the first two equations of `residual`.

    >>> reduced_jacobian(torch.tensor([0.5, 0.5])).dense()
    tensor([[-2.,  0.,  1.],
            [ 0., -2.,  1.],
            [ 1.,  1.,  0.]])
    """
    tau = _per_problem(temperature, y)
    one = torch.ones_like(y)
    return ReducedBlocks(_diagonal(-tau / y), _column(one), _row(one), _row(torch.zeros_like(y[..., :1])))


def reduced_inverse(y: Tensor, temperature: Temperature = 1.0) -> ReducedBlocks:  # (*B, n), (*B,) -> ReducedBlocks
    r"""The inverse of `reduced_jacobian` on the simplex (1ᵀy = 1); it divides by no yᵢ, so zeros are welcome.

        [[−τ D⁻¹, 1], [1ᵀ, 0]]⁻¹ = [[−S, y], [yᵀ, τ]]        S = (D − y yᵀ)/τ

    Args:     y: a point of the simplex, zeros allowed.  temperature: τ > 0.
    Returns:  the four blocks.
    Cost:     O(n²) memory and time.
    Source:   `inverse` with v = 0, its last row and column left out.

    >>> reduced_inverse(torch.tensor([0.25, 0.75])).dense()
    tensor([[-0.1875,  0.1875,  0.2500],
            [ 0.1875, -0.1875,  0.7500],
            [ 0.2500,  0.7500,  1.0000]])
    """
    tau = _per_problem(temperature, y)
    S = (_diagonal(y) - _column(y) * _row(y)) / tau.unsqueeze(-1)
    return ReducedBlocks(-S, _column(y), _row(y), _row(tau.expand(y[..., :1].shape)))


def log_residual(log_y: Tensor, u: Tensor, x: Tensor, temperature: Temperature = 1.0) -> tuple[Tensor, Tensor]:
    r"""The same two equations in the unknowns (log y, u); y > 0 needs no guard, and an underflowed y no logarithm.

        x − τ (log y + 1) + u 1 = 0        1ᵀ exp(log y) − 1 = 0

    Args:     log_y: (*B, n).  u: (*B,).  x: scores, (*B, n).  temperature: τ > 0.
    Returns:  stationarity (*B, n) and primal feasibility (*B,).
    Cost:     O(n).
    Source:   `residual` with v = 0.

    >>> log_residual(torch.tensor([0.0]), torch.tensor(-1.0), torch.tensor([2.0]))
    (tensor([0.]), tensor(0.))
    """
    tau = _per_problem(temperature, log_y)
    return x - tau * (log_y + 1) + u.unsqueeze(-1), log_y.exp().sum(-1) - 1


def log_inverse(y: Tensor, temperature: Temperature = 1.0) -> ReducedBlocks:  # (*B, n), (*B,) -> ReducedBlocks
    r"""The inverse of the Jacobian of `log_residual` on the simplex; zeros in y are welcome.

        [[−τ I, 1], [yᵀ, 0]]⁻¹ = [[−(I − 1 yᵀ)/τ, 1], [yᵀ, τ]] = diag(D⁻¹, 1) [[−S, y], [yᵀ, τ]]

    Args:     y: a point of the simplex.  temperature: τ > 0.
    Returns:  the four blocks, rows in the order (log y, u).
    Cost:     O(n²) memory and time.
    Source:   `reduced_inverse`, with d log y = D⁻¹ dy.

    >>> log_inverse(torch.tensor([0.25, 0.75])).yy
    tensor([[-0.7500,  0.7500],
            [ 0.2500, -0.2500]])
    """
    tau = _per_problem(temperature, y)
    one = torch.ones_like(y)
    centring = _diagonal(one) - _column(one) * _row(y)
    return ReducedBlocks(-centring / tau.unsqueeze(-1), _column(one), _row(y), _row(tau.expand(y[..., :1].shape)))


def log_newton_step(
    log_y: Tensor, u: Tensor, x: Tensor, temperature: Temperature = 1.0
) -> tuple[Tensor, Tensor]:  # (*B, n), (*B,), (*B, n), (*B,) -> (*B, n), (*B,)
    r"""One Newton step on `log_residual` with the explicit inverse: (log y, u) − J⁻¹ F.

    At the solution it moves nothing, and its derivative in x and τ, with (log y, u) and J⁻¹ held fixed, is −J⁻¹ ∂F/∂x
    and −J⁻¹ ∂F/∂τ: the derivative of the implicit function theorem. Reverse mode through it multiplies by J⁻ᵀ.

    Args:     as in `log_residual`.
    Returns:  the new (log y, u).
    Cost:     O(n²).
    Source:   Newton's method.

    >>> log_newton_step(torch.tensor([0.0]), torch.tensor(0.0), torch.tensor([2.0]))
    (tensor([0.]), tensor(-1.))
    """
    stationarity, primal = log_residual(log_y, u, x, temperature)
    blocks = log_inverse(log_y.exp(), temperature)
    step_log_y = _times(blocks.yy, stationarity) + _times(blocks.yu, primal.unsqueeze(-1))
    step_u = _times(blocks.uy, stationarity) + _times(blocks.uu, primal.unsqueeze(-1))
    return log_y - step_log_y, u - step_u.squeeze(-1)


def vjp(y: Tensor, scores: Tensor, grad_y: Tensor, temperature: Temperature = 1.0) -> Gradients:
    r"""Gradients of a loss through y = softmax(x/τ), by the explicit inverse of the KKT Jacobian.

        Jᵀ (a, b) = −(g, 0)            the adjoint system; here (a, b) = −J⁻ᵀ (g, 0), block by block
        ∂ℓ/∂x = a                      because ∂F/∂x = (I, 0)
        ∂ℓ/∂τ = −aᵀ(log y + 1) = −aᵀ(x − c)/τ

    for every constant c, because 1ᵀa = 0 and log y differs from x/τ by a constant. The last form needs no logarithm.

    Args:
        y: the solution, (*B, n).
        scores: (x − c)/τ, any constant c a problem, finite also where y = 0, (*B, n).
        grad_y: g = ∂ℓ/∂y, (*B, n).
        temperature: τ > 0.

    Returns:  ∂ℓ/∂x (*B, n) and ∂ℓ/∂τ, one a problem, (*B,).
    Cost:     O(n²): a closed form needs O(n), see `implicit_layers.softmax`.
    Source:   the implicit function theorem.

    >>> y = torch.tensor([0.25, 0.75])
    >>> vjp(y, y.log(), torch.tensor([1.0, 0.0])).x
    tensor([ 0.1875, -0.1875])
    """
    blocks = reduced_inverse(y, temperature)
    adjoint = -_times(blocks.yy.mT, grad_y)  # the block uyᵀ would meet the gradient of u, which is zero
    return Gradients(adjoint, -(adjoint * scores).sum(-1))


def jvp(
    y: Tensor, scores: Tensor, tangent_x: Tensor, tangent_temperature: Tensor, temperature: Temperature = 1.0
) -> Tensor:
    r"""The tangent of y = softmax(x/τ), by the explicit inverse of the KKT Jacobian.

        J (dy, du) = −(dx − (log y + 1) dτ, 0)        dy = S (dx − (x − c)/τ dτ)

    Args:     as in `vjp`; tangent_x: dx, (*B, n); tangent_temperature: dτ, one a problem, (*B,).
    Returns:  dy, (*B, n).
    Cost:     O(n²).
    Source:   the implicit function theorem.

    >>> y = torch.tensor([0.25, 0.75])
    >>> jvp(y, y.log(), torch.tensor([1.0, 0.0]), torch.tensor(0.0))
    tensor([ 0.1875, -0.1875])
    """
    moved = tangent_x - scores * tangent_temperature.unsqueeze(-1)
    return -_times(reduced_inverse(y, temperature).yy, moved)


def seed_residual(point: Point, x: Tensor) -> Residual:  # Point, (*B, n) -> Residual
    r"""The report's Eq. 4 (τ = 1), kept with its slip: a multiplier stands in front of primal feasibility.

        x − log y − 1 + u 1 + v = 0
        u (1ᵀy − 1)             = 0     wrong: complementary slackness is for inequalities
        diag(v) y               = 0

    It has a second, spurious root: u = 0, v = 0, y = exp(x − 1), which sums to one only when logsumexp(x) = 1.

    Args:     point: y > 0, u, v.  x: scores, called θ in the report.
    Returns:  the left-hand sides.
    Cost:     O(n).
    Source:   the report that this file corrects; use `residual`.

    >>> x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> spurious = seed_spurious_root(x)
    >>> float(seed_residual(spurious, x).flat().abs().max()), round(float(spurious.y.sum()), 4)
    (0.0, 1.3679)
    """
    right = residual(point, x)
    return right._replace(primal=point.u * right.primal)


def seed_jacobian(point: Point) -> Blocks:  # Point -> Blocks
    r"""The report's Eq. 6 (τ = 1), kept with its slip.

            ⎡ −D⁻¹      1      I ⎤
        J = ⎢ u 1ᵀ   1ᵀy − 1   0 ⎥        det J = (−1)ⁿ u at the true solution, u = 1 − logsumexp(x)
            ⎣ diag(v)   0      D ⎦

    Singular wherever logsumexp(x) = 1, although softmax is smooth there: the true and the spurious root cross.

    Args:     point: y > 0, u, v.
    Returns:  the nine blocks.
    Cost:     O(n²) memory.
    Source:   the report that this file corrects; use `jacobian`.

    >>> x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> at_one = x + 1 - x.logsumexp(-1)  # the same softmax, shifted so that logsumexp is 1
    >>> bool(torch.linalg.det(seed_jacobian(solution(at_one)).dense()).abs() < 1e-15)
    True
    """
    y, u, _ = point
    right = jacobian(point)
    return right._replace(uy=u[..., None, None] * right.uy, uu=(y.sum(-1) - 1)[..., None, None])


def seed_spurious_root(x: Tensor) -> Point:  # (*B, n) -> Point
    """The root of `seed_residual` that is no solution: u = 0, v = 0, y = exp(x − 1)."""
    y = (x - 1).exp()
    return Point(y, torch.zeros_like(y.sum(-1)), torch.zeros_like(y))


def seed_system(x: Tensor) -> SeedSystem:  # (*B, n) -> SeedSystem
    """The report's Eq. 4 and 6 at the true solution for the scores `x`: see `seed_residual` and `seed_jacobian`."""
    point = solution(x)
    return SeedSystem(point, seed_residual(point, x), seed_jacobian(point))


def _per_problem(temperature: Temperature, like: Tensor) -> Tensor:
    """The temperature with one trailing dimension, ready to meet (*B, n)."""
    if isinstance(temperature, Tensor):
        return temperature.unsqueeze(-1)
    return like.new_full((1,), temperature)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:  # (*B, m, n), (*B, n) -> (*B, m)
    """Matrix times vector without `matmul`, which autocast would take down to half precision."""
    return (matrix * vector.unsqueeze(-2)).sum(-1)


def _diagonal(entries: Tensor) -> Tensor:  # (*B, n) -> (*B, n, n)
    """The diagonal matrix of `entries`."""
    return torch.diag_embed(entries)


def _column(entries: Tensor) -> Tensor:  # (*B, n) -> (*B, n, 1)
    """`entries` as a column."""
    return entries.unsqueeze(-1)


def _row(entries: Tensor) -> Tensor:  # (*B, n) -> (*B, 1, n)
    """`entries` as a row."""
    return entries.unsqueeze(-2)
