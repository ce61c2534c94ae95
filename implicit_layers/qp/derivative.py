r"""The derivative of a quadratic program's solution, to any order and in both modes.

With K the symmetric KKT matrix on the active constraints (see `kkt.quadratic`), a change of the data moves the solution

    K d(z, ν, λ, μ) = r,   r_z = −(dQ z + dp + dAᵀν + dGᵀλ),   r_ν = db − dA z,   r_λ = dh − dG z   (active rows),
                           r_μ = the change of the bound that holds an unknown,

where μ = λ_ub − λ_lb is the dual of the bounds. With the adjoint K v = (g_z, g_ν, g_λ, g_μ) the gradients are

    ∂p = −v_z,  ∂Q = −v_z zᵀ,  ∂b = v_ν,  ∂A = −(ν v_zᵀ + v_ν zᵀ),  ∂h = v_λ,  ∂G = −(λ v_zᵀ + v_λ zᵀ),  ∂(bound) = v_μ.

Forward mode solves the first system, reverse mode the second, and derivatives of derivatives the same one again:
`_KKTSolve` is that one linear solve, with the factors that the forward pass ended with.

Each Function comes twice. The compiler can look into one that has no rules for forward mode and `vmap`, so it gets that
one; everybody else gets the one with the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from implicit_layers import checks, transforms
from implicit_layers.errors import UnsupportedError
from implicit_layers.kkt import quadratic
from implicit_layers.legacy_vmap import level, modernised
from implicit_layers.qp import operators, value
from implicit_layers.qp.arguments import EVENT_NDIM, Program
from implicit_layers.qp.run import (
    DIFFERENTIABLE,
    KKT_EVENT_NDIM,
    Outcome,
    Settings,
    factor_event_ndim,
    run,
    solve_kkt,
)
from implicit_layers.solvers import compiled


class _ReverseKKT(torch.autograd.Function):
    """(Q, A, G, r_z, r_nu, r_lam, r_bound, degenerate, active set) to (u_z, u_nu, u_lam, u_bound), where K u = r."""

    @staticmethod
    @transforms.signed
    def forward(  # one by one: with *tensors the compiler does not know whether there is a context
        settings: Settings,
        Q: Tensor,
        A: Tensor,
        G: Tensor,
        r_z: Tensor,
        r_nu: Tensor,
        r_lam: Tensor,
        r_bound: Tensor,
        degenerate: Tensor,
        active: Tensor,
        fixed: Tensor,
    ) -> tuple[Tensor, ...]:
        return operators.solve_kkt(settings, Q, A, G, r_z, r_nu, r_lam, r_bound, degenerate, active, fixed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        settings, *tensors = inputs
        ctx.settings, ctx.tensors = settings, len(tensors)
        saved = (*tensors[:3], *output, *tensors[7:])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        settings, needs = ctx.settings, ctx.needs_input_grad[1:4]

        def work(*tensors: Tensor) -> list[Tensor | None]:
            Q, A, G, u_z, u_nu, u_lam, _, *constants, g_z, g_nu, g_lam, g_bound = tensors
            v = _solve(settings, Q, A, G, g_z, g_nu, g_lam, g_bound, *constants)
            matrices = _matrix_gradients(v, (u_z, u_nu, u_lam), needs, (Q, A, G))
            return [*matrices, *v]

        gradients = modernised(work, (*ctx.saved_tensors, *grads))
        return (None, *gradients, *(None for _ in range(ctx.tensors - 7)))


class _KKTSolve(_ReverseKKT):
    """The same with any kind of factor instead of the active set, for forward mode and `vmap` too."""

    @staticmethod
    @transforms.signed
    def forward(settings: Settings, *tensors: Tensor) -> tuple[Tensor, ...]:
        return solve_kkt(settings, *tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        settings = ctx.settings

        def work(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            with transforms.forward_mode():
                *saved, d_Q, d_A, d_G, d_z, d_nu, d_lam, d_bound = tensors
                Q, A, G, u_z, u_nu, u_lam, u_bound, *constants = transforms.primals(saved)  # type: ignore[arg-type]
                changes = _change_of_residual(d_Q, d_A, d_G, u_z, u_nu, u_lam)
                rights = (_add(x, y) for x, y in zip(changes, (d_z, d_nu, d_lam), strict=True))
                d_bound = torch.zeros_like(u_bound) if d_bound is None else d_bound
                return _solve(settings, Q, A, G, *rights, d_bound, *constants)

        return tuple(modernised(work, (*ctx.saved_tensors, *tangents[:7])))  # type: ignore[arg-type]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], settings: Settings, *tensors: Tensor) -> tuple[Any, Any]:
        events = (*KKT_EVENT_NDIM, *factor_event_ndim(len(tensors) - len(KKT_EVENT_NDIM)))
        r_z, dim = tensors[3], in_dims[4]
        batch = (r_z if dim is None else r_z.movedim(dim, 0)[0]).shape[:-1]
        moved = map_to_front(info.batch_size, in_dims[1:], tensors, events, batch, slice(3))
        return _KKTSolve.apply(settings, *moved), (0, 0, 0, 0)


def _solve(settings: Settings, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Solve the KKT system, differentiably."""
    function = _ReverseKKT if torch.compiler.is_compiling() else _KKTSolve
    solution: tuple[Tensor, ...] = transforms.apply(function, settings, *tensors, plain=checks.plain(*tensors))
    return solution


class _ReverseQP(torch.autograd.Function):
    """(Q, p, A, b, G, h, lb, ub) to the fields of `run.Outcome`, of which the first have derivatives."""

    @staticmethod
    @transforms.signed
    def forward(
        settings: Settings,
        Q: Tensor,
        p: Tensor,
        A: Tensor,
        b: Tensor,
        G: Tensor,
        h: Tensor,
        lb: Tensor | None,
        ub: Tensor | None,
    ) -> tuple[Tensor, ...]:
        solve = operators.run if torch.compiler.is_compiling() else run
        return solve(settings, Q, p, A, b, G, h, lb, ub).flat()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        settings, Q, _, A, _, G, _, _, _ = inputs
        ctx.settings, ctx.outputs = settings._replace(settled=None), len(output)
        ctx.shapes = [None if x is None else x.shape for x in inputs[1:]]
        ctx.mark_non_differentiable(*output[DIFFERENTIABLE:])
        ctx.set_materialize_grads(False)
        saved = (Q, A, G, *output)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        settings, needs, shapes = ctx.settings, ctx.needs_input_grad[1:], ctx.shapes

        def work(*tensors: Tensor | None) -> Sequence[Tensor | None]:
            saved, grads = tensors[:-DIFFERENTIABLE], tensors[-DIFFERENTIABLE:]
            Q, A, G, point, outcome = _unpack(settings, saved)  # type: ignore[arg-type]
            return _gradients(settings, (Q, A, G), point, outcome, grads, needs, shapes)

        return None, *modernised(work, (*ctx.saved_tensors, *grads[:DIFFERENTIABLE]))


class _QP(_ReverseQP):
    """The same, for forward mode and `vmap` too."""

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        settings = ctx.settings

        def work(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            with transforms.forward_mode():
                *saved, d_Q, d_p, d_A, d_b, d_G, d_h, d_lb, d_ub = tensors
                Q, A, G, point, outcome = _unpack(settings, transforms.primals(saved))  # type: ignore[arg-type]
                changes = _change_of_residual(d_Q, d_A, d_G, *point)
                moves = (None if d_p is None else -d_p, d_b, d_h)
                rights = [_add(x, y) for x, y in zip(changes, moves, strict=True)]
                rights.append(torch.zeros_like(outcome.bound))
                for pull, d_bound in ((outcome.pull_lb, d_lb), (outcome.pull_ub, d_ub)):
                    rights[3] = _add(rights[3], None if d_bound is None else pull * d_bound)
                good = outcome.converged.unsqueeze(-1)
                rights = _first_order_only(settings, [torch.where(good, right, 0.0) for right in rights], outcome.z)
                moved = _solve(settings, Q, A, G, *rights, outcome.degenerate, *outcome.factor)
                of_s = value.change_of_slacks(moved[0], d_G, d_h, outcome.z, G)
                of_value = value.change_of_value((d_Q, d_p, d_A, d_b, d_G, d_h, d_lb, d_ub), outcome[:4])
                return *moved, torch.where(good, of_s, 0.0), torch.where(outcome.converged, of_value, 0.0)

        moved = modernised(work, (*ctx.saved_tensors, *tangents))
        return *moved, *(None for _ in range(ctx.outputs - DIFFERENTIABLE))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], settings: Settings, *tensors: Tensor | None) -> tuple[Any, Any]:
        shapes = (
            t.shape[: t.ndim - k] if d is None else t.movedim(d, 0).shape[1 : t.ndim - k]
            for t, d, k in zip(tensors, in_dims[1:], EVENT_NDIM, strict=True)
            if t is not None
        )
        batch = torch.broadcast_shapes(*shapes)
        moved = map_to_front(info.batch_size, in_dims[1:], tensors, EVENT_NDIM, batch, slice(8))
        outputs = _QP.apply(settings, *moved)
        return outputs, (0,) * len(outputs)


class _SettledQP(torch.autograd.Function):
    """What the kernel has settled, attached to plain data: (Q, p, A, b, G, h, lb, ub) to (z, ν, λ, s, value) and, with
    bounds, their dual, in reverse mode.

    The rest of what is settled needs no derivative, so autograd does not have to know of it.
    """

    @staticmethod
    def forward(ctx: Any, settings: Settings, settled: compiled.Settled, *data: Tensor | None) -> tuple[Tensor, ...]:
        z, nu, lam, bound, s, value, pull_lb, pull_ub, (memory, structure), *_ = settled
        ctx.settings, ctx.structure = settings, structure
        ctx.set_materialize_grads(False)
        if bound is None:
            ctx.save_for_backward(data[0], data[2], data[4], z, nu, lam, memory)
            return z, nu, lam, s, value
        ctx.save_for_backward(data[0], data[2], data[4], z, nu, lam, memory, bound, pull_lb, pull_ub)
        return z, nu, lam, s, value, bound

    @staticmethod
    def backward(
        ctx: Any,
        g_z: Tensor | None,
        g_nu: Tensor | None,
        g_lam: Tensor | None,
        g_s: Tensor | None,
        g_value: Tensor | None,
        g_bound: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        settings, structure, needs = ctx.settings, ctx.structure, (*ctx.needs_input_grad[2:], False, False)
        saved, grads = ctx.saved_tensors, (g_z, g_nu, g_lam, g_bound)
        if g_s is None and g_value is None and compiled.ordinary((*saved, *grads)) and _once():
            Q, A, G, z, nu, lam, memory, *of_bounds = saved
            matrices, point = (Q, A, G), (z, nu, lam)
            which = (needs[0], needs[2], needs[4], needs[1], needs[6], needs[7])
            packed, pull_ub = compiled.Packed(memory, structure), of_bounds[2] if of_bounds else None
            solved = compiled.adjoint(structure.batch, matrices, point, grads, packed, None, None, which, pull_ub)
            if solved is not None:
                shapes = None if structure.alone else structure.shapes
                return None, None, *_collected(solved, matrices, point, needs, shapes)[: len(needs) - 2]

        def work(*tensors: Any) -> Sequence[Tensor | None]:
            Q, A, G, z, nu, lam, memory, *of_bounds = tensors[:-6]
            outcome = _settled_before(z, nu, lam, of_bounds, tuple(compiled.Packed(memory, structure).factor()))
            return _gradients(settings, (Q, A, G), (z, nu, lam), outcome, tensors[-6:], needs, structure.shapes)

        return None, None, *modernised(work, (*saved, *grads, g_s, g_value))[: len(needs) - 2]


def _once() -> bool:
    """Whether nobody differentiates what is computed now, nor maps over it."""
    return not torch.is_grad_enabled() and not transforms.at_work() and level() == 0


def _settled_before(
    z: Tensor, nu: Tensor, lam: Tensor, of_bounds: Sequence[Tensor], factor: tuple[Tensor, ...]
) -> Outcome:
    """As much of an outcome as a backward pass reads; all have converged, and nothing is degenerate."""
    no_bound = z.new_empty(*z.shape[:-1], 0)
    bound, pull_lb, pull_ub = of_bounds or (no_bound,) * 3
    nothing = torch.zeros_like(z[..., 0], dtype=torch.int8)
    of_info = (nothing, nothing, nothing, torch.ones_like(nothing, dtype=torch.bool), nothing, nothing)
    return Outcome(z, nu, lam, bound, nothing, nothing, pull_lb, pull_ub, *of_info, (), factor)


def attached(
    settings: Settings, settled: compiled.Settled, program: Program
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Give z, ν, λ, s, value and the dual of the bounds of settled programs, all of plain data, their derivatives."""
    data = program[:6] if settled.bound is None else program
    outputs = transforms.apply(_SettledQP, settings, settled, *data, plain=True)
    return outputs if len(outputs) == 6 else (*outputs, None)


def differentiable(settings: Settings, program: Program) -> Outcome:
    """Solve a batch of programs, differentiably."""
    function = _ReverseQP if torch.compiler.is_compiling() else _QP
    return Outcome.of(settings.gradient, transforms.apply(function, settings, *program, plain=settings.plain))


def _gradients(
    settings: Settings,
    matrices: tuple[Tensor, Tensor, Tensor],
    point: Sequence[Tensor],
    outcome: Outcome,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    shapes: Sequence[torch.Size],
) -> Sequence[Tensor | None]:
    """From gradients of z, ν, λ, the dual of the bounds, s and the value to those of the data."""
    g_z, g_nu, g_lam, g_bound, g_s, g_value = grads
    if g_s is None and g_value is None:
        return _pulled_back(settings, matrices, point, outcome, (g_z, g_nu, g_lam, g_bound), needs, shapes)
    good = outcome.converged
    g_s = None if g_s is None else torch.where(good.unsqueeze(-1), g_s, 0.0)
    g_value = None if g_value is None else torch.where(good, g_value, 0.0)
    direct = value.gradients(g_s, g_value, outcome[:4], needs, shapes)
    if g_s is not None:
        through_z = -quadratic.transposed_matvec(matrices[2], g_s)
        g_z = through_z if g_z is None else g_z + through_z
    if g_z is None and g_nu is None and g_lam is None and g_bound is None:
        return direct  # the optimal value asks for no solve
    implicit = _pulled_back(settings, matrices, point, outcome, (g_z, g_nu, g_lam, g_bound), needs, shapes)
    return [x if y is None else _add(y, x) for x, y in zip(direct, implicit, strict=True)]


def _pulled_back(
    settings: Settings,
    matrices: tuple[Tensor, Tensor, Tensor],
    point: Sequence[Tensor],
    outcome: Outcome,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    shapes: Sequence[torch.Size],
) -> Sequence[Tensor | None]:
    """From gradients of z, ν, λ and the dual of the bounds to those of the data: one solve."""
    quick = _solved_by_the_kernel(settings, matrices, outcome, grads, needs, shapes)
    if quick is not None:
        return quick
    good = outcome.converged.unsqueeze(-1)
    rights = [
        torch.zeros_like(like) if grad is None else torch.where(good, grad, 0.0)
        for grad, like in zip(grads, (*point, outcome.bound), strict=True)
    ]
    rights = _first_order_only(settings, rights, outcome.z)
    v_z, v_nu, v_lam, v_bound = _solve(settings, *matrices, *rights, outcome.degenerate, *outcome.factor)
    grad_Q, grad_A, grad_G = _matrix_gradients((v_z, v_nu, v_lam), point, (needs[0], needs[2], needs[4]), matrices)
    vectors = (-v_z, v_nu, v_lam, outcome.pull_lb * v_bound, outcome.pull_ub * v_bound)
    grad_p, grad_b, grad_h, grad_lb, grad_ub = (
        vector.sum_to_size(shapes[i]) if needs[i] else None for i, vector in zip((1, 3, 5, 6, 7), vectors, strict=True)
    )
    return [grad_Q, grad_p, grad_A, grad_b, grad_G, grad_h, grad_lb, grad_ub]


def _solved_by_the_kernel(
    settings: Settings,
    matrices: tuple[Tensor, Tensor, Tensor],
    outcome: Outcome,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    shapes: Sequence[torch.Size],
) -> list[Tensor | None] | None:
    """The gradients of all data by the compiled kernel, where it may be used and nothing is degenerate."""
    z, nu, lam, bound = outcome[:4]
    if settings.solver.backend == "torch" or settings.gradient == "smoothed":
        return None
    if len(outcome.factor) != len(quadratic.EVENT_NDIM) or torch.is_grad_enabled() or transforms.in_forward_mode():
        return None
    held = bound.shape[-1]
    if not outcome.status.numel() or not compiled.fits(*matrices, bool(held)):
        return None
    if outcome.factor[-1].shape[-1] != nu.shape[-1] + lam.shape[-1] + held:  # bounds that are none
        return None
    if not checks.plain(*matrices, z, *(grad for grad in grads if grad is not None)):
        return None
    which = (needs[0], needs[2], needs[4])
    adjoint = compiled.adjoint(
        z.shape[:-1],
        matrices,
        (z, nu, lam),
        grads,
        quadratic.Factor(*outcome.factor),
        outcome.degenerate,
        outcome.converged,
        (*which, needs[1], needs[6] and bool(held), needs[7] and bool(held)),
        outcome.pull_ub if held else None,
    )
    if adjoint is None:
        return None
    return _collected(adjoint, matrices, (z, nu, lam), needs, shapes)


def _collected(
    solved: tuple[tuple[Tensor, Tensor, Tensor], list[Tensor | None]],
    matrices: tuple[Tensor, Tensor, Tensor],
    point: tuple[Tensor, Tensor, Tensor],
    needs: Sequence[bool],
    shapes: Sequence[torch.Size] | None,
) -> list[Tensor | None]:
    """The gradients of all data from what `compiled.adjoint` returns; without shapes nothing is shared by the batch."""
    (v_z, v_nu, v_lam), (grad_Q, grad_A, grad_G, grad_p, grad_lb, grad_ub) = solved
    grad_b, grad_h = v_nu if needs[3] else None, v_lam if needs[5] else None
    gradients = [grad_Q, grad_p, grad_A, grad_b, grad_G, grad_h, grad_lb, grad_ub]
    if shapes is None:
        return gradients
    shared = [needs[i] and gradients[i] is None for i in (0, 2, 4)]
    if any(shared):
        summed = _matrix_gradients((v_z, v_nu, v_lam), point, shared, matrices)
        for i, new in zip((0, 2, 4), summed, strict=True):
            gradients[i] = gradients[i] if new is None else new
    for i in (1, 3, 5, 6, 7):
        vector = gradients[i]
        gradients[i] = None if vector is None else _summed(vector, shapes[i])
    return gradients


def _summed(vector: Tensor, shape: torch.Size) -> Tensor:
    """Sum over what is shared."""
    return vector if vector.shape == shape else vector.sum_to_size(shape)


def _unpack(settings: Settings, saved: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor], Outcome]:
    """Take what was saved apart: Q, A, G, the point (z, ν, λ) of the derivative, and the outcome."""
    Q, A, G, *outputs = saved
    outcome = Outcome.of(settings.gradient, tuple(outputs))
    point = _first_order_only(settings, outcome.smooth, outcome.z) or [outcome.z, outcome.nu, outcome.lam]
    return Q, A, G, point, outcome


def _first_order_only(settings: Settings, tensors: Sequence[Tensor], witness: Tensor) -> list[Tensor]:
    """Refuse to be differentiated again where the point of the derivative is not the solution that autograd knows."""
    if settings.gradient != "smoothed":
        return list(tensors)
    return [_FirstOrderOnly.apply(tensor, witness) for tensor in tensors]


class _FirstOrderOnly(torch.autograd.Function):
    """(x, witness) to x, which may be differentiated again only where the witness is constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, witness: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.needs_input_grad[1]:
            raise UnsupportedError(
                'solve_qp: gradient="smoothed" has first derivatives only; use gradient="exact" for higher ones'
            )
        return grad, None

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor | None, d_witness: Tensor | None) -> Tensor | None:
        if d_witness is not None:
            raise UnsupportedError(
                'solve_qp: gradient="smoothed" has first derivatives only; use gradient="exact" for higher ones'
            )
        return d_x


def map_to_front(
    size: int,
    in_dims: Sequence[int | None],
    tensors: Sequence[Tensor | None],
    events: Sequence[int],
    batch: torch.Size,
    data: slice,
) -> list[Tensor | None]:
    """Move the mapped dimension of each tensor to the front; data that all problems share keep dimensions of size 1."""
    may_be_shared = range(len(tensors))[data]

    def move(i: int, tensor: Tensor | None, dim: int | None, event_ndim: int) -> Tensor | None:
        if tensor is None:
            return None
        if dim is not None:
            tensor = tensor.movedim(dim, 0)
            return tensor.expand((size, *batch, *tensor.shape[tensor.ndim - event_ndim :]))
        if i in may_be_shared and tensor.shape[: tensor.ndim - event_ndim].numel() == 1:
            return tensor.unsqueeze(0)
        return tensor.expand((size, *tensor.shape))

    each = zip(range(len(tensors)), tensors, in_dims, events, strict=True)
    return [move(*one) for one in each]


def _add(x: Tensor, y: Tensor | None) -> Tensor:
    """Add what may be missing."""
    return x if y is None else x + y


def _change_of_residual(
    d_Q: Tensor | None, d_A: Tensor | None, d_G: Tensor | None, z: Tensor, nu: Tensor, lam: Tensor
) -> list[Tensor]:
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
    return [r_z, r_nu, r_lam]


def _matrix_gradients(
    adjoint: Sequence[Tensor], point: Sequence[Tensor], needed: Sequence[bool], matrices: Sequence[Tensor]
) -> list[Tensor | None]:
    """Turn an adjoint v and a point into the gradients of Q, A and G, summed where a matrix is shared.

    d(point) = K⁻¹ r with r_z = −(dQ z + dAᵀν + dGᵀλ), r_ν = −dA z, r_λ = −dG z; so ⟨v, r⟩ gives the outer products.
    Only the symmetric part of Q counts, so its gradient is symmetric: −½(v_z zᵀ + z v_zᵀ).
    """
    (v_z, v_nu, v_lam, *_), (z, nu, lam, *_) = adjoint, point
    pairs = ((z, v_z), (nu, v_nu), (lam, v_lam))
    weights = (-0.5, -1.0, -1.0)
    return [
        value.outer_sum(torch.stack(pair, dim=-1).mul(weight), torch.stack([v_z, z], dim=-2), matrix.shape[:-2])
        if need
        else None
        for pair, weight, need, matrix in zip(pairs, weights, needed, matrices, strict=True)
    ]
