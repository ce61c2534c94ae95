r"""How good a model and its inference are, per datum, with oracles where there are any.

log p(x) − ELBO(λ) is the approximation gap log p(x) − ELBO(λ*) plus the amortisation gap ELBO(λ*) − ELBO(λ), λ* being
the best of the family (Cremer et al., 2018, arXiv:1801.03558).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentError, ShapeError
from implicit_layers.vae.families import DiagonalGaussian, log_prior
from implicit_layers.vae.model import LatentModel
from implicit_layers.vae.noise import Noise
from implicit_layers.vae.outer import IWAE

_CHUNK = 2**17  # pairs of a point and a datum that are looked at together


class Evidence(NamedTuple):
    """log p(x), and how far half the grid is from the whole one: a generous bound on the error of either."""

    value: Tensor  # (*B,)
    error: Tensor  # (*B,)


@torch.no_grad()
def elbo(
    model: LatentModel, lam: Tensor, x: Tensor, samples: int = 100, generator: torch.Generator | None = None
) -> Tensor:  # (*B, size), (*B, *E) -> (*B,)
    """The ELBO with fresh independent points; never with those that λ was fitted to.

    >>> model = LatentModel(torch.nn.Linear(1, 2), 1)
    >>> elbo(model, torch.zeros(3, 2), torch.zeros(3, 2)).shape
    torch.Size([3])
    """
    _check(model, lam, x)
    return -model.free_energy(lam, x, _fresh(model, lam, samples, generator))


@torch.no_grad()
def iwae_nll(
    model: LatentModel, lam: Tensor, x: Tensor, samples: int = 100, generator: torch.Generator | None = None
) -> Tensor:  # (*B, size), (*B, *E) -> (*B,)
    """An upper bound on −log p(x) on average, from `samples` importance-weighted points of q_λ.

    >>> model = LatentModel(torch.nn.Linear(1, 2), 1)
    >>> iwae_nll(model, torch.zeros(3, 2), torch.zeros(3, 2)).shape
    torch.Size([3])
    """
    _check(model, lam, x)
    return IWAE()(model, lam, x, _fresh(model, lam, samples, generator))


@torch.no_grad()
def evidence(model: LatentModel, x: Tensor, nodes: int = 161, width: float = 8.0) -> Evidence:  # (B, *E) -> (B,)
    """The evidence log p(x) by the trapezoidal rule on [−width, width]^D, D ≤ 2, one grid for all data.

    The rule converges faster than any power of the step for smooth densities; its step must be below the posterior's
    standard deviations, which the error reports: every second node alone gives the same, or there are too few.

    >>> model = LatentModel(torch.nn.Linear(1, 1).double(), 1)
    >>> found = evidence(model, torch.zeros(2, 1, dtype=torch.float64))
    >>> bool((found.error < 1e-10).all())
    True
    """
    checks.whole("nodes", nodes, least=3)
    if nodes % 2 == 0:
        raise ArgumentError(f"nodes must be odd, so that every second one is a grid too, got {nodes}")
    if model.latent_dim > 2:
        raise ArgumentError(f"quadrature is for at most 2 latent dimensions, got {model.latent_dim}; use iwae_nll")
    if x.ndim == 0:
        raise ShapeError("x must have a batch dimension, (B, *E); use x.unsqueeze(0) for one datum")
    like = x if x.is_floating_point() else next(model.parameters(), torch.empty(0, device=x.device))
    axis = torch.linspace(-width, width, nodes, dtype=like.dtype, device=x.device)
    grid = torch.cartesian_prod(*[axis] * model.latent_dim).reshape(-1, model.latent_dim)
    even = torch.arange(nodes, device=x.device) % 2 == 0
    coarse = torch.cartesian_prod(*[even] * model.latent_dim).reshape(len(grid), -1).all(-1)
    cell = model.latent_dim * math.log(2 * width / (nodes - 1))
    joint = torch.cat([_log_joint(model, part, x) for part in grid.split(max(1, _CHUNK // max(1, len(x))))])
    value = joint.logsumexp(0) + cell
    half = joint[coarse].logsumexp(0) + cell + model.latent_dim * math.log(2)
    return Evidence(value, (value - half).abs())


@torch.no_grad()
def quadrature_elbo(model: LatentModel, lam: Tensor, x: Tensor, nodes: int = 32) -> Tensor:  # -> (*B,)
    """The ELBO without sampling error, by Gauss–Hermite quadrature under q, D ≤ 2.

    >>> model = LatentModel(torch.nn.Linear(1, 2), 1)
    >>> quadrature_elbo(model, torch.zeros(3, 2), torch.zeros(3, 2)).shape
    torch.Size([3])
    """
    if model.latent_dim > 2:
        raise ArgumentError(f"quadrature is for at most 2 latent dimensions, got {model.latent_dim}; use elbo")
    checks.whole("nodes", nodes, least=1)
    _check(model, lam, x)
    place, weight = _hermite(nodes, lam)
    eps = torch.cartesian_prod(*[place] * model.latent_dim).reshape(-1, model.latent_dim)
    weights = torch.cartesian_prod(*[weight] * model.latent_dim).reshape(len(eps), -1).prod(-1)
    batch = lam.shape[:-1]
    points = eps.reshape(len(eps), *[1] * len(batch), -1).expand(len(eps), *batch, -1)
    log_p = model.log_likelihood(model.family.sample(lam, points), x)
    return torch.tensordot(weights, log_p, 1) - model.family.kl_prior(lam)


def amortisation_gap(model: LatentModel, lam: Tensor, best: Tensor, x: Tensor) -> Tensor:  # -> (*B,)
    """ELBO(best) − ELBO(lam), exactly, D ≤ 2; `best` minimises the energy without an anchor.

    >>> model = LatentModel(torch.nn.Linear(1, 2), 1)
    >>> amortisation_gap(model, torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2))
    tensor([0., 0., 0.])
    """
    return quadrature_elbo(model, best, x) - quadrature_elbo(model, lam, x)


def approximation_gap(model: LatentModel, best: Tensor, x: Tensor) -> Tensor:  # (B, size), (B, *E) -> (B,)
    """The gap log p(x) − ELBO(best), exactly, D ≤ 2: what the family cannot reach.

    >>> model = LatentModel(torch.nn.Linear(1, 2).double(), 1)
    >>> lam, x = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    >>> bool((approximation_gap(model, lam, x) >= 0).all())
    True
    """
    return evidence(model, x).value - quadrature_elbo(model, best, x)


def active_units(model: LatentModel, lam: Tensor, threshold: float = 1e-2) -> int:  # (N, size)
    """How many latent coordinates depend on the data: the variance over x of E_q[zᵢ] is above the threshold.

    Source:  Burda et al. (2016), arXiv:1509.00519.

    >>> model = LatentModel(torch.nn.Linear(2, 2), 2)
    >>> active_units(model, torch.tensor([[1.0, 0.5, 0.0, 0.0], [-1.0, 0.5, 0.0, 0.0]]))
    1
    """
    model.family.check("lam", lam)
    means = model.family.mean(lam.detach()).reshape(-1, model.latent_dim)
    return int((means.var(0, correction=0) > threshold).sum()) if len(means) else 0


def kl_per_unit(model: LatentModel, lam: Tensor) -> Tensor:  # (N, 2D) -> (D,)
    """KL(q ‖ p) of each latent coordinate, its mean over the data.

    >>> kl_per_unit(LatentModel(torch.nn.Linear(1, 2), 1), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([0.5000])
    """
    if not isinstance(model.family, DiagonalGaussian):
        raise ArgumentError("only the KL of a DiagonalGaussian splits into coordinates")
    model.family.check("lam", lam)
    return model.family.kl_units(lam.detach()).reshape(-1, model.latent_dim).mean(0)


@torch.no_grad()
def mutual_information(
    model: LatentModel, lam: Tensor, samples: int = 10, generator: torch.Generator | None = None
) -> Tensor:  # (N, size) -> ()
    """How much z says of which datum it came from: the mean of log q(z | x) − log q(z), q(z) the mean over the data.

    It is between 0, a collapsed posterior, and log N; KL(q(z | x) ‖ p) is on average this plus KL(q(z) ‖ p).

    Source:  Hoffman & Johnson (2016), "ELBO surgery".

    >>> model = LatentModel(torch.nn.Linear(1, 2), 1)
    >>> mutual_information(model, torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
    tensor(0.)
    """
    checks.whole("samples", samples, least=1)
    model.family.check("lam", lam)
    lam = lam.reshape(-1, model.family.size)
    z = model.family.sample(lam, _fresh(model, lam, samples, generator))  # (S, N, D)
    own = model.family.log_prob(lam, z)
    parts = z.reshape(-1, 1, model.latent_dim).split(max(1, _CHUNK // max(1, len(lam))))
    together = torch.cat([model.family.log_prob(lam, part).logsumexp(-1) for part in parts]) - math.log(
        max(1, len(lam))
    )
    return (own.flatten() - together).mean()


def _check(model: LatentModel, lam: Tensor, x: Tensor) -> None:
    """The door: a λ of the family for every datum."""
    model.family.check("lam", lam)
    batch = lam.shape[:-1]
    if x.shape[: len(batch)] != batch:
        raise ShapeError(f"x must begin with the batch {tuple(batch)} of lam, got {tuple(x.shape)}")


def _fresh(model: LatentModel, lam: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """Independent points."""
    noise = Noise("iid", samples)
    return noise.draw(model.latent_dim, lam.shape[:-1], dtype=lam.dtype, device=lam.device, generator=generator)


def _log_joint(model: LatentModel, z: Tensor, x: Tensor) -> Tensor:  # (G, D), (B, *E) -> (G, B)
    """The joint log p(x, z) of every datum at every point; each point is decoded once."""
    output = model.decoder(z)  # (G, *E)
    log_p = model.likelihood(output.unsqueeze(1), x)
    if log_p.shape[:2] != (len(z), len(x)):
        raise ShapeError(
            f"the likelihood of x {tuple(x.shape)} has shape {tuple(log_p.shape)} for {len(z)} points, which must "
            f"begin with {(len(z), len(x))}: x must be (B, *E), one batch dimension and the shape of one output"
        )
    return log_p.flatten(2).sum(-1) + log_prior(z).unsqueeze(1) if log_p.ndim > 2 else log_p + log_prior(z).unsqueeze(1)


def _hermite(nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Points and weights for the standard normal distribution, from the eigenvalues of its Jacobi matrix."""
    off = torch.arange(1, nodes, dtype=torch.float64).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return values.to(like), (vectors[0] ** 2).to(like)
