"""The compiled solver for small and medium dense programs on the CPU, several programs side by side.

Its steps are those of `dual_path` and `active_set`, for the whole of a program at a time, in the cache, one program in
each lane of the processor's registers, the programs of a batch shared by threads. Bounds are rows of the identity,
which nobody writes down. It settles what those steps settle and leaves all others, fixed unknowns among them, to the
general solvers. It is there when the package was built with a C++ compiler. The environment variable
IMPLICIT_LAYERS_KERNEL, read at import, takes a lesser one: "avx2", "basic" or "none". What it names and is not there
is warned of, and the best there is taken.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
_VECTORS = (0, 1, 0, 1, 0, 1)
_WIDE, _NARROW, _BOUNDED = range(3)  # the forms of the iteration, see csrc


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
    factor: quadratic.Factor  # float64, each (*B, ...); with bounds on the rows (A, G, identity)
    weak: Tensor  # (*B,) int8
    condition: Tensor  # (*B,)
    iterations: Tensor  # (*B,) int64
    residual: Tensor  # (*B,)
    done: Tensor  # (*B,) bool
    number: int  # how many are done for good: weak ones are looked at again


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


def solve(
    batch: torch.Size,
    data: Sequence[Tensor],
    *,
    bounds: tuple[Tensor | None, Tensor | None] = (None, None),
    tol: float,
    max_iter: int,
    start: Tensor | None = None,
) -> Settled:
    """Solve a batch of programs Q, p, A, b, G, h with bounds (lb, ub), each (*B or 1s, ...).

    `start`: active rows to try first, (N, m), and with bounds +1 at ub, -1 at lb behind them, (N, m + n).
    """
    Q, _, A, _, G, _ = data
    count, n, n_eq, n_ineq = batch.numel(), Q.shape[-1], A.shape[-2], G.shape[-2]
    bounded = any(bound is not None for bound in bounds)
    held = n if bounded else 0
    rows = n_ineq + held
    hold = min(rows, max(n - n_eq, 0))  # more rows are not independent
    kept = [_flat(tensor, 2 - vector, batch) for tensor, vector in zip(data, _VECTORS, strict=True)]
    sides = [(None, 0) if bound is None else _flat(bound, 1, batch) for bound in bounds]
    shared_q = kept[0][1] == 0
    shared = shared_q and (n_eq == 0 or kept[2][1] == 0) and (n_ineq == 0 or kept[4][1] == 0)
    own = (1,) * len(batch)
    of_q, of_rows = (own if shared_q else batch), (own if shared else batch)
    double = torch.float64
    z, nu, lam = Q.new_empty(*batch, n), Q.new_empty(*batch, n_eq), Q.new_empty(*batch, n_ineq)
    s, value = Q.new_empty(*batch, n_ineq), Q.new_empty(batch)
    bound, pull_lb, pull_ub = [torch.empty_like(z) for _ in range(3)] if bounded else (None, None, None)
    residual, condition = torch.empty_like(value), torch.empty_like(value)
    # sizes one by one, which PyTorch reads in half the time; like Q, since the user's default device may be another
    chol_q = Q.new_empty(*of_q, n, n, dtype=double)
    chol_eq = Q.new_empty(*of_rows, n_eq, n_eq, dtype=double)
    across = Q.new_empty(*of_rows, n_eq, rows, dtype=double)
    chol_ineq = Q.new_empty(*batch, hold, hold, dtype=double)
    scale = Q.new_empty(*of_rows, n_eq + rows, dtype=double)
    active = Q.new_empty(*batch, n_eq + rows, dtype=double)
    iterations = torch.empty_like(value, dtype=torch.int64)
    weak, done = torch.empty_like(value, dtype=torch.int8), torch.empty_like(value, dtype=torch.bool)
    start = None if start is None else start.contiguous()
    settled = _kernel.solve(
        Q.dtype == torch.float32,
        torch.get_num_threads(),
        *(count, n, n_eq, n_ineq, hold, _form(n, n_ineq, bounded)),
        *[tensor.data_ptr() for tensor, _ in kept],
        *[0 if side is None else side.data_ptr() for side, _ in sides],
        *[step for _, step in (*kept, *sides)],
        0 if start is None else start.data_ptr(),
        tol,
        min(max_iter, 2**31),
        *[0 if t is None else t.data_ptr() for t in (z, nu, lam, bound, s, value, pull_lb, pull_ub)],
        *[t.data_ptr() for t in (residual, condition)],
        *[t.data_ptr() for t in (chol_q, chol_eq, across, chol_ineq, scale, active, iterations, weak, done)],
    )
    if shared_q:
        chol_q = chol_q.expand(*batch, n, n)
    if shared:
        chol_eq, across = chol_eq.expand(*batch, n_eq, n_eq), across.expand(*batch, n_eq, rows)
        scale = scale.expand(*batch, n_eq + rows)
    factor = quadratic.Factor(chol_q, chol_eq, across, chol_ineq, scale, active)
    point = (z, nu, lam, bound, s, value, pull_lb, pull_ub)
    return Settled(*point, factor, weak, condition, iterations, residual, done, settled)


def adjoint(
    batch: torch.Size,
    matrices: Sequence[Tensor],
    point: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    factor: quadratic.Factor,
    degenerate: Tensor,
    converged: Tensor,
    wanted: Sequence[bool],
    pull_ub: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """Solve K v = g and form the gradients that are wanted, those of Q, A and G where the batch does not share them.

    `grads` are those of z, ν, λ and the dual of the bounds; with bounds `pull_ub` tells which holds an unknown.

    Returns: v_z, v_nu, v_lam; the gradients of Q, A, G, p, lb, ub. None where a problem failed or is degenerate.
    """
    Q, A, G = matrices
    count, n, n_eq, n_ineq = batch.numel(), Q.shape[-1], A.shape[-2], G.shape[-2]
    kept = [_flat(tensor, 2, batch) for tensor in matrices]
    parts = [_flat(t, k, batch) for t, k in zip(factor, quadratic.EVENT_NDIM, strict=True)]
    point = [t.contiguous() for t in point]
    rights = [(None, 0) if grad is None else _flat(grad, 1, batch) for grad in grads]
    v = [torch.empty_like(t) for t in point]
    own = [
        Q.new_empty(*batch, *matrix.shape[-2:]) if want and matrix.shape[:-2] == batch else None
        for want, matrix in zip(wanted, matrices, strict=False)
    ]
    own += [torch.empty_like(point[0]) if want else None for want in wanted[3:]]
    bounded = pull_ub is not None
    held = pull_ub.contiguous() if pull_ub is not None else None
    (q, step_q), (a, step_a), (g, step_g) = kept
    zero = 0
    good = _kernel.adjoint(
        Q.dtype == torch.float32,
        torch.get_num_threads(),
        *(count, n, n_eq, n_ineq, factor.chol_ineq.shape[-1], _form(n, n_ineq, bounded)),
        *(q.data_ptr(), zero, a.data_ptr(), zero, g.data_ptr(), zero, zero, zero),
        *(step_q, zero, step_a, zero, step_g, zero, zero, zero),
        *[t.data_ptr() for t, _ in parts],
        *(parts[0][1], parts[1][1], parts[2][1], parts[4][1]),
        *[t.data_ptr() for t in point],
        zero if held is None else held.data_ptr(),
        *[zero if t is None else t.data_ptr() for t, _ in rights],
        *[step for _, step in rights],
        *[t.data_ptr() for t in v],
        *[zero if t is None else t.data_ptr() for t in own],
        *(degenerate.data_ptr(), converged.data_ptr()),
    )
    return (v, own) if good else None


def _flat(tensor: Tensor, event_ndim: int, batch: torch.Size) -> tuple[Tensor, int]:
    """Give a tensor whose memory the kernel can walk: what to keep alive, and the step between problems."""
    if tensor.is_contiguous() and tensor.shape[:-event_ndim] == batch:
        return tensor, tensor.numel() // (batch.numel() or 1)
    flat = quadratic.unexpand(tensor, event_ndim, batch).contiguous()
    return flat, 0 if flat.shape[0] == 1 else flat.numel() // flat.shape[0]
