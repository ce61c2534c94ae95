"""What the demonstration found: a table to read and a figure to look at."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from implicit_layers.demonstration.digits import require
from implicit_layers.demonstration.models import QP_STEPS, SOFTMAX_STEPS
from implicit_layers.demonstration.training import Result, Settings

HEAD = ("model", "gradient", "test accuracy", "forward ms", "backward ms", "graph KiB", "gradient error")
COLOURS = {"implicit": "#1b6ca8", "unrolled": "#d9822b"}


def table(results: list[Result], settings: Settings) -> str:
    """The figures of every model and mode, with a line for what they mean."""
    rows = [HEAD] + [
        (
            result.model,
            result.how,
            f"{result.accuracies[-1]:.1%}",
            f"{result.forward_ms:.2f}",
            f"{result.backward_ms:.2f}",
            f"{result.graph_bytes / 1024:.0f}",
            f"{result.gradient_error:.1e}",
        )
        for result in results
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = ["  ".join(_cell(row[i], widths[i], left=i < 2) for i in range(len(HEAD))) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", *_notes(settings)])


def _cell(text: str, width: int, *, left: bool) -> str:
    """Names to the left, numbers to the right."""
    return text.ljust(width) if left else text.rjust(width)


def _notes(settings: Settings) -> list[str]:
    """How the numbers were obtained."""
    return [
        f"Handwritten digits, {settings.epochs} epochs, batches of {settings.batch}, {settings.dtype} on "
        f"{settings.device}, seed {settings.seed}. Milliseconds: median of a training step.",
        "Graph: bytes kept for the backward pass of one step, distinct storages, parameters and data left out.",
        "Gradient error: relative, all parameters together, at the same weights and batch, against float64:",
        "  softmax LP: the closed form by plain autograd; QP layer: a dense KKT solve on the verified active set.",
        f"Unrolled: {SOFTMAX_STEPS} steps of mirror ascent, {QP_STEPS} steps of ADMM.",
    ]


def figure(results: list[Result], path: Path) -> None:
    """Save the training curves and the bars of memory, time and gradient error, one row a model, as a PNG."""
    canvas = require("matplotlib.figure").Figure(figsize=(15, 7), layout="constrained")
    names = list(dict.fromkeys(result.model for result in results))
    axes = canvas.subplots(len(names), 5, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        pair = [result for result in results if result.model == name]
        _curves(row[0], pair, "training loss", lambda result: result.losses)
        row[0].set_yscale("log")
        _curves(row[1], pair, "test accuracy", lambda result: result.accuracies)
        _times(row[2], pair)
        _bars(row[3], pair, "autograd graph, KiB", [result.graph_bytes / 1024 for result in pair])
        _bars(row[4], pair, "relative gradient error", [result.gradient_error for result in pair])
        row[0].set_ylabel(name, fontsize=13, fontweight="bold")
    canvas.suptitle("Digits: the same model, differentiated implicitly and through its iterations")
    canvas.savefig(path, format="png", dpi=110)


def _curves(axis: Any, pair: list[Result], title: str, values: Callable[[Result], list[float]]) -> None:
    """One curve a mode; the second dashed, because they often coincide."""
    for result, style in zip(pair, ("-", "--"), strict=True):
        epochs = range(1, len(values(result)) + 1)
        axis.plot(epochs, values(result), style, color=COLOURS[result.how], label=result.how, marker="o", markersize=3)
    axis.set_title(title)
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)


def _times(axis: Any, pair: list[Result]) -> None:
    """Forward and backward milliseconds on top of each other."""
    for i, result in enumerate(pair):
        colour = COLOURS[result.how]
        axis.bar(i, result.forward_ms, color=colour)
        axis.bar(i, result.backward_ms, bottom=result.forward_ms, color=colour, alpha=0.45, hatch="//")
        total = result.forward_ms + result.backward_ms
        axis.annotate(f"{total:.1f}", (i, total), ha="center", va="bottom")
    axis.set_xticks(range(len(pair)), [result.how for result in pair])
    axis.set_title("ms a step (hatched: backward)")
    axis.margins(y=0.15)


def _bars(axis: Any, pair: list[Result], title: str, values: list[float]) -> None:
    """One bar a mode on a logarithmic axis, its value written above it; an exact zero gets the lowest bar."""
    heights = [max(value, 1e-17) for value in values]
    axis.bar(range(len(pair)), heights, color=[COLOURS[result.how] for result in pair])
    axis.set_yscale("log")
    axis.set_ylim(10 ** (math.floor(math.log10(min(heights))) - 1), 10 ** (math.ceil(math.log10(max(heights))) + 1))
    for i, (value, height) in enumerate(zip(values, heights, strict=True)):
        text = f"{value:.0f}" if value >= 1 or value == 0 else f"{value:.0e}"
        axis.annotate(text, (i, height), ha="center", va="bottom")
    axis.set_xticks(range(len(pair)), [result.how for result in pair])
    axis.set_title(title)
