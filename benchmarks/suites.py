"""The suites: what `python -m benchmarks.run NAME` measures. A new one is a function here and a line in SUITES."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import memory
from benchmarks.contenders import contenders
from benchmarks.measure import measure
from benchmarks.problems import PROBLEMS

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    device: str = "cpu"
    seed: int = 0
    quick: bool = False


# family, n, n_ineq, n_eq, batch
QP_CASES = (
    ("dense", 10, 10, 0, 1),
    ("dense", 10, 10, 0, 128),
    ("dense", 20, 20, 5, 1),
    ("dense", 20, 20, 5, 128),
    ("dense", 50, 50, 10, 1),
    ("dense", 50, 50, 10, 128),
    ("dense", 100, 100, 50, 1),
    ("dense", 100, 100, 50, 128),
    ("qpth linear", 10, 10, 0, 128),
    ("qpth linear", 50, 50, 0, 128),
    ("qpth test", 10, 5, 3, 64),
    ("known solution", 15, 10, 3, 64),
)
QP_CASES_QUICK = (("dense", 10, 10, 0, 16), ("dense", 20, 20, 5, 16), ("known solution", 15, 10, 3, 8))


def qp(options: Options) -> Rows:
    """`il.solve_qp` against its peers: certificate, errors, graph memory, forward and forward + backward."""
    rows: Rows = []
    cases = QP_CASES_QUICK if options.quick else QP_CASES
    for family, n, n_ineq, n_eq, batch in tqdm(cases, desc="qp"):
        problem = PROBLEMS[family](n, n_ineq, n_eq, batch, options.seed)
        case = {"problem": family, "n": n, "n_ineq": n_ineq, "n_eq": n_eq, "batch": batch}
        measured = measure(problem, contenders(), rounds=3 if options.quick else 15, device=options.device)
        rows += [{**case, **row} for row in measured]
    return rows


def memory_suite(options: Options) -> Rows:
    """Bytes of the autograd graph, gradient error and time, against the number of iterations."""
    rows: Rows = []
    for part in tqdm((memory.quadratic_program, memory.ridge_regression), desc="memory"):
        rows += part(options.quick, options.seed, torch.device(options.device))
    return rows


SUITES: dict[str, Callable[[Options], Rows]] = {"qp": qp, "memory": memory_suite}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The least-squares slope of log y on log x: 1 linear, ½ square root, 0 flat."""
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum((a - mean_u) ** 2 for a in u)


def slopes(rows: Rows) -> dict[str, float]:
    """The exponent of memory in the number of iterations, one a problem and mode of the memory suite.

    Memory that no iteration adds to (`fixed_bytes`, the factors of an unrolled QP) is taken off first.
    """
    groups: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        point = (row["iterations"], row["peak_bytes"] - row["fixed_bytes"])
        groups.setdefault(f"{row['problem']}: {row['mode']}", []).append(point)
    return {
        name: round(slope(*zip(*points, strict=True)), 3)
        for name, points in groups.items()
        if len({iterations for iterations, _ in points}) > 1
    }
