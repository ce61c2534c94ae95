"""Modules of the simplex family: they hold parameters and settings and call one function each."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from implicit_layers import checks, scores, simplex, top_k, tsallis
from implicit_layers.errors import ArgumentError
from implicit_layers.nn.tempered import TemperedAxis


class _Choice(TemperedAxis):
    """A member of the family: its axis and temperature, and what a problem without entries gets."""

    def __init__(self, dim: int, temperature: float, learn_temperature: bool, empty: scores.Empty) -> None:
        super().__init__(dim, temperature, learn_temperature)
        scores.check_empty(empty)
        self.empty: scores.Empty = empty

    def extra_repr(self) -> str:
        """The settings, as in the constructor."""
        return super().extra_repr() + (f", empty={self.empty!r}" if self.empty != "raise" else "")


class Softmax(_Choice):
    r"""Softmax as an entropy-regularised linear program; see `implicit_layers.softmax`.

    Args:
        dim: the axis of the scores.
        temperature: τ > 0; the starting value if it is learned.
        learn_temperature: make the temperature a parameter, see `Tempered`.
        method: "closed", "newton" or "kkt".
        empty: what a problem gets that a mask or −inf leaves no entry of: "raise" an error, "uniform" or "zeros".

    Raises:   ValueError: τ is not positive and finite, or the method or `empty` is unknown.

    >>> Softmax(temperature=0.5)(torch.tensor([0.0, 1.0]))
    tensor([0.1192, 0.8808])
    """

    def __init__(
        self,
        dim: int = -1,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        method: simplex.SoftmaxMethod = "closed",
        *,
        empty: scores.Empty = "raise",
    ) -> None:
        super().__init__(dim, temperature, learn_temperature, empty)
        simplex.check_method(method)
        self.method: simplex.SoftmaxMethod = method

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (*, n, *) -> (*, n, *)
        """The point of the simplex that the scores choose."""
        return simplex.softmax(
            x, self.dim, temperature=self.temperature, mask=mask, method=self.method, empty=self.empty
        )

    def extra_repr(self) -> str:
        """The settings, as in the constructor."""
        return super().extra_repr() + (f", method={self.method!r}" if self.method != "closed" else "")


class Sparsemax(_Choice):
    """Projection on the probability simplex; see `implicit_layers.sparsemax`.

    Args:
        dim: the axis of the scores.
        temperature, learn_temperature, empty: as in `Softmax`.

    Raises:   ValueError: τ is not positive and finite.

    >>> Sparsemax()(torch.tensor([0.0, 1.0, 0.9]))
    tensor([0.0000, 0.5500, 0.4500])
    """

    def __init__(
        self,
        dim: int = -1,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        *,
        empty: scores.Empty = "raise",
    ) -> None:
        super().__init__(dim, temperature, learn_temperature, empty)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (*, n, *) -> (*, n, *)
        """The point of the simplex that the scores choose."""
        return tsallis.sparsemax(x, self.dim, temperature=self.temperature, mask=mask, empty=self.empty)


class Entmax(_Choice):
    r"""Sparse choices between softmax (α = 1) and sparsemax (α = 2); see `implicit_layers.entmax`.

    Args:
        alpha: α ≥ 1; the starting value, strictly between 1 and 2, if it is learned.
        dim: the axis of the scores.
        temperature, learn_temperature, empty: as in `Softmax`.
        learn_alpha: make α a parameter. It is stored as `logit_alpha`, α = 1 + σ(logit_alpha), so an optimiser can
            never take it out of (1, 2).

    Raises:   ValueError: α or τ out of its range.

    >>> Entmax(1.5)(torch.tensor([0.0, 1.0, 2.0]))
    tensor([0.0000, 0.1693, 0.8307])
    """

    logit_alpha: nn.Parameter | None

    def __init__(
        self,
        alpha: float = 1.5,
        dim: int = -1,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        learn_alpha: bool = False,
        *,
        empty: scores.Empty = "raise",
    ) -> None:
        super().__init__(dim, temperature, learn_temperature, empty)
        tsallis.check_alpha(checks.number("alpha", alpha))
        if learn_alpha and not 1 < alpha < 2:
            raise ArgumentError(f"a learned alpha starts strictly between 1 and 2, got {alpha}")
        self.learn_alpha, self._alpha = learn_alpha, float(alpha)
        start = nn.Parameter(torch.tensor(math.log((alpha - 1) / (2 - alpha)))) if learn_alpha else None
        self.register_parameter("logit_alpha", start)

    @property
    def alpha(self) -> Tensor | float:
        """α: a number, or a 0-d tensor if it is learned."""
        return self._alpha if self.logit_alpha is None else 1 + self.logit_alpha.sigmoid()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (*, n, *) -> (*, n, *)
        """The point of the simplex that the scores choose."""
        return tsallis.entmax(x, self.alpha, self.dim, temperature=self.temperature, mask=mask, empty=self.empty)

    def extra_repr(self) -> str:
        """The settings, as in the constructor."""
        learned = ", learn_alpha=True" if self.learn_alpha else ""
        return f"alpha={float(torch.as_tensor(self.alpha).detach()):g}, {super().extra_repr()}{learned}"


class SoftTopK(_Choice):
    """Choose k of n, softly; see `implicit_layers.soft_top_k`.

    Args:
        k: how many, a number.
        dim: the axis of the scores.
        temperature, learn_temperature, empty: as in `Softmax`.
        regulariser: "entropy" or "euclidean".

    Raises:   ValueError: k is negative or not finite, τ not positive and finite, or the regulariser unknown.

    >>> SoftTopK(2)(torch.tensor([0.0, 2.0, 1.0, -1.0]))
    tensor([0.3775, 0.8176, 0.6225, 0.1824])
    """

    def __init__(
        self,
        k: float,
        dim: int = -1,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        regulariser: top_k.TopKRegulariser = "entropy",
        *,
        empty: scores.Empty = "raise",
    ) -> None:
        super().__init__(dim, temperature, learn_temperature, empty)
        if not 0 <= checks.number("k", k) < math.inf:
            raise ArgumentError(f"k must be at least 0 and finite, got {k}")
        top_k.check_regulariser(regulariser)
        self.k = k
        self.regulariser: top_k.TopKRegulariser = regulariser

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (*, n, *) -> (*, n, *)
        """How much of each entry is chosen, k in all."""
        tau, regulariser = self.temperature, self.regulariser
        return top_k.soft_top_k(
            x, self.k, self.dim, temperature=tau, regulariser=regulariser, mask=mask, empty=self.empty
        )

    def extra_repr(self) -> str:
        """The settings, as in the constructor."""
        regulariser = f", regulariser={self.regulariser!r}" if self.regulariser != "entropy" else ""
        return f"k={self.k}, {super().extra_repr()}{regulariser}"
