"""What the command line sets, for every suite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    device: str = "cpu"
    seed: int = 0
    quick: bool = False
    dtype: torch.dtype = torch.float64
    threads: int = 1
