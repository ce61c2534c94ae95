"""What differentiating a computation costs: bytes that its autograd graph keeps, milliseconds of each direction."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


def milliseconds(run: Callable[[], _T], device: torch.device) -> tuple[_T, float]:
    """The result of `run()` and how long it took, after the device has finished."""
    _synchronise(device)
    start = time.perf_counter()
    result = run()
    _synchronise(device)
    return result, 1e3 * (time.perf_counter() - start)


def _synchronise(device: torch.device) -> None:
    """Wait for a device that works in the background."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graph_bytes(compute: Callable[[], Tensor], exclude: Iterable[Tensor] = ()) -> int:
    r"""Bytes kept alive for the backward pass of `compute()`.

    Counted over distinct storages, so that a tensor saved twice, or a view of one, counts once: everything that
    autograd packs (saved-tensor hooks) and every tensor that an `autograd.Function` keeps as an attribute of its
    node, which hooks do not see.

    Args:
        compute: builds the graph and returns its result.
        exclude: tensors that live anyway (parameters, data); their storages are not counted.

    Returns:
        The number of bytes. Tensors that a checkpoint will compute again in the backward pass are not in it.

    >>> x = torch.zeros(100, requires_grad=True)
    >>> graph_bytes(lambda: x.exp().sum())  # the result of exp, 100 numbers of 4 bytes
    400
    >>> graph_bytes(lambda: (x * x).sum(), exclude=[x])
    0
    """
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice while counting

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = compute()
    for node in _nodes(result.grad_fn):
        for tensor in _attribute_tensors(node):
            count(tensor)
    for tensor in exclude:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _nodes(root: object) -> list[object]:
    """Every node of the graph behind `root`."""
    seen: dict[int, object] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node is None or id(node) in seen:
            continue
        seen[id(node)] = node
        stack.extend(following for following, _ in getattr(node, "next_functions", ()))
    return list(seen.values())


def _attribute_tensors(node: object) -> list[Tensor]:
    """The tensors that a Python node keeps as attributes, alone or in lists, tuples and dictionaries."""
    found: list[Tensor] = []
    stack: list[object] = list(getattr(node, "__dict__", {}).values())
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, (list, tuple)):
            stack.extend(value)
    return found


def relative_error(ours: Iterable[Tensor], reference: Iterable[Tensor]) -> float:
    """‖ours − reference‖ / ‖reference‖ over all tensors together, in float64.

    >>> relative_error([torch.tensor([3.0, 4.5])], [torch.tensor([3.0, 4.0])])
    0.1
    """
    difference = total = 0.0
    for mine, exact in zip(ours, reference, strict=True):
        difference += float((mine.detach().double() - exact.detach().double()).square().sum())
        total += float(exact.detach().double().square().sum())
    return float((difference / total) ** 0.5) if total else float(difference**0.5)
