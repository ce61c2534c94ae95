"""What an `autograd.Function` needs so that PyTorch's functional transforms nest correctly around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Forward = TypeVar("Forward", bound=Callable[..., object])


def signed(forward: Forward) -> Forward:
    """Keep the signature of a Function's `forward`, which PyTorch works out at every call otherwise."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


def apply(function: type[torch.autograd.Function], *args: object, plain: bool) -> Any:
    """function.apply(*args); where all tensors are plain ones, without the work for transforms, which costs as much."""
    if plain and not torch._C._are_functorch_transforms_active():
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    return function.apply(*args)


def map_to_front(size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Move the mapped dimension of each tensor to the front; unmapped tensors get one that costs no memory."""
    return [
        tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]


def forward_mode() -> AbstractContextManager[None]:
    """Let the body of a `jvp` staticmethod be differentiated by an outer forward-mode transform.

    PyTorch runs `jvp` with forward mode switched off, so that `jacfwd(jacfwd(f))` would silently be zero.
    """
    return forward_ad._set_fwd_grad_enabled(True)


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return forward_ad._current_level >= 0


def at_work() -> bool:
    """Whether a functional transform is running, or forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Compute in the dtypes at hand, whatever autocast region the caller is in; "meta" tensors know no autocast."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def primals(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Strip the tangents of the level at hand from saved tensors; those of outer levels stay."""
    return tuple(forward_ad.unpack_dual(tensor, level=0).primal for tensor in tensors)
