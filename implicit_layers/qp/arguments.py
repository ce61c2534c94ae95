"""The arguments of `solve_qp`: checked at the door and brought to one form.

In that form every tensor has the leading dimensions of the batch, or dimensions of size 1 in their place: what the
whole batch shares is never copied, is factorised once, and gets its gradient as one sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import DeviceError, DtypeError, NonFiniteError, ShapeError
from implicit_layers.solvers import compiled

_FINE_ENOUGH = (torch.float32, torch.float64)
EVENT_NDIM = (2, 1, 2, 1, 2, 1, 1, 1)  # trailing dimensions of Q, p, A, b, G, h, lb, ub


class Program(NamedTuple):
    """The data of a batch of programs."""

    Q: Tensor  # (*B or 1s, n, n)
    p: Tensor  # (*B or 1s, n)
    A: Tensor  # (*B or 1s, n_eq, n)
    b: Tensor  # (*B or 1s, n_eq)
    G: Tensor  # (*B or 1s, n_ineq, n)
    h: Tensor  # (*B or 1s, n_ineq); inf: no such row
    lb: Tensor | None  # (*B or 1s, n); -inf: no such bound
    ub: Tensor | None  # (*B or 1s, n); inf: no such bound

    @property
    def batch(self) -> torch.Size:
        """The batch shape *B."""
        present = zip(self, EVENT_NDIM, strict=True)
        shapes = [t.shape[: t.ndim - k] for t, k in present if t is not None]
        return next((shape for shape in shapes if any(size != 1 for size in shape)), shapes[0])


class Door(NamedTuple):
    """What came through the door."""

    program: Program
    batch: torch.Size
    checked: bool  # whether the values were looked at
    plain: bool  # whether all tensors are plain ones; the compiled kernel then looks at their values
    structure: compiled.Structure | None = None  # of plain ones that have come through before, and if contiguous


def at_the_door(
    Q: Tensor,
    p: Tensor,
    A: Tensor | None,
    b: Tensor | None,
    G: Tensor | None,
    h: Tensor | None,
    lb: Tensor | None,
    ub: Tensor | None,
    *,
    read: bool,
    later: bool,
) -> Door:
    """Check the arguments, their values too where they may and can be read, and bring all to one form.

    `later`: values may be left to `run`, where the compiled kernel looks at them anyway. Sizes and dtypes that have
    come through in that way before are known to fit, and not looked at one by one again.
    """
    given = (Q, p, A, b, G, h, lb, ub)
    key = compiled.sizes_and_dtypes(given) if later else None
    known = None if key is None else _known.get(key)
    if known is not None:
        return Door(_formed(known, given), known.batch, False, True, known.structure)
    later = key is not None
    ordinary = later or (read and checks.plain(*(t for t in given if t is not None)))
    checks.paired("solve_qp", A, b, G, h)
    optional = {"A": A, "b": b, "G": G, "h": h, "lb": lb, "ub": ub}
    tensors = {"Q": Q, "p": p} | {name: tensor for name, tensor in optional.items() if tensor is not None}
    tensors = checks.without_autocast(tensors)
    dtype, device = checks.floating_tensors(**tensors)
    if device.type == "meta" and type(Q) in (Tensor, torch.nn.Parameter):  # a subclass may hold numbers of its own
        raise DeviceError("solve_qp: the arguments are on the meta device, which holds no numbers to solve with")
    if dtype not in _FINE_ENOUGH:
        raise DtypeError(f"solve_qp: Q is {dtype}, too coarse for a quadratic program; convert to float32 or float64")
    Q, p = tensors["Q"], tensors["p"]
    if Q.ndim < 2 or Q.shape[-1] != Q.shape[-2]:
        raise ShapeError(f"Q must have shape (*B, n, n), got {tuple(Q.shape)}")
    n = Q.shape[-1]
    if n == 0:
        raise ShapeError(f"Q must have at least one row, got shape {tuple(Q.shape)}")
    for name in ("p", "lb", "ub"):
        if name in tensors:
            checks.trailing_shape(name, tensors[name], (n,), f"to fit Q with n = {n}")
    A, b, G, h = checks.constraint_rows(tensors, p, "Q")
    bounds = {name: (tensors[name], 1) for name in ("lb", "ub") if name in tensors}
    batch = checks.batch_shape(Q=(Q, 2), p=(p, 1), A=(A, 2), b=(b, 1), G=(G, 2), h=(h, 1), **bounds)
    later = later and compiled.fits(Q, A, G, bool(bounds))
    checked = read and not later and checks.readable(*tensors.values())
    if checked:  # here, where an index is one of the caller's own tensor
        refuse_values(tensors)
    arguments = (Q, p, A, b, G, h, tensors.get("lb"), tensors.get("ub"))
    forms = (None if t is None else uniform(t, k, batch) for t, k in zip(arguments, EVENT_NDIM, strict=True))
    program = Program(*forms)  # type: ignore[arg-type]
    if later and key is not None and batch.numel() and all(t.dtype == dtype for t in given if t is not None):
        _remember(key, given, program, batch)
    return Door(program, batch, checked, ordinary)


class _Known(NamedTuple):
    """What the structure of arguments decides: the batch, and what is to be done to bring each to its form."""

    batch: torch.Size
    changed: tuple[int, ...]  # arguments that are given without the dimensions of the batch
    absent: tuple[tuple[int, torch.Size], ...]  # constraints that are not given, with the shape of having no rows
    structure: compiled.Structure  # of contiguous ones


_MOST_KNOWN = 256
_known: dict[tuple[object, ...] | None, _Known] = {}


def _remember(key: tuple[object, ...], given: Sequence[Tensor | None], program: Program, batch: torch.Size) -> None:
    """Keep what good arguments have shown of their structure."""
    pairs = [(i, old, new) for i, (old, new) in enumerate(zip(given, program, strict=True)) if new is not None]
    changed = tuple(i for i, old, new in pairs if old is not None and old is not new)
    absent = tuple((i, new.shape) for i, old, new in pairs if old is None)
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[key] = _Known(batch, changed, absent, compiled.structure(batch, program))


def _formed(known: _Known, given: Sequence[Tensor | None]) -> Program:
    """Bring arguments of a known structure to one form."""
    if not known.changed and not known.absent:
        return Program(*given)  # type: ignore[arg-type]
    forms = list(given)
    for i in known.changed:
        forms[i] = uniform(given[i], EVENT_NDIM[i], known.batch)  # type: ignore[arg-type]
    for i, shape in known.absent:
        forms[i] = given[1].new_empty(*shape)  # type: ignore[union-attr]
    return Program(*forms)  # type: ignore[arg-type]


def uniform(tensor: Tensor, event_ndim: int, batch: torch.Size) -> Tensor:
    """Give a tensor the dimensions of the batch, or 1s where the whole batch shares it."""
    own, event = tensor.shape[: tensor.ndim - event_ndim], tensor.shape[tensor.ndim - event_ndim :]
    if own == batch:
        return tensor
    if all(size == 1 for size in own):
        return tensor.reshape((*(1 for _ in batch), *event))
    return tensor.expand((*batch, *event))


# the infinity that an argument may not hold: no point would satisfy it
_WRONG_INFINITY = {"h": -torch.inf, "lb": torch.inf, "ub": -torch.inf}


def refuse_values(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN, and infinities other than those that mean "no such constraint"; one host synchronisation.

    Raises:
        NonFiniteError: names the argument and the first offending index.
    """
    parts = []
    with torch.no_grad():
        for name, tensor in tensors.items():
            wrong = _WRONG_INFINITY.get(name, 0)
            part = tensor if not wrong else tensor.clamp(max=0) if wrong < 0 else tensor.clamp(min=0)
            parts.append(part.sum())
        total = torch.stack(parts).sum()
    if math.isfinite(checks.host_float(total)):  # sums may overflow too: then a closer look
        return
    checks.finite(**{name: tensor for name, tensor in tensors.items() if name not in _WRONG_INFINITY})
    for name, wrong in _WRONG_INFINITY.items():
        if name not in tensors:
            continue
        tensor = tensors[name].detach()
        bad = tensor.isnan() | (tensor == wrong)
        if bool(bad.any()):
            raise NonFiniteError(
                f"{name}{checks.index_of(bad)} is {float(tensor[bad][0])}: {int(bad.sum())} of {bad.numel()} entries "
                f"of {name} are NaN or {wrong}, which no point satisfies; {-wrong} means that there is no constraint"
            )
