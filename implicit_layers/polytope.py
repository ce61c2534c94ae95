r"""Entropy-regularised linear programs over any polytope, differentiated through one small system.

    max ⟨c, x⟩ + τ H(x)   subject to   A x = b,   G x ≤ h,   0 ≤ x ≤ u,      H(x) = −Σ xᵢ log xᵢ

With θ = c/τ, E = [A; G], f = [b; h], duals η (divided by τ) and t = θ − Eᵀη, the solution is x = ψ(t) entry by entry
(see `solvers.dual_newton`), W = diag ψ'(t), and with M = E W Eᵀ (+ the entropic slacks) on the rows that are held, the
adjoint of (g_x, g_η) is

    w = M⁻¹(E W g_x − g_η),   p = W(g_x − Eᵀw),
    ∂θ = p,   ∂f = w,   ∂E = −(η pᵀ + w xᵀ),   ∂u = ∂ψ/∂u ∘ (g_x − Eᵀw).

Forward mode solves the same M, and so do derivatives of derivatives: `SchurSolve` is that one solve. Nothing is n×n.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from implicit_layers import checks, transforms
from implicit_layers.eager import uncompiled
from implicit_layers.errors import ArgumentError, DeviceError, ShapeError
from implicit_layers.kkt.quadratic import expand, matvec, outer, transposed_matvec, unexpand
from implicit_layers.kkt.schur import SchurSolve
from implicit_layers.legacy_vmap import modernised
from implicit_layers.regularizers import Regularizer
from implicit_layers.solution import OnFailure, Solution, SolveInfo, Status, check_on_failure, report_failure
from implicit_layers.solvers import dual_start
from implicit_layers.solvers.dual_newton import DualNewton

Slack = Literal["hard", "entropic"]
SLACKS = get_args(Slack)
_STEEP = 3e4  # scores over the temperature beyond which hard bounds are hard to meet
_LARGE = 1e4  # x this many times larger than 1 + |b| + |h| is suspected to run off


def entropic_lp(
    c: Tensor,  # (*B, n)
    *,
    A: Tensor | None = None,  # (*B, n_eq, n)
    b: Tensor | None = None,  # (*B, n_eq)
    G: Tensor | None = None,  # (*B, n_ineq, n)
    h: Tensor | None = None,  # (*B, n_ineq)
    ub: Tensor | float | None = None,  # (*B, n)
    temperature: Tensor | float = 1.0,  # (*B, 1)
    slack: Slack = "hard",
    tol: float = 1e-10,
    max_iter: int = 1000,
    on_failure: OnFailure = "raise",
) -> Solution:
    r"""Choose a point of a polytope by an entropy-regularised linear program. `c` are SCORES: they are MAXIMISED.

    Problem:  x* = argmax_x ⟨c, x⟩ + τ H(x)  subject to  A x = b,  G x ≤ h,  0 ≤ x ≤ u,  with H(x) = −Σᵢ xᵢ log xᵢ.
              For costs, to be minimised, pass −c. With A = 1ᵀ and b = 1 this is `softmax`.
    Solution: log xᵢ = (c − Aᵀy − Gᵀz)ᵢ/τ − 1 below the bounds, with multipliers y of A x = b and z ≥ 0 of G x ≤ h. x is
              positive by itself, so x ≥ 0 needs no row. An entry that rows force to zero one after the other is zero;
              one that only their combination forces to zero (x₁ = 1 beside Σx = 1) is as small as `tol` asks, about
              1e-11, and so is its gradient.

    Args:
        c: scores, n of them in the last axis.
        A, b: (*B, n_eq, n) and (*B, n_eq), together or not at all. Rows may depend on each other (the marginals of a
            transport plan do): the multipliers of least norm are used.
        G, h: (*B, n_ineq, n) and (*B, n_ineq), together or not at all.
        ub: upper bounds, inf where there is none; a number bounds all entries.
        temperature: τ > 0, in the unit of the scores: a number, or a tensor that broadcasts with `c` and has size 1 in
            the last axis. A tensor is differentiated.
        slack: what the slack in G x ≤ h and x ≤ u does.
            "hard": nothing. The inequalities are met, some exactly; their multipliers are zero where there is slack.
            The solution has kinks in the data, where an inequality becomes active.
            "entropic": it counts as a further variable with the same entropy, H(h − G x) + H(u − x). The solution is
            smooth in all data and has slack in every row, so it is pushed away from the bounds: for 0 ≤ x ≤ u it is
            Fermi–Dirac, x = u·sigmoid((c − Aᵀy − Gᵀz)/τ), and not min(exp(…), u).
        tol: relative residual of the constraints, row by row; iterations go on below it while they still gain. Of rows
            that share entries, one of terms below 1e-5 of the largest is judged by that or by 1 + |b|. A row
            of largest entry one must also be met to max(tol, 1e-8)(1 + |b|), however large its terms: where x runs off
            (the program without entropy is unbounded, τ is small) rounding alone breaks it, and that is a failure.
        max_iter: cap on the factorisations.
        on_failure: "raise", or "warn" / "ignore": problems that fail keep their last iterate, get zero gradient and
            are marked in `info`; their neighbours are untouched. Data that are refused raise in any case.
        Leading dimensions *B broadcast. All is computed in float64 inside, and half precision is accepted.

    Returns:  Solution(value, info): x*, (*B, n), in the dtype and on the device of `c`; `info` has one entry a problem.
    Gradient: with respect to c, A, b, G, h, u and τ, to any order, forward and reverse mode: one Cholesky factorisation
              of E W Eᵀ, of the size of the constraints. Where an inequality is weakly active (no slack and no
              multiplier), the derivative to one side, with a `DegenerateGradientWarning` in the backward pass; where
              rows depend on each other, the one of least norm, right for changes that keep the rows consistent. An
              entry that is zero because the rows leave nothing else has zero derivatives.
    Raises:   DtypeError, DeviceError, ShapeError, NonFiniteError: naming the argument (and index).
              ValueError: τ is not positive, unknown `slack`.
              InfeasibleError: no point meets the constraints, proven by a combination of them that contradicts itself
                  (looked for in every iteration far off, and once more after 40 or at the end).
              ConvergenceError: the residual stayed above `tol`.
    Cost:     O(m²n + m³) a factorisation, m = n_eq + n_ineq, 10–60 of them; more with `ub` beside `G` at small τ: of
              192 random programs at τ = 0.01 two took more than 60, 120 and 158. Memory O(mn).
    Source:   Boyd & Vandenberghe (2004), section 5.1.6, for the dual; Fang, Rajasekera & Tsao (1997), Entropy
              Optimization and Mathematical Programming.

    >>> c, A, b = torch.tensor([0.0, 1.0, 2.0]), torch.ones(1, 3), torch.ones(1)
    >>> entropic_lp(c, A=A, b=b).value  # softmax
    tensor([0.0900, 0.2447, 0.6652])
    >>> entropic_lp(c, A=A, b=b, ub=0.5).value
    tensor([0.1345, 0.3655, 0.5000])
    """
    check_on_failure(on_failure)
    check_slack(slack)
    checks.positive("tol", tol)
    checks.whole("max_iter", max_iter, least=1)
    dtype, n_eq, checked, theta, E, f, u = at_the_door("entropic_lp", c, A, b, G, h, ub, temperature)
    settings = Settings(DualNewton(tol, max_iter), slack == "entropic", n_eq, on_failure, checked, dtype)
    outputs = differentiable(settings, theta, E, f, u)
    status, converged, iterations, residual = outputs[-4:]
    return Solution(outputs[0].to(dtype), SolveInfo(status, converged, iterations, residual.to(dtype)))


def check_slack(slack: str) -> None:
    """Refuse anything but the two kinds of slack."""
    if slack not in SLACKS:
        raise ArgumentError(f"slack must be one of {SLACKS}, got {slack!r}")


def at_the_door(
    what: str,
    c: Tensor,
    A: Tensor | None,
    b: Tensor | None,
    G: Tensor | None,
    h: Tensor | None,
    ub: Tensor | float | None,
    temperature: Tensor | float,
) -> tuple[torch.dtype, int, bool, Tensor, Tensor, Tensor, Tensor]:
    """Check the arguments; in float64 and of one batch shape: θ = c/τ, E, f, u."""
    checks.paired(what, A, b, G, h)
    optional = {"A": A, "b": b, "G": G, "h": h, "ub": ub if isinstance(ub, Tensor) else None}
    tensors = {"c": c} | {name: tensor for name, tensor in optional.items() if tensor is not None}
    tensors = checks.without_autocast(tensors)
    c, ub = tensors["c"], tensors.get("ub", ub)
    dtype, device = checks.floating_tensors(**tensors)
    if device.type == "meta" and type(c) in (Tensor, torch.nn.Parameter):
        raise DeviceError(f"{what}: the arguments are on the meta device, which holds no numbers to solve with")
    if c.ndim < 1 or c.shape[-1] == 0:
        raise ShapeError(f"c must have shape (*B, n) with n at least 1, got {tuple(c.shape)}")
    n = c.shape[-1]
    tau = checks.temperature("c", c, 1, temperature)
    A, b, G, h = (rows.double() for rows in checks.constraint_rows(tensors, c, "c"))
    u = _bounds(c, ub)
    checked = checks.readable(*tensors.values(), u)
    if checked:
        checks.finite(**{name: tensor for name, tensor in tensors.items() if name != "ub"})
        _check_bounds(u)
    scores = (c, 1) if not isinstance(tau, Tensor) or tau.ndim == 0 else (tau.expand(*tau.shape[:-1], n), 1)
    batch = checks.batch_shape(c=(c, 1), temperature=scores, A=(A, 2), b=(b, 1), G=(G, 2), h=(h, 1), ub=(u, 1))
    theta = c.double() / tau
    both = torch.broadcast_shapes(A.shape[:-2], G.shape[:-2])
    E = torch.cat([A.expand(*both, *A.shape[-2:]), G.expand(*both, *G.shape[-2:])], dim=-2)
    both = torch.broadcast_shapes(b.shape[:-1], h.shape[:-1])
    f = torch.cat([b.expand(*both, b.shape[-1]), h.expand(*both, h.shape[-1])], dim=-1)
    expanded = (x.expand(*batch, *x.shape[x.ndim - k :]) for x, k in ((theta, 1), (E, 2), (f, 1), (u, 1)))
    theta, E, f, u = expanded
    return dtype, b.shape[-1], checked, theta, E, f, u


def _bounds(c: Tensor, ub: Tensor | float | None) -> Tensor:  # -> (*B, n)
    """The upper bounds as a tensor."""
    n = c.shape[-1]
    if ub is None:
        return torch.full((), torch.inf, dtype=torch.float64, device=c.device).expand(n)
    if not isinstance(ub, Tensor):
        return torch.full((), float(checks.number("ub", ub)), dtype=torch.float64, device=c.device).expand(n)
    if ub.ndim == 0:
        return ub.double().expand(n)
    if ub.shape[-1] not in (1, n):
        raise ShapeError(f"ub must have shape (*B, {n}) to fit c, got {tuple(ub.shape)}")
    return ub.double().expand(*ub.shape[:-1], n)


def _check_bounds(u: Tensor) -> None:
    """Refuse bounds that are NaN or −inf."""
    if not checks.host_bool((u.detach() > -torch.inf).all()):
        bad = ~(u.detach() > -torch.inf)
        raise ArgumentError(
            f"ub{checks.index_of(bad)} is {float(u.detach()[bad][0])}; an upper bound is a number, or inf for none"
        )


def _suspicion(x: Tensor, f: Tensor, theta: Tensor, u: Tensor, settings: Settings) -> str:  # (n,), (m,), (n,), (n,)
    """What the last iterate of a problem that failed tells of the reason."""
    dtype = settings.dtype
    largest = float(x.nan_to_num(torch.inf, torch.inf).amax())
    if largest > torch.finfo(dtype).max and settings.chosen is None:
        return (
            f"x overflows {dtype}: an entry is about exp(c/temperature - 1) = {largest:.1e} where nothing bounds it; "
            "raise the temperature, or bound x with rows or ub."
        )
    if largest > _LARGE * (1 + float(f.abs().sum())):
        return (
            f"x has reached {largest:.1e}, far beyond the right-hand sides: without its entropy the program is "
            "probably unbounded, and A x = b cannot be met to rounding at so large an x; "
            "raise the temperature or give ub."
        )
    scores = float(theta.abs().amax())
    if scores * torch.finfo(torch.float64).eps > 0.1 * settings.solver.tol:
        return (
            f"c/temperature has entries of {scores:.1e}, next to which float64 cannot resolve log x to tol; raise the "
            "temperature or tol."
        )
    if scores > _STEEP and bool(u.isfinite().any()) and not settings.entropic:
        return (
            f"c/temperature has entries of {scores:.1e}: beside hard upper bounds the iterations grow in proportion to "
            "that, and where max_iter is far below what they would be, they are not made; "
            "raise the temperature, or take slack='entropic', or leave "
            "the entropy out (smoothed_lp, solve_qp)."
        )
    return ""


class Settings(NamedTuple):
    """What a solve needs besides tensors."""

    solver: DualNewton
    entropic: bool
    n_eq: int
    on_failure: OnFailure
    checked: bool  # whether the values of the arguments are known to be finite
    dtype: torch.dtype  # of the caller
    chosen: Regularizer | None = None  # None: entropy
    what: str = "entropic_lp"


class _EntropicLP(torch.autograd.Function):
    """(θ, E, f, u), all of one batch shape, to (x, η, held, null, weak, info...)."""

    @staticmethod
    def forward(settings: Settings, theta: Tensor, E: Tensor, f: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        if not settings.checked:
            checks.finite(c=theta, A_or_G=E, b_or_h=f)
            _check_bounds(u)
        batch, n, m = theta.shape[:-1], theta.shape[-1], f.shape[-1]
        size = batch.numel()
        flat = theta.reshape(size, n), unexpand(E, 2, batch), f.reshape(size, m), u.reshape(size, n)
        solver = settings.solver
        dual, null = dual_start.solve(
            *flat, settings.n_eq, entropic=settings.entropic, solver=solver, maps=settings.chosen
        )
        representable = torch.isfinite(dual.x.to(settings.dtype)).all(-1)
        converged = (dual.status == int(Status.CONVERGED)) & representable
        dual = dual._replace(residual=torch.where(representable, dual.residual, torch.inf))
        lost = (dual.status == int(Status.CONVERGED)) & ~representable
        status = torch.where(lost, int(Status.NOT_CONVERGED), dual.status).to(torch.int8)
        info = SolveInfo(*(t.reshape(batch) for t in (status, converged, dual.iterations, dual.residual)))
        hint = ""
        if settings.on_failure != "ignore" and not checks.host_bool(converged.all()):
            first = ~converged
            hint = _suspicion(dual.x[first][0], flat[2][first][0], flat[0][first][0], flat[3][first][0], settings)
        report_failure(
            info, settings.on_failure, what=settings.what, tol=solver.tol, max_iter=solver.max_iter, hint=hint
        )
        return (
            dual.x.reshape(*batch, n).clone(),
            dual.eta.reshape(*batch, m).clone(),
            dual.active.reshape(*batch, m).clone(),
            expand(null, 2, batch),
            dual.weak.reshape(batch),
            *info,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        settings, _, E, _, u = inputs
        x, eta, held, null, weak, _, converged, _, _ = output
        ctx.settings = settings
        ctx.set_materialize_grads(False)  # whoever has no cotangent pays for no solve
        ctx.mark_non_differentiable(*output[2:])
        saved = (E, u, x, eta, held, null, weak, converged)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_eta: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_x is None and grad_eta is None:
            return (None,) * 5
        needs_matrix = ctx.needs_input_grad[2]
        settings = ctx.settings

        def work(*tensors: Any) -> list[Tensor | None]:
            *saved, grad_x, grad_eta = tensors
            at = _Linear.at(settings, *saved)
            grad_x = torch.zeros_like(at.x) if grad_x is None else at.good(grad_x)
            grad_eta = torch.zeros_like(at.eta) if grad_eta is None else at.good(grad_eta)
            w, left = at.eliminate(grad_x, -grad_eta)
            p = at.weight * left
            grad_E = -(outer(at.eta, p) + outer(w, at.x)) if needs_matrix else None
            return [p, grad_E, w, at.by_bound * left]

        return None, *modernised(work, (*ctx.saved_tensors, grad_x, grad_eta))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with transforms.forward_mode():
            at = _Linear.at(ctx.settings, *transforms.primals(ctx.saved_tensors))
            d_theta, d_E, d_f, d_u = tangents
            moved, excess = torch.zeros_like(at.x), torch.zeros_like(at.eta)
            moved = moved if d_theta is None else moved + d_theta
            if d_E is not None:
                moved, excess = moved - transposed_matvec(d_E, at.eta), excess + matvec(d_E, at.x)
            excess = excess if d_f is None else excess - d_f
            by_bound = torch.zeros_like(at.x) if d_u is None else at.by_bound * d_u
            d_eta, left = at.eliminate(at.good(moved), at.good(excess + matvec(at.E, by_bound)))
            return at.weight * left + at.good(by_bound), d_eta, *(None for _ in range(7))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], settings: Settings, *tensors: Tensor) -> tuple[Any, Any]:
        outputs = _EntropicLP.apply(settings, *transforms.map_to_front(info.batch_size, in_dims[1:], tensors))
        return outputs, (0,) * len(outputs)


@uncompiled
def differentiable(settings: Settings, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`_EntropicLP` as a function that the compiler leaves whole."""
    outputs: tuple[Tensor, ...] = _EntropicLP.apply(settings, *tensors)
    return outputs


class _Linear(NamedTuple):
    """The optimality conditions linearised at a solution; failed problems stand at zero, where nothing moves."""

    E: Tensor  # (*B, m, n)
    x: Tensor  # (*B, n)
    eta: Tensor  # (*B, m)
    weight: Tensor  # (*B, n): ∂x/∂t
    by_bound: Tensor  # (*B, n): ∂x/∂u
    slack: Tensor  # (*B, m): −∂(entropic slack)/∂η
    held: Tensor  # (*B, m)
    null: Tensor  # (*B, m, m)
    weak: Tensor  # (*B,)
    converged: Tensor  # (*B,)

    @staticmethod
    def at(
        settings: Settings,
        E: Tensor,
        u: Tensor,
        x: Tensor,
        eta: Tensor,
        held: Tensor,
        null: Tensor,
        weak: Tensor,
        converged: Tensor,
    ) -> _Linear:
        """From what the forward pass kept."""
        if settings.on_failure != "raise":
            x, eta = (torch.where(converged.unsqueeze(-1), t, 0.0) for t in (x, eta))
        bounded = torch.isfinite(u)
        slack = torch.zeros_like(eta)
        if settings.entropic:
            full = torch.where(bounded & (u > 0), u, 1.0)
            share = torch.where(bounded, x / full, 0.0)
            weight, by_bound = x * (1 - share), share
            inequality = torch.arange(eta.shape[-1], device=eta.device) >= settings.n_eq
            slack = torch.where(inequality, (-eta - 1).exp(), 0.0)
        else:
            capped = bounded & (x >= u) & converged.unsqueeze(-1)
            weight = x if settings.chosen is None else settings.chosen.weights(x)
            weight, by_bound = torch.where(capped, 0.0, weight), capped.to(x.dtype)
        return _Linear(E, x, eta, weight, by_bound, slack, held, null, weak & converged, converged)

    def good(self, t: Tensor) -> Tensor:
        """t, but zero for failed problems."""
        return torch.where(self.converged.unsqueeze(-1), t, 0.0)

    def eliminate(self, g: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:  # (*B, n), (*B, m)
        """Solve for w = M⁻¹(E W g + extra), and give g − Eᵀw free of cancellation.

        Near a vertex g − Eᵀw is many orders smaller than g. Whatever w₀ is taken out first, what is left to solve for
        is w − w₀, and is small too.
        """
        first = self._solve(matvec(self.E, self.weight * g) + extra)
        left = g - transposed_matvec(self.E, first)
        second = self._solve(matvec(self.E, self.weight * left) + extra - self.slack * first)
        return first + second, left - transposed_matvec(self.E, second)

    def _solve(self, right: Tensor) -> Tensor:
        """M⁻¹ right on the rows that are held."""
        solution: Tensor = SchurSolve.apply(self.E, self.weight, self.slack, self.held, self.null, self.weak, right)
        return solution
