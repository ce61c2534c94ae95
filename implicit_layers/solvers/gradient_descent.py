"""Gradient descent with a fixed step and momentum, or with a line search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentError
from implicit_layers.jacobian import gradient
from implicit_layers.solution import Solution
from implicit_layers.solvers.lbfgs import confirmed, descend, loosened
from implicit_layers.solvers.problem import Method, Rows, Terms, norm, outcome, resolve_batch_dims


@dataclass(frozen=True)
class GradientDescent(Method):
    """v ← momentum·v − step·∇f(z), z ← z + v; the textbook method, and the slowest one here.

    Attributes:
        step:     the fixed step; below 2/L for gradients of Lipschitz constant L (without momentum). None: a line
                  search from the step length of Barzilai and Borwein (and no momentum).
        momentum: 0 ≤ momentum < 1.
        tol:      a problem ends when ‖∇f‖ ≤ tol·size, size being that of the terms that cancel in ∇f: its change per
                  relative change of z and θ (terms below 1e-10 count as 1e-10). None: eps^(2/3), 4e-11 in float64
                  and 2e-5 in float32.
        max_iter: cap on the iterations.

    >>> GradientDescent(step=0.25)(lambda z: ((z - 3.0) ** 2).sum(-1), torch.zeros(2)).value
    tensor([3., 3.])
    """

    step: float | None = None
    momentum: float = 0.0
    tol: float | None = None
    max_iter: int = 10_000

    def __post_init__(self) -> None:
        if self.step is not None:
            checks.positive("step", self.step)
        if not 0 <= checks.number("momentum", self.momentum) < 1:
            raise ArgumentError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.step is None and self.momentum:
            raise ArgumentError(f"momentum must be 0 without a fixed step, got {self.momentum}; give step too")
        checks.stopping(self.tol, self.max_iter)

    def accepted(self, dtype: torch.dtype) -> float:
        """See `Method.accepted`."""
        return loosened(self.tol, dtype)

    def __call__(
        self, objective: Callable[..., Tensor], z0: Tensor, *theta: Any, batch_dims: int | None = None
    ) -> Solution:
        """See `argmin`."""
        return self.argmin(objective, z0, *theta, batch_dims=batch_dims)

    def argmin(
        self, objective: Callable[..., Tensor], z0: Tensor, *theta: Any, batch_dims: int | None = None
    ) -> Solution:
        """Find a minimum of objective(z, *theta); see `Method`."""
        if self.step is None:
            return descend(objective, z0, theta, batch_dims, 0, self.tol, self.max_iter)
        rows = Rows(z0.shape, resolve_batch_dims(z0, batch_dims))
        slope = gradient(objective)
        g_of = rows.residual(slope, theta)
        goal = self.tol if self.tol is not None else float(torch.finfo(z0.dtype).eps ** (2 / 3))
        with torch.no_grad():
            terms = Terms(rows, slope, z0, theta)
            y = rows.flat(z0).clone()
            g, v = g_of(y), torch.zeros_like(y)
            iterations = torch.zeros(rows.batch, dtype=torch.int64, device=z0.device)
            solved, size = torch.zeros(rows.batch, dtype=torch.bool, device=z0.device), terms.size(y, g)
            for k in range(self.max_iter + 1):
                size, solved = confirmed(terms, y, g, size, solved, goal)
                active = ~solved & torch.isfinite(norm(g))
                if k == self.max_iter or not checks.host_bool(active.any()):
                    break
                v = self.momentum * v - self.step * g
                y = torch.where(active[..., None], y + v, y)
                g = g_of(y)
                iterations = iterations + active
            g = g_of(y)
            return outcome(rows, y, g, terms.size(y, g), solved, iterations, self.accepted(z0.dtype))
