r"""Derivatives of an inner solution that come from small matrices, one a datum, instead of the iterations' graph.

With y the solution found, g = ∇e(y; θ, λ⁰) and H = ∇²e(y), every rule here is one linear surrogate,

    dy = S dy⁰ + T (∂g/∂θ dθ + ∂g/∂λ⁰ dλ⁰),

whose value is y and whose first derivatives are those of the rule:

| rule | S | T |
|---|---|---|
| envelope | 0 | 0 |
| straight-through | I | 0 |
| one step (length a) | I − aH | −aI |
| frozen Hessian, K steps with momentum | (I − aH)ᴷ, with its momentum | Σ of the steps' responses |
| implicit | 0 | −H⁻¹ |

At a point that is no solution "implicit" is the derivative of a Newton step from there: where outer and inner objective
agree it turns an error O(δ) of the gradient into O(δ²).
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_layers.kkt.quadratic import matvec


def implicit(H: Tensor) -> tuple[Tensor, Tensor]:  # (*B, n, n) -> T (*B, n, n), positive definite (*B,)
    """−H⁻¹ where H is positive definite and 0 elsewhere, which drops the implicit term there."""
    L, failed = torch.linalg.cholesky_ex(0.5 * (H + H.mT))
    definite = (failed == 0) & torch.isfinite(L).all(-1).all(-1)
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    L = torch.where(definite[..., None, None], L, eye)
    inverse = torch.cholesky_solve(eye.expand_as(L), L)
    return torch.where(definite[..., None, None], -inverse, 0.0), definite


def frozen(H: Tensor, steps: int, step: float, momentum: float) -> tuple[Tensor, Tensor]:  # (*B, n, n) -> S, T
    """What K steps p ← μp − g, y ← y + a p do to a small change of the start, and of g, H being constant."""
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device).expand_as(H)
    S, T = eye, torch.zeros_like(H)
    S_p, T_p = torch.zeros_like(H), torch.zeros_like(H)
    for _ in range(steps):
        S_p, T_p = momentum * S_p - H @ S, momentum * T_p - (eye + H @ T)
        S, T = S + step * S_p, T + step * T_p
    return S, T


def attach(y: Tensor, y0: Tensor, g: Tensor | None, S: Tensor | None, T: Tensor | None) -> Tensor:  # (*B, n)
    """The value y with the derivatives S in y0 and T in g; None for zero."""
    y = y.detach()
    if S is not None:
        y = y + matvec(S.detach(), y0 - y0.detach())
    if g is not None and T is not None:
        y = y + matvec(T.detach(), g - g.detach())
    return y
