r"""Gradient descent with momentum that can be run backwards bit by bit, so that no iterate has to be remembered.

    v ← μ v + (f(z, θ) − z),   z ← z + v.

Undone in floating point, v is divided by μ in every step and the rounding of z + v grows like μ⁻ᴷ. Here z and v are
whole multiples of a power of two, so that sums are exact, and the only step that loses information, v ← μ v rounded,
writes down which of the few numbers with that image v was: one digit, and none where there is but one. The digits of
an entry make one integer, its *buffer*; a full one is put aside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.eager import uncompiled
from implicit_layers.errors import NonFiniteError, UnsupportedError
from implicit_layers.jacobian import living, opaque, pullback, pushforward, recordable
from implicit_layers.ledger import LIMIT, Ledger, fraction, scales, whole
from implicit_layers.legacy_vmap import modernised
from implicit_layers.transforms import forward_mode, full_precision, map_to_front, primals

Call = Callable[..., Tensor]  # the step f(z, *theta)

_COARSE = 2**48  # an entry that never reaches this many units is not resolved


def heavy_ball(call: Call, steps: int, momentum: float, z: Tensor, *theta: Tensor) -> Tensor:
    """The same iteration in floating point, which is what the gradient of the exact one is a gradient of."""
    return heavy_ball_from(call, steps, momentum, z, None, *theta)[0]


def heavy_ball_from(
    call: Call, steps: int, momentum: float, z: Tensor, v: Tensor | None, *theta: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`steps` steps from a position and a velocity; None is zero. Without momentum there is no velocity to keep.

    A step may work in place: what it gets is a copy where its argument is needed again.
    """
    for k in range(steps):
        following = call(z.clone() if k == 0 or momentum != 0.0 else z, *theta)
        if momentum == 0.0:
            z = following
            continue
        v = following - z if v is None else momentum * v + (following - z)
        z = z + v
    return z, v


class Trail(NamedTuple):
    """Where an exact run ended, and what it takes to go back."""

    z: Tensor  # int64: the position is z·2⁻ᵉ
    v: Tensor  # int64: the velocity is v·2⁻ᵉ
    exponent: Tensor  # int16, one an entry
    digits: Tensor  # int64, the buffer in use
    aside: tuple[Tensor, ...]  # int64, the full buffers; without momentum, the velocities of all steps
    lengths: tuple[int, ...]  # how many digits each of them holds

    @property
    def bits(self) -> int:
        """The bits an entry that the buffers take."""
        return 64 * (len(self.aside) + 1)


def run(call: Call, steps: int, momentum: float, z0: Tensor, *theta: Tensor) -> Trail:
    """Run forward exactly, each entry with the resolution that its largest value on the way leaves.

    The largest value is guessed, 2¹⁰ times that of the start and the first step. Where an entry outgrows that, or did
    not move in the first step and stays far smaller than the others, a run in floating point measures it.

    Raises:
        NonFiniteError: the iterates do not stay finite.
    """
    first = call(z0, *theta).double() - z0.double() if steps else torch.zeros_like(z0)
    size = torch.maximum(z0.double().abs(), first.abs()).nan_to_num_(1.0, 1.0, 1.0)
    if size.numel():
        size = torch.where(size > 0, size, size.amax().clamp_min(torch.finfo(z0.dtype).tiny))
    trail, fits = _run(call, steps, momentum, _exponent(size, headroom=10), z0, *theta)
    if checks.host_bool(fits):
        return trail
    size, finite = _sizes(call, steps, momentum, z0, *theta)
    if finite:
        trail, fits = _run(call, steps, momentum, _exponent(size, headroom=3), z0, *theta)
        if checks.host_bool(fits):
            return trail
    raise NonFiniteError(
        "unroll: the iterates grow without limit or are not finite, so mode='reversible' cannot keep them as exact "
        "integers; make the step smaller or the momentum less, or look at them with mode='full'"
    )


def _run(call: Call, steps: int, momentum: float, exponent: Tensor, z0: Tensor, *theta: Tensor) -> tuple[Trail, Tensor]:
    """The run, and whether every entry was within its range and, if it moved at all, not far below it."""
    scale, inverse = scales(exponent)
    z = whole(z0, scale)
    v, used = torch.zeros_like(z), z.abs()  # `used` gets all the bits that z, v and the displacements ever have
    moved = torch.zeros_like(z, dtype=torch.bool)
    ledger = Ledger(fraction(momentum), torch.zeros_like(z))
    for k in range(steps):
        if k:
            v = ledger.multiply(v)
        x = position(z, inverse, z0.dtype)
        real = call(x, *theta).double() - x.double()
        d = whole(real, scale)
        v = v + d
        z = z + v
        used |= z.abs() | v.abs() | d.abs()
        moved |= real != 0
    fits = ((used < LIMIT) & ((used >= _COARSE) | ~moved)).all()
    return Trail(z, v, exponent, ledger.digits, tuple(ledger.aside), tuple(ledger.lengths)), fits


def position(z: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """The point that the integers stand for."""
    return (z.double() * inverse).to(dtype)


def _exponent(size: Tensor, headroom: int) -> Tensor:
    """The e for which size·2^(e + headroom) is just below the limit."""
    return (61 - headroom - torch.frexp(size).exponent).clamp_(-1000, 1000).to(torch.int16)


def _sizes(call: Call, steps: int, momentum: float, z: Tensor, *theta: Tensor) -> tuple[Tensor, bool]:
    """The largest |z|, |v| and |f(z) − z| of every entry on the way, in floating point, and whether all are finite."""
    largest = z.double().abs()
    v = torch.zeros_like(z)
    for _ in range(steps):
        d = call(z, *theta) - z
        v = momentum * v + d
        z = z + v
        largest = largest.maximum(z.double().abs()).maximum(v.double().abs()).maximum(d.double().abs())
    return largest.clamp_min(torch.finfo(torch.float64).tiny), checks.host_bool(largest.isfinite().all())


def positions(call: Call, steps: int, momentum: float, z0: Tensor, *theta: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """All iterates as they come, and as they are rebuilt backwards; to see that they are equal bit by bit.

    >>> there, back = positions(lambda z, a: z - 0.1 * (z - a), 100, 0.9, torch.zeros(2), torch.ones(2))
    >>> all(torch.equal(x, y) for x, y in zip(there, back))
    True
    """
    seen: list[Tensor] = []

    def noted(z: Tensor, *theta: Tensor) -> Tensor:
        seen.append(z)
        return call(z, *theta)

    with opaque(z0.device):
        trail = run(noted, steps, momentum, z0, *theta)
        there = seen[len(seen) - steps :] if steps else []
        seen.clear()
        zeros = torch.zeros_like(z0)
        _sweep(_Program(noted, steps, momentum, []), zeros, trail, z0, theta)
    return there, seen[::-1]


# --- the derivative -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Program:
    """What is run, which of z0 and theta need a gradient, and how many digits the buffers held at the end."""

    call: Call
    steps: int
    momentum: float
    lengths: list[int]  # written by the run; not an argument of the function, where transforms would copy it
    needed: tuple[bool, ...] = ()

    def plain(self, z0: Tensor, *theta: Tensor) -> Tensor:
        """The same in floating point, for autograd."""
        return heavy_ball(self.call, self.steps, self.momentum, z0, *theta)

    def with_needed(self, needed: Sequence[bool]) -> _Program:
        return _Program(self.call, self.steps, self.momentum, self.lengths, tuple(needed))

    def mapped(self, dims: Sequence[int | None]) -> _Program:
        """The program over one more dimension, the first of z and of what is mapped in theta."""
        call = torch.func.vmap(self.call, in_dims=(0, *dims))
        return _Program(call, self.steps, self.momentum, self.lengths, self.needed)

    def pulled(self, g: Tensor, z0: Tensor, *theta: Tensor) -> Tensor:
        """What the sweep computes, as one vector, in floating point and differentiable."""
        chosen = [i for i, need in enumerate(self.needed) if need]
        every = [z0, *theta]

        def some(*inputs: Tensor) -> Tensor:
            full = list(every)
            for i, x in zip(chosen, inputs, strict=True):
                full[i] = x
            return self.plain(*full)

        parts = pullback(some, *(every[i] for i in chosen))[1](g)
        return torch.cat([part.reshape(-1) for part in parts])


def _sweep(
    program: _Program, g: Tensor, trail: Trail, z0: Tensor, theta: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Go back step by step, rebuilding each iterate and pulling the cotangent of z_K through the step made there.

    Returns the gradients of z0 and theta that are needed, and whether the start was reached again.
    """
    scale, inverse = scales(trail.exponent)
    z, v = trail.z, trail.v
    momentum = fraction(program.momentum)
    ledger = Ledger(momentum, trail.digits, list(trail.aside), list(trail.lengths))
    wanted = [i for i, need in enumerate(program.needed[1:]) if need]
    totals = [torch.zeros_like(theta[i], memory_format=torch.contiguous_format) for i in wanted]
    g_z, g_v = g, torch.zeros_like(g)
    for k in reversed(range(program.steps)):
        z = z - v
        here = position(z, inverse, g.dtype)
        g_v = g_v + g_z
        with torch.enable_grad():
            inputs = [here.requires_grad_(), *(theta[i].detach().requires_grad_() for i in wanted)]
            every = list(theta)
            for i, x in zip(wanted, inputs[1:], strict=True):
                every[i] = x
            following = program.call(here.view_as(here), *every)
        v = v - whole(following.detach().double() - here.detach().double(), scale)
        if following.requires_grad:
            pulled = torch.autograd.grad(following, inputs, g_v, materialize_grads=True)
            g_z = g_z - g_v + pulled[0]
            for total, part in zip(totals, pulled[1:], strict=True):
                total += part
        else:
            g_z = g_z - g_v
        g_v = program.momentum * g_v
        if k:
            v = ledger.divide(v)
    returned = (z == whole(z0, scale)).all() & (v == 0).all()
    return [*([g_z] if program.needed and program.needed[0] else []), *totals], returned


class _Reversible(torch.autograd.Function):
    """(program, z0, *theta) -> (z_K, z, v, exponents, digits, *aside); z_K alone is differentiable."""

    @staticmethod
    @uncompiled
    def forward(program: _Program, z0: Tensor, *theta: Tensor) -> tuple[Tensor, ...]:
        """Run exactly, unseen by autograd."""
        with opaque(z0.device):
            z0, *plain = recordable(z0, *theta)
            trail = run(program.call, program.steps, program.momentum, z0, *plain)
            program.lengths[:] = trail.lengths
            value = position(trail.z, scales(trail.exponent)[1], z0.dtype) if program.steps else z0.clone()
        return value.contiguous(), *trail[:4], *trail.aside

    @staticmethod
    @uncompiled
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the inputs and where the run ended."""
        program, *tensors = inputs
        _, *trail = output
        ctx.mark_non_differentiable(*trail)
        ctx.program, ctx.count = program, len(trail)
        ctx.save_for_backward(*trail, *tensors)
        ctx.save_for_forward(*trail, *tensors)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Run back, pulling the cotangent through every step."""
        needed = ctx.needs_input_grad[1:]
        if not any(needed):
            return (None,) * (1 + len(needed))
        program = ctx.program.with_needed(needed)
        saved = tuple(map(living, ctx.saved_tensors))

        def work(g: Tensor, *saved: Tensor) -> list[Tensor | None]:
            trail, tensors = saved[: ctx.count], saved[ctx.count :]
            pulled = iter(_Sweep.apply(program, ctx.count, g, *trail, *tensors))
            return [next(pulled) if need else None for need in needed]

        return None, *modernised(work, (grads[0], *saved))

    @staticmethod
    @uncompiled
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The tangent of the same iteration in floating point."""
        with forward_mode():
            tensors = primals(tuple(map(living, ctx.saved_tensors))[ctx.count :])
            count = len(tensors)

            def work(*both: Any) -> list[Tensor | None]:
                return [_push(ctx.program.plain, both[:count], both[count:], both[0])]

            return *modernised(work, (*tensors, *tangents[1:])), *(None,) * ctx.count

    @staticmethod
    @uncompiled
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """The mapped axis is one more dimension of z; what is not mapped in theta stays one."""
        program, z0, *theta = inputs
        z0, theta, dims = _to_front(info.batch_size, in_dims[1:], z0, theta)
        outputs = _Reversible.apply(program.mapped(dims), z0, *theta)
        return outputs, (0,) * len(outputs)


class _Sweep(torch.autograd.Function):
    """(program, count, g, *trail, z0, *theta) -> the gradients that are needed; a function of g, z0, theta."""

    @staticmethod
    @uncompiled
    def forward(program: _Program, count: int, g: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """The sweep, unseen by autograd, and a look at whether it came back to the start."""
        with opaque(g.device):
            z0, *theta = recordable(*rest[count:])
            z, v, exponent, digits, *aside = rest[:count]
            trail = Trail(z, v, exponent, digits, tuple(aside), tuple(program.lengths))
            pulled, returned = _sweep(program, g.detach(), trail, z0, theta)
            if not checks.host_bool(returned):
                raise UnsupportedError(
                    "unroll: run backwards, mode='reversible' did not come back to z0 bit by bit, so the step is not "
                    "the same function when it is called again (random numbers, a state that it changes, operations "
                    "that add in no fixed order); make it deterministic or use mode='checkpointed'"
                )
        return tuple(pulled)

    @staticmethod
    @uncompiled
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the gradients depend on; the trail is a function of that."""
        program, count, g, *rest = inputs
        ctx.program, ctx.skipped = program, count
        ctx.save_for_backward(g, *rest[count:])
        ctx.save_for_forward(g, *rest[count:])

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Second derivatives, by autograd through the iteration in floating point."""
        saved = tuple(map(living, ctx.saved_tensors))
        needed = [ctx.needs_input_grad[2], *ctx.needs_input_grad[3 + ctx.skipped :]]
        chosen = [i for i, need in enumerate(needed) if need]
        count = len(saved)

        def work(*both: Tensor) -> list[Tensor | None]:
            every, cotangents = list(both[:count]), both[count:]

            def some(*inputs: Tensor) -> Tensor:
                full = list(every)
                for i, x in zip(chosen, inputs, strict=True):
                    full[i] = x
                return ctx.program.pulled(*full)

            with full_precision(every[0].device):
                flat = torch.cat([c.reshape(-1) for c in cotangents])
                pulled = iter(pullback(some, *(every[i] for i in chosen))[1](flat))
            return [next(pulled) if need else None for need in needed]

        first, *others = modernised(work, (*saved, *grads))
        return None, None, first, *(None,) * ctx.skipped, *others

    @staticmethod
    @uncompiled
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The tangents of the gradients, likewise."""
        with forward_mode():
            saved = primals(tuple(map(living, ctx.saved_tensors)))
            count = len(saved)
            sizes = [x.shape for x, need in zip(saved[1:], ctx.program.needed, strict=True) if need]

            def work(*both: Any) -> list[Tensor | None]:
                with full_precision(both[0].device):
                    like = torch.cat(
                        [x.reshape(-1) for x, need in zip(both[1:count], ctx.program.needed, strict=True) if need]
                    )
                    moved = _push(ctx.program.pulled, both[:count], both[count:], like)
                parts = moved.split([math.prod(shape) for shape in sizes])
                return [part.reshape(shape) for part, shape in zip(parts, sizes, strict=True)]

            return tuple(modernised(work, (*saved, tangents[2], *tangents[3 + ctx.skipped :])))

    @staticmethod
    @uncompiled
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """Every gradient has the mapped axis, so everything that has one does too."""
        program, count, g, *rest = inputs
        size, dims = info.batch_size, in_dims[3:]
        g, *trail = map_to_front(size, in_dims[2 : 3 + count], [g, *rest[:count]])
        z0, theta, own = _to_front(size, dims[count:], rest[count], rest[count + 1 :])
        for i, need in enumerate(program.needed[1:]):
            if need and own[i] is None:
                theta[i], own[i] = theta[i].expand(size, *theta[i].shape), 0
        outputs = _Sweep.apply(program.mapped(own), count, g, *trail, z0, *theta)
        return outputs, (0,) * len(outputs)


def _to_front(
    size: int, dims: Sequence[int | None], z0: Tensor, theta: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[int | None]]:
    """z0 with the mapped dimension first; theta likewise where it has one, and which do."""
    moved = [x if d is None else x.movedim(d, 0) for d, x in zip(dims[1:], theta, strict=True)]
    return map_to_front(size, dims[:1], [z0])[0], moved, [None if d is None else 0 for d in dims[1:]]


def _push(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor | None], like: Tensor
) -> Tensor:
    """The derivative of the function along those tangents that there are."""
    pairs = enumerate(zip(inputs, tangents, strict=True))
    chosen = {i: t for i, (x, t) in pairs if t is not None and x.is_floating_point()}
    if not chosen:
        return torch.zeros_like(like)

    def some(*moving: Tensor) -> Tensor:
        every = list(inputs)
        for i, x in zip(chosen, moving, strict=True):
            every[i] = x
        return function(*every)

    return pushforward(some, [inputs[i] for i in chosen], list(chosen.values()), like)


@uncompiled
def reversible(call: Call, steps: int, momentum: float, z0: Tensor, *theta: Tensor) -> Tensor:
    """z_K by the exact run, with the gradient by the exact run back."""
    return _Reversible.apply(_Program(call, steps, momentum, []), z0, *theta)[0]
