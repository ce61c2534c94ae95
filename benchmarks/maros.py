"""Solvers on the MM-like set of `hard_qps`: `python -m benchmarks.maros [--quick] [--each N] [--out FOLDER]`.

Every solver gets every problem once, in float64 on one thread, asked in its own terms for that tolerance of 1e-8, 1e-9
and 1e-10 with which it did best; ours has its defaults. What it returns is judged by a certificate that shares nothing
with any of them: right (residual at most 1e-6); failed, and it says so; inaccurate (says solved, up to 1e-3); or wrong
(says solved, above that), which is the worst. Times are those of one call from dense data, for orientation.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import implicit_layers as il
from benchmarks.contenders import installed
from benchmarks.hard_qps import INF, Answer, Array, Problem, problems, residual
from benchmarks.run import RESULTS, save

LIMIT = 1e-6  # an answer with a larger residual is not right
WRONG = 1e-3  # above that, nobody would call it solved
ASKED = {"Clarabel": 1e-9, "PIQP": 1e-8, "ProxQP": 1e-10, "OSQP": 1e-9}


class Outcome(NamedTuple):
    """What a solver says and returns; no answer where it gives none."""

    says: str
    solved: bool
    answer: Answer | None


def ours(data: Problem) -> Outcome:
    def tensor(part: Array) -> torch.Tensor | None:
        return torch.from_numpy(part) if part.size else None

    bounds = {
        name: torch.from_numpy(side)
        for name, side in (("lb", data.lb), ("ub", data.ub))
        if bool(np.isfinite(side).any())
    }
    solution = il.solve_qp(
        torch.from_numpy(data.Q), torch.from_numpy(data.p), A=tensor(data.A), b=tensor(data.b), G=tensor(data.G),
        h=tensor(data.h), **bounds, on_failure="ignore",
    )  # fmt: skip
    status = il.Status(int(solution.info.status))
    bound = solution.lam_ub - solution.lam_lb
    answer = Answer(*(part.numpy() for part in (solution.z, solution.nu, solution.lam, bound)))
    return Outcome(status.name.lower(), status == il.Status.CONVERGED, answer)


def _rows(data: Problem) -> tuple[Array, Array, Array, Array]:
    """Finite bounds as rows: the matrix and the right-hand sides of identity z ≤ ub, −z ≤ −lb, and which they are."""
    n = len(data.p)
    upper, lower = np.isfinite(data.ub), np.isfinite(data.lb)
    matrix = np.r_[np.eye(n)[upper], -np.eye(n)[lower]]
    return matrix, np.r_[data.ub[upper], -data.lb[lower]], upper, lower


def _bound(multipliers: Array, upper: Array, lower: Array) -> Array:
    """lam_ub − lam_lb from the multipliers of those rows."""
    bound = np.zeros(len(upper))
    count = int(upper.sum())
    bound[upper] += multipliers[:count]
    bound[lower] -= multipliers[count:]
    return bound


def clarabel(data: Problem) -> Outcome:
    import clarabel
    from scipy import sparse

    matrix, right, upper, lower = _rows(data)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = ASKED["Clarabel"]
    n_eq, n_ineq = len(data.b), len(data.h)
    solver = clarabel.DefaultSolver(
        sparse.csc_matrix(np.triu(data.Q)),
        data.p,
        sparse.csc_matrix(np.r_[data.A, data.G, matrix]),
        np.r_[data.b, data.h, right],
        [clarabel.ZeroConeT(n_eq), clarabel.NonnegativeConeT(n_ineq + len(right))],
        settings,
    )
    solution = solver.solve()
    y = np.asarray(solution.z)
    bound = _bound(y[n_eq + n_ineq :], upper, lower)
    says = str(solution.status)
    return Outcome(says, says == "Solved", Answer(np.asarray(solution.x), y[:n_eq], y[n_eq : n_eq + n_ineq], bound))


def osqp(data: Problem) -> Outcome:
    import osqp
    from scipy import sparse

    n_eq, n_ineq, n = len(data.b), len(data.h), len(data.p)
    solver = osqp.OSQP()
    solver.setup(
        sparse.csc_matrix(np.triu(data.Q)),
        data.p,
        sparse.csc_matrix(np.r_[data.A, data.G, np.eye(n)]),
        np.r_[data.b, np.full(n_ineq, -INF), data.lb],
        np.r_[data.b, data.h, data.ub],
        verbose=False, eps_abs=ASKED["OSQP"], eps_rel=ASKED["OSQP"], max_iter=100_000, polishing=True, time_limit=10.0,
    )  # fmt: skip
    solution = solver.solve(raise_error=False)
    says = str(solution.info.status)
    if solution.x is None or solution.x[0] is None:
        return Outcome(says, False, None)
    y = np.asarray(solution.y)
    answer = Answer(np.asarray(solution.x), y[:n_eq], y[n_eq : n_eq + n_ineq], y[n_eq + n_ineq :])
    return Outcome(says, says == "solved", answer)


def piqp(data: Problem) -> Outcome:
    import piqp

    solver = piqp.DenseSolver()
    solver.settings.verbose = False
    solver.settings.eps_abs = solver.settings.eps_duality_gap_abs = ASKED["PIQP"]
    solver.settings.eps_rel = solver.settings.eps_duality_gap_rel = ASKED["PIQP"]

    def matrix(part: Array) -> Array | None:
        return np.asfortranarray(part) if part.size else None

    solver.setup(
        np.asfortranarray(data.Q), data.p, matrix(data.A), data.b if len(data.b) else None, matrix(data.G),
        np.full(len(data.h), -INF) if len(data.h) else None, data.h if len(data.h) else None, data.lb, data.ub,
    )  # fmt: skip
    says = str(solver.solve()).rsplit(".", 1)[-1]
    found = solver.result
    lam = np.asarray(found.z_u) if len(data.h) else np.zeros(0)
    nu = np.asarray(found.y) if len(data.b) else np.zeros(0)
    answer = Answer(np.asarray(found.x), nu, lam, np.asarray(found.z_bu) - np.asarray(found.z_bl))
    return Outcome(says, says == "PIQP_SOLVED", answer)


def proxqp(data: Problem) -> Outcome:
    module = importlib.import_module("proxsuite").proxqp
    n, n_eq, n_ineq = len(data.p), len(data.b), len(data.h)
    box = bool(np.isfinite(data.lb).any() or np.isfinite(data.ub).any())
    solver = module.dense.QP(n, n_eq, n_ineq, box)
    solver.settings.verbose = False
    solver.settings.eps_abs = solver.settings.eps_rel = ASKED["ProxQP"]
    solver.settings.max_iter = 10_000
    solver.settings.check_duality_gap = True
    solver.settings.eps_duality_gap_abs = solver.settings.eps_duality_gap_rel = ASKED["ProxQP"]
    A, b = (data.A, data.b) if n_eq else (None, None)
    G, low, h = (data.G, np.full(n_ineq, -1e30), data.h) if n_ineq else (None, None, None)
    sides = (np.maximum(data.lb, -1e30), np.minimum(data.ub, 1e30)) if box else ()
    solver.init(data.Q, data.p, A, b, G, low, h, *sides)
    solver.solve()
    found, says = solver.results, str(solver.results.info.status).rsplit(".", 1)[-1]
    y = np.asarray(found.z)
    bound = y[n_ineq:] if box else np.zeros(n)
    return Outcome(says, says == "PROXQP_SOLVED", Answer(np.asarray(found.x), np.asarray(found.y), y[:n_ineq], bound))


WORDS = ("right", "inaccurate", "failed", "wrong")
SOLVERS: dict[str, tuple[str, Callable[[Problem], Outcome]]] = {
    "implicit_layers": ("implicit_layers", ours),
    "Clarabel": ("clarabel", clarabel),
    "PIQP": ("piqp", piqp),
    "ProxQP": ("proxsuite", proxqp),
    "OSQP": ("osqp", osqp),
}


def measure(data: Problem, solve: Callable[[Problem], Outcome]) -> dict[str, Any]:
    """One solve: what it says, what it is worth, how long it took."""
    start = time.perf_counter()
    try:
        outcome = solve(data)
    except Exception as error:  # noqa: BLE001  whatever a solver raises is the result
        said = f"{type(error).__name__}: {str(error).strip()[:80]}"
        return {"outcome": "failed", "says": said, "ms": round(1e3 * (time.perf_counter() - start), 3)}
    row: dict[str, Any] = {"says": outcome.says, "ms": round(1e3 * (time.perf_counter() - start), 3)}
    if outcome.answer is None:
        return {"outcome": "failed", **row}
    row["residual"] = residual(data, outcome.answer)
    if data.value is not None:
        z = outcome.answer.z
        value = 0.5 * z @ data.Q @ z + data.p @ z
        row["value_error"] = abs(value - data.value) / max(1.0, abs(data.value))
    if not np.isfinite(row["residual"]):
        row["residual"] = None
    if not outcome.solved:
        return {"outcome": "failed", **row}
    worth = INF if row["residual"] is None else row["residual"]
    return {"outcome": "right" if worth <= LIMIT else "inaccurate" if worth <= WRONG else "wrong", **row}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a solver: how many of each outcome, the largest residual that it calls solved, the median time."""
    lines = []
    for name in dict.fromkeys(row["solver"] for row in rows):
        own = [row for row in rows if row["solver"] == name]
        if own[0]["outcome"] == "not installed":
            lines.append({"solver": name, "version": None})
            continue
        called = [row["residual"] for row in own if row["outcome"] in ("right", "inaccurate", "wrong")]
        largest = max((INF if value is None else value for value in called), default=0.0)
        count = {word: sum(row["outcome"] == word for row in own) for word in WORDS}
        lines.append(
            {
                "solver": name, "version": own[0]["version"], "problems": len(own), **count,
                "largest_residual": float(f"{largest:.2g}"),
                "median_ms": float(f"{statistics.median(row['ms'] for row in own):.3g}"),
            }
        )  # fmt: skip
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The summary in Markdown."""
    text = ["| solver | right | failed, says so | inaccurate | wrong | largest residual called solved | median ms |"]
    text += ["| --- | --: | --: | --: | --: | --: | --: |"]
    for line in lines:
        if line["version"] is None:
            text.append(f"| {line['solver']} | not installed | | | | | |")
            continue
        share = f"{line['right']} of {line['problems']} ({line['right'] / line['problems']:.0%})"
        text.append(
            f"| {line['solver']} {line['version']} | {share} | {line['failed']} | {line['inaccurate']} "
            f"| {line['wrong']} | {line['largest_residual']:.0e} | {line['median_ms']} |"
        )
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.maros", description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="one problem of each family, ours and Clarabel only")
    arguments.add_argument("--each", type=int, default=6, help="problems a family (default: %(default)s)")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = arguments.parse_args(argv)
    names = ["implicit_layers", "Clarabel"] if options.quick else list(SOLVERS)
    rows: list[dict[str, Any]] = []
    for name in names:
        package, solve = SOLVERS[name]
        found = installed(package)
        if found is None:
            rows.append({"solver": name, "outcome": "not installed"})
            continue
        for data in problems(1 if options.quick else options.each, options.seed):
            rows.append({"solver": name, "version": found, "problem": data.name, **measure(data, solve)})
    lines = summary(rows)
    path = save(options.out, "maros", options.quick, rows, options.seed, summary=lines)
    for row in rows:
        if row["outcome"] in WORDS[1:]:
            worth = f", residual {row['residual']:.1e}" if row.get("residual") is not None else ""
            print(f"{row['solver']}, {row['problem']}: {row['outcome']} ({row['says']}{worth})")
    print(table(lines))
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
