"""Modules of the regularised linear programs: they hold parameters and settings and call one function each."""

from __future__ import annotations

from torch import Tensor

from implicit_layers.losses import Reduction, check_reduction
from implicit_layers.nn.polytope import Polytope
from implicit_layers.regularized import regularized_lp, regularized_lp_loss
from implicit_layers.regularizers import Regularizer, regularizer
from implicit_layers.solution import OnFailure, Solution, check_on_failure


class _Regularized(Polytope):
    """What the layer and its loss share: a polytope, a temperature and a regulariser."""

    regulariser: str | Regularizer

    def over(self, regulariser: str | Regularizer) -> None:
        """Check and keep the regulariser."""
        regularizer(regulariser)
        self.regulariser = regulariser

    def extra_repr(self) -> str:
        """The regulariser, the constraints' sizes and the temperature."""
        name = self.regulariser.name if isinstance(self.regulariser, Regularizer) else self.regulariser
        return f"{name!r}, {super().extra_repr()}"


class RegularizedLP(_Regularized):
    r"""Scores to a point of a fixed polytope, c ↦ argmax_x ⟨c, x⟩ − τ Σφ(xᵢ), MAXIMISED; see `regularized_lp`.

    Args:
        regulariser: "entropy", "euclidean", "binary_entropy", "box", the name of your own, or a `Regularizer`.
        A, b, G, h, ub: the polytope A x = b, G x ≤ h, 0 ≤ x ≤ min(u, cap). What is given as `nn.Parameter` is learned
            (keep it feasible: b = A @ x0 of a learned positive x0 is safer through `regularized_lp` itself), the rest
            are buffers.
        temperature: τ > 0; the starting value if it is learned.
        learn_temperature: make the temperature a parameter, stored as `log_temperature`, so it stays positive. It has
            the dtype of the constraints.
        tol, max_iter, on_failure: see `regularized_lp`.

    Shape:  (*B, n) -> (*B, n).
    Raises: as `regularized_lp`.

    >>> import torch
    >>> RegularizedLP("euclidean", A=torch.ones(1, 3), b=torch.ones(1))(torch.tensor([0.0, 1.0, 0.9]))
    tensor([0.0000, 0.5500, 0.4500])
    """

    def __init__(
        self,
        regulariser: str | Regularizer = "entropy",
        *,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        ub: Tensor | None = None,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        tol: float = 1e-10,
        max_iter: int = 1000,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        self.over(regulariser)
        check_on_failure(on_failure)
        self.hold(temperature, learn_temperature, tol, max_iter, A=A, b=b, G=G, h=h, ub=ub)
        self.on_failure: OnFailure = on_failure

    def solve(self, c: Tensor) -> Solution:  # (*B, n)
        """The point that the scores choose, and how it was found."""
        return regularized_lp(
            c,
            self.regulariser,
            A=self.A,
            b=self.b,
            G=self.G,
            h=self.h,
            ub=self.ub,
            temperature=self.temperature,
            tol=self.tol,
            max_iter=self.max_iter,
            on_failure=self.on_failure,
        )

    def forward(self, c: Tensor) -> Tensor:  # (*B, n) -> (*B, n)
        """The point of the polytope that the scores choose."""
        return self.solve(c).value


class RegularizedLPLoss(_Regularized):
    r"""The Fenchel–Young loss that belongs to `RegularizedLP`; see `regularized_lp_loss`.

    Args:
        regulariser, A, b, G, h, ub, temperature, learn_temperature, tol, max_iter: as in `RegularizedLP`.
        reduction: "mean" over the problems, "sum" or "none".

    Shape:  scores (*B, n), target (*B, n) -> (), or (*B,) without reduction.
    Raises: as `regularized_lp_loss`.

    >>> import torch
    >>> loss = RegularizedLPLoss("euclidean", A=torch.ones(1, 3), b=torch.ones(1))
    >>> loss(torch.tensor([[0.0, 1.0, 0.9]]), torch.tensor([[0.0, 1.0, 0.0]]))
    tensor(0.2025)
    """

    def __init__(
        self,
        regulariser: str | Regularizer = "entropy",
        *,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        ub: Tensor | None = None,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        tol: float = 1e-10,
        max_iter: int = 1000,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.over(regulariser)
        check_reduction(reduction)
        self.hold(temperature, learn_temperature, tol, max_iter, A=A, b=b, G=G, h=h, ub=ub)
        self.reduction: Reduction = reduction

    def forward(self, c: Tensor, target: Tensor) -> Tensor:  # (*B, n), (*B, n)
        """The loss of the scores for a target in the polytope."""
        loss = regularized_lp_loss(
            c,
            target,
            self.regulariser,
            A=self.A,
            b=self.b,
            G=self.G,
            h=self.h,
            ub=self.ub,
            temperature=self.temperature,
            tol=self.tol,
            max_iter=self.max_iter,
        )
        if self.reduction == "none":
            return loss
        return loss.mean() if self.reduction == "mean" else loss.sum()

    def extra_repr(self) -> str:
        """The settings."""
        return f"{super().extra_repr()}, reduction={self.reduction!r}"
