"""What the tests of the semi-amortised VAE share: small models in float64, linear ones with their closed forms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from implicit_layers.vae import DiagonalGaussian, FullGaussian, Gaussian, LatentModel, Noise
from implicit_layers.vae.ppca import PPCA


@dataclass
class Case:
    """A batch, a first guess and the frozen points."""

    model: LatentModel
    x: Tensor
    lam0: Tensor
    eps: Tensor


def linear_case(D: int = 3, n: int = 6, B: int = 5, full: bool = False, gamma: float = 0.4) -> tuple[Case, PPCA]:
    """A linear decoder with cubature, for which every expectation is exact, and its closed forms."""
    decoder = nn.Linear(D, n).double()
    likelihood = Gaussian(gamma, learn=True).double()
    family = FullGaussian(D) if full else DiagonalGaussian(D)
    model = LatentModel(decoder, D, likelihood, family)
    oracle = PPCA(decoder.weight.detach(), decoder.bias.detach(), likelihood.gamma.detach())
    x = 2 * torch.randn(B, n, dtype=torch.float64)
    lam0 = 0.5 * torch.randn(B, family.size, dtype=torch.float64)
    return Case(model, x, lam0, Noise("cubature").draw(D, (B,), dtype=torch.float64)), oracle


def curved_case(D: int = 2, n: int = 5, B: int = 3, likelihood: nn.Module | None = None) -> Case:
    """A decoder with one hidden layer of tanh."""
    decoder = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, n)).double()
    likelihood = Gaussian(0.5, learn=True) if likelihood is None else likelihood
    model = LatentModel(decoder, D, likelihood.double())
    x = torch.rand(B, n, dtype=torch.float64)
    lam0 = 0.3 * torch.randn(B, 2 * D, dtype=torch.float64)
    eps = Noise("whitened", 2 * D + 2).draw(D, (B,), dtype=torch.float64)
    return Case(model, x, lam0, eps)


def close(ours: Tensor, exact: Tensor, tol: float = 1e-9) -> bool:
    """Whether the relative difference, all entries together, is at most `tol`."""
    assert ours.shape == exact.shape
    return float((ours - exact).detach().norm()) <= tol * max(float(exact.detach().norm()), 1e-3)
