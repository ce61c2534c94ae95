"""Slow, dense, independent answers in float64, to hold the layers against: not for use in a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers.errors import ConvergenceError
from implicit_layers.testing import kkt_certificate


class ExactQP(NamedTuple):
    """Solution of a batch of quadratic programs by dense linear algebra on its active set."""

    z: Tensor  # (B, n)
    nu: Tensor  # (B, n_eq)
    lam: Tensor  # (B, n_ineq)
    active: Tensor  # (B, n_ineq) bool


class Program(NamedTuple):
    """The data of a batch of quadratic programs, every argument present and batched."""

    Q: Tensor  # (B, n, n)
    p: Tensor  # (B, n)
    A: Tensor  # (B, n_eq, n)
    b: Tensor  # (B, n_eq)
    G: Tensor  # (B, n_ineq, n)
    h: Tensor  # (B, n_ineq)


def program(
    Q: Tensor,
    p: Tensor,
    *,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
) -> Program:
    """The same program in float64 with one batch dimension, missing constraints as zero rows; differentiable."""
    n = p.shape[-1]
    empty_rows, empty = p.new_zeros(0, n), p.new_zeros(0)
    given = (
        (Q, 2), (p, 1), (empty_rows if A is None else A, 2), (empty if b is None else b, 1),
        (empty_rows if G is None else G, 2), (empty if h is None else h, 1),
    )  # fmt: skip
    batch = torch.broadcast_shapes(*(tensor.shape[: tensor.ndim - ndim] for tensor, ndim in given))
    count = batch.numel()
    return Program(
        *(
            tensor.double().expand(*batch, *tensor.shape[tensor.ndim - ndim :])
            .reshape(count, *tensor.shape[tensor.ndim - ndim :])
            for tensor, ndim in given
        )
    )  # fmt: skip


def exact_qp(data: Program, guess: Tensor | None = None, *, tol: float = 1e-9) -> ExactQP:
    r"""Solve strictly convex quadratic programs through their active set, verified, by dense linear algebra.

    Problem:  z* = argmin_z ½ zᵀQz + pᵀz  subject to  Az = b, Gz ≤ h.

    The active rows are guessed, and found by the method of Lawson & Hanson on the dual, min ½λᵀRλ − dᵀλ with λ ≥ 0,
    where the guess is wrong. The answer is one dense KKT system [Q Cᵀ; C 0] a problem, C the equalities and the
    active rows, solved by LU with partial pivoting; autograd goes through that solve, and nothing of the implicit
    layers is used. It leaves only when its KKT conditions hold, wherever the guess came from.

    Args:
        data: the program, see `program`.
        guess: active rows, (B, n_ineq) bool; none unless given.
        tol: bound on `testing.kkt_certificate`.

    Returns:
        z, ν, λ and the active set; z, ν, λ carry the gradient of every argument through plain autograd.

    Gradient:
        Exact where the active set is stable (strict complementarity).

    Raises:
        ConvergenceError: no verified active set was found.

    Cost:
        One dense LU of order n + n_eq + |active| a problem, about |active| + 1 of them without a good guess.

    Source:
        Lawson & Hanson (1974), ch. 23.

    >>> data = program(torch.eye(2), torch.tensor([-1.0, -2.0]), G=torch.eye(2), h=torch.tensor([5.0, 1.0]))
    >>> exact_qp(data).z
    tensor([[1., 1.]], dtype=torch.float64)
    """
    count, n_ineq = data.h.shape
    guess = torch.zeros(count, n_ineq, dtype=torch.bool, device=data.h.device) if guess is None else guess
    solutions = [_exact_one(Program(*(argument[i] for argument in data)), guess[i], tol, index=i) for i in range(count)]
    if not solutions:
        return ExactQP(data.p, data.b, data.h, guess)
    z, nu, lam, active = (torch.stack(parts) for parts in zip(*solutions, strict=True))
    return ExactQP(z, nu, lam, active)


def _exact_one(one: Program, guess: Tensor, tol: float, index: int) -> tuple[Tensor, ...]:
    """One problem: verify the guess or find the active set without gradients, then solve once with them."""
    detached = Program(*(argument.detach() for argument in one))
    Q, p, A, b, G, h = detached
    residual = float("inf")
    for find in (lambda: guess, lambda: _active_set(detached)):
        active = find()
        z, nu, lam = _solve_active(detached, active)
        residual = float(kkt_certificate(Q, p, z, nu, lam, A=A, b=b, G=G, h=h))
        if residual <= tol:
            return *_solve_active(one, active), active
    raise ConvergenceError(
        f"exact_qp: problem {index} has no verified active set (KKT residual {residual:.1e}, tol {tol:.1e}); "
        "it is degenerate or infeasible, for which there is no exact gradient to compare with"
    )


def _active_set(one: Program) -> Tensor:  # (n_ineq,) bool
    """Lawson and Hanson's method for the dual: the most violated row enters, rows whose λ would turn negative leave."""
    n, n_eq = one.p.shape[0], one.b.shape[0]
    K = torch.cat(
        [torch.cat([0.5 * (one.Q + one.Q.mT), one.A.mT], dim=1), torch.cat([one.A, one.A.new_zeros(n_eq, n_eq)], dim=1)]
    )
    right = torch.cat([torch.cat([one.G.mT, -one.p[:, None]], dim=1), one.A.new_zeros(n_eq, one.h.shape[0] + 1)])
    right[n:, -1] = one.b
    solved = _solve(K, right)[:n]
    R, d = one.G @ solved[:, :-1], one.G @ solved[:, -1] - one.h
    lam, active = torch.zeros_like(d), torch.zeros_like(d, dtype=torch.bool)
    tiny = 1e-12 * (1.0 + float(_largest(d)))
    for _ in range(10 * d.shape[0]):
        violation = torch.where(active, -torch.inf, d - R @ lam)
        if float(violation.max()) <= tiny:
            break
        active[violation.argmax()] = True
        while bool(active.any()):
            trial = torch.zeros_like(lam)
            trial[active] = _solve(R[active][:, active], d[active])
            if not bool(torch.isfinite(trial).all()):
                return active  # dependent rows: the dual is unbounded, so the program is infeasible
            falling = active & (trial <= 0.0)
            if not bool(falling.any()):
                break
            ratio = torch.where(falling, lam / (lam - trial).clamp_min(1e-300), torch.inf)
            lam = lam + ratio.min() * (trial - lam)
            active = active & (ratio > ratio.min())
            lam = torch.where(active, lam, 0.0)
        lam = torch.where(active, trial, 0.0)
    return active


def _solve_active(one: Program, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The KKT system of one problem with the active rows as equalities."""
    n, n_eq = one.p.shape[0], one.b.shape[0]
    C = torch.cat([one.A, one.G[active]])
    K = torch.cat(
        [
            torch.cat([0.5 * (one.Q + one.Q.mT), C.mT], dim=1),
            torch.cat([C, C.new_zeros(C.shape[0], C.shape[0])], dim=1),
        ]
    )
    solution = _solve(K, torch.cat([-one.p, one.b, one.h[active]]))
    lam = torch.zeros_like(one.h).index_put((active.nonzero().squeeze(-1),), solution[n + n_eq :])
    return solution[:n], solution[n : n + n_eq], lam


def _solve(M: Tensor, right: Tensor) -> Tensor:
    """M⁻¹ right by LU; not a number where M is singular, which no verification lets through."""
    solution, status = torch.linalg.solve_ex(M, right)
    return torch.where(status == 0, solution, torch.nan)


def _matvec(M: Tensor, v: Tensor) -> Tensor:  # (*B, m, n), (*B, n) -> (*B, m)
    """M v."""
    return (M @ v.unsqueeze(-1)).squeeze(-1)


def _largest(v: Tensor) -> Tensor:  # (*B, m) -> (*B,)
    """The largest entry by size, 0 where there is none."""
    return v.abs().amax(-1) if v.shape[-1] else v.new_zeros(v.shape[:-1])
