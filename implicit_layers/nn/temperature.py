"""A learned temperature: the exponential of a parameter, which no optimiser can make negative, zero or infinite."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def exponential(log_temperature: Tensor) -> Tensor:  # () -> ()
    """τ = exp(log τ), held between t and 1/t with t = tiny^¾, tiny the smallest normal number of the dtype.

    That is 3e-29 in float32 and 4e-231 in float64. Beyond these bounds the gradient is the one at the bound, not zero,
    so that a parameter that has run off comes back as soon as the loss asks for it.
    """
    most = -0.75 * math.log(torch.finfo(log_temperature.dtype).tiny)
    plain = log_temperature.detach()
    return (log_temperature + (plain.clamp(-most, most) - plain)).exp()
