"""The module holds settings or a learned temperature and calls the function; nothing else."""

import copy
import io
import pickle

import pytest
import torch

import implicit_layers as il
from implicit_layers.errors import DtypeError

X = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, 0.25]])


@pytest.mark.parametrize("method", ["closed", "newton", "kkt"])
@pytest.mark.parametrize("learn", [False, True])
def test_it_calls_the_function(method, learn):
    layer = il.nn.Softmax(dim=0, temperature=0.4, learn_temperature=learn, method=method)
    torch.testing.assert_close(layer(X), torch.softmax(X / 0.4, 0))
    assert len(list(layer.parameters())) == int(learn)


def test_the_learned_temperature_gets_its_gradient_and_stays_positive():
    layer = il.nn.Softmax(temperature=0.5, learn_temperature=True)
    tau = torch.tensor(0.5, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, -1.0])
    (il.softmax(X, temperature=tau) @ weights).sum().backward()
    (layer(X) @ weights).sum().backward()
    torch.testing.assert_close(layer.log_temperature.grad, 0.5 * tau.grad)  # d/d log τ = τ d/dτ
    optimiser = torch.optim.SGD(layer.parameters(), lr=20.0)
    for _ in range(3):
        optimiser.step()
        assert layer.temperature > 0


def test_training_recovers_a_temperature():
    target = torch.softmax(X.double() / 0.3, -1)
    layer = il.nn.Softmax(temperature=2.0, learn_temperature=True).double()
    optimiser = torch.optim.LBFGS(
        layer.parameters(), max_iter=100, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = -(target * layer(X.double()).log()).sum()
        loss.backward()
        return loss.detach()

    optimiser.step(closure)
    assert abs(float(layer.temperature.detach()) - 0.3) < 1e-5


@pytest.mark.parametrize("learn", [False, True])
def test_copies_pickles_and_state_dicts(learn):
    layer = il.nn.Softmax(dim=-1, temperature=0.7, learn_temperature=learn)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(X), layer(X)) and repr(twin) == repr(layer)
    other = il.nn.Softmax(dim=-1, temperature=3.0 if learn else 0.7, learn_temperature=learn)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(X), layer(X))
    assert set(layer.state_dict()) == ({"log_temperature"} if learn else set())


def test_repr():
    assert repr(il.nn.Softmax()) == "Softmax(dim=-1, temperature=1)"
    layer = il.nn.Softmax(1, temperature=0.5, learn_temperature=True, method="kkt")
    assert repr(layer) == "Softmax(dim=1, temperature=0.5, learn_temperature=True, method='kkt')"


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_temperature_is_refused_at_once(temperature):
    with pytest.raises(ValueError, match="positive and finite"):
        il.nn.Softmax(temperature=temperature)


def test_an_unknown_method_is_refused_at_once():
    with pytest.raises(ValueError, match="'svd'"):
        il.nn.Softmax(method="svd")


def test_dtypes():
    layer = il.nn.Softmax(temperature=0.5, learn_temperature=True)
    assert layer(X.half()).dtype == torch.float16
    with pytest.raises(DtypeError, match="temperature"):
        layer(X.double())
    assert layer.double()(X.double()).dtype == torch.float64


def test_it_compiles_and_trains_inside_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), il.nn.Softmax(learn_temperature=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))
    compiled(X).pow(2).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
