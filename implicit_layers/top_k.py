"""Soft top-k: the linear program over the capped simplex, at most one each and k in all."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from implicit_layers import regularizers
from implicit_layers.errors import ArgumentError
from implicit_layers.scores import Empty

TopKRegulariser = Literal["entropy", "euclidean"]
REGULARISERS = get_args(TopKRegulariser)
OVER_THE_BOX = {"entropy": regularizers.BINARY_ENTROPY, "euclidean": regularizers.BOX}


def soft_top_k(
    x: Tensor,  # (*, n, *)
    k: Tensor | float,  # broadcasts with x, of size 1 along dim
    dim: int = -1,
    *,
    temperature: Tensor | float = 1.0,  # the same
    regulariser: TopKRegulariser = "entropy",
    mask: Tensor | None = None,  # broadcasts with x
    empty: Empty = "raise",
) -> Tensor:  # (*, n, *)
    r"""Choose k of n, softly: how much of each, at most one, k in all.

    Problem:  y* = argmax_y ⟨x, y⟩ + τ H(y)  subject to  0 ≤ y ≤ 1, Σy = k.
    Solution: yᵢ = σ((xᵢ − ν)/τ) for the entropy H(y) = −Σ yᵢ log yᵢ + (1 − yᵢ) log(1 − yᵢ), Fermi–Dirac occupations;
        yᵢ = min(max((xᵢ − ν)/τ, 0), 1) for the Euclidean H(y) = −½‖y‖²; with ν such that the sum is k.
        As τ → 0 both become the indicator of the k largest.

    Args:
        x: scores, n of them along `dim`; −inf masks an entry. float16 and bfloat16 are computed in float32.
        k: real, between 0 and the number of entries that are not masked; a tensor is differentiated, one of integers
            is taken as it is.
        dim: the axis of the n scores.
        temperature: τ > 0, as in `softmax`.
        regulariser: "entropy", smooth, or "euclidean", piecewise linear with exact zeros and ones.
        mask, empty: as in `softmax`; "uniform" gives k/n each.

    Returns:  y*, with the dtype and device of `x`, and the broadcast shape.
    Gradient: ∂y/∂x = (diag(s) − s sᵀ/⟨s, 1⟩)/τ, ∂y/∂k = s/⟨s, 1⟩, with s = y(1 − y) or 1 between the bounds, else 0.
        Where all entries are at their bounds, ∂y/∂x = 0 and ∂y/∂k is half of either one-sided derivative.
    Raises:   as `softmax`; ValueError: k out of its range, an unknown regulariser.
    Cost:     O(n log n), and about ten iterations of O(n).
    Source:   Amos, Koltun & Kolter (2019), arXiv:1906.08707 (τ = 1); Blondel et al. (2020), arXiv:2002.08871.

    >>> import torch
    >>> soft_top_k(torch.tensor([0.0, 2.0, 1.0, -1.0]), 2)
    tensor([0.3775, 0.8176, 0.6225, 0.1824])
    >>> soft_top_k(torch.tensor([0.0, 2.0, 1.5, -1.0]), 2, regulariser="euclidean")
    tensor([0., 1., 1., 0.])
    """
    check_regulariser(regulariser)
    return regularizers.choose(x, OVER_THE_BOX[regulariser], dim, temperature, k, mask, empty, name="k")


def check_regulariser(regulariser: str) -> None:
    """Refuse anything but the two regularisers over the box."""
    if regulariser not in REGULARISERS:
        raise ArgumentError(f"regulariser must be one of {REGULARISERS}, got {regulariser!r}")
