"""Fenchel–Young losses: cross-entropy and the projection's loss as oracles, and what holds for all of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import implicit_layers as il
from implicit_layers import regularizers, simplex, tsallis
from tests.differences import first_order, second_order

INF = math.inf
REGULARISERS = ["entropy", "euclidean", 1.0, 1.3, 1.5, 2.0, 3.0]
each = pytest.mark.parametrize("regulariser", REGULARISERS, ids=str)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(x, regulariser, **more):
    members = {"entropy": il.softmax, "euclidean": il.sparsemax}
    if regulariser in members:
        return members[regulariser](x, **more)
    return il.entmax(x, regulariser, **more)


def close(found, expected, tol=1e-10):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def test_the_entropy_gives_cross_entropy():
    x, hard, soft = draw(5, 4), torch.tensor([0, 3, 1, 1, 2]), draw(5, 4, seed=1).softmax(-1)
    close(il.fenchel_young_loss(x, hard), torch.nn.functional.cross_entropy(x, hard, reduction="none"))
    own = -(soft * soft.log()).sum(-1)
    close(il.fenchel_young_loss(x, soft), torch.nn.functional.cross_entropy(x, soft, reduction="none") - own)
    close(il.fenchel_young_loss(x, hard, 1.0), il.fenchel_young_loss(x, hard))
    tempered = il.fenchel_young_loss(x, hard, temperature=0.5)
    close(tempered, 0.5 * torch.nn.functional.cross_entropy(x / 0.5, hard, reduction="none"))


def test_the_projection_gives_the_sparsemax_loss():
    """½‖x − t‖² − ½‖x − y‖²: the distance to the target less the distance to the simplex."""
    x, t = draw(5, 4), draw(5, 4, seed=1).softmax(-1)
    y = il.sparsemax(x)
    expected = 0.5 * (x - t).square().sum(-1) - 0.5 * (x - y).square().sum(-1)
    close(il.fenchel_young_loss(x, t, "euclidean"), expected)
    close(il.fenchel_young_loss(x, t, 2.0), expected)


@each
def test_the_gradient_is_answer_less_target_without_a_solve(regulariser, monkeypatch):
    x, t = draw(5, 4).requires_grad_(), draw(5, 4, seed=1).softmax(-1)
    loss = il.fenchel_young_loss(x, t, regulariser, temperature=0.8)
    y = layer(x.detach(), regulariser, temperature=0.8)
    called = []
    monkeypatch.setattr(tsallis, "_Part", lambda *_: called.append(1))
    monkeypatch.setattr(tsallis, "_pulled", lambda *_: called.append(1))
    monkeypatch.setattr(regularizers, "tangent", lambda *_: called.append(1))
    monkeypatch.setattr(simplex, "tangent", lambda *_: called.append(1))
    (p,) = torch.autograd.grad(loss.sum(), x)
    assert not called
    close(p, y - t)


@each
def test_indices_are_corners(regulariser):
    x, hard = draw(3, 5, 4).requires_grad_(), torch.randint(4, (3, 5), generator=torch.Generator().manual_seed(0))
    corner = torch.nn.functional.one_hot(hard, 4).double()
    found, expected = (il.fenchel_young_loss(x, t, regulariser, temperature=0.7) for t in (hard, corner))
    close(found, expected)
    close(*(torch.autograd.grad(loss.sum(), x)[0] for loss in (found, expected)))
    turned = il.fenchel_young_loss(x.movedim(-1, 1), hard, regulariser, 1, temperature=0.7)
    close(turned, found)


@each
def test_derivatives_in_everything(regulariser):
    x = torch.tensor([[0.5, 0.1, -1.3, 0.3], [0.1, 0.9, -0.2, 0.6]], dtype=torch.float64, requires_grad=True)
    tau = torch.tensor([[0.8], [1.1]], dtype=torch.float64, requires_grad=True)
    raw = draw(2, 4, seed=1).requires_grad_()

    def function(x, tau, raw):
        return il.fenchel_young_loss(x, raw.softmax(-1), regulariser, temperature=tau)

    assert first_order(function, (x, tau, raw), check_forward_ad=True, check_batched_grad=True)
    assert second_order(function, (x, tau, raw))


@pytest.mark.parametrize("value", [1.01, 1.4, 1.9, 2.3])
def test_derivatives_in_alpha(value):
    x = torch.tensor([[0.5, 0.0, -1.3, 0.3], [0.1, 0.9, -0.2, 0.6]], dtype=torch.float64, requires_grad=True)
    alpha = torch.full((2, 1), value, dtype=torch.float64, requires_grad=True)
    for target in (draw(2, 4, seed=1).softmax(-1), torch.tensor([2, 0])):

        def loss(x, alpha, t=target):
            return il.fenchel_young_loss(x, t.expand(*x.shape[:-2], *t.shape), alpha, temperature=0.9)

        assert first_order(loss, (x, alpha), check_forward_ad=True)
        assert second_order(loss, (x, alpha))


@pytest.mark.parametrize("regulariser", ["binary_entropy", "box"])
def test_the_losses_of_soft_top_k(regulariser):
    x, target = draw(3, 5).requires_grad_(), torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 0, 1], [0, 0, 0, 1, 1]]).double()
    loss = il.fenchel_young_loss(x, target, regulariser, temperature=0.6, total=2)
    kind = "entropy" if regulariser == "binary_entropy" else "euclidean"
    y = il.soft_top_k(x, 2, temperature=0.6, regulariser=kind)
    (p,) = torch.autograd.grad(loss.sum(), x)
    close(p, (y - target).detach())
    assert bool((loss >= 0).all())
    assert gradcheck(lambda x: il.fenchel_young_loss(x, target, regulariser, temperature=0.6, total=2), x)
    assert gradgradcheck(lambda x: il.fenchel_young_loss(x, target, regulariser, temperature=0.6, total=2), x)


@each
def test_masked_entries_and_impossible_targets(regulariser):
    x = draw(2, 4)
    mask = torch.tensor([[True, True, False, True], [True, False, False, True]])
    hard = torch.tensor([1, 3])
    leaf = x.clone().requires_grad_()
    loss = il.fenchel_young_loss(leaf, hard, regulariser, mask=mask)
    close(loss[1], il.fenchel_young_loss(x[1, [0, 3]], torch.tensor(1), regulariser))
    (p,) = torch.autograd.grad(loss.sum(), leaf)
    assert bool((p[~mask] == 0).all())
    impossible = il.fenchel_young_loss(leaf, torch.tensor([2, 3]), regulariser, mask=mask)
    assert float(impossible[0].detach()) == INF and math.isfinite(float(impossible[1].detach()))


def test_ignored_problems_and_reductions():
    x, hard = draw(4, 3).requires_grad_(), torch.tensor([0, -100, 2, -100])
    each_loss = il.fenchel_young_loss(x, hard)
    assert bool((each_loss[1::2] == 0).all())
    expected = torch.nn.functional.cross_entropy(x, hard)
    close(il.fenchel_young_loss(x, hard, reduction="mean"), expected)
    close(il.fenchel_young_loss(x, hard, reduction="sum"), 2 * expected)
    close(*(torch.autograd.grad(v, x)[0] for v in (il.fenchel_young_loss(x, hard, reduction="mean"), expected)))
    close(il.fenchel_young_loss(x, torch.tensor([0, 7, 2, 7]), ignore_index=7, reduction="mean"), expected)
    assert il.fenchel_young_loss(x[0], torch.tensor(1)).shape == ()
    assert il.fenchel_young_loss(x[:, :0].mT.reshape(0, 4), torch.zeros(0, dtype=torch.long)).shape == (0,)


@settings(max_examples=100)
@given(
    st.lists(st.floats(-10, 10).map(lambda v: round(v, 4)), min_size=2, max_size=6),
    st.sampled_from(REGULARISERS),
    st.sampled_from([0.1, 1.0, 3.0]),
    st.integers(0, 1),
)
def test_never_negative_and_zero_at_its_own_answer(values, regulariser, tau, index):
    x = torch.tensor(values, dtype=torch.float64)
    assert float(il.fenchel_young_loss(x, torch.tensor(index), regulariser, temperature=tau)) >= -1e-12
    own = layer(x, regulariser, temperature=tau)
    assert abs(float(il.fenchel_young_loss(x, own, regulariser, temperature=tau))) < 1e-11
    shifted = il.fenchel_young_loss(x + 50, torch.tensor(index), regulariser, temperature=tau)
    close(shifted, il.fenchel_young_loss(x, torch.tensor(index), regulariser, temperature=tau), 1e-9)


def test_refusals():
    x = draw(2, 3)
    with pytest.raises(ValueError, match=r"target\[1\] is no point.*sum to 0.5"):
        il.fenchel_young_loss(x, torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.0]]).double())
    with pytest.raises(ValueError, match=r"target\[0\]"):
        il.fenchel_young_loss(x, torch.tensor([[2.0, -1.0, 0.0], [1.0, 0.0, 0.0]]).double())
    with pytest.raises(ValueError, match=r"target\[1\] is 3"):
        il.fenchel_young_loss(x, torch.tensor([0, 3]))
    with pytest.raises(il.ShapeError, match="target"):
        il.fenchel_young_loss(x, torch.tensor([0, 1, 2]))
    with pytest.raises(il.ShapeError, match="target"):
        il.fenchel_young_loss(x, torch.ones(2, 4).double())
    with pytest.raises(il.DtypeError, match="target"):
        il.fenchel_young_loss(x, torch.ones(2, 3))
    with pytest.raises(il.DtypeError, match="target"):
        il.fenchel_young_loss(x, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="reduction"):
        il.fenchel_young_loss(x, torch.tensor([0, 1]), reduction="average")
    with pytest.raises(ValueError, match="regulariser must be one of"):
        il.fenchel_young_loss(x, torch.tensor([0, 1]), "shannon")
    with pytest.raises(ValueError, match="total must be 1"):
        il.fenchel_young_loss(x, torch.tensor([0, 1]), total=2)
    with pytest.raises(TypeError, match="total is 2"):
        il.fenchel_young_loss(x, torch.tensor([0, 1]), "box", total=2)
