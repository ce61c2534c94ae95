"""Modules for quadratic programs: they hold parameters and settings and call one function each."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor, nn

from implicit_layers import checks, transforms
from implicit_layers.errors import ArgumentTypeError, DtypeError, ShapeError
from implicit_layers.qp import solve_qp
from implicit_layers.solution import OnFailure, QPSolution, check_on_failure
from implicit_layers.solvers.interior_point import InteriorPoint


class QPData(TypedDict):
    """The arguments of `solve_qp` that a `QPLayer` learns; those of missing constraints are None."""

    Q: Tensor  # (n, n)
    A: Tensor | None  # (n_eq, n)
    b: Tensor | None  # (n_eq,)
    G: Tensor | None  # (n_ineq, n)
    h: Tensor | None  # (n_ineq,)


class QPLayer(nn.Module):
    r"""OptNet layer: p ↦ argmin_z ½ zᵀQz + pᵀz subject to A z = b, G z ≤ h, with learned Q, A, b, G, h.

    See `solve_qp`. Every setting of the parameters gives a strictly convex, feasible program:
    Q = L Lᵀ + ε I with L lower triangular,  b = A z₀,  h = G z₀ + s₀ with s₀ = exp(log_slack) > 0.

    Args:
        n: number of unknowns, the size of the last axis of input and output.
        n_eq: number of equality rows, at most n.
        n_ineq: number of inequality rows.
        epsilon: ε, the least eigenvalue of Q; > 0.
        solver, on_failure: see `solve_qp`.
        device, dtype: of the parameters.

    Shape:  (*B, n) -> (*B, n).
    Raises: ShapeError: sizes that do not fit, or an input whose last axis is not n; else as `solve_qp`.

    >>> _ = torch.manual_seed(0)
    >>> layer = QPLayer(3, n_ineq=2)
    >>> layer(torch.randn(5, 3)).shape
    torch.Size([5, 3])
    """

    A: nn.Parameter | None
    G: nn.Parameter | None
    z0: nn.Parameter | None
    log_slack: nn.Parameter | None

    def __init__(
        self,
        n: int,
        n_eq: int = 0,
        n_ineq: int = 0,
        *,
        epsilon: float = 1e-4,
        solver: InteriorPoint | None = None,
        on_failure: OnFailure = "raise",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("n", n), ("n_eq", n_eq), ("n_ineq", n_ineq)):
            checks.integer(f"QPLayer: {name}", size)
        if n < 1 or not 0 <= n_eq <= n or n_ineq < 0:
            raise ShapeError(f"QPLayer needs n >= 1, 0 <= n_eq <= n and n_ineq >= 0, got {n=}, {n_eq=}, {n_ineq=}")
        checks.positive("epsilon", epsilon)
        check_on_failure(on_failure)
        if not isinstance(solver, (InteriorPoint, type(None))):
            raise ArgumentTypeError(f"QPLayer: solver must be an InteriorPoint, got {type(solver).__name__}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"QPLayer: dtype must be float32 or float64, got {dtype}; autocast may be used around it")
        self.n, self.n_eq, self.n_ineq = n, n_eq, n_ineq
        self.epsilon, self.solver, self.on_failure = epsilon, solver, on_failure

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.L = empty(n, n)
        self.register_parameter("A", empty(n_eq, n) if n_eq else None)
        self.register_parameter("G", empty(n_ineq, n) if n_ineq else None)
        self.register_parameter("z0", empty(n) if n_eq or n_ineq else None)
        self.register_parameter("log_slack", empty(n_ineq) if n_ineq else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from Q near the identity, random rows of length about 1, z₀ = 0 and slack 1."""
        with torch.no_grad():
            self.L.copy_(torch.eye(self.n) + 0.1 * torch.randn(self.n, self.n) / self.n**0.5)
            for rows in (self.A, self.G):
                if rows is not None:
                    nn.init.normal_(rows, std=self.n**-0.5)
            for vector in (self.z0, self.log_slack):
                if vector is not None:
                    nn.init.zeros_(vector)

    def program(self) -> QPData:
        """The data of the program that the parameters stand for, all but p, as keyword arguments of `solve_qp`."""
        with transforms.full_precision(self.L.device):
            lower = self.L.tril()
            Q = lower @ lower.mT + self.epsilon * torch.eye(self.n, dtype=lower.dtype, device=lower.device)
            b = None if self.A is None or self.z0 is None else self.A @ self.z0
            h = None
            if self.G is not None and self.z0 is not None and self.log_slack is not None:
                h = self.G @ self.z0 + self.log_slack.exp()
        return QPData(Q=Q, A=self.A, b=b, G=self.G, h=h)

    def solve(self, p: Tensor) -> QPSolution:  # (*B, n)
        """Solve the program for the linear cost `p`, with duals, slack and how it went."""
        checks.floating_tensors(p=p)
        if p.ndim < 1 or p.shape[-1] != self.n:
            raise ShapeError(f"QPLayer: the last axis of p must have size n = {self.n}, got shape {tuple(p.shape)}")
        return solve_qp(p=p, **self.program(), solver=self.solver, on_failure=self.on_failure)

    def forward(self, p: Tensor) -> Tensor:  # (*B, n) -> (*B, n)
        """Return the solution z for the linear cost `p`."""
        return self.solve(p).z

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"n={self.n}, n_eq={self.n_eq}, n_ineq={self.n_ineq}, epsilon={self.epsilon:g}"
