"""Two classifiers of digits with an optimisation problem inside, which can be differentiated in three ways."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from implicit_layers.nn import QPLayer
from implicit_layers.reference import exact_qp, program
from implicit_layers.simplex import softmax
from implicit_layers.unrolled import unrolled_qp, unrolled_softmax

How = Literal["implicit", "unrolled", "exact"]

SOFTMAX_STEPS = 60  # mirror ascent, error 2⁻⁶⁰: float64 rounding
QP_STEPS = 400  # ADMM


class SoftmaxClassifier(nn.Module):
    r"""Linear, ReLU, linear, and as output the softmax linear program y = argmax ⟨x, y⟩ + H(y) over the simplex.

    Trained by the negative log-likelihood of y itself, so that the gradient goes through the program.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def scores(self, images: Tensor, how: How) -> Tensor:
        """The probabilities y of the ten classes."""
        x = self.body(images)
        if how == "implicit":
            return softmax(x)
        if how == "unrolled":
            return unrolled_softmax(x, steps=SOFTMAX_STEPS)
        return (x - x.logsumexp(-1, keepdim=True)).exp()  # the closed form, by plain autograd

    def loss(self, images: Tensor, labels: Tensor, how: How) -> Tensor:
        """Negative log-likelihood of y."""
        y = self.scores(images, how)
        return functional.nll_loss(y.clamp_min(torch.finfo(y.dtype).tiny).log(), labels)


class QPClassifier(nn.Module):
    r"""Linear, a quadratic program with learnable Q, A and G (OptNet), linear: the program is the only nonlinearity."""

    def __init__(self, n: int = 20, n_eq: int = 2, n_ineq: int = 20) -> None:
        super().__init__()
        self.first = nn.Linear(64, n)
        self.layer = QPLayer(n, n_eq=n_eq, n_ineq=n_ineq)
        self.last = nn.Linear(n, 10)

    def scores(self, images: Tensor, how: How) -> Tensor:
        """The logits of the ten classes."""
        p = self.first(images)
        return self.last(self.layer(p) if how == "implicit" else self._otherwise(p, how))

    def _otherwise(self, p: Tensor, how: How) -> Tensor:
        """The same program, with the layer's own matrices, solved in another way."""
        data = self.layer.program()
        if how == "unrolled":
            return unrolled_qp(p=p, **data, steps=QP_STEPS)
        return exact_qp(program(p=p, **data)).z.to(p.dtype)

    def loss(self, images: Tensor, labels: Tensor, how: How) -> Tensor:
        """Cross-entropy of the logits."""
        return functional.cross_entropy(self.scores(images, how), labels)


Classifier = SoftmaxClassifier | QPClassifier
