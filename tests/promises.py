"""What every differentiable operation promises, each promise a function that takes a row of `operations.py`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from tests.differences import SideBySide, pull, with_cotangents
from tests.operations import Operation, Tensors

Promise = Callable[[Operation], None]

TRANSFORMS: dict[str, Promise] = {}
PROMISES: dict[str, Promise] = {}


def _in(table: dict[str, Promise], name: str) -> Callable[[Promise], Promise]:
    def keep(promise: Promise) -> Promise:
        table[name] = promise
        return promise

    return keep


def close(found: Tensor | Tensors, expected: Tensor | Tensors, tol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def leaves(op: Operation, batch: tuple[int, ...] = (), seed: int = 0) -> Tensors:
    return tuple(x.requires_grad_() for x in op.make(batch, seed))


def weights(output: Tensor) -> Tensor:
    """A cotangent that tells all entries apart and depends on nothing but the shape."""
    count = torch.arange(1, output.numel() + 1, dtype=output.dtype, device=output.device)
    return torch.cos(count).reshape(output.shape)


def pulled(op: Operation, inputs: Tensors, cotangents: Tensors | None = None) -> tuple[Tensors, Tensors]:
    """Outputs and the gradients of all inputs."""
    outputs = op.call(*inputs)
    if cotangents is None:
        cotangents = tuple(map(weights, outputs))
    return tuple(y.detach() for y in outputs), torch.autograd.grad(outputs, inputs, cotangents)


def element(op: Operation, inputs: Tensors, index: tuple[int, ...]) -> Tensors:
    """The inputs of one problem of the batch."""
    chosen = (x[index] if may else x for x, may in zip(inputs, op.may_have_batch, strict=True))
    return tuple(x.detach().clone().requires_grad_() for x in chosen)


def in_dims(op: Operation) -> tuple[int | None, ...]:
    return tuple(0 if may else None for may in op.may_have_batch)


def loss(op: Operation) -> Callable[..., Tensor]:
    return lambda *inputs: sum((weights(y) * y).sum() for y in op.call(*inputs))


class Flat:
    """The operation on one problem as a function of one vector, and its derivatives by central differences."""

    def __init__(self, op: Operation) -> None:
        inputs = op.make((), 3)
        self.op, self.shapes = op, [x.shape for x in inputs]
        self.point = torch.cat([x.reshape(-1) for x in inputs])

    def inputs(self, vector: Tensor) -> Tensors:
        parts = vector.split([shape.numel() for shape in self.shapes], dim=-1)
        leading = vector.shape[:-1]
        return tuple(part.reshape((*leading, *shape)) for part, shape in zip(parts, self.shapes, strict=True))

    def outputs(self, vector: Tensor) -> Tensor:
        leading = vector.shape[:-1]
        return torch.cat([y.reshape(*leading, -1) for y in self.op.call(*self.inputs(vector))], dim=-1)

    def scalar(self, vector: Tensor) -> Tensor:
        y = self.outputs(vector)
        return (weights(y[(0,) * (y.ndim - 1)]) * y).sum()

    def gradient(self, vector: Tensor) -> Tensor:
        vector = vector.detach().requires_grad_()
        return torch.autograd.grad(self.scalar(vector), vector)[0]

    def differences(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Of all entries in one batch, unless what belongs to no batch is among them."""
        step = 1e-5
        moved = step * torch.eye(len(self.point), dtype=self.point.dtype)
        points = torch.cat([self.point + moved, self.point - moved])
        together = all(self.op.may_have_batch)
        values = function(points) if together else torch.stack([function(point).detach() for point in points])
        above, below = values.detach().chunk(2)
        return ((above - below) / (2 * step)).mT


@lru_cache
def flat(op: Operation) -> Flat:
    return Flat(op)


@lru_cache
def jacobian(op: Operation) -> Tensor:
    return flat(op).differences(flat(op).outputs)


@lru_cache
def hessian(op: Operation) -> Tensor:
    return flat(op).differences(flat(op).gradient)


# --- transforms -----------------------------------------------------------------------------------------------------


@lru_cache
def function(op: Operation) -> SideBySide:
    """The operation as gradcheck sees it on a batch of two: the same differences in all of the promises below."""
    return SideBySide(op.call, leaves(op, (2,)), together=all(op.may_have_batch))


@lru_cache
def gradients(op: Operation, batch: int) -> tuple[SideBySide, Tensors]:
    """Its gradients, and where gradgradcheck looks at them."""
    inputs = leaves(op, (batch,))
    point = with_cotangents(op.call, inputs)
    return SideBySide(pull(op.call, len(inputs)), point, together=all(op.may_have_batch)), point


@_in(TRANSFORMS, "`gradcheck`")
def first_order(op: Operation) -> None:
    assert gradcheck(function(op), leaves(op, (2,)), atol=1e-7)


@_in(TRANSFORMS, "`gradgradcheck`")
def second_order(op: Operation) -> None:
    assert gradcheck(*gradients(op, 2), atol=1e-7)


@_in(TRANSFORMS, "forward mode, and over reverse")
def forward_mode(op: Operation) -> None:
    only = {"atol": 1e-7, "check_forward_ad": True, "check_backward_ad": False}
    assert gradcheck(function(op), leaves(op, (2,)), **only)
    assert gradcheck(*gradients(op, 1), **only)


@_in(TRANSFORMS, "batched gradients (`is_grads_batched`)")
def batched_gradients(op: Operation) -> None:
    options = {"check_batched_grad": True, "check_batched_forward_grad": True, "check_forward_ad": True}
    # what is not defined has its place above, with and without forward mode
    assert gradcheck(function(op), leaves(op, (2,)), atol=1e-7, check_undefined_grad=False, **options)


@_in(TRANSFORMS, "`grad`, `vjp`")
def functional_reverse_mode(op: Operation) -> None:
    inputs = op.make((2,), 0)
    outputs, expected = pulled(op, leaves(op, (2,)))
    close(grad(loss(op), argnums=tuple(range(len(inputs))))(*inputs), expected)
    found, pull = vjp(op.call, *inputs)
    close(found, outputs)
    close(pull(tuple(map(weights, outputs))), expected)


@_in(TRANSFORMS, "`jvp`")
def functional_forward_mode(op: Operation) -> None:
    f, direction = flat(op), weights(flat(op).point)
    value, tangent = jvp(f.outputs, (f.point,), (direction,))
    close(value, f.outputs(f.point))
    close(tangent, jacobian(op) @ direction, 1e-6)


@_in(TRANSFORMS, "`jacrev`")
def reverse_jacobian(op: Operation) -> None:
    close(jacrev(flat(op).outputs)(flat(op).point), jacobian(op), 1e-6)


@_in(TRANSFORMS, "`jacfwd`")
def forward_jacobian(op: Operation) -> None:
    close(jacfwd(flat(op).outputs)(flat(op).point), jacobian(op), 1e-6)


def _hessian(outer: Callable, inner: Callable) -> Promise:
    def check(op: Operation) -> None:
        close(outer(inner(flat(op).scalar))(flat(op).point), hessian(op), 1e-6)

    return check


TRANSFORMS["`jacrev(jacrev)`"] = _hessian(jacrev, jacrev)
TRANSFORMS["`jacfwd(jacrev)`, `hessian`"] = _hessian(jacfwd, jacrev)
TRANSFORMS["`jacrev(jacfwd)`"] = _hessian(jacrev, jacfwd)
TRANSFORMS["`jacfwd(jacfwd)`"] = _hessian(jacfwd, jacfwd)


@_in(TRANSFORMS, "`vmap`")
def mapped(op: Operation) -> None:
    """Over every input that has a batch, over all but the first, over the last dimension, and twice."""
    inputs = op.make((3,), 1)
    expected = op.call(*inputs)
    close(vmap(op.call, in_dims(op))(*inputs), expected)
    last = tuple(None if d is None else x.ndim - 1 for x, d in zip(inputs, in_dims(op), strict=True))
    moved = (x if d is None else x.movedim(0, d) for x, d in zip(inputs, last, strict=True))
    close(vmap(op.call, last)(*moved), expected)
    dims = in_dims(op)
    if sum(op.may_have_batch) > 1:
        close(vmap(op.call, (None, *dims[1:]))(inputs[0][1], *inputs[1:]), op.call(inputs[0][1], *inputs[1:]))
    inputs = op.make((2, 3), 1)
    close(vmap(vmap(op.call, dims), dims)(*inputs), op.call(*inputs))


@_in(TRANSFORMS, "`vmap(grad)`, per-sample gradients")
def per_sample_gradients(op: Operation) -> None:
    inputs = op.make((3,), 1)
    found = vmap(grad(loss(op), argnums=tuple(range(len(inputs)))), in_dims(op))(*inputs)
    for i in range(3):
        close(tuple(x[i] for x in found), pulled(op, element(op, inputs, (i,)))[1])


@_in(TRANSFORMS, "`vmap(jacrev)`, `vmap(jacfwd)`")
def mapped_jacobians(op: Operation) -> None:
    inputs = op.make((3,), 1)
    last = len(inputs) - 1
    by_rev, by_fwd = (vmap(jac(op.call, argnums=last), in_dims(op))(*inputs) for jac in (jacrev, jacfwd))
    close(by_rev, by_fwd)
    for i in range(3):
        one = element(op, inputs, (i,))
        expected = torch.autograd.functional.jacobian(lambda x, one=one: op.call(*one[:-1], x), one[-1])
        close(tuple(J[i] for J in by_rev), expected)


def _compiled(function: Callable, inputs: Tensors, *, fullgraph: bool) -> None:
    """The compiled function gives the eager numbers, forward and backward, on two inputs."""
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=fullgraph)
    with warnings.catch_warnings():
        # where a graph breaks, the compiler looks at .grad of tensors inside it, and warns itself of that
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        for factor in (1.0, 1.01):
            given = tuple((x.detach() * factor).requires_grad_() for x in inputs)
            expected, found = function(*given), compiled(*given)
            close(found, expected)
            cotangents = tuple(map(weights, expected))
            close(torch.autograd.grad(found, given, cotangents), torch.autograd.grad(expected, given, cotangents))


@_in(TRANSFORMS, "`torch.compile`")
def compiled(op: Operation) -> None:
    _compiled(lambda *inputs: tuple(2.0 * y for y in op.call(*inputs)), op.make((2,), 1), fullgraph=not op.breaks[0])


@_in(TRANSFORMS, "`torch.compile` of `vmap`")
def compiled_vmap(op: Operation) -> None:
    def mapped(*inputs: Tensor) -> Tensors:
        return vmap(lambda *x: op.call(*x), in_dims(op))(*inputs)

    _compiled(mapped, op.make((2,), 1), fullgraph=not op.breaks[1])


# --- shapes, types, devices -----------------------------------------------------------------------------------------


@_in(PROMISES, "several leading dimensions = loop over the elements")
def batch_is_a_loop(op: Operation) -> None:
    inputs = leaves(op, (2, 1, 3), 2)
    outputs, gradients = pulled(op, inputs)
    cotangents = tuple(map(weights, outputs))
    shared = [torch.zeros_like(x) for x in inputs]
    for i in range(2):
        for j in range(3):
            index = (i, 0, j)
            one, parts = pulled(op, element(op, inputs, index), tuple(c[index] for c in cotangents))
            close(tuple(y[index] for y in outputs), one)
            for k, may in enumerate(op.may_have_batch):
                if may:
                    close(gradients[k][index], parts[k])
                else:
                    shared[k] += parts[k]
    for g, total, may in zip(gradients, shared, op.may_have_batch, strict=True):
        assert may or torch.allclose(g, total, rtol=1e-9, atol=1e-9)


@_in(PROMISES, "a shared argument gets the sum of the gradients")
def broadcasting_sums(op: Operation) -> None:
    full = op.make((3,), 4)
    for k, may in enumerate(op.may_have_batch):
        if not may:
            continue  # its sum is checked above
        for shared in (full[k][0], full[k][:1]):
            copies = shared.expand_as(full[k])
            given = [*full[:k], shared, *full[k + 1 :]]
            outputs, gradients = pulled(op, tuple(x.detach().clone().requires_grad_() for x in given))
            given[k] = copies
            apart, parts = pulled(op, tuple(x.detach().clone().requires_grad_() for x in given))
            if sum(op.may_have_batch) == 1:  # alone it makes the batch
                apart = tuple(y[0].expand_as(o) for y, o in zip(apart, outputs, strict=True))
                continue
            close(outputs, apart)
            close(gradients[k], parts[k].sum(0).reshape(shared.shape))
            close(gradients[:k] + gradients[k + 1 :], parts[:k] + parts[k + 1 :])


@_in(PROMISES, "an empty batch keeps the graph")
def empty_batch(op: Operation) -> None:
    for batch in ((0,), (2, 0)):
        inputs = leaves(op, batch)
        outputs = op.call(*inputs)
        one = op.call(*op.make((), 0))
        assert [y.shape for y in outputs] == [torch.Size((*batch, *y.shape)) for y in one]
        assert all(y.requires_grad for y in outputs)
        for x, g in zip(
            inputs, torch.autograd.grad(outputs, inputs, tuple(map(torch.ones_like, outputs))), strict=True
        ):
            assert g.shape == x.shape and bool((g == 0).all())


@_in(PROMISES, "float32 is close to float64 and stays float32")
def single_precision(op: Operation) -> None:
    inputs = tuple(x.float() for x in op.make((3,), 5))
    outputs, gradients = pulled(op, tuple(x.clone().requires_grad_() for x in inputs))
    assert {y.dtype for y in (*outputs, *gradients)} == {torch.float32}
    expected = pulled(op, tuple(x.double().requires_grad_() for x in inputs))
    close(tuple(y.double() for y in outputs), expected[0], 3e-5)
    close(tuple(g.double() for g in gradients), expected[1], 3e-4)


@_in(PROMISES, "any strides")
def strides(op: Operation) -> None:
    inputs = op.make((3,), 6)
    expected = pulled(op, tuple(x.clone().requires_grad_() for x in inputs))

    def transposed(x: Tensor) -> Tensor:
        return x.movedim(0, -1).contiguous().movedim(-1, 0) if x.ndim else x

    def spread(x: Tensor) -> Tensor:
        return torch.full((*x.shape, 2), torch.nan, dtype=x.dtype).select(-1, 0).copy_(x)

    for layout in (transposed, spread):
        moved = tuple(layout(x).requires_grad_() for x in inputs)
        found = pulled(op, moved, tuple(layout(weights(y)) for y in expected[0]))
        close(found, expected)
    expanded = tuple(x[:1].expand_as(x) if may else x for x, may in zip(inputs, op.may_have_batch, strict=True))
    close(
        pulled(op, tuple(x.detach().requires_grad_() for x in expanded)),
        pulled(op, tuple(x.clone().requires_grad_() for x in expanded)),
    )


def on_fake_cuda(op: Operation) -> None:
    """The shapes come out right on tensors that have a device and no values."""
    with FakeTensorMode():
        inputs = tuple(torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in op.make((3,), 0))
        outputs = op.call(*inputs)
    assert {y.device.type for y in outputs} == {"cuda"}
    assert [y.shape for y in outputs] == [y.shape for y in op.call(*op.make((3,), 0))]


# --- conduct --------------------------------------------------------------------------------------------------------


@_in(PROMISES, "bit by bit the same when run again")
def deterministic(op: Operation) -> None:
    first, second = (pulled(op, leaves(op, (3,), 7)) for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


@_in(PROMISES, "no graph under no_grad and inference_mode")
def without_gradients(op: Operation) -> None:
    inputs = leaves(op, (2,))
    expected = op.call(*inputs)
    with torch.no_grad():
        outputs = op.call(*inputs)
    assert not any(y.requires_grad for y in outputs)
    close(outputs, expected)
    with torch.inference_mode():
        outputs = op.call(*(x.detach().clone() for x in inputs))
    assert not any(y.requires_grad for y in outputs)
    close(tuple(y.clone() for y in outputs), expected)
    assert not any(y.requires_grad for y in op.call(*op.make((2,), 0)))


@_in(PROMISES, "backward twice, gradients accumulate")
def accumulation(op: Operation) -> None:
    inputs = leaves(op, (2,))
    total = sum((weights(y) * y).sum() for y in op.call(*inputs))
    total.backward(retain_graph=True)
    once = tuple(x.grad.clone() for x in inputs)
    total.backward()
    close(tuple(x.grad for x in inputs), tuple(2 * g for g in once))


@_in(PROMISES, "a gradient of one input alone")
def one_input_at_a_time(op: Operation) -> None:
    _, gradients = pulled(op, leaves(op, (2,)))
    for k, expected in enumerate(gradients):
        inputs = list(op.make((2,), 0))
        inputs[k].requires_grad_()
        outputs = [y for y in op.call(*inputs) if y.requires_grad]
        close(torch.autograd.grad(outputs, inputs[k], [weights(y) for y in outputs])[0], expected)


@_in(PROMISES, "inputs are left as they were")
def inputs_untouched(op: Operation) -> None:
    inputs = leaves(op, (2,))
    before = [(x.detach().clone(), x._version) for x in inputs]
    pulled(op, inputs)
    assert all(torch.equal(x, old) and x._version == version for x, (old, version) in zip(inputs, before, strict=True))


@_in(PROMISES, "double backward keeps its graph only when asked")
def released_graph(op: Operation) -> None:
    inputs = leaves(op, (2,))
    total = sum((weights(y) * y).sum() for y in op.call(*inputs))
    first = torch.autograd.grad(total, inputs, create_graph=True)
    again = torch.autograd.grad(total, inputs)
    assert not any(g.requires_grad for g in again)
    close(tuple(g.detach() for g in first), again)
