"""One problem through different rooms of the package, and by hand: one answer, one gradient.

Each group has a reference that uses nothing of the package, or an independent dense route, and every other room is
held against it: all outputs that the room has, and the gradients of a weighted sum of them in all parameters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import implicit_layers as il
from implicit_layers.kkt import entropic, quadratic
from implicit_layers.reference import exact_qp, program
from implicit_layers.testing import random_qp
from implicit_layers.unrolled import unrolled_qp, unrolled_softmax

Tensors = tuple[Tensor, ...]
Room = Callable[..., Tensor | Tensors]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matvec(M: Tensor, v: Tensor) -> Tensor:
    return (M @ v.unsqueeze(-1)).squeeze(-1)


def solved(M: Tensor, v: Tensor) -> Tensor:
    """M⁻¹ v, one matrix at a time."""
    return torch.stack([torch.linalg.solve(a, b) for a, b in zip(M, v, strict=True)])


def answer(room: Room, theta: Tensors, outputs: int | None = None) -> tuple[Tensors, Tensors]:
    """What a room returns (the first `outputs` of it), and the gradients of a weighted sum of that."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in theta)
    found = room(*leaves)
    found = (found,) if isinstance(found, Tensor) else found[:outputs]
    loss = sum((torch.cos(torch.arange(1.0, y.numel() + 1, dtype=y.dtype)).reshape(y.shape) * y).sum() for y in found)
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return tuple(y.detach() for y in found), gradients


def agree(room: Room, reference: Room, theta: Tensors, tol: float = 1e-9) -> None:
    found = answer(room, theta)
    expected = answer(reference, theta, len(found[0]))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)


# --- softmax --------------------------------------------------------------------------------------------------------


def softmax_by_root(x: Tensor, temperature: Tensor) -> Tensor:
    """The KKT system in (log y, u), solved and differentiated by the generic core."""

    def residual(w: Tensor, x: Tensor, temperature: Tensor) -> Tensor:
        stationarity, primal = entropic.log_residual(w[..., :-1], w[..., -1], x, temperature)
        return torch.cat([stationarity, primal.unsqueeze(-1)], -1)

    start = torch.cat([torch.zeros_like(x), torch.zeros_like(x[..., :1])], -1)
    return il.root(residual, start, x, temperature).value[..., :-1].exp()


def softmax_by_argmin(x: Tensor, temperature: Tensor) -> Tensor:
    """The dual, min over u of τ Σ exp((x + u)/τ − 1) − u, whose minimum gives y; one unknown a problem."""

    def dual(u: Tensor, x: Tensor, temperature: Tensor) -> Tensor:
        tau = temperature.unsqueeze(-1)
        return (tau * ((x + u) / tau - 1).exp()).sum(-1) - u.squeeze(-1)

    u = il.argmin(dual, -x.detach().amax(-1, keepdim=True), x, temperature).value
    return ((x + u) / temperature.unsqueeze(-1) - 1).exp()


SOFTMAX: dict[str, Room] = {
    "closed": lambda x, t: il.softmax(x, temperature=t.unsqueeze(-1)),
    "newton": lambda x, t: il.softmax(x, temperature=t.unsqueeze(-1), method="newton"),
    "kkt": lambda x, t: il.softmax(x, temperature=t.unsqueeze(-1), method="kkt"),
    "root of the KKT system": softmax_by_root,
    "argmin of the dual": softmax_by_argmin,
    "unrolled mirror ascent": lambda x, t: unrolled_softmax(x, temperature=t.unsqueeze(-1)),
}


@pytest.mark.parametrize("room", SOFTMAX)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_softmax(room: str, n: int) -> None:
    theta = 2.0 * normal(1, 4, n), 0.4 + normal(2, 4).square()

    def reference(x: Tensor, temperature: Tensor) -> Tensor:
        return torch.softmax(x / temperature.unsqueeze(-1), -1)

    def slope(softmax: Room) -> Room:
        """Its gradient as a function, so that second derivatives are compared too."""
        w = torch.cos(torch.arange(float(4 * n), dtype=torch.float64)).reshape(4, n)
        return lambda *leaves: torch.autograd.grad((w * softmax(*leaves)).sum(), leaves, create_graph=True)

    agree(SOFTMAX[room], reference, theta)
    agree(slope(SOFTMAX[room]), slope(reference), theta)


# --- projection onto the simplex ------------------------------------------------------------------------------------


def projection(x: Tensor) -> Tensor:
    """The closed form: sort, find the support, subtract what makes it sum to one."""
    ordered = x.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    size = (ordered * count > excess).sum(-1, keepdim=True)
    return (x - excess.gather(-1, size - 1) / size).clamp(min=0)


def projection_by_qp(x: Tensor, solve: Callable = il.solve_qp, **options: object) -> Tensor:
    n = x.shape[-1]
    eye, one = torch.eye(n, dtype=x.dtype), torch.ones(1, dtype=x.dtype)
    solution = solve(eye, -x, A=one.expand(1, n), b=one, G=-eye, h=torch.zeros(n, dtype=x.dtype), **options)
    return solution if isinstance(solution, Tensor) else solution.z


def projection_by_root(x: Tensor) -> Tensor:
    """y = x + u on the support, 0 elsewhere, Σy = 1: smooth once the support is known."""
    support = projection(x.detach()) > 0

    def residual(w: Tensor, x: Tensor) -> Tensor:
        y, u = w[..., :-1], w[..., -1:]
        return torch.cat([torch.where(support, y - x - u, y), y.sum(-1, keepdim=True) - 1], -1)

    return il.root(residual, x.new_zeros(*x.shape[:-1], x.shape[-1] + 1), x).value[..., :-1]


PROJECTION: dict[str, Room] = {
    "solve_qp": projection_by_qp,
    "root on the support": projection_by_root,
    "gradient attached to the closed form": lambda x: il.attach_gradient(
        # the projection is the fixed point of a projected step of any length, here ½
        lambda y, x: y - projection(0.5 * (x + y)),
        projection(x.detach()),
        x,
    ),
    "fixed point of a projected step": lambda x: (
        il.fixed_point(lambda y, x: projection(0.5 * (x + y)), torch.full_like(x, 1 / x.shape[-1]), x).value
    ),
    "unrolled ADMM": lambda x: projection_by_qp(x, unrolled_qp, steps=300),
}


@pytest.mark.parametrize("room", PROJECTION)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_projection_onto_the_simplex(room: str, n: int) -> None:
    agree(PROJECTION[room], projection, (normal(3, 6, n),))


# --- quadratic programs ---------------------------------------------------------------------------------------------


def half(Q: Tensor) -> Tensor:
    return 0.5 * (Q + Q.mT)


def dense_kkt(Q: Tensor, p: Tensor, A: Tensor, b: Tensor) -> Tensors:
    """[Q Aᵀ; A 0] (z, ν) = (−p, b)."""
    zero = A.new_zeros(*A.shape[:-1], A.shape[-2])
    K = torch.cat([torch.cat([half(Q), A.mT], -1), torch.cat([A, zero], -1)], -2)
    return solved(K, torch.cat([-p, b], -1)).split([p.shape[-1], b.shape[-1]], -1)


def equalities_by_root(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, **options: object) -> Tensors:
    sizes = [p.shape[-1], b.shape[-1]]

    def residual(w: Tensor, Q: Tensor, p: Tensor, A: Tensor, b: Tensor) -> Tensor:
        z, nu = w.split(sizes, -1)
        return torch.cat([matvec(half(Q), z) + p + matvec(A.mT, nu), matvec(A, z) - b], -1)

    return il.root(residual, p.new_zeros(*p.shape[:-1], sum(sizes)), Q, p, A, b, **options).value.split(sizes, -1)


def equalities_eliminated(Q: Tensor, p: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """z = z₀ + N w with A z₀ = b, A N = 0: an unconstrained program in w, as `argmin` sees it."""
    pseudo = A.mT @ torch.cholesky_solve(torch.eye(A.shape[-2], dtype=A.dtype), torch.linalg.cholesky(A @ A.mT))
    project = torch.eye(p.shape[-1], dtype=p.dtype) - pseudo @ A
    shift = matvec(pseudo, b)

    def objective(w: Tensor, Q: Tensor, p: Tensor, project: Tensor, shift: Tensor) -> Tensor:
        z = shift + matvec(project, w)
        away = w - matvec(project, w)
        return (0.5 * z * matvec(half(Q), z) + p * z + 0.5 * away.square()).sum(-1)

    w = il.argmin(objective, torch.zeros_like(p), Q, p, project, shift).value
    return shift + matvec(project, w)


EQUALITIES: dict[str, Room] = {
    "solve_qp": lambda Q, p, A, b: il.solve_qp(Q, p, A=A, b=b)[:2],
    "exact_qp": lambda Q, p, A, b: exact_qp(program(Q, p, A=A, b=b))[:2],
    "root of the KKT system": equalities_by_root,
    "root, differentiated by GMRES": lambda *theta: equalities_by_root(*theta, linear_solver=il.GMRES(tol=1e-13)),
    "argmin on the null space": equalities_eliminated,
    "unrolled ADMM": lambda Q, p, A, b: unrolled_qp(Q, p, A=A, b=b),
}


@pytest.mark.parametrize("room", EQUALITIES)
@pytest.mark.parametrize(("n", "n_eq"), [(1, 1), (5, 3), (12, 4)])
def test_equality_constrained_program(room: str, n: int, n_eq: int) -> None:
    problem = random_qp(n, 0, n_eq, batch=(3,), condition=10.0, seed=n)
    skewed = problem.Q + torch.triu(normal(5, n, n), 1) - torch.triu(normal(5, n, n), 1).mT  # only ½(Q + Qᵀ) counts
    agree(EQUALITIES[room], dense_kkt, (skewed, problem.p, problem.A, problem.b), 1e-8)


def exact(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensors:
    """Plain autograd through one dense solve on the active set."""
    return exact_qp(program(Q, p, A=A, b=b, G=G, h=h))[:3]


def by_interior_point(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensors:
    return il.solve_qp(Q, p, A=A, b=b, G=G, h=h)[:3]


def _conditions(w: Tensor, *data: Tensor) -> Tensor:
    """Stationarity, Az − b and λ∘(Gz − h), which are smooth, in the unknowns (z, ν, λ)."""
    Q, p, A, b, G, h = data
    z, nu, lam = w.split([p.shape[-1], b.shape[-1], h.shape[-1]], -1)
    residual = quadratic.residual(half(Q), p, A, b, G, h, z, nu, lam)
    return torch.cat([residual.stationarity, residual.equality, residual.complementarity], -1)


def by_attached_gradient(*data: Tensor) -> Tensors:
    """The solution comes from the interior point without a graph; the core differentiates the KKT system."""
    with torch.no_grad():
        w = torch.cat(by_interior_point(*data), -1)
    return il.attach_gradient(_conditions, w, *data).split([data[i].shape[-1] for i in (1, 3, 5)], -1)


def by_root(*data: Tensor) -> Tensors:
    """Newton on the KKT system, from near the solution, without the package's own solver."""
    with torch.no_grad():
        near = torch.cat(exact(*data), -1)
    start = near + 1e-3 * torch.sin(torch.arange(near.numel(), dtype=near.dtype)).reshape(near.shape)
    return il.root(_conditions, start, *data).value.split([data[i].shape[-1] for i in (1, 3, 5)], -1)


def by_explicit_jacobian(*data: Tensor) -> Tensors:
    """One Newton step with the dense KKT Jacobian held fixed: the implicit function theorem written out."""
    Q, _, A, _, G, h = data
    with torch.no_grad():
        z, nu, lam = exact(*data)
        J = quadratic.jacobian(half(Q), A, G, h, z, lam)
        w = torch.cat([z, nu, lam], -1)
    return (w - solved(J, _conditions(w, *data))).split([z.shape[-1], nu.shape[-1], lam.shape[-1]], -1)


def by_qpth(*data: Tensor) -> Tensor:
    Q, p, A, b, G, h = data
    if A.shape[-2] == 0:
        A = b = p.new_zeros(0)
    return importlib.import_module("qpth.qp").QPFunction(verbose=-1, check_Q_spd=False)(half(Q), p, G, h, A, b)


INEQUALITIES: dict[str, tuple[Room, float]] = {
    "solve_qp": (by_interior_point, 1e-9),
    "attach_gradient on the KKT system": (by_attached_gradient, 1e-8),
    "root of the KKT system": (by_root, 1e-8),
    "explicit KKT Jacobian": (by_explicit_jacobian, 1e-9),
    "unrolled ADMM": (lambda Q, p, A, b, G, h: unrolled_qp(Q, p, A=A, b=b, G=G, h=h, steps=800), 1e-8),
}
if find_spec("qpth") is not None:  # an older way of ours, with an accuracy of its own
    INEQUALITIES["qpth"] = (by_qpth, 1e-4)


@pytest.mark.parametrize("room", INEQUALITIES)
@pytest.mark.parametrize("size", [(1, 1, 0), (4, 3, 1), (10, 10, 0), (12, 10, 4)], ids=str)
def test_inequality_constrained_program(room: str, size: tuple[int, int, int]) -> None:
    """z, ν, λ where the room has them; every parameter has a batch of its own, so that qpth's gradient is the sum."""
    problem = random_qp(*size, batch=(3,), condition=10.0, seed=sum(size))
    call, tol = INEQUALITIES[room]
    agree(call, exact, tuple(problem[:6]), tol)
    for ours, drawn in zip(answer(call, tuple(problem[:6]))[0], problem[6:], strict=False):
        torch.testing.assert_close(ours, drawn, rtol=tol, atol=tol)  # what the problem was made from


# --- minima, roots, fixed points --------------------------------------------------------------------------------------


def ridge(w: Tensor, X: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    return 0.5 * (matvec(X, w) - y).square().sum(-1) + 0.5 * alpha * w.square().sum(-1)


def ridge_system(X: Tensor, alpha: Tensor) -> Tensor:
    return X.mT @ X + alpha[..., None, None] * torch.eye(X.shape[-1], dtype=X.dtype)


def _start(X: Tensor) -> Tensor:
    return X.new_zeros(*X.shape[:-2], X.shape[-1])


def ridge_slope(w: Tensor, X: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    return matvec(X.mT, matvec(X, w) - y) + alpha.unsqueeze(-1) * w


RIDGE: dict[str, tuple[Room, float]] = {
    "argmin": (lambda *theta: il.argmin(ridge, _start(theta[0]), *theta).value, 1e-10),
    "argmin, LBFGS": (
        lambda *theta: il.argmin(ridge, _start(theta[0]), *theta, solver=il.LBFGS(tol=1e-12)).value,
        1e-8,
    ),
    "argmin, conjugate gradients behind": (
        lambda *theta: il.argmin(ridge, _start(theta[0]), *theta, linear_solver=il.ConjugateGradient(tol=1e-14)).value,
        1e-9,
    ),
    "root of the gradient": (lambda *theta: il.root(ridge_slope, _start(theta[0]), *theta).value, 1e-10),
    "solve_qp without constraints": (
        lambda X, y, alpha: il.solve_qp(ridge_system(X, alpha), -matvec(X.mT, y)).z,
        1e-10,
    ),
    "unrolled gradient descent": (
        lambda *theta: il.unroll(lambda w, *t: w - 0.05 * ridge_slope(w, *t), _start(theta[0]), *theta, steps=2000),
        1e-8,
    ),
}


@pytest.mark.parametrize("room", RIDGE)
def test_ridge_regression(room: str) -> None:
    theta = normal(6, 3, 8, 4), normal(7, 3, 8), 0.5 + normal(8, 3).square()
    call, tol = RIDGE[room]
    agree(call, lambda X, y, alpha: solved(ridge_system(X, alpha), matvec(X.mT, y)), theta, tol)


def test_logistic_regression_is_that_of_scipy() -> None:
    """The minimum, and its derivative by differences of the minima that scipy finds."""
    X, target = normal(9, 12, 3), normal(10, 12).sigmoid()

    def loss(w: Tensor, X: Tensor, target: Tensor) -> Tensor:
        scores = matvec(X, w)
        return (torch.nn.functional.softplus(scores) - target * scores).sum(-1) + 0.5 * w.square().sum(-1)

    def by_scipy(flat: np.ndarray) -> np.ndarray:
        X, target = flat[:36].reshape(12, 3), flat[36:]

        def slope(w: np.ndarray) -> np.ndarray:
            return X.T @ (1 / (1 + np.exp(-X @ w)) - target) + w

        def value(w: np.ndarray) -> float:
            return float((np.logaddexp(0, X @ w) - target * (X @ w)).sum() + 0.5 * w @ w)

        rough = scipy.optimize.minimize(value, np.zeros(3), jac=slope, method="BFGS").x
        return scipy.optimize.root(slope, rough, tol=1e-15).x

    (found,), gradients = answer(lambda *theta: il.argmin(loss, torch.zeros(3).double(), *theta).value, (X, target))
    point = torch.cat([X.reshape(-1), target]).numpy()
    assert abs(found.numpy() - by_scipy(point)).max() < 1e-10
    weights, step = np.cos(np.arange(1.0, 4.0)), 1e-5
    differences = [
        weights @ (by_scipy(point + d) - by_scipy(point - d)) / (2 * step) for d in step * np.eye(len(point))
    ]
    ours = torch.cat([g.reshape(-1) for g in gradients]).numpy()
    assert abs(ours - np.array(differences)).max() < 1e-8


def contraction(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ W + x)


def _fixed(solver: object = None, **options: object) -> Room:
    """The fixed point for one W and a batch of x."""
    solver = il.Anderson() if solver is None else solver
    return lambda W, x: il.fixed_point(contraction, torch.zeros_like(x), W, x, solver=solver, **options).value


FIXED_POINT: dict[str, tuple[Room, float]] = {
    "fixed_point": (_fixed(), 1e-9),
    "fixed_point, plain iteration": (_fixed(il.FixedPointIteration(tol=1e-13)), 1e-9),
    "fixed_point, Newton": (_fixed(il.Newton()), 1e-10),
    "fixed_point, Neumann series behind": (_fixed(linear_solver=il.Neumann(tol=1e-12, max_iter=500)), 1e-9),
    "fixed_point, GMRES behind": (_fixed(linear_solver=il.GMRES(tol=1e-13)), 1e-9),
    "root": (lambda W, x: il.root(lambda z, *t: z - contraction(z, *t), torch.zeros_like(x), W, x).value, 1e-10),
    "unrolled, checkpointed": (
        lambda W, x: il.unroll(contraction, torch.zeros_like(x), W, x, steps=300, mode="checkpointed"),
        1e-10,
    ),
    "unrolled, its last steps": (
        lambda W, x: il.unroll(contraction, torch.zeros_like(x), W, x, steps=300, mode="truncated", last=150),
        1e-9,
    ),
    "fixed_point of a module": (lambda W, x: _cell_fixed_point(W, x), 1e-9),
}


class _Cell(torch.nn.Module):
    """The contraction, its matrix a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.W = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return contraction(z, self.W, x)


def _cell_fixed_point(W: Tensor, x: Tensor) -> Tensor:
    """The parameter gets its value, and its gradient finds its way, through a parametrisation by hand."""

    def step(z: Tensor, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(_CELL, parameters, (z, x))

    return il.fixed_point(step, torch.zeros_like(x), {"W": W}, x).value


_CELL = _Cell().requires_grad_(False)


@pytest.mark.parametrize("room", FIXED_POINT)
def test_fixed_point(room: str) -> None:
    """Held against all iterations, unrolled and remembered."""
    theta = 0.3 * normal(11, 4, 4), normal(12, 5, 4)
    call, tol = FIXED_POINT[room]
    agree(call, lambda W, x: il.unroll(contraction, torch.zeros_like(x), W, x, steps=300), theta, tol)


def test_parameters_of_a_module_get_the_gradient_of_the_matrix_they_are() -> None:
    W, x = 0.3 * normal(11, 4, 4), normal(12, 5, 4)
    cell = _Cell()
    with torch.no_grad():
        cell.W.copy_(W)
    z = il.fixed_point(cell, torch.zeros_like(x), x).value
    (expected,), (gradient, _) = answer(_fixed(), (W, x))
    torch.testing.assert_close(z.detach(), expected, rtol=1e-12, atol=1e-12)
    (torch.cos(torch.arange(1.0, 21.0, dtype=torch.float64)).reshape(5, 4) * z).sum().backward()
    torch.testing.assert_close(cell.W.grad, gradient, rtol=1e-10, atol=1e-10)


# --- the agreement can be broken --------------------------------------------------------------------------------------


def test_an_averaged_gradient_is_noticed() -> None:
    theta = 0.3 * normal(11, 4, 4), normal(12, 5, 4)

    def averaged(W: Tensor, x: Tensor) -> Tensor:
        return _fixed()(W / 5 + 0.8 * W.detach(), x)  # the gradient of what the batch shares, divided by its size

    with pytest.raises(AssertionError, match="not close"):
        agree(averaged, _fixed(), theta)


def test_a_swapped_sign_of_a_dual_is_noticed() -> None:
    problem = random_qp(4, 3, 1, batch=(3,), seed=8)

    def swapped(*data: Tensor) -> Tensors:
        z, nu, lam = by_interior_point(*data)
        return z, -nu, lam

    with pytest.raises(AssertionError, match="not close"):
        agree(swapped, exact, tuple(problem[:6]))
