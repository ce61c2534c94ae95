"""The harness catches what it is there to catch: wrong answers, wrong gradients, slowdowns, missing peers."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import instances, memory, scaling, simplex, tables, train_gpu, transport
from benchmarks import measure as measure_module
from benchmarks.compare import ratios, regressions
from benchmarks.contenders import OURS, QP_JUDGE, Answer, certificate, contenders, installed, reference
from benchmarks.fresh import fresh, resident
from benchmarks.measure import Contender, interleave, leaves, measure
from benchmarks.options import Options
from benchmarks.peak import peak_bytes, resident_bytes
from benchmarks.problems import PROBLEMS, QP, dense, known_solution, matvec
from benchmarks.run import NAMES, environment, main
from benchmarks.suites import MODULES, load
from implicit_layers.testing import kkt_certificate

ROOT = Path(__file__).parents[1]
SLEEP = 0.1


def only(problem: QP, contender: Contender, rounds: int = 2) -> dict:
    return measure(problem, [contender], QP_JUDGE, rounds=rounds)[0]


@pytest.fixture(scope="module")
def problem() -> QP:
    return dense(6, 5, 2, 4)


def slightly_wrong(problem: QP) -> Answer:
    answer = OURS.solve(problem)
    return answer._replace(z=answer.z * (1 + 1e-2))


def blind_to_h(problem: QP) -> Answer:
    return OURS.solve(problem._replace(h=problem.h.detach() + 0.0 * problem.h))


def slow(problem: QP) -> Answer:
    time.sleep(SLEEP)
    return OURS.solve(problem)


def broken(problem: QP) -> Answer:
    raise RuntimeError("no answer\nand more lines")


def test_a_right_answer_is_timed_and_its_errors_are_at_rounding(problem):
    row = only(problem, OURS)
    assert row["status"] == "ok"
    assert row["residual"] < 1e-12 and row["solution_error"] < 1e-11 and row["gradient_error"] < 1e-10
    assert len(row["forward_ms"]["repeats"]) == len(row["total_ms"]["repeats"]) == 2
    assert row["peak_bytes"] > row["graph_bytes"] > 0


def test_a_planted_wrong_answer_is_not_timed(problem):
    row = only(problem, Contender("slightly wrong", "0", slightly_wrong))
    assert row["status"].startswith("wrong: residual")
    assert "forward_ms" not in row


def test_a_planted_wrong_gradient_is_seen(problem):
    assert only(problem, Contender("blind to h", "0", blind_to_h))["gradient_error"] > 1e-3


def test_a_planted_slowdown_is_seen_and_named(problem):
    rows = measure(problem, [OURS, Contender("slow", "0", slow)], QP_JUDGE, rounds=4)
    times = [row["forward_ms"]["median"] for row in rows]
    assert times[1] > 1e3 * SLEEP
    assert times[1] - times[0] > 0.5e3 * SLEEP
    before, after = ({"rows": [{"problem": "dense", **row, "contender": "x"}]} for row in rows)
    found = regressions(before, after)
    assert len(found) == 2 and "forward_ms" in found[0] and "total_ms" in found[1]
    assert regressions(after, before) == regressions(before, before) == []
    found = {figure: ratio for _, figure, ratio in ratios(before, after)}
    assert found["forward_ms"] == pytest.approx(times[1] / times[0]) and found["forward_ms"] > 1.5
    assert found["graph_bytes"] == pytest.approx(1.0)


def test_a_peer_that_raises_or_is_not_installed_has_its_row(problem):
    assert only(problem, Contender("broken", "0", broken))["status"] == "failed: RuntimeError: no answer"
    assert only(problem, Contender("absent", None, broken))["status"] == "not installed"
    assert installed("torch") and installed("no-such-package") is None


def test_new_wrong_answers_errors_and_sizes_are_regressions():
    good = {"problem": "dense", "contender": "x", "status": "ok", "gradient_error": 1e-14, "graph_bytes": 1000}
    before = {"rows": [good]}
    for change in ({"status": "wrong"}, {"gradient_error": 1e-8}, {"graph_bytes": 2000}):
        assert len(regressions(before, {"rows": [{**good, **change}]})) == 1
    assert regressions(before, {"rows": [{**good, "gradient_error": 1e-12}]}) == []


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 10])
def test_every_contender_takes_every_position_in_turn(n):
    order: list[int] = []
    samples = interleave([lambda i=i: order.append(i) for i in range(n)], rounds=n, warm_up=1)
    assert [len(part) for part in samples] == [n] * n
    rounds = [tuple(order[k : k + n]) for k in range(n, len(order), n)]
    assert all(sorted(found) == list(range(n)) for found in rounds)
    assert all(sorted(position) == list(range(n)) for position in zip(*rounds, strict=True))
    if n % 2 == 0:  # and follows every other once
        pairs = {pair for found in rounds for pair in itertools.pairwise(found)}
        assert len(pairs) == n * (n - 1)
    assert len(interleave([lambda: 0] * n, rounds=n + 1)[0]) == (2 * n if n > 1 else 2)
    assert interleave([], rounds=3) == []


def test_what_takes_seconds_is_timed_once(problem, monkeypatch):
    clock = {"fast": 1.0, "slow": 5000.0}
    first = measure_module._certify

    def certify(problem, contender, judge, exact):
        return {**first(problem, contender, judge, exact), "first_ms": clock[contender.name]}

    monkeypatch.setattr(measure_module, "_certify", certify)
    rows = measure(problem, [Contender(name, "0", OURS.solve) for name in clock], QP_JUDGE, rounds=2)
    assert [len(row["forward_ms"]["repeats"]) for row in rows] == [2, 1]
    assert not any("first_ms" in row for row in rows)


def test_a_solver_without_a_gradient_is_timed_forward_only(problem):
    row = only(problem, Contender("bare", "0", lambda p: Answer(*(t.detach() for t in OURS.solve(p))), gradient=False))
    assert row["status"] == "ok" and "forward_ms" in row
    assert not {"total_ms", "gradient_error", "graph_bytes"} & set(row)


def test_a_peer_that_tells_no_duals_is_certified_all_the_same(problem):
    answer = OURS.solve(problem)
    assert certificate(problem, Answer(answer.z)) < 1e-12
    assert certificate(problem, Answer(answer.z + 1e-2)) > 1e-3
    assert certificate(problem, Answer(answer.z * math.nan)) == math.inf


def test_every_peer_has_a_row_whether_it_is_here_or_not(problem):
    rows = measure(problem, contenders(), QP_JUDGE, rounds=1)
    layers = {"implicit_layers", "ours in torch", "qpth", "cvxpylayers", "proxsuite", "moreau", "qpax", "unrolled ADMM"}
    assert {row["contender"] for row in rows} == layers | {"osqp", "clarabel", "piqp", "proxqp"}
    for row in rows:
        assert row["status"] in ("ok", "not installed") or row["contender"] == "unrolled ADMM", row
        if row["status"] == "ok" and "gradient_error" in row:
            assert row["gradient_error"] < 1e-3, row


def test_float32_is_judged_by_its_own_limit():
    row = measure(dense(6, 5, 2, 4), [OURS], QP_JUDGE, rounds=1, dtype=torch.float32)[0]
    assert row["status"] == "ok" and 1e-9 < row["gradient_error"] < 1e-3


SIZES = {"qpth linear": (10, 8, 0), "SCQPTH": (10, 8, 0), "qpax": (10, 8, 0), "simplex projection": (10, 10, 1)}


@pytest.mark.parametrize("name", PROBLEMS)
def test_generators_depend_on_their_seed_alone_and_make_feasible_programs(name):
    sizes = SIZES.get(name, (10, 4, 3))
    one, same, other = (PROBLEMS[name](*sizes, 4, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.p, other.p) or not torch.equal(one.Q, other.Q)
    assert all(tensor.dtype == torch.float64 and len(tensor) == 4 for tensor in one)
    assert one.G.shape == (4, sizes[1], 10) and one.A.shape == (4, sizes[2], 10)
    assert torch.linalg.eigvalsh(one.Q).min() > 0
    z = reference(leaves(one)).z
    assert (matvec(one.G, z) - one.h).max() < 1e-8 and (matvec(one.A, z) - one.b).abs().sum() < 1e-7


def test_known_solution_keeps_its_certificate():
    answer = OURS.solve(known_solution(15, 10, 3, 64))
    Q, p, A, b, G, h, _ = known_solution(15, 10, 3, 64)
    assert float(kkt_certificate(Q, p, *answer, A=A, b=b, G=G, h=h).max()) < 1e-9
    with pytest.raises(ValueError, match="no equalities"):
        PROBLEMS["qpth linear"](3, 3, 1, 1)


def test_families_refuse_sizes_that_they_do_not_have():
    for name, sizes in {
        "qpax": (3, 3, 1),
        "SCQPTH": (3, 3, 0),
        "Alt-Diff": (3, 2, 1),
        "simplex projection": (3, 2, 1),
    }.items():
        with pytest.raises(ValueError, match="this family"):
            PROBLEMS[name](*sizes, 1)


INSTANCES = {
    "scores": lambda seed: instances.scores(5, 3, seed),
    "transport": lambda seed: instances.transport(4, 5, 3, seed),
    "entropic_lp": lambda seed: instances.entropic_lp(6, 3, 2, 3, seed),
    "lasso": lambda seed: instances.lasso(20, 8, 3, seed),
    "equilibrium": lambda seed: instances.equilibrium(6, 3, seed),
    "linear_vae": lambda seed: instances.linear_vae(6, 2, 3, seed),
    "ridge": lambda seed: instances.ridge(7, 3, 50.0, seed),
}


@pytest.mark.parametrize("name", INSTANCES)
def test_instances_depend_on_their_seed_alone(name):
    one, same, other = (INSTANCES[name](seed) for seed in (0, 0, 5))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0 if name == "entropic_lp" else -1], other[0 if name == "entropic_lp" else -1])
    assert all(tensor.dtype == torch.float64 for tensor in one)


def test_instances_are_what_they_say():
    W, _, _ = instances.equilibrium(6, 3)
    assert float(torch.linalg.matrix_norm(W, 2)) == pytest.approx(0.9)
    problem = instances.transport(4, 5, 3)
    assert torch.allclose(problem.a.sum(-1), problem.b.sum(-1))
    problem = instances.lasso(20, 8, 3)
    largest = (problem.X.mT @ problem.y.unsqueeze(-1)).squeeze(-1).abs().amax(-1) / 20
    assert torch.allclose(problem.theta.exp(), 0.1 * largest)
    w, alpha, X, _, _ = instances.ridge(30, 2, 50.0)
    H = X.mT @ (w[:, None] * X) + alpha * torch.eye(30)
    eigenvalues = torch.linalg.eigvalsh(H)
    torch.testing.assert_close(eigenvalues[[0, -1]], torch.tensor([0.02, 1.0]).double(), rtol=1e-6, atol=1e-8)


def test_the_slope_of_ridge_is_that_of_its_objective():
    w, alpha, X, y, _ = instances.ridge(9, 3, 50.0)
    z = torch.ones_like(y).requires_grad_()
    value = 0.5 * (w * (z @ X.mT).square()).sum() + 0.5 * alpha * z.square().sum() - (y * z).sum()
    torch.testing.assert_close(memory.slope_of_ridge(z, w, alpha, X, y), torch.autograd.grad(value, z)[0])


@pytest.mark.parametrize("name", ["softmax", "sparsemax", "entmax 1.5"])
def test_the_simplex_references_are_right_and_a_wrong_answer_is_seen(name):
    judge, _ = simplex.operations()[name]
    problem = instances.scores(6, 4)
    y, (gradient,) = judge.reference(problem)
    assert judge.certificate(problem, y) < 1e-12 and float((y.sum(-1) - 1).abs().max()) < 1e-12
    wrong = y.roll(1, -1)
    assert judge.certificate(problem, wrong) > 1e-2
    assert judge.certificate(problem, y * 1.01) > 1e-3
    step = 1e-6 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = [judge.reference(problem._replace(x=problem.x + s * step)).z for s in (1, -1)]
    moved = 0.5 * ((ends[0] - ends[1]) * problem.c).sum()
    assert float(moved) == pytest.approx(float((gradient * step).sum()), rel=1e-4)


def test_the_simplex_suite_times_what_is_here_and_sees_a_wrong_softmax():
    rows = simplex.suite(Options(quick=True))
    assert {row["problem"] for row in rows} == {"softmax", "sparsemax", "entmax 1.5", "Sinkhorn"}
    for row in rows:
        assert row["status"] in ("ok", "not installed"), row
        if row["status"] == "ok":
            assert row["gradient_error"] < 1e-6, row
    judge, _ = simplex.operations()["softmax"]
    sharp = Contender("too sharp", "0", lambda problem: torch.softmax(1.01 * problem.x, -1))
    assert measure(instances.scores(6, 4), [sharp], judge, rounds=1)[0]["status"].startswith("wrong")


def test_peak_bytes_are_those_of_the_tensors_alive_together():
    x = torch.zeros(1000, requires_grad=True)

    def chain(length: int) -> Tensor:
        z = x
        for _ in range(length):
            z = z.exp()
        return z.sum()

    ten, twenty = (peak_bytes(lambda k=k: chain(k).backward(), x.device) for k in (10, 20))
    assert twenty - ten == 10 * 4000
    assert peak_bytes(lambda: None, x.device) == 0
    assert peak_bytes(lambda: x.detach().view(10, 100), x.device) == 0


def test_resident_memory_sees_what_is_kept():
    assert resident_bytes(lambda: torch.ones(2**22)) > 0.8 * 2**24


def test_a_fresh_process_answers_or_its_error_is_told():
    assert fresh("json:dumps", {"a": 1}) == '{"a": 1}'
    with pytest.raises(RuntimeError, match="TypeError"):
        fresh("json:loads", {"a": 1})


@pytest.mark.slow
def test_resident_memory_of_a_mode_in_its_own_process():
    sizes = {
        mode: resident("benchmarks.memory:ready", {"mode": mode, "steps": 2000, "quick": False, "seed": 0})
        for mode in ("full", "reversible", "implicit")
    }
    assert sizes["full"] > 5 * sizes["reversible"] and sizes["full"] > 5 * sizes["implicit"]
    assert 100e6 < sizes["full"] < 170e6  # 51200 bytes of tensors a step, and the nodes of the graph


def test_slopes_are_exponents():
    assert memory.slope([1, 10, 100], [7, 70, 700]) == pytest.approx(1.0)
    assert memory.slope([4, 16, 64], [2, 4, 8]) == pytest.approx(0.5)
    rows = [
        {"problem": "QP", "mode": "implicit", "iterations": k, "graph_bytes": 5, "fixed_bytes": 0} for k in (8, 9, 12)
    ]
    assert memory.slopes(rows) == {"QP: implicit": 0.0}
    assert memory.slopes([{**row, "iterations": 8} for row in rows]) == {}
    grown = [{**row, "graph_bytes": 100 + 3 * row["iterations"], "fixed_bytes": 100} for row in rows]
    assert memory.slopes(grown) == {"QP: implicit": 1.0}


def test_command_writes_a_small_file_that_says_where_it_comes_from(tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "simplex", "--quick", "--threads", "1", "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "simplex-quick.json").read_text()
    result = json.loads(text)
    assert len(text) < 100_000
    assert result["environment"]["pinned"] == {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    assert result["environment"]["threads"] == 1
    assert {"commit", "torch", "device", "seed", "date"} <= set(result["environment"])
    assert str(ROOT) not in text
    assert result["environment"]["dtype"] == "float64"
    assert all(row["status"] in ("ok", "not installed") for row in result["rows"]), result["rows"]


def test_memory_grows_as_the_theory_says(monkeypatch):
    monkeypatch.setattr(memory, "resident", lambda *_: 0)  # has a test of its own
    rows = memory.suite(Options(quick=True))
    summary = memory.summary(rows)
    found = summary["slopes"]
    assert summary["peak_slopes"]["ridge: full"] > 0.7 and abs(summary["peak_slopes"]["ridge: implicit"]) < 0.01
    assert summary["peak_slopes"]["ridge: reversible"] < 0.1
    for problem in ("QP", "ridge"):
        assert 0.95 < found[f"{problem}: full"] < 1.05
        assert 0.3 < found[f"{problem}: checkpointed"] < 0.6
        for mode in ("truncated", "one-step"):
            assert abs(found[f"{problem}: {mode}"]) < 0.01
        assert 0.0 < found[f"{problem}: reversible"] < 0.15  # the buffer
    assert abs(found["ridge: implicit"]) < 0.01
    assert len({row["graph_bytes"] for row in rows if (row["problem"], row["mode"]) == ("QP", "implicit")}) == 1
    by_mode = {(row["problem"], row["mode"], row["iterations"]): row for row in rows}
    errors = {key: row["gradient_error"] for key, row in by_mode.items()}
    assert all(error < 1e-10 for (problem, mode, _), error in errors.items() if (problem, mode) == ("QP", "implicit"))
    last = ("ridge", "full", 160)
    assert errors[last] < 1e-5
    assert errors["ridge", "checkpointed", 160] == errors[last]
    assert errors["ridge", "reversible", 160] == pytest.approx(errors[last], rel=1e-6)
    assert errors["ridge", "one-step", 160] > errors["ridge", "truncated", 160] > 0.1
    assert errors["ridge", "implicit", 160] < errors[last]
    assert 0 < by_mode["ridge", "reversible", 160]["buffer_bits"] < 1


def test_an_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "no suite speed; there are memory, qp, kernel, simplex, scaling" in capsys.readouterr().err


def test_the_scaling_suite_has_a_row_a_size_a_batch_and_a_number_of_threads(monkeypatch):
    asked = []

    def here(function, argument, threads):
        asked.append((function, threads))
        return [{**row, "threads": threads} for row in scaling.with_threads(dict(argument))]

    monkeypatch.setattr(scaling, "fresh", here)
    rows = scaling.suite(Options(quick=True, threads=2))
    assert asked == [("benchmarks.scaling:with_threads", threads) for threads in (1, 2)]
    assert {(row["axis"], row["n"], row["batch"]) for row in rows} == {
        ("size", 5, 16),
        ("size", 20, 16),
        ("batch", 20, 1),
        ("batch", 20, 16),
        ("threads", 10, 16),
    }
    timed = [
        {"axis": "size", "n": n, "batch": 16, "contender": "qpth", "total_ms": {"median": n**3}} for n in (2, 4, 8)
    ]
    assert scaling.summary(timed)["slopes"] == {"time ~ n, qpth": 3.0}


def test_every_suite_is_in_the_frame():
    assert set(MODULES) == set(NAMES)
    for name in NAMES:
        suite = load(name)
        assert callable(suite.suite) and callable(suite.summary)


def test_the_training_script_learns_and_two_processes_learn_the_same():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    settings = ["benchmarks.train_gpu", "--device", "cpu", "--batch", "32", "--unknowns", "6", "--inequalities", "4"]
    settings += ["--steps", "30", "--rate", "0.02"]
    alone = train_gpu.train(train_gpu.parser().parse_args(settings[1:]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    done = subprocess.run(
        [sys.executable, *launcher, *settings],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(done.stdout.splitlines()[-1])
    assert (alone["processes"], two["processes"]) == (1, 2)
    assert two["apart"] == 0.0
    assert alone["last_loss"] < alone["first_loss"] - 0.05
    assert two["parameters"] == pytest.approx(alone["parameters"], rel=1e-3)


def test_the_transport_suite_compares_at_equal_errors_and_its_tables_show_it():
    forward = list(transport._forward(12, 0.1, torch.float64, 1e-9, 2))
    found = {row["contender"]: row for row in forward}
    assert found[transport.OURS]["marginal_error"] <= 1e-9
    if transport.HAS_POT:
        reached = max(1e-9, found["POT sinkhorn"]["marginal_error"])
        assert found[transport.EQUAL]["marginal_error"] <= reached
        assert found[transport.EQUAL]["tol"] >= 1e-9
    backward = list(transport._backward(10, 2, 0.1, torch.float64, 1))
    few, many = sorted((row for row in backward if row["contender"].startswith("implicit")), key=by_iterations)
    assert few["iterations"] < many["iterations"] and few["peak_MiB"] == many["peak_MiB"]
    assert many["gradient_error"] < few["gradient_error"] < 1e-3
    short, long = sorted((row for row in backward if row["contender"] == "unrolled"), key=by_iterations)
    assert long["graph_MiB"] > 3.5 * short["graph_MiB"] > 20 * many["graph_MiB"]
    assert long["gradient_error"] < 1e-8
    result = {"suite": "transport", "environment": environment("cpu", 0), "rows": forward + backward}
    assert "| float64 | 12 | 0.1 | " in tables.transport_forward(result)
    table = tables.transport_backward(result)
    assert table.count("| 0.1, float64 | implicit, tol ") == 2 and table.count("| 0.1, float64 | unrolled | ") == 2
    assert "2 problems of 10 × 10" in table


def by_iterations(row: dict) -> int:
    return row["iterations"]


def test_a_table_of_seeds_shows_the_mean_and_the_ends():
    rows = [
        {"head": head, "seed": seed, "both right": right, "digits right": 1.0, "seconds": 2.0}
        for head, *rights in (("one", 0.5, 0.7), ("other", 0.1, 0.2))
        for seed, right in enumerate(rights)
    ]
    table = tables.digit_pairs({"suite": "digit_pairs", "environment": environment("cpu", 0), "rows": rows})
    assert "| one | 0.600 (0.500 – 0.700) | 1.000 (1.000 – 1.000) | 2.0 (2.0 – 2.0) |" in table
    assert "| other | 0.150 (0.100 – 0.200) |" in table and "The mean of 2 seeds" in table
