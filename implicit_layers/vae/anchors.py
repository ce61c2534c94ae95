r"""What ties the inner solution to the encoder's guess λ⁰, so that the encoder has a gradient at all.

| anchor | R(λ, λ⁰), to be multiplied by ρ |
|---|---|
| none | 0: at a strict minimum λ* does not depend on λ⁰ |
| l2, identity metric | ½‖λ − λ⁰‖² |
| l2, Fisher metric | ½ Σ Mᵢ (λᵢ − λᵢ⁰)², M the Fisher information at λ⁰; its dependence on λ⁰ is differentiated too |
| kl | KL(q_λ ‖ q_λ⁰) |

ρ → ∞ is the amortised VAE, ρ → 0 is stochastic variational inference (SVI).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from implicit_layers.errors import ArgumentError
from implicit_layers.vae.families import DiagonalGaussian, GaussianFamily

AnchorKind = Literal["none", "l2", "kl"]
Metric = Literal["identity", "fisher"]


@dataclass(frozen=True)
class Anchor:
    """The kind of anchor; its weight ρ is given with the data.

    >>> Anchor("kl")
    Anchor(kind='kl', metric='identity')
    """

    kind: AnchorKind = "l2"
    metric: Metric = "identity"

    def __post_init__(self) -> None:
        if self.kind not in get_args(AnchorKind):
            raise ArgumentError(f"kind must be one of {get_args(AnchorKind)}, got {self.kind!r}")
        if self.metric not in get_args(Metric):
            raise ArgumentError(f"metric must be one of {get_args(Metric)}, got {self.metric!r}")
        if self.metric != "identity" and self.kind != "l2":
            raise ArgumentError(f"metric={self.metric!r} is for the l2 anchor, got kind={self.kind!r}")

    def distance(self, family: GaussianFamily, lam: Tensor, lam0: Tensor) -> Tensor:  # -> (*B,)
        """R(λ, λ⁰)."""
        if self.kind == "kl":
            return family.kl(lam, lam0)
        squares = (lam - lam0) ** 2
        if self.metric == "fisher":
            if not isinstance(family, DiagonalGaussian):
                raise ArgumentError("metric='fisher' is for a DiagonalGaussian; use the identity or the kl anchor")
            squares = family.fisher(lam0) * squares
        return 0.5 * squares.sum(-1)
