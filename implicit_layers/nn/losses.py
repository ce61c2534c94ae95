"""Modules of the Fenchel–Young losses: they hold settings and call one function."""

from __future__ import annotations

from torch import Tensor, nn

from implicit_layers import checks, losses, regularizers, top_k, tsallis
from implicit_layers.losses import Reduction
from implicit_layers.regularizers import Regularizer


class FenchelYoungLoss(nn.Module):
    r"""How far the answer of a regularised argmax is from the target; see `implicit_layers.fenchel_young_loss`.

    Args:
        regulariser: "entropy", "euclidean", a number α ≥ 1, "binary_entropy" or "box" (with `total`), the name of a
            registered one, or a `Regularizer`.
        dim: the axis of the scores.
        temperature: τ > 0.
        total: k, the sum of a target.
        ignore_index: a problem with this index as target has loss 0.
        reduction: "mean" over the problems that are not ignored, "sum" or "none".

    Raises:   ValueError: an unknown regulariser or reduction, or a setting out of its range.

    >>> import torch
    >>> FenchelYoungLoss("euclidean")(torch.tensor([[0.0, 1.0, 0.9]]), torch.tensor([1]))
    tensor(0.2025)
    """

    def __init__(
        self,
        regulariser: str | Regularizer | float = "entropy",
        dim: int = -1,
        *,
        temperature: float = 1.0,
        total: float = 1.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if isinstance(regulariser, (str, Regularizer)):
            regularizers.regularizer(regulariser)
        else:
            tsallis.check_alpha(checks.number("regulariser", regulariser))
        checks.integer("dim", dim)
        checks.positive("temperature", temperature)
        checks.positive("total", total)
        checks.integer("ignore_index", ignore_index)
        losses.check_reduction(reduction)
        self.regulariser, self.dim, self.temperature, self.total = regulariser, dim, temperature, total
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(self, x: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of the scores x (*, n, *) for a target of the same shape, or for indices (*, *)."""
        return losses.fenchel_young_loss(
            x,
            target,
            self.regulariser,
            self.dim,
            temperature=self.temperature,
            total=self.total,
            mask=mask,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The settings, as in the constructor."""
        name = self.regulariser.name if isinstance(self.regulariser, Regularizer) else self.regulariser
        total = f", total={self.total:g}" if self.total != 1 else ""
        return f"{name!r}, dim={self.dim}, temperature={self.temperature:g}{total}, reduction={self.reduction!r}"


class SparsemaxLoss(FenchelYoungLoss):
    """The loss that belongs to `Sparsemax`; see `FenchelYoungLoss`."""

    def __init__(
        self, dim: int = -1, *, temperature: float = 1.0, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> None:
        super().__init__("euclidean", dim, temperature=temperature, ignore_index=ignore_index, reduction=reduction)


class EntmaxLoss(FenchelYoungLoss):
    """The loss that belongs to `Entmax(alpha)`; see `FenchelYoungLoss`."""

    def __init__(
        self,
        alpha: float = 1.5,
        dim: int = -1,
        *,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(alpha, dim, temperature=temperature, ignore_index=ignore_index, reduction=reduction)


class SoftTopKLoss(FenchelYoungLoss):
    """The loss that belongs to `SoftTopK(k)`: targets are points with entries in [0, 1] and sum k, e.g. k-hot."""

    def __init__(
        self,
        k: float,
        dim: int = -1,
        *,
        temperature: float = 1.0,
        regulariser: top_k.TopKRegulariser = "entropy",
        reduction: Reduction = "mean",
    ) -> None:
        top_k.check_regulariser(regulariser)
        super().__init__(
            top_k.OVER_THE_BOX[regulariser].name, dim, temperature=temperature, total=k, reduction=reduction
        )
