"""The solve and the linear solve of its derivative as single operations, for `torch.compile` and `torch.export`.

A solver's loop ends on data, so the compiler must not look into it. It sees an operation with known sizes instead, and
traces the rest of the derivative. These operations have no derivatives of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_layers.qp import run as eager
from implicit_layers.qp.arguments import EVENT_NDIM
from implicit_layers.qp.run import Outcome, Settings
from implicit_layers.solvers.interior_point import InteriorPoint

_SETTINGS = (
    "float? tol, int max_iter, int check_every, str precision, str form, str backend, str on_failure, str gradient, "
    "bool elastic"
)


def _packed(settings: Settings) -> tuple[float | int | str | bool | None, ...]:
    """Settings as plain values."""
    solver = settings.solver
    of_solver = (solver.tol, solver.max_iter, solver.check_every, solver.precision, solver.form, solver.backend)
    return *of_solver, settings.on_failure, settings.gradient, settings.elastic


def _unpacked(values: tuple[object, ...]) -> Settings:
    """The settings again."""
    *of_solver, on_failure, gradient, elastic = values
    return Settings(InteriorPoint(*of_solver), on_failure, gradient, elastic=elastic)  # type: ignore[arg-type]


def run(settings: Settings, *tensors: Tensor | None) -> Outcome:
    """See `run.run`; the active set takes the place of the factor."""
    outputs = torch.ops.implicit_layers.solve_qp(*tensors, *_packed(settings))
    return Outcome.of(settings.gradient, tuple(outputs))


def solve_kkt(settings: Settings, *tensors: Tensor) -> tuple[Tensor, ...]:
    """See `run.solve_kkt`."""
    return tuple(torch.ops.implicit_layers.solve_kkt(*tensors, *_packed(settings)))


@torch.library.custom_op(
    "implicit_layers::solve_qp",
    mutates_args=(),
    schema="(Tensor Q, Tensor p, Tensor A, Tensor b, Tensor G, Tensor h, Tensor? lb, Tensor? ub, "
    f"{_SETTINGS}) -> ({', '.join(['Tensor'] * 16)})",
)
def _solve_qp(*arguments: object) -> tuple[Tensor, ...]:
    tensors, settings = arguments[:8], _unpacked(arguments[8:])
    return tuple(map(_owned, eager.run(settings, *tensors, factor=False).flat()))  # type: ignore[arg-type]


@_solve_qp.register_fake
def _sizes_of_a_solution(*arguments: object) -> tuple[Tensor, ...]:
    tensors: tuple[Tensor, ...] = arguments[:8]  # type: ignore[assignment]
    p, b, h = tensors[1], tensors[3], tensors[5]
    present = [(t, k) for t, k in zip(tensors, EVENT_NDIM, strict=True) if t is not None]
    batch = torch.broadcast_shapes(*(t.shape[: t.ndim - k] for t, k in present))
    n, n_eq, n_ineq = p.shape[-1], b.shape[-1], h.shape[-1]
    bounds = n if len(present) > 6 else 0
    compute = p.dtype if arguments[11] == "native" else torch.float64
    sizes = ((n,), (n_eq,), (n_ineq,), (bounds,), (n_ineq,), (), (bounds,), (bounds,))
    small = (torch.int8, p.dtype, torch.int8, torch.bool, torch.int64, p.dtype)
    active_set = (n_eq + n_ineq, n)
    return (
        *(p.new_empty((*batch, *size)) for size in sizes),
        *(p.new_empty(batch, dtype=dtype) for dtype in small),
        *(p.new_empty(*batch, size, dtype=compute) for size in active_set),
    )


@torch.library.custom_op(
    "implicit_layers::solve_kkt",
    mutates_args=(),
    schema="(Tensor Q, Tensor A, Tensor G, Tensor r_z, Tensor r_nu, Tensor r_lam, Tensor r_bound, Tensor degenerate, "
    f"Tensor active, Tensor fixed, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _solve_kkt(*arguments: object) -> tuple[Tensor, ...]:
    tensors, settings = arguments[:10], _unpacked(arguments[10:])
    return tuple(map(_owned, eager.solve_kkt(settings, *tensors)))  # type: ignore[arg-type]


@_solve_kkt.register_fake
def _sizes_of_a_direction(*arguments: object) -> tuple[Tensor, ...]:
    rights: tuple[Tensor, ...] = arguments[3:7]  # type: ignore[assignment]
    return tuple(right.new_empty(right.shape) for right in rights)


def _owned(tensor: Tensor) -> Tensor:
    """A tensor with memory of its own, laid out as the compiler expects."""
    return tensor.clone(memory_format=torch.contiguous_format)
