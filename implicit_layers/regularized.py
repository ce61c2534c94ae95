r"""Linear programs over any polytope with any registered regulariser: the template behind the whole family.

    max ⟨c, x⟩ − τ Σ φ(xᵢ)   subject to   A x = b,   G x ≤ h,   0 ≤ x ≤ u

With the duals y, z of the rows, x = (φ')⁻¹((c − Aᵀy − Gᵀz)/τ), entry by entry and cut off at u. Everything else is what
`polytope` does for φ(x) = x log x: the same Newton on the dual, and the same adjoint

    M = E W Eᵀ,   w = M⁻¹(E W g),   p = W(g − Eᵀw),   W = diag(1/φ''(x)), zero at the bounds,

with E the rows that are held. The optimal value needs no adjoint at all: its derivatives are x, −Σφ(x) and the duals.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks, transforms
from implicit_layers.errors import ArgumentError
from implicit_layers.kkt.quadratic import matvec, outer, transposed_matvec
from implicit_layers.legacy_vmap import modernised
from implicit_layers.polytope import Settings, at_the_door, differentiable
from implicit_layers.regularizers import Regularizer, regularizer
from implicit_layers.solution import OnFailure, Solution, SolveInfo, check_on_failure
from implicit_layers.solvers.dual_newton import DualNewton


def regularized_lp(
    c: Tensor,  # (*B, n)
    regulariser: str | Regularizer = "entropy",
    *,
    A: Tensor | None = None,  # (*B, n_eq, n)
    b: Tensor | None = None,  # (*B, n_eq)
    G: Tensor | None = None,  # (*B, n_ineq, n)
    h: Tensor | None = None,  # (*B, n_ineq)
    ub: Tensor | float | None = None,  # (*B, n)
    temperature: Tensor | float = 1.0,  # (*B, 1)
    tol: float = 1e-10,
    max_iter: int = 1000,
    on_failure: OnFailure = "raise",
) -> Solution:
    r"""Choose a point of a polytope by a linear program with any regulariser. `c` are SCORES: they are MAXIMISED.

    Problem:  x* = argmax_x ⟨c, x⟩ − τ Σᵢ φ(xᵢ)  subject to  A x = b,  G x ≤ h,  0 ≤ x ≤ min(u, cap).
    Solution: xᵢ = (φ')⁻¹((c − Aᵀy − Gᵀz)ᵢ/τ), cut off at the bounds, with multipliers y of A x = b, z ≥ 0 of G x ≤ h.

    Args:
        c: scores, n of them in the last axis.
        regulariser: "entropy" (this is `entropic_lp`), "euclidean", "binary_entropy" or "box" (the last two with
            x ≤ 1), the name of your own, or what `register_regularizer` or `tsallis` returned.
        A, b, G, h, ub, temperature, tol, max_iter, on_failure: as in `entropic_lp` with hard slack. Without a bound and
            with φ' bounded above, rows must bound x. Where the weight 1/φ'' has no bound at zero (Tsallis, α > 2) the
            duals do not determine small entries to rounding: small temperatures fail with a ConvergenceError.

    Returns:  Solution(value, info): x*, (*B, n), in the dtype and on the device of `c`; `info` has one entry a problem.
    Gradient: with respect to c, A, b, G, h, u and τ, to any order, forward and reverse mode, from the weights 1/φ''(x),
              zero at the bounds, and one Cholesky factorisation of E W Eᵀ. Where an entry is at a bound and about to
              leave it, the derivative of fewest free entries; else as `entropic_lp`. Where so few entries are free
              that rows depend on each other on them, b can change to one side only: derivatives in b mean nothing.
    Raises:   as `entropic_lp`; ValueError: an unknown name.
    Cost:     as `entropic_lp`.
    Source:   the implicit function theorem; see the module `implicit_layers.regularized`.

    >>> c, A, b = torch.tensor([0.0, 1.0, 0.9]), torch.ones(1, 3), torch.ones(1)
    >>> regularized_lp(c, "euclidean", A=A, b=b).value  # sparsemax
    tensor([0.0000, 0.5500, 0.4500])
    """
    x, _, info, _ = _solved("regularized_lp", c, regulariser, A, b, G, h, ub, temperature, tol, max_iter, on_failure)
    return Solution(x.to(c.dtype), info)


class _Program(NamedTuple):
    """A program as it came through the door, in float64 and of one batch shape."""

    chosen: Regularizer
    theta: Tensor  # (*B, n): c/τ
    E: Tensor  # (*B, m, n)
    f: Tensor  # (*B, m)
    u: Tensor  # (*B, n), at most the cap


def _solved(
    what: str,
    c: Tensor,
    regulariser: str | Regularizer,
    A: Tensor | None,
    b: Tensor | None,
    G: Tensor | None,
    h: Tensor | None,
    ub: Tensor | float | None,
    temperature: Tensor | float,
    tol: float,
    max_iter: int,
    on_failure: OnFailure,
) -> tuple[Tensor, Tensor, SolveInfo, _Program]:  # x (*B, n), η (*B, m)
    """Check and solve."""
    chosen = regularizer(regulariser)
    check_on_failure(on_failure)
    checks.positive("tol", tol)
    checks.whole("max_iter", max_iter, least=1)
    dtype, n_eq, checked, theta, E, f, u = at_the_door(what, c, A, b, G, h, ub, temperature)
    if chosen.cap < float("inf"):
        u = u.clamp(max=chosen.cap)
    settings = Settings(DualNewton(tol, max_iter), False, n_eq, on_failure, checked, dtype, chosen, what)
    x, eta, *_, status, converged, iterations, residual = differentiable(settings, theta, E, f, u)
    info = SolveInfo(status, converged, iterations, residual.to(dtype))
    return x, eta, info, _Program(chosen, theta, E, f, u)


def regularized_lp_loss(
    c: Tensor,  # (*B, n)
    target: Tensor,  # (*B, n)
    regulariser: str | Regularizer = "entropy",
    *,
    A: Tensor | None = None,  # (*B, n_eq, n)
    b: Tensor | None = None,  # (*B, n_eq)
    G: Tensor | None = None,  # (*B, n_ineq, n)
    h: Tensor | None = None,  # (*B, n_ineq)
    ub: Tensor | float | None = None,  # (*B, n)
    temperature: Tensor | float = 1.0,  # (*B, 1)
    tol: float = 1e-10,
    max_iter: int = 1000,
) -> Tensor:  # (*B,)
    r"""How much better than the target the answer of `regularized_lp` is, by the regularised objective itself.

    Problem:  ℓ(c; t) = max_x (⟨c, x⟩ − τ Σφ(xᵢ)) − (⟨c, t⟩ − τ Σφ(tᵢ))  over A x = b, G x ≤ h, 0 ≤ x ≤ min(u, cap):
              the Fenchel–Young loss. Convex in c, never negative, zero where x*(c) = t.

    Args:
        c, regulariser, A, b, G, h, ub, temperature, tol, max_iter: as in `regularized_lp`.
        target: t, a point of the polytope, in the dtype of `c`; leading dimensions broadcast.

    Returns:  one loss a problem, in the dtype of `c`.
    Gradient: ∂ℓ/∂c = x* − t, ∂ℓ/∂τ = Σφ(t) − Σφ(x*), ∂ℓ/∂b and ∂ℓ/∂h the multipliers y and z, ∂ℓ/∂A = −y xᵀ, and so
              on, by the envelope theorem: no adjoint solve. Second derivatives are those of x*.
    Raises:   as `regularized_lp`; ArgumentError: the target is no point of the polytope.
    Cost:     one forward pass of `regularized_lp`.
    Source:   Blondel, Martins & Niculae (2020), Learning with Fenchel-Young losses, arXiv:1901.02324.

    >>> c = torch.tensor([0.0, 1.0, 0.9], requires_grad=True)
    >>> t = torch.tensor([0.0, 1.0, 0.0])
    >>> loss = regularized_lp_loss(c, t, "euclidean", A=torch.ones(1, 3), b=torch.ones(1))
    >>> loss.detach(), torch.autograd.grad(loss, c)[0]
    (tensor(0.2025), tensor([ 0.0000, -0.4500,  0.4500]))
    """
    what = "regularized_lp_loss"
    x, eta, _, program = _solved(what, c, regulariser, A, b, G, h, ub, temperature, tol, max_iter, "raise")
    checks.floating_tensors(c=c, target=target)
    checks.trailing_shape("target", target, (x.shape[-1],), "to fit c")
    checks.batch_shape(c=(x, 1), target=(target, 1))
    t = target.double()
    n_eq = 0 if b is None else b.shape[-1]
    _check_target(t, program, n_eq, c.dtype)
    tau = checks.temperature("c", c, 1, temperature)
    chosen, theta, E, f, u = program
    phi = _sum(chosen, torch.where(x > 0, x, x.detach()))
    capped = (x >= u) & (u > 0) & (u < chosen.cap)
    by_bound = theta - transposed_matvec(E, eta) - chosen.slopes(u)
    by_bound = torch.where(capped, by_bound, 0.0)
    optimum = _Optimum.apply(((theta * x).sum(-1) - phi).detach(), theta, E, f, u, x, eta, by_bound)
    loss = optimum + _sum(chosen, t) - (theta * t).sum(-1)
    return (loss * (tau.squeeze(-1) if isinstance(tau, Tensor) and tau.ndim else tau)).to(c.dtype)


def _sum(chosen: Regularizer, x: Tensor) -> Tensor:  # (*B, n) -> (*B,)
    """Σ φ(xᵢ)."""
    return chosen.value(x).sum(-1)


def _check_target(t: Tensor, program: _Program, n_eq: int, dtype: torch.dtype) -> None:
    """Refuse targets outside the polytope, by more than rounding."""
    t, E, f, u = (x.detach() for x in (t, program.E, program.f, program.u))
    if not checks.readable(t, E, f, u):
        return
    slack = max(torch.finfo(dtype).eps ** 0.5, 1e-6)
    off = matvec(E, t) - f
    off = torch.cat([off[..., :n_eq].abs(), off[..., n_eq:]], -1) / (1 + f.abs())
    outside = torch.maximum(-t, t - u * (1 + slack))
    bad = ~((off <= slack).all(-1) & (outside <= slack).all(-1))
    if checks.host_bool(bad.any()):
        rows = f", and its rows are off by up to {float(off.amax()):.1e}" if off.numel() else ""
        raise ArgumentError(
            f"regularized_lp_loss: target{checks.index_of(bad)} is no point of the polytope ({int(bad.sum())} of "
            f"{bad.numel()} problems): its entries are outside 0 <= t <= u by up to {float(outside.amax()):.1e}{rows}"
        )


class _Optimum(torch.autograd.Function):
    """(value, θ, E, f, u, x, η, μ) to value, with the derivatives x, −η xᵀ, η and μ of the envelope theorem."""

    @staticmethod
    def forward(
        value: Tensor, theta: Tensor, E: Tensor, f: Tensor, u: Tensor, x: Tensor, eta: Tensor, mu: Tensor
    ) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[5:])
        ctx.save_for_forward(*inputs[5:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_matrix = ctx.needs_input_grad[2]

        def work(grad: Tensor, x: Tensor, eta: Tensor, mu: Tensor) -> list[Tensor | None]:
            g = grad.unsqueeze(-1)
            return [g * x, -outer(g * eta, x) if needs_matrix else None, g * eta, g * mu]

        return None, *modernised(work, (grad, *ctx.saved_tensors)), None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> Tensor:
        with transforms.forward_mode():
            x, eta, mu = transforms.primals(ctx.saved_tensors)
            d_theta, d_E, d_f, d_u, *_ = tangents
            moved = torch.zeros_like(x[..., 0])
            for change, rate in ((d_theta, x), (d_f, eta), (d_u, mu)):
                if change is not None:
                    moved = moved + (change * rate).sum(-1)
            return moved if d_E is None else moved - (eta * matvec(d_E, x)).sum(-1)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _Optimum.apply(*transforms.map_to_front(info.batch_size, in_dims, tensors)), 0
