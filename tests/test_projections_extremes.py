"""Projections of numbers near the largest that a dtype holds: the answer is a number wherever the true one is."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

import implicit_layers as il

DTYPES = [torch.float32, torch.float64]
POINTS = [
    [1.0, 1.0, 1.0, -1.0],
    [1.0, -1.0, 0.5, -1.0],
    [1.0, 1.0, 0.875, 0.75],
    [-1.0, -1.0, -1.0, -1.0],
    [1.0, -1.0, 1.0, 0.0],
]


def grown(point: list[float], dtype: torch.dtype) -> tuple[Tensor, float]:
    """The point times the largest number, and that number."""
    largest = torch.finfo(dtype).max
    return largest * torch.tensor(point, dtype=dtype), largest


@pytest.mark.parametrize(("dtype", "weight"), [(torch.float32, 1.0), (torch.float32, 1e38), (torch.float64, 1.0)])
@pytest.mark.parametrize("point", POINTS)
def test_a_regression_grows_with_its_data(point, dtype, weight):
    x, largest = grown(point, dtype)
    found = il.projections.isotonic(x, weight=weight)
    expected = il.projections.isotonic(torch.tensor(point, dtype=torch.float64))
    torch.testing.assert_close((found / largest).double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("point", POINTS)
def test_ranks_of_large_scores_are_those_of_scores_far_apart(point, dtype):
    x, largest = grown(point, dtype)
    x = x.requires_grad_()
    ranks = il.soft_rank(x)
    apart = (1e6 * torch.tensor(point, dtype=torch.float64)).requires_grad_()
    expected = il.soft_rank(apart)
    torch.testing.assert_close(ranks.double(), expected)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    (found,) = torch.autograd.grad(ranks, x, weights.to(dtype))
    (wanted,) = torch.autograd.grad(expected, apart, weights)
    torch.testing.assert_close(found.double(), wanted)
    mean = float(sum(Fraction(v) for v in point) / 4)
    torch.testing.assert_close((il.soft_sort(x) / largest).double(), torch.full((4,), mean).double())  # one block


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("normal", [[1.0, 1.0, 1.0, 1.0], [1e30, 2e30, 0.0, -1e30], [1e-30, 0.0, 0.0, 0.0]])
def test_planes_far_from_a_point(point, dtype, normal):
    """In fractions: x − (aᵀx − b) a/‖a‖²."""
    x = 0.375 * grown(point, dtype)[0]  # the sum over a overflows, the answer does not
    a = torch.tensor(normal, dtype=dtype)
    exact_a = [Fraction(v) for v in a.tolist()]
    exact_x = [Fraction(v) for v in x.tolist()]
    gap = sum(p * q for p, q in zip(exact_a, exact_x, strict=True)) - Fraction(1)
    share = gap / sum(p * p for p in exact_a)
    y = torch.tensor([float(q - share * p) for p, q in zip(exact_a, exact_x, strict=True)], dtype=torch.float64)
    scale = float(x.double().abs().max())
    for project, expected in (
        (il.projections.hyperplane, y),
        (il.projections.half_space, y if gap > 0 else x.double()),
    ):
        found = project(x, normal=a, offset=1.0).double()
        assert float(((found - expected) / scale).abs().max()) < 8 * torch.finfo(dtype).eps
