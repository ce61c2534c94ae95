"""The modules RegularizedLP and RegularizedLPLoss: what is learned, what is a buffer, and what they call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import implicit_layers as il
from implicit_layers.regularizers import tsallis

DOUBLE = torch.float64
REGULARISERS = ["entropy", "euclidean", "binary_entropy", "box"]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def rows(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Two equations that 0.4 solves, with 0 < x < 1."""
    A = torch.cat([torch.ones(1, n, dtype=DOUBLE), draw(3, 1, n)])
    return A, A @ torch.full((n,), 0.4, dtype=DOUBLE)


@pytest.mark.parametrize("regulariser", [*REGULARISERS, tsallis(1.5)])
def test_it_calls_the_function(regulariser):
    (A, b), c = rows(), draw(0, 4, 5)
    for options in ({}, {"ub": torch.full((5,), 0.7, dtype=DOUBLE)}, {"G": A[:1] * 0.5, "h": b[:1]}):
        layer = il.nn.RegularizedLP(regulariser, A=A, b=b, temperature=0.5, **options)
        x = il.regularized_lp(c, regulariser, A=A, b=b, temperature=0.5, **options).value
        assert torch.equal(layer(c), x)
        assert list(layer.parameters()) == [] and set(layer.state_dict()) == {"A", "b"} | set(options)
        info = layer.solve(c).info
        assert bool(info.converged.all()) and info.status.shape == (4,)
        target = x.roll(1, 0)
        losses = il.regularized_lp_loss(c, target, regulariser, A=A, b=b, temperature=0.5, **options)
        for reduction, expected in (("none", losses), ("mean", losses.mean()), ("sum", losses.sum())):
            loss = il.nn.RegularizedLPLoss(regulariser, A=A, b=b, temperature=0.5, reduction=reduction, **options)
            assert torch.equal(loss(c, target), expected)


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_every_parameter_has_the_gradient_of_finite_differences(regulariser):
    A, b = rows()
    c = 0.2 * draw(1, 5)
    weights = draw(2, 5)
    learned = {"A": A, "b": b, "ub": torch.full((5,), 0.9, dtype=DOUBLE)}
    parameters = {name: torch.nn.Parameter(x.clone()) for name, x in learned.items()}
    G, h = torch.nn.Parameter(draw(4, 1, 5)), torch.nn.Parameter(torch.tensor([9.0], dtype=DOUBLE))
    layer = il.nn.RegularizedLP(regulariser, **parameters, G=G, h=h, temperature=0.8, learn_temperature=True, tol=1e-13)
    loss = il.nn.RegularizedLPLoss(regulariser, A=A, b=b, temperature=0.8, learn_temperature=True, tol=1e-13)
    target = il.regularized_lp(draw(5, 5), regulariser, A=A, b=b).value
    assert {name for name, _ in layer.named_parameters()} == {"A", "b", "G", "h", "ub", "log_temperature"}
    for module, call in ((layer, lambda: (weights * layer(c)).sum()), (loss, lambda: loss(c, target))):
        call().backward()
        for name, p in module.named_parameters():
            direction = draw(6, *p.shape) if p.ndim else torch.ones((), dtype=DOUBLE)
            step, values = 1e-5, []
            with torch.no_grad():
                for sign in (1, -2):
                    p += sign * step * direction
                    values.append(call())
                p += step * direction
            slope = (values[0] - values[1]) / (2 * step)
            assert p.grad is not None
            torch.testing.assert_close((p.grad * direction).sum(), slope, rtol=1e-6, atol=1e-8, msg=name)
            assert p.grad.shape == p.shape


def test_state_copies_and_moves():
    A, b = rows()
    c = draw(0, 3, 5)
    layer = il.nn.RegularizedLP(
        "euclidean", A=A, b=torch.nn.Parameter(b.clone()), temperature=0.3, learn_temperature=True
    )
    other = il.nn.RegularizedLP("euclidean", A=2 * A, b=torch.nn.Parameter(2 * b), learn_temperature=True)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(c), layer(c)) and repr(twin) == repr(layer)
    single = copy.deepcopy(layer).float()
    assert all(x.dtype == torch.float32 for x in single.state_dict().values())
    found = single(c.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), layer(c), rtol=1e-5, atol=1e-5)
    assert all(x.is_meta for x in copy.deepcopy(layer).to("meta").state_dict().values())


def test_repr():
    A, b = rows()
    layer = il.nn.RegularizedLP("box", A=A, b=b, G=A[:1], h=b[:1] + 1, ub=A[0], temperature=0.5)
    assert repr(layer) == "RegularizedLP('box', n_eq=2, n_ineq=1, ub, temperature=0.5)"
    loss = il.nn.RegularizedLPLoss(tsallis(1.5), A=A, b=b, learn_temperature=True, reduction="sum")
    name = tsallis(1.5).name
    assert repr(loss) == f"RegularizedLPLoss({name!r}, n_eq=2, temperature=1, learn_temperature=True, reduction='sum')"


@pytest.mark.parametrize("module", [il.nn.RegularizedLP, il.nn.RegularizedLPLoss])
def test_settings_are_refused_where_it_is_made(module):
    with pytest.raises(ValueError, match="lasso"):
        module("lasso")
    with pytest.raises(ValueError, match="temperature"):
        module(temperature=0.0)
    with pytest.raises(TypeError, match="learn_temperature"):
        module(temperature=torch.tensor(1.0))
    with pytest.raises(ValueError, match="tol"):
        module(tol=-1.0)
    with pytest.raises(ValueError, match="max_iter"):
        module(max_iter=0)


def test_choices_are_refused_where_they_are_made():
    with pytest.raises(ValueError, match="on_failure"):
        il.nn.RegularizedLP(on_failure="stop")
    with pytest.raises(ValueError, match="reduction"):
        il.nn.RegularizedLPLoss(reduction="median")


def test_the_gradient_of_the_loss_is_the_answer_without_the_target():
    """And one that forgets the temperature in front is told apart."""
    A, b = rows()
    c, target = draw(1, 5), torch.full((5,), 0.4, dtype=DOUBLE)
    loss = il.nn.RegularizedLPLoss("euclidean", A=A, b=b, temperature=0.5)
    leaf = c.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, target), leaf)
    x = il.nn.RegularizedLP("euclidean", A=A, b=b, temperature=0.5)(c)
    torch.testing.assert_close(gradient, x - target, rtol=1e-9, atol=1e-9)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradient / 0.5, x - target, rtol=1e-9, atol=1e-9)
