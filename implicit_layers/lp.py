r"""Linear programs as layers. THE GRADIENT OF A LINEAR PROGRAM IS ZERO: three practical ways around that.

The solution of max ⟨c, y⟩ over a polytope is a vertex. It stays the same while c moves a little, and jumps where two
vertices tie. So ∂y/∂c is zero almost everywhere and does not exist elsewhere: a network in front of a plain linear
program learns nothing, however exact the derivative. What can be done:

    smoothed_lp        another layer: with −τ/2 ‖y‖² the solution moves continuously, and its gradient is exact
    perturbed_argmax   another layer: the mean solution under noise, for any solver, integer ones too; noisy gradient
    spo_plus_loss      another loss: convex in the predicted costs, above the regret of deciding by them

The entropy in place of the square gives `softmax` and its family; `projections` and `soft_rank`, `soft_sort` are the
smoothed programs of polytopes with a faster solution than a general quadratic program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentError, ArgumentTypeError, DtypeError, NonFiniteError, ShapeError
from implicit_layers.opaque import opaque
from implicit_layers.projections.door import enforce, finite, positive, rows
from implicit_layers.qp import solve_qp
from implicit_layers.solution import OnFailure, Solution, SolveInfo
from implicit_layers.solvers.interior_point import InteriorPoint

Noise = Literal["normal", "gumbel"]
Reduction = Literal["mean", "sum", "none"]
_NOISES = get_args(Noise)
_REDUCTIONS = get_args(Reduction)


def smoothed_lp(
    c: Tensor,  # (*B, n)
    *,
    A: Tensor | None = None,  # (*B, n_eq, n)
    b: Tensor | None = None,  # (*B, n_eq)
    G: Tensor | None = None,  # (*B, n_ineq, n)
    h: Tensor | None = None,  # (*B, n_ineq)
    lb: Tensor | float | None = None,  # (*B, n)
    ub: Tensor | float | None = None,  # (*B, n)
    temperature: Tensor | float = 1.0,
    solver: InteriorPoint | None = None,
    on_failure: OnFailure = "raise",
) -> Solution:
    r"""Solve a linear program made strictly concave by a small square; the plain program has zero gradient.

    Problem:  y* = argmax_y ⟨c, y⟩ − τ/2 ‖y‖²  subject to  A y = b,  G y ≤ h,  lb ≤ y ≤ ub:
              the projection of c/τ onto the polytope.

    Args:
        c: (*B, n) scores to MAXIMISE; for costs pass −c.
        A, b: (*B, n_eq, n) and (*B, n_eq), together or not at all.
        G, h: (*B, n_ineq, n) and (*B, n_ineq), together or not at all.
        lb, ub: (*B, n) bounds, each may be left out; infinite where there is none; a number bounds all entries.
        temperature: τ > 0: a number, or a tensor that broadcasts with `c` and has size 1 in the last axis. The value
            lost against the plain program is at most τ/2 (‖y_LP‖² − ‖y*‖²). For a bounded polytope a small enough τ
            gives a solution of the plain program exactly, and its zero gradient with it: keep τ in the size of the
            differences of c that should matter.
        solver, on_failure: see `solve_qp`.

    Returns:  Solution(value, info), value (*B, n) in the dtype of `c`.
    Gradient: exact for the smoothed program, to c, A, b, G, h, lb, ub and τ; see `solve_qp`. Any order.
    Raises:   as `solve_qp`; ArgumentError: τ is not positive and finite.
    Cost:     one quadratic program with Q = I, shared by the batch.
    Source:   Wilder, Dilkina & Tambe (2019), Melding the data-decisions pipeline, arXiv:1809.05504.

    >>> A, b, lb = torch.ones(1, 3), torch.ones(1), torch.zeros(3)
    >>> smoothed_lp(torch.tensor([1.0, 0.9, 0.0]), A=A, b=b, lb=lb, temperature=0.5).value
    tensor([0.6000, 0.4000, 0.0000])
    """
    points = rows(c, -1)
    if c.ndim == 0:
        raise ShapeError("c must have shape (*B, n), got a 0-d tensor")
    tau = points.parameter("temperature", temperature)
    enforce(positive("temperature", tau))
    lb, ub = (_bound(name, x, points.x) for name, x in (("lb", lb), ("ub", ub)))
    Q = torch.eye(c.shape[-1], dtype=points.x.dtype, device=c.device)
    if c.dtype in checks.HALF:
        A, b, G, h, lb, ub = (
            t.float() if isinstance(t, Tensor) and t.dtype in checks.HALF else t for t in (A, b, G, h, lb, ub)
        )
    solution = solve_qp(Q, -points.x / tau, A=A, b=b, G=G, h=h, lb=lb, ub=ub, solver=solver, on_failure=on_failure)
    return Solution(solution.z.to(c.dtype), SolveInfo(*solution.info[:4]))


def _bound(name: str, value: Tensor | float | None, x: Tensor) -> Tensor | None:
    """A bound as a tensor; a number bounds all entries."""
    if value is None or isinstance(value, Tensor):
        return value
    return torch.full(x.shape[-1:], checks.number(name, value), dtype=x.dtype, device=x.device)


def perturbed_argmax(
    x: Tensor,  # (*B, n), or (*B, ...) with event_ndim
    solver: Callable[[Tensor], Tensor],
    *,
    sigma: Tensor | float = 1.0,
    samples: int = 100,
    noise: Noise = "normal",
    generator: torch.Generator | None = None,
    event_ndim: int = 1,
) -> Tensor:
    r"""Average the answers of a solver under noise on its input: differentiable although the solver is not.

    Problem:  y(x) = E[ solver(x + σ Z) ],  Z of independent normal or Gumbel entries; here the mean of `samples` draws.
              solver(x) = argmax_y ⟨x, y⟩ over any set: a linear, integer or combinatorial program. A one-hot argmax
              with Gumbel noise gives softmax(x/σ).

    Args:
        x: scores, (*B, n).
        solver: scores of shape (samples, *B, n) to solutions of that shape. It is never differentiated and may leave
            PyTorch; it must treat every leading dimension as a batch. (Under `vmap` there is one more of them.)
        sigma: σ > 0, in the unit of the scores: a number, or a tensor that broadcasts with `x` and has size 1 in the
            axes of one problem.
        samples: draws, each one call for the whole batch. The error of value and gradient falls with their square root.
        noise: "normal" or "gumbel".
        generator: where the noise comes from, on the device of `x`; the same seed gives the same answer and gradient.
            Default: PyTorch's own.
        event_ndim: the number of axes of one problem: 2 for matrices of scores.

    Returns:  the mean solution, with the shape, dtype and device of `x` (broadcast with `sigma`).
    Gradient: an unbiased estimate of the exact ∂y/∂x and ∂y/∂σ by likelihood ratios: no derivative of the solver. The
              mean of the other draws is subtracted from each first, which takes away variance and adds no bias. Higher
              orders are unbiased too, and noisier. Each estimate has its own error: it is not the derivative of the
              returned sample mean, so finite differences agree with it only up to that error.
    Raises:   ArgumentError, ArgumentTypeError: a setting is out of its range.
              NonFiniteError: x, or an answer, is not finite.
              ShapeError, DtypeError: the solver's answer does not have the shape of its input, or no number.
    Cost:     one call of the solver; O(samples · n) memory.
    Source:   Berthet et al. (2020), Learning with differentiable perturbed optimizers, arXiv:2002.08676.

    >>> def best(scores):
    ...     return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])
    >>> x, generator = torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0)
    >>> y = perturbed_argmax(x, best, samples=100_000, noise="gumbel", generator=generator)
    >>> bool((y - x.softmax(-1)).abs().max() < 0.01)
    True
    """
    check_sampling(solver, samples, noise, generator, event_ndim)
    work, spread = _scores(x, sigma, event_ndim)

    def answers(scores: Tensor, spread: Tensor) -> tuple[Tensor, ...]:
        z = _draw(noise, (samples, *scores.shape), scores, generator)
        perturbed = scores + spread * z
        return perturbed, _answer(solver, perturbed)

    perturbed, y = opaque(answers, work, spread, out_dim=1)
    mean = y.mean(0)
    log_density = _log_density(noise, (perturbed - work) / spread) - spread.log()
    log_density = log_density.sum(tuple(range(-event_ndim, 0)), keepdim=True)
    weight = (log_density - log_density.detach()).exp()  # one, with the derivatives of the likelihood ratio
    apart = (y - mean) * (samples / (samples - 1)) if samples > 1 else y  # less the mean of the other draws
    return (mean + (apart * (weight - 1)).mean(0)).to(x.dtype)


def check_sampling(solver: object, samples: object, noise: object, generator: object, event_ndim: object) -> None:
    """Refuse settings of `perturbed_argmax` that cannot work."""
    if not callable(solver):
        raise ArgumentTypeError(f"perturbed_argmax: solver must be callable, got {type(solver).__name__}")
    if noise not in _NOISES:
        raise ArgumentError(f"noise must be one of {_NOISES}, got {noise!r}")
    checks.whole("samples", samples, least=1)
    checks.whole("event_ndim", event_ndim, least=1)
    if not isinstance(generator, (torch.Generator, type(None))):
        raise ArgumentTypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


def check_loss(solver: object, reduction: object, event_ndim: object) -> None:
    """Refuse settings of `spo_plus_loss` that cannot work."""
    if not callable(solver):
        raise ArgumentTypeError(f"spo_plus_loss: solver must be callable, got {type(solver).__name__}")
    if reduction not in _REDUCTIONS:
        raise ArgumentError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")
    checks.whole("event_ndim", event_ndim, least=1)


def _scores(x: Tensor, sigma: Tensor | float, event_ndim: int) -> tuple[Tensor, Tensor]:
    """Scores and spread in the dtype of the computation, of one shape."""
    checks.floating_tensors(x=x)
    if x.ndim < event_ndim:
        raise ShapeError(f"x must have at least event_ndim={event_ndim} dimensions, got shape {tuple(x.shape)}")
    work = x.float() if x.dtype in checks.HALF else x
    if isinstance(sigma, Tensor):
        spread = sigma.float() if sigma.dtype in checks.HALF and x.dtype in checks.HALF else sigma
        checks.floating_tensors(x=work, sigma=spread)
        if any(size != 1 for size in spread.shape[max(spread.ndim - event_ndim, 0) :]):
            raise ShapeError(
                f"sigma must have size 1 in the last {event_ndim} axes, those of one problem, got {tuple(spread.shape)}"
            )
    else:
        checks.positive("sigma", sigma)
        spread = torch.full((), sigma, dtype=work.dtype, device=work.device)
    enforce(finite("x", work), positive("sigma", spread))
    try:
        work, spread = torch.broadcast_tensors(work, spread)
    except RuntimeError:
        raise ShapeError(
            f"sigma of shape {tuple(spread.shape)} does not broadcast with x of shape {tuple(x.shape)}"
        ) from None
    return work, spread


def _draw(noise: Noise, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal or Gumbel noise."""
    z = torch.empty(shape, dtype=like.dtype, device=like.device)
    return z.normal_(generator=generator) if noise == "normal" else -z.exponential_(generator=generator).log()


def _log_density(noise: Noise, z: Tensor) -> Tensor:
    """Of standard noise, entry by entry, up to a constant."""
    return -0.5 * z.square() if noise == "normal" else -z - (-z).exp()


def _answer(solver: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    """The solver's answer, checked, in the dtype and on the device of the scores."""
    y = solver(scores)
    if not isinstance(y, Tensor):
        raise DtypeError(f"the solver must return a torch.Tensor, got {type(y).__name__}")
    if y.shape != scores.shape:
        raise ShapeError(f"the solver must keep the shape {tuple(scores.shape)} of its input, got {tuple(y.shape)}")
    bad = ~torch.isfinite(y)
    if checks.host_bool(bad.any()):
        raise NonFiniteError(
            f"the solver's answer{checks.index_of(bad)} is {float(y[bad][0])}: {int(bad.sum())} of {bad.numel()} "
            "entries are not finite; a mean or a gradient of it would be none"
        )
    return y.detach().to(scores)


def spo_plus_loss(
    predicted: Tensor,  # (*B, n), or (*B, ...) with event_ndim
    true: Tensor,
    solver: Callable[[Tensor], Tensor],
    *,
    solution: Tensor | None = None,
    reduction: Reduction = "none",
    event_ndim: int = 1,
) -> Tensor:  # (*B), or () if reduced
    r"""Score predicted costs by the decisions they lead to: smart "predict, then optimise" plus.

    The regret ⟨c, w(ĉ)⟩ − ⟨c, w(c)⟩ of deciding by predicted costs ĉ, with w(c) = argmin_w ⟨c, w⟩ over the feasible
    set, is piecewise constant in ĉ: its gradient is zero. This loss is convex in ĉ, never below the regret, and zero
    for ĉ = c:

        ℓ(ĉ, c) = max_w ⟨c − 2ĉ, w⟩ + 2⟨ĉ, w(c)⟩ − ⟨c, w(c)⟩.

    Args:
        predicted: ĉ, costs to MINIMISE, (*B, n).
        true: c, of the same dtype; both broadcast.
        solver: costs of shape (*B, n) to solutions of that shape, by minimising. It is never differentiated and may
            leave PyTorch; it must treat every leading dimension as a batch.
        solution: w(c), if it is known; it saves one of two calls of the solver.
        reduction: "none", or "mean" or "sum" over the problems.
        event_ndim: the number of axes of one problem: 2 for matrices of costs.

    Returns:  the loss, in the dtype of `predicted`.
    Gradient: to `predicted` the subgradient 2(w(c) − w(2ĉ − c)), to `true` w(2ĉ − c) − w(c). The loss is piecewise
              linear, so second derivatives are zero.
    Raises:   ArgumentError, ArgumentTypeError: a setting is out of its range.
              NonFiniteError: costs or answers are not finite.
              ShapeError, DtypeError: arguments or the solver's answer do not fit each other.
    Cost:     two calls of the solver, one if `solution` is given; O(n) memory.
    Source:   Elmachtoub & Grigas (2022), Smart "predict, then optimize", arXiv:1710.08005.

    >>> def cheapest(costs):
    ...     return torch.nn.functional.one_hot(costs.argmin(-1), costs.shape[-1])
    >>> predicted = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> loss = spo_plus_loss(predicted, torch.tensor([2.0, 1.0]), cheapest)
    >>> loss.backward()
    >>> loss.item(), predicted.grad
    (3.0, tensor([-2.,  2.]))
    """
    check_loss(solver, reduction, event_ndim)
    given = {"predicted": predicted, "true": true} | ({} if solution is None else {"solution": solution})
    checks.floating_tensors(**given)
    checks.batch_shape(**{name: (tensor, event_ndim) for name, tensor in given.items()})
    try:
        tensors = torch.broadcast_tensors(*given.values())
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
        raise ShapeError(f"spo_plus_loss: the shapes do not broadcast: {shapes}") from None
    enforce(*(finite(name, tensor) for name, tensor in given.items()))
    cost, actual, *known = (t.float() if t.dtype in checks.HALF else t for t in tensors)

    def decide(cost: Tensor, actual: Tensor, *known: Tensor) -> tuple[Tensor, ...]:
        cautious = _answer(solver, 2 * cost - actual)
        return cautious, known[0].clone() if known else _answer(solver, actual)

    cautious, best = opaque(decide, cost, actual, *known)
    loss = 2 * cost * (best - cautious) + actual * (cautious - best)
    loss = loss.sum(tuple(range(-event_ndim, 0)))
    loss = loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
    return loss.to(predicted.dtype)
