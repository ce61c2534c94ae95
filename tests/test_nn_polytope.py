"""The module EntropicLP: what is learned, what is a buffer, and that it calls `entropic_lp`."""

from __future__ import annotations

import pytest
import torch

import implicit_layers as il


def test_it_calls_the_function():
    c, A, b = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(1, 3), torch.ones(1)
    for options in (
        {},
        {"ub": torch.tensor(0.5)},
        {"G": torch.eye(3), "h": torch.full((3,), 0.6), "slack": "entropic"},
    ):
        layer = il.nn.EntropicLP(A=A, b=b, temperature=0.5, **options)
        assert torch.equal(layer(c), il.entropic_lp(c, A=A, b=b, temperature=0.5, **options).value)
        assert list(layer.parameters()) == []
        assert set(layer.state_dict()) == {"A", "b"} | set(options) - {"slack"}


def test_parameters_are_learned_and_the_rest_is_not():
    b = torch.nn.Parameter(torch.ones(1))
    layer = il.nn.EntropicLP(A=torch.ones(1, 3), b=b, learn_temperature=True)
    assert {name for name, _ in layer.named_parameters()} == {"b", "log_temperature"}
    layer(torch.tensor([0.0, 1.0, 2.0]))[0].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())
    assert "n_eq=1" in repr(layer) and "learn_temperature=True" in repr(layer)


def test_settings_are_refused_where_it_is_made():
    with pytest.raises(ValueError, match="temperature"):
        il.nn.EntropicLP(temperature=0.0)
    with pytest.raises(TypeError, match="learn_temperature"):
        il.nn.EntropicLP(temperature=torch.tensor(1.0))
    with pytest.raises(ValueError, match="slack"):
        il.nn.EntropicLP(slack="soft")
    with pytest.raises(ValueError, match="on_failure"):
        il.nn.EntropicLP(on_failure="stop")
