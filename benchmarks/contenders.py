"""The ways to solve a quadratic program that are compared: ours and every peer that is installed."""

from __future__ import annotations

import importlib
import importlib.metadata

import implicit_layers
from benchmarks.measure import Answer, Contender
from benchmarks.problems import QP
from implicit_layers.qp import solve_qp


def installed(package: str) -> str | None:
    """The version of a package that is here, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ours(problem: QP) -> Answer:
    Q, p, A, b, G, h, _ = problem
    solution = solve_qp(Q, p, A=A, b=b, G=G, h=h)
    return Answer(solution.z, solution.nu, solution.lam)


def qpth(problem: QP) -> Answer:
    """Default settings but for the check of Q, which would only cost it time; its duals are kept on the node."""
    Q, p, A, b, G, h, _ = problem
    empty = Q.new_zeros(0)
    rows = (A, b) if A.shape[-2] else (empty, empty)
    z = importlib.import_module("qpth.qp").QPFunction(verbose=-1, check_Q_spd=False)(Q, p, G, h, *rows)
    nu = z.grad_fn.nus if A.shape[-2] else b
    return Answer(z, nu, z.grad_fn.lams)


OURS = Contender("implicit_layers", implicit_layers.__version__, ours)


def contenders() -> list[Contender]:
    """Ours first, then the peers, installed or not."""
    return [OURS, Contender("qpth", installed("qpth"), qpth)]
