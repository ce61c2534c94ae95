"""A call that neither autograd nor the functional transforms look into; its results are constants to both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_layers import transforms
from implicit_layers.eager import uncompiled


class _Opaque(torch.autograd.Function):
    """`function` of the tensors; a mapped axis is one more leading batch dimension of all of them."""

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], out_dim: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.count

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], function: Callable[..., tuple[Tensor, ...]], out_dim: int, *tensors: Tensor
    ) -> tuple[Any, Any]:
        moved = transforms.map_to_front(info.batch_size, in_dims[2:], tensors)
        outputs = _Opaque.apply(function, out_dim, *moved)
        return outputs, (out_dim,) * len(outputs)


@uncompiled
def opaque(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, out_dim: int = 0) -> tuple[Tensor, ...]:
    """function(*tensors) on detached tensors, which may have further leading dimensions and be read on the host.

    Args:
        function: tensors to a tuple of tensors.
        tensors: its arguments.
        out_dim: where a leading dimension of the arguments is found in the results.
    """
    outputs: tuple[Tensor, ...] = _Opaque.apply(function, out_dim, *(t.detach() for t in tensors))
    return outputs
