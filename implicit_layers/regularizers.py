r"""One mechanism for every regularised argmax: a regulariser is four maps of one number, and the rest follows.

    y* = argmax_y ⟨x, y⟩ − τ Σᵢ φ(yᵢ)   subject to  Σᵢ yᵢ = k,  0 ≤ yᵢ ≤ cap

Stationarity, solved for y, with ν the multiplier of the sum:   yᵢ = primal(uᵢ),  uᵢ = (xᵢ − ν)/τ,  primal = (φ')⁻¹.
What is left is one equation for ν a problem, Σᵢ primal((xᵢ − ν)/τ) = k, solved by safeguarded Newton. Its derivatives
need nothing but the weights sᵢ = 1/φ''(yᵢ), zero where yᵢ is at a bound, whatever the regulariser:

    VJP   w = ⟨s, g⟩/⟨s, 1⟩,   p = s ∘ (g − w)/τ,   ∂x = p,   ∂k = w,   ∂τ = −⟨p, u⟩
    JVP   dy = s ∘ (e − ⟨s, e⟩/⟨s, 1⟩) + s/⟨s, 1⟩ dk,   e = (dx − u dτ)/τ
    loss  V(x) + τ Φ(t) − ⟨x, t⟩ with V the optimal value: gradient y* − t, no adjoint solve

Weights and slopes are functions of y alone, so the formulas are differentiable again, to any order. For constraints
A y = b the same reads M = A diag(s) Aᵀ/τ, w = M⁻¹ A diag(s) g/τ, p = diag(s)(g − Aᵀw)/τ: here A = 1ᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicit_layers import checks, scores, transforms
from implicit_layers.attached import attached, moving
from implicit_layers.eager import traced, uncompiled
from implicit_layers.errors import ArgumentError, ArgumentTypeError
from implicit_layers.legacy_vmap import modernised
from implicit_layers.scores import Empty
from implicit_layers.solvers import entmax_newton, operators, separable

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Regularizer:
    """A separable regulariser Φ(y) = Σᵢ φ(yᵢ), φ strictly convex on (0, cap).

    Attributes:
        name:   what it is called in `regularized_argmax` and `fenchel_young_loss`.
        primal: s ↦ (φ')⁻¹(s), increasing, with values in [0, cap]; 0 at s = −∞, and constant outside the range of φ'.
        weight: y ↦ 1/φ''(y), for y in (0, cap).
        value:  y ↦ φ(y), finite at 0 where the loss shall take targets with zeros.
        slope:  y ↦ φ'(y), for y in (0, cap).
        cap:    the largest value of an entry.
        solve:  (x, k, τ), (*B, n) and twice (*B, 1), to y, where there is a better way than Newton for ν; else None.
    """

    name: str
    primal: Elementwise
    weight: Elementwise
    value: Elementwise
    slope: Elementwise
    cap: float = float("inf")
    solve: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    key: str = field(init=False, repr=False, compare=False)  # by which a compiled graph finds it

    def __post_init__(self) -> None:
        """Make it known to the operation that a compiled graph holds."""
        object.__setattr__(self, "key", separable.key_of(self, self.name))

    def __copy__(self) -> Regularizer:
        """Itself: nothing in it can change."""
        return self

    def __deepcopy__(self, memo: object) -> Regularizer:
        """Itself: nothing in it can change."""
        return self

    def inside(self, y: Tensor) -> tuple[Tensor, Tensor]:  # (*B, n) -> (*B, n), (*B, n)
        """Which entries are between the bounds, and y with a harmless constant elsewhere."""
        open_ = (y > 0) & (y < self.cap)
        return open_, torch.where(open_, y, 0.5 * min(self.cap, 1.0))

    def weights(self, y: Tensor) -> Tensor:  # (*B, n) -> (*B, n)
        """The weights s = 1/φ''(y), zero where y is at a bound; safe to differentiate."""
        open_, safe = self.inside(y)
        return torch.where(open_, self.weight(safe), 0.0)

    def slopes(self, y: Tensor) -> Tensor:  # (*B, n) -> (*B, n)
        """The slopes u = φ'(y), zero where y is at a bound; safe to differentiate."""
        open_, safe = self.inside(y)
        return torch.where(open_, self.slope(safe), 0.0)


_REGISTERED: dict[str, Regularizer] = {}


def register_regularizer(
    name: str,
    *,
    primal: Elementwise,
    weight: Elementwise,
    value: Elementwise,
    slope: Elementwise,
    cap: float = float("inf"),
) -> Regularizer:
    r"""Add a regulariser Φ(y) = Σᵢ φ(yᵢ): forward, VJP, JVP and Fenchel–Young loss, at once.

    Problem:  y* = argmax_y ⟨x, y⟩ − τ Φ(y)  subject to  Σy = k, 0 ≤ y ≤ cap: see `regularized_argmax`.

    Args:
        name: a new name.
        primal, weight, value, slope: (φ')⁻¹(s), 1/φ''(y), φ(y) and φ'(y), each a pure, elementwise function of one
            tensor; see `Regularizer`. They are checked against each other by finite differences.
        cap: the largest value of an entry.

    Returns:  the regulariser, which can also be passed instead of its name.
    Gradient: the four maps themselves are not differentiated with respect to what they close over.
    Raises:   ValueError: the name is taken, the cap not positive, or the four maps contradict each other.
    Cost:     a few evaluations of each map.
    Source:   the implicit function theorem for the one constraint Σy = k; see the module.

    >>> squared = register_regularizer(
    ...     "doctest: twice the square",
    ...     primal=lambda s: s.clamp(min=0) / 4, weight=lambda y: torch.full_like(y, 0.25),
    ...     value=lambda y: 2 * y**2, slope=lambda y: 4 * y,
    ... )
    >>> regularized_argmax(torch.tensor([0.0, 1.0, 2.0]), squared)
    tensor([0.0833, 0.3333, 0.5833])
    """
    if not isinstance(name, str):
        raise ArgumentTypeError(f"name must be a string, got {name!r}")
    if name in _REGISTERED:
        raise ArgumentError(f"a regulariser named {name!r} is registered already; choose another name")
    if not checks.number("cap", cap) > 0:
        raise ArgumentError(f"cap must be positive, got {cap}")
    new = Regularizer(name, primal, weight, value, slope, float(cap))
    _check_maps(new)
    _REGISTERED[name] = new
    return new


def _check_maps(new: Regularizer) -> None:
    """The four maps are those of one function φ, at a few points inside the bounds."""
    y = min(new.cap, 1.0) * torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    step = 1e-5 * min(new.cap, 1.0)
    pairs = {
        "primal(slope(y)) = y": (new.primal(new.slope(y)), y),
        "the derivative of value is slope": ((new.value(y + step) - new.value(y - step)) / (2 * step), new.slope(y)),
        "the derivative of slope is 1/weight": (
            (new.slope(y + step) - new.slope(y - step)) / (2 * step),
            1 / new.weight(y),
        ),
    }
    for claim, (found, expected) in pairs.items():
        error = (found - expected).abs() / (1 + expected.abs())
        if not bool((error < 1e-6).all()):
            at = int(error.nan_to_num(nan=float("inf")).argmax())
            raise ArgumentError(
                f"regulariser {new.name!r}: {claim} does not hold at y = {float(y[at]):.2g} "
                f"({float(found[at]):.6g} against {float(expected[at]):.6g}). The maps are primal = (φ')⁻¹, "
                "weight = 1/φ'', value = φ and slope = φ' of one strictly convex φ"
            )


def regularizer(regulariser: str | Regularizer) -> Regularizer:
    """The regulariser of this name, or itself."""
    if isinstance(regulariser, Regularizer):
        return regulariser
    if not isinstance(regulariser, str):
        raise ArgumentTypeError(f"regulariser must be a name or a Regularizer, got {regulariser!r}")
    if regulariser not in _REGISTERED:
        raise ArgumentError(f"regulariser must be one of {sorted(_REGISTERED)}, got {regulariser!r}")
    return _REGISTERED[regulariser]


def tangent(s: Tensor, v: Tensor, *, steep: bool = False) -> Tensor:  # (*B, n), (*B, n) -> (*B, n)
    """The map v ↦ s ∘ (v − ⟨s, v⟩/⟨s, 1⟩), the symmetric map that both derivatives need; zero for weights all zero.

    It does not see a constant added to v. In float64, and where the weights are `steep`, the v of the largest weight is
    taken off first, so that the result is right to rounding relative to its own size, also where one entry has nearly
    all the weight.
    """
    if steep or v.dtype == torch.float64:
        v = v - v.gather(-1, s.detach().argmax(-1, keepdim=True))
    total = s.sum(-1, keepdim=True)
    mean = (s * v).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
    return s * (v - mean)


def regularized_argmax(
    x: Tensor,  # (*, n, *)
    regulariser: str | Regularizer,
    dim: int = -1,
    *,
    temperature: Tensor | float = 1.0,  # broadcasts with x, of size 1 along dim
    total: Tensor | float = 1.0,  # the same
    mask: Tensor | None = None,  # broadcasts with x
    empty: Empty = "raise",
) -> Tensor:  # (*, n, *)
    r"""Choose a point of the (capped) simplex by a linear program with any registered regulariser.

    Problem:  y* = argmax_y ⟨x, y⟩ − τ Σᵢ φ(yᵢ)  subject to  Σy = k, 0 ≤ y ≤ cap.
    Solution: yᵢ = (φ')⁻¹((xᵢ − ν)/τ), with ν such that the sum is k.

    Args:
        x: scores, n of them along `dim`; −inf masks an entry. float16 and bfloat16 are computed in float32.
        regulariser: "entropy", "euclidean", "binary_entropy" or "box" (the last two with 0 ≤ y ≤ 1), the name of your
            own, or what `register_regularizer` returned.
        dim: the axis of the n scores.
        temperature: τ > 0, a number or a tensor of size 1 along `dim`, differentiated.
        total: k, between 0 and cap times the number of entries that are not masked; as `temperature`. An integer
            tensor will do, and has no gradient.
        mask: boolean, True where an entry may be chosen; the others are as if their score were −inf.
        empty: what a problem without entries gets: an error, equal entries k/n, or zeros.

    Returns:  y*, with the dtype and device of `x`, and the broadcast shape.
    Gradient: ∂y/∂x = (diag(s) − s sᵀ/⟨s, 1⟩)/τ with s = 1/φ''(y), zero where y is at a bound; ∂y/∂k = s/⟨s, 1⟩;
        ∂y/∂τ by the chain rule. Any order. At a kink one of the generalised Jacobians.
    Raises:   as `softmax`; ValueError: an unknown name, or a total out of its range.
    Cost:     O(n) an iteration, about ten iterations; O(n log n) where there is a cap.
    Source:   the implicit function theorem; see the module `implicit_layers.regularizers`.

    >>> regularized_argmax(torch.tensor([0.0, 1.0, 3.0]), "box", total=1.5)
    tensor([0.0000, 0.5000, 1.0000])
    """
    return choose(x, regularizer(regulariser), dim, temperature, total, mask, empty, name="total")


def choose(
    x: Tensor,
    chosen: Regularizer,
    dim: int,
    temperature: Tensor | float,
    total: Tensor | float,
    mask: Tensor | None,
    empty: Empty,
    *,
    name: str,
) -> Tensor:  # (*, n, *) -> (*, n, *)
    """Do the work of `regularized_argmax`, for callers who call the total by another name."""
    scores.check_empty(empty)
    axis = scores.axis_of(x, dim)
    tau = scores.temperature_of(x, axis, temperature)
    k = scores.per_problem(name, scores.floating_count(total, x), x, axis)
    x = scores.masked(x, mask)
    rows, _, settings = scores.rows(x, axis, empty, tau, k)
    ones = torch.ones_like(rows[..., :1])
    tau, k = (ones * s if isinstance(s, Tensor) else torch.full_like(ones, s) for s in settings)
    rows = check_total(rows, k, chosen.cap, name)
    return scores.restored(_differentiable(chosen, rows, k, tau), x, axis, empty, k)


def check_total(x: Tensor, total: Tensor, cap: float, name: str) -> Tensor:  # (*B, n), (*B, 1) -> (*B, n)
    """Refuse totals that no point has; where the host may not look, make the scores NaN there."""
    room = cap * x.detach().isfinite().sum(-1, keepdim=True)
    ok = (total >= 0) & (total <= room) & (total < float("inf"))
    if cap == float("inf"):
        ok = ok & (total > 0)
    if not checks.readable(x, total):
        return checks.poisoned(x, ok)
    if not checks.host_bool(ok.all()):
        bad = ~ok
        most = f"{float(room[bad][0]):g}" if cap < float("inf") else "infinity, and not 0"
        raise ArgumentError(
            f"{name}{checks.index_of(bad.squeeze(-1))} is {float(total.detach()[bad][0]):g}, which no point has: it "
            f"must be between 0 and {most} (entries of at most {cap:g}, as many as are not masked)"
        )
    return x


class _Choice(torch.autograd.Function):
    """(regularizer, x, total, tau) to y; x (*B, n), the others (*B, 1)."""

    @staticmethod
    def forward(chosen: Regularizer, x: Tensor, total: Tensor, tau: Tensor) -> Tensor:
        return separable.solve(chosen, x, total, tau)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        chosen, x, _, tau = inputs
        ctx.regularizer = chosen
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, tau, output)
        ctx.save_for_forward(x, tau, output)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return None, None, None, None
        chosen = ctx.regularizer
        _, needs_x, needs_total, needs_tau = ctx.needs_input_grad

        def work(x: Tensor, tau: Tensor, y: Tensor, g: Tensor) -> list[Tensor | None]:
            s = chosen.weights(y)
            p = tangent(s, g, steep=chosen.solve is not None) / tau
            grad_tau = -(p * chosen.slopes(y)).sum(-1, keepdim=True) if needs_tau else None
            grad_total = (share(chosen, s, x, y) * g).sum(-1, keepdim=True) if needs_total else None
            return [p if needs_x else None, grad_total, grad_tau]

        return None, *modernised(work, (*ctx.saved_tensors, grad_y))

    @staticmethod
    def jvp(ctx: Any, _: None, d_x: Tensor | None, d_total: Tensor | None, d_tau: Tensor | None) -> Any:
        with transforms.forward_mode():
            chosen = ctx.regularizer

            def work(
                d_x: Tensor | None, d_total: Tensor | None, d_tau: Tensor | None, x: Tensor, tau: Tensor, y: Tensor
            ) -> list[Tensor]:
                s = chosen.weights(y)
                moved = torch.zeros_like(y)
                if d_x is not None:
                    moved = moved + torch.where(s > 0, d_x, 0.0)
                if d_tau is not None:
                    moved = moved - chosen.slopes(y) * d_tau
                d_y = tangent(s, moved, steep=chosen.solve is not None) / tau
                return [d_y if d_total is None else d_y + share(chosen, s, x, y) * d_total]

            d_y: Any = modernised(work, (d_x, d_total, d_tau, *transforms.primals(ctx.saved_tensors)))[0]
            return d_y

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], chosen: Regularizer, *tensors: Tensor) -> tuple[Tensor, int]:
        return _Choice.apply(chosen, *transforms.map_to_front(info.batch_size, in_dims[1:], tensors)), 0


def _differentiable(chosen: Regularizer, x: Tensor, total: Tensor, tau: Tensor) -> Tensor:
    """The answer to rows, differentiably."""
    if not traced():
        return _by_rule(chosen, x, total, tau)
    y = operators.choose(chosen.key, x.detach(), total.detach(), tau.detach())
    y = y + share(chosen, chosen.weights(y), x.detach(), y) * moving(total)
    return attached(y, chosen.weights, chosen.slopes, x, tau)


@uncompiled
def _by_rule(chosen: Regularizer, x: Tensor, total: Tensor, tau: Tensor) -> Tensor:
    """`_Choice` as a function that the compiler leaves whole."""
    y: Tensor = _Choice.apply(chosen, x, total, tau)
    return y


def share(chosen: Regularizer, s: Tensor, x: Tensor, y: Tensor) -> Tensor:  # (*B, n)... -> (*B, n)
    """∂y/∂k = s/⟨s, 1⟩; where no entry is free, half to the last at the cap and half to the first at 0."""
    total = s.sum(-1, keepdim=True)
    shares = s / torch.where(total > 0, total, 1.0)
    if chosen.cap == float("inf"):
        return shares
    full = y > 0.5 * chosen.cap
    last = torch.where(full, x, float("inf"))
    first = torch.where(full, float("-inf"), x)
    edges = [
        (last == last.amin(-1, keepdim=True)) & full,
        (first == first.amax(-1, keepdim=True)) & x.isfinite() & ~full,
    ]
    halves = [edge / edge.sum(-1, keepdim=True).clamp(min=1) for edge in edges]
    both = sum(half.sum(-1, keepdim=True) for half in halves)
    return torch.where(total > 0, shares, (halves[0] + halves[1]).to(y.dtype) / torch.as_tensor(both).clamp(min=1))


# --- the built-in ones ----------------------------------------------------------------------------------------------


def _logit(y: Tensor) -> Tensor:
    """The logit, log y − log(1 − y)."""
    return y.log() - (-y).log1p()


ENTROPY = register_regularizer(
    "entropy",
    primal=lambda s: (s - 1).exp(),
    weight=lambda y: y,
    value=lambda y: torch.special.xlogy(y, y),
    slope=lambda y: y.log() + 1,
)
EUCLIDEAN = register_regularizer(
    "euclidean",
    primal=lambda s: s.clamp(min=0),
    weight=torch.ones_like,
    value=lambda y: 0.5 * y.square(),
    slope=lambda y: y,
)
BINARY_ENTROPY = register_regularizer(
    "binary_entropy",
    primal=torch.sigmoid,
    weight=lambda y: y * (1 - y),
    value=lambda y: torch.special.xlogy(y, y) + torch.special.xlogy(1 - y, 1 - y),
    slope=_logit,
    cap=1.0,
)
BOX = register_regularizer(
    "box",
    primal=lambda s: s.clamp(0, 1),
    weight=torch.ones_like,
    value=lambda y: 0.5 * y.square(),
    slope=lambda y: y,
    cap=1.0,
)


def tsallis(alpha: float) -> Regularizer:
    r"""φ(y) = (y^α − y)/(α(α − 1)), α > 1: between entropy (α → 1) and ½ y² (α = 2); see `entmax`.

    Args:     alpha: a number; for a tensor, and its gradient, use `entmax`.
    Returns:  the regulariser, not registered.
    Gradient: see `regularized_argmax`.
    Raises:   ValueError: α out of its range.
    Cost:     nothing.
    Source:   Tsallis (1988); Peters, Niculae & Martins (2019), arXiv:1905.05702.

    >>> regularized_argmax(torch.tensor([0.0, 1.0, 2.0]), tsallis(1.5))
    tensor([0.0000, 0.1693, 0.8307])
    """
    checks.positive("alpha", alpha)
    if alpha <= 1:
        raise ArgumentError(f'alpha must be above 1, got {alpha}; "entropy" is the limit at 1')
    d = float(alpha) - 1

    def solve(x: Tensor, total: Tensor, tau: Tensor) -> Tensor:
        """Scaled to a sum of one, where y/k is entmax at the temperature τ kᵈ."""
        rows = x.reshape(-1, x.shape[-1])
        hot = (tau * total**d).reshape(-1, 1)
        y = entmax_newton.solve(rows, rows.amax(-1, keepdim=True), hot, d + 1).y
        return y.reshape(x.shape) * total

    def weight(y: Tensor) -> Tensor:
        """1/φ'', bounded by the square of the precision where an entry just above zero has an unbounded slope."""
        most = -2 * math.log(torch.finfo(y.dtype).eps)
        return ((1 - d) * y.log()).clamp(max=most).exp()

    made = Regularizer(
        f"tsallis({float(alpha):g})",
        primal=lambda s: (1 / (1 + d) + d * s).clamp(min=0).pow(1 / d),
        weight=weight,
        value=lambda y: (y.pow(1 + d) - y) / (d * (1 + d)),
        slope=lambda y: (y.pow(d) - 1 / (1 + d)) / d,
        solve=solve,
    )
    _check_maps(made)
    return made
