"""The short way through `solve_qp`: how few operations it takes, and that nothing is taken for granted on it."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import implicit_layers as il
from implicit_layers.qp import arguments
from implicit_layers.solvers import compiled
from implicit_layers.testing import random_qp
from tests.compiled_problems import NAMES, require_kernel

Data = dict[str, Any]


@pytest.fixture(autouse=True)
def kernel() -> None:
    require_kernel()


class Operations(TorchDispatchMode):
    """Counts the operations that reach the dispatcher, detached aliases of saved tensors among them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Sizes(TorchDispatchMode):
    """The memory, in numbers, of what operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if isinstance(answer, Tensor):
            self.found.append(answer.untyped_storage().nbytes() // answer.element_size())
        return answer


def program(n: int = 10, n_ineq: int = 10, n_eq: int = 0, batch: tuple[int, ...] = (1,)) -> Data:
    return dict(zip(NAMES, random_qp(n, n_ineq, n_eq, batch=batch, seed=3, condition=10.0), strict=False))


def leaves(data: Data) -> Data:
    return {name: tensor.clone().requires_grad_(tensor.numel() > 0) for name, tensor in data.items()}


def gradients(data: Data, solution: il.QPSolution) -> list[Tensor]:
    wanted = [tensor for tensor in data.values() if tensor.requires_grad]
    return list(torch.autograd.grad(solution.z.square().sum() + solution.lam.sum(), wanted))


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The sizes of the tensors that the kernel makes, without asking the dispatcher."""
    sizes: list[tuple[int, ...]] = []
    empty, *others = compiled._ASKED

    def counted(*room: Any) -> Tensor:
        sizes.append(room[0])
        return empty(*room)

    compiled._kernel.prepare(counted, *others)
    yield sizes
    compiled._kernel.prepare(*compiled._ASKED)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(("n_eq", "gradient"), [(0, "exact"), (3, "exact"), (3, "least_norm")])
def test_operations_of_a_call(n_eq: int, gradient: Any, bounded: bool, made: list[tuple[int, ...]]) -> None:
    """15 tensors of the answer and one of the factor, 3 of the point saved as outputs; with bounds their dual, too, and
    what pulls, and 7 operations for λ_lb and λ_ub of it.
    """
    data = leaves(program(n_eq=n_eq) | ({"ub": torch.full((1, 10), 0.5, dtype=torch.float64)} if bounded else {}))
    for _ in range(2):  # what is worked out in the first call takes no operation either
        made.clear()
        with Operations() as forward:
            solution = il.solve_qp(**data, gradient=gradient)
        assert forward.found.total() <= (11 if bounded else 3), forward.found
        assert len(made) == (17 if bounded else 16), made
        made.clear()
        wanted, ones = [t for t in data.values() if t.requires_grad], torch.ones_like(solution.z)
        with Operations() as backward:  # the same 3
            torch.autograd.grad(solution.z, wanted, ones)
        assert backward.found.total() <= (4 if bounded else 3), backward.found
        assert len(made) == 3 + sum(data[name].requires_grad for name in ("Q", "p", "A", "G", "ub") if name in data)


def test_without_a_graph_nothing_is_attached(made: list[tuple[int, ...]]) -> None:
    data = program()
    for _ in range(2):
        made.clear()
        with Operations() as forward:
            solution = il.solve_qp(**data)
        assert forward.found.total() == 0, forward.found
        assert len(made) == 16
    assert not solution.z.requires_grad


def test_a_program_that_the_kernel_leaves_is_not_given_to_it_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked, solve = program(3, 2, 0, batch=(4,)), [], compiled.solve
    monkeypatch.setattr(compiled, "solve", lambda *args, **options: asked.append(1) or solve(*args, **options))
    data["G"][2], data["h"][2] = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]), torch.tensor([-1.0, -1.0])
    solution = il.solve_qp(**data, on_failure="ignore")
    assert solution.info.status.tolist() == [0, 0, int(il.Status.INFEASIBLE), 0]
    assert len(asked) == 1


@pytest.mark.parametrize("bounded", [False, True])
def test_memory_from_the_dispatcher_does_as_well(bounded: bool) -> None:
    data = program(n_eq=2, batch=(3,))
    data = leaves(data | ({"lb": torch.full((10,), -3.0, dtype=torch.float64)} if bounded else {}))
    answers = []
    for empty in (compiled._ASKED[0], compiled._empty):
        compiled._kernel.prepare(empty, *compiled._ASKED[1:])
        try:
            solution = il.solve_qp(**data)
            answers.append([*solution[:4], *solution.info, *solution[5:8], *solution.shift, *gradients(data, solution)])
        finally:
            compiled._kernel.prepare(*compiled._ASKED)
    assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(*answers, strict=True))


# --- nothing is taken for granted ------------------------------------------------------------------------------------

BAD = {
    "p too long": lambda d: {"p": torch.ones(1, 11, dtype=torch.float64)},
    "p of another dtype": lambda d: {"p": d["p"].float()},
    "Q of integers": lambda d: {"Q": torch.eye(10, dtype=torch.int64).unsqueeze(0)},
    "Q no tensor": lambda d: {"Q": d["Q"].tolist()},
    "G of another width": lambda d: {"G": d["G"][..., :9].contiguous()},
    "h too short": lambda d: {"h": d["h"][..., :9].contiguous()},
    "h missing": lambda d: {"h": None},
    "b without A": lambda d: {"b": torch.ones(1, 2, dtype=torch.float64), "A": None},
    "batches that do not go together": lambda d: {"Q": d["Q"].expand(3, 10, 10), "p": d["p"].expand(2, 10)},
    "all of them half": lambda d: {name: t.half() for name, t in d.items()},
    "meta": lambda d: {name: t.to("meta") for name, t in d.items()},
    "NaN in Q": lambda d: {"Q": torch.full_like(d["Q"], torch.nan)},
    "NaN in G": lambda d: {"G": torch.full_like(d["G"], torch.nan)},
    "infinite p": lambda d: {"p": torch.full_like(d["p"], torch.inf)},
    "h of minus infinity": lambda d: {"h": torch.full_like(d["h"], -torch.inf)},
    "indefinite": lambda d: {"Q": -d["Q"]},
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_refused_is_refused_after_a_good_call_too(what: str) -> None:
    good = program()
    bad = {**good, **BAD[what](good)}
    arguments._known.clear()
    with pytest.raises(il.ImplicitLayersError) as first:
        il.solve_qp(**bad)
    for _ in range(2):
        assert il.solve_qp(**good).info.converged.all()
        with pytest.raises(type(first.value)) as later:
            il.solve_qp(**bad)
        assert str(later.value) == str(first.value)


def test_half_precision_is_known_as_such() -> None:
    data = {name: tensor.bfloat16() for name, tensor in program().items()}
    with torch.autocast("cpu"):
        assert il.solve_qp(**data).z.dtype == torch.float32
    with pytest.raises(il.DtypeError, match="too coarse"):
        il.solve_qp(**data)


def test_values_are_not_remembered() -> None:
    first, second = program(), dict(zip(NAMES, random_qp(10, 10, 0, batch=(1,), seed=4), strict=False))
    expected = [il.solve_qp(**data, solver=il.InteriorPoint(backend="torch")).z for data in (first, second, first)]
    found = [il.solve_qp(**data).z for data in (first, second, first)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", ["given", "shared", "without rows", "equalities only", "no batch"])
def test_the_first_call_and_later_ones_give_the_same_bits(shape: str) -> None:
    data = program(4, 5, 2, batch=() if shape == "no batch" else (3,))
    if shape == "shared":
        data |= {name: data[name][0] for name in ("Q", "A", "b", "G")} | {"h": data["h"] + 5.0}
    if shape in ("without rows", "equalities only"):
        data = {name: t for name, t in data.items() if name not in ("G", "h", *("A", "b")[: 2 * ("rows" in shape)])}
    data = leaves(data)
    arguments._known.clear()
    answers = []
    for _ in range(3):
        solution = il.solve_qp(**data)
        answers.append([*solution[:4], *solution.info, *solution[5:8], *solution.shift, *gradients(data, solution)])
    assert len(arguments._known) == 1
    for name, gradient in zip(data, answers[0][-len(data) :], strict=True):
        assert gradient.shape == data[name].shape
    for later in answers[1:]:
        assert all(torch.equal(x, y) for x, y in zip(answers[0], later, strict=True))


@pytest.mark.parametrize("which", ["Q", "A", "G", "h"])
def test_an_argument_without_memory_of_its_own_for_each_program(which: str) -> None:
    data = program(4, 5, 2, batch=(3,))
    data = leaves({**data, "h": data["h"] + 5.0})
    one = {**data, which: data[which][0].detach().requires_grad_()}
    arguments._known.clear()
    answers = []
    for _ in range(3):
        shared = {
            **one,
            which: one[which].expand(3, *one[which].shape),
        }  # the sizes are those of three, the memory is not
        apart = {**one, which: shared[which].contiguous()}
        for same in (shared, apart):
            solution = il.solve_qp(**same)
            answers.append([*solution[:4], *gradients(one, solution)])
    for later in answers[1:]:
        for x, y in zip(answers[0], later, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_what_a_batch_shares_is_not_copied_for_each_of_its_programs() -> None:
    data = program(4, 5, 2, batch=(50,))
    data = leaves({**data, "h": data["h"] + 5.0})
    for name in ("Q", "A", "G"):
        one = data[name][0].detach().clone().requires_grad_()
        data[name] = one.expand(50, *one.shape)
    for _ in range(2):
        with Sizes() as forward:
            solution = il.solve_qp(**data)
        with Sizes() as backward:
            torch.autograd.grad(solution.z, data["p"], torch.ones_like(solution.z))
        assert max([*forward.found, *backward.found]) <= 50 * 5, (forward.found, backward.found)


def test_an_empty_batch_again() -> None:
    data = {name: tensor[:0] for name, tensor in program(n_eq=2, batch=(3,)).items()}
    for _ in range(3):
        assert il.solve_qp(**data).z.shape == (0, 10)


def test_one_structure_in_many_threads() -> None:
    data = leaves(program(n_eq=2, batch=(3,)))
    expected = gradients(data, il.solve_qp(**data))
    arguments._known.clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: gradients(data, il.solve_qp(**data)), range(40)))
    assert all(torch.equal(x, y) for each in found for x, y in zip(each, expected, strict=True))


def test_few_structures_are_kept() -> None:
    arguments._known.clear()
    one = torch.eye(1, dtype=torch.float64)
    for size in range(arguments._MOST_KNOWN + 10):
        il.solve_qp(one, one.new_ones(size + 1, 1))
    assert 0 < len(arguments._known) <= arguments._MOST_KNOWN


# --- what comes back -------------------------------------------------------------------------------------------------


def test_the_fields_share_no_memory() -> None:
    solution = il.solve_qp(**program(n_eq=2))
    fields = [*solution[:4], *solution.info, *solution[5:8], *solution.shift]
    addresses = Counter(field.untyped_storage().data_ptr() for field in fields)
    assert max(addresses.values()) == 1
    assert all(field._base is None for field in fields)


def test_solutions_are_copied_and_pickled() -> None:
    solution = il.solve_qp(**program(n_eq=2))
    for copy in (deepcopy(solution), pickle.loads(pickle.dumps(solution))):
        assert type(copy) is il.QPSolution
        torch.testing.assert_close(tuple(copy.info), tuple(solution.info))
        torch.testing.assert_close((*copy[:4], *copy[5:8]), (*solution[:4], *solution[5:8]), rtol=0, atol=0)


@pytest.mark.parametrize("bounded", [False, True])
def test_hooks_on_what_is_saved(bounded: bool) -> None:
    data = program(n_ineq=3, n_eq=2, batch=(3,))
    data = leaves(data | ({"lb": torch.full((10,), -0.5, dtype=torch.float64)} if bounded else {}))
    expected = gradients(data, il.solve_qp(**data))

    def scattered(t: Tensor) -> Tensor:  # not contiguous
        return torch.stack([t, t], dim=-1)[..., 0] if t.ndim else t

    with torch.autograd.graph.saved_tensors_hooks(scattered, lambda t: t):
        solution = il.solve_qp(**data)
    for mine, theirs in zip(gradients(data, solution), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_whatever_the_default_device() -> None:
    data = leaves(program(n_eq=2))
    expected = il.solve_qp(**data)
    with torch.device("meta"):
        solution = il.solve_qp(**data)
        found = torch.autograd.grad(solution.z.sum(), data["p"])[0]
    assert torch.equal(solution.z, expected.z)
    assert torch.equal(found, torch.autograd.grad(expected.z.sum(), data["p"])[0])


@pytest.mark.parametrize("bounded", [False, True])
def test_hooks_that_change_the_dtype(bounded: bool) -> None:
    """Saved in half the memory, and as exact as that allows."""
    data = leaves(program(n_eq=2) | ({"lb": torch.full((10,), -0.5, dtype=torch.float64)} if bounded else {}))
    expected = gradients(data, il.solve_qp(**data))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.float() if t.is_floating_point() else t, lambda t: t):
        solution = il.solve_qp(**data)
    for mine, theirs in zip(gradients(data, solution), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


# --- tensors that only look ordinary ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["p", "lb", "ub"])
def test_a_tensor_of_zeros_without_memory(which: str) -> None:
    data = program() | {"lb": -torch.ones(10, dtype=torch.float64), "ub": torch.ones(10, dtype=torch.float64)}
    zero = torch._efficientzerotensor(tuple(data[which].shape), dtype=torch.float64)
    found = il.solve_qp(**(data | {which: zero}))
    expected = il.solve_qp(**(data | {which: torch.zeros_like(data[which])}))
    torch.testing.assert_close(found.z, expected.z, rtol=1e-12, atol=1e-12)
    assert not torch.equal(expected.z, il.solve_qp(**data).z)


@pytest.mark.parametrize("which", ["lb", "ub"])
def test_freed_memory_is_not_taken_for_an_argument_that_is_not_given(which: str) -> None:
    data = program() | {which: torch.zeros(1, 10, dtype=torch.float64)}
    il.solve_qp(**data)
    data[which].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed"):
        il.solve_qp(**data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("batch", [(), (1,), (3,)])
@pytest.mark.parametrize("bounded", [False, True])
def test_what_a_row_without_a_side_holds_is_looked_at(batch: tuple[int, ...], bounded: bool, value: float) -> None:
    data = program(batch=batch) | ({"lb": torch.full((10,), -0.5, dtype=torch.float64)} if bounded else {})
    data["h"][..., 2] = torch.inf
    il.solve_qp(**data)
    data["G"][..., 2, 1] = value
    for backend in ("compiled", "torch"):
        with pytest.raises(il.NonFiniteError, match="G"):
            il.solve_qp(**data, solver=il.InteriorPoint(backend=backend))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["compiled", "torch"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_a_warm_start_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype], backend: Any) -> None:
    solver = il.InteriorPoint(backend=backend, precision="native")
    one, two = ({name: t.to(dtype) for name, t in program(n_eq=2, batch=(8,)).items()} for dtype in dtypes)
    found = il.solve_qp(**two, solver=solver, warm_start=il.solve_qp(**one, solver=solver))
    expected = il.solve_qp(**two, solver=solver)
    torch.testing.assert_close(found.z, expected.z, rtol=1e-4, atol=1e-5)
    assert (found.info.iterations == 0).all() and (expected.info.iterations > 0).any()


def test_a_trace_does_not_take_the_solution_for_a_constant() -> None:
    data = program()

    def minimiser(p: Tensor) -> Tensor:
        return il.solve_qp(**(data | {"p": p})).z

    with pytest.raises(RuntimeError, match="tracing tensor"):
        make_fx(minimiser)(data["p"])
