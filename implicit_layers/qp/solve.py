r"""Quadratic programs as layers: solved by an interior point, differentiated through their KKT conditions.

min ½ zᵀQz + pᵀz   subject to   A z = b,   G z ≤ h,   lb ≤ z ≤ ub
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from implicit_layers import checks, transforms
from implicit_layers.eager import transforms_at_work, uncompiled
from implicit_layers.errors import ArgumentError, ArgumentTypeError, NonFiniteError, ShapeError
from implicit_layers.kkt.program import ActiveSet
from implicit_layers.qp.arguments import Program, at_the_door, refuse_values
from implicit_layers.qp.derivative import attached, differentiable
from implicit_layers.qp.run import Gradient, Outcome, Settings, settled_by_the_kernel
from implicit_layers.solution import OnFailure, QPInfo, QPShift, QPSolution, Status, check_on_failure
from implicit_layers.solvers import compiled
from implicit_layers.solvers.interior_point import InteriorPoint

Infeasible = Literal["raise", "nearest"]
_GRADIENTS = get_args(Gradient)  # asked once: the compiler of older PyTorch cannot
_INFEASIBLE = get_args(Infeasible)
_DEFAULT = InteriorPoint()


def solve_qp(
    Q: Tensor,  # (*B, n, n)
    p: Tensor,  # (*B, n)
    *,
    A: Tensor | None = None,  # (*B, n_eq, n)
    b: Tensor | None = None,  # (*B, n_eq)
    G: Tensor | None = None,  # (*B, n_ineq, n)
    h: Tensor | None = None,  # (*B, n_ineq)
    lb: Tensor | None = None,  # (*B, n)
    ub: Tensor | None = None,  # (*B, n)
    solver: InteriorPoint | None = None,
    on_failure: OnFailure = "raise",
    gradient: Gradient = "exact",
    smoothing: float = 1e-3,
    infeasible: Infeasible = "raise",
    warm_start: QPSolution | None = None,
) -> QPSolution:
    r"""Solve a batch of convex quadratic programs, linear programs among them, with gradients to all data.

    Problem:  z* = argmin_z ½ zᵀQz + pᵀz  subject to  A z = b,  G z ≤ h,  lb ≤ z ≤ ub;
              duals from L = ½zᵀQz + pᵀz + νᵀ(Az−b) + λᵀ(Gz−h) + λ_ubᵀ(z−ub) − λ_lbᵀ(z−lb),  λ, λ_lb, λ_ub ≥ 0.

    Args:
        Q: (*B, n, n) positive semidefinite, zero for a linear program; only its symmetric part ½(Q + Qᵀ) is used.
        p: (*B, n).
        A, b: (*B, n_eq, n) and (*B, n_eq), together or not at all. Rows may depend on each other.
        G, h: (*B, n_ineq, n) and (*B, n_ineq), together or not at all. Where h is inf there is no such row.
        lb, ub: (*B, n), each may be left out. -inf and inf mean that there is no such bound; lb = ub fixes an unknown.
        solver: an `InteriorPoint`; default `InteriorPoint()`.
        on_failure: "raise", or "warn" / "ignore": problems that fail keep their last iterate, get zero gradient and
            are marked in `info`; their neighbours are untouched. Data that are refused raise in any case.
        gradient: "exact", the derivative of the solution; "least_norm", the same, without a warning where it is not
            unique; "smoothed", that of the minimiser of ½ zᵀQz + pᵀz − μ Σ log(slacks of G z ≤ h, lb ≤ z ≤ ub), which
            is not zero at the vertices of a linear program. The solution itself is exact with all three.
        smoothing: μ > 0, in the unit of the cost.
        infeasible: "nearest": where no point satisfies the constraints, those of A z = b, G z ≤ h are moved by the
            shift of least norm that lets one (bounds stay), and `shift` says how far; that too is differentiated.
        warm_start: a solution of a similar batch of programs of the same sizes; its active set is tried first. Where
            few constraints change, a solve then takes one or two factorisations; the answer is the same. Left aside
            under `torch.func` transforms, while compiling and with `check_every=0`.
        Leading dimensions *B broadcast. What is shared by the batch is not copied.

    Returns:  QPSolution(z, nu, lam, s, info, lam_lb, lam_ub, value, shift), in the dtype and on the device of the data;
              s = h − Gz. `info` has one entry a problem: status, converged, iterations, residual, degenerate (flags
              that say why the derivative is not unique, see `Degeneracy`), condition (of the derivative's system).
              Where the minimiser is not unique, z is the one of least Euclidean norm (with `check_every=0` any). Where
              duals are not unique, they are some, inside the set of all rather than at its edge.
    Gradient: of z, nu, lam, s, lam_lb, lam_ub, value with respect to Q, p, A, b, G, h, lb, ub: one batched solve with
              the transposed KKT matrix on the active constraints, reusing the factor of the forward pass; any order,
              forward and reverse mode ("smoothed": first order). That of `value` is the Lagrangian's and takes no
              solve. Where a constraint is weakly active (λ = s = 0), the derivative to one side; where active rows
              depend on each other, that of least norm; where the minimiser is not unique, none in directions in which
              it jumps; all three with a `DegenerateGradientWarning` in the backward pass. A parameter shared by the
              batch gets the sum of the gradients.
    Raises:   DtypeError, DeviceError, ShapeError, NonFiniteError: naming the argument (and index).
              NotPositiveDefiniteError: Q is not positive semidefinite, naming the problem.
              InfeasibleError, UnboundedError: proven to working precision.
              ConvergenceError: the KKT residual stayed above the solver's tolerance.
              UnsupportedError: a second derivative of "smoothed".
    Cost:     time O(k (m n² + n³)) or, for positive definite Q without bounds and m < 2n rows, O(n³ + n²m + k m³) a
              problem, k ≈ 10 factorisations; a bound adds to a diagonal only. Memory for backward O(n² + m² + n m),
              whatever the iterations.
    Source:   Amos & Kolter (2017), OptNet, arXiv:1703.00443; Mehrotra (1992); Pougkakiotis & Gondzio (2021),
              arXiv:1904.10369.

    >>> Q, p = torch.eye(2), torch.tensor([-1.0, -4.0])
    >>> solution = solve_qp(Q, p, ub=torch.tensor([2.0, 3.0]))
    >>> solution.z, solution.lam_ub
    (tensor([1., 3.]), tensor([0., 1.]))
    """
    check_choices(on_failure, gradient, smoothing, infeasible)
    solver = _DEFAULT if solver is None else solver
    if not isinstance(solver, InteriorPoint):
        raise ArgumentTypeError(f"solve_qp: solver must be an InteriorPoint, got {type(solver).__name__}")
    read = solver.check_every > 0
    later = read and solver.backend != "torch"
    program, batch, checked, plain, structure = at_the_door(Q, p, A, b, G, h, lb, ub, read=read, later=later)
    begin = None if warm_start is None else _active_set(warm_start, program, solver)
    smoothing = smoothing if gradient == "smoothed" else 0.0
    settings = Settings(solver, on_failure, gradient, smoothing, checked, begin, plain)
    if plain and infeasible != "nearest" and not transforms.at_work():
        solution, settled = _solve_directly(settings, program, batch, structure)
        if solution is not None:
            return solution
        settings = settings._replace(settled=settled)
    # the compiler traces the derivative but for vmap and forward mode, whose rules it cannot take
    traced = torch.compiler.is_compiling() and gradient != "smoothed" and not transforms_at_work() & {"Vmap", "Jvp"}
    if traced and infeasible != "nearest":
        return _solution(differentiable(settings, program), None)
    try:
        return _solve_nearest(settings, program) if infeasible == "nearest" else _solve_eagerly(settings, program)
    except NonFiniteError:  # where an index is one of the caller's own tensor
        given = {"Q": Q, "p": p, "A": A, "b": b, "G": G, "h": h, "lb": lb, "ub": ub}
        refuse_values({name: tensor for name, tensor in given.items() if tensor is not None})
        raise


def check_choices(on_failure: str, gradient: str, smoothing: float, infeasible: str) -> None:
    """Refuse settings that are none, or that do not go together."""
    check_on_failure(on_failure)
    if gradient not in _GRADIENTS:
        raise ArgumentError(f"gradient must be one of {_GRADIENTS}, got {gradient!r}")
    if infeasible not in _INFEASIBLE:
        raise ArgumentError(f"infeasible must be one of {_INFEASIBLE}, got {infeasible!r}")
    if gradient == "smoothed" and infeasible == "nearest":
        raise ArgumentError(
            'gradient="smoothed" needs points inside the constraints, and the nearest feasible program has none; with '
            'infeasible="nearest" take gradient="exact" or "least_norm"'
        )
    checks.positive("smoothing", smoothing)


@uncompiled
def _solve_directly(
    settings: Settings, program: Program, batch: torch.Size, structure: compiled.Structure | None
) -> tuple[QPSolution | None, compiled.Settled | None]:
    """The short way, of plain tensors that the compiled kernel settles: a small program takes no longer than what is
    done around it.

    Returns: the solution, None where the kernel left a program; and what it settled.
    """
    settled = settled_by_the_kernel(settings, program, batch, structure, zeros=True)
    if settled is None or settled.number != batch.numel():
        return None, settled
    z, nu, lam, bound, s, value, _, _, _, weak, condition, iterations, residual, done, _, zeros = settled
    status, shift_b, shift_h, *of_bounds = zeros
    info = QPInfo(status, done, iterations, residual, weak, condition)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in program]):  # noqa: C419  a list is quicker
        z, nu, lam, s, value, bound = attached(settings, settled, program)
    lower, upper = of_bounds if bound is None else _sides(bound)
    return QPSolution(z, nu, lam, s, info, lower, upper, value, QPShift(shift_b, shift_h)), settled


def _sides(bound: Tensor) -> tuple[Tensor, Tensor]:
    """The duals of the lower and the upper bounds, from their difference."""
    return torch.where(bound < 0, -bound, 0.0), torch.where(bound > 0, bound, 0.0)


@uncompiled
def _solve_eagerly(settings: Settings, program: Program) -> QPSolution:
    """Solve; the compiler leaves this whole, instead of tracing its way to the first question of data."""
    return _solution(differentiable(settings, program), None)


@uncompiled
def _solve_nearest(settings: Settings, program: Program) -> QPSolution:
    """Solve; where that is infeasible, move b and h by the least-norm shift and solve again.

    The shifts t of min ½|t|² subject to A z = b + t_b, G z ≤ h + t_h, lb ≤ z ≤ ub are the duals of the elastic program
    min ½|Az − b|² + ½|max(Gz − h, 0)|² subject to lb ≤ z ≤ ub, whose derivative is the same linear system again.
    """
    with torch.no_grad():
        first = differentiable(settings._replace(on_failure="ignore", gradient="least_norm"), _detached(program))
    impossible = first.status == int(Status.INFEASIBLE)
    if "Vmap" not in transforms_at_work() and not checks.host_bool(impossible.any()):  # under vmap nobody may ask
        return _solution(differentiable(settings, program), None)
    elastic = settings._replace(on_failure="ignore", gradient="least_norm", elastic=True)
    nearest = differentiable(elastic, program._replace(Q=torch.zeros_like(program.Q), p=torch.zeros_like(program.p)))
    where = impossible.unsqueeze(-1)
    shift = QPShift(torch.where(where, nearest.nu, 0.0), torch.where(where, nearest.lam, 0.0))
    moved = program._replace(b=program.b + shift.b, h=program.h + shift.h)
    outcome = differentiable(settings, moved)
    good = outcome.converged.unsqueeze(-1)
    shift = QPShift(*(torch.where(good, part, part.detach()) for part in shift))
    return _solution(outcome, shift)


def _active_set(solution: QPSolution, program: Program, solver: InteriorPoint) -> ActiveSet | None:
    """The active set of a solution, flat; None where it cannot be used."""
    if not isinstance(solution, QPSolution):
        raise ArgumentTypeError(f"solve_qp: warm_start must be a QPSolution, got {type(solution).__name__}")
    batch, n, n_eq, n_ineq = program.batch, program.p.shape[-1], program.b.shape[-1], program.h.shape[-1]
    for name, tensor, size in (("z", solution.z, n), ("nu", solution.nu, n_eq), ("lam", solution.lam, n_ineq)):
        if tensor.shape != (*batch, size):
            raise ShapeError(
                f"solve_qp: warm_start has {name} of shape {tuple(tensor.shape)}, but these programs have "
                f"{(*batch, size)}"
            )
    if torch.compiler.is_compiling() or transforms_at_work() or solver.check_every == 0:
        return None
    rows = torch.cat([torch.ones_like(solution.nu), (solution.lam > 0).to(solution.lam.dtype)], dim=-1)
    fixed = (solution.lam_ub > 0).to(rows.dtype) - (solution.lam_lb > 0).to(rows.dtype)
    dtype = program.p.dtype if solver.precision == "native" else torch.float64
    count = batch.numel()
    return ActiveSet(rows.detach().reshape(count, rows.shape[-1]).to(dtype), fixed.detach().reshape(count, n).to(dtype))


def _detached(program: Program) -> Program:
    """The same data, without their history."""
    return Program(*(None if t is None else t.detach() for t in program))  # type: ignore[arg-type]


def _solution(outcome: Outcome, shift: QPShift | None) -> QPSolution:
    """Put together what the caller gets."""
    z, nu, lam, bound, s, value, *_ = outcome
    if shift is None:
        shift = QPShift(torch.zeros_like(nu), torch.zeros_like(lam))
    lower, upper = _sides(bound) if bound.shape[-1] else (torch.zeros_like(z), torch.zeros_like(z))
    return QPSolution(z, nu, lam, s, outcome.info, lower, upper, value, shift)
