r"""Softmax as the solution of an entropy-regularised linear program over the probability simplex, in three ways.

    closed   the formula, and the derivative of the formula: the fast path
    newton   the KKT system solved by Newton in the log domain, differentiated by the implicit function theorem
    kkt      the explicit inverse of the KKT Jacobian, block by block: for teaching and testing

All three see the scores through `_scaled`: z = (x − max x)/τ, in [floor, 0] and finite, so that masked entries
(x = −∞), enormous scores and small temperatures reach neither an overflow nor a 0 · ∞ in any derivative.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from implicit_layers import checks, implicit
from implicit_layers.errors import ArgumentError, ArgumentTypeError, NonFiniteError, ShapeError
from implicit_layers.kkt import entropic

SoftmaxMethod = Literal["closed", "newton", "kkt"]
METHODS = get_args(SoftmaxMethod)

_HALF = (torch.float16, torch.bfloat16)
_KKT_STEPS = 3  # derivatives up to order seven


def softmax(
    x: Tensor,  # (*, n, *)
    dim: int = -1,
    *,
    temperature: Tensor | float = 1.0,  # broadcasts with x, of size 1 along dim
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
        method: "closed", "newton" or "kkt"; one answer and one gradient, found in three ways (see the module).
            torch.compile takes "closed" and "kkt" into one graph; the iterations of "newton" break it and run eagerly.

    Returns:  y*, with the dtype and device of `x`, and its shape broadcast with the one of `temperature`.
    Gradient: ∂y/∂x = S = (diag(y) − y yᵀ)/τ, symmetric, S1 = 0, ‖S‖₂ ≤ 1/(2τ);  ∂y/∂τ = −S x/τ.  Any order.
        "newton" gets it from the adjoint solve of the generic core, "kkt" from the explicit inverse (up to order 7).

    Raises:
        DtypeError: `x` or `temperature` is no real floating-point tensor, or their dtypes differ.
        DeviceError: they live on different devices.
        ShapeError: the axis is empty or out of range; `temperature` does not broadcast, or varies along `dim`.
        ValueError: τ is zero, negative, NaN or smaller than the smallest normal number; all n scores of a problem are
            −inf; unknown `method`.
        NonFiniteError: a score is NaN or +inf.
        The checks of values cost one host synchronisation. Under torch.compile, torch.export and torch.func, and for
        fake and meta tensors, they are skipped: there the problem with the bad score returns NaN, and the others are
        right ("newton" raises even then, at the first residual that it sees).

    Cost:     O(n) time and memory a problem; "newton" one more O(n) an iteration; "kkt" O(n²).
    Source:   Gao & Pavel (2017), On the properties of the softmax function, arXiv:1704.00805.

    >>> softmax(torch.tensor([0.0, 1.0, float("-inf")]), temperature=0.5)
    tensor([0.1192, 0.8808, 0.0000])
    """
    check_method(method)
    axis = _axis(x, dim)
    tau = _temperature(x, axis, temperature)
    _check_values(x, axis, tau)
    work = x.float() if x.dtype in _HALF else x
    if method == "closed":
        return _closed(work, axis, tau).to(x.dtype)
    z = _scaled(work, axis, tau)
    rows = z.movedim(axis, -1) if z.ndim else z.reshape(1)
    y = _newton(rows) if method == "newton" else _kkt(rows)
    return y.movedim(-1, axis).reshape(z.shape).to(x.dtype)


def check_method(method: str) -> None:
    """Refuse anything but the three methods."""
    if method not in METHODS:
        raise ArgumentError(f"method must be one of {METHODS}, got {method!r}")


def _axis(x: Tensor, dim: int) -> int:
    """The axis counted from the end, so that broadcasting may add leading dimensions; checks shape and dtype."""
    checks.floating_tensors(x=x)
    checks.integer("dim", dim)
    ndim = max(x.ndim, 1)
    if not -ndim <= dim < ndim:
        raise ShapeError(f"dim must be in [{-ndim}, {ndim - 1}] for x of shape {tuple(x.shape)}, got {dim}")
    axis = dim if dim < 0 else dim - ndim
    if x.ndim and x.shape[axis] == 0:
        raise ShapeError(f"x of shape {tuple(x.shape)} has no entries along dim={dim}; the simplex needs at least one")
    return axis


def _temperature(x: Tensor, axis: int, temperature: Tensor | float) -> Tensor | float:
    """The temperature in the dtype of the computation; everything but the values of a tensor is checked."""
    if not isinstance(temperature, Tensor):
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise ArgumentTypeError(f"temperature must be a number or a tensor, got {temperature!r}")
        tiny = torch.finfo(torch.float32 if x.dtype in _HALF else x.dtype).tiny
        if not temperature >= tiny:  # also catches NaN
            raise ArgumentError(_bad_temperature(temperature, tiny, x.dtype))
        return temperature
    if x.dtype in _HALF and temperature.dtype == torch.float32:
        checks.floating_tensors(x=x.float(), temperature=temperature)
    else:
        checks.floating_tensors(x=x, temperature=temperature)
    if temperature.ndim >= -axis and temperature.shape[axis] != 1:
        raise ShapeError(
            f"temperature of shape {tuple(temperature.shape)} varies along the axis of the scores (size "
            f"{temperature.shape[axis]} at dim {axis}); one temperature a problem needs size 1 there, e.g. "
            f"temperature.unsqueeze({axis})"
        )
    try:
        torch.broadcast_shapes(x.shape, temperature.shape)
    except RuntimeError:
        raise ShapeError(
            f"temperature of shape {tuple(temperature.shape)} does not broadcast with x of shape {tuple(x.shape)}"
        ) from None
    return temperature.float() if temperature.dtype in _HALF else temperature


def _check_values(x: Tensor, axis: int, tau: Tensor | float) -> None:
    """Refuse values without an answer; one host synchronisation, none where the host may not look."""
    tau_tensor = tau.detach() if isinstance(tau, Tensor) else None
    if not checks.readable(x if tau_tensor is None else tau_tensor, x):
        return
    x = x.detach()
    top = x.amax(axis)  # NaN and +inf survive a maximum, and -inf means that all n scores are -inf
    good = top.isfinite().all()
    if tau_tensor is not None:
        tiny = torch.finfo(tau_tensor.dtype).tiny
        good = good & (tau_tensor >= tiny).all()
    if checks.host_bool(good):
        return
    if tau_tensor is not None:
        bad = ~(tau_tensor >= tiny)
        if bool(bad.any()):
            where = checks.index_of(bad)
            raise ArgumentError(_bad_temperature(float(tau_tensor[bad][0]), tiny, tau_tensor.dtype, where))
    bad = x.isnan() | x.isposinf()
    if bool(bad.any()):
        raise NonFiniteError(
            f"x{checks.index_of(bad)} is {float(x[bad][0])}: {int(bad.sum())} of {bad.numel()} scores are NaN or +inf. "
            "Only finite scores and -inf (a masked entry) have a softmax; look for an overflow upstream"
        )
    bad = top.isneginf()
    place = f" at index {checks.index_of(bad)} (dim={axis} left out)" if bad.ndim else ""
    raise ArgumentError(
        f"{int(bad.sum())} of {bad.numel()} problems have only -inf scores, first{place}: an empty simplex has no "
        "point. Leave at least one entry of each problem unmasked"
    )


def _bad_temperature(value: float, tiny: float, dtype: torch.dtype, where: str = "") -> str:
    """The message for a temperature that is no positive normal number."""
    return (
        f"temperature{where} must be positive (at least {tiny:.1e}, the smallest normal number of {dtype}), "
        f"got {value}. For a hard argmax use a small positive temperature"
    )


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
        return _scaled(x, dim, tau).softmax(dim)
    if tau == 1:
        return x.softmax(dim)  # which subtracts the maximum itself
    return ((x - x.detach().amax(dim, keepdim=True)) / tau).softmax(dim)


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
