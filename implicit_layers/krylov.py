"""Iterative linear solvers: only products with the operator, never its matrix.

Every system of the batch, and every right-hand side, has its own inner products and stops on its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentError
from implicit_layers.linalg import LinearSolver, Operator, refuse
from implicit_layers.solution import OnFailure


def _tolerance(tol: float | None, dtype: torch.dtype) -> float:
    """The given relative tolerance, or the dtype's: eps^(2/3), 4e-11 in float64."""
    return float(torch.finfo(dtype).eps ** (2 / 3)) if tol is None else tol


def _dot(a: Tensor, b: Tensor) -> Tensor:  # (*S, n), (*S, n) -> (*S, 1)
    """One inner product a system."""
    return (a * b).sum(-1, keepdim=True)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """The quotient where b is not zero, else 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _report(name: str, operator: Operator, x: Tensor, rhs: Tensor, tol: float, on_failure: OnFailure) -> None:
    """With "raise", refuse a residual above the tolerance, recomputed from its definition."""
    if on_failure == "raise":
        error, size = torch.linalg.vector_norm(operator.matvec(x) - rhs, dim=-1), torch.linalg.vector_norm(rhs, dim=-1)
        # the recurrence's residual, which stopped the loop, drifts from the true one by rounding
        refuse(~(error <= 10 * tol * size), f"{name} did not reach tol={tol:.1e}; raise max_iter, or use Direct()")


@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradients for symmetric positive definite operators; one product an iteration.

    Attributes:
        tol:      stop a system when ‖A x − rhs‖ ≤ tol·‖rhs‖; None: eps^(2/3) of the dtype. As `linear_solver` of
                  an operation it is also what you agree to: give a large one for a truncated solve.
        max_iter: cap; None: 10·n, but at least 50 and at most 5000.

    Source:  Hestenes & Stiefel (1952). A direction of no positive curvature ends that system where it stands.

    >>> from implicit_layers.linalg import Matrix
    >>> ConjugateGradient().solve(Matrix(torch.tensor([[2.0, 1.0], [1.0, 2.0]])), torch.tensor([3.0, 3.0]))
    tensor([1., 1.])
    """

    tol: float | None = None
    max_iter: int | None = None

    def __post_init__(self) -> None:
        checks.stopping(self.tol, 1 if self.max_iter is None else self.max_iter)

    def solve(self, operator: Operator, rhs: Tensor, *, on_failure: OnFailure = "raise") -> Tensor:
        """See `LinearSolver.solve`."""
        tol = _tolerance(self.tol, rhs.dtype)
        x, _ = self.descend(operator, rhs, tol)
        _report("ConjugateGradient", operator, x, rhs, tol, on_failure)
        return x

    def descend(self, operator: Operator, rhs: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """The iterate, and where negative curvature was met: (*S, n), (*S, 1). Always A's descent direction."""
        limit = self.max_iter if self.max_iter is not None else min(max(10 * operator.n, 50), 5000)
        x, r = torch.zeros_like(rhs), rhs.clone()
        p, rr = r.clone(), _dot(r, r)
        goal = tol**2 * rr
        negative = torch.zeros_like(rr, dtype=torch.bool)
        active = rr > goal
        for _ in range(limit):
            if not checks.host_bool(active.any()):
                break
            Ap = operator.matvec(p)
            curvature = _dot(p, Ap)
            negative = negative | (active & (curvature <= 0))
            active = active & (curvature > 0)  # false for NaN too
            alpha = torch.where(active, _divide(rr, curvature), 0.0)
            x = torch.where(active, x + alpha * p, x)
            r = torch.where(active, r - alpha * Ap, r)
            new = torch.where(active, _dot(r, r), rr)
            p = torch.where(active, r + _divide(new, rr) * p, p)
            rr = new
            active = active & (rr > goal)
        return x, negative


@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Restarted GMRES for any invertible operator; one product an iteration, `restart` vectors of memory.

    Attributes:
        tol:      stop a system when ‖A x − rhs‖ ≤ tol·‖rhs‖; None: eps^(2/3) of the dtype. As `linear_solver` of
                  an operation it is also what you agree to: give a large one for a truncated solve.
        max_iter: cap on the products; None: 10·n, but at least 50 and at most 5000.
        restart:  length of a cycle.

    Source:  Saad & Schultz (1986), with classical Gram–Schmidt done twice.

    >>> from implicit_layers.linalg import Matrix
    >>> GMRES().solve(Matrix(torch.tensor([[0.0, 2.0], [1.0, 0.0]])), torch.tensor([2.0, 3.0])).round(decimals=4)
    tensor([3., 1.])
    """

    tol: float | None = None
    max_iter: int | None = None
    restart: int = 50

    def __post_init__(self) -> None:
        checks.stopping(self.tol, 1 if self.max_iter is None else self.max_iter)
        checks.whole("restart", self.restart, least=1)

    def solve(self, operator: Operator, rhs: Tensor, *, on_failure: OnFailure = "raise") -> Tensor:
        """See `LinearSolver.solve`."""
        tol = _tolerance(self.tol, rhs.dtype)
        limit = self.max_iter if self.max_iter is not None else min(max(10 * operator.n, 50), 5000)
        goal = tol * torch.linalg.vector_norm(rhs, dim=-1, keepdim=True)
        x, r, spent = torch.zeros_like(rhs), rhs, 0
        best = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        active = best > goal
        while spent < limit and checks.host_bool(active.any()):
            length = min(self.restart, operator.n, limit - spent)
            step, used = self._cycle(operator, torch.where(active, r, 0.0), goal, length)
            spent += used + 1
            trial = torch.where(active, x + step, x)
            r = rhs - operator.matvec(trial)
            error = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
            better = active & (error < best)
            x = torch.where(better, trial, x)
            # a cycle that gains less than a thousandth has met rounding, or a singular operator
            active = better & (error > goal) & (error < 0.999 * best)
            best = torch.where(better, error, best)
        _report("GMRES", operator, x, rhs, tol, on_failure)
        return x

    @staticmethod
    def _cycle(operator: Operator, r: Tensor, goal: Tensor, length: int) -> tuple[Tensor, int]:
        """One cycle from residual r: the correction, (*S, n), and the products it took."""
        beta = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        V = [_divide(r, beta)]  # orthonormal, (*S, n) each
        R = r.new_zeros(*r.shape[:-1], length, length)  # upper triangular
        g = r.new_zeros(*r.shape[:-1], length + 1)  # rotated right-hand side
        g[..., 0] = beta.squeeze(-1)
        cosines: list[Tensor] = []
        sines: list[Tensor] = []
        active = (beta > goal).squeeze(-1)
        used = 0
        for j in range(length):
            w = operator.matvec(V[j])
            size = torch.linalg.vector_norm(w, dim=-1)
            basis = torch.stack(V, -1)  # (*S, n, j + 1)
            h = torch.zeros_like(basis[..., 0, :])
            for _ in range(2):
                overlap = (basis.mT @ w.unsqueeze(-1)).squeeze(-1)
                w = w - (basis @ overlap.unsqueeze(-1)).squeeze(-1)
                h = h + overlap
            rest = torch.linalg.vector_norm(w, dim=-1)
            rest = torch.where(rest <= 10 * torch.finfo(r.dtype).eps * size, 0.0, rest)  # the space is exhausted
            column = list(h.unbind(-1))
            for i, (c, s) in enumerate(zip(cosines, sines, strict=True)):
                column[i], column[i + 1] = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
            diagonal = torch.hypot(column[j], rest)
            c, s = torch.where(diagonal == 0, 1.0, _divide(column[j], diagonal)), _divide(rest, diagonal)
            cosines.append(c)
            sines.append(s)
            column[j] = diagonal
            # a system that has stopped gets the column of the identity and a zero: its solution stays as it is
            usable = active & (diagonal > 0)
            for i in range(j + 1):
                R[..., i, j] = torch.where(usable, column[i], float(i == j))
            g[..., j + 1] = torch.where(usable, -s * g[..., j], 0.0)
            g[..., j] = torch.where(usable, c * g[..., j], 0.0)
            V.append(_divide(w, rest.unsqueeze(-1)))
            used = j + 1
            active = usable & (g[..., j + 1].abs() > goal.squeeze(-1)) & (rest > 0)
            if not checks.host_bool(active.any()):
                break
        y = torch.linalg.solve_triangular(R[..., :used, :used], g[..., :used].unsqueeze(-1), upper=True)
        return (torch.stack(V[:used], -1) @ y).squeeze(-1), used


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """The Neumann series x ← x + step·(rhs − A x), i.e. step·Σₖ (I − step·A)ᵏ rhs; one product a term.

    Attributes:
        step:     1 for the system of a contracting fixed point (A = I − ∂f/∂z); below 2/λ_max for a Hessian.
        tol:      stop a system when ‖A x − rhs‖ ≤ tol·‖rhs‖; None: eps^(2/3) of the dtype. As `linear_solver` of
                  an operation it is also what you agree to: `math.inf` accepts the series truncated at `max_iter`.
        max_iter: cap on the terms.

    >>> from implicit_layers.linalg import Matrix
    >>> Neumann().solve(Matrix(0.5 * torch.eye(2)), torch.ones(2))
    tensor([2.0000, 2.0000])
    """

    step: float = 1.0
    tol: float | None = None
    max_iter: int = 1000

    def __post_init__(self) -> None:
        if not 0 < abs(checks.number("step", self.step)) < float("inf"):  # negative for a negative definite operator
            raise ArgumentError(f"step must be finite and not 0, got {self.step}")
        checks.stopping(None if self.tol == float("inf") else self.tol, self.max_iter)

    def solve(self, operator: Operator, rhs: Tensor, *, on_failure: OnFailure = "raise") -> Tensor:
        """See `LinearSolver.solve`."""
        tol = _tolerance(self.tol, rhs.dtype)
        # an infinite tolerance asks for all the terms, whatever they give
        goal = (tol if tol < float("inf") else 0.0) * torch.linalg.vector_norm(rhs, dim=-1, keepdim=True)
        x = self.step * rhs
        for _ in range(self.max_iter - 1):
            r = rhs - operator.matvec(x)
            active = torch.linalg.vector_norm(r, dim=-1, keepdim=True) > goal
            if not checks.host_bool(active.any()):
                break
            x = torch.where(active, x + self.step * r, x)
        _report("Neumann", operator, x, rhs, tol, on_failure)
        return x
