r"""The Gauss–Newton method for the inner problem: no second derivative of the decoder.

The Hessian of −E_q log p(x | z) is replaced by mean_j Jⱼᵀ C Jⱼ, J the derivative of the decoder's output in the unknown
and C the likelihood's curvature in that output; the KL term and the anchor keep their Hessians, so that the matrix is
always positive definite. Where the decoder is linear and the unknown is the mean, it is Newton's method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentError
from implicit_layers.jacobian import Jacobian, gradient
from implicit_layers.solvers.problem import norm
from implicit_layers.vae.inner import InnerProblem
from implicit_layers.vae.model import LatentModel

_HALVINGS = 30


@dataclass(frozen=True)
class GaussNewton:
    """Gauss–Newton steps, each datum with its own step length and its own end, never uphill.

    Attributes:
        tol:      a datum ends when ‖∇e‖ ≤ tol·(1 + |e|), or when no step lowers e any more.
        max_iter: cap on the steps; `info.iterations` does not count them.

    Source:  Park et al. (2019), arXiv:1907.05527, for the Laplace approximation in a VAE.

    >>> GaussNewton(max_iter=50)
    GaussNewton(tol=1e-12, max_iter=50)
    """

    tol: float = 1e-12
    max_iter: int = 200

    def __post_init__(self) -> None:
        checks.stopping(self.tol, self.max_iter)

    @torch.no_grad()
    def minimise(self, problem: InnerProblem, y0: Tensor, *theta: Any) -> Tensor:  # (*B, n) -> (*B, n)
        """The unknown at a minimum of the problem."""
        slope = gradient(problem.value)
        y = y0.detach().clone()
        value, g = problem.value(y, *theta), slope(y, *theta)
        active = torch.ones_like(value, dtype=torch.bool)
        for _ in range(self.max_iter):
            active = active & (norm(g) > self.tol * (1 + value.abs()))
            if not checks.host_bool(active.any()):
                break
            L, failed = torch.linalg.cholesky_ex(curvature(problem, y, *theta))
            step = -torch.cholesky_solve(g.unsqueeze(-1), L).squeeze(-1)
            step = torch.where((failed > 0).unsqueeze(-1) | ~torch.isfinite(step), -g, step)
            downhill = (g * step).sum(-1)
            t, waiting = torch.ones_like(value), active
            for _ in range(_HALVINGS):
                trial = torch.where(waiting.unsqueeze(-1), y + t.unsqueeze(-1) * step, y)
                new, G = problem.value(trial, *theta), slope(trial, *theta)
                lower = (new <= value + 1e-4 * t * downhill) & (new < value)
                flatter = (new <= value + 1e-12 * (1 + value.abs())) & (norm(G) < norm(g))  # down to rounding
                good = waiting & (lower | flatter) & torch.isfinite(norm(G))
                y, value = torch.where(good.unsqueeze(-1), trial, y), torch.where(good, new, value)
                g = torch.where(good.unsqueeze(-1), G, g)
                waiting = waiting & ~good
                if not checks.host_bool(waiting.any()):
                    break
                t = 0.5 * t
            active = active & ~waiting
        return y


def curvature(
    problem: InnerProblem,
    y: Tensor,
    model: LatentModel,
    x: Tensor,
    lam0: Tensor,
    eps: Tensor,
    rho: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:  # (*B, n) -> (*B, n, n)
    """The Gauss–Newton matrix."""
    family = model.family
    weights_of = getattr(model.likelihood, "curvature", None)
    if weights_of is None:
        raise ArgumentError(
            f"Gauss–Newton needs the likelihood's curvature in the decoder's output, which {model.likelihood!r} does "
            "not have (Gaussian and Bernoulli do); use Newton()"
        )

    def rest(v: Tensor) -> Tensor:
        lam = problem.lam(family, v, lam0)
        return problem.tied(beta * family.kl_prior(lam), family, lam, lam0, rho)

    def output(v: Tensor) -> Tensor:  # (*B, n) -> (S, *B, *E)
        return model.decode(family.sample(problem.lam(family, v, lam0), eps))

    def along(unit: Tensor) -> Tensor:
        return torch.func.jvp(output, (y,), (unit.expand_as(y),))[1]

    weights = weights_of(output(y))
    weights = weights if mask is None else weights * mask
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    J = torch.func.vmap(along)(eye).reshape(len(eye), *eps.shape[:-1], -1)  # (n, S, *B, prod E)
    weights = weights.reshape(*eps.shape[:-1], -1)
    data = torch.einsum("is...e,s...e,js...e->...ij", J, weights, J) / eps.shape[0]
    H = Jacobian(gradient(rest), y).dense()
    return data + 0.5 * (H + H.mT)
