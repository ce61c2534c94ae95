"""The Birkhoff polytope: optimality by a linear assignment, the derivative by differences and solve_qp, failures."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.autograd.gradcheck import GradcheckError
from torch.func import jacrev

import implicit_layers as il
from implicit_layers.errors import ArgumentTypeError, ConvergenceError, ConvergenceWarning, NonFiniteError, ShapeError
from implicit_layers.projections import birkhoff, doubly_stochastic


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, tol=1e-10):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def check_optimal(X, tol=1e-11):
    """Y is doubly stochastic, and the best permutation in direction X − Y is no better than Y."""
    Y = birkhoff(X)
    size = 1 + float(X.abs().max())
    assert Y.min() >= 0
    close(Y.sum(-1), torch.ones(Y.shape[:-1]).double(), tol * size)
    close(Y.sum(-2), torch.ones(Y.shape[:-1]).double(), tol * size)
    D = X - Y
    for d, y in zip(D.flatten(0, -3), Y.flatten(0, -3), strict=True):
        best = d.numpy()[linear_sum_assignment(d.numpy(), maximize=True)].sum()
        assert abs(best - float((d * y).sum())) <= tol * size**2 * len(d)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 30])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 10.0, 1e3])
def test_the_answer_is_optimal(n, scale):
    X = draw(6, n, n, scale=scale)
    X[1], X[2], X[3] = X[1].round(), 0.0, X[3] + 100 * draw(n, 1)
    check_optimal(X)


@settings(max_examples=40)
@given(entries=st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.5, 30.0]), min_size=9, max_size=9))
def test_the_answer_is_optimal_for_ties(entries):
    check_optimal(torch.tensor(entries, dtype=torch.float64).reshape(1, 3, 3))


@pytest.mark.parametrize("scale", [1e5, 1e7])
def test_far_apart_entries_give_the_best_permutation(scale):
    X = draw(4, 40, 40, scale=scale).requires_grad_()
    Y = birkhoff(X)
    for x, y in zip(X.detach(), Y.detach(), strict=True):
        rows, columns = linear_sum_assignment(x.numpy(), maximize=True)
        expected = torch.zeros_like(y)
        expected[rows, columns] = 1.0
        close(y, expected, 1e-6)


def test_the_answer_and_gradient_of_solve_qp():
    X, g = draw(3, 3, scale=0.5).requires_grad_(), draw(3, 3, seed=1)
    eye, ones = torch.eye(3).double(), torch.ones(1, 3).double()
    A = torch.cat([torch.kron(eye, ones), torch.kron(ones, eye)[:2]])  # the sixth sum follows from the others
    z = il.solve_qp(
        torch.eye(9).double(), -X.reshape(9), A=A, b=torch.ones(5).double(), G=-torch.eye(9).double(), h=X.new_zeros(9)
    ).z
    Y = birkhoff(X)
    close(Y, z.reshape(3, 3), 1e-8)
    close(torch.autograd.grad(Y, X, g), torch.autograd.grad(z, X, g.reshape(9)), 1e-7)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_jacobian_is_the_projector_onto_the_face(scale):
    X = draw(4, 4, scale=scale)
    J = jacrev(birkhoff)(X).reshape(16, 16)
    close(J, J.mT)
    close(J @ J, J)
    step = 1e-6
    moved = [
        (birkhoff(X + step * e) - birkhoff(X - step * e)).reshape(16) / (2 * step)
        for e in torch.eye(16).double().reshape(16, 4, 4)
    ]
    close(J, torch.stack(moved, -1), 1e-7)


def test_at_a_vertex_the_gradient_is_zero_and_where_it_is_square_it_has_two_blocks():
    J = jacrev(birkhoff)(10 * torch.eye(3).double())
    assert J.abs().max() < 1e-12
    X = torch.block_diag(torch.tensor([[0.1, 0.2], [0.3, 0.1]]), torch.tensor([[0.3, 0.2], [0.1, 0.2]])).double()
    X[:2, 2:] = X[2:, :2] = -5.0  # two components, each with a gauge of its own
    J = jacrev(birkhoff)(X).reshape(16, 16)
    close(torch.linalg.matrix_rank(J, atol=1e-9), torch.tensor(2))


def test_single_and_half_precision_compute_in_double():
    X = draw(5, 4, 4)
    for dtype, tol in ((torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        Y = birkhoff(X.to(dtype))
        assert Y.dtype == dtype
        close(Y.double(), birkhoff(X.to(dtype).double()), tol)


def test_failed_problems_keep_their_last_iterate_get_zero_gradient_and_spoil_no_neighbour():
    X = torch.stack([draw(6, 6, scale=0.01), draw(6, 6, scale=5.0)]).requires_grad_()
    hasty = il.SemismoothNewton(max_iter=2)
    with pytest.raises(ConvergenceError, match=r"birkhoff: 1 of 2 problems did not converge \(index 1"):
        birkhoff(X, solver=hasty)
    with pytest.warns(ConvergenceWarning, match="birkhoff"):
        birkhoff(X, solver=hasty, on_failure="warn")
    Y = birkhoff(X, solver=hasty, on_failure="ignore")
    close(Y[0], birkhoff(X[0]))
    (g,) = torch.autograd.grad(Y, X, draw(2, 6, 6, seed=1))
    assert g[0].abs().max() > 0.1 and not g[1].any()
    assert Y.isfinite().all()


def test_a_planted_wrong_derivative_is_caught(monkeypatch):
    monkeypatch.setattr(doubly_stochastic, "_component_projector", lambda linked: torch.eye(4).double())
    X = draw(4, 4, scale=0.3).requires_grad_()
    with pytest.raises((GradcheckError, AssertionError, ConvergenceError)):
        torch.autograd.gradcheck(birkhoff, X)
        check_optimal(X.detach().unsqueeze(0))


def test_what_is_refused():
    with pytest.raises(ShapeError, match=r"X must have shape \(\*B, n, n\)"):
        birkhoff(torch.ones(2, 3))
    with pytest.raises(NonFiniteError, match=r"X\[0, 1\]"):
        birkhoff(torch.tensor([[0.0, torch.inf], [0.0, 0.0]]))
    with pytest.raises(ArgumentTypeError, match="must be a SemismoothNewton"):
        birkhoff(torch.eye(2), solver=il.Newton())
    with pytest.raises(ValueError, match="max_iter"):
        il.SemismoothNewton(max_iter=0)
    with pytest.raises(ValueError, match="on_failure"):
        birkhoff(torch.eye(2), on_failure="hope")


def test_what_is_too_large_for_its_sums_is_never_returned_as_doubly_stochastic():
    generator = torch.Generator().manual_seed(5)
    for size in (1e3, 1e6, 1e9, 1e12, 1e15, 1e18):
        X = size * torch.randn(6, 4, 4, dtype=torch.float64, generator=generator)
        try:
            Y = birkhoff(X)
        except ConvergenceError:
            assert size >= 1e9
            continue
        ones = torch.ones(6, 4, dtype=torch.float64)
        torch.testing.assert_close(Y.sum(-1), ones, rtol=0, atol=1e-6)
        torch.testing.assert_close(Y.sum(-2), ones, rtol=0, atol=1e-6)
    small = torch.eye(3, dtype=torch.float64)
    X = torch.stack([small, 1e15 * torch.randn(3, 3, dtype=torch.float64, generator=generator)]).requires_grad_()
    Y = birkhoff(X, on_failure="ignore")
    torch.testing.assert_close(Y[0], birkhoff(small), rtol=0, atol=1e-12)
    off = (Y.detach().sum(-1) - 1).abs().amax(-1) + (Y.detach().sum(-2) - 1).abs().amax(-1)
    (gradient,) = torch.autograd.grad(Y.square().sum(), X)
    assert (gradient[1] == 0).all() or off[1] <= 2e-6


@pytest.mark.parametrize("size", [1e9, 1e12, 1e15, 1e18, 1e100, 1e300])
@pytest.mark.parametrize("n", [3, 17])
def test_entries_of_any_size_give_the_best_permutation(size, n):
    X = (size * draw(4, n, n)).requires_grad_()
    Y = birkhoff(X)
    for x, y in zip(X.detach(), Y.detach(), strict=True):
        rows, columns = linear_sum_assignment((x / size).numpy(), maximize=True)
        expected = torch.zeros_like(y)
        expected[rows, columns] = 1.0
        assert torch.equal(y, expected)
    (gradient,) = torch.autograd.grad(Y, X, draw(4, n, n, seed=1))
    assert not gradient.any()


@pytest.mark.parametrize("power", [30, 36, 42])
def test_digits_beside_huge_shifts_and_huge_barriers_are_not_lost(power):
    S, G = (8 * draw(5, 6, 6)).round() / 32, draw(5, 6, 6, seed=9)  # so that sums with powers of two are exact
    allowed = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()
    rows, columns = (torch.randint(-8, 9, (5, 6), generator=torch.Generator().manual_seed(s)).double() for s in (1, 2))
    barrier = torch.where(allowed, 0.0, -(2.0 ** (power + 3)))
    X = (S + 2.0**power * (rows.unsqueeze(-1) + columns.unsqueeze(-2)) + barrier).requires_grad_()
    plain = S.clone().requires_grad_()
    Y, expected = birkhoff(X), birkhoff(plain, mask=allowed)
    close(Y, expected, 1e-11)
    close(torch.autograd.grad(Y, X, G)[0], torch.autograd.grad(expected, plain, G)[0], 1e-9)
