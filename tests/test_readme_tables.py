"""The README's figures are those of the committed results, and a changed figure is noticed."""

import json

import pytest

from benchmarks.tables import README, RESULTS, TABLES, pattern, rewritten

ENVIRONMENT = {"device": "a processor", "threads": 2, "torch": "2.13.0", "commit": "0123abc", "date": "2026-01-31"}


def row(contender: str, total: float, **more) -> dict:
    case = {"problem": "dense", "n": 5, "n_ineq": 4, "n_eq": 1, "batch": 8, "contender": contender}
    times = {"forward_ms": {"median": 0.8 * total}, "total_ms": {"median": total}}
    return {**case, "status": "ok", "kkt": 2e-15, "gradient_error": 3e-14, **times, **more}


@pytest.fixture
def results(tmp_path):
    absent = {"problem": "dense", "n": 9, "n_ineq": 4, "n_eq": 1, "batch": 8, "contender": "qpth"}
    qp = [
        row("implicit_layers", 2.0),
        row("qpth", 9.0, gradient_error=5e-6),
        row("implicit_layers", 150.0, n=9),
        {**absent, "status": "not installed"},
    ]
    memory = [
        {"problem": "ridge", "mode": "full", "iterations": k, "peak_bytes": 1024 * k, "gradient_error": 0.08 / k}
        for k in (40, 10)
    ]
    (tmp_path / "qp.json").write_text(json.dumps({"suite": "qp", "environment": ENVIRONMENT, "rows": qp}))
    slopes = {"ridge: full": 1.0}
    (tmp_path / "memory.json").write_text(
        json.dumps({"suite": "memory", "environment": ENVIRONMENT, "slopes": slopes, "rows": memory})
    )
    return tmp_path


def test_readme_and_results_agree():
    text = README.read_text(encoding="utf-8")
    for name in TABLES:
        assert pattern(name).search(text), f"README.md has no markers for the table {name!r}"
    assert rewritten(text) == text, "run python -m benchmarks.tables"


def test_committed_results_are_full_small_and_from_a_known_commit():
    for path in RESULTS.glob("*.json"):
        if path.stem.endswith("-quick"):
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["quick"] is False
        assert path.stat().st_size < 100_000
        assert not result["environment"]["commit"].endswith("dirty")


def test_tables_hold_the_figures(results):
    empty = "".join(f"<!-- table:{name} -->\n<!-- /table:{name} -->\n" for name in TABLES)
    text = rewritten(f"before\n{empty}after\n", results)
    assert "| dense | 5, 4, 1 | 8 | 1.60 / 2.00 | 7.20 / 9.00 | 4.5 | 2e-15 | 2e-15 | 3e-14 | 5e-06 |" in text
    assert "| dense | 9, 4, 1 | 8 | 120 / 150 | not installed | – | 2e-15 | – | 3e-14 | – |" in text
    assert "| ridge | full | 10 – 40 | 10 – 40 | 1.00 | 8e-03 – 2e-03 |" in text
    assert "commit 0123abc" in text and text.startswith("before\n") and text.endswith("after\n")
    assert rewritten(text, results) == text


def test_a_changed_figure_is_noticed(results):
    empty = "".join(f"<!-- table:{name} -->\n<!-- /table:{name} -->\n" for name in TABLES)
    text = rewritten(empty, results)
    assert rewritten(text.replace("4.5", "9.5"), results) == text


def test_a_table_without_results_is_empty(tmp_path):
    text = "<!-- table:qp -->\nold figures\n<!-- /table:qp -->"
    assert rewritten(text, tmp_path) == "<!-- table:qp -->\n<!-- /table:qp -->"
