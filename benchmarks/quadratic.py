"""The suite "qp": `il.solve_qp` against its peers, layers and bare solvers, on every family of problems."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tqdm import tqdm

from benchmarks.contenders import QP_JUDGE, by_name, contenders
from benchmarks.fresh import resident
from benchmarks.measure import both, measure
from benchmarks.options import Options, Rows
from benchmarks.problems import PROBLEMS, QP

KEYS = ("problem", "n", "n_ineq", "n_eq", "batch")

# family, n, n_ineq, n_eq, batch
CASES = (
    ("dense", 10, 10, 0, 1),
    ("dense", 10, 10, 0, 128),
    ("dense", 20, 20, 5, 1),
    ("dense", 20, 20, 5, 128),
    ("dense", 50, 50, 10, 1),
    ("dense", 50, 50, 10, 128),
    ("dense", 100, 100, 50, 1),
    ("dense", 100, 100, 50, 128),
    ("dense", 20, 100, 0, 64),
    ("dense", 50, 200, 0, 64),
    ("dense", 10, 10, 0, 512),
    ("dense", 20, 20, 5, 512),
    ("dense", 50, 50, 10, 512),
    ("dense", 100, 100, 50, 512),
    ("other draws", 50, 50, 10, 128),
    ("ill-conditioned", 50, 50, 10, 128),
    ("qpth linear", 10, 10, 0, 128),
    ("qpth linear", 50, 50, 0, 128),
    ("qpth test", 10, 5, 3, 64),
    ("OptNet", 100, 10, 10, 64),
    ("SCQPTH", 25, 100, 0, 32),
    ("Alt-Diff", 50, 20, 10, 32),
    ("BPQP", 50, 10, 10, 1),
    ("dQP", 50, 50, 25, 1),
    ("simplex projection", 100, 100, 1, 32),
    ("ProxQP", 50, 20, 10, 32),
    ("qpax", 32, 64, 0, 64),
    ("cone program", 50, 20, 5, 32),
    ("known solution", 15, 10, 3, 64),
)
QUICK = (("dense", 10, 10, 0, 16), ("dense", 20, 20, 5, 16), ("known solution", 15, 10, 3, 8))
LARGE = 512  # batch from which those that take seconds to minutes are left out
SLOW = ("cvxpylayers", "qpax", "unrolled ADMM", "clarabel")
RESIDENT = ("dense", 50, 50, 10, 128)


def drawn(case: dict[str, Any], seed: int) -> QP:
    """The problem of a row."""
    return PROBLEMS[case["problem"]](case["n"], case["n_ineq"], case["n_eq"], case["batch"], seed)


def suite(options: Options) -> Rows:
    """Certificate, errors, memory, forward and forward + backward; one row a case and contender."""
    rows: Rows = []
    for key in tqdm(QUICK if options.quick else CASES, desc="qp"):
        case = dict(zip(KEYS, key, strict=True))
        rounds = 3 if options.quick else 10
        slow = SLOW if case["batch"] >= LARGE else ()
        measured = measure(
            drawn(case, options.seed),
            [contender for contender in contenders() if contender.name not in slow],
            QP_JUDGE,
            rounds=rounds,
            device=options.device,
            dtype=options.dtype,
        )
        for row in measured:
            local = row["status"] == "ok" and "peak_bytes" in row and options.device == "cpu"
            if local and (key == RESIDENT or (options.quick and key == QUICK[0] and row["contender"] in LIGHT)):
                argument = {**case, "contender": row["contender"], "seed": options.seed}
                row["resident_bytes"] = resident("benchmarks.quadratic:ready", argument)
        rows += [{**case, **row} for row in measured]
        rows += [{**case, "contender": name, "version": None, "status": "not run"} for name in slow]
    return rows


LIGHT = ("implicit_layers",)  # whose resident memory the quick run measures too


def ready(argument: dict[str, Any]) -> Callable[[], Any]:
    """One forward and backward pass of one contender, a small one of which has been run."""
    contender = by_name(argument["contender"])
    both(drawn({**argument, "batch": 1}, argument["seed"]), contender)
    return partial(both, drawn(argument, argument["seed"]), contender)


def summary(rows: Rows) -> dict[str, Any]:
    return {}
