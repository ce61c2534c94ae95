"""What is solved: a system F(z, θ) = 0, and the linear systems that its derivatives come from.

`System` is the problem itself, `LinearSystem` the linear one that gives a cotangent (Jᵀu = −g) or a tangent
(J·dz = −F_θ·dθ). The derivative of a linear one is again a linear one with the same operator or its transpose, so
nothing that was computed inside a solve is ever differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.certificate import certified
from implicit_layers.errors import DtypeError, NonFiniteError, ShapeError
from implicit_layers.jacobian import Jacobian, TransposedJacobian, gradient, pullback, pushforward
from implicit_layers.krylov import GMRES, ConjugateGradient
from implicit_layers.linalg import DENSE_LIMIT, Cholesky, Direct, LinearSolver
from implicit_layers.solution import OnFailure, Solution, SolveInfo, Status, report_failure
from implicit_layers.solvers.problem import GIVEN_FLOOR, Method, Rows, Terms, outcome, relative

Kind = Literal["root", "fixed_point", "argmin"]
Dims = tuple[int | None, ...]
External = Callable[[Tensor, Sequence[Tensor]], Tensor]  # a solver of the user's: (z0, leaves) -> z

_COUPLED = "If the problems of the batch depend on each other, pass batch_dims=0."
_NOT_OURS = "Tighten your solver's tolerance, or use attach_gradient if you trust its answer."


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
        external_tol:  how accurate that solver says that it is, its attribute `tol`; at the least, eps^(1/2).
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
    external_tol: float = 0.0

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
            return Solution(z0, info)
        self._check_start(z0, leaves)
        if self.solver is not None:
            solution: Solution = getattr(self.solver, self.kind)(
                self.mapped_function, z0, *leaves, batch_dims=self.batch_dims
            )
            report_failure(
                solution.info,
                self.on_failure,
                what=self.what,
                tol=self.solver.accepted(z0.dtype),
                max_iter=self.solver.max_iter,
                hint=_COUPLED if prod(rows.batch[len(self.maps) :]) > 1 else "",
            )
        else:
            z = self._run_external(self.maps, z0, leaves)
            tol = max(float(torch.finfo(z0.dtype).eps ** 0.5), self.external_tol)
            y = rows.flat(z)
            F = rows.residual(self.residual, tuple(leaves))(y)
            size = Terms(rows, self.residual, z0, tuple(leaves)).size(y, F)
            solved = relative(F, size, GIVEN_FLOOR) <= tol
            zero = torch.zeros(rows.batch, dtype=torch.int64, device=z0.device)
            solution = outcome(rows, y, F, size.clamp_min(GIVEN_FLOOR), solved, zero, tol)
            report_failure(solution.info, self.on_failure, what=self.what, tol=tol, max_iter=None, advice=_NOT_OURS)
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
        return replace(self, maps=(*self.maps, self.places(dims)[1:]), batch_dims=self.batch_dims + 1), 0

    def places(self, dims: Dims) -> tuple[int | None, ...]:
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
        u, ok, error = certified(
            linear, operator, u, b, on_failure=self.on_failure, what=self.what, transposed=self.transposed
        )
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

    def places(self, dims: Dims) -> tuple[int | None, ...]:
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
