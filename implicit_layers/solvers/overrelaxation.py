r"""Sinkhorn's iterations, over-relaxed: P = diag(u) K diag(v) with K = exp(L + ψ − the largest of each row).

    v ← v (b / (v ∘ Kᵀu))^ω,      u ← u (a / (u ∘ Kv))^ω        (near the answer: v ← v + ω (b/Kᵀu − v), and so for u)

Plain iterations (ω = 1) converge at the rate η, the second largest eigenvalue of D_b⁻¹PᵀD_a⁻¹P; with
ω = 2/(1 + √(1 − η)) the rate is ω − 1, so that their number becomes about its square root. A few plain iterations show
η, and from the rate λ of over-relaxed ones η = (λ + ω − 1)²/(λω²) tells more. An iteration is two products with K, into
which ψ is absorbed wherever v leaves the safe range, so nothing under- or overflows.

Source: Thibault, Chizat, Dossal & Papadakis (2017), arXiv:1711.01851, and Lehmann, von Renesse, Sambale & Uschmajew
(2020), arXiv:2012.12562, for ω; Young (1954), Trans. AMS 76, for the formulas; Schmitzer (2019), SIAM J. Sci. Comput.
41(3), for the absorption.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.kkt.quadratic import matvec, transposed_matvec

AIM = 1e-2  # of the tolerance: iterations go on to this while they converge, for the sake of the gradient
FIRST, ROUND = 5, 10  # iterations before the first look at the error, and at most between two
NEAR = 0.3  # relative error of every column from which steps are linear
WIDE = 115.0  # the largest |log v| before ψ is absorbed; twice this is not trusted
LOST = 600.0  # spread of L below which no entry of K is lost
SLOWEST = 1 - 1e-6  # the largest η that is believed
WORSE = 100.0  # how often as large as its least the error may become
LATE = 3.0  # how often as many iterations as were foreseen are waited for


class Scaled(NamedTuple):
    """Where the iterations ended."""

    psi: Tensor  # (N, m)
    iterations: Tensor  # (N,)
    error: Tensor  # (N,): Σ|P1 − a| + Σ|Pᵀ1 − b|; inf where nothing came of it
    P: Tensor | None  # (N, n, m): the plan, of the mass asked for, its rows exact, where K holds every entry; with
    phi: Tensor | None  # (N, n)


class _Pace(NamedTuple):
    """What is known of the convergence of each problem."""

    omega: Tensor | None  # (N,), None before anything is known
    since: Tensor  # (N,): looks since ω was changed
    error: Tensor  # (N,)
    least: Tensor  # (N,): the least error so far

    def after(self, count: int, error: Tensor, slope: Tensor) -> tuple[_Pace, Tensor]:
        """What `count` iterations tell, and the rate to be expected; `slope` is that of the last plain iteration."""
        least = torch.minimum(self.least, error)
        if self.omega is None:
            omega = _best(slope)
            return _Pace(omega, torch.zeros_like(error), error, least), omega - 1
        observed = (error / self.error) ** (1 / count)
        known = (self.since >= 1) & (observed < 1)  # the first look after a change sees what the change has stirred up
        more = known & (self.since >= 2) & (observed > self.omega - 0.98)
        higher = _best((observed + self.omega - 1).square() / (observed * self.omega.square()))
        omega = torch.where(more, torch.maximum(self.omega, higher), self.omega)
        rate = torch.where(known & ~more, torch.maximum(observed, omega - 1), omega - 1)
        return _Pace(omega, torch.where(more, 0.0, self.since + 1), error, least), rate


def scale(
    L: Tensor,  # (N, n, m)
    a: Tensor,  # (N, n)
    b: Tensor,  # (N, m)
    mass: Tensor,  # (N, 1)
    tol: float,
    max_iter: int,
    odd: bool,
    spread: float,
    patience: float,
) -> Scaled:
    """Iterate until all are done, or the slowest needs more iterations than there is patience.

    For one problem there is `overrelaxation_alone`, which does the same with less overhead.
    Σa = Σb = 1; P and φ are returned for the mass. `odd`: there may be rows or columns without mass, or L of −inf.
    `spread`: the largest L without the least. `patience` is for errors below 1e-2; farther from the answer there is
    four times as much.
    """
    if len(b) == 0:
        return Scaled(torch.zeros_like(b), b.sum(-1).long(), b.sum(-1), None, None)
    no_row, no_column = ((a <= 0).to(a.dtype), (b <= 0).to(b.dtype)) if odd else (0.0, 0.0)
    aim = AIM * tol
    top, K = kernel(L, odd)
    whole = not odd and spread < LOST
    base, v = torch.zeros_like(b), torch.ones_like(b)
    psi, kept, worst = base, v, math.inf
    u = a / (matvec(K, v) + no_row)
    s = transposed_matvec(K, u)
    unknown = torch.full_like(b[..., 0], torch.inf)
    pace = _Pace(None, unknown, unknown, unknown)
    iterations = torch.zeros_like(unknown, dtype=torch.int64)
    done = torch.zeros_like(unknown, dtype=torch.bool)
    used, count, limit, linear = 0, FIRST, math.inf, False
    while used < max_iter:
        count = min(count, max_iter - used)
        omega = None if pace.omega is None else pace.omega.unsqueeze(-1)
        old, t = v, u
        for _ in range(count):
            wanted = b / (s + no_column)
            if omega is None:
                old, v = v, wanted
                t = matvec(K, v) + no_row
                u = a / t
            else:
                v = _relaxed(v, wanted, omega, linear, no_column)
                t = matvec(K, v) + no_row
                u = _relaxed(u, a / t, omega, linear, no_row)
            s = transposed_matvec(K, u)
        used += count
        growth = (v + no_column).log()
        off = (v * s - b).abs()
        error, slope = off.sum(-1), unknown
        if omega is None:
            before = (growth - (old + no_column).log()).square()
            now = ((b + no_column) / (v * s + no_column)).log().square()
            slope = ((b * now).sum(-1) / (b * before).sum(-1)).sqrt()
        else:
            error = error + (u * t - a).abs().sum(-1)
        error = torch.where(error.isfinite(), error, torch.inf)
        iterations += count * ~done
        pick = (done | error.isinf()).unsqueeze(-1)
        kept, psi = torch.where(pick, kept, v), torch.where(pick, psi, base + growth)
        error = torch.where(done, pace.error, error)
        pace, rate = pace.after(count, error, slope)
        done = error <= aim
        missing = torch.where(done, 0.0, (aim / error).log() / rate.log())
        worse = torch.where(done, 0.0, error / pace.least)
        relative = off / (b + no_column)
        worst, longest, grown, width, far = checks.host_floats(
            error.amax(), missing.amax(), worse.amax(), growth.abs().amax(), relative.amax()
        )
        if not (math.isfinite(worst) and width < 2 * WIDE) or grown > WORSE:
            break
        if worst <= aim:
            break
        allowed = patience if worst < 1e-2 else 4 * patience
        if limit == math.inf:
            limit = used + LATE * longest + 2 * ROUND
        if longest > min(allowed, max_iter - used) or (used > limit and longest > ROUND):
            break
        linear = far < NEAR
        count = max(2, min(ROUND, math.ceil(longest)))
        if width > WIDE:
            base, whole = psi, False
            top, K = kernel(L + base.unsqueeze(-2), odd)
            v = kept = torch.ones_like(v)
            u = a / (matvec(K, v) + no_row)
            s = transposed_matvec(K, u)
    P = phi = None
    if whole and worst <= tol:
        u = a / matvec(K, kept)
        error = (kept * transposed_matvec(K, u) - b).abs().sum(-1)
        u = u * mass
        P, phi = K.mul_(u.unsqueeze(-1)).mul_(kept.unsqueeze(-2)), u.log() - top
    psi = torch.where(psi.isfinite() & (b > 0), psi, 0.0)
    return Scaled(psi, iterations, error, P, phi)


def kernel(logits: Tensor, odd: bool) -> tuple[Tensor, Tensor]:  # (*N, n, m) -> (*N, n), (*N, n, m)
    """The largest entry of each row, and the exponentials without it."""
    top = logits.amax(-1)
    if odd:
        top = torch.where(top.isfinite(), top, 0.0)
    return top, (logits - top.unsqueeze(-1)).exp_()


def _relaxed(x: Tensor, wanted: Tensor, omega: Tensor, linear: bool, absent: Tensor | float) -> Tensor:
    """From x to what is wanted, and beyond by ω − 1; `absent` is 1 where x and what is wanted are zero."""
    return torch.lerp(x, wanted, omega) if linear else x * ((wanted + absent) / (x + absent)) ** omega


def _best(eta: Tensor) -> Tensor:
    """The ω for a plain rate η."""
    return 2 / (1 + (1 - eta.nan_to_num(0.0).clamp(0.0, SLOWEST)).sqrt())
