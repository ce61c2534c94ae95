r"""The active inequalities of strictly convex programs, from nothing: a set is corrected by its signs until it stays.

In the dual form s = R λ + w, holding a set of rows gives λ with s = 0 on them and λ = 0 elsewhere. Its signs give the
next set: the held rows with a positive dual, and the others with a negative slack. A set that stays is that of the
solution. A round is one Cholesky factorisation and a few products, a quarter of an interior-point iteration. From
programs with no more rows than unknowns it takes a handful of rounds. Where it goes round in circles, one row at a time
is changed, and what does not end soon is left to the interior point.

With x = −λ and R = I + P both signs are those of v = w − P x: on held rows, where s = 0, that is x, elsewhere s.

Source: Hintermüller, Ito & Kunisch (2003), SIAM J. Optim. 13(3); Júdice & Pires (1994), Comput. Oper. Res. 21(5), for
the single changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.kkt import quadratic

_ROUNDS = 12
_PATIENCE = 2  # rounds in which no fewer rows were wrong than before, after which only the last of them is changed
_STUCK = 6  # such rounds after which a program is given up
_STEP = 0.5  # of the projected gradient that gives the first set, for rows of unit length
_SIGN = 1e-12  # of the largest violation: what is smaller counts as zero, and its row is not held
_HARD = 6  # rounds after which the search ends where most programs of a batch are still at work: their family is hard
_FEW = 0.6  # share of programs at work, below which the others are taken out


class Found(NamedTuple):
    """What a search ended with."""

    held: Tensor  # (k, m): 1 on inequalities that hold, else 0
    rounds: Tensor  # (k,) int64; of those whose set stays
    ended: Tensor | None  # positions of the programs whose set stays; None: all of them
    made: tuple[Tensor, Tensor] | None  # R factored on all of `held`, see `quadratic.masked_cholesky`; None: not kept


class _Work(NamedTuple):
    """The programs that the search is still at."""

    P: Tensor  # (k or 1, m, m)
    w: Tensor  # (k, m)
    held: Tensor  # (k, m)
    rounds: Tensor  # (k,): this one included
    least: Tensor  # (k,): the smallest number of wrong rows so far
    stale: Tensor  # (k,): for how many rounds it has been that

    def take(self, index: Tensor) -> _Work:
        """Keep some of them."""
        P, *others = self
        return _Work(P if P.shape[0] == 1 else P[index], *(other[index] for other in others))


def search(R: Tensor, w: Tensor, most: int) -> Found:
    """Find the held rows of s = R λ + w, (k or 1, m, m) and (k, m), in at most so many rounds.

    Rows of R have unit diagonal or less, and the largest violation −w of a program is 1.
    """
    P = R.clone()
    P.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    x = (_STEP * w).clamp_(max=0.0)
    x = torch.lerp(x, _signs(P, w, x), _STEP).clamp_(max=0.0)
    held = _signs(P, w, x).lt_(0.0)
    most = min(most, _ROUNDS)
    return _search_one(P, w, held, most) if w.shape[0] == 1 else _search_many(P, w, held, most)


def _search_one(P: Tensor, w: Tensor, held: Tensor, most: int) -> Found:
    """Search for a single program, whose rows the host looks at."""
    narrow = quadratic.crowded(held)
    before = checks.host_list(held)
    least, stale, count, made = len(before[0]) + 1, 0, 0, None
    while stale < _STUCK and count < most:
        after, made = _round(P, w, held, int(sum(before[0])) if narrow else None)
        count += 1
        now = checks.host_list(after)
        if now == before:
            return Found(held, torch.full((1,), count, device=w.device), None, made)
        wrong = [i for i, (a, b) in enumerate(zip(now[0], before[0], strict=True)) if a != b]
        least, stale = (len(wrong), 0) if len(wrong) < least else (least, stale + 1)
        if stale < _PATIENCE:
            held, before = after, now
        else:
            held[0, wrong[-1]] = before[0][wrong[-1]] = now[0][wrong[-1]]
    rounds = torch.full((1,), count, device=w.device)
    return Found(held, rounds, rounds[:0], None)


def _search_many(P: Tensor, w: Tensor, held: Tensor, most: int) -> Found:
    """Search for a batch, in which those at work go on alone once the others are many."""
    none = torch.zeros(w.shape[0], dtype=torch.int64, device=w.device)
    work = _Work(P, w, held, none + 1, none + (w.shape[-1] + 1), none)
    all_held, all_rounds, all_ended = held, none, none > 0
    every: Tensor | None = None  # the positions of those at work; None: all of them
    order = torch.arange(w.shape[-1], device=w.device)
    width = checks.host_int(held.sum(-1).amax()) if quadratic.crowded(held) else None
    for k in range(1, most + 1):
        P, w, held, rounds, least, stale = work
        after, made = _round(P, w, held, width)
        rows = after != held
        wrong = rows.sum(-1)
        rounds = rounds + (wrong > 0)
        stale = torch.where(wrong < least, 0, stale + 1)
        going = torch.gt(wrong > 0, stale >= _STUCK)
        if k > _PATIENCE:
            last = torch.where(rows, order, -1).amax(-1, keepdim=True)
            after = torch.where((stale >= _PATIENCE).unsqueeze(-1) & (order != last), held, after)
        if width is None:
            at_work = checks.host_int(going.sum())
        else:
            at_work, width = checks.host_ints(going.sum(), after.sum(-1).amax().to(torch.int64))
        hard = k == _HARD and 2 * at_work > all_held.shape[0]
        over, few = hard or at_work == 0 or k == most, at_work <= _FEW * wrong.shape[0]
        if over or few:
            if every is None:
                all_held, all_rounds, all_ended = held, rounds, wrong == 0
            else:
                all_held[every], all_rounds[every], all_ended[every] = held, rounds, wrong == 0
        if over:
            break
        work = _Work(P, w, after, rounds, torch.minimum(least, wrong), stale)
        if few:
            pick = going.nonzero().squeeze(-1)
            every = pick if every is None else every[pick]
            work = work.take(pick)
            width = width if quadratic.crowded(work.held) else None
    ended = all_ended.nonzero().squeeze(-1)
    whole = ended.shape[0] == all_ended.shape[0]
    return Found(all_held, all_rounds, None if whole else ended, made if whole and every is None else None)


def _round(P: Tensor, w: Tensor, held: Tensor, width: int | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Hold a set of rows; give the set that its signs ask for, and the factor, where it is one of all rows.

    `width`: the most rows that any program holds; None: factor matrices of all rows.
    """
    if width is None:
        matrix = P * held.unsqueeze(-2)
        matrix.mul_(held.unsqueeze(-1)).diagonal(dim1=-2, dim2=-1).add_(1.0)
        made = torch.linalg.cholesky_ex(matrix)
        x = torch.cholesky_solve((held * w).unsqueeze(-1), made[0]).squeeze(-1)
        return _signs(P, w, x).lt_(-_SIGN), made
    rows = held.topk(max(width, 1), dim=-1, sorted=False).indices
    there = held.gather(-1, rows)
    matrix = quadratic.block(P, rows).mul_(there.unsqueeze(-2))
    matrix.mul_(there.unsqueeze(-1)).diagonal(dim1=-2, dim2=-1).add_(1.0)
    chol, _ = torch.linalg.cholesky_ex(matrix)
    x = torch.zeros_like(w).scatter_(-1, rows, quadratic.cholesky_solve(chol, there * w.gather(-1, rows)))
    return _signs(P, w, x).lt_(-_SIGN), None


def _signs(P: Tensor, w: Tensor, x: Tensor) -> Tensor:  # (k or 1, m, m), (k, m) x 2 -> (k, m)
    """Form w − P x."""
    if P.shape[0] == 1:  # one matrix for all vectors
        return torch.addmm(w, x, P.squeeze(0), alpha=-1.0)
    return torch.baddbmm(w.unsqueeze(-2), x.unsqueeze(-2), P, alpha=-1.0).squeeze(-2)
