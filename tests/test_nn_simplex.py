"""The modules of the family hold settings or learned numbers and call one function each; nothing else."""

import copy
import math
import pickle

import pytest
import torch

import implicit_layers as il

X = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, 0.25]])
MASK = torch.tensor([True, True, False])
CASES = {
    "Sparsemax": (il.nn.Sparsemax, {}, il.sparsemax),
    "Entmax": (il.nn.Entmax, {"alpha": 1.3}, lambda x, **more: il.entmax(x, 1.3, **more)),
    "SoftTopK": (il.nn.SoftTopK, {"k": 1.5}, lambda x, **more: il.soft_top_k(x, 1.5, **more)),
    "SoftTopK, euclidean": (
        il.nn.SoftTopK,
        {"k": 1, "regulariser": "euclidean"},
        lambda x, **more: il.soft_top_k(x, 1, regulariser="euclidean", **more),
    ),
    "Softmax": (il.nn.Softmax, {}, il.softmax),
}
each = pytest.mark.parametrize("case", CASES)


@each
@pytest.mark.parametrize("learn", [False, True])
def test_it_calls_the_function(case, learn):
    module, settings, function = CASES[case]
    layer = module(**settings, dim=0, temperature=0.4, learn_temperature=learn)
    torch.testing.assert_close(layer(X.mT), function(X.mT, dim=0, temperature=0.4))
    torch.testing.assert_close(layer(X.mT, MASK[:, None]), function(X.mT, dim=0, temperature=0.4, mask=MASK[:, None]))
    assert len(list(layer.parameters())) == int(learn)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(X.mT), layer(X.mT)) and repr(twin) == repr(layer)
    if learn:
        (layer(X.mT) * X.mT).sum().backward()
        assert float(layer.log_temperature.grad.abs()) > 0


@each
@pytest.mark.parametrize("empty", ["uniform", "zeros"])
def test_a_row_without_entries_gets_what_the_function_gives(case, empty):
    module, settings, function = CASES[case]
    x = torch.stack([X[0], torch.full((3,), -math.inf)])
    layer = module(**settings, empty=empty)
    assert torch.equal(layer(x), function(x, empty=empty)) and f"empty={empty!r}" in repr(layer)
    with pytest.raises(ValueError, match="only -inf"):
        module(**settings)(x)
    with pytest.raises(ValueError, match="empty must be one of"):
        module(**settings, empty="nothing")


def test_a_learned_alpha_stays_between_one_and_two_and_is_found():
    target = il.entmax(X.double(), 1.25)
    layer = il.nn.Entmax(1.8, learn_alpha=True).double()
    assert abs(float(layer.alpha.detach()) - 1.8) < 1e-6
    optimiser = torch.optim.LBFGS(
        layer.parameters(), max_iter=50, line_search_fn="strong_wolfe", tolerance_change=1e-15
    )

    def closure():
        optimiser.zero_grad()
        loss = (layer(X.double()) - target).square().sum()
        loss.backward()
        return loss.detach()

    optimiser.step(closure)
    assert abs(float(layer.alpha.detach()) - 1.25) < 1e-4
    with torch.no_grad():
        layer.logit_alpha.fill_(1000.0)
    torch.testing.assert_close(layer(X.double()), il.sparsemax(X.double()))
    with torch.no_grad():
        layer.logit_alpha.fill_(-1000.0)
    torch.testing.assert_close(layer(X.double()), torch.softmax(X.double(), -1))


def test_repr():
    assert repr(il.nn.Sparsemax()) == "Sparsemax(dim=-1, temperature=1)"
    assert repr(il.nn.Entmax(1.5, learn_alpha=True)) == "Entmax(alpha=1.5, dim=-1, temperature=1, learn_alpha=True)"
    expected = "SoftTopK(k=2, dim=0, temperature=0.5, regulariser='euclidean')"
    assert repr(il.nn.SoftTopK(2, 0, 0.5, regulariser="euclidean")) == expected


def test_bad_settings_are_refused_at_once():
    for bad in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha"):
            il.nn.Entmax(bad)
    for end in (1.0, 2.0):
        with pytest.raises(ValueError, match="strictly between"):
            il.nn.Entmax(end, learn_alpha=True)
    with pytest.raises(ValueError, match="k must"):
        il.nn.SoftTopK(-1)
    with pytest.raises(ValueError, match="regulariser"):
        il.nn.SoftTopK(1, regulariser="l2")
    for module in (il.nn.Sparsemax, il.nn.Entmax, lambda **more: il.nn.SoftTopK(1, **more)):
        with pytest.raises(ValueError, match="temperature"):
            module(temperature=0.0)
        with pytest.raises(TypeError, match="dim"):
            module(dim=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("module", [il.nn.Softmax, il.nn.Sparsemax, lambda **kw: il.nn.SoftTopK(2, **kw)])
def test_a_temperature_that_runs_off_is_held_where_it_can_be_used_and_comes_back(module, dtype):
    layer = module(learn_temperature=True).to(dtype)
    x = torch.tensor([0.0, 1.0, 3.0], dtype=dtype)
    for log_tau in (-1e4, -200.0 if dtype == torch.float32 else -800.0, 200.0, 1e4):
        layer.log_temperature.data.fill_(log_tau)
        y = layer(x)
        assert y.isfinite().all() and 0 < float(layer.temperature.detach()) < math.inf
        layer.log_temperature.grad = None
        layer.temperature.log().backward()
        assert float(layer.log_temperature.grad) == pytest.approx(1.0)  # the slope of log τ: never dead
    layer.log_temperature.data.fill_(-50.0)
    torch.testing.assert_close(layer.temperature, torch.tensor(math.exp(-50), dtype=dtype), rtol=1e-5, atol=0.0)
