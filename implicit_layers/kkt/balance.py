r"""The linear system of a transport plan: which change of the potentials makes up for a change of the marginals.

With P > 0 and its own marginals r = P1, c = Pᵀ1, a change (u, v) of the potentials changes the marginals by

    B(u, v) = (r∘u + P v,  Pᵀu + c∘v),      that is  Σⱼ Pᵢⱼ(uᵢ + vⱼ)  and  Σᵢ Pᵢⱼ(uᵢ + vⱼ).

B is symmetric and positive semidefinite; its kernel is the gauge (1, −1), as long as the plan is connected. Everything
here is B⁺, the answer without a part along the gauge: with S = diag(c) − Pᵀ diag(1/r) P, the smaller side second,
S + c cᵀ/Σc is positive definite, and one Cholesky factorisation of it (or conjugate gradients) is all it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_layers import checks, transforms
from implicit_layers.kkt.quadratic import cholesky_solve, matvec, transposed_matvec
from implicit_layers.krylov import ConjugateGradient
from implicit_layers.legacy_vmap import modernised

DENSE_LIMIT = 2048  # size of the smaller side up to which S is formed
_RIDGES = (1e-15, 1e-12, 1e-9, 1e-6)  # on the unit diagonal of the scaled S, the first that lets it be factored
_ROUNDING = 1e-12  # relative difference of sums that is none
_CG = ConjugateGradient(tol=1e-13)


@dataclass(frozen=True)
class _Schur:
    """C^{−½}(S + c cᵀ/Σc)C^{−½}, factored where it is small enough, else as a product."""

    P: Tensor  # (N, n, m)
    inverse_r: Tensor  # (N, n)
    root: Tensor  # (N, m): c^{−½}, zero for columns of zeros
    part: Tensor  # (N, m): c^{½}/√Σc, the unit vector of the kernel
    cholesky: Tensor | None  # (N, m, m)

    @staticmethod
    def of(P: Tensor, inverse_r: Tensor, c: Tensor) -> _Schur:
        """Form and factor."""
        root = torch.where(c > 0, torch.where(c > 0, c, 1.0).rsqrt(), 0.0)
        total = c.sum(-1, keepdim=True)
        part = c.sqrt() / torch.where(total > 0, total, 1.0).sqrt()
        m = P.shape[-1]
        if m > DENSE_LIMIT:
            return _Schur(P, inverse_r, root, part, None)
        half = P * inverse_r.sqrt().unsqueeze(-1) * root.unsqueeze(-2)
        eye = torch.eye(m, dtype=P.dtype, device=P.device)
        matrix = eye - half.mT @ half + part.unsqueeze(-1) * part.unsqueeze(-2)
        factor, failed = torch.linalg.cholesky_ex(matrix + _RIDGES[0] * eye)
        for ridge in _RIDGES[1:]:
            if not checks.host_bool((failed > 0).any()):
                break
            again, info = torch.linalg.cholesky_ex(matrix + ridge * eye)
            factor = torch.where((failed > 0)[:, None, None], again, factor)  # the others keep theirs
            failed = torch.where(failed > 0, info, failed)
        return _Schur(P, inverse_r, root, part, factor)

    @property
    def n(self) -> int:
        """Unknowns a problem."""
        return self.P.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """(N,)."""
        return self.P.shape[:1]

    def matvec(self, v: Tensor) -> Tensor:
        """Apply the scaled matrix."""
        pulled = self.root * v
        back = self.root * transposed_matvec(self.P, self.inverse_r * matvec(self.P, pulled))
        return v - back + self.part * (self.part * v).sum(-1, keepdim=True)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Apply the transpose, which is the same."""
        return self.matvec(v)

    def dense(self) -> Tensor:
        """Form the matrix."""
        return torch.func.vmap(self.matvec, in_dims=1, out_dims=2)(
            torch.eye(self.n, dtype=self.P.dtype, device=self.P.device).expand(self.P.shape[0], -1, -1)
        )

    def solve(self, right: Tensor) -> Tensor:
        """Solve S v = right."""
        right = self.root * right
        if self.cholesky is None:
            return self.root * _CG.descend(self, right, 1e-13)[0]
        return self.root * cholesky_solve(self.cholesky, right)


@dataclass(frozen=True)
class Balance:
    """B for a batch of plans, the smaller side second, with what its solves need."""

    P: Tensor  # (N, n, m)
    r: Tensor  # (N, n)
    c: Tensor  # (N, m)
    inverse_r: Tensor  # (N, n), zero for rows of zeros
    schur: _Schur
    swapped: bool  # P is the transpose of the plan that was given

    @staticmethod
    def of(P: Tensor) -> Balance:
        """Factor."""
        swapped = P.shape[-1] > P.shape[-2]
        P = P.mT if swapped else P
        r, c = P.sum(-1), P.sum(-2)
        inverse_r = torch.where(r > 0, 1 / torch.where(r > 0, r, 1.0), 0.0)
        return Balance(P, r, c, inverse_r, _Schur.of(P, inverse_r, c), swapped)

    def solve(self, r1: Tensor, r2: Tensor, *, same_sums: bool = False) -> tuple[Tensor, Tensor]:  # (N, n), (N, m)
        """Solve B(u, v) = (r1, r2); rows and columns of zeros get zeros. `same_sums`: Σr1 = Σr2 but for rounding."""
        if self.swapped:
            r1, r2 = r2, r1
        rows, columns = self.r > 0, self.c > 0
        r1, r2 = torch.where(rows, r1, 0.0), torch.where(columns, r2, 0.0)
        if not same_sums:
            r1, r2 = _consistent(r1, r2, rows, columns)
        u, v = torch.zeros_like(r1), torch.zeros_like(r2)
        for _ in range(2):  # the second refines the first
            e1 = r1 - torch.where(rows, self.r * u + matvec(self.P, v), 0.0)
            e2 = r2 - torch.where(columns, transposed_matvec(self.P, u) + self.c * v, 0.0)
            dv = self.schur.solve(e2 - transposed_matvec(self.P, self.inverse_r * e1))
            u = u + self.inverse_r * (e1 - matvec(self.P, dv))
            v = v + dv
        u, v = without_gauge(u, v, rows, columns)
        return (v, u) if self.swapped else (u, v)


def _consistent(r1: Tensor, r2: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Make the sums equal, where they differ by more than rounding, which a tiny row would not survive."""
    mismatch = (r1.sum(-1) - r2.sum(-1)).abs()
    size = r1.abs().sum(-1) + r2.abs().sum(-1)
    differ = (mismatch > _ROUNDING * size).unsqueeze(-1)
    even1, even2 = without_gauge(r1, r2, rows, columns)
    return torch.where(differ, even1, r1), torch.where(differ, even2, r2)


def without_gauge(u: Tensor, v: Tensor, rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Take out the part along (1, −1), and what belongs to rows and columns that are not there; None: all are."""
    if rows is None or columns is None:
        shift = (v.sum(-1, keepdim=True) - u.sum(-1, keepdim=True)) / (u.shape[-1] + v.shape[-1])
        return u + shift, v - shift
    u, v = torch.where(rows, u, 0.0), torch.where(columns, v, 0.0)
    count = (rows.sum(-1, keepdim=True) + columns.sum(-1, keepdim=True)).clamp(min=1)
    shift = (v.sum(-1, keepdim=True) - u.sum(-1, keepdim=True)) / count
    return torch.where(rows, u + shift, 0.0), torch.where(columns, v - shift, 0.0)


class BalanceSolve(torch.autograd.Function):
    """(P, r1, r2) to (u, v) = B⁺(r1, r2); B is linear in P, so derivatives solve it again."""

    @staticmethod
    def forward(P: Tensor, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """Solve, unseen by autograd."""
        batch, (n, m) = P.shape[:-2], P.shape[-2:]
        size = batch.numel()
        u, v = Balance.of(P.reshape(size, n, m)).solve(r1.reshape(size, n), r2.reshape(size, m))
        return u.reshape(*batch, n).clone(), v.reshape(*batch, m).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the matrix and the solution."""
        saved = (inputs[0], *output)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Solve once more, with the cotangent."""

        def work(P: Tensor, u: Tensor, v: Tensor, g1: Tensor, g2: Tensor) -> list[Tensor | None]:
            w1, w2 = BalanceSolve.apply(P, g1, g2)
            return [-_sum(w1, w2) * _sum(u, v), w1, w2]

        grad_P, grad_1, grad_2 = modernised(work, (*ctx.saved_tensors, *grads))
        return grad_P, grad_1, grad_2

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Solve once more, with the tangent of the right-hand side."""
        with transforms.forward_mode():
            P, u, v = transforms.primals(ctx.saved_tensors)
            d_P, d_1, d_2 = tangents
            right1 = torch.zeros_like(u) if d_1 is None else d_1
            right2 = torch.zeros_like(v) if d_2 is None else d_2
            if d_P is not None:
                change = d_P * _sum(u, v)
                right1, right2 = right1 - change.sum(-1), right2 - change.sum(-2)
            return BalanceSolve.apply(P, right1, right2)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> tuple[Any, Any]:
        """Take the mapped axis as one more batch dimension."""
        return BalanceSolve.apply(*transforms.map_to_front(info.batch_size, in_dims, tensors)), (0, 0)


def _sum(u: Tensor, v: Tensor) -> Tensor:  # (*B, n), (*B, m) -> (*B, n, m)
    """uᵢ + vⱼ."""
    return u.unsqueeze(-1) + v.unsqueeze(-2)
