"""Anderson acceleration of a fixed-point iteration."""

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
class Anderson(Method):
    """Anderson acceleration: the next iterate combines the last ones so that their residuals nearly cancel.

    With r_k = f(z_k) − z_k, ΔZ and ΔR the last `memory` differences: γ = argmin ‖r_k − ΔR γ‖ and
    z_{k+1} = z_k + β·r_k − (ΔZ + β·ΔR) γ. The columns of ΔR are scaled to length one and the small system is
    regularised by eps^(3/4), so that a singular one does no harm. A problem whose residual grows tenfold over its best
    one, or is no longer finite, goes back to its best iterate, forgets its memory and takes a plain step.

    Attributes:
        memory:   how many differences are kept.
        mixing:   β in (0, 1].
        tol:      a problem ends when ‖z − f(z)‖ ≤ tol·max(‖z‖, ‖f(z)‖) (norms below 1e-10 count as 1e-10). None:
                  eps^(3/4), 2e-12 in float64 and 6e-6 in float32; a problem that rounding stops before still counts
                  as solved within eps^(2/3).
        max_iter: cap on the evaluations of f.

    Source:  Walker & Ni (2011), doi:10.1137/10078356X.

    >>> Anderson()(torch.cos, torch.tensor([1.0], dtype=torch.float64)).value
    tensor([0.7391], dtype=torch.float64)
    """

    memory: int = 5
    mixing: float = 1.0
    tol: float | None = None
    max_iter: int = 500

    def __post_init__(self) -> None:
        checks.whole("memory", self.memory, least=1)
        if not 0 < checks.number("mixing", self.mixing) <= 1:
            raise ArgumentError(f"mixing must be above 0 and at most 1, got {self.mixing}")
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
            r = f(y) - y
            best_y, best_r = y, r
            dY = y.new_zeros(*y.shape, 0)  # (*B, n, m)
            dR = dY
            iterations = torch.zeros(rows.batch, dtype=torch.int64, device=z0.device)
            for k in range(self.max_iter + 1):
                size = torch.maximum(norm(best_y), norm(best_y + best_r))
                solved = relative(best_r, size) <= tol
                active = ~solved & torch.isfinite(norm(best_r))
                if k == self.max_iter or not checks.host_bool(active.any()):
                    break
                lost = ~(norm(r) <= 10 * norm(best_r))  # true for NaN
                y, r = _pick(lost, best_y, y), _pick(lost, best_r, r)
                dY, dR = (torch.where(lost[..., None, None], 0.0, d) for d in (dY, dR))
                # after a loss the plain step is halved: from the best iterate it may be what led astray
                plain = torch.where(lost[..., None], 0.5 * r, self.mixing * r)
                new = torch.where(active[..., None], y + plain - _correction(dY, dR, r, self.mixing), y)
                new_r = f(new) - new
                dY = torch.cat([dY, (new - y).unsqueeze(-1)], -1)[..., -self.memory :]
                dR = torch.cat([dR, (new_r - r).unsqueeze(-1)], -1)[..., -self.memory :]
                y, r = new, new_r
                better = active & (norm(r) < norm(best_r))
                best_y, best_r = _pick(better, y, best_y), _pick(better, r, best_r)
                iterations = iterations + active
            image = f(best_y)
            size = torch.maximum(norm(best_y), norm(image))
            return outcome(rows, best_y, best_y - image, size, solved, iterations, self.tol)


def _pick(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows of `a` where the mask is true, else of `b`."""
    return torch.where(mask[..., None], a, b)


def _correction(dY: Tensor, dR: Tensor, r: Tensor, mixing: float) -> Tensor:  # (*B, n, m) twice, (*B, n) -> (*B, n)
    """(ΔZ + β·ΔR) γ with γ the regularised least-squares solution of ΔR γ = r."""
    if dR.shape[-1] == 0 or r.numel() == 0:
        return torch.zeros_like(r)
    tiny = torch.finfo(r.dtype).tiny
    finite = torch.isfinite(dR).all(-2, keepdim=True) & torch.isfinite(dY).all(-2, keepdim=True)
    dR, dY = torch.where(finite, dR, 0.0), torch.where(finite, dY, 0.0)
    length = torch.linalg.vector_norm(dR, dim=-2, keepdim=True).clamp_min(tiny)
    unit = dR / length
    gram = unit.mT @ unit
    gram = gram + torch.finfo(r.dtype).eps ** 0.75 * torch.eye(gram.shape[-1], dtype=r.dtype, device=r.device)
    L, _ = torch.linalg.cholesky_ex(gram)
    gamma = torch.cholesky_solve(unit.mT @ torch.nan_to_num(r).unsqueeze(-1), L)
    return ((dY + mixing * dR) @ (gamma / length.mT)).squeeze(-1)
