"""Every promise of `promises.py`, for every operation of the table in `operations.py`.

A promise that an operation does not keep is stated in its row with the reason, and then it is tested that it is
broken, so that no excuse outlives its cause. `python -m tests.test_contracts` writes the README's table of transforms
from the same rows.
"""

from __future__ import annotations

import copy
import io
import pickle
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import implicit_layers as il
from benchmarks.tables import README, pattern
from tests.operations import OPERATIONS, Operation
from tests.promises import PROMISES, TRANSFORMS, close, leaves, on_fake_cuda, pulled, weights

EVERY = TRANSFORMS | PROMISES
BROKEN = (AssertionError, RuntimeError, TypeError, ValueError)


def ids(op: Operation) -> str:
    return op.name.replace(": ", ":")


@pytest.mark.parametrize("promise", EVERY)
@pytest.mark.parametrize("op", OPERATIONS, ids=ids)
def test_promise(op: Operation, promise: str) -> None:
    check = EVERY[promise]
    if promise in op.exceptions:
        with pytest.raises(BROKEN):
            check(op)
    else:
        check(op)


@pytest.mark.parametrize("op", OPERATIONS, ids=ids)
def test_another_device(op: Operation, fake_device) -> None:
    """Values and gradients are computed where the inputs are, without a detour over the CPU."""
    inputs = op.make((2,), 0)
    expected, gradients = pulled(op, leaves(op, (2,)))
    there = tuple(fake_device(x, requires_grad=True) for x in inputs)
    outputs = op.call(*there)
    found = torch.autograd.grad(outputs, there, tuple(fake_device(weights(y)) for y in expected))
    assert {y.device for y in (*outputs, *found)} == {fake_device.device}
    close(tuple(y.detach().cpu() for y in outputs), expected)
    close(tuple(g.cpu() for g in found), gradients)


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op.fake_cuda], ids=ids)
def test_fake_cuda(op: Operation) -> None:
    on_fake_cuda(op)


@pytest.mark.parametrize("batch", [(), (5,), (200,)], ids=str)
@pytest.mark.parametrize("op", OPERATIONS, ids=ids)
def test_host_synchronisations(op: Operation, batch: tuple[int, ...], host_syncs) -> None:
    """Bounded by a constant and the iterations; the size of the batch has no part in it."""
    inputs = leaves(op, batch, 8)
    most = 0 if op.iterations is None else int(op.iterations(*inputs).max())
    forward, each, backward = op.syncs
    with host_syncs() as syncs:
        outputs = op.call(*inputs)
    assert syncs.count <= forward + each * most, (syncs, most)
    cotangents = tuple(map(weights, outputs))
    with host_syncs() as syncs:
        torch.autograd.grad(outputs, inputs, cotangents)
    assert syncs.count <= backward, syncs


MODULES = [op for op in OPERATIONS if op.module is not None]


@pytest.mark.parametrize("op", MODULES, ids=ids)
def test_modules_are_copied_pickled_and_restored(op: Operation) -> None:
    assert op.module is not None
    *state, x = op.make((2,), 9)
    module = op.module()
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), state, strict=True):
            parameter.copy_(value)
    expected = module(x)
    fresh = op.module()
    assert fresh.load_state_dict(module.state_dict()).missing_keys == []
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = op.module()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh, loaded):
        assert repr(twin) == repr(module)
        found = twin(x)
        assert torch.equal(found, expected)
        found.square().sum().backward()
        assert all(p.grad is None for p in module.parameters())  # nothing is shared with the original
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in twin.parameters())


@pytest.mark.parametrize("op", MODULES, ids=ids)
def test_modules_are_cast(op: Operation) -> None:
    assert op.module is not None
    module = op.module().float()
    assert module(op.make((2,), 9)[-1].float()).dtype == torch.float32


def test_every_public_operation_has_a_row() -> None:
    """What is exported in lower case is an operation, unless it is named here with what it is instead."""
    no_operations = {
        "il.check_ift": "a report",
        "il.root_vjp": "the derivative of root itself",
        "il.root_jvp": "the derivative of root itself",
        "il.register_regularizer": "a registry; what it adds goes through il.regularized_argmax",
        "nn.FenchelYoungLoss": "il.fenchel_young_loss with settings, no parameters",
        "nn.SparsemaxLoss": "the same",
        "nn.EntmaxLoss": "the same",
        "nn.SoftTopKLoss": "the same",
        "nn.PerturbedArgmax": "draws other noise each time; its function has a row",
        "nn.SPOPlusLoss": "a loss of two inputs; its function has a row",
        "nn.RegularizedLPLoss": "a loss of two inputs; its function has a row",
    }
    functions = {f"il.{name}" for name, value in vars(il).items() if isinstance(value, types.FunctionType)}
    functions |= {f"il.projections.{n}" for n, v in vars(il.projections).items() if isinstance(v, types.FunctionType)}
    modules = {f"nn.{name}" for name, value in vars(il.nn).items() if _is_ours(value)}
    expected = functions | modules
    assert expected - set(no_operations) == {op.public_name for op in OPERATIONS}


def _is_ours(value: object) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, torch.nn.Module)
        and value.__module__.startswith(f"{il.nn.__name__}.")
    )


def test_exceptions_name_promises_and_give_reasons() -> None:
    for op in OPERATIONS:
        assert set(op.exceptions) <= set(EVERY)
        assert all(len(reason) > 20 for reason in op.exceptions.values())


# --- tests of the tester --------------------------------------------------------------------------------------------


class _Sine(torch.autograd.Function):
    """The usual recipe for a custom function, right in all but forward mode over forward mode, which loses a term."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, t: Tensor) -> Tensor:
        return t * ctx.saved_tensors[0].cos()


def _row(call: Callable[..., Tensor], **more: object) -> Operation:
    return Operation("planted", OPERATIONS[0].make, lambda *x: (call(*x),), (1, 1), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("promise", EVERY)
def test_a_right_operation_keeps_every_promise_but_what_its_recipe_cannot(promise: str) -> None:
    op = _row(lambda x, t: _Sine.apply(x) * t)
    if promise == "`jacfwd(jacfwd)`":
        with pytest.raises(AssertionError):
            TRANSFORMS[promise](op)
    else:
        EVERY[promise](op)


WRONG = {
    "gradient": (
        lambda x, t: x.sin() * t + 0.01 * (x - x.detach()),
        ["`gradcheck`", "forward mode, and over reverse", "`jvp`", "`jacrev`", "`jacfwd`"],
    ),
    "gradient of the second argument": (lambda x, t: x.sin() * t.detach(), ["`gradcheck`", "`jacrev`", "`jacfwd`"]),
    "second derivative": (
        lambda x, t: x.sin().detach() * t + (x - x.detach()) * x.cos().detach() * t,
        ["`gradgradcheck`", "`jacrev(jacrev)`", "`jacfwd(jacrev)`, `hessian`", "`jacrev(jacfwd)`", "`jacfwd(jacfwd)`"],
    ),
    "averaged over the batch": (
        lambda x, t: x.sin() * t if x.ndim == 1 else (x.sin() * t + (len(x) - 1) * (x.sin() * t).detach()) / len(x),
        ["several leading dimensions = loop over the elements"],
    ),
    "problems coupled": (
        lambda x, t: x.sin() * t + 1e-3 * x.sum(0, keepdim=True),
        ["several leading dimensions = loop over the elements", "`vmap`"],
    ),
    "dtype": (lambda x, t: x.double().sin() * t, ["float32 is close to float64 and stays float32"]),
    "history of an input": (lambda x, t: x.data.mul_(1.5) * t, ["inputs are left as they were"]),
    "random": (lambda x, t: x.sin() * t + torch.rand(1), ["bit by bit the same when run again"]),
    "contiguous only": (lambda x, t: x.view(-1).sin().view(x.shape) * t, ["any strides"]),
}


@pytest.mark.parametrize("defect", WRONG)
def test_a_planted_defect_is_caught(defect: str) -> None:
    call, promises = WRONG[defect]
    for promise in promises:
        op = _row(call)
        with pytest.raises(BROKEN):
            EVERY[promise](op)


def test_a_tensor_made_on_the_cpu_is_caught(fake_device) -> None:
    op = _row(lambda x, t: x.sin() * t + torch.arange(4.0, dtype=x.dtype))
    with pytest.raises(BROKEN, match="device"):
        test_another_device(op, fake_device)
    with pytest.raises(BROKEN, match=r"cpu.*cuda"):
        on_fake_cuda(op)


# --- the README's table ---------------------------------------------------------------------------------------------

BREAK = "the graph breaks at the solve, whose iterations depend on the data; numbers and gradients are the eager ones"


def transform_table() -> str:
    """Public names by transforms: a tick where every row of the name keeps the promise, else a note with the reason."""
    names = list(dict.fromkeys(op.public_name for op in OPERATIONS))
    notes: list[str] = []
    lines = [["", *TRANSFORMS], ["---", *(":-:" for _ in TRANSFORMS)]]
    for name in names:
        rows = [op for op in OPERATIONS if op.public_name == name]
        breaks = dict(zip(("`torch.compile`", "`torch.compile` of `vmap`"), rows[0].breaks, strict=True))
        cells = []
        for promise in TRANSFORMS:
            broken = [f"`{op.name}` is {op.exceptions[promise]}" for op in rows if promise in op.exceptions]
            remarks = broken or ([BREAK] if breaks.get(promise) else [])
            for remark in remarks:
                if remark not in notes:
                    notes.append(remark)
            numbers = ", ".join(str(notes.index(remark) + 1) for remark in remarks)
            cells.append(("–" if broken else "✓") + (f" ({numbers})" if numbers else ""))
        lines.append([f"`{name}`", *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return table + "".join(f"\n\n({i}) {note[0].upper()}{note[1:]}." for i, note in enumerate(notes, start=1))


def rewritten(readme: str) -> str:
    """The README with this table between its markers."""
    head = "Each tick is a test (`tests/test_contracts.py`) of every output with respect to every input.\n\n"
    return pattern("transforms").sub(lambda found: f"{found[1]}\n{head}{transform_table()}\n\n{found[3]}", readme)


def test_readme_has_this_table() -> None:
    text = README.read_text(encoding="utf-8")
    assert pattern("transforms").search(text)
    assert rewritten(text) == text, "run python -m tests.test_contracts"


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
