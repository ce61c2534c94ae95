"""Problems by name. Each generator states its formula and where it comes from, and depends on its seed alone."""

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


PROBLEMS = {
    "dense": dense,
    "qpth linear": qpth_linear,
    "qpth test": qpth_test,
    "known solution": known_solution,
}


class Ridge(NamedTuple):
    """min_z ½ zᵀHz − yᵀz with H = Xᵀ diag(w) X + α I, one problem; differentiated for the weights w and for α."""

    X: Tensor  # (m, n)
    y: Tensor  # (n,)
    w: Tensor  # (m,)
    alpha: Tensor  # ()
    z: Tensor  # (n,), the solution
    c: Tensor  # (n,), loss weights


def ridge(n: int, condition: float, seed: int = 0) -> Ridge:
    """Weighted ridge regression whose Hessian has eigenvalues from 1/condition to 1, so gradient descent is slow.

    X = diag(√σ) Vᵀ with V orthogonal and σ spread geometrically, w = 1, α = 1/condition; y, c = N.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    V = torch.linalg.qr(normal(n, n))[0]
    alpha = torch.tensor(1.0 / condition, dtype=torch.float64)
    sigma = torch.logspace(0.0, -8.0, n, dtype=torch.float64)
    X = (sigma * (1.0 - alpha)).sqrt()[:, None] * V.mT
    y, c = normal(n), normal(n)
    z = V @ ((V.mT @ y) / (sigma * (1.0 - alpha) + alpha))
    return Ridge(X, y, torch.ones(n, dtype=torch.float64), alpha, z, c)
