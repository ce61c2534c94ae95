"""What a solve returns, and the one place that turns failed problems into an error or a warning."""

from __future__ import annotations

import warnings
from enum import IntEnum
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import (
    ConvergenceError,
    ConvergenceWarning,
    InfeasibleError,
    SingularAdjointError,
    SolveError,
    UnboundedError,
)

OnFailure = Literal["raise", "warn", "ignore"]


class Status(IntEnum):
    """How the solve of one problem ended; `SolveInfo.status` holds these numbers."""

    CONVERGED = 0
    NOT_CONVERGED = 1
    INFEASIBLE = 2
    UNBOUNDED = 3
    SINGULAR = 4


class SolveInfo(NamedTuple):
    """How a solve went, one entry a problem: every field has the batch shape (*B,)."""

    status: Tensor  # (*B,) int8, the numbers of `Status`
    converged: Tensor  # (*B,) bool
    iterations: Tensor  # (*B,) int64
    residual: Tensor  # (*B,) relative residual at the returned point, in the dtype of the solution


class Solution(NamedTuple):
    """A solution and how it was found."""

    value: Tensor
    info: SolveInfo


class QPSolution(NamedTuple):
    """A solution of a quadratic program: primal, duals, slack, and how it was found."""

    z: Tensor  # (*B, n)
    nu: Tensor  # (*B, n_eq), duals of A z = b
    lam: Tensor  # (*B, n_ineq), duals of G z <= h, never negative
    s: Tensor  # (*B, n_ineq), slack h - G z, never negative beyond rounding
    info: SolveInfo


_ERRORS: dict[Status, tuple[type[SolveError], str, str]] = {
    Status.INFEASIBLE: (
        InfeasibleError,
        "have no feasible point (a combination of the constraints contradicts itself)",
        "Relax the right-hand sides, or pass on_failure='warn' to go on with zero gradient for these problems.",
    ),
    Status.UNBOUNDED: (
        UnboundedError,
        "have an objective that decreases without limit",
        "Bound the feasible set or make the objective strictly convex.",
    ),
    Status.SINGULAR: (
        SingularAdjointError,
        "have a singular system",
        "Remove dependent constraints or regularise the problem.",
    ),
    Status.NOT_CONVERGED: (
        ConvergenceError,
        "did not converge",
        "Raise max_iter, rescale the data, start nearer, or pass on_failure='warn' to get the last iterate.",
    ),
}


def check_on_failure(on_failure: str) -> None:
    """Refuse anything but the three policies."""
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"on_failure must be one of {get_args(OnFailure)}, got {on_failure!r}")


def report_failure(info: SolveInfo, on_failure: OnFailure, *, what: str, tol: float, max_iter: int) -> None:
    """Raise or warn when problems of the batch failed; costs one host synchronisation, none with "ignore".

    Args:
        info: the outcome, one entry a problem, not under a functional transform.
        on_failure: "raise", "warn" or "ignore".
        what: the operation, for the message.
        tol, max_iter: the settings of the solver, for the message.

    Raises:
        ConvergenceError, InfeasibleError, UnboundedError, SingularAdjointError: the kind of the first failed problem.
    """
    if on_failure == "ignore" or checks.host_bool(info.converged.all()):
        return
    failed = (~info.converged).nonzero()
    first = tuple(failed[0].tolist())
    status = Status(int(info.status[first]))
    error, happened, advice = _ERRORS[status]
    same = int((info.status == status).sum())
    where = f" (first: index {first[0] if len(first) == 1 else first}" if first else " ("
    residual = float(info.residual[first].to(torch.float64))
    message = (
        f"{what}: {same} of {info.converged.numel()} problems {happened}{where}"
        f"{', ' if first else ''}residual {residual:.1e}, tol {tol:.1e}, "
        f"{int(info.iterations[first])} of {max_iter} iterations). {advice}"
    )
    if on_failure == "raise":
        raise error(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
