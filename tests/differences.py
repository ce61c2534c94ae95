"""Central differences of gradcheck, all of them in one call: the function takes them as problems of one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensor | Tensors]
STEP = 1e-6  # of gradcheck


class SideBySide:
    """A function as gradcheck is to see it, whose values at the differences are all computed in one call.

    gradcheck moves one entry at a time and calls the function twice for each, and all of that again for forward mode.
    This gives it the same numbers, each computed once; every other call is one of the function itself.

    Args:
        function: of tensors; with `together` every one of them may have a leading dimension more.
        inputs:   the point, as it is given to gradcheck.
        together: otherwise the differences are computed one by one, and once all the same.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor], *, together: bool = True) -> None:
        self.function, self.together = function, together
        self.base = [x.detach().clone() for x in inputs]
        self.needed = [x.requires_grad for x in inputs]
        starts = torch.tensor([0, *(2 * x.numel() for x in self.base)]).cumsum(0)
        self.starts, self.count = starts[:-1].tolist(), int(starts[-1])
        self.values: Tensors = ()

    def __call__(self, *inputs: Tensor) -> Tensor | Tensors:
        index = self._index(inputs)
        if index is None:
            return self.function(*inputs)
        if not self.values:
            self.values = self._all()
        return tuple(y[index] for y in self.values)

    def _index(self, inputs: Tensors) -> int | None:
        """Which of the differences this is, if it is one: 2i for entry i a step lower, 2i + 1 for a step higher."""
        found = None
        for start, x, base in zip(self.starts, inputs, self.base, strict=True):
            places = (x.detach() != base).reshape(-1).nonzero().reshape(-1).tolist()
            for place in places:
                value, old = float(x.detach().reshape(-1)[place]), float(base.reshape(-1)[place])
                if found is not None or value not in (old - STEP, old + STEP):
                    return None
                found = start + 2 * place + int(value > old)
        return found

    def _all(self) -> Tensors:
        moved = [x.expand(self.count, *x.shape).clone() for x in self.base]
        for start, x, base in zip(self.starts, moved, self.base, strict=True):
            entries = torch.arange(base.numel())
            flat = x.reshape(self.count, -1)
            flat[start + 2 * entries, entries] -= STEP
            flat[start + 2 * entries + 1, entries] += STEP
        if self.together:
            return self._called(moved)
        each = [self._called([x[i] for x in moved]) for i in range(self.count)]
        return tuple(torch.stack(values) for values in zip(*each, strict=True))

    def _called(self, inputs: list[Tensor]) -> Tensors:
        leaves = [x.requires_grad_(needed) for x, needed in zip(inputs, self.needed, strict=True)]
        values = self.function(*leaves)
        return tuple(y.detach() for y in ((values,) if isinstance(values, Tensor) else values))


def pull(function: Function, number: int) -> Callable[..., Tensors]:
    """The gradients as a function of the inputs, of which there is this number, and of the cotangents behind them."""

    def pulled(*tensors: Tensor) -> Tensors:
        inputs = tuple(x.requires_grad_() for x in tensors[:number])  # gradcheck detaches them for forward mode
        values = function(*inputs)
        outputs = [y for y in ((values,) if isinstance(values, Tensor) else values) if y.requires_grad]
        found = torch.autograd.grad(outputs, inputs, tensors[number:], create_graph=True, allow_unused=True)
        return tuple(gradient for gradient in found if gradient is not None)

    return pulled


def with_cotangents(function: Function, inputs: Sequence[Tensor]) -> Tensors:
    """The point at which gradgradcheck looks: the inputs, and a random cotangent for each output."""
    generator = torch.Generator().manual_seed(0)
    values = function(*inputs)
    outputs = [y for y in ((values,) if isinstance(values, Tensor) else values) if y.requires_grad]
    cotangents = (torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs)
    return *inputs, *(cotangent.requires_grad_() for cotangent in cotangents)


def first_order(function: Function, inputs: Sequence[Tensor], **options: Any) -> bool:
    """gradcheck, whose differences are all made in one call."""
    return gradcheck(SideBySide(function, inputs), tuple(inputs), **options)


def second_order(function: Function, inputs: Sequence[Tensor], **options: Any) -> bool:
    """gradgradcheck: gradcheck of the gradients in the inputs and in the cotangents."""
    point = with_cotangents(function, inputs)
    return gradcheck(SideBySide(pull(function, len(inputs)), point), point, **options)


def both_orders(function: Function, *theta: Tensor, atol: float = 1e-6, rtol: float = 1e-6) -> None:
    """What `il.testing.check_gradients` checks of a function that takes a leading dimension more."""
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in theta)
    options: dict[str, Any] = {"atol": atol, "rtol": rtol, "check_forward_ad": True}
    assert first_order(function, inputs, check_batched_grad=True, **options)
    assert second_order(function, inputs, **options)
