"""The compiled solver where inequalities are many, and where some have no side: the answers of PyTorch's tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import implicit_layers as il
from implicit_layers.kkt import quadratic
from implicit_layers.solvers import compiled
from implicit_layers.testing import random_qp
from tests.compiled_problems import (
    BACKENDS,
    HARD,
    NAMES,
    POINT,
    Data,
    answer,
    both,
    call,
    disagreement,
    draw,
    require_kernel,
    spoil,
)
from tests.differences import both_orders
from tests.steep_vertices import steep

SIZES = [(1, 2, 0), (1, 9, 0), (2, 5, 1), (3, 24, 2), (10, 40, 10), (20, 100, 0), (10, 200, 3), (20, 400, 0)]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[compiled.Settled]:
    """What the kernel made of each batch."""
    require_kernel()
    seen: list[compiled.Settled] = []
    solve = compiled.solve

    def spy(*args: object, **options: object) -> compiled.Settled:
        seen.append(solve(*args, **options))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(compiled, "solve", spy)
    return seen


def agree(data: Data, within: float = 1e-10, **options: object) -> None:
    errors = disagreement(*both(data, **options))
    assert all(error <= within for error in errors.values()), errors


@pytest.mark.parametrize("shared", ["", "Q", "G", "QAG"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agreement(size: tuple[int, int, int], shared: str, settled: list[compiled.Settled]) -> None:
    data = draw(*size, (11,), 3, shared=shared, condition=10.0)
    agree(data)
    assert settled[-1].number == 11
    room = size[0] - size[2]
    assert settled[-1].factor.chol_ineq.shape == (11, room, room), "no memory of the square of the rows"
    agree({name: tensor.float() for name, tensor in data.items()}, within=4e-6)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)], ids=str)
def test_any_batch(batch: tuple[int, ...], settled: list[compiled.Settled]) -> None:
    agree(draw(4, 20, 1, batch, 1, condition=10.0))


def test_rows_beyond_the_cache_go_to_pytorch(settled: list[compiled.Settled]) -> None:
    data = draw(50, 801, 0, (2,), 0)
    assert call(data, il.InteriorPoint(backend="compiled")).info.converged.all() and not settled


@pytest.mark.parametrize("parallel", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("size", [(4, 24), (8, 40), (12, 120)], ids=str)
def test_ill_conditioned_vertices_in_fifty_digits(
    size: tuple[int, int], parallel: float, settled: list[compiled.Settled]
) -> None:
    n, m = size
    problem = steep(n, m, batch=9, seed=n, active=n - 1, parallel=parallel, spread=1e3)
    p, h = problem.p.requires_grad_(), problem.h.requires_grad_()
    solution = il.solve_qp(problem.Q, p, G=problem.G, h=h, solver=il.InteriorPoint(backend="compiled"))
    loss = (torch.cat([solution.z, solution.lam], dim=-1) * problem.weight).sum()
    by_p, by_h = torch.autograd.grad(loss, (p, h))
    found = {"z": solution.z, "lam": solution.lam, "by_p": by_p, "by_h": by_h}
    condition = torch.tensor([truth.condition for truth in problem.truths], dtype=torch.float64)
    for name, tensor in found.items():
        exact = problem.stacked(name)
        error = (tensor.detach() - exact).abs().amax(-1) / exact.abs().amax(-1)
        assert bool((error <= 1e-13 + 4e-16 * condition).all()), (name, float((error / condition).max()))
    if parallel >= 1e-3:  # some are told a condition above 1e8: those are left to the condensed form
        assert settled[-1].number >= (9 if parallel >= 1e-1 else 5)


@pytest.mark.parametrize("how", HARD)
@pytest.mark.parametrize("place", [0, 4])
def test_hard_programs_among_easy_ones(how: str, place: int, settled: list[compiled.Settled]) -> None:
    data = spoil(draw(5, 30, 2, (5,), place), place, how)
    one, two = both(data, on_failure="ignore", gradient="least_norm")
    errors = disagreement(one, two)
    slack = 1e-6 if how == "slab" else 1e-9
    assert all(error < slack for error in errors.values()), errors
    if two.solution is not None and how != "indefinite":
        assert settled[-1].number >= 4


def test_more_rows_through_the_solution_than_unknowns(settled: list[compiled.Settled]) -> None:
    """Forty rows meet in one point: no factor of the active rows, and the same duals of least norm."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(4, 40, 3, generator=generator, dtype=torch.float64)
    centre = torch.randn(4, 3, 1, generator=generator, dtype=torch.float64)
    h = (G @ centre).squeeze(-1)
    p = -(centre.squeeze(-1) + G[:, :10].sum(1))
    one, two = both({"Q": torch.eye(3, dtype=p.dtype).expand(4, 3, 3), "p": p, "G": G, "h": h}, gradient="least_norm")
    assert max(disagreement(one, two).values()) < 1e-8


@pytest.mark.parametrize("shared", ["", "QAG"])
def test_any_number_of_threads_gives_the_same_bits(shared: str, settled: list[compiled.Settled]) -> None:
    data = draw(8, 60, 2, (70,), 1, shared=shared)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = answer(data, "compiled")
            own = [gradient for name, gradient in made.gradients.items() if name not in shared]
            found.append([*(getattr(made.solution, name) for name in POINT), *own])
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))
        assert all(one.number == 70 for one in settled)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(1, 3, 0), (3, 9, 1)], ids=str)
def test_derivatives_by_finite_differences(size: tuple[int, int, int], settled: list[compiled.Settled]) -> None:
    problem = random_qp(*size, batch=(2,), seed=3, condition=10.0)
    kept = [name for name, tensor in zip(NAMES, problem, strict=False) if tensor.numel()]
    solver = il.InteriorPoint(backend="compiled")

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        solution = il.solve_qp(**dict(zip(kept, leaves, strict=True)), solver=solver)
        return tuple(part for part in solution[:4] if part.numel())

    both_orders(function, *(tensor for tensor in problem[:6] if tensor.numel()))
    assert settled


def test_transforms_agree(settled: list[compiled.Settled]) -> None:
    data = draw(3, 12, 1, (2,), 3, condition=10.0)
    rows = {name: data[name] for name in NAMES[2:]}
    found = []
    for backend in BACKENDS:
        solver = il.InteriorPoint(backend=backend)  # type: ignore[arg-type]

        def cost(p: Tensor, Q: Tensor, solver: il.InteriorPoint = solver) -> Tensor:
            solution = il.solve_qp(Q, p, **rows, solver=solver)
            return (solution.z**3).sum() + (solution.lam**2).sum()

        def one(p: Tensor, Q: Tensor, *rest: Tensor, solver: il.InteriorPoint = solver) -> Tensor:
            return il.solve_qp(Q, p, **dict(zip(NAMES[2:], rest, strict=True)), solver=solver).lam

        p, Q = data["p"], data["Q"]
        found.append(
            [
                torch.func.hessian(cost)(p, Q),
                torch.func.jacrev(torch.func.jacrev(cost))(p, Q),
                torch.func.jacfwd(cost, argnums=1)(p, Q),
                torch.func.vmap(torch.func.jacrev(one))(p, Q, *rows.values()),
                torch.func.vmap(torch.func.jacfwd(one))(p, Q, *rows.values()),
            ]
        )
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)
    assert settled[-1].factor.chol_ineq.shape[-1] == 2


def test_warm_starts(settled: list[compiled.Settled]) -> None:
    data = draw(6, 40, 2, (9,), 5)
    first = call(data, il.InteriorPoint(backend="compiled"))
    for begin in (first, first._replace(lam=torch.ones_like(first.lam)), first._replace(lam=first.lam.flip(-1))):
        one, two = both({**data, "p": data["p"] + 1e-3}, warm_start=begin)
        assert max(disagreement(one, two).values()) < 1e-10
        assert settled[-1].number == 9


def test_a_factor_of_the_active_rows_alone_is_that_of_all() -> None:
    data = draw(5, 30, 2, (7,), 0)
    factor = compiled.solve(torch.Size([7]), [data[name] for name in NAMES], tol=1e-10, max_iter=60).factor
    whole = factor.whole()
    assert factor.chol_ineq.shape == (7, 3, 3) and whole.chol_ineq.shape == (7, 30, 30) and whole.whole() is whole
    right = torch.randn(7, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = quadratic.schur_solve(whole, right)
    torch.testing.assert_close(quadratic.schur_solve(factor, right), expected, rtol=1e-11, atol=1e-12)
    chosen = factor.active[:, 2:]
    E = torch.cat([data["A"], data["G"]], dim=-2) * factor.scale.unsqueeze(-1)
    S = E @ torch.linalg.inv(0.5 * (data["Q"][:1] + data["Q"][:1].mT)) @ E[:1].mT
    held = torch.cat([chosen.new_ones(7, 2), chosen], dim=-1)[0] > 0
    direct = torch.linalg.solve(S[0][held][:, held], right[0][held])
    torch.testing.assert_close(expected[0][held], direct, rtol=1e-9, atol=1e-10)


# --- rows without a side ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n_ineq", [1, 6, 30])
def test_rows_of_infinite_side_are_no_rows(n_ineq: int, dtype: torch.dtype, settled: list[compiled.Settled]) -> None:
    data = {name: tensor.to(dtype) for name, tensor in draw(5, n_ineq, 2, (9,), 2, condition=10.0).items()}
    generator = torch.Generator().manual_seed(0)
    data["h"] = data["h"].masked_fill(torch.rand(9, n_ineq, generator=generator) < 0.4, torch.inf)
    data["h"][4] = torch.inf
    one, two = (answer(data, backend) for backend in BACKENDS)
    assert settled[-1].number == 9, "the kernel does these"
    assert one.solution is not None and two.solution is not None
    assert torch.equal(two.solution.s.isinf(), data["h"].isinf())
    assert not bool(two.solution.lam[data["h"].isinf()].any())
    for name in ("z", "nu", "lam", "value"):
        torch.testing.assert_close(getattr(two.solution, name), getattr(one.solution, name), rtol=1e-5, atol=1e-5)
    cut = {**data, "h": torch.where(data["h"].isinf(), 1e3, data["h"])}  # far away, so the same programs
    for backend in BACKENDS:
        solver = il.InteriorPoint(backend=backend)  # type: ignore[arg-type]
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in data.items()}
        others = {name: tensor.clone().requires_grad_() for name, tensor in cut.items()}
        found, expected = (
            torch.autograd.grad(call(x, solver).z.pow(3).sum() + call(x, solver).lam.sum(), list(x.values()))
            for x in (leaves, others)
        )
        within = 1e-9 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(found, expected, rtol=within, atol=within)


@pytest.mark.parametrize("whole", [True, False])
def test_shared_rows_of_infinite_side(whole: bool, settled: list[compiled.Settled]) -> None:
    """A side that the batch shares takes its row out of all programs; one program's own leaves it to the others."""
    data = draw(4, 12, 1, (11,), 0, shared="QAG", condition=10.0)
    if whole:
        data["h"] = data["h"].amax(0)
        data["h"][3] = torch.inf
    else:
        data["h"][5, 3] = torch.inf
    solution = call(data, il.InteriorPoint(backend="compiled"))
    expected = call(data, il.InteriorPoint(backend="torch"))
    for name in ("z", "nu", "lam"):
        torch.testing.assert_close(getattr(solution, name), getattr(expected, name), rtol=1e-10, atol=1e-11)
    assert settled[-1].number == (11 if whole else 10)
