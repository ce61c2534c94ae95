"""The optimal value, differentiated by the envelope theorem: with the duals at hand, its gradient asks for no solve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from implicit_layers import transforms
from implicit_layers.kkt import quadratic
from implicit_layers.legacy_vmap import modernised
from implicit_layers.qp.arguments import EVENT_NDIM, Program
from implicit_layers.qp.derivative import map_to_front, outer_sum
from implicit_layers.qp.run import Outcome


def optimal_value(outcome: Outcome, program: Program, *, plain: bool) -> Tensor:  # (*B,)
    r"""½ zᵀQz + pᵀz at the solution.

    Its gradient is that of the Lagrangian with z and the duals held: ∂Q = ½ zzᵀ, ∂p = z, ∂A = ν zᵀ, ∂b = −ν, ∂G = λ zᵀ,
    ∂h = −λ, ∂lb = λ_lb, ∂ub = −λ_ub. Derivatives of it go through z and the duals again.
    """
    good = outcome.converged
    if torch.compiler.is_compiling():  # the chain rule says the same, at the price of a solve
        z = torch.where(good.unsqueeze(-1), outcome.z, outcome.z.detach())
        whole = _value(z, program.Q, program.p)
        return torch.where(good, whole, whole.detach())
    arguments = (good, outcome.z, outcome.nu, outcome.lam, outcome.bound, *program)
    value: Tensor = transforms.apply(_Value, *arguments, plain=plain)
    return value


def _value(z: Tensor, Q: Tensor, p: Tensor) -> Tensor:
    """½ zᵀQz + pᵀz, in float64."""
    z, Q, p = z.double(), Q.double(), p.double()
    return ((0.5 * quadratic.matvec(Q, z) + p) * z).sum(-1)


class _Value(torch.autograd.Function):
    """(converged, z, nu, lam, bound, Q, p, A, b, G, h, lb, ub) to the value; constant where not converged."""

    @staticmethod
    @transforms.signed
    def forward(
        good: Tensor, z: Tensor, nu: Tensor, lam: Tensor, bound: Tensor, Q: Tensor, p: Tensor, *_: Tensor | None
    ) -> Tensor:
        with transforms.full_precision(z.device):
            return _value(z, Q, p).to(z.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shapes = [None if x is None else x.shape for x in inputs[5:]]
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs, shapes = ctx.needs_input_grad[5:], ctx.shapes

        def work(*tensors: Tensor) -> list[Tensor | None]:
            good, z, nu, lam, bound, grad = tensors
            weight = torch.where(good, grad, 0.0).unsqueeze(-1)
            scaled = weight * z
            gradients: list[Tensor | None] = [None] * 8
            for i, left in ((0, 0.5 * z), (2, nu), (4, lam)):
                if needs[i]:
                    pair = left.unsqueeze(-1), scaled.unsqueeze(-2)
                    gradients[i] = outer_sum(*pair, shapes[i][:-2])
            vectors = {1: scaled, 3: -weight * nu, 5: -weight * lam}
            vectors |= {6: weight * (-bound).clamp(min=0.0), 7: -weight * bound.clamp(min=0.0)}
            for i, vector in vectors.items():
                if needs[i]:
                    gradients[i] = vector.sum_to_size(shapes[i])
            return gradients

        return *(None for _ in range(5)), *modernised(work, (*ctx.saved_tensors, grad))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        def work(*tensors: Tensor | None) -> tuple[Tensor]:
            with transforms.forward_mode():
                good, z, nu, lam, bound = transforms.primals(tensors[:5])  # type: ignore[arg-type]
                d_Q, d_p, d_A, d_b, d_G, d_h, d_lb, d_ub = tensors[5:]
                change = torch.zeros_like(z[..., 0])
                for matrix, left in ((d_Q, 0.5 * z), (d_A, nu), (d_G, lam)):
                    if matrix is not None:
                        change = change + (left * quadratic.matvec(matrix, z)).sum(-1)
                upward, downward = bound.clamp(min=0.0), (-bound).clamp(min=0.0)
                for vector, left in ((d_p, z), (d_b, -nu), (d_h, -lam), (d_lb, downward), (d_ub, -upward)):
                    if vector is not None:
                        change = change + (left * vector).sum(-1)
                return (torch.where(good, change, 0.0),)

        (change,) = modernised(work, (*ctx.saved_tensors, *tangents[5:]))
        return change  # type: ignore[return-value]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Any, Any]:
        events = (0, 1, 1, 1, 1, *EVENT_NDIM)
        z, dim = tensors[1], in_dims[1]
        batch = z.shape[:-1] if dim is None else z.movedim(dim, 0).shape[1:-1]  # type: ignore[union-attr]
        return _Value.apply(*map_to_front(info.batch_size, in_dims, tensors, events, batch, slice(5, None))), 0
