r"""Refine the encoder's guess: solve the inner problem of every datum, and differentiate it in one of six ways.

| grad | derivative of λ* | memory |
|---|---|---|
| implicit | of the solution, by the implicit function theorem | of one evaluation |
| unrolled | of K steps, by automatic differentiation | K steps |
| frozen_hessian | of K steps, the Hessian being that of the last iterate | of one gradient |
| one_step | of one step from the last iterate | of one gradient |
| straight_through | dλ*/dλ⁰ = I, dλ*/dθ = 0 | none |
| envelope | 0: exact for an outer objective that λ* minimises (Moreau) | none |
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.eager import uncompiled
from implicit_layers.errors import ArgumentError, ArgumentTypeError, ShapeError
from implicit_layers.implicit import argmin
from implicit_layers.jacobian import Jacobian, gradient, opaque
from implicit_layers.linalg import LinearSolver
from implicit_layers.solution import OnFailure, Solution, SolveInfo, Status, check_on_failure, report_failure
from implicit_layers.solvers.newton import Newton
from implicit_layers.solvers.problem import Method, norm
from implicit_layers.unrolled import unroll
from implicit_layers.vae.derivative import attach, frozen, implicit
from implicit_layers.vae.gauss_newton import GaussNewton
from implicit_layers.vae.inner import InnerProblem
from implicit_layers.vae.model import LatentModel

GradMode = Literal["implicit", "unrolled", "frozen_hessian", "one_step", "straight_through", "envelope"]
_NEED_STEPS = ("unrolled", "frozen_hessian", "one_step")


@dataclass(frozen=True)
class Descent:
    """A fixed number of steps p ← μp − ∇e, y ← y + a p, as in the semi-amortised VAE of Kim et al. (2018).

    Attributes:
        steps:        K.
        step:         a, for the energy of one datum (not for a mean over the batch).
        momentum:     0 ≤ μ < 1.

    >>> Descent(steps=20, step=0.02, momentum=0.5).matching_rho
    1.25
    """

    steps: int = 20
    step: float = 0.1
    momentum: float = 0.5

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, least=0)
        checks.positive("step", self.step)
        if not 0 <= checks.number("momentum", self.momentum) < 1:
            raise ArgumentError(f"momentum must be at least 0 and below 1, got {self.momentum}")

    @property
    def matching_rho(self) -> float:
        """ρ = (1 − μ)/(a K): the l2 anchor that holds back directions of small curvature as K steps do."""
        return (1 - self.momentum) / (self.step * self.steps) if self.steps else float("inf")


InnerSolver = Method | Descent | GaussNewton | Callable[..., Any]


@uncompiled
def refine(
    model: LatentModel,
    x: Tensor,
    lam0: Tensor,
    eps: Tensor,
    *,
    problem: InnerProblem = InnerProblem(),  # noqa: B008  (frozen)
    rho: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    mask: Tensor | None = None,
    solver: InnerSolver = Newton(),  # noqa: B008  (frozen)
    grad: GradMode = "implicit",
    linear_solver: LinearSolver | None = None,
    on_failure: OnFailure = "warn",
) -> Solution:
    r"""Solve the inner problem of every datum, differentiably.

    Problem:  λ* = argmin_λ  f(λ; θ) + ρ R(λ, λ⁰), f = −ELBO with the points ε; see `InnerProblem`.

    Args:
        model:         the generative model; its parameters θ are differentiated.
        x:             (\*B, \*E).
        lam0:          λ⁰, (\*B, size): the start, and what the anchor ties the solution to.
        eps:           (S, \*B, D), from `Noise`; the same for all inner steps.
        problem:       what is minimised.
        rho, beta:     the weights of the anchor and of the KL term, numbers or (\*B,); differentiated.
        mask:          weights of the entries of x in the inner problem; see `HeldOut`.
        solver:        `Newton()`, `LBFGS()`, `GradientDescent()`, `GaussNewton()` or a callable, to stationarity; or
                       `Descent()`.
        grad:          see the table of this module. "unrolled", "frozen_hessian" and "one_step" need a `Descent`.
        linear_solver: of the implicit derivative; see `argmin`.
        on_failure:    "raise", "warn" or "ignore"; with the last two a datum that did not converge keeps its last
                       iterate and loses its implicit term, `info` counts it, and the others are untouched.

    Returns:  λ*, (\*B, size), and how it was found. A datum whose energy is not finite at λ⁰ starts at the prior,
        λ = 0, and gives the encoder no gradient. With a `Descent`, `info.residual` is ‖∇e‖ at the last iterate, and
        a datum whose steps ended above their start diverged: it stays at its start.
    Gradient: "implicit": dλ* = −(H + ρM)⁻¹ (∂F/∂θ dθ − ρM dλ⁰ + M(λ* − λ⁰) dρ) with F = ∇f, H = ∇²f; to any order,
        unless a `Descent` found λ*: then the same at its last iterate, and first derivatives only.

    Raises:
        ArgumentError: the solver does not fit `grad`; the model is random or couples the data (BatchNorm, Dropout).
        ShapeError, DtypeError: an argument does not fit. ConvergenceError: with on_failure="raise".
    Cost:     the solver's; "implicit": one Hessian (size)² and one Cholesky factorisation a datum.

    >>> model = LatentModel(torch.nn.Linear(1, 1), 1)
    >>> lam0, eps = torch.zeros(3, 2, requires_grad=True), torch.tensor([1.0, -1.0]).reshape(2, 1, 1).expand(2, 3, 1)
    >>> refine(model, torch.ones(3, 1), lam0, eps).value.shape
    torch.Size([3, 2])
    """
    lam0, eps = checks.without_autocast({"lam0": lam0, "eps": eps}).values()
    _check(model, x, lam0, eps, solver, grad, on_failure)
    model.check_deterministic()
    lam0 = _usable_start(problem, model, x, lam0, eps, rho, beta, mask)
    theta = (model, x, lam0, eps, rho, beta, mask)
    y0 = problem.start(model.family, lam0)
    if isinstance(solver, Descent):
        y, info = _descend(problem, solver, y0, theta, grad, on_failure)
    else:
        if isinstance(solver, GaussNewton):
            solver = _ByParts(solver, problem)
        with torch.set_grad_enabled(torch.is_grad_enabled() and grad == "implicit"):
            solution = argmin(
                problem.value, y0, *theta, solver=solver, linear_solver=linear_solver, on_failure=on_failure
            )
        y, info = solution
        y = torch.where(torch.isfinite(y).all(-1, keepdim=True), y, y0.detach())
        if grad == "straight_through":
            y = y.detach() + (y0 - y0.detach())
    return Solution(problem.lam(model.family, y, lam0), info)


def _check(
    model: LatentModel, x: Tensor, lam0: Tensor, eps: Tensor, solver: object, grad: str, on_failure: str
) -> None:
    """The door."""
    check_on_failure(on_failure)
    if not isinstance(model, LatentModel):
        raise ArgumentTypeError(f"model must be a LatentModel, got {type(model).__name__}")
    if grad not in get_args(GradMode):
        raise ArgumentError(f"grad must be one of {get_args(GradMode)}, got {grad!r}")
    if grad in _NEED_STEPS and not isinstance(solver, Descent):
        raise ArgumentError(f"grad={grad!r} is about a number of steps: give solver=Descent(...), got {solver!r}")
    checks.floating_tensors(lam0=lam0, eps=eps)
    model.family.check("lam0", lam0)
    batch, dim = lam0.shape[:-1], model.latent_dim
    if eps.shape[1:] != (*batch, dim) or eps.ndim == 0 or eps.shape[0] == 0:
        wanted = ", ".join(map(str, ("S", *batch, dim)))
        raise ShapeError(f"eps must have shape ({wanted}) with S ≥ 1 points for lam0 {tuple(lam0.shape)}, got "
                         f"{tuple(eps.shape)}; Noise().draw(dim, batch) makes it")  # fmt: skip
    if x.shape[: len(batch)] != batch:
        raise ShapeError(f"x must begin with the batch {tuple(batch)} of lam0, got {tuple(x.shape)}")


def _usable_start(
    problem: InnerProblem, model: LatentModel, x: Tensor, lam0: Tensor, eps: Tensor, *rest: Any
) -> Tensor:  # (*B, size)
    """λ⁰, or the prior where the energy at λ⁰ is not finite."""
    with opaque(lam0.device):
        plain = lam0.detach()
        energy = problem.value(problem.start(model.family, plain), model, x, plain, eps, *rest)
        good = torch.isfinite(energy) & torch.isfinite(plain).all(-1)
    return torch.where(good.unsqueeze(-1), lam0, 0.0)


@dataclass(frozen=True)
class _ByParts:
    """A solver as the core calls it, which looks at the parts of the objective instead."""

    solver: GaussNewton
    problem: InnerProblem

    @property
    def tol(self) -> float:
        """What the core judges its answers by."""
        return self.solver.tol

    def __call__(self, _: Callable[..., Tensor], y0: Tensor, *theta: Any) -> Tensor:
        """The unknown at a minimum."""
        return self.solver.minimise(self.problem, y0, *theta)


def _descend(
    problem: InnerProblem,
    descent: Descent,
    y0: Tensor,
    theta: tuple[Any, ...],
    grad: GradMode,
    on_failure: OnFailure,
) -> tuple[Tensor, SolveInfo]:
    """K steps, and the derivative asked for."""
    slope = gradient(problem.value)
    everywhere = torch.ones(y0.shape[:-1], dtype=torch.bool, device=y0.device)
    differentiated = torch.is_grad_enabled()
    with nullcontext() if differentiated and grad == "unrolled" else opaque(y0.device):
        y = _steps(slope, descent, y0, theta, everywhere)
        alive = _not_above(problem, y, y0, theta)
        if not checks.host_bool(alive.all()):  # what diverged stays at its start, and spoils no gradient
            y = _steps(slope, descent, y0, theta, alive)
    good = alive
    if grad not in ("unrolled", "envelope") and differentiated:
        S = T = g = None
        if grad == "straight_through":
            S = _masked(torch.eye(y.shape[-1], dtype=y.dtype, device=y.device).expand(*y.shape, -1), alive)
        else:
            g = slope(y.detach(), *theta)
            with opaque(y.device):
                H = Jacobian(lambda v: slope(v, *theta), y).dense()
                if grad == "implicit":
                    T, definite = implicit(H)
                    good = alive & definite
                else:
                    S, T = frozen(H, descent.steps if grad == "frozen_hessian" else 1, descent.step, descent.momentum)
                    S = _masked(S, alive)
            T = _masked(T, alive)
        y = attach(y, y0, g, S, T)
    with opaque(y.device):
        residual = norm(slope(y.detach(), *theta))
    bad = torch.where(alive, int(Status.SINGULAR), int(Status.NOT_CONVERGED))
    status = torch.where(good, int(Status.CONVERGED), bad).to(torch.int8)
    info = SolveInfo(status, good, torch.full_like(status, descent.steps, dtype=torch.int64), residual)
    report_failure(
        info,
        on_failure,
        what="refine",
        tol=float("inf"),
        max_iter=descent.steps,
        advice="Its steps diverged: take a smaller step, or Newton().",
    )
    return y, info


def _not_above(problem: InnerProblem, y: Tensor, y0: Tensor, theta: tuple[Any, ...]) -> Tensor:  # (*B,)
    """Where the last iterate is finite and its energy no higher than at the start, but for rounding."""
    with opaque(y.device):
        start, end = (problem.value(v.detach(), *theta) for v in (y0, y))
        rounding = 100 * torch.finfo(y.dtype).eps * (1 + start.abs())
        return torch.isfinite(y).all(-1) & (end <= start + rounding)  # false for NaN


def _steps(
    slope: Callable[..., Tensor], descent: Descent, y0: Tensor, theta: tuple[Any, ...], alive: Tensor
) -> Tensor:  # (*B, n)
    """Heavy-ball steps for the data that are alive; the others stay."""
    n = y0.shape[-1]

    def step(state: Tensor) -> Tensor:
        y, p = state[..., :n], state[..., n:]
        p = torch.where(alive.unsqueeze(-1), descent.momentum * p - slope(y, *theta), 0.0)
        return torch.cat([y + descent.step * p, p], -1)

    state = torch.cat([y0, torch.zeros_like(y0)], -1)
    return unroll(step, state, steps=descent.steps)[..., :n]


def _masked(matrix: Tensor, alive: Tensor) -> Tensor:  # (*B, n, n), (*B,)
    """Zero for the data that diverged."""
    return torch.where(alive[..., None, None], matrix, 0.0)
