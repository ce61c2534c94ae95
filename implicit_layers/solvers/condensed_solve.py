"""The condensed form as a whole: follow the central path, end on a verified active set, for what is left once more."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.kkt import condensed
from implicit_layers.kkt.condensed import Factor
from implicit_layers.kkt.program import ActiveSet, Program
from implicit_layers.solvers import condensed_end, condensed_path
from implicit_layers.solvers.condensed_end import End, Guess
from implicit_layers.solvers.condensed_path import State


class Settings(NamedTuple):
    """How long and how exactly to solve."""

    tol: float  # largest relative KKT residual of an answer
    max_iter: int
    check_every: int  # iterations between two questions of the host; 0: none
    thorough: bool = True  # whether to tell constraints that hold loosely from duplicates of others


class _Phase(NamedTuple):
    """How far to follow the central path before trying the active set, and how."""

    measure: float  # relative complementarity to reach
    tol: float  # relative residual to accept, where that of the settings is larger
    sign_tol: float
    refine: int
    balanced: bool
    near: bool  # whether to start from the path's own point, which dependent rows need
    rounds: int


_PHASES = (
    _Phase(1e-3, 1e-13, 1e-13, 4, balanced=False, near=False, rounds=3),
    _Phase(1e-6, 1e-13, 1e-13, 4, balanced=False, near=False, rounds=3),
    _Phase(1e-9, 1e-12, 1e-12, 6, balanced=True, near=True, rounds=4),
    _Phase(1e-12, 1e-11, 1e-11, 10, balanced=False, near=True, rounds=4),
    _Phase(1e-14, 1e-10, 1e-10, 20, balanced=True, near=True, rounds=4),
)
_PHASES_NATIVE = (
    _Phase(1e-2, 2e-6, 2e-6, 3, balanced=False, near=False, rounds=3),
    _Phase(1e-4, 2e-6, 2e-6, 4, balanced=False, near=True, rounds=3),
    _Phase(1e-6, 1e-5, 5e-6, 6, balanced=True, near=True, rounds=4),
)
_BLIND = (  # where the host asks nothing: all of it, whatever comes out
    _Phase(1e-12, 1e-11, 1e-11, 6, balanced=False, near=True, rounds=3),
    _Phase(1e-12, 1e-10, 1e-10, 8, balanced=True, near=True, rounds=3),
)
_BLIND_NATIVE = (
    _Phase(1e-6, 2e-6, 2e-6, 4, balanced=False, near=True, rounds=3),
    _Phase(1e-6, 1e-5, 5e-6, 6, balanced=True, near=True, rounds=3),
)


_LAST = _Phase(0.0, 1e-12, 1e-12, 4, balanced=True, near=True, rounds=6)  # with a sharp factor
_LAST_NATIVE = _Phase(0.0, 2e-6, 2e-6, 4, balanced=True, near=True, rounds=6)


class Outcome(NamedTuple):
    """Where the programs ended, scaled units; leading dimension N."""

    z: Tensor  # (N, n)
    y: Tensor  # (N, m)
    bound: Tensor  # (N, n)
    active: Tensor  # (N, m)
    fixed: Tensor  # (N, n)
    weak: Tensor  # (N,) bool
    residual: Tensor  # (N,)
    absolute: Tensor  # (N,)
    exact: Tensor  # (N,) bool: verified on an active set
    iterations: Tensor  # (N,) int64

    @staticmethod
    def blank(program: Program, batch: int) -> Outcome:
        """Begin with nothing."""
        n, m, like = program.Q.shape[-1], program.E.shape[-2], program.p
        flag = torch.zeros(batch, dtype=torch.bool, device=like.device)
        return Outcome(
            like.new_zeros(batch, n),
            like.new_zeros(batch, m),
            like.new_zeros(batch, n),
            like.new_zeros(batch, m),
            like.new_zeros(batch, n),
            flag,
            like.new_full((batch,), torch.inf),
            like.new_full((batch,), torch.inf),
            flag,
            torch.zeros(batch, dtype=torch.int64, device=like.device),
        )

    def put(self, index: Tensor | None, end: End, iterations: Tensor | None) -> Outcome:
        """Write down what is better than what is there: verified ends first, then smaller residuals."""
        old = self if index is None else self.take(index)
        better = (end.accepted & old.exact.logical_not()) | (old.exact.logical_not() & (end.at.residual < old.residual))
        count = old.iterations if iterations is None else torch.where(old.exact, old.iterations, iterations)
        new = old._exchanged(end, better)._replace(iterations=count)
        return new if index is None else self.replace(index, new)

    def _exchanged(self, end: End, where: Tensor) -> Outcome:
        """Take an end instead of what is there."""
        at, guess = end.at, end.guess
        new = (at.z, at.y, at.bound, guess.active, guess.fixed, end.weak, at.residual, at.absolute, end.accepted)
        pairs = zip((*new, self.iterations), self, strict=True)
        return Outcome(*(torch.where(where if a.ndim == 1 else where.unsqueeze(-1), a, b) for a, b in pairs))

    @property
    def guess(self) -> Guess:
        """The active set, and the point on it."""
        return Guess(self.active, self.fixed, self.z, self.y)

    def differs(self, other: Outcome) -> Tensor:  # -> (N,) bool
        """Tell where the active sets are not the same."""
        return (self.active != other.active).any(-1) | ((self.fixed != 0) != (other.fixed != 0)).any(-1)

    def exchange(self, index: Tensor | None, end: End, where: Tensor) -> Outcome:
        """Write down other ends, whatever was there."""
        if index is None:
            return self._exchanged(end, where)
        return self.replace(index, self.take(index)._exchanged(end, where))

    def take(self, index: Tensor) -> Outcome:
        """Keep some programs."""
        return Outcome(*(field[index] for field in self))

    def replace(self, index: Tensor, part: Outcome) -> Outcome:
        """Write back what `take` took."""
        return Outcome(*(field.index_copy(0, index, new) for field, new in zip(self, part, strict=True)))


def solve(program: Program, batch: int, settings: Settings, begin: ActiveSet | None = None) -> Outcome:
    """Solve a batch of scaled programs as well as possible; says how good each answer is, and no more.

    `begin`: an active set to try first.
    """
    phases = _PHASES if program.p.dtype == torch.float64 else _PHASES_NATIVE
    outcome = Outcome.blank(program, batch)
    if batch == 0:
        return outcome
    if program.E.shape[-2] == program.n_eq and not program.bounded:
        return _without_cone(program, batch, outcome, phases)
    state = condensed_path.start(program, batch)
    if settings.check_every == 0:
        blind = _BLIND if program.p.dtype == torch.float64 else _BLIND_NATIVE
        return _without_questions(program, state, outcome, settings, blind)
    index = torch.arange(batch, device=program.p.device)
    if begin is not None:
        active = torch.where(program.rows, begin.active, 0.0)
        pinned = torch.where(program.pinned & (begin.fixed == 0), 1.0, begin.fixed)
        fixed = torch.where(program.pinned | ((pinned > 0) & program.has_ub), pinned, 0.0)
        fixed = torch.where((pinned < 0) & program.has_lb, pinned, fixed)
        tried = Guess(active, fixed, torch.zeros_like(state.z), torch.zeros_like(active))
        outcome, left = _settle(program, index, state, tried, phases[0], settings, outcome)
        index, program, state = index[left], program.take(left), state.take(left)
    steps = 0
    for phase in phases:
        if not index.numel():
            return outcome
        state, steps = _advance(program, state, phase.measure, settings, steps)
        tried = condensed_end.guess(program, state, balanced=phase.balanced, near=phase.near)
        outcome, left = _settle(program, index, state, tried, phase, settings, outcome)
        if not left.numel():
            return outcome
        if left.numel() < index.numel():
            index, program, state = index[left], program.take(left), state.take(left)
    return outcome.put(index, as_it_is(program, state), state.iterations) if index.numel() else outcome


def _settle(
    program: Program, index: Tensor, state: State, tried: Guess, phase: _Phase, settings: Settings, outcome: Outcome
) -> tuple[Outcome, Tensor]:
    """End what can be ended, correcting the guess a few times; also the positions that are left."""
    rows = torch.arange(index.shape[0], device=index.device)
    settled = torch.zeros_like(state.stuck)
    for _ in range(phase.rounds):
        end = _end(program, tried, phase, settings)
        outcome = outcome.put(index[rows], end, state.iterations[rows])
        settled[rows] = end.accepted
        again = (end.accepted.logical_not()).nonzero().squeeze(-1)
        if not again.numel():
            break
        rows, program, tried = rows[again], program.take(again), end.corrected.take(again)
    return outcome, (settled.logical_not()).nonzero().squeeze(-1)


def _end(program: Program, tried: Guess, phase: _Phase, settings: Settings, factor: Factor | None = None) -> End:
    """Solve on a guess with the settings of a phase."""
    tol = min(settings.tol, phase.tol)
    end = condensed_end.solve_on(program, tried, tol=tol, sign_tol=phase.sign_tol, refine=phase.refine, factor=factor)
    if phase.near or not settings.thorough:
        return end
    return end._replace(accepted=end.accepted & end.weak.logical_not())  # which may be duplicates


def _without_cone(program: Program, batch: int, outcome: Outcome, phases: tuple[_Phase, ...]) -> Outcome:
    """Solve programs with equalities only: nothing to guess."""
    active = program.p.new_ones(batch, program.E.shape[-2])
    zero = program.p.new_zeros(batch, program.Q.shape[-1])
    tried = Guess(active, zero, zero, torch.zeros_like(active))
    last = phases[-1]
    end = condensed_end.solve_on(program, tried, tol=last.tol, sign_tol=last.sign_tol, refine=last.refine)
    return outcome.put(None, end, None)


def _without_questions(
    program: Program, state: State, outcome: Outcome, settings: Settings, phases: tuple[_Phase, ...]
) -> Outcome:
    """Take all iterations and all rounds, whatever comes out."""
    target = phases[-1].measure
    for _ in range(settings.max_iter):
        reached = condensed_path.progress(program, state)
        running = _running(reached, target, state)
        state = condensed_path.step(program, state, running, reached)
    for phase in phases:
        tried = condensed_end.guess(program, state, balanced=phase.balanced, near=phase.near)
        for _ in range(phase.rounds):
            end = _end(program, tried, phase, settings)
            outcome = outcome.put(None, end, state.iterations)
            tried = end.corrected
    return outcome.put(None, as_it_is(program, state), state.iterations)


def as_it_is(program: Program, state: State) -> End:
    """Take the path's own point for an answer, with the active set that it suggests."""
    tried = condensed_end.guess(program, state, balanced=True, near=True)
    no = torch.zeros_like(state.stuck)
    return End(condensed_path.point(program, state), tried, condensed_end.factor_on(program, tried), no, no, tried)


def factored(program: Program, outcome: Outcome, *, ask: bool) -> Factor:
    """Factor the system on the active sets found, and look at it closely."""
    return condensed.examined(program, condensed_end.factor_on(program, outcome.guess), ask=ask)


def polished(program: Program, outcome: Outcome, settings: Settings) -> tuple[Outcome, Factor]:
    """Solve once more where the factor is sharp, since the coarse one misjudged duals there; also the factors.

    Where the active set turns out to be another, it is corrected and everything done again.
    """
    ask = settings.check_every > 0
    factor = factored(program, outcome, ask=ask)
    if not factor.held.shape[-1] or not outcome.z.shape[0]:
        return outcome, factor
    last = _LAST if program.p.dtype == torch.float64 else _LAST_NATIVE
    if not ask:
        end = _end(program, outcome.guess, last, settings, factor)
        outcome = outcome.exchange(None, end, end.accepted & factor.sharp.squeeze(-1))
        return outcome, factor
    index = factor.sharp.squeeze(-1).nonzero().squeeze(-1)
    part, made, before = program.take(index), factor.take(index), outcome
    tried = outcome.take(index).guess
    for _ in range(last.rounds):
        end = _end(part, tried, last, settings, made)
        taken = end.accepted & made.sharp.squeeze(-1)
        outcome = outcome.exchange(index, end, taken)
        again = taken.logical_not().nonzero().squeeze(-1)
        if not again.numel():
            break
        index, part, tried = index[again], part.take(again), end.corrected.take(again)
        made = condensed.examined(part, condensed_end.factor_on(part, tried), ask=True)
    if not checks.host_bool(outcome.differs(before).any()):
        return outcome, factor
    return outcome, factored(program, outcome, ask=True)


def _running(reached: condensed_path.Progress, target: float, state: State) -> Tensor:  # -> (k,) bool
    """Tell where the path has neither come to its end nor got stuck."""
    done = (reached.measure <= target) & (reached.infeasibility <= 1e-2 * target**0.5)
    return (done | state.stuck).logical_not()


def _advance(program: Program, state: State, target: float, settings: Settings, steps: int) -> tuple[State, int]:
    """Iterate until every program has reached the target, or cannot go on; also the most iterations of any program.

    No program has had more than `steps` iterations before.
    """
    whole, rows = state, None
    part = program
    count = 0
    while True:
        reached = condensed_path.progress(part, state)
        running = _running(reached, target, state)
        if steps + count >= settings.max_iter:
            running = running & (state.iterations < settings.max_iter)
        if count % settings.check_every == 0:
            at_work = checks.host_int(running.sum())
            if at_work == 0 or at_work <= 0.75 * running.shape[0]:
                whole = state if rows is None else whole.put(rows, state)
                if at_work == 0:
                    return whole, steps + count
                pick = running.nonzero().squeeze(-1)
                rows = pick if rows is None else rows[pick]
                part, state, running = part.take(pick), state.take(pick), running[pick]
                reached = reached.take(pick)
        state = condensed_path.step(part, state, running, reached)
        count += 1
