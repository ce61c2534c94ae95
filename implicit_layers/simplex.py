r"""Softmax as the solution of an entropy-regularised linear program over the probability simplex, in three ways.

    closed   the formula, and the derivative of the formula: the fast path
    newton   the KKT system solved by Newton in the log domain, differentiated by the implicit function theorem
    kkt      the explicit inverse of the KKT Jacobian, block by block: for teaching and testing

All three see the scores through `_scaled`: z = (x − max x)/τ, in [floor, 0] and finite, so that masked entries
(x = −∞), enormous scores and small temperatures reach neither an overflow nor a 0 · ∞ in any derivative.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from implicit_layers import checks, implicit, scores, transforms
from implicit_layers.errors import ArgumentError
from implicit_layers.kkt import entropic
from implicit_layers.legacy_vmap import modernised
from implicit_layers.regularizers import tangent
from implicit_layers.scores import Empty

SoftmaxMethod = Literal["closed", "newton", "kkt"]
METHODS = get_args(SoftmaxMethod)

_KKT_STEPS = 3  # derivatives up to order seven


def softmax(
    x: Tensor,  # (*, n, *)
    dim: int = -1,
    *,
    temperature: Tensor | float = 1.0,  # broadcasts with x, of size 1 along dim
    mask: Tensor | None = None,  # broadcasts with x
    empty: Empty = "raise",
    method: SoftmaxMethod = "closed",
) -> Tensor:  # (*, n, *)
    r"""Choose a point of the probability simplex by an entropy-regularised linear program.

    Problem:  y* = argmax_y ⟨x, y⟩ + τ H(y)  subject to  1ᵀy = 1, y ≥ 0,  with H(y) = −Σᵢ yᵢ log yᵢ.
    Solution: y* = exp(x/τ) / Σⱼ exp(xⱼ/τ).

    Args:
        x: scores, n of them along `dim`. −inf masks an entry: it gets y = 0 and gradient 0, and the others get what
            they would get without it. float16 and bfloat16 are computed in float32 and cast back.
        dim: the axis of the n scores. A 0-d `x` counts as one score, as for `torch.softmax`.
        temperature: τ > 0, in the unit of the scores: a number, or a tensor that broadcasts with `x` and has size 1
            along `dim` (one τ a problem: for `x` of shape (B, n), shape (B, 1) or ()). A tensor is differentiated. It
            has the dtype of `x`, or float32 where `x` is float16 or bfloat16.
        mask: boolean, True where an entry may be chosen; the others are as if their score were −inf.
        empty: what a problem gets that has no entry left: "raise" an error, "uniform" 1/n each, or "zeros"; the latter
            two with zero gradient.
        method: "closed", "newton" or "kkt"; one answer and one gradient, found in three ways (see the module).
            torch.compile takes "closed" and "kkt" into one graph; the iterations of "newton" break it and run eagerly.

    Returns:  y*, with the dtype and device of `x`, and its shape broadcast with the one of `temperature`.
    Gradient: ∂y/∂x = S = (diag(y) − y yᵀ)/τ, symmetric, S1 = 0, ‖S‖₂ ≤ 1/(2τ);  ∂y/∂τ = −S x/τ.  Any order.
        In float64 "closed" keeps its relative accuracy also where one yᵢ is nearly 1 and the gradient nearly vanishes.
        "newton" gets it from the adjoint solve of the generic core, "kkt" from the explicit inverse (up to order 7).

    Raises:
        DtypeError: `x` or `temperature` is no real floating-point tensor, or they differ; `mask` is not boolean.
        DeviceError: they live on different devices.
        ShapeError: the axis is empty or out of range; `temperature` does not broadcast, or varies along `dim`.
        ValueError: τ is zero, negative, NaN or smaller than the smallest normal number; all n scores of a problem are
            −inf and `empty` is "raise"; unknown `method` or `empty`.
        NonFiniteError: a score is NaN or +inf.
        The checks of values cost one host synchronisation. Under torch.compile, torch.export and torch.func, and for
        fake and meta tensors, they are skipped: there the problem with the bad score returns NaN, and the others are
        right ("newton" raises even then, at the first residual that it sees).

    Cost:     O(n) time and memory a problem; "newton" one more O(n) an iteration; "kkt" O(n²).
    Source:   Gao & Pavel (2017), On the properties of the softmax function, arXiv:1704.00805.

    >>> softmax(torch.tensor([0.0, 1.0, float("-inf")]), temperature=0.5)
    tensor([0.1192, 0.8808, 0.0000])
    """
    if mask is None and method == "closed" and empty == "raise" and _plain(x, dim, temperature):
        y = torch.softmax(x, dim)
        if checks.readable(x):
            one = y.detach().select(dim, 0)  # a problem without an answer has nothing but NaN: one entry of each tells
            if checks.host_nan(one.dot(one) if one.ndim == 1 else one.sum()):  # a third less than the sum
                scores.refuse_scores(x.detach(), dim if dim < 0 else dim - x.ndim)
        return y
    check_method(method)
    scores.check_empty(empty)
    axis = scores.axis_of(x, dim)
    tau = scores.temperature_of(x, axis, temperature)
    x = scores.masked(x, mask)
    work = x.float() if x.dtype in checks.HALF else x
    if method == "closed" and empty == "raise" and not isinstance(tau, Tensor):
        y = _closed(work, axis, tau)
        # a NaN, +inf, or nothing but -inf among the scores makes all n entries NaN: to look at one of them is enough
        one = y.detach()
        if checks.readable(one) and checks.host_nan((one.select(axis, 0) if one.ndim else one).sum()):
            scores.refuse_scores(x.detach(), axis)
        return y.to(x.dtype)
    top = work.detach().amax(axis, keepdim=True)
    scores.check_values(x, axis, top, tau, empty)
    if empty != "raise":
        work = work.masked_fill(top.isneginf(), 0.0)
    if method == "closed":
        y = _closed(work, axis, tau)
    else:
        z = _scaled(work, axis, tau)
        rows = z.movedim(axis, -1) if z.ndim else z.reshape(1)
        y = _newton(rows) if method == "newton" else _kkt(rows)
        y = y.movedim(-1, axis).reshape(z.shape)
    return (y if empty == "raise" else scores.fill_empty(y, top, empty, 1 / y.shape[axis] if x.ndim else 1.0)).to(
        x.dtype
    )


def _plain(x: Tensor, dim: int, temperature: Tensor | float) -> bool:
    """Whether PyTorch's own softmax answers: single precision and τ = 1, with nothing to refuse but values."""
    if type(dim) is not int or type(temperature) not in (int, float) or temperature != 1 or not isinstance(x, Tensor):
        return False
    ndim = x.ndim
    return x.dtype == torch.float32 and x.layout == torch.strided and -ndim <= dim < ndim and x.numel() > 0


def check_method(method: str) -> None:
    """Refuse anything but the three methods."""
    if method not in METHODS:
        raise ArgumentError(f"method must be one of {METHODS}, got {method!r}")


def _scaled(x: Tensor, dim: int, tau: Tensor | float) -> Tensor:  # (*, n, *) -> (*, n, *)
    r"""The scores z = (x − max x)/τ, raised to a finite floor where exp(z) is zero in this dtype.

    exp(floor) is zero as well. The maximum is subtracted before the division (an offset of 1e8 costs no digits) and
    detached: softmax does not see a shift, to any order. Raised entries are constants, so their derivatives are zero
    and not 0 · ∞.
    """
    floor = 2 * math.log(torch.finfo(x.dtype).tiny)
    gap = x - x.detach().amax(dim, keepdim=True)  # in [-inf, 0]
    hidden = (gap < floor * tau) | gap.isneginf()
    return (gap.masked_fill(hidden, 0.0) / tau).masked_fill(hidden, floor)


def _closed(x: Tensor, dim: int, tau: Tensor | float) -> Tensor:  # (*, n, *) -> (*, n, *)
    """The formula; a number as temperature has no derivative, so −inf scores may stay as they are."""
    if isinstance(tau, Tensor) or tau > torch.finfo(x.dtype).max:
        z = _scaled(x, dim, tau)
    elif tau == 1:
        z = x  # softmax subtracts the maximum itself
    else:
        z = (x - x.detach().amax(dim, keepdim=True)) / tau
    if z.dtype != torch.float64 or torch.compiler.is_compiling():
        return z.softmax(dim)
    rows = z.movedim(dim, -1) if z.ndim else z.reshape(1)
    y: Tensor = _Softmax.apply(rows)
    return y.movedim(-1, dim).reshape(z.shape)


class _Softmax(torch.autograd.Function):
    """Softmax over the last axis with derivatives that are right relative to their own size."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z.softmax(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> Tensor | None:
        if grad_y is None:
            return None
        return modernised(_tangent, (*ctx.saved_tensors, grad_y))[0]

    @staticmethod
    def jvp(ctx: Any, d_z: Tensor) -> Tensor | None:
        with transforms.forward_mode():
            return modernised(_tangent, (*transforms.primals(ctx.saved_tensors), d_z))[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], z: Tensor) -> tuple[Tensor, int]:
        return _Softmax.apply(z.movedim(in_dims[0], 0)), 0


def _tangent(y: Tensor, v: Tensor) -> list[Tensor]:
    """S v, in the form in which it may pass through the old vectorisation."""
    return [tangent(y, v)]


def _kkt(z: Tensor) -> Tensor:  # (*B, n) -> (*B, n)
    """Softmax of `z` with the derivative by the explicit inverse of the KKT Jacobian.

    The solution is detached and attached again by Newton steps that move nothing but carry the derivative: the first
    gives the gradient of the implicit function theorem, k of them all derivatives up to order 2ᵏ − 1.
    """
    log_y, u = z.detach().log_softmax(-1), 1 - z.detach().logsumexp(-1)
    for _ in range(_KKT_STEPS):
        log_y, u = entropic.log_newton_step(log_y, u, z)
    return log_y.exp()


def _newton(z: Tensor) -> Tensor:  # (*B, n) -> (*B, n)
    """Softmax of `z` by Newton on the KKT system, in the unknown u; the gradient comes from the generic core.

    Stationarity is linear in (log y, u), so after one Newton step it holds exactly, log y = z + u − 1, and what is
    left of every later step is the step for u alone. Eliminating log y leaves a convex increasing equation, and from
    its right Newton descends to the root without overshooting, for any spread of the scores.
    """
    start = torch.ones_like(z[..., :1])  # max z = 0: here 1ᵀy ≥ 1, right of the root
    fixed = z.detach()
    u = implicit.root(_primal_residual, start, fixed, batch_dims=z.ndim - 1).value
    missing = _primal_residual(u, fixed)  # below the solver's tolerance; a last step, of slope 1 + F, leaves rounding
    u = implicit.attach_gradient(_primal_residual, u - missing / (1 + missing), z, batch_dims=z.ndim - 1)
    return (z + u - 1).exp()


def _primal_residual(u: Tensor, z: Tensor) -> Tensor:  # (*B, 1), (*B, n) -> (*B, 1)
    """1ᵀ exp(z + u − 1) − 1: primal feasibility with stationarity solved for y."""
    return (z + u - 1).exp().sum(-1, keepdim=True) - 1
