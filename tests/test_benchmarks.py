"""The harness catches what it is there to catch: wrong answers, wrong gradients, slowdowns, missing peers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import memory
from benchmarks.compare import regressions
from benchmarks.contenders import OURS, installed
from benchmarks.measure import Answer, Contender, _interleave, measure, reference
from benchmarks.problems import PROBLEMS, QP, dense, known_solution, matvec, ridge
from benchmarks.run import main
from benchmarks.suites import slope, slopes
from implicit_layers.testing import kkt_certificate

ROOT = Path(__file__).parents[1]
SLEEP = 0.03


def only(problem: QP, contender: Contender, rounds: int = 2) -> dict:
    return measure(problem, [contender], rounds=rounds, device="cpu")[0]


@pytest.fixture(scope="module")
def problem() -> QP:
    return dense(6, 5, 2, 4)


def slightly_wrong(problem: QP) -> Answer:
    answer = OURS.solve(problem)
    return answer._replace(z=answer.z * (1 + 1e-4))


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
    assert row["kkt"] < 1e-12 and row["solution_error"] < 1e-11 and row["gradient_error"] < 1e-10
    assert len(row["forward_ms"]["repeats"]) == len(row["total_ms"]["repeats"]) == 2
    assert row["graph_bytes"] > 0


def test_a_planted_wrong_answer_is_not_timed(problem):
    row = only(problem, Contender("slightly wrong", "0", slightly_wrong))
    assert row["status"].startswith("wrong: KKT residual")
    assert "forward_ms" not in row


def test_a_planted_wrong_gradient_is_seen(problem):
    assert only(problem, Contender("blind to h", "0", blind_to_h))["gradient_error"] > 1e-3


def test_a_planted_slowdown_is_seen_and_named(problem):
    rows = measure(problem, [OURS, Contender("slow", "0", slow)], rounds=3, device="cpu")
    times = [row["forward_ms"]["median"] for row in rows]
    assert times[1] > 1e3 * SLEEP
    assert times[1] - times[0] > 0.5e3 * SLEEP
    before, after = ({"rows": [{"problem": "dense", **row, "contender": "x"}]} for row in rows)
    found = regressions(before, after)
    assert len(found) == 2 and "forward_ms" in found[0] and "total_ms" in found[1]
    assert regressions(after, before) == regressions(before, before) == []


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


def test_every_contender_takes_every_position_in_turn():
    order: list[int] = []
    _interleave([lambda i=i: order.append(i) for i in range(3)], rounds=1)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]


@pytest.mark.parametrize("name", PROBLEMS)
def test_generators_depend_on_their_seed_alone_and_make_feasible_programs(name):
    n_eq = 0 if name == "qpth linear" else 3
    one, same, other = (PROBLEMS[name](10, 8, n_eq, 4, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.Q, other.Q)
    assert all(tensor.dtype == torch.float64 and len(tensor) == 4 for tensor in one)
    assert torch.linalg.eigvalsh(one.Q).min() > 0
    z = reference(one).z
    assert (matvec(one.G, z) - one.h).max() < 1e-9 and (matvec(one.A, z) - one.b).abs().sum() < 1e-8


def test_known_solution_keeps_its_certificate():
    answer = OURS.solve(known_solution(15, 10, 3, 64))
    Q, p, A, b, G, h, _ = known_solution(15, 10, 3, 64)
    assert float(kkt_certificate(Q, p, *answer, A=A, b=b, G=G, h=h).max()) < 1e-9
    with pytest.raises(ValueError, match="no equalities"):
        PROBLEMS["qpth linear"](3, 3, 1, 1)


def test_ridge_is_solved_by_its_stated_solution():
    drawn = ridge(30, condition=50.0)
    H = drawn.X.mT @ (drawn.w[:, None] * drawn.X) + drawn.alpha * torch.eye(30)
    torch.testing.assert_close(H @ drawn.z, drawn.y)
    eigenvalues = torch.linalg.eigvalsh(H)
    torch.testing.assert_close(eigenvalues[[0, -1]], torch.tensor([0.02, 1.0]).double(), rtol=1e-6, atol=1e-8)
    z = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    theta = (drawn.w, drawn.alpha, drawn.X, drawn.y)
    (gradient,) = torch.autograd.grad(memory.objective(z, *theta), z)
    torch.testing.assert_close(memory.descent_step(z, *theta), z - gradient)


def test_slopes_are_exponents():
    assert slope([1, 10, 100], [7, 70, 700]) == pytest.approx(1.0)
    assert slope([4, 16, 64], [2, 4, 8]) == pytest.approx(0.5)
    rows = [
        {"problem": "QP", "mode": "implicit", "iterations": k, "peak_bytes": 5, "fixed_bytes": 0} for k in (8, 9, 12)
    ]
    assert slopes(rows) == {"QP: implicit": 0.0}
    assert slopes([{**row, "iterations": 8} for row in rows]) == {}
    grown = [{**row, "peak_bytes": 100 + 3 * row["iterations"], "fixed_bytes": 100} for row in rows]
    assert slopes(grown) == {"QP: implicit": 1.0}


def test_command_writes_a_small_file_that_says_where_it_comes_from(tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "qp", "--quick", "--threads", "1", "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "qp-quick.json").read_text()
    result = json.loads(text)
    assert len(text) < 100_000
    assert result["environment"]["pinned"] == {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    assert result["environment"]["threads"] == 1
    assert {"commit", "torch", "device", "seed", "date"} <= set(result["environment"])
    assert str(ROOT) not in text
    assert {row["contender"] for row in result["rows"]} == {"implicit_layers", "qpth"}
    assert all(row["status"] == "ok" for row in result["rows"] if row["contender"] == "implicit_layers")


def test_memory_of_the_implicit_gradient_is_flat_and_that_of_iterations_grows(tmp_path):
    assert main(["memory", "--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "memory-quick.json").read_text())
    assert abs(result["slopes"]["QP: implicit"]) < 0.01
    assert abs(result["slopes"]["ridge: implicit"]) < 0.01
    for problem in ("QP", "ridge"):
        assert 0.95 < result["slopes"][f"{problem}: full"] < 1.05
        assert 0.4 < result["slopes"][f"{problem}: checkpointed"] < 0.6
    errors = {(row["problem"], row["mode"]): row["gradient_error"] for row in result["rows"]}
    assert errors["QP", "implicit"] < 1e-10  # the hardest of its rows
    assert errors["QP", "full"] < 1e-1


def test_an_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "no suite speed; there are qp, memory" in capsys.readouterr().err
