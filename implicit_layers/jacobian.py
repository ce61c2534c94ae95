"""Derivatives of a residual as products: pull back a cotangent, push forward a tangent, or form the Jacobian's blocks.

Two ways to the same numbers: `torch.autograd.grad` where no functional transform is active (it composes with
`torch.utils.checkpoint` and other saved-tensor hooks), `torch.func.vjp` below a transform (where it is the only way).
Tangents are pushed forward by pulling back twice, because forward mode does not nest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from math import prod

import torch
from torch import Tensor

from implicit_layers.transforms import full_precision

Pullback = Callable[[Tensor], tuple[Tensor, ...]]

_CHUNK = 2**24  # entries of one batch of cotangents; bounds the memory that forming a Jacobian takes


def transform_active() -> bool:
    """Whether a functional transform (torch.func) is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def living(x: Tensor) -> Tensor:
    """The tensor without the wrappers of functional transforms that have ended."""
    while (inner := torch._C._functorch.unwrap_if_dead(x)) is not x:
        x = inner
    return x


@contextmanager
def opaque(device: torch.device) -> Iterator[None]:
    """Run a solve unseen: no autocast, no inference mode, no saved-tensor hook of the caller's, no gradient."""
    with torch.inference_mode(False), torch.no_grad(), full_precision(device), _without_hooks():
        yield


def recordable(*tensors: Tensor) -> list[Tensor]:
    """The tensors without history; those made in inference mode are copied, since autograd cannot record them."""
    return [x.detach().clone() if x.is_inference() else x.detach() for x in tensors]


@contextmanager
def _without_hooks() -> Iterator[None]:
    """Lift the caller's saved-tensor hooks (of a checkpoint, say): functional transforms refuse to run under any."""
    autograd = torch._C._autograd
    if not hasattr(autograd, "_top_saved_tensors_default_hooks"):  # before torch 2.8
        with _covered_hooks():
            yield
        return
    lifted = []
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
        lifted.append(top)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(lifted):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


def _alias(x: Tensor) -> Tensor:
    """A new node with the value (and the history) of `x`, so that paths to `x` from elsewhere are not followed."""
    y = x.view_as(x)
    return y if y.requires_grad else y.requires_grad_()


def pullback(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Pullback]:
    """The value of `function` and the map from a cotangent of it to those of the inputs; itself differentiable."""
    if transform_active():
        value, *pulled = torch.func.vjp(function, *inputs)
        return value, pulled[0]
    with torch.enable_grad():
        aliases = tuple(map(_alias, inputs))
        value = function(*aliases)

    def pull(cotangent: Tensor) -> tuple[Tensor, ...]:
        if not value.requires_grad:
            return tuple(torch.zeros_like(x) for x in aliases)
        return torch.autograd.grad(
            value,
            aliases,
            cotangent,
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            materialize_grads=True,
        )

    return value, pull


def pushforward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor], like: Tensor
) -> Tensor:
    """The derivative of `function` (with values `like` the last argument) along the tangents; itself differentiable."""

    def along(cotangent: Tensor) -> Tensor:  # linear in the cotangent, with the wanted derivative as its gradient
        pulled = pullback(function, *inputs)[1](cotangent)
        return reduce(torch.add, [(p * t).sum() for p, t in zip(pulled, tangents, strict=True)])

    total, pull = pullback(along, torch.zeros_like(like))
    return pull(torch.ones_like(total))[0]


def gradient(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The gradient of the per-problem objectives in their first argument, as a function of the same arguments."""

    def residual(z: Tensor, *theta: object) -> Tensor:
        values, pull = pullback(lambda y: objective(y, *theta), z)
        return pull(torch.ones_like(values))[0]

    return residual


@contextmanager
def _covered_hooks() -> Iterator[None]:
    """Where hooks cannot be lifted, cover them by some that do nothing; transforms inside still refuse to run."""
    autograd = torch._C._autograd
    if autograd._saved_tensors_hooks_get_disabled_error_message() is None:
        try:
            with torch.autograd.graph.disable_saved_tensors_hooks("none are in use"):
                pass
        except RuntimeError:  # some are
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                yield
            return
    yield


class Jacobian:
    """dF/dz of a batch of independent problems at a point, as an operator on (*K, *B, n) tensors.

    `matvec` and `rmatvec` are products with the true derivative of the whole batch. `dense` takes it to be block
    diagonal, one block a problem; where the problems are in truth coupled the two disagree, which is how the caller
    finds out. `T` is the transposed operator; it shares everything with this one.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], z: Tensor) -> None:  # z: (*B, n)
        with torch.enable_grad():
            self._z = z.detach().requires_grad_()
            self._value = function(self._z)
        self.batch_shape = z.shape[:-1]
        self.n = z.shape[-1]
        self.dtype, self.device = z.dtype, z.device
        self._blocks: Tensor | None = None
        self._linear: tuple[Tensor, Tensor] | None = None

    @property
    def value(self) -> Tensor:  # (*B, n)
        """F at the point."""
        return self._value.detach()

    @property
    def T(self) -> TransposedJacobian:
        """The transposed operator."""
        return TransposedJacobian(self)

    @property
    def formed(self) -> bool:
        """Whether the blocks have been formed."""
        return self._blocks is not None

    def matvec(self, v: Tensor) -> Tensor:  # (*K, *B, n) -> (*K, *B, n)
        """J v."""
        if self._linear is None:
            with torch.enable_grad():
                cotangent = torch.zeros_like(self._value, requires_grad=True)
                self._linear = cotangent, self._pull(self._value, self._z, cotangent, create_graph=True)
        cotangent, pulled = self._linear
        return self._pull(pulled, cotangent, v)

    def rmatvec(self, v: Tensor) -> Tensor:  # (*K, *B, n) -> (*K, *B, n)
        """Jᵀ v."""
        return self._pull(self._value, self._z, v)

    def dense(self) -> Tensor:  # (*B, n, n)
        """The blocks, by n pull-backs of unit vectors that all problems share; formed once."""
        if self._blocks is None:
            rows = []
            step = max(1, _CHUNK // max(1, self._z.numel()))
            for start in range(0, self.n, step):
                stop = min(start + step, self.n)
                unit = torch.zeros(stop - start, self.n, dtype=self.dtype, device=self.device)
                unit.diagonal(start).fill_(1)
                unit = unit.reshape(stop - start, *[1] * len(self.batch_shape), self.n)
                rows.append(self.rmatvec(unit.expand(stop - start, *self._z.shape)))
            self._blocks = torch.cat(rows).movedim(0, -2) if rows else self._z.new_zeros(*self._z.shape, self.n)
        return self._blocks

    @staticmethod
    def _pull(value: Tensor, at: Tensor, cotangent: Tensor, create_graph: bool = False) -> Tensor:
        """One product, or several at once when the cotangent has more leading dimensions than the value."""
        if not value.requires_grad:
            return torch.zeros_like(cotangent)

        def product(v: Tensor) -> Tensor:
            return torch.autograd.grad(
                value, at, v, retain_graph=True, create_graph=create_graph, materialize_grads=True
            )[0]

        columns = cotangent.shape[: cotangent.ndim - value.ndim]
        if not columns:
            return product(cotangent)
        if prod(columns) == 0:
            return torch.zeros_like(cotangent)
        together = torch.func.vmap(product)(cotangent.reshape(prod(columns), *value.shape))
        return together.reshape(*columns, *at.shape)


class TransposedJacobian:
    """Jᵀ, with the interface of `Jacobian`."""

    def __init__(self, jacobian: Jacobian) -> None:
        self.T = jacobian
        self.batch_shape, self.n = jacobian.batch_shape, jacobian.n
        self.dtype, self.device = jacobian.dtype, jacobian.device

    @property
    def formed(self) -> bool:
        """Whether the blocks have been formed."""
        return self.T.formed

    def matvec(self, v: Tensor) -> Tensor:  # (*K, *B, n) -> (*K, *B, n)
        """Jᵀ v."""
        return self.T.rmatvec(v)

    def rmatvec(self, v: Tensor) -> Tensor:  # (*K, *B, n) -> (*K, *B, n)
        """J v."""
        return self.T.matvec(v)

    def dense(self) -> Tensor:  # (*B, n, n)
        """The transposed blocks."""
        return self.T.dense().mT
