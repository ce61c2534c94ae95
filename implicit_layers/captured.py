"""What a residual closes over, where a functional transform has wrapped it.

`jacrev` and its kin wrap every tensor that is computed under them, constants too. The residual is evaluated on other
levels of the stack than the one it was written on: below all transforms in the solver, and again in the backward pass
when some have ended. There a wrapper of the old level means nothing (PyTorch takes off one ended wrapper, not two, and
takes a level for another that has the same number). So the captured constants are noted once and replaced by what is
inside. That they are constants has been checked: one that is tracked or mapped is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

Captured = dict[int, tuple[Tensor, Tensor]]  # by identity: the wrapper, kept alive, and what is inside

_functorch = torch._C._functorch


class Witness(TorchFunctionMode):
    """Note every wrapped tensor that an operation uses and none has made."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: Captured = {}
        self._made: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and id(x) not in self._made and _functorch.is_functorch_wrapped_tensor(x):
                self.captured[id(x)] = x, _inside(x)
        result = func(*args, **kwargs)
        self._made.update((id(x), x) for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


class Replaced(TorchFunctionMode):
    """Put what is inside in the place of the captured wrappers."""

    def __init__(self, captured: Captured) -> None:
        super().__init__()
        self._captured = captured

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda x: self._captured.get(id(x), (x, x))[1], (args, kwargs or {}))
        return func(*args, **kwargs)


def _inside(x: Tensor) -> Tensor:
    """The tensor below all transforms."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x
