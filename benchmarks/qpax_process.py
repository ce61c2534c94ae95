"""qpax in a process of its own, which stays and answers: it brings JAX, which has no place beside PyTorch here.

It runs one problem when asked and measures its own time, so that it takes its turn in the rounds like the others.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import QP

WORKER = Path(__file__).with_name("qpax_worker.py")
VARIABLE = "QPAX_PYTHON"


class _Process:
    """The other interpreter, and one question at a time."""

    def __init__(self, python: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [python, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        atexit.register(self._process.kill)
        self.version = self.ask("version")

    def ask(self, question: str, *arrays: Any) -> Any:
        """Send a question, wait for its answer.

        Raises:
            RuntimeError: the process has ended, or its answer is an error.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None or self._process.poll() is not None:
            raise RuntimeError("the process of qpax has ended")
        pickle.dump((question, arrays), stdin)
        stdin.flush()
        good, answer = pickle.load(stdout)
        if not good:
            raise RuntimeError(answer)
        return answer


@lru_cache
def _process() -> _Process | None:
    """Started once; None where no interpreter is named or it has no qpax."""
    python = os.environ.get(VARIABLE)
    if not python:
        return None
    try:
        return _Process(python)
    except (OSError, EOFError, RuntimeError):
        return None


def version() -> str | None:
    """The version of qpax, or None."""
    process = _process()
    return None if process is None else process.version


def _ask(question: str, problem: QP) -> Any:
    process = _process()
    if process is None:
        raise RuntimeError(f"name the interpreter that has qpax in {VARIABLE}")
    return process.ask(question, *(tensor.detach().numpy() for tensor in problem))


class _Remote(torch.autograd.Function):
    """The answer, and the gradient that came with it: for the loss weights `c` of the problem alone."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        answer, gradient = _ask("solve", QP(*arguments, c))
        ctx.save_for_backward(*map(torch.as_tensor, gradient))
        parts = tuple(map(torch.as_tensor, answer))
        ctx.mark_non_differentiable(*parts[1:])
        return parts

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.saved_tensors


def solve(problem: QP) -> tuple[Tensor, ...]:
    """z, ν, λ, with the gradient of Σ c z."""
    return _Remote.apply(problem.c, *problem[:-1])


def milliseconds(problem: QP) -> tuple[float, float]:
    """Of one forward pass, and of one forward and backward pass, measured where they run."""
    return _ask("time", problem)
