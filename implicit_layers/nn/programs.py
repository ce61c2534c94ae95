"""Modules of the linear programs' surrogates: they hold settings and call one function each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from implicit_layers import checks, lp


class PerturbedArgmax(nn.Module):
    r"""A solver made differentiable by noise on its scores; see `implicit_layers.perturbed_argmax`.

    Args:     solver, sigma, samples, noise, generator, event_ndim: as there; `sigma` is a number.
    Raises:   ValueError: `sigma` is not positive and finite; else as there.

    >>> best = lambda scores: torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])
    >>> PerturbedArgmax(best, sigma=0.1)(torch.tensor([0.0, 9.0]))
    tensor([0., 1.])
    """

    def __init__(
        self,
        solver: Callable[[Tensor], Tensor],
        *,
        sigma: float = 1.0,
        samples: int = 100,
        noise: lp.Noise = "normal",
        generator: torch.Generator | None = None,
        event_ndim: int = 1,
    ) -> None:
        super().__init__()
        checks.positive("sigma", sigma)
        lp.check_sampling(solver, samples, noise, generator, event_ndim)
        self.solver, self.sigma, self.samples = solver, sigma, samples
        self.noise: lp.Noise = noise
        self.generator, self.event_ndim = generator, event_ndim

    def forward(self, x: Tensor) -> Tensor:  # (*B, n) -> (*B, n)
        """The mean solution under noise."""
        return lp.perturbed_argmax(
            x,
            self.solver,
            sigma=self.sigma,
            samples=self.samples,
            noise=self.noise,
            generator=self.generator,
            event_ndim=self.event_ndim,
        )

    def extra_repr(self) -> str:
        """The settings."""
        return f"sigma={self.sigma:g}, samples={self.samples}, noise={self.noise!r}, event_ndim={self.event_ndim}"


class SPOPlusLoss(nn.Module):
    r"""The loss of predicted costs by the decisions they lead to; see `implicit_layers.spo_plus_loss`.

    Args:     solver, reduction, event_ndim: as there; `reduction` is "mean" here, as for PyTorch's own losses.
    Raises:   as there.

    >>> cheapest = lambda costs: torch.nn.functional.one_hot(costs.argmin(-1), costs.shape[-1])
    >>> SPOPlusLoss(cheapest)(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]))
    tensor(3.)
    """

    def __init__(
        self, solver: Callable[[Tensor], Tensor], *, reduction: lp.Reduction = "mean", event_ndim: int = 1
    ) -> None:
        super().__init__()
        lp.check_loss(solver, reduction, event_ndim)
        self.solver, self.event_ndim = solver, event_ndim
        self.reduction: lp.Reduction = reduction

    def forward(self, predicted: Tensor, true: Tensor, solution: Tensor | None = None) -> Tensor:
        """The loss of predicted against true costs."""
        return lp.spo_plus_loss(
            predicted, true, self.solver, solution=solution, reduction=self.reduction, event_ndim=self.event_ndim
        )

    def extra_repr(self) -> str:
        """The settings."""
        return f"reduction={self.reduction!r}, event_ndim={self.event_ndim}"
