"""The table of bad inputs: ours solves or refuses every one, and what the script says of an answer is right."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import bad_inputs
from benchmarks.bad_inputs import RESULTS, cases, judge, ours, ours_warning, table

GOOD = {"right", "refused"}


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_ours_solves_or_refuses(case):
    row = judge(case, ours)
    assert row["outcome"] in GOOD, row
    solvable = case.answer is not None and not bool(case.answer.isnan().any())
    assert row["outcome"] == ("right" if solvable else "refused")
    if row["outcome"] == "refused":
        kind, _, message = row["said"].partition(": ")
        assert kind.endswith("Error") and kind not in ("RuntimeError", "ValueError", "IndexError")
        assert len(message) > 20


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_warning_says_what_failed_and_the_others_are_right(case):
    row = judge(case, ours_warning)
    assert row["outcome"] in GOOD | {"warned", "warned, the others right"}, row


def test_answers_are_judged():
    by_name = {case.name: case for case in cases()}
    equality, infeasible = by_name["equalities only"], by_name["no feasible point (inequalities)"]

    def constant(value: list[float]):
        return lambda case: torch.tensor([value], dtype=torch.float64) + 0 * case.p

    def fails(case):
        raise RuntimeError("out of luck")

    assert judge(equality, constant([-0.5, 2.5]))["outcome"] == "right"
    assert judge(equality, constant([-0.5, 2.6]))["outcome"] == "wrong"
    assert judge(equality, constant([float("nan"), 2.5]))["outcome"] == "nan"
    assert judge(equality, fails)["outcome"] == "error"
    assert judge(infeasible, fails)["outcome"] == "refused"
    assert judge(infeasible, constant([0.0, 0.0]))["outcome"] == "wrong"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bad_inputs.main(["--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bad_inputs-quick.json").read_text(encoding="utf-8"))
    own = [row for row in result["rows"] if row["layer"] == "implicit_layers"]
    assert len(own) == 3 and all(row["outcome"] in GOOD for row in own)
    theirs = [row["outcome"] for row in result["rows"] if row["layer"] == "qpth"]
    assert theirs == (["not installed"] if find_spec("qpth") is None else ["wrong", "error", "nan"])
    assert "**wrong answer**, silent" in capsys.readouterr().out or find_spec("qpth") is None


def test_the_committed_table_is_whole():
    result = json.loads((RESULTS / "bad_inputs.json").read_text(encoding="utf-8"))
    rows = result["rows"]
    names = {case.name for case in cases()}
    for layer in bad_inputs.LAYERS:
        own = [row for row in rows if row["layer"] == layer]
        assert {row["input"] for row in own} == names
    assert all(row["outcome"] in GOOD for row in rows if row["layer"] == "implicit_layers")
    assert len(table(rows).splitlines()) == 2 + len(names)
