"""One measurement: first is the answer right, then what it costs, in interleaved rounds of one process."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.peak import peak_bytes
from implicit_layers.measure import graph_bytes, milliseconds, relative_error

WARM_UP = 2
SLOW_MS = 2000.0  # what takes longer is timed once


class Reference(NamedTuple):
    """The exact solution of a problem and the exact gradient of the loss Σ c z, in float64."""

    z: Tensor
    gradient: tuple[Tensor, ...]


@dataclass(frozen=True)
class Contender:
    """A way to solve one kind of problem.

    Attributes:
        name, version: version None where it is not installed, which its row then says.
        solve:         problem -> answer; the solution is the answer itself or its first field, with its graph.
        gradient:      whether it has one; a bare solver does not, and only its forward pass is timed.
        cpu_only:      not asked for an answer elsewhere.
        remote:        problem -> milliseconds of (forward, forward and backward), where it has a process of its own.
        capturable:    whether it may be recorded as a CUDA graph: no value is read back to the host.
    """

    name: str
    version: str | None
    solve: Callable[[Any], Any]
    gradient: bool = True
    cpu_only: bool = False
    remote: Callable[[Any], tuple[float, float]] | None = None
    capturable: bool = False


@dataclass(frozen=True)
class Judge:
    """How the answers to one kind of problem are judged.

    Attributes:
        certificate: (problem, answer) -> a relative residual that a right answer has near zero; it needs no reference.
        reference:   problem in float64 -> solution and gradient by a way that shares nothing with any contender.
        limits:      the largest residual that is still timed, by dtype.
        comparable:  gradients made unique before they are compared.
    """

    certificate: Callable[[Any, Any], float]
    reference: Callable[[Any], Reference]
    limits: tuple[tuple[torch.dtype, float], ...] = ((torch.float64, 1e-3), (torch.float32, 1e-2))
    comparable: Callable[[list[Tensor]], list[Tensor]] = list

    def limit(self, dtype: torch.dtype) -> float:
        return dict(self.limits)[dtype]


def leaves(problem: Any) -> Any:
    """The problem with every tensor that has entries requiring grad, except the last, the loss weights `c`."""
    *tensors, c = problem
    return type(problem)(*(t.detach().clone().requires_grad_(t.numel() > 0) for t in tensors), c)


def differentiated(problem: Any) -> list[Tensor]:
    return [tensor for tensor in problem[:-1] if tensor.requires_grad]


def solution(answer: Any) -> Tensor:
    """The part of an answer that the loss is a function of."""
    return answer if isinstance(answer, Tensor) else answer[0]


def moved(problem: Any, *to: Any) -> Any:
    """The problem in another dtype or on another device."""
    return type(problem)(*(tensor.to(*to) for tensor in problem))


def measure(
    problem: Any,
    contenders: Sequence[Contender],
    judge: Judge,
    *,
    rounds: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> list[dict[str, Any]]:
    """One row a contender: certificate and errors of all of them, times of those whose answer holds."""
    problem = moved(problem, dtype)
    exact = judge.reference(leaves(moved(problem, torch.float64)))
    problem = moved(problem, device)
    rows = [_certify(problem, contender, judge, exact) for contender in contenders]
    timed = [i for i, row in enumerate(rows) if row["status"] == "ok"]
    once = {i for i in timed if rows[i].pop("first_ms") > SLOW_MS}
    for group, count in ((once, 1), ([i for i in timed if i not in once], rounds)):
        chosen = sorted(group)
        times = interleave(
            [lambda i=i: _time(problem, contenders[i]) for i in chosen], count, 0 if group is once else 2
        )
        for i, samples in zip(chosen, times, strict=True):
            for name, part in zip(("forward_ms", "total_ms"), zip(*samples, strict=True), strict=True):
                if part[0] is not None:
                    rows[i][name] = spread(part)
    if device.startswith("cuda"):
        for i in timed:
            if contenders[i].capturable:
                try:
                    rows[i]["graph_replay_ms"] = replayed(lambda i=i: contenders[i].solve(problem))
                except RuntimeError as error:  # it waits for a value, which no graph can
                    rows[i]["graph_replay"] = f"not possible: {str(error).splitlines()[0][:80]}"
    return rows


def _certify(problem: Any, contender: Contender, judge: Judge, exact: Reference) -> dict[str, Any]:
    """Solve once, and hold the answer and its gradient against the reference."""
    row: dict[str, Any] = {"contender": contender.name, "version": contender.version}
    if contender.version is None:
        return {**row, "status": "not installed"}
    if contender.cpu_only and problem.c.device.type != "cpu":
        return {**row, "status": "runs on the CPU only"}
    arguments = leaves(problem)
    try:
        answer, forward = milliseconds(lambda: contender.solve(arguments), problem.c.device)
        z = solution(answer)
        if contender.gradient:
            gradient, backward = milliseconds(lambda: _pull(arguments, z, problem.c), problem.c.device)
            found, right = (judge.comparable([part.cpu() for part in parts]) for parts in (gradient, exact.gradient))
            row["gradient_error"] = relative_error(found, right)
            row["first_ms"] = forward + backward
        else:
            row["first_ms"] = forward
    except Exception as error:  # noqa: BLE001  (a peer may raise anything; its row says what)
        message = (str(error).splitlines() or [""])[0][:120]
        return {**row, "status": f"failed: {type(error).__name__}: {message}"}
    if answer is not z:
        answer = type(answer)(*(part.detach() if isinstance(part, Tensor) else part for part in answer))
    residual = judge.certificate(problem, z.detach() if isinstance(answer, Tensor) else answer)
    row["residual"] = residual if math.isfinite(residual) else math.inf
    row["solution_error"] = relative_error([z.cpu()], [exact.z])
    if not row["residual"] <= judge.limit(problem.c.dtype):
        row.pop("first_ms")
        return {**row, "status": f"wrong: residual {row['residual']:.0e}"}
    if contender.gradient and contender.remote is None:
        arguments = leaves(problem)
        row["graph_bytes"] = graph_bytes(lambda: solution(contender.solve(arguments)), exclude=arguments)
        row["peak_bytes"] = peak_bytes(lambda: both(problem, contender), problem.c.device)
    return {**row, "status": "ok"}


def _pull(arguments: Any, z: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """The gradient of Σ c z for every argument; zero where it does not depend on one."""
    return torch.autograd.grad((c * z).sum(), differentiated(arguments), materialize_grads=True, allow_unused=True)


def both(problem: Any, contender: Contender) -> tuple[Tensor, ...]:
    """Forward and backward from fresh arguments."""
    arguments = leaves(problem)
    return _pull(arguments, solution(contender.solve(arguments)), problem.c)


def _time(problem: Any, contender: Contender) -> tuple[float, float | None]:
    """Milliseconds of forward alone, and of forward and backward together, each from fresh arguments."""
    if contender.remote is not None:
        return contender.remote(problem)
    device, arguments = problem.c.device, leaves(problem)
    forward = elapsed(lambda: contender.solve(arguments), device)
    return forward, elapsed(lambda: both(problem, contender), device) if contender.gradient else None


def elapsed(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds on the device's own clock."""
    if device.type != "cuda":
        return milliseconds(run, device)[1]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def replayed(run: Callable[[], Any], repeats: int = 20) -> dict[str, Any]:
    """Milliseconds of a forward pass that is recorded once as a CUDA graph and played again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        run()
    return spread([elapsed(graph.replay, torch.device("cuda")) for _ in range(repeats)])


def interleave(runs: Sequence[Callable[[], Any]], rounds: int, warm_up: int = WARM_UP) -> list[list[Any]]:
    """Run all of them in every round, so that none owns a position, nor always follows the same one.

    The orders are the rows of a Latin square, rotations of 0, 1, n−1, 2, n−2, …: in n rounds everyone takes every
    position, and follows every other once where n is even. The rounds are made a multiple of n if they are more.
    """
    n = len(runs)
    first = [(j + 1) // 2 if j % 2 else (n - j // 2) % n for j in range(n)]
    if n and rounds > n:
        rounds = -(-rounds // n) * n
    samples: list[list[Any]] = [[] for _ in runs]
    for k in range(-warm_up, rounds):
        for i in ((start + k) % n for start in first):
            result = runs[i]()
            if k >= 0:
                samples[i].append(result)
    return samples


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and every repeat, in milliseconds."""
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return {
        "median": round(statistics.median(samples), 4),
        "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "repeats": [round(sample, 4) for sample in samples],
    }
