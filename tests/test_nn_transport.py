"""The module Sinkhorn: its defaults, what is learned, and that it calls `sinkhorn`."""

from __future__ import annotations

import pytest
import torch

import implicit_layers as il


def test_it_calls_the_function_with_even_marginals():
    C = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    layer = il.nn.Sinkhorn(temperature=0.5)
    assert torch.equal(layer(C), il.sinkhorn(C, torch.full((3,), 1 / 3), torch.full((4,), 0.25), temperature=0.5).value)
    a, b = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert torch.equal(layer(C, a, b), il.sinkhorn(C, a, b, temperature=0.5).value)
    assert layer.solve(C).info.converged.all()


def test_the_temperature_can_be_learned():
    layer = il.nn.Sinkhorn(temperature=0.5, learn_temperature=True)
    layer(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))[0, 0].backward()
    assert layer.log_temperature.grad < 0  # warmer is flatter
    assert repr(layer) == "Sinkhorn(temperature=0.5, learn_temperature=True)"


def test_settings_are_refused_where_it_is_made():
    with pytest.raises(ValueError, match="temperature"):
        il.nn.Sinkhorn(temperature=-1.0)
    with pytest.raises(TypeError, match="learn_temperature"):
        il.nn.Sinkhorn(temperature=torch.tensor(1.0))
    with pytest.raises(ValueError, match="max_iter"):
        il.nn.Sinkhorn(max_iter=0)
    with pytest.raises(il.ShapeError, match="C must have shape"):
        il.nn.Sinkhorn()(torch.ones(3))
