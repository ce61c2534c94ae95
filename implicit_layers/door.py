"""The door of the core: arguments in, a `System` and flat tensors out, everything that can be refused refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

from implicit_layers import checks
from implicit_layers.errors import (
    ArgumentError,
    ArgumentTypeError,
    CapturedTensorError,
    DeviceError,
    DtypeError,
    ShapeError,
)
from implicit_layers.jacobian import opaque, recordable, transform_active
from implicit_layers.linalg import LinearSolver
from implicit_layers.solution import OnFailure, check_on_failure
from implicit_layers.solvers.problem import Method, resolve_batch_dims
from implicit_layers.structure import Structure, flatten
from implicit_layers.system import Kind, System
from implicit_layers.transforms import full_precision

Solver = Method | Callable[..., Any]

_NAMES = {"root": "residual", "fixed_point": "step", "argmin": "objective"}
_functorch = torch._C._functorch


@dataclass(frozen=True)
class Entrance:
    """What came through the door."""

    system: System
    z0: Tensor
    leaves: list[Tensor]
    structure: Structure
    dtype: torch.dtype  # of the given z0, to which the solution is cast back
    dtypes: list[torch.dtype]  # of the given tensors of theta


def enter(
    kind: Kind,
    function: Callable[..., Any],
    z0: Tensor,
    theta: tuple[Any, ...],
    *,
    what: str,
    solver: Solver | None = None,
    linear_solver: LinearSolver | None = None,
    on_failure: OnFailure = "raise",
    batch_dims: int | None = None,
    z_name: str = "z0",
) -> Entrance:
    """Check the arguments and evaluate the function on detached ones, once or twice; no host synchronisation.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument, or what the function returns, does not fit.
        CapturedTensorError: the function depends on a tensor that requires grad and is not among the arguments.
        ArgumentError, ArgumentTypeError: a setting is not one, or a residual or objective is detached from z.
    """
    check_on_failure(on_failure)
    if not callable(function):
        raise ArgumentTypeError(f"{what}: {_NAMES[kind]} must be callable, got {type(function).__name__}")
    checks.no_class(f"{what}: solver", solver, Method)
    if solver is not None and not callable(solver) and not isinstance(solver, Method):
        raise ArgumentTypeError(f"{what}: solver must be the package's or a callable, got {type(solver).__name__}")
    if linear_solver is not None:
        checks.instance_with_solve(f"{what}: linear_solver", linear_solver)
    if not isinstance(z0, Tensor):
        raise DtypeError(f"{what}: {z_name} must be a torch.Tensor, got {type(z0).__name__}")
    if not z0.is_floating_point():
        raise DtypeError(
            f"{what}: {z_name} must be a real floating-point tensor, got {z0.dtype}; e.g. {z_name}.double()"
        )
    dims = resolve_batch_dims(z0, batch_dims, z_name)
    structure, given = flatten(function, theta)
    dtype = torch.float32 if z0.dtype in checks.HALF else z0.dtype
    start = z0.to(dtype)
    leaves = [x.to(dtype) if x.dtype in checks.HALF else x for x in given]
    for i, x in enumerate(leaves):
        if x.device != z0.device and x.ndim > 0:
            raise DeviceError(
                f"{what}: tensor {i} of theta is on {x.device} but {z_name} is on {z0.device}; move one of them"
            )
    _try_once(kind, structure, start, leaves, dims, what, z_name)
    method = solver if isinstance(solver, Method) else None
    wanted = method is not None or (torch.is_grad_enabled() and any(x.requires_grad for x in leaves))
    if wanted and kind != "fixed_point" and not transform_active():
        _refuse_independent(structure, start, leaves, what, _NAMES[kind])
    external = None
    if solver is not None and method is None:
        by_hand = solver

        def external(z: Tensor, tensors: Any) -> Any:
            result = by_hand(structure.caller(tensors), z, *structure.theta(tensors))  # type: ignore[operator]
            return getattr(result, "value", result)

    system = System(kind, structure.call, dims, method, external, linear_solver, on_failure, what)
    return Entrance(system, start, leaves, structure, z0.dtype, [x.dtype for x in given])


def _try_once(
    kind: Kind, structure: Structure, z0: Tensor, leaves: list[Tensor], batch_dims: int, what: str, z_name: str
) -> None:
    """What the function returns fits, and it depends on nothing that is not among its arguments."""
    name = _NAMES[kind]
    z, *plain = (_plain(x) for x in (z0, *leaves))
    wants_gradient = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad(), full_precision(z0.device):
        value = structure.first_call(z, *plain)
    if not isinstance(value, Tensor):
        raise ShapeError(f"{what}: {name}(z, *theta) must return a tensor, got {type(value).__name__}")
    expected = z0.shape[:batch_dims] if kind == "argmin" else z0.shape
    if value.shape != expected:
        why = (
            f"one value a problem: the first batch_dims={batch_dims} dimensions of {z_name}"
            if kind == "argmin"
            else f"the shape of {z_name}; expand {z_name} if theta has more batch dimensions"
        )
        raise ShapeError(
            f"{what}: {name}(z, *theta) must have shape {tuple(expected)} ({why}, which is {tuple(z0.shape)}), "
            f"got {tuple(value.shape)}"
        )
    if value.dtype != z0.dtype:
        raise DtypeError(
            f"{what}: {name}(z, *theta) is {value.dtype} but {z_name} is {z0.dtype}; give {z_name} and theta one dtype"
        )
    if value.device != z0.device:
        raise DeviceError(f"{what}: {name}(z, *theta) is on {value.device} but {z_name} is on {z0.device}")
    _refuse_captured(value, wants_gradient, what, name)


def _refuse_independent(structure: Structure, z0: Tensor, leaves: list[Tensor], what: str, name: str) -> None:
    """The function depends on z as autograd sees it; one more evaluation, where dF/dz will be needed anyway.

    A step of a fixed point may be constant, a residual or an objective may not: its Jacobian would be zero.
    """
    with opaque(z0.device), torch.enable_grad():
        z, *plain = recordable(z0, *leaves)
        z = z.requires_grad_().view_as(z)  # no leaf, which the function could not change in place
        try:
            attached = structure.first_call(z, *plain).requires_grad
        except RuntimeError as error:
            if "numpy()" not in str(error):  # PyTorch's own refusal to leave the graph
                raise
            attached = False
    if not attached and z0.numel():
        raise ArgumentError(
            f"{what}: {name} does not depend on z through PyTorch operations (was it detached, or computed with "
            "numpy?), so there is no derivative in z to solve with. Write it in PyTorch operations, or wrap what "
            "cannot be in a torch.autograd.Function"
        )


def _unwrapped(x: Tensor) -> Tensor:
    """The tensor below all functional transforms, of every mapped axis the first entry."""
    while _functorch.is_functorch_wrapped_tensor(x):
        batched = _functorch.is_batchedtensor(x)
        axis = _functorch.maybe_get_bdim(x) if batched else 0
        x = _functorch.get_unwrapped(x)
        if batched:
            x = x.select(axis, 0) if x.shape[axis] else x.new_zeros([*x.shape[:axis], *x.shape[axis + 1 :]])
    return x


def _plain(x: Tensor) -> Tensor:
    """The tensor without transforms and without history, a problem of its own."""
    return _unwrapped(_unwrapped(x).detach())


def _refuse_captured(value: Tensor, wants_gradient: bool, what: str, name: str) -> None:
    """The function was evaluated on plain tensors: a history or a transform on the value came in by another way."""
    tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None
    mapped = _functorch.is_batchedtensor(value)
    if (value.requires_grad and wants_gradient) or tangent or mapped:
        kind = "is mapped by vmap" if mapped else "carries a tangent" if tangent else "requires grad"
        raise CapturedTensorError(
            f"{what}: {name} depends on a tensor that {kind} and is not among its arguments (a closure, a global, "
            "a parameter of a module), so its gradient would be lost. Pass the tensor as theta and take it as an "
            f"argument: {name}(z, W). For an nn.Module pass the module itself, as {name} or as one of theta. "
            "If no gradient is wanted, detach it"
        )
    if _functorch.is_functorch_wrapped_tensor(value):
        inner = _functorch.get_unwrapped(value)
        with temporarily_pop_interpreter_stack():  # a tangent is seen only from its own level
            _refuse_captured(inner, wants_gradient, what, name)
