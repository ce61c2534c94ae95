"""The arguments of a residual as a flat list of tensors, and back: tensors, containers of them, and modules.

A module stands for its parameters and buffers. While the residual runs they are replaced, inside the module itself,
by the flat tensors (`torch.func.functional_call`), so that attributes and submodules may be used as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from implicit_layers.captured import Captured, Replaced, Witness
from implicit_layers.jacobian import transform_active


@dataclass(frozen=True)
class _Slot:
    """The place of one tensor."""

    index: int


class _Held(nn.Module):
    """All modules among the arguments under one roof, so that one functional call replaces all their tensors."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.held = nn.ModuleList(modules)

    def forward(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Call `function` while the tensors of the modules are replaced."""
        return function(*arguments)


def _map(node: Any, leaf: Callable[[Any], Any]) -> Any:
    """The same nest of tuples, lists and dicts with every leaf replaced."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*(_map(child, leaf) for child in node))
    if isinstance(node, tuple | list):
        return type(node)(_map(child, leaf) for child in node)
    if isinstance(node, dict):
        return {key: _map(child, leaf) for key, child in node.items()}
    return leaf(node)


class Structure:
    """How the arguments of `function` are made of a flat list of tensors: explicit ones first, then the modules'."""

    def __init__(
        self,
        function: Callable[..., Any],
        theta: Any,
        explicit: int,
        held: _Held | None,
        names: dict[str, int],
        buffers: set[str],
        index_of: dict[int, int],
    ) -> None:
        self._function = function
        self._theta = theta  # with a `_Slot` for every tensor
        self._explicit = explicit
        self._held = held
        self._names = names  # of the modules' tensors, and where they are in the list
        self._buffers = buffers
        self._index_of = index_of  # by the identity of a module's tensor
        self._captured: Captured = {}
        self._training = held is not None and any(m.training for m in held.held.modules())

    def theta(self, leaves: Sequence[Tensor]) -> tuple[Any, ...]:
        """The arguments with these explicit tensors; modules stand as they are."""
        return _map(self._theta, lambda node: leaves[node.index] if isinstance(node, _Slot) else node)

    def call(self, z: Tensor, *leaves: Tensor) -> Any:
        """The function as a pure function of the unknown and the flat tensors."""
        if self._captured:
            with Replaced(self._captured):
                return self._call(z, leaves)
        return self._call(z, leaves)

    def first_call(self, z: Tensor, *leaves: Tensor) -> Any:
        """The same with plain tensors, noting what else the function uses that a transform has wrapped."""
        if not transform_active():
            return self._call(z, leaves)
        with Witness() as witness:
            value = self._call(z, leaves)
        self._captured = witness.captured
        return value

    def _call(self, z: Tensor, leaves: Sequence[Tensor]) -> Any:
        """`call` as it is."""
        theta = self.theta(leaves)
        if self._held is None:
            return self._function(z, *theta)
        tensors = {name: leaves[index] for name, index in self._names.items()}
        if self._training:  # running statistics are read, never updated, by the many calls of one solve
            tensors.update({name: tensors[name].clone() for name in self._buffers})
        return functional_call(self._held, tensors, (self._function, z, *theta), tie_weights=False)

    def caller(self, leaves: Sequence[Tensor]) -> Callable[..., Any]:
        """The function as (z, *theta), for a solver of the user's; the modules' tensors are those of `leaves`."""

        def function(z: Tensor, *theta: object) -> Any:
            explicit: list[Tensor] = []
            _map(theta, lambda leaf: explicit.append(leaf) if isinstance(leaf, Tensor) else None)
            return self.call(z, *explicit, *leaves[self._explicit :])

        return function

    def gather(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """One value a tensor in the shape of the arguments; a module becomes a dict by name, what has none None."""

        def place(node: Any) -> Any:
            if isinstance(node, _Slot):
                return values[node.index]
            if not isinstance(node, nn.Module):
                return None
            return {name: values[self._index_of[id(x)]] for name, x in node.named_parameters()}

        return _map(self._theta, place)

    def scatter(self, values: tuple[object, ...]) -> list[Tensor | None]:
        """The inverse of `gather`; what is missing is None."""
        flat: list[Tensor | None] = [None] * (self._explicit + len(self._index_of))

        def put(node: Any, value: Any) -> None:
            if value is None:
                return
            if isinstance(node, _Slot):
                flat[node.index] = value
            elif isinstance(node, nn.Module):
                parameters = dict(node.named_parameters())
                for name, tensor in value.items():
                    flat[self._index_of[id(parameters[name])]] = tensor
            elif isinstance(node, dict):
                for key, child in node.items():
                    put(child, value.get(key))
            elif isinstance(node, tuple | list):
                for child, item in zip(node, value, strict=True):
                    put(child, item)

        put(self._theta, values)
        return flat


def flatten(function: Callable[..., Any], theta: tuple[object, ...]) -> tuple[Structure, list[Tensor]]:
    """The structure of the arguments, and their tensors."""
    leaves: list[Tensor] = []
    modules: list[nn.Module] = []

    def take(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            leaves.append(leaf)
            return _Slot(len(leaves) - 1)
        if isinstance(leaf, nn.Module):
            modules.append(leaf)
        return leaf

    template = _map(theta, take)
    explicit = len(leaves)
    for candidate in (function, getattr(function, "__self__", None)):  # a module as the function, or a method of one
        if isinstance(candidate, nn.Module):
            modules.append(candidate)
    if not modules:
        return Structure(function, template, explicit, None, {}, set(), {}), leaves
    held = _Held(modules)
    names: dict[str, int] = {}
    buffers: set[str] = set()
    index_of: dict[int, int] = {}
    for prefix, module in held.named_modules():  # each module once, by whatever paths it can be reached
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if id(tensor) not in index_of:
                index_of[id(tensor)] = len(leaves)
                leaves.append(tensor)
            names[f"{prefix}.{name}"] = index_of[id(tensor)]  # tied weights are one tensor under several names
        buffers.update(f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False))
    return Structure(function, template, explicit, held, names, buffers, index_of), leaves
