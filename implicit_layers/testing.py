"""Public helpers to test layers and solutions: certificates, problems with known answers, gradient checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from implicit_layers.errors import ArgumentError, ArgumentTypeError, DtypeError, ShapeError


def kkt_certificate(
    Q: Tensor,
    p: Tensor,
    z: Tensor,
    nu: Tensor | None = None,
    lam: Tensor | None = None,
    *,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    lb: Tensor | None = None,
    ub: Tensor | None = None,
    lam_lb: Tensor | None = None,
    lam_ub: Tensor | None = None,
) -> Tensor:
    r"""Measure how far a point is from satisfying the KKT conditions of a quadratic program.

    Problem:  min ½ zᵀQz + pᵀz  subject to  A z = b,  G z ≤ h,  lb ≤ z ≤ ub.

    Args:
        Q, p, A, b, G, h, lb, ub: the program, as for `solve_qp`; leading dimensions broadcast. Q is symmetrised.
            Infinite entries of h, lb, ub are constraints that are not there; their duals must be 0.
        z, nu, lam, lam_lb, lam_ub: the point and its duals; those of missing constraints may be left out.

    Returns: (*B,): the largest of the violations, each divided by max(1, its largest term): stationarity
             Qz + p + Aᵀν + Gᵀλ + λ_ub − λ_lb, equality Az − b, inequality max(Gz − h, 0), dual sign max(−λ, 0),
             complementarity λ∘(Gz − h), and the same three for the bounds. Zero at an exact solution; NaN where the
             point is NaN. Computed in float64.
    Raises:  ValueError: constraints without their duals.
    Cost:    a few matrix–vector products.
    Source:  Boyd & Vandenberghe (2004), section 5.5.3.

    >>> Q, p = torch.eye(1), torch.tensor([-2.0])
    >>> G, h = torch.eye(1), torch.tensor([1.0])
    >>> kkt_certificate(Q, p, torch.tensor([1.0]), lam=torch.tensor([1.0]), G=G, h=h)
    tensor(0., dtype=torch.float64)
    >>> kkt_certificate(Q, p, torch.tensor([1.5]), lam=torch.tensor([0.5]), G=G, h=h)
    tensor(0.3333, dtype=torch.float64)
    """
    if (A is not None and nu is None) or (G is not None and lam is None):
        raise ArgumentError("kkt_certificate: a program with constraints needs their duals: nu for A, lam for G")
    if (lb is None) != (lam_lb is None) or (ub is None) != (lam_ub is None):
        raise ArgumentError("kkt_certificate: bounds come with their duals: lam_lb for lb, lam_ub for ub")
    for name, rows, right, dual in (("A", A, b, nu), ("G", G, h, lam)):
        if (rows is None) != (right is None) or (rows is None and dual is not None and dual.shape[-1]):
            raise ArgumentError(
                f"kkt_certificate: {name} comes with its right-hand side and its duals, or none of them does"
            )
        if rows is not None and right is not None and dual is not None:
            sizes = {rows.shape[-2], right.shape[-1], dual.shape[-1]}
            if rows.shape[-1] != z.shape[-1] or len(sizes) > 1:
                raise ShapeError(
                    f"kkt_certificate: {name} of shape {tuple(rows.shape)}, its right-hand side {tuple(right.shape)}, "
                    f"its duals {tuple(dual.shape)} and z {tuple(z.shape)} do not fit"
                )
    if Q.shape[-2:] != (z.shape[-1], z.shape[-1]) or p.shape[-1] != z.shape[-1]:
        raise ShapeError(f"kkt_certificate: Q {tuple(Q.shape)}, p {tuple(p.shape)} and z {tuple(z.shape)} do not fit")
    with torch.no_grad():
        Q, p, z = (tensor.detach().to(torch.float64) for tensor in (Q, p, z))
        curved = (0.5 * (Q + Q.mT) @ z.unsqueeze(-1)).squeeze(-1)
        terms = [curved, p]
        violations = []
        if A is not None and b is not None and nu is not None:
            A, b, nu = (tensor.detach().to(torch.float64) for tensor in (A, b, nu))
            terms.append((A.mT @ nu.unsqueeze(-1)).squeeze(-1))
            left = (A @ z.unsqueeze(-1)).squeeze(-1)
            violations.append(_relative(left - b, left, b))
        if G is not None and h is not None and lam is not None:
            G, h, lam = (tensor.detach().to(torch.float64) for tensor in (G, h, lam))
            terms.append((G.mT @ lam.unsqueeze(-1)).squeeze(-1))
            left = (G @ z.unsqueeze(-1)).squeeze(-1)
            violations += _inequality(left, h, lam)
        for sign, bound, dual in ((-1.0, lb, lam_lb), (1.0, ub, lam_ub)):
            if bound is not None and dual is not None:
                bound, dual = (tensor.detach().to(torch.float64) for tensor in (bound, dual))
                terms.append(sign * dual)
                violations += _inequality(sign * z, sign * bound, dual)
        violations.append(_relative(sum(terms[1:], terms[0]), *terms))
        return torch.stack(torch.broadcast_tensors(*violations)).amax(0)


def _inequality(left: Tensor, right: Tensor, dual: Tensor) -> list[Tensor]:
    """Violations of left ≤ right, dual ≥ 0, dual∘(left − right) = 0; an infinite right side is no constraint."""
    there = right < torch.inf
    right = torch.where(there, right, left)
    return [
        _relative((left - right).clamp(min=0), left, right),
        _relative(torch.where(there, dual.clamp(max=0), dual), dual),
        _relative(dual * (left - right), dual * left, dual * right),
    ]


def _relative(value: Tensor, *terms: Tensor) -> Tensor:
    """Largest magnitude of `value` over max(1, largest magnitude of the terms), per problem."""
    if value.shape[-1] == 0:
        return value.new_zeros(value.shape[:-1])
    scale = torch.stack(torch.broadcast_tensors(*(term.abs().amax(-1) for term in terms))).amax(0).clamp(min=1.0)
    return value.abs().amax(-1) / scale


class QPProblem(NamedTuple):
    """A quadratic program with its exact solution."""

    Q: Tensor  # (*B, n, n)
    p: Tensor  # (*B, n)
    A: Tensor  # (*B, n_eq, n)
    b: Tensor  # (*B, n_eq)
    G: Tensor  # (*B, n_ineq, n)
    h: Tensor  # (*B, n_ineq)
    z: Tensor  # (*B, n)
    nu: Tensor  # (*B, n_eq)
    lam: Tensor  # (*B, n_ineq)


def random_qp(
    n: int,
    n_ineq: int = 0,
    n_eq: int = 0,
    *,
    batch: tuple[int, ...] = (),
    active: float = 0.3,
    condition: float = 100.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> QPProblem:
    r"""Draw a strictly convex quadratic program whose exact solution is known beforehand.

    The solution is drawn first: z and ν normal; λ positive on the active rows, s = h − Gz positive on the others, both
    at least 0.1, so strict complementarity holds. Then h = Gz + s, b = Az and p = −(Qz + Aᵀν + Gᵀλ).

    Args:
        n, n_ineq, n_eq: sizes; n_eq ≤ n.
        batch: leading dimensions.
        active: share of the inequality rows that are active; never so many that n_eq + active rows exceed n.
        condition: condition number of Q, whose eigenvalues lie between 1/condition and 1, spread geometrically.
        seed: of the generator; the same seed gives the same problem.
        dtype: the problem is drawn in float64 and rounded to it.

    Returns: QPProblem(Q, p, A, b, G, h, z, nu, lam), unique in z; nu and lam are unique too, almost surely.
    Raises:  ValueError: n_eq > n, or an impossible share or condition.
    Source:  the construction is the usual one for known-answer tests of QP solvers.

    >>> problem = random_qp(4, 3, 1, batch=(2,))
    >>> [tuple(tensor.shape) for tensor in problem]
    [(2, 4, 4), (2, 4), (2, 1, 4), (2, 1), (2, 3, 4), (2, 3), (2, 4), (2, 1), (2, 3)]
    """
    if not 0 <= n_eq <= n or n < 1 or n_ineq < 0:
        raise ArgumentError(f"random_qp: need n >= 1, 0 <= n_eq <= n and n_ineq >= 0, got {n=}, {n_eq=}, {n_ineq=}")
    if not 0.0 <= active <= 1.0 or condition < 1.0:
        raise ArgumentError(f"random_qp: need 0 <= active <= 1 and condition >= 1, got {active=}, {condition=}")
    if not dtype.is_floating_point:
        raise DtypeError(f"random_qp: dtype must be a floating-point type, got {dtype}")
    if not isinstance(batch, tuple):
        raise ArgumentTypeError(f"random_qp: batch must be a tuple of sizes, got {batch!r}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*batch, *shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(normal(n, n))[0]
    exponents = torch.linspace(0.0, 1.0, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)
    Q = (basis * condition**-exponents) @ basis.mT
    Q = 0.5 * (Q + Q.mT)
    A, G = normal(n_eq, n) / n**0.5, normal(n_ineq, n) / n**0.5
    z, nu = normal(n), normal(n_eq)
    count = min(round(active * n_ineq), n - n_eq)
    order = uniform(n_ineq).argsort(-1).argsort(-1)
    is_active = order < count
    size = 0.1 + uniform(n_ineq)
    lam, s = torch.where(is_active, size, 0.0), torch.where(is_active, 0.0, size)
    h = (G @ z.unsqueeze(-1)).squeeze(-1) + s
    b = (A @ z.unsqueeze(-1)).squeeze(-1)
    pulled = A.mT @ nu.unsqueeze(-1) + G.mT @ lam.unsqueeze(-1)
    p = -(Q @ z.unsqueeze(-1) + pulled).squeeze(-1)
    return QPProblem(*(tensor.to(dtype) for tensor in (Q, p, A, b, G, h, z, nu, lam)))


def check_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    *theta: Tensor,
    second: bool = True,
    forward_mode: bool = True,
    atol: float = 1e-6,
    rtol: float = 1e-6,
) -> None:
    r"""Check derivatives of a function against central differences, in float64; silent when they are right.

    Args:
        function: takes the tensors, returns a tensor or a tuple of tensors.
        theta: the points at which to check; copied, converted to float64.
        second: also check second derivatives, reverse over reverse.
        forward_mode: also check forward mode (and, with `second`, forward over reverse).
        atol, rtol: tolerances; a solve stopped at a tolerance t makes the differences uncertain by about t / 1e-6.

    Raises: torch.autograd.gradcheck.GradcheckError: with the two Jacobians that differ.

    >>> check_gradients(torch.sin, torch.tensor([0.3, 0.7]))
    """
    if not theta:
        raise ArgumentError("check_gradients: give at least one tensor at which to check")
    points = tuple(tensor.detach().clone().to(torch.float64).requires_grad_() for tensor in theta)
    gradcheck(
        function, points, atol=atol, rtol=rtol, check_forward_ad=forward_mode, check_batched_grad=True, fast_mode=False
    )
    if second:
        gradgradcheck(function, points, atol=atol, rtol=rtol, check_fwd_over_rev=forward_mode)
