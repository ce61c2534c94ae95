"""What the solvers refuse as settings, and what the errors of a failed solve say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import implicit_layers as il

F64 = torch.float64

METHODS = [il.Newton, il.FixedPointIteration, il.Anderson, il.GradientDescent, il.LBFGS]
ITERATIVE = [*METHODS, il.ConjugateGradient, il.GMRES, il.Neumann]
NO_NUMBER: list[Any] = ["1e-8", True, torch.tensor(1e-8), [1e-8]]


@pytest.mark.parametrize("solver", ITERATIVE)
def test_a_tolerance_is_positive_and_finite(solver: type):
    for tol in (0, 0.0, -1e-8, math.nan, -math.inf):
        with pytest.raises(il.ArgumentError, match="tol must be positive and finite"):
            solver(tol=tol)
    for tol in NO_NUMBER:
        with pytest.raises(il.ArgumentTypeError, match="tol must be a number"):
            solver(tol=tol)
    assert solver(tol=None).tol is None
    assert solver(tol=1).tol == 1


@pytest.mark.parametrize("solver", ITERATIVE)
def test_an_infinite_tolerance_is_for_the_truncated_series_alone(solver: type):
    if solver is il.Neumann:
        assert solver(tol=math.inf).tol == math.inf
        return
    with pytest.raises(il.ArgumentError, match="tol must be positive and finite, got inf"):
        solver(tol=math.inf)


@pytest.mark.parametrize(
    ("solver", "setting"),
    [*((s, "max_iter") for s in ITERATIVE), (il.Anderson, "memory"), (il.LBFGS, "memory"), (il.GMRES, "restart")],
)
def test_counts_are_whole_and_at_least_one(solver: type, setting: str):
    for value in (0, -3):
        with pytest.raises(il.ArgumentError, match=f"{setting} must be at least 1, got {value}"):
            solver(**{setting: value})
    for wrong in (10.0, "10", True, math.inf):
        with pytest.raises(il.ArgumentTypeError, match=f"{setting} must be an int"):
            solver(**{setting: wrong})
    assert getattr(solver(**{setting: 1}), setting) == 1


def test_the_products_of_a_krylov_method_may_go_uncapped():
    assert il.ConjugateGradient(max_iter=None) == il.ConjugateGradient()
    assert il.GMRES(max_iter=None) == il.GMRES()


@pytest.mark.parametrize(
    ("solver", "setting", "good", "bad"),
    [
        (il.FixedPointIteration, "damping", (0, 0.0, 0.99), (-0.1, 1, 1.0, math.nan, math.inf)),
        (il.Anderson, "mixing", (1, 1e-3), (0, -0.5, 1.1, math.nan, math.inf)),
        (il.GradientDescent, "step", (None, 1, 1e-3), (0, -1.0, math.nan, math.inf)),
        (il.Neumann, "step", (1, 0.1, -1.0), (0.0, math.nan, math.inf, -math.inf)),
        (il.LeastSquares, "rcond", (None, 0, 1e-3), (-1e-3, 1.0, math.nan, math.inf)),
    ],
)
def test_further_settings_have_a_range(solver: type, setting: str, good: tuple[Any, ...], bad: tuple[float, ...]):
    for value in good:
        assert getattr(solver(**{setting: value}), setting) == value
    for value in bad:
        with pytest.raises(il.ArgumentError, match=f"^{setting} must be "):
            solver(**{setting: value})
    for wrong in NO_NUMBER:
        with pytest.raises(il.ArgumentTypeError, match=f"^{setting} must be a number"):
            solver(**{setting: wrong})


def test_momentum_needs_a_fixed_step():
    assert il.GradientDescent(step=0.1, momentum=0.9).momentum == 0.9
    with pytest.raises(il.ArgumentError, match="momentum must be 0 without a fixed step"):
        il.GradientDescent(momentum=0.9)
    for momentum in (-0.1, 1.0, math.nan):
        with pytest.raises(il.ArgumentError, match=r"^momentum must be "):
            il.GradientDescent(step=0.1, momentum=momentum)


def test_the_settings_of_anderson_are_refused_one_by_one():
    with pytest.raises(il.ArgumentError) as caught:
        il.Anderson(memory=0)
    assert "mixing" not in str(caught.value)
    with pytest.raises(il.ArgumentError) as caught:
        il.Anderson(mixing=2.0)
    assert "memory" not in str(caught.value)


class OwnSolver:
    """A linear solver of the user's."""

    def solve(self, operator: Any, rhs: Tensor, *, on_failure: str = "raise") -> Tensor:
        """Solve with the matrix."""
        return il.Direct().solve(operator, rhs)


def test_a_linear_solver_is_an_instance_with_a_method_solve():
    def square(z: Tensor, t: Tensor) -> Tensor:
        return z * z - t

    t, one = torch.tensor([4.0], requires_grad=True), torch.ones(1)
    uses: list[Callable[[Any], Any]] = [
        lambda solver: il.Newton(linear_solver=solver),
        lambda solver: il.root(square, one, t, linear_solver=solver),
        lambda solver: il.attach_gradient(square, 2 * one, t, linear_solver=solver),
        lambda solver: il.root_vjp(square, 2 * one, t, one, linear_solver=solver),
    ]
    for use in uses:
        with pytest.raises(il.ArgumentTypeError, match=r"linear_solver is the class Direct; pass an instance: il\.Dir"):
            use(il.Direct)
        with pytest.raises(il.ArgumentTypeError, match=r"the class OwnSolver; pass an instance: OwnSolver\(\)"):
            use(OwnSolver)
        with pytest.raises(il.ArgumentTypeError, match="linear_solver must have a method solve"):
            use("direct")
        use(il.Direct())
        use(OwnSolver())
        use(None)


@pytest.mark.parametrize("solver", METHODS)
def test_a_solver_is_an_instance(solver: type):
    with pytest.raises(il.ArgumentTypeError, match=rf"solver is .* {solver.__name__}; pass an instance: il\.\w+\(\)"):
        il.fixed_point(torch.cos, torch.ones(1), solver=solver)


def no_root(z: Tensor, t: Tensor) -> Tensor:
    """z² + t = 0 has no root for t > 0, so that every solver fails."""
    return z * z + t


def message(solve: Callable[[], object], error: type[Exception] = il.ConvergenceError) -> str:
    """What the error of a failing solve says."""
    with pytest.raises(error) as caught:
        solve()
    return str(caught.value)


COUPLED = "If the problems of the batch depend on each other, pass batch_dims=0."


def test_problems_that_may_be_coupled_are_mentioned_where_there_are_several():
    t = torch.ones(3, 2)
    assert COUPLED in message(lambda: il.root(no_root, torch.ones(3, 2), t))
    assert COUPLED in message(lambda: il.root(no_root, torch.ones(3, 2), t, batch_dims=2))
    assert COUPLED in message(lambda: il.fixed_point(lambda z, t: z + z * z + t, torch.ones(3, 2), t))
    for one in (
        lambda: il.root(no_root, torch.ones(3, 2), t, batch_dims=0),
        lambda: il.root(no_root, torch.ones(2), t[0]),
        lambda: il.root(no_root, torch.ones(1, 2), t[:1]),
        # a mapped axis numbers problems that do not depend on each other
        lambda: torch.func.vmap(lambda t: il.root(no_root, torch.ones(2), t).value)(t),
    ):
        text = message(one)
        assert "batch_dims" not in text
        assert "Raise max_iter" in text
    with pytest.warns(il.ConvergenceWarning, match="pass batch_dims=0"):
        il.root(no_root, torch.ones(3, 2), t, on_failure="warn")


def test_a_coupled_batch_is_solved_with_the_advice():
    t = torch.linspace(1, 2, 4, dtype=F64).unsqueeze(-1)

    def coupled(z: Tensor, t: Tensor) -> Tensor:
        return z + 3 * z.roll(1, 0) + z**3 - t

    assert COUPLED in message(lambda: il.root(coupled, torch.zeros_like(t), t))
    z = il.root(coupled, torch.zeros_like(t), t, batch_dims=0).value
    assert coupled(z, t).abs().max() < 1e-12


def test_the_advice_for_a_solver_of_the_users_is_about_that_solver():
    text = message(lambda: il.root(no_root, torch.ones(3, 2), torch.ones(3, 2), solver=lambda f, z, t: z + 1))
    assert "Tighten your solver's tolerance, or use attach_gradient if you trust its answer." in text
    assert "max_iter" not in text
    assert "iterations" not in text
    assert "tol 3.5e-04" in text  # √eps of float32


@pytest.mark.parametrize(
    ("kind", "solver", "factor"),
    [
        ("root", il.Newton, 1),
        ("fixed_point", il.Newton, 1),
        ("fixed_point", il.Anderson, 1),
        ("fixed_point", il.FixedPointIteration, 1),
        ("argmin", il.Newton, 1),
        ("argmin", il.LBFGS, 30),
        ("argmin", il.GradientDescent, 30),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_tolerance_in_the_message_is_the_one_that_judged(kind: str, solver: type, factor: int, dtype: torch.dtype):
    # from 5 no method is there after one step
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "root": lambda z, t: torch.exp(z) - t,
        "fixed_point": lambda z, t: torch.cos(z) * t,
        "argmin": lambda z, t: (torch.exp(z) - t * z).sum(-1),
    }
    start, t = torch.full((1,), 5.0, dtype=dtype), torch.tensor([0.9], dtype=dtype)

    def solve(**settings: Any) -> il.Solution:
        return getattr(il, kind)(functions[kind], start, t, solver=solver(max_iter=1, **settings))

    default = factor * torch.finfo(dtype).eps ** (2 / 3)
    text = message(solve)
    assert f"tol {default:.1e}, 1 of 1 iterations" in text
    assert "tol 1.2e-03, " in message(lambda: solve(tol=1.2e-3))
    residual = float(text.split("residual ")[1].split(",")[0])
    assert residual > default
    # the same residual within the tolerance is a solution
    assert solve(tol=1.01 * residual).info.converged


def with_numpy(z: Tensor, t: Tensor) -> Tensor:
    """z³ − t, half of it outside PyTorch."""
    return torch.from_numpy(z.detach().numpy() ** 3) - t


def with_attached_numpy(z: Tensor, t: Tensor) -> Tensor:
    """The same, where PyTorch itself objects."""
    return torch.from_numpy(z.numpy() ** 3) - t


@torch.no_grad()
def without_grad(z: Tensor, t: Tensor) -> Tensor:
    """The same in PyTorch, unrecorded."""
    return z**3 - t


@pytest.mark.parametrize("residual", [with_numpy, with_attached_numpy, without_grad])
def test_a_residual_that_autograd_does_not_see_is_refused(residual: Callable[..., Tensor]):
    t = torch.tensor([8.0], dtype=F64, requires_grad=True)
    z = torch.full((1,), 2.0, dtype=F64)
    for solve in (
        lambda: il.root(residual, z, t),
        lambda: il.root(residual, z, t.detach()),
        lambda: il.root(residual, z, t, solver=lambda F, z, t: z),
        lambda: il.attach_gradient(residual, z, t),
        lambda: il.argmin(lambda z, t: residual(z, t).sum(-1), z, t),
    ):
        text = message(solve, il.ArgumentError)
        assert "does not depend on z through PyTorch operations (was it detached, or computed with numpy?)" in text
    # forward only, by a solver of the user's: nothing is differentiated
    solution = il.root(residual, z, t.detach(), solver=lambda F, z, t: z)
    assert solution.info.converged


def test_a_residual_that_autograd_does_see_is_not_refused():
    t = torch.tensor([8.0], dtype=F64, requires_grad=True)
    z = torch.ones(1, dtype=F64)

    def in_place(z: Tensor, t: Tensor) -> Tensor:
        return z.clone().pow_(3).sub_(t)

    class Cube(torch.autograd.Function):
        """z³ by numpy, with its derivative."""

        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            """Leave PyTorch."""
            ctx.save_for_backward(z)
            return torch.from_numpy(z.detach().numpy() ** 3)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            """3z²."""
            (z,) = ctx.saved_tensors
            return 3 * z**2 * g

    with torch.no_grad():
        assert il.root(in_place, z, t).value.item() == pytest.approx(2)
    with torch.inference_mode():
        assert il.root(in_place, z.clone(), t.clone()).value.item() == pytest.approx(2)
    (g,) = torch.autograd.grad(il.attach_gradient(lambda z, t: Cube.apply(z) - t, 2 * z, t), t)
    assert g.item() == pytest.approx(1 / 12)
    # a step may be constant, and a problem empty
    (g,) = torch.autograd.grad(il.fixed_point(lambda z, t: 2 * t, z, t).value, t)
    assert g.item() == 2
    empty = torch.empty(0, 3, dtype=F64)
    assert il.root(lambda z, t: torch.empty_like(z).detach(), empty, t).value.shape == (0, 3)
