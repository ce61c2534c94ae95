"""Newton's method for systems and for minima, damped by a line search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.jacobian import Jacobian, gradient
from implicit_layers.krylov import GMRES, ConjugateGradient
from implicit_layers.linalg import DENSE_LIMIT, Direct, LinearSolver
from implicit_layers.solution import Solution
from implicit_layers.solvers.line_search import rounding
from implicit_layers.solvers.problem import Method, Rows, Terms, norm, outcome, relative, resolve_batch_dims

_HALVINGS = 40
_SETTLING = 40


@dataclass(frozen=True)
class Newton(Method):
    """Newton's method, each problem of the batch with its own step length and its own end.

    For a system, z ← z + t·δ with J δ = −F and t halved until ‖F‖ decreases. For a minimum the step descends the
    objective: where the Hessian is not positive definite its eigenvalues are replaced by their absolute values, and a
    stationary point with a direction of negative curvature is left along that direction, so that saddles and maxima
    are not accepted (without the dense Hessian, conjugate gradients stop at such a direction, and a start exactly at
    a saddle is not noticed).

    Attributes:
        tol:           a problem ends when ‖F‖ ≤ tol·size, size being that of the terms that cancel in F: its change
                       per relative change of z and θ. This does not depend on the units of F, z or θ (terms below
                       1e-10 count as 1e-10). None: as far as rounding lets it come; a problem counts as solved within
                       eps^(2/3), 4e-11 in float64 and 2e-5 in float32, from where it goes on, to at best 4·eps, for
                       as long as a full step halves ‖F‖.
        max_iter:      cap on the steps.
        linear_solver: how J δ = −F is solved. None: `Direct` (for a minimum: `Cholesky` with the change above) up to
                       512 unknowns a problem, beyond that `GMRES` (`ConjugateGradient`), without forming J.

    >>> solution = Newton()(lambda z: z * z - 2.0, torch.tensor([1.0]))
    >>> solution.value
    tensor([1.4142])
    """

    tol: float | None = None
    max_iter: int = 100
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        checks.stopping(self.tol, self.max_iter)
        if self.linear_solver is not None:
            checks.instance_with_solve("linear_solver", self.linear_solver)

    def __call__(
        self, residual: Callable[..., Tensor], z0: Tensor, *theta: Any, batch_dims: int | None = None
    ) -> Solution:
        """See `root`."""
        return self.root(residual, z0, *theta, batch_dims=batch_dims)

    def root(self, residual: Callable[..., Tensor], z0: Tensor, *theta: Any, batch_dims: int | None = None) -> Solution:
        """Find z with residual(z, *theta) = 0; see `Method`."""
        with torch.no_grad():
            return self._root(residual, z0, theta, Rows(z0.shape, resolve_batch_dims(z0, batch_dims)))

    def fixed_point(
        self, step: Callable[..., Tensor], z0: Tensor, *theta: Any, batch_dims: int | None = None
    ) -> Solution:
        """Find z with z = step(z, *theta), as the root of z − step(z); see `Method`."""
        return self.root(lambda z, *rest: z - step(z, *rest), z0, *theta, batch_dims=batch_dims)

    def argmin(
        self, objective: Callable[..., Tensor], z0: Tensor, *theta: Any, batch_dims: int | None = None
    ) -> Solution:
        """Find a minimum of objective(z, *theta); see `Method`."""
        with torch.no_grad():
            return self._argmin(objective, z0, theta, Rows(z0.shape, resolve_batch_dims(z0, batch_dims)))

    def _root(self, residual: Callable[..., Tensor], z0: Tensor, theta: tuple[Any, ...], rows: Rows) -> Solution:
        """`root` below the door."""
        f, terms = rows.residual(residual, theta), Terms(rows, residual, z0, theta)
        tol, good = self._tolerances(z0.dtype)
        linear = self.linear_solver or (Direct() if rows.n <= DENSE_LIMIT else GMRES())
        y = rows.flat(z0).clone()
        F = f(y)
        iterations = torch.zeros(rows.batch, dtype=torch.int64, device=z0.device)
        stuck = torch.zeros(rows.batch, dtype=torch.bool, device=z0.device)
        for k in range(self.max_iter + 1):
            error = relative(F, terms.size(y, F))
            solved = error <= tol
            active = ~(solved | stuck)
            if k == self.max_iter or not checks.host_bool(active.any()):
                break
            J = Jacobian(f, y)
            step = linear.solve(J, -F, on_failure="ignore")
            bad = ~torch.isfinite(step).all(-1)
            if checks.host_bool((bad & active).any()):  # no Newton step: the steepest descent of ½‖F‖²
                step = torch.where(bad[..., None], _steepest(J, F), step)
            y, F, moved = _decrease(f, y, F, step, active, error <= good)
            stuck = stuck | (active & ~moved)
            iterations = iterations + (active & moved)
        if self.tol is None:
            y, more = _settle(f, terms, linear, y, solved | (error <= good), good)
            iterations = iterations + more
        F = f(y)  # once more, all together: coupled problems do not pass one by one
        return outcome(rows, y, F, terms.size(y, F), solved, iterations, self.tol)

    def _argmin(self, objective: Callable[..., Tensor], z0: Tensor, theta: tuple[Any, ...], rows: Rows) -> Solution:
        """`argmin` below the door."""
        slope = gradient(objective)
        f, g = rows.objective(objective, theta), rows.residual(slope, theta)
        terms = Terms(rows, slope, z0, theta)
        tol, good = self._tolerances(z0.dtype)
        dense = rows.n <= DENSE_LIMIT if self.linear_solver is None else False
        y = rows.flat(z0).clone()
        value, F = f(y), g(y)
        start = value
        iterations = torch.zeros(rows.batch, dtype=torch.int64, device=z0.device)
        stuck = torch.zeros(rows.batch, dtype=torch.bool, device=z0.device)
        for k in range(self.max_iter + 1):
            error = relative(F, terms.size(y, F))
            solved, near = error <= tol, error <= good
            if dense:
                H = Jacobian(g, y).dense()
                step, convex, saddle = _convex_step(0.5 * (H + H.mT), F, near | solved)
                solved, near = solved & ~saddle, near & ~saddle
            active = ~(solved | stuck)
            if k == self.max_iter or not checks.host_bool(active.any()):
                break
            if not dense:
                step, convex = self._step_by_products(Jacobian(g, y), F)
            noise = rounding(value, start)
            y, value, F, moved = _descend(f, g, y, value, F, step, active, near, convex, noise)
            stuck = stuck | (active & ~moved)
            iterations = iterations + (active & moved)
        F = g(y)
        solution = outcome(rows, y, F, terms.size(y, F), solved, iterations, self.tol)
        return _without(solution, saddle & ~solved) if dense else solution

    def _tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        """Where a problem ends, and from where on it goes on only while full steps help."""
        eps = float(torch.finfo(dtype).eps)
        return (4 * eps, eps ** (2 / 3)) if self.tol is None else (self.tol, -1.0)

    def _step_by_products(self, H: Jacobian, F: Tensor) -> tuple[Tensor, Tensor]:
        """A descent direction from products with the Hessian, and where it is Newton's step."""
        linear = self.linear_solver or ConjugateGradient()
        if isinstance(linear, ConjugateGradient):
            tol = linear.tol if linear.tol is not None else float(torch.finfo(F.dtype).eps ** 0.5)
            step, negative = linear.descend(H, -F, tol)
        else:
            step = linear.solve(H, -F, on_failure="ignore")
            negative = torch.zeros_like(F[..., :1], dtype=torch.bool)
        uphill = ~((step * F).sum(-1, keepdim=True) < 0) | ~torch.isfinite(step).all(-1, keepdim=True)
        return torch.where(uphill, -F, step), ~(uphill | negative).squeeze(-1)


def _settle(
    f: Callable[[Tensor], Tensor], terms: Terms, linear: LinearSolver, y: Tensor, solved: Tensor, good: float
) -> tuple[Tensor, Tensor]:
    """Take full steps while they still move an unknown; also returns how many each problem took.

    The residual of a problem is judged as a whole, so that an unknown much smaller than the others may be far from its
    value when the problem counts as solved. Newton's step says so, in the unknown's own unit.
    """
    eps = float(torch.finfo(y.dtype).eps)
    going, count = solved, torch.zeros(solved.shape, dtype=torch.int64, device=y.device)
    before = torch.full(solved.shape, torch.inf, dtype=y.dtype, device=y.device)
    for _ in range(_SETTLING):
        F = f(y)
        step = linear.solve(Jacobian(f, y), -F, on_failure="ignore")
        largest = y.abs().amax(-1, keepdim=True) if y.shape[-1] else y
        moving = (step.abs() > eps**0.5 * y.abs()) & (step.abs() > eps * largest)
        length = norm(torch.where(moving, step, 0.0))
        going = going & moving.any(-1) & (length <= 1.01 * before)  # steps that grow are rounding
        before = length
        trial = torch.where(going.unsqueeze(-1), y + step, y)
        G = f(trial)
        size = terms.size(trial, G)
        going = going & (relative(G, size) <= good)  # false for NaN
        if not checks.host_bool(going.any()):
            break
        y = torch.where(going.unsqueeze(-1), trial, y)
        count = count + going
    return y, count


def _without(solution: Solution, rejected: Tensor) -> Solution:
    """The same solution, the rejected problems counted as failed."""
    info = solution.info
    status = torch.where(rejected, 1, info.status.to(torch.int64)).to(torch.int8)
    return Solution(solution.value, info._replace(status=status, converged=info.converged & ~rejected))


def _steepest(J: Jacobian, F: Tensor) -> Tensor:  # -> (*B, n)
    """The minimiser of the linear model along −Jᵀ F; zero where that vanishes."""
    direction = -J.rmatvec(F)
    curvature = (J.matvec(direction) ** 2).sum(-1, keepdim=True)
    length = (direction**2).sum(-1, keepdim=True) / torch.where(curvature > 0, curvature, 1.0)
    step = length * direction
    return torch.where(torch.isfinite(step).all(-1, keepdim=True), step, 0.0)


def _decrease(
    f: Callable[[Tensor], Tensor], y: Tensor, F: Tensor, step: Tensor, active: Tensor, near: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve the step until ‖F‖ decreases; the new point, its residual and which problems moved.

    Those near the solution have the full step or none, and it has to halve ‖F‖.
    """
    before = norm(F)
    waiting, moved = active, torch.zeros_like(active)
    t = torch.ones_like(before)
    for _ in range(_HALVINGS):
        trial = torch.where(waiting[..., None], y + t[..., None] * step, y)
        G = f(trial)
        factor = torch.where(near, 0.5, 1 - 0.1 * t)
        good = waiting & (norm(G) <= factor * before) & (norm(G) < before)  # false for NaN
        y, F = torch.where(good[..., None], trial, y), torch.where(good[..., None], G, F)
        moved = moved | good
        waiting = waiting & ~good & ~near
        if not checks.host_bool(waiting.any()):
            break
        t = torch.where(waiting, 0.5 * t, t)
    return y, F, moved


def _convex_step(H: Tensor, F: Tensor, stationary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Newton's step with |H| where H is not positive definite; where it is; which stationary points are no minima."""
    L, failed = torch.linalg.cholesky_ex(H)
    step = -torch.cholesky_solve(F.unsqueeze(-1), L).squeeze(-1)
    saddle = torch.zeros_like(stationary)
    indefinite = failed > 0
    if checks.host_bool(indefinite.any()):
        unusable = ~torch.isfinite(H).all(-1).all(-1)
        values, vectors = torch.linalg.eigh(torch.where(unusable[..., None, None], 0.0, H))
        largest = values.abs().amax(-1, keepdim=True)
        eps = torch.finfo(H.dtype).eps
        size = values.abs().clamp_min(eps**0.5 * largest.clamp_min(torch.finfo(H.dtype).tiny))
        along = (vectors.mT @ F.unsqueeze(-1)).squeeze(-1)
        changed = -(vectors @ (along / size).unsqueeze(-1)).squeeze(-1)
        saddle = indefinite & stationary & (values[..., 0] < -(eps**0.5) * largest[..., 0])
        lowest = vectors[..., 0]
        downhill = torch.where((lowest * F).sum(-1, keepdim=True) > 0, -lowest, lowest)
        step = torch.where(indefinite[..., None], changed, step)
        step = torch.where(saddle[..., None], downhill, step)
        step = torch.where(unusable[..., None], -F, step)
    return step, ~indefinite, saddle


def _descend(
    f: Callable[[Tensor], Tensor],
    g: Callable[[Tensor], Tensor],
    y: Tensor,
    value: Tensor,
    F: Tensor,
    step: Tensor,
    active: Tensor,
    near: Tensor,
    convex: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Halve the step until the objective decreases, or, within its rounding, the gradient does.

    Those near the solution have the full step or none, and it has to halve the gradient. So does, where the Hessian is
    positive definite, a full step that the values refused until next to nothing of it was left: they were rounding.
    """
    first_y, first_value, first_F = y, value, F
    slope = (F * step).sum(-1)
    before = norm(F)
    waiting, moved = active, torch.zeros_like(active)
    t = torch.ones_like(before)
    for halvings in range(_HALVINGS):
        trial = torch.where(waiting[..., None], y + t[..., None] * step, y)
        new, G = f(trial), g(trial)
        if halvings == 0:
            first_y, first_value, first_F = trial, new, G
        lower = (new <= value + 0.25 * t * slope) & (new < value)
        factor = torch.where(near, 0.5, 1 - 0.1 * t)
        flatter = ((new <= value + noise) | near) & (norm(G) <= factor * before) & (norm(G) < before)
        good = waiting & ((lower & ~near) | flatter) & torch.isfinite(norm(G))
        y, value = torch.where(good[..., None], trial, y), torch.where(good, new, value)
        F = torch.where(good[..., None], G, F)
        moved = moved | good
        waiting = waiting & ~good & ~near
        if not checks.host_bool(waiting.any()):
            break
        t = torch.where(waiting, 0.5 * t, t)
    full = active & convex & (t < 1e-3) & (norm(first_F) <= 0.5 * before)
    y, value = torch.where(full[..., None], first_y, y), torch.where(full, first_value, value)
    return y, value, torch.where(full[..., None], first_F, F), moved | full
