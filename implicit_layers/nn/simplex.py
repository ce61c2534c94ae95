"""Modules of the simplex family: they hold parameters and settings and call one function each."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from implicit_layers import checks, simplex
from implicit_layers.errors import ArgumentTypeError


class Softmax(nn.Module):
    r"""Softmax as an entropy-regularised linear program; see `implicit_layers.softmax`.

    Args:
        dim: the axis of the scores.
        temperature: τ > 0; the starting value if it is learned.
        learn_temperature: make the temperature a parameter. It is stored as `log_temperature`, whose exponential is
            used, so an optimiser can never make it negative. It has the default dtype: `module.double()` for float64
            scores; for float16 and bfloat16 scores leave it in float32.
        method: "closed", "newton" or "kkt".

    Raises:   ValueError: τ is not positive and finite, or the method is unknown.

    >>> Softmax(temperature=0.5)(torch.tensor([0.0, 1.0]))
    tensor([0.1192, 0.8808])
    """

    log_temperature: nn.Parameter | None

    def __init__(
        self,
        dim: int = -1,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        method: simplex.SoftmaxMethod = "closed",
    ) -> None:
        super().__init__()
        if isinstance(temperature, Tensor):
            raise ArgumentTypeError("temperature must be a number; to learn it pass learn_temperature=True")
        checks.positive("temperature", temperature)
        checks.integer("dim", dim)
        simplex.check_method(method)
        self.dim = dim
        self.method: simplex.SoftmaxMethod = method
        self.learn_temperature = learn_temperature
        self._temperature = float(temperature)
        start = nn.Parameter(torch.tensor(math.log(temperature))) if learn_temperature else None
        self.register_parameter("log_temperature", start)

    @property
    def temperature(self) -> Tensor | float:
        """τ: a number, or a 0-d tensor if it is learned."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, x: Tensor) -> Tensor:  # (*, n, *) -> (*, n, *)
        """The point of the simplex that the scores choose."""
        return simplex.softmax(x, self.dim, temperature=self.temperature, method=self.method)

    def extra_repr(self) -> str:
        """The settings, as in the constructor."""
        temperature = self._temperature if self.log_temperature is None else float(self.log_temperature.detach().exp())
        learned = ", learn_temperature=True" if self.learn_temperature else ""
        method = f", method={self.method!r}" if self.method != "closed" else ""
        return f"dim={self.dim}, temperature={temperature:g}{learned}{method}"
