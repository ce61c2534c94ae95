"""What layers for quadratic programs do with bad input: `python -m benchmarks.bad_inputs [--quick] [--out FOLDER]`.

Twelve kinds, each a few numbers large, given with default settings to every layer that is installed. The table says
what comes back. A solvable program must be solved and an unsolvable one refused; worst is a wrong answer in silence.
Every layer runs in a process of its own, so that a crash is a result as well.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicit_layers
from benchmarks.contenders import installed
from benchmarks.run import RESULTS, save

SECONDS = 60.0  # for one input
ATOL = 1e-4  # how near an answer must be; loose, to be fair to first-order solvers


class Case(NamedTuple):
    """One kind of bad input: min ½ zᵀQz + pᵀz subject to Az = b, Gz ≤ h; None where there are no such rows."""

    name: str
    Q: Tensor
    p: Tensor
    A: Tensor | None
    b: Tensor | None
    G: Tensor | None
    h: Tensor | None
    answer: Tensor | None  # (B, n) with NaN in the rows of problems without a solution; None: nothing to return


def cases() -> list[Case]:
    """The twelve, all with n = 2."""

    def tensor(*rows: Any) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    eye, zero, nan = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64), math.nan
    p = tensor([-1.0, -4.0])
    box, width = torch.cat([eye, -eye]), tensor([2.0, 3.0, 0.0, 0.0])  # 0 <= z <= (2, 3)
    inside = tensor([1.0, 3.0])  # the solution with these
    apart = tensor([2.0, 3.0, -2.5, 0.0])  # z_1 <= 2 and z_1 >= 2.5
    one_bad = torch.cat([width, width, apart, width])
    answers = torch.cat([inside, inside, tensor([nan, nan]), inside])
    row, twice = tensor([1.0, 1.0]), tensor([1.0, 1.0], [1.0, 1.0])
    return [
        Case("no feasible point (inequalities)", eye, p, None, None, box, apart, None),
        Case("one infeasible problem among four", eye, p.expand(4, 2), None, None, box, one_bad, answers),
        Case("contradictory equalities", eye, p, twice, tensor([1.0, 2.0]), box, width, None),
        Case("a duplicated equality", eye, p, twice, tensor([2.0, 2.0]), box, width, tensor([0.0, 2.0])),
        Case("unbounded objective", zero, p, None, None, -eye, tensor([0.0, 0.0]), None),
        Case("indefinite Q", eye * tensor([1.0, -1.0]), p, None, None, -eye, tensor([0.0, 0.0]), None),
        Case("linear program, Q = 0", zero, p, None, None, box, width, tensor([2.0, 3.0])),
        Case("NaN in p", eye, tensor([nan, -4.0]), None, None, box, width, None),
        Case("+inf in h (no such row)", eye, p, None, None, box, tensor([math.inf, 3.0, 0.0, 0.0]), inside),
        Case("equalities only", eye, p, row, tensor([2.0]), None, None, tensor([-0.5, 2.5])),
        Case("an empty batch", eye, p[:0], None, None, box, width, p[:0]),
        Case("G with too many columns", eye, p, None, None, torch.cat([box, box[:, :1]], 1), width, None),
    ]


# --- the layers -----------------------------------------------------------------------------------------------------


def ours(case: Case, on_failure: str = "raise") -> Tensor:
    return implicit_layers.solve_qp(case.Q, case.p, A=case.A, b=case.b, G=case.G, h=case.h, on_failure=on_failure).z


def ours_warning(case: Case) -> Tensor:
    return ours(case, "warn")


def qpth(case: Case) -> Tensor:
    none = torch.Tensor()
    rows = (none if rows is None else rows for rows in (case.G, case.h, case.A, case.b))
    return importlib.import_module("qpth.qp").QPFunction()(case.Q, case.p, *rows)


def proxsuite(case: Case) -> Tensor:
    layer = importlib.import_module("proxsuite.torch.qplayer").QPFunction()
    n, size = case.p.shape[-1], len(case.p)
    empty = case.p.new_zeros(size, 0, n), case.p.new_zeros(size, 0)
    A, b = empty if case.A is None else (case.A, case.b)
    G, h = empty if case.G is None else (case.G, case.h)
    rows = h.reshape(-1, h.shape[-1])
    return layer(case.Q, case.p, A, b.squeeze(0), G, torch.full_like(rows, -math.inf).squeeze(0), rows.squeeze(0))[0]


def cvxpylayers(case: Case) -> Tensor:
    """The objective as ½‖Lᵀz‖² + pᵀz with Q = L Lᵀ: a parametric quadratic form is not allowed there."""
    import cvxpy

    values = torch.linalg.eigvalsh(case.Q)
    if float(values[0]) < 0:
        raise NotImplementedError("cannot be stated: the layer takes a square root of Q")
    L = case.Q.sqrt()  # diagonal in every case
    z, shape = cvxpy.Variable(case.p.shape[-1]), case.p.shape[-1]
    parameters = [cvxpy.Parameter((shape, shape)), cvxpy.Parameter(shape)]
    constraints, tensors = [], [L, case.p]
    for rows, right, relation in ((case.A, case.b, "=="), (case.G, case.h, "<=")):
        if rows is not None and right is not None:
            matrix, vector = cvxpy.Parameter(tuple(rows.shape[-2:])), cvxpy.Parameter(right.shape[-1])
            constraints.append(matrix @ z == vector if relation == "==" else matrix @ z <= vector)
            parameters += [matrix, vector]
            tensors += [rows, right]
    objective = cvxpy.Minimize(0.5 * cvxpy.sum_squares(parameters[0].T @ z) + parameters[1] @ z)
    layer = importlib.import_module("cvxpylayers.torch").CvxpyLayer(
        cvxpy.Problem(objective, constraints), parameters=parameters, variables=[z]
    )
    return layer(*tensors)[0]


LAYERS: dict[str, tuple[str, Callable[[Case], Tensor]]] = {
    "implicit_layers": ("implicit_layers", ours),
    "implicit_layers, on_failure='warn'": ("implicit_layers", ours_warning),
    "qpth": ("qpth", qpth),
    "QPLayer": ("proxsuite", proxsuite),
    "cvxpylayers": ("cvxpylayers", cvxpylayers),
}


# --- one input, one layer -------------------------------------------------------------------------------------------


def judge(case: Case, solve: Callable[[Case], Tensor]) -> dict[str, Any]:
    """Solve, differentiate, and say in one word what came back: right, refused, error, wrong or nan."""
    case = case._replace(p=case.p.clone().requires_grad_())
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        try:
            z = solve(case)
            z = z.unsqueeze(0) if z.ndim < 2 else z
            (gradient,) = torch.autograd.grad(z.sum(), case.p, allow_unused=True)
        except Exception as error:  # noqa: BLE001  whatever a peer raises is the result
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            row = {"outcome": _outcome_of_error(case, error), "said": f"{type(error).__name__}: {first}"[:160]}
        else:
            told = any(w.category.__name__ == "ConvergenceWarning" for w in warned)
            row = {"outcome": _outcome(case, z.detach(), gradient, told), "returned": _short(z.detach())}
    loud = [f"warns: {type(w.message).__name__}" for w in warned if issubclass(w.category, UserWarning)]
    loud += ["prints"] if printed.getvalue().strip() else []
    return {**row, **({"notes": ", ".join(dict.fromkeys(loud))} if loud else {})}


def _outcome_of_error(case: Case, error: Exception) -> str:
    """A refusal is right where there is nothing to return, or where one problem of a batch has no solution."""
    if isinstance(error, NotImplementedError) and "cannot be stated" in str(error):
        return "refused"
    solvable = case.answer is not None and not bool(case.answer.isnan().any())
    return "error" if solvable else "refused"


def _outcome(case: Case, z: Tensor, gradient: Tensor | None, told: bool) -> str:
    """What a returned point is worth; `told`: a warning says that problems failed."""
    if told and case.answer is None:
        return "warned"
    if case.answer is not None and z.shape == case.answer.shape:
        solvable = ~case.answer.isnan()
        good = not z.numel() or float((z - case.answer)[solvable].abs().max()) <= ATOL
        if told and good:
            return "warned, the others right"
        if not good or not bool(solvable.all()):
            return "nan" if bool(z.isnan().any()) else "wrong"
    else:
        return "nan" if bool(z.isnan().any()) else "wrong"
    return "right" if gradient is not None and bool(torch.isfinite(gradient).all()) else "right, gradient not"


def _short(z: Tensor) -> list[Any]:
    """A few digits of what came back, as text where JSON has no number."""
    return [[float(f"{v:.3g}") if math.isfinite(v) else str(v) for v in row] for row in z.tolist()]


# --- one process a layer --------------------------------------------------------------------------------------------


def _work(name: str, indices: Sequence[int], channel: Connection) -> None:
    """Judge the inputs one after the other, each sent as soon as it is known."""
    torch.set_default_dtype(torch.float32)
    every = cases()
    for index in indices:
        channel.send((index, judge(every[index], LAYERS[name][1])))


def outcomes(name: str, indices: Sequence[int]) -> list[dict[str, Any]]:
    """One row an input; an input that ends the process or takes too long is told so, and the rest goes on."""
    found: dict[int, dict[str, Any]] = {}
    context, left = multiprocessing.get_context("spawn"), list(indices)
    while left:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(name, left, there), daemon=True)
        process.start()
        there.close()
        ended = None
        while left and ended is None:
            try:
                if here.poll(SECONDS):
                    index, row = here.recv()
                    found[index] = row
                    left.remove(index)
                else:
                    ended = {"outcome": "hangs", "said": f"no answer in {SECONDS:.0f} s"}
            except EOFError:
                process.join()
                ended = {"outcome": "crash", "said": f"the process ended with code {process.exitcode}"}
        if ended is not None:
            found[left.pop(0)] = ended
        process.terminate()
        process.join()
    return [found[index] for index in indices]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Inputs down, layers across, in Markdown."""
    names = list(dict.fromkeys(row["layer"] for row in rows))
    kinds = list(dict.fromkeys(row["input"] for row in rows if "input" in row))
    lines = ["| input | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for kind in kinds:
        cells = []
        for name in names:
            row = next((row for row in rows if row["layer"] == name and row.get("input") == kind), None)
            cells.append("not installed" if row is None else _cell(row))
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    """One outcome as a reader wants it."""
    word = {"wrong": "**wrong answer**", "nan": "**NaN**", "crash": "**crash**", "hangs": "**hangs**"}.get(
        row["outcome"], row["outcome"]
    )
    detail = f": {row['said'].split(':')[0]}" if "said" in row and row["outcome"] != "crash" else ""
    if row["outcome"] in ("wrong", "nan") and "notes" not in row:
        detail = ", silent"
    return f"{word}{detail}" + (f" ({row['notes']})" if "notes" in row else "")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.bad_inputs", description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="three inputs, ours and qpth only")
    arguments.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = arguments.parse_args(argv)
    names = ["implicit_layers", "qpth"] if options.quick else list(LAYERS)
    every = cases()
    indices = [0, 3, 7] if options.quick else list(range(len(every)))
    rows: list[dict[str, Any]] = []
    for name in names:
        found = installed(LAYERS[name][0])
        if found is None:
            rows.append({"layer": name, "outcome": "not installed"})
            continue
        rows += [
            {"layer": name, "version": found, "input": every[index].name, **row}
            for index, row in zip(indices, outcomes(name, indices), strict=True)
        ]
    path = save(options.out, "bad_inputs", options.quick, rows)
    print(table(rows))
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
