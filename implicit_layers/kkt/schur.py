r"""The Schur complement of a regularised linear program: M = E W Eᵀ + diag(d) on the rows that are held.

Rows that depend on each other (a transport program has one too many) make M singular along directions that do not
depend on W. P projects on them; M + P/‖·‖ is regular, and the solution of least norm has no part along them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks, transforms
from implicit_layers.errors import DegenerateGradientWarning, warn
from implicit_layers.kkt.quadratic import cholesky_solve, matvec, outer, transposed_matvec, unexpand
from implicit_layers.legacy_vmap import modernised

_RIDGES = (1e-14, 1e-11, 1e-8, 1e-5)  # on the unit diagonal, the first that makes the factorisation succeed
_DEPENDENT = 1e-12  # a combination of unit rows shorter than this is zero


class Factor(NamedTuple):
    """Cholesky factor of the scaled matrix."""

    cholesky: Tensor  # (N, m, m)
    matrix: Tensor  # (N, m, m), of unit diagonal
    scale: Tensor  # (N, m)
    kept: Tensor  # (N, m)
    null: Tensor  # (N or 1, m, m)

    def solve(self, right: Tensor, refine: int = 1) -> Tensor:  # (N, m) -> (N, m)
        """Solve M w = right on the kept rows; w has no part along the dependent directions."""
        right = self.kept * self.scale * (right - matvec(self.null, right))
        w = cholesky_solve(self.cholesky, right)
        for _ in range(refine):
            w = w + cholesky_solve(self.cholesky, right - matvec(self.matrix, w))
        w = self.kept * self.scale * w
        return w - matvec(self.null, w)


def gram(E: Tensor, weight: Tensor, diagonal: Tensor) -> Tensor:  # (N or 1, m, n), (N, n), (N, m) -> (N, m, m)
    """Form E W Eᵀ + diag(d)."""
    return (E * weight.unsqueeze(-2)) @ E.mT + torch.diag_embed(diagonal)


def factorise(matrix: Tensor, kept: Tensor, null: Tensor) -> Factor:
    """Factor the kept rows, scaled to unit diagonal, with the dependent directions filled in."""
    diagonal = torch.where(kept > 0, matrix.diagonal(dim1=-2, dim2=-1), 0.0)
    used = diagonal > 0
    scale = torch.where(used, torch.where(used, diagonal, 1.0).rsqrt(), 0.0)
    size = (diagonal.sum(-1) / used.sum(-1).clamp(min=1))[:, None, None]
    scaled = scale.unsqueeze(-1) * (matrix + size * null) * scale.unsqueeze(-2)
    scaled = scaled + torch.diag_embed(torch.where(used, 0.0, 1.0).to(matrix.dtype))
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    lower, failed = torch.linalg.cholesky_ex(scaled + _RIDGES[0] * eye)
    for ridge in _RIDGES[1:]:
        if not checks.host_bool((failed > 0).any()):
            break
        again, info = torch.linalg.cholesky_ex(scaled + ridge * eye)
        lower = torch.where((failed > 0)[:, None, None], again, lower)  # the others keep theirs
        failed = torch.where(failed > 0, info, failed)
    return Factor(lower, scaled, scale, torch.where(used, kept, 0.0), null)


def dependent(E: Tensor) -> Tensor:  # (N or 1, m, n) -> (N or 1, m, m)
    """Project on the combinations of the rows that vanish."""
    length = torch.linalg.vector_norm(E, dim=-1, keepdim=True)
    unit = E / torch.where(length > 0, length, 1.0)
    _, vectors = torch.linalg.eigh(unit @ unit.mT)
    vanish = torch.linalg.vector_norm(vectors.mT @ unit, dim=-1) <= _DEPENDENT * E.shape[-2]
    basis = vectors * vanish.unsqueeze(-2) / torch.where(length > 0, length, 1.0)  # of the rows as they are
    if not checks.host_bool((vanish.sum(-1) > 0).any()):
        return torch.zeros_like(vectors)
    orthonormal, triangle = torch.linalg.qr(basis)
    kept = triangle.diagonal(dim1=-2, dim2=-1).abs() > 0
    orthonormal = orthonormal * kept.unsqueeze(-2)
    return orthonormal @ orthonormal.mT


class SchurSolve(torch.autograd.Function):
    """(E, W, d, kept, null, weak, r) to w with (E W Eᵀ + diag d) w = r on the kept rows; derivatives solve it again.

    Warns of problems that are `weak`: this is the first place of a backward pass where values may be looked at.
    """

    @staticmethod
    def forward(
        E: Tensor, weight: Tensor, diagonal: Tensor, kept: Tensor, null: Tensor, weak: Tensor, right: Tensor
    ) -> Tensor:
        """Solve, unseen by autograd."""
        if checks.host_bool(weak.any()):
            _warn_of_kinks(weak)
        batch, m, n = right.shape[:-1], right.shape[-1], weight.shape[-1]
        size = batch.numel()
        matrix = gram(unexpand(E, 2, batch), weight.reshape(size, n), diagonal.reshape(size, m))
        factor = factorise(matrix, kept.reshape(size, m), unexpand(null, 2, batch))
        return factor.solve(right.reshape(size, m), refine=2).reshape(right.shape).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep the matrix and the solution."""
        saved = (*inputs[:6], output)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Solve once more, with the cotangent."""
        needs_matrix = ctx.needs_input_grad[0]

        def work(*tensors: Tensor) -> list[Tensor | None]:
            E, weight, diagonal, kept, null, weak, w, grad = tensors
            v = SchurSolve.apply(E, weight, diagonal, kept, null, weak, grad)
            by_w, by_v = transposed_matvec(E, w), transposed_matvec(E, v)
            grad_E = -(outer(v, weight * by_w) + outer(w, weight * by_v)) if needs_matrix else None
            return [grad_E, -by_w * by_v, -v * w, v]

        grad_E, grad_weight, grad_diagonal, v = modernised(work, (*ctx.saved_tensors, grad))
        return grad_E, grad_weight, grad_diagonal, None, None, None, v

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Solve once more, with the tangent of the right-hand side."""
        with transforms.forward_mode():
            E, weight, diagonal, kept, null, weak, w = transforms.primals(ctx.saved_tensors)
            d_E, d_weight, d_diagonal, _, _, _, d_right = tangents
            right = torch.zeros_like(w) if d_right is None else d_right
            pulled = transposed_matvec(E, w)
            if d_E is not None:
                change = matvec(d_E, weight * pulled) + matvec(E, weight * transposed_matvec(d_E, w))
                right = right - change
            if d_weight is not None:
                right = right - matvec(E, d_weight * pulled)
            if d_diagonal is not None:
                right = right - d_diagonal * w
            return SchurSolve.apply(E, weight, diagonal, kept, null, weak, right)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        """Take the mapped axis as one more batch dimension."""
        return SchurSolve.apply(*transforms.map_to_front(info.batch_size, in_dims, tensors)), 0


def _warn_of_kinks(weak: Tensor) -> None:
    """Say which problems have a kink at the solution."""
    first = f" (first: index {checks.index_of(weak)})" if weak.ndim else ""
    warn(
        f"entropic_lp: {int(weak.sum())} of {weak.numel()} problems{first} have an inequality that is only just active "
        "(its multiplier and its slack are both zero) or active inequalities that depend on each other, where the "
        "solution has a kink; the derivative to one side is "
        "used. slack='entropic' has no kinks.",
        DegenerateGradientWarning,
    )
