r"""The data of a batch of convex quadratic programs, brought to one scale.

    min ½ zᵀQz + pᵀz   subject to   E z − c∘y {=, ≤} f,  dual y = (ν, λ),   lb ≤ z ≤ ub,  dual `bound` = λ_ub − λ_lb.

The rows are E = [A; G], f = [b; h], equalities first. A compliance c > 0 makes a row elastic: it may be off by c∘y, at
the price ½ c y². With z = D z̃, rows multiplied by R and the cost by γ, the duals of the scaled program are
ỹ = γ R⁻¹ y and γ D·bound. D, R and γ are powers of two, so that scaling and scaling back round nothing.

Source: Ruiz (2001), A scaling algorithm to equilibrate both rows and columns norms in matrices, RAL-TR-2001-034.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_layers.kkt import quadratic

_SIMILAR = 64.0  # columns whose scales differ by no more keep one unit, and lengths of z their meaning
_SIMILAR_ROWS = 16.0  # the same for rows and duals
_RUIZ_ITERATIONS = 8


class Data(NamedTuple):
    """A batch of programs with rows stacked; leading dimension N, or 1 for what the whole batch shares."""

    Q: Tensor  # (N or 1, n, n) symmetric, positive semidefinite
    p: Tensor  # (N or 1, n)
    E: Tensor  # (N or 1, m, n): rows [A; G], equalities first
    f: Tensor  # (N or 1, m): [b; h]; +inf on inequality rows that are not there
    lb: Tensor | None  # (N or 1, n), -inf allowed
    ub: Tensor | None  # (N or 1, n), +inf allowed
    n_eq: int
    compliance: Tensor | None = None  # (N or 1, m) >= 0; None: all zero

    def take(self, index: Tensor) -> Data:
        """Keep the programs of `index`; what the batch shares stays shared."""
        return Data(*(_pick(field, index) for field in self))

    def put(self, batch: int, index: Tensor, part: Data) -> Data:
        """Replace the programs of `index`; bounds stay."""

        def merge(old: Tensor, new: Tensor) -> Tensor:
            return old.expand(batch, *old.shape[1:]).index_copy(0, index, new.expand(index.numel(), *new.shape[1:]))

        return self._replace(Q=merge(self.Q, part.Q), p=merge(self.p, part.p), f=merge(self.f, part.f))

    def to(self, dtype: torch.dtype) -> Data:
        """Convert all tensors."""
        fields: list[Any] = [field.to(dtype) if isinstance(field, Tensor) else field for field in self]
        return Data(*fields)

    def impossible(self, batch: int) -> Tensor:  # -> (N,) bool
        """Tell where a single constraint cannot be satisfied: bounds that cross, or at the wrong infinity."""
        inequality = torch.arange(self.f.shape[-1], device=self.f.device) >= self.n_eq
        empty = ((self.f == -torch.inf) | (inequality.logical_not() & torch.isinf(self.f))).any(-1)
        if self.lb is not None:
            empty = empty | (self.lb == torch.inf).any(-1)
        if self.ub is not None:
            empty = empty | (self.ub == -torch.inf).any(-1)
        if self.lb is not None and self.ub is not None:
            empty = empty | (self.lb > self.ub).any(-1)
        return empty.expand(batch)


class ActiveSet(NamedTuple):
    """Which constraints hold: where to begin, or where a solve ended."""

    active: Tensor  # (N, m): 1 on rows that hold, else 0
    fixed: Tensor  # (N, n): +1 at ub, -1 at lb, 0 free

    def take(self, index: Tensor) -> ActiveSet:
        """Keep the programs of `index`."""
        return ActiveSet(self.active[index], self.fixed[index])


class Scaling(NamedTuple):
    """Powers of two: z = column ∘ z̃, rows times `row`, cost times `cost`."""

    column: Tensor  # (N or 1, n)
    row: Tensor  # (N or 1, m)
    cost: Tensor  # (N or 1, 1)


class Units(NamedTuple):
    """What sets the units of scaled programs where a point does not; leading dimension N or 1."""

    least: Tensor  # (N or 1,): the smallest right-hand side or bound that is not zero, 1 where all are
    primal: Tensor  # (N or 1,): the smaller of that and |p|/|Q|, or 1
    dual: Tensor  # (N or 1,): |p|, or a trifle of |Q| times `primal`, or 1
    reach: Tensor  # (N or 1,): the largest right-hand side or bound, at least `primal`
    slope: Tensor  # (N or 1,): |p| or |Q| times `reach`, or 1


class Program(NamedTuple):
    """The scaled programs, infinities replaced by zeros and masks; leading dimension N or 1."""

    Q: Tensor  # (N or 1, n, n)
    p: Tensor  # (N or 1, n)
    E: Tensor  # (N or 1, m, n)
    f: Tensor  # (N or 1, m), 0 where absent
    lb: Tensor  # (N or 1, n), 0 where absent
    ub: Tensor  # (N or 1, n), 0 where absent
    rows: Tensor  # (N or 1, m) bool: the row is there
    has_lb: Tensor  # (N or 1, n) bool: a bound that is there, on a coordinate that is not pinned
    has_ub: Tensor  # (N or 1, n) bool
    pinned: Tensor  # (N or 1, n) bool: lb == ub
    compliance: Tensor  # (N or 1, m)
    scaling: Scaling
    units: Units
    n_eq: int
    bounded: bool  # whether any program may have bounds
    elastic: bool  # whether any row may have a compliance

    @staticmethod
    def of(data: Data, stiffness: Tensor | None = None) -> Program:
        """Scale the programs and take their infinities out; what is elastic or stiff gets units of its own."""
        column, row, cost = equilibrate(data.Q, data.E)
        if data.compliance is not None:
            row = row * _power_of_two((1.0 + data.compliance * row * row / cost).rsqrt())
        if stiffness is not None:
            column = column * _power_of_two((1.0 + stiffness * column**2 * cost).rsqrt())
        scaling = Scaling(column, row, cost)
        n = data.Q.shape[-1]
        rows = torch.isfinite(data.f)
        none = data.p.new_zeros(1, n)
        lb = none - torch.inf if data.lb is None else data.lb
        ub = none + torch.inf if data.ub is None else data.ub
        has_lb, has_ub = torch.isfinite(lb), torch.isfinite(ub)
        pinned = has_lb & has_ub & (lb >= ub)
        compliance = data.p.new_zeros(1, 1) if data.compliance is None else data.compliance
        Q = cost.unsqueeze(-1) * column.unsqueeze(-1) * data.Q * column.unsqueeze(-2)
        p = cost * column * data.p
        f = torch.where(rows, row * data.f, 0.0)
        lb = torch.where(has_lb, lb / column, 0.0)
        ub = torch.where(has_ub, ub / column, 0.0)
        return Program(
            Q=Q,
            p=p,
            E=row.unsqueeze(-1) * data.E * column.unsqueeze(-2),
            f=f,
            lb=lb,
            ub=ub,
            rows=rows,
            has_lb=has_lb & pinned.logical_not(),
            has_ub=has_ub & pinned.logical_not(),
            pinned=pinned,
            compliance=compliance * row * row / cost,
            scaling=scaling,
            units=_units(Q, p, (f, lb, ub)),
            n_eq=data.n_eq,
            bounded=data.lb is not None or data.ub is not None,
            elastic=data.compliance is not None,
        )

    def take(self, index: Tensor) -> Program:
        """Keep the programs of `index`; what the batch shares stays shared."""
        return Program(*(_pick(field, index) for field in self))

    def inequality(self) -> Tensor:  # (m,) bool
        """Tell which rows are inequalities."""
        return torch.arange(self.E.shape[-2], device=self.E.device) >= self.n_eq

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:  # (k, n), (k, m) -> (k, n)
        """Evaluate Qz + p + Eᵀy."""
        return quadratic.matvec(self.Q, z) + self.p + quadratic.transposed_matvec(self.E, y)

    def unscaled(self, z: Tensor, y: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bring a point back to the units of the data; exact."""
        column, row, cost = self.scaling
        return z * column, y * row / cost, bound / (column * cost)


class Point(NamedTuple):
    """A point of scaled programs with what its judgement needs."""

    z: Tensor  # (k, n)
    y: Tensor  # (k, m)
    bound: Tensor  # (k, n)
    gap: Tensor  # (k, m): Ez − c∘y − f
    stationarity: Tensor  # (k, n): Qz + p + Eᵀy + bound
    terms: Tensor  # (k, m): the size of the terms of each row
    bound_terms: Tensor  # (k, n): the size of the terms of each bound
    primal_unit: Tensor  # (k, 1)
    dual_unit: Tensor  # (k, 1)
    residual: Tensor  # (k,): relative KKT residual
    absolute: Tensor  # (k,): the same of rows and stationarity, relative to the data and not to the point


def judge(program: Program, z: Tensor, y: Tensor, bound: Tensor) -> Point:
    """Measure how well a scaled point satisfies the KKT conditions, blind to units: 0 where all data are zero.

    Stationarity is relative to the largest of its own terms; a row to its right-hand side and the length of z; signs
    of duals to the largest dual; complementarity to both. Where all these vanish, what is left sets the unit: the
    smaller of |p|/|Q| and the smallest right-hand side, or 1.
    """
    largest, units = quadratic.largest, program.units
    curved = quadratic.matvec(program.Q, z)
    pulled = quadratic.transposed_matvec(program.E, y)
    stationarity = (curved + program.p).add_(pulled)
    dual = torch.maximum(torch.maximum(largest(curved), largest(pulled)), units.dual)
    if program.bounded:
        stationarity = stationarity.add_(bound)
        dual = torch.maximum(dual, largest(bound))
    dual = dual.unsqueeze(-1)
    image = quadratic.matvec(program.E, z)
    length = torch.linalg.vector_norm(z, dim=-1)
    primal = torch.maximum(length, 1e-5 * units.primal).unsqueeze(-1)
    gap, terms = image - program.f, program.f.abs() + primal
    if program.elastic:
        gap = gap - program.compliance * y
        terms = terms + program.compliance * y.abs()
    gap, n_eq = torch.where(program.rows, gap, 0.0), program.n_eq
    sizes = [n_eq, gap.shape[-1] - n_eq]
    equal, above_side = gap.split(sizes, dim=-1)
    over = torch.cat([equal.abs(), above_side], dim=-1) if n_eq else gap  # not negative where it is too much
    of_gap = over / terms
    there, lam = program.rows.split(sizes, dim=-1)[1], y.split(sizes, dim=-1)[1]
    of_lam = torch.where(there, lam, 0.0).div_(dual)
    steepest = largest(stationarity)
    parts = [steepest.unsqueeze(-1) / dual, of_gap, -of_lam, (of_lam * of_gap.split(sizes, dim=-1)[1]).abs_()]
    bound_terms = primal
    if program.bounded:
        nearest = torch.where(z >= 0, program.ub, program.lb)
        bound_terms = nearest.abs() + primal
        held_ub, held_lb = program.has_ub | program.pinned, program.has_lb | program.pinned
        above = torch.where(held_ub, z - program.ub, 0.0)
        below = torch.where(held_lb, program.lb - z, 0.0)
        upward, downward = bound.clamp(min=0.0), (-bound).clamp_(min=0.0)
        loose = torch.where(held_ub, 0.0, upward) + torch.where(held_lb, 0.0, downward)
        slackness = torch.maximum((upward * above).abs_(), (downward * below).abs_())
        slackness = torch.where(program.pinned, 0.0, slackness)
        parts += [torch.maximum(above, below) / bound_terms, loose / dual, slackness / (bound_terms * dual)]
    residual = torch.cat(parts, dim=-1).amax(-1).nan_to_num_(nan=torch.inf, posinf=torch.inf)
    absolute = steepest / units.slope
    if over.shape[-1]:
        absolute = torch.maximum(over.amax(-1) / units.reach, absolute)
    absolute = absolute.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    return Point(z, y, bound, gap, stationarity, terms, bound_terms, primal, dual, residual, absolute)


def _units(Q: Tensor, p: Tensor, sides: tuple[Tensor, ...]) -> Units:
    """Find what sets the units."""
    size, size_p = quadratic.largest(Q.flatten(-2)), quadratic.largest(p)
    present = [side.abs() for side in sides if side.shape[-1]]  # the bounds always are
    largest = torch.stack(torch.broadcast_tensors(*(side.amax(-1) for side in present))).amax(0)
    smallest = (torch.where(side > 0, side, torch.inf).amin(-1) for side in present)
    least = torch.stack(torch.broadcast_tensors(*smallest)).amin(0)
    free = torch.where((size > 0) & (size_p > 0), size_p / torch.where(size > 0, size, 1.0), torch.inf)
    primal = torch.minimum(least, free)
    primal = torch.where(torch.isfinite(primal), primal, 1.0)
    reach = torch.maximum(largest, primal)
    floor = torch.maximum(size_p, 1e-5 * size * primal)
    slope = torch.maximum(size_p, size * reach)
    return Units(
        torch.where(torch.isfinite(least), least, 1.0),
        primal,
        torch.where(floor > 0, floor, 1.0),
        reach,
        torch.where(slope > 0, slope, 1.0),
    )


def relative_residual(data: Data, z: Tensor, y: Tensor, bound: Tensor) -> Tensor:  # -> (N,)
    """Measure the relative KKT residual of a point in the units of the data; see `judge`."""
    program = Program.of(data)
    column, row, cost = program.scaling
    return judge(program, z / column, y * cost / row, bound * column * cost).residual


def equilibrate(Q: Tensor, E: Tensor) -> Scaling:
    """Scale the columns and rows of [Q Eᵀ; E 0] towards one size, and the cost to |Q| about 1; Q = 0 is left alone."""
    n, m = Q.shape[-1], E.shape[-2]
    size_q, own = Q.abs(), _own_size(E)
    size_e = E.abs() * own.unsqueeze(-1)  # entries about 1, whatever the units of a row: its square is a number too
    batch = max(Q.shape[0], E.shape[0])
    column = Q.new_ones(batch, n)
    row = E.new_ones(batch, m)
    cost = Q.new_ones(batch, 1)
    for _ in range(_RUIZ_ITERATIONS):
        scaled_q = cost * column * (size_q * column.unsqueeze(-2)).amax(-1)
        if m:
            scaled_e = row.unsqueeze(-1) * size_e * column.unsqueeze(-2)
            widest = torch.maximum(scaled_q, scaled_e.amax(-2))
            row = row / _root(scaled_e.amax(-1))
        else:
            widest = scaled_q
        column = column / _root(widest)
        steepest = cost * (column * (size_q * column.unsqueeze(-2)).amax(-1)).amax(-1, keepdim=True)
        cost = cost / torch.where(steepest > 0, steepest, 1.0)
    spread = column.amax(-1, keepdim=True) / column.amin(-1, keepdim=True)
    column = torch.where(spread > _SIMILAR, column, 1.0)
    column = _power_of_two(column)
    steepest = (column * (size_q * column.unsqueeze(-2)).amax(-1)).amax(-1, keepdim=True)
    cost = _power_of_two(torch.where(steepest > 0, steepest, 1.0).reciprocal())
    if m:
        even = torch.linalg.vector_norm(size_e * column.unsqueeze(-2), dim=-1)
        length = (even / own).clamp_(max=torch.finfo(even.dtype).max)
        longest = length.amax(-1, keepdim=True)
        shortest = torch.where(length > 0, length, torch.inf).amin(-1, keepdim=True)
        differ = longest > _SIMILAR_ROWS * shortest
        row = _power_of_two(torch.where(differ & (even > 0), even, 1.0).reciprocal()) * own
        one = _power_of_two(torch.where(longest > 0, longest, 1.0).reciprocal())
        row = torch.where(differ, row, one)
    return Scaling(column, row, cost)


def _own_size(E: Tensor) -> Tensor:  # (N or 1, m, n) -> (N or 1, m)
    """Give the powers of two that bring the largest entry of rows far from 1 to about that; 1 for the others.

    Scaled like the others, such a row would hand half of its unit to its unknowns, whose own condition then vanishes.
    """
    if not E.shape[-2]:
        return E.new_ones(E.shape[0], 0)
    top, info = E.abs().amax(-1), torch.finfo(E.dtype)
    most = 1e13 if E.dtype == torch.float64 else 1e4
    far = (top > info.tiny) & ((top > most) | (top < 1.0 / most))
    return _power_of_two(torch.where(far, top, 1.0).reciprocal())


def _root(size: Tensor) -> Tensor:
    """Take the square root; 1 of nothing."""
    return torch.where(size > 0, size, 1.0).sqrt()


def _power_of_two(value: Tensor) -> Tensor:
    """Round down to a power of two, exactly: a number over its mantissa, halved."""
    mantissa, _ = torch.frexp(value)
    return 0.5 * (value / mantissa)


def _pick(field: Any, index: Tensor) -> Any:
    """Index a tensor, or all tensors of a tuple, of which the batch does not share one."""
    if isinstance(field, Tensor):
        return field if field.shape[0] == 1 else field[index]
    if isinstance(field, (Scaling, Units)):
        return type(field)(*(_pick(part, index) for part in field))
    return field
