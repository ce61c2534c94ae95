"""What every test shares: one thread, fixed seeds, the same hypothesis examples everywhere, and two witnesses.

`host_syncs` counts how often the host waits for the device; `fake_device` gives tensors on a device that is not the
CPU, on a machine without one. Both watch PyTorch from outside and know nothing of the package's own bookkeeping.
"""

from __future__ import annotations

import functools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: never through torch.set_num_threads

import random
import sys
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

TESTS = Path(__file__).parent

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


class FakeDevice:
    """Tensors without data on a device that is not the CPU; mixing the two raises, as it would on a GPU.

    The device is "meta" inside `FakeTensorMode`: it takes the branches that are not the CPU's, it has autograd and
    torch.func, and it refuses to read a value back. Fake tensors on "cuda" itself would be nearer still, but the CPU
    build of PyTorch aborts the whole process when one of them requires a gradient.
    """

    def __init__(self) -> None:
        self.device = torch.device("meta")

    def __call__(self, tensor: Tensor, *, requires_grad: bool = False) -> Tensor:
        """The tensor's shape, strides and dtype on the device, under the running mode."""
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        return fake.requires_grad_(requires_grad)

    def module(self, module: torch.nn.Module) -> torch.nn.Module:
        """A module made on the CPU, moved: its parameters and buffers become fake tensors of the device."""
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None:
                    part._parameters[name] = torch.nn.Parameter(self(parameter.detach()))
            for name, buffer in list(part._buffers.items()):
                if buffer is not None:
                    part._buffers[name] = self(buffer)
        return module


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    """The test runs under `FakeTensorMode`; the package's questions to the device are answered "yes" and "none".

    That all is finite, all has converged, all factors exist, none is left: the way through without an error. Give
    `monkeypatch` another answer where a loop has to run longer. Any other read of a value raises.
    """
    for name, answer in {"host_bool": True, "host_int": 0}.items():
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("implicit_layers") and hasattr(module, name):
                monkeypatch.setattr(module, name, functools.partial(_answer, answer))
    with FakeTensorMode():
        yield FakeDevice()


def _answer(answer: bool | int, question: Tensor) -> bool | int:
    if question.numel() != 1:
        raise ValueError(f"the host reads one value, got shape {tuple(question.shape)}")
    return answer
