"""The suite "kernel": what the compiled kernel of `il.solve_qp` brings, on the dense family of the suite "qp".

The kernel in float64 and float32 and the tensors of PyTorch, side by side; one and all threads; the time against that
of the same operations at the speed of a large matrix product; and the peak memory against the size of the data. Some
programs have bounds beside their rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.contenders import OURS, Answer, by_name, reference
from benchmarks.fresh import resident
from benchmarks.measure import Contender, Reference, both, differentiated, elapsed, interleave, leaves, moved, spread
from benchmarks.options import Options, Rows
from benchmarks.problems import QP, BoxedQP, boxed, dense
from implicit_layers import InteriorPoint, __version__, solve_qp
from implicit_layers.measure import relative_error
from implicit_layers.reference import exact_qp, program
from implicit_layers.solvers import compiled

SHAPES = ((10, 10, 0), (20, 20, 5), (50, 50, 10), (100, 100, 50), (20, 100, 0))
BATCHES = (1, 128, 512)
BOUNDED = ((10, 0, 0), (50, 0, 0), (50, 50, 10))
QUICK = ((10, 10, 0),), (16,)
KEYS = ("n", "n_ineq", "n_eq", "batch")
MEMORY = (100, 100, 50, 512)
SIDE = 1024  # of the matrix product that sets the pace


def suite(options: Options) -> Rows:
    """One row a shape, batch and way."""
    shapes, batches = QUICK if options.quick else (SHAPES, BATCHES)
    rows: Rows = []
    pace = _pace()
    for shape in tqdm(shapes, desc="kernel"):
        for batch in batches:
            rows += _rows((*shape, batch), dense(*shape, batch, options.seed), options, pace)
    for shape in tqdm(BOUNDED[: len(shapes)], desc="kernel, bounds"):
        for batch in batches[:2]:
            rows += _rows((*shape, batch), boxed(*shape, batch, options.seed), options, pace)
    if not options.quick:
        argument = {"sizes": MEMORY, "seed": options.seed}
        row = next(row for row in rows if tuple(row[key] for key in KEYS) == MEMORY)
        row["resident_bytes"] = resident("benchmarks.kernel:ready", argument)
        row["input_bytes"] = sum(t.numel() * t.element_size() for t in dense(*MEMORY, options.seed)[:6])
    return rows


def ready(argument: dict[str, Any]) -> Callable[[], Any]:
    """One forward and backward pass, a small one of which has been run."""
    sizes, seed = argument["sizes"], argument["seed"]
    both(dense(*sizes[:3], 8, seed), OURS)
    return partial(both, dense(*sizes, seed), OURS)


def _within_bounds(backend: str, problem: BoxedQP) -> Answer:
    Q, p, A, b, G, h, lb, ub, _ = problem
    answer = solve_qp(Q, p, A=A, b=b, G=G, h=h, lb=lb, ub=ub, solver=InteriorPoint(backend=backend))
    return Answer(answer.z, answer.nu, answer.lam)


def _exact(problem: QP | BoxedQP) -> Reference:
    """The answer and its gradient, bounds being rows like others."""
    if isinstance(problem, QP):
        return reference(problem)
    Q, p, A, b, G, h, lb, ub, c = problem
    one = torch.eye(Q.shape[-1], dtype=Q.dtype).expand_as(Q)
    exact = exact_qp(program(Q, p, A=A, b=b, G=torch.cat((G, one, -one), -2), h=torch.cat((h, ub, -lb), -1)))
    return Reference(exact.z.detach(), torch.autograd.grad((c * exact.z).sum(), differentiated(problem)))


def _rows(sizes: tuple[int, int, int, int], problem: QP | BoxedQP, options: Options, pace: float) -> Rows:
    """The three ways, and the kernel on one thread, in interleaved rounds; errors first."""
    threads = torch.get_num_threads()
    kernel, tensors = OURS, by_name("ours in torch")
    if isinstance(problem, BoxedQP):
        kernel, tensors = (
            Contender(f"bounds, {name}", __version__, partial(_within_bounds, name)) for name in ("auto", "torch")
        )
    ways = {
        "kernel, float64": (problem, kernel, threads),
        "kernel, float32": (moved(problem, torch.float32), kernel, threads),
        "kernel, one thread": (problem, kernel, 1),
        "torch, float64": (problem, tensors, threads),
    }
    rows: Rows = []
    for way, (data, contender, _) in ways.items():
        exact = _exact(leaves(moved(data, torch.float64)))  # of the data as they were rounded
        arguments = leaves(data)
        z = contender.solve(arguments).z
        found = torch.autograd.grad(
            (data.c * z).sum(), differentiated(arguments), allow_unused=True, materialize_grads=True
        )
        rows.append(
            {
                **dict(zip(KEYS, sizes, strict=True)),
                "bounds": isinstance(problem, BoxedQP),
                "way": way,
                "solution_error": relative_error([z.detach()], [exact.z]),
                "gradient_error": relative_error(list(found), list(exact.gradient)),
            }
        )

    def timed(data: QP | BoxedQP, contender: Any, count: int) -> tuple[float, float]:
        torch.set_num_threads(count)
        arguments = leaves(data)
        forward = elapsed(lambda: contender.solve(arguments), torch.device("cpu"))
        return forward, elapsed(lambda: both(data, contender), torch.device("cpu"))

    times = interleave([partial(timed, *way) for way in ways.values()], 4 if options.quick else 12)
    torch.set_num_threads(threads)
    for row, samples in zip(rows, times, strict=True):
        forward, total = zip(*samples, strict=True)
        row["forward_ms"], row["total_ms"] = spread(forward), spread(total)
    if isinstance(problem, QP):
        rows[0]["floor_ms"] = _floor(sizes, problem, pace)
    return rows


def _pace() -> float:
    """Operations a millisecond of a large matrix product in float64, all threads."""
    matrix = torch.randn(SIDE, SIDE, dtype=torch.float64)
    times = [elapsed(lambda: matrix @ matrix, torch.device("cpu")) for _ in range(12)][2:]
    return 2.0 * SIDE**3 / statistics.median(times)


def _floor(sizes: tuple[int, int, int, int], problem: QP, pace: float) -> float:
    """Milliseconds for the products and factorisations of a solve at that pace, with the iterations that it takes.

    An iteration factors the active rows' matrix, as where these are guessed; with many rows, one of the unknowns' size.
    """
    n, m, n_eq, batch = sizes
    rows = m + n_eq
    settled = compiled.solve(torch.Size([batch]), tuple(problem[:6]), tol=1e-8, max_iter=60)
    factorisations = float(settled.iterations.double().mean())
    active = float(settled.factor.active.sum(-1).mean()) - n_eq
    set_up = n**3 / 3 + n * n * rows + n_eq**3 / 3 + n_eq**2 * m
    if m >= compiled.MANY * n:
        forming, each = n * n_eq**2 + 2 * n * n_eq * m, m * n**2 + n**3 / 3
        factorisations += 1.0  # the first point
    else:
        forming, each = n * rows**2 + n_eq * m**2, active**3 / 3
    return batch * (set_up + forming + factorisations * each + active**3 / 3) / pace


def summary(rows: Rows) -> dict[str, Any]:
    """Ratios that the README names."""
    found: dict[str, Any] = {"kernel": compiled.description()}
    for row in rows:
        if row.get("resident_bytes"):
            found["peak memory over data"] = round(row["resident_bytes"] / row["input_bytes"], 2)
    return found
