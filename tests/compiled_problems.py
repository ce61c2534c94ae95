"""Random programs of every kind and layout, and both backends' answers side by side."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import implicit_layers as il
from implicit_layers.solvers import compiled
from implicit_layers.testing import random_qp

NAMES = ("Q", "p", "A", "b", "G", "h")
BOUNDS = ("lb", "ub")
POINT = ("z", "nu", "lam", "s", "value")
DUALS = ("lam_lb", "lam_ub")  # of the bounds: zero where there are none
BACKENDS = ("torch", "compiled")

INSTRUCTIONS = ("best", "avx2", "basic")

Data = dict[str, Tensor]


class Answer(NamedTuple):
    """What one backend makes of a batch of programs."""

    solution: il.QPSolution | None
    gradients: Data
    error: str


def require_kernel() -> None:
    """Fail, where a test would otherwise be silently without what it tests."""
    assert compiled._kernel is not None, f"no kernel: {compiled.description()}; python setup.py build_ext --inplace"


def take_instructions(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solve by another copy of the kernel until the test ends: it chooses its instructions as it is loaded."""
    require_kernel()
    full, file = compiled._kernel.__name__, Path(compiled._kernel.__file__)
    monkeypatch.setitem(sys.modules, full, compiled._kernel)  # put back afterwards, as loading replaces it
    monkeypatch.setenv("IMPLICIT_LAYERS_KERNEL", name)
    (folder / name).mkdir(exist_ok=True)
    spec = importlib.util.spec_from_file_location(full, shutil.copy(file, folder / name))
    assert spec is not None and spec.loader is not None
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    kernel.prepare(*compiled._ASKED)
    assert kernel is not compiled._kernel and (name not in INSTRUCTIONS[1:] or kernel.describe()[0] in (name, "basic"))
    monkeypatch.setattr(compiled, "_kernel", kernel)


def relative(found: Tensor, expected: Tensor, floor: float = 1.0) -> float:
    """Largest difference over the largest entry, NaN and infinities being equal to themselves."""
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    size = expected[expected.isfinite()].abs().max() if bool(expected.isfinite().any()) else expected.new_ones(())
    return float(torch.where(same, 0.0, (found - expected).abs()).max() / size.clamp(min=floor))


def call(leaves: Data, solver: il.InteriorPoint, **options: Any) -> il.QPSolution:
    rows = {name: leaf for name, leaf in leaves.items() if name not in ("Q", "p")}
    return il.solve_qp(leaves["Q"], leaves["p"], **rows, solver=solver, **options)


def answer(
    data: Mapping[str, Tensor], backend: str, wanted: tuple[str, ...] = (*NAMES, *BOUNDS), **options: Any
) -> Answer:
    """Solve and differentiate a weighted sum of everything."""
    setting = {name: options.pop(name) for name in ("tol", "max_iter", "form", "precision") if name in options}
    solver = il.InteriorPoint(backend=backend, **setting)  # type: ignore[arg-type]
    leaves = {
        name: tensor.detach().requires_grad_() if name in wanted else tensor.detach() for name, tensor in data.items()
    }
    try:
        solution = call(leaves, solver, **options)
    except il.ImplicitLayersError as error:
        return Answer(None, {}, f"{type(error).__name__}: {error}")
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=solution.z.dtype)
    for name in (*POINT, *DUALS):
        part = getattr(solution, name)
        weight = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part)
        loss = loss + (weight * part).sum()
    inputs = [leaf for leaf in leaves.values() if leaf.requires_grad]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True) if inputs else ()
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    return Answer(solution, {k: g for k, g in zip(names, gradients, strict=True) if g is not None}, "")


def both(data: Mapping[str, Tensor], **options: Any) -> tuple[Answer, Answer]:
    reference, kernel = (answer(data, backend, **dict(options)) for backend in BACKENDS)
    return reference, kernel


def disagreement(reference: Answer, kernel: Answer) -> dict[str, float]:
    """The errors of everything that must agree to rounding; failed programs' points do not count."""
    assert kernel.error == reference.error
    if reference.solution is None or kernel.solution is None:
        return {}
    one, two = reference.solution, kernel.solution
    for field in ("status", "converged", "degenerate"):
        found, expected = getattr(two.info, field), getattr(one.info, field)
        assert torch.equal(found, expected), (field, found, expected)
    good = one.info.converged
    errors = {}
    for name in (*POINT, *DUALS):
        found, expected = getattr(two, name), getattr(one, name)
        assert found.shape == expected.shape and found.dtype == expected.dtype, name
        errors[name] = relative(found[good], expected[good])
    assert kernel.gradients.keys() == reference.gradients.keys()
    for name, expected in reference.gradients.items():
        assert kernel.gradients[name].shape == expected.shape, name
        errors[f"d{name}"] = relative(kernel.gradients[name], expected)
    return errors


def draw(
    n: int, n_ineq: int, n_eq: int, batch: tuple[int, ...], seed: int, *, shared: str = "", condition: float = 100.0
) -> Data:
    """Programs with known solutions; the matrices named in `shared` belong to the whole batch ("QAG").

    At most half of the unknowns are held by active inequalities: vertices may be as ill-conditioned as they like.
    """
    active = min(0.3, 0.5 * (n - n_eq) / n_ineq) if n_ineq else 0.0
    base = random_qp(n, n_ineq, n_eq, seed=seed, condition=condition, active=active)._asdict()
    own = random_qp(n, n_ineq, n_eq, batch=batch, seed=seed + 1000, condition=condition, active=active)._asdict()
    data = {name: base[name] if name in shared else own[name] for name in ("Q", "A", "G")}
    point = own["z"].unsqueeze(-1)
    slack = torch.where(own["lam"] > 0, 0.0, own["h"] - (own["G"] @ point).squeeze(-1))
    pulled = data["Q"] @ point + data["A"].mT @ own["nu"].unsqueeze(-1) + data["G"].mT @ own["lam"].unsqueeze(-1)
    data["p"] = -pulled.squeeze(-1)
    data["b"] = (data["A"] @ point).squeeze(-1)
    data["h"] = (data["G"] @ point).squeeze(-1) + slack
    skew = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    data["Q"] = data["Q"] + (skew - skew.mT)  # only the symmetric part counts
    if n_eq == 0:
        del data["A"], data["b"]
    if n_ineq == 0:
        del data["G"], data["h"]
    return {name: data[name] for name in NAMES if name in data}


def boxed(
    n: int,
    n_ineq: int,
    n_eq: int,
    batch: tuple[int, ...],
    seed: int,
    *,
    sides: tuple[str, ...] = BOUNDS,
    shared: str = "",
    condition: float = 10.0,
    infinite: float = 0.0,
) -> Data:
    """The programs of `draw` with bounds, of which about a quarter holds its unknown; some are infinite.

    The solution stays: what is added to p is the dual of a bound. Beside rows that are active, at most half of the
    unknowns that these leave is held.
    """
    data = draw(n, n_ineq, n_eq, batch, seed, shared=shared, condition=condition)
    z = call(data, il.InteriorPoint(backend="torch")).z
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(z.shape, generator=generator, dtype=torch.float64)

    order = uniform().argsort(-1).argsort(-1)
    held = order < (n - n_eq) / 4
    upper = (uniform() < 0.5) if len(sides) == 2 else torch.full_like(held, sides == ("ub",))
    dual, away = 0.1 + uniform(), 0.1 + uniform()
    data["p"] = data["p"] - torch.where(held, torch.where(upper, dual, -dual), 0.0)
    none = ~held & (uniform() < infinite)
    if "lb" in sides:
        data["lb"] = torch.where(held & ~upper, z, z - away).masked_fill(
            none | (uniform() < 0.5 * infinite) & ~held, -torch.inf
        )
    if "ub" in sides:
        data["ub"] = torch.where(held & upper, z, z + away + uniform()).masked_fill(none, torch.inf)
    return data


def layout(tensor: Tensor, kind: str) -> Tensor:
    """The same numbers, lying in memory otherwise."""
    if kind == "strided":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
    if kind == "transposed" and tensor.ndim > 1:
        return tensor.mT.contiguous().mT
    if kind == "negated":
        return (-tensor).clone()._neg_view()
    if kind == "offset":
        return torch.cat([tensor.new_full((3,), torch.nan), tensor.flatten()])[3:].view(tensor.shape)
    return tensor


def spoil(data: Data, index: int, how: str) -> Data:
    """Make one program of a batch (of one dimension, nothing shared) hard, or one without a solution."""
    data = {name: tensor.clone() for name, tensor in data.items()}
    Q, G, h = data["Q"][index], data["G"][index], data["h"][index]
    if how == "infeasible":
        G[1], h[0], h[1] = -G[0], -1.0, -1.0
    elif how == "dependent equalities":
        data["A"][index, 1], data["b"][index, 1] = 2.0 * data["A"][index, 0], 2.0 * data["b"][index, 0]
    elif how == "contradicting equalities":
        data["A"][index, 1], data["b"][index, 1] = data["A"][index, 0], data["b"][index, 0] + 1.0
    elif how == "duplicate":
        G[1], h[1] = G[0], h[0]
    elif how == "weak":  # a row through the solution, without a dual
        (z,) = (answer({name: t[index] for name, t in data.items()}, "torch").solution.z,)  # type: ignore[union-attr]
        h.copy_(torch.where((G @ z) - h > -1e-9, h, h))
        slack = h - G @ z
        loose = int(slack.argmax())
        h[loose] = G[loose] @ z
    elif how == "indefinite":
        Q -= 10.0 * torch.eye(Q.shape[-1], dtype=Q.dtype)
    elif how == "semidefinite":
        Q[-1, :], Q[:, -1] = 0.0, 0.0
    elif how == "unbounded":
        Q[-1, :], Q[:, -1], G[:, -1], data["A"][index, :, -1] = 0.0, 0.0, 0.0, 0.0
        data["p"][index, -1] = 1.0
    elif how == "no row":
        h[0] = torch.inf
    elif how == "zero row":
        G[0], h[0] = 0.0, 1.0
    elif how == "zero row, zero side":
        G[0], h[0] = 0.0, 0.0
    elif how == "zero row, infeasible":
        G[0], h[0] = 0.0, -1.0
    elif how == "zero equality":
        data["A"][index, 0], data["b"][index, 0] = 0.0, 0.0
    elif how == "zero data":
        for tensor in data.values():
            tensor[index] = 0.0
        Q += torch.eye(Q.shape[-1], dtype=Q.dtype)
    elif how == "slab":
        G[1], h[1] = -G[0], -h[0]
    elif how.startswith("nan "):
        tensor = data[how[4:]][index]
        tensor.view(-1)[-1] = torch.nan
    elif how.startswith("inf "):
        data[how[4:]][index].view(-1)[-1] = torch.inf
    elif how.startswith("-inf "):
        data[how[5:]][index].view(-1)[-1] = -torch.inf
    else:
        raise ValueError(how)
    return data


HARD = (
    "infeasible", "dependent equalities", "contradicting equalities", "duplicate", "weak", "indefinite",
    "semidefinite", "unbounded", "no row", "zero row", "zero row, zero side", "zero row, infeasible", "zero equality",
    "zero data", "slab",
)  # fmt: skip
REFUSED = tuple(
    f"{value} {name}" for value in ("nan", "inf", "-inf") for name in NAMES if (value, name) != ("inf", "h")
)
