"""The search for active sets from nothing: what it finds, what it leaves to the interior point, and in which form."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

import implicit_layers as il
from benchmarks.problems import QP, dense, ill_conditioned
from implicit_layers.kkt import quadratic
from implicit_layers.solvers import dual_path, dual_search

DOUBLE = torch.float64


def solved(problem: QP, **settings: int) -> il.QPSolution:
    Q, p, A, b, G, h, _ = problem
    rows = {"A": A, "b": b} if A.shape[-2] else {}
    solver = il.InteriorPoint(backend="torch", **settings)  # type: ignore[arg-type]
    return il.solve_qp(Q, p, G=G, h=h, **rows, solver=solver, on_failure="ignore")


def by_the_path_alone(monkeypatch: pytest.MonkeyPatch, problem: QP) -> il.QPSolution:
    with monkeypatch.context() as patch:
        patch.setattr(dual_path, "_FEW_ROWS", 0.0)
        return solved(problem)


def complementarity(seed: int, m: int, batch: int, spread: float) -> tuple[Tensor, Tensor]:
    """R of unit diagonal and w with largest violation 1."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(batch, m, m, generator=generator, dtype=DOUBLE) * torch.logspace(0, -spread, m, dtype=DOUBLE)
    root = root / root.norm(dim=-1, keepdim=True)
    w = torch.randn(batch, m, generator=generator, dtype=DOUBLE)
    return root @ root.mT, w / -w.amin(-1, keepdim=True).clamp(max=-1e-3)


def held_by_least_squares(R: Tensor, w: Tensor) -> Tensor:
    """λ minimises |Lᵀλ + L⁻¹w| over λ ≥ 0, with R = L Lᵀ."""
    held = []
    for matrix, vector in zip(R, w, strict=True):
        lower = torch.linalg.cholesky(matrix)
        right = torch.linalg.solve_triangular(lower, vector[:, None], upper=False)[:, 0]
        held.append(torch.as_tensor(nnls(lower.mT.numpy(), -right.numpy())[0]) > 0)
    return torch.stack(held)


@pytest.mark.parametrize("large", [0, 10**12], ids=["held rows alone", "all rows"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [1, 60])
def test_what_stays_is_the_active_set(batch: int, shared: bool, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quadratic, "_LARGE", large)
    R, w = complementarity(0, 12, batch, 1.0)
    R = R[:1] if shared else R
    found = dual_search.search(R, w, 60)
    ended = torch.arange(batch) if found.ended is None else found.ended
    assert ended.shape[0] >= 0.9 * batch
    assert (found.held[ended] == held_by_least_squares(R.expand(batch, -1, -1), w)[ended]).all()
    assert found.rounds[ended].min() >= 1 and found.rounds[ended].max() <= dual_search._ROUNDS
    if found.made is not None:
        masked = R * found.held[:, :, None] * found.held[:, None] + torch.diag_embed(1 - found.held)
        assert (found.made[0] @ found.made[0].mT - masked).abs().max() < 1e-14


@pytest.mark.parametrize("large", [0, 10**12], ids=["held rows alone", "all rows"])
def test_single_changes_end_what_goes_round_in_circles(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one and in a batch alike."""
    R, w = complementarity(0, 8, 400, 1.5)
    monkeypatch.setattr(quadratic, "_LARGE", large)
    for name in ("_ROUNDS", "_STUCK"):
        monkeypatch.setattr(dual_search, name, 100)
    found = dual_search.search(R, w, 100)
    patience = dual_search._PATIENCE
    monkeypatch.setattr(dual_search, "_PATIENCE", 1000)
    circles = dual_search.search(R, w, 100)
    assert found.ended is None and circles.ended is not None and circles.ended.shape[0] < 400
    assert (found.held == held_by_least_squares(R, w)).all()
    monkeypatch.setattr(dual_search, "_PATIENCE", patience)
    for i in set(range(400)) - set(circles.ended.tolist()):
        alone = dual_search.search(R[i : i + 1], w[i : i + 1], 100)
        assert alone.ended is None and (alone.held == found.held[i]).all() and alone.rounds == found.rounds[i]


@pytest.mark.parametrize("large", [0, 10**12], ids=["held rows alone", "all rows"])
@pytest.mark.parametrize("n_eq", [0, 5])
@pytest.mark.parametrize("batch", [1, 40])
def test_the_answers_are_those_of_the_interior_point(
    batch: int, n_eq: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quadratic, "_LARGE", large)
    problem = dense(20, 20, n_eq, batch)
    leaves = [t.requires_grad_() for t in problem[:6] if t.numel()]
    answers = solved(problem), by_the_path_alone(monkeypatch, problem)
    gradients = [
        torch.autograd.grad((problem.c * answer.z).sum() + answer.lam.square().sum(), leaves) for answer in answers
    ]
    assert answers[0].info.converged.all() and answers[0].info.iterations.double().mean() <= 4
    for name in ("z", "nu", "lam", "s", "value"):
        one, other = (getattr(answer, name) for answer in answers)
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 1e-11 * other.abs().max()


@pytest.mark.parametrize("large", [0, 10**12], ids=["held rows alone", "all rows"])
def test_what_the_search_leaves_goes_to_the_interior_point(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Easy and hard programs in one batch; those left count the iterations of the interior point alone."""
    monkeypatch.setattr(quadratic, "_LARGE", large)
    parts = dense(20, 20, 5, 12), ill_conditioned(20, 20, 5, 12)
    problem = QP(*(torch.cat(pair) for pair in zip(*parts, strict=True)))
    seen = []
    search = dual_search.search

    def watched(*arguments: object) -> dual_search.Found:
        seen.append(search(*arguments))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(dual_search, "search", watched)
    answer = solved(problem)
    (found, *_) = seen
    assert found.ended is not None and 12 <= found.ended.shape[0] < 24
    path = by_the_path_alone(monkeypatch, problem)
    assert answer.info.converged.all()
    assert ((answer.z - path.z).norm(dim=-1) <= 1e-9 * path.z.norm(dim=-1)).all()
    left = sorted(set(range(24)) - set(found.ended.tolist()))
    assert (answer.info.iterations[left] == path.info.iterations[left]).all()
    assert (answer.info.iterations[:12] == found.rounds[:12]).all()


@pytest.mark.parametrize("batch", [1, 32])
def test_a_hard_family_is_given_up_early(batch: int) -> None:
    """A single program is tried for longer."""
    R, w = complementarity(1, 40, batch, 4.0)
    found = dual_search.search(R, w, 60)
    assert found.ended is not None and found.ended.shape[0] < batch
    assert found.rounds.max() <= (dual_search._ROUNDS if batch == 1 else dual_search._HARD + 1)


@pytest.mark.parametrize("max_iter", [1, 2])
@pytest.mark.parametrize("batch", [1, 30])
def test_no_more_rounds_than_iterations_are_allowed(max_iter: int, batch: int) -> None:
    problem = dense(10, 10, 0, batch, seed=2)
    exact, answer = solved(problem), solved(problem, max_iter=max_iter)
    assert (answer.info.iterations <= max_iter).all()
    good = answer.info.converged
    assert torch.allclose(answer.z[good], exact.z[good], rtol=1e-12, atol=1e-12)
    assert (good >= (exact.info.iterations <= max_iter)).all()


def test_a_program_without_a_violated_row_takes_no_round() -> None:
    problem = dense(6, 4, 0, 3)
    h = problem.h.clone()
    h[1] = 1e3
    answer = solved(problem._replace(h=h))
    assert answer.info.iterations[1] == 0 and (answer.lam[1] == 0).all()
    assert torch.allclose(answer.z[1], torch.linalg.solve(problem.Q[1], -problem.p[1]), rtol=1e-13, atol=1e-13)


def test_duplicated_rows_are_left_to_the_interior_point(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = dense(20, 10, 0, 8)
    twice = problem._replace(G=problem.G.repeat(1, 2, 1), h=problem.h.repeat(1, 2))
    answer, single = solved(twice), solved(problem)
    held = (single.lam > 0).any(-1)
    assert answer.info.converged.all() and held.any()
    assert ((answer.info.degenerate & int(il.Degeneracy.DEPENDENT) > 0) == held).all()
    assert torch.allclose(answer.z, single.z, rtol=1e-11, atol=1e-11)
    assert torch.allclose(answer.lam[:, :10] + answer.lam[:, 10:], single.lam, rtol=1e-9, atol=1e-9)


def test_single_precision_data() -> None:
    problem = dense(20, 20, 5, 30)
    coarse = QP(*(t.float() for t in problem))
    answer, exact = solved(coarse), solved(QP(*(t.double() for t in coarse)))
    assert answer.z.dtype == torch.float32 and answer.info.converged.all()
    assert (answer.info.iterations == exact.info.iterations).all()
    assert (answer.z - exact.z).abs().max() < 1e-6


@pytest.mark.parametrize("batch", [1, 20])
def test_infeasible_programs_are_told(batch: int) -> None:
    problem = dense(10, 8, 0, batch)
    G, h = problem.G.clone(), problem.h.clone()
    G[0, 1], h[0, 0], h[0, 1] = -G[0, 0], -1.0, -1.0  # aᵀz ≤ −1 and aᵀz ≥ 1
    answer = solved(problem._replace(G=G, h=h))
    assert answer.info.status[0] == int(il.Status.INFEASIBLE)
    assert answer.info.converged[1:].all()
