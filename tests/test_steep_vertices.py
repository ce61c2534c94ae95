"""Ill-conditioned vertices with many more rows than unknowns, against fifty digits: points, duals, gradients."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import implicit_layers as il
from benchmarks.problems import dense
from implicit_layers.kkt import condensed, quadratic
from implicit_layers.kkt.program import Data, Program
from implicit_layers.solvers import active_set, dual_path
from tests.steep_vertices import Steep, steep

TORCH = il.InteriorPoint(backend="torch", form="condensed")
SOLVERS = {
    "condensed": TORCH,
    "automatic": il.InteriorPoint(backend="torch"),
    "with the kernel": il.InteriorPoint(),
    "without questions": il.InteriorPoint(backend="torch", check_every=0),
}
CASES = {  # n, n_ineq, active rows, how parallel, condition of Q
    "well conditioned": (20, 100, 20, 1.0, 1e2),
    "vertex": (20, 100, 20, 1e-3, 1e4),
    "edge": (20, 100, 18, 1e-5, 1e2),
    "many rows": (20, 400, 20, 1e-5, 1e4),
    "steep cost": (20, 100, 20, 1e-4, 1e8),
    "nearly dependent": (20, 100, 12, 1e-6, 10.0),
    "few rows, steeper cost": (20, 100, 5, 1.0, 1e11),
    "steep for float32": (20, 100, 16, 3e-3, 10.0),
    "one unknown": (1, 8, 1, 1.0, 1.0),
    "two unknowns, steep cost": (2, 4, 2, 1.0, 1e8),
    "two unknowns, steeper cost": (2, 4, 2, 1.0, 1e10),
    "two rows an unknown, vertex": (10, 20, 10, 1e-3, 1e8),
    "two rows an unknown, edge": (10, 20, 8, 1e-4, 1e6),
}
EPS = torch.finfo(torch.float64).eps


class Found(NamedTuple):
    """An answer and the gradients of the loss of `Steep`."""

    solution: il.QPSolution
    z: Tensor
    lam: Tensor
    by_p: Tensor
    by_h: Tensor


def found(case: Steep, solver: il.InteriorPoint) -> Found:
    """Solve and differentiate."""
    p, h = (tensor.clone().requires_grad_() for tensor in (case.p, case.h))
    solution = il.solve_qp(case.Q, p, G=case.G, h=h, solver=solver)
    values = torch.cat([solution.z, solution.lam], dim=-1).double()
    by_p, by_h = torch.autograd.grad((case.weight * values).sum(), (p, h))
    return Found(solution, solution.z.detach(), solution.lam.detach(), by_p, by_h)


def excess(case: Steep, answer: Found) -> float:
    """The largest error in units of what is attainable: ten times eps times the condition, and the data's rounding."""
    floor = 1e-13 if case.p.dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
    worst = 0.0
    for name in ("z", "lam", "by_p", "by_h"):
        for i, truth in enumerate(case.truths):
            exact = getattr(truth, name)
            error = (getattr(answer, name)[i].double() - exact).abs().max() / exact.abs().max()
            worst = max(worst, float(error) / (10 * EPS * truth.condition + floor))
    return worst


@cache
def drawn(kind: str, **options: object) -> Steep:
    """Three programs of a kind."""
    n, n_ineq, active, parallel, spread = CASES[kind]
    return steep(n, n_ineq, batch=3, seed=1, active=active, parallel=parallel, spread=spread, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", CASES)
def test_everything_is_as_good_as_the_condition_allows(kind: str, solver: str) -> None:
    case = drawn(kind)
    answer = found(case, SOLVERS[solver])
    assert answer.solution.info.converged.all() and not answer.solution.info.degenerate.any()
    assert answer.solution.info.residual.max() < 1e-14
    assert excess(case, answer) < 1.0


@pytest.mark.parametrize("kind", CASES)
def test_the_condition_is_told_honestly(kind: str) -> None:
    case = drawn(kind)
    told = found(case, TORCH).solution.info.condition.tolist()
    for estimate, truth in zip(told, case.truths, strict=True):
        assert 1e-2 * truth.condition < estimate < 10 * truth.condition


@pytest.mark.parametrize("kind", ["vertex", "edge", "nearly dependent"])
def test_shared_matrices(kind: str) -> None:
    case = drawn(kind, shared=True)
    assert case.Q.shape[0] == case.G.shape[0] == 1
    assert excess(case, found(case, TORCH)) < 1.0


@pytest.mark.parametrize("kind", ["well conditioned", "steep for float32", "one unknown"])
@pytest.mark.parametrize("shared", [False, True])
def test_float32_data(kind: str, shared: bool) -> None:
    case = drawn(kind, shared=shared, dtype=torch.float32)
    answer = found(case, TORCH)
    assert answer.z.dtype == torch.float32
    assert excess(case, answer) < 1.0


def test_one_by_one() -> None:
    case = drawn("nearly dependent")
    whole = found(case, TORCH)
    for i, truth in enumerate(case.truths):
        single = Steep(case.Q[i], case.p[i], case.G[i], case.h[i], case.weight, [truth])
        answer = found(single, TORCH)
        assert excess(single, answer._replace(z=answer.z[None], lam=answer.lam[None], by_p=answer.by_p[None],
                                              by_h=answer.by_h[None])) < 1.0  # fmt: skip
        assert (answer.z - whole.z[i]).abs().max() < 1e-8


@pytest.mark.parametrize("kind", ["edge", "many rows", "nearly dependent", "few rows, steeper cost"])
def test_without_the_sharp_factor_the_answers_are_wrong_and_the_tests_see_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(condensed, "_SLOW", torch.inf)
    case = drawn(kind)
    answer = found(case, TORCH)
    assert answer.solution.info.converged.all()
    assert excess(case, answer) > 1.0


def test_ordinary_neighbours_stay_as_they_are() -> None:
    case, others = drawn("nearly dependent"), dense(20, 100, 0, 4)
    alone = [torch.zeros(())] * 2
    gradients = []
    for hard in (False, True):
        parts = [(others.Q, case.Q), (others.p, case.p), (others.G, case.G), (others.h, case.h)]
        Q, p, G, h = (torch.cat(pair) if hard else pair[0] for pair in parts)
        p = p.clone().requires_grad_()
        solution = il.solve_qp(Q, p, G=G, h=h, solver=TORCH)
        gradients.append(torch.autograd.grad((others.c[:1] * solution.z[:4]).sum(), p)[0][:4])
        alone[hard] = solution.z[:4].detach()
    assert (alone[0] - alone[1]).abs().max() < 1e-12
    assert (gradients[0] - gradients[1]).abs().max() < 1e-11


@pytest.mark.parametrize("ask", [False, True])
def test_a_factor_from_the_active_set_alone(ask: bool) -> None:
    """What compiled functions keep of a solve: the adjoint is as good."""
    case = drawn("edge")
    n, n_ineq = case.p.shape[-1], case.h.shape[-1]
    data = Data(case.Q, case.p, case.G, case.h, None, None, 0)
    active = (case.stacked("lam") > 0).double()
    factor = condensed.factorise(data, active, torch.zeros_like(case.p), ask=ask)
    assert factor.sharp.all()
    r_z, r_y = case.weight[:n].expand(3, n), case.weight[n:].expand(3, n_ineq)
    u_z, u_y, _ = condensed.solve(factor, case.Q, case.G, r_z, r_y, None, 0)
    answer = found(case, TORCH)._replace(by_p=-u_z, by_h=u_y)
    assert excess(case, answer) < 1.0


@pytest.mark.parametrize("kind", ["compliance", "fixed"])
def test_a_sharp_factor_of_elastic_rows_and_fixed_unknowns(kind: str) -> None:
    """The system itself is satisfied to rounding."""
    case = drawn("vertex")
    active = (case.stacked("lam") > 0).double()
    fixed = torch.zeros_like(case.p)
    compliance = None
    if kind == "fixed":
        fixed[:, 0], active = 1.0, active * (active.cumsum(-1) <= 17)
    else:
        compliance = 1e-9 + torch.linspace(0, 3, case.h.shape[-1], dtype=torch.float64)[None] ** 8
    data = Data(case.Q, case.p, case.G, case.h, None, None, 0, compliance)
    factor = condensed.factorise(data, active, fixed)
    factor = condensed.sharpened(Program.of(data), factor, torch.ones(3, dtype=torch.bool), ask=True)
    assert factor.sharp.all()
    r_z, r_y = torch.ones_like(case.p), torch.ones_like(case.h)
    u_z, u_y, _ = condensed.solve(factor, case.Q, case.G, r_z, r_y, torch.zeros_like(case.p), 0)
    soft = 0.0 if compliance is None else compliance
    free = 1.0 - fixed
    left = free * (r_z - quadratic.matvec(case.Q, u_z) - quadratic.transposed_matvec(case.G, u_y))
    rows = active * (r_y - quadratic.matvec(case.G, u_z) + soft * u_y)
    size = max(1.0, float(u_z.abs().max()), float(u_y.abs().max()))
    assert max(float(left.abs().max()), float(rows.abs().max())) < 1e-13 * size
    assert not (fixed * u_z).any()


# --- other ways to have many rows -----------------------------------------------------------------------------------


def rows_of(kind: str, n: int = 8, m: int = 64, batch: int = 6) -> tuple[Tensor, Tensor]:
    """G and h, all around a point."""
    generator = torch.Generator().manual_seed(len(kind))
    G = torch.randn(batch, m, n, generator=generator, dtype=torch.float64)
    inside = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    h = quadratic.matvec(G, inside) + torch.rand(batch, m, generator=generator, dtype=torch.float64)
    half = m // 2
    if kind in ("duplicates", "almost duplicates"):
        off = 1e-9 if kind == "almost duplicates" else 0.0
        G[:, half:] = G[:, :half] + off * torch.randn(batch, half, n, generator=generator, dtype=torch.float64)
        h[:, half:] = h[:, :half] + off
    elif kind == "no such rows":
        h[:, ::3] = torch.inf
    elif kind == "one vertex":
        h = quadratic.matvec(G, inside)
    elif kind == "whole numbers":
        G, h = G.round(), h.abs().round()
    elif kind == "rows of zeros":
        G[:, ::4], h[:, ::4] = 0.0, 1.0
    return G, h


@pytest.mark.parametrize("condition", [10.0, 1e6])
@pytest.mark.parametrize(
    "kind", ["duplicates", "almost duplicates", "no such rows", "one vertex", "whole numbers", "rows of zeros"]
)
def test_degenerate_rows_like_the_dual_form(kind: str, condition: float) -> None:
    """Both forms, which have no linear algebra in common, agree on points, statuses and gradients that exist."""
    G, h = rows_of(kind)
    n = G.shape[-1]
    generator = torch.Generator().manual_seed(5)
    V = torch.linalg.qr(torch.randn(6, n, n, generator=generator, dtype=torch.float64))[0]
    Q = V * torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64) @ V.mT
    p = 3.0 * torch.randn(6, n, generator=generator, dtype=torch.float64)
    answers = []
    for form in ("condensed", "dual"):
        there = torch.isfinite(h[0]) if form == "dual" else torch.ones_like(h[0], dtype=torch.bool)
        leaf = p.clone().requires_grad_()
        solver = il.InteriorPoint(backend="torch", form=form)  # type: ignore[arg-type]
        solution = il.solve_qp(Q, leaf, G=G[:, there], h=h[:, there], solver=solver, gradient="least_norm")
        value = torch.linspace(1, 2, n, dtype=torch.float64) * solution.z
        unique = solution.info.degenerate == 0
        gradient = torch.autograd.grad(value[unique].sum(), leaf)[0] if unique.any() else torch.zeros_like(p)
        answers.append((solution.z.detach(), gradient, unique))
    (z, gradient, unique), (other_z, other_gradient, other_unique) = answers
    both = unique & other_unique
    assert both.any() or kind in ("duplicates", "almost duplicates", "one vertex", "whole numbers")
    scale = z.abs().amax(-1, keepdim=True).clamp(min=1e-3)
    assert ((z - other_z) / scale).abs().max() < 1e-9 * condition**0.5
    assert torch.allclose(gradient[both], other_gradient[both], rtol=1e-8, atol=1e-9 * condition)


def test_bounds_like_rows() -> None:
    case = dense(10, 60, 0, 8)
    at = torch.linalg.vector_norm(case.p, dim=-1, keepdim=True) * 0.05
    eye = torch.eye(10, dtype=torch.float64).expand(8, 10, 10)
    answers = []
    for bounds in (True, False):
        p = case.p.clone().requires_grad_()
        box = at.expand_as(p)
        if bounds:
            solution = il.solve_qp(case.Q, p, G=case.G, h=case.h + 2, lb=-box, ub=box, solver=TORCH)
        else:
            G, h = torch.cat([case.G, eye, -eye], 1), torch.cat([case.h + 2, box, box], 1)
            solution = il.solve_qp(case.Q, p, G=G, h=h, solver=TORCH)
        answers.append((solution.z.detach(), torch.autograd.grad((case.c * solution.z).sum(), p)[0]))
    for one, other in zip(*answers, strict=True):
        assert (one - other).abs().max() < 1e-11


# --- kernels an iteration -------------------------------------------------------------------------------------------

# what an iteration may ask of ATen, its test of convergence included, and what of that is work for the device
DUAL_CALLS, DUAL_KERNELS = 53, 40
CONDENSED_CALLS, CONDENSED_KERNELS = 227, 170
_NO_KERNEL = {"aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}


class Kernels(TorchDispatchMode):
    """Count the operations, and those among them that are more than a view or an allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.calls += 1
        self.count += not view and func._schema.name not in _NO_KERNEL
        return func(*args, **(kwargs or {}))


def more(few: Kernels, many: Kernels) -> tuple[int, int]:
    """What one iteration more takes: calls and kernels."""
    return many.calls - few.calls, many.count - few.count


def test_counting_kernels() -> None:
    x = torch.ones(2, 3)
    with Kernels() as kernels:
        torch.empty_like(x).copy_(x.mT.unsqueeze(0).squeeze(0).mT + x)
    assert (kernels.calls, kernels.count) == (7, 2)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("n_eq", [0, 3])
def test_kernels_of_a_condensed_iteration(n_eq: int, batch: int, bounded: bool) -> None:
    """No more for a larger batch; without questions of the host, one iteration more or less."""
    case = dense(20, 100, n_eq, batch)
    lb = torch.full((1, 20), -9.0, dtype=torch.float64) if bounded else None
    data = Data(case.Q, case.p, torch.cat([case.A, case.G], 1), torch.cat([case.b, case.h], 1), lb, None, n_eq)
    counts = []
    for steps in (3, 4):
        with Kernels() as kernels:
            il.InteriorPoint(check_every=0, max_iter=steps).solve(data, batch)
        counts.append(kernels)
    calls, count = more(*counts)
    assert 0 < count <= CONDENSED_KERNELS
    assert calls <= CONDENSED_CALLS


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("n_eq", [0, 3])
def test_kernels_of_a_dual_iteration(n_eq: int, batch: int) -> None:
    """While all programs of the batch go on."""
    case = dense(20, 30, n_eq, batch)
    E, f = torch.cat([case.A, case.G], 1), torch.cat([case.b, case.h], 1)
    chol, _ = quadratic.check_definite(case.Q)
    reduced = quadratic.reduce(chol, case.p, E, f, n_eq, active_set.RIDGE)
    counts = []
    for steps in (2, 3):
        path = dual_path._CentralPath(active_set.Program(case.Q, case.p, E, f, n_eq, reduced), batch)
        path.begin()
        with Kernels() as kernels:
            path.advance(0.0, steps)
        counts.append(kernels)
    calls, count = more(*counts)
    assert 0 < count <= DUAL_KERNELS
    assert calls <= DUAL_CALLS
