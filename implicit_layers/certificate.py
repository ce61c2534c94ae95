"""The certificate of a linear solve: its residual by the true operator, and what happens where that is too large."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ConvergenceWarning, SingularAdjointError
from implicit_layers.jacobian import Jacobian, TransposedJacobian
from implicit_layers.linalg import Cholesky, LeastSquares, LinearSolver
from implicit_layers.solution import OnFailure


def certified(
    linear: LinearSolver,
    operator: Jacobian | TransposedJacobian,
    u: Tensor,
    b: Tensor,
    *,
    on_failure: OnFailure,
    what: str,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The solution u of A u = b with zero for the systems that failed, which did not, and the relative residuals."""
    # a zero right-hand side asks for nothing, and gets it even where A is singular; a NaN one is passed on
    nothing = (b == 0).all(-1, keepdim=True)
    spoilt = ~torch.isfinite(b).all(-1, keepdim=True)
    u = torch.where(nothing, 0.0, torch.where(spoilt, torch.nan, u))
    spoilt = spoilt.squeeze(-1)
    error = _linear_error(linear, operator, u, b, operator.batch_shape)
    tol = _agreed(linear, b.dtype)
    ok = spoilt | (error <= tol)
    if not checks.host_bool(ok.all()):
        message = _message(what, "adjoint" if transposed else "tangent", ok, error, tol)
        if on_failure == "raise":
            if isinstance(linear, Cholesky):  # its own error says more
                linear.solve(operator, b, on_failure="raise")
            raise SingularAdjointError(message)
        u, ok = _without_failed(linear, operator, u, b, ok, spoilt, tol)
        if on_failure == "warn":
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
    return u, ok, error


def _agreed(linear: LinearSolver, dtype: torch.dtype) -> float:
    """The relative residual that a linear solve may leave: 64·√eps, or what the solver's `tol` agrees to."""
    tol = getattr(linear, "tol", None)
    return max(64 * float(torch.finfo(dtype).eps ** 0.5), 0.0 if tol is None else 1.01 * float(tol))


def _linear_error(
    linear: LinearSolver, A: Jacobian | TransposedJacobian, u: Tensor, b: Tensor, batch: torch.Size
) -> Tensor:
    """‖A u − b‖/‖b‖ by the true operator, or what rounding hides of it if that is more; infinite where not finite.

    Where b = 0 and u = 0, A u can only differ from zero by a coupling with another problem; there it is measured
    against the largest b of the batch.
    """
    if b.numel() == 0:
        return b.new_zeros(b.shape[:-1])
    r = A.matvec(u) - b
    size = torch.linalg.vector_norm(b, dim=-1)
    nothing = size == 0
    finite = torch.where(torch.isfinite(size), size, 0.0)
    largest = finite.amax(tuple(range(-len(batch), 0)), keepdim=True) if batch else finite
    r = torch.where(nothing[..., None] & ~torch.isfinite(r), 0.0, r)  # 0·NaN, of a problem nobody asks for
    size = torch.where(nothing, largest, size)
    if isinstance(linear, LeastSquares):  # the residual proper may stay, its projection may not
        error = torch.linalg.vector_norm(A.rmatvec(r), dim=-1)
        size = size * torch.linalg.matrix_norm(A.dense())
    else:
        error = torch.linalg.vector_norm(r, dim=-1)
        if A.formed:  # with terms this large in A u, a residual can be small by accident
            terms = torch.linalg.vector_norm((A.dense().abs() @ u.abs().unsqueeze(-1)).squeeze(-1), dim=-1)
            error = torch.maximum(error, torch.where(nothing, 0.0, torch.finfo(b.dtype).eps * terms))
    error = torch.where(error > 0, error / size, error)
    return torch.where(torch.isfinite(error), error, torch.inf)


def _without_failed(
    linear: LinearSolver,
    A: Jacobian | TransposedJacobian,
    u: Tensor,
    b: Tensor,
    ok: Tensor,
    spoilt: Tensor,
    tol: float,
) -> tuple[Tensor, Tensor]:
    """Zero for the failed systems; where that changes the others they are coupled, and all have failed."""
    batch = A.batch_shape
    u = torch.where(ok[..., None], u, 0.0)
    still = _linear_error(linear, A, u, torch.where(ok[..., None], b, 0.0), batch) <= tol
    if not checks.host_bool((still | spoilt).all()):
        return torch.zeros_like(u), torch.zeros_like(ok)
    return u, ok


def _message(what: str, which: str, ok: Tensor, error: Tensor, tol: float) -> str:
    """What a failed linear solve says."""
    where = f"; first: index {checks.index_of(~ok)}" if ok.ndim else ""
    return (
        f"{what}: the {which} system of {int((~ok).sum())} of {ok.numel()} problems could not be solved "
        f"(relative residual {float(error[~ok][0]):.1e} > {tol:.1e}{where}). Either the Jacobian dF/dz is singular "
        "there, so that the derivative does not exist or is not unique (see check_ift; linear_solver=LeastSquares() "
        "gives its minimum-norm element), or the problems of the batch are coupled, i.e. F of one depends on z of "
        "another (pass batch_dims=0 to solve them as one), or an iterative linear solver needs a larger max_iter."
    )
