"""The mechanism: one solver, one VJP, one JVP for every regulariser; the generic core and closed forms as oracles."""

import copy
import gc
import math

import mpmath
import pytest
import torch
from torch.autograd import gradcheck

import implicit_layers as il
from implicit_layers.regularizers import BINARY_ENTROPY, BOX, ENTROPY, EUCLIDEAN, tsallis
from implicit_layers.solvers import separable
from tests.differences import first_order, second_order
from tests.digits import entmax

LOG_BARRIER = il.Regularizer(
    "log barrier",
    primal=lambda s: torch.where(s < 0, -1 / torch.where(s < 0, s, -1.0), math.inf),
    weight=torch.square,
    value=lambda y: -y.log(),
    slope=lambda y: -1 / y,
)
EVERY = [ENTROPY, EUCLIDEAN, BINARY_ENTROPY, BOX, tsallis(1.3), tsallis(1.5), tsallis(2.5), LOG_BARRIER]
each = pytest.mark.parametrize("regulariser", EVERY, ids=lambda r: r.name)

X = torch.tensor([[0.5, 0.0, -0.9, 0.3], [0.1, 0.9, -0.2, 0.6]], dtype=torch.float64)
K = torch.tensor([[0.9], [1.2]], dtype=torch.float64)
TAU = torch.tensor([[0.8], [0.7]], dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves():
    return tuple(t.clone().requires_grad_() for t in (X, K, TAU))


def close(found, expected, tol=1e-10):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


@each
def test_the_generic_core_on_the_same_residual_agrees(regulariser):
    """Σ primal((x − ν)/τ) − k = 0 for ν by the core's root, with its adjoint solve: value and all gradients."""

    def residual(nu, x, k, tau):
        return regulariser.primal((x - nu) / tau).sum(-1, keepdim=True) - k

    x, k, tau = leaves()
    y = il.regularized_argmax(x, regulariser, temperature=tau, total=k)
    open_ = (y > 0) & (y < regulariser.cap)
    start = (x - tau * regulariser.slopes(y)).where(open_, -math.inf).amax(-1, keepdim=True).detach()
    nu = il.attach_gradient(residual, start, x, k, tau, batch_dims=1)
    by_core = regulariser.primal((x - nu) / tau)
    close(by_core.sum(-1, keepdim=True), K)
    close(y, by_core)
    g = draw(2, 4)
    found = torch.autograd.grad(y, (x, k, tau), g)
    close(found, torch.autograd.grad(by_core, (x, k, tau), g))


@each
def test_derivatives(regulariser):
    def function(x, k, tau):
        return il.regularized_argmax(x, regulariser, temperature=tau, total=k)

    assert first_order(function, leaves(), check_forward_ad=True, check_batched_grad=True)
    assert second_order(function, leaves(), check_forward_ad=True)


@pytest.mark.parametrize(
    ("regulariser", "member"),
    [
        ("entropy", il.softmax),
        ("euclidean", il.sparsemax),
        (tsallis(1.5), il.entmax),
        (tsallis(1.3), lambda x, **more: il.entmax(x, 1.3, **more)),
        (tsallis(4), lambda x, **more: il.entmax(x, 4.0, **more)),
    ],
    ids=["softmax", "sparsemax", "entmax 1.5", "entmax 1.3", "entmax 4"],
)
def test_the_members_of_their_own_are_special_cases(regulariser, member):
    for scale in (0.01, 1.0, 20.0):
        x = (scale * draw(5, 8)).requires_grad_()
        one, other = il.regularized_argmax(x, regulariser, temperature=0.6), member(x, temperature=0.6)
        close(one, other, 1e-9)
        g = draw(5, 8, seed=1)
        close(torch.autograd.grad(one, x, g)[0], torch.autograd.grad(other, x, g)[0], 1e-7)


@each
def test_the_optimum_beats_its_neighbours(regulariser):
    y = il.regularized_argmax(X, regulariser, temperature=0.7, total=1.0)
    good = (y * X).sum(-1) - 0.7 * regulariser.value(y.clamp(min=1e-300)).sum(-1)
    for seed in range(20):
        step = draw(2, 4, seed=seed)
        near = y + 1e-3 * (step - step.mean(-1, keepdim=True))
        inside = ((near > 0) & (near < regulariser.cap)).all(-1)
        other = (near * X).sum(-1) - 0.7 * regulariser.value(near.clamp(min=1e-300)).sum(-1)
        assert bool((other <= good)[inside].all())


def test_a_new_member_gets_forward_derivatives_and_loss_at_once():
    name = "test: cosh"
    mine = il.register_regularizer(
        name,
        primal=lambda s: s.clamp(min=0).asinh(),
        weight=lambda y: 1 / y.cosh(),
        value=torch.cosh,
        slope=torch.sinh,
    )
    y = il.regularized_argmax(X, name, temperature=0.8)
    close(y.sum(-1), torch.ones(2, dtype=torch.float64))
    close(il.regularized_argmax(X, mine, temperature=0.8), y)
    u = X - 0.8 * y.sinh()  # stationarity: x − τ sinh y is the same number on the support
    for row, chosen in zip(u, y > 0, strict=True):
        close(row[chosen], row[chosen][0].expand(int(chosen.sum())))
    x = X.clone().requires_grad_()
    assert gradcheck(lambda x: il.regularized_argmax(x, name, temperature=0.8), x, check_forward_ad=True)
    (p,) = torch.autograd.grad(il.fenchel_young_loss(x, torch.tensor([0, 3]), name, temperature=0.8).sum(), x)
    close(p, y - torch.nn.functional.one_hot(torch.tensor([0, 3]), 4))
    with pytest.raises(ValueError, match="registered already"):
        il.register_regularizer(name, primal=mine.primal, weight=mine.weight, value=mine.value, slope=mine.slope)


@pytest.mark.parametrize(
    ("wrong", "claim"),
    [
        ({"primal": lambda s: 2 * s.clamp(min=0)}, r"primal\(slope\(y\)\) = y"),
        ({"value": lambda y: y**2}, "derivative of value"),
        ({"weight": lambda y: torch.full_like(y, 2.0)}, "derivative of slope"),
        ({"weight": lambda y: y * math.nan}, "derivative of slope"),
    ],
)
def test_maps_that_contradict_each_other_are_refused(wrong, claim):
    right = {"primal": EUCLIDEAN.primal, "weight": EUCLIDEAN.weight, "value": EUCLIDEAN.value, "slope": EUCLIDEAN.slope}
    with pytest.raises(ValueError, match=claim):
        il.register_regularizer("test: wrong", **{**right, **wrong})
    with pytest.raises(ValueError, match="'test: wrong'"):
        il.regularized_argmax(X, "test: wrong")  # and was not kept


def test_other_refusals():
    with pytest.raises(TypeError, match="regulariser"):
        il.regularized_argmax(X, 1.5)
    with pytest.raises(ValueError, match="total"):
        il.regularized_argmax(X, "entropy", total=0.0)
    for alpha in (1, 0.5, math.inf):
        with pytest.raises(ValueError, match="alpha"):
            tsallis(alpha)


# --- Tsallis beyond sparsemax: entries just above zero have an unbounded slope in the multiplier ----------------------


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-14), (torch.float32, 5e-7)])
@pytest.mark.parametrize("alpha", [1.3, 2.5, 5.0])
@pytest.mark.parametrize(("k", "tau"), [(1.0, 1.0), (2.5, 0.03)])
def test_tsallis_is_right_in_every_digit_and_its_gradient_too(alpha, dtype, tol, k, tau):
    g = [1.0, -2.0, 3.0, 0.5, 0.25]
    for seed in range(2):
        x = (draw(5, seed=seed) * 10 ** (-0.8 * seed)).to(dtype).requires_grad_()
        y = il.regularized_argmax(x, tsallis(alpha), total=k, temperature=tau)
        exact, step = [mpmath.mpf(float(v)) for v in x.detach()], mpmath.mpf(10) ** -50
        expected = [float(v) for v in entmax(exact, alpha, k, tau, 120)]
        close(y.detach().double(), torch.tensor(expected, dtype=torch.float64), tol * (1 + k))
        (found,) = torch.autograd.grad(y, x, torch.tensor(g, dtype=dtype))
        for i in range(5):
            with mpmath.workdps(120):
                sides = [
                    entmax([v + s * step * (i == j) for j, v in enumerate(exact)], alpha, k, tau, 120) for s in (1, -1)
                ]
                right = float(sum(w * (p - m) for w, p, m in zip(g, *sides, strict=True)) / (2 * step))
            assert abs(float(found[i]) - right) <= 1e4 * tol * (1 + abs(right)), (i, float(found[i]), right)


def test_a_compiled_graph_finds_the_regulariser_that_it_was_made_for():
    """By a key of its own, also where two have one name; copies are the same one, and none is kept alive."""
    maps = {"primal": EUCLIDEAN.primal, "weight": EUCLIDEAN.weight, "value": EUCLIDEAN.value, "slope": EUCLIDEAN.slope}
    first, second = il.Regularizer("one name", **maps), il.Regularizer("one name", **maps, cap=0.5)
    assert copy.deepcopy(second) is second and copy.copy(second) is second
    x = X[0]
    for made in (first, second):
        found = torch.ops.implicit_layers.choose(x, x.new_ones(1), x.new_ones(1), made.key)
        assert torch.equal(found, il.regularized_argmax(x, made))
    key = second.key
    assert separable.known(key) is second
    del second, made
    gc.collect()
    with pytest.raises(KeyError):
        separable.known(key)
