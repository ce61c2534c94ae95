"""The suite "scaling": the cost of `il.solve_qp` and of qpth against size, batch and threads, on the dense family."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from benchmarks.contenders import OURS, QP_JUDGE, by_name
from benchmarks.fresh import fresh
from benchmarks.measure import measure
from benchmarks.memory import slope
from benchmarks.options import Options, Rows
from benchmarks.problems import dense

SIZES = (5, 10, 20, 40, 80, 160, 320)  # at batch 16
BATCHES = (1, 4, 16, 64, 256, 1024)  # at n = 20
THREADED = ((20, 256), (100, 64))  # n, batch
SIZES_QUICK, BATCHES_QUICK, THREADED_QUICK = (5, 20), (1, 16), ((10, 16),)
CONTENDERS = ("implicit_layers", "qpth")


def suite(options: Options) -> Rows:
    """One row a size, batch, number of threads and contender; other numbers of threads in processes of their own."""
    quick = options.quick
    cases = [("size", n, 16) for n in (SIZES_QUICK if quick else SIZES)]
    cases += [("batch", 20, batch) for batch in (BATCHES_QUICK if quick else BATCHES)]
    rows: Rows = []
    for axis, n, batch in tqdm(cases, desc="scaling"):
        rows += _rows({"axis": axis, "n": n, "batch": batch}, options, options.threads)
    if options.device != "cpu":
        return rows
    counts = [k for k in (1, 2, 4, 8, 16, 32) if k < options.threads] + [options.threads]
    for n, batch in THREADED_QUICK if quick else THREADED:
        for threads in counts:
            argument = {"axis": "threads", "n": n, "batch": batch, "seed": options.seed, "quick": quick}
            rows += fresh("benchmarks.scaling:with_threads", argument, threads=threads)
    return rows


def _rows(case: dict[str, Any], options: Options, threads: int) -> Rows:
    n, batch = case["n"], case["batch"]
    measured = measure(
        dense(n, n, n // 5, batch, options.seed),
        [OURS, by_name("qpth")],
        QP_JUDGE,
        rounds=3 if options.quick else 10,
        device=options.device,
        dtype=options.dtype,
    )
    return [{"problem": "dense", **case, "threads": threads, **row} for row in measured]


def with_threads(argument: dict[str, Any]) -> Rows:
    """The rows of one case with the threads of this process."""
    options = Options(quick=argument.pop("quick"), seed=argument.pop("seed"))
    return _rows(argument, options, torch.get_num_threads())


def summary(rows: Rows) -> dict[str, Any]:
    """The exponents of time in size and in batch, over the larger half of each."""
    found: dict[str, float] = {}
    for axis, key in (("size", "n"), ("batch", "batch")):
        for contender in CONTENDERS:
            points = [
                (row[key], row["total_ms"]["median"])
                for row in rows
                if row["axis"] == axis and row["contender"] == contender and "total_ms" in row
            ]
            upper = sorted(points)[len(points) // 2 :]
            if len(upper) > 1:
                x, y = zip(*upper, strict=True)
                found[f"time ~ {key}, {contender}"] = round(slope(list(x), list(y)), 3)
    return {"slopes": found}
