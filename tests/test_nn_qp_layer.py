"""`nn.QPLayer`: feasible for every parameter, trainable, and a well-behaved Module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import implicit_layers as il
from implicit_layers.testing import kkt_certificate

SIZES = [(4, 0, 0), (4, 2, 0), (4, 0, 3), (4, 2, 3), (1, 1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_solves_the_program_of_its_parameters(size: tuple[int, int, int]) -> None:
    layer = il.nn.QPLayer(*size, dtype=torch.float64)
    for parameter in layer.parameters():  # anywhere in parameter space the program is feasible
        nn.init.normal_(parameter)
    p = torch.randn(2, 3, size[0], dtype=torch.float64)
    solution = layer.solve(p)
    assert torch.equal(layer(p), solution.z) and solution.z.shape == p.shape
    lower = layer.L.detach().tril()
    Q = lower @ lower.mT + layer.epsilon * torch.eye(size[0], dtype=torch.float64)
    rows = {}
    if layer.A is not None:
        rows |= {"A": layer.A, "b": layer.A @ layer.z0}
    if layer.G is not None:
        rows |= {"G": layer.G, "h": layer.G @ layer.z0 + layer.log_slack.exp()}
    assert kkt_certificate(Q, p, solution.z, solution.nu, solution.lam, **rows).max() < 1e-8


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_parameter_gets_a_gradient(size: tuple[int, int, int]) -> None:
    layer = il.nn.QPLayer(*size)
    layer(5 * torch.randn(32, size[0])).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if size != (1, 1, 1):  # there the equality fixes z
            assert parameter.grad.abs().max() > 0, name


def test_it_learns_a_projection() -> None:
    """The layer is fitted to projections on a box; the loss falls far below that of the best affine map."""
    torch.manual_seed(0)
    x = 2 * torch.randn(256, 2)
    target = x.clamp(-1.0, 1.0)
    layer = il.nn.QPLayer(2, n_ineq=8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    losses = []
    for _ in range(200):
        loss = nn.functional.mse_loss(layer(-x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    affine = torch.linalg.lstsq(torch.cat([x, torch.ones(256, 1)], 1), target)
    best_affine = float((torch.cat([x, torch.ones(256, 1)], 1) @ affine.solution - target).square().mean())
    assert losses[-1] < 1e-3 * best_affine


def test_module_habits() -> None:
    layer = il.nn.QPLayer(3, 1, 2, on_failure="warn", solver=il.InteriorPoint(max_iter=30))
    p = torch.randn(4, 3)
    expected = layer(p)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(p), expected)
    fresh = il.nn.QPLayer(3, 1, 2)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(p), expected)
    assert sorted(layer.state_dict()) == ["A", "G", "L", "log_slack", "z0"]
    assert "n_eq=1" in repr(layer)
    assert layer.double()(p.double()).dtype == torch.float64
    assert il.nn.QPLayer(3, device="meta").L.is_meta


def test_reset_parameters_changes_them() -> None:
    layer = il.nn.QPLayer(3, 1, 2)
    before = layer.L.clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.L)


@pytest.mark.parametrize("sizes", [(0,), (3, -1), (3, 0, -1)])
def test_impossible_sizes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(il.ShapeError, match="QPLayer"):
        il.nn.QPLayer(*sizes)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="epsilon"):
        il.nn.QPLayer(3, epsilon=0.0)
    with pytest.raises(ValueError, match="on_failure"):
        il.nn.QPLayer(3, on_failure="never")  # type: ignore[arg-type]
    with pytest.raises(il.ShapeError, match="n = 3"):
        il.nn.QPLayer(3)(torch.randn(2, 4))
    with pytest.raises(il.DtypeError):
        il.nn.QPLayer(3)(torch.randn(2, 3).double())


def test_more_equalities_than_unknowns_are_feasible_by_construction() -> None:
    layer = il.nn.QPLayer(3, n_eq=5, gradient="least_norm")
    nn.init.normal_(layer.z0)
    p = torch.randn(2, 3, requires_grad=True)
    z = layer(p)
    assert torch.allclose(z, layer.z0.expand(2, 3), atol=1e-5)
    z.sum().backward()
    assert layer.z0.grad is not None and p.grad is not None


def test_what_is_not_learned_is_given() -> None:
    layer = il.nn.QPLayer(3, n_eq=1, n_ineq=2, learn=("b", "h"), epsilon=0.5, dtype=torch.float64)
    assert {name for name, _ in layer.named_parameters()} == {"z0", "log_slack"}
    p, A, G = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3), (4, 1, 3), (2, 3)))
    solution = layer.solve(p, A=A, G=G)
    expected = il.solve_qp(
        0.5 * torch.eye(3, dtype=torch.float64), p, A=A, b=(A @ layer.z0), G=G, h=G @ layer.z0 + layer.log_slack.exp()
    )
    assert torch.equal(solution.z, expected.z)
    with pytest.raises(ValueError, match="A is not learned"):
        layer(p, G=G)
    with pytest.raises(ValueError, match="h was given"):
        il.nn.QPLayer(3)(p.float(), h=torch.ones(1))
    with pytest.raises(ValueError, match="learn may hold"):
        il.nn.QPLayer(3, learn=("q",))
    with pytest.raises(ValueError, match="p is not learned"):
        il.nn.QPLayer(3)()


def test_every_argument_may_replace_a_learned_one() -> None:
    layer = il.nn.QPLayer(3, 1, 2, learn=("Q", "p", "A", "b", "G", "h"), lb=-2.0, ub=torch.ones(3))
    learned = layer.solve()
    given = {name: value.detach() for name, value in layer.program().items()}
    again = layer.solve(layer.p.detach(), **given, lb=torch.full((3,), -2.0), ub=torch.ones(3))
    assert torch.equal(learned.z, again.z)
    free = layer.solve(lb=torch.full((3,), -torch.inf), ub=torch.full((3,), torch.inf))
    assert free.lam_lb.eq(0).all() and free.lam_ub.eq(0).all()
    assert {"lb", "ub"} < set(layer.state_dict())


def test_a_point_outside_the_bounds_is_moved_inside() -> None:
    layer = il.nn.QPLayer(2, n_eq=1, n_ineq=1, lb=0.0, ub=1.0)
    with torch.no_grad():
        layer.z0.fill_(5.0)
    z = layer(torch.randn(8, 2))
    assert z.min() >= -1e-6 and z.max() <= 1 + 1e-6
