"""The condensed form of the interior point: every convex program, every way to have no solution."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from implicit_layers import checks
from implicit_layers.errors import ArgumentError
from implicit_layers.kkt import condensed, quadratic
from implicit_layers.kkt.program import Data
from implicit_layers.reference import exact_qp, program
from implicit_layers.solution import Status
from implicit_layers.solvers.active_set import Degeneracy
from implicit_layers.solvers.interior_point import InteriorPoint, QPResult

CONDENSED = InteriorPoint(form="condensed")
INF = float("inf")


class Draw:
    """Random numbers of one seed, in float64."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator).double()


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def known(draw: Draw, N: int, n: int = 15, n_ineq: int = 10, n_eq: int = 3) -> tuple[Data, Tensor]:
    """Programs with a solution drawn beforehand, half of the inequalities active."""
    L, E, x = draw.normal(N, n, n), draw.normal(N, n_eq + n_ineq, n), draw.normal(N, n)
    active = draw.uniform(N, n_ineq) < 0.5
    slack = torch.where(active, 0.0, draw.normal(N, n_ineq).abs())
    y = torch.cat([draw.normal(N, n_eq), torch.where(active, draw.normal(N, n_ineq).abs(), 0.0)], -1)
    f = apply(E, x) + torch.cat([zeros(N, n_eq), slack], -1)
    Q = L @ L.mT
    return Data(Q, -apply(Q, x) - apply(E.mT, y), E, f, None, None, n_eq), x


def mixed(draw: Draw, N: int, n: int = 12, p: Tensor | None = None, Q: Tensor | None = None) -> Data:
    """Feasible programs with rows of both kinds, in a box; linear unless Q is given."""
    E, x = draw.normal(N, 10, n), draw.uniform(N, n) - 0.5
    f = apply(E, x)
    f[:, 2:] += 0.3 * draw.uniform(N, 8)
    p = draw.normal(N, n) if p is None else p
    return Data(zeros(1, n, n) if Q is None else Q, p, E, f, zeros(1, n) - 0.5, zeros(1, n) + 0.5, 2)


def one(data: Data, i: int) -> list[np.ndarray]:
    """Q, p, E, f, lb, ub of one problem, bounds infinite where there are none."""
    n = data.p.shape[-1]
    lb = zeros(1, n) - INF if data.lb is None else data.lb
    ub = zeros(1, n) + INF if data.ub is None else data.ub
    fields = (data.Q, data.p, data.E, data.f, lb, ub)
    return [field[0 if field.shape[0] == 1 else i].double().numpy() for field in fields]


def violation(data: Data, result: QPResult, i: int) -> float:
    """The KKT residual of one answer in numpy, relative to max(1, largest term): nothing of the package."""
    Q, p, E, f, lb, ub = one(data, i)
    z, y, bound = (part[i].double().numpy() for part in (result.z, result.y, result.bound))
    dual = max([1.0, *abs(Q @ z), *abs(p), *abs(E.T @ y)])
    there = np.isfinite(f)
    gap = np.where(there, E @ z - np.where(there, f, 0.0), 0.0)
    primal = max([1.0, *abs(z), *abs(f[there])])
    lam, excess = y[data.n_eq :], gap[data.n_eq :]
    parts = [abs(Q @ z + p + E.T @ y + bound) / dual, abs(gap[: data.n_eq]) / primal, excess / primal, -lam / dual]
    parts += [abs(lam * excess) / (primal * dual), abs(y[~there]) / dual, (z - ub) / primal, (lb - z) / primal]
    for push, room in ((np.maximum(bound, 0), ub - z), (np.maximum(-bound, 0), z - lb)):
        parts.append(np.where(push > 0, push * np.where(np.isfinite(room), room, 1e300), 0.0) / (primal * dual))
    return float(np.concatenate(parts).max())


def certified(data: Data, result: QPResult, tol: float = 1e-11) -> None:
    """Every problem is solved, and says so rightly."""
    assert result.info.converged.all(), result.info.status.tolist()
    worst = max(violation(data, result, i) for i in range(result.z.shape[0]))
    assert worst < tol


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["condensed", "auto"])
def test_a_thousand_known_solutions(form: str) -> None:
    data, x = known(Draw(0), 1000)
    result = InteriorPoint(form=form).solve(data, 1000)  # type: ignore[arg-type]
    assert result.info.converged.all() and result.info.iterations.max() <= 25 and result.info.residual.max() <= 1e-8
    assert (result.z - x).abs().max() < 1e-9 and (result.z - x).abs().amax(-1).median() < 1e-14
    certified(data, result, 1e-12)


@pytest.mark.parametrize("size", [(1, 1, 0), (5, 0, 3), (10, 10, 0), (15, 10, 3), (20, 30, 5)], ids=str)
def test_like_the_reference(size: tuple[int, int, int]) -> None:
    data, _ = known(Draw(1), 4, *size)
    n_eq = data.n_eq
    result = CONDENSED.solve(data, 4)
    exact = exact_qp(
        program(data.Q, data.p, A=data.E[:, :n_eq], b=data.f[:, :n_eq], G=data.E[:, n_eq:], h=data.f[:, n_eq:])
    )
    y = torch.cat([exact.nu, exact.lam], -1)
    single = result.degenerate == 0
    assert (result.z - exact.z).abs().max() < 1e-11
    assert torch.allclose(result.y[single], y[single], rtol=1e-9, atol=1e-10)


def test_the_dual_form_answers_in_the_same_terms() -> None:
    data, _ = known(Draw(2), 6)
    ours, theirs = CONDENSED.solve(data, 6), InteriorPoint(form="dual").solve(data, 6)
    assert isinstance(ours.factor, condensed.Factor) and isinstance(theirs.factor, quadratic.Factor)
    for name in ("z", "y", "bound", "active", "fixed", "degenerate"):
        assert torch.allclose(getattr(ours, name).double(), getattr(theirs, name).double(), atol=1e-10), name
    draw = Draw(3)
    r_z, r_y = draw.normal(6, 15), draw.normal(6, 13)
    left = condensed.solve(ours.factor, data.Q, data.E, r_z, r_y, None, 0)
    right = quadratic.solve(theirs.factor, data.Q, data.E, r_z, r_y, None, 1)
    for a, b in zip(left, right, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max().clamp(min=1)))


def test_forms_are_chosen_by_kind_and_shape() -> None:
    data, _ = known(Draw(4), 2)
    n = data.p.shape[-1]

    def chosen(data: Data, **settings: object) -> type:
        return type(InteriorPoint(**settings).solve(data, 2).factor)  # type: ignore[arg-type]

    free = zeros(1, n) + INF
    assert chosen(data) is quadratic.Factor
    assert chosen(data._replace(lb=-free, ub=free)) is quadratic.Factor
    for other in (
        data._replace(lb=zeros(1, n) - 3),
        data._replace(compliance=zeros(1, 13) + 1),
        data._replace(f=torch.cat([data.f[:, :-1], zeros(2, 1) + INF], -1)),
        known(Draw(4), 2, 4, 20, 0)[0],
        data._replace(
            Q=data.Q * torch.tensor([1.0, 0.0]).double()[:, None, None], ub=zeros(1, n) + 9, lb=zeros(1, n) - 9
        ),
    ):
        assert chosen(other) is condensed.Factor
    assert chosen(data, check_every=0) is condensed.Factor


def test_box_projection() -> None:
    draw = Draw(5)
    x, lb = 3 * draw.normal(20, 6), -draw.uniform(20, 6)
    ub = lb + draw.uniform(20, 6)
    lb[:, 0], ub[:, 1], ub[:, 2] = -INF, INF, lb[:, 2]
    data = Data(torch.eye(6).double()[None], -x, zeros(1, 0, 6), zeros(1, 0), lb, ub, 0)
    result = InteriorPoint().solve(data, 20)
    assert (result.z - torch.minimum(torch.maximum(x, lb), ub)).abs().max() < 1e-14
    assert (result.bound - (x - result.z)).abs().max() < 1e-14
    sides = torch.where(x >= ub, 1, torch.where(x <= lb, -1, 0))
    assert torch.equal(result.fixed.sign().long(), sides)


def test_simplex_projection() -> None:
    x = 3 * Draw(6).normal(20, 7)
    data = Data(torch.eye(7).double()[None], -x, zeros(1, 1, 7) + 1, zeros(1, 1) + 1, zeros(1, 7), None, 1)
    ordered = x.sort(descending=True).values
    level = (ordered.cumsum(-1) - 1) / torch.arange(1, 8)
    count = (ordered > level).sum(-1, keepdim=True)
    expected = (x - level.gather(-1, count - 1)).clamp(min=0)
    assert (InteriorPoint().solve(data, 20).z - expected).abs().max() < 1e-14


def test_linear_programs_with_one_vertex() -> None:
    """Exact to rounding, against HiGHS."""
    data = mixed(Draw(7), 30)
    result = InteriorPoint().solve(data, 30)
    certified(data, result)
    assert not result.degenerate.any()
    for i in range(30):
        _, p, E, f, lb, ub = one(data, i)
        found = linprog(p, E[2:], f[2:], E[:2], f[:2], list(zip(lb, ub, strict=True)))
        assert abs(found.x - result.z[i].numpy()).max() < 1e-12


def face_projection(data: Data, result: QPResult, i: int) -> np.ndarray:
    """Least norm on the face of minimisers, by another program: alternating projections of Dykstra."""
    Q, p, E, f, lb, ub = one(data, i)
    z = result.z[i].numpy()
    flat = np.vstack([E[:2], Q, p[None]])
    side = flat @ z
    inverse = np.linalg.pinv(flat, rcond=1e-12)
    sets = [lambda v: v - inverse @ (flat @ v - side), lambda v: np.clip(v, lb, ub)]
    for row, right in zip(E[2:], f[2:], strict=True):
        sets.append(lambda v, row=row, right=right: v - row * max(row @ v - right, 0.0) / (row @ row))
    x, corrections = np.zeros_like(z), [np.zeros_like(z) for _ in sets]
    for _ in range(20000):
        before = x
        for k, project in enumerate(sets):
            y = project(x + corrections[k])
            corrections[k] = x + corrections[k] - y
            x = y
        if abs(x - before).max() < 1e-14:
            break
    return x


@pytest.mark.parametrize("kind", ["linear", "flat"])
def test_minimisers_of_least_norm(kind: str) -> None:
    draw = Draw(8)
    if kind == "linear":
        p = draw.normal(12, 12).round()
        p[:, :5] = 0.0
        data = mixed(draw, 12, p=p)
    else:
        L = draw.normal(12, 12, 5)
        data = mixed(draw, 12, Q=L @ L.mT, p=0.2 * apply(L, draw.normal(12, 5)))
    result = InteriorPoint().solve(data, 12)
    certified(data, result)
    plural = (result.degenerate & int(Degeneracy.PRIMAL)) > 0
    assert plural.any()
    for i in plural.nonzero().flatten().tolist()[:3]:
        assert abs(face_projection(data, result, i) - result.z[i].numpy()).max() < 1e-6
    assert torch.isinf(result.condition[(result.degenerate & int(Degeneracy.PRIMAL)) > 0]).sum() > 0


def test_flat_without_constraints_is_the_pseudoinverse() -> None:
    draw = Draw(9)
    L = draw.normal(5, 8, 3)
    data = Data(L @ L.mT, apply(L, draw.normal(5, 3)), zeros(1, 0, 8), zeros(1, 0), None, None, 0)
    result = InteriorPoint().solve(data, 5)
    expected = -apply(torch.linalg.pinv(data.Q, hermitian=True, rtol=1e-10), data.p)
    assert (result.z - expected).abs().max() < 1e-13
    assert (result.degenerate == int(Degeneracy.PRIMAL)).all() and result.info.iterations.max() == 0


@pytest.mark.parametrize("equalities", [True, False])
def test_duplicated_rows_change_nothing(equalities: bool) -> None:
    """The minimiser is the same, the duals share, and the least-norm derivative is that of the single rows."""
    data, x = known(Draw(10), 8)
    single = CONDENSED.solve(data, 8)
    chosen = slice(0, 3) if equalities else slice(3, 13)
    E = torch.cat([data.E[:, chosen], data.E], 1) if equalities else torch.cat([data.E, data.E[:, chosen]], 1)
    f = torch.cat([data.f[:, chosen], data.f], 1) if equalities else torch.cat([data.f, data.f[:, chosen]], 1)
    twice = data._replace(E=E, f=f, n_eq=6 if equalities else 3)
    result = CONDENSED.solve(twice, 8)
    certified(twice, result)
    assert (result.z - x).abs().max() < 1e-12
    assert (result.degenerate == int(Degeneracy.DEPENDENT)).all()
    r_z = Draw(11).normal(8, 15)
    u_z, _, _ = condensed.solve(result.factor, twice.Q, twice.E, r_z, zeros(8, f.shape[1]), None, 0)
    expected, _, _ = condensed.solve(single.factor, data.Q, data.E, r_z, zeros(8, 13), None, 0)
    assert (u_z - expected).abs().max() < 1e-10


def test_weakly_active_constraints_are_told() -> None:
    eye = torch.eye(3).double()[None]
    data = Data(eye, -torch.tensor([[1.0, 2.0, 0.5]]).double(), eye, zeros(1, 3) + 1, None, None, 0)
    for lb, ub in ((None, None), (None, zeros(1, 3) + 1)):
        rows = data if ub is None else data._replace(E=zeros(1, 0, 3), f=zeros(1, 0), lb=lb, ub=ub)
        result = CONDENSED.solve(rows, 1)
        assert torch.allclose(result.z, torch.tensor([[1.0, 1.0, 0.5]]).double(), atol=1e-15)
        assert result.degenerate.item() == int(Degeneracy.WEAK)


@pytest.mark.parametrize("rows", [75, 300])
def test_many_rows(rows: int) -> None:
    data, _ = known(Draw(12), 10, 15, rows, 2)
    result = InteriorPoint().solve(data, 10)
    certified(data, result)
    assert isinstance(result.factor, condensed.Factor)


@pytest.mark.parametrize("decades", [3, 6])
def test_badly_scaled_data(decades: int) -> None:
    draw = Draw(13)
    data, x = known(draw, 20)
    rows = 10 ** (decades * (2 * draw.uniform(20, 13) - 1))
    columns = 10 ** (decades * (2 * draw.uniform(20, 15) - 1))
    wild = Data(
        columns[:, :, None] * data.Q * columns[:, None], data.p * columns,
        rows[..., None] * data.E * columns[:, None], data.f * rows, None, None, 3,
    )  # fmt: skip
    for form in ("condensed", "auto"):
        result = InteriorPoint(form=form).solve(wild, 20)  # type: ignore[arg-type]
        assert result.info.converged.all()
        assert ((result.z * columns - x).abs().amax(-1) / x.abs().amax(-1)).max() < 1e-11


@pytest.mark.parametrize("exponent", [-6, -9, -12])
def test_hardly_curved(exponent: int) -> None:
    """A vanishing Q is no reason to accept a bad answer."""
    data = mixed(Draw(14), 100, Q=10.0**exponent * torch.eye(12).double()[None])
    certified(data, InteriorPoint().solve(data, 100), 1e-10)


def test_one_bad_condition() -> None:
    draw = Draw(15)
    V = torch.linalg.qr(draw.normal(10, 15, 15))[0]
    Q = V * 10 ** (-10 * torch.linspace(0, 1, 15).double()) @ V.mT
    data, x = known(draw, 10)
    Q = 0.5 * (Q + Q.mT)
    data = data._replace(Q=Q, p=data.p + apply(data.Q - Q, x))
    for form in ("condensed", "auto"):
        certified(data, InteriorPoint(form=form).solve(data, 10), 1e-10)  # type: ignore[arg-type]


def test_shared_and_repeated_data_agree() -> None:
    draw = Draw(16)
    data = mixed(draw, 6)
    shared = data._replace(E=data.E[:1], f=data.f[:1])
    repeated = Data(*(t.expand(6, *t.shape[1:]).contiguous() if isinstance(t, Tensor) else t for t in shared))
    left, right = InteriorPoint().solve(shared, 6), InteriorPoint().solve(repeated, 6)
    assert torch.equal(left.info.status, right.info.status)
    assert (left.z - right.z).abs().max() < 1e-13


def test_empty_batch_and_nothing_at_all() -> None:
    data, _ = known(Draw(17), 0)
    for form in ("condensed", "auto"):
        result = InteriorPoint(form=form).solve(data, 0)  # type: ignore[arg-type]
        assert result.z.shape == (0, 15) and result.y.shape == (0, 13) and result.info.status.shape == (0,)
    nothing = Data(zeros(1, 3, 3), zeros(1, 3), zeros(1, 0, 3), zeros(1, 0), None, None, 0)
    result = InteriorPoint().solve(nothing, 2)
    assert not result.z.any() and result.info.converged.all()


def test_zero_cost_gives_the_feasible_point_of_least_norm() -> None:
    data = Data(zeros(1, 3, 3), zeros(1, 3), zeros(1, 0, 3), zeros(1, 0), zeros(1, 3) - 1, zeros(1, 3) + 2, 0)
    assert InteriorPoint().solve(data, 1).z.abs().max() < 1e-14
    above = data._replace(lb=zeros(1, 3) + 1)
    assert (InteriorPoint().solve(above, 1).z - 1).abs().max() < 1e-14


def test_elastic_rows() -> None:
    """E z − c∘y ≤ f is the row with the penalty (1/2c) t²: against the program with t written out."""
    draw = Draw(18)
    data, _ = known(draw, 5, 6, 4, 1)
    c = 0.1 + draw.uniform(1, 5)
    result = InteriorPoint().solve(data._replace(compliance=c), 5)
    assert result.info.converged.all()
    Q = zeros(5, 11, 11)
    Q[:, :6, :6], Q[:, 6:, 6:] = data.Q, torch.diag_embed(1 / c[0])
    E = torch.cat([data.E, -torch.eye(5).double().expand(5, 5, 5)], -1)
    whole = InteriorPoint(form="dual").solve(Data(Q, torch.cat([data.p, zeros(5, 5)], -1), E, data.f, None, None, 1), 5)
    assert torch.allclose(result.z, whole.z[:, :6], atol=1e-11) and torch.allclose(result.y, whole.y, atol=1e-11)


# --- no solution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [1.0, 1e-3, 1e-6])
def test_contradicting_rows(amount: float) -> None:
    """Proven where they are; their neighbours, the same rows a little looser, are solved."""
    data = mixed(Draw(20), 12, Q=torch.eye(12).double()[None])
    gap = torch.full((12, 1), amount, dtype=torch.float64)
    gap[::2] = -amount
    data = data._replace(E=torch.cat([data.E, -data.E[:, 3:4]], 1), f=torch.cat([data.f, -data.f[:, 3:4] - gap], 1))
    result = InteriorPoint().solve(data, 12)
    expected = torch.tensor([int(Status.CONVERGED), int(Status.INFEASIBLE)], dtype=torch.int8).repeat(6)
    assert torch.equal(result.info.status, expected)
    assert max(violation(data, result, i) for i in range(0, 12, 2)) < 1e-12


def test_other_contradictions() -> None:
    data = mixed(Draw(21), 4)
    n = data.p.shape[-1]
    lb, far = zeros(1, n) - 0.5, data.f.clone()
    lb[0, 3] = 0.6
    far[:, 0] = 100.0
    dependent = torch.cat([data.E[:, :2], data.E[:, :2].sum(1, keepdim=True), data.E[:, 2:]], 1)
    side = torch.cat([data.f[:, :2], data.f[:, :2].sum(1, keepdim=True) + 1e-6, data.f[:, 2:]], 1)
    nowhere = data.f.clone()
    nowhere[:, 5] = -INF
    for bad in (
        data._replace(lb=lb),
        data._replace(f=far),
        data._replace(E=dependent, f=side, n_eq=3),
        data._replace(f=nowhere),
        data._replace(lb=zeros(1, n) + INF),
        data._replace(ub=zeros(1, n) - INF),
    ):
        result = InteriorPoint().solve(bad, 4)
        assert (result.info.status == int(Status.INFEASIBLE)).all() and not result.info.converged.any()
        assert torch.isfinite(result.z).all() and torch.isfinite(result.y).all()


def test_descent_without_end() -> None:
    draw = Draw(22)
    data = mixed(draw, 10)._replace(lb=None, ub=None)
    assert (InteriorPoint().solve(data, 10).info.status == int(Status.UNBOUNDED)).all()
    L = draw.normal(10, 12, 3)
    flat = Data(L @ L.mT, draw.normal(10, 12), zeros(1, 0, 12), zeros(1, 0), None, None, 0)
    assert (InteriorPoint().solve(flat, 10).info.status == int(Status.UNBOUNDED)).all()
    held = flat._replace(p=flat.p * torch.tensor([1.0, 0.0] * 5).double()[:, None])
    status = InteriorPoint().solve(held, 10).info.status
    assert status.tolist() == [int(Status.UNBOUNDED), int(Status.CONVERGED)] * 5


def statuses(draw: Draw, N: int) -> Iterator[Data]:
    """Small programs of small whole numbers: as degenerate as can be."""
    for kind in range(4):
        for _ in range(2):
            n, n_eq, n_ineq = (int(draw.whole(a, b, 1)) for a, b in ((1, 6), (0, 2), (0, 9)))
            L = draw.whole(-2, 2, N, n, 2)
            Q = zeros(N, n, n) if kind < 2 else L @ L.mT
            E = draw.whole(-2, 2, N, n_eq + n_ineq, n)
            f = draw.whole(-2, 4, N, n_eq + n_ineq)
            f[:, :n_eq] = apply(E[:, :n_eq], draw.whole(-1, 1, N, n))
            lb = draw.whole(-3, 0, N, n) if kind % 2 else None
            ub = torch.where(draw.uniform(N, n) < 0.4, INF, draw.whole(0, 3, N, n)) if kind % 2 else None
            yield Data(Q, draw.whole(-3, 3, N, n), E, f, lb, ub, n_eq)


def by_linear_programs(data: Data, i: int) -> int:
    """The status of one problem: feasible or not, and a direction of descent in the recession cone or none (HiGHS)."""
    Q, p, E, f, lb, ub = one(data, i)
    k = data.n_eq

    def solve(cost: np.ndarray, side: np.ndarray, equal: np.ndarray, to: np.ndarray, box: list) -> object:
        inequalities = (E[k:], side[k:]) if len(f) > k else (None, None)
        return linprog(cost, *inequalities, *((equal, to) if len(equal) else (None, None)), box)

    if solve(0 * p, f, E[:k], f[:k], list(zip(lb, ub, strict=True))).status == 2:  # type: ignore[attr-defined]
        return int(Status.INFEASIBLE)
    flat = np.vstack([E[:k], Q])
    cone = [(0 if np.isfinite(a) else -1, 0 if np.isfinite(b) else 1) for a, b in zip(lb, ub, strict=True)]
    down = solve(p, 0 * f, flat, np.zeros(len(flat)), cone)
    return int(Status.UNBOUNDED) if down.fun < -1e-9 else int(Status.CONVERGED)  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(3))
def test_small_whole_numbers(seed: int) -> None:
    """Status by HiGHS, answers by their KKT conditions; without questions nothing that fails is called solved."""
    draw, seen = Draw(100 + seed), set()
    for data in statuses(draw, 6):
        result = InteriorPoint().solve(data, 6)
        blind = InteriorPoint(check_every=0, max_iter=40).solve(data, 6)
        for i in range(6):
            status = by_linear_programs(data, i)
            seen.add(status)
            assert result.info.status[i] == status, i
            if status == int(Status.CONVERGED):
                assert violation(data, result, i) < 1e-9
                if blind.info.converged[i]:
                    assert violation(data, blind, i) < 1e-6
            else:
                assert not blind.info.converged[i]
    assert int(Status.CONVERGED) in seen and len(seen) > 1


def test_too_few_iterations_are_said_to_be() -> None:
    data = mixed(Draw(23), 30)
    result = InteriorPoint(max_iter=1).solve(data, 30)
    good = result.info.converged
    assert not good.all() and (result.info.status[~good] == int(Status.NOT_CONVERGED)).all()
    assert all(violation(data, result, i) < 1e-7 for i in good.nonzero().flatten().tolist())


# --- precision, devices, questions ----------------------------------------------------------------------------------


def test_native_float32() -> None:
    data, _ = known(Draw(24), 40)
    single = data.to(torch.float32)
    result = InteriorPoint(precision="native").solve(single, 40)
    assert all(part.dtype == torch.float32 for part in (result.z, result.y, result.info.residual, *result.factor[:5]))
    assert result.info.converged.all()
    assert max(violation(single, result, i) for i in range(40)) < 2e-6
    assert InteriorPoint().solve(single, 40).z.dtype == torch.float64


def test_questions_of_the_host_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One an iteration, one every k, or none at all; the answers are the same."""
    data = mixed(Draw(25), 20, Q=torch.eye(12).double()[None])
    asked = []
    for name in ("host_bool", "host_int"):
        function = getattr(checks, name)
        monkeypatch.setattr(checks, name, lambda flag, function=function: asked.append(1) or function(flag))
    counts, answers = [], []
    for check_every in (1, 4, 0):
        asked.clear()
        answers.append(InteriorPoint(check_every=check_every, max_iter=30).solve(data, 20))
        counts.append(len(asked))
    assert counts[0] > counts[1] > counts[2] == 0
    for answer in answers:
        certified(data, answer)
        assert (answer.z - answers[0].z).abs().max() < 1e-12


def test_on_a_device_that_is_not_there() -> None:
    with FakeTensorMode():
        tensors = [torch.empty(*s, dtype=torch.float64, device="cuda") for s in ((1, 4, 4), (3, 4), (3, 5, 4), (3, 5))]
        bound = torch.empty(1, 4, dtype=torch.float64, device="cuda")
        for lb, n_eq in ((bound, 2), (None, 5)):
            result = InteriorPoint(check_every=0, max_iter=1).solve(Data(*tensors, lb, None, n_eq), 3)
            parts = (result.z, result.y, result.bound, result.condition, *result.factor, *result.info)
            assert {part.device.type for part in parts} == {"cuda"} and result.z.shape == (3, 4)


def test_settings_are_checked() -> None:
    for bad in ({"precision": "half"}, {"form": "primal"}, {"check_every": -1}, {"check_every": 0, "form": "dual"}):
        with pytest.raises(ArgumentError):
            InteriorPoint(**bad)  # type: ignore[arg-type]
    assert InteriorPoint().tolerance(torch.float64) == 1e-8
    assert InteriorPoint().tolerance(torch.float32) == 2e-6  # the data are no better
    assert InteriorPoint(precision="native").tolerance(torch.float32) == 1e-5
    assert InteriorPoint(tol=1e-3).tolerance(torch.float64) == 1e-3
