"""The measures of cost count what they say they count."""

import time

import pytest
import torch

from implicit_layers.measure import graph_bytes, milliseconds, relative_error
from implicit_layers.unrolled import unrolled_softmax

FLOAT64 = 8


class Hoarder(torch.autograd.Function):
    """Keeps tensors where hooks do not look."""

    @staticmethod
    def forward(ctx, x):
        ctx.secret = [x.new_zeros(1000), {"more": x.new_zeros(500)}]
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_distinct_storages_are_counted_once_and_excluded_ones_not():
    x = torch.zeros(10, 10, dtype=torch.float64, requires_grad=True)
    w = torch.zeros(10, 10, dtype=torch.float64, requires_grad=True)
    assert graph_bytes(lambda: (x * w).sum()) == 200 * FLOAT64
    assert graph_bytes(lambda: (x * w.T * w[:2, :1].sum()).sum(), exclude=[x, w]) >= 100 * FLOAT64
    assert graph_bytes(lambda: (x * w).sum(), exclude=[x]) == 100 * FLOAT64


def test_tensors_hidden_on_a_node_are_counted():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert graph_bytes(lambda: Hoarder.apply(x).sum()) == 1500 * FLOAT64


def test_unrolled_graph_grows_in_proportion_to_its_steps_and_a_checkpointed_one_slower():
    x = torch.randn(32, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    full = [graph_bytes(lambda k=k: unrolled_softmax(x, steps=k), exclude=[x]) for k in (25, 100, 400)]
    assert full[2] / full[1] == pytest.approx(4.0, rel=0.1)
    checkpointed = [
        graph_bytes(lambda k=k: unrolled_softmax(x, steps=k, mode="checkpointed"), exclude=[x]) for k in (25, 100, 400)
    ]
    assert checkpointed[2] / checkpointed[1] == pytest.approx(2.0, rel=0.2)


def test_milliseconds_sees_a_sleep_and_hands_back_the_result():
    result, elapsed = milliseconds(lambda: time.sleep(0.02) or 7, torch.device("cpu"))
    assert result == 7
    assert elapsed >= 20.0


def test_relative_error_is_over_all_tensors_and_safe_at_zero():
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0.0
    assert relative_error([torch.ones(1), torch.zeros(3)], [torch.zeros(1), torch.ones(3)]) == pytest.approx(
        (4 / 3) ** 0.5
    )
