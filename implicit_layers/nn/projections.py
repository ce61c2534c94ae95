"""Modules of projections, soft sorting and ranking: they hold parameters and settings and call one function each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from implicit_layers import softsort
from implicit_layers.errors import ArgumentTypeError
from implicit_layers.nn.tempered import TemperedAxis


class Projection(nn.Module):
    r"""A projection with its parameters: x ↦ projection(x, **parameters); see `implicit_layers.projections`.

    Args:
        projection: one of `il.projections`, or any function of a tensor and keyword arguments.
        parameters: its other arguments by name. An `nn.Parameter` is learned, another tensor becomes a buffer, anything
            else is a setting.

    Raises:   ArgumentTypeError: `projection` is not callable.

    >>> import torch
    >>> import implicit_layers as il
    >>> layer = Projection(il.projections.l2_ball, radius=nn.Parameter(torch.tensor(2.0)))
    >>> layer(torch.tensor([3.0, 4.0])).tolist()
    [1.2000000476837158, 1.600000023841858]
    """

    def __init__(self, projection: Callable[..., Tensor], **parameters: Any) -> None:
        super().__init__()
        if not callable(projection):
            raise ArgumentTypeError(f"Projection: projection must be callable, got {type(projection).__name__}")
        self.projection = projection
        self.settings: dict[str, Any] = {}
        self._tensors: list[str] = []
        for name, value in parameters.items():
            if not isinstance(value, Tensor):
                self.settings[name] = value
                continue
            self._tensors.append(name)
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """The projection of x."""
        return self.projection(x, **self.settings, **{name: getattr(self, name) for name in self._tensors})

    def extra_repr(self) -> str:
        """The projection and its settings."""
        name = getattr(self.projection, "__name__", repr(self.projection))
        return ", ".join([name, *(f"{key}={value!r}" for key, value in self.settings.items()), *self._tensors])


class _SoftOrder(TemperedAxis):
    """What soft sorting and soft ranking have in common."""

    def __init__(
        self, dim: int = -1, temperature: float = 1.0, descending: bool = False, learn_temperature: bool = False
    ) -> None:
        super().__init__(dim, temperature, learn_temperature)
        self.descending = descending

    def extra_repr(self) -> str:
        """The settings, as in the constructor."""
        return super().extra_repr() + (", descending=True" if self.descending else "")


class SoftRank(_SoftOrder):
    r"""Soft ranks; see `implicit_layers.soft_rank`.

    Args:
        dim, temperature, descending: as there; `temperature` is the starting value if it is learned.
        learn_temperature: make the temperature a parameter, stored as its logarithm `log_temperature`.

    Raises:   ValueError: τ is not positive and finite.

    >>> import torch
    >>> SoftRank(temperature=0.5)(torch.tensor([2.9, 0.1, 1.2]))
    tensor([3., 1., 2.])
    """

    def forward(self, x: Tensor) -> Tensor:  # (*, n, *) -> (*, n, *)
        """The soft ranks of the scores."""
        return softsort.soft_rank(x, self.dim, temperature=self.temperature, descending=self.descending)


class SoftSort(_SoftOrder):
    r"""Soft sorting; see `implicit_layers.soft_sort`.

    Args:     dim, temperature, descending, learn_temperature: as in `SoftRank`.
    Raises:   ValueError: τ is not positive and finite.

    >>> import torch
    >>> SoftSort(temperature=0.5)(torch.tensor([2.9, 0.1, 1.2]))
    tensor([0.1000, 1.2000, 2.9000])
    """

    def forward(self, x: Tensor) -> Tensor:  # (*, n, *) -> (*, n, *)
        """The scores, softly sorted."""
        return softsort.soft_sort(x, self.dim, temperature=self.temperature, descending=self.descending)
