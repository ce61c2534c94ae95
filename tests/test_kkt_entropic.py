"""The KKT system of the softmax LP against dense linear algebra, finite differences and the report's own slip."""

import pytest
import torch

from implicit_layers.kkt import entropic

BATCHES = [(), (3,), (2, 3), (0,)]
SIZES = [1, 2, 5]


def scores(batch, n, seed=0, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*batch, n, dtype=torch.float64, generator=generator)


def temperatures(batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 0.3 + torch.rand(batch, dtype=torch.float64, generator=generator)


def loop_det(matrices):
    return torch.stack([torch.linalg.det(matrix) for matrix in matrices.reshape(-1, *matrices.shape[-2:])])


def loop_inv(matrices):
    flat = [torch.linalg.inv(matrix) for matrix in matrices.reshape(-1, *matrices.shape[-2:])]
    return torch.stack(flat).reshape(matrices.shape) if flat else matrices


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("n", SIZES)
def test_the_solution_is_softmax_and_a_root(batch, n):
    x, tau = scores(batch, n), temperatures(batch)
    point = entropic.solution(x, tau)
    torch.testing.assert_close(point.y, torch.softmax(x / tau[..., None], -1))
    torch.testing.assert_close(point.u, tau * (1 - torch.logsumexp(x / tau[..., None], -1)))
    residual = entropic.residual(point, x, tau)
    assert residual.flat().shape == (*batch, 2 * n + 1)
    torch.testing.assert_close(residual.flat(), torch.zeros(*batch, 2 * n + 1, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_the_jacobian_is_the_derivative_of_the_residual_anywhere(batch):
    n = 4
    y, v = scores(batch, n, 2).exp(), scores(batch, n, 3).exp()
    u, x, tau = scores(batch, 1, 4).squeeze(-1), scores(batch, n, 5), temperatures(batch)

    def flat_residual(z, x, tau):
        return entropic.residual(entropic.Point(z[:n], z[n], z[n + 1 :]), x, tau).flat()

    z = torch.cat([y, u[..., None], v], -1).reshape(-1, 2 * n + 1)
    by_autograd = torch.func.vmap(torch.func.jacrev(flat_residual))(z, x.reshape(-1, n), tau.reshape(-1))
    dense = entropic.jacobian(entropic.Point(y, u, v), tau).dense()
    torch.testing.assert_close(dense.reshape(by_autograd.shape), by_autograd)

    def flat_log_residual(z, x, tau):
        stationarity, primal = entropic.log_residual(z[:n], z[n], x, tau)
        return torch.cat([stationarity, primal[None]])

    point = entropic.solution(x, tau)
    z = torch.cat([point.y.log(), point.u[..., None]], -1).reshape(-1, n + 1)
    by_autograd = torch.func.vmap(torch.func.jacrev(flat_log_residual))(z, x.reshape(-1, n), tau.reshape(-1))
    dense = entropic.log_inverse(point.y, tau).dense()
    torch.testing.assert_close(dense.reshape(by_autograd.shape), loop_inv(by_autograd), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("n", SIZES)
def test_the_block_inverse_is_the_inverse(batch, n):
    x, tau = scores(batch, n), temperatures(batch)
    point = entropic.solution(x, tau)
    close = {"rtol": 1e-9, "atol": 1e-10}
    full = entropic.inverse(point, tau).dense()
    torch.testing.assert_close(full, loop_inv(entropic.jacobian(point, tau).dense()), **close)
    reduced = entropic.reduced_inverse(point.y, tau).dense()
    torch.testing.assert_close(reduced, loop_inv(entropic.reduced_jacobian(point.y, tau).dense()), **close)
    torch.testing.assert_close(reduced, full[..., : n + 1, : n + 1], **close)
    off = entropic.Point(scores(batch, n, 7).exp(), point.u, scores(batch, n, 8).exp())  # any y > 0 and v ≥ 0
    torch.testing.assert_close(
        entropic.inverse(off, tau).dense(), loop_inv(entropic.jacobian(off, tau).dense()), **close
    )


def test_the_blocks_of_the_inverse_are_the_formulas_of_the_text():
    x, tau = scores((), 4), temperatures(())
    y = torch.softmax(x / tau, -1)
    S = (torch.diag(y) - torch.outer(y, y)) / tau
    one, eye = torch.ones(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    blocks = entropic.inverse(entropic.solution(x, tau), tau)
    expected = entropic.Blocks(
        yy=-S, yu=y[:, None], yv=(eye - torch.outer(y, one)) / tau,
        uy=y[None], uu=tau.reshape(1, 1), uv=-one[None],
        vy=torch.zeros(4, 4).double(), vu=torch.zeros(4, 1).double(), vv=torch.diag(1 / y),
    )  # fmt: skip
    for got, want in zip(blocks, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", SIZES)
def test_determinants(n):
    x, tau = scores((6,), n), temperatures((6,))
    point = entropic.solution(x, tau)
    sign = (-1.0) ** n
    torch.testing.assert_close(loop_det(entropic.jacobian(point, tau).dense()), sign * tau ** (n - 1))
    reduced = loop_det(entropic.reduced_jacobian(point.y, tau).dense())
    torch.testing.assert_close(reduced, sign * tau ** (n - 1) / point.y.prod(-1), rtol=1e-9, atol=0)
    seed = entropic.seed_system(x)  # τ = 1: the report's Jacobian has det (−1)ⁿ u, the right one (−1)ⁿ
    torch.testing.assert_close(loop_det(seed.jacobian.dense()), sign * (1 - x.logsumexp(-1)), rtol=1e-9, atol=1e-12)


def test_the_seed_has_a_spurious_root_where_implicit_differentiation_is_wrong():
    x = scores((), 4)
    spurious = entropic.seed_spurious_root(x)
    assert entropic.seed_residual(spurious, x).flat().abs().max() < 1e-14
    assert abs(float(spurious.y.sum()) - 1) > 0.1  # not on the simplex
    assert entropic.residual(spurious, x).flat().abs().max() > 0.1  # the corrected system refuses it
    J = entropic.seed_jacobian(spurious).dense()  # regular there, so the theorem applies: to the wrong branch
    derivative = -torch.linalg.inv(J)[:4, :4]
    torch.testing.assert_close(derivative, torch.diag(spurious.y), rtol=1e-10, atol=1e-12)


def test_the_seed_is_singular_at_logsumexp_one_and_the_corrected_system_is_not():
    x = scores((), 5)
    x = x + 1 - x.logsumexp(-1)
    seed = entropic.seed_system(x)
    assert seed.residual.flat().abs().max() < 1e-14
    assert torch.linalg.svdvals(seed.jacobian.dense())[-1] < 1e-15
    right = entropic.jacobian(seed.point).dense()
    assert torch.linalg.svdvals(right)[-1] > 1e-3
    torch.testing.assert_close(torch.linalg.det(right), torch.tensor(-1.0, dtype=torch.float64))


def test_the_sign_of_u_is_free():
    low = entropic.solution(torch.tensor([-3.0, -4.0], dtype=torch.float64))
    high = entropic.solution(torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert low.u > 0 > high.u
    torch.testing.assert_close(low.u - high.u, torch.tensor(7.0).double())  # x + c moves u by −c; here also a swap


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_vjp_jvp_and_the_inverse_agree_with_autograd(batch):
    n = 5
    x, tau = scores(batch, n).requires_grad_(), temperatures(batch).requires_grad_()
    g, dx, dtau = scores(batch, n, 2), scores(batch, n, 3), scores(batch, 1, 4).squeeze(-1)
    y = torch.softmax(x / tau[..., None], -1)
    want_x, want_tau = torch.autograd.grad((y * g).sum(), (x, tau))
    with torch.no_grad():
        shifted = x / tau[..., None] - 3.0  # any constant may be subtracted
        got = entropic.vjp(y, shifted, g, tau)
        torch.testing.assert_close(got.x, want_x)
        torch.testing.assert_close(got.temperature, want_tau)
        dy = entropic.jvp(y, shifted, dx, dtau, tau)
        torch.testing.assert_close((dy * g).sum(), (got.x * dx).sum() + (got.temperature * dtau).sum())
        step = 1e-6
        moved = [torch.softmax((x + h * dx) / (tau + h * dtau)[..., None], -1) for h in (step, -step)]
        torch.testing.assert_close(dy, (moved[0] - moved[1]) / (2 * step), rtol=1e-7, atol=1e-9)


def test_zeros_in_y_reach_no_division_in_the_reduced_inverse():
    y = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    for blocks in (entropic.reduced_inverse(y), entropic.log_inverse(y)):
        assert blocks.dense().isfinite().all()
    got = entropic.vjp(y, torch.tensor([-900.0, 0.0, -900.0]).double(), torch.ones(3).double())
    assert (got.x == 0).all()
    assert got.temperature == 0


def test_newton_with_the_explicit_inverse_stays_at_the_root_and_carries_its_derivative():
    x, tau = scores((3,), 4).requires_grad_(), temperatures((3,)).requires_grad_()
    point = entropic.solution(x.detach(), tau.detach())
    log_y, u = entropic.log_newton_step(point.y.log(), point.u, x, tau)
    torch.testing.assert_close(log_y.exp(), point.y, rtol=1e-13, atol=0)
    g = scores((3,), 4, 9)
    got = torch.autograd.grad((log_y.exp() * g).sum(), (x, tau), retain_graph=True)
    want = torch.autograd.grad((torch.softmax(x / tau[:, None], -1) * g).sum(), (x, tau))
    torch.testing.assert_close(got, want)
    (du,) = torch.autograd.grad(u.sum(), x)
    torch.testing.assert_close(du, -point.y)  # du/dx = −yᵀ


def test_a_planted_slip_is_seen():
    """The determinant and inverse tests above can fail: the report's row spoils both."""
    x = scores((), 3)
    seed = entropic.seed_system(x)
    product = entropic.inverse(seed.point).dense() @ seed.jacobian.dense()
    assert (product - torch.eye(7, dtype=torch.float64)).abs().max() > 0.1
