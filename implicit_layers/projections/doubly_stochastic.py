r"""The projection onto the Birkhoff polytope, the doubly stochastic matrices.

Y = (X − u1ᵀ − 1vᵀ)₊ with duals u, v that make all sums 1. They are found by semismooth Newton, unseen by autograd. With
Z = 1[Y > 0] fixed, u and v solve a linear system with a constant matrix,

    diag(Z1) u + Z v = (Z∘X)1 − 1,    Zᵀu + diag(Zᵀ1) v = (Z∘X)ᵀ1 − 1,

so it is solved once more on the graph, and autograd gives every derivative of any order. The system is singular: each
connected component of Z lets a constant move from its u to its v, which does not change Y. A rank-one term for each
component fixes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentTypeError, ShapeError
from implicit_layers.opaque import opaque
from implicit_layers.projections.door import enforce, finite, kept_within
from implicit_layers.solution import OnFailure, SolveInfo, Status, check_on_failure, report_failure
from implicit_layers.solvers.semismooth_newton import SemismoothNewton

_OFF = 1e-6  # the most that a row or column sum may be off by
_TOO_LARGE = (
    "The entries of X are so large beside 1 that float64 cannot resolve sums of 1 among their differences; scale X "
    "down (a temperature), or take a linear assignment, which is what the projection of so large an X is."
)


def birkhoff(
    X: Tensor, *, solver: SemismoothNewton | None = None, on_failure: OnFailure = "raise"
) -> Tensor:  # (*B, n, n) -> (*B, n, n)
    r"""Project onto the Birkhoff polytope: a soft permutation matrix with exact zeros.

    Problem:  Y* = argmin_Y ½‖Y − X‖²_F  subject to  Y ≥ 0, Y1 = 1, Yᵀ1 = 1.
              With X = scores/τ: argmax_Y ⟨scores, Y⟩ − τ/2 ‖Y‖², a soft assignment.

    Args:
        X: matrices, (*B, n, n).
        solver: a `SemismoothNewton`; default `SemismoothNewton()`.
        on_failure: "raise", or "warn" / "ignore": problems that fail keep their last iterate and get zero gradient;
            their neighbours are untouched.

    Returns:  Y*, with the dtype and device of X; exact zeros. Computed in float64 inside.
    Gradient: with Z the indicator of Y > 0 and G the incoming gradient, Z∘(G − a1ᵀ − 1bᵀ), where a, b make its row and
              column sums zero. Where Z changes, this is one generalised Jacobian (an entry that has just become zero
              does not count as positive). Any order.
    Raises:   ConvergenceError: the sums stayed farther from 1 than the tolerance, or than 1e-6 by
              rounding, which is where X is very large.  NonFiniteError: X is not finite.
              DtypeError, ShapeError: X is no tensor of square matrices.
    Cost:     O(n³) time an iteration, 10 to 30 of them; O(n²) memory.
    Source:   Li, Sun & Toh (2020), On the efficient computation of a generalized Jacobian of the projector over the
              Birkhoff polytope, arXiv:1702.05934.

    >>> birkhoff(torch.tensor([[1.0, 0.5], [0.0, 0.3]]))
    tensor([[0.7000, 0.3000],
            [0.3000, 0.7000]])
    """
    check_on_failure(on_failure)
    solver = SemismoothNewton() if solver is None else solver
    if not isinstance(solver, SemismoothNewton):
        raise ArgumentTypeError(f"birkhoff: solver must be a SemismoothNewton, got {solver!r}")
    checks.floating_tensors(X=X)
    if X.ndim < 2 or X.shape[-1] != X.shape[-2] or X.shape[-1] == 0:
        raise ShapeError(f"X must have shape (*B, n, n) with n ≥ 1, got {tuple(X.shape)}")
    enforce(finite("X", X))

    def solve(X: Tensor) -> tuple[Tensor, ...]:
        batch, n = X.shape[:-2], X.shape[-1]
        u, v, info = solver.solve(X.reshape(-1, n, n) if X.numel() else X.new_zeros(0, n, n))
        report_failure(
            SolveInfo(*(t.reshape(batch) for t in info)),
            on_failure,
            what="birkhoff",
            tol=solver.tol,
            max_iter=solver.max_iter,
        )
        return u.reshape(*batch, n), v.reshape(*batch, n), info.converged.reshape(batch)

    work = X.to(torch.float64)
    work = work - _means(work.detach())  # a shift of the duals; without it large rows would cost digits
    u, v, converged = opaque(solve, work)
    Y = _attached(work, u, v, converged)

    def judge(Y: Tensor, converged: Tensor) -> tuple[Tensor]:
        off = ((Y.sum(-1) - 1).abs() + (Y.sum(-2) - 1).abs()).amax(-1)
        good = ~converged.bool() | (off <= _OFF)  # those that failed before have been reported
        status = torch.where(good, int(Status.CONVERGED), int(Status.NOT_CONVERGED)).to(torch.int8)
        info = SolveInfo(status, good, torch.zeros_like(status, dtype=torch.int64), off)
        report_failure(info, on_failure, what="birkhoff", tol=_OFF, max_iter=None, advice=_TOO_LARGE)
        return (good,)

    (good,) = opaque(judge, Y, converged)
    return torch.where(good[..., None, None], Y, Y.detach()).to(X.dtype)


def _means(X: Tensor) -> Tensor:  # (*B, n, n) -> (*B, n, n)
    """The mean of each row and column, added up, so that X minus this has means zero."""
    return X.mean(-1, keepdim=True) + X.mean(-2, keepdim=True) - X.mean((-2, -1), keepdim=True)


def _attached(X: Tensor, u: Tensor, v: Tensor, converged: Tensor) -> Tensor:
    """The projection as a function of X, on the support that the duals tell."""
    plain = X.detach() - u.unsqueeze(-1) - v.unsqueeze(-2)
    rounding = 16 * torch.finfo(X.dtype).eps * (1 + X.detach().abs().amax((-2, -1), keepdim=True))
    Z = (plain > rounding).to(X.dtype)
    rows, columns = Z.sum(-1).clamp(min=1), Z.sum(-2).clamp(min=1)  # zero only in a failed problem
    across = Z / columns.unsqueeze(-2)
    laplacian = torch.diag_embed(rows) - across @ Z.mT
    factor, _ = torch.linalg.cholesky_ex(laplacian + _component_projector(across @ Z.mT))
    right_rows, right_columns = (Z * X).sum(-1) - 1, (Z * X).sum(-2) - 1
    right = right_rows - (across @ right_columns.unsqueeze(-1)).squeeze(-1)
    u = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    v = (right_columns - (Z.mT @ u.unsqueeze(-1)).squeeze(-1)) / columns
    Y = kept_within(Z * (X - u.unsqueeze(-1) - v.unsqueeze(-2)), 0.0)
    return torch.where(converged[..., None, None], Y, plain.relu())


def _component_projector(linked: Tensor) -> Tensor:  # (*B, n, n) -> (*B, n, n)
    """The orthogonal projector onto the constants of each connected component of rows; `linked` > 0 joins two rows."""
    n = linked.shape[-1]
    reach = ((linked > 0) | torch.eye(n, dtype=torch.bool, device=linked.device)).to(linked.dtype)
    for _ in range((n - 1).bit_length()):  # paths of 2, 4, 8, ... links
        reach = (reach @ reach > 0).to(linked.dtype)
    return reach / reach.sum(-1, keepdim=True)
