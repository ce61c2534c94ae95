"""The suite "simplex": softmax, sparsemax, entmax and Sinkhorn against PyTorch, entmax and POT.

Answers are certified by the optimality conditions of their programs; references come from bisection and plain
iteration in float64, with gradients in closed form or by autograd through them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import implicit_layers as il
from benchmarks.contenders import installed
from benchmarks.instances import Scores, Transport, scores, transport
from benchmarks.measure import Contender, Judge, Reference, measure
from benchmarks.options import Options, Rows

CASES = ((128, 10), (128, 1000), (1, 32000))  # batch, n
QUICK = ((16, 10), (16, 100))
PLANS = ((64, 16, 16), (4, 128, 128))  # batch, n, m
PLANS_QUICK = ((4, 8, 8),)
TEMPERATURE = 0.1  # of the plans


# --- the simplex ----------------------------------------------------------------------------------------------------


def entropic(problem: Scores, y: Tensor) -> float:
    """y ∝ exp x and Σy = 1, relative to the largest y."""
    top = y.amax(-1, keepdim=True)
    wanted = top * (problem.x - problem.x.amax(-1, keepdim=True)).exp()
    return float(torch.maximum((y - wanted).abs().amax(-1), (y.sum(-1) - 1.0).abs()).max())


def tsallis(alpha: float, problem: Scores, y: Tensor) -> float:
    """y = [(α−1) x − t]₊^{1/(α−1)} with the t of the largest entry, and Σy = 1."""
    x, a = problem.x.detach() * (alpha - 1.0), 1.0 / (alpha - 1.0)
    t = x.amax(-1, keepdim=True) - y.amax(-1, keepdim=True) ** (alpha - 1.0)
    wanted = (x - t).clamp_min(0.0) ** a
    return float(torch.maximum((y - wanted).abs().amax(-1), (y.sum(-1) - 1.0).abs()).max())


def exact_softmax(problem: Scores) -> Reference:
    """exp and division, and y ∘ (c − ⟨c, y⟩)."""
    x, c = problem.x.detach(), problem.c
    weight = (x - x.amax(-1, keepdim=True)).exp()
    y = weight / weight.sum(-1, keepdim=True)
    return Reference(y, (y * (c - (c * y).sum(-1, keepdim=True)),))


def exact_entmax(alpha: float, problem: Scores) -> Reference:
    """Bisection for t to the last bit; with s = y^{2−α} on the support, s ∘ (c − ⟨s, c⟩/Σs)."""
    x, a = problem.x.detach() * (alpha - 1.0), 1.0 / (alpha - 1.0)
    high = x.amax(-1, keepdim=True)
    low = high - 1.0
    for _ in range(100):
        t = 0.5 * (low + high)
        more = ((x - t).clamp_min(0.0) ** a).sum(-1, keepdim=True) > 1.0
        low, high = torch.where(more, t, low), torch.where(more, high, t)
    y = (x - 0.5 * (low + high)).clamp_min(0.0) ** a
    y = y / y.sum(-1, keepdim=True)
    s = torch.where(y > 0, y ** (2.0 - alpha), 0.0)
    c = problem.c
    return Reference(y, (s * (c - (s * c).sum(-1, keepdim=True) / s.sum(-1, keepdim=True)),))


def ours(name: str, call: Callable[..., Any]) -> Contender:
    """Our own operation, where this version has it."""
    return Contender("implicit_layers", il.__version__ if hasattr(il, name) else None, call, capturable=True)


def on_scores(function: Callable[[Tensor], Tensor]) -> Callable[[Scores], Tensor]:
    return lambda problem: function(problem.x)


def peer(name: str, package: str, call: Callable[[Any, Any], Any], **more: Any) -> Contender:
    """A peer, imported when it is called."""
    return Contender(name, installed(package), lambda problem: call(importlib.import_module(name), problem), **more)


def operations() -> dict[str, tuple[Judge, list[Contender]]]:
    """How the answers of each operation are judged, and who gives them."""
    softmax = [
        ours("softmax", on_scores(lambda x: il.softmax(x))),
        Contender("torch", torch.__version__, on_scores(lambda x: torch.softmax(x, -1)), capturable=True),
        Contender("our Newton", il.__version__, on_scores(lambda x: il.softmax(x, method="newton"))),
    ]
    sparsemax = [
        ours("sparsemax", on_scores(lambda x: il.sparsemax(x))),  # type: ignore[attr-defined]
        peer("entmax", "entmax", lambda package, problem: package.sparsemax(problem.x, -1)),
    ]
    entmax = [
        ours("entmax", on_scores(lambda x: il.entmax(x, 1.5))),  # type: ignore[attr-defined]
        peer("entmax", "entmax", lambda package, problem: package.entmax15(problem.x, -1)),
    ]
    return {
        "softmax": (Judge(entropic, exact_softmax), softmax),
        "sparsemax": (Judge(partial(tsallis, 2.0), partial(exact_entmax, 2.0)), sparsemax),
        "entmax 1.5": (Judge(partial(tsallis, 1.5), partial(exact_entmax, 1.5)), entmax),
    }


# --- transport ------------------------------------------------------------------------------------------------------


def marginals(problem: Transport, P: Tensor) -> float:
    """The marginals, and log P + C/τ a sum of a row's and a column's number: its mixed differences vanish."""
    rows, columns = (P.sum(-1) - problem.a).abs().sum(-1), (P.sum(-2) - problem.b).abs().sum(-1)
    M = P.clamp_min(torch.finfo(P.dtype).tiny).log() + problem.C.detach() / TEMPERATURE
    mixed = M - M.mean(-1, keepdim=True) - M.mean(-2, keepdim=True) + M.mean((-2, -1), keepdim=True)
    size = problem.C.detach().abs().amax((-2, -1)) / TEMPERATURE
    return float(torch.stack([rows, columns, mixed.abs().amax((-2, -1)) / size]).max())


def plan(problem: Transport, steps: int = 1000) -> Tensor:
    """Sinkhorn's iterations in the logarithm."""
    M, a, b = -problem.C / TEMPERATURE, problem.a.log(), problem.b.log()
    g = torch.zeros_like(b)
    for _ in range(steps):
        f = a - torch.logsumexp(M + g.unsqueeze(-2), -1)
        g = b - torch.logsumexp(M + f.unsqueeze(-1), -2)
    return (M + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()


def exact_plan(problem: Transport) -> Reference:
    """By autograd through a thousand iterations."""
    arguments = [problem.C, problem.a, problem.b]
    P = plan(problem)
    return Reference(P.detach(), torch.autograd.grad((problem.c * P).sum(), arguments))


def _same_gauge(gradient: list[Tensor]) -> list[Tensor]:
    """The marginals have one sum, so their gradients count up to a constant."""
    return [gradient[0], *(part - part.mean(-1, keepdim=True) for part in gradient[1:])]


def with_pot(package: Any, problem: Transport) -> Tensor:
    """ot.bregman.sinkhorn_log for each problem of the batch, autograd through its iterations."""
    return torch.stack(
        [
            package.bregman.sinkhorn_log(a, b, C, TEMPERATURE, numItermax=2000, stopThr=1e-10, warn=False)
            for C, a, b in zip(problem.C, problem.a, problem.b, strict=True)
        ]
    )


def transports() -> tuple[Judge, list[Contender]]:
    return Judge(marginals, exact_plan, comparable=_same_gauge), [
        ours("sinkhorn", lambda problem: il.sinkhorn(*problem[:3], temperature=TEMPERATURE).value),  # type: ignore[attr-defined]
        peer("ot", "pot", with_pot),
        Contender("unrolled Sinkhorn", il.__version__, partial(plan, steps=300)),
    ]


def suite(options: Options) -> Rows:
    """One row a problem, size and contender."""
    rows: Rows = []
    settings = {"rounds": 3 if options.quick else 20, "device": options.device, "dtype": options.dtype}
    with tqdm(desc="simplex") as progress:
        for batch, n in QUICK if options.quick else CASES:
            for name, (judge, contenders) in operations().items():
                measured = measure(scores(n, batch, options.seed), contenders, judge, **settings)
                rows += [{"problem": name, "n": n, "batch": batch, **row} for row in measured]
                progress.update()
        for batch, n, m in PLANS_QUICK if options.quick else PLANS:
            judge, contenders = transports()
            measured = measure(transport(n, m, batch, options.seed), contenders, judge, **settings)
            rows += [{"problem": "Sinkhorn", "n": n * m, "batch": batch, **row} for row in measured]
            progress.update()
    return rows


def summary(rows: Rows) -> dict[str, Any]:
    return {}
