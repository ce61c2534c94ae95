"""Likelihoods p(x | decoder output), entry by entry: modules, so that a learned variance is a parameter like others.

A likelihood is called as `likelihood(output, x)` with output (S, *B, *E) and x (*B, *E) and returns log-probabilities
(S, *B, *rest), which the model sums over *rest. Any callable of that form will do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from implicit_layers import checks


class Gaussian(nn.Module):
    r"""N(x; output, γ I); γ is a variance.

    Args:
        gamma: γ > 0, the starting value if it is learned.
        learn: make it a parameter; `log_gamma` is what is stored.

    >>> Gaussian(gamma=0.5)(torch.zeros(1), torch.zeros(1))
    tensor([-0.5724])
    """

    log_gamma: Tensor

    def __init__(self, gamma: float = 1.0, learn: bool = False) -> None:
        super().__init__()
        checks.positive("gamma", gamma)
        start = torch.tensor(math.log(gamma))
        if learn:
            self.log_gamma = nn.Parameter(start)
        else:
            self.register_buffer("log_gamma", start)

    @property
    def gamma(self) -> Tensor:
        """γ."""
        return self.log_gamma.exp()

    def forward(self, output: Tensor, x: Tensor) -> Tensor:  # (S, *B, *E), (*B, *E) -> (S, *B, *E)
        """−(x − output)²/(2γ) − ½ log 2πγ."""
        return -0.5 * ((x - output) ** 2 * (-self.log_gamma).exp() + self.log_gamma + math.log(2 * math.pi))

    def curvature(self, output: Tensor) -> Tensor:
        """Minus the second derivative in the output: 1/γ."""
        return (-self.log_gamma).exp().expand_as(output)


class Bernoulli(nn.Module):
    """Bernoulli, the output being logits; x in [0, 1], where grey values give the cross-entropy.

    >>> Bernoulli()(torch.zeros(1), torch.ones(1))
    tensor([-0.6931])
    """

    def forward(self, output: Tensor, x: Tensor) -> Tensor:  # (S, *B, *E), (*B, *E) -> (S, *B, *E)
        """x·output − log(1 + e^output)."""
        return x * output - functional.softplus(output)

    def curvature(self, output: Tensor) -> Tensor:
        """Minus the second derivative in the output: p(1 − p)."""
        return output.sigmoid() * (-output).sigmoid()


class Categorical(nn.Module):
    """Categorical, the output being logits along its last axis; x holds class numbers.

    >>> Categorical()(torch.zeros(1, 4), torch.tensor([2]))
    tensor([-1.3863])
    """

    def forward(self, output: Tensor, x: Tensor) -> Tensor:  # (S, *B, *E, V), (*B, *E) -> (S, *B, *E)
        """The entries log softmax(output)[x]."""
        log_p = output.log_softmax(-1)
        shape = torch.broadcast_shapes(log_p.shape[:-1], x.shape)
        index = x.to(torch.int64).expand(shape).unsqueeze(-1)
        return log_p.expand(*shape, -1).gather(-1, index).squeeze(-1)
