r"""The linear-Gaussian model, probabilistic PCA, in which everything about variational inference has a closed form.

    z ~ N(0, I_D),  x | z ~ N(W z + b, γ I_n);   r = x − b,  Λ = I + WᵀW/γ,  C = W Wᵀ + γ I.

Source: Tipping & Bishop (1999); Lucas et al. (2019), arXiv:1911.02469, for the linear VAE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks

_NEWTON_STEPS = 100


class Moments(NamedTuple):
    """A Gaussian: mean (*B, D), covariance (D, D)."""

    mean: Tensor
    covariance: Tensor


class Optimum(NamedTuple):
    """What maximum likelihood learns for a fixed γ."""

    W: Tensor  # (n, D)
    b: Tensor  # (n,)
    active: int  # columns of W that are not zero
    log_likelihood: Tensor  # mean over the data


@dataclass(frozen=True)
class PPCA:
    """The model.

    Attributes:
        W:     (n, D).
        b:     (n,).
        gamma: γ, a variance; a tensor without dimensions.

    >>> oracle = PPCA(torch.tensor([[1.0]]), torch.zeros(1), torch.tensor(1.0))
    >>> oracle.posterior(torch.tensor([[2.0]])).mean
    tensor([[1.]])
    """

    W: Tensor
    b: Tensor
    gamma: Tensor

    def __post_init__(self) -> None:
        checks.floating_tensors(W=self.W, b=self.b, gamma=self.gamma)
        checks.trailing_shape("b", self.b, (self.W.shape[0],), "for W (n, D)")

    @property
    def precision(self) -> Tensor:  # (D, D)
        """Λ, the posterior precision."""
        return torch.eye(self.W.shape[1], dtype=self.W.dtype, device=self.W.device) + self.W.mT @ self.W / self.gamma

    def _solve(self, matrix: Tensor, v: Tensor) -> Tensor:  # (D, D), (*B, D) -> (*B, D)
        """matrix⁻¹ v for a positive definite matrix."""
        L = torch.linalg.cholesky(matrix)
        return torch.cholesky_solve(v.reshape(-1, v.shape[-1]).mT, L).mT.reshape(v.shape)

    def evidence_slope(self, x: Tensor) -> Tensor:  # (*B, n) -> (*B, D)
        """Wᵀ r/γ, minus the gradient of the negative log-likelihood in z at z = 0."""
        return (x - self.b) @ self.W / self.gamma

    def posterior(self, x: Tensor) -> Moments:
        """p(z | x) = N(Λ⁻¹ Wᵀr/γ, Λ⁻¹)."""
        L = torch.linalg.cholesky(self.precision)
        return Moments(self._solve(self.precision, self.evidence_slope(x)), torch.cholesky_inverse(L))

    def log_evidence(self, x: Tensor) -> Tensor:  # (*B, n) -> (*B,)
        """The evidence log p(x) = log N(x; b, C)."""
        n, D = self.W.shape
        r, M = x - self.b, self.gamma * self.precision
        projected = r @ self.W
        square = (r**2).sum(-1) - (projected * self._solve(M, projected)).sum(-1)
        log_det = (n - D) * self.gamma.log() + torch.logdet(M)
        return -0.5 * (n * math.log(2 * math.pi) + log_det + square / self.gamma)

    def elbo(self, x: Tensor, mean: Tensor, covariance: Tensor, beta: float | Tensor = 1.0) -> Tensor:  # -> (*B,)
        """The ELBO of q = N(mean, covariance), exactly."""
        n, D = self.W.shape
        error = ((x - self.b - mean @ self.W.mT) ** 2).sum(-1)
        spread = (self.W.mT @ self.W * covariance).sum((-2, -1))
        fit = -0.5 * n * (2 * math.pi * self.gamma).log() - 0.5 * (error + spread) / self.gamma
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        log_det = 2 * torch.linalg.cholesky(covariance).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return fit - 0.5 * beta * (trace + (mean**2).sum(-1) - D - log_det)

    def diagonal_optimum(self, x: Tensor, beta: float | Tensor = 1.0) -> Tensor:  # (*B, n) -> (*B, 2D)
        """λ = (m, s) of the best diagonal q: m = (WᵀW/γ + βI)⁻¹ Wᵀr/γ, σᵢ² = β/(β + |Wᵢ|²/γ)."""
        eye = torch.eye(self.W.shape[1], dtype=self.W.dtype, device=self.W.device)
        m = self._solve(self.precision + (beta - 1) * eye, self.evidence_slope(x))
        variances = beta / (self.precision.diagonal() + (beta - 1))
        return torch.cat([m, (0.5 * variances.log()).expand_as(m)], -1)

    def diagonal_gap(self) -> Tensor:
        """The gap log p(x) − max ELBO over diagonal q: ½(Σ log Λᵢᵢ − log|Λ|) for every x."""
        return 0.5 * (self.precision.diagonal().log().sum() - torch.logdet(self.precision))

    def anchored_l2(self, x: Tensor, lam0: Tensor, rho: float | Tensor) -> Tensor:  # (*B, n), (*B, 2D) -> (*B, 2D)
        """λ* of the l2 anchor: m* = (Λ + ρI)⁻¹(Wᵀr/γ + ρm₀), s* the root of e²ˢ Λᵢᵢ − 1 + ρ(s − s₀)."""
        D = self.W.shape[1]
        eye = torch.eye(D, dtype=self.W.dtype, device=self.W.device)
        m0, s0 = lam0[..., :D], lam0[..., D:]
        m = self._solve(self.precision + rho * eye, self.evidence_slope(x) + rho * m0)
        curvature = self.precision.diagonal()
        s = torch.maximum(s0, -0.5 * curvature.log())  # from the right Newton's steps on a convex function are monotone
        for _ in range(_NEWTON_STEPS):
            grown = (2 * s).exp() * curvature
            s = s - (grown - 1 + rho * (s - s0)) / (2 * grown + rho)
        return torch.cat([m, s], -1)

    def anchored_kl(self, x: Tensor, lam0: Tensor, rho: float | Tensor) -> Tensor:  # (*B, n), (*B, 2D) -> (*B, 2D)
        """λ* of the KL anchor for diagonal q, P₀ = diag(e⁻²ˢ⁰): m* = (Λ + ρP₀)⁻¹(Wᵀr/γ + ρP₀m₀)."""
        D = self.W.shape[1]
        m0, s0 = lam0[..., :D], lam0[..., D:]
        P0 = (-2 * s0).exp()
        matrix = self.precision + rho * torch.diag_embed(P0)
        rhs = self.evidence_slope(x) + rho * P0 * m0
        m = torch.cholesky_solve(rhs.unsqueeze(-1), torch.linalg.cholesky(matrix)).squeeze(-1)
        variances = (1 + rho) / (self.precision.diagonal() + rho * P0)
        return torch.cat([m, 0.5 * variances.log()], -1)

    def anchored_kl_full(
        self, x: Tensor, mean0: Tensor, precision0: Tensor, rho: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and precision of the KL anchor for full covariances: P* = (Λ + ρP₀)/(1 + ρ)."""
        total = self.precision + rho * precision0
        rhs = self.evidence_slope(x).unsqueeze(-1) + rho * precision0 @ mean0.unsqueeze(-1)
        return torch.cholesky_solve(rhs, torch.linalg.cholesky(total)).squeeze(-1), total / (1 + rho)

    def predictive(self, x: Tensor, observed: Tensor) -> Moments:  # (*B, n), (n,) bool -> (*B, n_u), (n_u, n_u)
        """p(x_u | x_o), u the entries that are not observed."""
        seen = PPCA(self.W[observed], self.b[observed], self.gamma).posterior(x[..., observed])
        W, b = self.W[~observed], self.b[~observed]
        eye = torch.eye(W.shape[0], dtype=W.dtype, device=W.device)
        return Moments(seen.mean @ W.mT + b, W @ seen.covariance @ W.mT + self.gamma * eye)

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, n) -> (n, D), (n,), ()
        """The gradient of Σ log p(x) in W, b and γ."""
        C = self.W @ self.W.mT + self.gamma * torch.eye(self.W.shape[0], dtype=self.W.dtype, device=self.W.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(C))
        white = (x - self.b) @ inverse
        along_W = white.mT @ (white @ self.W) - x.shape[0] * inverse @ self.W
        along_gamma = 0.5 * ((white**2).sum() - x.shape[0] * inverse.diagonal().sum())
        return along_W, white.sum(0), along_gamma


def learned(x: Tensor, dim: int, gamma: float | Tensor) -> Optimum:
    """Maximum likelihood of W and b for a fixed γ: eigenvectors of the sample covariance, eigenvalues ℓ above γ.

    Args:
        x: the data, (N, n). dim: D. gamma: γ.
    Returns:  W = U diag(√max(ℓ − γ, 0)), the mean of the data, the number of active units #{i ≤ D: ℓᵢ > γ}, and
        −½[n log 2π + Σ_active log ℓᵢ + (n − k) log γ + k + Σ_others ℓᵢ/γ].

    >>> learned(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), 1, 1.0).active
    1
    """
    gamma = torch.as_tensor(gamma, dtype=x.dtype, device=x.device)
    b = x.mean(0)
    values, vectors = torch.linalg.eigh((x - b).mT @ (x - b) / x.shape[0])
    values, vectors = values.flip(0), vectors.flip(1)
    n, k = x.shape[1], int((values[:dim] > gamma).sum())
    W = vectors[:, :dim] * (values[:dim] - gamma).clamp_min(0).sqrt()
    log_det = values[:k].log().sum() + (n - k) * gamma.log()
    value = -0.5 * (n * math.log(2 * math.pi) + log_det + k + values[k:].sum() / gamma)
    return Optimum(W, b, k, value)


def best_gamma(x: Tensor, dim: int) -> Tensor:
    """The γ of maximum likelihood: the mean of the n − D smallest eigenvalues of the sample covariance.

    >>> best_gamma(torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]), 1)
    tensor(1.)
    """
    centred = x - x.mean(0)
    return torch.linalg.eigvalsh(centred.mT @ centred / x.shape[0])[: x.shape[1] - dim].mean()
