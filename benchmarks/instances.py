"""Problems that are no quadratic programs, for the suites of every room: simplex, transport, bilevel, VAE and others.

Each is one named tuple of float64 tensors; the last field `c` holds the weights of the loss Σ c z. Formulas and sources
stand with the generators, which depend on their seed alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.problems import Draw


class Scores(NamedTuple):
    """max ⟨x, y⟩ − τ Ω(y) over the simplex: softmax, sparsemax, entmax and their kin."""

    x: Tensor  # (B, n)
    c: Tensor  # (B, n)


def scores(n: int, batch: int, seed: int = 0) -> Scores:
    """x = 2 N, so that sparsemax keeps a few; c = N. Attention-like sizes, as in entmax's own comparison."""
    draw = Draw(batch, seed)
    return Scores(2.0 * draw.normal(n), draw.normal(n))


class Transport(NamedTuple):
    """min ⟨C, P⟩ − τ H(P) with marginals a and b."""

    C: Tensor  # (B, n, m)
    a: Tensor  # (B, n)
    b: Tensor  # (B, m)
    c: Tensor  # (B, n, m)


def transport(n: int, m: int, batch: int, seed: int = 0) -> Transport:
    """Squared distances of points drawn from N(0, I₂) and N(1, I₂), over their mean; uniform marginals; c = N.

    The example of the POT documentation.
    """
    draw = Draw(batch, seed)
    source, target = draw.normal(n, 2), draw.normal(m, 2) + 1.0
    C = (source[:, :, None] - target[:, None]).square().sum(-1)
    C = C / C.mean((-2, -1), keepdim=True)
    a, b = C.new_full((batch, n), 1.0 / n), C.new_full((batch, m), 1.0 / m)
    return Transport(C, a, b, draw.normal(n, m))


class EntropicLP(NamedTuple):
    """min ⟨q, z⟩ − τ H(z) over {z ≥ 0, Az = b, Gz ≤ h}."""

    q: Tensor  # (B, n)
    A: Tensor  # (B, n_eq, n)
    b: Tensor  # (B, n_eq)
    G: Tensor  # (B, n_ineq, n)
    h: Tensor  # (B, n_ineq)
    c: Tensor  # (B, n)


def entropic_lp(n: int, n_ineq: int, n_eq: int, batch: int, seed: int = 0) -> EntropicLP:
    """z₀ = U inside; A, G = U, b = A z₀, h = G z₀ + s₀; q = −Gᵀλ₀ with s₀ = max(N, 0), λ₀ = max(−N, 0) of the same N.

    BPQP's linear programs, where the regulariser is quadratic; c = 1.
    """
    draw = Draw(batch, seed)
    pair, z0 = draw.normal(n_ineq), draw.uniform(n)
    A, G = draw.uniform(n_eq, n), draw.uniform(n_ineq, n)
    q = -(G.mT @ pair.neg().clamp_min(0.0).unsqueeze(-1)).squeeze(-1)
    b, h = (A @ z0.unsqueeze(-1)).squeeze(-1), (G @ z0.unsqueeze(-1)).squeeze(-1) + pair.clamp_min(0.0)
    return EntropicLP(q, A, b, G, h, torch.ones_like(q))


class Lasso(NamedTuple):
    """min ½‖Xz − y‖²/m + exp(θ) ‖z‖₁, differentiated for θ."""

    X: Tensor  # (B, m, n)
    y: Tensor  # (B, m)
    theta: Tensor  # (B,)
    c: Tensor  # (B, n)


def lasso(m: int, n: int, batch: int, seed: int = 0, active: int = 5) -> Lasso:
    """X = N, `active` coefficients ±1, y = Xz + 0.1 N; exp(θ) a tenth of the least that makes z zero (sparse-ho)."""
    draw = Draw(batch, seed)
    X, truth = draw.normal(m, n), torch.zeros(batch, n, dtype=torch.float64)
    truth[:, :active] = draw.normal(active).sign()
    y = (X @ truth.unsqueeze(-1)).squeeze(-1) + 0.1 * draw.normal(m)
    largest = (X.mT @ y.unsqueeze(-1)).squeeze(-1).abs().amax(-1) / m
    return Lasso(X, y, (0.1 * largest).log(), draw.normal(n))


class Equilibrium(NamedTuple):
    """z = tanh(Wz + x): the smallest deep-equilibrium model."""

    W: Tensor  # (n, n)
    x: Tensor  # (B, n)
    c: Tensor  # (B, n)


def equilibrium(n: int, batch: int, seed: int = 0, norm: float = 0.9) -> Equilibrium:
    """W = N scaled to the spectral norm `norm`, so that the map contracts; x, c = N."""
    draw = Draw(batch, seed)
    W = Draw(1, seed + 1).normal(n, n)[0]
    return Equilibrium(W * (norm / torch.linalg.matrix_norm(W, 2)), draw.normal(n), draw.normal(n))


class LinearVAE(NamedTuple):
    """Probabilistic PCA: x = Wu + m + σ ε; its posterior, ELBO and evidence are known in closed form."""

    x: Tensor  # (B, d), data
    W: Tensor  # (d, k)
    mean: Tensor  # (d,)
    log_sigma: Tensor  # ()
    start: Tensor  # (B, k), what an encoder would say
    c: Tensor  # (B, k)


def linear_vae(d: int, k: int, batch: int, seed: int = 0, sigma: float = 0.5) -> LinearVAE:
    """W, m, u, ε = N (W over √k); the start is the posterior mean + 0.3 N, as of an imperfect encoder; c = N."""
    draw, one = Draw(batch, seed), Draw(1, seed + 1)
    W, mean = one.normal(d, k)[0] / k**0.5, one.normal(d)[0]
    x = draw.normal(k) @ W.mT + mean + sigma * draw.normal(d)
    M = W.mT @ W + sigma**2 * torch.eye(k, dtype=torch.float64)
    posterior = torch.cholesky_solve(W.mT @ (x - mean).mT, torch.linalg.cholesky(M)).mT
    log_sigma = torch.tensor(sigma, dtype=torch.float64).log()
    return LinearVAE(x, W, mean, log_sigma, posterior + 0.3 * draw.normal(k), draw.normal(k))


class Ridge(NamedTuple):
    """min_z ½ zᵀHz − yᵀz for every row y, with one H = Xᵀ diag(w) X + α I; w and α get the gradient."""

    w: Tensor  # (m,)
    alpha: Tensor  # ()
    X: Tensor  # (m, n)
    y: Tensor  # (B, n)
    c: Tensor  # (B, n)


def ridge(n: int, batch: int, condition: float, seed: int = 0) -> Ridge:
    """Weighted ridge regression whose Hessian has eigenvalues from 1/condition to 1, so gradient descent is slow.

    X = diag(√σ) Vᵀ with V orthogonal and σ spread geometrically, w = 1, α = 1/condition; y, c = N.
    """
    draw = Draw(batch, seed)
    V = torch.linalg.qr(Draw(1, seed + 1).normal(n, n)[0])[0]
    alpha = torch.tensor(1.0 / condition, dtype=torch.float64)
    sigma = torch.logspace(0.0, -8.0, n, dtype=torch.float64)
    X = (sigma * (1.0 - alpha)).sqrt()[:, None] * V.mT
    return Ridge(torch.ones(n, dtype=torch.float64), alpha, X, draw.normal(n), draw.normal(n))
