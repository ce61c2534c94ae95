"""Fixed-point iteration, also called Picard iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentError
from implicit_layers.solution import Solution
from implicit_layers.solvers.problem import Method, Rows, norm, outcome, relative, resolve_batch_dims, tolerance


@dataclass(frozen=True)
class FixedPointIteration(Method):
    """z ← damping·z + (1 − damping)·f(z); converges where f contracts, linearly.

    Attributes:
        damping:  0 ≤ damping < 1.
        tol:      a problem ends when ‖z − f(z)‖ ≤ tol·max(‖z‖, ‖f(z)‖) (norms below 1e-10 count as 1e-10). None:
                  eps^(3/4), 2e-12 in float64 and 6e-6 in float32; a problem that rounding stops before still counts
                  as solved within eps^(2/3).
        max_iter: cap on the evaluations of f.

    >>> FixedPointIteration()(torch.cos, torch.tensor([1.0], dtype=torch.float64)).value
    tensor([0.7391], dtype=torch.float64)
    """

    damping: float = 0.0
    tol: float | None = None
    max_iter: int = 1000

    def __post_init__(self) -> None:
        if not 0 <= checks.number("damping", self.damping) < 1:
            raise ArgumentError(f"damping must be at least 0 and below 1, got {self.damping}")
        checks.stopping(self.tol, self.max_iter)

    def __call__(self, step: Callable[..., Tensor], z0: Tensor, *theta: Any, batch_dims: int | None = None) -> Solution:
        """See `fixed_point`."""
        return self.fixed_point(step, z0, *theta, batch_dims=batch_dims)

    def fixed_point(
        self, step: Callable[..., Tensor], z0: Tensor, *theta: Any, batch_dims: int | None = None
    ) -> Solution:
        """Find z with z = step(z, *theta); see `Method`."""
        rows = Rows(z0.shape, resolve_batch_dims(z0, batch_dims))
        f, tol = rows.residual(step, theta), tolerance(self.tol, z0.dtype)
        with torch.no_grad():
            y = rows.flat(z0).clone()
            image = f(y)
            iterations = torch.zeros(rows.batch, dtype=torch.int64, device=z0.device)
            for k in range(self.max_iter + 1):
                size = torch.maximum(norm(y), norm(image))
                solved = relative(y - image, size) <= tol
                active = ~solved & torch.isfinite(size)  # what diverged stays at its last finite iterate
                if k == self.max_iter or not checks.host_bool(active.any()):
                    break
                y = torch.where(active[..., None], self.damping * y + (1 - self.damping) * image, y)
                image = f(y)
                iterations = iterations + active
            size = torch.maximum(norm(y), norm(image))
            return outcome(rows, y, y - image, size, solved, iterations, self.tol)
