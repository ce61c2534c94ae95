"""The modules hold parameters and settings and call the functions; nothing else."""

import pytest
import torch

import implicit_layers as il
from implicit_layers.errors import ArgumentTypeError

X = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, 0.25]])


def test_a_projection_calls_its_function_with_settings_buffers_and_parameters():
    layer = il.nn.Projection(
        il.projections.capped_simplex, k=torch.nn.Parameter(torch.tensor(1.5)), cap=torch.ones(2, 1), dim=0
    )
    assert [name for name, _ in layer.named_parameters()] == ["k"]
    assert [name for name, _ in layer.named_buffers()] == ["cap"]
    expected = il.projections.capped_simplex(X, 1.5, 0)
    torch.testing.assert_close(layer(X), expected)
    layer(X)[0].sum().backward()
    assert layer.k.grad is not None
    assert repr(layer) == "Projection(capped_simplex, dim=0, k, cap)"
    assert layer.double()(X.double()).dtype == torch.float64
    with pytest.raises(ArgumentTypeError, match="must be callable"):
        il.nn.Projection("simplex")


@pytest.mark.parametrize(("module", "function"), [(il.nn.SoftSort, il.soft_sort), (il.nn.SoftRank, il.soft_rank)])
def test_soft_order_calls_its_function(module, function):
    layer = module(dim=0, temperature=0.4, descending=True)
    torch.testing.assert_close(layer(X), function(X, 0, temperature=0.4, descending=True))
    assert not list(layer.parameters())
    assert repr(layer) == f"{module.__name__}(dim=0, temperature=0.4, descending=True)"
    learned = module(temperature=0.4, learn_temperature=True)
    learned(X)[0, 0].backward()
    assert learned.log_temperature.grad is not None and "learn_temperature=True" in repr(learned)
    with pytest.raises(ValueError, match="temperature must be positive"):
        module(temperature=0.0)
