"""`solve_qp`: answers, gradients, broadcasting, refusals, failures."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import implicit_layers as il
from implicit_layers.reference import exact_qp, program
from implicit_layers.testing import QPProblem, kkt_certificate, random_qp
from tests.differences import both_orders

SIZES = [(1, 1, 0), (5, 0, 3), (10, 10, 0), (20, 20, 5), (50, 50, 10), (100, 100, 50)]
NAMES = ("Q", "p", "A", "b", "G", "h")


def solve(problem: QPProblem, **options: object) -> il.QPSolution:
    Q, p, A, b, G, h, *_ = problem
    return il.solve_qp(Q, p, A=A, b=b, G=G, h=h, **options)  # type: ignore[arg-type]


def relative_error(found: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(1,), (7,), (128,)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_known_solutions(size: tuple[int, int, int], batch: tuple[int, ...]) -> None:
    """z, nu, lam drawn beforehand are found again to rounding, over 20 seeds."""
    n, n_ineq, n_eq = size
    for seed in range(20):
        problem = random_qp(n, n_ineq, n_eq, batch=batch, seed=seed)
        solution = solve(problem)
        for found, expected in ((solution.z, problem.z), (solution.nu, problem.nu), (solution.lam, problem.lam)):
            assert relative_error(found, expected) < 1e-9, seed
        assert solution.info.converged.all() and solution.info.residual.max() < 1e-12


def exact_gradients(leaves: list[Tensor], weights: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the weighted sum of z, nu, lam by plain autograd through a dense solve on the active set."""
    Q, p, A, b, G, h = leaves
    with torch.no_grad():
        guess = solve(QPProblem(*leaves, p, b, h)).lam > 0
    exact = exact_qp(program(0.5 * (Q + Q.mT), p, A=A, b=b, G=G, h=h), guess)
    loss = sum((weight * part).sum() for weight, part in zip(weights, (exact.z, exact.nu, exact.lam), strict=True))
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))


def compare_gradients(size: tuple[int, int, int], batch: int, seed: int) -> float:
    n, n_ineq, n_eq = size
    problem = random_qp(n, n_ineq, n_eq, batch=(batch,), seed=seed)
    leaves = [tensor.clone().requires_grad_() for tensor in problem[:6]]
    solution = solve(QPProblem(*leaves, *problem[6:]))
    generator = torch.Generator().manual_seed(seed)
    parts = (solution.z, solution.nu, solution.lam)
    weights = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in parts]
    loss = sum((weight * part).sum() for weight, part in zip(weights, parts, strict=True))
    ours = torch.autograd.grad(loss, leaves, allow_unused=True)
    exact = exact_gradients(leaves, weights)
    worst = 0.0
    for name, found, expected in zip(NAMES, ours, exact, strict=True):
        if expected is None or expected.numel() == 0:
            continue
        assert found is not None, name
        worst = max(worst, relative_error(found, expected))
    return worst


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_equal_those_of_a_dense_active_set_solve(size: tuple[int, int, int]) -> None:
    for seed in range(20 if size[0] <= 20 else 4):
        assert compare_gradients(size, 7 if size[0] <= 20 else 2, seed) < 1e-8, seed


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 7, 128])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_of_every_batch_and_seed(size: tuple[int, int, int], batch: int) -> None:
    for seed in range(20):
        assert compare_gradients(size, batch, seed) < 1e-8, seed


@pytest.mark.parametrize("size", [(1, 1, 0), (3, 0, 2), (3, 4, 0), (3, 4, 1), (2, 0, 0)], ids=str)
def test_derivatives_by_finite_differences(size: tuple[int, int, int]) -> None:
    """First and second order, reverse and forward mode, every input, every output (z, nu, lam, s)."""
    problem = random_qp(*size, batch=(2,), seed=3, condition=10.0)
    kept = [name for name, tensor in zip(NAMES, problem, strict=False) if tensor.numel()]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        data = dict(zip(kept, leaves, strict=True))
        return tuple(part for part in il.solve_qp(**data)[:4] if part.numel())  # type: ignore[arg-type]

    both_orders(function, *(tensor for tensor in problem[:6] if tensor.numel()))


def test_a_planted_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test of the tester: OptNet's printed formula for G, with λ missing, must not pass."""
    from implicit_layers.qp import derivative
    from implicit_layers.solvers import compiled

    monkeypatch.setattr(compiled, "_kernel", None)  # it forms these gradients itself: see test_compiled.py
    right = derivative._matrix_gradients

    def wrong(adjoint: tuple[Tensor, ...], point: tuple[Tensor, ...], *rest: object) -> list[Tensor | None]:
        grad_Q, grad_A, grad_G = right(adjoint, point, *rest)  # type: ignore[arg-type]
        return [grad_Q, grad_A, None if grad_G is None else grad_G * point[2].unsqueeze(-1)]

    monkeypatch.setattr(derivative, "_matrix_gradients", wrong)
    with pytest.raises(AssertionError):
        assert compare_gradients((10, 10, 0), 2, 0) < 1e-8


def test_q_counts_by_its_symmetric_part() -> None:
    problem = random_qp(4, 3, 1, seed=1)
    skew = torch.triu(torch.ones(4, 4, dtype=torch.float64), 1)
    Q = (problem.Q + skew - skew.mT).requires_grad_()
    solution = il.solve_qp(Q, problem.p, A=problem.A, b=problem.b, G=problem.G, h=problem.h)
    assert torch.allclose(solution.z, problem.z)
    (gradient,) = torch.autograd.grad(solution.z.sum(), Q)
    assert torch.equal(gradient, gradient.mT)


def test_equalities_only_take_no_iterations() -> None:
    solution = solve(random_qp(6, 0, 3, batch=(5,)))
    assert solution.info.iterations.eq(0).all() and solution.lam.shape == (5, 0)


def test_without_constraints() -> None:
    problem = random_qp(6, batch=(5,))
    z = il.solve_qp(problem.Q, problem.p).z
    assert (
        relative_error(z, -torch.cholesky_solve(problem.p.unsqueeze(-1), torch.linalg.cholesky(problem.Q))[..., 0])
        < 1e-12
    )


def test_strictly_feasible_direction_of_zero_dual_step() -> None:
    """qpth's wrong answer (0, 0.5): min ½‖x‖² + p·x, x ≥ 0, at p = (0, −1)."""
    eye = torch.eye(2, dtype=torch.float64)
    solution = il.solve_qp(eye, torch.tensor([0.0, -1.0], dtype=torch.float64), G=-eye, h=torch.zeros(2).double())
    assert torch.equal(solution.z, torch.tensor([0.0, 1.0], dtype=torch.float64))


# --- hard, but not refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-8, 1e-4, 1e6])
@pytest.mark.parametrize("what", ["cost", "rows", "unknowns"])
def test_units_do_not_matter(what: str, factor: float) -> None:
    Q, p, A, b, G, h, z, _, _ = random_qp(20, 20, 5, batch=(8,), seed=5)
    if what == "cost":
        scaled = (Q * factor, p * factor, A, b, G, h)
    elif what == "rows":
        scaled = (Q, p, A * factor, b * factor, G * factor, h * factor)
    else:
        scaled, z = (Q * factor**2, p * factor, A * factor, b, G * factor, h), z / factor
    solution = solve(QPProblem(*scaled, z, b, h))
    assert relative_error(solution.z, z) < 1e-10 and solution.info.residual.max() < 1e-12


def test_badly_scaled_rows_and_columns() -> None:
    Q, p, A, b, G, h, z, _, _ = random_qp(20, 20, 5, batch=(8,), seed=5)
    generator = torch.Generator().manual_seed(0)
    columns = 10 ** (12 * torch.rand(20, generator=generator, dtype=torch.float64) - 6)
    rows = 10 ** (12 * torch.rand(8, 20, 1, generator=generator, dtype=torch.float64) - 6)
    solution = il.solve_qp(
        Q * columns * columns[:, None], p * columns, A=A * columns, b=b, G=G * columns * rows, h=h * rows[..., 0]
    )
    assert relative_error(solution.z * columns, z) < 1e-8


@pytest.mark.parametrize("condition", [1e4, 1e8, 1e10])
def test_ill_conditioned_cost(condition: float) -> None:
    problem = random_qp(20, 20, 5, batch=(16,), seed=5, condition=condition)
    solution = solve(problem)
    assert relative_error(solution.z, problem.z) < 1e-15 * condition * 100


def test_many_more_rows_than_unknowns() -> None:
    problem = random_qp(10, 200, 2, batch=(8,), seed=1, active=0.03)
    assert relative_error(solve(problem).z, problem.z) < 1e-10


def test_duplicated_rows_share_their_dual() -> None:
    """The solution is right, the duals the least-norm choice, and the gradient says that it is not unique."""
    Q, p, A, b, G, h, z, nu, lam = random_qp(6, 5, 2, seed=2)
    twice = solve(
        QPProblem(Q, p, torch.cat([A, A]), torch.cat([b, b]), torch.cat([G, G]), torch.cat([h, h]), z, nu, lam)
    )
    assert relative_error(twice.z, z) < 1e-10
    assert relative_error(twice.lam[:5] + twice.lam[5:], lam) < 1e-8
    assert relative_error(twice.nu[:2] + twice.nu[2:], nu) < 1e-8
    rows = torch.cat([h, h]).requires_grad_()
    solution = il.solve_qp(Q, p, A=A, b=b, G=torch.cat([G, G]), h=rows)
    with pytest.warns(il.DegenerateGradientWarning, match=r"1 of 1"):
        (gradient,) = torch.autograd.grad(solution.z.sum(), rows)
    single = h.clone().requires_grad_()
    (expected,) = torch.autograd.grad(il.solve_qp(Q, p, A=A, b=b, G=G, h=single).z.sum(), single)
    assert relative_error(gradient[:5] + gradient[5:], expected) < 1e-6


def test_vertex_with_more_active_rows_than_unknowns() -> None:
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(16, 40, 5, generator=generator, dtype=torch.float64)
    p = 10 * torch.randn(16, 5, generator=generator, dtype=torch.float64)
    solution = il.solve_qp(torch.eye(5, dtype=torch.float64), p, G=G, h=torch.zeros(40, dtype=torch.float64))
    certificate = kkt_certificate(
        torch.eye(5).double(), p, solution.z, lam=solution.lam, G=G, h=torch.zeros(40).double()
    )
    assert certificate.max() < 1e-12


def test_thin_slab() -> None:
    """Two opposite rows 1e-9 apart: only one of them can be active."""
    Q, p, A, b, G, h, *_ = random_qp(8, 6, 1, batch=(8,), seed=3, active=0.5)
    slab_G, slab_h = torch.cat([G, -G[:, :1]], 1), torch.cat([h, -h[:, :1] + 1e-9], 1)
    solution = il.solve_qp(Q, p, A=A, b=b, G=slab_G, h=slab_h)
    certificate = kkt_certificate(Q, p, solution.z, solution.nu, solution.lam, A=A, b=b, G=slab_G, h=slab_h)
    assert certificate.max() < 1e-10


def test_zero_data_give_zero() -> None:
    eye, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    solution = il.solve_qp(eye, zero, A=torch.ones(1, 3).double(), b=zero[:1], G=-eye, h=zero)
    assert solution.z.eq(0).all() and solution.lam.eq(0).all()


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_every_mix_of_batched_and_shared_arguments() -> None:
    """The answer is that of the loop, and what is shared gets the sum of the gradients."""
    full = random_qp(4, 3, 1, batch=(5,), seed=4)
    for mask in range(64):
        data = [tensor if mask >> i & 1 else tensor[0] for i, tensor in enumerate(full[:6])]
        # keep every program feasible: whatever is shared, z = 0 satisfies A z = 0 and G z <= 1
        data[3] = torch.zeros_like(data[3])
        data[5] = torch.ones_like(data[5])
        leaves = [tensor.clone().requires_grad_() for tensor in data]
        solution = solve(QPProblem(*leaves, *full[6:]))
        gradients = torch.autograd.grad(solution.z.square().sum() + solution.lam.sum() + solution.nu.sum(), leaves)
        expected = [torch.zeros_like(tensor) for tensor in data]
        batch = 5 if mask else 1
        for i in range(batch):
            one = [(tensor[i] if mask >> k & 1 else tensor).clone().requires_grad_() for k, tensor in enumerate(data)]
            part = solve(QPProblem(*one, *full[6:]))
            assert relative_error(solution.z[i] if mask else solution.z, part.z) < 1e-12
            loss = part.z.square().sum() + part.lam.sum() + part.nu.sum()
            for k, gradient in enumerate(torch.autograd.grad(loss, one)):
                if mask >> k & 1:
                    expected[k][i] += gradient
                else:
                    expected[k] += gradient
        for found, wanted in zip(gradients, expected, strict=True):
            assert relative_error(found, wanted) < 1e-9, mask


def test_several_leading_dimensions() -> None:
    problem = random_qp(4, 3, 1, batch=(2, 1, 3), seed=4)
    p = problem.p + torch.zeros(2, 5, 3, 4, dtype=torch.float64)
    solution = il.solve_qp(problem.Q, p, A=problem.A, b=problem.b, G=problem.G, h=problem.h)
    assert solution.z.shape == (2, 5, 3, 4) and solution.nu.shape == (2, 5, 3, 1) and solution.lam.shape == (2, 5, 3, 3)
    assert all(field.shape == (2, 5, 3) for field in solution.info)
    assert relative_error(solution.z, problem.z.expand(2, 5, 3, 4)) < 1e-10


@pytest.mark.parametrize("batch", [(0,), (3, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("size", [(4, 3, 1), (4, 0, 1), (4, 3, 0), (4, 0, 0)], ids=str)
def test_empty_batch_keeps_the_graph(batch: tuple[int, ...], size: tuple[int, int, int]) -> None:
    problem = random_qp(*size, seed=4)
    Q = problem.Q.clone().requires_grad_()
    p = torch.zeros(*batch, 4, dtype=torch.float64, requires_grad=True)
    solution = il.solve_qp(Q, p, A=problem.A, b=problem.b, G=problem.G, h=problem.h)
    assert solution.z.shape == (*batch, 4) and solution.info.status.shape == batch
    solution.z.sum().backward()
    assert p.grad is not None and p.grad.shape == p.shape and Q.grad is not None and Q.grad.eq(0).all()


def test_float32_keeps_its_type_and_is_close_to_float64() -> None:
    problem = random_qp(20, 20, 5, batch=(16,), seed=6)
    leaves = [tensor.float().requires_grad_() for tensor in problem[:6]]
    solution = solve(QPProblem(*leaves, *problem[6:]))
    assert solution.z.dtype == solution.lam.dtype == solution.nu.dtype == solution.s.dtype == torch.float32
    assert solution.info.residual.dtype == torch.float32 and solution.info.residual.max() < 1e-6
    assert (
        relative_error(solution.z.double(), problem.z) < 1e-4
    )  # the data themselves are rounded to 1e-7, condition 100
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    ours = torch.autograd.grad(solution.z.sum() + solution.lam.sum(), leaves)
    again = solve(QPProblem(*exact, *problem[6:]))
    expected = torch.autograd.grad(again.z.sum() + again.lam.sum(), exact)
    for found, wanted in zip(ours, expected, strict=True):
        assert found.dtype == torch.float32 and relative_error(found.double(), wanted) < 1e-5


def test_arguments_are_not_changed() -> None:
    problem = random_qp(6, 5, 2, batch=(3,), seed=7)
    before = [tensor.clone() for tensor in problem]
    solve(problem)
    assert all(torch.equal(old, new) for old, new in zip(before, problem, strict=True))


def test_no_grad_saves_nothing() -> None:
    problem = random_qp(6, 5, 2, batch=(3,), seed=7)
    with torch.no_grad():
        assert solve(QPProblem(problem.Q.clone().requires_grad_(), *problem[1:])).z.grad_fn is None


def test_autocast_region() -> None:
    """Half-precision arguments are taken to float32, and nothing inside is computed in half precision."""
    problem = random_qp(6, 5, 2, batch=(3,), seed=7, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solve(problem)
        layer = il.nn.QPLayer(4, 1, 3)
        z = layer(torch.nn.Linear(4, 4)(torch.randn(2, 4)))
    assert solution.z.dtype == torch.float32 and relative_error(solution.z, problem.z) < 1e-4
    z.sum().backward()
    assert layer.L.grad is not None and layer.L.grad.dtype == torch.float32


# --- memory ---------------------------------------------------------------------------------------------------------


def test_saved_memory_does_not_grow_with_the_iterations() -> None:
    from implicit_layers.measure import graph_bytes

    easy = random_qp(10, 10, 2, batch=(4,), seed=0, condition=1.0)
    hard = random_qp(10, 10, 2, batch=(4,), seed=0, condition=1e9)
    bytes_and_iterations = []
    for problem in (easy, hard):
        leaves = [tensor.clone().requires_grad_() for tensor in problem[:6]]
        iterations = solve(QPProblem(*leaves, *problem[6:])).info.iterations.max()
        bytes_and_iterations.append(
            (graph_bytes(lambda leaves=leaves, p=problem: solve(QPProblem(*leaves, *p[6:])).z), int(iterations))
        )
    (few, k), (many, more) = bytes_and_iterations
    assert more > k and many == few


# --- refusals -------------------------------------------------------------------------------------------------------


def good() -> dict[str, Tensor]:
    problem = random_qp(4, 3, 1, batch=(2,), seed=8)
    return dict(zip(NAMES, problem[:6], strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in NAMES for value in (math.nan, math.inf, -math.inf) if (name, value) != ("h", math.inf)],
)
def test_not_finite(name: str, value: float) -> None:
    data = good()
    data[name] = data[name].clone()
    data[name][1].view(-1)[-1] = value
    with pytest.raises(il.NonFiniteError, match=rf"{name}\[1, .*{value}"):
        il.solve_qp(**data)


def test_large_but_finite_numbers_are_not_taken_for_infinite() -> None:
    """Their sum overflows."""
    solution = il.solve_qp(torch.eye(4).double() * 1e308, torch.full((4,), 1e308, dtype=torch.float64))
    assert torch.allclose(solution.z, -torch.ones(4).double())


@pytest.mark.parametrize("name", NAMES)
def test_wrong_dtypes(name: str) -> None:
    data = good()
    with pytest.raises(il.DtypeError, match=name):
        il.solve_qp(**{**data, name: data[name].float()})
    with pytest.raises(il.DtypeError, match=name):
        il.solve_qp(**{**data, name: data[name].long()})
    with pytest.raises(il.DtypeError, match=name):
        il.solve_qp(**{**data, name: data[name].tolist()})  # type: ignore[dict-item]
    with pytest.raises(il.DtypeError, match=r"float16|bfloat16"):
        il.solve_qp(**{key: tensor.bfloat16() for key, tensor in data.items()})


@pytest.mark.parametrize("name", NAMES)
def test_wrong_devices(name: str) -> None:
    data = good()
    with pytest.raises(il.DeviceError, match="meta"):
        il.solve_qp(**{**data, name: data[name].to("meta")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Q": torch.zeros(4, 3).double()}, r"Q must have shape \(\*B, n, n\), got \(4, 3\)"),
        ({"Q": torch.zeros(4).double()}, "Q must have shape"),
        ({"p": torch.zeros(3).double()}, r"p must have shape \(\*B, 4\)"),
        ({"p": torch.tensor(1.0).double()}, "p must have"),
        ({"A": torch.zeros(1, 3).double()}, "A must have shape"),
        ({"b": torch.zeros(2).double()}, "b must have shape"),
        ({"G": torch.zeros(4).double()}, "G must have shape"),
        ({"h": torch.zeros(2).double()}, "h must have shape"),
        ({"h": None}, "G was given without h"),
        ({"A": None}, "b was given without A"),
        ({"p": torch.zeros(3, 4).double()}, "batch dimensions"),
    ],
)
def test_wrong_shapes(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(il.ShapeError, match=message):
        il.solve_qp(**{**good(), **change})


def test_not_positive_definite_names_the_problem() -> None:
    data = good()
    data["Q"] = torch.stack([data["Q"][0], -data["Q"][1]])
    with pytest.raises(il.NotPositiveDefiniteError, match=r"Q\[1\].*1 of 2"):
        il.solve_qp(**data)
    with pytest.raises(il.NotPositiveDefiniteError, match="smallest eigenvalue"):
        il.solve_qp(torch.diag(tensor(1, 0, -1e-6)), torch.ones(3).double())


def test_unknown_policy_and_solver() -> None:
    with pytest.raises(ValueError, match="on_failure"):
        il.solve_qp(torch.eye(2), torch.ones(2), on_failure="loud")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="InteriorPoint"):
        il.solve_qp(torch.eye(2), torch.ones(2), solver="ipm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_iter"):
        il.InteriorPoint(max_iter=0)
    with pytest.raises(ValueError, match="tol"):
        il.InteriorPoint(tol=0.0)


# --- failures -------------------------------------------------------------------------------------------------------


def one_infeasible() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three programs; the middle one asks for z₀ ≤ −1 and z₀ ≥ 1."""
    Q = torch.eye(2, dtype=torch.float64)
    p = torch.tensor([[1.5, 2.0], [3.0, 4.0], [-5.0, 6.0]], dtype=torch.float64)
    G = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    h = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    return Q, p, G, h


def test_infeasible_raises_and_names_the_problem() -> None:
    Q, p, G, h = one_infeasible()
    with pytest.raises(il.InfeasibleError, match=r"1 of 3 problems .*index 1"):
        il.solve_qp(Q, p, G=G, h=h)


def test_one_infeasible_problem_leaves_its_neighbours_alone() -> None:
    Q, p, G, h = one_infeasible()
    leaves = [tensor.clone().requires_grad_() for tensor in (p, G, h)]
    with pytest.warns(il.ConvergenceWarning, match="1 of 3"):
        solution = il.solve_qp(Q, leaves[0], G=leaves[1], h=leaves[2], on_failure="warn")
    assert solution.info.converged.tolist() == [True, False, True]
    assert solution.info.status.tolist() == [0, int(il.Status.INFEASIBLE), 0]
    assert solution.z.isfinite().all() and solution.lam.isfinite().all()
    alone = [tensor.clone().requires_grad_() for tensor in (p[[0, 2]], G, h[[0, 2]])]
    expected = il.solve_qp(Q, alone[0], G=alone[1], h=alone[2])
    assert torch.equal(solution.z[[0, 2]], expected.z)
    ours = torch.autograd.grad((solution.z.sum() + solution.lam.sum()), leaves)
    theirs = torch.autograd.grad((expected.z.sum() + expected.lam.sum()), alone)
    assert ours[0][1].eq(0).all() and torch.allclose(ours[0][[0, 2]], theirs[0])
    assert torch.allclose(ours[1], theirs[1])
    assert torch.allclose(ours[2][[0, 2]], theirs[2])


def test_ignored_failure_is_silent_and_survives_infinite_gradients() -> None:
    Q, p, G, h = one_infeasible()
    p.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = il.solve_qp(Q, p, G=G, h=h, on_failure="ignore")
    upstream = torch.ones_like(solution.z)
    upstream[1] = math.inf
    (gradient,) = torch.autograd.grad(solution.z, p, upstream)
    assert gradient[1].eq(0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("gap", [10.0, 1e-2, 1e-5])
def test_slightly_infeasible_is_proven(gap: float) -> None:
    Q, p, A, b, G, h, *_ = random_qp(20, 20, 5, batch=(16,), seed=9)
    with pytest.raises(il.InfeasibleError, match="16 of 16"):
        il.solve_qp(Q, p, A=A, b=b, G=torch.cat([G, -G[:, :1]], 1), h=torch.cat([h, -h[:, :1] - gap], 1))


def test_contradicting_equalities() -> None:
    Q, p, A, b, *_ = random_qp(5, 0, 2, batch=(3,), seed=9)
    with pytest.raises(il.InfeasibleError):
        il.solve_qp(Q, p, A=torch.cat([A, A], 1), b=torch.cat([b, b + 1], 1))
    with pytest.raises(il.InfeasibleError):
        il.solve_qp(Q, p, A=torch.zeros(1, 5).double(), b=torch.ones(1).double())


def test_not_converged() -> None:
    problem = random_qp(20, 60, 0, batch=(4,), seed=1, condition=1e8)
    with pytest.raises(il.ConvergenceError, match=r"of 4 problems .*tol 1.0e-08.*max_iter"):
        solve(problem, solver=il.InteriorPoint(max_iter=1))


@given(seed=st.integers(0, 2**31), n=st.integers(1, 6), n_ineq=st.integers(0, 9), n_eq=st.integers(0, 3))
def test_integer_data_are_solved_or_proven_infeasible(seed: int, n: int, n_ineq: int, n_eq: int) -> None:
    """Ties, duplicated rows, weakly active and contradicting constraints, against HiGHS for feasibility."""
    from scipy.optimize import linprog

    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).double()

    Q = 2 * torch.eye(n, dtype=torch.float64)
    p, A, b, G, h = integers(n), integers(n_eq, n), integers(n_eq), integers(n_ineq, n), integers(n_ineq)
    solution = il.solve_qp(Q, p, A=A, b=b, G=G, h=h, on_failure="ignore")
    feasible = linprog([0.0] * n, A_ub=G if n_ineq else None, b_ub=h if n_ineq else None, A_eq=A if n_eq else None,
                       b_eq=b if n_eq else None, bounds=(None, None)).status == 0  # fmt: skip
    assert int(solution.info.status) == (il.Status.CONVERGED if feasible else il.Status.INFEASIBLE)
    if feasible:
        assert kkt_certificate(Q, p, solution.z, solution.nu, solution.lam, A=A, b=b, G=G, h=h) < 1e-8


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_scaling_the_cost_leaves_z_and_scales_the_duals(seed: int, scale: float) -> None:
    problem = random_qp(5, 6, 1, seed=seed)
    Q, p, A, b, G, h, *_ = problem
    once, scaled = solve(problem), il.solve_qp(Q * scale, p * scale, A=A, b=b, G=G, h=h)
    assert relative_error(scaled.z, once.z) < 1e-9
    assert relative_error(scaled.lam, once.lam * scale) < 1e-8


# --- found by review ------------------------------------------------------------------------------------------------

F64 = torch.float64


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=F64)


@pytest.mark.parametrize("large", [1e4, 1e9, 1e15])
def test_an_unrelated_large_number_does_not_hide_a_contradiction(large: float) -> None:
    """Feasibility is judged row by row."""
    eye, zero = torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64)
    with pytest.raises(il.InfeasibleError):
        il.solve_qp(eye, zero, G=tensor([1, 0], [-1, 0], [0, 1]), h=tensor(-1, 0, large))
    with pytest.raises(il.InfeasibleError):
        il.solve_qp(eye, zero, A=tensor([1, 1], [1, 1]), b=tensor(0, 1), G=tensor([0, 1]), h=tensor(large))


def test_a_large_cost_does_not_hide_a_contradiction() -> None:
    with pytest.raises(il.SolveError):
        il.solve_qp(torch.eye(2, dtype=F64), tensor(1e9, 0), G=tensor([1, 0], [-1, 0]), h=tensor(-1, 0))


@pytest.mark.parametrize("large", [1e4, 1e7, 1e10, 1e20])
def test_an_inactive_row_may_be_as_far_away_as_it_likes(large: float) -> None:
    problem = random_qp(20, 20, 5, batch=(30,), seed=0)
    Q, p, A, b, G, h, z, _, _ = problem
    row = torch.eye(20, dtype=F64)[:1].expand(30, 1, 20)
    far = torch.full((30, 1), large, dtype=F64)
    solution = il.solve_qp(Q, p, A=A, b=b, G=torch.cat([G, row], 1), h=torch.cat([h, far], 1))
    assert relative_error(solution.z, z) < 1e-10
    assert (solution.info.iterations - solve(problem).info.iterations).abs().max() <= 1


def test_rows_that_touch_the_unconstrained_minimum() -> None:
    """Their violation is nothing but rounding, which must not be taken for a violation."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        m, n = int(torch.randint(1, 9, (), generator=generator)), int(torch.randint(1, 5, (), generator=generator))
        G = torch.randint(-3, 4, (m, n), generator=generator).double()
        z = torch.randint(-6, 7, (n,), generator=generator).double()
        L = torch.randint(-2, 3, (n, n), generator=generator).double()
        Q = L @ L.mT + torch.eye(n, dtype=F64)
        assert torch.allclose(il.solve_qp(Q, -(Q @ z), G=G, h=G @ z).z, z, atol=1e-10)
    Q, p, *_ = random_qp(20, batch=(16,), seed=1)
    z = il.solve_qp(Q, p).z
    G = torch.randn(16, 50, 20, generator=generator, dtype=F64)
    solution = il.solve_qp(Q, p, G=G, h=(G @ z.unsqueeze(-1)).squeeze(-1))
    assert relative_error(solution.z, z) < 1e-10


def test_a_solution_far_away_is_found() -> None:
    eye, zero = torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64)
    z = il.solve_qp(eye, zero, A=tensor([1, 1e-7], [1, -1e-7]), b=tensor(0, 1)).z
    assert torch.allclose(z, tensor(0.5, -5e6), rtol=1e-7)
    z = il.solve_qp(eye, zero, G=tensor([1, -1e-7], [-1, -1e-7]), h=tensor(-0.5, -0.5)).z
    assert abs(float(z[1]) - 5e6) < 5.0  # rows at an angle of 1e-7: the condition of the Schur complement is 1e14


@pytest.mark.parametrize("angle", [1e-3, 1e-5, 1e-6])
def test_active_rows_at_a_small_angle(angle: float) -> None:
    G, h = tensor([1, 0], [1, angle]), torch.zeros(2, dtype=F64, requires_grad=True)
    solution = il.solve_qp(torch.eye(2, dtype=F64), -(G.mT @ tensor(1, 0.7)), G=G, h=h)
    assert torch.allclose(solution.lam, tensor(1, 0.7), atol=1e-7)
    (gradient,) = torch.autograd.grad(solution.z[1], h)
    assert torch.allclose(gradient, tensor(-1, 1) / angle, rtol=1e-6)


def test_numbers_that_overflow_are_not_answers() -> None:
    eye = torch.eye(2, dtype=F64)
    for data in (
        {"Q": eye, "p": tensor(1e308, 1e308), "G": eye * 1e200, "h": tensor(-1e300, -1e300)},
        {"Q": torch.eye(2) * 1e-30, "p": torch.ones(2) * 1e20},
        {"Q": torch.eye(2) * 1e30, "p": torch.zeros(2), "G": torch.eye(2) * 1e-10, "h": -torch.ones(2)},
    ):
        with pytest.raises(il.ConvergenceError):
            il.solve_qp(**data)
        solution = il.solve_qp(**data, on_failure="ignore")
        assert not solution.info.converged and not solution.info.residual < 1e-8


def test_batched_gradients_keep_their_graph() -> None:
    Q = torch.diag(tensor(2, 4)).requires_grad_()
    seconds = []
    for vectorize in (True, False):
        J = torch.autograd.functional.jacobian(
            lambda Q: il.solve_qp(Q, tensor(-2, -8)).z, Q, vectorize=vectorize, create_graph=True
        )
        seconds.append(torch.autograd.grad(J.square().sum(), Q)[0])
    assert torch.allclose(*seconds) and seconds[0].abs().max() > 0.1


def test_a_kink_is_announced_in_the_backward_pass() -> None:
    p = tensor(0.0, -1.0).requires_grad_()
    solution = il.solve_qp(torch.eye(2, dtype=F64), p, G=-torch.eye(2, dtype=F64), h=torch.zeros(2, dtype=F64))
    with pytest.warns(il.DegenerateGradientWarning, match="kink"):
        torch.autograd.grad(solution.z.sum(), p)


def test_the_index_in_a_message_is_one_of_the_callers_tensor() -> None:
    G = torch.tensor([[math.nan, 0, 0]])
    with pytest.raises(il.NonFiniteError, match=r"G\[0, 0\] is nan: 1 of 3"):
        il.solve_qp(torch.eye(3).repeat(4, 1, 1), torch.zeros(4, 3), G=G, h=torch.ones(1))


def test_arguments_that_are_no_dense_tensors() -> None:
    eye = torch.eye(2, dtype=F64)
    with pytest.raises(il.DtypeError, match="p must be a torch"):
        il.solve_qp(eye, None)  # type: ignore[arg-type]
    with pytest.raises(il.DtypeError, match=r"to_dense"):
        il.solve_qp(eye.to_sparse(), tensor(1, 1))
    with pytest.raises(il.DeviceError, match="meta"):
        il.solve_qp(eye.to("meta"), tensor(1, 1).to("meta"))
