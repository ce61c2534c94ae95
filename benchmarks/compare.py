"""`python -m benchmarks.compare OLD.json NEW.json`: the ratios of two results, and what became worse."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEYS = ("problem", "axis", "threads", "condition", "n", "n_ineq", "n_eq", "batch", "contender", "mode", "iterations")
TIME_FACTOR = 1.5  # medians of a quiet machine repeat within about 10 %
ERROR_FACTOR = 100.0
ERROR_FLOOR = 1e-10  # errors below this are rounding


def regressions(old: dict[str, Any], new: dict[str, Any], factor: float = TIME_FACTOR) -> list[str]:
    """One sentence for each row of `new` that is worse than the same row of `old`."""
    before = {_key(row): row for row in old["rows"]}
    found = []
    for row in new["rows"]:
        earlier = before.get(_key(row))
        if earlier is None:
            continue
        name = ", ".join(f"{key} {value}" for key, value in _key(row))
        if row.get("status", "ok") != earlier.get("status", "ok"):
            found.append(f"{name}: was {earlier['status']!r}, is {row['status']!r}")
        for time in ("forward_ms", "total_ms"):
            if time in row and time in earlier and row[time]["median"] > factor * earlier[time]["median"]:
                found.append(f"{name}: {time} {earlier[time]['median']:.2f} -> {row[time]['median']:.2f}")
        for size in ("graph_bytes", "peak_bytes"):
            if size in row and size in earlier and row[size] > factor * earlier[size]:
                found.append(f"{name}: {size} {earlier[size]} -> {row[size]}")
        for error in ("residual", "gradient_error"):
            if error in row and error in earlier and row[error] > max(ERROR_FACTOR * earlier[error], ERROR_FLOOR):
                found.append(f"{name}: {error} {earlier[error]:.1e} -> {row[error]:.1e}")
    return found


def ratios(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(row, figure, new/old) for every time and size that both results have."""
    before = {_key(row): row for row in old["rows"]}
    found = []
    for row in new["rows"]:
        earlier = before.get(_key(row), {})
        name = ", ".join(str(value) for _, value in _key(row))
        for figure in ("forward_ms", "total_ms", "graph_bytes", "peak_bytes", "resident_bytes"):
            mine, theirs = _number(row.get(figure)), _number(earlier.get(figure))
            if mine is not None and theirs:
                found.append((name, figure, mine / theirs))
    return found


def _number(figure: Any) -> float | None:
    """A figure, or the median of one that was repeated."""
    return figure["median"] if isinstance(figure, dict) else figure


def _key(row: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What is measured, without the figures; the iterations of an implicit solve may change."""
    left_out = {"iterations"} if row.get("mode") == "implicit" else set()
    return tuple((key, row[key]) for key in KEYS if key in row and key not in left_out)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    arguments.add_argument("old", type=Path)
    arguments.add_argument("new", type=Path)
    options = arguments.parse_args(argv)
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (options.old, options.new))
    every = ratios(old, new)
    for name, figure, ratio in every:
        print(f"{ratio:8.3f}  {figure:14} {name}")
    for figure in dict.fromkeys(figure for _, figure, _ in every):
        print(f"{figure}: median ratio {statistics.median(ratio for _, of, ratio in every if of == figure):.3f}")
    found = regressions(old, new)
    print("\n".join(found) or "nothing became worse")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
