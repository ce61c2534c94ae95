"""The compiled solver with bounds lb ≤ z ≤ ub: the answers of PyTorch's tensors, of rows of G, and of other solvers."""

from __future__ import annotations

from pathlib import Path

import cvxpy
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError

import implicit_layers as il
from implicit_layers import reference
from implicit_layers.qp import derivative
from implicit_layers.solvers import compiled
from implicit_layers.testing import check_gradients
from tests.compiled_problems import (
    BACKENDS,
    BOUNDS,
    DUALS,
    INSTRUCTIONS,
    POINT,
    Data,
    answer,
    both,
    boxed,
    call,
    disagreement,
    layout,
    relative,
    require_kernel,
    spoil,
    take_instructions,
)
from tests.differences import both_orders

ROOT = Path(__file__).parent.parent
SIZES = [(1, 0, 0), (2, 1, 1), (5, 0, 0), (6, 0, 2), (10, 10, 3), (23, 60, 5), (40, 7, 20), (9, 4, 9)]
SIDES = [("lb",), ("ub",), BOUNDS]
COMPILED = il.InteriorPoint()


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[compiled.Settled | None]:
    """What the kernel made of each batch, and None for each of its backward passes."""
    require_kernel()
    seen: list[compiled.Settled | None] = []
    solve, adjoint = compiled.solve, compiled.adjoint

    def spy_solve(*args: object, **options: object) -> compiled.Settled:
        made = solve(*args, **options)  # type: ignore[arg-type]
        seen.append(made)
        return made

    def spy_adjoint(*args: object) -> object:
        made = adjoint(*args)  # type: ignore[arg-type]
        seen.extend([] if made is None else [None])
        return made

    monkeypatch.setattr(compiled, "solve", spy_solve)
    monkeypatch.setattr(compiled, "adjoint", spy_adjoint)
    return seen


def counts(settled: list[compiled.Settled | None]) -> list[int]:
    """How many programs each solve settled, and -1 for a backward pass."""
    return [-1 if one is None else one.number for one in settled]


def agree(data: Data, within: float = 1e-10, **options: object) -> None:
    errors = disagreement(*both(data, **options))
    assert all(error <= within for error in errors.values()), errors


def as_rows(data: Data) -> Data:
    """The same programs with the bounds, all finite, as rows of G."""
    n, batch = data["Q"].shape[-1], data["p"].shape[:-1]
    eye = torch.eye(n, dtype=data["p"].dtype).expand(*batch, n, n)
    rows = [data["G"].expand(*batch, -1, n)] if "G" in data else []
    sides = [data["h"].expand(*batch, -1)] if "h" in data else []
    for name, sign in (("lb", -1.0), ("ub", 1.0)):
        if name in data:
            rows, sides = [*rows, sign * eye], [*sides, sign * data[name].expand(*batch, n)]
    others = {name: data[name] for name in ("Q", "p", "A", "b") if name in data}
    return {**others, "G": torch.cat(rows, dim=-2), "h": torch.cat(sides, dim=-1)}


# --- the same answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["", "Q", "QAG"])
@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agreement_to_1e_10(
    size: tuple[int, int, int], sides: tuple[str, ...], shared: str, settled: list[compiled.Settled | None]
) -> None:
    data = boxed(*size, (11,), 3, sides=sides, shared=shared)
    settled.clear()
    agree(data)
    assert counts(settled) == [11, -1], "the kernel does these"
    agree({name: tensor.float() for name, tensor in data.items()}, within=4e-6)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (17,)], ids=str)
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_any_batch(batch: tuple[int, ...], sides: tuple[str, ...]) -> None:
    agree(boxed(4, 3, 1, batch, 1, sides=sides))


@pytest.mark.parametrize("seed", range(20))
def test_random_programs_of_any_layout(seed: int) -> None:
    """Nothing known of the solution: random boxes around any point, some without room for the other rows."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 25, (), generator=generator))
    n_ineq, n_eq = (int(torch.randint(0, k, (), generator=generator)) for k in (2 * n, n // 3 + 1))
    data = boxed(n, n_ineq, n_eq, (9,), seed, shared=("", "QAG", "G")[seed % 3], infinite=0.3 * (seed % 2))
    low = torch.randn(9, n, generator=generator, dtype=torch.float64)
    data["lb"] = torch.where(data["lb"].isinf(), data["lb"], low)
    data["ub"] = torch.where(data["ub"].isinf(), data["ub"], low + 3.0 * torch.rand(9, n, generator=generator).double())
    data["p"] = 3.0 * data["p"]
    kinds = ("plain", "strided", "transposed", "negated", "offset")
    data = {name: layout(tensor, kinds[(seed + i) % 5]) for i, (name, tensor) in enumerate(data.items())}
    agree(data, within=1e-8, on_failure="ignore", gradient="least_norm")


@pytest.mark.parametrize("size", [(1, 0, 0), (7, 0, 0), (8, 3, 2), (30, 30, 4)], ids=str)
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_bounds_are_rows_of_the_identity(
    size: tuple[int, int, int], sides: tuple[str, ...], settled: list[compiled.Settled | None]
) -> None:
    """The same programs by the kernel's other forms, and the gradients of what the rows are made of."""
    data = boxed(*size, (9,), 5, sides=sides)
    found = []
    for form in (lambda x: x, as_rows):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in data.items()}
        solution = call(form(leaves), COMPILED)
        loss = (solution.z**3).sum() + solution.value.sum()
        k = size[1]
        if form is as_rows:
            duals = solution.lam[:, k:]
        else:
            duals = torch.cat([getattr(solution, f"lam_{name}") for name in sides], dim=-1)
        loss = loss + (duals * torch.linspace(1, 2, duals.shape[-1], dtype=duals.dtype)).sum()
        found.append([solution.z.detach(), duals.detach(), *torch.autograd.grad(loss, list(leaves.values()))])
    for one, two in zip(*found, strict=True):
        assert relative(one, two) < 1e-10
    assert counts(settled)[-4:] == [9, -1, 9, -1]


@pytest.mark.parametrize("size", [(3, 0, 0), (6, 4, 1), (12, 12, 3)], ids=str)
def test_the_answers_of_a_dense_active_set(size: tuple[int, int, int]) -> None:
    data = boxed(*size, (5,), 2)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in data.items()}
    solution = call(leaves, COMPILED)
    rows = as_rows(leaves)
    exact = reference.exact_qp(reference.program(rows["Q"], rows["p"], **{k: rows[k] for k in rows if k not in "Qp"}))
    for found, expected in ((solution.z, exact.z), (solution.lam_lb, exact.lam[:, -2 * size[0] : -size[0]])):
        assert relative(found, expected) < 1e-11
    weight = torch.linspace(-1, 2, solution.z.numel(), dtype=torch.float64).view(solution.z.shape)
    given = list(leaves.values())
    gradients = [torch.autograd.grad((weight * z).sum(), given, retain_graph=True) for z in (solution.z, exact.z)]
    for name, found, expected in zip(leaves, *gradients, strict=True):
        found, expected = (0.5 * (g + g.mT) if name == "Q" else g for g in (found, expected))
        assert relative(found, expected) < 1e-10, name


@pytest.mark.parametrize("size", [(1, 0, 0), (5, 0, 2), (10, 10, 0), (20, 20, 5)], ids=str)
def test_solutions_and_duals_are_those_of_clarabel(size: tuple[int, int, int]) -> None:
    data = boxed(*size, (3,), 4, infinite=0.3)
    solution = call(data, COMPILED)
    tight = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}
    for i in range(3):
        one = {name: tensor[i].numpy() for name, tensor in data.items()}
        z = cvxpy.Variable(size[0])
        low, high = np.isfinite(one["lb"]), np.isfinite(one["ub"])
        bounds = [z[low] >= one["lb"][low], z[high] <= one["ub"][high]]
        rows = [one[k] @ z == one[side] for k, side in [("A", "b")] if k in one]
        rows += [one[k] @ z <= one[side] for k, side in [("G", "h")] if k in one]
        cost = 0.5 * cvxpy.quad_form(z, cvxpy.psd_wrap(0.5 * (one["Q"] + one["Q"].T))) + one["p"] @ z
        cvxpy.Problem(cvxpy.Minimize(cost), [*bounds, *rows]).solve(solver=cvxpy.CLARABEL, **tight)
        np.testing.assert_allclose(solution.z[i], z.value, atol=1e-6)
        np.testing.assert_allclose(solution.lam_lb[i].numpy()[low], bounds[0].dual_value, atol=1e-6)
        np.testing.assert_allclose(solution.lam_ub[i].numpy()[high], bounds[1].dual_value, atol=1e-6)


def test_no_curvature_between_unknowns_is_clipping(settled: list[compiled.Settled | None]) -> None:
    """A diagonal Q: the closed form, its duals and its derivative; z is at its bound to the last bit."""
    generator = torch.Generator().manual_seed(0)
    n, batch = 6, 13
    weight = 0.5 + torch.rand(batch, n, generator=generator, dtype=torch.float64)
    y = 2.0 * torch.randn(batch, n, generator=generator, dtype=torch.float64)
    lb, ub = -torch.rand(n, generator=generator, dtype=torch.float64), torch.full((n,), 0.7, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (y, lb, ub)]
    solution = il.solve_qp(torch.diag_embed(weight), -weight * y, lb=lb, ub=ub)
    expected = torch.minimum(torch.maximum(y, lb), ub)
    assert torch.equal(solution.z == lb, expected == lb) and torch.equal(solution.z == ub, expected == ub)
    torch.testing.assert_close(solution.z, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(solution.lam_ub, (weight * (y - ub)).clamp(min=0), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(solution.lam_lb, (weight * (lb - y)).clamp(min=0), rtol=1e-12, atol=1e-13)
    cotangent = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    found, right = (
        torch.autograd.grad((cotangent * z).sum(), leaves, retain_graph=True) for z in (solution.z, expected)
    )
    torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-13)
    assert counts(settled) == [batch, -1]


def test_bounds_broadcast_and_get_the_sum_of_the_gradients(settled: list[compiled.Settled | None]) -> None:
    data = boxed(5, 2, 1, (2, 4), 1)
    wide = data["ub"].amax(dim=(0, 1)) + 0.1
    for ub in (wide, wide.expand(2, 4, 5), wide.expand(2, 1, 5)):
        agree({**data, "ub": ub})
    agree({**data, "lb": data["lb"].amin(0)})
    assert counts(settled)[-2:] == [8, -1]


@pytest.mark.parametrize("seed", range(4))
def test_units_do_not_matter(seed: int, settled: list[compiled.Settled | None]) -> None:
    """Unknowns, cost and rows in units from 1e-8 to 1e8, each program its own; exact, powers of two."""
    data = boxed(6, 8, 2, (5,), seed)
    plain = answer(data, "compiled")
    generator = torch.Generator().manual_seed(seed)

    def units(*shape: int) -> Tensor:
        return 2.0 ** torch.randint(-26, 27, shape, generator=generator).double()

    z, cost, of_a, of_g = units(5, 1), units(5, 1), units(5, 2), units(5, 8)
    moved = dict(data)
    moved["Q"] = data["Q"] * (cost / z).unsqueeze(-1) / z.unsqueeze(-2)
    moved["p"] = data["p"] * cost / z
    for matrix, side, row in (("A", "b", of_a), ("G", "h", of_g)):
        moved[matrix] = data[matrix] * row.unsqueeze(-1) / z.unsqueeze(-2)
        moved[side] = data[side] * row
    for name in BOUNDS:
        moved[name] = data[name] * z
    found = answer(moved, "compiled")
    assert counts(settled)[-4::2] == [5, 5]
    assert plain.solution is not None and found.solution is not None
    assert relative(found.solution.z / z, plain.solution.z) < 1e-10
    for name in DUALS:
        assert relative(getattr(found.solution, name) * z / cost, getattr(plain.solution, name)) < 1e-9


def test_the_rows_that_fit_count_the_bounds(settled: list[compiled.Settled | None]) -> None:
    agree(boxed(150, 5, 3, (2,), 1), within=1e-9)
    assert counts(settled)[-2:] == [2, -1]
    settled.clear()
    large = boxed(150, 150, 0, (2,), 1)
    settled.clear()
    assert call(large, COMPILED).info.converged.all() and not settled


# --- bounds that are none, meet or cross -----------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["", "QAG"])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_infinite_bounds_are_none(sides: tuple[str, ...], shared: str, settled: list[compiled.Settled | None]) -> None:
    data = boxed(9, 7, 2, (19,), 3, sides=sides, shared=shared, infinite=0.5)
    for name in sides:
        assert data[name].isinf().any()
        data[name][4] = -torch.inf if name == "lb" else torch.inf
    settled.clear()
    agree(data, on_failure="ignore")
    assert counts(settled)[0] >= 18, "one may have come out harder"
    solution = call(data, COMPILED)
    for name in sides:
        leaf = {**data, name: data[name].clone().requires_grad_()}
        (gradient,) = torch.autograd.grad((call(leaf, COMPILED).z ** 2).sum(), [leaf[name]])
        assert not gradient[data[name].isinf()].any() and gradient.isfinite().all()
        assert not getattr(solution, f"lam_{name}")[data[name].isinf()].any()


def test_all_bounds_infinite_is_no_bounds(settled: list[compiled.Settled | None]) -> None:
    data = boxed(6, 5, 2, (9,), 3)
    free = {name: tensor for name, tensor in data.items() if name not in BOUNDS}
    open_ = {**free, "lb": torch.full((6,), -torch.inf).double(), "ub": torch.full((9, 6), torch.inf).double()}
    settled.clear()
    one, two = answer(free, "compiled"), answer(open_, "compiled")
    assert counts(settled) == [9, -1, 9, -1]
    assert one.solution is not None and two.solution is not None
    for name in (*POINT, *DUALS):
        assert relative(getattr(two.solution, name), getattr(one.solution, name)) < 1e-11, name
    for name, expected in one.gradients.items():
        assert relative(two.gradients[name], expected) < 1e-11, name
    assert not any(two.gradients[name].any() for name in BOUNDS)
    agree(open_)


HARD = ("fixed", "crossing", "crossing by rounding", "narrow", "outside", "infeasible", "dependent equalities",
        "duplicate", "indefinite", "semidefinite", "zero row", "bound as a row")  # fmt: skip


def harden(data: Data, index: int, how: str) -> Data:
    """Make the bounds of one program special, or the rest of it."""
    data = {name: tensor.clone() for name, tensor in data.items()}
    lb, ub = data["lb"][index], data["ub"][index]
    one = {name: tensor[index] for name, tensor in data.items()}
    z = call(one, il.InteriorPoint(backend="torch")).z
    middle = int(torch.minimum(z - lb, ub - z).argmax())
    if how == "fixed":
        lb[middle] = ub[middle] = z[middle] + 0.01
    elif how == "crossing":
        lb[middle] = ub[middle] + 1.0
    elif how == "crossing by rounding":
        ub[middle] = z[middle] - 0.01
        lb[middle] = torch.nextafter(ub[middle], ub[middle] + 1.0)
    elif how == "narrow":
        lb[middle], ub[middle] = z[middle] - 1e-9, z[middle] + 1e-9
    elif how == "outside":  # no point of the box is on the equality rows
        ub[:] = lb + 1e-3
        data["b"][index] += 100.0
    elif how == "bound as a row":
        data["G"][index, 0], data["h"][index, 0] = 0.0, z[middle] - 0.02
        data["G"][index, 0, middle] = 1.0
        ub[middle] = z[middle] - 0.02
    else:
        return spoil(data, index, how)
    return data


@pytest.mark.parametrize("how", HARD)
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_hard_programs_among_easy_ones(
    how: str, place: int, dtype: torch.dtype, settled: list[compiled.Settled | None]
) -> None:
    easy = boxed(7, 3, 2, (5,), place)
    data = {name: tensor.to(dtype) for name, tensor in harden(easy, place, how).items()}
    if dtype == torch.float32 and how == "crossing by rounding":
        data["lb"][place] = torch.where(
            data["lb"][place] == data["ub"][place],
            data["lb"][place].nextafter(data["ub"][place] + 1),
            data["lb"][place],
        )
    settled.clear()
    one, two = both(data, on_failure="ignore", gradient="least_norm")
    within = 1e-9 if dtype == torch.float64 else 2e-5
    errors = disagreement(one, two)
    assert all(error < within for error in errors.values()), errors
    if how != "indefinite":
        assert counts(settled)[0] >= 4, "the others are the kernel's"
        assert two.solution is not None
        alone = answer({name: tensor.to(dtype) for name, tensor in easy.items()}, "compiled").solution
        assert alone is not None
        others = [i for i in range(5) if i != place]
        for name in (*POINT, *DUALS):
            assert relative(getattr(two.solution, name)[others], getattr(alone, name)[others]) < within, name
        if not two.solution.info.converged[place]:
            assert all(not bool(gradient[place].any()) for gradient in two.gradients.values())
    one, two = both(data, on_failure="raise", gradient="least_norm")
    assert one.error.split("(residual")[0][:60] == two.error.split("(residual")[0][:60]


@pytest.mark.parametrize("side", BOUNDS)
def test_a_bound_that_is_only_just_active(side: str, settled: list[compiled.Settled | None]) -> None:
    """Told, and the derivative is that to one side: with the bound, or without."""
    data = boxed(6, 3, 1, (4,), 1)
    solution = call(data, COMPILED)
    place = int(torch.minimum(solution.z[2] - data["lb"][2], data["ub"][2] - solution.z[2]).argmax())
    sign = 1.0 if side == "ub" else -1.0
    data[side][2, place] = solution.z[2, place]
    settled.clear()
    found = []
    for move in (0.0, 1e-4, -1e-4):  # of the bound: away from the solution, and into it
        leaf = data["p"].clone().requires_grad_()
        moved = data[side].clone()
        moved[2, place] += sign * move
        made = call({**data, "p": leaf, side: moved}, COMPILED, gradient="least_norm")
        assert made.info.degenerate.tolist() == ([0, 0, 1, 0] if move == 0 else [0, 0, 0, 0])
        weight = torch.linspace(1, 2, 24, dtype=torch.float64).view(4, 6)
        found.append(torch.autograd.grad((weight * made.z).sum(), leaf)[0])
    weakly, free, held = found
    assert relative(free, held) > 1e-3
    assert min(relative(weakly, free), relative(weakly, held)) < 1e-9
    assert [int(one.done.sum()) for one in settled if one is not None] == [4, 4, 4]


@pytest.mark.parametrize("how", ["nan lb", "nan ub", "inf lb", "-inf ub"])
def test_refusals_to_the_word(how: str) -> None:
    data = boxed(5, 6, 2, (5,), 0)
    value, name = how.split()
    data[name][3, 2] = float(value)
    one, two = both(data, on_failure="ignore")
    assert one.error.startswith(f"NonFiniteError: {name}[3, 2] is {value}") and two.error == one.error


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("size", [(1, 0, 0), (3, 2, 1)], ids=str)
def test_derivatives_by_finite_differences(size: tuple[int, int, int], sides: tuple[str, ...]) -> None:
    data = boxed(*size, (2,), 3, sides=sides)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        solution = call(dict(zip(data, leaves, strict=True)), COMPILED)
        parts = (solution.z, solution.nu, solution.lam, *(getattr(solution, f"lam_{name}") for name in sides))
        return tuple(part for part in parts if part.numel())

    both_orders(function, *data.values())


@pytest.mark.parametrize("which", range(6))
def test_a_planted_wrong_gradient_is_caught(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = boxed(4, 3, 1, (2,), 2)
    right = compiled.adjoint

    def wrong(*args: object) -> object:
        made = right(*args)  # type: ignore[arg-type]
        if made is not None:
            made[1][which] = 1.01 * made[1][which]
        return made

    monkeypatch.setattr(derivative.compiled, "adjoint", wrong)
    with pytest.raises(GradcheckError):
        check_gradients(
            lambda *leaves: call(dict(zip(data, leaves, strict=True)), COMPILED).z,
            *data.values(),
            second=False,
            forward_mode=False,
        )


def transformed(solver: il.InteriorPoint) -> dict[str, object]:
    """Every way to differentiate, of a function of p, Q and ub."""
    data = boxed(3, 2, 1, (2,), 3)
    rows = {name: data[name] for name in ("A", "b", "G", "h", "lb")}
    p, Q, ub = data["p"], data["Q"], data["ub"]
    d_p = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape)
    func = torch.func

    def z(p: Tensor, Q: Tensor, ub: Tensor) -> Tensor:
        solution = il.solve_qp(Q, p, **rows, ub=ub, solver=solver)
        return torch.cat([solution.z, solution.lam_ub], dim=-1)

    def cost(p: Tensor, Q: Tensor, ub: Tensor) -> Tensor:
        return (z(p, Q, ub) ** 3).sum()

    def one(p: Tensor, Q: Tensor, ub: Tensor, *rest: Tensor) -> Tensor:
        return il.solve_qp(Q, p, ub=ub, **dict(zip(rows, rest, strict=True)), solver=solver).z

    found: dict[str, object] = {
        "jacrev": func.jacrev(z, argnums=(0, 2))(p, Q, ub),
        "jacfwd": func.jacfwd(z, argnums=(0, 2))(p, Q, ub),
        "hessian": func.hessian(cost, argnums=(0, 2))(p, Q, ub),
        "jacrev of jacrev": func.jacrev(func.jacrev(cost), argnums=2)(p, Q, ub),
        "jvp of grad": func.jvp(lambda x: func.grad(cost, argnums=1)(x, Q, ub), (p,), (d_p,))[1],
        "vmap": func.vmap(one)(p, Q, ub, *rows.values()),
        "vmap of grad": func.vmap(func.grad(lambda *t: one(*t).pow(3).sum(), argnums=2))(p, Q, ub, *rows.values()),
    }
    leaves = [p.clone().requires_grad_(), Q.clone().requires_grad_(), ub.clone().requires_grad_()]
    first = torch.autograd.grad(cost(*leaves), leaves, create_graph=True)
    found["create_graph"] = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
    with forward_ad.dual_level():
        moved = cost(forward_ad.make_dual(leaves[0], d_p), leaves[1], leaves[2])
        gradient = torch.autograd.grad(moved, leaves[2])[0]
        found["forward over reverse"] = forward_ad.unpack_dual(gradient).tangent
    output = z(*leaves)
    found["batched cotangents"] = torch.autograd.grad(
        output, leaves, torch.stack([torch.ones_like(output), output.detach()]), is_grads_batched=True
    )
    return found


def test_all_transforms_agree() -> None:
    one, two = (transformed(il.InteriorPoint(backend=backend)) for backend in BACKENDS)  # type: ignore[arg-type]
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_second_derivatives_of_a_batch_of_two_kinds() -> None:
    """One program has a fixed unknown and goes to PyTorch; all then have the other form's factor."""
    data = harden(boxed(4, 2, 1, (3,), 1), 1, "fixed")

    def function(p: Tensor, lb: Tensor) -> Tensor:
        return call({**data, "p": p, "lb": lb - (lb - data["lb"]) * (data["lb"] == data["ub"])}, COMPILED).z

    both_orders(function, data["p"], data["lb"])


def test_warm_starts(settled: list[compiled.Settled | None]) -> None:
    data = boxed(12, 10, 2, (9,), 5)
    first = call(data, COMPILED)
    moved = {**data, "p": data["p"] + 1e-3}
    swapped = first._replace(lam_lb=first.lam_ub, lam_ub=first.lam_lb, lam=first.lam.flip(-1))
    everything = first._replace(lam_ub=torch.ones_like(first.lam_ub))
    for begin in (first, swapped, everything):
        agree(moved, warm_start=begin)
    settled.clear()
    again = call(data, COMPILED, warm_start=first)
    assert counts(settled) == [9] and not again.info.iterations.any()
    alone = {name: tensor for name, tensor in data.items() if name != "ub"}
    agree(alone, warm_start=first)  # names sides that are not there


def test_inside_a_compiled_function() -> None:
    data = boxed(3, 2, 1, (2,), 0)
    leaves = [data[name].clone().requires_grad_() for name in ("p", "Q", "ub")]
    rows = {name: data[name] for name in ("A", "b", "G", "h", "lb")}

    def cost(p: Tensor, Q: Tensor, ub: Tensor) -> Tensor:
        solution = il.solve_qp(Q, p, **rows, ub=ub)
        return (solution.z**3).sum() + solution.lam_ub.sum()

    expected = torch.autograd.grad(cost(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(cost, backend="aot_eager")(*leaves), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("tol", [1e-14, 1e-3])
def test_tolerances_agree(tol: float) -> None:
    agree(boxed(6, 9, 1, (5,), 2), within=1e-9, on_failure="ignore", tol=tol)


@pytest.mark.parametrize("max_iter", [1, 2, 3])
def test_a_cap_on_iterations_is_kept(max_iter: int) -> None:
    """What has an answer by then has the right one; how far others come is each way's own."""
    data = boxed(20, 19, 1, (15,), 2)
    whole = call(data, COMPILED)
    solution = call(data, il.InteriorPoint(max_iter=max_iter), on_failure="ignore")
    good = solution.info.converged
    assert int(solution.info.iterations.max()) <= max_iter and good.any()
    for name in (*POINT, *DUALS):
        assert relative(getattr(solution, name)[good], getattr(whole, name)[good]) < 1e-10, name


# --- deterministic, alone as side by side, with any instructions -----------------------------------------------------


@pytest.mark.parametrize("shared", ["", "QAG"])
def test_any_number_of_threads_gives_the_same_bits(shared: str) -> None:
    data = boxed(12, 9, 2, (70,), 1, shared=shared, infinite=0.2)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = answer(data, "compiled")
            own = [gradient for name, gradient in made.gradients.items() if name not in shared]
            found.append([*(getattr(made.solution, name) for name in (*POINT, *DUALS)), *own])
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))
    finally:
        torch.set_num_threads(before)


def parts_of(data: Data) -> list[Tensor]:
    """Point, duals and gradients of a sum that does not depend on the batch."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in data.items()}
    solution = call(leaves, COMPILED)
    parts = [getattr(solution, name) for name in (*POINT, *DUALS)]
    loss = sum(
        (part * torch.linspace(1, 2, part.shape[-1]).double()).sum()
        for part in parts
        if part.ndim > solution.value.ndim
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [*(part.detach() for part in parts), *gradients]


def worst_of_sizes(n: int) -> float:
    """The largest difference of eight side by side and some of them alone, relative to the largest entry."""
    worst = 0.0
    for n_eq in {0, n // 3}:
        for n_ineq in (0, 2, n):
            data = boxed(n, n_ineq, n_eq, (11,), n + n_ineq, sides=SIDES[(n + n_ineq) % 3], infinite=0.2)
            together = parts_of(data)
            for i in (0, 5, 10):
                alone = parts_of({name: tensor[i] for name, tensor in data.items()})
                worst = max(worst, *(relative(one, many[i]) for one, many in zip(alone, together, strict=True)))
    return worst


@pytest.mark.parametrize("n", [*range(1, 19), 24, 33])
def test_alone_as_side_by_side(n: int) -> None:
    assert worst_of_sizes(n) < 1e-11


SETS = [  # sizes, sides, what is shared, and the type
    ((3, 4, 1), BOUNDS, "", torch.float64),
    ((20, 3, 5), ("ub",), "QG", torch.float64),
    ((10, 50, 0), ("lb",), "", torch.float64),
    ((17, 0, 3), BOUNDS, "QAG", torch.float64),
    ((13, 9, 2), BOUNDS, "QAG", torch.float32),
    ((1, 0, 0), BOUNDS, "", torch.float64),
]


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_all_instruction_sets_agree(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: list[compiled.Settled | None]
) -> None:
    take_instructions(name, tmp_path, monkeypatch)
    for seed, (size, sides, shared, dtype) in enumerate(SETS):
        data = boxed(*size, (13,), seed, sides=sides, shared=shared, infinite=0.2)
        settled.clear()
        one, two = both({k: t.to(dtype) for k, t in data.items()})
        assert counts(settled) == [13, -1]
        for part in (*POINT, *DUALS):
            error = relative(getattr(two.solution, part), getattr(one.solution, part))
            assert error < (1e-10 if dtype == torch.float64 else 1e-5), (seed, part)
        for given, right in one.gradients.items():
            error = relative(two.gradients[given], right)
            assert error < (1e-10 if dtype == torch.float64 else 1e-5), (seed, given)
