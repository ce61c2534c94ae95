"""Points on the central path, for smoothed derivatives: closed form, conditions, finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from implicit_layers.kkt import condensed, quadratic
from implicit_layers.kkt.program import Data
from implicit_layers.solvers.interior_point import BarrierPoint, InteriorPoint

N, n = 6, 6
INF = float("inf")


def problem(linear: bool) -> Data:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    L, E, x = normal(N, n, n), normal(N, 5, n), torch.rand(N, n, generator=generator, dtype=torch.float64) - 0.5
    f = quadratic.matvec(E, x)
    f[:, 1:] += 0.1
    f[:, 4] = INF
    lb = torch.full((N, n), -0.5, dtype=torch.float64)
    ub = lb + 1.0
    lb[:, 3] = ub[:, 3] = x[:, 3]  # fixed
    lb[:, 4], ub[:, 5] = (-INF, INF) if not linear else (-0.5, 0.5)
    Q = torch.zeros(1, n, n, dtype=torch.float64) if linear else L @ L.mT + 0.1 * torch.eye(n).double()
    return Data(Q, 2 * normal(N, n), E, f, lb, ub, 1)


def test_closed_form_of_one_unknown() -> None:
    """min ½z² + pz − μ log z: z = (−p + sqrt(p² + 4μ))/2; and with rows in the place of the bound."""
    p = torch.tensor([[2.0], [0.0], [-3.0]], dtype=torch.float64)
    one, zero = torch.ones(1, 1, 1).double(), torch.zeros(1, 1).double()
    bounds = Data(one, p, torch.zeros(1, 0, 1).double(), torch.zeros(1, 0).double(), zero, None, 0)
    rows = Data(one, p, -one, zero, None, None, 0)
    for mu in (1.0, 1e-3, 1e-6):
        expected = 2 * mu / (p + (p**2 + 4 * mu).sqrt())
        expected = torch.where(p > 0, expected, (-p + (p**2 + 4 * mu).sqrt()) / 2)
        for data in (bounds, rows):
            point = InteriorPoint().solve_barrier(data, 3, mu)
            assert point.converged.all()
            assert ((point.z - expected) / expected).abs().max() < 1e-9
            dual = -point.bound if data is bounds else point.y
            assert (dual * expected / mu - 1).abs().max() < 1e-9


@pytest.mark.parametrize("mu", [1.0, 1e-2, 1e-4, 1e-7])
@pytest.mark.parametrize("linear", [False, True])
def test_perturbed_conditions(linear: bool, mu: float) -> None:
    data = problem(linear)
    assert data.lb is not None and data.ub is not None
    point = InteriorPoint().solve_barrier(data, N, mu)
    assert point.converged.all() and point.residual.max() < 1e-12
    gradient = quadratic.matvec(data.Q, point.z) + data.p + quadratic.transposed_matvec(data.E, point.y) + point.bound
    assert gradient.abs().max() < 1e-11 * float(point.y.abs().max().clamp(min=10))
    gap = quadratic.matvec(data.E, point.z) - data.f
    assert gap[:, 0].abs().max() < 1e-13
    assert (-gap[:, 1:4] * point.y[:, 1:4] / mu - 1).abs().max() < 1e-7
    assert (point.compliance[:, 1:4] / (-gap[:, 1:4] / point.y[:, 1:4]) - 1).abs().max() < 1e-6
    assert not point.y[:, 4].any() and not point.active[:, 4].any() and not point.compliance[:, 0].any()
    free = data.lb < data.ub
    bound = mu / (data.ub - point.z) - mu / (point.z - data.lb)
    assert torch.allclose(point.bound[free], bound[free], rtol=1e-6)
    assert torch.equal(point.z[:, 3], data.lb[:, 3]) and (point.fixed[:, 3] != 0).all() and not point.fixed[:, :3].any()
    other = InteriorPoint().solve_barrier(data, N, torch.full((N,), mu, dtype=torch.float64))
    assert torch.equal(other.z, point.z)


def derivative(data: Data, point: BarrierPoint, d_p: Tensor, d_f: Tensor, d_lb: Tensor, d_ub: Tensor) -> Tensor:
    """Along a change of p, f, lb and ub, by the condensed system."""
    factor = condensed.factorise(
        data, point.active, point.fixed, compliance=point.compliance, stiffness=point.stiffness
    )
    pulled = point.stiffness_lb * d_lb + point.stiffness_ub * d_ub
    stiff = point.stiffness > 0
    at = torch.where(stiff, pulled / torch.where(stiff, point.stiffness, 1.0), torch.where(point.fixed != 0, d_lb, 0.0))
    parts = condensed.solve(factor, data.Q, data.E, -d_p, d_f, at, 0)
    return torch.cat(parts, -1)


@pytest.mark.parametrize("mu", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("linear", [False, True])
def test_derivative_by_finite_differences(linear: bool, mu: float) -> None:
    data = problem(linear)
    assert data.lb is not None and data.ub is not None
    generator = torch.Generator().manual_seed(1)
    changes = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (data.p, data.f, data.lb, data.ub)]
    changes[3][:, 3] = changes[2][:, 3]
    changes = [
        torch.where(torch.isfinite(t), c, 0.0) for c, t in zip(changes, (data.p, data.f, data.lb, data.ub), strict=True)
    ]
    point = InteriorPoint().solve_barrier(data, N, mu)
    found = derivative(data, point, *changes)
    step = 1e-5 * mu**0.5
    ends = []
    for sign in (1, -1):
        p, f, lb, ub = (t + sign * step * c for t, c in zip((data.p, data.f, data.lb, data.ub), changes, strict=True))
        end = InteriorPoint().solve_barrier(data._replace(p=p, f=f, lb=lb, ub=ub), N, mu)
        ends.append(torch.cat([end.z, end.y, end.bound], -1))
    expected = (ends[0] - ends[1]) / (2 * step)
    assert ((found - expected).abs().max() / expected.abs().max()) < 1e-6
    wrong = derivative(data, point._replace(compliance=2 * point.compliance), *changes)
    assert ((wrong - expected).abs().max() / expected.abs().max()) > 1e-4


def test_no_point_no_convergence() -> None:
    data = problem(False)
    f = data.f.clone()
    f[0, 1] = -100.0
    point = InteriorPoint().solve_barrier(data._replace(f=f), N, 1e-2)
    assert point.converged.tolist() == [False] + [True] * (N - 1)
    assert torch.isfinite(point.z).all()


def test_on_a_device_that_is_not_there() -> None:
    with FakeTensorMode():
        tensors = [torch.empty(*s, dtype=torch.float64, device="cuda") for s in ((1, 4, 4), (3, 4), (3, 5, 4), (3, 5))]
        bound = torch.empty(1, 4, dtype=torch.float64, device="cuda")
        point = InteriorPoint(check_every=0, max_iter=2).solve_barrier(Data(*tensors, bound, None, 2), 3, 0.1)
    assert {part.device.type for part in point} == {"cuda"}
