"""Quadratic programs by name. Each generator states its formula and its source, and depends on its seed alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class QP(NamedTuple):
    """min ½ zᵀQz + pᵀz subject to Az = b, Gz ≤ h, one batch dimension, float64; missing constraints have zero rows.

    `c` is the cotangent: the loss of every benchmark is Σ cᵢ zᵢ.
    """

    Q: Tensor  # (B, n, n)
    p: Tensor  # (B, n)
    A: Tensor  # (B, n_eq, n)
    b: Tensor  # (B, n_eq)
    G: Tensor  # (B, n_ineq, n)
    h: Tensor  # (B, n_ineq)
    c: Tensor  # (B, n)


class BoxedQP(NamedTuple):
    """A `QP` with lb ≤ z ≤ ub beside."""

    Q: Tensor  # (B, n, n)
    p: Tensor  # (B, n)
    A: Tensor  # (B, n_eq, n)
    b: Tensor  # (B, n_eq)
    G: Tensor  # (B, n_ineq, n)
    h: Tensor  # (B, n_ineq)
    lb: Tensor  # (B, n)
    ub: Tensor  # (B, n)
    c: Tensor  # (B, n)


class Draw:
    """Random tensors in float64 with a leading batch dimension, from one seed."""

    def __init__(self, batch: int, seed: int) -> None:
        self.batch, self.generator = batch, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.batch, *shape, generator=self.generator, dtype=torch.float64)


def matvec(M: Tensor, v: Tensor) -> Tensor:  # (B, m, n), (B, n) -> (B, m)
    return (M @ v.unsqueeze(-1)).squeeze(-1)


def dense(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> QP:
    """Well conditioned and feasible, about a third of the inequalities active.

    L, G√n, A√n, q = N; Q = L Lᵀ/n + 0.1 I; z₀ = N/√n; h = G z₀ + U; b = A z₀; p = q. Loss weights c = N.
    The family of this project's own design study; the seed is mixed with the sizes so that no two sizes share numbers.
    """
    draw = Draw(batch, 1_000_003 * seed + 10_007 * n + 101 * n_ineq + n_eq)
    L = draw.normal(n, n)
    Q = L @ L.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)
    p = draw.normal(n)
    G, z0 = draw.normal(n_ineq, n) / n**0.5, draw.normal(n) / n**0.5
    h = matvec(G, z0) + draw.uniform(n_ineq)
    A = draw.normal(n_eq, n) / n**0.5
    return QP(Q, p, A, matvec(A, z0), G, h, draw.normal(n))


def boxed(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> BoxedQP:
    """`dense` between bounds that hold 40 % of the unknowns or more.

    z₀ = N/√n; lb = z₀ − U; ub = z₀ + U; h = G z₀ + U; b = A z₀.
    """
    problem, draw = dense(n, n_ineq, n_eq, batch, seed), Draw(batch, seed + 7)
    z0 = draw.normal(n) / n**0.5
    h, b = matvec(problem.G, z0) + draw.uniform(n_ineq), matvec(problem.A, z0)
    return BoxedQP(*problem._replace(b=b, h=h)[:6], z0 - draw.uniform(n), z0 + draw.uniform(n), problem.c)


def qpth_linear(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> QP:
    """Badly conditioned Q: L = U(n, n), Q = L Lᵀ + 10⁻³ I; G, z₀, p = N; h = G z₀ + U; no equalities; c = 1.

    qpth, prof-linear.py and prof-gurobi.py (Amos & Kolter 2017); `n_eq` must be 0.
    """
    if n_eq:
        raise ValueError(f"this family has no equalities, got n_eq = {n_eq}")
    draw = Draw(batch, seed)
    L = draw.uniform(n, n)
    Q = L @ L.mT + 1e-3 * torch.eye(n, dtype=torch.float64)
    G, z0, slack, p = draw.normal(n_ineq, n), draw.normal(n), draw.uniform(n_ineq), draw.normal(n)
    A = draw.normal(0, n)
    return QP(Q, p, A, A.new_zeros(batch, 0), G, matvec(G, z0) + slack, torch.ones_like(p))


def qpth_test(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 1) -> QP:
    """L = N(n, n), Q = L Lᵀ + 10⁻⁴ I; G, A, z₀, p = N; h = G z₀ + U; b = A z₀; loss weights c = N.

    qpth, test.py, where n = 10 and Q = L Lᵀ; the multiple of I keeps every draw numerically positive definite.
    """
    draw = Draw(batch, seed)
    L = draw.normal(n, n)
    G, A, z0, p = draw.normal(n_ineq, n), draw.normal(n_eq, n), draw.normal(n), draw.normal(n)
    Q = L @ L.mT + 1e-4 * torch.eye(n, dtype=torch.float64)
    return QP(Q, p, A, matvec(A, z0), G, matvec(G, z0) + draw.uniform(n_ineq), draw.normal(n))


def known_solution(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> QP:
    """Drawn backwards from its solution: z, R, G, A, ν = N; of λ, s = |N| one of each pair is zeroed by a fair coin.

    Q = RᵀR, h = Gz + s, b = Az, p = −Qz − Gᵀλ − Aᵀν; c = N. qpax, misc_test_utils.py. Coins that would make more rows
    active than there are unknowns left, so that the duals were not unique, are turned: then s keeps its value.
    """
    draw = Draw(batch, seed)
    z, R, G, A, nu = draw.normal(n), draw.normal(n, n), draw.normal(n_ineq, n), draw.normal(n_eq, n), draw.normal(n_eq)
    Q = R.mT @ R
    sizes, coin = draw.normal(2, n_ineq).abs(), draw.uniform(n_ineq) < 0.5
    coin &= coin.cumsum(-1) <= n - n_eq
    lam, s = sizes[:, 0] * coin, sizes[:, 1] * ~coin
    p = -(matvec(Q, z) + matvec(G.mT, lam) + matvec(A.mT, nu))
    return QP(Q, p, A, matvec(A, z), G, matvec(G, z) + s, draw.normal(n))


def optnet(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> QP:
    """One Q, G, A for the whole batch: L = tril(U) + I, Q = L Lᵀ + 10⁻³ I; G, A, z₀ = N; h = G z₀ + 1; b = A z₀; p = N.

    OptNet, profile/optnet-forward.py, n in {10, 100, 200}; c = 1.
    """
    one, draw = Draw(1, seed), Draw(batch, seed + 1)
    L = one.uniform(n, n).tril() + torch.eye(n, dtype=torch.float64)
    Q = L @ L.mT + 1e-3 * torch.eye(n, dtype=torch.float64)
    G, A, z0 = one.normal(n_ineq, n), one.normal(n_eq, n), one.normal(n)
    p = draw.normal(n)
    shared = (t.repeat(batch, *[1] * (t.ndim - 1)) for t in (Q, A, matvec(A, z0), G, matvec(G, z0) + 1.0))
    Q, A, b, G, h = shared
    return QP(Q, p, A, b, G, h, torch.ones_like(p))


def scqpth(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> QP:
    """Two-sided rows l ≤ Az ≤ u as G = [A; −A]: M = N∘coin(0.5), Q = MᵀM + 0.01 I; p = N; A = N∘coin(0.15); l, u = ∓U.

    SCQPTH, utils.py, with n or 2n rows of A; `n_ineq` is twice their number, an empty row gets one entry; c = N.
    """
    if n_eq or n_ineq % 2:
        raise ValueError(f"this family has no equalities and rows in pairs, got n_eq = {n_eq}, n_ineq = {n_ineq}")
    draw, m = Draw(batch, seed), n_ineq // 2
    M = draw.normal(n, n) * (draw.uniform(n, n) < 0.5)
    rows = draw.normal(m, n) * (draw.uniform(m, n) < 0.15)
    empty = (rows == 0).all(-1)
    rows[..., 0] = torch.where(empty, 1.0, rows[..., 0])
    Q = M.mT @ M + 0.01 * torch.eye(n, dtype=torch.float64)
    h = draw.uniform(n_ineq)
    A = draw.normal(0, n)
    return QP(Q, draw.normal(n), A, A.new_zeros(batch, 0), torch.cat([rows, -rows], -2), h, draw.normal(n))


def alt_diff(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 100) -> QP:
    """Q = RᵀR + 10⁻⁶ I, R = N(n, n); p, A, b, G, h = N: feasible since n_ineq + n_eq < n; c = 1.

    Alt-Diff, data_generation.py, without the multiple of I.
    """
    if n_ineq + n_eq >= n:
        raise ValueError(f"this family is feasible for n_ineq + n_eq < n, got {n_ineq} + {n_eq} and n = {n}")
    draw = Draw(batch, seed)
    R = draw.normal(n, n)
    p, A, b, G, h = draw.normal(n), draw.normal(n_eq, n), draw.normal(n_eq), draw.normal(n_ineq, n), draw.normal(n_ineq)
    return QP(R.mT @ R + 1e-6 * torch.eye(n, dtype=torch.float64), p, A, b, G, h, torch.ones_like(p))


def bpqp(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> QP:
    """Q = UᵀU + 10⁻³ I; p, A, G = U; one z₀ = U with h = G z₀ (no slack) and b = A z₀; c = 1.

    BPQP's notebook, (n, n_eq = n_ineq) = (10, 5), (50, 10), (100, 20), (500, 100), but for b, which is U there, so that
    the equalities may contradict the rest.
    """
    draw = Draw(batch, seed)
    U, p, A, G, z0 = (
        draw.uniform(n, n),
        draw.uniform(n),
        draw.uniform(n_eq, n),
        draw.uniform(n_ineq, n),
        draw.uniform(n),
    )
    Q = U.mT @ U + 1e-3 * torch.eye(n, dtype=torch.float64)
    return QP(Q, p, A, matvec(A, z0), G, matvec(G, z0), torch.ones_like(p))


def dqp(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> QP:
    """P = U(n, n), Q = P Pᵀ + 10⁻⁴ I; p, G, A = U; h = G 1 + 1; b = A 1; c = 1.

    dQP, exp_utils.py, with n_ineq = n and n_eq = ⌈n/2⌉.
    """
    draw = Draw(batch, seed)
    P = draw.uniform(n, n)
    Q = P @ P.mT + 1e-4 * torch.eye(n, dtype=torch.float64)
    p, G, A = draw.uniform(n), draw.uniform(n_ineq, n), draw.uniform(n_eq, n)
    return QP(Q, p, A, A.sum(-1), G, G.sum(-1) + 1.0, torch.ones_like(p))


def simplex_projection(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> QP:
    """Q = I, p = N, z ≥ 0, Σz = 1: n_ineq = n and n_eq = 1. dQP's simplex family, n up to 10⁵; c = N."""
    if (n_ineq, n_eq) != (n, 1):
        raise ValueError(f"this family has n_ineq = n and n_eq = 1, got {n_ineq} and {n_eq}")
    draw = Draw(batch, seed)
    eye = torch.eye(n, dtype=torch.float64).repeat(batch, 1, 1)
    A = eye.new_ones(batch, 1, n)
    return QP(eye, draw.normal(n), A, A[..., 0], -eye, eye.new_zeros(batch, n), draw.normal(n))


def proxqp(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> QP:
    """Sparse H = N∘coin(0.15), symmetric, + (10⁻² + |λ_min|) I; A, G = N∘coin(0.15); z, p = N, h = Gz + U, b = Az.

    ProxQP, random_qp_problems.hpp, the strongly convex family; A has I added so that its rows are independent; c = N.
    """
    draw = Draw(batch, seed)
    H = draw.normal(n, n) * (draw.uniform(n, n) < 0.075)
    H = H + H.mT
    eye = torch.eye(n, dtype=torch.float64)
    Q = H + (1e-2 + torch.linalg.eigvalsh(H)[:, :1, None].abs()) * eye
    A = draw.normal(n_eq, n) * (draw.uniform(n_eq, n) < 0.15) + torch.eye(n_eq, n, dtype=torch.float64)
    G = draw.normal(n_ineq, n) * (draw.uniform(n_ineq, n) < 0.15)
    z = draw.normal(n)
    return QP(Q, draw.normal(n), A, matvec(A, z), G, matvec(G, z) + draw.uniform(n_ineq), draw.normal(n))


def qpax_benchmark(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> QP:
    """Q = I, p = −N, G = U[−4, 4], h = G ½ + U[½, 1½]; c = N. qpax, benchmarks, where n = 32 and n_ineq = 64."""
    if n_eq:
        raise ValueError(f"this family has no equalities, got n_eq = {n_eq}")
    draw = Draw(batch, seed)
    p, G, s0 = -draw.normal(n), 8.0 * draw.uniform(n_ineq, n) - 4.0, 0.5 + draw.uniform(n_ineq)
    A = draw.normal(0, n)
    eye = torch.eye(n, dtype=torch.float64).repeat(batch, 1, 1)
    return QP(eye, p, A, A.new_zeros(batch, 0), G, 0.5 * G.sum(-1) + s0, draw.normal(n))


def cone_program(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> QP:
    """Q = MᵀM/n + 10⁻² I and A, G of density 0.3; p = U[−1, 1]; right sides inside; c = N. After moreau.testing."""
    draw = Draw(batch, seed)
    M = draw.normal(n, n) * (draw.uniform(n, n) < 0.3)
    Q = M.mT @ M / n + 1e-2 * torch.eye(n, dtype=torch.float64)
    p = 2.0 * draw.uniform(n) - 1.0
    A = draw.normal(n_eq, n) * (draw.uniform(n_eq, n) < 0.3) + torch.eye(n_eq, n, dtype=torch.float64)
    G = draw.normal(n_ineq, n) * (draw.uniform(n_ineq, n) < 0.3)
    z = draw.normal(n)
    return QP(Q, p, A, matvec(A, z), G, matvec(G, z) + 0.1 + draw.uniform(n_ineq), draw.normal(n))


def other_draws(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> QP:
    """The family `dense` from another seed, so that nothing is tuned to one draw."""
    return dense(n, n_ineq, n_eq, batch, seed + 77_000)


def ill_conditioned(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> QP:
    """`dense` with the eigenvalues of Q spread over 10⁶ and rows in units from 10⁻³ to 10³.

    Q = V diag(10^−6k/(n−1)) Vᵀ, V orthogonal; rows of G, h, A, b times 10^U[−3, 3].
    """
    problem, draw = dense(n, n_ineq, n_eq, batch, seed), Draw(batch, seed + 1)
    V = torch.linalg.qr(draw.normal(n, n))[0]
    Q = V * torch.logspace(0, -6, n, dtype=torch.float64) @ V.mT
    units = 10.0 ** (6 * draw.uniform(n_ineq + n_eq) - 3)
    inequality, equality = units[:, :n_ineq], units[:, n_ineq:]
    return problem._replace(
        Q=0.5 * (Q + Q.mT),
        A=equality.unsqueeze(-1) * problem.A,
        b=equality * problem.b,
        G=inequality.unsqueeze(-1) * problem.G,
        h=inequality * problem.h,
    )


PROBLEMS = {
    "dense": dense,
    "other draws": other_draws,
    "ill-conditioned": ill_conditioned,
    "qpth linear": qpth_linear,
    "qpth test": qpth_test,
    "known solution": known_solution,
    "OptNet": optnet,
    "SCQPTH": scqpth,
    "Alt-Diff": alt_diff,
    "BPQP": bpqp,
    "dQP": dqp,
    "simplex projection": simplex_projection,
    "ProxQP": proxqp,
    "qpax": qpax_benchmark,
    "cone program": cone_program,
}
