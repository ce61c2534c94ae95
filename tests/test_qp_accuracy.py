"""Programs whose size hides their answer: a long cost against ill-conditioned rows, odd units, repeated rows.

Points are known in closed form; certificates are computed here, in the units of the data.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import implicit_layers as il

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
