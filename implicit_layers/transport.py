r"""Entropic optimal transport, differentiated through the two marginals that define the plan.

    min ⟨C, P⟩ − ε H(P)   subject to   P 1 = a,   Pᵀ 1 = b,      H(P) = −Σ Pᵢⱼ log Pᵢⱼ

With L = −C/ε and potentials φ, ψ (divided by ε) the plan is P = exp(L + φ ⊕ ψ). For a cotangent (G, g_φ, g_ψ) let
Q = P∘G and (u, v) = B⁺(Q1 + g_φ, Qᵀ1 + g_ψ) (see `kkt.balance`); then

    ∂a = u,   ∂b = v,   ∂L = Q − P∘(u ⊕ v),

whatever iterations found P. Forward mode, and derivatives of derivatives, solve with the same B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks, transforms
from implicit_layers.eager import uncompiled
from implicit_layers.errors import ArgumentError, DeviceError, NonFiniteError, ShapeError, SingularAdjointError
from implicit_layers.kkt.balance import BalanceSolve
from implicit_layers.legacy_vmap import modernised
from implicit_layers.solution import OnFailure, Solution, SolveInfo, Status, check_on_failure, report_failure
from implicit_layers.solvers.scaling import Range, Scaling

_SAME = 1e-6  # relative difference of sums that is taken for rounding: of a float32 softmax, say
_COARSE = 1e-6  # tolerance from which large float32 costs may be rounded once more
_ADVICE = "Raise max_iter, or the temperature, which may be too small for costs that far apart."


def sinkhorn(
    C: Tensor,  # (*B, n, m)
    a: Tensor,  # (*B, n)
    b: Tensor,  # (*B, m)
    *,
    temperature: Tensor | float = 1.0,  # (*B, 1, 1)
    tol: float = 1e-9,
    max_iter: int = 10000,
    on_failure: OnFailure = "raise",
) -> Solution:
    r"""Transport the mass `a` to `b` at the least cost, softened by entropy. `C` are COSTS: they are MINIMISED.

    Problem:  P* = argmin_P ⟨C, P⟩ − ε H(P)  subject to  P 1 = a,  Pᵀ 1 = b,  P ≥ 0,  with H(P) = −Σᵢⱼ Pᵢⱼ log Pᵢⱼ and ε
              the temperature.
    Solution: Pᵢⱼ = exp((fᵢ + gⱼ − Cᵢⱼ)/ε): the same plan as with KL(P‖a bᵀ) instead of −H(P), and the same as
              `entropic_lp` of −C with the marginals as rows.

    Args:
        C: costs; +inf forbids an entry, which gets P = 0 and gradient 0.
        a, b: the marginals, (*B, n) and (*B, m), never negative, of the same sum. Rows and columns of zero mass get
            zeros. Sums that differ by no more than 1e-6 relative, or by rounding of their dtype, count as the same: b
            is scaled to the mass of a. Sums farther apart are refused: such a problem has no plan.
        temperature: ε > 0, in the unit of the costs: a number, or a tensor that broadcasts with `C` and has size 1 in
            the last two axes. A tensor is differentiated.
        tol: error of the marginals, Σ|P1 − a| + Σ|Pᵀ1 − b| over Σa.
        max_iter: cap on the scaling iterations and Newton steps together.
        on_failure: "raise", or "warn" / "ignore": problems that fail keep their last iterate, get zero gradient and
            are marked in `info`; their neighbours are untouched. Data that are refused raise in any case.
        Leading dimensions *B broadcast. All is computed in float64 inside, and half precision is accepted. Of one
        large problem in float32 with `tol` of 1e-6 or more, C/ε may be rounded to float32 once again.

    Returns:  Solution(value, info): P*, (*B, n, m), in the dtype and on the device of `C`; `info` has one entry a
              problem.
    Gradient: with respect to C, a, b and ε, to any order, forward and reverse mode: one Cholesky factorisation of the
              smaller side's size (above 2048, conjugate gradients), whatever the iterations. a and b can only change
              with Σa = Σb, so their gradients are defined up to a constant (+κ on a, −κ on b); those of least norm are
              returned, and are right behind a softmax or any other normalisation. At a marginal that is zero, the
              derivative to its side, first order only: there second derivatives in C alone are right, and those in a
              or b are refused.
    Raises:   DtypeError, DeviceError, ShapeError, NonFiniteError: naming the argument (and index).
              ValueError: a negative marginal, sums that differ, ε not positive.
              InfeasibleError: forbidden entries leave some mass no way, proven.
              ConvergenceError: the marginals stayed off by more than `tol`. Between sides of different length this may
                  happen from C/ε of about 1e6 on, and mostly does from 1e10 on, beyond what float64 resolves.
              SingularAdjointError: a second derivative in marginals of which some are zero.
    Cost:     O(nm) a scaling iteration; where those are slow, Newton steps of O(nm·k + k³), k = min(n, m), about 15–40
              of them at any ε. Memory for backward O(nm), whatever the iterations.
    Source:   Cuturi (2013), Sinkhorn distances, arXiv:1306.0895; Eisenberger et al. (2022), A unified framework for
              implicit Sinkhorn differentiation, arXiv:2205.06688.

    >>> C = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> half = torch.tensor([0.5, 0.5])
    >>> sinkhorn(C, half, half, temperature=0.5).value
    tensor([[0.4404, 0.0596],
            [0.0596, 0.4404]])
    """
    check_on_failure(on_failure)
    checks.positive("tol", tol)
    checks.whole("max_iter", max_iter, least=1)
    C, a, b = checks.without_autocast({"C": C, "a": a, "b": b}).values()
    dtype, device = checks.floating_tensors(C=C, a=a, b=b)
    if device.type == "meta" and type(C) in (Tensor, torch.nn.Parameter):
        raise DeviceError("sinkhorn: the arguments are on the meta device, which holds no numbers to solve with")
    if C.ndim < 2 or 0 in C.shape[-2:]:
        raise ShapeError(f"C must have shape (*B, n, m) with n and m at least 1, got {tuple(C.shape)}")
    n, m = C.shape[-2:]
    checks.trailing_shape("a", a, (n,), f"to fit C with n = {n} rows")
    checks.trailing_shape("b", b, (m,), f"to fit C with m = {m} columns")
    epsilon = checks.temperature("C", C, 2, temperature)
    scale = (epsilon if epsilon.ndim else epsilon.reshape(1, 1)) if isinstance(epsilon, Tensor) else None
    parts = {"C": (C, 2), "a": (a, 1), "b": (b, 1)}
    batch = checks.batch_shape(**parts if scale is None else {"C": (C, 2), "temperature": (scale, 2), **parts})
    a, b = a.double(), b.double()
    known = _range(C, a, b, epsilon, dtype) if checks.readable(C, a, b) else None
    if known is not None and known.spread < torch.inf:
        fresh = C.dtype != torch.float64 and not isinstance(epsilon, Tensor)
        L = C.double().mul_(-1 / epsilon) if fresh else C.double() / -epsilon
    else:
        forbidden = C.detach() == torch.inf
        L = (C.double().masked_fill(forbidden, 0.0) / -epsilon).masked_fill(forbidden, -torch.inf)
    L, a, b = (_expanded(x, batch, k) for x, k in ((L, 2), (a, 1), (b, 1)))
    rounded = dtype != torch.float64 and tol >= _COARSE
    settings = _Settings(Scaling(tol, max_iter, rounded), on_failure, known, dtype)
    P, _, _, status, converged, iterations, residual = _differentiable(settings, L, a, b)
    return Solution(P.to(dtype), SolveInfo(status, converged, iterations, residual.to(dtype)))


def _expanded(x: Tensor, batch: torch.Size, event_ndim: int) -> Tensor:
    """Give x this batch shape."""
    return (
        x
        if x.ndim == len(batch) + event_ndim and x.shape[: len(batch)] == batch
        else (x.expand(*batch, *x.shape[x.ndim - event_ndim :]))
    )


def _range(C: Tensor, a: Tensor, b: Tensor, epsilon: Tensor | float, dtype: torch.dtype) -> Range:
    """Check the values of costs and marginals; one look at all of them tells whether another is needed."""
    C, a, b = C.detach(), a.detach(), b.detach()
    if not (C.numel() and a.numel() and b.numel()):
        _check_costs(C)
        checks.finite(a=a, b=b)
        _check_marginals(a, b, dtype)
        return Range(0.0, 0.0, 0.0)
    mass, other = a.sum(-1), b.sum(-1)
    apart = (mass - other).abs_().sub_(torch.maximum(mass, other), alpha=_allowed(a, b, dtype))
    ends = [t.double() for t in torch.aminmax(C)]
    temperatures = [epsilon.detach().amin()] if isinstance(epsilon, Tensor) else []
    low, high, least, least_b, gap, *coldest = checks.host_floats(
        *ends, a.amin(), b.amin(), apart.amax(), *temperatures
    )
    tau = coldest[0] if coldest else float(epsilon)
    spread = high - low if high < torch.inf else torch.inf  # also where all entries are forbidden
    known = Range(spread / tau, min(least, least_b), max(abs(low), abs(high)) / tau)
    if not (known.spread < torch.inf and known.least >= 0 and gap <= 0):  # NaN is none of these
        _check_costs(C)
        checks.finite(a=a, b=b)
        _check_marginals(a, b, dtype)
    return known


def _check_costs(C: Tensor) -> None:
    """Refuse costs that are NaN or −inf."""
    C = C.detach()
    bad = C.isnan() | C.isneginf()
    if checks.host_bool(bad.any()):
        raise NonFiniteError(
            f"C{checks.index_of(bad)} is {float(C[bad][0])}: {int(bad.sum())} of {bad.numel()} costs are NaN or -inf. "
            "A cost is a number, or +inf for an entry that is forbidden"
        )


def _check_marginals(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Refuse marginals that are negative or of different sums."""
    a, b = a.detach().double(), b.detach().double()
    mass, other = torch.broadcast_tensors(a.sum(-1), b.sum(-1))
    allowed = _allowed(a, b, dtype)
    apart = (mass - other).abs() > allowed * torch.maximum(mass.abs(), other.abs())
    if checks.host_bool((a >= 0).all() & (b >= 0).all() & ~apart.any()):
        return
    for name, marginal in (("a", a), ("b", b)):
        bad = ~(marginal >= 0)
        if bool(bad.any()):
            raise ArgumentError(
                f"{name}{checks.index_of(bad)} is {float(marginal[bad][0])}; a marginal is a mass, never negative"
            )
    where = checks.index_of(apart)
    one, two = float(mass[apart][0]), float(other[apart][0])
    raise ArgumentError(
        f"sinkhorn: the marginals have different sums, {one:.12g} of a{where} and {two:.12g} of b{where}, "
        f"{abs(one - two):.3g} apart where {allowed * max(abs(one), abs(two)):.3g} is allowed for rounding "
        f"({int(apart.sum())} of {apart.numel()} problems), so no plan has both. "
        "Normalise them: b * (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True))"
    )


def _allowed(a: Tensor, b: Tensor, dtype: torch.dtype) -> float:
    """The relative difference of sums that is rounding."""
    return max(64 * max(a.shape[-1], b.shape[-1]) ** 0.5 * torch.finfo(dtype).eps, _SAME)


class _Settings(NamedTuple):
    """What a solve needs besides tensors."""

    solver: Scaling
    on_failure: OnFailure
    known: Range | None  # of values that were looked at and are right; None: nobody could
    dtype: torch.dtype  # of the caller

    @property
    def zeros(self) -> bool:
        """Whether some marginal may be zero."""
        return self.known is None or self.known.least <= 0


class _Sinkhorn(torch.autograd.Function):
    """(L, a, b), all of one batch shape, to (P, φ, ψ, info...)."""

    @staticmethod
    @transforms.signed
    def forward(settings: _Settings, L: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        if settings.known is None:
            _check_costs(-L)
            checks.finite(a=a, b=b)
            _check_marginals(a, b, settings.dtype)
        found = settings.solver.solve(L, a, b, settings.known)
        converged = found.status == int(Status.CONVERGED)
        info = SolveInfo(found.status, converged, found.iterations, found.residual)
        solver = settings.solver
        report_failure(
            info, settings.on_failure, what="sinkhorn", tol=solver.tol, max_iter=solver.max_iter, advice=_ADVICE
        )
        return *(x.clone() if x._is_view() else x for x in found[:3]), *info  # a view is not the caller's to change

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        settings, L, a, b = inputs
        P, phi, psi, status, converged, iterations, residual = output
        ctx.settings = settings
        ctx.mark_non_differentiable(status, converged, iterations, residual)
        extra = (L, a, b, phi, psi) if settings.zeros else ()
        ctx.save_for_backward(P, converged, *extra)
        ctx.save_for_forward(P, converged, *extra)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        settings = ctx.settings
        in_marginals = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]

        def work(P: Tensor, converged: Tensor, *rest: Tensor) -> list[Tensor | None]:
            *extra, by_P, by_phi, by_psi = rest
            P, by_P = (_masked(converged, x) for x in (P, by_P))
            Q = P * by_P
            right = (Q.sum(-1) + _masked(converged, by_phi), Q.sum(-2) + _masked(converged, by_psi))
            u, v = BalanceSolve.apply(P, *right)
            grad_L = Q - P * (u.unsqueeze(-1) + v.unsqueeze(-2))
            if settings.zeros:
                edges = _Edges.of(extra, converged)
                from_rows = (edges.rows * (by_P - v.unsqueeze(-2)).detach()).sum(-1)
                from_columns = (edges.columns * (by_P - u.unsqueeze(-1)).detach()).sum(-2)
                u, v = u + from_rows, v + from_columns
                if in_marginals:
                    grad_L, u, v = (_Once.apply(t, edges.some) for t in (grad_L, u, v))
            return [grad_L, u, v]

        return None, *modernised(work, (*ctx.saved_tensors, *grads[:3]))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with transforms.forward_mode():
            P, converged, *extra = transforms.primals(ctx.saved_tensors)
            P = _masked(converged, P)
            d_L, d_a, d_b = tangents
            in_marginals = ctx.settings.zeros and not (d_a is None and d_b is None)
            d_P = torch.zeros_like(P) if d_L is None else torch.where(P > 0, P * d_L, 0.0)
            d_a = torch.zeros_like(P[..., 0]) if d_a is None else d_a
            d_b = torch.zeros_like(P[..., 0, :]) if d_b is None else d_b
            if ctx.settings.zeros:
                edges = _Edges.of(extra, converged)
                d_P = d_P + edges.rows * d_a.unsqueeze(-1) + edges.columns * d_b.unsqueeze(-2)
            right = (_masked(converged, d_a - d_P.sum(-1)), _masked(converged, d_b - d_P.sum(-2)))
            d_phi, d_psi = BalanceSolve.apply(P, *right)
            d_P = _masked(converged, d_P) + P * (d_phi.unsqueeze(-1) + d_psi.unsqueeze(-2))
            if in_marginals:
                d_P, d_phi, d_psi = (_Once.apply(t, edges.some) for t in (d_P, d_phi, d_psi))
            return d_P, d_phi, d_psi, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], settings: _Settings, *tensors: Tensor) -> tuple[Any, Any]:
        outputs = _Sinkhorn.apply(settings, *transforms.map_to_front(info.batch_size, in_dims[1:], tensors))
        return outputs, (0,) * len(outputs)


@uncompiled
def _differentiable(settings: _Settings, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`_Sinkhorn` as a function that the compiler leaves whole."""
    outputs: tuple[Tensor, ...] = transforms.apply(_Sinkhorn, settings, *tensors, plain=checks.plain(*tensors))
    return outputs


class _Edges(NamedTuple):
    """Where the first mass in a row or column of zeros would go; constants, so derivatives of them are not tracked."""

    rows: Tensor  # (*B, n, m): softmaxⱼ(Lᵢⱼ + ψⱼ) in rows of zeros, else 0
    columns: Tensor  # (*B, n, m): softmaxᵢ(Lᵢⱼ + φᵢ) in columns of zeros, else 0
    some: Tensor  # (*B,): whether there are any

    @staticmethod
    def of(kept: Sequence[Tensor], converged: Tensor) -> _Edges:
        """From L, a, b, φ, ψ: by the potentials of the rows and columns that have mass."""
        L, a, b, phi, psi = (x.detach() for x in kept)
        no_row, no_column = (a <= 0).unsqueeze(-1), (b <= 0).unsqueeze(-2)
        by_row = (L + psi.unsqueeze(-2)).masked_fill(no_column, -torch.inf).softmax(-1)
        by_column = (L + phi.unsqueeze(-1)).masked_fill(no_row, -torch.inf).softmax(-2)
        rows = torch.where(no_row & ~no_column & ~by_row.isnan(), by_row, 0.0)
        columns = torch.where(no_column & ~no_row & ~by_column.isnan(), by_column, 0.0)
        some = (no_row.any(-2) | no_column.any(-1)).squeeze(-1) & converged
        return _Edges(_masked(converged, rows), _masked(converged, columns), some)


class _Once(torch.autograd.Function):
    """(x, some) to x, which can be differentiated once more only where nothing is said by `some`.

    A first derivative at a marginal of zero holds the distribution of its first mass fixed: another one would be wrong.
    """

    @staticmethod
    def forward(x: Tensor, some: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return modernised(lambda some, g: [_Refusal.apply(g, some)], (*ctx.saved_tensors, grad))[0], None

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor, _: None) -> Tensor:
        with transforms.forward_mode():
            return _Refusal.apply(d_x, *transforms.primals(ctx.saved_tensors))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _Once.apply(*transforms.map_to_front(info.batch_size, in_dims, tensors)), 0


class _Refusal(_Once):
    """(g, some) to g, an error where there are some; this is the first place where their values may be looked at."""

    @staticmethod
    def forward(x: Tensor, some: Tensor) -> Tensor:
        if checks.host_bool(some.any()):
            raise SingularAdjointError(
                f"sinkhorn: {int(some.sum())} of {some.numel()} problems{checks.index_of(some)} have marginals of zero,"
                " at which there are first derivatives to one side, and no second ones in a and b. Leave the rows and "
                "columns of zero mass out, or take second derivatives in C alone (a.detach(), b.detach())"
            )
        return x.clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _Refusal.apply(*transforms.map_to_front(info.batch_size, in_dims, tensors)), 0


def _masked(mask: Tensor, x: Tensor) -> Tensor:
    """x, but zero for problems that failed."""
    return torch.where(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), x, 0.0)
