r"""Sparsemax and α-entmax: the linear program over the simplex with a Tsallis entropy, whose answers have exact zeros.

The solver (`solvers.entmax_newton`) finds y; the derivatives are closed forms of y alone, with s = y^{2−α} on the
support and 0 off it, L = log y, and u = log_α y = ((y^{α−1} − 1)/(α − 1), which is (x − ν)/τ on the support:

    ∂x = p = s ∘ (g − ⟨s, g⟩/⟨s, 1⟩)/τ      ∂τ = −⟨p, u⟩      ∂α = ⟨e, g − ⟨s, g⟩/⟨s, 1⟩⟩,  e = ∂exp_α(u)/∂α

    e = −y L² φ₂(−(α − 1) L)      u = L φ₁((α − 1) L)      φ₁(a) = (eᵃ − 1)/a,  φ₂(a) = (eᵃ − 1 − a)/a²

φ₁(0) = 1 and φ₂(0) = ½, so that α = 1 is no special case: u = log y and e = −½ y log² y. Where the solver has narrowed
the rows, so do the derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from implicit_layers import checks, scores, simplex, transforms
from implicit_layers.attached import attached
from implicit_layers.eager import traced, uncompiled
from implicit_layers.errors import ArgumentError
from implicit_layers.jacobian import transform_active
from implicit_layers.legacy_vmap import modernised
from implicit_layers.scores import Empty
from implicit_layers.solvers import entmax_newton, operators

Setting = Tensor | float


def sparsemax(
    x: Tensor,  # (*, n, *)
    dim: int = -1,
    *,
    temperature: Tensor | float = 1.0,  # broadcasts with x, of size 1 along dim
    mask: Tensor | None = None,  # broadcasts with x
    empty: Empty = "raise",
) -> Tensor:  # (*, n, *)
    r"""Project scores onto the probability simplex.

    Problem:  y* = argmin_y ½‖y − x/τ‖²  subject to  y ≥ 0, Σy = 1.
    Solution: yᵢ = max(xᵢ/τ − t, 0), with t such that the sum is 1.

    Args:     as `softmax`, without `method`.
    Returns:  y*, with the dtype and device of `x`, and its shape broadcast with the one of `temperature`; exact zeros
        off the support.
    Gradient: (diag(m) − m mᵀ/|S|)/τ with m the indicator of the support S = {y > 0}; where S changes, this one of the
        generalised Jacobians. Any order.
    Raises:   as `softmax`.
    Cost:     O(n) an iteration, without sorting; three to ten iterations. Rows of 2048 and more entries are narrowed
        to the few that can be chosen.
    Source:   Martins & Astudillo (2016), arXiv:1602.02068; monotone Newton in place of the sort.

    >>> sparsemax(torch.tensor([0.0, 1.0, 0.9]))
    tensor([0.0000, 0.5500, 0.4500])
    """
    return entmax(x, 2.0, dim, temperature=temperature, mask=mask, empty=empty)


def entmax(
    x: Tensor,  # (*, n, *)
    alpha: Tensor | float = 1.5,  # broadcasts with x, of size 1 along dim
    dim: int = -1,
    *,
    temperature: Tensor | float = 1.0,  # the same
    mask: Tensor | None = None,  # broadcasts with x
    empty: Empty = "raise",
) -> Tensor:  # (*, n, *)
    r"""Choose a point of the simplex by a linear program regularised with Tsallis entropy.

    Problem:  y* = argmax_y ⟨x, y⟩ − τ Σᵢ (yᵢ^α − yᵢ)/(α(α − 1))  subject to  y ≥ 0, Σy = 1.
    Solution: yᵢ = [1 + (α − 1)(xᵢ − ν)/τ]₊^{1/(α − 1)}, with ν such that the sum is 1.
        α = 1 is softmax, its limit; α = 2 sparsemax; the larger α, the sparser.

    Args:
        x: scores, n of them along `dim`; −inf masks an entry. float16 and bfloat16 are computed in float32.
        alpha: α ≥ 1, a number, or a tensor of size 1 along `dim` (one α a problem), differentiated.
        dim: the axis of the n scores.
        temperature, mask, empty: as in `softmax`.

    Returns:  y*, with the dtype and device of `x`, and the broadcast shape; exact zeros off the support for α > 1.
    Gradient: ∂y/∂x = (diag(s) − s sᵀ/⟨s, 1⟩)/τ with s = y^{2−α} on the support; ∂y/∂τ and ∂y/∂α in closed form, also at
        α = 1 and α = 2. Any order, off the kinks. For α > 2 an entry just above zero has a slope without bound; s is
        bounded by the square of the dtype's precision then.
    Raises:   as `softmax`; ValueError: α < 1, infinite or NaN.
    Cost:     as `sparsemax`; an exponential and a logarithm an entry and iteration unless α is the number 1, 1.5 or 2.
        α > 2 costs a search among the largest scores, in float64, and a sort where many of them are chosen.
    Source:   Peters, Niculae & Martins (2019), arXiv:1905.05702; gradient in α: Correia, Niculae & Martins (2019),
        arXiv:1909.00015. Monotone Newton in place of sort and bisection.

    >>> entmax(torch.tensor([0.0, 1.0, 2.0]), 1.5)
    tensor([0.0000, 0.1693, 0.8307])
    """
    scores.check_empty(empty)
    axis = scores.axis_of(x, dim)
    alpha = scores.per_problem("alpha", alpha, x, axis)
    check_alpha(alpha)
    if isinstance(alpha, Tensor) and not checks.readable(alpha):
        alpha = checks.poisoned(alpha, (alpha.detach() >= 1) & alpha.detach().isfinite())
    if not isinstance(alpha, Tensor) and alpha == 1:
        return simplex.softmax(x, dim, temperature=temperature, mask=mask, empty=empty)
    tau = scores.temperature_of(x, axis, temperature)
    x = scores.masked(x, mask)
    rows, top, settings = scores.rows(x, axis, empty, tau, alpha)
    return scores.restored(_differentiable(rows, top, *settings), x, axis, empty)


def check_alpha(alpha: Tensor | float) -> None:
    """Refuse α below 1, infinite or NaN; a tensor costs one host synchronisation where the host may look."""
    if not isinstance(alpha, Tensor):
        if not 1 <= alpha < float("inf"):
            raise ArgumentError(f"alpha must be at least 1 and finite, got {alpha}; 1 is softmax, 2 is sparsemax")
        return
    if not checks.readable(alpha):
        return
    bad = ~((alpha.detach() >= 1) & alpha.detach().isfinite())
    if checks.host_bool(bad.any()):
        raise ArgumentError(
            f"alpha{checks.index_of(bad)} must be at least 1 and finite, got {float(alpha.detach()[bad][0])} "
            f"({int(bad.sum())} of {bad.numel()}). To learn it, bound it: il.nn.Entmax(learn_alpha=True) does"
        )


def _differentiable(x: Tensor, top: Tensor, tau: Setting, alpha: Setting) -> Tensor:
    """The answer to rows, differentiably."""
    if not traced():
        return _by_rule(x, top, tau, alpha)
    plain = (s.detach() if isinstance(s, Tensor) else s for s in (tau, alpha))
    y = operators.entmax(x.detach(), top, *plain)
    none = torch.empty(*y.shape[:-1], 0, dtype=torch.long, device=y.device)
    return attached(y, lambda y: _Part(y, none, alpha).s, lambda y: _Part(y, none, alpha).u(), x, tau)


@uncompiled
def _by_rule(x: Tensor, top: Tensor, tau: Setting, alpha: Setting) -> Tensor:
    """`_Entmax` as a function that the compiler leaves whole."""
    y: Tensor = _Entmax.apply(x, top, tau, alpha)[0]
    return y


class _Entmax(torch.autograd.Function):
    """(x (*B, n), top (*B, 1), τ, α) to (y, columns); columns (*B, K) hold the support, K = 0 where not narrowed."""

    @staticmethod
    def forward(x: Tensor, top: Tensor, tau: Setting, alpha: Setting) -> tuple[Tensor, Tensor]:
        return entmax_newton.point(x, top, tau, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        settings = inputs[2:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.numbers = tuple(None if isinstance(s, Tensor) else s for s in settings)
        saved = (*output, *(s for s in settings if isinstance(s, Tensor)))
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return None, None, None, None
        _, _, needs_tau, needs_alpha = ctx.needs_input_grad

        def work(g: Tensor, y: Tensor, columns: Tensor, *tensors: Tensor) -> list[Tensor | None]:
            tau, alpha = _settings(ctx, tensors)
            if not tensors and alpha <= 2 and not columns.shape[-1] and _final() and y.dtype == torch.float32:
                return [_pulled(y, g, tau, alpha), None, None]
            part, g = _Part(y, columns, alpha), _narrowed(g, columns)
            centred = part.centred(g)
            p = part.s * centred / tau
            return [
                part.spread(p),
                -(p * part.u()).sum(-1, keepdim=True) if needs_tau else None,
                (part.e() * centred).sum(-1, keepdim=True) if needs_alpha else None,
            ]

        grad_x, grad_tau, grad_alpha = modernised(work, (grad_y, *ctx.saved_tensors))
        return grad_x, None, grad_tau, grad_alpha

    @staticmethod
    def jvp(
        ctx: Any, d_x: Tensor | None, _: Any, d_tau: Tensor | None, d_alpha: Tensor | None
    ) -> tuple[Tensor | None, None]:
        with transforms.forward_mode():

            def work(
                d_x: Tensor | None, d_tau: Tensor | None, d_alpha: Tensor | None, *saved: Tensor
            ) -> list[Tensor | None]:
                y, columns, *tensors = saved
                tau, alpha = _settings(ctx, tensors)
                part = _Part(y, columns, alpha)
                moved = torch.zeros_like(part.y)
                if d_x is not None:
                    moved = moved + torch.where(part.y > 0, _narrowed(d_x, columns), 0.0)
                if d_tau is not None:
                    moved = moved - part.u() * d_tau
                d_y = part.s * part.centred(moved) / tau
                if d_alpha is not None:
                    e = part.e()
                    d_y = d_y + (e - part.s * (e.sum(-1, keepdim=True) / part.total)) * d_alpha
                return [part.spread(d_y)]

            return modernised(work, (d_x, d_tau, d_alpha, *transforms.primals(ctx.saved_tensors)))[0], None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        tensors = [(i, d) for i, d in enumerate(in_dims) if isinstance(inputs[i], Tensor)]
        moved = transforms.map_to_front(info.batch_size, [d for _, d in tensors], [inputs[i] for i, _ in tensors])
        given = list(inputs)
        for (i, _), tensor in zip(tensors, moved, strict=True):
            given[i] = tensor
        return _Entmax.apply(*given), (0, 0)


def _pulled(y: Tensor, g: Tensor, tau: float, alpha: float) -> Tensor:
    """The gradient in x alone for one α of at most 2, in as few passes as it takes."""
    s = y.sign() if alpha == 2 else y.sqrt() if alpha == 1.5 else y.pow(2 - alpha)
    p = s * g
    p.addcmul_(s, p.sum(-1, keepdim=True) / s.sum(-1, keepdim=True), value=-1)
    return p if tau == 1 else p.div_(tau)


def _settings(ctx: Any, tensors: Any) -> list[Any]:
    """τ and α, the numbers and the saved tensors in their places."""
    left = iter(tensors)
    return [next(left) if number is None else number for number in ctx.numbers]


def _narrowed(v: Tensor, columns: Tensor) -> Tensor:  # (*B, n), (*B, K) -> (*B, K or n)
    """The entries in the columns, all where there are none."""
    return v.gather(-1, columns) if columns.shape[-1] else v


class _Part:
    """The entries that can differ from zero, and what the derivatives need of them."""

    def __init__(self, y: Tensor, columns: Tensor, alpha: Setting) -> None:
        self.whole, self.columns, self.alpha = y, columns, alpha
        y = _narrowed(y, columns)
        if columns.shape[-1]:
            first = torch.arange(columns.shape[-1], device=y.device) == 0
            y = torch.where((columns == columns[..., :1]) & ~first, 0.0, y)  # padding
        self.y = y
        self.s = self._weights()
        self.total = self.s.sum(-1, keepdim=True)

    def _weights(self) -> Tensor:
        """The weights s = y^{2−α}, zero off the support."""
        y, alpha = self.y, self.alpha
        if not isinstance(alpha, Tensor) and alpha == 2:
            return (y > 0).to(y.dtype)
        if not isinstance(alpha, Tensor) and alpha == 1.5 and _final():
            return y.sqrt()
        most = -2 * math.log(torch.finfo(y.dtype).eps)
        return torch.where(y > 0, ((2 - alpha) * self._log()).clamp(max=most).exp(), 0.0)

    def _log(self) -> Tensor:
        """L = log y, zero off the support."""
        return _safe_log(self.y)

    def u(self) -> Tensor:
        """The tempered score, up to a constant a problem: log_α y."""
        log_y = self._log()
        return log_y * _phi1((self.alpha - 1) * log_y)

    def e(self) -> Tensor:
        """∂exp_α(u)/∂α at a fixed u."""
        log_y = self._log()
        most = 0.9 * math.log(torch.finfo(self.y.dtype).max)
        return -self.y * log_y.square() * _phi2(((1 - self.alpha) * log_y).clamp(max=most))

    def centred(self, v: Tensor) -> Tensor:
        """The map v ↦ v − ⟨s, v⟩/⟨s, 1⟩; see `regularizers.tangent` for what is taken off first."""
        if v.dtype == torch.float64 or isinstance(self.alpha, Tensor) or self.alpha > 2:
            v = v - v.gather(-1, self.s.detach().argmax(-1, keepdim=True))
        return v - (self.s * v).sum(-1, keepdim=True) / self.total

    def spread(self, v: Tensor) -> Tensor:
        """The entries back in their columns, zero elsewhere."""
        if not self.columns.shape[-1]:
            return v
        return torch.zeros_like(self.whole).scatter_add(-1, self.columns, v)


def value(y: Tensor, alpha: Setting) -> Tensor:
    """The regulariser φ(y) = (y^α − y)/(α(α − 1)), y log y at α = 1; zero at y = 0."""
    log_y = _safe_log(y)
    return y * log_y * _phi1((alpha - 1) * log_y) / alpha


def slope_in_alpha(y: Tensor, alpha: Setting) -> Tensor:
    """∂φ/∂α at a fixed y."""
    log_y = _safe_log(y)
    a = (alpha - 1) * log_y
    phi1, phi2 = _phi1(a), _phi2(a)
    return y * log_y * (log_y * (phi1 - phi2) - phi1 / alpha) / alpha


def _safe_log(y: Tensor) -> Tensor:
    """L = log y, zero where y is; safe to differentiate."""
    return torch.where(y > 0, y, 1.0).clamp(min=torch.finfo(y.dtype).tiny).log()


def _final() -> bool:
    """Whether nobody differentiates what is computed now, so that an infinite derivative at zero does no harm."""
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() and not transform_active() and forward_ad._current_level < 0


def _phi1(a: Tensor) -> Tensor:
    """(eᵃ − 1)/a, 1 at zero; safe to differentiate."""
    return 1 + a * _phi2(a)


def _phi2(a: Tensor) -> Tensor:
    """(eᵃ − 1 − a)/a², by its series near zero; safe to differentiate."""
    near = a.abs() < 0.5
    small, large = torch.where(near, a, 0.0), torch.where(near, 1.0, a)
    series = torch.ones_like(a)
    for k in range(16, 2, -1):
        series = 1 + small / k * series
    return torch.where(near, 0.5 * series, (large.expm1() - large) / large.square())
