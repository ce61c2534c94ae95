"""What methods share that follow a path from an easy problem to the given one, in rows of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

LONGER = 4.0  # how the step along the path grows once it is taken
_SHORTER = 0.3  # and shrinks where it is not


def shortened(length: Tensor, ahead: Tensor, gamma: Tensor, trial: int) -> tuple[Tensor, Tensor]:  # (N, 1) each
    """The next trial of a refused step: less along the path, none after a while, and then half of the step back to it.

    Args:
        length: of the step back to the path. ahead: how far along it, γ → γ + ahead. trial: how many were refused.
    """
    shrinking = ahead > 0
    length = torch.where(shrinking, length, 0.5 * length)
    return length, torch.where(_SHORTER * ahead < 1e-3 * (1 - gamma) * (trial > 5), 0.0, _SHORTER * ahead)


def choose(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:  # (N,), (N, *), (N, *) -> (N, *)
    """Take the new rows where the mask is true."""
    return torch.where(mask.reshape(-1, *[1] * (new.ndim - 1)), new, old)
