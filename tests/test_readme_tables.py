"""The README's figures are those of the committed results, and a changed figure is noticed."""

import json

import pytest

from benchmarks.plot import DRAWN, draw, fingerprint, source, stale
from benchmarks.suites import MODULES
from benchmarks.tables import PAGES, RESULTS, TABLES, pattern, rewritten, times_longer

ENVIRONMENT = {"device": "a processor", "threads": 2, "torch": "2.13.0", "commit": "0123abc", "date": "2026-01-31"}


def row(contender: str, total: float, **more) -> dict:
    case = {"problem": "dense", "n": 5, "n_ineq": 4, "n_eq": 1, "batch": 8, "contender": contender}
    times = {"forward_ms": {"median": 0.8 * total}, "total_ms": {"median": total}}
    return {**case, "status": "ok", "residual": 2e-15, "version": "1.0", "gradient_error": 3e-14, **times, **more}


@pytest.fixture
def results(tmp_path):
    absent = {"problem": "dense", "n": 9, "n_ineq": 4, "n_eq": 1, "batch": 8, "contender": "qpth", "version": None}
    qp = [
        row("implicit_layers", 2.0),
        row("qpth", 9.0, gradient_error=5e-6),
        row("implicit_layers", 150.0, n=9),
        {**absent, "status": "not installed"},
    ]
    memory = [
        {
            "problem": "ridge",
            "mode": "full",
            "iterations": k,
            "graph_bytes": 1024 * k,
            "peak_bytes": 2048 * k,
            "gradient_error": 0.08 / k,
        }
        | {"total_ms": {"median": 2.0 * k}, "buffer_bits": 0.25}
        for k in (40, 10)
    ]
    (tmp_path / "qp.json").write_text(json.dumps({"suite": "qp", "environment": ENVIRONMENT, "rows": qp}))
    slopes = {"ridge: full": 1.0}
    (tmp_path / "memory.json").write_text(
        json.dumps({"suite": "memory", "environment": ENVIRONMENT, "slopes": slopes, "rows": memory})
    )
    return tmp_path


def test_readme_and_results_agree():
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    for name in TABLES:
        assert len(pattern(name).findall("".join(texts))) == 1, f"not one pair of markers for the table {name!r}"
    for text in texts:
        assert rewritten(text) == text, "run python -m benchmarks.plot"


def test_committed_results_are_full_small_and_from_a_known_commit():
    for path in (RESULTS / f"{name}.json" for name in MODULES):
        if not path.exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["quick"] is False
        assert not result["environment"]["commit"].endswith("dirty")
    assert sum(path.stat().st_size for path in RESULTS.glob("*.json")) < 1_000_000


def test_figures_are_drawn_from_the_committed_results():
    assert stale() == [], "run python -m benchmarks.plot"


def test_tables_hold_the_figures(results):
    empty = "".join(f"<!-- table:{name} -->\n<!-- /table:{name} -->\n" for name in TABLES)
    text = rewritten(f"before\n{empty}after\n", results)
    assert "| dense | 5, 4, 1 | 8 | 1.60 / 2.00 | 9.00 (4.5) |" in text
    assert "| dense | 9, 4, 1 | 8 | 120 / 150 | not installed |" in text
    assert "| ridge | full | 10 – 40 | 10 – 40 | 1.00 | 20 – 80 | 8e-03 – 2e-03 | 20.0 – 80.0 |" in text
    assert "| qpth | 1.0 | 1 of 2 | 2e-15 | 2e-15 | 5e-06 | 5e-06 |" in text
    assert "| implicit_layers | 1.0 | 2 of 2 | 2e-15 | 2e-15 | 3e-14 | 3e-14 |" in text
    assert "takes 0.25 bits a number and step" in text
    assert "commit 0123abc" in text and text.startswith("before\n") and text.endswith("after\n")
    assert rewritten(text, results) == text


def test_a_changed_figure_is_noticed(results):
    empty = "".join(f"<!-- table:{name} -->\n<!-- /table:{name} -->\n" for name in TABLES)
    text = rewritten(empty, results)
    assert rewritten(text.replace("4.5", "9.5"), results) == text


def test_a_table_without_results_is_empty(tmp_path):
    text = "<!-- table:qp -->\nold figures\n<!-- /table:qp -->"
    assert rewritten(text, tmp_path) == "<!-- table:qp -->\n<!-- /table:qp -->"


def test_a_ratio_is_the_median_of_the_ratios_within_the_rounds():
    ours = {"total_ms": {"median": 2.0, "repeats": [1.0, 2.0, 8.0]}}
    peer = {"total_ms": {"median": 4.0, "repeats": [4.0, 4.0, 8.0]}}
    assert times_longer(peer, ours) == 2.0
    assert times_longer({"total_ms": {"median": 5.0, "repeats": [5.0]}}, ours) == 2.5
    assert times_longer({}, ours) is None


@pytest.mark.parametrize("suite", ["memory", "qp"])
def test_a_figure_knows_its_results_and_an_old_one_is_seen(results, tmp_path, suite):
    assert suite in DRAWN
    figures = tmp_path / "figures"
    assert sorted(stale(results, figures)) == ["memory", "qp"]
    figure = draw(suite, results, figures)
    assert source(figure) == fingerprint(results / f"{suite}.json")
    assert suite not in stale(results, figures)
    (results / f"{suite}.json").write_text((results / f"{suite}.json").read_text() + " ")
    assert suite in stale(results, figures)
