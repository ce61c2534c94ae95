"""What follows from a solution without another solve: the optimal value and the slacks, with their derivatives.

    value = ½ zᵀQz + pᵀz,   s = h − G z

The gradient of the value is that of the Lagrangian with z and the duals held (the envelope theorem):

    ∂Q = ½ zzᵀ,  ∂p = z,  ∂A = ν zᵀ,  ∂b = −ν,  ∂G = λ zᵀ,  ∂h = −λ,  ∂lb = λ_lb,  ∂ub = −λ_ub.

Derivatives of it go through z and the duals again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from implicit_layers.kkt import quadratic


def optimal_value(z: Tensor, Q: Tensor, p: Tensor) -> Tensor:  # (*B,)
    """½ zᵀQz + pᵀz, computed in float64."""
    x, Q, p = z.double(), Q.double(), p.double()
    return ((0.5 * quadratic.matvec(Q, x) + p) * x).sum(-1).to(z.dtype)


def slacks(z: Tensor, G: Tensor, h: Tensor) -> Tensor:  # (*B, n_ineq)
    """Give s = h − G z."""
    return h - quadratic.matvec(G, z)


def gradients(
    grad_s: Tensor | None,
    grad_value: Tensor | None,
    point: Sequence[Tensor],
    needs: Sequence[bool],
    shapes: Sequence[torch.Size],
) -> list[Tensor | None]:
    """The gradients for Q, p, A, b, G, h, lb, ub with z and the duals held; `point` is z, ν, λ and λ_ub − λ_lb."""
    z, nu, lam, bound = point
    found: list[Tensor | None] = [None] * 8
    pairs: dict[int, list[tuple[Tensor, Tensor]]] = {0: [], 2: [], 4: []}
    vectors: dict[int, Tensor] = {}
    if grad_value is not None:
        weight = grad_value.unsqueeze(-1)
        scaled = weight * z
        pairs = {0: [(0.5 * z, scaled)], 2: [(nu, scaled)], 4: [(lam, scaled)]}
        vectors = {1: scaled, 3: -weight * nu, 5: -weight * lam}
        if bound.shape[-1]:
            vectors |= {6: weight * (-bound).clamp(min=0.0), 7: -weight * bound.clamp(min=0.0)}
    if grad_s is not None:
        pairs[4].append((-grad_s, z))
        vectors[5] = vectors[5] + grad_s if 5 in vectors else grad_s
    for i, factors in pairs.items():
        if needs[i] and factors:
            left, right = (
                torch.stack(side, dim) for side, dim in zip(zip(*factors, strict=True), (-1, -2), strict=True)
            )
            found[i] = outer_sum(left, right, shapes[i][:-2])
    for i, vector in vectors.items():
        if needs[i]:
            found[i] = vector.sum_to_size(shapes[i])
    return found


def change_of_value(tangents: Sequence[Tensor | None], point: Sequence[Tensor]) -> Tensor:
    """The change of the value that comes with those of Q, p, A, b, G, h, lb, ub."""
    z, nu, lam, bound = point
    d_Q, d_p, d_A, d_b, d_G, d_h, d_lb, d_ub = tangents
    change = torch.zeros_like(z[..., 0])
    for matrix, left in ((d_Q, 0.5 * z), (d_A, nu), (d_G, lam)):
        if matrix is not None:
            change = change + (left * quadratic.matvec(matrix, z)).sum(-1)
    upward, downward = bound.clamp(min=0.0), (-bound).clamp(min=0.0)
    for vector, left in ((d_p, z), (d_b, -nu), (d_h, -lam), (d_lb, downward), (d_ub, -upward)):
        if vector is not None:
            change = change + (left * vector).sum(-1)
    return change


def change_of_slacks(d_z: Tensor, d_G: Tensor | None, d_h: Tensor | None, z: Tensor, G: Tensor) -> Tensor:
    """Give ds = dh − dG z − G dz."""
    change = -quadratic.matvec(G, d_z)
    if d_G is not None:
        change = change - quadratic.matvec(d_G, z)
    return change if d_h is None else change + d_h


def outer_sum(left: Tensor, right: Tensor, batch: torch.Size) -> Tensor:
    """Multiply (*B, m, k) with (*B, k, n); summed over the batch, in one product, where `batch` is 1s."""
    if batch.numel() != 1 or left.shape[:-2].numel() == 1:
        return left @ right
    m, n = left.shape[-2], right.shape[-1]
    total = left.movedim(-2, 0).reshape(m, -1) @ right.reshape(-1, n)
    return total.reshape(*batch, m, n)
