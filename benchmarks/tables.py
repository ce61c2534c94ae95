"""`python -m benchmarks.tables [--check]`: write the README's tables from `results/*.json`, between their markers."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
OURS = "implicit_layers"

Result = dict[str, Any]


def qp(result: Result) -> str:
    """One line a case: times of ours and each peer, how many times faster, certificates and gradient errors."""
    peers = sorted({row["contender"] for row in result["rows"]} - {OURS})
    head = ["problem", "n, n_ineq, n_eq", "batch", "ms, forward / total"]
    for peer in peers:
        head += [f"{peer} ms", f"times {peer}"]
    lines = [[*head, "KKT residual, ours", *peers, "gradient error, ours", *peers]]
    cases: dict[tuple, dict[str, Result]] = {}
    for row in result["rows"]:
        key = (row["problem"], row["n"], row["n_ineq"], row["n_eq"], row["batch"])
        cases.setdefault(key, {})[row["contender"]] = row
    for (problem, n, n_ineq, n_eq, batch), rows in cases.items():
        ours = rows[OURS]
        line = [problem, f"{n}, {n_ineq}, {n_eq}", str(batch), _times(ours)]
        for peer in peers:
            line += [_times(rows[peer]), _ratio(rows[peer], ours)]
        for figure in ("kkt", "gradient_error"):
            line += [_power(row.get(figure)) for row in (ours, *(rows[peer] for peer in peers))]
        lines.append(line)
    return _markdown(lines, left=1) + f"\n\n{_provenance(result)}"


def memory(result: Result) -> str:
    """One line a problem and mode: memory at the fewest and the most iterations, its exponent, errors there."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for row in result["rows"]:
        groups.setdefault((row["problem"], row["mode"]), []).append(row)
    lines = [["problem", "gradient", "iterations", "graph KiB", "grows as iterations to the", "gradient error"]]
    for (problem, mode), rows in groups.items():
        rows.sort(key=lambda row: row["iterations"])
        first, last = rows[0], rows[-1]
        exponent = result["slopes"].get(f"{problem}: {mode}")
        lines.append(
            [
                problem,
                mode,
                f"{first['iterations']} – {last['iterations']}",
                f"{first['peak_bytes'] / 1024:.0f} – {last['peak_bytes'] / 1024:.0f}",
                "–" if exponent is None else f"{abs(exponent):.2f}",
                f"{_power(first['gradient_error'])} – {_power(last['gradient_error'])}",
            ]
        )
    return _markdown(lines, left=2) + f"\n\n{_provenance(result)}"


TABLES: dict[str, Callable[[Result], str]] = {"qp": qp, "memory": memory}


def _times(row: Result) -> str:
    """Median milliseconds, or why there are none."""
    if row["status"] != "ok":
        return str(row["status"]).split(":")[0]
    return f"{_figure(row['forward_ms']['median'])} / {_figure(row['total_ms']['median'])}"


def _ratio(peer: Result, ours: Result) -> str:
    """How many times longer the peer takes, forward and backward together."""
    if peer["status"] != "ok" or ours["status"] != "ok":
        return "–"
    return f"{peer['total_ms']['median'] / ours['total_ms']['median']:.1f}"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _power(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def _markdown(lines: list[list[str]], left: int) -> str:
    """A table whose first columns are text and whose others are numbers."""
    rule = ["---" if i < left else "--:" for i in range(len(lines[0]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _provenance(result: Result) -> str:
    env = result["environment"]
    threads = f"{env['threads']} thread{'s' if env['threads'] != 1 else ''}"
    return (
        f"{env['device']}, {threads}, torch {env['torch']}, commit {env['commit']}, {env['date']}; float64, medians. "
        f"`python -m benchmarks.run {result['suite']}` makes it."
    )


def pattern(name: str) -> re.Pattern[str]:
    """The text between the markers of one table."""
    return re.compile(rf"(<!-- table:{name} -->\n)(.*?)(<!-- /table:{name} -->)", re.DOTALL)


def rewritten(readme: str, results: Path = RESULTS) -> str:
    """The README with every table that has a result; the others are empty."""
    for name, render in TABLES.items():
        path = results / f"{name}.json"
        body = f"\n{render(json.loads(path.read_text(encoding='utf-8')))}\n\n" if path.exists() else ""
        readme = pattern(name).sub(lambda found, body=body: found[1] + body + found[3], readme)
    return readme


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    arguments.add_argument("--check", action="store_true", help="write nothing; fail where README and JSON differ")
    check = arguments.parse_args(argv).check
    old = README.read_text(encoding="utf-8")
    new = rewritten(old)
    if check:
        print("README and results agree" if old == new else "README and results differ: python -m benchmarks.tables")
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
