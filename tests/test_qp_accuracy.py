"""Programs whose size hides their answer: a long cost against ill-conditioned rows, odd units, repeated rows.

Points are known in closed form; certificates are computed here, in the units of the data.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import implicit_layers as il
from implicit_layers.solvers import compiled

DOUBLE = torch.float64
BACKENDS = ["torch", pytest.param("auto", id="with the kernel")]


def solver(backend: str) -> il.InteriorPoint:
    return il.InteriorPoint(backend=backend)  # type: ignore[arg-type]


def pinned_down(size: float, spread: float, seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """Twenty programs with as many equalities as unknowns, of condition 10**spread, and a cost of that size; z = z⁰."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    n, m, batch = 6, 4, 20
    left, right = (torch.linalg.qr(draw(batch, n, n))[0] for _ in range(2))
    A = (left * torch.logspace(0, -spread, n, dtype=DOUBLE)) @ right.mT
    z = draw(batch, n)
    G = draw(batch, m, n)
    h = (G @ z[..., None])[..., 0] + 0.1 * torch.rand(batch, m, generator=generator, dtype=DOUBLE)
    data = {"Q": torch.eye(n, dtype=DOUBLE), "p": size * draw(batch, n), "A": A, "b": (A @ z[..., None])[..., 0]}
    return data | {"G": G, "h": h}, z


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "spread"), [(1.0, 5), (1e6, 5), (1e8, 4), (1e10, 3)])
def test_equalities_that_determine_z_are_not_hidden_by_a_long_cost(size: float, spread: int, backend: str) -> None:
    data, z = pinned_down(size, spread)
    data["b"].requires_grad_()
    solution = il.solve_qp(**data, solver=solver(backend), gradient="least_norm")
    (by_b,) = torch.autograd.grad(solution.z.sum(), data["b"])
    exact = torch.linalg.solve(data["A"].mT, torch.ones_like(z))
    assert solution.info.converged.all() and not (solution.info.degenerate & int(il.Degeneracy.DEPENDENT)).any()
    assert (solution.z - z).abs().max() < 1e-11 * 10**spread
    assert ((by_b - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 1e-9
    assert (solution.lam == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slack_is_weak_in_its_own_units_and_not_in_those_of_the_cost(backend: str) -> None:
    one = torch.ones(1, 1, dtype=DOUBLE)

    def flag(h: float) -> int:
        data = {"Q": one, "p": 1e8 * one[0], "A": one, "b": 0 * one[0], "G": one, "h": h * one[0]}
        return int(il.solve_qp(**data, solver=solver(backend)).info.degenerate)

    assert flag(1e-3) == 0
    assert flag(0.0) == int(il.Degeneracy.DEPENDENT)  # z = 0 twice


def repeated(seed: int, n: int = 3, others: int = 0) -> dict[str, Tensor]:
    """A row of G twice, in units that differ by ten, and others."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    half, row = draw(n, n), draw(1, n)
    G = torch.cat([row, 10.0 * row, draw(others, n)])
    h = torch.cat([torch.tensor([0.3, 3.0], dtype=DOUBLE), 0.5 + draw(others).abs()])
    return {"Q": half @ half.mT / n + 0.1 * torch.eye(n, dtype=DOUBLE), "p": 2 * draw(n), "G": G, "h": h}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("others", [0, 2])
def test_a_repeated_row_shares_its_dual_and_its_derivative(others: int, backend: str) -> None:
    """Whatever the units, both backends: equal parts of the pull; without the repetition the same point and sum."""
    shared = 0
    for seed in range(60):
        data = repeated(seed, others=others)
        once = data | {"G": data["G"][1:], "h": data["h"][1:]}
        single = il.solve_qp(**once)
        data["h"].requires_grad_(), once["h"].requires_grad_()
        solution = il.solve_qp(**data, solver=solver(backend), gradient="least_norm")
        (by_h,) = torch.autograd.grad(solution.z.sum(), data["h"])
        (expected,) = torch.autograd.grad(il.solve_qp(**once).z.sum(), once["h"])
        assert torch.allclose(solution.z, single.z, atol=1e-10)
        if single.lam[0] < 1e-6:
            assert solution.info.degenerate == 0
            continue
        shared += 1
        assert solution.info.degenerate == int(il.Degeneracy.DEPENDENT)
        first, second = solution.lam[:2].tolist()
        assert first == pytest.approx(10 * second, rel=1e-3)
        assert first + 10 * second == pytest.approx(10 * float(single.lam[0]), rel=1e-9)
        assert by_h[0] == pytest.approx(10 * float(by_h[1]), rel=1e-3, abs=1e-4)
        assert by_h[0] + 10 * by_h[1] == pytest.approx(10 * float(expected[0]), abs=1e-8)
        assert torch.allclose(by_h[2:], expected[1:], atol=1e-8)
    assert shared >= 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_inequalities_tight_where_equalities_determine_z_depend_on_them(backend: str) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        A, G, z, p = (torch.randn(*s, generator=generator, dtype=DOUBLE) for s in ((2, 2), (3, 2), (2,), (2,)))
        b = (A @ z).requires_grad_()
        solution = il.solve_qp(
            torch.eye(2, dtype=DOUBLE), p, A=A, b=b, G=G, h=G @ z, solver=solver(backend), on_failure="ignore"
        )
        if not solution.info.converged:  # the sides are rounded: infeasible by that much
            continue
        assert solution.info.degenerate == int(il.Degeneracy.DEPENDENT)
        assert torch.allclose(solution.z, z, atol=1e-9)


@pytest.mark.parametrize("exponent", [-36, -24, -12, -6, 0, 6, 7, 8, 9, 10, 12, 24, 36])
@pytest.mark.parametrize("kind", ["G", "A"])
def test_the_unit_of_a_row_does_not_matter_in_native_float32(kind: str, exponent: int) -> None:
    """The unit of one row alone, whatever it is: z = (1/2, 1/2)."""
    eye, unit = torch.eye(2), 10.0**exponent
    rows, sides = torch.stack([eye[0], unit * eye[1]]), torch.tensor([0.5, 0.5 * unit])
    data = {"G": rows, "h": sides} if kind == "G" else {"A": rows, "b": sides}
    solution = il.solve_qp(eye, -torch.ones(2), **data, solver=il.InteriorPoint(precision="native"))
    assert torch.allclose(solution.z, torch.tensor([0.5, 0.5]), atol=1e-6)
    duals = (solution.lam if kind == "G" else solution.nu) * torch.tensor([1.0, unit])
    assert torch.allclose(duals, torch.tensor([0.5, 0.5]), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exponent", [-300, -200, -165, -155, -100, -60, 60, 100, 155, 200, 290])
@pytest.mark.parametrize("rows", ["all of G", "one of G", "all of A", "one of A"])
def test_rows_whose_squares_are_no_numbers(rows: str, exponent: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    n, m, k = 5, 6, 2
    half, A, G, p, z = (
        torch.randn(*s, generator=generator, dtype=DOUBLE) for s in ((n, n), (k, n), (m, n), (n,), (n,))
    )
    h = G @ z + torch.rand(m, generator=generator, dtype=DOUBLE)
    data = {"Q": half @ half.mT / n + 0.1 * torch.eye(n, dtype=DOUBLE), "p": p, "A": A, "b": A @ z, "G": G, "h": h}
    reference = il.solve_qp(**data)
    unit = {"G": torch.ones(m, dtype=DOUBLE), "A": torch.ones(k, dtype=DOUBLE)}
    unit[rows[-1]][: None if rows.startswith("all") else 1] = 10.0**exponent
    scaled = data | {
        "A": A * unit["A"][:, None],
        "b": data["b"] * unit["A"],
        "G": G * unit["G"][:, None],
        "h": h * unit["G"],
    }
    solution = il.solve_qp(**scaled, solver=solver(backend))
    assert torch.allclose(solution.z, reference.z, atol=1e-9)
    for dual, old, factor in ((solution.nu, reference.nu, unit["A"]), (solution.lam, reference.lam, unit["G"])):
        assert torch.allclose(dual * factor, old, atol=1e-9)


@pytest.mark.parametrize("form", ["condensed", "dual"])
@pytest.mark.parametrize("off", [0.0, 1e-12, 1e-9, 1e-6])
def test_more_active_rows_than_unknowns_depend_on_each_other(off: float, form: str) -> None:
    generator = torch.Generator().manual_seed(17)
    G, inside = (torch.randn(*s, generator=generator, dtype=DOUBLE) for s in ((6, 64, 8), (6, 8)))
    h = (G @ inside[..., None])[..., 0] + torch.rand(6, 64, generator=generator, dtype=DOUBLE)
    G[:, 32:] = G[:, :32] + off * torch.randn(6, 32, 8, generator=generator, dtype=DOUBLE)
    h[:, 32:] = h[:, :32] + off
    p = 3.0 * torch.randn(6, 8, generator=generator, dtype=DOUBLE)
    solution = il.solve_qp(torch.eye(8, dtype=DOUBLE), p, G=G, h=h, solver=il.InteriorPoint(form=form, backend="torch"))
    many = (solution.lam > 1e-9).sum(-1) > 8
    assert (solution.info.degenerate[many] & int(il.Degeneracy.DEPENDENT) > 0).all()
    if off == 0.0:
        assert many.any()


@pytest.mark.parametrize(
    ("name", "warned"), [("bogus", True), ("AVX2", True), ("best", False), ("basic", False), ("none", False)]
)
def test_a_kernel_that_is_not_there_is_warned_of(name: str, warned: bool) -> None:
    if compiled.description().startswith("none"):
        warned = False  # without a kernel there is none to choose
    code = (
        "import warnings; warnings.simplefilter('ignore', FutureWarning); from implicit_layers.solvers import compiled"
    )
    code += "; print(compiled.description())"
    environment = {**os.environ, "IMPLICIT_LAYERS_KERNEL": name, "PYTHONPATH": str(Path(il.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ("ImplicitLayersWarning: IMPLICIT_LAYERS_KERNEL" in done.stderr) == warned
    assert not warned or "none of best, avx512, avx2, basic, none" in done.stderr
    if not compiled.description().startswith("none"):
        assert done.stdout.startswith("none: switched off" if name == "none" else "basic" if name == "basic" else "")
