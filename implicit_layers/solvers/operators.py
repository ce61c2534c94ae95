"""The solves of the simplex family as single operations, for `torch.compile` and `torch.export`.

Their loops end on data, so the compiler must not look into them. It sees operations with known sizes instead, and
traces the derivatives. These operations have no derivatives of their own; a mapped axis is one more leading dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from implicit_layers import transforms
from implicit_layers.solvers import entmax_newton, separable

Setting = Tensor | float


def entmax(x: Tensor, top: Tensor, tau: Setting, alpha: Setting) -> Tensor:
    """See `entmax_newton.point`."""
    tensors, numbers = [], []
    for setting in (tau, alpha):
        given = isinstance(setting, Tensor)
        tensors.append(setting if given else None)
        numbers.append(0.0 if given else float(setting))
    y: Tensor = torch.ops.implicit_layers.entmax(x, top, *tensors, *numbers)
    return y


def choose(key: str, x: Tensor, total: Tensor, tau: Tensor) -> Tensor:
    """See `separable.solve`; the regulariser by its key."""
    y: Tensor = torch.ops.implicit_layers.choose(x, total, tau, key)
    return y


@torch.library.custom_op(
    "implicit_layers::entmax",
    mutates_args=(),
    schema="(Tensor x, Tensor top, Tensor? tau, Tensor? alpha, float tau_number, float alpha_number) -> Tensor",
)
def _entmax(
    x: Tensor, top: Tensor, tau: Tensor | None, alpha: Tensor | None, tau_number: float, alpha_number: float
) -> Tensor:
    settings = tau_number if tau is None else tau, alpha_number if alpha is None else alpha
    return _owned(entmax_newton.point(x, top, *settings)[0], x)


@torch.library.custom_op(
    "implicit_layers::choose", mutates_args=(), schema="(Tensor x, Tensor total, Tensor tau, str key) -> Tensor"
)
def _choose(x: Tensor, total: Tensor, tau: Tensor, key: str) -> Tensor:
    return _owned(separable.solve(separable.known(key), x, total, tau), x)


@_entmax.register_fake
@_choose.register_fake
def _like_the_scores(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@_entmax.register_vmap
def _entmax_of_a_batch(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    return torch.ops.implicit_layers.entmax(*_in_front(info.batch_size, in_dims, arguments)), 0


@_choose.register_vmap
def _choose_of_a_batch(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    return torch.ops.implicit_layers.choose(*_in_front(info.batch_size, in_dims, arguments)), 0


def _in_front(size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments with the mapped dimension of every tensor in front."""
    given = zip(in_dims, arguments, strict=True)
    return [transforms.map_to_front(size, [d], [x])[0] if isinstance(x, Tensor) else x for d, x in given]


def _owned(y: Tensor, x: Tensor) -> Tensor:
    """The answer in memory of its own, laid out as the compiler expects."""
    y = y if y.is_contiguous() else y.contiguous()
    return y.clone() if y.data_ptr() == x.data_ptr() else y
