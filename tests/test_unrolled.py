"""Unrolled iterations: the modes agree, and where they have converged they give the exact gradient."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from implicit_layers.errors import ArgumentTypeError, DtypeError, NotPositiveDefiniteError, ShapeError
from implicit_layers.unrolled import MODES, unroll, unrolled_qp, unrolled_softmax

STEPS = 23


def contraction(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ W + x)


def contraction_problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    W = 0.15 * torch.randn(6, 6, generator=g, dtype=torch.float64)
    x = torch.randn(4, 6, generator=g, dtype=torch.float64)
    z0 = torch.randn(4, 6, generator=g, dtype=torch.float64)
    return W.requires_grad_(), x.requires_grad_(), z0.requires_grad_()


def gradients(**settings) -> tuple[Tensor, ...]:
    W, x, z0 = contraction_problem()
    z = unroll(contraction, z0, W, x, **settings)
    return z.detach(), *torch.autograd.grad(z.square().sum(), (W, x, z0))


@pytest.mark.parametrize("steps", [1, 2, 7, STEPS, 64])
def test_checkpointed_is_bit_identical_to_full(steps):
    for ours, reference in zip(
        gradients(steps=steps, mode="checkpointed"), gradients(steps=steps, mode="full"), strict=True
    ):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("steps", [1, STEPS])
def test_truncated_to_all_steps_equals_full(steps):
    for ours, reference in zip(
        gradients(steps=steps, mode="truncated", last=steps), gradients(steps=steps, mode="full"), strict=True
    ):
        assert torch.equal(ours, reference)


def test_full_gradient_is_that_of_finite_differences():
    W, x, z0 = contraction_problem()
    for mode in ("full", "checkpointed"):
        assert torch.autograd.gradcheck(
            lambda W, x, z0, mode=mode: unroll(contraction, z0, W, x, steps=5, mode=mode), (W, x, z0)
        )


def test_converged_gradients_equal_the_implicit_one_by_dense_algebra():
    W, x, _ = contraction_problem()
    z = unroll(contraction, torch.zeros_like(x), W, x, steps=400)
    grads = torch.autograd.grad(z.square().sum(), (W, x))
    z = z.detach()
    slope = 1.0 - z.square()  # d tanh
    grad_W, grad_x = torch.zeros_like(W), torch.zeros_like(x)
    for i in range(len(x)):  # J = I − diag(slope) Wᵀ in each row; u = J⁻ᵀ 2z
        J = torch.eye(6, dtype=z.dtype) - slope[i, :, None] * W.detach().T
        u = torch.linalg.solve(J.T, 2.0 * z[i]) * slope[i]
        grad_x[i] = u
        grad_W += torch.outer(z[i], u)
    torch.testing.assert_close(grads[0], grad_W, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grads[1], grad_x, rtol=1e-12, atol=1e-13)


def test_truncation_error_shrinks_and_last_defaults_to_one_step():
    exact = gradients(steps=200)[1]
    errors = [float((gradients_of_W(last) - exact).norm() / exact.norm()) for last in (1, 3, 6, 12)]
    assert errors[0] > 1e-2
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors))
    assert torch.equal(gradients_of_W(None), gradients_of_W(1))


def gradients_of_W(last: int | None) -> Tensor:
    W, x, z0 = contraction_problem()
    z = unroll(contraction, z0, W, x, steps=200, mode="truncated", last=last)
    return torch.autograd.grad(z.square().sum(), W)[0]


def test_truncated_to_nothing_is_a_constant_and_leaves_z0_alone():
    W, x, z0 = contraction_problem()
    assert not unroll(contraction, z0, W, x, steps=9, mode="truncated", last=0).requires_grad
    z = unroll(contraction, z0, W, x, steps=9, mode="truncated", last=2)
    assert torch.autograd.grad(z.sum(), z0, allow_unused=True) == (None,)


def test_no_steps_return_the_initial_point():
    W, x, z0 = contraction_problem()
    for mode in ("full", "truncated", "checkpointed", "reversible"):
        assert torch.equal(unroll(contraction, z0, W, x, steps=0, mode=mode), z0)


def test_checkpointed_remembers_less_and_runs_about_twice():
    calls = 0

    def counted(z, W, x):
        nonlocal calls
        calls += 1
        return contraction(z, W, x)

    def saved(mode):
        total, seen = 0, set()

        def pack(tensor):
            nonlocal total
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total += tensor.numel()
            return tensor

        W, x, z0 = contraction_problem()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z = unroll(counted, z0, W, x, steps=100, mode=mode)
        return total, z

    full, _ = saved("full")
    calls = 0
    checkpointed, z = saved("checkpointed")
    assert checkpointed < 0.2 * full
    assert calls == 100
    z.sum().backward()
    assert 190 <= calls <= 200


@pytest.mark.parametrize("mode", ["full", "checkpointed", "truncated", "reversible"])
def test_second_derivatives(mode):
    W, x, z0 = contraction_problem()
    settings = {"last": 3} if mode == "truncated" else {}
    assert torch.autograd.gradgradcheck(
        lambda x: unroll(contraction, z0.detach(), W.detach(), x, steps=3, mode=mode, **settings), (x,)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 3, "mode": "forgetful"}, "'full', 'truncated', 'checkpointed', 'reversible'"),
        ({"steps": -1}, "steps must be 0 or more"),
        ({"steps": 3, "last": 1}, "truncated"),
        ({"steps": 3, "mode": "truncated", "last": 4}, "between 0 and steps = 3"),
    ],
)
def test_meaningless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        gradients(**settings)


def test_a_step_that_changes_the_shape_is_refused():
    with pytest.raises(ShapeError, match="must keep the shape of z"):
        unroll(lambda z, x: z + x, torch.zeros(3), torch.zeros(2, 3), steps=2)


@pytest.mark.parametrize("mode", ["full", "checkpointed"])
@pytest.mark.parametrize(
    ("shape", "dim"), [((5,), 0), ((3, 4), 0), ((2, 3, 4), 1), ((0, 4), -1), ((2, 1), -1), ((), -1)]
)
def test_softmax_converges_to_the_closed_form_and_its_gradient(shape, dim, mode):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(shape, generator=g, dtype=torch.float64)
    ours = unrolled_softmax(x, dim, temperature=0.3, mode=mode)
    exact = torch.softmax(x / 0.3, dim)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad((weight * ours).sum(), x),
        torch.autograd.grad((weight * exact).sum(), x),
        rtol=0,
        atol=1e-12,
    )


def test_softmax_error_halves_with_every_step_at_rate_one_half():
    x = torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=torch.float64)
    exact = torch.log_softmax(x, -1)
    errors = [
        (unrolled_softmax(x, steps=k).log() - exact - (unrolled_softmax(x, steps=k).log() - exact).mean()).norm()
        for k in (4, 5, 6)
    ]
    assert errors[1] / errors[0] == pytest.approx(0.5)
    assert errors[2] / errors[1] == pytest.approx(0.5)


def test_softmax_keeps_a_masked_score_at_zero_and_refuses_a_rate_of_zero():
    x = torch.tensor([0.0, -math.inf, 1.0], requires_grad=True)
    y = unrolled_softmax(x)
    y[0].backward()
    torch.testing.assert_close(y, torch.softmax(x, -1))
    assert x.grad is not None and torch.isfinite(x.grad).all()
    with pytest.raises(ValueError, match="rate"):
        unrolled_softmax(x, rate=0.0)


def program(
    n: int = 6, n_ineq: int = 8, n_eq: int = 2, batch: tuple[int, ...] = (3,), seed: int = 0
) -> dict[str, Tensor]:
    """A strictly convex program whose solution z_star is strictly complementary, drawn backwards from it."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=g, dtype=torch.float64)

    L, G, A, z, nu = normal(n, n), normal(n_ineq, n), normal(n_eq, n), normal(n), normal(n_eq)
    pair = 0.2 + normal(n_ineq).abs()
    active = torch.arange(n_ineq) < max(1, (n - n_eq) // 2)  # few enough for independent rows
    lam, s = pair * active, pair * ~active
    Q = L @ L.mT / n + 0.5 * torch.eye(n, dtype=torch.float64)
    h = (G @ z[..., None])[..., 0] + s
    b = (A @ z[..., None])[..., 0]
    p = -((Q @ z[..., None]) + G.mT @ lam[..., None] + A.mT @ nu[..., None])[..., 0]
    return {"Q": Q, "p": p, "A": A, "b": b, "G": G, "h": h, "z_star": z, "active": lam > 0}


def active_set_solution(Q, p, A, b, G, h, active) -> Tensor:
    """The solution given the active rows, one dense KKT solve a problem, differentiable by autograd."""
    rows = []
    for i in range(len(p)):
        C, d = torch.cat([A[i], G[i][active[i]]]), torch.cat([b[i], h[i][active[i]]])
        n, m = len(p[i]), len(d)
        K = torch.cat([torch.cat([0.5 * (Q[i] + Q[i].T), C.T], 1), torch.cat([C, C.new_zeros(m, m)], 1)])
        rows.append(torch.linalg.solve(K, torch.cat([-p[i], d]))[:n])
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["full", "checkpointed"])
@pytest.mark.parametrize(("n", "n_ineq", "n_eq"), [(6, 8, 2), (1, 1, 0), (5, 3, 0), (4, 9, 1)])
def test_converged_qp_gradient_equals_that_of_the_active_set(n, n_ineq, n_eq, mode):
    problem = program(n, n_ineq, n_eq)
    z_star, active = problem.pop("z_star"), problem.pop("active")
    leaves = {name: tensor.requires_grad_() for name, tensor in problem.items()}
    z = unrolled_qp(**leaves, steps=3000, mode=mode)
    torch.testing.assert_close(z, z_star, rtol=1e-9, atol=1e-9)
    weight = torch.linspace(-1.0, 1.0, n, dtype=torch.float64)
    arguments = [leaf for leaf in leaves.values() if leaf.numel()]
    ours = torch.autograd.grad((weight * z).sum(), arguments)
    exact = torch.autograd.grad((weight * active_set_solution(**leaves, active=active)).sum(), arguments)
    for mine, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-7, atol=1e-8)


def test_qp_broadcasts_any_mix_of_batched_and_shared_arguments():
    problem = program(batch=(2, 3))
    z_star = problem.pop("z_star")
    problem.pop("active")
    torch.testing.assert_close(unrolled_qp(**problem, steps=2000), z_star, rtol=1e-8, atol=1e-8)
    shared = {name: tensor[0, 0] for name, tensor in problem.items()}
    for name in problem:
        mixed = unrolled_qp(**{**shared, name: problem[name]}, steps=50)
        single = unrolled_qp(**{**shared, name: problem[name][1, 2]}, steps=50)
        assert mixed.shape == (2, 3, 6)
        torch.testing.assert_close(mixed[1, 2], single, rtol=1e-9, atol=1e-10)
    assert unrolled_qp(**{name: tensor[:, :0] for name, tensor in problem.items()}, steps=3).shape == (2, 0, 6)


def test_qp_without_inequalities_takes_no_iterations():
    problem = program(n_ineq=0)
    z = unrolled_qp(problem["Q"], problem["p"], A=problem["A"], b=problem["b"], steps=0)
    torch.testing.assert_close(z, problem["z_star"])
    z = unrolled_qp(problem["Q"], problem["p"], steps=0)
    torch.testing.assert_close((problem["Q"] @ z[..., None])[..., 0], -problem["p"])


def test_qp_says_what_is_wrong():
    eye, p = torch.eye(2), torch.ones(2)
    with pytest.raises(NotPositiveDefiniteError, match="Q is not positive definite"):
        unrolled_qp(-eye, p)
    with pytest.raises(NotPositiveDefiniteError, match="drop dependent rows"):
        unrolled_qp(eye, p, A=torch.ones(2, 2), b=torch.ones(2))
    with pytest.raises(ValueError, match="G and h"):
        unrolled_qp(eye, p, G=eye)
    with pytest.raises(DtypeError, match="p is"):
        unrolled_qp(eye, p.double())


def test_a_planted_wrong_gradient_is_seen():
    """The comparison above can fail: a step whose derivative is doubled disagrees with the closed form."""
    x = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    wrong = unrolled_softmax(2 * x - x.detach())
    ours, exact = (torch.autograd.grad(y[0], x)[0] for y in (wrong, torch.softmax(x, -1)))
    assert (ours - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_step_in_place_changes_nothing_of_the_callers_and_no_result(mode: str, momentum: float) -> None:
    def plain(z: Tensor, a: Tensor) -> Tensor:
        return 0.5 * z + a

    def in_place(z: Tensor, a: Tensor) -> Tensor:
        return z.mul_(0.5).add_(a)

    def spoiling(z: Tensor, a: Tensor) -> Tensor:
        following = 0.5 * z + a
        z.zero_()
        return following

    results = []
    for step in (plain, in_place, spoiling):
        z0 = torch.tensor([1.0, -2.0], dtype=torch.float64)
        a = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
        z = unroll(step, z0, a, steps=7, mode=mode, momentum=momentum)  # type: ignore[arg-type]
        assert z0.tolist() == [1.0, -2.0]
        results.append((z.detach(), torch.autograd.grad(z.sum(), a)[0]))
    z, v = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(7):  # by hand
        v = momentum * v + (0.5 * z + torch.tensor([0.3, 0.7]).double() - z)
        z = z + v
    for value, gradient in results:
        assert torch.allclose(value, z, rtol=0, atol=1e-7)
        assert torch.allclose(gradient, results[0][1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", ["dtype", "none", "tuple", "list"])
def test_a_step_or_start_of_another_type_is_refused_in_every_mode(mode: str, bad: str) -> None:
    steps = {
        "dtype": lambda z: z.double(),
        "none": lambda z: None,
        "tuple": lambda z: (z, z),
        "list": lambda z: z,
    }
    z0 = [0.0, 1.0] if bad == "list" else torch.zeros(2)
    with pytest.raises((DtypeError, ShapeError)):
        unroll(steps[bad], z0, steps=3, mode=mode)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", [{"steps": 2.5}, {"steps": True}, {"steps": 3, "mode": "truncated", "last": 1.0}])
def test_a_number_of_steps_that_is_no_int_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ArgumentTypeError):
        unroll(lambda z: z, torch.zeros(2), **setting)


def test_under_autocast_the_iterates_keep_their_dtype() -> None:
    W = 0.3 * torch.eye(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = unroll(lambda z, W: z @ W, torch.ones(2, 3), W, steps=2)
    assert z.dtype == torch.float32
    assert torch.allclose(z, torch.full((2, 3), 0.09), rtol=1e-2)
