r"""Outer objectives: what the whole model is trained on, given λ*, per datum.

Each is called as `outer(model, lam, x, eps)` with points ε (S, *B, D), and returns (*B,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentError
from implicit_layers.vae.families import DiagonalGaussian, log_prior
from implicit_layers.vae.model import LatentModel


@dataclass(frozen=True)
class ELBO:
    """−ELBO with weight β on the KL term.

    >>> ELBO(beta=0.5)
    ELBO(beta=0.5)
    """

    beta: float | Tensor = 1.0

    def __call__(self, model: LatentModel, lam: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """E_q[−log p(x | z)] + β KL."""
        return model.free_energy(lam, x, eps, self.beta)


@dataclass(frozen=True)
class IWAE:
    """The importance-weighted bound; k is the number of points it is given.

    >>> IWAE()
    IWAE()
    """

    def __call__(self, model: LatentModel, lam: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """−log (1/k) Σ_j p(x, z_j)/q(z_j)."""
        z = model.family.sample(lam, eps)
        weights = model.log_likelihood(z, x) + log_prior(z) - model.family.log_prob(lam, z)
        return math.log(eps.shape[0]) - weights.logsumexp(0)


@dataclass(frozen=True)
class FreeBits:
    """Each latent coordinate has κ nats of KL for free.

    >>> FreeBits(0.1)
    FreeBits(kappa=0.1)
    """

    kappa: float = 0.1

    def __post_init__(self) -> None:
        checks.positive("kappa", self.kappa)

    def __call__(self, model: LatentModel, lam: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """E_q[−log p(x | z)] + Σ max(κ, KLᵢ)."""
        if not isinstance(model.family, DiagonalGaussian):
            raise ArgumentError("free bits need a KL that splits into coordinates: a DiagonalGaussian")
        return model.free_energy(lam, x, eps, 0.0) + model.family.kl_units(lam).clamp_min(self.kappa).sum(-1)


@dataclass(frozen=True)
class HeldOut:
    """The entries of x that the inner problem does not see.

    Attributes:
        observed: weights of the entries, 1 where the inner problem sees them; like x, or broadcast.

    >>> import torch
    >>> HeldOut(torch.tensor([1.0, 0.0])).hidden
    tensor([0., 1.])
    """

    observed: Tensor

    @property
    def hidden(self) -> Tensor:
        """1 where they are held out."""
        return 1 - self.observed

    def __call__(self, model: LatentModel, lam: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """−E_q log p(x_hidden | z), at least −log E_q p(x_hidden | z), the predictive one."""
        return -model.log_likelihood(model.family.sample(lam, eps), x, self.hidden).mean(0)
