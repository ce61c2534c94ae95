r"""The projection onto the Birkhoff polytope, the doubly stochastic matrices.

Y = (X − u1ᵀ − 1vᵀ)₊ with duals u, v that make all sums 1. They are found by semismooth Newton, unseen by autograd. With
Z = 1[Y > 0] fixed, u and v solve a linear system with a constant matrix,

    diag(Z1) u + Z v = (Z∘X)1 − 1,    Zᵀu + diag(Zᵀ1) v = (Z∘X)ᵀ1 − 1,

so it is solved once more on the graph, and autograd gives every derivative of any order. The system is singular: each
connected component of Z lets a constant move from its u to its v, which does not change Y. A rank-one term for each
component fixes it.

Where entries are so large that X − u − v loses the digits that count, it is computed to twice the precision, and the
projection is found again, of that: it differs from X by a shift of the duals alone, and is small wherever Y > 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentTypeError, ShapeError
from implicit_layers.opaque import opaque
from implicit_layers.projections.door import Rule, enforce, finite, kept_within, rows
from implicit_layers.solution import OnFailure, SolveInfo, Status, check_on_failure, report_failure
from implicit_layers.solvers.semismooth_newton import SemismoothNewton

_OFF = 1e-6  # the most that a row or column sum may be off by
_SPREAD = 1e9  # of the entries, to which they are scaled down
_ROUNDS = 100  # of a projection found again
_FINE = 1e-10  # rounding of the sums below which that is not needed
_FAR = 1e2  # times what is left of the entries that count, below which an entry is not looked at again
_TOO_LARGE = (
    "The entries of X are so large beside 1 that float64 cannot resolve sums of 1 among their differences; scale X "
    "down (a temperature), or take a linear assignment, which is what the projection of so large an X is."
)


def birkhoff(
    X: Tensor,  # (*B, n, n)
    *,
    mask: Tensor | None = None,  # (*B, n, n)
    solver: SemismoothNewton | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:  # (*B, n, n)
    r"""Project onto the Birkhoff polytope: a soft permutation matrix with exact zeros.

    Problem:  Y* = argmin_Y ½‖Y − X‖²_F  subject to  Y ≥ 0, Y1 = 1, Yᵀ1 = 1.
              With X = scores/τ: argmax_Y ⟨scores, Y⟩ − τ/2 ‖Y‖², a soft assignment.

    Args:
        X: matrices, (*B, n, n).
        mask: boolean, broadcasts with `X`, False where an assignment is forbidden: Y = 0 there, with zero gradient.
        solver: a `SemismoothNewton`; default `SemismoothNewton()`.
        on_failure: "raise", or "warn" / "ignore": problems that fail keep their last iterate and get zero gradient;
            their neighbours are untouched.

    Returns:  Y*, with the dtype and device of X; exact zeros. Computed in float64 inside.
    Gradient: with Z the indicator of Y > 0 and G the incoming gradient, Z∘(G − a1ᵀ − 1bᵀ), where a, b make its row and
              column sums zero. Where Z changes, this is one generalised Jacobian (an entry that has just become zero
              does not count as positive). Any order.
    Raises:   ConvergenceError: the sums stayed farther from 1 than the tolerance, or than 1e-6 by rounding.
              InfeasibleError: `mask` allows no permutation.  ArgumentError: it leaves a row or column without entries.
              NonFiniteError: X is not finite.  DtypeError, DeviceError, ShapeError: X is no tensor of square matrices,
              or `mask` does not fit.
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
    points, kept = rows(X, -1).masked(mask)
    X = points.back(points.x)
    open_ = () if kept is None else (kept,)
    enforce(finite("X", X), *(rule for t in open_ for rule in _no_row_is_empty(t)))

    def solve(X: Tensor, *open_: Tensor) -> tuple[Tensor, ...]:
        batch, n = X.shape[:-2], X.shape[-1]
        flat = [t.reshape(-1, n, n) if t.numel() else t.new_zeros(0, n, n) for t in (X, *open_)]
        reduced, u, v, info = _solved(solver, flat[0], flat[1] if open_ else None)
        report_failure(
            SolveInfo(*(t.reshape(batch) for t in info)),
            on_failure,
            what="birkhoff",
            tol=solver.tol,
            max_iter=solver.max_iter,
        )
        return reduced.reshape(X.shape), u.reshape(*batch, n), v.reshape(*batch, n), info.converged.reshape(batch)

    work = X.to(torch.float64)
    reduced, u, v, converged = opaque(solve, work, *open_)
    work = reduced + (work - work.detach())
    Y = _attached(work, u, v, converged, kept)

    def judge(Y: Tensor, converged: Tensor) -> tuple[Tensor]:
        off = ((Y.sum(-1) - 1).abs() + (Y.sum(-2) - 1).abs()).amax(-1)
        good = ~converged.bool() | (off <= _OFF)  # those that failed before have been reported
        status = torch.where(good, int(Status.CONVERGED), int(Status.NOT_CONVERGED)).to(torch.int8)
        info = SolveInfo(status, good, torch.zeros_like(status, dtype=torch.int64), off)
        report_failure(info, on_failure, what="birkhoff", tol=_OFF, max_iter=None, advice=_TOO_LARGE)
        return (good,)

    (good,) = opaque(judge, Y, converged)
    return torch.where(good[..., None, None], Y, Y.detach()).to(points.dtype)


def _no_row_is_empty(mask: Tensor) -> list[Rule]:  # (*B, n, n)
    """Every row and every column has an entry."""
    must = "must leave at least one entry of each"
    return [Rule("mask", mask.sum(dim), lambda v: v > 0, f"{must} {of}") for dim, of in ((-1, "row"), (-2, "column"))]


def _solved(
    solver: SemismoothNewton, X: Tensor, open_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, SolveInfo]:  # (N, n, n), (N, n, n) -> (N, n, n), (N, n), (N, n)
    """X less a shift of the duals, the duals of that, and how it went.

    Entries too far apart for the solver are scaled down; where that already has a permutation as its answer, it is the
    answer, and else X less the duals found is not so far apart any more.
    """
    rows, columns = X.mean(-1), X.mean(-2)
    reduced = _less(X, rows - rows.mean(-1, keepdim=True), columns)
    near, again = reduced, torch.ones_like(X[:, :1, :1], dtype=torch.bool)
    one = X[:, 0, 0]
    info = SolveInfo(*(torch.zeros_like(one, dtype=t) for t in (torch.int8, torch.bool, torch.int64, one.dtype)))
    u, v = torch.zeros_like(rows), torch.zeros_like(columns)
    for _ in range(_ROUNDS):
        spread = near.abs().amax((-2, -1), keepdim=True)
        scale = _SPREAD / spread.clamp(min=_SPREAD)
        du, dv, new = solver.solve(scale * near, open_)
        failed = again & ~new.converged[:, None, None]
        rounding = torch.finfo(X.dtype).eps * X.shape[-1] * spread
        done = again & (failed | ((scale == 1) & (rounding <= _FINE)))
        u, v = torch.where(again[:, 0], du / scale[:, 0], u), torch.where(again[:, 0], dv / scale[:, 0], v)
        info = SolveInfo(*(torch.where(again[:, 0, 0], x, y) for x, y in zip(new, info, strict=True)))
        again = again & ~done
        if not checks.host_bool(again.any()):
            break
        reduced = torch.where(again, _less(reduced, u, v), reduced)
        u, v = torch.where(again[:, 0], 0.0, u), torch.where(again[:, 0], 0.0, v)
        least = -_FAR * X.shape[-1] * (1 / scale + rounding)
        near = torch.where(again, torch.maximum(reduced, least), 0.0)  # the others: nothing to do
    return reduced, u, v, info


def _less(X: Tensor, u: Tensor, v: Tensor) -> Tensor:  # (N, n, n), (N, n), (N, n) -> (N, n, n)
    """X − u1ᵀ − 1vᵀ to twice the precision, rounded once."""
    total, lost = X, torch.zeros_like(X)
    for t in (-u.unsqueeze(-1), -v.unsqueeze(-2)):
        new = total + t
        back = new - total
        lost = lost + ((total - (new - back)) + (t - back))  # exactly what the sum has lost
        total = new
    return total + lost


def _attached(X: Tensor, u: Tensor, v: Tensor, converged: Tensor, kept: Tensor | None) -> Tensor:
    """The projection as a function of X, on the support that the duals tell."""
    plain = X.detach() - u.unsqueeze(-1) - v.unsqueeze(-2)
    if kept is not None:
        plain = torch.where(kept, plain, 0.0)
    duals = u.abs().amax(-1)[..., None, None] + v.abs().amax(-1)[..., None, None]
    rounding = 16 * torch.finfo(X.dtype).eps * (1 + X.detach().abs() + duals)
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
