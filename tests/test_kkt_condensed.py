"""The condensed KKT system on an active set, against dense algebra: regular, singular, elastic, with a barrier."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from implicit_layers.errors import NotPositiveDefiniteError
from implicit_layers.kkt import condensed, quadratic
from implicit_layers.kkt.program import Data, Program, equilibrate, relative_residual

N, n, m, n_eq = 5, 7, 6, 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def program(kind: str) -> tuple[Data, Tensor, Tensor]:
    """Data of a kind, the active rows and the fixed coordinates."""
    L, E = normal(N, n, n, seed=1), normal(N, m, n, seed=2)
    Q = L @ L.mT + 0.1 * torch.eye(n).double()
    active = torch.ones(N, m, dtype=torch.float64)
    active[:, 4:] = 0.0
    fixed = torch.zeros(N, n, dtype=torch.float64)
    compliance = None
    if kind == "linear vertex":
        Q, fixed[:, :3] = torch.zeros_like(Q), 1.0
    if kind == "linear face":
        Q, fixed[:, :2] = torch.zeros_like(Q), -1.0
    if kind == "flat":
        Q = L[..., :2] @ L[..., :2].mT
    if kind == "duplicated rows":
        E[:, 3] = E[:, 2]
    if kind == "more rows than unknowns":
        active[:], fixed[:, :4] = 1.0, 1.0
    if kind == "elastic":
        compliance = normal(1, m, seed=3).abs()
    if kind == "shared":
        Q, E = Q[:1], E[:1]
    return Data(Q, normal(N, n), E, normal(N, m), None, None, n_eq, compliance), active, fixed


KINDS = [
    "regular",
    "linear vertex",
    "linear face",
    "flat",
    "duplicated rows",
    "more rows than unknowns",
    "elastic",
    "shared",
]


def dense(data: Data, active: Tensor, fixed: Tensor, r_z: Tensor, r_y: Tensor, at: Tensor) -> tuple[Tensor, ...]:
    """The same system by the pseudoinverse of the dense matrix, one problem at a time."""
    found = []
    for i in range(r_z.shape[0]):
        Q, E = (matrix[0 if matrix.shape[0] == 1 else i] for matrix in (data.Q, data.E))
        on, free = active[i] > 0, fixed[i] == 0
        c = E.new_zeros(m) if data.compliance is None else data.compliance[0]
        z, y = torch.where(free, 0.0, at[i]), torch.zeros_like(r_y[i])
        C = E[on][:, free]
        K = torch.cat([torch.cat([Q[free][:, free], C.mT], -1), torch.cat([C, -torch.diag(c[on])], -1)])
        right = torch.cat([(r_z[i] - Q @ z)[free], r_y[i][on] - E[on] @ z])
        u = torch.linalg.pinv(K, hermitian=True, rtol=1e-11) @ right
        z[free], y[on] = u[: int(free.sum())], u[int(free.sum()) :]
        found.append((z, y, torch.where(free, 0.0, r_z[i] - Q @ z - E.mT @ y)))
    return tuple(torch.stack(part) for part in zip(*found, strict=True))


def rights() -> tuple[Tensor, Tensor, Tensor]:
    return normal(N, n, seed=5), normal(N, m, seed=6), normal(N, n, seed=7)


def error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_solution_of_least_norm(kind: str) -> None:
    data, active, fixed = program(kind)
    factor = condensed.factorise(data, active, fixed)
    found = condensed.solve(factor, data.Q, data.E, *rights(), refine=0)
    assert error(found, dense(data, active, fixed, *rights())) < 1e-8
    again = condensed.solve(factor, data.Q, data.E, *rights(), refine=0, project=True)
    assert error(again, found) < 1e-12  # whether the host was asked or not


def test_a_planted_wrong_sign_is_caught() -> None:
    data, active, fixed = program("elastic")
    factor = condensed.factorise(data._replace(compliance=None), active, fixed)
    found = condensed.solve(factor, data.Q, data.E, *rights(), refine=0)
    assert error(found, dense(data, active, fixed, *rights())) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_singular_systems_are_told(kind: str) -> None:
    data, active, fixed = program(kind)
    expected = {"linear face": 1, "flat": 1, "duplicated rows": 2, "more rows than unknowns": 2}.get(kind, 0)
    factor = condensed.factorise(data, active, fixed)
    assert (factor.singular == expected).all()
    estimate = condensed.condition(Program.of(data), factor)
    assert torch.isinf(estimate).all() if expected else ((estimate >= 1.0) & (estimate < 1e6)).all()


def test_nearly_dependent_rows_are_not_singular_and_solved() -> None:
    data, active, fixed = program("regular")
    E = data.E.clone()
    E[:, 3] = E[:, 2] + 1e-4 * E[:, 3]
    data = data._replace(E=E)
    factor = condensed.factorise(data, active, fixed)
    assert not factor.singular.any()
    found = condensed.solve(factor, data.Q, data.E, *rights(), refine=0)
    expected = dense(data, active, fixed, *rights())
    assert error(found, expected) < 1e-5
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max().clamp(min=1)))


def test_condition_of_a_known_matrix() -> None:
    Q = torch.diag(torch.tensor([1.0, 0.5, 1e-2, 1e-1], dtype=torch.float64))[None]
    data = Data(Q, normal(1, 4), torch.zeros(1, 0, 4).double(), torch.zeros(1, 0).double(), None, None, 0)
    factor = condensed.factorise(data, torch.zeros(1, 0), torch.zeros(1, 4))
    assert 80 < float(condensed.condition(Program.of(data), factor)) < 101


def test_stiffness_is_a_diagonal_of_the_matrix() -> None:
    """u_bound = σ (u_z − r_bound) on coordinates with a barrier."""
    data, active, fixed = program("elastic")
    stiffness = torch.tensor([0.0, 1e-6, 1.0, 1e3, 1e6, 0.0, 3.0], dtype=torch.float64)[None]
    factor = condensed.factorise(data, active, fixed, stiffness=stiffness)
    r_z, r_y, at = rights()
    u_z, u_y, u_bound = condensed.solve(factor, data.Q, data.E, r_z, r_y, at, 0)
    whole = data._replace(Q=data.Q + torch.diag_embed(stiffness))
    expected = dense(whole, active, fixed, r_z + stiffness * at, r_y, at)
    assert error((u_z, u_y), expected[:2]) < 1e-9
    left = r_z - quadratic.matvec(data.Q, u_z) - quadratic.transposed_matvec(data.E, u_y)
    assert torch.allclose(left[:, :4], u_bound[:, :4], atol=1e-8)


def test_scaling_is_exact_and_evens_out() -> None:
    """Powers of two, which round nothing; shared matrices are scaled once; similar columns keep one unit."""
    big = 10.0 ** (12 * torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 6)
    L, E = normal(1, n, n), normal(1, m, n, seed=1)
    Q = L @ L.mT
    assert (equilibrate(Q, E).column == equilibrate(Q, E).column[0, 0]).all()
    wild_Q, wild_E = big[:, None] * Q * big, E * big
    scaling = equilibrate(wild_Q, wild_E)
    assert scaling.column.shape == (1, n) and scaling.row.shape == (1, m) and scaling.cost.shape == (1, 1)
    for part in scaling:
        mantissa, _ = torch.frexp(part)
        assert (mantissa == 0.5).all()
    even = scaling.column[..., None] * wild_Q * scaling.column[..., None, :]
    diagonal = even.diagonal(dim1=-2, dim2=-1)
    assert diagonal.max() / diagonal.min() < 1e3
    zero = equilibrate(torch.zeros_like(Q), torch.zeros_like(E))
    assert all((part == 1.0).all() for part in zero)


def test_badly_scaled_system() -> None:
    data, active, fixed = program("regular")
    generator = torch.Generator().manual_seed(0)
    columns = 10.0 ** (12 * torch.rand(1, n, generator=generator, dtype=torch.float64) - 6)
    rows = 10.0 ** (12 * torch.rand(1, m, generator=generator, dtype=torch.float64) - 6)
    wild = data._replace(
        Q=columns[..., None] * data.Q * columns[..., None, :], E=rows[..., None] * data.E * columns[..., None, :]
    )
    r_z, r_y, at = rights()
    u_z, u_y, u_bound = condensed.solve(
        condensed.factorise(wild, active, fixed), wild.Q, wild.E, r_z * columns, r_y * rows, at / columns, 0
    )
    expected = dense(data, active, fixed, r_z, r_y, at)
    assert error((u_z * columns, u_y * rows, u_bound / columns), expected) < 1e-11


def test_residual_is_blind_to_units() -> None:
    data = Data(
        torch.eye(2).double()[None], torch.tensor([[-1.0, -4.0]]).double(), torch.eye(2).double()[None],
        torch.tensor([[2.0, 3.0]]).double(), None, None, 0,
    )  # fmt: skip
    z, y, none = torch.tensor([[1.0, 3.0]]).double(), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1, 2).double()
    assert relative_residual(data, z, y, none) == 0.0
    off = relative_residual(data, z + 1e-3, y, none)
    assert 1e-5 < float(off) < 1e-2
    for scale in (2.0**-30, 2.0**30):
        scaled = data._replace(p=data.p * scale, f=data.f * scale)
        assert torch.equal(relative_residual(scaled, (z + 1e-3) * scale, y * scale, none), off)
        scaled = data._replace(Q=data.Q * scale, p=data.p * scale)
        assert torch.equal(relative_residual(scaled, z + 1e-3, y * scale, none), off)


def test_float32_stays_float32() -> None:
    data, active, fixed = program("regular")
    single = data.to(torch.float32)
    factor = condensed.factorise(single, active, fixed)
    found = condensed.solve(factor, single.Q, single.E, *(part.float() for part in rights()), refine=0)
    assert all(part.dtype == torch.float32 for part in found)
    assert error(tuple(p.double() for p in found), dense(data, active, fixed, *rights())) < 1e-3


def test_indefinite_matrices_are_refused_by_name() -> None:
    L = normal(2, 3, 6, 2)
    good = L @ L.mT  # semidefinite to rounding
    rounding = torch.finfo(torch.float64).eps
    for Q, batch in ((good.reshape(6, 6, 6), (2, 3)), (torch.zeros(1, 4, 4).double(), (7,))):
        assert quadratic.convex(Q, torch.Size(batch), rounding) is Q
    bad = good.clone()
    bad[1, 2] -= 1e-6 * torch.eye(6).double()
    with pytest.raises(NotPositiveDefiniteError, match=r"Q\[1, 2\] is not positive semidefinite.*-1e-06"):
        quadratic.convex(bad.reshape(6, 6, 6), torch.Size((2, 3)), rounding)
    with pytest.raises(NotPositiveDefiniteError, match=r"Q is not"):
        quadratic.convex(bad[1, 2:], torch.Size((5,)), rounding)


def test_on_a_device_that_is_not_there() -> None:
    with FakeTensorMode():
        Q, p = (torch.empty(*shape, dtype=torch.float64, device="cuda") for shape in ((1, n, n), (N, n)))
        E, f = (torch.empty(*shape, dtype=torch.float64, device="cuda") for shape in ((N, m, n), (N, m)))
        factor = condensed.factorise(Data(Q, p, E, f, None, None, n_eq), f, p)
        parts = condensed.solve(factor, Q, E, p, f, p, 0, project=True)
    assert [part.shape for part in parts] == [(N, n), (N, m), (N, n)]
    assert {part.device.type for part in (*factor, *parts)} == {"cuda"}
