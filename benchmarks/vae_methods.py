"""The contenders: the same encoder and decoder, trained in seven ways."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from benchmarks.vae_data import WORDS, Data, SequenceLikelihood
from implicit_layers.nn import SemiAmortizedVAE
from implicit_layers.solvers.newton import Newton
from implicit_layers.vae import Anchor, Bernoulli, Descent, InnerProblem, LatentModel, Noise, refine

FREE = InnerProblem(Anchor("none"))
SOLVER = Newton(tol=1e-4, max_iter=30)
STEPS, MOMENTUM = 10, 0.5  # of the unrolled descent; its step follows from rho
METHODS = ("vae", "svi", "vae_svi", "vae_svi_kl", "sa_vae", "savi_implicit", "savi_moreau")


class OneHot(nn.Module):
    """Words to the numbers that a linear layer reads."""

    def forward(self, x: Tensor) -> Tensor:  # (*B, T) -> (*B, T·WORDS)
        return nn.functional.one_hot(x.long(), WORDS).to(x.dtype).flatten(-2)


def build(
    method: str, data: Data, latent: int, hidden: int, rho: float, seed: int, fixed: bool = False
) -> SemiAmortizedVAE:
    """Encoder and model from one seed, whatever the method; ρ = (1 − μ)/(aK) fixes the step of the unrolled descent.

    With `fixed` the model is the generator of the data, and only the encoder learns.
    """
    torch.manual_seed(seed)
    n = data.train.shape[1]
    if data.truth is not None:
        latent = 2
        encoder: nn.Module = nn.Sequential(OneHot(), _mlp(n * WORDS, hidden, 2 * latent))
        model = deepcopy(data.truth) if fixed else LatentModel(nn.Identity(), latent, SequenceLikelihood())
    else:
        encoder = _mlp(n, hidden, 2 * latent)
        model = LatentModel(_mlp(latent, hidden, n), latent, Bernoulli())
    encoder.double()
    model.double()
    common = {"noise": Noise("whitened"), "solver": SOLVER, "on_failure": "ignore"}
    step = (1 - MOMENTUM) / (rho * STEPS)
    presets: dict[str, Callable[[], SemiAmortizedVAE]] = {
        "vae": lambda: SemiAmortizedVAE.vae(encoder, model, **common),
        "svi": lambda: SemiAmortizedVAE.svi(model, **common),
        "vae_svi": lambda: SemiAmortizedVAE.vae_svi(encoder, model, **common),
        "vae_svi_kl": lambda: SemiAmortizedVAE.vae_svi_kl(encoder, model, **common),
        "sa_vae": lambda: SemiAmortizedVAE.sa_vae(
            encoder, model, **{**common, "solver": Descent(STEPS, step, MOMENTUM)}
        ),
        "savi_implicit": lambda: SemiAmortizedVAE.savi_implicit(encoder, model, rho, **common),
        "savi_moreau": lambda: SemiAmortizedVAE.savi_moreau(encoder, model, rho, **common),
    }
    return presets[method]()


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """One hidden layer of tanh: the inner problem needs smooth decoders."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def refined(vae: SemiAmortizedVAE, x: Tensor, lam0: Tensor, generator: torch.Generator) -> Tensor:
    """The free optimum from λ⁰, the same for every method."""
    with torch.no_grad():
        eps = Noise("whitened", 4 * vae.model.latent_dim).draw(
            vae.model.latent_dim, lam0.shape[:-1], dtype=lam0.dtype, generator=generator
        )
        settings = {
            "problem": FREE,
            "solver": Newton(tol=1e-6, max_iter=60),
            "grad": "envelope",
            "on_failure": "ignore",
        }
        return refine(vae.model, x, lam0, eps, **settings).value
