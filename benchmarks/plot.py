"""`python -m benchmarks.plot [--check]`: the tables of both pages and `figures/*.png`, from `results/*.json` alone.

Each figure carries the fingerprint of the results that it was drawn from, so that `--check` and a test see an old one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import vae_tables
from benchmarks.tables import OURS, PAGES, RESULTS, Result, rewritten, times_longer

FIGURES = Path(__file__).parent / "figures"
COLOURS = {
    "implicit": "#d62728",
    "full": "#1f77b4",
    "checkpointed": "#2ca02c",
    "reversible": "#9467bd",
    "truncated": "#8c564b",
    "one-step": "#e377c2",
}


def memory(result: Result, axes: Any) -> None:
    """Gradient error against memory and against time, and memory against iterations, of the ridge problem."""
    groups: dict[str, list[Result]] = {}
    for row in result["rows"]:
        if row["problem"] == "ridge":
            groups.setdefault(row["mode"], []).append(row)
    for mode in [mode for mode in COLOURS if mode in groups]:
        rows = sorted(groups[mode], key=lambda row: row["iterations"])
        style = {"marker": "o", "ms": 4, "color": COLOURS[mode]}
        steps = [row["iterations"] for row in rows]
        error = [row["gradient_error"] for row in rows]
        size = [row["peak_bytes"] / 1024 for row in rows]
        milliseconds = [row["total_ms"]["median"] for row in rows]
        axes[0].loglog(size, error, label=mode, **style)
        axes[1].loglog(milliseconds, error, label=mode, **style)
        exponent = result.get("peak_slopes", result["slopes"]).get(f"ridge: {mode}")
        label = mode if exponent is None else f"{mode}: exponent {abs(exponent):.2f}"
        axes[2].loglog(steps, size, label=label, **style)
    _name(axes[0], "peak memory, KiB", "gradient error")
    _name(axes[1], "forward and backward, ms", "gradient error")
    _name(axes[2], "iterations", "peak memory, KiB")
    axes[0].set_title("better: down and left", fontsize=9)
    axes[2].legend(fontsize=7)


def qp(result: Result, axes: Any) -> None:
    """How many times longer each contender takes than `il.solve_qp`, one point a case."""
    cases: dict[tuple[Any, ...], dict[str, Result]] = {}
    for row in result["rows"]:
        key = tuple(row[name] for name in ("problem", "n", "n_ineq", "n_eq", "batch"))
        cases.setdefault(key, {})[row["contender"]] = row
    peers = [name for name in dict.fromkeys(row["contender"] for row in result["rows"]) if name != OURS]
    for ax, small in zip(axes, (True, False), strict=True):
        for i, name in enumerate(peers):
            for key, rows in cases.items():
                if (key[-1] == 1) == small and name in rows:
                    field = "total_ms" if "total_ms" in rows[name] else "forward_ms"
                    ratio = times_longer(rows[name], rows[OURS], field)
                    if ratio is not None:
                        ax.plot(ratio, i, "o", ms=5, alpha=0.6, color="#1f77b4" if field == "total_ms" else "#aaaaaa")
        ax.axvline(1.0, color="#d62728", lw=1)
        ax.set_xscale("log")
        ax.set_yticks(range(len(peers)), peers)
        ax.set_ylim(-0.5, len(peers) - 0.5)
        ax.invert_yaxis()
        _name(ax, "times as long as implicit_layers", "")
        ax.set_title("batch 1" if small else "batches (grey: forward only, no gradient)", fontsize=9)


def scaling(result: Result, axes: Any) -> None:
    """Forward and backward against size, batch and threads."""
    keys = {"size": "n", "batch": "batch", "threads": "threads"}
    for ax, (axis, key) in zip(axes, keys.items(), strict=True):
        rows = [row for row in result["rows"] if row["axis"] == axis and "total_ms" in row]
        for group in dict.fromkeys((row["contender"], *((row["n"],) if axis == "threads" else ())) for row in rows):
            chosen = [row for row in rows if (row["contender"], row["n"])[: len(group)] == group]
            chosen.sort(key=lambda row: row[key])
            label = ", n = ".join(map(str, group))
            style = "--" if group[0] != OURS else "-"
            times = [row["total_ms"]["median"] for row in chosen]
            ax.loglog([row[key] for row in chosen], times, f"o{style}", ms=4, label=label)
        _name(ax, key, "forward and backward, ms")
        if rows:
            ax.legend(fontsize=7)


def _name(ax: Any, x: str, y: str) -> None:
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.3, which="major")


# suite -> how many panels, their size in inches, and what draws them
DRAWN: dict[str, tuple[int, tuple[float, float], Callable[[Result, Any], None]]] = {
    "memory": (3, (12.0, 3.8), memory),
    "qp": (2, (10.0, 3.8), qp),
    "scaling": (3, (12.0, 3.6), scaling),
    "vae-gradients": (3, (12.0, 3.6), vae_tables.gradients),
}


def fingerprint(path: Path) -> str:
    """Of the results that a figure is drawn from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(suite: str, results: Path, figures: Path) -> Path:
    """One figure, with the fingerprint of its results in the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels, size, paint = DRAWN[suite]
    path = results / f"{suite}.json"
    figure, axes = pyplot.subplots(1, panels, figsize=size, layout="constrained")
    paint(json.loads(path.read_text(encoding="utf-8")), axes)
    drawn = figures / f"{suite}.png"
    figures.mkdir(parents=True, exist_ok=True)
    figure.savefig(drawn, dpi=110, metadata={"Source": fingerprint(path)})
    pyplot.close(figure)
    return drawn


def source(figure: Path) -> str | None:
    """The fingerprint in a figure."""
    from PIL import Image

    with Image.open(figure) as image:
        return image.info.get("Source")


def stale(results: Path = RESULTS, figures: Path = FIGURES) -> list[str]:
    """The figures that are missing or drawn from other results than those that are there."""
    found = []
    for suite in DRAWN:
        path, figure = results / f"{suite}.json", figures / f"{suite}.png"
        if path.exists() and (not figure.exists() or source(figure) != fingerprint(path)):
            found.append(suite)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    arguments.add_argument("--check", action="store_true", help="write nothing; fail where a page or figure is old")
    check = arguments.parse_args(argv).check
    old = {page: page.read_text(encoding="utf-8") for page in PAGES}
    new = {page: rewritten(text) for page, text in old.items()}
    outdated = stale()
    if check:
        good = old == new and not outdated
        print("pages, figures and results agree" if good else "they differ: python -m benchmarks.plot")
        return int(not good)
    for page, text in new.items():
        page.write_text(text, encoding="utf-8")
    for suite in outdated:
        print(draw(suite, RESULTS, FIGURES))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
