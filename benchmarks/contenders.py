"""The ways to solve a quadratic program that are compared, ours and every peer, and how their answers are judged.

Peers come from PyPI. qpth and entmax ask for old versions of what they need and run with new ones:

    pip install --no-deps qpth entmax proxsuite cmeel
    pip install cvxpylayers piqp moreau moreau-cpu POT

qpax brings JAX and wants a Python of its own, which the environment variable QPAX_PYTHON names:

    python -m venv ~/qpax && ~/qpax/bin/pip install qpax && export QPAX_PYTHON=~/qpax/bin/python
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import implicit_layers
from benchmarks import qpax_process
from benchmarks.measure import Contender, Judge, Reference, differentiated
from benchmarks.problems import QP
from implicit_layers.qp import solve_qp
from implicit_layers.reference import exact_qp, program
from implicit_layers.solvers.interior_point import InteriorPoint
from implicit_layers.testing import kkt_certificate
from implicit_layers.unrolled import unrolled_qp

ADMM_STEPS = 1000


class Answer(NamedTuple):
    """A solution with its duals, in the signs of `il.solve_qp`; None where a peer does not tell them."""

    z: Tensor  # (B, n)
    nu: Tensor | None = None  # (B, n_eq)
    lam: Tensor | None = None  # (B, n_ineq)


def installed(package: str) -> str | None:
    """The version of a package that is here, or None; ours may run from its folder."""
    if package == "implicit_layers":
        return implicit_layers.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- judging --------------------------------------------------------------------------------------------------------


def reference(problem: QP) -> Reference:
    """By a dense KKT solve in float64 on a verified active set, which shares nothing with any contender."""
    Q, p, A, b, G, h, c = problem
    z = exact_qp(program(Q, p, A=A, b=b, G=G, h=h)).z
    return Reference(z.detach(), torch.autograd.grad((c * z).sum(), differentiated(problem)))


def certificate(problem: QP, answer: Answer) -> float:
    """The largest relative KKT residual of the batch; for a peer that tells no duals, with the best that there are."""
    Q, p, A, b, G, h, _ = problem
    z = answer.z
    if not len(z) or not bool(z.isfinite().all()):
        return math.inf if len(z) else 0.0
    given = [(answer.nu, answer.lam)] if answer.lam is not None else [_duals(problem, z, near) for near in NEAR]
    residuals = [kkt_certificate(Q, p, z, nu, lam, A=A, b=b, G=G, h=h) for nu, lam in given]
    largest = float(torch.stack(residuals).amin(0).max())
    return largest if math.isfinite(largest) else math.inf


NEAR = (1e-7, 1e-5, 1e-3)  # rows with less slack than this, relative, may have a dual


def _duals(problem: QP, z: Tensor, near: float) -> tuple[Tensor, Tensor]:
    """Non-negative least squares of stationarity over the rows that z makes active, one problem at a time."""
    from scipy.optimize import lsq_linear

    nus, lams = [], []
    for Q, p, A, _, G, h, x in zip(*(t.detach().double().cpu() for t in (*problem[:-1], z)), strict=True):
        active = (G @ x - h) > -near * h.abs().clamp_min(1.0)
        rows = torch.cat([A, G[active]])
        lower = np.r_[np.full(len(A), -np.inf), np.zeros(len(rows) - len(A))]
        dual = np.zeros(len(rows))
        if len(rows):
            dual = lsq_linear(rows.T.numpy(), -(Q @ x + p).numpy(), bounds=(lower, np.inf), tol=1e-14).x
        nus.append(torch.as_tensor(dual[: len(A)]))
        lams.append(torch.zeros_like(h).masked_scatter(active, torch.as_tensor(dual[len(A) :])))
    return torch.stack(nus).to(z), torch.stack(lams).to(z)


def _symmetric(gradient: list[Tensor]) -> list[Tensor]:
    """That of Q made symmetric: peers differ in what they return beyond that."""
    Q, *others = gradient
    return [0.5 * (Q + Q.mT), *others]


QP_JUDGE = Judge(certificate, reference, comparable=_symmetric)


# --- layers ---------------------------------------------------------------------------------------------------------


def ours(problem: QP) -> Answer:
    Q, p, A, b, G, h, _ = problem
    answer = solve_qp(Q, p, A=A, b=b, G=G, h=h)
    return Answer(answer.z, answer.nu, answer.lam)


def unrolled_admm(problem: QP) -> Answer:
    """The iterations of OSQP, unrolled: what a user without an implicit layer would write."""
    Q, p, A, b, G, h, _ = problem
    return Answer(unrolled_qp(Q, p, A=A, b=b, G=G, h=h, steps=ADMM_STEPS))


def qpth(problem: QP) -> Answer:
    """Default settings but for the check of Q, which would only cost it time; its duals are kept on the node."""
    Q, p, A, b, G, h, _ = problem
    empty = Q.new_zeros(0)
    rows = (A, b) if A.shape[-2] else (empty, empty)
    z = importlib.import_module("qpth.qp").QPFunction(verbose=-1, check_Q_spd=False)(Q, p, G, h, *rows)
    return Answer(z, z.grad_fn.nus if A.shape[-2] else b, z.grad_fn.lams)


def proxsuite(problem: QP) -> Answer:
    """QPLayer with its own defaults; one-sided rows have a lower bound of −10²⁰, as its examples do."""
    Q, p, A, b, G, h, _ = problem
    function = importlib.import_module("proxsuite.torch.qplayer").QPFunction()
    lower = torch.full_like(h, -1e20)
    z, nu, lam = function(Q, p, A, b, G, lower, h)
    return Answer(z, nu, lam)


@lru_cache(maxsize=4)
def _cvxpy_layer(n: int, n_ineq: int, n_eq: int) -> Any:
    """½‖Rz‖² + pᵀz with R a Cholesky factor of Q, since a parameter Q is not DPP; made once a size."""
    import cvxpy as cp

    z, R, p = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n)
    G, h = cp.Parameter((n_ineq, n)), cp.Parameter(n_ineq)
    parameters, constraints = [R, p, G, h], [G @ z <= h]
    if n_eq:
        A, b = cp.Parameter((n_eq, n)), cp.Parameter(n_eq)
        parameters, constraints = [*parameters, A, b], [*constraints, A @ z == b]
    task = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(R @ z) + p @ z), constraints)
    layer = importlib.import_module("cvxpylayers.torch").CvxpyLayer
    return layer(task, parameters=parameters, variables=[z], solver_args={"solve_method": "Clarabel"})


def cvxpylayers(problem: QP) -> Answer:
    """With Clarabel inside."""
    Q, p, A, b, G, h, _ = problem
    layer = _cvxpy_layer(p.shape[-1], h.shape[-1], b.shape[-1])
    R = torch.linalg.cholesky(0.5 * (Q + Q.mT)).mT
    return Answer(layer(R, p, G, h, *((A, b) if b.shape[-1] else ()))[0])


@lru_cache(maxsize=4)
def _moreau_solver(n: int, n_ineq: int, n_eq: int, batch: int) -> Any:
    """Its own class, with dense patterns; made once a size, as its documentation does."""
    package = importlib.import_module("moreau")

    def pattern(rows: int) -> tuple[Tensor, Tensor]:
        return torch.arange(rows + 1) * n, torch.arange(n).repeat(rows)

    cones = package.Cones(num_zero_cones=n_eq, num_nonneg_cones=n_ineq)
    settings = package.Settings(device="cpu", batch_size=batch, enable_grad=True)
    solver = importlib.import_module("moreau.torch").Solver
    return solver(n, n_eq + n_ineq, *pattern(n), *pattern(n_eq + n_ineq), cones=cones, settings=settings)


def moreau(problem: QP) -> Answer:
    Q, p, A, b, G, h, _ = problem
    batch, n_eq = p.shape[0], b.shape[-1]
    solver = _moreau_solver(p.shape[-1], h.shape[-1], n_eq, batch)
    rows = torch.cat([A, G], -2).reshape(batch, -1)
    found = solver.solve((0.5 * (Q + Q.mT)).reshape(batch, -1), rows, p, torch.cat([b, h], -1))
    return Answer(found.x, found.z[..., :n_eq].detach(), found.z[..., n_eq:].detach())


def qpax(problem: QP) -> Answer:
    """In its own process; target_kappa = 1e-8, since its default smooths the gradient by a tenth or more."""
    z, nu, lam = qpax_process.solve(problem)
    return Answer(z, nu, lam)


# --- bare solvers, one problem after the other ----------------------------------------------------------------------


def _arrays(problem: QP) -> list[tuple[np.ndarray, ...]]:
    return list(zip(*(t.detach().cpu().numpy() for t in problem[:-1]), strict=True))


def _stacked(problem: QP, found: list[tuple[Any, Any, Any]]) -> Answer:
    return Answer(*(torch.as_tensor(np.stack(part)).to(problem.p) for part in zip(*found, strict=True)))


def osqp(problem: QP) -> Answer:
    """eps = 1e-6 and polishing."""
    import osqp as package
    from scipy import sparse

    found = []
    for Q, p, A, b, G, h in _arrays(problem):
        solver = package.OSQP()
        lower = np.r_[b, np.full(len(h), -np.inf)]
        upper = np.r_[b, h]
        rows = sparse.csc_matrix(np.vstack([A, G]))
        settings = {"eps_abs": 1e-6, "eps_rel": 1e-6, "polishing": True, "verbose": False, "max_iter": 20000}
        solver.setup(sparse.csc_matrix(np.triu(Q)), p, rows, lower, upper, **settings)
        result = solver.solve(raise_error=False)
        found.append((result.x, result.y[: len(b)], np.maximum(result.y[len(b) :], 0.0)))
    return _stacked(problem, found)


def clarabel(problem: QP) -> Answer:
    """Default settings."""
    import clarabel as package
    from scipy import sparse

    settings = package.DefaultSettings()
    settings.verbose = False
    found = []
    for Q, p, A, b, G, h in _arrays(problem):
        cones = [package.ZeroConeT(len(b)), package.NonnegativeConeT(len(h))]
        rows, right = sparse.csc_matrix(np.vstack([A, G])), np.r_[b, h]
        result = package.DefaultSolver(sparse.csc_matrix(np.triu(Q)), p, rows, right, cones, settings).solve()
        dual = np.asarray(result.z)
        found.append((np.asarray(result.x), dual[: len(b)], dual[len(b) :]))
    return _stacked(problem, found)


def piqp(problem: QP) -> Answer:
    """eps = 1e-9."""
    import piqp as package

    found = []
    for Q, p, A, b, G, h in _arrays(problem):
        solver = package.DenseSolver()
        solver.settings.eps_abs = solver.settings.eps_rel = 1e-9
        lower = np.full(len(h), -np.inf)
        solver.setup(Q, p, A, b, G, lower, h)
        solver.solve()
        result = solver.result
        found.append((result.x.copy(), result.y.copy(), result.z_u.copy()))
    return _stacked(problem, found)


def proxqp(problem: QP) -> Answer:
    """The solver behind QPLayer, dense, eps = 1e-9."""
    package = importlib.import_module("proxsuite").proxqp

    found = []
    for Q, p, A, b, G, h in _arrays(problem):
        result = package.dense.solve(Q, p, A, b, G, np.full(len(h), -1e20), h, eps_abs=1e-9, eps_rel=0.0)
        found.append((np.asarray(result.x), np.asarray(result.y), np.asarray(result.z)))
    return _stacked(problem, found)


def ours_in_torch(problem: QP) -> Answer:
    """Without the compiled kernel."""
    Q, p, A, b, G, h, _ = problem
    answer = solve_qp(Q, p, A=A, b=b, G=G, h=h, solver=InteriorPoint(backend="torch"))
    return Answer(answer.z, answer.nu, answer.lam)


OURS = Contender("implicit_layers", implicit_layers.__version__, ours)


def contenders() -> list[Contender]:
    """Ours first, then the peers, installed or not: layers, then bare solvers."""
    warnings.filterwarnings("ignore", module="cvxpy|diffcp|cvxpylayers|moreau")
    return [
        OURS,
        Contender("ours in torch", implicit_layers.__version__, ours_in_torch),
        Contender("qpth", installed("qpth"), qpth),
        Contender("cvxpylayers", installed("cvxpylayers"), cvxpylayers, cpu_only=True),
        Contender("proxsuite", installed("proxsuite"), proxsuite, cpu_only=True),
        Contender("moreau", installed("moreau"), moreau, cpu_only=True),
        Contender("qpax", qpax_process.version(), qpax, gradient=True, cpu_only=True, remote=qpax_process.milliseconds),
        Contender("unrolled ADMM", implicit_layers.__version__, unrolled_admm),
        Contender("osqp", installed("osqp"), osqp, gradient=False, cpu_only=True),
        Contender("clarabel", installed("clarabel"), clarabel, gradient=False, cpu_only=True),
        Contender("piqp", installed("piqp"), piqp, gradient=False, cpu_only=True),
        Contender("proxqp", installed("proxsuite"), proxqp, gradient=False, cpu_only=True),
    ]


def by_name(name: str) -> Contender:
    """The contender of that name."""
    (found,) = [contender for contender in contenders() if contender.name == name]
    return found
