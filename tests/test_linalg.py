"""The linear solvers against each other, numpy, and their own contracts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import implicit_layers as il
from implicit_layers.jacobian import Jacobian
from implicit_layers.linalg import LinearSolver, Matrix

F64 = torch.float64
GENERAL = [il.Direct(), il.GMRES(), il.GMRES(restart=4, max_iter=4000), il.LeastSquares()]
POSITIVE = [*GENERAL, il.Cholesky(), il.ConjugateGradient(), il.Neumann(step=0.2)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def general(*shape: int, seed: int = 0) -> Tensor:
    """Far from symmetric, condition below ten."""
    n = shape[-1]
    return rand(*shape, n, seed=seed) / (2 * n) ** 0.5 + 2 * torch.eye(n, dtype=F64)


def positive(*shape: int, seed: int = 0) -> Tensor:
    X = rand(*shape, shape[-1], seed=seed)
    return X @ X.mT / shape[-1] + torch.eye(shape[-1], dtype=F64)


def by_numpy(A: Tensor, b: Tensor) -> Tensor:
    return torch.from_numpy(np.linalg.solve(A.numpy(), b.numpy()[..., None])[..., 0])


CASES = [(s, general) for s in GENERAL] + [(s, positive) for s in POSITIVE]


@pytest.mark.parametrize(("solver", "make"), CASES, ids=lambda c: getattr(c, "__name__", type(c).__name__))
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3)])
@pytest.mark.parametrize("n", [1, 2, 6, 60])
def test_solves(solver: LinearSolver, make: type, batch: tuple[int, ...], n: int):
    A, b = make(*batch, n), rand(*batch, n, seed=1)
    x = solver.solve(Matrix(A), b)
    assert x.shape == b.shape and x.dtype == F64
    assert torch.allclose(x, by_numpy(A, b), atol=1e-9)
    single = solver.solve(Matrix(A.float()), b.float())
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), x, atol=1e-3)


@pytest.mark.parametrize(("solver", "make"), CASES, ids=lambda c: getattr(c, "__name__", type(c).__name__))
def test_several_right_hand_sides(solver: LinearSolver, make: type):
    A, b = make(3, 4), rand(2, 5, 3, 4, seed=1)
    x = solver.solve(Matrix(A), b)
    assert torch.allclose(x, by_numpy(A.expand(2, 5, 3, 4, 4), b), atol=1e-9)


@pytest.mark.parametrize("solver", POSITIVE, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (0, 0), (0, 2, 3)])
def test_empty(solver: LinearSolver, shape: tuple[int, ...]):
    b = torch.zeros(*shape, dtype=F64)
    x = solver.solve(Matrix(torch.zeros(*shape, shape[-1], dtype=F64)), b)
    assert x.shape == b.shape


@pytest.mark.parametrize("solver", POSITIVE, ids=lambda s: type(s).__name__)
def test_zero_right_hand_side_and_strides(solver: LinearSolver):
    A = positive(4).T
    assert (solver.solve(Matrix(A), torch.zeros(4, dtype=F64)) == 0).all()
    b = rand(8, seed=1)[::2]
    assert torch.allclose(solver.solve(Matrix(A), b), by_numpy(A, b), atol=1e-9)


@pytest.mark.parametrize("solver", POSITIVE, ids=lambda s: type(s).__name__)
def test_each_system_is_solved_as_if_alone(solver: LinearSolver):
    # systems of very different sizes and difficulty, one that is not finite among them
    A = torch.stack([positive(5), 1e-2 * torch.eye(5, dtype=F64), 3 * positive(5, seed=3), positive(5, seed=4)])
    A = A / torch.linalg.matrix_norm(A, 2)[..., None, None]
    b = torch.tensor([1.0, 1e-9, 1e6, torch.nan], dtype=F64)[:, None] * rand(4, 5, seed=1)
    solver = il.Neumann(step=1.0) if isinstance(solver, il.Neumann) else solver
    x = solver.solve(Matrix(A), b, on_failure="ignore")
    for i in range(3):
        assert torch.allclose(x[i], by_numpy(A[i], b[i]), rtol=1e-8, atol=1e-9 * float(x[i].norm()))


SINGULAR = torch.stack([torch.eye(2, dtype=F64), torch.ones(2, 2, dtype=F64)])


@pytest.mark.parametrize(
    ("solver", "error"),
    [
        (il.Direct(), il.SingularAdjointError),
        (il.Cholesky(), il.NotPositiveDefiniteError),
        (il.ConjugateGradient(), il.SingularAdjointError),
        (il.GMRES(), il.SingularAdjointError),
        (il.Neumann(max_iter=20), il.SingularAdjointError),
    ],
    ids=lambda c: type(c).__name__,
)
def test_a_singular_system_raises_and_is_named(solver: LinearSolver, error: type[Exception]):
    b = torch.tensor([[1.0, 2.0], [1.0, -3.0]], dtype=F64)
    with pytest.raises(error, match=r"1 of 2 systems, first at index \[1\]"):
        solver.solve(Matrix(SINGULAR), b)
    x = solver.solve(Matrix(SINGULAR), b, on_failure="ignore")
    assert torch.allclose(x[0], b[0], atol=1e-6)


def test_not_positive_definite_is_named():
    A = torch.stack([positive(3), -positive(3), positive(3)])
    with pytest.raises(il.NotPositiveDefiniteError, match=r"index \[1\]"):
        il.Cholesky().solve(Matrix(A), rand(3, 3))
    assert il.Cholesky().solve(Matrix(A), rand(3, 3), on_failure="ignore")[1].isnan().all()


@settings(derandomize=True, max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 100))
def test_least_squares_is_the_pseudo_inverse(n: int, rank: int, seed: int):
    rank = min(rank, n)
    A = rand(2, n, rank, seed=seed) @ rand(2, rank, n, seed=seed + 1)
    b = rand(2, n, seed=seed + 2)
    want = np.stack([np.linalg.pinv(a, rcond=1e-10) @ c for a, c in zip(A.numpy(), b.numpy(), strict=True)])
    got = il.LeastSquares(rcond=1e-10).solve(Matrix(A), b).numpy()
    assert np.abs(got - want).max() < 1e-7 * (1 + np.abs(want).max())


class Counted:
    """A matrix that counts its products and refuses to be formed."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.products = A, 0
        self.batch_shape, self.n = A.shape[:-2], A.shape[-1]

    def matvec(self, v: Tensor) -> Tensor:
        self.products += 1
        return (self.A @ v.unsqueeze(-1)).squeeze(-1)

    def rmatvec(self, v: Tensor) -> Tensor:
        raise AssertionError("only products with A are needed")

    def dense(self) -> Tensor:
        raise AssertionError("formed")


@pytest.mark.parametrize("solver", [il.ConjugateGradient(), il.GMRES()], ids=lambda s: type(s).__name__)
def test_krylov_methods_end_after_as_many_products_as_eigenvalues(solver: LinearSolver):
    n = 60
    Q, _ = torch.linalg.qr(rand(n, n))
    A = Counted(Q @ torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=F64).repeat(n // 3)) @ Q.mT)
    b = rand(n, seed=1)
    x = solver.solve(A, b)
    assert A.products <= 6  # three, one to check, one to report
    assert torch.allclose(A.A @ x, b, atol=1e-9)


@pytest.mark.parametrize(
    "solver", [il.ConjugateGradient(max_iter=3), il.GMRES(max_iter=3, restart=3), il.Neumann(max_iter=3)]
)
def test_products_are_capped(solver: LinearSolver):
    A = Counted(positive(40) * torch.linspace(0.01, 1, 40, dtype=F64))
    solver.solve(A, rand(40), on_failure="ignore")
    assert A.products <= 5


def test_restarted_gmres_on_a_hard_system():
    n = 80
    A = torch.diag(torch.linspace(1, 3, n, dtype=F64)) + torch.diag(torch.ones(n - 1, dtype=F64), 1)
    b = rand(n, seed=1)
    x = il.GMRES(restart=20, max_iter=4000).solve(Matrix(A), b)
    assert torch.allclose(x, by_numpy(A, b), atol=1e-8)


def test_negative_curvature_ends_conjugate_gradients():
    A = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=F64))
    with pytest.raises(il.SingularAdjointError):
        il.ConjugateGradient().solve(Matrix(A), torch.ones(3, dtype=F64))


def test_bad_matrices():
    with pytest.raises(il.ShapeError, match=r"\(\*B, n, n\)"):
        Matrix(torch.ones(3))
    with pytest.raises(il.ShapeError):
        Matrix(torch.ones(2, 3))
    with pytest.raises(il.DtypeError):
        Matrix(torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_the_jacobian_operator(batch: tuple[int, ...]):
    W, z = rand(4, 4), rand(*batch, 4, seed=1)
    J = Jacobian(lambda z: torch.tanh(z @ W.T) + z**2, z)
    dense = (1 - torch.tanh(z @ W.T) ** 2).unsqueeze(-1) * W + 2 * torch.diag_embed(z)
    v = rand(2, *batch, 4, seed=2)
    assert not J.formed
    assert torch.allclose(J.matvec(v), (dense @ v.unsqueeze(-1)).squeeze(-1))
    assert torch.allclose(J.matvec(v[0]), (dense @ v[0].unsqueeze(-1)).squeeze(-1))
    assert torch.allclose(J.rmatvec(v), (dense.mT @ v.unsqueeze(-1)).squeeze(-1))
    assert torch.allclose(J.T.matvec(v[1]), J.rmatvec(v[1])) and torch.allclose(J.T.rmatvec(v), J.matvec(v))
    assert torch.allclose(J.dense(), dense) and torch.allclose(J.T.dense(), dense.mT)
    assert J.formed and J.T.T is J


def test_the_jacobian_of_a_constant_and_of_something_linear():
    z = rand(2, 3)
    assert (Jacobian(lambda z: torch.ones(2, 3, dtype=F64), z).matvec(z) == 0).all()
    assert (Jacobian(lambda z: torch.ones(2, 3, dtype=F64), z).dense() == 0).all()
    assert torch.equal(Jacobian(lambda z: 3 * z, z).matvec(z), 3 * z)


def test_cholesky_refuses_a_pivot_that_is_only_rounding() -> None:
    """A singular Hessian may pass the factorisation by luck; its derivative is not unique all the same."""

    def f(p: torch.Tensor) -> torch.Tensor:
        return il.argmin(lambda z, p: (z.sum(-1) - p) ** 2, torch.zeros(2, dtype=torch.float64), p).value

    one = torch.ones((), dtype=torch.float64)
    with pytest.raises(il.NotPositiveDefiniteError):
        torch.func.jvp(f, (one,), (one,))
    p = one.clone().requires_grad_()
    with pytest.raises(il.NotPositiveDefiniteError):
        torch.autograd.grad(f(p).sum(), p)
