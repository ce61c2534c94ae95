"""Linear solvers: A x = rhs for a batch of independent systems, the operator seen only through its products or blocks.

A linear solver is a frozen dataclass with one method, `solve(operator, rhs, on_failure=...)`. The operator offers
`matvec` (A v), `rmatvec` (Aᵀ v), `dense()` (the blocks, (*B, n, n)), `batch_shape` and `n`; rhs and the result are
(*K, *B, n), K being further right-hand sides for the same operator. Direct methods are here, iterative ones in
`krylov`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentError, NotPositiveDefiniteError, ShapeError, SingularAdjointError
from implicit_layers.solution import OnFailure

DENSE_LIMIT = 512  # unknowns a problem up to which the default forms the Jacobian
_QR_LIMIT = 48  # unknowns up to which a batched QR is faster on the CPU than one LU after the other


class Operator(Protocol):
    """A linear map of (*K, *B, n) tensors, block diagonal over the batch."""

    @property
    def batch_shape(self) -> torch.Size: ...  # noqa: D102
    @property
    def n(self) -> int: ...  # noqa: D102
    def matvec(self, v: Tensor) -> Tensor: ...  # noqa: D102
    def rmatvec(self, v: Tensor) -> Tensor: ...  # noqa: D102
    def dense(self) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class Matrix:
    """An operator given by its blocks; for using the linear solvers on matrices one has.

    >>> Direct().solve(Matrix(2.0 * torch.eye(2)), torch.ones(2))
    tensor([0.5000, 0.5000])
    """

    blocks: Tensor  # (*B, n, n)

    def __post_init__(self) -> None:
        checks.floating_tensors(blocks=self.blocks)
        if self.blocks.ndim < 2 or self.blocks.shape[-1] != self.blocks.shape[-2]:
            raise ShapeError(f"blocks must have shape (*B, n, n), got {tuple(self.blocks.shape)}")

    @property
    def batch_shape(self) -> torch.Size:
        """*B."""
        return self.blocks.shape[:-2]

    @property
    def n(self) -> int:
        """Unknowns a problem."""
        return self.blocks.shape[-1]

    def matvec(self, v: Tensor) -> Tensor:  # (*K, *B, n) -> (*K, *B, n)
        """A v."""
        return (self.blocks @ v.unsqueeze(-1)).squeeze(-1)

    def rmatvec(self, v: Tensor) -> Tensor:  # (*K, *B, n) -> (*K, *B, n)
        """Aᵀ v."""
        return (self.blocks.mT @ v.unsqueeze(-1)).squeeze(-1)

    def dense(self) -> Tensor:  # (*B, n, n)
        """The blocks."""
        return self.blocks


class LinearSolver:
    """Base of the linear solvers. One that has a field `tol` also says by it which relative residual is agreed to."""

    def solve(self, operator: Operator, rhs: Tensor, *, on_failure: OnFailure = "raise") -> Tensor:
        """Solve A x = rhs.

        Args:
            operator:    A, as described in this module's docstring, or a `Matrix`.
            rhs:         (*K, *B, n).
            on_failure:  with "raise" a system without a solution raises; else its entries of the result are NaN or
                         the last iterate, and the others are untouched.

        Returns:  x, with the shape of `rhs`.
        Raises:   SingularAdjointError or NotPositiveDefiniteError: names the first system that has no solution.
        """
        raise NotImplementedError


def columns_last(operator: Operator, rhs: Tensor) -> Tensor:  # (*K, *B, n) -> (*B, n, prod K)
    """The right-hand sides as the columns of one matrix a problem."""
    kept = len(operator.batch_shape) + 1
    flat = rhs.reshape(prod(rhs.shape[: rhs.ndim - kept]), *rhs.shape[rhs.ndim - kept :])
    return flat.movedim(0, -1)


def columns_first(x: Tensor, rhs: Tensor) -> Tensor:  # (*B, n, prod K) -> (*K, *B, n)
    """Undo `columns_last`."""
    return x.movedim(-1, 0).reshape(rhs.shape)


def refuse(bad: Tensor, message: str, error: type[Exception] = SingularAdjointError) -> None:
    """Raise, naming the first bad system of the batch, if there is one."""
    if checks.host_bool(bad.any()):
        where = f", first at index {checks.index_of(bad)}" if bad.ndim else ""
        raise error(f"{message}: {int(bad.sum())} of {bad.numel()} systems{where}")


def _by_lu(A: Tensor, b: Tensor) -> Tensor:  # (*B, n, n), (*B, n, k) -> (*B, n, k)
    """LU with one step of refinement; not finite where A is singular."""
    LU, pivots, _ = torch.linalg.lu_factor_ex(A)
    x = torch.linalg.lu_solve(LU, pivots, b)
    return x + torch.linalg.lu_solve(LU, pivots, b - A @ x)


@dataclass(frozen=True)
class Direct(LinearSolver):
    """Dense factorisation of each block, LU or (a batch of small ones on the CPU) QR, with one step of refinement.

    Cost:  n products to form each block, then O(n³) a problem; every right-hand side reuses the factor.

    >>> Direct().solve(Matrix(torch.tensor([[0.0, 2.0], [1.0, 0.0]])), torch.tensor([2.0, 3.0]))
    tensor([3., 1.])
    """

    def solve(self, operator: Operator, rhs: Tensor, *, on_failure: OnFailure = "raise") -> Tensor:
        """See `LinearSolver.solve`; a singular block gives a result that is not finite."""
        A, b = operator.dense(), columns_last(operator, rhs)
        if b.numel() == 0:
            return torch.zeros_like(rhs)
        if operator.n == 1:
            x = b / A
        elif A.is_cuda:
            x = _by_lu(A, b)
        elif prod(A.shape[:-2]) == 1 or operator.n > _QR_LIMIT:
            # one matrix at a time: batched LU hangs on some CPU builds of PyTorch
            matrices, columns = A.reshape(-1, *A.shape[-2:]), b.reshape(-1, *b.shape[-2:])
            x = torch.stack([_by_lu(M, c) for M, c in zip(matrices, columns, strict=True)]).reshape(b.shape)
        else:
            Q, R = torch.linalg.qr(A)
            x = torch.linalg.solve_triangular(R, Q.mT @ b, upper=True)
            x = x + torch.linalg.solve_triangular(R, Q.mT @ (b - A @ x), upper=True)
        if on_failure == "raise":
            bad = torch.isfinite(b).all(-2) & ~torch.isfinite(x).all(-2)
            refuse(bad.any(-1), "Direct: the matrix is singular")
        return columns_first(x, rhs)


@dataclass(frozen=True)
class Cholesky(LinearSolver):
    """Dense Cholesky factorisation of each symmetric positive definite block, one step of refinement.

    Cost:  n products to form each block, then n³/3 a problem; every right-hand side reuses the factor.

    >>> Cholesky().solve(Matrix(torch.tensor([[4.0, 0.0], [0.0, 1.0]])), torch.tensor([2.0, 3.0]))
    tensor([0.5000, 3.0000])
    """

    def solve(self, operator: Operator, rhs: Tensor, *, on_failure: OnFailure = "raise") -> Tensor:
        """See `LinearSolver.solve`; a block that is not positive definite gives NaN."""
        A, b = operator.dense(), columns_last(operator, rhs)
        if b.numel() == 0:
            return torch.zeros_like(rhs)
        A = 0.5 * (A + A.mT)
        L, failed = torch.linalg.cholesky_ex(A)
        # a pivot that is nothing but rounding: singular, whatever sign it happened to get
        diagonal = A.diagonal(dim1=-2, dim2=-1).abs()
        pivot = L.diagonal(dim1=-2, dim2=-1) ** 2
        rounding = 4 * operator.n * torch.finfo(A.dtype).eps * diagonal
        bad = (failed > 0) | (pivot <= rounding).any(-1)
        if on_failure == "raise":
            refuse(
                bad,
                "Cholesky: the matrix is not positive definite (no strict minimum there?). Regularise the problem, or "
                "pass linear_solver=Direct() if a stationary point is all that is wanted",
                NotPositiveDefiniteError,
            )
        x = torch.cholesky_solve(b, L)
        x = x + torch.cholesky_solve(b - A @ x, L)
        return columns_first(x.masked_fill(bad[..., None, None], torch.nan), rhs)


@dataclass(frozen=True)
class LeastSquares(LinearSolver):
    """The minimum-norm least-squares solution by the singular value decomposition; defined for singular blocks too.

    Attributes:
        rcond: singular values below `rcond` times the largest count as zero; None: n times the machine precision.

    Cost:  n products to form each block, then O(n³), about ten times that of `Direct`.

    >>> LeastSquares().solve(Matrix(torch.ones(2, 2)), torch.ones(2))
    tensor([0.5000, 0.5000])
    """

    rcond: float | None = None

    def __post_init__(self) -> None:
        if self.rcond is not None and not 0 <= checks.number("rcond", self.rcond) < 1:
            raise ArgumentError(f"rcond must be at least 0 and below 1, got {self.rcond}")

    def solve(self, operator: Operator, rhs: Tensor, *, on_failure: OnFailure = "raise") -> Tensor:
        """See `LinearSolver.solve`; a block that is not finite gives NaN."""
        A, b = operator.dense(), columns_last(operator, rhs)
        if b.numel() == 0:
            return torch.zeros_like(rhs)
        bad = ~torch.isfinite(A).all(-1).all(-1)
        if on_failure == "raise":
            refuse(bad, "LeastSquares: the matrix is not finite")
        U, S, Vh = torch.linalg.svd(A.masked_fill(bad[..., None, None], 0.0))
        rcond = self.rcond if self.rcond is not None else operator.n * torch.finfo(A.dtype).eps
        kept = (rcond * S[..., :1] < S) & (S > 0)
        inverse = torch.where(kept, 1 / torch.where(kept, S, 1.0), 0.0)
        x = Vh.mT @ (inverse.unsqueeze(-1) * (U.mT @ b))
        return columns_first(x.masked_fill(bad[..., None, None], torch.nan), rhs)
