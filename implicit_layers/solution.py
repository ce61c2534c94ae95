"""What a solve returns, and the one place that turns failed problems into an error or a warning."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import (
    ArgumentError,
    ConvergenceError,
    ConvergenceWarning,
    InfeasibleError,
    SingularAdjointError,
    SolveError,
    UnboundedError,
    warn,
)

OnFailure = Literal["raise", "warn", "ignore"]
_POLICIES = get_args(OnFailure)  # asked once: the compiler of older PyTorch cannot


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


class QPInfo(NamedTuple):
    """How the solve of quadratic programs went; the fields of `SolveInfo` first, all of shape (*B,)."""

    status: Tensor  # (*B,) int8, the numbers of `Status`
    converged: Tensor  # (*B,) bool
    iterations: Tensor  # (*B,) int64, of the interior point or the search before it; 0 where none was needed
    residual: Tensor  # (*B,) relative KKT residual at the returned point, in the dtype of the solution
    degenerate: Tensor  # (*B,) int8, the flags of `Degeneracy`: not 0 where the derivative is not unique
    condition: Tensor  # (*B,) estimated condition number of the linear system that gives the derivative


class Degeneracy(IntFlag):
    """Why the derivative of a quadratic program's solution is not unique; `QPInfo.degenerate` holds these flags."""

    NONE = 0
    WEAK = 1  # an inequality is only just active: no dual, no slack
    DEPENDENT = 2  # the active constraints depend on each other
    PRIMAL = 4  # there is more than one minimiser


class QPShift(NamedTuple):
    """How far right-hand sides were moved to make a program feasible: A z = b + shift.b, G z <= h + shift.h."""

    b: Tensor  # (*B, n_eq)
    h: Tensor  # (*B, n_ineq), never negative


class QPSolution(NamedTuple):
    """A solution of a quadratic program: primal, duals, slack, how it was found, duals of the bounds, value."""

    z: Tensor  # (*B, n)
    nu: Tensor  # (*B, n_eq), duals of A z = b
    lam: Tensor  # (*B, n_ineq), duals of G z <= h, never negative
    s: Tensor  # (*B, n_ineq), slack h - G z, never negative beyond rounding; inf where h is
    info: QPInfo
    lam_lb: Tensor  # (*B, n), duals of z >= lb, never negative; 0 where there is no bound
    lam_ub: Tensor  # (*B, n), duals of z <= ub, never negative; 0 where there is no bound
    value: Tensor  # (*B,), the optimal value 1/2 z'Qz + p'z
    shift: QPShift  # all 0 unless infeasible="nearest"


# For each way to fail: the error, what happened to one problem, what happened to several, and what to do about it.
_FAILURES: dict[Status, tuple[type[SolveError], str, str, str]] = {
    Status.NOT_CONVERGED: (
        ConvergenceError,
        "did not converge",
        "did not converge",
        "Raise max_iter, rescale the data or start nearer; an infeasible problem never converges.",
    ),
    Status.INFEASIBLE: (
        InfeasibleError,
        "has no feasible point: a combination of its constraints contradicts itself",
        "have no feasible point: a combination of their constraints contradicts itself",
        "Relax the right-hand sides or remove a constraint.",
    ),
    Status.UNBOUNDED: (
        UnboundedError,
        "has an objective that decreases without limit",
        "have an objective that decreases without limit",
        "Bound the feasible set or make the objective strictly convex.",
    ),
    Status.SINGULAR: (
        SingularAdjointError,
        "has a singular system",
        "have a singular system",
        "Remove dependent constraints or regularise the problem.",
    ),
}


def check_on_failure(on_failure: str) -> None:
    """Refuse anything but the three policies."""
    if on_failure not in _POLICIES:
        raise ArgumentError(f"on_failure must be one of {_POLICIES}, got {on_failure!r}")


def report_failure(
    info: SolveInfo | QPInfo,
    on_failure: OnFailure,
    *,
    what: str,
    tol: float,
    max_iter: int | None,
    advice: str = "",
    hint: str = "",
) -> None:
    """Raise or warn when problems of the batch failed; costs one host synchronisation, none with "ignore".

    Args:
        info: the outcome, one entry a problem, not under a functional transform.
        on_failure: "raise", "warn" or "ignore".
        what: the operation, for the message.
        tol, max_iter: the settings of the solver, for the message; max_iter None: nobody counted its iterations.
        advice: what to do about problems that did not converge, instead of the general advice.
        hint: what else may be wrong with them, after the advice.

    Raises:
        ConvergenceError, InfeasibleError, UnboundedError, SingularAdjointError: the kind of the first failed problem.
    """
    if on_failure == "ignore" or checks.host_bool(info.converged.all()):
        return
    failed = (~info.converged).nonzero()
    first = tuple(failed[0].tolist())  # () where there is one problem and no batch
    status = Status(int(info.status[first]))
    error, one, several, general = _FAILURES[status]
    if status == Status.NOT_CONVERGED:
        general = f"{advice or general} {hint}".rstrip()
    alike = int((~info.converged & (info.status == status)).sum())
    otherwise = len(failed) - alike
    subject = f"{alike} of {info.converged.numel()} problems" if first else "the problem"
    index = str(first[0] if len(first) == 1 else first)
    where = "" if not first else f"index {index}, " if alike == 1 else f"first: index {index}, "
    also = f" {otherwise} more failed in another way." if otherwise else ""
    count = "" if max_iter is None else f", {int(info.iterations[first])} of {max_iter} iterations"
    message = (
        f"{what}: {subject} {one if alike == 1 else several} "
        f"({where}residual {float(info.residual[first]):.1e}, tol {tol:.1e}{count}).{also} {general}"
    )
    these = "the failed problems" if first else "it"
    if on_failure == "raise":
        raise error(f"{message} Or pass on_failure='warn' to get the last iterate, and zero gradient, for {these}.")
    warn(f"{message} The last iterate is returned for {these}, with zero gradient.", ConvergenceWarning)
