"""The KKT functions of a quadratic program, against autograd and dense algebra."""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_layers.kkt import quadratic
from implicit_layers.testing import random_qp


def stacked_residual(problem: tuple[Tensor, ...], point: Tensor) -> Tensor:
    """F(z, ν, λ) as one vector, from the parts whose zero defines the solution."""
    Q, p, A, b, G, h = problem
    z, nu, lam = point.split([p.shape[-1], b.shape[-1], h.shape[-1]], dim=-1)
    parts = quadratic.residual(Q, p, A, b, G, h, z, nu, lam)
    return torch.cat([parts.stationarity, parts.equality, parts.complementarity], dim=-1)


def test_residual_vanishes_at_the_solution_only() -> None:
    Q, p, A, b, G, h, z, nu, lam = random_qp(6, 5, 2, batch=(3,), seed=1)
    for part in quadratic.residual(Q, p, A, b, G, h, z, nu, lam):
        assert part.abs().max() < 1e-13
    moved = quadratic.residual(Q, p, A, b, G, h, z + 1, nu, lam - 1)
    assert moved.stationarity.abs().amax(-1).min() > 1e-3 and moved.equality.abs().amax(-1).min() > 1e-3
    assert moved.dual.amax(-1).min() > 0.5


def test_jacobian_is_that_of_the_residual() -> None:
    *problem, z, nu, lam = random_qp(4, 3, 2, batch=(2,), seed=2)
    point = torch.cat([z, nu, lam], dim=-1) + 0.1
    z, nu, lam = point.split([4, 2, 3], dim=-1)
    ours = quadratic.jacobian(problem[0], problem[2], problem[4], problem[5], z, lam)
    for i in range(2):
        one = tuple(tensor[i] for tensor in problem)
        expected = torch.func.jacrev(lambda v, one=one: stacked_residual(one, v))(point[i])
        assert torch.allclose(ours[i], expected, atol=1e-14)


def test_jacobian_broadcasts() -> None:
    Q, _, A, _, G, h, z, _, lam = random_qp(4, 3, 2, batch=(2,), seed=2)
    ours = quadratic.jacobian(Q[0], A[0], G[0], h[0], z, lam)
    assert ours.shape == (2, 9, 9)
    assert torch.equal(ours[1], quadratic.jacobian(Q[0], A[0], G[0], h[0], z[1], lam[1]))


def test_active_set_solve_is_the_dense_kkt_solve() -> None:
    """With the factors, refined or not, and with inactive rows pinned to zero."""
    Q, p, A, b, G, h, _, _, lam = random_qp(6, 5, 2, batch=(3,), seed=3)
    E, f = torch.cat([A, G], dim=-2), torch.cat([b, h], dim=-1)
    active = torch.cat([torch.ones(3, 2), lam > 0], dim=-1).double()
    chol_q = torch.linalg.cholesky(Q)
    reduced = quadratic.reduce(chol_q, p, E, f, 2, 1e-10)
    assert torch.allclose(reduced.schur.diagonal(dim1=-2, dim2=-1), torch.ones(3, 7).double())
    factor, positive = quadratic.factorise(reduced, active)
    assert positive.all()
    r_z, r_y = torch.randn(3, 6).double(), torch.randn(3, 7).double()
    E_a = E * active.unsqueeze(-1)
    lower = torch.cat([E_a, torch.diag_embed(1.0 - active)], dim=-1)
    K = torch.cat([torch.cat([Q, E_a.mT], dim=-1), lower], dim=-2)
    expected = torch.stack([torch.linalg.solve(K[i], torch.cat([r_z[i], active[i] * r_y[i]])) for i in range(3)])
    ridged = quadratic.factorise_with_ridge(reduced, active, 1e-10)
    for each, refine in ((factor, 0), (factor, 1), (factor, 2), (ridged, 2)):
        u_z, u_y, u_bound = quadratic.solve(each, Q, E, r_z, r_y, None, refine)
        assert not u_bound.any()
        assert torch.allclose(torch.cat([u_z, u_y], dim=-1), expected, atol=1e-10)


def test_dependent_rows_are_noticed() -> None:
    Q, p, A, b, *_ = random_qp(6, 0, 2, batch=(3,), seed=3)
    E, f = torch.cat([A, A[:, :1]], dim=-2), torch.cat([b, b[:, :1]], dim=-1)
    chol_q = torch.linalg.cholesky(Q)
    everything = torch.ones(3, 3, dtype=torch.float64)
    for n_eq in (3, 2, 0):  # whether they are equalities or inequalities
        reduced = quadratic.reduce(chol_q, p, E, f, n_eq, 1e-10)
        assert reduced.dependent.all() == (n_eq == 3)
        assert not quadratic.factorise(reduced, everything)[1].any()


def test_shared_matrices_are_recognised_and_not_copied() -> None:
    shared = torch.randn(4, 4, dtype=torch.float64)
    flat = quadratic.unexpand(shared.expand(2, 3, 4, 4), 2, torch.Size((2, 3)))
    assert flat.shape == (1, 4, 4) and flat.data_ptr() == shared.data_ptr()
    own = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert quadratic.unexpand(own, 2, torch.Size((2, 3))).shape == (6, 4, 4)
    half = torch.randn(2, 1, 4, 4, dtype=torch.float64).expand(2, 3, 4, 4)
    assert torch.equal(quadratic.unexpand(half, 2, torch.Size((2, 3)))[4], half[1, 1])


def test_products_of_one_matrix_with_many_vectors() -> None:
    matrix, vectors = torch.randn(1, 3, 4).double(), torch.randn(5, 4).double()
    assert torch.allclose(quadratic.matvec(matrix, vectors), quadratic.matvec(matrix.expand(5, 3, 4), vectors))
    left = torch.randn(5, 3).double()
    full = quadratic.transposed_matvec(matrix.expand(5, 3, 4), left)
    assert torch.allclose(quadratic.transposed_matvec(matrix, left), full)
    definite = torch.linalg.cholesky(matrix @ matrix.mT + torch.eye(3).double())
    full = quadratic.cholesky_solve(definite.expand(5, 3, 3).contiguous(), left)
    assert torch.allclose(quadratic.cholesky_solve(definite, left), full)
