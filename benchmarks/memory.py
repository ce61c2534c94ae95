"""Memory of the autograd graph against the number of iterations: implicit, unrolled, checkpointed, truncated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import spread
from benchmarks.problems import QP, Ridge, ridge
from implicit_layers.implicit import argmin
from implicit_layers.linalg import Cholesky
from implicit_layers.measure import graph_bytes, milliseconds, relative_error
from implicit_layers.qp import solve_qp
from implicit_layers.reference import exact_qp, program
from implicit_layers.solution import Solution
from implicit_layers.solvers.gradient_descent import GradientDescent
from implicit_layers.testing import random_qp
from implicit_layers.unrolled import unroll, unrolled_qp

STEPS = (10, 20, 40, 80, 160, 320, 640, 1280)
STEPS_QUICK = (10, 40, 160)
CONDITIONS = (1e0, 1e2, 1e4, 1e6)  # harder programs need more interior-point iterations
TOLERANCES = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)  # tighter ones need more steps of gradient descent
UNROLLED = ("full", "checkpointed", "truncated")

Solve = Callable[[], Tensor]


def quadratic_program(quick: bool, seed: int, device: torch.device) -> list[dict[str, Any]]:
    """`il.solve_qp` on programs that need more and more iterations, and unrolled ADMM on the second of them."""
    rows = []
    for condition in CONDITIONS[:2] if quick else CONDITIONS:
        drawn = random_qp(20, 20, 5, batch=(32,), condition=condition, seed=seed)
        problem = QP(*(tensor.to(device) for tensor in drawn[:6]), drawn.z.to(device).cos())
        tensors = [tensor.requires_grad_() for tensor in problem[:6]]
        named = dict(zip("QpAbGh", tensors, strict=True))
        exact = exact_qp(program(**named)).z
        reference = torch.autograd.grad((problem.c * exact).sum(), tensors)
        case = partial(_row, tensors, list(problem), problem.c, reference, {"problem": "QP", "condition": condition})
        with torch.no_grad():
            iterations = int(solve_qp(**named).info.iterations.max())
        rows.append(case("implicit", iterations, lambda named=named: solve_qp(**named).z))
        if condition == CONDITIONS[1]:
            for mode in UNROLLED:
                for steps in STEPS_QUICK if quick else STEPS:
                    solve = partial(_unrolled_qp, named)
                    rows.append(case(mode, steps, partial(solve, mode, steps), *_parts(solve, mode, steps)))
    return rows


def ridge_regression(quick: bool, seed: int, device: torch.device) -> list[dict[str, Any]]:
    """`il.argmin` by gradient descent to tighter and tighter tolerances, and gradient descent unrolled."""
    problem = Ridge(*(tensor.to(device) for tensor in ridge(200, condition=50.0, seed=seed)))
    tensors = [problem.w.requires_grad_(), problem.alpha.requires_grad_()]
    H = problem.X.mT @ (problem.w[:, None] * problem.X) + problem.alpha * torch.eye(200, device=device).double()
    reference = torch.autograd.grad(problem.c @ torch.linalg.solve(H, problem.y), tensors)
    case = partial(_row, tensors, list(problem), problem.c, reference, {"problem": "ridge", "condition": 50.0})
    rows = []
    for tol in TOLERANCES[:2] if quick else TOLERANCES:
        solve = partial(_implicit_ridge, problem, tol)
        with torch.no_grad():
            iterations = int(solve().info.iterations)
        rows.append(case("implicit", iterations, lambda solve=solve: solve().value))
    for mode in UNROLLED:
        for steps in STEPS_QUICK if quick else STEPS:
            solve = partial(_unrolled_ridge, problem)
            rows.append(case(mode, steps, partial(solve, mode, steps), *_parts(solve, mode, steps)))
    return rows


def _row(
    tensors: Sequence[Tensor],
    alive: Sequence[Tensor],
    c: Tensor,
    reference: Sequence[Tensor],
    case: dict[str, Any],
    mode: str,
    iterations: int,
    solve: Solve,
    first: tuple[Solve, Solve] | None = None,
    segment: Solve | None = None,
) -> dict[str, Any]:
    """Bytes held after the forward pass, the most held during the backward pass, gradient error and time.

    `first` is one step and two: what the first needs beyond what the second adds is there whatever the number of steps.
    A checkpointed graph runs one segment again before it goes through it: the graph of a `segment` joins the peak.
    """
    held = graph_bytes(solve, exclude=alive)
    fixed = 0
    if first is not None:
        one, two = (graph_bytes(part, exclude=alive) for part in first)
        fixed = 2 * one - two
    again = 0 if segment is None else graph_bytes(segment, exclude=alive) - fixed
    gradient = torch.autograd.grad((c * solve()).sum(), tensors)
    times = [
        milliseconds(lambda: torch.autograd.grad((c * solve()).sum(), tensors), c.device)[1]
        for _ in range(3)
    ]  # fmt: skip
    return {
        **case,
        "mode": mode,
        "iterations": iterations,
        "fixed_bytes": fixed,
        "held_bytes": held,
        "peak_bytes": held + again,
        "gradient_error": relative_error(gradient, reference),
        "total_ms": spread(times),
    }


def _parts(solve: Callable[..., Tensor], mode: str, steps: int) -> tuple[tuple[Solve, Solve], Solve | None]:
    """One step and two of the loop, and where it is checkpointed one segment of it, all in full."""
    segment = partial(solve, "full", math.ceil(steps / math.ceil(math.sqrt(steps))))
    return (partial(solve, "full", 1), partial(solve, "full", 2)), segment if mode == "checkpointed" else None


def _unrolled_qp(named: dict[str, Tensor], mode: Any, steps: int) -> Tensor:
    return unrolled_qp(**named, steps=steps, mode=mode, last=10 if mode == "truncated" else None)


def objective(z: Tensor, w: Tensor, alpha: Tensor, X: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (w * (X @ z).square()).sum() + 0.5 * alpha * z.square().sum() - y @ z


def descent_step(z: Tensor, w: Tensor, alpha: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """z − ∇f(z): the largest eigenvalue of the Hessian is 1."""
    return z - (X.mT @ (w * (X @ z)) + alpha * z - y)


def _implicit_ridge(problem: Ridge, tol: float) -> Solution:
    return argmin(
        objective,
        torch.zeros_like(problem.y),
        problem.w,
        problem.alpha,
        problem.X,
        problem.y,
        solver=GradientDescent(step=1.0, tol=tol),
        linear_solver=Cholesky(),
    )


def _unrolled_ridge(problem: Ridge, mode: Any, steps: int) -> Tensor:
    theta = (problem.w, problem.alpha, problem.X, problem.y)
    last = 10 if mode == "truncated" else None
    return unroll(descent_step, torch.zeros_like(problem.y), *theta, steps=steps, mode=mode, last=last)
