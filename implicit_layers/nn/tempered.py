"""What modules with a temperature share: a number, or a parameter that stays positive."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from implicit_layers import checks
from implicit_layers.errors import ArgumentTypeError


class Tempered(nn.Module):
    """A module with a temperature that may be learned.

    A learned temperature is stored as `log_temperature`, whose exponential is used, so that an optimiser can never
    make it negative. It has the given dtype, else the default one: `module.double()` for float64 scores; for float16
    and bfloat16 scores leave it in float32.
    """

    log_temperature: nn.Parameter | None

    def start_at(self, temperature: float, learn_temperature: bool, dtype: torch.dtype | None = None) -> None:
        """Check and keep the temperature; for the constructor, which may have registered other parameters before."""
        if isinstance(temperature, Tensor):
            raise ArgumentTypeError("temperature must be a number; to learn it pass learn_temperature=True")
        checks.positive("temperature", temperature)
        self.learn_temperature = learn_temperature
        self._temperature = float(temperature)
        start = nn.Parameter(torch.tensor(math.log(temperature), dtype=dtype)) if learn_temperature else None
        self.register_parameter("log_temperature", start)

    @property
    def temperature(self) -> Tensor | float:
        """τ: a number, or a 0-d tensor if it is learned."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def extra_repr(self) -> str:
        """The temperature, as in the constructor."""
        temperature = self._temperature if self.log_temperature is None else float(self.log_temperature.detach().exp())
        return f"temperature={temperature:g}" + (", learn_temperature=True" if self.learn_temperature else "")


class TemperedAxis(Tempered):
    """A module of scores along an axis, with a temperature that may be learned."""

    def __init__(self, dim: int, temperature: float, learn_temperature: bool) -> None:
        super().__init__()
        self.start_at(temperature, learn_temperature)
        checks.integer("dim", dim)
        self.dim = dim

    def extra_repr(self) -> str:
        """The settings, as in the constructor."""
        return f"dim={self.dim}, {super().extra_repr()}"
