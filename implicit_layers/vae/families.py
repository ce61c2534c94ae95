r"""Gaussian families q_λ(z) on R^D, λ unconstrained, and what has a closed form for them; the prior is N(0, I).

| family | λ | z = m + L ε |
|---|---|---|
| `DiagonalGaussian` | (m, s), 2D numbers | L = diag(eˢ): s is the logarithm of the standard deviation |
| `FullGaussian` | (m, s, l), D(D+3)/2 numbers | L lower triangular, diagonal eˢ, below it l row by row |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.kkt.quadratic import matvec

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class GaussianFamily(ABC):
    """Base of the families: N(m, L Lᵀ) with L lower triangular.

    Attributes:
        dim: D, the size of z.
    """

    dim: int

    def __post_init__(self) -> None:
        checks.whole("dim", self.dim, least=1)

    @property
    @abstractmethod
    def size(self) -> int:
        """How many numbers λ has."""

    @abstractmethod
    def spread(self, lam: Tensor, eps: Tensor) -> Tensor:  # (*B, size), (S, *B, D) -> (S, *B, D)
        """L ε."""

    @abstractmethod
    def whiten(self, lam: Tensor, deviation: Tensor) -> Tensor:  # (*B, size), (S, *B, D) -> (S, *B, D)
        """L⁻¹ (z − m), for deviations z − m."""

    @abstractmethod
    def variances(self, lam: Tensor) -> Tensor:  # (*B, size) -> (*B, D)
        """The variance of each zᵢ."""

    @abstractmethod
    def covariance(self, lam: Tensor) -> Tensor:  # (*B, size) -> (*B, D, D)
        """L Lᵀ."""

    @abstractmethod
    def kl(self, lam: Tensor, lam0: Tensor) -> Tensor:  # (*B, size), (*B, size) -> (*B,)
        """KL(q_λ ‖ q_λ0)."""

    def check(self, name: str, lam: Tensor) -> None:
        """Refuse a λ whose last axis is not `size`."""
        checks.floating_tensors(**{name: lam})
        checks.trailing_shape(name, lam, (self.size,), f"for a {type(self).__name__} with dim={self.dim}")

    def mean(self, lam: Tensor) -> Tensor:  # (*B, size) -> (*B, D)
        """The mean, m."""
        return lam[..., : self.dim]

    def log_scale(self, lam: Tensor) -> Tensor:  # (*B, size) -> (*B, D)
        """s, the logarithm of L's diagonal."""
        return lam[..., self.dim : 2 * self.dim]

    def sample(self, lam: Tensor, eps: Tensor) -> Tensor:  # (*B, size), (S, *B, D) -> (S, *B, D)
        """The points m + L ε."""
        return self.mean(lam) + self.spread(lam, eps)

    def kl_prior(self, lam: Tensor) -> Tensor:  # (*B, size) -> (*B,)
        """KL(q_λ ‖ N(0, I)) = ½(tr L Lᵀ + mᵀm − D) − Σ s."""
        square = self.variances(lam) + self.mean(lam) ** 2
        return (0.5 * (square - 1) - self.log_scale(lam)).sum(-1)

    def entropy(self, lam: Tensor) -> Tensor:  # (*B, size) -> (*B,)
        """H(q_λ) = Σ s + ½ D log 2πe."""
        return self.log_scale(lam).sum(-1) + 0.5 * self.dim * (_LOG_2PI + 1)

    def log_prob(self, lam: Tensor, z: Tensor) -> Tensor:  # (*B, size), (S, *B, D) -> (S, *B)
        """The log-density log q_λ(z)."""
        white = self.whiten(lam, z - self.mean(lam))
        return -0.5 * (white**2).sum(-1) - self.log_scale(lam).sum(-1) - 0.5 * self.dim * _LOG_2PI


def log_prior(z: Tensor) -> Tensor:  # (*, D) -> (*,)
    """The log-density log N(z; 0, I)."""
    return -0.5 * (z**2).sum(-1) - 0.5 * z.shape[-1] * _LOG_2PI


class DiagonalGaussian(GaussianFamily):
    """N(m, diag(e²ˢ)), λ = (m, s).

    >>> DiagonalGaussian(2).kl_prior(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor(0.5000)
    """

    @property
    def size(self) -> int:
        """2D."""
        return 2 * self.dim

    def pack(self, m: Tensor, s: Tensor) -> Tensor:  # (*B, D), (*B, D) -> (*B, 2D)
        """λ."""
        return torch.cat([m, s], -1)

    def spread(self, lam: Tensor, eps: Tensor) -> Tensor:
        """eˢ ε."""
        return self.log_scale(lam).exp() * eps

    def whiten(self, lam: Tensor, deviation: Tensor) -> Tensor:
        """e⁻ˢ (z − m)."""
        return (-self.log_scale(lam)).exp() * deviation

    def variances(self, lam: Tensor) -> Tensor:
        """e²ˢ."""
        return (2 * self.log_scale(lam)).exp()

    def covariance(self, lam: Tensor) -> Tensor:
        """diag(e²ˢ)."""
        return torch.diag_embed(self.variances(lam))

    def kl_units(self, lam: Tensor) -> Tensor:  # (*B, 2D) -> (*B, D)
        """The summands of `kl_prior`, one a coordinate."""
        return 0.5 * (self.variances(lam) + self.mean(lam) ** 2 - 1) - self.log_scale(lam)

    def kl(self, lam: Tensor, lam0: Tensor) -> Tensor:
        """Σ [s₀ − s + (e²ˢ + (m − m₀)²)/(2 e²ˢ⁰) − ½]."""
        s, s0 = self.log_scale(lam), self.log_scale(lam0)
        distance = ((self.mean(lam) - self.mean(lam0)) * (-s0).exp()) ** 2
        return (s0 - s + 0.5 * ((2 * (s - s0)).exp() + distance - 1)).sum(-1)

    def fisher(self, lam: Tensor) -> Tensor:  # (*B, 2D) -> (*B, 2D)
        """The diagonal of the Fisher information of (m, s): (e⁻²ˢ, 2)."""
        return torch.cat([(-2 * self.log_scale(lam)).exp(), torch.full_like(self.log_scale(lam), 2.0)], -1)


class FullGaussian(GaussianFamily):
    """N(m, L Lᵀ), λ = (m, s, l).

    >>> FullGaussian(2).covariance(torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0]))
    tensor([[ 1.,  3.],
            [ 3., 10.]])
    """

    @property
    def size(self) -> int:
        """D(D+3)/2."""
        return self.dim * (self.dim + 3) // 2

    def pack(self, m: Tensor, L: Tensor) -> Tensor:  # (*B, D), (*B, D, D) -> (*B, size)
        """λ from a lower triangular L with a positive diagonal."""
        rows, columns = torch.tril_indices(self.dim, self.dim, -1, device=L.device)
        return torch.cat([m, L.diagonal(dim1=-2, dim2=-1).log(), L[..., rows, columns]], -1)

    def factor(self, lam: Tensor) -> Tensor:  # (*B, size) -> (*B, D, D)
        """L."""
        below, start = [], 2 * self.dim
        for i in range(self.dim):
            row = [lam[..., start : start + i], self.log_scale(lam)[..., i : i + 1].exp()]
            row.append(torch.zeros_like(lam[..., : self.dim - i - 1]))
            below.append(torch.cat(row, -1))
            start += i
        return torch.stack(below, -2)

    def spread(self, lam: Tensor, eps: Tensor) -> Tensor:
        """L ε."""
        return matvec(self.factor(lam), eps)

    def whiten(self, lam: Tensor, deviation: Tensor) -> Tensor:
        """L⁻¹ (z − m)."""
        L = self.factor(lam).expand(*deviation.shape, self.dim)
        return torch.linalg.solve_triangular(L, deviation.unsqueeze(-1), upper=False).squeeze(-1)

    def variances(self, lam: Tensor) -> Tensor:
        """Squared row lengths of L."""
        return (self.factor(lam) ** 2).sum(-1)

    def covariance(self, lam: Tensor) -> Tensor:
        """L Lᵀ."""
        L = self.factor(lam)
        return L @ L.mT

    def kl(self, lam: Tensor, lam0: Tensor) -> Tensor:
        """½(‖L₀⁻¹L‖² + ‖L₀⁻¹(m − m₀)‖² − D) + Σ (s₀ − s)."""
        columns = torch.cat([self.factor(lam), (self.mean(lam) - self.mean(lam0)).unsqueeze(-1)], -1)
        L0 = self.factor(lam0).expand(*columns.shape[:-1], self.dim)
        white = torch.linalg.solve_triangular(L0, columns, upper=False)
        squares = (white**2).sum((-2, -1)) - self.dim
        return 0.5 * squares + (self.log_scale(lam0) - self.log_scale(lam)).sum(-1)
