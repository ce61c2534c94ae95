"""What every test shares: one thread, fixed seeds, the same hypothesis examples everywhere, and two witnesses.

`host_syncs` counts how often the host waits for the device; `fake_device` gives tensors on a device that is not the
CPU, on a machine without one. Both watch PyTorch from outside and know nothing of the package's own bookkeeping.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: never through torch.set_num_threads

import random
import traceback
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

TESTS = Path(__file__).parent

pytest.register_assert_rewrite("tests.promises")

# cvxpy is the only optional oracle: without it, the files that import it are left out (one job of the workflow).
collect_ignore = [
    path.name
    for path in TESTS.glob("test_*.py")
    if find_spec("cvxpy") is None and "\nimport cvxpy" in path.read_text(encoding="utf-8")
]

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random numbers, whatever ran before it and on whichever worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# --- host synchronisations ------------------------------------------------------------------------------------------

# Operations that make the host wait for a CUDA device: a value or a size that Python needs, or an error flag.
WAITING_OPERATIONS = {
    "_local_scalar_dense",  # bool(), float(), .item()
    "nonzero",
    "masked_select",
    "equal",
    "allclose",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "_linalg_check_errors",  # torch.linalg.cholesky, solve, inv (their _ex forms do not wait)
    "linalg_lu_factor",
    "cholesky",
    "_linalg_eigh",
    "linalg_eig",
    "_linalg_svd",
}
# With a boolean mask as an index these look for its true entries first; torch.repeat_interleave adds up its counts.
WAITING_WITH_A_MASK = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Functions that copy to the host, invisible below because a tensor of the CPU is there already.
WAITING_FUNCTIONS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu", Tensor.__array__: "__array__"}


def _is_mask(entry: object) -> bool:
    return isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8)


def _calling_line() -> str | None:
    """The innermost line of the stack that is neither PyTorch's nor this file's; None while a module is imported."""
    torch_folder = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(torch_folder) and frame.filename != __file__:
            if frame.filename.startswith(
                "<frozen importlib"
            ):  # PyTorch imports some of its own modules late, once a process
                return None
            return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
    return "unknown line"


def _record(found: list[str], name: str) -> None:
    line = _calling_line()
    if line is not None:
        found.append(f"{name} at {line}")


class HostSyncs(TorchDispatchMode):
    """Counts host synchronisations inside its `with` block; printed, it says which operations, from which lines."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._functions = _HostCopies(self.found)

    def __enter__(self) -> HostSyncs:
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        waits = name in WAITING_OPERATIONS or (name == "repeat_interleave" and "output_size" not in (kwargs or {}))
        if name in WAITING_WITH_A_MASK:
            waits = any(_is_mask(entry) for entry in args[1])
        if waits:
            _record(self.found, name)
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return len(self.found)

    def __repr__(self) -> str:
        return f"{self.count} host synchronisations: " + "; ".join(self.found)


class _HostCopies(TorchFunctionMode):
    """Sees the copies to the host that cost nothing on the CPU and so never reach the dispatcher."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in WAITING_FUNCTIONS:
            _record(self.found, WAITING_FUNCTIONS[func])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def host_syncs() -> type[HostSyncs]:
    """`with host_syncs() as syncs: ...; assert syncs.count <= 2, syncs`."""
    return HostSyncs


# --- a device that is not the CPU -----------------------------------------------------------------------------------

FAKE_DEVICE = torch.device("meta")
# Operations that CUDA allows between devices: copies, and an index that is still on the CPU.
BETWEEN_DEVICES = {"_to_copy", "copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_"}


class FakeDeviceTensor(Tensor):
    """A tensor that says it is on another device, and keeps its numbers on the CPU all the same."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> FakeDeviceTensor:
        if numbers._is_zerotensor():  # forward mode's zeros without memory
            numbers = torch.zeros(numbers.shape, dtype=numbers.dtype)
        outer = Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=FAKE_DEVICE,
        )
        outer.numbers = numbers
        return outer

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FakeDeviceTensor({self.numbers})"

    def tolist(self) -> Any:
        return torch.ops.aten._to_copy(self, device="cpu").tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run_on_fake_device(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """A device that is not the CPU, on a machine that has none: it computes, and it refuses to mix devices.

    Its tensors carry real numbers, so that loops end, errors are raised and results can be compared (`x.cpu()`).
    They say "meta", the one other device that every build of PyTorch knows to the end: in the CPU build a tensor that
    says "cuda" aborts the process as soon as it requires grad. Like CUDA, it takes 0-d tensors and indices of the CPU.
    """

    device = FAKE_DEVICE

    def __call__(self, tensor: Tensor, *, requires_grad: bool = False) -> Tensor:
        """A copy of the tensor on the device, with the same strides."""
        return FakeDeviceTensor(tensor.detach().clone()).requires_grad_(requires_grad)

    def module(self, module: torch.nn.Module) -> torch.nn.Module:
        """A module made on the CPU, moved in place, as `module.to(device)` would."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = torch.nn.Parameter(self(parameter), parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self(buffer)
        return module

    def __init__(self) -> None:
        super().__init__()
        self._functions = _MadeFromNumbers()

    def __enter__(self) -> FakeDevice:
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run_on_fake_device(func, args, kwargs or {})


class _MadeFromNumbers(TorchFunctionMode):
    """Makes tensors from Python numbers on the CPU and moves them; on "meta" PyTorch would drop the numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


def _run_on_fake_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation: on the device if a tensor of it is among the arguments, or if it is named."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    inside = [tensor for tensor in tensors if isinstance(tensor, FakeDeviceTensor)]
    outside = [tensor for tensor in tensors if not isinstance(tensor, FakeDeviceTensor) and tensor.ndim > 0]
    name = func.overloadpacket.__name__
    if inside and outside and name not in BETWEEN_DEVICES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {FAKE_DEVICE} and cpu")
    target = kwargs.get("device")
    there = bool(inside) if target is None else torch.device(target).type == FAKE_DEVICE.type
    if name == "copy_":
        there = isinstance(args[0], FakeDeviceTensor)
    inner_args, inner_kwargs = tree_map_only(FakeDeviceTensor, lambda tensor: tensor.numbers, (args, kwargs))
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if not there:
        return result
    result = tree_map_only(Tensor, FakeDeviceTensor, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if inside else result


@pytest.fixture
def fake_device() -> Iterator[FakeDevice]:
    """`x = fake_device(torch.ones(3)); y = f(x); assert y.device == fake_device.device; y.cpu()`."""
    with FakeDevice() as device:
        yield device
