"""Momentum run backwards: every iterate comes back bit by bit, and the gradient is that of the remembered ones."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import implicit_layers as il
from implicit_layers.errors import CapturedTensorError, DtypeError, NonFiniteError, ShapeError, UnsupportedError
from implicit_layers.ledger import Ledger
from implicit_layers.measure import graph_bytes, relative_error
from implicit_layers.reversible import positions, run

MOMENTA = (0.0, 1e-3, 0.3, 0.5, 0.8765432, 0.9, 0.99, 0.999)


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    w = torch.rand(30, generator=g, dtype=torch.float64)
    z0 = torch.randn(4, 12, generator=g, dtype=torch.float64)
    return z0.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    X = torch.randn(30, 12, generator=g, dtype=torch.float64) / 6
    return X.to(dtype), torch.randn(4, 12, generator=g, dtype=torch.float64).to(dtype)


def descent(z: Tensor, w: Tensor) -> Tensor:
    """A gradient step on logistic-like losses: smooth, not quadratic."""
    X, y = data(z.dtype)
    return z - 0.3 * ((torch.tanh(z @ X.T) * w) @ X + 0.05 * z - y)


def gradients(mode: str, steps: int, momentum: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    z0, w = problem(dtype=dtype)
    z = il.unroll(descent, z0, w, steps=steps, mode=mode, momentum=momentum)
    return z.detach(), *torch.autograd.grad(z.square().sum(), (z0, w), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_the_trajectory_comes_back_bit_by_bit(momentum):
    z0, w = problem()
    there, back = positions(descent, 1000, momentum, z0, w)
    assert len(there) == len(back) == 1000
    assert all(torch.equal(x, y) for x, y in zip(there, back, strict=True))
    torch.testing.assert_close(there[0], z0.detach(), rtol=0, atol=2**-50)


@pytest.mark.parametrize("steps", [0, 1, 2, 65, 1000])
@pytest.mark.parametrize("momentum", MOMENTA[:-1])  # at 0.999 the thousand steps themselves blow up rounding
def test_gradients_are_those_of_full_to_rounding(momentum, steps):
    for ours, reference in zip(
        gradients("reversible", steps, momentum), gradients("full", steps, momentum), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
def test_all_modes_agree_with_the_same_momentum(momentum):
    reference = gradients("full", 200, momentum)
    for mine, exact in zip(gradients("checkpointed", 200, momentum), reference, strict=True):
        assert torch.equal(mine, exact)
    z0, w = problem()
    z = il.unroll(descent, z0, w, steps=200, mode="truncated", last=200, momentum=momentum)
    assert torch.equal(torch.autograd.grad(z.square().sum(), w)[0], reference[2])
    z = il.unroll(descent, z0, w, steps=201, mode="truncated", last=200, momentum=momentum)  # v_1 is a constant in it
    shorter = torch.autograd.grad(z.square().sum(), w)[0]
    assert 0 < relative_error([shorter], [gradients("full", 201, momentum)[2]]) < 0.2


def test_momentum_is_the_heavy_ball_of_the_textbook():
    z0, w = (x.detach() for x in problem())
    z, v = z0, torch.zeros_like(z0)
    for _ in range(9):
        v = 0.7 * v + (descent(z, w) - z)
        z = z + v
    for mode in ("full", "checkpointed", "truncated", "reversible"):
        torch.testing.assert_close(il.unroll(descent, z0, w, steps=9, mode=mode, momentum=0.7), z)


def test_float32_and_half_precision():
    for dtype, tol in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        for ours, exact in zip(gradients("reversible", 100, 0.9, dtype), gradients("full", 100, 0.9), strict=True):
            assert ours.dtype == dtype
            assert relative_error([ours], [exact]) < tol


def test_entries_of_any_size_keep_their_own_precision():
    sizes = torch.logspace(-200, 200, 9, dtype=torch.float64)

    def step(z, a):
        return z - 0.1 * (z - a)

    a = sizes.clone().requires_grad_()
    z0 = torch.zeros_like(sizes)
    ours, exact = (il.unroll(step, z0, a, steps=500, mode=mode, momentum=0.9) for mode in ("reversible", "full"))
    torch.testing.assert_close(ours / sizes, exact / sizes, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), a)[0], torch.ones_like(a), rtol=1e-9, atol=0)


def test_an_entry_that_starts_at_rest_and_stays_small_is_resolved():
    """The second entry is driven by the first, 10⁻¹² times as large, and the third never moves."""

    def step(z, a):
        first, second, third = z.unbind(-1)
        return torch.stack([first - 0.3 * (first - a), second - 0.3 * (second - 1e-12 * first), third], -1)

    a = torch.tensor(1e3, dtype=torch.float64, requires_grad=True)
    z0 = torch.zeros(3, dtype=torch.float64)
    found, exact = (il.unroll(step, z0, a, steps=40, mode=mode, momentum=0.4) for mode in ("reversible", "full"))
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=0)
    for k in range(2):
        ours, right = (torch.autograd.grad(z[k], a, retain_graph=True)[0] for z in (found, exact))
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=0)


def test_growth_beyond_the_guess_is_measured_and_divergence_is_refused():
    def growing(z, a):
        return z * a

    a = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    z0 = torch.tensor([1.0, -3.0], dtype=torch.float64, requires_grad=True)
    z = il.unroll(growing, z0, a, steps=100, mode="reversible")
    torch.testing.assert_close(z, z0 * 1.1**100, rtol=1e-11, atol=0)
    grads = torch.autograd.grad(z.sum(), (z0, a))
    torch.testing.assert_close(grads[0], torch.full_like(z0, 1.1**100), rtol=1e-9, atol=0)
    torch.testing.assert_close(grads[1], -2 * 100 * a.detach() ** 99, rtol=1e-9, atol=0)
    with pytest.raises(NonFiniteError, match="are not finite"):
        il.unroll(growing, z0, 10 * a, steps=2000, mode="reversible", momentum=0.5)
    with pytest.raises(NonFiniteError):
        il.unroll(lambda z, a: z / (a - a), z0, a, steps=3, mode="reversible")


def test_shapes_scalars_empty_and_no_steps():
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for shape in ((), (1,), (0,), (2, 0, 3), (2, 3, 4)):
        z0 = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        for steps in (0, 40):
            z = il.unroll(lambda z, a: z - 0.5 * (z - a), z0, a, steps=steps, mode="reversible", momentum=0.2)
            full = il.unroll(lambda z, a: z - 0.5 * (z - a), z0, a, steps=steps, momentum=0.2)
            assert z.shape == shape
            ours, exact = (
                torch.autograd.grad(y.sum(), (z0, a), allow_unused=True, materialize_grads=True) for y in (z, full)
            )
            torch.testing.assert_close(ours, exact)


def test_the_parameters_of_a_module_get_their_gradient():
    torch.manual_seed(0)
    cell = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh()).double()
    grads = []
    for mode in ("reversible", "full"):
        z = il.unroll(cell, torch.ones(3, 5, dtype=torch.float64), steps=50, mode=mode, momentum=0.1)
        grads.append(torch.autograd.grad(z.square().sum(), list(cell.parameters())))
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


def test_a_step_that_loses_a_gradient_or_is_not_a_function_is_refused():
    z0, w = problem()
    with pytest.raises(CapturedTensorError, match="requires grad and is not among its arguments"):
        il.unroll(lambda z: descent(z, w), z0, steps=3, mode="reversible", momentum=0.5)
    z = il.unroll(
        lambda z, w: descent(z, w) + 0.01 * torch.rand_like(z), z0, w, steps=5, mode="reversible", momentum=0.5
    )
    with pytest.raises(UnsupportedError, match="did not come back to z0 bit by bit"):
        z.sum().backward()
    with pytest.raises(ShapeError):
        il.unroll(lambda z, x: z + x, torch.zeros(3), torch.zeros(2, 3), steps=2, mode="reversible")
    with pytest.raises(DtypeError):
        il.unroll(lambda z, x: z + x, torch.zeros(3), torch.zeros(3).double(), steps=2, mode="reversible")


@pytest.mark.parametrize(("momentum", "error"), [(1.0, ValueError), (-0.1, ValueError), (float("nan"), ValueError)])
def test_a_meaningless_momentum_is_refused(momentum, error):
    for mode in ("full", "reversible"):
        with pytest.raises(error, match="momentum must be in"):
            il.unroll(descent, *problem(), steps=2, mode=mode, momentum=momentum)
    with pytest.raises(TypeError, match="momentum must be a number"):
        il.unroll(descent, *problem(), steps=2, momentum="0.9")  # type: ignore[arg-type]


def held(mode: str, steps: int, momentum: float = 0.9) -> int:
    z0, w = problem()
    return graph_bytes(lambda: il.unroll(descent, z0, w, steps=steps, mode=mode, momentum=momentum), exclude=[z0, w])


def test_the_graph_is_flat_but_for_the_buffer():
    """At 0.9 a step loses log₂(1/0.9) = 0.152 bits an entry; what is stored is that and less than three times it."""
    z0, w = problem()
    counts = [len(run(descent, k, 0.9, z0.detach(), w.detach()).aside) for k in (50, 1000, 4000)]
    assert counts[0] == 0
    bits = 64 * (counts[2] - counts[1]) / 3000
    assert math.log2(1 / 0.9) < bits < 3 * math.log2(1 / 0.9), bits
    state = held("reversible", 50)
    assert held("reversible", 1000) == state + 8 * z0.numel() * counts[1]
    assert held("full", 1000) > 20 * held("reversible", 1000)
    assert state < 6 * 8 * z0.numel()


def test_without_momentum_the_velocities_are_kept_whole():
    z0, _ = problem()
    growth = held("reversible", 200, 0.0) - held("reversible", 100, 0.0)
    assert growth == pytest.approx(100 * 8 * z0.numel(), rel=0.02)
    assert growth < 0.5 * (held("full", 200, 0.0) - held("full", 100, 0.0))


def test_a_planted_wrong_reversal_is_seen(monkeypatch):
    """Without its digits the way back misses the start, and says so."""
    monkeypatch.setattr(Ledger, "divide", lambda self, w: (w.double() / 0.9).round().to(torch.int64))
    z0, w = problem()
    z = il.unroll(descent, z0, w, steps=100, mode="reversible", momentum=0.9)
    with pytest.raises(UnsupportedError, match="did not come back"):
        z.sum().backward()
    there, back = positions(descent, 100, 0.9, z0, w)
    errors = [float((x - y).detach().abs().max()) for x, y in itertools.islice(zip(there, back, strict=True), 3)]
    assert max(errors) > 1e-13
