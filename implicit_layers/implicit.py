"""The core: solutions of F(z, θ) = 0, differentiable in θ by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_layers.door import Entrance, Solver, enter
from implicit_layers.eager import uncompiled
from implicit_layers.errors import DtypeError, ShapeError
from implicit_layers.linalg import LinearSolver
from implicit_layers.solution import OnFailure, Solution, SolveInfo
from implicit_layers.solve import apply, pull_back, push_forward
from implicit_layers.solvers.anderson import Anderson
from implicit_layers.solvers.newton import Newton
from implicit_layers.system import Kind


def root(
    residual: Callable[..., Tensor],
    z0: Tensor,
    *theta: Any,
    solver: Solver = Newton(),  # noqa: B008  (frozen)
    linear_solver: LinearSolver | None = None,
    on_failure: OnFailure = "raise",
    batch_dims: int | None = None,
) -> Solution:
    r"""Solve a system of equations, differentiably.

    Problem:  F(z, θ) = 0.

    Args:
        residual:       F(z, \*theta), a tensor like z; or an nn.Module (or a method of one), whose parameters are then
                        differentiated too. It must not depend on other tensors that require grad.
        z0:             the start, (\*B, n); it gets no gradient, since the solution does not depend on it.
        theta:          what F depends on: tensors, nested tuples, lists and dicts of tensors, or nn.Modules, which
                        stand for their parameters and buffers (running statistics are read, never updated).
                        Anything else is passed on as it is. float16 and bfloat16 are computed in float32.
        solver:         how it is solved: `Newton()`, or any callable (residual, z0, \*theta) -> z. The residual of
                        what that returns must be at most √eps relative to the size of its terms.
        linear_solver:  how the linear systems of the derivative are solved. None: `Direct()` up to 512 unknowns a
                        problem, beyond that `GMRES()`, which does not form the Jacobian.
        on_failure:     "raise", "warn" or "ignore"; with the last two the problems that fail keep their last iterate
                        and get zero gradient, and the others are untouched.
        batch_dims:     how many leading dimensions of z number independent problems; None: all but the last. With 0
                        a tensor of any shape is one coupled problem.

    Returns:  the solution, with the shape, dtype and device of z0, and how it was found, one entry a problem.
    Gradient: g_θ = F_θᵀ u with Jᵀu = −g, J = ∂F/∂z; to any order, forward and reverse. Every linear solve is checked
        with the true operator, so that a singular J, or problems that are coupled after all, raise.

    Raises:
        CapturedTensorError: F depends on a tensor that requires grad and is not an argument.
        ConvergenceError: a problem did not converge.
        SingularAdjointError: in the backward pass: a linear system of the derivative has no (unique) solution.
        NonFiniteError: F is not finite at z0.
        ArgumentError: F does not depend on z through PyTorch operations.
        ShapeError, DtypeError, DeviceError: an argument, or what F returns, does not fit.
    Cost:     the solver's; then one linear solve for each derivative. The memory kept is z and θ.
    Source:   Krantz & Parks (2013), The Implicit Function Theorem, Theorem 3.3.1.

    >>> theta = torch.tensor([4.0], requires_grad=True)
    >>> z = root(lambda z, theta: z * z - theta, torch.tensor([1.0]), theta).value
    >>> z.backward()
    >>> z.detach(), theta.grad
    (tensor([2.]), tensor([0.2500]))
    """
    return _solve("root", residual, z0, theta, solver, linear_solver, on_failure, batch_dims)


def fixed_point(
    step: Callable[..., Tensor],
    z0: Tensor,
    *theta: Any,
    solver: Solver = Anderson(),  # noqa: B008  (frozen)
    linear_solver: LinearSolver | None = None,
    on_failure: OnFailure = "raise",
    batch_dims: int | None = None,
) -> Solution:
    r"""Find a fixed point, differentiably.

    Problem:  z = f(z, θ).

    Args:     step: f(z, \*theta). solver: `Anderson()`, `FixedPointIteration()`, `Newton()`, or any callable
              (step, z0, \*theta) -> z. The others as for `root`; `Neumann()` is a further linear solver that fits.
    Returns:  as `root`.
    Gradient: that of the root of F(z, θ) = z − f(z, θ); see `root`.
    Raises:   as `root`.
    Cost:     as `root`.

    >>> theta = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    >>> z = fixed_point(lambda z, theta: theta * torch.cos(z), torch.zeros_like(theta), theta).value
    >>> z.backward()
    >>> z.detach(), theta.grad
    (tensor([0.4502], dtype=torch.float64), tensor([0.7395], dtype=torch.float64))
    """
    return _solve("fixed_point", step, z0, theta, solver, linear_solver, on_failure, batch_dims)


def argmin(
    objective: Callable[..., Tensor],
    z0: Tensor,
    *theta: Any,
    solver: Solver = Newton(),  # noqa: B008  (frozen)
    linear_solver: LinearSolver | None = None,
    on_failure: OnFailure = "raise",
    batch_dims: int | None = None,
) -> Solution:
    r"""Minimise, differentiably.

    Problem:  z*(θ) = argmin_z f(z, θ), i.e. F = ∇_z f = 0 with ∇²_zz f positive definite.

    Args:
        objective:      f(z, \*theta), one value a problem: of shape (\*B,).
        solver:         `Newton()`, the default because its solution is accurate to rounding, and so is the gradient,
                        however badly conditioned the Hessian; `LBFGS()`, `GradientDescent()`, cheaper and with an
                        error of about the condition number times their tolerance; or any callable
                        (objective, z0, \*theta) -> z, judged by its attribute `tol` if it has one that is above
                        eps^(1/2).
        linear_solver:  None: `Cholesky()` up to 512 unknowns a problem, beyond that `ConjugateGradient()`; both want
                        a strict minimum.
        z0, theta, on_failure, batch_dims: as for `root`.

    Returns:  as `root`.
    Gradient: that of the root of F = ∇_z f; see `root`.
    Raises:   as `root`. NotPositiveDefiniteError: in the backward pass: the Hessian of a problem is not.
    Cost:     as `root`.

    >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> z = argmin(lambda z, theta: ((z - theta) ** 2).sum(-1), torch.zeros(2), theta).value
    >>> z.sum().backward()
    >>> z.detach(), theta.grad
    (tensor([1., 2.]), tensor([1., 1.]))
    """
    return _solve("argmin", objective, z0, theta, solver, linear_solver, on_failure, batch_dims)


def attach_gradient(
    residual: Callable[..., Tensor],
    z: Tensor,
    *theta: Any,
    linear_solver: LinearSolver | None = None,
    batch_dims: int | None = None,
) -> Tensor:
    r"""Give a solution that was found by anything at all its gradient.

    Args:     residual: F(z, \*theta), zero at z. z: the solution, (\*B, n); its own history is cut. The others as for
              `root`.
    Returns:  z, now differentiable in θ. That F(z, θ) = 0 is taken on trust: at a point that is no solution the
              result is the gradient of a Newton step from there, not of z; `check_ift` tells.
    Gradient: as `root`.
    Raises:   as `root`, but for ConvergenceError.
    Cost:     two evaluations of F; in the backward pass one linear solve.

    >>> theta = torch.tensor([4.0], requires_grad=True)
    >>> z = attach_gradient(lambda z, theta: z * z - theta, theta.detach().sqrt(), theta)
    >>> z.backward()
    >>> theta.grad
    tensor([0.2500])
    """
    return _attach(residual, z, theta, linear_solver, batch_dims)


@uncompiled
def root_vjp(
    residual: Callable[..., Tensor],
    z: Tensor,
    theta: Any,
    grad_z: Tensor,
    *,
    linear_solver: LinearSolver | None = None,
    batch_dims: int | None = None,
) -> Any:
    r"""Pull a cotangent of the solution back to θ.

    Args:     residual: F(z, \*theta), zero at z. theta: a tuple of arguments of F; anything else is its one argument.
              grad_z: like z. The others as for `root`.
    Returns:  F_θᵀ u with Jᵀu = −grad_z, in the structure of `theta`; an nn.Module becomes a dict by parameter name,
              and what is no floating-point tensor None.
    Raises:   as `attach_gradient`, and SingularAdjointError.
    Cost:     one linear solve.

    >>> root_vjp(lambda z, theta: z * z - theta, torch.tensor([2.0]), torch.tensor([4.0]), torch.tensor([1.0]))
    tensor([0.2500])
    """
    bare = not isinstance(theta, tuple)
    entrance = _enter_at_solution(residual, z, (theta,) if bare else theta, linear_solver, batch_dims, "root_vjp")
    leaves, grad = entrance.leaves, _like(grad_z, z, "grad_z").to(entrance.z0.dtype)
    needed = [x.is_floating_point() for x in leaves]
    everywhere = torch.ones(z.shape[: entrance.system.batch_dims], dtype=torch.bool, device=z.device)
    pulled = pull_back(entrance.system, entrance.z0, everywhere, leaves, grad, needed)
    pulled = [None if g is None else g.to(dtype) for g, dtype in zip(pulled, entrance.dtypes, strict=True)]
    result = entrance.structure.gather(pulled)
    return result[0] if bare else result


@uncompiled
def root_jvp(
    residual: Callable[..., Tensor],
    z: Tensor,
    theta: Any,
    tangents: Any,
    *,
    linear_solver: LinearSolver | None = None,
    batch_dims: int | None = None,
) -> Tensor:
    r"""Push a tangent of θ forward to the solution.

    Args:     residual: F(z, \*theta), zero at z. theta: a tuple of arguments of F; anything else is its one argument.
              tangents: in the structure of `theta`, None for zero; a dict by parameter name for an nn.Module. The
              others as for `root`.
    Returns:  dz with J dz = −F_θ dθ, like z.
    Raises:   as `attach_gradient`, and SingularAdjointError.
    Cost:     one linear solve.

    >>> root_jvp(lambda z, theta: z * z - theta, torch.tensor([2.0]), torch.tensor([4.0]), torch.tensor([1.0]))
    tensor([0.2500])
    """
    bare = not isinstance(theta, tuple)
    entrance = _enter_at_solution(residual, z, (theta,) if bare else theta, linear_solver, batch_dims, "root_jvp")
    flat = entrance.structure.scatter((tangents,) if bare else tangents)
    moved = [
        None if t is None else _like(t, x, f"tangent {i}").to(x.dtype)
        for i, (t, x) in enumerate(zip(flat, entrance.leaves, strict=True))
    ]
    everywhere = torch.ones(z.shape[: entrance.system.batch_dims], dtype=torch.bool, device=z.device)
    return push_forward(entrance.system, entrance.z0, everywhere, entrance.leaves, moved).to(z.dtype)


def _enter_at_solution(
    residual: Callable[..., Tensor],
    z: Tensor,
    theta: tuple[Any, ...],
    linear_solver: LinearSolver | None,
    batch_dims: int | None,
    what: str,
) -> Entrance:
    """The door for a solution that is already there."""
    return enter("root", residual, z, theta, what=what, linear_solver=linear_solver, batch_dims=batch_dims, z_name="z")


def _like(x: Tensor, other: Tensor, name: str) -> Tensor:
    """Refuse an x that is no floating-point tensor with the shape of the other."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise DtypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.shape != other.shape:
        raise ShapeError(f"{name} must have shape {tuple(other.shape)}, got {tuple(x.shape)}")
    return x


@uncompiled
def _attach(
    residual: Callable[..., Tensor],
    z: Tensor,
    theta: tuple[Any, ...],
    linear_solver: LinearSolver | None,
    batch_dims: int | None,
) -> Tensor:
    """`attach_gradient`, hidden from the compiler."""
    entrance = _enter_at_solution(residual, z, theta, linear_solver, batch_dims, "attach_gradient")
    return apply(entrance.system, entrance.z0.detach(), *entrance.leaves)[0].to(entrance.dtype)


@uncompiled
def _solve(
    kind: Kind,
    function: Callable[..., Tensor],
    z0: Tensor,
    theta: tuple[Any, ...],
    solver: Solver,
    linear_solver: LinearSolver | None,
    on_failure: OnFailure,
    batch_dims: int | None,
) -> Solution:
    """The three solving operations, hidden from the compiler."""
    entrance = enter(
        kind,
        function,
        z0,
        theta,
        what=kind,
        solver=solver,
        linear_solver=linear_solver,
        on_failure=on_failure,
        batch_dims=batch_dims,
    )
    value, *info = apply(entrance.system, entrance.z0.detach(), *entrance.leaves)
    return Solution(value.to(entrance.dtype), SolveInfo(*info))
