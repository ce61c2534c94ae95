"""The simplex family against its peers: speed of softmax, sparsemax and entmax, and gradients held against the truth.

    python -m benchmarks.simplex_family [--quick] [--out FILE] [--suite NAME [--add]]

`speed`, `gradient_truth` and `entropic_truth` each return rows that JSON can hold. Peers that are not installed are
left out by name: `pip install entmax` for the first, `pip install cvxpylayers` for the others.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import mpmath
import torch
from torch import Tensor

import implicit_layers as il
from benchmarks.run import commit

Rows = list[dict[str, Any]]
Layer = Callable[[Tensor], Tensor]

SHAPES = ((1024, 64), (256, 1024), (64, 32000))
WIDTHS = {64: (None, 16, 32), 1024: (None, 64, 128, 512), 32000: (None, 64, 128, 256, 512, 1024)}
SPREADS = (1, 2, 4, 6, 10, 20)
RESULTS = Path(__file__).parent / "results" / "simplex_family.json"


def peer(package: str, module: str | None = None) -> Any:
    """The module of a peer, or None where it is not installed."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return importlib.import_module(module or package)


# --- speed ----------------------------------------------------------------------------------------------------------


def contenders(layer: str, n: int) -> dict[str, Layer]:
    """Ours and the peers' ways to compute one layer; the peers' partial sorts with every width that makes sense."""
    entmax = peer("entmax")
    if layer == "softmax":
        return {"ours": lambda x: il.softmax(x), "torch": lambda x: x.softmax(-1)}
    if layer == "softmax, temperature 0.5":
        return {"ours": lambda x: il.softmax(x, temperature=0.5), "torch": lambda x: (x / 0.5).softmax(-1)}
    found: dict[str, Layer] = {"ours": il.sparsemax if layer == "sparsemax" else il.entmax}
    if layer == "entmax 1.3":
        found = {"ours": lambda x: il.entmax(x, 1.3)}
        if entmax is not None:
            found["entmax: bisection"] = lambda x: entmax.entmax_bisect(x, 1.3)
        return found
    if entmax is not None:
        function = entmax.sparsemax if layer == "sparsemax" else entmax.entmax15
        for k in WIDTHS[n]:
            name = "entmax: default" if k is None else f"entmax: k={k}"
            found[name] = lambda x, k=k: function(x, dim=-1, k=k)  # type: ignore[misc]
    return found


def milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Every run once a round, the order turned by one each round; two rounds to warm up are not counted."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for k in range(rounds + 2):
        for j in range(len(names)):
            name = names[(j + k) % len(names)]
            taken = milliseconds(runs[name])
            if k >= 2:
                samples[name].append(taken)
    return samples


def speed(quick: bool = False, seed: int = 0) -> Rows:
    """Forward and backward in float32, side by side; every answer is held against float64 first."""
    rows: Rows = []
    layers = ("softmax", "softmax, temperature 0.5", "sparsemax", "entmax 1.5", "entmax 1.3")
    for count, n in SHAPES[:1] if quick else SHAPES:
        for scale in (1.0,) if quick else (1.0, 0.1, 4.0):
            generator = torch.Generator().manual_seed(seed)
            x = (scale * torch.randn(count, n, generator=generator)).requires_grad_()
            g = torch.randn(count, n, generator=generator)
            for layer in layers:
                if layer.startswith("softmax") and scale != 1.0:
                    continue
                functions = contenders(layer, n)
                exact = functions["ours"](x.detach().double())

                def both(function: Layer, x: Tensor = x, g: Tensor = g) -> Callable[[], Any]:
                    return lambda: torch.autograd.grad(function(x), x, g)

                cheap = count * n < 1e6
                rounds = 5 if quick else (101 if layer.startswith("softmax") else 31 if cheap else 9)
                samples = interleaved({name: both(f) for name, f in functions.items()}, rounds)
                for name, function in functions.items():
                    error = float((function(x.detach()) - exact).abs().max())
                    rows.append(
                        {
                            "layer": layer,
                            "rows": count,
                            "n": n,
                            "scale": scale,
                            "contender": name,
                            "error": error,
                            "total_ms": round(statistics.median(samples[name]), 4),
                            "fastest_ms": round(min(samples[name]), 4),
                        }
                    )
    return rows


# --- gradients against the truth ------------------------------------------------------------------------------------


def exact_gradient(x: Tensor, g: Tensor, temperature: float) -> Tensor:
    """The gradient of ⟨g, softmax(x/τ)⟩ with fifty digits; no formula of the package has a part in it."""
    with mpmath.workdps(50):
        z = [mpmath.mpf(float(v)) / mpmath.mpf(temperature) for v in x]
        weights = [mpmath.exp(v - max(z)) for v in z]
        y = [w / mpmath.fsum(weights) for w in weights]
        loss = mpmath.fsum(mpmath.mpf(float(c)) * p for c, p in zip(g, y, strict=True))
        parts = [p * (mpmath.mpf(float(c)) - loss) / mpmath.mpf(temperature) for c, p in zip(g, y, strict=True)]
        return torch.tensor([float(part) for part in parts], dtype=torch.float64)


def cvxpy_softmax(n: int, temperature: float) -> Layer | None:
    """The same program through cvxpylayers, with its solver's tolerances tightened."""
    layers = peer("cvxpylayers", "cvxpylayers.torch")
    if layers is None:
        return None
    cp = importlib.import_module("cvxpy")
    scores, y = cp.Parameter(n), cp.Variable(n)
    program = cp.Problem(cp.Maximize(scores @ y + temperature * cp.sum(cp.entr(y))), [cp.sum(y) == 1])
    layer = layers.CvxpyLayer(program, parameters=[scores], variables=[y])
    return lambda x: layer(x, solver_args={"eps": 1e-9, "max_iters": 100000})[0]


def gradient_truth(quick: bool = False, n: int = 10, temperature: float = 0.05) -> Rows:
    """Relative error of the gradient of ⟨g, y⟩, y = argmax ⟨x, y⟩ + τ H(y), by the spread of the scores over τ."""
    candidates: dict[str, Layer | None] = {
        "ours: closed": lambda x: il.softmax(x, temperature=temperature),
        "ours: newton": lambda x: il.softmax(x, temperature=temperature, method="newton"),
        "ours: kkt": lambda x: il.softmax(x, temperature=temperature, method="kkt"),
        "torch": lambda x: (x / temperature).softmax(-1),
        "cvxpylayers": cvxpy_softmax(n, temperature),
    }
    functions = {name: f for name, f in candidates.items() if f is not None}
    rows: Rows = []
    for spread in SPREADS[::2] if quick else SPREADS:
        errors: dict[str, list[float]] = {name: [] for name in functions}
        for seed in range(2 if quick else 8):
            generator = torch.Generator().manual_seed(seed)
            x = spread * temperature * torch.randn(n, generator=generator, dtype=torch.float64)
            g = torch.randn(n, generator=generator, dtype=torch.float64)
            exact = exact_gradient(x, g, temperature)
            for name, function in functions.items():
                given = x.clone().requires_grad_()
                (found,) = torch.autograd.grad(function(given), given, g)
                errors[name].append(float((found - exact).norm() / exact.norm()))
        for name, found_errors in errors.items():
            rows.append(
                {
                    "spread": spread,
                    "n": n,
                    "temperature": temperature,
                    "contender": name,
                    "median_error": statistics.median(found_errors),
                    "largest_error": max(found_errors),
                    "seeds": len(found_errors),
                }
            )
    return rows


def entropic_program(spread: float, seed: int, n: int, m: int, temperature: float) -> tuple[Tensor, ...]:
    """Scores of that spread over τ, m rows through a point, the first of ones, and a cotangent: c, A, b, g."""
    generator = torch.Generator().manual_seed(seed)
    c = spread * temperature * torch.randn(n, generator=generator, dtype=torch.float64)
    A = torch.randn(m, n, generator=generator, dtype=torch.float64)
    A[0] = 1.0
    b = A @ torch.randn(n, generator=generator, dtype=torch.float64).softmax(-1)
    return c, A, b, torch.randn(n, generator=generator, dtype=torch.float64)


def exact_entropic_gradient(c: Tensor, A: Tensor, b: Tensor, g: Tensor, temperature: float, start: Tensor) -> Tensor:
    """The gradient of ⟨g, x⟩ in c with sixty digits: Newton on A exp((c − Aᵀy)/τ − 1) = b, and its Jacobian."""
    with mpmath.workdps(60):
        rows, tau = mpmath.matrix(A.tolist()), mpmath.mpf(temperature)
        scores, right = mpmath.matrix(c.tolist()), mpmath.matrix(b.tolist())
        logs = mpmath.matrix([v if v > -mpmath.inf else mpmath.mpf(-700) for v in map(mpmath.log, start.tolist())])
        weights = mpmath.diag(start.tolist())
        pulled = rows * weights * (scores - tau * (logs + mpmath.matrix([1] * len(start))))
        y = mpmath.lu_solve(rows * weights * rows.T, pulled)
        for _ in range(40):
            x = [mpmath.exp(v / tau - 1) for v in scores - rows.T * y]
            missing = rows * mpmath.matrix(x) - right
            M = rows * mpmath.diag(x) * rows.T / tau
            if mpmath.norm(missing) < mpmath.mpf(10) ** -45:
                break
            y += mpmath.lu_solve(M, missing)
        else:
            raise ArithmeticError("the reference did not converge")
        W = mpmath.diag(x) / tau
        cotangent = mpmath.matrix(g.tolist())
        w = mpmath.lu_solve(M, rows * W * cotangent)
        return torch.tensor([float(v) for v in W * (cotangent - rows.T * w)], dtype=torch.float64)


def cvxpy_entropic(n: int, m: int, temperature: float) -> Callable[..., Tensor] | None:
    """The same program through cvxpylayers, with its solver's tolerances tightened."""
    layers = peer("cvxpylayers", "cvxpylayers.torch")
    if layers is None:
        return None
    cp = importlib.import_module("cvxpy")
    c, A, b, x = cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
    program = cp.Problem(cp.Maximize(c @ x + temperature * cp.sum(cp.entr(x))), [A @ x == b])
    layer = layers.CvxpyLayer(program, parameters=[c, A, b], variables=[x])
    return lambda c, A, b: layer(c, A, b, solver_args={"eps": 1e-9, "max_iters": 100000})[0]


def entropic_truth(quick: bool = False, n: int = 10, m: int = 5, temperature: float = 0.05) -> Rows:
    """Relative error of the gradient of ⟨g, x⟩ in c, x = argmax ⟨c, x⟩ + τ H(x), A x = b with m rows, by the spread."""
    candidates: dict[str, Callable[..., Tensor] | None] = {
        "ours": lambda c, A, b: il.entropic_lp(c, A=A, b=b, temperature=temperature, tol=1e-13).value,
        "cvxpylayers": cvxpy_entropic(n, m, temperature),
    }
    functions = {name: f for name, f in candidates.items() if f is not None}
    rows: Rows = []
    for spread in SPREADS[::2] if quick else SPREADS:
        errors: dict[str, list[float]] = {name: [] for name in functions}
        for seed in range(2 if quick else 8):
            c, A, b, g = entropic_program(spread, seed, n, m, temperature)
            start = il.entropic_lp(c, A=A, b=b, temperature=temperature, tol=1e-13).value
            exact = exact_entropic_gradient(c, A, b, g, temperature, start)
            for name, function in functions.items():
                given = c.clone().requires_grad_()
                try:
                    (found,) = torch.autograd.grad(function(given, A, b), given, g)
                    error = float((found - exact).norm() / exact.norm())
                except Exception as failure:  # noqa: BLE001  a peer's solver may give up in any way
                    print(f"{name}, spread {spread}, seed {seed}: {type(failure).__name__}")
                    error = math.inf
                errors[name].append(error)
        for name, found_errors in errors.items():
            finite = [error for error in found_errors if math.isfinite(error)]
            rows.append(
                {
                    "spread": spread,
                    "n": n,
                    "m": m,
                    "temperature": temperature,
                    "contender": name,
                    "median_error": statistics.median(finite) if finite else None,
                    "largest_error": max(finite) if finite else None,
                    "seeds": len(found_errors),
                    "failed": len(found_errors) - len(finite),
                }
            )
    return rows


SUITES: dict[str, Callable[[bool], Rows]] = {
    "speed": speed,
    "gradient_truth": gradient_truth,
    "entropic_truth": entropic_truth,
}


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for package in ("torch", "entmax", "cvxpylayers", "diffcp", "scs"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "python": platform.python_version(),
        "implicit_layers": il.__version__,
        **versions,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape and few seeds")
    parser.add_argument("--add", action="store_true", help="keep the rows of the other suites in the file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--suite", choices=sorted(SUITES), action="append", help="default: all")
    options = parser.parse_args()
    head = {"suite": "simplex_family", "quick": options.quick, "environment": environment()}
    names = options.suite or list(SUITES)
    rows = [{"table": name, **row} for name in names for row in SUITES[name](options.quick)]
    if options.add:
        kept = json.loads(options.out.read_text(encoding="utf-8"))
        rows = [row for row in kept.pop("rows") if row["table"] not in names] + rows
        head = {**kept, "added": {**kept.get("added", {}), **dict.fromkeys(names, head["environment"])}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(dump(head, rows), encoding="utf-8")
    print(f"{len(rows)} rows in {options.out}")


def dump(head: dict[str, Any], rows: Rows) -> str:
    """JSON with one line a row and four digits a number, so that two files can be compared by eye."""
    short = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    lines = ",\n".join("  " + json.dumps(row) for row in short)
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'


if __name__ == "__main__":
    main()
