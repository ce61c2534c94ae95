"""Polytopes and transport plans: gradient truth, speed and memory against unrolled autograd and POT (where installed).

`python -m benchmarks.transport [--quick]` writes `results/transport.json`. Contenders are timed in turns, round by
round. POT is optional: `pip install --no-deps POT`.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import implicit_layers as il
from benchmarks.peak import peak_bytes
from benchmarks.run import RESULTS, save

Row = dict[str, Any]
OURS, EQUAL = "implicit_layers", "implicit_layers, at POT's error"
HAS_POT = importlib.util.find_spec("ot") is not None


def milliseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Row]:
    """The time of each call in every round, and the median; the first round is left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(float(f"{1e3 * (time.perf_counter() - start):.4g}"))
    return {name: {"median": statistics.median(found[1:]), "repeats": found[1:]} for name, found in times.items()}


def once(call: Callable[[], object], rounds: int) -> Row:
    """The same for one call."""
    return milliseconds({"": call}, rounds)[""]


def plan_data(batch: int, n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points in the unit square with random masses, in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    x, y = torch.rand(batch, n, 2, **draw), torch.rand(batch, m, 2, **draw)
    a, b = torch.randn(batch, n, **draw).softmax(-1), torch.randn(batch, m, **draw).softmax(-1)
    return torch.cdist(x, y).square(), a, b


def unrolled(C: Tensor, a: Tensor, b: Tensor, tau: float, iterations: int) -> Tensor:
    """Sinkhorn in the log domain, differentiated through its iterations by whoever calls it."""
    L, f, g = -C / tau, torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(iterations):
        g = b.log() - (L + f.unsqueeze(-1)).logsumexp(-2)
        f = a.log() - (L + g.unsqueeze(-2)).logsumexp(-1)
    return (L + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()


def marginal_error(P: Tensor, a: Tensor, b: Tensor) -> float:
    """The largest sum of the two marginals' errors in the batch."""
    return float(((P.sum(-1) - a).abs().sum(-1) + (P.sum(-2) - b).abs().sum(-1)).max())


def kept_bytes(call: Callable[[], Tensor]) -> int:
    """What the graph of a call saves for its backward pass, each memory once."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    del result
    return sum(seen.values())


def sinkhorn_backward(quick: bool) -> Iterator[Row]:
    """Implicit gradients against those of unrolled iterations: time, memory, distance from the exact one."""
    size, batch, rounds = (30, 4, 2) if quick else (100, 16, 7)
    for tau in (0.1, 0.03):
        for dtype in (torch.float64, torch.float32):
            yield from _backward(size, batch, tau, dtype, rounds)


def _backward(size: int, batch: int, tau: float, dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    """Every way of one problem; the implicit one with two tolerances, for what more iterations cost."""
    exact_data = plan_data(batch, size, size)
    C, a, b = (t.to(dtype) for t in exact_data)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(batch, size, size, generator=generator, dtype=torch.float64)

    def implicit(C: Tensor, tol: float, a: Tensor = a, b: Tensor = b) -> il.Solution:
        return il.sinkhorn(C, a, b, temperature=tau, tol=tol)

    def gradient(function: Callable[[Tensor], Tensor], C: Tensor) -> Tensor:
        leaf = C.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, weights.to(C.dtype))[0].double()

    truth = gradient(lambda C: implicit(C, 1e-13, *exact_data[1:]).value, exact_data[0])
    ways: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {}
    for tol in (1e-9, 1e-3):
        used = int(implicit(C, tol).info.iterations.max())
        ways[f"implicit, tol {tol:.0e}", used] = lambda C, tol=tol: implicit(C, tol).value
    for count in (50, 200):
        ways["unrolled", count] = lambda C, count=count: unrolled(C, a, b, tau, count)
    leaves = {way: C.clone().requires_grad_() for way in ways}
    plans = {way: function(leaves[way]) for way, function in ways.items()}
    pull = weights.to(dtype)
    backward = milliseconds(
        {w: lambda w=w: torch.autograd.grad(plans[w], leaves[w], pull, retain_graph=True) for w in ways}, rounds
    )
    with torch.no_grad():
        forward = milliseconds({w: lambda f=f: f(C) for w, f in ways.items()}, rounds)
    for way, function in ways.items():
        yield {
            "suite": "sinkhorn backward",
            "contender": way[0],
            "iterations": way[1],
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "n": size,
            "tau": tau,
            "forward_ms": forward[way],
            "backward_ms": backward[way],
            "graph_MiB": kept_bytes(lambda f=function, way=way: f(leaves[way])) / 2**20,
            "peak_MiB": peak_bytes(lambda f=function: gradient(f, C), C.device) / 2**20,
            "gradient_error": float((gradient(function, C) - truth).norm() / truth.norm()),
        }


def sinkhorn_forward(quick: bool) -> Iterator[Row]:
    """Forward alone against POT's torch backend."""
    for dtype, threshold in ((torch.float64, 1e-9),) if quick else ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        for n in (50,) if quick else (20, 50, 100, 500):
            for tau in (0.1, 0.03) if quick else (1.0, 0.1, 0.03, 0.01):
                yield from _forward(n, tau, dtype, threshold, 2 if quick else 9 if n == 500 else 40)


def _forward(n: int, tau: float, dtype: torch.dtype, threshold: float, rounds: int) -> Iterator[Row]:
    """Every contender on one problem: ours with POT's threshold as the tolerance, and at the error that POT reaches."""
    C, a, b = (t[0].to(dtype) for t in plan_data(1, n, n))

    def ours(tol: float) -> Tensor:
        return il.sinkhorn(C, a, b, temperature=tau, tol=tol).value

    def error(P: Tensor) -> float:
        return marginal_error(P.double(), a.double(), b.double())

    calls: dict[str, Callable[[], Tensor]] = {OURS: lambda: ours(threshold)}
    tolerances = {OURS: threshold}
    with torch.no_grad():
        if HAS_POT:
            import ot

            for method in ("sinkhorn", "sinkhorn_log"):
                calls[f"POT {method}"] = lambda m=method: ot.sinkhorn(
                    a, b, C, tau, method=m, stopThr=threshold, numItermax=20000, warn=False
                )
            reached = max(threshold, error(calls["POT sinkhorn"]()))
            tol = next(t for t in (10.0**-k for k in range(2, 14)) if error(ours(t)) <= reached)
            calls[EQUAL], tolerances[EQUAL] = lambda: ours(tol), tol
        logs = {name: call for name, call in calls.items() if name.endswith("_log")}  # slow, and far behind
        times = milliseconds({name: call for name, call in calls.items() if name not in logs}, rounds)
        times |= milliseconds(logs, 2)
        for name, call in calls.items():
            yield {
                "suite": "sinkhorn forward",
                "contender": name,
                "dtype": str(dtype).removeprefix("torch."),
                "n": n,
                "tau": tau,
                "tol": tolerances.get(name, threshold),
                "forward_ms": times[name],
                "marginal_error": error(call()),
            }


def polytopes(quick: bool) -> Iterator[Row]:
    """Iterations from cold over the temperature; the large program; the truth of the gradient on the simplex."""
    generator = torch.Generator().manual_seed(2)
    draw = {"generator": generator, "dtype": torch.float64}
    A = torch.randn(16, 5, 20, **draw)
    A[:, 0] = 1.0
    b, c = (A @ torch.rand(16, 20, 1, **draw))[..., 0], torch.randn(16, 20, **draw)
    for tau in (1.0, 0.3, 0.1, 0.03, 0.01, 0.001):
        call = lambda tau=tau: il.entropic_lp(c, A=A, b=b, temperature=tau)  # noqa: E731
        info = call().info
        yield {
            "suite": "entropic_lp cold",
            "tau": tau,
            "iterations": int(info.iterations.max()),
            "residual": float(info.residual.max()),
            "forward_ms": once(call, 3),
        }
    n = 10_000 if quick else 100_000
    A = torch.randn(5, n, **draw)
    A[0] = 1.0
    b, c = A @ torch.rand(n, **draw), torch.randn(n, **draw).requires_grad_()
    for tau in (1.0, 0.1):
        solution = il.entropic_lp(c, A=A, b=b, temperature=tau)
        weights = torch.randn(n, **draw)
        yield {
            "suite": "entropic_lp large",
            "n": n,
            "m": 5,
            "tau": tau,
            "iterations": int(solution.info.iterations),
            "forward_ms": once(lambda tau=tau: il.entropic_lp(c.detach(), A=A, b=b, temperature=tau), 3),
            "backward_ms": once(lambda s=solution, w=weights: torch.autograd.grad(s.value, c, w, retain_graph=True), 3),
            "graph_MiB": kept_bytes(lambda tau=tau: il.entropic_lp(c, A=A, b=b, temperature=tau).value) / 2**20,
        }
    tau, one = 0.05, torch.ones(1, dtype=torch.float64)
    for spread in (1.0, 2.0, 4.0, 6.0, 10.0, 20.0):
        c = (spread * tau * torch.randn(8, 10, **draw)).requires_grad_()
        g = torch.randn(8, 10, **draw)
        x = il.entropic_lp(c, A=one.expand(1, 10), b=one, temperature=tau).value
        found = torch.autograd.grad(x, c, g)[0]
        y = (c.detach() / tau).softmax(-1)
        exact = (y.unsqueeze(-1) * y.unsqueeze(-2) * (g.unsqueeze(-1) - g.unsqueeze(-2))).sum(-1) / tau
        error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
        yield {"suite": "gradient truth", "spread_over_tau": spread, "gradient_error": float(error.max())}


def rows(quick: bool = False) -> list[Row]:
    """All measurements."""
    return [*sinkhorn_backward(quick), *sinkhorn_forward(quick), *polytopes(quick)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the rows."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.transport", description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="small problems, half a minute; not for figures")
    arguments.add_argument("--out", type=Path, default=RESULTS)
    options = arguments.parse_args(argv)
    print(save(options.out, "transport", options.quick, rows(options.quick)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
