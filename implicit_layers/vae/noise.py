r"""Points ε for the expectation over q: drawn once, then frozen, so that the inner problem is one fixed function.

| rule | points | mean 0 | covariance I |
|---|---|---|---|
| cubature | ±√D eᵢ, 2D of them, no randomness | exactly | exactly |
| whitened | antithetic pairs, orthonormalised; at least 2D | exactly | exactly |
| antithetic | independent pairs ±ε | exactly | on average |
| iid | independent | on average | on average |

With the first two the ELBO of a linear decoder, and its derivatives, are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentError

NoiseRule = Literal["cubature", "whitened", "antithetic", "iid"]


@dataclass(frozen=True)
class Noise:
    """A rule for the points, and how many of them.

    Attributes:
        rule:    see the table of this module.
        samples: S; None: 2D.

    >>> Noise("cubature").draw(1, ()).squeeze(-1)
    tensor([ 1., -1.])
    """

    rule: NoiseRule = "whitened"
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.rule not in get_args(NoiseRule):
            raise ArgumentError(f"rule must be one of {get_args(NoiseRule)}, got {self.rule!r}")
        if self.samples is not None:
            checks.whole("samples", self.samples, least=1)

    def count(self, dim: int) -> int:
        """S for a latent of this size.

        Raises:
            ArgumentError: the rule does not allow this number.
        """
        samples = 2 * dim if self.samples is None else self.samples
        if self.rule == "cubature" and samples != 2 * dim:
            raise ArgumentError(f"cubature has 2·dim = {2 * dim} points, got samples={samples}; leave samples out")
        if self.rule in ("whitened", "antithetic") and samples % 2:
            raise ArgumentError(f"{self.rule} points come in pairs, got samples={samples}")
        if self.rule == "whitened" and samples < 2 * dim:
            raise ArgumentError(f"whitened points must be at least 2·dim = {2 * dim}, got samples={samples}")
        return samples

    def draw(
        self,
        dim: int,
        batch: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (S, *B, D)
        """Points for every datum of the batch."""
        samples = self.count(dim)
        if self.rule == "cubature":
            axes = dim**0.5 * torch.eye(dim, dtype=dtype, device=device)
            points = torch.cat([axes, -axes])
            return points.reshape(samples, *[1] * len(batch), dim).expand(samples, *batch, dim)
        pairs = samples if self.rule == "iid" else samples // 2
        drawn = torch.randn(*batch, pairs, dim, dtype=dtype, device=device, generator=generator)
        if self.rule == "whitened" and drawn.numel():
            Q, R = torch.linalg.qr(drawn)
            signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
            drawn = pairs**0.5 * Q * signs.unsqueeze(-2)  # with the signs, rotations are uniform
        drawn = drawn.movedim(-2, 0)
        return drawn if self.rule == "iid" else torch.cat([drawn, -drawn])
