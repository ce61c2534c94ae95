"""What the solvers share: a batch of problems as rows, when a row counts as solved, and what a method offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from implicit_layers.errors import ArgumentTypeError, ShapeError
from implicit_layers.solution import Solution, SolveInfo, Status

FLOOR = 1e-10  # terms smaller than this count as this: a root at which every term vanishes can still be reached
FINAL_FLOOR = 1e-5  # the same once no further step helps
GIVEN_FLOOR = 1e-3  # the same for a solution that somebody else found


class Method:
    """Base of the solvers; each overrides the kinds of problem that it can solve.

    Every kind is called as `(function, z0, *theta, batch_dims=None)`, under no particular grad mode, and returns a
    `Solution` whose value has the shape of `z0`. The first `batch_dims` dimensions of `z0` number independent
    problems (None: all but the last).
    """

    tol: float | None
    max_iter: int

    def accepted(self, dtype: torch.dtype) -> float:
        """The largest relative residual of a problem that counts as solved; None of `tol` means eps^(2/3)."""
        return float(torch.finfo(dtype).eps ** (2 / 3)) if self.tol is None else self.tol

    def root(self, residual: Callable[..., Tensor], z0: Tensor, *theta: Any, batch_dims: int | None = None) -> Solution:
        """Find z with residual(z, *theta) = 0."""
        raise ArgumentTypeError(f"{type(self).__name__} does not solve systems F(z) = 0; use Newton()")

    def fixed_point(
        self, step: Callable[..., Tensor], z0: Tensor, *theta: Any, batch_dims: int | None = None
    ) -> Solution:
        """Find z with z = step(z, *theta)."""
        raise ArgumentTypeError(
            f"{type(self).__name__} does not solve fixed points z = f(z); use Anderson(), FixedPointIteration() or "
            "Newton()"
        )

    def argmin(
        self, objective: Callable[..., Tensor], z0: Tensor, *theta: Any, batch_dims: int | None = None
    ) -> Solution:
        """Find z at which objective(z, *theta), one value a problem, is least."""
        raise ArgumentTypeError(f"{type(self).__name__} does not minimise; use Newton(), LBFGS() or GradientDescent()")


def resolve_batch_dims(z: Tensor, batch_dims: int | None, name: str = "z0") -> int:
    """The number of leading dimensions that number independent problems; by default all but the last.

    Raises:
        ShapeError: there are fewer dimensions than that.
    """
    if batch_dims is None:
        return max(z.ndim - 1, 0)
    if not 0 <= batch_dims <= z.ndim:
        raise ShapeError(f"batch_dims must be between 0 and {z.ndim}, the dimensions of {name}, got {batch_dims}")
    return batch_dims


@dataclass(frozen=True)
class Rows:
    """A tensor of shape (*B, *E) seen as one row of n unknowns a problem, (*B, n)."""

    shape: torch.Size
    batch_dims: int

    @property
    def batch(self) -> torch.Size:
        """*B."""
        return self.shape[: self.batch_dims]

    @property
    def n(self) -> int:
        """Unknowns a problem."""
        return prod(self.shape[self.batch_dims :])

    def flat(self, x: Tensor) -> Tensor:  # (*K, *B, *E) -> (*K, *B, n)
        """As rows."""
        columns = x.shape[: x.ndim - len(self.shape)]
        return x.reshape((*columns, *self.batch, self.n))

    def full(self, y: Tensor) -> Tensor:  # (*K, *B, n) -> (*K, *B, *E)
        """Undo `flat`."""
        columns = y.shape[: y.ndim - self.batch_dims - 1]
        return y.reshape((*columns, *self.shape))

    def residual(self, function: Callable[..., Tensor], theta: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
        """A residual (or a step) as a function of the rows alone."""
        return lambda y: self.flat(function(self.full(y), *theta))

    def objective(self, function: Callable[..., Tensor], theta: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
        """An objective as a function of the rows alone: (*B, n) -> (*B,)."""
        return lambda y: function(self.full(y), *theta)


def norm(y: Tensor) -> Tensor:  # (*B, n) -> (*B,)
    """Euclidean norm of each row."""
    return torch.linalg.vector_norm(y, dim=-1)


class Terms:
    """How large the terms are that cancel in F(z, θ) = 0: the residual is judged relative to this size.

    It is the change of F per relative change of the data, ‖F((1 + hw)·z, (1 + hw′)·θ) − F(z, θ)‖/h with fixed weights
    w, w′ of either sign and h = eps^(1/3): one more evaluation, no derivative, and the same whatever the units of F,
    z and θ.
    """

    def __init__(self, rows: Rows, residual: Callable[..., Tensor], z0: Tensor, theta: tuple[Any, ...]) -> None:
        self._h = float(torch.finfo(z0.dtype).eps ** (1 / 3))
        ramp = torch.arange(1, rows.n + 1, dtype=z0.dtype, device=z0.device) * 0.6180339887498949
        fraction = ramp - ramp.floor()
        self._weights = torch.where(fraction < 0.5, -0.5 - fraction, 0.5 + fraction)  # (n,)
        moved = tuple(
            x * (1 + self._h * (-1) ** i * (0.5 + (0.618 * (i + 1)) % 1))
            if isinstance(x, Tensor) and x.is_floating_point()
            else x
            for i, x in enumerate(theta)
        )
        self._residual = rows.residual(residual, moved)

    def size(self, y: Tensor, F: Tensor) -> Tensor:  # (*B, n), (*B, n) -> (*B,)
        """The size at a point whose residual is F."""
        moved = self._residual(y * (1 + self._h * self._weights))
        size = norm(moved - F) / self._h
        return torch.where(torch.isfinite(size), size, norm(y))


def relative(F: Tensor, size: Tensor, floor: float = FLOOR) -> Tensor:  # (*B, n), (*B,) -> (*B,)
    """‖F‖ relative to the size of its terms; infinite where F is not finite."""
    error = norm(F)
    return torch.where(torch.isfinite(error), error / size.clamp_min(floor), torch.inf)


def tolerance(tol: float | None, dtype: torch.dtype) -> float:
    """The given relative tolerance, or the dtype's: eps^(3/4), 2e-12 in float64 and 6e-6 in float32."""
    return float(torch.finfo(dtype).eps ** 0.75) if tol is None else tol


def outcome(
    rows: Rows, y: Tensor, F: Tensor, size: Tensor, solved: Tensor, iterations: Tensor, tol: float | None
) -> Solution:
    """The solution with its final judgement: solved, or stopped where rounding ends all progress.

    With the default tolerance a problem that stopped short of it still counts as solved within eps^(2/3).
    """
    error = relative(F, size, FINAL_FLOOR)
    accepted = tol if tol is not None else float(torch.finfo(y.dtype).eps ** (2 / 3))
    converged = (error <= accepted) | (solved & (error <= 2 * accepted))
    status = torch.where(converged, int(Status.CONVERGED), int(Status.NOT_CONVERGED)).to(torch.int8)
    return Solution(rows.full(y), SolveInfo(status, converged, iterations, error))
