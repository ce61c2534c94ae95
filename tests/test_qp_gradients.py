"""`solve_qp`: the optimal value, the choices of derivative, the nearest feasible program, sharing, compilation."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import implicit_layers as il
from implicit_layers.qp import derivative
from implicit_layers.testing import check_gradients, random_qp
from tests.test_qp_forms import boxed, linear, normal, tensor

F64 = torch.float64


# --- the optimal value ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_gradient_of_the_value_takes_no_solve(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    calls = []
    solver = il.InteriorPoint(backend=backend)
    for where, name in ((derivative, "solve_kkt"), (derivative.compiled, "adjoint")):
        right = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *given, right=right: calls.append(1) or right(*given))
    data = {name: t.clone().requires_grad_() for name, t in boxed(5, 4, 1, batch=(3,), seed=1).items()}
    solution = il.solve_qp(**data, solver=solver)
    gradients = dict(zip(data, torch.autograd.grad(solution.value.sum(), list(data.values())), strict=True))
    assert not calls
    with torch.no_grad():
        assert torch.allclose(gradients["p"], solution.z)
        assert torch.allclose(gradients["Q"], 0.5 * solution.z.unsqueeze(-1) * solution.z.unsqueeze(-2))
        assert torch.allclose(gradients["b"], -solution.nu) and torch.allclose(gradients["h"], -solution.lam)
        assert torch.allclose(gradients["lb"], solution.lam_lb) and torch.allclose(gradients["ub"], -solution.lam_ub)
    il.solve_qp(**data, solver=solver).z.sum().backward()
    assert calls


def test_shared_data_get_the_sum_of_the_values_gradients() -> None:
    data = boxed(4, 3, 1, seed=2)
    p = data.pop("p") + 0.1 * normal(0)(5, 4)
    leaves = {name: t.clone().requires_grad_() for name, t in data.items()}
    value = il.solve_qp(p=p, **leaves).value
    total = torch.autograd.grad(value.sum(), list(leaves.values()))
    expected = [torch.zeros_like(t) for t in total]
    for i in range(5):
        one = torch.autograd.grad(il.solve_qp(p=p[i], **leaves).value, list(leaves.values()))
        expected = [x + y for x, y in zip(expected, one, strict=True)]
    assert all(torch.allclose(x, y, atol=1e-11) for x, y in zip(total, expected, strict=True))


# --- choices of derivative ------------------------------------------------------------------------------------------


def test_least_norm_is_the_same_without_the_warning() -> None:
    problem = random_qp(6, 5, 2, seed=2)
    Q, p, A, b, G, h, *_ = problem
    gradients = {}
    for gradient in ("exact", "least_norm"):
        rows = torch.cat([h, h]).requires_grad_()
        solution = il.solve_qp(
            Q, p, A=torch.cat([A, A]), b=torch.cat([b, b]), G=torch.cat([G, G]), h=rows, gradient=gradient
        )
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            (gradients[gradient],) = torch.autograd.grad(solution.z.sum(), rows)
        assert [w.category for w in seen] == ([il.DegenerateGradientWarning] if gradient == "exact" else [])
        assert int(solution.info.degenerate) & il.Degeneracy.DEPENDENT
        assert solution.info.condition > 1e8
    assert torch.allclose(gradients["exact"], gradients["least_norm"], atol=1e-9)
    once, twice = gradients["exact"].split(5)
    assert torch.allclose(once, twice, atol=1e-7)  # of least norm: duplicates share


def test_a_well_posed_problem_has_no_flag_and_a_moderate_condition() -> None:
    problem = random_qp(6, 5, 2, seed=2, condition=10.0)
    Q, p, A, b, G, h, *_ = problem
    for form in ("dual", "condensed"):
        info = il.solve_qp(Q, p, A=A, b=b, G=G, h=h, solver=il.InteriorPoint(form=form)).info
        assert int(info.degenerate) == il.Degeneracy.NONE and 1.0 <= float(info.condition) < 1e4


def smoothed(p: Tensor, lb: float, ub: float, mu: float) -> Tensor:
    """argmin p z − μ log(z − lb) − μ log(ub − z), by bisection."""
    low, high = torch.full_like(p, lb), torch.full_like(p, ub)
    for _ in range(200):
        middle = 0.5 * (low + high)
        slope = p - mu / (middle - lb) + mu / (ub - middle)
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    return low


@pytest.mark.parametrize("mu", [1e-3, 0.1])
def test_smoothed_is_the_derivative_of_the_barrier_problem(mu: float) -> None:
    """n = 1, a linear cost on an interval: closed form; the solution stays that of the program."""
    p = tensor([1.0], [-0.3], [0.02]).requires_grad_()
    lb, ub = tensor(-1.0).requires_grad_(), tensor(2.0).requires_grad_()
    solution = il.solve_qp(torch.zeros(1, 1, dtype=F64), p, lb=lb, ub=ub, gradient="smoothed", smoothing=mu)
    assert torch.allclose(solution.z[:, 0], tensor(-1, 2, -1), atol=1e-9)
    d_p, d_lb, d_ub = torch.autograd.grad(solution.z.sum(), (p, lb, ub))
    step = 1e-5

    def differences(change: str) -> Tensor:
        values = []
        for sign in (1, -1):
            given = {"p": p.detach()[:, 0], "lb": -1.0, "ub": 2.0}
            given[change] = given[change] + sign * step
            values.append(smoothed(**given, mu=mu))
        return (values[0] - values[1]) / (2 * step)

    assert torch.allclose(d_p[:, 0], differences("p"), rtol=1e-4)
    assert torch.allclose(d_lb, differences("lb").sum(), rtol=1e-4)
    assert torch.allclose(d_ub, differences("ub").sum(), rtol=1e-4)


def barrier_minimiser(data: dict[str, Tensor], mu: float) -> Tensor:
    """Damped Newton on the barrier problem with equalities, from an interior point, by plain dense solves."""
    Q, p, A, b, G, h, lb, ub = (data[name] for name in ("Q", "p", "A", "b", "G", "h", "lb", "ub"))
    n, n_eq = len(p), len(b)
    z = data["inside"].clone()
    for _ in range(200):
        s, low, high = h - G @ z, z - lb, ub - z
        gradient = Q @ z + p + mu * (G.mT @ (1 / s) - 1 / low + 1 / high)
        hessian = Q + mu * (G.mT @ (G / s.square()[:, None]) + torch.diag(1 / low**2 + 1 / high**2))
        K = torch.zeros(n + n_eq, n + n_eq, dtype=F64)
        K[:n, :n], K[n:, :n], K[:n, n:] = hessian, A, A.mT
        step = torch.linalg.solve(K, torch.cat([-gradient, b - A @ z]))[:n]
        length = 1.0
        while length > 1e-12:
            trial = z + length * step
            if all((t > 0).all() for t in (h - G @ trial, trial - lb, ub - trial)):
                break
            length *= 0.5
        z = z + min(1.0, 0.99 * length if length < 1 else 1.0) * step
    return z


@pytest.mark.parametrize("quadratic", [False, True])
def test_smoothed_against_finite_differences_of_a_barrier_method(quadratic: bool) -> None:
    data = linear(3, 4, 1, 1)
    data["inside"] = 0.5 * (data["lb"] + data["ub"])
    if quadratic:
        data["Q"] = torch.diag(tensor(0.5, 0.0, 1.0))
    mu, weight = 0.05, normal(8)(3)
    names = [name for name in data if name != "inside"]
    leaves = {name: data[name].clone().requires_grad_() for name in names}
    solution = il.solve_qp(**leaves, gradient="smoothed", smoothing=mu)
    gradients = dict(zip(names, torch.autograd.grad(solution.z @ weight, list(leaves.values())), strict=True))
    for name in names:
        found = torch.zeros_like(data[name])
        for k in range(found.numel()):
            ends = []
            for sign in (1, -1):
                moved = {**data, name: data[name].clone()}
                moved[name].view(-1)[k] += sign * 1e-6
                if name == "Q":
                    moved[name] = 0.5 * (moved[name] + moved[name].mT)
                ends.append(float(barrier_minimiser(moved, mu) @ weight))
            found.view(-1)[k] = (ends[0] - ends[1]) / 2e-6
        assert torch.allclose(gradients[name], found, rtol=1e-4, atol=1e-6), name


def test_smoothed_refuses_to_be_differentiated_twice() -> None:
    p = tensor(1.0, -0.3).requires_grad_()

    def z(p: Tensor) -> Tensor:
        return il.solve_qp(torch.eye(2, dtype=F64), p, lb=tensor(0, 0), gradient="smoothed").z.sum()

    (gradient,) = torch.autograd.grad(z(p), p, create_graph=True)
    with pytest.raises(il.UnsupportedError, match="first derivatives only"):
        torch.autograd.grad(gradient.sum(), p)
    with pytest.raises(il.UnsupportedError, match="first derivatives only"):
        torch.func.hessian(z)(p.detach())


def test_smoothed_in_forward_mode_and_batched() -> None:
    data = boxed(3, 2, 1, batch=(2,), seed=3)

    def function(p: Tensor, h: Tensor, lb: Tensor) -> Tensor:
        return il.solve_qp(**{**data, "p": p, "h": h, "lb": lb}, gradient="smoothed", smoothing=0.1).z

    given = (data["p"], data["h"], data["lb"])
    for i in range(3):
        forward = torch.func.jacfwd(function, argnums=i)(*given)
        assert torch.allclose(forward, torch.func.jacrev(function, argnums=i)(*given), atol=1e-10)


def test_training_through_a_linear_program_does_not_stall() -> None:
    """The exact gradient of a vertex in its cost is zero; the smoothed one finds a cost with the wanted vertex."""
    A, b, zero = torch.ones(1, 5, dtype=F64), tensor(1), torch.zeros(5, dtype=F64)
    target = torch.eye(5, dtype=F64)[3]
    Q = torch.zeros(5, 5, dtype=F64)
    p = normal(1)(5).requires_grad_()

    def loss(gradient: str) -> Tensor:
        z = il.solve_qp(Q, p, A=A, b=b, lb=zero, gradient=gradient, smoothing=0.1).z  # type: ignore[arg-type]
        return (z - target).square().sum()

    assert loss("exact") > 1.0
    (exact,) = torch.autograd.grad(loss("exact"), p)
    assert exact.abs().max() < 1e-9
    optimiser = torch.optim.Adam([p], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        loss("smoothed").backward()
        optimiser.step()
    assert loss("exact") < 1e-9


def test_training_across_weakly_active_constraints_does_not_stall() -> None:
    """Start at a kink: all bounds of the projection are only just active, and half of the unknowns must move."""
    target = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=F64)
    p = torch.zeros(4, dtype=F64, requires_grad=True)
    optimiser = torch.optim.SGD([p], lr=0.3)
    eye, zero = torch.eye(4, dtype=F64), torch.zeros(4, dtype=F64)
    for gradient in ("exact", "least_norm", "smoothed"):
        with torch.no_grad():
            p.zero_().add_(1e-9)
        for _ in range(100):
            optimiser.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                z = il.solve_qp(eye, p - 1e-3, lb=zero, gradient=gradient, smoothing=1e-3).z  # type: ignore[arg-type]
                (z - target).square().sum().backward()
            optimiser.step()
        assert torch.allclose(z.detach(), target.clamp(min=0), atol=1e-2), gradient


# --- the nearest feasible program -----------------------------------------------------------------------------------


def test_nearest_shifts_contradicting_rows_evenly() -> None:
    """z ≤ −1 and z ≥ 3 meet at 1, each moved by 2."""
    G, h = tensor([1.0], [-1.0]), tensor(-1.0, -3.0).requires_grad_()
    with pytest.raises(il.InfeasibleError):
        il.solve_qp(torch.eye(1, dtype=F64), tensor(0), G=G, h=h)
    solution = il.solve_qp(torch.eye(1, dtype=F64), tensor(0), G=G, h=h, infeasible="nearest", gradient="least_norm")
    assert torch.allclose(solution.z, tensor(1.0)) and torch.allclose(solution.shift.h, tensor(2.0, 2.0))
    assert torch.allclose(torch.autograd.grad(solution.z.sum(), h, retain_graph=True)[0], tensor(0.5, -0.5), atol=1e-9)
    assert torch.allclose(torch.autograd.grad(solution.shift.h.sum(), h)[0], tensor(-1.0, -1.0), atol=1e-9)


def test_nearest_leaves_feasible_problems_alone() -> None:
    data = boxed(4, 3, 1, batch=(3,), seed=4)
    impossible = {**data, "A": torch.cat([data["A"], data["A"]], -2), "b": torch.cat([data["b"], data["b"]], -1)}
    impossible["b"] = impossible["b"] + tensor([0, 0], [0, 1.0], [0, 0])
    leaves = {name: t.clone().requires_grad_() for name, t in impossible.items()}
    solution = il.solve_qp(**leaves, infeasible="nearest", gradient="least_norm", on_failure="ignore")
    assert solution.shift.b[[0, 2]].eq(0).all() and solution.shift.h[[0, 2]].eq(0).all()
    assert solution.info.converged[[0, 2]].all()
    expected = il.solve_qp(**data)
    assert torch.allclose(solution.z[[0, 2]], expected.z[[0, 2]], atol=1e-9)
    assert torch.allclose(solution.shift.b[1], tensor(0.5, -0.5), atol=0.5)


def test_nearest_by_finite_differences() -> None:
    """Two equalities that contradict each other, in the data of both: z, and the shift, move as the differences say."""
    draw = normal(6)
    row = draw(1, 3)
    A, b, p = torch.cat([row, row]), tensor(0.0, 1.0), draw(3)

    def function(p: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        solution = il.solve_qp(torch.eye(3, dtype=F64), p, A=A, b=b, infeasible="nearest", gradient="least_norm")
        return solution.z, solution.shift.b

    z, shift = function(p, b)
    assert torch.allclose(shift, tensor(0.5, -0.5), atol=1e-10) and torch.allclose(A @ z, tensor(0.5, 0.5), atol=1e-9)
    check_gradients(function, p, b, second=False)


# --- sharing --------------------------------------------------------------------------------------------------------


def test_shared_matrices_are_never_copied_for_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a shared matrix is one product, and the solver is given one matrix."""
    seen: list[tuple[int, ...]] = []
    right = il.InteriorPoint.solve

    def spy(self: il.InteriorPoint, data: object, *rest: object, **settings: object) -> object:
        seen.append((data.Q.shape[0], data.E.shape[0], data.p.shape[0]))  # type: ignore[attr-defined]
        return right(self, data, *rest, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(il.InteriorPoint, "solve", spy)
    problem = random_qp(4, 3, 1, seed=4)
    p = problem.p + 0.01 * normal(0)(2, 50, 4)
    data = {"A": problem.A, "b": problem.b, "G": problem.G, "h": problem.h}
    solution = il.solve_qp(problem.Q, p, **data, solver=il.InteriorPoint(backend="torch"))
    assert seen == [(1, 1, 100)] and solution.z.shape == (2, 50, 4)


# --- living with the rest of PyTorch --------------------------------------------------------------------------------


def test_copies_and_pickles_of_solver_layer_and_solution() -> None:
    layer = il.nn.QPLayer(3, 1, 2, lb=-1.0, solver=il.InteriorPoint(tol=1e-9), gradient="least_norm")
    p = torch.randn(4, 3)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(p), layer(p))
    solution = layer.solve(p)
    again = pickle.loads(pickle.dumps(il.QPSolution(*(x.detach() if isinstance(x, Tensor) else x for x in solution))))
    assert torch.equal(again.z, solution.z)


def test_threads() -> None:
    problem = random_qp(8, 6, 2, batch=(16,), seed=1)
    expected = il.solve_qp(problem.Q, problem.p, A=problem.A, b=problem.b, G=problem.G, h=problem.h).z
    found: list[bool] = []

    def work() -> None:
        for _ in range(5):
            z = il.solve_qp(problem.Q, problem.p, A=problem.A, b=problem.b, G=problem.G, h=problem.h).z
            found.append(torch.equal(z, expected))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 20 and all(found)


class Projected(torch.utils.data.Dataset):
    """Points projected on the simplex by a worker."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        x = torch.arange(3, dtype=F64) * i
        return il.solve_qp(
            torch.eye(3, dtype=F64), -x, A=torch.ones(1, 3, dtype=F64), b=tensor(1), lb=tensor(0, 0, 0)
        ).z


def test_workers_of_a_data_loader() -> None:
    loader = torch.utils.data.DataLoader(Projected(), batch_size=4, num_workers=2, multiprocessing_context="spawn")
    assert torch.allclose(torch.cat(list(loader)).sum(-1), torch.ones(8, dtype=F64))


COMPILED = """
import torch, warnings
import implicit_layers as il
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(5, 4)
        self.layer = il.nn.QPLayer(4, 1, 3, lb=-1.0)
    def forward(self, x):
        solution = self.layer.solve(self.first(x))
        return solution.z.square().sum(-1) + solution.value + solution.lam.sum(-1) + solution.lam_lb.sum(-1)

model, x = Model(), torch.randn(6, 5)
def gradients(function):
    model.zero_grad()
    function(x).sum().backward()
    return [p.grad.clone() for p in model.parameters()]
expected, numbers = gradients(model), model(x)
for backend in ("aot_eager", "inductor"):
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.allclose(compiled(x), numbers, atol=1e-10)
    for ours, theirs in zip(gradients(compiled), expected):
        assert torch.allclose(ours, theirs, atol=1e-9)
second = torch.compile(torch.func.hessian(lambda p: model.layer(p).sum()), backend="aot_eager")
p = torch.randn(4)
assert torch.allclose(second(p), torch.func.hessian(lambda p: model.layer(p).sum())(p), atol=1e-9)
exported = torch.export.export(model, (x,))
assert torch.allclose(exported.module()(x), numbers, atol=1e-10)
assert any("solve_qp" in str(node.target) for node in exported.graph.nodes)
try:
    torch.compile(lambda: il.solve_qp(torch.eye(1), torch.zeros(1), G=torch.tensor([[1.], [-1.]]),
                                      h=torch.tensor([-1., -1.])).z, fullgraph=True, backend="aot_eager")()
except il.InfeasibleError as error:
    print("done")
"""


def test_a_whole_graph_is_compiled_and_exported() -> None:
    """In a process of its own, since the compiler leaves much behind."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", COMPILED]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0 and run.stdout.strip() == "done", run.stderr[-3000:]


def test_nothing_is_read_back_without_checks(host_syncs) -> None:  # type: ignore[no-untyped-def]
    """`check_every=0` and failures ignored: no host synchronisation, forward and backward."""
    data = {name: t.clone().requires_grad_() for name, t in boxed(6, 5, 2, batch=(4,), seed=1).items()}
    solver = il.InteriorPoint(max_iter=20, check_every=0)
    with host_syncs() as found:
        solution = il.solve_qp(**data, solver=solver, on_failure="ignore", gradient="least_norm")
        solution.z.sum().backward()
    assert not found.found, found
    assert torch.allclose(solution.z, il.solve_qp(**data).z, atol=1e-9)
    assert solution.info.converged.all()


def test_fewer_checks_fewer_synchronisations(host_syncs) -> None:  # type: ignore[no-untyped-def]
    data = boxed(6, 5, 2, batch=(4,), seed=1)
    counts = []
    for k in (1, 5):
        with host_syncs() as found:
            il.solve_qp(**data, solver=il.InteriorPoint(check_every=k, backend="torch"))
        counts.append(len(found.found))
    assert counts[1] < counts[0]


class WithoutDeviceGuard(TorchFunctionMode):
    """Index by single operations: Python's operators ask for the device itself, which a CPU build does not have."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is Tensor.__invert__:
            return torch.ops.aten.bitwise_not(*args)
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        tensor, index = args
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            place = index.index(Ellipsis)
            there = len([entry for entry in index if entry is not None]) - 1
            index = (*index[:place], *(slice(None),) * (tensor.ndim - there), *index[place + 1 :])
        dim = 0
        for entry in index:
            if entry is None:
                tensor, dim = torch.ops.aten.unsqueeze(tensor, dim), dim + 1
            elif isinstance(entry, slice):
                tensor = torch.ops.aten.slice(tensor, dim, entry.start, entry.stop, entry.step or 1)
                dim += 1
            else:
                tensor = torch.ops.aten.select(tensor, dim, entry)
        return tensor


def test_fake_cuda_tensors_go_through_without_values() -> None:
    """Forward, and the linear solve that a backward pass is, on a device that is not there.

    Autograd itself cannot be had: it asks the missing device for a stream.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from implicit_layers.qp.run import Settings, run, solve_kkt

    solver = il.InteriorPoint(max_iter=3, check_every=0)
    with FakeTensorMode(), torch.no_grad(), WithoutDeviceGuard():
        data = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cuda")
            for name, t in boxed(6, 5, 2, batch=(4,), seed=1).items()
        }
        solution = il.solve_qp(**data, solver=solver, on_failure="ignore")
        assert all(t.device.type == "cuda" for t in (*solution[:4], *solution.info, solution.value))
        settings = Settings(solver, "ignore")
        outcome = run(settings, *data.values())
        rights = (outcome.z, outcome.nu, outcome.lam, outcome.bound)
        matrices = (data["Q"], data["A"], data["G"])
        adjoint = solve_kkt(settings, *matrices, *rights, outcome.degenerate, *outcome.factor)
        assert [t.shape for t in adjoint] == [t.shape for t in rights]
        assert all(t.device.type == "cuda" for t in adjoint)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gradient": "clever"}, "gradient must be one of"),
        ({"infeasible": "guess"}, "infeasible must be one of"),
        ({"smoothing": 0.0}, "smoothing"),
        ({"smoothing": math.nan}, "smoothing"),
    ],
)
def test_settings_out_of_range(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        il.solve_qp(torch.eye(2), torch.ones(2), **setting)  # type: ignore[arg-type]


# --- warm start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dual", "condensed"])
@pytest.mark.parametrize("change", [0.0, 1e-3, 1e-1, 10.0])
def test_a_warm_start_changes_the_work_and_not_the_answer(form: str, change: float) -> None:
    Q, p, A, b, G, h, *_ = random_qp(15, 12, 3, batch=(2, 8), seed=3, active=0.5)
    data = {"Q": Q, "A": A, "b": b, "G": G, "h": h}
    moved = p * (1 + change * normal(0)(2, 8, 15))
    solver = il.InteriorPoint(form=form)  # type: ignore[arg-type]
    first = il.solve_qp(p=p, **data, solver=solver)
    cold = il.solve_qp(p=moved, **data, solver=solver)
    warm = il.solve_qp(p=moved.requires_grad_(), **data, solver=solver, warm_start=first)
    assert torch.allclose(warm.z, cold.z, atol=1e-12) and torch.allclose(warm.lam, cold.lam, atol=1e-11)
    assert warm.info.converged.all() and (warm.info.iterations <= cold.info.iterations).all()
    if change <= 1e-3:
        assert warm.info.iterations.eq(0).all()
    warm.z.sum().backward()
    assert moved.grad is not None and moved.grad.isfinite().all()


def test_a_wrong_warm_start_is_only_slow() -> None:
    data = boxed(6, 5, 2, batch=(4,), seed=1)
    right = il.solve_qp(**data)
    wrong = right._replace(lam=(right.lam == 0).double(), lam_lb=right.lam_ub, lam_ub=right.lam_lb + 1.0)
    again = il.solve_qp(**data, warm_start=wrong)
    assert torch.allclose(again.z, right.z, atol=1e-11)
    with pytest.raises(il.ShapeError, match="warm_start"):
        il.solve_qp(**data, warm_start=il.solve_qp(**boxed(6, 5, 2, batch=(3,), seed=1)))
    with pytest.raises(TypeError, match="warm_start"):
        il.solve_qp(**data, warm_start=right.z)  # type: ignore[arg-type]


# --- data rounded to float32 ----------------------------------------------------------------------------------------


def test_float32_rounding_makes_nothing_infeasible_or_indefinite() -> None:
    """Redundant equalities and semidefinite costs, consistent but for their rounding, are solved."""
    draw = normal(3)
    for seed in range(10):
        A, z = draw(6, 4).float(), draw(4).float()
        solution = il.solve_qp(torch.eye(4), draw(4).float(), A=A, b=A @ z)
        assert torch.allclose(solution.z, z, atol=1e-4), seed
        L = draw(3, 20, 5).float()
        box = torch.ones(20)
        solution = il.solve_qp(L @ L.mT, draw(3, 20).float(), lb=-box, ub=box)
        assert solution.info.converged.all()
    with pytest.raises(il.InfeasibleError):  # beyond rounding
        il.solve_qp(torch.eye(1), torch.zeros(1), A=torch.ones(2, 1), b=torch.tensor([1.0, 1.001]))
    with pytest.raises(il.NotPositiveDefiniteError):
        il.solve_qp(torch.diag(torch.tensor([1.0, -1e-3])), torch.ones(2), lb=-torch.ones(2), ub=torch.ones(2))
