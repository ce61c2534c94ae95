"""Polytopes and transport plans: gradient truth, speed and memory against unrolled autograd and POT (where installed).

`rows()` gives dictionaries that JSON takes; `python -m benchmarks.transport [--quick]` prints them. POT is optional:
`pip install --no-deps POT`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import implicit_layers as il

Row = dict[str, Any]
HAS_POT = importlib.util.find_spec("ot") is not None


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The median over repeated calls, the first left out."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


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
    """Backward through 200 unrolled iterations against the implicit one: time, memory, distance from the exact one."""
    size, batch, repeats = (30, 4, 2) if quick else (100, 16, 5)
    for tau in (0.1, 0.03):
        for dtype in (torch.float64, torch.float32):
            exact_data = plan_data(batch, size, size)
            C, a, b = (t.to(dtype) for t in exact_data)
            weights = torch.randn(batch, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

            def gradient(function: Callable[[Tensor], Tensor], C: Tensor, weights: Tensor = weights) -> Tensor:
                leaf = C.clone().requires_grad_()
                return torch.autograd.grad((function(leaf) * weights.to(C.dtype)).sum(), leaf)[0].double()

            def exact(C: Tensor, data: tuple[Tensor, ...] = exact_data, tau: float = tau) -> Tensor:
                return il.sinkhorn(C, *data[1:], temperature=tau, tol=1e-13).value

            truth = gradient(exact, exact_data[0])
            contenders = {
                "implicit": lambda C, a=a, b=b, tau=tau: il.sinkhorn(C, a, b, temperature=tau).value,
                "unrolled 200": lambda C, a=a, b=b, tau=tau: unrolled(C, a, b, tau, 200),
            }
            for name, function in contenders.items():
                leaf = C.clone().requires_grad_()
                P = function(leaf)
                pull = weights.to(dtype)
                backward = milliseconds(
                    lambda P=P, leaf=leaf, pull=pull: torch.autograd.grad(P, leaf, pull, retain_graph=True), repeats
                )
                with torch.no_grad():
                    forward = milliseconds(lambda f=function, C=C: f(C), repeats)
                yield {
                    "suite": "sinkhorn backward",
                    "contender": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch": batch,
                    "n": size,
                    "tau": tau,
                    "forward_ms": forward,
                    "backward_ms": backward,
                    "graph_MiB": kept_bytes(lambda f=function, leaf=leaf: f(leaf)) / 2**20,
                    "gradient_error": float((gradient(function, C) - truth).norm() / truth.norm()),
                }


def sinkhorn_forward(quick: bool) -> Iterator[Row]:
    """Forward alone against POT's torch backend, both at the marginal error that POT's threshold gives."""
    for dtype, threshold in ((torch.float64, 1e-9),) if quick else ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        for n in (50,) if quick else (20, 50, 100, 500):
            for tau in (0.1, 0.03, 0.01) if quick else (1.0, 0.1, 0.03, 0.01):
                yield from _forward(n, tau, dtype, threshold, quick)


def _forward(n: int, tau: float, dtype: torch.dtype, threshold: float, quick: bool) -> Iterator[Row]:
    """Every contender on one problem."""
    C, a, b = (t[0].to(dtype) for t in plan_data(1, n, n))
    contenders: dict[str, Callable[[], Tensor]] = {}
    if HAS_POT:
        import ot

        for method in ("sinkhorn", "sinkhorn_log"):
            contenders[f"POT {method}"] = lambda m=method: ot.sinkhorn(
                a, b, C, tau, method=m, stopThr=threshold, numItermax=20000, warn=False
            )
    contenders["implicit_layers"] = lambda: il.sinkhorn(C, a, b, temperature=tau, tol=threshold).value
    for name, call in contenders.items():
        with torch.no_grad():
            P = call()
            yield {
                "suite": "sinkhorn forward",
                "contender": name,
                "dtype": str(dtype).removeprefix("torch."),
                "n": n,
                "tau": tau,
                "forward_ms": milliseconds(call, 2 if quick else 15),
                "marginal_error": marginal_error(P.double(), a.double(), b.double()),
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
            "forward_ms": milliseconds(call, 3),
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
            "forward_ms": milliseconds(lambda tau=tau: il.entropic_lp(c.detach(), A=A, b=b, temperature=tau), 3),
            "backward_ms": milliseconds(
                lambda s=solution, w=weights: torch.autograd.grad(s.value, c, w, retain_graph=True), 3
            ),
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


def main() -> None:
    """Print the rows, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small problems, half a minute")
    for row in rows(parser.parse_args().quick):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
