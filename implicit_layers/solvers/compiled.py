"""The compiled solver for small and medium dense programs on the CPU, several programs side by side.

Its steps are those of `dual_path` and `active_set`, for the whole of a program at a time, in the cache, one program in
each lane of the processor's registers, the programs of a batch shared by threads. It settles what those steps settle
and leaves all others to the general solvers. It is there when the package was built with a C++ compiler. The
environment variable IMPLICIT_LAYERS_KERNEL, read at import, takes a lesser one: "avx2", "basic" or "none". What it
names and is not there is warned of, and the best there is taken.
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
_NARROW = 2.0  # inequalities for each unknown from which an iteration factors a matrix of the unknowns' size
_VECTORS = (0, 1, 0, 1, 0, 1)


class Settled(NamedTuple):
    """The answers of a batch, one entry a problem; where `done` is false, nothing else is to be read."""

    z: Tensor  # (*B, n)
    nu: Tensor  # (*B, n_eq)
    lam: Tensor  # (*B, n_ineq)
    s: Tensor  # (*B, n_ineq)
    value: Tensor  # (*B,)
    factor: quadratic.Factor  # float64, each (*B, ...); the active rows are among its fields
    weak: Tensor  # (*B,) int8
    condition: Tensor  # (*B,)
    iterations: Tensor  # (*B,) int64
    residual: Tensor  # (*B,)
    done: Tensor  # (*B,) bool
    number: int  # how many are done


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


def fits(Q: Tensor, A: Tensor, G: Tensor) -> bool:
    """Tell whether the kernel is there and made for programs of that kind."""
    n, n_eq, n_ineq = Q.shape[-1], A.shape[-2], G.shape[-2]
    if _kernel is None or n > _MOST_UNKNOWNS or Q.numel() == 0:
        return False
    rows = n_eq + n_ineq
    if rows > _MOST_ROWS and (_room(n, n_ineq) == n_ineq or n_eq > n or rows * n > _MOST_ENTRIES):
        return False
    return Q.device.type == "cpu" and Q.dtype in (torch.float32, torch.float64)


def _room(n: int, n_ineq: int) -> int:
    """Say how many active inequalities the factors have room for: all, or where they are many as many as unknowns."""
    return n if n_ineq >= _NARROW * n and n_ineq > n else n_ineq


def solve(
    batch: torch.Size, data: Sequence[Tensor], *, tol: float, max_iter: int, start: Tensor | None = None
) -> Settled:
    """Solve a batch of programs Q, p, A, b, G, h, each (*B or 1s, ...); `start`: active rows to try first, (N, m)."""
    Q, _, A, _, G, _ = data
    count, n, n_eq, n_ineq = batch.numel(), Q.shape[-1], A.shape[-2], G.shape[-2]
    hold = _room(n, n_ineq)
    kept = [_flat(tensor, 2 - vector, batch) for tensor, vector in zip(data, _VECTORS, strict=True)]
    shared_q = kept[0][1] == 0
    shared = shared_q and (n_eq == 0 or kept[2][1] == 0) and (n_ineq == 0 or kept[4][1] == 0)
    own = (1,) * len(batch)
    of_q, of_rows = (own if shared_q else batch), (own if shared else batch)
    double = torch.float64
    z, nu, lam = Q.new_empty(*batch, n), Q.new_empty(*batch, n_eq), Q.new_empty(*batch, n_ineq)
    s, value = Q.new_empty(*batch, n_ineq), Q.new_empty(batch)
    residual, condition = Q.new_empty(batch), Q.new_empty(batch)
    chol_q = torch.empty((*of_q, n, n), dtype=double)
    chol_eq = torch.empty((*of_rows, n_eq, n_eq), dtype=double)
    across = torch.empty((*of_rows, n_eq, n_ineq), dtype=double)
    chol_ineq = torch.empty((*batch, hold, hold), dtype=double)
    scale = torch.empty((*of_rows, n_eq + n_ineq), dtype=double)
    active = torch.empty((*batch, n_eq + n_ineq), dtype=double)
    iterations = torch.empty(batch, dtype=torch.int64)
    weak, done = torch.empty(batch, dtype=torch.int8), torch.empty(batch, dtype=torch.bool)
    start = None if start is None else start.contiguous()
    settled = _kernel.solve(
        Q.dtype == torch.float32,
        torch.get_num_threads(),
        *(count, n, n_eq, n_ineq, hold),
        *(tensor.data_ptr() for tensor, _ in kept),
        *(step for _, step in kept),
        0 if start is None else start.data_ptr(),
        tol,
        min(max_iter, 2**31),
        *(t.data_ptr() for t in (z, nu, lam, s, value, residual, condition)),
        *(t.data_ptr() for t in (chol_q, chol_eq, across, chol_ineq, scale, active)),
        *(t.data_ptr() for t in (iterations, weak, done)),
    )
    if shared_q:
        chol_q = chol_q.expand(*batch, n, n)
    if shared:
        chol_eq, across = chol_eq.expand(*batch, n_eq, n_eq), across.expand(*batch, n_eq, n_ineq)
        scale = scale.expand(*batch, n_eq + n_ineq)
    factor = quadratic.Factor(chol_q, chol_eq, across, chol_ineq, scale, active)
    return Settled(z, nu, lam, s, value, factor, weak, condition, iterations, residual, done, settled)


def adjoint(
    batch: torch.Size,
    matrices: Sequence[Tensor],
    point: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    factor: quadratic.Factor,
    degenerate: Tensor,
    converged: Tensor,
    wanted: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """Solve K v = g and form the gradients of Q, A and G that are wanted and not shared by the batch.

    Returns: v_z, v_nu, v_lam; the gradients of Q, A, G, p. None where a problem failed or is degenerate.
    """
    Q, A, G = matrices
    count, n, n_eq, n_ineq = batch.numel(), Q.shape[-1], A.shape[-2], G.shape[-2]
    kept = [_flat(tensor, 2, batch) for tensor in matrices]
    parts = [_flat(t, k, batch) for t, k in zip(factor, quadratic.EVENT_NDIM, strict=True)]
    point = [t.contiguous() for t in point]
    rights = [(None, 0) if grad is None else _flat(grad, 1, batch) for grad in grads]
    v = [torch.empty_like(t) for t in point]
    own = [
        torch.empty(batch + matrix.shape[-2:], dtype=Q.dtype) if want and matrix.shape[:-2] == batch else None
        for want, matrix in zip(wanted, matrices, strict=False)
    ]
    of_p = torch.empty_like(point[0]) if wanted[3] else None
    (q, step_q), (a, step_a), (g, step_g) = kept
    zero = 0
    good = _kernel.adjoint(
        Q.dtype == torch.float32,
        torch.get_num_threads(),
        *(count, n, n_eq, n_ineq, factor.chol_ineq.shape[-1]),
        *(q.data_ptr(), zero, a.data_ptr(), zero, g.data_ptr(), zero),
        *(step_q, zero, step_a, zero, step_g, zero),
        *(t.data_ptr() for t, _ in parts),
        *(parts[i][1] for i in (0, 1, 2, 4)),
        *(t.data_ptr() for t in point),
        *(zero if t is None else t.data_ptr() for t, _ in rights),
        *(step for _, step in rights),
        *(t.data_ptr() for t in v),
        *(zero if t is None else t.data_ptr() for t in (*own, of_p)),
        *(degenerate.data_ptr(), converged.data_ptr()),
    )
    return (v, [*own, of_p]) if good else None


def _flat(tensor: Tensor, event_ndim: int, batch: torch.Size) -> tuple[Tensor, int]:
    """Give a tensor whose memory the kernel can walk: what to keep alive, and the step between problems."""
    if tensor.shape[: tensor.ndim - event_ndim] == batch and tensor.is_contiguous():
        return tensor, tensor.numel() // max(batch.numel(), 1)
    flat = quadratic.unexpand(tensor, event_ndim, batch).contiguous()
    return flat, 0 if flat.shape[0] == 1 else flat.numel() // flat.shape[0]
