"""Sparsemax and entmax against a sort, a bracketing root finder, finite differences, and their own properties."""

import math

import mpmath
import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode

import implicit_layers as il
from implicit_layers import tsallis
from implicit_layers.solvers import entmax_newton, entmax_steep
from tests.differences import first_order, second_order
from tests.digits import entmax as by_many_digits
from tests.planted import planted

INF = math.inf
ALPHAS = [1.0, 1.0 + 1e-9, 1.01, 1.25, 1.5, 1.9, 2.0, 2.5, 4.0, 30.0]


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def by_sorting(x):
    """The projection on the simplex, by the textbook's sort."""
    ordered = np.sort(x)[::-1]
    sums = np.cumsum(ordered) - 1
    size = np.nonzero(ordered - sums / np.arange(1, len(x) + 1) > 0)[0][-1]
    return np.maximum(x - sums[size] / (size + 1), 0)


def by_bracketing(x, alpha):
    """Entmax by scipy's root finder on the sum; α > 1."""
    z = (alpha - 1) * (x - x.max())
    weigh = lambda t: np.maximum(z - t, 0) ** (1 / (alpha - 1))  # noqa: E731
    t = scipy.optimize.brentq(lambda t: weigh(t).sum() - 1, -1, -(len(x) ** (1 - alpha)) + 1e-15, xtol=1e-16)
    return weigh(t) / weigh(t).sum()


def close(found, expected, tol=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=tol, atol=tol)


# --- the value ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("n", [1, 2, 7, 100, 3000])
def test_sparsemax_is_the_projection(n, scale):
    x = draw(4, n, scale=scale)
    y = il.sparsemax(x)
    for row, found in zip(x, y, strict=True):
        close(found, by_sorting(row.numpy()))


@pytest.mark.parametrize("alpha", [1.01, 1.25, 1.5, 1.9, 2.0, 2.5])
@pytest.mark.parametrize(("n", "scale"), [(2, 1.0), (7, 0.1), (40, 3.0), (3000, 1.0), (2500, 0.01)])
def test_entmax_is_the_root_that_bracketing_finds(n, scale, alpha):
    x = draw(3, n, scale=scale, seed=1)
    y = il.entmax(x, alpha)
    each = il.entmax(x, torch.full((3, 1), alpha, dtype=torch.float64))
    for i in range(3):
        expected = by_bracketing(x[i].numpy(), alpha)
        close(y[i], expected, 1e-9)
        close(each[i], expected, 1e-9)


@pytest.mark.parametrize("alpha", [2.0625, 2.5, 4.0, 7.0, 20.0, 50.0])
def test_beyond_sparsemax_entries_just_above_zero_are_right(alpha):
    """There y = (difference)^{1/(α − 1)} has an unbounded slope: the root in ν is right and y wrong in every digit."""
    for seed in range(4):
        x = draw(5, seed=seed, scale=10 ** (-0.8 * seed)) + 3 * (seed % 2)
        expected = [float(v) for v in by_many_digits([mpmath.mpf(float(v)) for v in x], alpha)]
        close(il.entmax(x, alpha), expected, 4e-15)
        close(il.entmax(x, torch.tensor(alpha).double()), expected, 4e-15)
        close(torch.func.vmap(lambda x: il.entmax(x, alpha))(x[None])[0], expected, 4e-15)
        single = x.float()
        expected = [float(v) for v in by_many_digits([mpmath.mpf(float(v)) for v in single], alpha)]
        close(il.entmax(single, alpha), expected, 2e-7)


@pytest.mark.parametrize(("alpha", "scale"), [(2.5, 1e-1), (4.0, 1e-3), (3.0, 1e-2), (2.5, 1e-7), (3.0, 0.0)])
def test_beyond_sparsemax_nearly_equal_scores_are_right(alpha, scale):
    """Supports of few, of many and of all the scores, and rows of different ones together."""
    x = draw(24, scale=scale, seed=3) + 1
    expected = [float(v) for v in by_many_digits([mpmath.mpf(float(v)) for v in x], alpha)]
    close(il.entmax(x, alpha), expected, 4e-15)
    other = draw(24, scale=2.0, seed=4)
    close(il.entmax(torch.stack([other, x]), alpha), torch.stack([il.entmax(other, alpha), il.entmax(x, alpha)]), 4e-15)
    close(torch.func.vmap(lambda x: il.entmax(x, alpha))(x[None])[0], expected, 4e-15)


class Powers(TorchDispatchMode):
    """Counts the powers, which are what costs."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.pow, torch.ops.aten.pow_):
            self.count += max(x.numel() for x in args if isinstance(x, torch.Tensor))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("alpha", [2.5, 3.0, 4.0])
def test_beyond_sparsemax_nearly_equal_scores_cost_little_more(alpha):
    """What counts is the size of the support; where it is the whole row, nothing is searched for."""
    counts = []
    for scale in (1.0, 0.2, 0.0):
        with Powers() as powers:
            entmax_steep.solve(scale * draw(16, 256, seed=5), 1.0, alpha - 1, True)
        counts.append(powers.count)
    ordinary, near, equal = counts
    assert ordinary > 0 and near <= 5 * ordinary
    assert equal <= 4 * 16 * 256


def test_a_support_that_single_precision_misses_is_found_again(monkeypatch):
    x = draw(8, 64, scale=1e-2, seed=6)
    expected, found = il.entmax(x, 3.0), entmax_steep._halving

    def off_by_one(best, tau, delta, dtype):
        place = found(best, tau, delta, dtype)
        return place if dtype == torch.float64 else place + torch.tensor([[1], [-1]] * 4)

    monkeypatch.setattr(entmax_steep, "_halving", off_by_one)
    assert torch.equal(il.entmax(x, 3.0), expected)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("alpha", [3.0, 7.0, 20.0])
def test_beyond_sparsemax_gradient_and_loss_are_right(alpha, dtype, tol):
    x = torch.tensor([-0.0034036325135246574, 0.014278457425785401, 0.01835891108496748, -0.0380403464334503])
    x, g = x.to(dtype).requires_grad_(), torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=dtype)
    y = il.entmax(x, alpha)
    (found,) = torch.autograd.grad((y * g).sum(), x)
    exact, step = [mpmath.mpf(float(v)) for v in x.detach()], mpmath.mpf(10) ** -60
    for i in range(4):
        sides = []
        for sign in (1, -1):
            with mpmath.workdps(300):
                moved = by_many_digits([v + sign * step * (i == j) for j, v in enumerate(exact)], alpha)
                sides.append(sum(float(w) * v for w, v in zip(g, moved, strict=True)))
        with mpmath.workdps(300):
            expected = float((sides[0] - sides[1]) / (2 * step))
        assert abs(float(found[i]) - expected) <= tol * (1 + abs(expected)), (i, float(found[i]), expected)
    assert il.fenchel_young_loss(x, y.detach(), alpha).abs() <= 4 * torch.finfo(dtype).eps
    for seed in range(20):
        t = draw(4, seed=seed).softmax(-1).to(dtype)
        assert il.fenchel_young_loss(x, t, alpha) >= -4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_beyond_sparsemax_many_classes_agree_with_their_support(scale):
    x = draw(2, 4000, scale=scale, seed=3) + 100
    for alpha in (3.0, 8.0):
        y, each = il.entmax(x, alpha), il.entmax(x, torch.tensor([[1.5], [alpha]]).double())
        close(each[1], y[1], 1e-13)
        for row, found in zip(x, y, strict=True):
            chosen = found > 0
            close(found[chosen], il.entmax(row[chosen], alpha), 1e-13)
        order = draw(4000, seed=5).argsort()
        close(il.entmax(x[:, order], alpha), y[:, order], 1e-14)
        x.requires_grad_()
        whole = torch.autograd.grad(il.entmax(x, alpha)[:, :50].sum(), x)[0]
        x = x.detach()
        apart = torch.func.vmap(torch.func.grad(lambda x, alpha=alpha: il.entmax(x, alpha)[:50].sum()))(x)
        close(whole, apart, 1e-9)


def test_the_limits_are_softmax_and_sparsemax():
    x = draw(5, 9)
    close(il.entmax(x, 1.0), torch.softmax(x, -1))
    close(il.entmax(x, torch.tensor(1.0).double()), torch.softmax(x, -1))
    close(il.entmax(x, 1 + 1e-9), torch.softmax(x, -1), 1e-7)
    close(il.entmax(x, 2), il.sparsemax(x))


def test_a_row_may_have_its_own_alpha():
    x, alpha = draw(4, 6), torch.tensor([[1.0], [1.5], [2.0], [3.0]]).double()
    y = il.entmax(x, alpha)
    for i in range(4):
        close(y[i], il.entmax(x[i], float(alpha[i])))
    close(il.entmax(x.mT, alpha.mT, 0), y.mT)


def test_sparsemax_agrees_with_the_quadratic_program_and_its_gradient():
    x = draw(3, 5).requires_grad_()
    n, batch = 5, 3
    Q = torch.eye(n, dtype=torch.float64)
    one, zero = torch.ones(1, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    y = il.sparsemax(x, temperature=0.7)
    z = il.solve_qp(Q, -x / 0.7, A=one, b=one[:, 0], G=-Q, h=zero).z
    close(z, y.detach(), 1e-8)
    g = draw(batch, n, seed=2)
    close(torch.autograd.grad(z, x, g)[0], torch.autograd.grad(y, x, g)[0], 1e-8)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0, 3.0])
@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 0), ((2, 3, 4), 1), ((2, 3, 4), -3), ((0, 4), 1), ((4, 0), 0)])
def test_any_shape_and_dim(shape, dim, alpha):
    x = draw(*shape)
    y = il.entmax(x, alpha, dim)
    assert y.shape == x.shape
    rows, found = x.movedim(dim, -1).reshape(-1, shape[dim]), y.movedim(dim, -1).reshape(-1, shape[dim])
    for row, one in zip(rows, found, strict=True):
        close(one, il.entmax(row, alpha))


def test_one_score():
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    for alpha in ALPHAS:
        y = il.entmax(x, alpha, 0)
        assert y.shape == () and y == 1 and torch.autograd.grad(y, x)[0] == 0


# --- derivatives ----------------------------------------------------------------------------------------------------

APART = torch.tensor([[0.5, 0.0, -1.3, 0.3], [0.1, 0.9, -0.2, 0.6]], dtype=torch.float64)


@pytest.mark.parametrize("alpha", [1.0, 1.01, 1.3, 1.5, 2.0, 2.4])
def test_gradcheck_with_a_number(alpha):
    tau = torch.tensor([[0.9], [1.1]], dtype=torch.float64, requires_grad=True)
    x = APART.clone().requires_grad_()

    def function(x, tau):
        return il.entmax(x, alpha, temperature=tau)

    assert first_order(function, (x, tau), check_forward_ad=True, check_batched_grad=True)
    assert second_order(function, (x, tau), check_forward_ad=True)


@pytest.mark.parametrize("alpha", [1.01, 1.3, 1.5, 1.99, 2.4])
def test_gradcheck_in_alpha(alpha):
    alphas = torch.full((2, 1), alpha, dtype=torch.float64, requires_grad=True)
    x = APART.clone().requires_grad_()
    assert first_order(il.entmax, (x, alphas), check_forward_ad=True, check_batched_grad=True)
    assert second_order(il.entmax, (x, alphas))


@pytest.mark.parametrize("alpha", [1.0, 1 + 1e-12, 1 + 1e-6, 1.001, 1.5, 2.0, 2.3])
def test_the_gradient_in_alpha_against_fifty_digits(alpha):
    """y(α + h) − y(α − h) by bisection in mpmath; at α = 1 the formula with the logarithms, from the literature."""
    x, g = APART[0], draw(4, seed=3)
    given = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(il.entmax(x, given), given, g)
    if alpha == 1.0:
        y = torch.softmax(x, -1)
        square = y.log().square()
        expected = float((g * (-0.5 * y * (square - (y * square).sum()))).sum())
    else:
        with mpmath.workdps(50):
            h = mpmath.mpf(10) ** -18
            expected = float((_loss(x, g, alpha + h) - _loss(x, g, alpha - h)) / (2 * h))
    assert abs(float(found) - expected) < 1e-9 * abs(expected)


def _loss(x, g, alpha):
    """⟨g, entmax(x)⟩ in mpmath."""
    d = alpha - 1
    u = [mpmath.mpf(float(v)) for v in x - x.max()]
    weigh = lambda c: [max(1 + d * (v + c), mpmath.mpf(0)) ** (1 / d) for v in u]  # noqa: E731
    low, high = -mpmath.mpf(10), mpmath.mpf(0)
    for _ in range(160):
        middle = (low + high) / 2
        low, high = (middle, high) if mpmath.fsum(weigh(middle)) < 1 else (low, middle)
    return mpmath.fsum(mpmath.mpf(float(c)) * p for c, p in zip(g, weigh(low), strict=True))


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_narrowed_rows_have_the_derivatives_of_whole_ones(alpha, monkeypatch):
    x = (draw(3, 5000)).requires_grad_()
    tau = torch.full((3, 1), 0.8, dtype=torch.float64, requires_grad=True)
    g, v = draw(3, 5000, seed=1), draw(3, 5000, seed=2)

    def everything():
        y = il.entmax(x, alpha, temperature=tau)
        p, q = torch.autograd.grad(y, (x, tau), g, create_graph=True)
        return y.detach(), p.detach(), q.detach(), *torch.autograd.grad((p * v).sum() + q.square().sum(), (x, tau))

    narrowed = everything()
    with torch.no_grad():
        columns = entmax_newton.solve(x, x.amax(-1, keepdim=True), 0.8, alpha).columns
    assert 0 < columns.shape[-1] < 2500
    tangent = torch.func.jvp(lambda x: il.entmax(x, alpha), (x.detach(),), (v,))[1]
    monkeypatch.setattr(entmax_newton, "WIDE", 10**9)
    close(torch.func.jvp(lambda x: il.entmax(x, alpha), (x.detach(),), (v,))[1], tangent)
    for found, expected in zip(narrowed, everything(), strict=True):
        close(found, expected, 1e-10)


def test_narrowed_rows_under_vmap_and_in_single_precision():
    x, g = draw(2, 3, 4000, dtype=torch.float32), draw(2, 3, 4000, seed=1, dtype=torch.float32)
    loss = lambda x, g: (il.entmax(x) * g).sum()  # noqa: E731
    expected = torch.stack([torch.func.grad(loss)(x[i], g[i]) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x, g), expected)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(leaf, g), leaf)[0], expected)
    leaf = x.double().requires_grad_()
    exact = torch.autograd.grad(loss(leaf, g.double()), leaf)[0]
    torch.testing.assert_close(expected.double(), exact, rtol=1e-4, atol=1e-5)


def test_gradcheck_sees_a_wrong_gradient():
    def wrong(y, g):
        return torch.where(y > 0, g - g.mean(-1, keepdim=True), 0.0)  # the mean over all, not over the support

    with pytest.raises(GradcheckError):
        gradcheck(planted(il.sparsemax, wrong), APART.clone().requires_grad_())


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5])
@pytest.mark.parametrize("spread", [10, 40])
def test_the_gradient_is_right_where_it_nearly_vanishes(alpha, spread):
    """One entry has nearly all the weight: relative to its own size the gradient keeps its digits."""
    x = torch.tensor([0.0, -spread, -1.3 * spread], dtype=torch.float64) / (1 if alpha == 1 else 1.05 * spread)
    if alpha > 1:  # the second entry only just inside: s = y^(2 − α) small
        x = torch.tensor([0.0, -(1 / (alpha - 1)) * (1 - 1e-3), -90.0], dtype=torch.float64)
    x, g = x.requires_grad_(), torch.tensor([0.7, -0.4, 1.0], dtype=torch.float64)
    y = il.entmax(x, alpha)
    (found,) = torch.autograd.grad(y, x, g)
    s = torch.where(y > 0, y.detach() ** (2 - alpha), 0.0)
    pairs = s[:, None] * s[None, :] / s.sum()  # p_i = Σ_j s_i s_j (g_i − g_j)/Σs, nothing cancels
    expected = (pairs * (g[:, None] - g[None, :])).sum(-1)
    assert float((found - expected).norm()) <= 1e-14 * float(expected.norm())


# --- hard inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "scores",
    [
        [0.0, 0.0, 0.0, 0.0],
        [1e4, 1e4, -1e4, 0.0],
        [0.0, -INF, 0.5, -INF],
        [-INF, -INF, 3.0, -INF],
        [6e-8, 0.0, -6e-8, 6e-8],
        [60000.0, -60000.0, 59968.0, 0.0],
    ],
    ids=str,
)
def test_hard_scores(scores, dtype, alpha):
    x = torch.tensor(scores, dtype=dtype, requires_grad=True)
    y = il.entmax(x, alpha)
    assert y.dtype == dtype and bool(((y >= 0) & (y <= 1)).all())
    y = y.detach()
    assert abs(float(y.double().sum()) - 1) <= 4 * torch.finfo(dtype).eps
    hidden = x.detach().isneginf()
    assert bool((y[hidden] == 0).all())
    p = torch.autograd.grad(il.entmax(x, alpha), x, torch.arange(4.0).to(dtype))[0]
    assert p.dtype == dtype and not bool(p.isnan().any()) and bool((p[hidden] == 0).all())
    assert bool((y[x == x.max()] == y.max()).all())
    if bool(hidden.any()):
        close(y[~hidden], il.entmax(x.detach()[~hidden], alpha), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [1e-320, 1e-300, 1e-30, 1e30, 1e300])
def test_sizes_from_subnormal_to_huge(size, alpha):
    x = torch.tensor([size, 0.0, -size, size], dtype=torch.float64)
    y = il.entmax(x, alpha)
    close(y, [0.25] * 4 if size < 1 else [0.5, 0.0, 0.0, 0.5])
    if 1e-300 <= size <= 1e300:
        close(il.entmax(x, alpha, temperature=size), il.entmax(torch.tensor([1.0, 0.0, -1.0, 1.0]).double(), alpha))


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, 3.0])
def test_a_temperature_without_bound_leaves_the_unmasked_equal(alpha):
    x = torch.tensor([1.0, -INF, 5.0])
    for temperature in (INF, torch.tensor(INF)):
        close(il.entmax(x, alpha, temperature=temperature), [0.5, 0.0, 0.5], 1e-6)


def test_an_offset_costs_no_digits():
    x = torch.tensor([1.0, 0.75, -2.0, 0.5])
    for offset in (1e3, -1e4):
        torch.testing.assert_close(il.entmax(x + offset), il.entmax(x), rtol=1e-6, atol=1e-7)


def test_a_geometric_staircase_takes_few_steps(host_syncs):
    """The worst case of methods that drop one entry a step."""
    x = -(2.0 ** -torch.arange(1000, dtype=torch.float64))
    for alpha in (1.5, 2.0, 1.7):
        with host_syncs() as syncs:
            y = il.entmax(x, alpha)
        assert syncs.count < 40, syncs
        close(y, by_bracketing(x.numpy(), alpha), 1e-10)


def test_values_are_not_looked_at_where_there_are_none():
    with FakeTensorMode():
        for alpha in (1.5, 2.0, 1.3):
            assert il.entmax(torch.empty(3, 5, device="cuda"), alpha).device.type == "cuda"


# --- properties -----------------------------------------------------------------------------------------------------

numbers = st.floats(-20, 20, allow_subnormal=True).map(lambda v: round(v, 6))
vectors = st.lists(numbers, min_size=1, max_size=8).map(lambda v: torch.tensor(v, dtype=torch.float64))
some_alpha = st.sampled_from([1.0, 1.1, 1.5, 1.75, 2.0, 3.0])
some_tau = st.sampled_from([0.05, 0.5, 1.0, 4.0])


@settings(max_examples=150)
@given(vectors, some_alpha, some_tau, st.floats(-100, 100), st.randoms(use_true_random=False))
def test_properties(x, alpha, tau, offset, random):
    tol = 1e-9 if alpha <= 2 else 1e-5  # an infinite slope above zero magnifies the offset's rounding
    y = il.entmax(x, alpha, temperature=tau)
    assert abs(float(y.sum()) - 1) < 1e-13 and float(y.min()) >= 0
    close(il.entmax(x + offset, alpha, temperature=tau), y, tol)  # translation
    order = list(range(len(x)))
    random.shuffle(order)
    close(il.entmax(x[order], alpha, temperature=tau), y[order], 1e-12 if alpha <= 2 else 1e-7)  # permutation
    assert bool((y[x.argsort()].diff() >= -1e-15).all())  # order
    assert bool((y[x == x.max()] == y.max()).all())  # ties
    hotter = il.entmax(x, alpha, temperature=2 * tau)
    assert int((hotter > 0).sum()) >= int((y > 0).sum())  # sparsity
    assert float(hotter.max()) <= float(y.max()) + 1e-12


@settings(max_examples=60)
@given(vectors, st.sampled_from([1.2, 1.5, 2.0]))
def test_the_jacobian_is_symmetric_semidefinite_and_blind_to_constants(x, alpha):
    J = torch.func.jacrev(lambda x: il.entmax(x, alpha))(x)
    close(J, J.mT, 1e-12)
    close(J.sum(-1), torch.zeros(len(x)), 1e-12)
    assert float(torch.linalg.eigvalsh(J).min()) > -1e-12


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.99, 0.0, -1.0, INF, math.nan])
def test_a_bad_alpha_is_refused(alpha):
    for given_alpha in (alpha, torch.tensor(alpha)):
        with pytest.raises(ValueError, match="alpha"):
            il.entmax(torch.zeros(3), given_alpha)


def test_other_bad_arguments():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"alpha\[1, 0\]"):
        il.entmax(x, torch.tensor([[1.0], [0.5]]))
    with pytest.raises(il.ShapeError, match="alpha"):
        il.entmax(x, torch.ones(2, 3))
    with pytest.raises(il.DtypeError, match="alpha"):
        il.entmax(x, torch.ones((), dtype=torch.float64))
    with pytest.raises(TypeError, match="alpha"):
        il.entmax(x, "1.5")
    with pytest.raises(il.NonFiniteError, match=r"x\[0, 1\]"):
        il.sparsemax(torch.tensor([[0.0, INF]]))


@pytest.mark.parametrize("a", [-700.0, -30.0, -0.5, -0.4999, -1e-9, 0.0, 1e-20, 1e-5, 0.3, 0.5, 7.0])
def test_phi(a):
    with mpmath.workdps(60):
        exact = (mpmath.expm1(a) - a) / mpmath.mpf(a) ** 2 if a else mpmath.mpf(0.5)
        assert abs(float(tsallis._phi2(torch.tensor(a, dtype=torch.float64))) / float(exact) - 1) < 2e-15
