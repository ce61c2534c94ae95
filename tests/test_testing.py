"""The public test helpers, tested: a certificate that sees every kind of violation, problems with known answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

import implicit_layers as il
from implicit_layers.testing import check_gradients, kkt_certificate, random_qp


@pytest.mark.parametrize("size", [(1, 0, 0), (1, 1, 0), (5, 0, 5), (6, 9, 2), (10, 40, 3)], ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (2, 0), (2, 3)], ids=str)
def test_random_problems_have_the_solution_they_claim(size: tuple[int, int, int], batch: tuple[int, ...]) -> None:
    Q, p, A, b, G, h, z, nu, lam = random_qp(*size, batch=batch, seed=5)
    certificate = kkt_certificate(Q, p, z, nu, lam, A=A, b=b, G=G, h=h)
    assert certificate.shape == batch and certificate.lt(1e-13).all()
    slack = h - (G @ z.unsqueeze(-1)).squeeze(-1)
    assert ((lam > 0) ^ (slack > 1e-9)).all(), "strictly complementary"
    assert torch.equal(random_qp(*size, batch=batch, seed=5).p, p)
    if p.numel():
        assert not torch.equal(random_qp(*size, batch=batch, seed=6).p, p)


def test_condition_number_is_the_one_asked_for() -> None:
    assert torch.linalg.cond(random_qp(8, condition=1e5).Q).item() == pytest.approx(1e5, rel=1e-6)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": 2, "n_eq": 3}, {"n": 2, "active": 2.0}, {"n": 2, "condition": 0.5}])
def test_impossible_sizes(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="random_qp"):
        random_qp(**wrong)  # type: ignore[arg-type]


def test_certificate_sees_every_violation() -> None:
    Q, p, A, b, G, h, z, nu, lam = random_qp(5, 4, 2, seed=1, active=0.5)
    rows = {"A": A, "b": b, "G": G, "h": h}
    inactive = int((lam == 0).nonzero()[0])

    def bumped(vector: Tensor, index: int, by: float) -> Tensor:
        vector = vector.clone()
        vector[index] += by
        return vector

    wrong = [
        kkt_certificate(Q, p + 0.5, z, nu, lam, **rows),
        kkt_certificate(Q, p, z, nu, lam, **{**rows, "b": b + 0.5}),
        kkt_certificate(Q, p, z, nu, lam, **{**rows, "h": h - 5.0}),
        kkt_certificate(Q, p, z, nu, bumped(lam, inactive, -0.5), **rows),
        kkt_certificate(Q, p - 0.5 * G[inactive], z, nu, bumped(lam, inactive, 0.5), **rows),
    ]
    assert all(float(value) > 1e-2 for value in wrong)
    assert kkt_certificate(Q, p, z * torch.nan, nu, lam, **rows).isnan()


def test_certificate_needs_the_duals() -> None:
    Q, p, A, b, G, h, z, nu, lam = random_qp(5, 4, 2, seed=1)
    with pytest.raises(ValueError, match="duals"):
        kkt_certificate(Q, p, z, lam=lam, A=A, b=b, G=G, h=h)
    with pytest.raises(ValueError, match="duals"):
        kkt_certificate(Q, p, z, nu, A=A, b=b, G=G, h=h)


class WrongSine(torch.autograd.Function):
    """sin with a gradient that is wrong by one part in ten thousand."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 1.0001 * x.cos() * gradient


def test_a_wrong_gradient_is_caught() -> None:
    check_gradients(torch.sin, torch.tensor([0.3, 0.7]))
    with pytest.raises(GradcheckError):
        check_gradients(WrongSine.apply, torch.tensor([0.3, 0.7]), forward_mode=False, second=False)


def test_a_detached_second_derivative_is_caught() -> None:
    def cut(x: Tensor) -> Tensor:
        return x.detach() ** 2 * x

    with pytest.raises(GradcheckError):
        check_gradients(cut, torch.tensor([0.3, 0.7]))


def test_certificate_accepts_the_layer_in_float32() -> None:
    problem = random_qp(5, 4, 2, batch=(3,), seed=1, dtype=torch.float32)
    Q, p, A, b, G, h, *_ = problem
    solution = il.solve_qp(Q, p, A=A, b=b, G=G, h=h)
    certificate = kkt_certificate(Q, p, solution.z, solution.nu, solution.lam, A=A, b=b, G=G, h=h)
    assert certificate.dtype == torch.float64 and certificate.max() < 1e-6
