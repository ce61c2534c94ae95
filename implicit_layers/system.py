"""The engine: a solution of F(z, θ) = 0 as a differentiable function of θ, to any order and under every transform.

One autograd function serves all. Its first argument is a frozen description of what is solved; `System` is the
problem itself, `LinearSystem` the linear one that gives a cotangent (Jᵀu = −g) or a tangent (J·dz = −F_θ·dθ). The
derivative of a linear one is again a linear one, so nothing that was computed inside a solve is ever differentiated:

    backward of z:  Jᵀu = −g through the same function, then g_θ = F_θᵀ u;
    forward mode:   J dz = −F_θ dθ through the same function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from implicit_layers import checks
from implicit_layers.eager import uncompiled
from implicit_layers.errors import ConvergenceWarning, DtypeError, NonFiniteError, ShapeError, SingularAdjointError
from implicit_layers.jacobian import Jacobian, TransposedJacobian, gradient, opaque, pullback, pushforward
from implicit_layers.krylov import GMRES, ConjugateGradient
from implicit_layers.legacy_vmap import modernised
from implicit_layers.linalg import DENSE_LIMIT, Cholesky, Direct, LeastSquares, LinearSolver
from implicit_layers.solution import OnFailure, Solution, SolveInfo, Status, report_failure
from implicit_layers.solvers.problem import Method, Rows, Terms, outcome, relative

Kind = Literal["root", "fixed_point", "argmin"]
Dims = tuple[int | None, ...]
External = Callable[[Tensor, Sequence[Tensor]], Tensor]  # a solver of the user's: (z0, leaves) -> z

_EXTERNAL_FLOOR = 1e-3


@dataclass(frozen=True)
class System:
    """F(z, *leaves) = 0, how it is solved, and how its linear systems are.

    Attributes:
        kind:          what `function` is: the residual, the step of a fixed point, or an objective.
        function:      pure, of the unknown and flat tensors.
        maps:          for every mapped axis (vmap), innermost first, which leaves have it as their first dimension;
                       the unknown always has. `function` knows nothing of these axes.
        batch_dims:    leading dimensions of z that number problems, the mapped ones included.
        solver:        None: the given z is the solution.
        external:      calls a solver of the user's, which knows nothing of mapped axes either.
    """

    kind: Kind
    function: Callable[..., Tensor]
    batch_dims: int
    solver: Method | None
    external: External | None
    linear_solver: LinearSolver | None
    on_failure: OnFailure
    what: str
    maps: tuple[Dims, ...] = ()

    columns = 0  # further right-hand sides; a nonlinear system has none

    @property
    def mapped_function(self) -> Callable[..., Tensor]:
        """`function` over the mapped axes too."""
        function = self.function
        for dims in self.maps:
            function = torch.func.vmap(function, in_dims=(0, *dims))
        return function

    @property
    def residual(self) -> Callable[..., Tensor]:
        """F itself."""
        function = self.mapped_function
        if self.kind == "argmin":
            return gradient(function)
        if self.kind == "fixed_point":
            return lambda z, *leaves: z - function(z, *leaves)
        return function

    @property
    def may_fail(self) -> bool:
        """Whether problems can go on that were not solved."""
        return self.on_failure != "raise" and (self.solver is not None or self.external is not None)

    def linear(self, n: int) -> LinearSolver:
        """The linear solver, chosen by the number of unknowns where none was given."""
        if self.linear_solver is not None:
            return self.linear_solver
        if self.kind == "argmin":
            return Cholesky() if n <= DENSE_LIMIT else ConjugateGradient()
        return Direct() if n <= DENSE_LIMIT else GMRES()

    def run(self, z0: Tensor, leaves: Sequence[Tensor]) -> Solution:
        """Solve; plain tensors only. Failures are reported here."""
        rows = Rows(z0.shape, self.batch_dims)
        if self.solver is None and self.external is None:
            nothing = torch.zeros(rows.batch, dtype=torch.int64, device=z0.device)
            info = SolveInfo(nothing.to(torch.int8), nothing == 0, nothing, nothing.to(z0.dtype))
            return Solution(z0.clone(), info)
        self._check_start(z0, leaves)
        if self.solver is not None:
            solution: Solution = getattr(self.solver, self.kind)(
                self.mapped_function, z0, *leaves, batch_dims=self.batch_dims
            )
            tol, max_iter = self.solver.tol, self.solver.max_iter
        else:
            z = self._run_external(self.maps, z0, leaves)
            tol, max_iter = float(torch.finfo(z0.dtype).eps ** 0.5), 0
            y = rows.flat(z)
            F = rows.residual(self.residual, tuple(leaves))(y)
            size = Terms(rows, self.residual, z0, tuple(leaves)).size(y, F)
            solved = relative(F, size, _EXTERNAL_FLOOR) <= tol
            zero = torch.zeros(rows.batch, dtype=torch.int64, device=z0.device)
            solution = outcome(rows, y, F, size.clamp_min(_EXTERNAL_FLOOR), solved, zero, tol)
        shown = tol if tol is not None else float(torch.finfo(z0.dtype).eps ** 0.75)
        report_failure(solution.info, self.on_failure, what=self.what, tol=shown, max_iter=max_iter)
        return solution

    def _check_start(self, z0: Tensor, leaves: Sequence[Tensor]) -> None:
        """The residual is finite where the solver starts."""
        F = self.residual(z0, *leaves)
        bad = ~torch.isfinite(F)
        # problems that may fail do so on their own
        if not self.may_fail and checks.host_bool(bad.any()):
            raise NonFiniteError(
                f"{self.what}: the residual at the start z0 is {float(F[bad][0])} at index {checks.index_of(bad)} "
                f"({int(bad.sum())} of {bad.numel()} entries are not finite); start elsewhere or look for NaN in theta"
            )

    def _run_external(self, maps: tuple[Dims, ...], z0: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """The user's solver, once for every index of the mapped axes."""
        if maps:
            *rest, dims = maps
            slices = [
                self._run_external(
                    tuple(rest), z0[i], [x if d is None else x[i] for x, d in zip(leaves, dims, strict=True)]
                )
                for i in range(z0.shape[0])
            ]
            return torch.stack(slices) if slices else z0.clone()
        assert_external = self.external
        z = assert_external(z0, leaves) if assert_external is not None else z0
        if not isinstance(z, Tensor) or z.dtype != z0.dtype:
            found = z.dtype if isinstance(z, Tensor) else type(z).__name__
            raise DtypeError(f"{self.what}: the solver must return a tensor of z0's dtype {z0.dtype}, got {found}")
        if z.shape != z0.shape:
            raise ShapeError(
                f"{self.what}: the solver must return z of z0's shape {tuple(z0.shape)}, got {tuple(z.shape)}"
            )
        return z.detach().clone()

    def jacobian(self, z: Tensor, leaves: Sequence[Tensor]) -> Jacobian:
        """dF/dz at a point, as an operator on rows; plain tensors only."""
        rows = Rows(z.shape, self.batch_dims)
        return Jacobian(rows.residual(self.residual, tuple(leaves)), rows.flat(z))

    def mapped(self, dims: Dims) -> tuple[System, int]:
        """The system with one more mapped axis, in front; and where that axis is in the result."""
        return replace(self, maps=(*self.maps, dims[1:]), batch_dims=self.batch_dims + 1), 0

    def unmapped_inputs(self, dims: Dims) -> tuple[int | None, ...]:
        """Where the mapped axis must be in each tensor; None: it has none."""
        return (0, *(None if d is None else 0 for d in dims[1:]))

    def transposed_system(self) -> LinearSystem:
        """Jᵀu = −g."""
        return LinearSystem(self, transposed=True)

    def tangent_system(self) -> LinearSystem:
        """J dz = −F_θ dθ."""
        return LinearSystem(self, transposed=False)

    def linear_parameters(self, z: Tensor, rhs: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The parameters of the linear systems at a solution."""
        return (z, rhs, *leaves)


@dataclass(frozen=True)
class LinearSystem:
    """R(u; z, rhs, *leaves) = A(z, leaves) u + rhs = 0 with A the Jacobian of a `System`, or its transpose.

    Mapped axes that only the right-hand side has are further columns of the same operator, `columns` of them in front,
    so that a Jacobian of the solution (`jacrev`) takes one factorisation.
    """

    base: System
    transposed: bool
    columns: int = 0

    may_fail = False  # a failed linear solve leaves u = 0, at which nothing needs care

    @property
    def batch_dims(self) -> int:
        """Leading dimensions of u that number systems."""
        return self.columns + self.base.batch_dims

    @property
    def on_failure(self) -> OnFailure:
        """That of the base."""
        return self.base.on_failure

    @property
    def what(self) -> str:
        """That of the base."""
        return self.base.what

    def residual(self, u: Tensor, z: Tensor, rhs: Tensor, *leaves: Tensor) -> Tensor:
        """A u + rhs, differentiable in everything."""

        def product(v: Tensor) -> Tensor:
            def F(y: Tensor) -> Tensor:
                return self.base.residual(y, *leaves)

            return pullback(F, z)[1](v)[0] if self.transposed else pushforward(F, (z,), (v,), z)

        for _ in range(self.columns):
            product = torch.func.vmap(product)
        return product(u) + rhs

    def run(self, u0: Tensor, parameters: Sequence[Tensor]) -> Solution:
        """Solve with the linear solver and check the result with the true operator; plain tensors only."""
        z, rhs, *leaves = parameters
        J = self.base.jacobian(z, leaves)
        operator: Jacobian | TransposedJacobian = J.T if self.transposed else J
        rows = Rows(z.shape, self.base.batch_dims)
        b = -rows.flat(rhs)
        linear = self.base.linear(rows.n)
        u = linear.solve(operator, b, on_failure="ignore")
        # a zero right-hand side asks for nothing, and gets it even where A is singular; a NaN one is passed on
        nothing = (b == 0).all(-1, keepdim=True)
        spoilt = ~torch.isfinite(b).all(-1, keepdim=True)
        u = torch.where(nothing, 0.0, torch.where(spoilt, torch.nan, u))
        exempt = (nothing | spoilt).squeeze(-1)
        error = _linear_error(linear, operator, u, b)
        tol = _agreed(linear, b.dtype)
        ok = exempt | (error <= tol)
        if not checks.host_bool(ok.all()):
            if self.on_failure == "raise":
                _refuse(self, linear, operator, b, ok, error, tol)
            u, ok = _without_failed(linear, operator, u, b, ok, exempt, tol)
            if self.on_failure == "warn":
                warnings.warn(_message(self, ok, error, tol), ConvergenceWarning, stacklevel=2)
        status = torch.where(ok, int(Status.CONVERGED), int(Status.SINGULAR)).to(torch.int8)
        steps = torch.ones(b.shape[:-1], dtype=torch.int64, device=b.device)
        return Solution(rows.full(u), SolveInfo(status, ok, steps, error))

    def mapped(self, dims: Dims) -> tuple[LinearSystem, int]:
        """The system with one more mapped axis; and where that axis is in the result."""
        _, z, _, *leaves = dims
        if z is None and all(d is None for d in leaves):
            return replace(self, columns=self.columns + 1), 0
        base, _ = self.base.mapped((0, *leaves))
        return replace(self, base=base), self.columns

    def unmapped_inputs(self, dims: Dims) -> tuple[int | None, ...]:
        """Where the mapped axis must be in each tensor; None: it has none."""
        _, z, _, *leaves = dims
        if z is None and all(d is None for d in leaves):
            return (0, None, 0, *(None for _ in leaves))
        return (self.columns, 0, self.columns, *(None if d is None else 0 for d in leaves))

    def transposed_system(self) -> LinearSystem:
        """Aᵀw = −c."""
        return replace(self, transposed=not self.transposed)

    def tangent_system(self) -> LinearSystem:
        """A du = −R_(z, rhs, θ)·tangents."""
        return self

    def linear_parameters(self, u: Tensor, rhs: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The parameters of the linear systems at a solution: A does not depend on u."""
        z, _, *leaves = parameters
        return (z, rhs, *leaves)


AnySystem = System | LinearSystem


def _agreed(linear: LinearSolver, dtype: torch.dtype) -> float:
    """The relative residual that a linear solve may leave: 64·√eps, or what the solver's `tol` agrees to."""
    tol = getattr(linear, "tol", None)
    return max(64 * float(torch.finfo(dtype).eps ** 0.5), 0.0 if tol is None else 1.01 * float(tol))


def _linear_error(linear: LinearSolver, A: Jacobian | TransposedJacobian, u: Tensor, b: Tensor) -> Tensor:
    """‖A u − b‖/‖b‖ by the true operator, or what rounding hides of it if that is more; infinite where not finite."""
    if b.numel() == 0:
        return b.new_zeros(b.shape[:-1])
    r = A.matvec(u) - b
    size = torch.linalg.vector_norm(b, dim=-1)
    if isinstance(linear, LeastSquares):  # the residual proper may stay, its projection may not
        size = size * torch.linalg.matrix_norm(A.dense())
        r = A.rmatvec(r)
    error = torch.linalg.vector_norm(r, dim=-1)
    if A.formed and not isinstance(linear, LeastSquares):
        # with terms this large in A u, a residual can be small by accident
        terms = torch.linalg.vector_norm((A.dense().abs() @ u.abs().unsqueeze(-1)).squeeze(-1), dim=-1)
        error = torch.maximum(error, torch.finfo(b.dtype).eps * terms)
    error = torch.where(size > 0, error / torch.where(size > 0, size, 1.0), error)
    return torch.where(torch.isfinite(error), error, torch.inf)


def _without_failed(
    linear: LinearSolver,
    A: Jacobian | TransposedJacobian,
    u: Tensor,
    b: Tensor,
    ok: Tensor,
    exempt: Tensor,
    tol: float,
) -> tuple[Tensor, Tensor]:
    """Zero for the failed systems; where that changes the others they are coupled, and all have failed."""
    u = torch.where(ok[..., None], u, 0.0)
    spoilt = ok & exempt & ~torch.isfinite(u).all(-1)
    still = _linear_error(linear, A, torch.where(spoilt[..., None], 0.0, u), b) <= tol
    if not checks.host_bool((still | ~ok | exempt).all()):
        ok = exempt
        u = torch.where(ok[..., None], u, 0.0)
    return u, ok


def _message(system: LinearSystem, ok: Tensor, error: Tensor, tol: float) -> str:
    """What a failed linear solve says."""
    which = "adjoint" if system.transposed else "tangent"
    where = f"; first: index {checks.index_of(~ok)}" if ok.ndim else ""
    return (
        f"{system.what}: the {which} system of {int((~ok).sum())} of {ok.numel()} problems could not be solved "
        f"(relative residual {float(error[~ok][0]):.1e} > {tol:.1e}{where}). Either the Jacobian dF/dz is singular "
        "there, so that the derivative does not exist or is not unique (see check_ift; linear_solver=LeastSquares() "
        "gives its minimum-norm element), or the problems of the batch are coupled, i.e. F of one depends on z of "
        "another (pass batch_dims=0 to solve them as one), or an iterative linear solver needs a larger max_iter"
    )


def _refuse(
    system: LinearSystem,
    linear: LinearSolver,
    operator: Jacobian | TransposedJacobian,
    b: Tensor,
    ok: Tensor,
    error: Tensor,
    tol: float,
) -> None:
    """Raise the linear solver's own error if it has one that is more exact, else the general one."""
    if isinstance(linear, Cholesky):
        linear.solve(operator, b, on_failure="raise")
    raise SingularAdjointError(_message(system, ok, error, tol) + ".")


def _masked(mask: Tensor, x: Tensor, otherwise: Tensor | float) -> Tensor:
    """X where the problem's entry of the mask is true."""
    return torch.where(mask.reshape((*mask.shape, *[1] * (x.ndim - mask.ndim))), x, otherwise)


class _Solve(torch.autograd.Function):
    """(system, z0, *parameters) -> (z, status, converged, iterations, residual); z alone is differentiable."""

    @staticmethod
    @uncompiled
    def forward(system: AnySystem, z0: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Solve, unseen by autograd."""
        with opaque(z0.device.type):
            z0, *plain = (x.detach().clone() if x.is_inference() else x.detach() for x in (z0, *parameters))
            solution = system.run(z0, plain)
        return (solution.value, *solution.info)

    @staticmethod
    @uncompiled
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep inputs and outputs, nothing else."""
        system, z0, *parameters = inputs
        z, status, converged, iterations, residual = output
        ctx.mark_non_differentiable(status, converged, iterations, residual)
        ctx.system = system
        ctx.count = len(parameters)
        kept = (z, converged, *([z0] if system.may_fail else []), *parameters)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One linear solve with the transposed Jacobian, then one pull-back to the parameters."""
        z, converged, parameters = _saved(ctx)
        needed = ctx.needs_input_grad[2:]
        if not any(needed):
            return (None,) * (2 + ctx.count)

        def work(z: Tensor, converged: Tensor, g: Tensor, *parameters: Tensor) -> list[Tensor | None]:
            return pull_back(ctx.system, z, converged, parameters, g, needed)

        return None, None, *modernised(work, (z, converged, grads[0], *parameters))

    @staticmethod
    @uncompiled
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """One pushed-forward tangent of the parameters, then one linear solve with the Jacobian."""
        # autograd turns forward mode off in here, which silently zeroes the tangents of outer levels (jacfwd of jacfwd)
        with forward_ad._set_fwd_grad_enabled(True):
            z, converged, parameters = _saved(ctx)
            z, *parameters = (forward_ad.unpack_dual(x).primal for x in (z, *parameters))

            def work(z: Tensor, converged: Tensor, *rest: Any) -> list[Tensor | None]:
                return [push_forward(ctx.system, z, converged, rest[: ctx.count], rest[ctx.count :])]

            return *modernised(work, (z, converged, *parameters, *tangents[2:])), None, None, None, None

    @staticmethod
    @uncompiled
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """Solve over the mapped axis as over one more batch dimension."""
        system, *tensors = inputs
        dims = in_dims[1:]
        places = system.unmapped_inputs(dims)
        moved = []
        for x, d, place in zip(tensors, dims, places, strict=True):
            if place is None:
                moved.append(x)
            elif d is None:
                moved.append(x.unsqueeze(place).expand((*x.shape[:place], info.batch_size, *x.shape[place:])))
            else:
                moved.append(x.movedim(d, place))
        mapped, place = system.mapped(dims)
        return apply(mapped, *moved), (place,) * 5


def _saved(ctx: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The solution, which problems were solved, and the parameters; failed problems stand at their start, where F is
    known to be finite.
    """
    z, converged, *rest = ctx.saved_tensors
    if ctx.system.may_fail:
        z0, *rest = rest
        z = _masked(converged, z, z0)
        # what NaN among the parameters spoilt has failed; 0·NaN must not spoil the parameters that problems share
        rest = [torch.where(torch.isnan(x), 1.0, x) if x.is_floating_point() else x for x in rest]
    return z, converged, rest


def apply(system: AnySystem, z0: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Solve differentiably: (z, status, converged, iterations, residual)."""
    return _Solve.apply(system, z0, *parameters)


def pull_back(
    system: AnySystem,
    z: Tensor,
    converged: Tensor,
    parameters: Sequence[Tensor],
    g: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Cotangents of the needed parameters from that of the solution."""
    with torch.autocast(z.device.type, enabled=False):
        if system.on_failure != "raise":
            g = _masked(converged, g, 0.0)
        u = apply(system.transposed_system(), torch.zeros_like(g), *system.linear_parameters(z, g, parameters))[0]
        chosen = [i for i, need in enumerate(needed) if need]

        def F(*some: Tensor) -> Tensor:
            every = list(parameters)
            for i, x in zip(chosen, some, strict=True):
                every[i] = x
            return system.residual(z, *every)

        pulled = iter(pullback(F, *(parameters[i] for i in chosen))[1](u))
        return [next(pulled) if need else None for need in needed]


def push_forward(
    system: AnySystem, z: Tensor, converged: Tensor, parameters: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Tensor:
    """The tangent of the solution from those of the parameters."""
    chosen = [i for i, (x, t) in enumerate(zip(parameters, tangents, strict=True)) if t is not None]
    chosen = [i for i in chosen if parameters[i].is_floating_point()]
    if not chosen:
        return torch.zeros_like(z)
    with torch.autocast(z.device.type, enabled=False):

        def F(*some: Tensor) -> Tensor:
            every = list(parameters)
            for i, x in zip(chosen, some, strict=True):
                every[i] = x
            return system.residual(z, *every)

        moved = pushforward(F, [parameters[i] for i in chosen], [tangents[i] for i in chosen], z)
        if system.on_failure != "raise":
            moved = _masked(converged, moved, 0.0)
        return apply(system.tangent_system(), torch.zeros_like(moved), *system.linear_parameters(z, moved, parameters))[
            0
        ]
