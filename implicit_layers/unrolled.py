r"""Differentiating through the iterations: what a user would try first, and what the implicit gradient is held against.

`unroll` runs any step a fixed number of times, with momentum if wanted, and lets autograd remember all of it, the end
of it, its milestones, or nothing but where it ended, from where it is run backwards bit by bit.
`unrolled_softmax` and `unrolled_qp` are two solvers written with it: the same problems as `il.softmax` and
`il.solve_qp`, differentiated by automatic differentiation alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from implicit_layers import checks
from implicit_layers.door import enter
from implicit_layers.eager import uncompiled
from implicit_layers.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeviceError,
    DtypeError,
    NotPositiveDefiniteError,
    ShapeError,
)
from implicit_layers.reversible import heavy_ball_from, reversible

UnrollMode = Literal["full", "truncated", "checkpointed", "reversible"]
MODES = get_args(UnrollMode)
Step = Callable[..., Tensor]


def unroll(
    step: Step,
    z0: Tensor,
    *theta: Any,
    steps: int,
    mode: UnrollMode = "full",
    last: int | None = None,
    momentum: float = 0.0,
) -> Tensor:
    r"""Iterate z ← step(z, θ) a fixed number of times, differentiated by automatic differentiation.

    Problem:  z_K with v_{k+1} = μ v_k + (f(z_k, θ) − z_k), z_{k+1} = z_k + v_{k+1}, v_0 = 0, k = 0 … K−1.
              Without momentum (μ = 0) that is z_{k+1} = f(z_k, θ). With a gradient step f(z) = z − α ∇g(z) it is
              heavy-ball gradient descent, v ← μ v − α ∇g(z).

    Args:
        step: f, called as `step(z, *theta)`; returns a tensor of the shape and dtype of z. It may work in place on z.
        z0: the initial point z_0.
        theta: the tensors that f depends on.
        steps: K ≥ 0.
        mode: "full" remembers every step. "truncated" differentiates the last `last` steps only, so that z0 gets a
            gradient only where last = K. "checkpointed" remembers the ends of ⌈√K⌉ segments and runs each segment
            again in the backward pass. "reversible" remembers where it ended and runs the iteration backwards,
            exactly: z and v are kept in integers, and the bits that μ v loses in a buffer. Its step must be the same
            function in every call, and may depend on no tensor that requires grad but theta, or the parameters of
            an nn.Module that is the step or one of theta.
        last: the number of differentiated steps, for "truncated" only; 1 unless given (one-step differentiation).
        momentum: μ in [0, 1). "reversible" lives on it: with μ = 0 a step forgets the velocity, which is put aside
            whole.

    Returns:
        z_K, with the shape, dtype and device of z0.

    Gradient:
        "full" and "checkpointed": the exact derivative of z_K, which is not yet that of the solution; the two are
        equal bit by bit where f is deterministic. "reversible": the same to rounding, of about 2⁻⁵² of the largest
        value that an entry of z or v has on the way; forward mode and second derivatives of it go through the
        iteration as "full" does, with its memory. "truncated": its last terms, biased by O(ρ^last) where f contracts
        by ρ. Where K is large enough all of them reach the implicit gradient. Reverse mode only for "checkpointed".

    Raises:
        ValueError: an unknown mode, a negative number of steps, a momentum outside [0, 1), or a `last` outside
            0 … steps or for another mode.
        TypeError: steps or last is no int.
        ShapeError, DtypeError, DeviceError: the step changes the shape, dtype or device of z, or it or z0 is no tensor.
        CapturedTensorError: "reversible": the step depends on a tensor that requires grad and is not an argument.
        NonFiniteError: "reversible": the iterates do not stay finite.
        UnsupportedError: "reversible", in the backward pass: it did not come back to z0, since f is random, say.

    Cost:
        K steps forward; memory of the graph K, `last`, or about 2√K steps ("checkpointed" runs f once more).
        "reversible": f once more; five tensors like z and about 2 K log₂(1/μ) bits an entry (64 K with μ = 0); a host
        synchronisation once in 15 steps at most where μ ≥ ½.

    Source:
        Griewank & Walther (2008), ch. 12, checkpoints; Bolte, Pauwels & Vaiter (2023), one-step differentiation,
        arXiv:2305.13768; Maclaurin, Duvenaud & Adams (2015), reversible momentum, arXiv:1502.03492.

    >>> a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    >>> root = unroll(lambda z, a: (z + a / z) / 2, torch.ones_like(a), a, steps=6)
    >>> root
    tensor(1.4142, dtype=torch.float64, grad_fn=<DivBackward0>)
    >>> torch.autograd.grad(root, a)[0]  # 1 / (2 √2)
    tensor(0.3536, dtype=torch.float64)
    >>> z0 = torch.zeros_like(a)
    >>> there = unroll(lambda z, a: z - 0.1 * (z - a), z0, a, steps=100, mode="reversible", momentum=0.8)
    >>> there.detach(), torch.autograd.grad(there, a)[0]
    (tensor(2.0000, dtype=torch.float64), tensor(1.0000, dtype=torch.float64))
    """
    _check(steps, mode, last, momentum)
    if not callable(step):
        raise ArgumentTypeError(f"unroll: step must be callable, got {type(step).__name__}")
    if not isinstance(z0, Tensor):
        raise DtypeError(f"unroll: z0 must be a torch.Tensor, got {type(z0).__name__}")
    if mode == "reversible":
        return _reversible(step, z0, theta, steps, momentum)
    call = partial(_like_z, step)
    if mode == "checkpointed":
        return _checkpointed(call, z0, theta, steps, momentum)
    v: Tensor | None = None
    if mode == "truncated":
        differentiated = min(1, steps) if last is None else last
        if differentiated < steps:
            with torch.no_grad():
                z0, v = heavy_ball_from(call, steps - differentiated, momentum, z0.detach(), None, *theta)
            z0, v = z0.detach(), None if v is None else v.detach()
        steps = differentiated
    return heavy_ball_from(call, steps, momentum, z0, v, *theta)[0]


def _check(steps: int, mode: str, last: int | None, momentum: float) -> None:
    """Refuse settings that mean nothing."""
    if mode not in MODES:
        raise ArgumentError(f"mode must be one of {MODES}, got {mode!r}")
    if checks.integer("steps", steps) < 0:
        raise ArgumentError(f"steps must be 0 or more, got {steps}")
    if last is not None and mode != "truncated":
        raise ArgumentError(f"last is for mode='truncated' only, got last={last} with mode={mode!r}; leave it out")
    if last is not None and not 0 <= checks.integer("last", last) <= steps:
        raise ArgumentError(f"last must be between 0 and steps = {steps}, got {last}")
    if not 0 <= checks.number("momentum", momentum) < 1:
        raise ArgumentError(f"momentum must be in [0, 1), got {momentum}; with 1 or more the velocity never dies out")


def _like_z(step: Step, z: Tensor, *theta: Any) -> Tensor:
    """The step, which must keep the shape, the dtype (but for autocast) and the device."""
    following = step(z, *theta)
    if not isinstance(following, Tensor):
        raise DtypeError(
            f"unroll: step(z, *theta) must return a torch.Tensor, got {type(following).__name__}"
            + ("; does it miss a return?" if following is None else "")
        )
    if following.shape != z.shape:
        raise ShapeError(
            f"step must keep the shape of z, {tuple(z.shape)}, but returned {tuple(following.shape)}; "
            "broadcast z0 to the shape of the batch first"
        )
    if following.dtype != z.dtype and _in_autocast(z, following):
        return following.to(z.dtype)
    if following.dtype != z.dtype:
        raise DtypeError(
            f"unroll: step must keep the dtype of z, {z.dtype}, but returned {following.dtype}; "
            "give z0 and theta one dtype"
        )
    if following.device != z.device:
        raise DeviceError(f"unroll: step must keep the device of z, {z.device}, but returned {following.device}")
    return following


def _in_autocast(z: Tensor, following: Tensor) -> bool:
    """Whether an autocast region may have made a real z another real dtype."""
    device = z.device.type
    real = z.is_floating_point() and following.is_floating_point()
    return real and device != "meta" and torch.is_autocast_enabled(device)


def _checkpointed(call: Step, z: Tensor, theta: tuple[Any, ...], steps: int, momentum: float) -> Tensor:
    """The loop in ⌈√K⌉ segments of nearly equal length, of which only the starting points are remembered."""
    segments = math.ceil(math.sqrt(steps))
    v: Tensor | None = None
    for k in range(segments):
        length = (k + 1) * steps // segments - k * steps // segments
        z, v = checkpoint(partial(heavy_ball_from, call, length, momentum), z, v, *theta, use_reentrant=False)
    return z


@uncompiled
def _reversible(step: Step, z0: Tensor, theta: tuple[Any, ...], steps: int, momentum: float) -> Tensor:
    """The loop in integers; half precision is computed in float32. The step gets copies, so it may work in place."""
    entrance = enter("fixed_point", step, z0.clone(), theta, what="unroll")

    def call(z: Tensor, *leaves: Tensor) -> Tensor:
        following: Tensor = entrance.structure.call(z.clone(), *leaves)
        return following

    z = reversible(call, steps, momentum, z0.to(entrance.z0.dtype), *entrance.leaves)
    return z.to(entrance.dtype)


def mirror_step(log_y: Tensor, scores: Tensor, rate: float) -> Tensor:  # (*, n), (*, n) -> (*, n)
    """One entropic mirror ascent step on <scores, y> + H(y), kept in log y: the error shrinks by 1 − rate."""
    return torch.log_softmax((1.0 - rate) * log_y + rate * scores, dim=-1)


def unrolled_softmax(
    x: Tensor,  # (*, n, *)
    dim: int = -1,
    *,
    temperature: float | Tensor = 1.0,
    steps: int = 60,
    rate: float = 0.5,
    mode: UnrollMode = "full",
    last: int | None = None,
    momentum: float = 0.0,
) -> Tensor:  # (*, n, *)
    r"""The softmax linear program by unrolled mirror ascent (exponentiated gradient).

    Problem:  y* = argmax_y ⟨x, y⟩ + τ H(y)  subject to  y ≥ 0, Σy = 1.

    Step:     y ← y^{1−γ} exp(γ x/τ), normalised: mirror ascent with step γ/τ, started at the uniform y. It converges
              linearly, ‖log y_k − log y*‖ ≤ (1−γ)^k ‖log y_0 − log y*‖ up to a constant vector, so 60 steps with
              γ = ½ reach float64 rounding. (γ = 1 is the closed form in one step; it would show nothing.)

    Args:
        x: scores.
        dim: the axis of the simplex.
        temperature: τ > 0.
        steps, mode, last, momentum: as in `unroll`.
        rate: γ in (0, 1].

    Returns:
        y after `steps` steps, shaped like x.

    Gradient:
        The derivative of the iterations; it converges to the implicit one at the same linear rate.

    Raises:
        ValueError: a rate outside (0, 1], or what `unroll` refuses.

    Cost:
        O(steps · n) time and memory of the graph ("full").

    Source:
        Beck & Teboulle (2003), mirror descent on the simplex.

    >>> unrolled_softmax(torch.tensor([0.0, 1.0]))
    tensor([0.2689, 0.7311])
    """
    if not 0.0 < rate <= 1.0:
        raise ArgumentError(f"rate must be in (0, 1], got {rate}; it is the share of the way taken in one step")
    scores = x.movedim(dim, -1) / temperature if x.ndim else x / temperature
    step = partial(mirror_step, rate=rate)
    start = torch.zeros_like(scores)
    log_y = unroll(step, start, scores, steps=steps, mode=mode, last=last, momentum=momentum)
    return log_y.exp().movedim(-1, dim) if x.ndim else log_y.exp()


def admm_step(v: Tensor, T: Tensor, g0: Tensor, h: Tensor) -> Tensor:  # (*B, m), (*B, m, m), (*B, m), (*B, m)
    """One ADMM step in v = G z + u: s = min(v, h), u = v − s; then G z = g0 + T (s − u − g0) and v ← G z + u."""
    s = torch.minimum(v, h)
    return g0 + _matvec(T, 2.0 * s - v - g0) + v - s


def unrolled_qp(
    Q: Tensor,  # (*B, n, n)
    p: Tensor,  # (*B, n)
    *,
    A: Tensor | None = None,  # (*B, n_eq, n)
    b: Tensor | None = None,  # (*B, n_eq)
    G: Tensor | None = None,  # (*B, n_ineq, n)
    h: Tensor | None = None,  # (*B, n_ineq)
    steps: int = 100,
    mode: UnrollMode = "full",
    last: int | None = None,
    momentum: float = 0.0,
) -> Tensor:  # (*B, n)
    r"""A strictly convex quadratic program by unrolled ADMM: `steps` iterations, factors made once inside autograd.

    Problem:  z* = argmin_z ½ zᵀQz + pᵀz  subject to  Az = b, Gz ≤ h.

    Step:     scaled ADMM on s = Gz, s ≤ h, with z and the equalities eliminated. With z_0 the solution without the
              inequalities, g_0 = G z_0, P the projected inverse of Q on Az = 0, R = G P Gᵀ and
              T = I − (I + ρR)⁻¹:  s = min(v, h),  v ← g_0 + T(2s − v − g_0) + v − s.
              At the end λ = ρ (v − s) and z = z_0 − P Gᵀ λ. ρ = 1/√(λ_min λ_max) of R, a constant for autograd.

    Args:
        Q, p: the cost; Q positive definite, only its symmetric part counts.
        A, b: equality constraints, rows independent.
        G, h: inequality constraints.
        steps, mode, last, momentum: as in `unroll`.

    Returns:
        z after `steps` steps: Az = b and stationarity hold to rounding, Gz ≤ h in the limit.

    Gradient:
        The derivative of the iterations for every argument; it converges linearly where strict complementarity holds.

    Raises:
        NotPositiveDefiniteError: Q has no Cholesky factor, or the rows of A are dependent.
        DtypeError, DeviceError: the arguments are not floating-point tensors of one dtype on one device.
        ValueError: A without b, G without h, or what `unroll` refuses.

    Cost:
        O(n³ + m n² + m³) once and O(m²) a step; the graph grows by about 4 m numbers a step and problem ("full").

    Source:
        Boyd et al. (2011), §5.2; Ghadimi et al. (2015), arXiv:1306.2454, for ρ.

    >>> Q, p = torch.eye(2), torch.tensor([-1.0, -2.0])
    >>> unrolled_qp(Q, p, G=torch.ones(1, 2), h=torch.tensor([1.0]))
    tensor([0., 1.])
    """
    _check(steps, mode, last, momentum)
    if (A is None) != (b is None) or (G is None) != (h is None):
        raise ArgumentError("A and b come together, and so do G and h; one of a pair is missing")
    given = {"Q": Q, "p": p, "A": A, "b": b, "G": G, "h": h}
    checks.floating_tensors(**{name: tensor for name, tensor in given.items() if tensor is not None})
    Q_factor = _cholesky("Q", 0.5 * (Q + Q.mT))
    z0 = -_solve_vector(Q_factor, p)
    if A is not None and b is not None:
        QiAt = torch.cholesky_solve(A.mT, Q_factor)
        S_factor = _cholesky("A Q⁻¹ Aᵀ", A @ QiAt)
        z0 = z0 + _matvec(QiAt, _solve_vector(S_factor, b - _matvec(A, z0)))
    if G is None or h is None or G.shape[-2] == 0:
        return z0
    PGt = torch.cholesky_solve(G.mT, Q_factor)
    size = (G.mT * PGt).sum(-2).amax(-1, keepdim=True)  # of G Q⁻¹ Gᵀ, of which the equalities may leave nothing
    if A is not None and b is not None:
        PGt = PGt - QiAt @ torch.cholesky_solve(A @ PGt, S_factor)
    R = G @ PGt
    rho = _penalty(R, size)
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    factor = _cholesky("I + ρR", eye + rho.unsqueeze(-1) * (0.5 * (R + R.mT)))
    T = eye - torch.cholesky_solve(eye.expand_as(factor), factor)
    g0 = _matvec(G, z0)
    g0, h = torch.broadcast_tensors(g0, h)
    v0 = torch.zeros_like(g0).expand(torch.broadcast_shapes(g0.shape, T.shape[:-1]))
    v = unroll(admm_step, v0, T, g0, h, steps=steps, mode=mode, last=last, momentum=momentum)
    return z0 - _matvec(PGt, rho * (v - torch.minimum(v, h)))


def _penalty(R: Tensor, size: Tensor) -> Tensor:  # (*B, m, m), (*B, 1) -> (*B, 1)
    """ρ = 1/√(λ_min λ_max) over the eigenvalues of R that are not zero beside `size`; 1/size if all are."""
    eigenvalues = torch.linalg.eigvalsh(R.detach())
    size = size.detach().clamp_min(torch.finfo(R.dtype).tiny)
    zero = eigenvalues <= size * (1e3 * torch.finfo(R.dtype).eps)
    largest = torch.where(zero.all(-1, keepdim=True), size, eigenvalues.amax(-1, keepdim=True))
    smallest = torch.where(zero, largest, eigenvalues).amin(-1, keepdim=True)
    return 1.0 / (smallest * largest).sqrt()


def _cholesky(name: str, M: Tensor) -> Tensor:  # (*B, n, n) -> (*B, n, n)
    """The Cholesky factor, or an error that names the matrix; a pivot lost to rounding counts as zero."""
    factor, status = torch.linalg.cholesky_ex(M)
    pivots, diagonal = factor.detach().diagonal(dim1=-2, dim2=-1).square(), M.detach().diagonal(dim1=-2, dim2=-1)
    failed = (status != 0) | (pivots <= 4 * torch.finfo(M.dtype).eps * diagonal).any(-1)
    if checks.host_bool(failed.any()):
        raise NotPositiveDefiniteError(
            f"{name}{checks.index_of(failed)} is not positive definite, so the program is not strictly convex or "
            "its equalities are dependent; add a small multiple of the identity to Q or drop dependent rows of A"
        )
    return factor


def _matvec(M: Tensor, v: Tensor) -> Tensor:  # (*B, m, n), (*B, n) -> (*B, m)
    """M v for any batch shapes; one matrix for the whole batch is one product, not one a problem."""
    return v @ M.mT if M.ndim == 2 else (M @ v.unsqueeze(-1)).squeeze(-1)


def _solve_vector(factor: Tensor, v: Tensor) -> Tensor:  # (*B, n, n), (*B, n) -> (*B, n)
    """M⁻¹ v from the Cholesky factor of M; one factor for the whole batch solves all of it at once."""
    if factor.ndim == 2:
        return torch.cholesky_solve(v.reshape(-1, v.shape[-1]).mT, factor).mT.reshape(v.shape)
    batch = torch.broadcast_shapes(factor.shape[:-2], v.shape[:-1])
    right = v.unsqueeze(-1).expand(*batch, v.shape[-1], 1)
    return torch.cholesky_solve(right, factor.expand(*batch, *factor.shape[-2:])).squeeze(-1)
