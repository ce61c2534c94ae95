"""The set of hard quadratic programs and its certificate: an independent solver agrees, spoilt answers are caught."""

from __future__ import annotations

import json
from pathlib import Path

import cvxpy
import numpy as np
import pytest

from benchmarks import maros
from benchmarks.hard_qps import FAMILIES, INF, Answer, Problem, problem, problems, residual
from benchmarks.maros import LIMIT, RESULTS, WORDS, Outcome, measure, ours, summary, table

SMALL = [data for data in problems(1) if len(data.p) <= 120]


def independent(data: Problem) -> float:
    """The optimal value by cvxpy with Clarabel."""
    z = cvxpy.Variable(len(data.p))
    root = np.linalg.eigh(data.Q)
    factor = root.eigenvectors * np.sqrt(np.maximum(root.eigenvalues, 0.0))
    constraints = [z[i] <= data.ub[i] for i in np.flatnonzero(np.isfinite(data.ub))]
    constraints += [z[i] >= data.lb[i] for i in np.flatnonzero(np.isfinite(data.lb))]
    constraints += [data.A @ z == data.b] if len(data.b) else []
    constraints += [data.G @ z <= data.h] if len(data.h) else []
    objective = cvxpy.Minimize(0.5 * cvxpy.sum_squares(factor.T @ z) + data.p @ z)
    return cvxpy.Problem(objective, constraints).solve(solver=cvxpy.CLARABEL)


def value(data: Problem, z: np.ndarray) -> float:
    return float(0.5 * z @ data.Q @ z + data.p @ z)


@pytest.mark.parametrize("data", SMALL, ids=lambda data: data.name)
def test_ours_solves_the_small_ones_and_an_independent_solver_agrees(data):
    outcome = ours(data)
    assert outcome.solved
    assert residual(data, outcome.answer) <= LIMIT
    expected = independent(data) if data.value is None else data.value
    assert value(data, outcome.answer.z) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_set_is_the_same_for_the_same_seed_and_convex():
    first, second, other = list(problems(2)), list(problems(2)), list(problems(2, seed=1))
    assert len(first) == 2 + 2 * len(FAMILIES)
    assert len({data.name for data in first}) == len(first)
    different = 0
    for a, b, c in zip(first, second, other, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a[1:9], b[1:9], strict=True))
        different += not np.array_equal(a.p, c.p) or not np.array_equal(a.b, c.b) or not np.array_equal(a.h, c.h)
        eigenvalues = np.linalg.eigvalsh(a.Q)
        assert eigenvalues[0] >= -1e-12 * max(abs(eigenvalues[-1]), 1e-300)
        assert len(a.p) <= 300
    assert different >= len(FAMILIES) - 3


def test_it_is_as_hard_as_it_says():
    drawn = list(problems(2))
    singular = [data for data in drawn if np.linalg.matrix_rank(data.Q) < len(data.p)]
    linear = [data for data in drawn if not data.Q.any()]
    dependent = [data for data in drawn if len(data.b) and np.linalg.matrix_rank(data.A) < len(data.b)]
    fixed = [data for data in drawn if (data.lb == data.ub).any()]
    wide = [data for data in drawn if (np.isfinite(data.ub) & (data.ub > 1e7)).any()]
    free = [data for data in drawn if (np.isinf(data.lb) & np.isinf(data.ub)).any()]
    assert min(map(len, (singular, linear, dependent, free))) >= 4
    assert fixed and wide


# --- the certificate --------------------------------------------------------------------------------------------------


def two() -> tuple[Problem, Answer]:
    """min ½|z|² − 4 z₁ + z₂ with z₁ + z₂ = 2, z₁ ≤ 2.5, 0 ≤ z₂: z = (2, 0), nu = 2, bound = (0, −3)."""
    data = problem(
        "two", np.eye(2), np.array([-4.0, 1.0]), A=np.ones((1, 2)), b=np.array([2.0]), G=np.array([[1.0, 0.0]]),
        h=np.array([2.5]), lb=np.array([-INF, 0.0]),
    )  # fmt: skip
    return data, Answer(np.array([2.0, 0.0]), np.array([2.0]), np.zeros(1), np.array([0.0, -3.0]))


def test_an_exact_answer_has_no_residual_and_spoilt_ones_have():
    data, exact = two()
    assert residual(data, exact) < 1e-15
    spoilt = [
        exact._replace(z=np.array([2.0, 1e-3])),
        exact._replace(z=np.array([2.001, -1e-3])),
        exact._replace(nu=np.array([2.01])),
        exact._replace(lam=np.array([0.01])),
        exact._replace(lam=np.array([-0.01]), nu=np.array([2.01])),
        exact._replace(bound=np.array([1e-2, -3.0])),
        exact._replace(z=np.array([np.nan, 0.0])),
    ]
    assert min(residual(data, answer) for answer in spoilt) > 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_units_do_not_matter(seed):
    """In other units of rows, unknowns and cost, an inexact answer is inexact by the same amount, or nearly."""
    rng = np.random.default_rng(seed)
    data, exact = two()
    answer = exact._replace(z=exact.z + 1e-4 * rng.standard_normal(2), nu=exact.nu + 1e-4)
    d, e, g, c = 10.0 ** rng.uniform(-4, 4, 2), *(10.0 ** rng.uniform(-4, 4, 3))
    moved = Problem(
        "moved", c * d[:, None] * data.Q * d, c * d * data.p, e * data.A * d, e * data.b, g * data.G * d, g * data.h,
        data.lb / d, data.ub / d,
    )  # fmt: skip
    other = Answer(answer.z / d, c * answer.nu / e, c * answer.lam / g, c * d * answer.bound)
    assert 0.1 < residual(moved, other) / residual(data, answer) < 10.0


# --- the script -------------------------------------------------------------------------------------------------------


def test_a_solver_that_lies_is_called_wrong_and_one_that_gives_up_failed():
    data, exact = two()
    lies = exact._replace(z=np.array([1.0, 1.0]))
    near = exact._replace(z=np.array([2.0, 1e-5]))
    assert measure(data, lambda _: Outcome("solved", True, exact))["outcome"] == "right"
    assert measure(data, lambda _: Outcome("solved", True, near))["outcome"] == "inaccurate"
    assert measure(data, lambda _: Outcome("solved", True, lies))["outcome"] == "wrong"
    assert measure(data, lambda _: Outcome("gave up", False, lies))["outcome"] == "failed"
    assert measure(data, lambda _: Outcome("gave up", False, None))["outcome"] == "failed"
    assert measure(data, lambda _: 1 / 0)["says"].startswith("ZeroDivisionError")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert maros.main(["--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "maros-quick.json").read_text(encoding="utf-8"))
    first = result["summary"][0]
    assert first["solver"] == "implicit_layers"
    assert first["right"] >= 0.9 * first["problems"]
    assert first["wrong"] == 0
    assert "| Clarabel" in capsys.readouterr().out


def test_the_committed_result_keeps_its_promise():
    result = json.loads((RESULTS / "maros.json").read_text(encoding="utf-8"))
    lines = {line["solver"]: line for line in result["summary"]}
    first = lines["implicit_layers"]
    assert first["right"] >= 0.95 * first["problems"]
    assert first["wrong"] == 0
    assert {"Clarabel", "PIQP", "ProxQP", "OSQP"} <= set(lines)
    own = [row for row in result["rows"] if row["solver"] == "implicit_layers"]
    counted = {word: sum(row["outcome"] == word for row in own) for word in WORDS}
    assert counted == {word: first[word] for word in WORDS}
    assert table(summary(result["rows"])) == table(result["summary"])
