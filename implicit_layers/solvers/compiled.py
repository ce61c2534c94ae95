"""The compiled solver for small and medium dense programs on the CPU, several programs side by side.

Its steps are those of `dual_path` and `active_set`, for the whole of a program at a time, in the cache, one program in
each lane of the processor's registers, the programs of a batch shared by threads. Bounds are rows of the identity,
which nobody writes down. It settles what those steps settle and leaves all others, fixed unknowns among them, to the
general solvers. It is there when the package was built with a C++ compiler. The environment variable
IMPLICIT_LAYERS_KERNEL, read at import, takes a lesser one: "avx2", "basic" or "none". What it names and is not there
is warned of, and the best there is taken.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ImplicitLayersWarning, UnsupportedError, warn
from implicit_layers.kkt import quadratic

_CHOICES = ("best", "avx512", "avx2", "basic", "none")
_WISH = os.environ.get("IMPLICIT_LAYERS_KERNEL", "")
_OFF = _WISH == "none"
try:
    _kernel: Any = None if _OFF else import_module("implicit_layers._kernel")
except ImportError:  # built without a compiler
    _kernel = None

if _kernel is not None and _WISH not in ("", "best", _kernel.describe()[0]):
    _why = "this processor has no such instructions" if _WISH in _CHOICES else f"it is none of {', '.join(_CHOICES)}"
    warn(f"IMPLICIT_LAYERS_KERNEL={_WISH}: {_why}; took {_kernel.describe()[0]}", ImplicitLayersWarning)

_MOST_UNKNOWNS = 160  # beyond which a program no longer fits the cache, and the libraries behind PyTorch are faster
_MOST_ROWS = 200
_MOST_ENTRIES = 40_000  # of the rows' matrix, where there are more of them
MANY = 2.0  # inequalities for each unknown from which an iteration factors a matrix of the unknowns' size
_WIDE, _NARROW, _BOUNDED = range(3)  # the forms of the iteration, see csrc

_Room = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # sizes, strides and dtype of a tensor
_EVENT_NDIM = (2, 1, 2, 1, 2, 1, 1, 1)  # trailing dimensions of Q, p, A, b, G, h, lb, ub
_ALIGNED = 8  # parts of a factor start at multiples of so many numbers, as memory of their own does


def _empty(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor, whatever the user's default device."""
    return torch.empty_strided(sizes, strides, dtype=dtype, device="cpu")


if _kernel is not None:  # what it asks of PyTorch
    _guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    _at_once = getattr(_guards, "_empty_strided_cpu", _empty)  # which takes half as long as to ask the dispatcher
    _wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    _of_tensors = (Tensor.data_ptr, Tensor.is_contiguous, Tensor.is_neg, Tensor._is_zerotensor, _wrapped)
    _ASKED = (_at_once, *_of_tensors, torch.strided, Tensor, torch.nn.Parameter)
    _kernel.prepare(*_ASKED)


class Structure(NamedTuple):
    """What sizes and steps decide of a batch of programs, worked out once for all batches that are alike in them."""

    head: bytes  # numbers as the kernel reads them, see csrc
    dtype: torch.dtype
    batch: torch.Size
    steps: tuple[int, ...]  # from one program's Q, p, A, b, G, h, lb, ub to the next's; 0 where there is one for all
    own: tuple[bool, ...]  # which of them have the sizes of the batch
    alone: bool  # whether all that there are do
    shapes: tuple[torch.Size, ...]  # of the same; of bounds as if there were both
    rooms: tuple[_Room, ...]  # of the tensors that a solve makes, as csrc lists them
    fixed: int  # how many of them are not just zeros
    bounded: bool
    back: tuple[_Room | None, ...]  # of those of `adjoint`; none for gradients of matrices that the batch shares
    parts: tuple[tuple[slice, tuple[int, ...], tuple[int, ...]], ...]  # of a factor: where, sizes, sizes in the batch


class Packed(NamedTuple):
    """A factor whose parts lie one behind the other."""

    memory: Tensor  # float64
    structure: Structure

    def factor(self) -> quadratic.Factor:
        """Take it apart, into (*B, ...) each; what the batch shares stays one memory."""
        return quadratic.Factor(
            *(self.memory[where].reshape(own).expand(sizes) for where, own, sizes in self.structure.parts)
        )


class Settled(NamedTuple):
    """The answers of a batch, one entry a problem; where `done` is false, nothing else is to be read."""

    z: Tensor  # (*B, n)
    nu: Tensor  # (*B, n_eq)
    lam: Tensor  # (*B, n_ineq)
    bound: Tensor | None  # (*B, n) λ_ub − λ_lb; none without bounds, nor what pulls
    s: Tensor  # (*B, n_ineq)
    value: Tensor  # (*B,)
    pull_lb: Tensor | None  # like `bound`: 1 where the lower bound holds the unknown
    pull_ub: Tensor | None  # like `bound`: 1 where the upper bound does
    packed: Packed  # the factor
    weak: Tensor  # (*B,) int8
    condition: Tensor  # (*B,)
    iterations: Tensor  # (*B,) int64
    residual: Tensor  # (*B,)
    done: Tensor  # (*B,) bool
    number: int  # how many are done for good: weak ones are looked at again
    zeros: Sequence[Tensor] = ()  # (*B,) int8, (*B, n_eq), (*B, n_ineq) and, without bounds, twice (*B, n)

    @property
    def factor(self) -> quadratic.Factor:
        """Of float64, each part (*B, ...); with bounds on the rows (A, G, identity)."""
        return self.packed.factor()


def description() -> str:
    """Say which instructions the kernel uses, or that there is none."""
    if _kernel is None:
        return "none: switched off" if _OFF else "none: built without a C++ compiler"
    name, lanes = _kernel.describe()
    return f"{name}, {lanes} programs side by side"


def required() -> None:
    """Refuse to go on without the kernel.

    Raises:
        UnsupportedError: the package was built without it.
    """
    if _kernel is None:
        raise UnsupportedError(
            'InteriorPoint: backend="compiled" needs the kernel, which this installation was built without; install '
            'the package again where there is a C++ compiler, or take backend="auto"'
        )


def fits(Q: Tensor, A: Tensor, G: Tensor, bounded: bool = False) -> bool:
    """Tell whether the kernel is there and made for programs of that kind; bounds count as a row an unknown."""
    n, n_eq, n_ineq = Q.shape[-1], A.shape[-2], G.shape[-2]
    if _kernel is None or n > _MOST_UNKNOWNS or Q.numel() == 0:
        return False
    rows = n_eq + n_ineq + n * bounded
    if rows > _MOST_ROWS and (_form(n, n_ineq, bounded) == _WIDE or n_eq > n or rows * n > _MOST_ENTRIES):
        return False
    return Q.is_cpu and Q.dtype in (torch.float32, torch.float64)


def _form(n: int, n_ineq: int, bounded: bool) -> int:
    """Choose what an iteration factors: a matrix of the size of the rows, or of the unknowns."""
    if bounded:
        return _BOUNDED
    return _NARROW if n_ineq >= MANY * n and n_ineq > n else _WIDE


def sizes_and_dtypes(tensors: tuple[Tensor | None, ...]) -> tuple[object, ...] | None:
    """Of ordinary tensors in the processor's memory; None where one is another, or there is no kernel."""
    return None if _kernel is None or checks.traced() else _kernel.structure(tensors)


def ordinary(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether these are ordinary tensors in the processor's memory."""
    return _kernel is not None and not checks.traced() and _kernel.ordinary(tensors)


def structure(batch: torch.Size, data: Sequence[Tensor | None], steps: Sequence[int] | None = None) -> Structure:
    """The structure of programs Q, p, A, b, G, h, lb, ub, each (*B or 1s, ...); contiguous, or with steps."""
    Q, _, A, _, G, _, lb, ub = data
    own = tuple(t is not None and t.shape[:-k] == batch for t, k in zip(data, _EVENT_NDIM, strict=True))
    if steps is None:
        events = [0 if t is None else math.prod(t.shape[-k:]) for t, k in zip(data, _EVENT_NDIM, strict=True)]
        steps = [event if mine else 0 for event, mine in zip(events, own, strict=True)]
    sizes = (Q.shape[-1], A.shape[-2], G.shape[-2])  # type: ignore[union-attr]
    return _structure(batch, Q.dtype, sizes, lb is not None or ub is not None, own, tuple(steps))  # type: ignore[union-attr]


@lru_cache(maxsize=256)
def _structure(
    batch: torch.Size,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    bounded: bool,
    own: tuple[bool, ...],
    steps: tuple[int, ...],
) -> Structure:
    """Work it out."""
    n, n_eq, n_ineq = sizes
    rows = n_ineq + n * bounded
    hold = min(rows, max(n - n_eq, 0))  # more rows are not independent
    shared_q = steps[0] == 0
    shared = shared_q and (n_eq == 0 or steps[2] == 0) and (n_ineq == 0 or steps[4] == 0)
    events = ((n, n), (n_eq, n_eq), (n_eq, rows), (hold, hold), (n_eq + rows,), (n_eq + rows,))
    parts, starts, apart, end = [], [], [], 0
    for event, once in zip(events, (shared_q, shared, shared, False, shared, False), strict=True):
        kept = ((1,) * len(batch) if once else tuple(batch)) + event
        start, end = end, end + math.prod(kept)
        parts.append((slice(start, end), kept, (*batch, *event)))
        starts.append(start)
        apart.append(0 if once else math.prod(event))
        end = -(-end // _ALIGNED) * _ALIGNED
    data = ((n, n), (n,), (n_eq, n), (n_eq,), (n_ineq, n), (n_ineq,), (n,), (n,))
    head = _head(dtype, batch, sizes, hold, bounded, steps, starts, apart)
    of_n, of_eq, of_ineq = (_room((*batch, size), dtype) for size in sizes)
    one, small = _room(batch, dtype), _room(batch, torch.int8)
    rooms = [of_n, of_eq, of_ineq, of_ineq, one, one, one, _room((end,), torch.float64)]
    rooms += [_room(batch, torch.int64), small, _room(batch, torch.bool), *[of_n] * 3 * bounded]
    fixed = len(rooms)
    rooms += [small, of_eq, of_ineq, *[of_n] * 2 * (not bounded)]
    back = [_room((*batch, rows, n), dtype) if mine else None for rows, mine in zip(sizes, own[:6:2], strict=True)]
    return Structure(
        head,
        dtype,
        batch,
        steps,
        own,
        all(own[: None if bounded else 6]),
        tuple(
            torch.Size((*(batch if mine else (1,) * len(batch)), *event)) for mine, event in zip(own, data, strict=True)
        ),
        tuple(rooms),
        fixed,
        bounded,
        (of_n, of_eq, of_ineq, *back, of_n, of_n, of_n),
        tuple(parts),
    )


def _head(
    dtype: torch.dtype,
    batch: torch.Size,
    sizes: tuple[int, int, int],
    hold: int,
    bounded: bool,
    steps: Sequence[int],
    starts: Sequence[int],
    apart: Sequence[int],
) -> bytes:
    """Numbers as the kernel reads them; of the factor's parts, where they start and the steps between programs."""
    form = _form(sizes[0], sizes[2], bounded)
    return struct.pack("=27q", dtype == torch.float32, batch.numel(), *sizes, hold, form, *steps, *starts, *apart)


def _room(sizes: tuple[int, ...], dtype: torch.dtype) -> _Room:
    """Of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(sizes), tuple(reversed(strides)), dtype


def solve(
    batch: torch.Size,
    data: Sequence[Tensor],
    *,
    bounds: tuple[Tensor | None, Tensor | None] = (None, None),
    tol: float,
    max_iter: int,
    start: Tensor | None = None,
    known: Structure | None = None,
    zeros: bool = False,
) -> Settled:
    """Solve a batch of programs Q, p, A, b, G, h with bounds (lb, ub), each (*B or 1s, ...).

    `start`: active rows to try first, (N, m), and with bounds +1 at ub, -1 at lb behind them, (N, m + n).
    `known`: the structure that these programs have if they are contiguous. `zeros`: whether zeros are wanted too.
    """
    every = (*data, *bounds)
    threads, most = torch.get_num_threads(), min(max_iter, 2**31)
    start = None if start is None else start.contiguous()

    def solved(known: Structure, tensors: Sequence[Tensor | None]) -> Any:  # None where a tensor has gaps
        rooms = known.rooms if zeros else known.rooms[: known.fixed]
        return _kernel.solve(known.head, threads, tol, most, start, tensors, rooms)

    found = None if known is None else solved(known, every)
    if known is None or found is None:
        kept = [(None, 0) if t is None else _flat(t, k, batch) for t, k in zip(every, _EVENT_NDIM, strict=True)]
        known = structure(batch, every, [step for _, step in kept])
        found = solved(known, tuple(tensor for tensor, _ in kept))
    number, (z, nu, lam, s, value, residual, condition, memory, iterations, weak, done, *others) = found
    bound, pull_lb, pull_ub = others[:3] if known.bounded else (None, None, None)
    packed, nothing = Packed(memory, known), others[3:] if known.bounded else others
    point = (z, nu, lam, bound, s, value, pull_lb, pull_ub)
    return Settled(*point, packed, weak, condition, iterations, residual, done, number, nothing)


def adjoint(
    batch: torch.Size,
    matrices: Sequence[Tensor],
    point: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    factor: quadratic.Factor | Packed,
    degenerate: Tensor | None,
    converged: Tensor | None,
    wanted: Sequence[bool],
    pull_ub: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor | None]] | None:
    """Solve K v = g and form the gradients that are wanted, those of Q, A and G where the batch does not share them.

    `grads` are those of z, ν, λ and the dual of the bounds; with bounds `pull_ub` tells which holds an unknown. Without
    `degenerate` and `converged` all problems are known to allow it.

    Returns: v_z, v_nu, v_lam; the gradients of Q, A, G, p, lb, ub. None where a problem failed or is degenerate.
    """
    Q, A, G = matrices
    if isinstance(factor, Packed):
        memory, known = factor
        head, parts = known.head, None
        if any(t.dtype != known.dtype for t in (Q, A, G, *point)) or memory.dtype != torch.float64:  # by a user's hooks
            Q, A, G, *point = (t.to(known.dtype) for t in (Q, A, G, *point))
            pull_ub = None if pull_ub is None else pull_ub.to(known.dtype)
            memory = memory.double()
    else:
        (Q, step_q), (A, step_a), (G, step_g) = (_flat(tensor, 2, batch) for tensor in matrices)
        sizes, bounded = (Q.shape[-1], A.shape[-2], G.shape[-2]), pull_ub is not None
        own = (*(matrix.shape[:-2] == batch for matrix in matrices for _ in range(2)), True, True)
        steps = (step_q, 0, step_a, 0, step_g, 0, 0, 0)
        known = _structure(batch, Q.dtype, sizes, bounded, own, steps)
        flat = [_flat(t, k, batch) for t, k in zip(factor, quadratic.EVENT_NDIM, strict=True)]
        memory, parts = None, tuple(part for part, _ in flat)
        apart = [step for _, step in flat]
        head = _head(Q.dtype, batch, sizes, factor.chol_ineq.shape[-1], bounded, steps, (0,) * 6, apart)
    rights = [(None, 0) if g is None else (g, g.shape[-1]) if g.is_contiguous() else _flat(g, 1, batch) for g in grads]
    (g_z, step_z), (g_nu, step_nu), (g_lam, step_lam), (g_bound, step_bound) = rights
    wishes = zip(known.back, (True, True, True, *wanted), strict=True)
    threads = torch.get_num_threads()
    task = (
        (g_z, g_nu, g_lam, g_bound),
        (step_z, step_nu, step_lam, step_bound),
        (degenerate, converged),
        parts,
        tuple([room if wish else None for room, wish in wishes]),
    )
    made = _kernel.adjoint(head, threads, (Q, A, G, *point, pull_ub, memory), *task)
    if made is None:
        Q, A, G = (_first(t, step) for t, step in zip((Q, A, G), known.steps[:6:2], strict=True))
        whole = (None if t is None else t.contiguous() for t in (*point, pull_ub, memory))
        made = _kernel.adjoint(head, threads, (Q, A, G, *whole), *task)
    return (made[:3], list(made[3:])) if made else None


def _first(tensor: Tensor, step: int) -> Tensor:
    """Give a tensor with contiguous memory: of a step of 0, that of the first program, which stands for all."""
    if tensor.is_contiguous() or step:
        return tensor.contiguous()
    for _ in range(tensor.ndim - 2):
        tensor = tensor.select(0, 0)
    return tensor.contiguous()


def _flat(tensor: Tensor, event_ndim: int, batch: torch.Size) -> tuple[Tensor, int]:
    """Give a tensor whose memory the kernel can walk: what to keep alive, and the step between problems."""
    if tensor.is_contiguous() and tensor.shape[:-event_ndim] == batch:
        return tensor, tensor.numel() // (batch.numel() or 1)
    flat = quadratic.unexpand(tensor, event_ndim, batch).contiguous()
    return flat, 0 if flat.shape[0] == 1 else flat.numel() // flat.shape[0]
