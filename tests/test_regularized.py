"""Any regulariser over any polytope: cvxpy, the generic core, closed members and differences as oracles."""

import cvxpy
import numpy
import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError

import implicit_layers as il
from implicit_layers import regularized as module
from implicit_layers.errors import ArgumentError, InfeasibleError, ShapeError
from implicit_layers.regularizers import BINARY_ENTROPY, BOX, ENTROPY, EUCLIDEAN, tsallis
from tests.differences import first_order, second_order

LOG_BARRIER = il.Regularizer(
    "log barrier",
    primal=lambda s: torch.where(s < 0, -1 / torch.where(s < 0, s, -1.0), torch.inf),
    weight=torch.square,
    value=lambda y: -y.log(),
    slope=lambda y: -1 / y,
)
EVERY = [ENTROPY, EUCLIDEAN, BINARY_ENTROPY, BOX, tsallis(1.5), LOG_BARRIER]
each = pytest.mark.parametrize("regulariser", EVERY, ids=lambda r: r.name)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, tol=1e-9):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def program(seed, n=8, m=3, n_ineq=0, batch=()):
    """Rows through a point inside (0, 1)ⁿ, the first one positive, so that the polytope is bounded."""
    inside = 0.1 + 0.5 * draw(*batch, n, seed=seed).sigmoid()
    A, G = draw(*batch, m, n, seed=seed + 1), draw(*batch, n_ineq, n, seed=seed + 2)
    A[..., 0, :] = A[..., 0, :].abs() + 0.1
    b = (A @ inside.unsqueeze(-1)).squeeze(-1)
    h = (G @ inside.unsqueeze(-1)).squeeze(-1) + 0.05
    return draw(*batch, n, seed=seed + 3), A, b, G, h, inside


def by_cvxpy(c, A, b, G, h, u, tau, regulariser):
    x = cvxpy.Variable(len(c))
    alpha = float(regulariser.name[8:-1]) if regulariser.name.startswith("tsallis") else None
    phi = {
        "entropy": lambda: -cvxpy.sum(cvxpy.entr(x)),
        "euclidean": lambda: 0.5 * cvxpy.sum_squares(x),
        "box": lambda: 0.5 * cvxpy.sum_squares(x),
        "binary_entropy": lambda: -cvxpy.sum(cvxpy.entr(x)) - cvxpy.sum(cvxpy.entr(1 - x)),
        "log barrier": lambda: -cvxpy.sum(cvxpy.log(x)),
    }.get(regulariser.name, lambda: cvxpy.sum(cvxpy.power(x, alpha) - x) / (alpha * (alpha - 1)))()
    rows = [A.numpy() @ x == b.numpy(), x >= 0, x <= numpy.minimum(u, regulariser.cap)]
    rows += [G.numpy() @ x <= h.numpy()] if len(h) else []
    problem = cvxpy.Problem(cvxpy.Maximize(c.numpy() @ x - tau * phi), rows)
    tol = 1e-8 if alpha else 1e-11  # power cones are not solved any better
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=tol, tol_gap_rel=tol, tol_feas=tol)
    return torch.from_numpy(x.value), problem.value


@each
@pytest.mark.parametrize(("n_ineq", "u"), [(0, 50.0), (2, 0.6)])
@pytest.mark.parametrize("tau", [1.0, 0.05])
def test_cvxpy_agrees_with_the_answer_and_the_optimal_value(regulariser, n_ineq, u, tau):
    for seed in (0, 20):
        c, A, b, G, h, inside = program(seed, n_ineq=n_ineq)
        more = {"G": G, "h": h, "ub": u} if n_ineq else {}
        x = il.regularized_lp(c, regulariser, A=A, b=b, temperature=tau, **more).value
        expected, value = by_cvxpy(c, A, b, G, h, u, tau, regulariser)
        close(A @ x, b)
        close(x, expected, 2e-4 if regulariser.name.startswith("tsallis") else 2e-5)
        found = c @ x - tau * regulariser.value(x).sum()
        assert float(found) >= value - 1e-7 * (1 + abs(value))
        loss = il.regularized_lp_loss(c, inside, regulariser, A=A, b=b, temperature=tau, **more)
        close(loss, value - (c @ inside - tau * regulariser.value(inside).sum()), 1e-6)


@each
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_the_generic_core_on_the_same_residual_agrees(regulariser, tau):
    """A primal((c − Aᵀν)/τ) = b for ν by the core's root, with its adjoint solve: value and all gradients."""
    c, A, b, *_ = program(3)
    leaves = [t.requires_grad_() for t in (c, A, b, torch.tensor(tau, dtype=torch.float64))]

    def residual(nu, c, A, b, tau):
        return A @ regulariser.primal((c - A.mT @ nu) / tau) - b

    x = il.regularized_lp(c, regulariser, A=A, b=b, temperature=leaves[3], tol=1e-14).value
    free = ((x > 0) & (x < regulariser.cap)).detach()
    slopes = tau * regulariser.slopes(x.detach())
    nu = torch.linalg.lstsq(A.detach()[:, free].mT, (c.detach() - slopes)[free].unsqueeze(-1)).solution.squeeze(-1)
    nu = il.attach_gradient(residual, nu, *leaves)
    by_core = regulariser.primal((c - A.mT @ nu) / leaves[3])
    close(x, by_core, 1e-7)
    g = draw(8, seed=9)
    found, expected = (torch.autograd.grad(y, leaves, g) for y in (x, by_core))
    for one, other in zip(found, expected, strict=True):
        close(one, other, 1e-6)


@each
def test_derivatives(regulariser):
    c, A, b, G, h, _ = program(5, n=6, m=2, n_ineq=1)
    leaves = [t.requires_grad_() for t in (c, A, b, G, h, torch.tensor([0.4], dtype=torch.float64))]

    def function(c, A, b, G, h, tau):
        return il.regularized_lp(c, regulariser, A=A, b=b, G=G, h=h, ub=0.8, temperature=tau, tol=1e-13).value

    assert first_order(function, leaves, check_forward_ad=True, check_batched_grad=True, rtol=2e-3, atol=1e-4)
    assert second_order(function, leaves, rtol=5e-3, atol=1e-3)


@each
def test_the_loss_has_the_gradient_of_the_envelope_theorem_and_the_second_of_the_answer(regulariser):
    c, A, b, _, _, inside = program(7, n=6, m=2)
    leaves = [t.requires_grad_() for t in (c, A, b, torch.tensor([0.4], dtype=torch.float64))]

    def loss(c, A, b, tau):
        target = inside  # stays in the polytope only if A and b do, so only the optimum is differentiated in them
        there = (A.detach() @ target - b.detach()).abs().max()
        assert there < 1e-3
        return il.regularized_lp_loss(c, target, regulariser, A=A, b=b, temperature=tau, tol=1e-13)

    assert first_order(loss, leaves, check_forward_ad=True, rtol=2e-3, atol=1e-4)
    assert second_order(loss, leaves, rtol=5e-3, atol=1e-3)
    x = il.regularized_lp(c, regulariser, A=A, b=b, temperature=0.4, tol=1e-13).value
    (found,) = torch.autograd.grad(loss(*leaves), c)
    close(found, x.detach() - inside)
    zero = il.regularized_lp_loss(c, x.detach(), regulariser, A=A, b=b, temperature=0.4)
    assert abs(float(zero.detach())) < 1e-9


def test_unbounded_weights_at_zero_are_solved_or_fail_loudly():
    """Tsallis beyond α = 2: near zero x is not determined by the duals to their precision."""
    c, A, b, G, h, _ = program(0, batch=(10,))
    for alpha, tau in ((2.5, 1.0), (2.5, 0.003), (4.0, 0.03)):
        found = il.regularized_lp(c, tsallis(alpha), A=A, b=b, temperature=tau, max_iter=200, on_failure="ignore")
        assert bool(found.info.converged.all()) or tau < 1
        off = ((A @ found.value.unsqueeze(-1)).squeeze(-1) - b).abs().amax(-1)
        assert bool((off[found.info.converged] < 1e-8).all())
        if tau == 1:
            expected = [by_cvxpy(c[i], A[i], b[i], G[i], h[i], 50.0, tau, tsallis(alpha))[0] for i in range(2)]
            close(found.value[:2], torch.stack(expected), 2e-4)


def test_members_of_their_own_are_special_cases():
    c, one = draw(3, 7), torch.ones(1, 7).double()
    for regulariser, member in (
        ("entropy", il.softmax),
        ("euclidean", il.sparsemax),
        (tsallis(1.5), il.entmax),
        (tsallis(3), lambda x, **more: il.entmax(x, 3.0, **more)),
    ):
        x = il.regularized_lp(c, regulariser, A=one, b=torch.ones(1).double(), temperature=0.3).value
        close(x, member(c, temperature=0.3), 1e-7 if regulariser not in ("entropy", "euclidean") else 1e-10)
    for name, kind in (("binary_entropy", "entropy"), ("box", "euclidean")):
        x = il.regularized_lp(c, name, A=one, b=torch.tensor([2.5]).double(), temperature=0.3).value
        close(x, il.soft_top_k(c, 2.5, temperature=0.3, regulariser=kind), 1e-9)
    cost, a, b = draw(4, 3), draw(4).softmax(0), draw(3).softmax(0)
    rows = torch.cat([torch.eye(4).repeat_interleave(3, 1), torch.eye(3).repeat(1, 4)]).double()
    x = il.regularized_lp(-cost.flatten(), A=rows, b=torch.cat([a, b]), temperature=0.2).value
    close(x.reshape(4, 3), il.sinkhorn(cost, a, b, temperature=0.2).value, 1e-9)
    same = il.entropic_lp(-cost.flatten(), A=rows, b=torch.cat([a, b]), temperature=0.2).value
    close(x, same, 1e-10)
    square = torch.eye(4).double() - cost[:, :1] + 0.3 * draw(4, 4, seed=4)
    rows = torch.cat([torch.eye(4).repeat_interleave(4, 1), torch.eye(4).repeat(1, 4)]).double()
    X = il.regularized_lp(square.flatten(), "euclidean", A=rows, b=torch.ones(8).double()).value
    close(X.reshape(4, 4), il.projections.birkhoff(square))


def test_a_new_member_gets_forward_derivatives_and_loss_at_once():
    weight = 2.0
    new = il.register_regularizer(
        "test: a weighted square over polytopes",
        primal=lambda s: s.clamp(min=0) / weight,
        weight=lambda y: torch.full_like(y, 1 / weight),
        value=lambda y: 0.5 * weight * y.square(),
        slope=lambda y: weight * y,
    )
    c, A, b, _, _, inside = program(11, batch=(4,))
    x = il.regularized_lp(c, new.name, A=A, b=b, temperature=0.5).value
    expected = il.solve_qp(torch.eye(8).double(), -c, A=A, b=b, lb=torch.zeros(8).double()).z
    close(x, expected, 1e-7)
    losses = il.regularized_lp_loss(c, inside, new, A=A, b=b, temperature=0.5)
    assert losses.shape == (4,) and bool((losses > 0).all())


@each
def test_a_batch_is_its_elements_and_maps(regulariser):
    c, A, b, *_ = program(13, batch=(2, 3))
    x = il.regularized_lp(c, regulariser, A=A, b=b, temperature=0.3).value
    for i in range(2):
        for j in range(3):
            close(x[i, j], il.regularized_lp(c[i, j], regulariser, A=A[i, j], b=b[i, j], temperature=0.3).value)

    def single(c, A, b):
        return il.regularized_lp(c, regulariser, A=A, b=b, temperature=0.3).value

    close(torch.func.vmap(single)(c[0], A[0], b[0]), x[0])
    J = torch.func.jacrev(single)(c[0, 0], A[0, 0], b[0, 0])
    close(torch.func.jacfwd(single)(c[0, 0], A[0, 0], b[0, 0]), J, 1e-8)
    assert il.regularized_lp(c[:0, 0], regulariser, A=A[0, 0], b=b[0, 0]).value.shape == (0, 8)
    assert il.regularized_lp(c.float(), regulariser, A=A.float(), b=b.float()).value.dtype == torch.float32


@each
def test_infeasible_rows_are_proven_so(regulariser):
    c, A, b, *_ = program(15)
    with pytest.raises(InfeasibleError, match="regularized_lp"):
        il.regularized_lp(c, regulariser, A=A, b=-b.abs() - 1)
    info = il.regularized_lp(c, regulariser, A=A, b=torch.stack([b, -b.abs() - 1]), on_failure="ignore").info
    assert info.converged.tolist() == [True, False]


def test_refusals():
    c, A, b, _, _, inside = program(1)
    with pytest.raises(ArgumentError, match="regulariser must be one of"):
        il.regularized_lp(c, "lasso", A=A, b=b)
    with pytest.raises(ShapeError, match="regularized_lp: A was given without b"):
        il.regularized_lp(c, "euclidean", A=A)
    with pytest.raises(ArgumentError, match="target is no point of the polytope"):
        il.regularized_lp_loss(c, inside + 0.1, "euclidean", A=A, b=b)
    with pytest.raises(ArgumentError, match=r"target\[1\] is no point of the polytope"):
        il.regularized_lp_loss(c, torch.stack([inside, -inside]), "euclidean", A=A, b=b)


def test_planted_wrong_derivatives_are_caught(monkeypatch):
    c, A, b, _, _, inside = program(1, n=8, m=2)
    c.requires_grad_()
    wrong = il.Regularizer("wrong", EUCLIDEAN.primal, lambda y: 1 + 0.1 * y, EUCLIDEAN.value, EUCLIDEAN.slope)
    with pytest.raises(GradcheckError):
        gradcheck(lambda c: il.regularized_lp(c, wrong, A=A, b=b, temperature=5.0).value, c)
    right = module._sum
    monkeypatch.setattr(module, "_sum", lambda chosen, x: 1.01 * right(chosen, x))
    with pytest.raises(AssertionError):
        x = il.regularized_lp(c.detach(), EUCLIDEAN, A=A, b=b).value
        close(il.regularized_lp_loss(c.detach(), inside, A=A, b=b), (c.detach() @ x), 1e-9)
