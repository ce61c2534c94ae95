"""The limited-memory BFGS method, and steepest descent with its line search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.jacobian import gradient, pullback
from implicit_layers.solution import Solution
from implicit_layers.solvers.line_search import Evaluate, rounding, wolfe_step
from implicit_layers.solvers.problem import Method, Rows, Terms, norm, outcome, relative, resolve_batch_dims


@dataclass(frozen=True)
class LBFGS(Method):
    """Limited-memory BFGS; each problem of the batch has its own curvature pairs, step length and end.

    Attributes:
        memory:   how many curvature pairs are kept.
        tol:      a problem ends when ‖∇f‖ ≤ tol·size, size being that of the terms that cancel in ∇f: its change per
                  relative change of z and θ (terms below 1e-10 count as 1e-10). None: eps^(2/3), 4e-11 in float64
                  and 2e-5 in float32.
        max_iter: cap on the iterations.

    Source:  Nocedal (1980); Nocedal & Wright, Numerical Optimization, Algorithm 7.4.

    >>> LBFGS()(lambda z: ((z - 3.0) ** 2).sum(-1), torch.zeros(2)).value
    tensor([3., 3.])
    """

    memory: int = 10
    tol: float | None = None
    max_iter: int = 1000

    def __post_init__(self) -> None:
        checks.whole("memory", self.memory, least=1)
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
        return descend(objective, z0, theta, batch_dims, self.memory, self.tol, self.max_iter)


def descend(
    objective: Callable[..., Tensor],
    z0: Tensor,
    theta: tuple[Any, ...],
    batch_dims: int | None,
    memory: int,
    tol: float | None,
    max_iter: int,
) -> Solution:
    """L-BFGS with this memory; with none, steepest descent from the step length of Barzilai and Borwein."""
    rows = Rows(z0.shape, resolve_batch_dims(z0, batch_dims))
    slope = gradient(objective)
    f, g_of = rows.objective(objective, theta), rows.residual(slope, theta)
    goal = tol if tol is not None else float(torch.finfo(z0.dtype).eps ** (2 / 3))
    evaluate = evaluator(f)
    with torch.no_grad():
        terms = Terms(rows, slope, z0, theta)
        y = rows.flat(z0).clone()
        value, g = evaluate(y)
        pairs: list[tuple[Tensor, Tensor]] = []
        scale = torch.ones_like(value)
        first = torch.ones(rows.batch, dtype=torch.bool, device=z0.device)
        iterations = torch.zeros(rows.batch, dtype=torch.int64, device=z0.device)
        stuck, solved = torch.zeros_like(first), torch.zeros_like(first)
        start, size = value, terms.size(y, g)
        for k in range(max_iter + 1):
            size, solved = confirmed(terms, y, g, size, solved, goal)
            active = ~(solved | stuck)
            if k == max_iter or not checks.host_bool(active.any()):
                break
            direction = -_times_inverse_hessian(pairs, scale, g)
            bad = ~((direction * g).sum(-1) < 0)
            direction = torch.where(bad[..., None], -g, direction)
            # the very first step has no curvature to go by: one unit of z, or less
            t = torch.where(first | bad, (1 / norm(g)).clamp_max(1.0), 1.0)
            new_y, new_value, new_g, moved = wolfe_step(
                evaluate, y, value, g, direction, t, active, rounding(value, start)
            )
            s, d = new_y - y, new_g - g
            curvature, length = (s * d).sum(-1), (d * d).sum(-1)
            usable = moved & (curvature > torch.finfo(y.dtype).eps * norm(s) * norm(d))
            scale = torch.where(usable, curvature / torch.where(usable, length, 1.0), scale)
            if memory:
                kept = usable[..., None]
                pairs = [*pairs, (torch.where(kept, s, 0.0), torch.where(kept, d, 0.0))][-memory:]
            first = first & ~usable
            y, value, g = new_y, new_value, new_g
            # a search that fails with stale curvature is tried once more from the plain gradient
            lost = active & ~moved
            stuck = stuck | (lost & (first | bad))
            first = first | lost
            pairs = [(torch.where(lost[..., None], 0.0, a), torch.where(lost[..., None], 0.0, b)) for a, b in pairs]
            scale = torch.where(lost, 1.0, scale)
            iterations = iterations + (active & moved)
        g = g_of(y)
        return outcome(rows, y, g, terms.size(y, g), solved, iterations, loosened(tol, z0.dtype))


def loosened(tol: float | None, dtype: torch.dtype) -> float:
    """The residual that still counts as solved: the default goal is next to what rounding lets a search reach."""
    return 30 * float(torch.finfo(dtype).eps ** (2 / 3)) if tol is None else tol


def confirmed(terms: Terms, y: Tensor, g: Tensor, size: Tensor, solved: Tensor, goal: float) -> tuple[Tensor, Tensor]:
    """Which problems are solved; the size of their terms is measured anew for those that seem to be."""
    seem = ~solved & (relative(g, size) <= 10 * goal)
    if checks.host_bool(seem.any()):
        size = torch.where(seem, terms.size(y, g), size)
        solved = solved | (seem & (relative(g, size) <= goal))
    return size, solved


def evaluator(f: Callable[[Tensor], Tensor]) -> Evaluate:
    """The values and the gradients of the objectives together."""

    def evaluate(y: Tensor) -> tuple[Tensor, Tensor]:
        value, pull = pullback(f, y)
        return value.detach(), pull(torch.ones_like(value))[0]

    return evaluate


def _times_inverse_hessian(pairs: list[tuple[Tensor, Tensor]], scale: Tensor, g: Tensor) -> Tensor:  # -> (*B, n)
    """The two-loop recursion; a pair of zeros changes nothing."""
    q = g
    weights: list[tuple[Tensor, Tensor]] = []
    for s, d in reversed(pairs):
        curvature = (s * d).sum(-1, keepdim=True)
        rho = torch.where(curvature > 0, 1 / torch.where(curvature > 0, curvature, 1.0), 0.0)
        alpha = rho * (s * q).sum(-1, keepdim=True)
        q = q - alpha * d
        weights.append((rho, alpha))
    q = scale[..., None] * q
    for (s, d), (rho, alpha) in zip(pairs, reversed(weights), strict=True):
        q = q + s * (alpha - rho * (d * q).sum(-1, keepdim=True))
    return q
