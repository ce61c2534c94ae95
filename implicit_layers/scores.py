"""The door of the simplex family: scores along any axis, one temperature a problem, masks, and rows without an entry.

Inside, everything is rows: scores (*B, n) with the axis last, settings (*B, 1), masked entries −inf.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentError, ArgumentTypeError, DeviceError, DtypeError, NonFiniteError, ShapeError

Empty = Literal["raise", "uniform", "zeros"]
EMPTY = get_args(Empty)


class Rows(NamedTuple):
    """Scores that have come through the door."""

    x: Tensor  # (*B, n), float32 or float64, −inf where masked
    top: Tensor  # (*B, 1), the largest score of each problem, detached
    settings: tuple[Tensor | float, ...]  # numbers, or (*B, 1) tensors


def check_empty(empty: str) -> None:
    """Refuse anything but the three answers to a problem without entries."""
    if empty not in EMPTY:
        raise ArgumentError(f"empty must be one of {EMPTY}, got {empty!r}")


def axis_of(x: Tensor, dim: int) -> int:
    """The axis counted from the end, so that broadcasting may add leading dimensions; checks shape and dtype."""
    checks.floating_tensors(x=x)
    return checks.axis_from_end(x, dim, "the simplex needs at least one")


def per_problem(name: str, value: Tensor | float, x: Tensor, axis: int) -> Tensor | float:
    """A setting, one a problem, in the dtype of the computation; everything but the values of a tensor is checked."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentTypeError(f"{name} must be a number or a tensor, got {value!r}")
        return value
    half = x.dtype in checks.HALF and value.dtype == torch.float32
    checks.floating_tensors(**{"x": x.float() if half else x, name: value})
    if value.ndim >= -axis and value.shape[axis] != 1:
        raise ShapeError(
            f"{name} of shape {tuple(value.shape)} varies along the axis of the scores (size "
            f"{value.shape[axis]} at dim {axis}); one {name} a problem needs size 1 there, e.g. "
            f"{name}.unsqueeze({axis})"
        )
    _broadcast(name, value, x)
    return value.float() if value.dtype in checks.HALF else value


def _broadcast(name: str, value: Tensor, x: Tensor) -> None:
    """Refuse a tensor that does not broadcast with the scores."""
    try:
        torch.broadcast_shapes(x.shape, value.shape)
    except RuntimeError:
        raise ShapeError(
            f"{name} of shape {tuple(value.shape)} does not broadcast with x of shape {tuple(x.shape)}"
        ) from None


def temperature_of(x: Tensor, axis: int, temperature: Tensor | float) -> Tensor | float:
    """The temperature in the dtype of the computation; everything but the values of a tensor is checked."""
    tau = per_problem("temperature", temperature, x, axis)
    if not isinstance(tau, Tensor):
        tiny = _tiny(x.dtype)
        if not tau >= tiny:  # also catches NaN
            raise ArgumentError(_bad_temperature(tau, tiny, x.dtype))
    elif not checks.readable(tau):
        return checks.poisoned(tau, tau.detach() >= torch.finfo(tau.dtype).tiny)
    return tau


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """The scores with −inf where the mask is false; the mask broadcasts with them."""
    if mask is None:
        return x
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise DtypeError(f"mask must be a boolean tensor, True where an entry may be chosen, got {got}")
    if mask.device != x.device:
        raise DeviceError(f"mask is on {mask.device} but x is on {x.device}; move it, e.g. mask.to(x.device)")
    _broadcast("mask", mask, x)
    return torch.where(mask, x, float("-inf"))


def rows(x: Tensor, axis: int, empty: Empty, tau: Tensor | float, *others: Tensor | float) -> Rows:
    """Scores and settings with the axis last and one batch shape; checks the values of scores and temperature.

    A problem without entries is refused, or, where `empty` has an answer for it, gets finite scores for now: its
    answer comes with `restored`.
    """
    settings = (tau, *others)
    shape = torch.broadcast_shapes(x.shape, *(s.shape for s in settings if isinstance(s, Tensor))) or (1,)
    work = x.float() if x.dtype in checks.HALF else x
    work = work.expand(shape).movedim(axis, -1)
    single = list(shape)
    single[axis] = 1
    moved = tuple(s.expand(single).movedim(axis, -1) if isinstance(s, Tensor) else s for s in settings)
    top = work.detach().amax(-1, keepdim=True)
    check_values(x, axis, top, tau, empty)
    if empty != "raise":
        lost = top.isneginf()
        work, top = work.masked_fill(lost, 0.0), top.masked_fill(lost, 0.0)
    return Rows(work, top, moved)


def restored(y: Tensor, x: Tensor, axis: int, empty: Empty, total: Tensor | float = 1.0) -> Tensor:
    """Rows back in the layout and dtype of the scores, with the answers for problems without entries."""
    if empty != "raise":
        one = x.detach().reshape(1) if x.ndim == 0 else x.detach()
        share = (total.detach() if isinstance(total, Tensor) else total) / y.shape[-1]
        y = fill_empty(y, one.amax(axis, keepdim=True).movedim(axis, -1), empty, share)
    y = y.movedim(-1, axis).to(x.dtype)
    return y.reshape(()) if x.ndim == 0 and y.shape == (1,) else y


def fill_empty(
    y: Tensor, top: Tensor, empty: Empty, share: Tensor | float
) -> Tensor:  # (*, n, *), (*, 1, *) -> (*, n, *)
    """The answer for problems whose largest score is −inf; a constant, so its gradient is zero."""
    return torch.where(top.isneginf(), 0.0 if empty == "zeros" else share, y)


def check_values(x: Tensor, axis: int, top: Tensor, tau: Tensor | float, empty: Empty = "raise") -> None:
    """Refuse scores and temperatures without an answer, given the largest score of each problem, or NaN for it.

    One host synchronisation, none where the host may not look.
    """
    if not checks.readable(x, top, *((tau,) if isinstance(tau, Tensor) else ())):
        return
    good = (top.isfinite() if empty == "raise" else top < float("inf")).all()  # NaN and +inf survive a maximum
    if isinstance(tau, Tensor):
        good = good & (tau.detach() >= torch.finfo(tau.dtype).tiny).all()
    if checks.host_bool(good):
        return
    if isinstance(tau, Tensor):
        tiny = torch.finfo(tau.dtype).tiny
        bad = ~(tau.detach() >= tiny)
        if bool(bad.any()):
            raise ArgumentError(_bad_temperature(float(tau.detach()[bad][0]), tiny, tau.dtype, checks.index_of(bad)))
    refuse_scores(x.detach(), axis, empty)


def refuse_scores(x: Tensor, axis: int, empty: Empty = "raise") -> None:
    """Say which scores have no answer; returns where `empty` answers for all of them."""
    bad = x.isnan() | x.isposinf()
    if bool(bad.any()):
        raise NonFiniteError(
            f"x{checks.index_of(bad)} is {float(x[bad][0])}: {int(bad.sum())} of {bad.numel()} scores are NaN or +inf. "
            "Only finite scores and -inf (a masked entry) have a softmax; look for an overflow upstream"
        )
    bad = x.amax(axis).isneginf()
    if empty != "raise" or not bool(bad.any()):
        return
    place = f" at index {checks.index_of(bad)} (dim={axis} left out)" if bad.ndim else ""
    raise ArgumentError(
        f"{int(bad.sum())} of {bad.numel()} problems have only -inf scores, first{place}: an empty simplex has no "
        "point. Leave at least one entry of each problem unmasked, or say what such a problem gets: "
        'empty="uniform" or empty="zeros"'
    )


def _tiny(dtype: torch.dtype) -> float:
    """The smallest normal number of the computation."""
    return torch.finfo(torch.float32 if dtype in checks.HALF else dtype).tiny


def _bad_temperature(value: float, tiny: float, dtype: torch.dtype, where: str = "") -> str:
    """The message for a temperature that is no positive normal number."""
    return (
        f"temperature{where} must be positive (at least {tiny:.1e}, the smallest normal number of {dtype}), "
        f"got {value}. For a hard argmax use a small positive temperature"
    )
