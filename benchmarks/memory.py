"""The suite "memory": memory, time and gradient error against the number of iterations, for every way to differentiate.

Ridge regression by gradient descent with momentum: one problem, one iteration, six gradients, of z after K steps:

    full, checkpointed, reversible   the derivative of the iterations, remembered in three ways
    truncated, one-step              its last ten terms, its last
    implicit                         the implicit function theorem at z_K

and a batch of quadratic programs by unrolled ADMM against `il.solve_qp`, whose iterations its data decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.fresh import resident
from benchmarks.instances import Ridge, ridge
from benchmarks.measure import differentiated, elapsed, interleave, leaves, moved, spread
from benchmarks.options import Options, Rows
from benchmarks.peak import peak_bytes
from benchmarks.problems import QP
from implicit_layers.implicit import attach_gradient
from implicit_layers.krylov import ConjugateGradient
from implicit_layers.measure import graph_bytes, relative_error
from implicit_layers.qp import solve_qp
from implicit_layers.reference import exact_qp, program
from implicit_layers.testing import random_qp
from implicit_layers.unrolled import unroll, unrolled_qp

STEPS = (10, 20, 40, 80, 160, 320, 640, 1280)
STEPS_QUICK = (10, 40, 160)
RESIDENT = (10, 160, 1280)  # each in a process of its own
CONDITIONS = (1e0, 1e2, 1e4, 1e6)  # harder programs need more interior-point iterations
SIZES = {"ridge": (200, 16), "QP": (20, 32)}  # unknowns, problems
SIZES_QUICK = {"ridge": (100, 4), "QP": (10, 8)}
MOMENTUM = {"ridge": 0.8, "QP": 0.25}
RIDGE_CONDITION = 50.0
LAST = 10

Solve = Callable[[Any], Tensor]

# name -> the arguments of `unroll`
UNROLLED: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "checkpointed": {"mode": "checkpointed"},
    "reversible": {"mode": "reversible"},
    "truncated": {"mode": "truncated", "last": LAST},
    "one-step": {"mode": "truncated", "last": 1},
}
MODES = (*UNROLLED, "implicit")


@dataclass(frozen=True)
class Case:
    """One problem and every way to its solution; `solve(mode, steps)` is a function of the problem."""

    name: str
    condition: float
    problem: Any
    exact: tuple[Tensor, ...]
    solve: Callable[[str, int], Solve]


def suite(options: Options) -> Rows:
    rows: Rows = []
    steps = STEPS_QUICK if options.quick else STEPS
    sizes = SIZES_QUICK if options.quick else SIZES
    for case in (ridge_case(*sizes["ridge"], options), qp_case(*sizes["QP"], CONDITIONS[1], options)):
        for k in steps:
            modes = MODES if case.name == "ridge" else tuple(UNROLLED)
            rows += _compare(case, modes, k, options)
    conditions = CONDITIONS[:2] if options.quick else CONDITIONS
    for condition in conditions:
        rows += _compare(qp_case(*sizes["QP"], condition, options), ("implicit",), None, options)
    return rows


def _compare(case: Case, modes: tuple[str, ...], steps: int | None, options: Options) -> Rows:
    """One row a mode: certificate and memory first, then the times, in turns."""
    if steps is None:
        with torch.no_grad():
            Q, p, A, b, G, h, _ = case.problem
            steps = int(solve_qp(Q, p, A=A, b=b, G=G, h=h).info.iterations.max())
    runs = {mode: case.solve(mode, steps) for mode in modes}
    rows = [_row(case, mode, steps, run, options) for mode, run in runs.items()]
    device = case.problem.c.device
    times = interleave(
        [partial(elapsed, partial(_both, case.problem, run), device) for run in runs.values()],
        3 if options.quick else len(runs),
        warm_up=1,
    )
    for row, samples in zip(rows, times, strict=True):
        row["total_ms"] = spread(samples)
    return rows


def _row(case: Case, mode: str, steps: int, run: Solve, options: Options) -> dict[str, Any]:
    """Errors, bytes held after the forward pass, and the most bytes that forward and backward hold."""
    exact = case.exact
    row: dict[str, Any] = {"problem": case.name, "condition": case.condition, "mode": mode, "iterations": steps}
    row["gradient_error"] = relative_error([part.cpu() for part in _both(case.problem, run)], exact)
    arguments = leaves(case.problem)
    row["graph_bytes"] = graph_bytes(lambda: run(arguments), exclude=arguments)
    device = case.problem.c.device
    row["peak_bytes"] = peak_bytes(partial(_both, case.problem, run), device)
    row["fixed_bytes"] = 0
    if mode in ("full", "checkpointed"):  # what the first step needs beyond what the second adds, whatever their number
        few = [graph_bytes(partial(case.solve("full", k), arguments), exclude=arguments) for k in (1, 2)]
        row["fixed_bytes"] = max(0, 2 * few[0] - few[1])
    if mode == "reversible":
        numbers = case.problem.h.numel() if isinstance(case.problem, QP) else case.problem.y.numel()
        fewer = graph_bytes(lambda: case.solve(mode, 1)(arguments), exclude=arguments)
        row["buffer_bits"] = 8 * (row["graph_bytes"] - fewer) / (steps * numbers)
    if device.type == "cpu" and case.name == "ridge" and steps in (RESIDENT if not options.quick else RESIDENT[1:2]):
        argument = {"mode": mode, "steps": steps, "quick": options.quick, "seed": options.seed}
        row["resident_bytes"] = resident("benchmarks.memory:ready", argument)
    return row


def _both(problem: Any, run: Solve) -> tuple[Tensor, ...]:
    """Forward and backward from fresh arguments; the gradients of those that matter."""
    arguments = leaves(problem)
    wanted = differentiated(arguments)
    wanted = wanted[:2] if isinstance(problem, Ridge) else wanted
    return torch.autograd.grad((problem.c * run(arguments)).sum(), wanted)


def ready(argument: dict[str, Any]) -> Callable[[], Any]:
    """One forward and backward pass of the ridge problem, a short one of which has been run."""
    options = Options(quick=argument["quick"], seed=argument["seed"])
    case = ridge_case(*(SIZES_QUICK if options.quick else SIZES)["ridge"], options)
    _both(case.problem, case.solve(argument["mode"], LAST))
    return partial(_both, case.problem, case.solve(argument["mode"], argument["steps"]))


# --- ridge regression -----------------------------------------------------------------------------------------------


def ridge_case(n: int, batch: int, options: Options) -> Case:
    """Reference by one dense Cholesky solve in float64."""
    drawn = moved(ridge(n, batch, RIDGE_CONDITION, options.seed), options.dtype)
    w, alpha, X, y, c = leaves(moved(drawn, torch.float64))
    H = X.mT @ (w[:, None] * X) + alpha * torch.eye(n, dtype=torch.float64)
    z = torch.cholesky_solve(y.mT, torch.linalg.cholesky(H)).mT
    exact = torch.autograd.grad((c * z).sum(), (w, alpha))
    return Case("ridge", RIDGE_CONDITION, moved(drawn, options.device), exact, _ridge_solver)


def slope_of_ridge(z: Tensor, w: Tensor, alpha: Tensor, X: Tensor, y: Tensor) -> Tensor:  # (B, n)
    """∇f(z) = Hz − y for every row."""
    return (w * (z @ X.mT)) @ X + alpha * z - y


def descent_step(z: Tensor, w: Tensor, alpha: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """z − ∇f(z): the largest eigenvalue of the Hessian is 1."""
    return z - slope_of_ridge(z, w, alpha, X, y)


def _ridge_solver(mode: str, steps: int) -> Solve:
    settings = {"steps": steps, "momentum": MOMENTUM["ridge"]}

    def solve(problem: Ridge) -> Tensor:
        w, alpha, X, y, _ = problem
        theta = (w, alpha, X.detach(), y.detach())
        z0 = torch.zeros_like(y)
        if mode != "implicit":
            return unroll(descent_step, z0, *theta, **UNROLLED[mode], **settings)
        with torch.no_grad():
            z = unroll(descent_step, z0, *theta, **settings)
        return attach_gradient(slope_of_ridge, z, *theta, linear_solver=ConjugateGradient())

    return solve


# --- quadratic programs ---------------------------------------------------------------------------------------------


def qp_case(n: int, batch: int, condition: float, options: Options) -> Case:
    """Reference by a dense KKT solve on a verified active set."""
    drawn = random_qp(n, n, n // 4, batch=(batch,), condition=condition, seed=options.seed)
    problem = moved(QP(*drawn[:6], drawn.z.cos()), options.dtype)
    arguments = leaves(moved(problem, torch.float64))
    Q, p, A, b, G, h, c = arguments
    z = exact_qp(program(Q, p, A=A, b=b, G=G, h=h)).z
    exact = torch.autograd.grad((c * z).sum(), differentiated(arguments))
    return Case("QP", condition, moved(problem, options.device), exact, _qp_solver)


def _qp_solver(mode: str, steps: int) -> Solve:
    def solve(problem: QP) -> Tensor:
        Q, p, A, b, G, h, _ = problem
        if mode == "implicit":
            return solve_qp(Q, p, A=A, b=b, G=G, h=h).z
        settings = {**UNROLLED[mode], "steps": steps, "momentum": MOMENTUM["QP"]}
        return unrolled_qp(Q, p, A=A, b=b, G=G, h=h, **settings)

    return solve


# --- how memory grows -----------------------------------------------------------------------------------------------


def slope(x: list[float], y: list[float]) -> float:
    """The least-squares slope of log y on log x: 1 linear, ½ square root, 0 flat."""
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum((a - mean_u) ** 2 for a in u)


def slopes(rows: Rows) -> dict[str, float]:
    """The exponent in the number of iterations of what autograd holds for the backward pass, one a problem and mode.

    Memory that no iteration adds to (`fixed_bytes`: the data, the factors of an unrolled QP) is taken off first.
    """
    return _exponents(rows, lambda row: row["graph_bytes"] - row["fixed_bytes"], 1)


def peak_slopes(rows: Rows) -> dict[str, float]:
    """That of the peak of forward and backward, over the larger half of the runs, where it leaves the workspace."""
    unrolled = [row for row in rows if (row["problem"], row["mode"]) != ("QP", "implicit")]  # it has its own iterations
    return _exponents(unrolled, lambda row: row["peak_bytes"], 2)


def _exponents(rows: Rows, size: Callable[[dict[str, Any]], int], part: int) -> dict[str, float]:
    """The slopes over the upper 1/part of the iterations."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        groups.setdefault(f"{row['problem']}: {row['mode']}", []).append((row["iterations"], max(1, size(row))))
    found = {}
    for name, points in groups.items():
        upper = sorted(points)[len(points) - max(2, len(points) // part) :] if len(points) > 1 else points
        if len({k for k, _ in upper}) > 1:
            x, y = zip(*upper, strict=True)
            found[name] = round(slope([float(k) for k in x], [float(value) for value in y]), 3)
    return found


def summary(rows: Rows) -> dict[str, Any]:
    """What is printed and kept beside the rows."""
    return {"slopes": slopes(rows), "peak_slopes": peak_slopes(rows)}
