"""Isotonic regression, the permutahedron, soft sort and rank: against scikit-learn, certificates and enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.isotonic import isotonic_regression
from torch.func import jacrev

import implicit_layers as il
from implicit_layers import projections
from implicit_layers.errors import ArgumentError, NonFiniteError, ShapeError
from implicit_layers.projections import isotone


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, tol=1e-10):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def pooled(x, w, increasing=True):
    rows = zip(x.numpy().reshape(-1, x.shape[-1]), w.numpy().reshape(-1, x.shape[-1]), strict=True)
    fitted = [isotonic_regression(a, sample_weight=b, increasing=increasing) for a, b in rows]
    return torch.from_numpy(np.stack(fitted)).reshape(x.shape)


# --- isotonic regression ----------------------------------------------------------------------------------------------

SHAPES = {
    "noise": lambda n: draw(3, n),
    "ties": lambda n: draw(3, n, scale=2.0).round(),
    "rising": lambda n: draw(3, n).sort(-1).values,
    "falling": lambda n: draw(3, n).sort(-1, descending=True).values,
    "ramp with a drop": lambda n: torch.cat([torch.arange(n - 1.0), torch.tensor([-float(n)])]).double().expand(3, n),
    "ten decades": lambda n: draw(3, n) * 10 ** draw(3, n, seed=5, scale=3.0),
    "far off": lambda n: draw(3, n) + 1e8,
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 64, 65, 300])
def test_the_regression_of_scikit_learn(kind, n):
    x, w = SHAPES[kind](n), 0.1 + draw(3, n, seed=1).square()
    size = max(1.0, float(x.abs().max()))
    for weight in (torch.ones_like(w), w):
        y = projections.isotonic(x, weight=weight)
        close(y / size, pooled(x, weight) / size, 1e-12)
        assert bool((y.diff(dim=-1) >= 0).all())
        down = projections.isotonic(x, weight=weight, decreasing=True)
        close(down / size, pooled(x, weight, increasing=False) / size, 1e-12)


@settings(max_examples=100)
@given(
    x=st.lists(st.floats(-1e3, 1e3) | st.sampled_from([0.0, 1.0, 1e-300]), min_size=1, max_size=20),
    seed=st.integers(0, 99),
)
def test_the_regression_of_scikit_learn_for_ties_and_extremes(x, seed):
    x = torch.tensor([x], dtype=torch.float64)
    w = 0.01 + draw(*x.shape, seed=seed).square()
    close(projections.isotonic(x, weight=w), pooled(x, w), 1e-9)


def test_single_precision_finds_the_blocks_of_double_precision():
    x = torch.randn(8, 2000, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    y = projections.isotonic(x)
    assert y.dtype == torch.float32
    close(y.double(), projections.isotonic(x.double()), 1e-5)


@pytest.mark.parametrize("n", [10_000, 100_000])
def test_single_precision_keeps_its_digits_in_long_blocks(n):
    ramp = torch.linspace(1, 0, n) + 1e4  # one block: the mean of all, for which float32 sums would lose three digits
    assert abs(float(projections.isotonic(ramp)[0]) / float(ramp.double().mean()) - 1) < 2e-7
    scores = torch.zeros(n, requires_grad=True)
    rank = il.soft_rank(scores)
    assert bool((rank / (0.5 * (n + 1)) - 1).abs().max() < 2e-7)
    seed = torch.rand(n, generator=torch.Generator().manual_seed(0)) + 100
    (gradient,) = torch.autograd.grad((rank * seed).sum(), scores)
    close(gradient.double(), (seed.double() - seed.double().mean()), 2e-5)  # seed itself is rounded to 4e-6
    values = torch.rand(n, generator=torch.Generator().manual_seed(1)) + 100
    expected = values.double().mean() + (torch.arange(1.0, n + 1).double() - 0.5 * (n + 1)) / 1e6  # one block
    close(il.soft_sort(values, temperature=1e6).double() / 100, expected / 100, 3e-7)


def test_numbers_near_the_largest_one_stay_finite():
    huge = torch.tensor([1e308, 1e308, -1e308], dtype=torch.float64)
    close(projections.isotonic(huge) / 1e308, torch.full((3,), 1 / 3, dtype=torch.float64))
    close(projections.isotonic(huge, weight=1e308) / 1e308, torch.full((3,), 1 / 3, dtype=torch.float64))
    close(il.soft_rank(huge), torch.tensor([2.5, 2.5, 1.0], dtype=torch.float64))
    close(il.soft_sort(huge[:2]) / 1e308, torch.ones(2, dtype=torch.float64))
    close(projections.permutahedron(huge, huge) / 1e308, huge / 1e308)
    one = torch.ones(3, dtype=torch.float64)
    for project in (projections.half_space, projections.hyperplane):
        close(project(huge, normal=one, offset=0.0) / 1e308, torch.tensor([2, 2, -4], dtype=torch.float64) / 3)


def test_the_jacobian_averages_over_blocks():
    x, w = torch.tensor([1.0, 3.0, 2.0, 4.0]).double(), torch.tensor([1.0, 3.0, 1.0, 2.0]).double()
    J = jacrev(lambda x: projections.isotonic(x, weight=w))(x)
    close(J, torch.tensor([[1.0, 0, 0, 0], [0, 0.75, 0.25, 0], [0, 0.75, 0.25, 0], [0, 0, 0, 1.0]]).double())
    in_weight = jacrev(lambda w: projections.isotonic(x, weight=w))(w)
    close(in_weight[1:3, 1:3], torch.tensor([[0.0625, -0.1875], [0.0625, -0.1875]]).double())


def test_blocks_that_touch_are_one_block():
    J = jacrev(projections.isotonic)(torch.tensor([2.0, 2.0, 5.0]).double())
    close(J, torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]).double())


def test_a_planted_wrong_merge_is_caught(monkeypatch):
    right = isotone._merged
    monkeypatch.setattr(
        isotone, "_merged", lambda y, w: right(y, w) if y.shape[-1] < 4 else y.flatten(-2).unsqueeze(-2)
    )
    x = draw(3, 16)
    y = projections.isotonic(x)
    assert (y - pooled(x, torch.ones_like(x))).abs().max() > 1e-3


# --- the permutahedron ------------------------------------------------------------------------------------------------


def support(d, w):
    """max <d, y> over the permutations y of w."""
    return (d.sort(-1).values * w.sort(-1).values).sum(-1)


def check_optimal(x, w, y, tol=1e-12):
    """y is the projection: it is majorised by w, and the linear program in direction x − y is solved by y."""
    size = float(1 + x.abs().max() + w.abs().max())
    ahead = (w.sort(-1, descending=True).values - y.sort(-1, descending=True).values).cumsum(-1)
    assert ahead.min() > -tol * size and ahead[..., -1].abs().max() < tol * size
    gap = support(x - y, w) - ((x - y) * y).sum(-1)
    assert gap.abs().max() < tol * size**2 * x.shape[-1]


@pytest.mark.parametrize("n", [1, 2, 3, 10, 257])
@pytest.mark.parametrize("scale", [1e-4, 0.3, 1.0, 30.0, 1e6])
def test_the_projection_is_optimal(n, scale):
    x, w = draw(30, n, scale=scale), draw(30, n, seed=1)
    x[1], x[2], w[3], w[4] = x[1].round(), 0.0, w[3].round(), 1.0
    check_optimal(x, w, projections.permutahedron(x, w))


@settings(max_examples=60)
@given(x=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, 1e4]), min_size=1, max_size=7), seed=st.integers(0, 50))
def test_the_projection_is_optimal_for_ties(x, seed):
    x = torch.tensor(x, dtype=torch.float64)
    w = draw(len(x), seed=seed, scale=2.0).round()
    check_optimal(x, w, projections.permutahedron(x, w))


@pytest.mark.parametrize("seed", range(3))
def test_the_answer_and_gradient_of_solve_qp_on_the_listed_vertices(seed):
    """With n = 3 the permutahedron is six inequalities and one equality: sums of subsets are bounded."""
    x, w, g = (draw(3, seed=seed + s) for s in (0, 10, 20))
    x, w = x.requires_grad_(), w.requires_grad_()
    ordered = w.sort(descending=True).values
    subsets = [s for size in (1, 2) for s in itertools.combinations(range(3), size)]
    G = torch.zeros(6, 3).double()
    for row, subset in zip(G, subsets, strict=True):
        row[list(subset)] = 1.0
    h = torch.stack([ordered[: len(s)].sum() for s in subsets])
    z = il.solve_qp(torch.eye(3).double(), -x, A=torch.ones(1, 3).double(), b=w.sum().reshape(1), G=G, h=h).z
    y = projections.permutahedron(x, w)
    close(y, z, 1e-8)
    close(torch.autograd.grad(y, (x, w), g), torch.autograd.grad(z, (x, w), g), 1e-7)


def test_w_may_vary_over_the_batch_and_stand_along_any_dim():
    x, w = draw(2, 5, 3), draw(2, 5, 1, seed=1)
    y = projections.permutahedron(x, w, 1)
    close(y[1, :, 2], projections.permutahedron(x[1, :, 2], w[1, :, 0]))


# --- soft sort and rank -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_low_temperature_they_are_the_hard_ones(descending, dtype):
    x = draw(20, 30).to(dtype)
    for temperature in (1e-4, 1e-12, 1e-30):
        expected = torch.from_numpy(rankdata(-x if descending else x, axis=-1)).to(dtype)
        close(il.soft_rank(x, temperature=temperature, descending=descending), expected, 1e-5)
        y = il.soft_sort(x, temperature=temperature, descending=descending)
        close(y, x.sort(-1, descending=descending).values, 1e-6)


def test_at_high_temperature_they_are_the_mean():
    x = draw(3, 7)
    close(il.soft_rank(x, temperature=1e6), torch.full_like(x, 4.0), 1e-5)
    close(il.soft_sort(x, temperature=1e6), x.mean(-1, keepdim=True).expand_as(x), 1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("descending", [False, True])
def test_they_solve_their_programs(temperature, descending):
    x = draw(10, 12)
    ranks = torch.arange(1.0, 13.0).double()
    sign = -1.0 if descending else 1.0
    y = il.soft_rank(x, temperature=temperature, descending=descending)
    check_optimal(sign * x / temperature, ranks.expand_as(x), y)
    z = il.soft_sort(x, temperature=temperature, descending=descending)
    check_optimal(((ranks.flip(0) if descending else ranks) / temperature).expand_as(x), x, z)
    assert bool((sign * z.diff(dim=-1) >= -1e-12).all())
    close(z.sum(-1), x.sum(-1))
    close(y.sum(-1), torch.full((10,), 78.0).double())


def test_ranks_of_ties_are_shared_and_the_gradient_pulls_them_apart():
    x = torch.tensor([1.0, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    y = il.soft_rank(x, temperature=0.1)
    assert y.tolist() == [1.5, 1.5, 3.0]
    (g,) = torch.autograd.grad(y[0], x)
    close(g, torch.tensor([5.0, -5.0, 0.0]).double())


def test_permuting_the_scores_permutes_the_ranks_and_a_shift_changes_nothing():
    x = draw(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    y = il.soft_rank(x, temperature=0.3)
    close(il.soft_rank(x[order], temperature=0.3), y[order])
    close(il.soft_rank(x + 100.0, temperature=0.3), y)
    close(il.soft_sort(x[order], temperature=0.3), il.soft_sort(x, temperature=0.3))
    close(il.soft_rank(x, temperature=0.3, descending=True), 10 - y)


def test_any_dim_and_a_temperature_for_each_problem():
    x, tau = draw(2, 4, 3), 0.1 + draw(2, 1, 3, seed=1).square()
    for soft in (il.soft_rank, il.soft_sort):
        y = soft(x, 1, temperature=tau)
        close(y[1, :, 2], soft(x[1, :, 2], temperature=float(tau[1, 0, 2])))


def test_learning_by_rank_reaches_a_wanted_order():
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0]).double()
    optimiser = torch.optim.SGD([x], lr=0.1)
    for _ in range(100):
        optimiser.zero_grad()
        (il.soft_rank(x, temperature=0.5) - wanted).square().sum().backward()
        optimiser.step()
    assert x.argsort().argsort().tolist() == (wanted - 1).tolist()


def test_what_is_refused():
    x = torch.ones(2, 3)
    for soft in (il.soft_rank, il.soft_sort):
        for temperature in (0.0, -1.0, math.inf, 1e-40):
            with pytest.raises(ArgumentError, match=r"temperature.* must be positive"):
                soft(x, temperature=temperature)
        with pytest.raises(NonFiniteError, match=r"x\[0, 0\]"):
            soft(x / 0)
        with pytest.raises(ShapeError, match="temperature has size 3"):
            soft(x, temperature=torch.ones(3))
