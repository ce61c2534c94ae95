"""The three conditions of the theorem, each met and each broken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import implicit_layers as il

F64 = torch.float64


def square(z: Tensor, t: Tensor) -> Tensor:
    return z * z - t


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64).unsqueeze(-1)


def test_each_condition_by_itself():
    report = il.check_ift(square, column(2.0, 0.0, 2.1, -3.0), column(4.0, 0.0, 4.0, 9.0))
    assert report.solved.tolist() == [True, True, False, True]
    assert report.invertible.tolist() == [True, False, True, True]
    assert report.differentiable.all()
    assert report.ok.tolist() == [True, False, False, True]
    assert not report
    assert torch.allclose(report.residual, torch.tensor([0.0, 0.0, 0.41, 0.0], dtype=F64))
    assert torch.allclose(report.smallest_singular_value, torch.tensor([4.0, 0.0, 4.2, 6.0], dtype=F64))


def test_a_kink_is_no_derivative():
    def F(z: Tensor, t: Tensor) -> Tensor:
        return torch.where(z > 0, z, 2 * z) - t

    report = il.check_ift(F, column(0.0, 1.0, -2.0), column(0.0, 1.0, -4.0))
    assert report.smooth.tolist() == [False, True, True]
    assert report.finite.all() and report.solved.all() and report.invertible.all()


def test_smooth_functions_pass_as_such():
    for F in (
        lambda z, t: z * z.abs() - t,  # once differentiable at 0
        lambda z, t: torch.exp(3 * z) - t - 1,
        lambda z, t: z + 0.1 * torch.sin(50 * z) - t,
    ):
        assert il.check_ift(F, column(0.0), column(0.0)).smooth.all()


def test_derivatives_that_are_not_finite():
    report = il.check_ift(lambda z, t: z - t.sqrt(), column(0.0, 2.0), column(0.0, 4.0))
    assert report.finite.tolist() == [False, True]
    assert report.invertible.all()
    report = il.check_ift(lambda z, t: z.abs().sqrt() - t, column(0.0), column(0.0))
    assert not report.finite.any() and not report.invertible.any()
    report = il.check_ift(square, column(torch.nan, 2.0), column(4.0, 4.0))
    assert report.ok.tolist() == [False, True]


@settings(derandomize=True, max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_singular_values_are_those_of_the_matrix(n: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    A, z = torch.randn(3, n, n, dtype=F64, generator=g), torch.randn(3, n, dtype=F64, generator=g)
    report = il.check_ift(
        lambda z, A, b: (A @ z.unsqueeze(-1)).squeeze(-1) - b, z, A, (A @ z.unsqueeze(-1)).squeeze(-1)
    )
    values = torch.linalg.svdvals(A)
    assert torch.allclose(report.largest_singular_value, values[:, 0])
    assert torch.allclose(report.smallest_singular_value, values[:, -1], atol=1e-12)
    assert torch.allclose(report.condition, values[:, 0] / values[:, -1], rtol=1e-6)
    assert report.solved.all() and report.differentiable.all()


@settings(derandomize=True, max_examples=15, deadline=None)
@given(st.integers(-8, 8), st.integers(-8, 8))
def test_units_do_not_matter(unit_of_z: int, unit_of_f: int):
    s, r = 10.0**unit_of_z, 10.0**unit_of_f
    t = torch.tensor([[2.0, 3.0]], dtype=F64)
    rows = torch.tensor([1.0, 1e9], dtype=F64)
    assert il.check_ift(lambda z, t: r * rows * ((z / s) ** 2 - t), s * t.sqrt(), t)
    assert not il.check_ift(lambda z, t: r * rows * ((z / s) ** 2 - t), s * (t.sqrt() + 1e-3), t)


def test_what_the_report_calls_singular_the_gradient_refuses():
    for gap in (1e-3, 1e-6, 1e-8, 1e-10, 1e-12):
        M = torch.tensor([[1.0, 1.0], [1.0, 1.0 + gap]], dtype=F64)
        x = torch.ones(2, dtype=F64, requires_grad=True)
        ok = bool(il.check_ift(lambda z, x, M=M: M @ (z - x), x.detach(), x.detach()).invertible)
        z = il.attach_gradient(lambda z, x, M=M: M @ z - x, torch.linalg.solve(M, x.detach()), x)
        if gap >= 1e-8:
            assert ok
            z[0].backward()
        if gap <= 1e-10:
            assert not ok
            with pytest.raises(il.SingularAdjointError):
                z[0].backward()


def test_the_table_says_what_fails_where():
    text = str(il.check_ift(square, column(2.0, 0.0, 2.1), column(4.0, 0.0, 4.0)))
    lines = text.splitlines()
    assert "1 of 3 problems" in lines[0]
    assert "1" in lines[2].split()[0] and "3: dF/dz is singular" in lines[2]
    assert "2" in lines[3].split()[0] and "1: z is no solution" in lines[3]
    assert lines[4].endswith("ok")
    many = str(il.check_ift(square, torch.ones(5, 10, 1), torch.ones(5, 10, 1)))
    assert "30 more" in many and "(0, 0)" in many
    assert "()" in str(il.check_ift(square, torch.tensor(2.0), torch.tensor(4.0)))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 1)])
def test_empty(shape: tuple[int, ...]):
    report = il.check_ift(lambda z, t: z - t, torch.zeros(shape), torch.zeros(shape))
    assert report.ok.shape == shape[:-1]
    assert report
    assert "problems satisfy" in str(report)


def test_modules_parameters_and_grad_modes():
    cell = nn.Linear(3, 3, dtype=F64)
    x = torch.randn(2, 3, dtype=F64)
    z = il.fixed_point(lambda z, c, x: 0.2 * torch.tanh(c(z)) + x, torch.zeros_like(x), cell, x).value
    report = il.check_ift(lambda z, c, x: z - 0.2 * torch.tanh(c(z)) - x, z, cell, x)
    assert report and not report.residual.requires_grad
    with torch.inference_mode():
        assert il.check_ift(square, torch.full((1,), 2.0), torch.full((1,), 4.0))
    captured = torch.full((1,), 4.0, requires_grad=True)
    assert il.check_ift(lambda z: z * z - captured, torch.full((1,), 2.0))  # nothing is differentiated here


def test_one_coupled_problem():
    C = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=F64)
    report = il.check_ift(lambda z: C @ z - 3, torch.ones(2, 4, dtype=F64), batch_dims=0)
    assert report.ok.shape == ()
    assert abs(report.condition - 3) < 1e-10


def test_float32_and_half():
    for dtype in (torch.float32, torch.bfloat16):
        t = torch.tensor([[4.0]], dtype=dtype)
        assert il.check_ift(square, t.sqrt(), t)


def test_bad_arguments():
    with pytest.raises(il.ShapeError):
        il.check_ift(lambda z: z.sum(), torch.ones(3))
    with pytest.raises(il.DtypeError):
        il.check_ift(lambda z: z, torch.ones(3, dtype=torch.int32))


@pytest.mark.parametrize("shift", [0.0, 0.3, -1.7])
def test_the_reports_own_system_is_singular_where_logsumexp_is_one(shift: float) -> None:
    """Its singular row is then nothing but rounding, which scaling to unit length must not revive."""
    theta = torch.tensor([0.1, 0.7, -0.4 + shift], dtype=torch.float64)
    for target, expected in ((1.0, False), (1.5, True)):
        moved = theta - theta.logsumexp(0) + target
        y = moved.softmax(0)
        point = torch.cat([y, (1.0 - moved.logsumexp(0)).reshape(1)])

        def residual(point: Tensor, moved: Tensor) -> Tensor:
            x, u = point[:3], point[3:]
            return torch.cat([moved - x.log() - 1.0 + u, u * (x.sum() - 1.0)])

        report = il.check_ift(residual, point, moved)
        assert bool(report.invertible) == expected, str(report)
