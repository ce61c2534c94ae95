"""Drop-ins for users who come from another library: its call signature, this package's solver and gradients."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ArgumentTypeError, DtypeError, ShapeError
from implicit_layers.qp import solve_qp
from implicit_layers.solution import OnFailure, check_on_failure
from implicit_layers.solvers.interior_point import InteriorPoint

_USUAL_TOL = 1e-8  # an `eps` up to this leaves the solver its own tolerance


class QPSolvers(Enum):
    """The names that qpth gives its two solvers; here both mean `InteriorPoint`."""

    PDIPM_BATCHED = 1
    CVXPY = 2


class QPFunction:
    r"""qpth's `QPFunction`: change the import, keep the call.

    Problem:  z* = argmin_z ½ zᵀQz + pᵀz  subject to  G z ≤ h,  A z = b;  `QPFunction(...)(Q, p, G, h, A, b)`.

    What differs from qpth, on purpose:
    - A parameter shared by the batch gets the *sum* of the gradients, as everywhere in PyTorch. qpth gives their mean,
      so a learning rate tuned with it may have to be divided by the batch size for such parameters.
    - No wrong answer in silence: infeasible, unbounded and unsolved programs raise (`on_failure`), at any `verbose`.
    - No constraints, equalities alone, an empty batch, infinite entries of h, dependent rows, semidefinite Q and linear
      programs are solved. Derivatives of any order and `torch.func` work, as for `solve_qp`.
    - Only the symmetric part of Q counts, and its gradient is symmetric.

    Args:
        eps: a residual that the caller accepts. One larger than 1e-8 becomes the solver's `tol`; a smaller one changes
            nothing, since solutions end at rounding anyway.
        verbose: accepted and ignored; nothing is printed.
        notImprovedLim: accepted and ignored.
        maxIter: cap of the iterations where it is larger than the solver's own; a smaller one changes nothing, since
            stopping early would return an answer known to be wrong.
        solver: one of `QPSolvers`, both of which mean the same here, or an `InteriorPoint`, whose settings then count
            instead of `eps` and `maxIter`.
        check_Q_spd: accepted and ignored; an indefinite Q is always refused, a semidefinite one never.
        on_failure: see `solve_qp`; not an argument of qpth.

    Call:     Q (B, n, n), p (B, n), G (B, n_ineq, n), h (B, n_ineq), A (B, n_eq, n), b (B, n_eq), in this order, each
              with or without its batch dimension. Missing constraints: None or an empty tensor, of any dtype.
    Returns:  z*, always (B, n), with B = 1 where no argument has a batch dimension.
    Gradient: as of `solve_qp`.
    Raises:   ArgumentTypeError, ArgumentError: a setting out of its range.
              ShapeError: more than one batch dimension, or shapes that do not fit; else as `solve_qp`.
    Cost:     as of `solve_qp`.
    Source:   the signature is that of qpth 0.0.18; Amos & Kolter (2017), arXiv:1703.00443.

    >>> import torch
    >>> Q, p = torch.eye(2), torch.tensor([[-1.0, -4.0]])
    >>> G, h, none = torch.eye(2), torch.tensor([2.0, 3.0]), torch.Tensor()
    >>> QPFunction(verbose=False)(Q, p, G, h, none, none)
    tensor([[1., 3.]])
    """

    def __init__(
        self,
        eps: float = 1e-12,
        verbose: int = 0,
        notImprovedLim: int = 3,
        maxIter: int = 20,
        solver: QPSolvers | InteriorPoint = QPSolvers.PDIPM_BATCHED,
        check_Q_spd: bool = True,
        *,
        on_failure: OnFailure = "raise",
    ) -> None:
        checks.positive("eps", eps)
        checks.whole("maxIter", maxIter, least=1)
        checks.whole("notImprovedLim", notImprovedLim, least=0)
        check_on_failure(on_failure)
        self.on_failure: OnFailure = on_failure
        self.solver = _translated(solver, eps, maxIter)

    def __call__(
        self,
        Q: Tensor,  # (B, n, n) or (n, n)
        p: Tensor,  # (B, n) or (n,)
        G: Tensor | None,  # (B, n_ineq, n) or (n_ineq, n) or empty
        h: Tensor | None,  # (B, n_ineq) or (n_ineq,) or empty
        A: Tensor | None,  # (B, n_eq, n) or (n_eq, n) or empty
        b: Tensor | None,  # (B, n_eq) or (n_eq,) or empty
    ) -> Tensor:  # (B, n)
        """Solve the programs; see the class."""
        named = {"Q": (Q, 2), "p": (p, 1), "G": (G, 2), "h": (h, 1), "A": (A, 2), "b": (b, 1)}
        batched = {name: _batch_of(name, tensor, ndim) for name, (tensor, ndim) in named.items()}
        sizes = {name: size for name, size in batched.items() if size is not None}
        count = next((size for size in sizes.values() if size != 1), 1)
        strange = next((name for name, size in sizes.items() if size not in (1, count)), None)
        if strange is not None:
            raise ShapeError(
                f"QPFunction: {strange} has a batch of {sizes[strange]} and other arguments one of {count}; give all "
                "batched arguments the same"
            )
        G, h = _present("G", G, "h", h)
        A, b = _present("A", A, "b", b)
        if p.ndim == 1 or p.shape[0] == 1:
            p = p.expand(count, p.shape[-1])
        return solve_qp(Q, p, A=A, b=b, G=G, h=h, solver=self.solver, on_failure=self.on_failure).z

    def __repr__(self) -> str:
        return f"QPFunction(solver={self.solver!r}, on_failure={self.on_failure!r})"


def _translated(solver: QPSolvers | InteriorPoint, eps: float, max_iter: int) -> InteriorPoint:
    """The interior point that qpth's settings ask for."""
    if isinstance(solver, InteriorPoint):
        return solver
    # an enum of the same names, so that qpth's own QPSolvers may stay in a call
    if getattr(solver, "name", None) not in QPSolvers.__members__:
        raise ArgumentTypeError(
            f"QPFunction: solver must be a member of QPSolvers or an il.InteriorPoint, got {solver!r}"
        )
    own = InteriorPoint(max_iter=max(InteriorPoint().max_iter, max_iter))
    return own if eps <= _USUAL_TOL else replace(own, tol=eps)


def _batch_of(name: str, tensor: Tensor | None, ndim: int) -> int | None:
    """The size of the batch dimension of an argument, None without one."""
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        raise DtypeError(
            f"{name} must be a torch.Tensor, got {type(tensor).__name__}; convert it, e.g. torch.as_tensor({name})"
        )
    if tensor.ndim == ndim + 1:
        return tensor.shape[0]
    missing = tensor.shape == (0,) and name not in ("Q", "p")
    if tensor.ndim != ndim and not missing:
        expected = "(B, rows, n) or (rows, n)" if ndim == 2 else "(B, rows) or (rows,)"
        raise ShapeError(
            f"QPFunction: {name} must have shape {expected}, got {tuple(tensor.shape)}; il.solve_qp takes any number "
            "of batch dimensions"
        )
    return None


def _present(
    matrix_name: str, matrix: Tensor | None, vector_name: str, vector: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Constraints as they are, or None for those without rows."""
    no_matrix = matrix is None or matrix.shape == (0,) or matrix.shape[-2] == 0
    no_vector = vector is None or vector.shape[-1] == 0
    if no_matrix != no_vector:
        given, missing = (vector_name, matrix_name) if no_matrix else (matrix_name, vector_name)
        raise ShapeError(f"QPFunction: {given} was given without {missing}; they come together")
    return (None, None) if no_matrix else (matrix, vector)
