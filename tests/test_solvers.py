"""The solvers on problems with known answers: stopping, damping, batches, failure, what they refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import implicit_layers as il
from implicit_layers.solvers.line_search import wolfe_step
from implicit_layers.solvers.problem import Method, Rows, Terms

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def name(solver: object) -> str:
    return type(solver).__name__


ROOT = [il.Newton(), il.Newton(linear_solver=il.GMRES()), il.Newton(linear_solver=il.LeastSquares())]
FIXED_POINT = [
    il.FixedPointIteration(),
    il.FixedPointIteration(damping=0.3),
    il.Anderson(),
    il.Anderson(memory=1),
    il.Anderson(memory=20, mixing=0.5),
    il.Newton(),
]
ARGMIN = [
    il.Newton(),
    il.Newton(linear_solver=il.ConjugateGradient()),
    il.Newton(linear_solver=il.Direct()),
    il.LBFGS(),
    il.LBFGS(memory=1),
    il.GradientDescent(),
    il.GradientDescent(step=0.1),
    il.GradientDescent(step=0.05, momentum=0.8),
]
W, X = 0.3 * rand(6, 6), rand(4, 6, seed=1)


def contraction(z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ W) + x


def bowl(z: Tensor, x: Tensor) -> Tensor:  # strictly convex, not quadratic, its curvature between 1 and 6
    return 0.5 * ((z - x) ** 2).sum(-1) + torch.log(torch.cosh(2 * (z @ W))).sum(-1)


def residual(z: Tensor, x: Tensor) -> Tensor:
    return z - contraction(z, x)


@pytest.mark.parametrize("solver", ROOT, ids=name)
def test_root(solver: Method):
    z, info = solver.root(residual, torch.zeros(4, 6, dtype=F64), X)
    assert residual(z, X).abs().max() < 1e-11
    assert info.converged.all() and (info.status == 0).all() and (info.residual < 1e-10).all()
    assert info.iterations.shape == (4,) and (info.iterations < 20).all()


@pytest.mark.parametrize("solver", FIXED_POINT, ids=name)
def test_fixed_point(solver: Method):
    z, info = solver.fixed_point(contraction, torch.zeros(4, 6, dtype=F64), X)
    exact = il.Newton(tol=1e-15).root(residual, z, X).value
    assert info.converged.all()
    assert (z - exact).abs().max() < 1e-10


@pytest.mark.parametrize("solver", ARGMIN, ids=name)
def test_argmin(solver: Method):
    z, info = solver.argmin(bowl, torch.zeros(4, 6, dtype=F64), X)
    assert info.converged.all()
    for row, x in zip(z, X, strict=True):
        by_scipy = scipy.optimize.minimize(
            lambda v, x=x: bowl(torch.from_numpy(v), x).item(), x.numpy(), method="BFGS", options={"gtol": 1e-8}
        )
        assert abs(bowl(row, x).item() - by_scipy.fun) < 1e-12
    exact = il.Newton(tol=1e-15).argmin(bowl, z, X).value
    assert (z - exact).abs().max() < 1e-8


ALL = (
    [("root", s, residual) for s in ROOT]
    + [("fixed_point", s, contraction) for s in FIXED_POINT]
    + [("argmin", s, bowl) for s in ARGMIN]
)
every_solver = pytest.mark.parametrize(
    ("kind", "solver", "function"), ALL, ids=lambda c: c if isinstance(c, str) else name(c)
)


@every_solver
def test_batch_is_the_loop_over_its_elements(kind: str, solver: Method, function: Callable[..., Tensor]):
    x = X * torch.tensor([1.0, 1e-3, 3.0, 0.0], dtype=F64)[:, None]
    together = getattr(solver, kind)(function, torch.zeros_like(x), x)
    for i in range(4):
        alone = getattr(solver, kind)(function, torch.zeros_like(x[i]), x[i])
        assert torch.allclose(together.value[i], alone.value, rtol=1e-9, atol=1e-11)
        assert abs(int(together.info.iterations[i]) - int(alone.info.iterations)) <= 1
    nested = getattr(solver, kind)(function, torch.zeros_like(x).reshape(2, 2, 6), x.reshape(2, 2, 6))
    assert torch.allclose(nested.value.reshape(4, 6), together.value, rtol=1e-9, atol=1e-11)
    assert nested.info.iterations.shape == (2, 2)


@every_solver
def test_starting_at_the_solution(kind: str, solver: Method, function: Callable[..., Tensor]):
    first = getattr(solver, kind)(function, torch.zeros_like(X), X)
    again = getattr(solver, kind)(function, first.value, X)
    assert again.info.converged.all()
    assert (again.info.iterations <= 2).all()


@every_solver
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_no_problems(kind: str, solver: Method, function: Callable[..., Tensor], shape: tuple[int, ...]):
    z, info = getattr(solver, kind)(function, torch.zeros(shape, dtype=F64), torch.zeros(shape, dtype=F64))
    assert z.shape == shape and info.converged.shape == shape[:-1]


@every_solver
def test_no_unknowns(kind: str, solver: Method, function: Callable[..., Tensor]):
    plain = {"root": lambda z: z, "fixed_point": lambda z: z, "argmin": lambda z: z.sum(-1)}[kind]
    z, info = getattr(solver, kind)(plain, torch.zeros(3, 0))
    assert z.shape == (3, 0) and info.converged.all()


@every_solver
def test_numbers_and_whole_tensors(kind: str, solver: Method, function: Callable[..., Tensor]):
    scalar = {
        "root": lambda z, t: z + z**3 / 3 - t,
        "fixed_point": lambda z, t: 0.5 * torch.cos(z) + t,
        "argmin": lambda z, t: torch.cosh(z) - t * z,
    }[kind]
    t = torch.tensor([0.3, 0.7, -0.2], dtype=F64)
    solve = getattr(solver, kind)
    one = [solve(scalar, torch.zeros((), dtype=F64), v).value for v in t]
    many = solve(scalar, torch.zeros(3, dtype=F64), t, batch_dims=1)
    assert one[0].shape == () and many.info.converged.shape == (3,)
    assert torch.allclose(many.value, torch.stack(one), atol=1e-9)
    whole = (lambda z, t: scalar(z, t).sum()) if kind == "argmin" else scalar
    coupled = solve(whole, torch.zeros(1, 3, dtype=F64), t, batch_dims=0)
    assert coupled.info.converged.shape == ()
    assert torch.allclose(coupled.value[0], many.value, atol=1e-8)


@every_solver
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_float32_whatever_the_default_dtype(
    kind: str, solver: Method, function: Callable[..., Tensor], default: torch.dtype
):
    def single(z: Tensor, x: Tensor) -> Tensor:
        assert z.dtype == x.dtype == torch.float32
        return function(z.double(), x.double()).float()

    torch.set_default_dtype(default)
    try:
        z, info = getattr(solver, kind)(single, torch.zeros(4, 6, dtype=torch.float32), X.float())
    finally:
        torch.set_default_dtype(torch.float32)
    assert z.dtype == info.residual.dtype == torch.float32
    exact = getattr(il.Newton(), kind)(function, torch.zeros(4, 6, dtype=F64), X).value
    assert info.converged.all()
    assert (z.double() - exact).abs().max() < 1e-3


@every_solver
def test_the_inputs_are_not_changed(kind: str, solver: Method, function: Callable[..., Tensor]):
    z0, x = torch.zeros(4, 6, dtype=F64), X.clone()
    getattr(solver, kind)(function, z0, x)
    assert (z0 == 0).all() and torch.equal(x, X)


@every_solver
def test_the_cap_on_the_iterations(kind: str, solver: Method, function: Callable[..., Tensor]):
    capped = type(solver)(**{**solver.__dict__, "max_iter": 1, "tol": 1e-14})
    z, info = getattr(capped, kind)(function, torch.full((4, 6), 3.0, dtype=F64), X)
    assert (info.iterations <= 1).all() and not info.converged.any() and (info.status == 1).all()
    assert torch.isfinite(z).all() and torch.isfinite(info.residual).all()


@pytest.mark.parametrize("solver", [*ROOT, *FIXED_POINT], ids=name)
@pytest.mark.parametrize("unit", [1e-9, 1e-6, 1.0, 1e6, 1e9])
def test_units_do_not_matter(solver: Method, unit: float):
    def scaled(z: Tensor, x: Tensor) -> Tensor:
        return unit * (torch.tanh((z / unit) @ W)) + x

    z, info = (
        solver.fixed_point(scaled, torch.zeros_like(X), unit * X)
        if solver in FIXED_POINT
        else solver.root(lambda z, x: z - scaled(z, x), torch.zeros_like(X), unit * X)
    )
    exact = il.Newton(tol=1e-15).fixed_point(contraction, torch.zeros_like(X), X).value
    assert info.converged.all()
    assert (z / unit - exact).abs().max() < 1e-9


@pytest.mark.parametrize("solver", [s for s in ARGMIN if getattr(s, "step", None) is None], ids=name)
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("weight", [1e-6, 1.0, 1e6])
def test_units_of_a_minimum_do_not_matter(solver: Method, unit: float, weight: float):
    z, info = solver.argmin(lambda z, x: weight * bowl(z / unit, x / unit), torch.zeros_like(X), unit * X)
    exact = il.Newton(tol=1e-15).argmin(bowl, torch.zeros_like(X), X).value
    assert info.converged.all()
    assert (z / unit - exact).abs().max() < 1e-8


@every_solver
def test_a_solution_at_zero(kind: str, solver: Method, function: Callable[..., Tensor]):
    z, info = getattr(solver, kind)(function, rand(4, 6, seed=2), torch.zeros_like(X))
    assert info.converged.all()
    assert z.abs().max() < 1e-9


@pytest.mark.parametrize("solver", ROOT, ids=name)
def test_a_root_at_zero_among_terms_of_size_one(solver: Method):
    z, info = solver.root(
        lambda z, t: torch.exp(z) - t + 0.1 * z.roll(1, -1), torch.ones(2, 3, dtype=F64), torch.ones(3, dtype=F64)
    )
    assert info.converged.all() and z.abs().max() < 1e-12
    z, info = solver.root(lambda z: torch.exp(z) - 1, torch.ones(2, 3, dtype=F64))
    assert info.converged.all() and z.abs().max() < 1e-12


def test_newton_is_quadratic():
    errors = []
    for k in range(1, 6):
        z = il.Newton(max_iter=k, tol=1e-300).root(lambda z: z * z - 2, torch.tensor([1.0], dtype=F64)).value
        errors.append(abs(z.item() - 2**0.5))
    for before, after in itertools.pairwise(errors[:-1]):
        assert after < before**2


def test_newton_is_damped():
    # the full step from 3 overshoots, and diverges
    z, info = il.Newton().root(torch.arctan, torch.tensor([[3.0], [0.5], [-20.0]], dtype=F64))
    assert info.converged.all() and z.abs().max() < 1e-9
    # beyond the full step the residual is not even defined
    z, info = il.Newton().root(lambda z: torch.log(z) - 1, torch.tensor([[20.0]], dtype=F64))
    assert info.converged.all() and torch.allclose(z.log(), torch.ones(1, 1, dtype=F64))


def test_newton_leaves_a_singular_start():
    z, info = il.Newton().root(
        lambda z: torch.stack([z[..., 0] * z[..., 1] - 1, z[..., 0] - z[..., 1]], -1),
        torch.tensor([1.0, -1.0], dtype=F64) + 2,
    )
    assert info.converged and torch.allclose(z.abs(), torch.ones(2, dtype=F64))


@pytest.mark.parametrize("start", [[0.0, 0.0], [0.0, 0.5], [1e-3, -1e-3], [2.0, 0.0]])
def test_newton_accepts_no_saddle_and_no_maximum(start: list[float]):
    def f(z: Tensor) -> Tensor:  # minima at (±1, ±1), a maximum at 0, saddles between
        return ((z**2 - 1) ** 2).sum(-1)

    z, info = il.Newton().argmin(f, torch.tensor(start, dtype=F64))
    assert info.converged
    assert torch.allclose(z.abs(), torch.ones(2, dtype=F64))


def test_newton_says_so_when_it_stays_at_a_saddle():
    solution = il.Newton(max_iter=1).argmin(lambda z: (z**4 - z**2).sum(-1), torch.zeros(2, dtype=F64))
    assert not solution.info.converged


@pytest.mark.parametrize("solver", [il.Newton(), il.LBFGS(), il.LBFGS(memory=30)], ids=name)
def test_rosenbrock(solver: Method):
    def f(z: Tensor) -> Tensor:
        return (100 * (z[..., 1:] - z[..., :-1] ** 2) ** 2 + (1 - z[..., :-1]) ** 2).sum(-1)

    z, info = solver.argmin(f, torch.tensor([[1.3, 0.7, 0.8, 1.9], [0.0, 0.0, 0.0, 0.0]], dtype=F64))
    assert info.converged.all()
    assert (z - 1).abs().max() < 1e-7


@settings(derandomize=True, max_examples=20, deadline=None)
@given(st.integers(2, 20), st.floats(0, 4), st.integers(0, 1000))
def test_lbfgs_reaches_a_small_gradient_on_hard_quadratics(n: int, digits: float, seed: int):
    Q, _ = torch.linalg.qr(rand(n, n, seed=seed))
    H = Q @ torch.diag(torch.logspace(0, digits, n, dtype=F64)) @ Q.mT
    b = rand(3, n, seed=seed + 1)
    z, info = il.LBFGS().argmin(
        lambda z, H, b: 0.5 * ((z @ H) * z).sum(-1) - (b * z).sum(-1), torch.zeros_like(b), H, b
    )
    assert info.converged.all() and (info.residual < 2e-9).all()
    size = torch.linalg.vector_norm(b, dim=-1)
    assert (torch.linalg.vector_norm(z @ H - b, dim=-1) < 1e-7 * size).all()


def test_an_objective_far_below_its_own_rounding():
    # 1e8 + a bowl: values tell nothing within 1e-8, gradients do
    z, info = il.LBFGS().argmin(lambda z, x: 1e8 + bowl(z, x), torch.zeros_like(X), X)
    exact = il.Newton(tol=1e-15).argmin(bowl, torch.zeros_like(X), X).value
    assert info.converged.all()
    assert (z - exact).abs().max() < 1e-8


@pytest.mark.parametrize("solver", [il.Newton(), il.LBFGS(), il.GradientDescent()], ids=name)
@pytest.mark.parametrize("far", [0.0, 1.0])
def test_an_objective_whose_rounding_is_larger_than_its_value(solver: Method, far: float):
    # log cosh rounds at 1e-16 however small it is, and here it ends at values of 1e-8 and at zero
    a, b = rand(2000, 1), far * rand(2000, 1, seed=1)

    def f(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (0.5 * far * (z - b) ** 2 + torch.log(torch.cosh(a * z if far else z - 1e-3 * a))).sum(-1)

    z, info = solver.argmin(f, rand(2000, 1, seed=2), a, b)
    slope = far * (z - b) + (a * torch.tanh(a * z) if far else torch.tanh(z - 1e-3 * a))
    assert info.converged.all() and (info.iterations < 30).all()
    assert slope.abs().max() < 1e-9


def test_line_search_keeps_the_weak_wolfe_conditions():
    def evaluate(y: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.sin(3 * y) + y**2).sum(-1), 3 * torch.cos(3 * y) + 2 * y

    y = rand(50, 2)
    value, g = evaluate(y)
    length = torch.logspace(-6, 6, 50, dtype=F64)
    new, v, G, moved = wolfe_step(evaluate, y, value, g, -g, length, torch.ones(50, dtype=torch.bool), 0 * value)
    slope = -(g * g).sum(-1)
    t = ((new - y) * -g).sum(-1) / (g * g).sum(-1)
    assert moved.all()
    assert (v <= value + 1e-4 * t * slope + 1e-12).all()
    assert ((G * -g).sum(-1) >= 0.9 * slope).all()


def test_anderson_beats_plain_iteration_and_converges_where_it_does_not():
    A = torch.diag(torch.linspace(-0.95, 0.95, 5, dtype=F64))
    b = torch.ones(5, dtype=F64)
    plain = il.FixedPointIteration().fixed_point(lambda z: A @ z + b, torch.zeros(5, dtype=F64))
    fast = il.Anderson().fixed_point(lambda z: A @ z + b, torch.zeros(5, dtype=F64))
    assert plain.info.converged and fast.info.converged
    assert fast.info.iterations < 15 < 300 < plain.info.iterations
    expanding = il.Anderson().fixed_point(lambda z: -2 * z + b, torch.zeros(5, dtype=F64))
    assert expanding.info.converged and torch.allclose(expanding.value, b / 3)
    assert not il.FixedPointIteration().fixed_point(lambda z: -2 * z + b, torch.zeros(5, dtype=F64)).info.converged


def test_anderson_with_a_singular_small_system():
    # all differences are parallel, then all are zero
    z, info = il.Anderson(memory=8).fixed_point(lambda z: 0.5 * z + 1, torch.zeros(3, 4, dtype=F64))
    assert info.converged.all() and torch.allclose(z, torch.full((3, 4), 2.0, dtype=F64))
    z, info = il.Anderson().fixed_point(lambda z: torch.ones_like(z), torch.zeros(3, 4, dtype=F64))
    assert info.converged.all() and (z == 1).all()


def test_what_diverges_stays_finite_and_leaves_its_neighbours_alone():
    rate = torch.tensor([[0.5], [3.0], [-0.5]], dtype=F64)
    for solver in (il.FixedPointIteration(), il.FixedPointIteration(damping=0.5)):
        z, info = solver.fixed_point(lambda z, r: r * z**3 + 1, torch.full((3, 1), 0.1, dtype=F64), rate)
        assert torch.isfinite(z).all()
        assert not info.converged[1] and info.converged[2]
    z, info = il.GradientDescent(step=1.0, max_iter=3000).argmin(
        lambda z, r: 0.5 * r[:, 0].abs() * (z**2).sum(-1), torch.ones(3, 1, dtype=F64), rate
    )
    assert torch.isfinite(z).all() and info.converged.tolist() == [True, False, True]


def test_a_problem_that_is_not_finite_leaves_its_neighbours_alone():
    x = X.clone()
    x[1, 2] = torch.nan
    for kind, solver, function in ALL:
        z, info = getattr(solver, kind)(function, torch.zeros_like(x), x)
        clean = getattr(solver, kind)(function, torch.zeros_like(x), X)
        assert info.converged.tolist() == [True, False, True, True], name(solver)
        assert torch.allclose(z[[0, 2, 3]], clean.value[[0, 2, 3]], rtol=1e-9, atol=1e-11)


def test_no_root_is_found_out():
    for solver in ROOT:
        z, info = solver.root(lambda z: z * z + 1, torch.full((2, 1), 0.7, dtype=F64))
        assert not info.converged.any() and torch.isfinite(z).all()


def test_an_explicit_tolerance_is_kept():
    for tol in (1e-2, 1e-5, 1e-9):
        z, info = il.FixedPointIteration(tol=tol).fixed_point(torch.cos, torch.ones(1, dtype=F64))
        assert info.converged.all() and tol / 10 < abs(z - torch.cos(z)) / z <= tol
        info = il.LBFGS(tol=tol).argmin(bowl, torch.zeros_like(X), X).info
        assert info.converged.all() and (info.residual <= 100 * tol).all()


def test_called_by_themselves():
    assert abs(il.Newton()(lambda z: z * z - 2, torch.ones(1)).value - 2**0.5) < 1e-6
    assert abs(il.Anderson()(torch.cos, torch.ones(1)).value - 0.739085) < 1e-5
    assert abs(il.LBFGS()(lambda z: (z[0] - 3) ** 2, torch.ones(1)).value - 3) < 1e-4


def test_bad_settings():
    for make in (
        lambda: il.FixedPointIteration(damping=1.0),
        lambda: il.Anderson(memory=0),
        lambda: il.Anderson(mixing=0.0),
        lambda: il.LBFGS(memory=0),
        lambda: il.GradientDescent(step=-1.0),
        lambda: il.GradientDescent(step=0.1, momentum=1.0),
        lambda: il.GradientDescent(momentum=0.5),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
    with pytest.raises(TypeError, match="use Newton"):
        il.Anderson().root(residual, X, X)


def test_size_of_the_terms():
    rows = Rows(torch.Size((2, 3)), 1)
    z, A = torch.tensor([[1.0, 2.0, 3.0]] * 2, dtype=F64), torch.eye(3, dtype=F64)

    def F(z: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return z @ A - b

    for unit in (1e-8, 1.0, 1e8):
        size = Terms(rows, F, z, (A, unit * z)).size(unit * z, torch.zeros_like(z))
        assert (size > 0.5 * unit).all() and (size < 20 * unit).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_newton_finds_small_unknowns_beside_large_ones(dtype: torch.dtype) -> None:
    """The residual as a whole is small long before the small unknown has its value."""
    p = torch.tensor([1e-2, 1e4], dtype=dtype, requires_grad=True)
    solution = il.root(lambda z, p: z * z - p, torch.ones(2, dtype=dtype), p)
    (gradient,) = torch.autograd.grad(solution.value.sum(), p)
    rtol = 1e-4 if dtype == torch.float32 else 1e-9
    assert torch.allclose(solution.value, torch.tensor([0.1, 100.0], dtype=dtype), rtol=rtol)
    assert torch.allclose(gradient, torch.tensor([5.0, 5e-3], dtype=dtype), rtol=rtol)
