"""An opaque call sees whole batches, and nothing of it reaches a derivative."""

import torch
from torch.func import jacfwd, jacrev, vmap

from implicit_layers.opaque import opaque


def counted(seen):
    def function(x, shift):
        assert not torch.is_grad_enabled()
        seen.append(tuple(x.shape))
        return torch.from_numpy((x + shift).numpy()), x > 0

    return function


def test_it_is_a_constant_to_every_derivative():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    value, positive = opaque(counted([]), x, torch.zeros(2))
    assert not value.requires_grad and positive.tolist() == [True, False]

    def function(x):
        return (opaque(counted([]), x, torch.zeros(2))[0] * x).sum()

    for derivative in (jacrev, jacfwd):
        assert torch.equal(derivative(function)(x.detach()), x.detach())
        for outer in (jacrev, jacfwd):
            assert not outer(derivative(function))(x.detach()).any()


def test_a_mapped_axis_is_one_more_leading_axis():
    seen = []
    x = torch.arange(6.0).reshape(2, 3)
    value, _ = vmap(lambda x: opaque(counted(seen), x, torch.ones(2)), in_dims=1)(x)
    assert torch.equal(value, x.mT + 1) and seen == [(3, 2)]
    vmap(vmap(lambda x: opaque(counted(seen), x, torch.ones(()))))(x)
    assert seen[-1] == (2, 3)


def test_the_leading_axis_may_come_out_elsewhere():
    def stacked(x):
        return (torch.stack([x, 2 * x, 3 * x]),)

    x = torch.arange(8.0).reshape(4, 2)
    (value,) = vmap(lambda x: opaque(stacked, x, out_dim=1))(x)
    assert torch.equal(value, torch.stack([x, 2 * x, 3 * x], 1))
