"""`solve_qp`: every form of constraint, semidefinite and linear costs, every output, against independent answers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

import implicit_layers as il
from implicit_layers.testing import kkt_certificate, random_qp
from tests.differences import both_orders

F64 = torch.float64
INF = math.inf


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=F64)


def normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)


def boxed(n: int, n_ineq: int, n_eq: int, *, batch: tuple[int, ...] = (), seed: int = 0) -> dict[str, Tensor]:
    """A strictly convex program whose solution has some unknowns at each bound, clearly."""
    Q, p, A, b, G, h, z, *_ = random_qp(n, n_ineq, n_eq, batch=batch, seed=seed, condition=10.0, active=0.3)
    place = torch.rand(*batch, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    count = (n - n_eq - min(round(0.3 * n_ineq), n - n_eq) + 1) // 2  # so that the active ones stay independent
    order = place.argsort(-1).argsort(-1)
    bound = torch.where(order < count, torch.where(order % 2 == 0, 1.0, -1.0), 0.0).double()  # the sign of the dual
    lb = torch.where(bound < 0, z, z - 0.5 - place)
    ub = torch.where(bound > 0, z, z + 0.5 + place)
    return {"Q": Q, "p": p - bound, "A": A, "b": b, "G": G, "h": h, "lb": lb, "ub": ub}


def certificate(data: dict[str, Tensor], solution: il.QPSolution) -> Tensor:
    rows = {name: tensor for name, tensor in data.items() if name not in ("Q", "p")}
    bounds = {"lam_lb": solution.lam_lb if "lb" in data else None, "lam_ub": solution.lam_ub if "ub" in data else None}
    duals = {"nu": solution.nu if "A" in data else None, "lam": solution.lam if "G" in data else None}
    return kkt_certificate(data["Q"], data["p"], solution.z, **rows, **bounds, **duals)


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_a_box_has_a_closed_form() -> None:
    draw = normal(0)
    q, p = 0.5 + draw(7, 5).square(), 2 * draw(7, 5)
    lb, ub = -draw(7, 5).abs(), draw(7, 5).abs()
    solution = il.solve_qp(torch.diag_embed(q), p, lb=lb, ub=ub)
    free = -p / q
    expected = free.clamp(lb, ub)
    assert torch.allclose(solution.z, expected, atol=1e-14)
    pull = q * expected + p
    assert torch.allclose(solution.lam_lb, pull.clamp(min=0), atol=1e-13)
    assert torch.allclose(solution.lam_ub, (-pull).clamp(min=0), atol=1e-13)
    assert torch.allclose(solution.value, (0.5 * q * expected**2 + p * expected).sum(-1), atol=1e-13)


@pytest.mark.parametrize("size", [(1, 0, 0), (4, 0, 1), (6, 4, 2), (20, 20, 5)], ids=str)
def test_bounds_are_the_same_as_rows(size: tuple[int, int, int]) -> None:
    n, n_ineq, n_eq = size
    data = boxed(n, n_ineq, n_eq, batch=(6,), seed=1)
    solution = il.solve_qp(**data)
    assert certificate(data, solution).max() < 1e-12
    eye = torch.eye(n, dtype=F64).expand(6, n, n)
    G = torch.cat([data["G"], eye, -eye], dim=-2)
    h = torch.cat([data["h"], data["ub"], -data["lb"]], dim=-1)
    rows = il.solve_qp(data["Q"], data["p"], A=data["A"], b=data["b"], G=G, h=h)
    assert torch.allclose(solution.z, rows.z, atol=1e-10)
    lam, upper, lower = rows.lam.split([n_ineq, n, n], dim=-1)
    for found, expected in ((solution.lam, lam), (solution.lam_ub, upper), (solution.lam_lb, lower)):
        assert torch.allclose(found, expected, atol=1e-9)
    assert torch.allclose(solution.nu, rows.nu, atol=1e-9)


@pytest.mark.parametrize("size", [(1, 0, 0), (3, 0, 1), (4, 3, 1)], ids=str)
def test_derivatives_with_bounds_by_finite_differences(size: tuple[int, int, int]) -> None:
    """First and second order, both modes, every input, every output."""
    data = {name: t for name, t in boxed(*size, batch=(2,), seed=3).items() if t.numel()}

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        z, nu, lam, s, _, lam_lb, lam_ub, value, _ = il.solve_qp(**dict(zip(data, leaves, strict=True)))
        return tuple(part for part in (z, nu, lam, s, lam_lb, lam_ub, value) if part.numel())

    both_orders(function, *data.values())


@pytest.mark.parametrize("name", ["lb", "ub", "h"])
def test_an_infinite_entry_is_a_constraint_that_is_not_there(name: str) -> None:
    data = boxed(5, 4, 1, batch=(3,), seed=5)
    full = {**data, name: data[name].clone()}
    far = {**data, name: data[name].clone()}
    sign = -1.0 if name == "lb" else 1.0
    full[name][:, ::2] = sign * INF
    far[name][:, ::2] = sign * 1e6
    leaves = {key: value.clone().requires_grad_() for key, value in full.items()}
    solution, expected = il.solve_qp(**leaves), il.solve_qp(**far)
    assert torch.allclose(solution.z, expected.z, atol=1e-10) and torch.allclose(solution.lam, expected.lam, atol=1e-9)
    assert torch.isinf(solution.s[:, ::2]).all() == (name == "h")
    gradients = torch.autograd.grad(
        solution.z.sum() + solution.value.sum() + solution.lam.sum() + solution.lam_lb.sum(), list(leaves.values())
    )
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[list(leaves).index(name)][:, ::2].eq(0).all()


def test_a_fixed_unknown() -> None:
    data = boxed(4, 0, 1, batch=(3,), seed=2)
    data["lb"][:, 1] = data["ub"][:, 1] = 0.3
    solution = il.solve_qp(**{key: value for key, value in data.items() if key not in ("G", "h")})
    assert solution.z[:, 1].eq(0.3).all()
    rest = [0, 2, 3]
    Q, p, A, b = data["Q"], data["p"], data["A"], data["b"]
    smaller = il.solve_qp(
        Q[:, rest][:, :, rest],
        p[:, rest] + 0.3 * Q[:, rest, 1],
        A=A[..., rest],
        b=b - 0.3 * A[..., 1],
        lb=data["lb"][:, rest],
        ub=data["ub"][:, rest],
    )
    assert torch.allclose(solution.z[:, rest], smaller.z, atol=1e-11)


def test_one_bound_alone_and_bounds_for_the_whole_batch() -> None:
    p = normal(0)(4, 3)
    eye = torch.eye(3, dtype=F64)
    assert torch.allclose(il.solve_qp(eye, p, lb=torch.zeros(3, dtype=F64)).z, (-p).clamp(min=0))
    assert torch.allclose(il.solve_qp(eye, p, ub=torch.zeros(3, dtype=F64)).z, (-p).clamp(max=0))
    lb = torch.zeros(3, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(il.solve_qp(eye, p, lb=lb).z.sum(), lb)
    assert torch.allclose(gradient, (p > 0).double().sum(0))


@pytest.mark.parametrize("batch", [(0,), (2, 0), (), (2, 3)], ids=str)
@pytest.mark.parametrize("missing", [(), ("lb",), ("ub",), ("A", "b"), ("G", "h"), ("A", "b", "G", "h")], ids=str)
def test_any_subset_of_constraints_and_any_batch(batch: tuple[int, ...], missing: tuple[str, ...]) -> None:
    data = boxed(4, 3, 1, seed=7)
    data = {name: t for name, t in data.items() if name not in missing}
    data["p"] = data["p"].expand(*batch, 4).clone().requires_grad_()
    solution = il.solve_qp(**data)
    assert solution.z.shape == solution.lam_lb.shape == solution.lam_ub.shape == (*batch, 4)
    assert solution.value.shape == batch and all(field.shape == batch for field in solution.info)
    total = solution.z.sum() + solution.value.sum() + solution.lam_ub.sum()
    (gradient,) = torch.autograd.grad(total, data["p"])
    assert gradient.shape == data["p"].shape
    if 0 not in batch:
        assert certificate(data, solution).max() < 1e-12


@pytest.mark.parametrize(
    ("name", "value"), [("h", -INF), ("lb", INF), ("ub", -INF), ("h", math.nan), ("lb", math.nan), ("ub", math.nan)]
)
def test_infinities_that_no_point_satisfies_and_nan(name: str, value: float) -> None:
    data = boxed(4, 3, 1, seed=7)
    data[name][1] = value
    with pytest.raises(il.NonFiniteError, match=rf"{name}\[1\] is {value}"):
        il.solve_qp(**data)


def test_bounds_that_cross_are_infeasible() -> None:
    lb = tensor([0, 0], [0, 2], [0, 0])
    with pytest.raises(il.InfeasibleError, match="index 1"):
        il.solve_qp(torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64), lb=lb, ub=torch.ones(2, dtype=F64))


# --- projections, whose Jacobians are known -------------------------------------------------------------------------


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jacrev(function)(x)


def test_jacobians_of_projections() -> None:
    """Simplex, box, hyperplane, half-space and L1 ball, to 1e-8."""
    n = 6
    eye, ones = torch.eye(n, dtype=F64), torch.ones(1, n, dtype=F64)
    draw = normal(4)
    for _ in range(5):
        x = draw(n)

        def simplex(x: Tensor) -> Tensor:
            return il.solve_qp(eye, -x, A=ones, b=tensor(1.0), lb=torch.zeros(n, dtype=F64)).z

        support = (simplex(x) > 0).double()
        expected = torch.diag(support) - torch.outer(support, support) / support.sum()
        assert torch.allclose(jacobian(simplex, x), expected, atol=1e-8)

        def box(x: Tensor) -> Tensor:
            return il.solve_qp(eye, -x, lb=-0.5 * ones[0], ub=0.5 * ones[0]).z

        assert torch.allclose(jacobian(box, x), torch.diag((x.abs() < 0.5).double()), atol=1e-8)

        a = draw(1, n)

        def hyperplane(x: Tensor, a: Tensor = a) -> Tensor:
            return il.solve_qp(eye, -x, A=a, b=tensor(0.7)).z

        flat = eye - a.mT @ a / a.square().sum()
        assert torch.allclose(jacobian(hyperplane, x), flat, atol=1e-8)

        def half_space(x: Tensor, a: Tensor = a) -> Tensor:
            return il.solve_qp(eye, -x, G=a, h=tensor(-0.2)).z

        expected = flat if float(a[0] @ x) > -0.2 else eye
        assert torch.allclose(jacobian(half_space, x), expected, atol=1e-8)

        def ball(x: Tensor) -> Tensor:  # x = u − v, u, v ≥ 0, Σ(u + v) ≤ 1: the Hessian [I −I; −I I] is singular
            Q = torch.cat([torch.cat([eye, -eye], 1), torch.cat([-eye, eye], 1)])
            lower = torch.zeros(2 * n, dtype=F64)
            z = il.solve_qp(
                Q, torch.cat([-x, x]), G=torch.ones(1, 2 * n, dtype=F64), h=tensor(1.0), lb=lower, gradient="least_norm"
            ).z
            return z[:n] - z[n:]

        y = ball(x)
        sign = y.sign() * (y.abs() > 1e-9)
        expected = torch.diag(sign.abs()) - torch.outer(sign, sign) / sign.abs().sum()
        expected = expected if float(x.abs().sum()) > 1 else eye
        assert torch.allclose(jacobian(ball, x), expected, atol=1e-8)


# --- linear programs and semidefinite costs -------------------------------------------------------------------------


def linear(n: int, n_ineq: int, n_eq: int, seed: int) -> dict[str, Tensor]:
    """A linear program with one solution, a vertex: a random polytope inside a box."""
    draw = normal(seed)
    inside = draw(n)
    A, G = draw(n_eq, n), draw(n_ineq, n)
    data = {"Q": torch.zeros(n, n, dtype=F64), "p": draw(n), "A": A, "b": A @ inside, "G": G}
    return {**data, "h": G @ inside + draw(n_ineq).abs(), "lb": inside - 1.5, "ub": inside + 1.5}


@pytest.mark.parametrize("size", [(1, 0, 0), (4, 3, 1), (10, 20, 2), (30, 30, 10)], ids=str)
def test_a_linear_program_is_solved_exactly(size: tuple[int, int, int]) -> None:
    for seed in range(5):
        data = linear(*size, seed)
        solution = il.solve_qp(**data)
        bounds = list(zip(data["lb"].tolist(), data["ub"].tolist(), strict=True))
        rows = {"A_ub": data["G"], "b_ub": data["h"]} if size[1] else {}
        equal = {"A_eq": data["A"], "b_eq": data["b"]} if size[2] else {}
        expected = linprog(data["p"], bounds=bounds, **rows, **equal)
        assert np.allclose(solution.z, expected.x, atol=1e-9)
        assert abs(float(solution.value) - expected.fun) < 1e-9
        assert certificate(data, solution) < 1e-10


def test_the_gradient_of_a_vertex() -> None:
    """Where n independent constraints hold, z = (active rows)⁻¹ (their right sides), whatever the cost."""
    data = linear(5, 8, 1, 3)
    leaves = {name: value.clone().requires_grad_() for name, value in data.items()}
    solution = il.solve_qp(**leaves)
    weight = normal(9)(5)
    gradients = dict(zip(leaves, torch.autograd.grad(solution.z @ weight, list(leaves.values())), strict=True))
    assert gradients["p"].abs().max() < 1e-9
    rows = torch.cat([data["A"], data["G"][solution.lam > 0], torch.eye(5, dtype=F64)[solution.lam_ub > 0]])
    rows = torch.cat([rows, torch.eye(5, dtype=F64)[solution.lam_lb > 0]])
    assert rows.shape == (5, 5)
    found = torch.cat(
        [
            gradients["b"],
            gradients["h"][solution.lam > 0],
            gradients["ub"][solution.lam_ub > 0],
            gradients["lb"][solution.lam_lb > 0],
        ]
    )
    assert torch.allclose(found, torch.linalg.solve(rows.mT, weight), rtol=1e-8)


def test_the_least_of_many_solutions() -> None:
    """min z₀ over a box whose other unknowns do not matter, and over a simplex with two equal costs."""
    p = tensor(1.0, 0.0, 0.0).requires_grad_()
    solution = il.solve_qp(torch.zeros(3, 3, dtype=F64), p, lb=tensor(-1, -1, 2), ub=tensor(1, 3, 5))
    assert torch.allclose(solution.z, tensor(-1, 0, 2), atol=1e-9)
    with pytest.warns(il.DegenerateGradientWarning):
        (gradient,) = torch.autograd.grad(solution.z.sum(), p)
    assert gradient.abs().max() < 1e-9
    ones = torch.ones(1, 3, dtype=F64)
    solution = il.solve_qp(torch.zeros(3, 3, dtype=F64), tensor(1, 1, 2), A=ones, b=tensor(1), lb=tensor(0, 0, 0))
    assert torch.allclose(solution.z, tensor(0.5, 0.5, 0), atol=1e-9)
    assert int(solution.info.degenerate) & il.Degeneracy.PRIMAL


def test_a_rank_deficient_cost_with_one_solution() -> None:
    draw = normal(2)
    for seed in range(5):
        L = draw(8, 3)
        inside = draw(8)
        A, G = draw(2, 8), draw(12, 8)
        data = {"Q": L @ L.mT, "p": draw(8), "A": A, "b": A @ inside, "G": G, "h": G @ inside + draw(12).abs()}
        data |= {"lb": inside - 1, "ub": inside + 1}
        solution = il.solve_qp(**data)
        assert certificate(data, solution) < 1e-11, seed
        nearby = il.solve_qp(**{**data, "Q": data["Q"] + 1e-7 * torch.eye(8, dtype=F64)})
        assert torch.allclose(solution.z, nearby.z, atol=1e-4), seed


def test_derivatives_of_a_rank_deficient_program_by_finite_differences() -> None:
    """Q = LLᵀ has rank 1 and the equalities do the rest: K is regular, Q is not."""
    draw = normal(5)
    L, A, G = draw(3, 1), draw(1, 3), draw(2, 3)
    inside = draw(3)
    b, p = A @ inside, draw(3)
    h = G @ inside + tensor(0.5, 0.7)
    lb, ub = inside - 1, inside + 1

    def function(L: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        solution = il.solve_qp(L @ L.mT, p, A=A, b=b, G=G, h=h, lb=lb, ub=ub)
        return solution.z, solution.nu, solution.lam, solution.value

    both_orders(function, L, p, A, b, G, h)


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 6),
    n_ineq=st.integers(0, 8),
    n_eq=st.integers(0, 3),
    rank=st.integers(0, 6),
)
def test_integer_programs_are_solved_or_told_why_not(seed: int, n: int, n_ineq: int, n_eq: int, rank: int) -> None:
    """Ties, dependent rows, any rank of Q, bounds in places: feasible? bounded? against HiGHS; the value too."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).double()

    L, p, A, b = integers(n, rank), integers(n), integers(n_eq, n), integers(n_eq)
    G, h = integers(n_ineq, n), integers(n_ineq)
    Q = L @ L.mT
    lb = torch.where(integers(n) > 0, integers(n) - 2, -INF)
    ub = torch.where(integers(n) > 0, integers(n) + 2, INF)
    data = {"Q": Q, "p": p, "A": A, "b": b, "G": G, "h": h, "lb": lb, "ub": ub}
    solution = il.solve_qp(**data, on_failure="ignore")
    rows = {"A_ub": G, "b_ub": h} if n_ineq else {}
    equal = {"A_eq": A, "b_eq": b} if n_eq else {}
    bounds = list(zip(lb.tolist(), ub.tolist(), strict=True))
    feasible = linprog([0.0] * n, bounds=bounds, **rows, **equal).status == 0
    # bounded below: no direction d of the recession cone with Qd = 0 and p·d < 0
    cone = [(0.0 if low > -INF else -1.0, 0.0 if high < INF else 1.0) for low, high in bounds]
    rows = {"A_ub": G, "b_ub": torch.zeros_like(h)} if n_ineq else {}
    flat = torch.cat([A, Q])
    bounded = linprog(p, bounds=cone, **rows, A_eq=flat, b_eq=torch.zeros(len(flat))).fun > -1e-9
    status = int(solution.info.status)
    if not feasible:
        assert status == il.Status.INFEASIBLE
    elif not bounded:
        assert status == il.Status.UNBOUNDED
    else:
        assert status == il.Status.CONVERGED
        assert certificate(data, solution) < 1e-8


def test_unbounded_programs_are_named() -> None:
    Q = torch.zeros(3, 2, 2, dtype=F64)
    Q[0] = torch.eye(2)
    p = tensor([1, 1], [1, 1], [-1, 1])
    with pytest.raises(il.UnboundedError, match=r"index 2"):
        il.solve_qp(Q, p, lb=tensor(0, 0))
    solution = il.solve_qp(Q, p, lb=tensor(0, 0), on_failure="ignore")
    assert solution.info.status.tolist() == [0, 0, int(il.Status.UNBOUNDED)]
    with pytest.raises(il.UnboundedError):
        il.solve_qp(torch.zeros(2, 2, dtype=F64), tensor(1, 0))


def test_a_failed_neighbour_of_each_kind_changes_nothing() -> None:
    draw = normal(3)
    Q = torch.stack([torch.eye(2, dtype=F64), torch.eye(2, dtype=F64), torch.zeros(2, 2, dtype=F64), torch.eye(2)])
    p, h = draw(4, 2), tensor([1, 1], [-1, -1], [1, INF], [2, 2])
    p[2] = tensor(0, 1)
    G = tensor([1, 0], [-1, 0])
    leaves = [t.clone().requires_grad_() for t in (Q, p, h)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = il.solve_qp(leaves[0], leaves[1], G=G, h=leaves[2], on_failure="ignore")
    assert solution.info.status.tolist() == [0, int(il.Status.INFEASIBLE), int(il.Status.UNBOUNDED), 0]
    gradients = torch.autograd.grad(solution.z.sum() + solution.value.sum(), leaves)
    assert all(gradient[1:3].eq(0).all() for gradient in gradients)
    good = [0, 3]
    alone = [t[good].clone().requires_grad_() for t in (Q, p, h)]
    expected = il.solve_qp(alone[0], alone[1], G=G, h=alone[2])
    assert torch.allclose(solution.z[good], expected.z, atol=1e-12)
    theirs = torch.autograd.grad(expected.z.sum() + expected.value.sum(), alone)
    assert all(torch.allclose(x[good], y, atol=1e-10) for x, y in zip(gradients, theirs, strict=True))


def test_a_thousand_known_solutions() -> None:
    """15 unknowns, 10 inequalities, half of them active, 3 equalities: at most 25 iterations, residual 1e-8."""
    for form in ("auto", "condensed"):
        problem = random_qp(15, 10, 3, batch=(1000,), seed=0, active=0.5)
        Q, p, A, b, G, h, z, nu, lam = problem
        solution = il.solve_qp(Q, p, A=A, b=b, G=G, h=h, solver=il.InteriorPoint(form=form))
        assert solution.info.iterations.max() <= 25
        found = kkt_certificate(Q, p, solution.z, solution.nu, solution.lam, A=A, b=b, G=G, h=h)
        assert found.max() <= 1e-8 and solution.info.residual.max() <= 1e-8
        for ours, known in ((solution.z, z), (solution.nu, nu), (solution.lam, lam)):
            assert torch.allclose(ours, known, atol=1e-9), form


# --- units ----------------------------------------------------------------------------------------------------------


def test_badly_scaled_rows_columns_and_bounds() -> None:
    data = boxed(12, 10, 3, batch=(8,), seed=5)
    expected = il.solve_qp(**data).z
    generator = torch.Generator().manual_seed(0)
    columns = 10 ** (12 * torch.rand(12, generator=generator, dtype=F64) - 6)
    rows = 10 ** (12 * torch.rand(10, generator=generator, dtype=F64) - 6)
    scaled = {
        "Q": data["Q"] * columns * columns[:, None],
        "p": data["p"] * columns,
        "A": data["A"] * columns,
        "b": data["b"],
        "G": data["G"] * columns * rows[:, None],
        "h": data["h"] * rows,
        "lb": data["lb"] / columns,
        "ub": data["ub"] / columns,
    }
    solution = il.solve_qp(**scaled)
    assert torch.allclose(solution.z * columns, expected, atol=1e-7)


def test_float32_in_float32() -> None:
    """`precision="native"`: residual near 1e-6 up to condition 1e4, gradients of the same dtype and near the exact."""
    for condition in (10.0, 1e4):
        problem = random_qp(20, 20, 5, batch=(16,), seed=6, condition=condition)
        data = dict(zip(("Q", "p", "A", "b", "G", "h"), problem[:6], strict=True))
        single = {name: value.float().requires_grad_() for name, value in data.items()}
        solution = il.solve_qp(**single, solver=il.InteriorPoint(precision="native"))
        assert solution.z.dtype == torch.float32
        double = {name: value.detach().double().requires_grad_() for name, value in single.items()}
        exact = il.solve_qp(**double)
        found = kkt_certificate(
            *(double[name] for name in ("Q", "p")),
            solution.z, solution.nu, solution.lam,
            **{name: double[name] for name in ("A", "b", "G", "h")},
        )  # fmt: skip
        assert found.max() < 5e-6, condition
        gradients = torch.autograd.grad(solution.z.sum(), list(single.values()))
        expected = torch.autograd.grad(exact.z.sum(), list(double.values()))
        for ours, theirs in zip(gradients, expected, strict=True):
            assert ours.dtype == torch.float32
            assert (ours.double() - theirs).abs().max() <= 1e-4 * max(condition / 10, 1.0) * theirs.abs().max()


# --- found by review ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [1e-6, 1e-8, 1e-10])
def test_a_nearly_singular_cost_without_constraints(small: float) -> None:
    """It used to raise IndexError, and any curvature at all means that there is a minimum."""
    c = tensor([0.6, 0.8], [-0.8, 0.6])
    Q = torch.stack([c @ torch.diag(tensor(1, small)) @ c.mT, torch.eye(2, dtype=F64)])
    p = torch.full((2,), 0.3, dtype=F64)
    solution = il.solve_qp(Q, p, on_failure="ignore")
    assert int(solution.info.status[1]) == il.Status.CONVERGED and torch.allclose(solution.z[1], -p)
    assert int(solution.info.status[0]) != il.Status.UNBOUNDED
    if small >= 1e-8:
        assert torch.allclose(solution.z[0], -torch.linalg.solve(Q[0], p), rtol=1e-6)


def test_float32_rounding_makes_nothing_unbounded() -> None:
    """Linear programs whose cost is a combination of their rows, and least squares of any rank, have solutions."""
    draw = normal(4)
    G = draw(50, 3, 5).float()
    p = -(G.mT @ draw(50, 3, 1).float().abs()).squeeze(-1)
    solution = il.solve_qp(torch.zeros(5, 5), p, G=G, h=torch.ones(50, 3))
    assert solution.info.converged.all()
    with pytest.raises(il.UnboundedError):
        il.solve_qp(torch.zeros(5, 5), p + 0.01, G=G, h=torch.ones(50, 3))
    M, y = draw(50, 2, 4).float(), draw(50, 2, 1).float()
    assert il.solve_qp(M.mT @ M, -(M.mT @ y).squeeze(-1)).info.converged.all()


def test_float32_rows_that_depend_on_each_other_but_for_rounding() -> None:
    draw = normal(5)
    A = draw(50, 2, 5).float()
    A = torch.cat([A, A[:, :1] + A[:, 1:], 0.3 * A[:, :1]], dim=1)
    z = draw(50, 5).float().abs()
    solution = il.solve_qp(torch.eye(5), draw(5).float(), A=A, b=(A @ z.unsqueeze(-1)).squeeze(-1), lb=torch.zeros(5))
    assert solution.info.converged.all()


def test_bounds_that_cross_by_rounding_hold_at_one_value() -> None:
    draw = normal(6)
    c, q = 10 * draw(50, 5).float().abs(), draw(50, 5).float().abs()
    solution = il.solve_qp(torch.eye(5), torch.zeros(5), lb=torch.maximum(c, (c - q) + q), ub=torch.minimum(c, c))
    assert torch.allclose(solution.z, c, rtol=1e-5)
    assert torch.equal(il.solve_qp(tensor([1.0]), tensor(0.0), lb=tensor(1 + 2e-16), ub=tensor(1.0)).z, tensor(1.0))
    with pytest.raises(il.InfeasibleError):
        il.solve_qp(tensor([1.0]), tensor(0.0), lb=tensor(1 + 1e-12), ub=tensor(1.0))


def test_failed_problems_have_zero_gradient_through_every_output() -> None:
    Q, p = torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64)
    G = tensor([1, 0], [-1, 0]).requires_grad_()
    h = tensor([1, 1], [-1, -1]).requires_grad_()
    solution = il.solve_qp(Q, p, G=G, h=h, on_failure="ignore")
    total = sum(part[1].sum() for part in (*solution[:4], *solution[5:8]))
    for gradient in torch.autograd.grad(total, (G, h)):
        assert gradient.eq(0).all()
    endless = il.solve_qp(
        torch.zeros(1, 1, dtype=F64),
        tensor(1.0),
        G=tensor([1.0], [1.0]),
        h=h[0] - 1,
        infeasible="nearest",
        on_failure="ignore",
    )
    assert torch.autograd.grad(endless.shift.h.sum() + endless.s.sum(), h)[0].eq(0).all()


def test_nearest_under_vmap() -> None:
    def shift(h: Tensor) -> Tensor:
        G = tensor([1.0], [-1.0])
        solution = il.solve_qp(tensor([1.0]), tensor(0.0), G=G, h=h, infeasible="nearest", gradient="least_norm")
        return solution.shift.h

    h = tensor([1, 1], [-1, -3])
    assert torch.allclose(torch.func.vmap(shift)(h), tensor([0, 0], [2, 2]))
    J = torch.func.vmap(torch.func.jacrev(shift))(h)
    assert torch.allclose(J, tensor([[0, 0], [0, 0]], [[-0.5, -0.5], [-0.5, -0.5]]), atol=1e-9)


def test_choices_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="nearest"):
        il.solve_qp(torch.eye(2), torch.ones(2), gradient="smoothed", infeasible="nearest")
    for wrong in ({"gradient": "clever"}, {"smoothing": -1.0}, {"infeasible": "x"}, {"lb": 1.0, "ub": 0.0}):
        with pytest.raises(ValueError):
            il.nn.QPLayer(3, **wrong)  # type: ignore[arg-type]
    G = tensor([1.0], [-1.0])
    with pytest.raises(il.ConvergenceError, match="satisfies every inequality strictly"):
        il.solve_qp(tensor([1.0]), tensor(0.0), G=G, h=tensor(0.0, 0.0), gradient="smoothed")
