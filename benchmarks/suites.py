"""The suites by name: what `python -m benchmarks.run NAME` measures.

A suite is a module with two functions, and a new one a line here:

    suite(options) -> rows     measure; a row is a flat dict with its keys (benchmarks.compare.KEYS) and its figures
    summary(rows) -> dict      what is printed and kept beside the rows

Most suites are a list of cases, the contenders of each, a `Judge` and one call of `benchmarks.measure.measure`;
`benchmarks/quadratic.py` is the one to copy. A table of it goes to `benchmarks/tables.py`, a figure to `plot.py`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

MODULES = {
    "memory": "benchmarks.memory",
    "qp": "benchmarks.quadratic",
    "kernel": "benchmarks.kernel",
    "simplex": "benchmarks.simplex",
    "scaling": "benchmarks.scaling",
}


def load(name: str) -> ModuleType:
    """The suite of that name."""
    return importlib.import_module(MODULES[name])
