"""Checks at the door: types, dtypes, devices, shapes, values. Below the door the code trusts its input.

Everything in a loop that makes the host wait for the device goes through `host_bool` or `host_int`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from implicit_layers.errors import ArgumentError, ArgumentTypeError, DeviceError, DtypeError, NonFiniteError, ShapeError

_PLAIN = (Tensor, torch.nn.Parameter)
HALF = (torch.float16, torch.bfloat16)  # too coarse to compute in; what is given in them is computed in float32


def host_bool(flag: Tensor) -> bool:
    """Read one boolean back from the device, which waits for it."""
    return bool(flag)


def host_nan(value: Tensor) -> bool:
    """Read one number back from the device: whether it is NaN."""
    return math.isnan(float(value))


def host_int(count: Tensor) -> int:
    """Read one integer back from the device."""
    return int(count)


def host_ints(*counts: Tensor) -> list[int]:
    """Read several integers back from the device at once."""
    return torch.stack(counts).tolist()


def host_list(values: Tensor) -> list[list[float]]:
    """Read a matrix back from the device."""
    return values.tolist()


def host_float(value: Tensor) -> float:
    """Read one number back from the device."""
    return float(value)


def host_floats(*values: Tensor) -> list[float]:
    """Read several numbers back from the device at once."""
    return torch.stack(values).tolist()


def integer(name: str, value: object) -> int:
    """`value` is an int (no bool), and returned as one.

    Raises:
        ArgumentTypeError: names the setting.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} must be an int, got {value!r}")
    return value


def whole(name: str, value: object, least: int) -> None:
    """`value` is an int (no bool), and at least `least`.

    Raises:
        ArgumentTypeError, ArgumentError: name the setting.
    """
    if integer(name, value) < least:
        raise ArgumentError(f"{name} must be at least {least}, got {value}")


def number(name: str, value: object) -> float:
    """`value` is an int or a float (no bool), and returned.

    Raises:
        ArgumentTypeError: names the setting.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} must be a number, got {value!r}")
    return value


def positive(name: str, value: object) -> None:
    """`value` is a positive, finite number.

    Raises:
        ArgumentTypeError, ArgumentError: name the setting.
    """
    if not 0 < number(name, value) < float("inf"):
        raise ArgumentError(f"{name} must be positive and finite, got {value}")


def stopping(tol: object, max_iter: object) -> None:
    """The settings that end an iteration: `tol` None or positive and finite, `max_iter` at least 1.

    Raises:
        ArgumentTypeError, ArgumentError: name the setting.
    """
    if tol is not None:
        positive("tol", tol)
    whole("max_iter", max_iter, least=1)


def instance_with_solve(name: str, solver: object) -> None:
    """`solver` is a linear solver: not the class itself, and with a method `solve`.

    Raises:
        ArgumentTypeError: names the setting.
    """
    if isinstance(solver, type):
        raise ArgumentTypeError(f"{name} is the class {solver.__name__}; pass an instance: {_constructor(solver)}")
    if not callable(getattr(solver, "solve", None)):
        raise ArgumentTypeError(f"{name} must have a method solve, e.g. il.Direct(), got {solver!r}")


def no_class(name: str, value: object, base: type) -> None:
    """`value` is not `base` or a class derived from it, which is callable and would be taken for a function.

    Raises:
        ArgumentTypeError: names the setting.
    """
    if isinstance(value, type) and issubclass(value, base):
        raise ArgumentTypeError(f"{name} is the class {value.__name__}; pass an instance: {_constructor(value)}")


def _constructor(cls: type) -> str:
    """How an instance of a class is made, as a person would write it."""
    prefix = "il." if cls.__module__.partition(".")[0] == "implicit_layers" else ""
    return f"{prefix}{cls.__name__}()"


def index_of(mask: Tensor) -> str:
    """The first index at which `mask` is true, as a person would write it; for messages only."""
    if mask.ndim == 0:
        return ""
    first = tuple(mask.nonzero()[0].tolist())
    return f"[{', '.join(map(str, first))}]"


def floating_tensors(**tensors: object) -> tuple[torch.dtype, torch.device]:
    """Each argument is a floating-point tensor, all of one dtype on one device, which are returned.

    Raises:
        DtypeError: an argument is no tensor, an integer, boolean or complex tensor, or of another dtype than the first.
        DeviceError: an argument lives on another device than the first.
    """
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    first = ""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(
                f"{name} must be a torch.Tensor, got {type(tensor).__name__}; convert it, e.g. torch.as_tensor({name})"
            )
        if tensor.layout != torch.strided:
            raise DtypeError(f"{name} must be dense, got {tensor.layout}; convert it: {name}.to_dense()")
        if tensor.is_complex():
            raise DtypeError(f"{name} must be real, got {tensor.dtype}; give its real and imaginary parts separately")
        if not tensor.is_floating_point():
            raise DtypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}; convert it: {name}.double()")
        if dtype is None or device is None:
            dtype, device, first = tensor.dtype, tensor.device, name
        if tensor.dtype != dtype:
            raise DtypeError(f"{name} is {tensor.dtype} but {first} is {dtype}; give all arguments one dtype")
        if tensor.device != device:
            raise DeviceError(
                f"{name} is on {tensor.device} but {first} is on {device}; move it, e.g. {name}.to({first}.device)"
            )
    if dtype is None or device is None:
        raise DtypeError("at least one tensor is needed")
    return dtype, device


def without_autocast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In an autocast region, take half-precision arguments to float32, as autocast does for such operations."""
    device = next((t.device.type for t in tensors.values() if isinstance(t, Tensor)), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    return {name: t.float() if isinstance(t, Tensor) and t.dtype in HALF else t for name, t in tensors.items()}


def finite(**tensors: Tensor) -> None:
    """No argument holds NaN or infinity; one host synchronisation for all of them together.

    Raises:
        NonFiniteError: names the argument and the first offending index.
    """
    sums = [tensor.sum() for tensor in tensors.values()]  # one pass and no temporary; an overflow is looked at below
    if not sums or host_bool(torch.isfinite(torch.stack(sums)).all()):
        return
    for name, tensor in tensors.items():
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            value, count = float(tensor[bad][0].detach()), int(bad.sum())
            verb = "is" if count == 1 else "are"
            raise NonFiniteError(
                f"{name}{index_of(bad)} is {value}: {count} of {bad.numel()} entries of {name} {verb} not finite"
            )


def temperature(name: str, scores: Tensor, event_ndim: int, value: object) -> Tensor | float:
    """A temperature > 0 for scores (*B, *event): a number, or a tensor of size 1 along the event; in float64.

    Raises:
        DtypeError, DeviceError, ShapeError, ArgumentError, ArgumentTypeError: it is not that.
    """
    least = torch.finfo(torch.float32).tiny
    if not isinstance(value, Tensor):
        if not least <= number("temperature", value) < float("inf"):
            raise ArgumentError(f"temperature must be positive and finite (at least {least:.1e}), got {value}")
        return float(number("temperature", value))
    if scores.dtype in HALF and value.dtype == torch.float32:
        floating_tensors(**{name: scores.float(), "temperature": value})
    else:
        floating_tensors(**{name: scores, "temperature": value})
    if value.ndim and any(size != 1 for size in value.shape[-event_ndim:]):
        ones = ", ".join(["1"] * event_ndim)
        raise ShapeError(
            f"temperature must be 0-d or have shape (*B, {ones}), one a problem, got {tuple(value.shape)} for {name} "
            f"of shape {tuple(scores.shape)}"
        )
    if readable(value):
        good = (value.detach() >= least) & value.detach().isfinite()
        if not host_bool(good.all()):
            raise ArgumentError(
                f"temperature{index_of(~good)} must be positive and finite (at least {least:.1e}), got "
                f"{float(value.detach()[~good][0])}"
            )
    return value.double()


def batch_shape(**arguments: tuple[Tensor, int]) -> torch.Size:
    """The common leading batch shape of the arguments, each given with its number of trailing dimensions.

    Raises:
        ShapeError: an argument has too few dimensions, or its batch dimensions do not broadcast with the others.
    """
    common = torch.Size()
    for name, (tensor, event_ndim) in arguments.items():
        if tensor.ndim < event_ndim:
            raise ShapeError(f"{name} must have at least {event_ndim} dimensions, got shape {tuple(tensor.shape)}")
        batch = tensor.shape[: tensor.ndim - event_ndim]
        if not batch or batch == common:
            continue
        try:
            common = torch.broadcast_shapes(common, batch) if common else batch
        except RuntimeError:
            raise ShapeError(
                f"the batch dimensions {tuple(batch)} of {name} (shape {tuple(tensor.shape)}) do not broadcast with "
                f"{tuple(common)}, those of the arguments before it"
            ) from None
    return common


def axis_from_end(x: Tensor, dim: int, why: str) -> int:
    """The axis `dim` counted from the end, so that broadcasting may add leading dimensions; a 0-d x has one entry.

    Raises:
        ArgumentTypeError, ShapeError: there is no such axis, or it is empty, and why it may not be.
    """
    integer("dim", dim)
    ndim = max(x.ndim, 1)
    if not -ndim <= dim < ndim:
        raise ShapeError(f"dim must be in [{-ndim}, {ndim - 1}] for x of shape {tuple(x.shape)}, got {dim}")
    axis = dim if dim < 0 else dim - ndim
    if x.ndim and x.shape[axis] == 0:
        raise ShapeError(f"x of shape {tuple(x.shape)} has no entries along dim={dim}; {why}")
    return axis


def paired(what: str, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None) -> None:
    """The rows of constraints come with their right-hand sides: A with b, and G with h.

    Raises:
        ShapeError: names the one that is missing.
    """
    for (matrix_name, matrix), (vector_name, vector) in ((("A", A), ("b", b)), (("G", G), ("h", h))):
        if (matrix is None) != (vector is None):
            given, missing = (matrix_name, vector_name) if vector is None else (vector_name, matrix_name)
            raise ShapeError(f"{what}: {given} was given without {missing}; they come together")


def constraint_rows(
    tensors: Mapping[str, Tensor], like: Tensor, like_name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, b, G and h of a program in the entries of the last axis of `like`; those not given have no rows.

    Raises:
        ShapeError: names the argument, what was expected and why.
    """
    n = like.shape[-1]
    rows = []
    for matrix_name, vector_name in (("A", "b"), ("G", "h")):
        matrix, vector = tensors.get(matrix_name), tensors.get(vector_name)
        if matrix is None or vector is None:
            matrix, vector = like.new_zeros(0, n), like.new_zeros(0)
        elif matrix.ndim < 2 or matrix.shape[-1] != n:
            raise ShapeError(
                f"{matrix_name} must have shape (*B, rows, {n}) to fit {like_name}, got {tuple(matrix.shape)}"
            )
        else:
            trailing_shape(vector_name, vector, (matrix.shape[-2],), f"to fit the rows of {matrix_name}")
        rows += [matrix, vector]
    return rows[0], rows[1], rows[2], rows[3]


def trailing_shape(name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    """The trailing dimensions of `tensor` are as expected.

    Raises:
        ShapeError: names the argument, what was expected and why.
    """
    got = tuple(tensor.shape[max(tensor.ndim - len(expected), 0) :])
    if got != expected:
        wanted = ", ".join(map(str, expected))
        raise ShapeError(f"{name} must have shape (*B, {wanted}) {why}, got {tuple(tensor.shape)}")


def poisoned(values: Tensor, good: Tensor) -> Tensor:
    """The values, NaN where a setting that the host could not read is out of its range; `good` broadcasts with them."""
    return values + torch.where(good, 0.0, float("nan")).to(values.dtype)


def traced() -> bool:
    """Whether operations are being written down, of tensors that may look like any others."""
    if torch.compiler.is_compiling():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (modes.PROXY, modes.FAKE, modes.FUNCTIONAL))


def plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors, whose numbers lie in memory as they are."""
    if traced():
        return False
    wrapped, kinds, strided = torch._C._functorch.is_functorch_wrapped_tensor, _PLAIN, torch.strided
    for t in tensors:
        if type(t) not in kinds or t.layout is not strided or t.is_neg() or t._is_zerotensor() or wrapped(t):
            return False
    return True


def readable(*tensors: Tensor) -> bool:
    """Whether the host may look at these values: not while tracing, under a functional transform, or without storage.

    `torch.compile` and `torch.export` trace with tensors that have no values, `torch.func` wraps the values, and fake
    and meta tensors hold none. Checks of values are skipped then; those of shapes and dtypes are not.
    """
    if torch.compiler.is_compiling() or (_level is not None and _level() is not None):
        return False
    for tensor in tensors:  # noqa: SIM110  a loop costs half of `any`, and softmax waits for it
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            return False
    return True


_level = getattr(
    getattr(torch._C, "_functorch", None), "maybe_current_level", None
)  # private; without it, checks stay on
