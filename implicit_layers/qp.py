r"""Quadratic programs as layers: solved by an interior point, differentiated through their KKT conditions.

    min ½ zᵀQz + pᵀz   subject to   A z = b,   G z ≤ h

With K the symmetric KKT matrix on the active rows (see `kkt.quadratic`), a change of the data moves the solution by

    K d(z, ν, λ) = r,   r_z = −(dQ z + dp + dAᵀν + dGᵀλ),   r_ν = db − dA z,   r_λ = dh − dG z   (active rows),

so with the adjoint K v = (g_z, g_ν, g_λ) the gradients are
    ∂p = −v_z,  ∂Q = −v_z zᵀ,  ∂b = v_ν,  ∂A = −(ν v_zᵀ + v_ν zᵀ),  ∂h = v_λ,  ∂G = −(λ v_zᵀ + v_λ zᵀ).
Forward mode solves the first system, reverse mode the second, and derivatives of derivatives the same one again:
`_KKTSolve` is that one linear solve, with the factors that the forward pass ended with.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks, transforms
from implicit_layers.eager import uncompiled
from implicit_layers.errors import (
    ArgumentTypeError,
    DegenerateGradientWarning,
    DeviceError,
    DtypeError,
    NotPositiveDefiniteError,
    ShapeError,
    UnsupportedError,
    warn,
)
from implicit_layers.kkt import quadratic
from implicit_layers.kkt.program import Data, relative_residual
from implicit_layers.legacy_vmap import modernised
from implicit_layers.solution import OnFailure, QPSolution, SolveInfo, Status, check_on_failure, report_failure
from implicit_layers.solvers.active_set import REFINE, REFINE_DEPENDENT, Degeneracy
from implicit_layers.solvers.interior_point import InteriorPoint


def solve_qp(
    Q: Tensor,  # (*B, n, n)
    p: Tensor,  # (*B, n)
    *,
    A: Tensor | None = None,  # (*B, n_eq, n)
    b: Tensor | None = None,  # (*B, n_eq)
    G: Tensor | None = None,  # (*B, n_ineq, n)
    h: Tensor | None = None,  # (*B, n_ineq)
    lb: Tensor | None = None,
    ub: Tensor | None = None,
    solver: InteriorPoint | None = None,
    on_failure: OnFailure = "raise",
) -> QPSolution:
    r"""Solve a batch of strictly convex quadratic programs, with gradients to all data.

    Problem:  z* = argmin_z ½ zᵀQz + pᵀz  subject to  A z = b,  G z ≤ h;
              duals from L = ½zᵀQz + pᵀz + νᵀ(Az−b) + λᵀ(Gz−h), λ ≥ 0.

    Args:
        Q: (*B, n, n) positive definite; only its symmetric part ½(Q + Qᵀ) is used.
        p: (*B, n).
        A, b: (*B, n_eq, n) and (*B, n_eq), together or not at all.
        G, h: (*B, n_ineq, n) and (*B, n_ineq), together or not at all.
        lb, ub: bounds on z; not there yet: write them as rows of G.
        solver: an `InteriorPoint`; default `InteriorPoint()`.
        on_failure: "raise", or "warn" / "ignore": problems that fail keep their last iterate, get zero gradient and
            are marked in `info`; their neighbours are untouched. Data that are refused raise in any case.
        Leading dimensions *B broadcast. float32 data are solved in float64 inside.

    Returns:  QPSolution(z, nu, lam, s, info) with shapes (*B, n), (*B, n_eq), (*B, n_ineq), (*B, n_ineq), in the dtype
              and on the device of the data; s = h − Gz. `info` has one entry a problem.
    Gradient: of z, nu, lam, s with respect to Q, p, A, b, G, h: one batched solve with the transposed KKT matrix on the
              active rows, reusing the factors of the forward pass; any order, forward and reverse mode. Where a
              constraint is weakly active (λ = s = 0), the derivative to one side; where active rows depend on each
              other, that of least norm; both with a `DegenerateGradientWarning` in the backward pass. A parameter
              shared by the batch gets the sum of the gradients.
    Raises:   DtypeError, DeviceError, ShapeError, NonFiniteError: naming the argument (and index).
              NotPositiveDefiniteError: naming the problem.  InfeasibleError: proven to working precision.
              ConvergenceError: the KKT residual stayed above `solver.tol`.
    Cost:     time O(n³ + n²m + k m³) a problem, m = n_eq + n_ineq, k ≈ 10 factorisations; one factorisation of Q for
              all problems that share it. Memory for backward O(n² + m² + n m), whatever the iterations.
    Source:   Amos & Kolter (2017), OptNet, arXiv:1703.00443; Mehrotra (1992).

    >>> Q, p = torch.eye(2), torch.tensor([-1.0, -4.0])
    >>> G, h = torch.eye(2), torch.tensor([2.0, 3.0])
    >>> solution = solve_qp(Q, p, G=G, h=h)
    >>> solution.z, solution.lam
    (tensor([1., 3.]), tensor([0., 1.]))
    """
    check_on_failure(on_failure)
    if lb is not None or ub is not None:
        raise UnsupportedError(
            "solve_qp: lb and ub are not supported yet; write z <= ub as rows of G (the identity) with h = ub, and "
            "z >= lb as the negative identity with h = -lb"
        )
    solver = InteriorPoint() if solver is None else solver
    if not isinstance(solver, InteriorPoint):
        raise ArgumentTypeError(f"solve_qp: solver must be an InteriorPoint, got {type(solver).__name__}")
    checked, (Q, p, A, b, G, h) = _at_the_door(Q, p, A, b, G, h)
    z, nu, lam, *_, status, converged, iterations, residual = _differentiable(
        _Settings(solver, on_failure, checked), Q, p, A, b, G, h
    )
    s = h - quadratic.matvec(G, z)
    return QPSolution(z, nu, lam, s, SolveInfo(status, converged, iterations, residual))


def _at_the_door(
    Q: Tensor, p: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None
) -> tuple[bool, tuple[Tensor, ...]]:
    """Check the arguments, their values too where they can be read, and expand all to one batch shape."""
    for (matrix_name, matrix), (vector_name, vector) in ((("A", A), ("b", b)), (("G", G), ("h", h))):
        if (matrix is None) != (vector is None):
            given, missing = (matrix_name, vector_name) if vector is None else (vector_name, matrix_name)
            raise ShapeError(f"solve_qp: {given} was given without {missing}; they come together")
    optional = {"A": A, "b": b, "G": G, "h": h}
    tensors = {"Q": Q, "p": p} | {name: tensor for name, tensor in optional.items() if tensor is not None}
    tensors = _without_autocast(tensors)
    dtype, device = checks.floating_tensors(**tensors)
    if device.type == "meta" and type(Q) in (Tensor, torch.nn.Parameter):  # a subclass may hold numbers of its own
        raise DeviceError("solve_qp: the arguments are on the meta device, which holds no numbers to solve with")
    if dtype not in (torch.float32, torch.float64):
        raise DtypeError(f"solve_qp: Q is {dtype}, too coarse for a quadratic program; convert to float32 or float64")
    Q, p = tensors["Q"], tensors["p"]
    if Q.ndim < 2 or Q.shape[-1] != Q.shape[-2]:
        raise ShapeError(f"Q must have shape (*B, n, n), got {tuple(Q.shape)}")
    n = Q.shape[-1]
    if n == 0:
        raise ShapeError(f"Q must have at least one row, got shape {tuple(Q.shape)}")
    checks.trailing_shape("p", p, (n,), f"to fit Q with n = {n}")
    rows = []
    for matrix_name, vector_name in (("A", "b"), ("G", "h")):
        matrix, vector = tensors.get(matrix_name), tensors.get(vector_name)
        if matrix is None or vector is None:
            matrix, vector = p.new_zeros(0, n), p.new_zeros(0)
        elif matrix.ndim < 2 or matrix.shape[-1] != n:
            raise ShapeError(f"{matrix_name} must have shape (*B, rows, {n}) to fit Q, got {tuple(matrix.shape)}")
        else:
            checks.trailing_shape(vector_name, vector, (matrix.shape[-2],), f"to fit the rows of {matrix_name}")
        rows += [matrix, vector]
    A, b, G, h = rows
    batch = checks.batch_shape(Q=(Q, 2), p=(p, 1), A=(A, 2), b=(b, 1), G=(G, 2), h=(h, 1))
    checked = checks.readable(*tensors.values())
    if checked:  # here, where an index is one of the caller's own tensor
        checks.finite(**tensors)
    events = (2, 1, 2, 1, 2, 1)
    arguments = (Q, p, A, b, G, h)
    expanded = (t.expand(*batch, *t.shape[t.ndim - k :]) for t, k in zip(arguments, events, strict=True))
    return checked, tuple(expanded)


def _without_autocast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In an autocast region, take half-precision arguments to float32, as autocast does for such operations."""
    device = next((t.device.type for t in tensors.values() if isinstance(t, Tensor)), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    half = (torch.float16, torch.bfloat16)
    return {name: t.float() if isinstance(t, Tensor) and t.dtype in half else t for name, t in tensors.items()}


_FACTOR_NDIM = (2, 2, 2, 2, 1, 1)  # trailing dimensions of the fields of `quadratic.Factor`
_CONSTANTS = len(_FACTOR_NDIM) + 1  # those fields and the flag `degenerate`: what backward takes as constant


class _Settings(NamedTuple):
    """What a solve needs besides tensors."""

    solver: InteriorPoint
    on_failure: OnFailure
    checked: bool  # whether the values of the arguments are known to be finite


def _stack_rows(A: Tensor, G: Tensor) -> Tensor:
    """Stack the rows of A and G, both flattened: (N or 1, m, n)."""
    if A.shape[-2] == 0 or G.shape[-2] == 0:
        return G if A.shape[-2] == 0 else A
    size = max(A.shape[0], G.shape[0])
    return torch.cat([A.expand(size, -1, -1), G.expand(size, -1, -1)], dim=-2)


class _QP(torch.autograd.Function):
    """(Q, p, A, b, G, h), all of one batch shape, to (z, nu, lam, factors..., info...)."""

    @staticmethod
    def forward(
        settings: _Settings, Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor
    ) -> tuple[Tensor, ...]:
        if not settings.checked:
            checks.finite(Q=Q, p=p, A=A, b=b, G=G, h=h)
        batch, dtype = p.shape[:-1], p.dtype
        n, n_eq, m = p.shape[-1], b.shape[-1], b.shape[-1] + h.shape[-1]
        with transforms.full_precision(p.device):
            flat = [
                quadratic.unexpand(t, k, batch).to(torch.float64)
                for t, k in ((Q, 2), (p, 1), (A, 2), (b, 1), (G, 2), (h, 1))
            ]
            flat[0] = quadratic.symmetric(flat[0])
            E = _stack_rows(flat[2], flat[4])
            f = _stack_rows(flat[3].unsqueeze(-1), flat[5].unsqueeze(-1)).squeeze(-1)
            data = Data(flat[0], flat[1], E, f, None, None, n_eq)
            solver = dataclasses.replace(settings.solver, form="dual", check_every=1)
            result = solver.solve(data, batch.numel())
            if not isinstance(result.factor, quadratic.Factor):
                _cholesky(flat[0], batch)  # the dual form applies wherever this does not raise
            z, y = result.z.to(dtype), result.y.to(dtype)
            residual = result.info.residual
            if dtype != torch.float64:  # judge what is returned, not what was rounded away
                rounded = relative_residual(data, z.double(), y.double(), result.bound)
                residual = torch.maximum(residual, rounded).to(dtype)
        status, _, iterations, _ = result.info
        representable = torch.isfinite(z).all(-1) & torch.isfinite(y).all(-1)
        solved = int(Status.CONVERGED)
        status = torch.where(representable | (status != solved), status, int(Status.NOT_CONVERGED)).to(torch.int8)
        info = SolveInfo(*(t.reshape(batch) for t in (status, status == solved, iterations, residual)))
        report_failure(
            info, settings.on_failure, what="solve_qp", tol=solver.tolerance(torch.float64), max_iter=solver.max_iter
        )
        return (
            z.reshape(*batch, n).clone(),  # forward-mode differentiation refuses outputs that are views
            y[:, :n_eq].reshape(*batch, n_eq).clone(),
            y[:, n_eq:].reshape(*batch, m - n_eq).clone(),
            *(quadratic.expand(t, k, batch) for t, k in zip(result.factor, _FACTOR_NDIM, strict=True)),
            result.degenerate.reshape(batch),
            *info,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, Q, _, A, _, G, _ = inputs
        z, nu, lam, *constant = output
        *factor, degenerate, _, converged, _, _ = constant
        ctx.mark_non_differentiable(*constant)
        saved = (Q, A, G, z, nu, lam, *factor, degenerate, converged)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_nu: Tensor, grad_lam: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needs = (ctx.needs_input_grad[1], ctx.needs_input_grad[3], ctx.needs_input_grad[5])

        def work(*tensors: Tensor) -> list[Tensor | None]:
            Q, A, G, z, nu, lam, *factor, converged, grad_z, grad_nu, grad_lam = tensors
            good = converged.unsqueeze(-1)
            rights = (torch.where(good, grad, 0.0) for grad in (grad_z, grad_nu, grad_lam))
            v_z, v_nu, v_lam = _KKTSolve.apply(*factor, Q, A, G, *rights)
            grad_Q, grad_A, grad_G = quadratic.parameter_gradients(v_z, v_nu, v_lam, z, nu, lam, needs)
            return [grad_Q, -v_z, grad_A, v_nu, grad_G, v_lam]

        return None, *modernised(work, (*ctx.saved_tensors, grad_z, grad_nu, grad_lam))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with transforms.forward_mode():
            Q, A, G, z, nu, lam, *factor, converged = transforms.primals(ctx.saved_tensors)
            d_Q, d_p, d_A, d_b, d_G, d_h = tangents
            r_z, r_nu, r_lam = _change_of_residual(d_Q, d_A, d_G, z, nu, lam)
            r_z = r_z if d_p is None else r_z - d_p
            r_nu = r_nu if d_b is None else r_nu + d_b
            r_lam = r_lam if d_h is None else r_lam + d_h
            good = converged.unsqueeze(-1)
            rights = (torch.where(good, right, 0.0) for right in (r_z, r_nu, r_lam))
            return (*_KKTSolve.apply(*factor, Q, A, G, *rights), *(None for _ in range(_CONSTANTS + 4)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], settings: _Settings, *tensors: Tensor) -> tuple[Any, Any]:
        outputs = _QP.apply(settings, *transforms.map_to_front(info.batch_size, in_dims[1:], tensors))
        return outputs, (0,) * len(outputs)


@uncompiled
def _differentiable(settings: _Settings, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`_QP` as a function that the compiler leaves whole, instead of tracing its way to the first question of data."""
    outputs: tuple[Tensor, ...] = _QP.apply(settings, *tensors)
    return outputs


class _KKTSolve(torch.autograd.Function):
    """(factors, Q, A, G, r_z, r_nu, r_lam) to (u_z, u_nu, u_lam): the KKT system on the active rows, K u = r."""

    @staticmethod
    def forward(
        chol_q: Tensor,
        chol_eq: Tensor,
        across: Tensor,
        chol_ineq: Tensor,
        scale: Tensor,
        active: Tensor,
        degenerate: Tensor,
        Q: Tensor,
        A: Tensor,
        G: Tensor,
        r_z: Tensor,
        r_nu: Tensor,
        r_lam: Tensor,
    ) -> tuple[Tensor, ...]:
        batch, dtype, n_eq = r_z.shape[:-1], r_z.dtype, r_nu.shape[-1]
        refine = REFINE
        if checks.host_bool((degenerate != 0).any()):
            refine = _warn_of_degeneracy(degenerate)
        with transforms.full_precision(r_z.device):
            blocks = (chol_q, chol_eq, across, chol_ineq, scale, active)
            factor = (quadratic.unexpand(t, k, batch) for t, k in zip(blocks, _FACTOR_NDIM, strict=True))
            Q, A, G = (quadratic.unexpand(t, 2, batch).to(torch.float64) for t in (Q, A, G))
            Q = quadratic.symmetric(Q)
            right_y = torch.cat([r_nu, r_lam], dim=-1)
            u_z, u_y, _ = quadratic.solve(
                quadratic.Factor(*factor),
                Q,
                _stack_rows(A, G),
                r_z.reshape(batch.numel(), r_z.shape[-1]).to(torch.float64),
                right_y.reshape(batch.numel(), right_y.shape[-1]).to(torch.float64),
                None,
                refine,
            )
        u_nu, u_lam = u_y.to(dtype).reshape(right_y.shape).split([n_eq, r_lam.shape[-1]], dim=-1)
        return u_z.to(dtype).reshape(r_z.shape).clone(), u_nu.clone(), u_lam.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        saved = (*inputs[: _CONSTANTS + 3], *output)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[_CONSTANTS : _CONSTANTS + 3]

        def work(*tensors: Tensor) -> list[Tensor | None]:
            *factor, Q, A, G, u_z, u_nu, u_lam, grad_z, grad_nu, grad_lam = tensors
            v_z, v_nu, v_lam = _KKTSolve.apply(*factor, Q, A, G, grad_z, grad_nu, grad_lam)
            matrices = quadratic.parameter_gradients(v_z, v_nu, v_lam, u_z, u_nu, u_lam, needs)
            return [*matrices, v_z, v_nu, v_lam]

        return (*(None for _ in range(_CONSTANTS)), *modernised(work, (*ctx.saved_tensors, *grads)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        with transforms.forward_mode():
            *factor, Q, A, G, u_z, u_nu, u_lam = transforms.primals(ctx.saved_tensors)
            d_Q, d_A, d_G, *d_right = tangents[_CONSTANTS:]
            changes = _change_of_residual(d_Q, d_A, d_G, u_z, u_nu, u_lam)
            rights = (
                change if tangent is None else change + tangent
                for change, tangent in zip(changes, d_right, strict=True)
            )
            return _KKTSolve.apply(*factor, Q, A, G, *rights)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> tuple[Any, Any]:
        return _KKTSolve.apply(*transforms.map_to_front(info.batch_size, in_dims, tensors)), (0, 0, 0)


def _warn_of_degeneracy(degenerate: Tensor) -> int:
    """Say which problems have no unique derivative; returns how many refinement steps their factors need."""
    dependent = degenerate == int(Degeneracy.DEPENDENT)
    weak = degenerate == int(Degeneracy.WEAK)
    for where, what in (
        (
            dependent,
            "active constraints that depend on each other, so that duals and derivatives are not unique; those of "
            "least norm are used. Remove duplicated or redundant rows",
        ),
        (
            weak,
            "a constraint that is only just active (its dual and its slack are both zero), where the solution has a "
            "kink; the derivative to one side is used",
        ),
    ):
        if checks.host_bool(where.any()):
            first = f" (first: index {checks.index_of(where)})" if where.ndim else ""
            warn(
                f"solve_qp: {int(where.sum())} of {where.numel()} problems{first} have {what}.",
                DegenerateGradientWarning,
            )
    return REFINE_DEPENDENT if checks.host_bool(dependent.any()) else REFINE


def _change_of_residual(
    d_Q: Tensor | None, d_A: Tensor | None, d_G: Tensor | None, z: Tensor, nu: Tensor, lam: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Move the matrices' tangents to the right-hand side: −(dQ z + dAᵀν + dGᵀλ), −dA z, −dG z."""
    r_z, r_nu, r_lam = torch.zeros_like(z), torch.zeros_like(nu), torch.zeros_like(lam)
    if d_Q is not None:
        r_z = r_z - 0.5 * (quadratic.matvec(d_Q, z) + quadratic.transposed_matvec(d_Q, z))
    if d_A is not None:
        r_z = r_z - quadratic.transposed_matvec(d_A, nu)
        r_nu = r_nu - quadratic.matvec(d_A, z)
    if d_G is not None:
        r_z = r_z - quadratic.transposed_matvec(d_G, lam)
        r_lam = r_lam - quadratic.matvec(d_G, z)
    return r_z, r_nu, r_lam


def _cholesky(Q: Tensor, batch: torch.Size) -> Tensor:
    """Factor Q, (N or 1, n, n); refuse what is not positive definite to working precision."""
    factor, info = torch.linalg.cholesky_ex(Q)
    diagonal = Q.diagonal(dim1=-2, dim2=-1)
    floor = 10 * Q.shape[-1] * torch.finfo(Q.dtype).eps
    relative = factor.diagonal(dim1=-2, dim2=-1) ** 2 / diagonal.abs().clamp(min=torch.finfo(Q.dtype).tiny)
    definite = (info == 0) & (relative.amin(-1) > floor)
    if checks.host_bool(definite.all()):
        return factor
    bad = ~definite if Q.shape[0] == 1 else (~definite).reshape(batch)
    smallest = float(torch.linalg.eigvalsh(Q[(~definite).nonzero()[0, 0]])[0])
    shared = Q.shape[0] == 1
    raise NotPositiveDefiniteError(
        f"Q{'' if shared else checks.index_of(bad)} is not positive definite (smallest eigenvalue {smallest:.3g}"
        f"{'' if shared else f'; {int(bad.sum())} of {bad.numel()} problems'}). If it should be, add a small multiple "
        "of the identity, Q + 1e-6 * torch.eye(n); if it is only semidefinite, or indefinite by nature, this solver "
        "does not apply."
    )
