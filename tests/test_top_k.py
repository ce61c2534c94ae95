"""Soft top-k against bracketing, the limits that are known, finite differences and hard inputs."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import implicit_layers as il

INF = math.inf
MAPS = {"entropy": scipy.special.expit, "euclidean": lambda s: np.clip(s, 0, 1)}
each = pytest.mark.parametrize("regulariser", MAPS)


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_bracketing(x, k, tau, regulariser):
    """The shift by scipy's root finder."""
    f = MAPS[regulariser]
    wide = 60 * tau + float(x.max() - x.min()) + 1
    shift = scipy.optimize.brentq(
        lambda c: f((x + c) / tau).sum() - k, -x.max() - wide, -x.min() + wide, xtol=1e-15, rtol=1e-15, maxiter=500
    )
    return f((x + shift) / tau)


@each
@pytest.mark.parametrize("tau", [0.01, 0.3, 5.0])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (5, 2), (5, 2.7), (5, 0.2), (40, 39.5), (3000, 3), (300, 150)])
def test_the_value_is_the_root_that_bracketing_finds(regulariser, n, k, tau):
    x = draw(3, n)
    y = il.soft_top_k(x, k, temperature=tau, regulariser=regulariser)
    assert float((y.sum(-1) - k).abs().max()) < 1e-11 * max(1, k)
    for row, found in zip(x, y, strict=True):
        expected = torch.from_numpy(by_bracketing(row.numpy(), k, tau, regulariser))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@each
def test_a_small_temperature_marks_the_largest(regulariser):
    x = draw(6, 9)
    y = il.soft_top_k(x, 3, temperature=1e-4, regulariser=regulariser)
    expected = torch.zeros_like(x).scatter_(-1, x.topk(3).indices, 1.0)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@each
@pytest.mark.parametrize("k", [0, 5, 5.0, 0.0])
def test_none_and_all(regulariser, k):
    x, ks = draw(2, 5).requires_grad_(), torch.full((2, 1), float(k), dtype=torch.float64, requires_grad=True)
    for many in (k, ks):
        y = il.soft_top_k(x, many, regulariser=regulariser)
        assert bool((y == k / 5).all())
    p, q = torch.autograd.grad(y, (x, ks), draw(2, 5, seed=1))
    assert bool((p == 0).all()) and bool(q.isfinite().all())


@each
def test_derivatives_in_scores_k_and_temperature(regulariser):
    x = torch.tensor([[0.5, 0.0, -1.3, 0.3], [0.1, 0.9, -0.2, 0.6]], dtype=torch.float64, requires_grad=True)
    k = torch.tensor([[1.6], [2.3]], dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def function(x, k, tau):
        return il.soft_top_k(x, k, temperature=tau, regulariser=regulariser)

    assert gradcheck(function, (x, k, tau), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, (x, k, tau), check_fwd_over_rev=True)


@each
def test_saturated_answers_have_no_gradient_in_the_scores_and_half_of_each_in_k(regulariser):
    x = torch.tensor([5.0, 4.0, 0.0, -3.0], dtype=torch.float64, requires_grad=True)
    k = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([1.0, 2.0, 5.0, 7.0], dtype=torch.float64)
    y = il.soft_top_k(x, k, temperature=1e-3, regulariser=regulariser)
    p, q = torch.autograd.grad(y, (x, k), g)
    assert bool((p == 0).all()) and float(q) == 3.5  # up: the entry 0 comes in; down: the entry 4 goes out


def test_two_places_is_a_sinkhorn_problem_of_two_columns():
    """Entropic transport of n points to two bins with masses n − k and k, costs 0 and −x: the same answer."""
    x, k, tau = draw(6).numpy(), 2.3, 0.4
    kernel, v = np.exp(np.stack([np.zeros(6), x], 1) / tau), np.ones(2)
    for _ in range(2000):
        u = 1 / (kernel @ v)
        v = np.array([6 - k, k]) / (kernel.T @ u)
    expected = torch.from_numpy((u[:, None] * kernel * v)[:, 1])
    found = il.soft_top_k(torch.from_numpy(x), k, temperature=tau)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 1.5])
@pytest.mark.parametrize(
    "scores",
    [
        [0.0, 0.0, 0.0, 0.0],
        [1e4, 1e4, -1e4, 0.0],
        [0.0, -INF, 0.5, -INF],
        [6e-8, 0.0, -6e-8, 6e-8],
        [1.0, 1.0, 1.0, 0.9],
    ],
    ids=str,
)
def test_hard_scores(scores, k, dtype, regulariser):
    x = torch.tensor(scores, dtype=dtype, requires_grad=True)
    y = il.soft_top_k(x, k, regulariser=regulariser)
    (p,) = torch.autograd.grad(y, x, torch.arange(4.0).to(dtype))
    y, hidden = y.detach(), x.detach().isneginf()
    assert bool(((y >= 0) & (y <= 1)).all()) and abs(float(y.double().sum()) - k) < 8 * torch.finfo(dtype).eps
    assert bool(p.isfinite().all()) and bool((y[hidden] == 0).all()) and bool((p[hidden] == 0).all())


@pytest.mark.parametrize("size", [1e-320, 1e-30, 1e30, 1e300])
@each
def test_sizes_from_subnormal_to_huge(regulariser, size):
    y = il.soft_top_k(torch.tensor([size, 0.0, -size, size], dtype=torch.float64), 2, regulariser=regulariser)
    expected = [0.5] * 4 if size < 1 else [1.0, 0.0, 0.0, 1.0]
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64))


vectors = st.lists(st.floats(-20, 20).map(lambda v: round(v, 6)), min_size=2, max_size=8)


@settings(max_examples=120)
@given(
    vectors.map(lambda v: torch.tensor(v, dtype=torch.float64)),
    st.floats(0.05, 0.95),
    st.sampled_from([0.05, 1.0, 4.0]),
    st.sampled_from(sorted(MAPS)),
    st.floats(-100, 100),
)
def test_properties(x, part, tau, regulariser, offset):
    k = part * len(x)
    y = il.soft_top_k(x, k, temperature=tau, regulariser=regulariser)
    assert abs(float(y.sum()) - k) < 1e-12 * len(x) and float(y.min()) >= 0 and float(y.max()) <= 1
    other = il.soft_top_k(x + offset, k, temperature=tau, regulariser=regulariser)
    torch.testing.assert_close(other, y, rtol=1e-8, atol=1e-10)
    assert bool((y[x.argsort()].diff() >= -1e-15).all())
    left_out = il.soft_top_k(-x, len(x) - k, temperature=tau, regulariser=regulariser)
    if regulariser == "entropy":
        torch.testing.assert_close(1 - left_out, y, rtol=1e-9, atol=1e-11)  # what is not chosen is chosen from −x
    more = il.soft_top_k(x, min(k + 0.5, len(x)), temperature=tau, regulariser=regulariser)
    assert bool((more >= y - 1e-12).all())


def test_refusals():
    x = torch.tensor([[0.0, 1.0, -INF], [0.0, 1.0, 2.0]])
    with pytest.raises(ValueError, match=r"k\[0\] is 3.*between 0 and 2"):
        il.soft_top_k(x, 3)
    for k in (-1, math.nan, INF):
        with pytest.raises(ValueError, match="k"):
            il.soft_top_k(x, k)
    with pytest.raises(ValueError, match="regulariser must be one of"):
        il.soft_top_k(x, 1, regulariser="l2")
    with pytest.raises(il.ShapeError, match="k"):
        il.soft_top_k(x, torch.ones(3))


@each
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_tensor_of_integers_counts(regulariser, dtype):
    x = draw(3, 6)
    k = torch.tensor([[0], [2], [6]], dtype=dtype)
    for scores_ in (x, x.float(), x.half()):
        one_by_one = [il.soft_top_k(scores_[i], int(k[i]), regulariser=regulariser) for i in range(3)]
        expected = torch.stack(one_by_one)
        torch.testing.assert_close(il.soft_top_k(scores_, k, regulariser=regulariser), expected)
    torch.testing.assert_close(il.projections.capped_simplex(x, k), il.projections.capped_simplex(x, k.double()))
    with pytest.raises(il.DtypeError, match="k"):
        il.soft_top_k(x, k > 0, regulariser=regulariser)
