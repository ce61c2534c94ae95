r"""Fenchel–Young losses: how far the answer of a regularised argmax is from a target, with a gradient for free.

    ℓ(x; t) = max_y (⟨x, y⟩ − τ Φ(y)) + τ Φ(t) − ⟨x, t⟩ ≥ 0,   zero where y*(x) = t

By the envelope theorem ∂ℓ/∂x = y* − t and ∂ℓ/∂τ = Φ(t) − Φ(y*): no adjoint solve. The entropy's is the cross-entropy.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from implicit_layers import checks, regularizers, scores, simplex, transforms, tsallis
from implicit_layers.attached import moving
from implicit_layers.eager import differentiations, traced
from implicit_layers.errors import ArgumentError, ArgumentTypeError, DtypeError, ShapeError
from implicit_layers.legacy_vmap import modernised
from implicit_layers.regularizers import Regularizer

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = get_args(Reduction)
Regulariser = str | Regularizer | Tensor | float


def fenchel_young_loss(
    x: Tensor,  # (*, n, *)
    target: Tensor,  # (*, n, *), or indices (*, *)
    regulariser: Regulariser = "entropy",
    dim: int = -1,
    *,
    temperature: Tensor | float = 1.0,  # broadcasts with x, of size 1 along dim
    total: float = 1.0,
    mask: Tensor | None = None,  # broadcasts with x
    ignore_index: int = -100,
    reduction: Reduction = "none",
) -> Tensor:  # (*, *), or () if reduced
    r"""How much better than the target the answer to the scores is, by the regularised objective itself.

    Problem:  ℓ(x; t) = max_y (⟨x, y⟩ − τ Φ(y)) − (⟨x, t⟩ − τ Φ(t))  over  Σy = k, 0 ≤ y ≤ cap.
        Convex in x, never negative, zero where y*(x) = t. Entropy: τ times cross-entropy less the target's entropy.

    Args:
        x: scores, n of them along `dim`.
        target: a point of the same polytope, of the dtype of `x`; or, for k = 1, integer indices, one a problem.
        regulariser: "entropy", "euclidean" (sparsemax), a number or tensor α ≥ 1 (entmax; a tensor is differentiated),
            "binary_entropy" and "box" (soft top-k, with `total`), the name of a registered one, or a `Regularizer`.
        dim, temperature, mask: as in `softmax`.
        total: k, a number.
        ignore_index: a problem with this index as target has loss 0 and gradient 0.
        reduction: "none", "sum", or "mean" over the problems that are not ignored.

    Returns:  one loss a problem, or one in all; infinite where the target needs a masked entry.
    Gradient: ∂ℓ/∂x = y* − t, ∂ℓ/∂τ = Φ(t) − Φ(y*), ∂ℓ/∂t = τ φ'(t) − x, without an adjoint solve; the second
        derivative in x is ∂y*/∂x.
    Raises:   as the function that computes y*; ShapeError, DtypeError: a target that does not fit; ValueError: a target
        outside the polytope, an index out of range, an unknown regulariser or reduction.
    Cost:     one forward pass of the layer; the backward pass is a subtraction.
    Source:   Blondel, Martins & Niculae (2020), Learning with Fenchel-Young losses, arXiv:1901.02324.

    >>> x = torch.tensor([[0.0, 1.0, 0.9]], requires_grad=True)
    >>> loss = fenchel_young_loss(x, torch.tensor([1]), "euclidean")
    >>> loss.detach(), torch.autograd.grad(loss.sum(), x)[0]
    (tensor([0.2025]), tensor([[ 0.0000, -0.4500,  0.4500]]))
    """
    check_reduction(reduction)
    checks.integer("ignore_index", ignore_index)
    axis = scores.axis_of(x, dim)
    tau = scores.temperature_of(x, axis, temperature)
    alpha = None if isinstance(regulariser, (str, Regularizer)) else scores.per_problem("alpha", regulariser, x, axis)
    chosen = None if alpha is not None else regularizers.regularizer(regulariser)  # type: ignore[arg-type]
    checks.positive("total", total)
    if total != 1 and (chosen is None or chosen.name in _FAST):
        raise ArgumentError(f'total must be 1 on the simplex, got {total}; for more choose "binary_entropy" or "box"')
    given = scores.masked(x, mask)
    rows, top, (tau, *rest) = scores.rows(given, axis, "raise", tau, *(() if alpha is None else (alpha,)))
    alpha = rest[0] if rest else None
    y = _answer(rows, chosen, alpha, tau, total)
    taus = tau if isinstance(tau, Tensor) else torch.full_like(top, tau)
    gap = rows - top
    value = _optimum(gap, y, taus, chosen, alpha)
    if target.is_floating_point():
        t = _point(target, x, axis, y, total, None if chosen is None else chosen.cap)
        inner = torch.where(t > 0, gap, 0.0).mul(t).sum(-1, keepdim=True)
        loss, kept = value + taus * _phi(t, chosen, alpha) - inner, None
    else:
        index, kept = _indices(target, x, axis, y, total, ignore_index)
        one = torch.zeros_like(y[..., :2])
        one[..., 0] = 1.0
        corner = _phi(one[..., :1], chosen, alpha) + (y.shape[-1] - 1) * _phi(one[..., 1:], chosen, alpha)
        loss = torch.where(kept, value + taus * corner - gap.gather(-1, index), 0.0)
    shape = list(loss.shape[:-1]) if x.ndim else []
    loss = loss.reshape(shape).to(x.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum" or kept is None:
        return loss.sum() if reduction == "sum" else loss.mean()
    return loss.sum() / kept.sum()


_FAST = ("entropy", "euclidean")


def check_reduction(reduction: str) -> None:
    """Refuse anything but the three reductions."""
    if reduction not in REDUCTIONS:
        raise ArgumentError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")


def _answer(
    x: Tensor, chosen: Regularizer | None, alpha: Tensor | float | None, tau: Tensor | float, total: float
) -> Tensor:  # (*B, n) -> (*B, n)
    """The answer y*, by the fastest way there is."""
    if alpha is not None:
        return tsallis.entmax(x, alpha, temperature=tau)
    if chosen is regularizers.ENTROPY:
        return simplex.softmax(x, temperature=tau)
    if chosen is regularizers.EUCLIDEAN:
        return tsallis.sparsemax(x, temperature=tau)
    return regularizers.regularized_argmax(x, chosen, temperature=tau, total=total)  # type: ignore[arg-type]


def _phi(y: Tensor, chosen: Regularizer | None, alpha: Tensor | float | None) -> Tensor:  # (*B, n) -> (*B, 1)
    """Φ(y); differentiable also at the bounds, where φ is."""
    value = tsallis.value(y, alpha) if chosen is None else chosen.value(y)  # type: ignore[arg-type]
    return value.sum(-1, keepdim=True)


def _optimum(
    x: Tensor, y: Tensor, tau: Tensor, chosen: Regularizer | None, alpha: Tensor | float | None
) -> Tensor:  # (*B, n), (*B, n), (*B, 1) -> (*B, 1)
    """The optimal value ⟨x, y⟩ − τ Φ(y), with the gradient of the envelope theorem, to any order."""
    phi = _phi(torch.where(y > 0, y, y.detach()), chosen, alpha)
    if isinstance(alpha, Tensor):
        slope, alphas = tsallis.slope_in_alpha(y, alpha).sum(-1, keepdim=True), alpha
    else:
        slope = alphas = torch.zeros_like(phi)
    value = (torch.where(y > 0, x, 0.0) * y).sum(-1, keepdim=True) - tau * phi
    if traced():
        if differentiations() > 1:
            return value  # its own derivatives are right too, and go on
        moved = (y.detach() * torch.where(y > 0, moving(x), 0.0)).sum(-1, keepdim=True)
        moved = moved - phi.detach() * moving(tau) - (tau * slope).detach() * moving(alphas)
        return value.detach() + moved
    optimum: Tensor = _Envelope.apply(value.detach(), x, tau, alphas, y, phi, slope)
    return optimum


class _Envelope(torch.autograd.Function):
    """(value, x, τ, α, y, Φ(y), ∂Φ/∂α) to value, whose derivatives in x, τ, α are y, −Φ and −τ ∂Φ/∂α."""

    @staticmethod
    def forward(value: Tensor, x: Tensor, tau: Tensor, alpha: Tensor, y: Tensor, phi: Tensor, slope: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, _, tau, _, y, phi, slope = inputs
        ctx.save_for_backward(tau, y, phi, slope)
        ctx.save_for_forward(tau, y, phi, slope)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_x, needs_tau, needs_alpha, *_ = ctx.needs_input_grad

        def work(grad: Tensor, tau: Tensor, y: Tensor, phi: Tensor, slope: Tensor) -> list[Tensor | None]:
            return [
                grad * y if needs_x else None,
                -grad * phi if needs_tau else None,
                -grad * tau * slope if needs_alpha else None,
            ]

        return None, *modernised(work, (grad, *ctx.saved_tensors)), None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, d_x: Tensor | None, d_tau: Tensor | None, d_alpha: Tensor | None, *__: Any) -> Tensor:
        with transforms.forward_mode():

            def work(
                d_x: Tensor | None, d_tau: Tensor | None, d_alpha: Tensor | None, *saved: Tensor
            ) -> list[Tensor | None]:
                tau, y, phi, slope = saved
                moved = torch.zeros_like(phi)
                if d_x is not None:
                    moved = moved + (torch.where(y > 0, d_x, 0.0) * y).sum(-1, keepdim=True)
                if d_tau is not None:
                    moved = moved - phi * d_tau
                return [moved if d_alpha is None else moved - tau * slope * d_alpha]

            found = modernised(work, (d_x, d_tau, d_alpha, *transforms.primals(ctx.saved_tensors)))[0]
            return torch.zeros(()) if found is None else found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _Envelope.apply(*transforms.map_to_front(info.batch_size, in_dims, tensors)), 0


def _point(target: Tensor, x: Tensor, axis: int, y: Tensor, total: float, cap: float | None) -> Tensor:
    """A soft target as rows; it must be a point of the polytope."""
    checks.floating_tensors(x=x, target=target)
    shape = y.movedim(-1, axis).shape if x.ndim else x.shape
    try:
        fits = torch.broadcast_shapes(shape, target.shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ShapeError(f"target of shape {tuple(target.shape)} does not fit x, which needs {tuple(shape)}")
    t = target.to(y.dtype).expand(shape)
    t = t.movedim(axis, -1) if x.ndim else t.reshape(1)
    if checks.readable(t, x):
        most = float("inf") if cap is None else cap
        error = (t.detach().sum(-1) - total).abs()
        slack = total * torch.finfo(x.dtype).eps ** 0.5
        bad = ~((error <= slack) & (t.detach() >= 0).all(-1) & (t.detach() <= most * (1 + slack)).all(-1))
        if checks.host_bool(bad.any()):
            raise ArgumentError(
                f"target{checks.index_of(bad)} is no point of the polytope: its entries must be at least 0"
                f"{'' if most == float('inf') else f', at most {most:g}'} and sum to {total:g}; they sum to "
                f"{float(t.detach().sum(-1)[bad][0]):g} ({int(bad.sum())} of {bad.numel()} problems). Divide by the sum"
            )
    return t


def _indices(
    target: Tensor, x: Tensor, axis: int, y: Tensor, total: float, ignore_index: int
) -> tuple[Tensor, Tensor]:  # (*B, 1), (*B, 1)
    """Indices as rows, and which of them count."""
    if target.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise DtypeError(f"target must be floating-point (a point) or integer (indices), got {target.dtype}")
    if total != 1:
        raise ArgumentTypeError(f"indices as target are one a problem, but total is {total}; give a point as target")
    shape = y.shape[:-1] if x.ndim else x.shape
    if target.shape != shape:
        raise ShapeError(
            f"target of shape {tuple(target.shape)} does not fit x of shape {tuple(x.shape)}: indices need "
            f"{tuple(shape)}, the shape of x without its axis {axis}"
        )
    target = target.long().reshape(*y.shape[:-1], 1)
    kept = target != ignore_index
    if checks.readable(target):
        bad = kept & ((target < 0) | (target >= y.shape[-1]))
        if checks.host_bool(bad.any()):
            raise ArgumentError(
                f"target{checks.index_of(bad.squeeze(-1))} is {int(target[bad][0])}, no index of one of {y.shape[-1]} "
                f"entries; a problem to leave out has ignore_index={ignore_index}"
            )
    return torch.where(kept, target, 0), kept
