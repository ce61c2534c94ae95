r"""Semismooth Newton on the dual of a projection onto the Birkhoff polytope.

The dual of  min ½‖Y − X‖²  subject to  Y ≥ 0, Y1 = 1, Yᵀ1 = 1  is the unconstrained, convex, once differentiable

    min over u, v of  D = ½ ‖(X − u1ᵀ − 1vᵀ)₊‖² + 1ᵀu + 1ᵀv,   Y = (X − u1ᵀ − 1vᵀ)₊,   ∇D = (1 − Y1, 1 − Yᵀ1).

∇D is piecewise linear, with the generalised Jacobian [diag(Z1), Z; Zᵀ, diag(Zᵀ1)], Z = 1[Y > 0], positive semidefinite.
A damping proportional to ‖∇D‖ makes it definite; columns are eliminated, and a Cholesky factorisation does the rest.

Where the entries of X are far apart, Y is nearly a permutation and the dual nearly polyhedral, on which Newton creeps.
So each problem starts with X scaled down, and the duals are scaled up with it whenever the sums are nearly right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.solution import SolveInfo, Status
from implicit_layers.solvers.scaling import contradicted

_ARMIJO = 1e-4
_HALVINGS = 30
_FIRST_SPREAD = 10.0
_GROWTH = 4.0
_NEARLY = 1e-2


class _State(NamedTuple):
    """Where the iteration is."""

    u: Tensor  # (N, n)
    v: Tensor  # (N, n)
    Y: Tensor  # (N, n, n)
    missing_rows: Tensor  # (N, n)
    missing_columns: Tensor  # (N, n)
    dual: Tensor  # (N,)


@dataclass(frozen=True)
class SemismoothNewton:
    """Newton on the dual of the projection onto the Birkhoff polytope, with an Armijo line search.

    Args:
        tol: on the largest error of a row or column sum; raised to rounding where the entries of X are very large.
        max_iter: Newton steps.
    """

    tol: float = 1e-10
    max_iter: int = 200

    def __post_init__(self) -> None:
        checks.stopping(self.tol, self.max_iter)

    def solve(
        self, X: Tensor, open_: Tensor | None = None
    ) -> tuple[Tensor, Tensor, SolveInfo]:  # (N, n, n), (N, n, n) bool -> (N, n), (N, n)
        """The duals u and v, and how it went; X is finite, has rows and columns of mean zero, and is in float64.

        Entries that are not open are held at zero. Where that leaves no doubly stochastic matrix the duals run off, in
        a direction that proves it.
        """
        spread = X.abs().amax((-2, -1)).unsqueeze(-1)
        rounding = torch.finfo(X.dtype).eps * X.shape[-1] * spread.squeeze(-1)
        scale = (_FIRST_SPREAD / spread.clamp(min=_FIRST_SPREAD)).clamp(min=torch.finfo(X.dtype).tiny)
        iterations = torch.zeros(len(X), dtype=torch.int64, device=X.device)
        start = X.new_full(X.shape[:-1], -0.5 / X.shape[-1])  # exact where Y > 0
        state = _evaluate(X, open_, start, start, scale)
        for _ in range(self.max_iter):
            error, final = _error(state), (scale == 1).squeeze(-1)
            done = error <= torch.where(final, rounding.clamp(min=self.tol), _NEARLY)
            if checks.host_bool((done & final).all()):
                break
            growth = torch.where(done.unsqueeze(-1), (1 / scale).clamp(max=_GROWTH), 1.0)
            scale = torch.where(growth < _GROWTH, torch.where(done.unsqueeze(-1), 1.0, scale), scale * growth)
            state = _evaluate(X, open_, growth * state.u, growth * state.v, scale)
            state = _line_search(X, open_, scale, state, *_direction(state, _error(state)), ~(done & final))
            iterations += ~(done & final)
        error = _error(state)
        converged = (error <= rounding.clamp(min=self.tol)) & (scale == 1).squeeze(-1)
        status = torch.where(converged, int(Status.CONVERGED), int(Status.NOT_CONVERGED))
        if open_ is not None:
            one = torch.ones_like(state.u)
            none = contradicted(open_, one, one, -state.v) | contradicted(open_.mT, one, one, -state.u)
            status = torch.where(none & ~converged, int(Status.INFEASIBLE), status)
        status = status.to(torch.int8)
        info = SolveInfo(status, converged, iterations, error)
        return state.u / scale, state.v / scale, info


def _evaluate(X: Tensor, open_: Tensor | None, u: Tensor, v: Tensor, scale: Tensor) -> _State:
    """The plan for scale · X, what its sums lack, and the value of the dual."""
    Y = (scale.unsqueeze(-1) * X - u.unsqueeze(-1) - v.unsqueeze(-2)).relu()
    Y = Y if open_ is None else torch.where(open_, Y, 0.0)
    dual = 0.5 * Y.square().sum((-2, -1)) + u.sum(-1) + v.sum(-1)
    return _State(u, v, Y, 1 - Y.sum(-1), 1 - Y.sum(-2), dual)


def _error(state: _State) -> Tensor:  # (N,)
    """The largest error of a row or column sum; infinite for NaN."""
    error = torch.maximum(state.missing_rows.abs().amax(-1), state.missing_columns.abs().amax(-1))
    return error.nan_to_num(nan=torch.inf)


def _direction(state: _State, error: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's step: minus the damped generalised Jacobian's inverse times the gradient."""
    Z = (state.Y > 0).to(state.Y.dtype)
    damping = (1e-3 * error.clamp(max=1.0)).clamp(min=1e-12).unsqueeze(-1)
    rows, columns = Z.sum(-1) + damping, Z.sum(-2) + damping
    across = Z / columns.unsqueeze(-2)
    schur = torch.diag_embed(rows) - across @ Z.mT
    right = state.missing_rows - (across @ state.missing_columns.unsqueeze(-1)).squeeze(-1)
    factor, _ = torch.linalg.cholesky_ex(schur)
    du = -torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    dv = -(state.missing_columns + (Z.mT @ du.unsqueeze(-1)).squeeze(-1)) / columns
    return du, dv


def _line_search(
    X: Tensor, open_: Tensor | None, scale: Tensor, state: _State, du: Tensor, dv: Tensor, active: Tensor
) -> _State:
    """Halve the step of each problem until the dual decreases enough; problems that are done stay."""
    slope = (state.missing_rows * du).sum(-1) + (state.missing_columns * dv).sum(-1)
    slack = 1e-15 * (state.dual.abs() + 1)
    step = active.to(X.dtype)
    new = state
    for _ in range(_HALVINGS):
        new = _evaluate(X, open_, state.u + step.unsqueeze(-1) * du, state.v + step.unsqueeze(-1) * dv, scale)
        enough = (new.dual <= state.dual + _ARMIJO * step * slope + slack) | ~active
        if checks.host_bool(enough.all()):
            break
        step = torch.where(enough, step, 0.5 * step)
    return new
