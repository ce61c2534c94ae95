"""Surrogates of linear programs: closed forms, enumeration, scipy; what is random is tested against its own spread."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch.func import vmap

import implicit_layers as il
from implicit_layers.errors import ArgumentError, ArgumentTypeError, DtypeError, NonFiniteError, ShapeError

SIMPLEX = {
    "A": torch.ones(1, 4).double(),
    "b": torch.ones(1).double(),
    "G": -torch.eye(4).double(),
    "h": torch.zeros(4).double(),
}


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, tol=1e-10):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def highest(scores):
    return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])


def lowest(costs):
    return highest(-costs)


# --- quadratic smoothing ----------------------------------------------------------------------------------------------


def test_a_plain_linear_program_has_zero_gradient_and_the_smoothed_one_has_not():
    c = draw(4)

    def vertex(c):
        return torch.from_numpy(linprog(-c.numpy(), A_eq=SIMPLEX["A"].numpy(), b_eq=[1.0], bounds=(0, None)).x)

    moved = [vertex(c + 1e-4 * e) - vertex(c - 1e-4 * e) for e in torch.eye(4).double()]
    assert not torch.stack(moved).any()
    c.requires_grad_()
    y = il.smoothed_lp(c, temperature=2.0, **SIMPLEX).value
    assert torch.autograd.grad(y[0], c)[0].abs().max() > 0.1


def test_over_the_simplex_it_is_the_projection():
    c, tau = draw(3, 5, 4).requires_grad_(), (0.3 + draw(3, 1, 1, seed=1).square()).requires_grad_()
    y = il.smoothed_lp(c, temperature=tau, **SIMPLEX)
    expected = il.projections.simplex(c / tau)
    close(y.value, expected, 1e-8)
    assert bool(y.info.converged.all()) and y.info.converged.shape == (3, 5)
    g = draw(3, 5, 4, seed=2)
    close(torch.autograd.grad(y.value, (c, tau), g), torch.autograd.grad(expected, (c, tau), g), 1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_cooled_down_it_reaches_the_vertex_of_the_linear_program(seed):
    c, G = draw(3, seed=seed), torch.cat([draw(6, 3, seed=seed + 10), torch.eye(3).double(), -torch.eye(3).double()])
    h = torch.cat([0.5 + draw(6, seed=seed + 20).sigmoid(), torch.full((6,), 2.0).double()])
    best = torch.from_numpy(linprog(-c.numpy(), A_ub=G.numpy(), b_ub=h.numpy(), bounds=(None, None)).x)
    for temperature in (1.0, 0.1, 1e-3):
        y = il.smoothed_lp(c, G=G, h=h, temperature=temperature).value
        loss = c @ (best - y)
        assert -1e-8 <= loss <= 0.5 * temperature * (best.square().sum() - y.square().sum()) + 1e-8
    close(y, best, 1e-6)


def test_half_precision_computes_in_float32():
    c = draw(3, 4).half()
    y = il.smoothed_lp(c, **{name: t.half() for name, t in SIMPLEX.items()}).value
    assert y.dtype == torch.float16
    close(y.float(), il.projections.simplex(c.float()), 1e-3)


def test_smoothed_lp_refuses():
    with pytest.raises(ArgumentError, match=r"temperature.* must be positive"):
        il.smoothed_lp(draw(4), temperature=0.0, **SIMPLEX)
    with pytest.raises(ShapeError, match="0-d"):
        il.smoothed_lp(torch.tensor(1.0).double())
    with pytest.raises(ShapeError, match="without"):
        il.smoothed_lp(draw(4), A=SIMPLEX["A"])


# --- perturbed argmax -------------------------------------------------------------------------------------------------


def estimates(x, sigma, noise, samples, repeats=60):
    """Values, gradients to x and σ, and Hessians of a fixed function of the mean solution, from many seeds."""
    g, generator = torch.tensor([1.0, -0.5, 2.0]).double()[: len(x)], torch.Generator().manual_seed(0)
    rows = []
    for _ in range(repeats):
        a, s = x.clone().requires_grad_(), sigma.clone().requires_grad_()
        y = il.perturbed_argmax(a, highest, sigma=s, samples=samples, noise=noise, generator=generator)
        first = torch.autograd.grad(y @ g, (a, s), create_graph=True)
        second = torch.autograd.grad(first[0][0], a)[0]
        rows.append(torch.cat([y.detach(), *(t.detach() for t in first), second]))
    return torch.stack(rows)


def exact(x, sigma, function):
    g = torch.tensor([1.0, -0.5, 2.0]).double()[: len(x)]
    x, sigma = x.clone().requires_grad_(), sigma.clone().requires_grad_()
    y = function(x, sigma)
    first = torch.autograd.grad(y @ g, (x, sigma), create_graph=True)
    return torch.cat([y, *first, torch.autograd.grad(first[0][0], x)[0]]).detach()


def off(found, expected):
    """How many standard errors the mean is away from what it should be."""
    return ((found.mean(0) - expected).abs() / (found.std(0) / len(found) ** 0.5)).max()


@pytest.mark.parametrize("samples", [1, 2, 500])
def test_with_gumbel_noise_it_is_an_unbiased_softmax_to_second_order(samples):
    x, sigma = torch.tensor([0.2, 0.9, 0.0]).double(), torch.tensor([0.8]).double()
    expected = exact(x, sigma, lambda x, sigma: torch.softmax(x / sigma, -1))
    found = estimates(x, sigma, "gumbel", samples, repeats=2000 if samples < 3 else 60)
    assert off(found, expected) < 4
    if samples == 500:
        assert found.std(0)[:7].max() < 0.4  # and not because nothing is known


def test_with_normal_noise_two_scores_follow_the_normal_distribution():
    x, sigma = torch.tensor([0.2, 0.9]).double(), torch.tensor([0.8]).double()

    def probability(x, sigma):
        first = torch.special.ndtr((x[0] - x[1]) / (sigma * math.sqrt(2)))
        return torch.cat([first, 1 - first])

    expected = exact(x, sigma, probability)
    assert off(estimates(x, sigma, "normal", 500), expected) < 4
    wrong = expected * torch.tensor([1, 1, 1.3, 1.3, 1, 1, 1])  # the test can fail
    assert off(estimates(x, sigma, "normal", 500), wrong) > 4


def test_subtracting_the_other_draws_takes_away_variance():
    x, solver = torch.zeros(3).double().requires_grad_(), highest
    generator = torch.Generator().manual_seed(0)

    def spread(offset):
        grads = []
        for _ in range(200):
            y = il.perturbed_argmax(x, lambda s: solver(s) + offset, samples=20, generator=generator)
            grads.append(torch.autograd.grad(y[0], x)[0])
        return torch.stack(grads).std(0).max()

    assert spread(100) < 1.3 * spread(0)  # a constant in the answer would add a hundredfold


def test_the_seed_decides():
    x = draw(5, 3).requires_grad_()

    def once(seed):
        y = il.perturbed_argmax(x, highest, samples=7, generator=torch.Generator().manual_seed(seed))
        return y, torch.autograd.grad(y, x, draw(5, 3, seed=1))[0]

    assert all(torch.equal(a, b) for a, b in zip(once(0), once(0), strict=True))
    assert not torch.equal(once(0)[0], once(1)[0])
    generator = torch.Generator().manual_seed(0)
    first, second = (il.perturbed_argmax(x, highest, samples=7, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    one = il.perturbed_argmax(x, highest, samples=7)
    torch.manual_seed(3)
    assert torch.equal(one, il.perturbed_argmax(x, highest, samples=7))


def test_any_solver_outside_of_pytorch_and_matrices_of_scores():
    shapes = []

    def assignment(scores):
        assert not torch.is_grad_enabled() and not scores.requires_grad
        shapes.append(tuple(scores.shape))
        flat = scores.flatten(0, -3).numpy()
        plans = np.zeros_like(flat)
        for plan, matrix in zip(plans, flat, strict=True):
            plan[linear_sum_assignment(matrix, maximize=True)] = 1
        return torch.from_numpy(plans.reshape(scores.shape))

    x = draw(2, 3, 3).requires_grad_()
    y = il.perturbed_argmax(x, assignment, samples=30, event_ndim=2)
    assert shapes == [(30, 2, 3, 3)]
    close(y.sum(-1), torch.ones(2, 3).double())
    (g,) = torch.autograd.grad((y[0] * draw(3, 3, seed=1)).sum(), x)
    assert g[0].abs().max() > 0 and not g[1].any()  # problems do not mix
    mapped = vmap(lambda x: il.perturbed_argmax(x, assignment, samples=4, event_ndim=2))(x.detach())
    assert mapped.shape == (2, 3, 3) and shapes[-1] == (4, 2, 3, 3)


def test_a_spread_for_each_problem_and_half_precision():
    x = torch.zeros(4, 1, 3, dtype=torch.float16)
    y = il.perturbed_argmax(x, highest, sigma=torch.tensor([[0.1], [10.0]]).half(), samples=500)
    assert y.shape == (4, 2, 3) and y.dtype == torch.float16
    close(y.float(), torch.full((4, 2, 3), 1 / 3), 0.15)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"solver": 3}, ArgumentTypeError, "solver must be callable"),
        ({"solver": lambda s: s[0]}, ShapeError, "must keep the shape"),
        ({"solver": lambda s: s.numpy()}, DtypeError, "must return a torch.Tensor"),
        ({"sigma": 0.0}, ArgumentError, "sigma must be positive"),
        ({"sigma": torch.tensor([-1.0])}, ArgumentError, r"sigma\[0\] must be positive"),
        ({"sigma": torch.ones(3)}, ShapeError, "sigma must have size 1"),
        ({"sigma": torch.ones(5, 1)}, ShapeError, "does not broadcast"),
        ({"samples": 0}, ArgumentError, "samples must be at least 1"),
        ({"noise": "uniform"}, ArgumentError, "noise must be one of"),
        ({"generator": 0}, ArgumentTypeError, r"generator must be a torch\.Generator"),
        ({"event_ndim": 3}, ShapeError, "at least event_ndim=3"),
    ],
)
def test_perturbed_argmax_refuses(settings, error, message):
    with pytest.raises(error, match=message):
        il.perturbed_argmax(torch.zeros(2, 3), **({"solver": highest} | settings))


# --- SPO+ -------------------------------------------------------------------------------------------------------------


def regret(predicted, true):
    return (true * (lowest(predicted) - lowest(true))).sum(-1)


def by_enumeration(predicted, true):
    """The formula over the vertices of the simplex."""
    optimum = lowest(true).double()
    return (true - 2 * predicted).amax(-1) + (2 * predicted * optimum).sum(-1) - (true * optimum).sum(-1)


def test_the_loss_is_its_formula_above_the_regret_and_zero_for_the_truth():
    predicted, true = draw(100, 5), draw(100, 5, seed=1)
    loss = il.spo_plus_loss(predicted, true, lowest)
    close(loss, by_enumeration(predicted, true))
    assert bool((loss >= regret(predicted, true) - 1e-12).all()) and bool((loss >= -1e-12).all())
    close(il.spo_plus_loss(true, true, lowest), torch.zeros(100).double())
    close(il.spo_plus_loss(predicted, true, lowest, reduction="mean"), loss.mean())
    close(il.spo_plus_loss(predicted, true, lowest, reduction="sum"), loss.sum())


def test_the_gradient_is_the_subgradient_of_a_convex_function_where_that_of_the_regret_is_zero():
    predicted, true, other = (draw(50, 5, seed=s) for s in (0, 1, 2))
    predicted.requires_grad_()
    loss = il.spo_plus_loss(predicted, true, lowest)
    (g,) = torch.autograd.grad(loss.sum(), predicted)
    close(g, 2 * (lowest(true) - lowest(2 * predicted.detach() - true)).double())
    below = loss + (g * (other - predicted)).sum(-1)
    assert bool((il.spo_plus_loss(other, true, lowest) >= below - 1e-12).all())
    assert not regret(predicted, true).requires_grad


def test_a_known_solution_saves_a_call_and_shapes_broadcast():
    calls = []

    def counted(costs):
        calls.append(tuple(costs.shape))
        return lowest(costs)

    predicted, true = draw(4, 5), draw(5, seed=1)
    loss = il.spo_plus_loss(predicted, true, counted)
    assert calls == [(4, 5), (4, 5)]
    close(il.spo_plus_loss(predicted, true, counted, solution=lowest(true).double()), loss)
    assert len(calls) == 3
    matrices = il.spo_plus_loss(predicted, predicted, lambda c: lowest(c.flatten(-2)).reshape(c.shape), event_ndim=2)
    assert matrices.shape == () and matrices == 0


def test_learning_with_the_loss_decides_better_than_it_started():
    features, truth = draw(200, 3, seed=3), draw(3, 6, seed=4)
    costs = features @ truth
    weight = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([weight], lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        il.nn.SPOPlusLoss(lowest)(features @ weight, costs).backward()
        optimiser.step()
    start = regret(torch.zeros(200, 6).double(), costs).mean()
    assert regret((features @ weight).detach(), costs).mean() < 0.05 * start


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"solver": None}, ArgumentTypeError, "solver must be callable"),
        ({"solver": lambda c: c.sum(-1)}, ShapeError, "must keep the shape"),
        ({"reduction": "avg"}, ArgumentError, "reduction must be one of"),
        ({"true": torch.zeros(4)}, ShapeError, "do not broadcast"),
        ({"true": torch.zeros(3).double()}, DtypeError, "true is torch.float64"),
        ({"true": torch.tensor([0.0, math.nan, 0.0])}, NonFiniteError, r"true\[1\] must be finite"),
        ({"event_ndim": 2, "true": torch.zeros(3)}, ShapeError, "at least 2 dimensions"),
    ],
)
def test_spo_plus_loss_refuses(settings, error, message):
    arguments = {"predicted": torch.zeros(2, 3), "true": torch.ones(3), "solver": lowest} | settings
    with pytest.raises(error, match=message):
        il.spo_plus_loss(**arguments)


def test_the_modules_call_the_functions():
    layer = il.nn.PerturbedArgmax(highest, sigma=0.3, samples=9, noise="gumbel")
    x = draw(2, 3)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    assert torch.equal(y, il.perturbed_argmax(x, highest, sigma=0.3, samples=9, noise="gumbel"))
    assert repr(layer) == "PerturbedArgmax(sigma=0.3, samples=9, noise='gumbel', event_ndim=1)"
    loss = il.nn.SPOPlusLoss(lowest)
    close(loss(x, x + 1), il.spo_plus_loss(x, x + 1, lowest).mean())
    close(loss(x, x + 1, lowest(x).double()), loss(x, x + 1))
    assert repr(loss) == "SPOPlusLoss(reduction='mean', event_ndim=1)"
    for wrong in (lambda: il.nn.PerturbedArgmax(3), lambda: il.nn.SPOPlusLoss(lowest, reduction="avg")):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            wrong()


def test_numbers_as_bounds_bound_all_entries():
    c = torch.tensor([[3.0, -1.0, 0.4], [0.1, 0.2, 9.0]], dtype=torch.float64)
    y = il.smoothed_lp(c, lb=0, ub=0.5, temperature=2.0).value
    torch.testing.assert_close(y, (c / 2).clamp(0, 0.5), rtol=0, atol=1e-9)  # the projection onto a box
    assert il.smoothed_lp(c.half(), lb=0.0, ub=0.5).value.dtype == torch.float16
    with pytest.raises(ArgumentTypeError, match="lb"):
        il.smoothed_lp(c, lb="0")


def test_an_answer_that_is_not_finite_is_refused():
    def broken(scores):
        return torch.where(scores == scores.amax(), torch.nan, 0.0)

    x = torch.zeros(3)
    with pytest.raises(NonFiniteError, match="answer"):
        il.perturbed_argmax(x, broken, samples=3)
    with pytest.raises(NonFiniteError, match="answer"):
        il.spo_plus_loss(x, x, broken)


def test_gradients_of_one_sample_are_right_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(200_000, 2).clone().requires_grad_()

    def best(scores):
        return torch.nn.functional.one_hot(scores.argmax(-1), 2)

    y = il.perturbed_argmax(x, best, samples=1, noise="gumbel", generator=generator)
    (gradient,) = torch.autograd.grad(y[:, 0].sum(), x)
    p = torch.tensor([0.0, 1.0]).double().softmax(-1)
    torch.testing.assert_close(gradient.mean(0), p[0] * p[1] * torch.tensor([1.0, -1.0]).double(), rtol=0, atol=0.01)
