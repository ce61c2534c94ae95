"""One measurement: first is the answer right, then what it costs, in interleaved rounds of one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.problems import QP
from implicit_layers.measure import graph_bytes, milliseconds, relative_error
from implicit_layers.reference import exact_qp, program
from implicit_layers.testing import kkt_certificate

KKT_LIMIT = 1e-6  # an answer with a larger relative KKT residual is not timed
WARM_UP = 2


class Answer(NamedTuple):
    """A solution with its duals, in the signs of `il.solve_qp`."""

    z: Tensor  # (B, n)
    nu: Tensor  # (B, n_eq)
    lam: Tensor  # (B, n_ineq)


@dataclass(frozen=True)
class Contender:
    """A way to solve a batch of quadratic programs with gradients; `version` is None where it is not installed."""

    name: str
    version: str | None
    solve: Callable[[QP], Answer]


class Reference(NamedTuple):
    """The exact solution of a problem and the exact gradient of the loss Σ c z."""

    z: Tensor
    gradient: tuple[Tensor, ...]


def leaves(problem: QP) -> QP:
    """The problem with every argument that has entries requiring grad, except the loss weights."""
    return QP(*(t.detach().clone().requires_grad_(t.numel() > 0) for t in problem[:-1]), problem.c)


def differentiated(problem: QP) -> list[Tensor]:
    return [tensor for tensor in problem[:-1] if tensor.requires_grad]


def reference(problem: QP) -> Reference:
    """By a dense KKT solve in float64 on a verified active set, which shares nothing with any contender."""
    problem = leaves(problem)
    Q, p, A, b, G, h, c = problem
    z = exact_qp(program(Q, p, A=A, b=b, G=G, h=h)).z
    return Reference(z.detach(), torch.autograd.grad((c * z).sum(), differentiated(problem)))


def certificate(problem: QP, answer: Answer) -> float:
    """The largest relative KKT residual of the batch; infinite where it is no number."""
    Q, p, A, b, G, h, _ = problem
    largest = float(kkt_certificate(Q, p, *answer, A=A, b=b, G=G, h=h).max())
    return largest if largest == largest else float("inf")


def measure(problem: QP, contenders: Sequence[Contender], *, rounds: int, device: str) -> list[dict[str, Any]]:
    """One row a contender: certificate and errors of all of them, times of those whose answer holds."""
    exact = reference(problem)
    problem = QP(*(tensor.to(device) for tensor in problem))
    rows = [_certify(problem, contender, exact) for contender in contenders]
    timed = [i for i, row in enumerate(rows) if row["status"] == "ok"]
    times = _interleave([lambda i=i: _time(problem, contenders[i]) for i in timed], rounds)
    for i, samples in zip(timed, times, strict=True):
        for name, part in zip(("forward_ms", "total_ms"), zip(*samples, strict=True), strict=True):
            rows[i][name] = spread(part)
    return rows


def _certify(problem: QP, contender: Contender, exact: Reference) -> dict[str, Any]:
    """Solve once, and hold the answer and its gradient against the reference."""
    row: dict[str, Any] = {"contender": contender.name, "version": contender.version}
    if contender.version is None:
        return {**row, "status": "not installed"}
    arguments = leaves(problem)
    try:
        answer = contender.solve(arguments)
        gradient = torch.autograd.grad((problem.c * answer.z).sum(), differentiated(arguments))
    except (RuntimeError, ValueError) as error:
        return {**row, "status": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    row["kkt"] = certificate(problem, Answer(*(tensor.detach() for tensor in answer)))
    row["solution_error"] = relative_error([answer.z.cpu()], [exact.z])
    row["gradient_error"] = relative_error([part.cpu() for part in gradient], exact.gradient)
    arguments = leaves(problem)
    row["graph_bytes"] = graph_bytes(lambda: contender.solve(arguments).z, exclude=arguments)
    wrong = row["kkt"] > KKT_LIMIT
    return {**row, "status": f"wrong: KKT residual {row['kkt']:.0e}" if wrong else "ok"}


def _time(problem: QP, contender: Contender) -> tuple[float, float]:
    """Milliseconds of forward alone, and of forward and backward together, each from fresh arguments."""
    device, arguments = problem.c.device, leaves(problem)
    _, forward = milliseconds(lambda: contender.solve(arguments).z, device)

    def both() -> None:
        torch.autograd.grad((problem.c * contender.solve(arguments).z).sum(), differentiated(arguments))

    _, total = milliseconds(both, device)
    return forward, total


def _interleave(runs: Sequence[Callable[[], Any]], rounds: int) -> list[list[Any]]:
    """Run all of them in every round, the first one last in the next round, so that none owns a position."""
    samples: list[list[Any]] = [[] for _ in runs]
    for k in range(WARM_UP + rounds):
        for j in range(len(runs)):
            i = (j + k) % len(runs)
            result = runs[i]()
            if k >= WARM_UP:
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
