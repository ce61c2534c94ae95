"""The one autograd function: a solution of F(z, θ) = 0 as a differentiable function of θ.

To any order, in reverse and forward mode, under every functional transform:

    backward of z:  Jᵀu = −g through the same function, then g_θ = F_θᵀ u;
    forward mode:   J dz = −F_θ dθ through the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from implicit_layers.eager import uncompiled
from implicit_layers.jacobian import living, opaque, pullback, pushforward, recordable, transform_active
from implicit_layers.legacy_vmap import modernised
from implicit_layers.system import LinearSystem, System
from implicit_layers.transforms import forward_mode, full_precision, primals

AnySystem = System | LinearSystem


def _masked(mask: Tensor, x: Tensor, otherwise: Tensor | float) -> Tensor:
    """Keep x where the problem's entry of the mask is true."""
    return torch.where(mask.reshape((*mask.shape, *[1] * (x.ndim - mask.ndim))), x, otherwise)


class _Solve(torch.autograd.Function):
    """(system, z0, *parameters) -> (z, status, converged, iterations, residual); z alone is differentiable."""

    @staticmethod
    @uncompiled
    def forward(system: AnySystem, z0: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Solve, unseen by autograd."""
        with opaque(z0.device):
            z0, *plain = recordable(z0, *parameters)
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
        with forward_mode():
            z, converged, parameters = _saved(ctx)
            z, *parameters = primals((z, *parameters))

            def work(z: Tensor, converged: Tensor, *rest: Any) -> list[Tensor | None]:
                return [push_forward(ctx.system, z, converged, rest[: ctx.count], rest[ctx.count :])]

            return *modernised(work, (z, converged, *parameters, *tangents[2:])), None, None, None, None

    @staticmethod
    @uncompiled
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """Solve over the mapped axis as over one more batch dimension."""
        system, *tensors = inputs
        dims = in_dims[1:]
        places = system.places(dims)
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
    """The solution, which problems were solved, and the parameters; failed problems stand at their start."""
    # after `vjp` has returned, what it tracked is a wrapper that no transform takes off any more
    z, converged, *rest = map(living, ctx.saved_tensors)
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
    with full_precision(z.device), _recording(z, g, *parameters):
        if system.on_failure != "raise":
            g = _masked(converged, g, 0.0)
        linear_parameters = system.linear_parameters(z, g, parameters)
        u = apply(system.transposed_system(), torch.zeros_like(g), *linear_parameters)[0]
        chosen = [i for i, need in enumerate(needed) if need]
        F = _residual_of(system, z, parameters, chosen)
        pulled = iter(pullback(F, *(parameters[i] for i in chosen))[1](u))
        return [next(pulled) if need else None for need in needed]


def push_forward(
    system: AnySystem, z: Tensor, converged: Tensor, parameters: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Tensor:
    """The tangent of the solution from those of the parameters."""
    pairs = enumerate(zip(parameters, tangents, strict=True))
    chosen = {i: t for i, (x, t) in pairs if t is not None and x.is_floating_point()}
    if not chosen:
        return torch.zeros_like(z)
    with full_precision(z.device), _recording(z, *parameters, *chosen.values()):
        F = _residual_of(system, z, parameters, list(chosen))
        moved = pushforward(F, [parameters[i] for i in chosen], list(chosen.values()), z)
        if system.on_failure != "raise":
            moved = _masked(converged, moved, 0.0)
        linear_parameters = system.linear_parameters(z, moved, parameters)
        return apply(system.tangent_system(), torch.zeros_like(moved), *linear_parameters)[0]


def _recording(*tensors: Tensor) -> AbstractContextManager[None]:
    """Record no graph where nothing asks for one; a transform sees to that itself."""
    if transform_active() or any(x.requires_grad for x in tensors):
        return nullcontext()
    return torch.no_grad()


def _residual_of(
    system: AnySystem, z: Tensor, parameters: Sequence[Tensor], chosen: Sequence[int]
) -> Callable[..., Tensor]:
    """F at the solution as a function of some of the parameters."""

    def F(*some: Tensor) -> Tensor:
        every = list(parameters)
        for i, x in zip(chosen, some, strict=True):
            every[i] = x
        return system.residual(z, *every)

    return F
