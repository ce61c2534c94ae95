r"""The inner problem of a datum, as a pure, deterministic, twice differentiable function of its unknown.

    e(λ) = f(λ; θ) + ρ R(λ, λ⁰),    f = −mean_j log p_θ(x | m + L ε_j) + β KL(q_λ ‖ N(0, I)),   ε frozen.

The unknown is λ, or its mean alone (subspace refinement: the encoder keeps the covariance). With a recognition
potential the encoder's output replaces the likelihood: λ⁰ = (h, log R) stands for ψ(z) = hᵀz − ½ zᵀ diag(R) z, and
f_in = β KL − E_q ψ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from implicit_layers.errors import ArgumentError
from implicit_layers.vae.anchors import Anchor
from implicit_layers.vae.families import DiagonalGaussian, GaussianFamily
from implicit_layers.vae.model import LatentModel

Unknown = Literal["all", "mean"]
Energy = Literal["elbo", "potential"]


@dataclass(frozen=True)
class InnerProblem:
    """Which energy is minimised, over what, tied to λ⁰ how.

    Attributes:
        anchor:  R.
        unknown: "all" of λ, or its "mean" alone.
        energy:  "elbo", or the recognition "potential" of the encoder in the likelihood's place.

    >>> InnerProblem(Anchor("none")).start(DiagonalGaussian(1), torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """

    anchor: Anchor = Anchor()  # noqa: RUF009  (frozen)
    unknown: Unknown = "all"
    energy: Energy = "elbo"

    def __post_init__(self) -> None:
        if self.unknown not in get_args(Unknown):
            raise ArgumentError(f"unknown must be one of {get_args(Unknown)}, got {self.unknown!r}")
        if self.energy not in get_args(Energy):
            raise ArgumentError(f"energy must be one of {get_args(Energy)}, got {self.energy!r}")
        if self.energy == "potential" and (self.anchor.kind != "none" or self.unknown != "all"):
            raise ArgumentError("with energy='potential' λ⁰ is no guess of λ: use Anchor('none') and unknown='all'")

    def start(self, family: GaussianFamily, lam0: Tensor) -> Tensor:  # (*B, size) -> (*B, n)
        """The unknown where the search begins."""
        if self.energy == "potential":
            return torch.zeros_like(lam0)
        return lam0 if self.unknown == "all" else family.mean(lam0)

    def lam(self, family: GaussianFamily, y: Tensor, lam0: Tensor) -> Tensor:  # (*B, n) -> (*B, size)
        """λ of an unknown."""
        return y if self.unknown == "all" else torch.cat([y, lam0[..., family.dim :]], -1)

    def value(
        self,
        y: Tensor,
        model: LatentModel,
        x: Tensor,
        lam0: Tensor,
        eps: Tensor,
        rho: float | Tensor = 1.0,
        beta: float | Tensor = 1.0,
        mask: Tensor | None = None,
    ) -> Tensor:  # (*B, n) -> (*B,)
        """The energy e."""
        lam = self.lam(model.family, y, lam0)
        if self.energy == "potential":
            return beta * model.family.kl_prior(lam) - expected_potential(model.family, lam, lam0)
        return self.tied(model.free_energy(lam, x, eps, beta, mask), model.family, lam, lam0, rho)

    def tied(
        self, energy: Tensor, family: GaussianFamily, lam: Tensor, lam0: Tensor, rho: float | Tensor
    ) -> Tensor:  # (*B,) -> (*B,)
        """The energy with what the anchor adds, ρ R(λ, λ⁰)."""
        return energy if self.anchor.kind == "none" else energy + rho * self.anchor.distance(family, lam, lam0)


def expected_potential(family: GaussianFamily, lam: Tensor, psi: Tensor) -> Tensor:  # (*B, 2D), (*B, 2D) -> (*B,)
    """E_q [hᵀz − ½ zᵀ diag(R) z] with ψ = (h, log R)."""
    if not isinstance(family, DiagonalGaussian):
        raise ArgumentError("a recognition potential is for a DiagonalGaussian")
    m, h, log_R = family.mean(lam), family.mean(psi), family.log_scale(psi)
    return (h * m - 0.5 * log_R.exp() * (m**2 + family.variances(lam))).sum(-1)
