r"""The generative model p(z) = N(0, I), p(x | z), and the free energy of a datum, −ELBO."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from implicit_layers.errors import ArgumentError, ArgumentTypeError, ImplicitLayersWarning, ShapeError, warn
from implicit_layers.vae.families import DiagonalGaussian, GaussianFamily
from implicit_layers.vae.likelihoods import Gaussian

Likelihood = Callable[[Tensor, Tensor], Tensor]

_BATCH_COUPLING = (nn.modules.batchnorm._BatchNorm,)
_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU)
_KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.Threshold, nn.Softshrink, nn.Hardshrink)


class LatentModel(nn.Module):
    r"""p(z) = N(0, I_D), p(x | z) by a decoder, q_λ in a Gaussian family.

    Args:
        decoder:    (N, D) -> (N, \*E): z to the parameters of the likelihood. Smooth: the inner problem needs second
                    derivatives, so that a ReLU is warned about; use tanh, softplus, SiLU or GELU.
        latent_dim: D.
        likelihood: `Gaussian()`, `Bernoulli()`, `Categorical()` or a callable; see `implicit_layers.vae.likelihoods`.
        family:     of q; None: `DiagonalGaussian`.

    Raises:   ArgumentTypeError: the decoder is no module. ArgumentError: the family has another dimension.

    >>> import torch
    >>> model = LatentModel(torch.nn.Linear(2, 3), 2)
    >>> model.free_energy(torch.zeros(5, 4), torch.zeros(5, 3), torch.zeros(1, 5, 2)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        decoder: nn.Module,
        latent_dim: int,
        likelihood: Likelihood | None = None,
        family: GaussianFamily | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(decoder, nn.Module):
            raise ArgumentTypeError(f"decoder must be an nn.Module, got {type(decoder).__name__}")
        self.decoder = decoder
        self.likelihood: Likelihood = Gaussian() if likelihood is None else likelihood
        self.family = DiagonalGaussian(latent_dim) if family is None else family
        if self.family.dim != latent_dim:
            raise ArgumentError(f"the family has dim={self.family.dim}, but latent_dim is {latent_dim}")
        kinked = sorted({type(m).__name__ for m in self.modules() if isinstance(m, _KINKED)})
        if kinked:
            warn(
                f"LatentModel: the decoder has {', '.join(kinked)}, whose kinks make the inner problem's gradient "
                "discontinuous, so that the implicit function theorem does not hold there; use tanh, softplus, SiLU "
                "or GELU",
                ImplicitLayersWarning,
            )

    @property
    def latent_dim(self) -> int:
        """D."""
        return self.family.dim

    def check_deterministic(self) -> None:
        """Refuse layers that make the energy of a datum random, or dependent on the other data of the batch."""
        for name, module in self.named_modules():
            if isinstance(module, _BATCH_COUPLING) and module.training:
                raise ArgumentError(
                    f"{name} is a {type(module).__name__} in training mode, which couples the data of a batch; use "
                    "LayerNorm or GroupNorm, or put it in eval mode"
                )
            if isinstance(module, _RANDOM) and module.training and getattr(module, "p", 1.0) > 0:
                raise ArgumentError(
                    f"{name} is a {type(module).__name__} in training mode, which makes every evaluation of the inner "
                    "problem another one; put it in eval mode, or drop it"
                )

    def decode(self, z: Tensor) -> Tensor:  # (S, *B, D) -> (S, *B, *E)
        """The decoder's output for points of any leading shape."""
        flat = self.decoder(z.reshape(-1, z.shape[-1]))
        return flat.reshape(*z.shape[:-1], *flat.shape[1:])

    def log_likelihood(self, z: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (S, *B, D) -> (S, *B)
        """The log-likelihood log p(x | z), summed over the entries of x; a mask, like x or broadcast, weighs them."""
        output = self.decode(z)
        log_p = self.likelihood(output, x)
        if log_p.shape[: z.ndim - 1] != z.shape[:-1]:
            raise ShapeError(
                f"the likelihood of x {tuple(x.shape)} under outputs {tuple(output.shape)} has shape "
                f"{tuple(log_p.shape)}, which must begin with {tuple(z.shape[:-1])}: x must be (*B, *E), "
                "the decoder's output (N, *E)"
            )
        if mask is not None:
            log_p = log_p * mask
        return log_p.flatten(z.ndim - 1).sum(-1) if log_p.ndim > z.ndim - 1 else log_p

    def free_energy(
        self, lam: Tensor, x: Tensor, eps: Tensor, beta: float | Tensor = 1.0, mask: Tensor | None = None
    ) -> Tensor:  # (*B, size), (*B, *E), (S, *B, D) -> (*B,)
        """−ELBO: −mean over the points of log p(x | m + L ε), plus β KL(q ‖ p)."""
        z = self.family.sample(lam, eps)
        return beta * self.family.kl_prior(lam) - self.log_likelihood(z, x, mask).mean(0)

    def forward(
        self, lam: Tensor, x: Tensor, eps: Tensor, beta: float | Tensor = 1.0, mask: Tensor | None = None
    ) -> Tensor:
        """`free_energy`."""
        return self.free_energy(lam, x, eps, beta, mask)
