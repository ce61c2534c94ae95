"""The vectorisation that autograd itself still uses (`is_grads_batched`, `gradcheck`, `autograd.functional.jacobian`).

It batches the tensors that reach a custom function's `backward` or `jvp` in an old way that has rules for few
operations and, in forward mode, loses tangents without a word. Here such tensors are taken apart and the work is done
under `torch.func.vmap` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def level() -> int:
    """The innermost level of the old vmap."""
    depth: int = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    return depth - 1


def _batched(x: Tensor | None) -> bool:
    """Whether the old vmap has batched this tensor."""
    return x is not None and torch._C._dispatch_keys(x).has("Batched")


def modernised(
    function: Callable[..., Sequence[Tensor | None]], tensors: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """function(*tensors), under `torch.func.vmap` where the old one has batched some of the tensors."""
    if torch.compiler.is_compiling():  # which knows no old vmap
        return function(*tensors)
    nested = level()
    if nested == 0 or not any(map(_batched, tensors)):
        return function(*tensors)
    dims = tuple(0 if _batched(x) else None for x in tensors)
    plain = [torch._remove_batch_dim(x, nested, 1, 0) if x is not None and _batched(x) else x for x in tensors]
    present: list[bool] = []

    def without_none(*inputs: Tensor | None) -> tuple[Tensor, ...]:
        outputs = function(*inputs)
        present[:] = [x is not None for x in outputs]
        return tuple(x for x in outputs if x is not None)

    outputs = iter(torch.func.vmap(without_none, in_dims=dims)(*plain))
    return [torch._add_batch_dim(next(outputs), 0, nested) if there else None for there in present]
