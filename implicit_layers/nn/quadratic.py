"""Modules for quadratic programs: they hold parameters and settings and call one function each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import Tensor, nn

from implicit_layers import checks, transforms
from implicit_layers.errors import ArgumentError, ArgumentTypeError, DtypeError, ShapeError
from implicit_layers.qp import solve_qp
from implicit_layers.qp.run import Gradient
from implicit_layers.qp.solve import Infeasible, check_choices
from implicit_layers.solution import OnFailure, QPSolution
from implicit_layers.solvers.interior_point import InteriorPoint

_LEARNABLE = ("Q", "p", "A", "b", "G", "h")


class QPData(TypedDict):
    """The arguments of `solve_qp` but p and bounds; those of missing constraints are None."""

    Q: Tensor  # (*B, n, n)
    A: Tensor | None  # (*B, n_eq, n)
    b: Tensor | None  # (*B, n_eq)
    G: Tensor | None  # (*B, n_ineq, n)
    h: Tensor | None  # (*B, n_ineq)


class QPLayer(nn.Module):
    r"""OptNet layer: p ↦ argmin_z ½ zᵀQz + pᵀz subject to A z = b, G z ≤ h, lb ≤ z ≤ ub; any of Q, A, b, G, h learned.

    See `solve_qp`. Every setting of the parameters gives a convex, feasible program:
    Q = L Lᵀ + ε I with L lower triangular,  b = A z₀,  h = G z₀ + s₀ with s₀ = exp(log_slack) > 0,  lb ≤ z₀ ≤ ub.

    Args:
        n: number of unknowns, the size of the last axis of input and output.
        n_eq: number of equality rows.
        n_ineq: number of inequality rows.
        learn: which of "Q", "p", "A", "b", "G", "h" are parameters. The others are given with each call; a Q that is
            neither learned nor given is ε I.
        lb, ub: bounds on z, numbers or tensors of shape (n,), kept as buffers; each call may give others.
        epsilon: ε, the least eigenvalue of Q; > 0, or 0 for a linear program where Q is not learned.
        solver, on_failure, gradient, smoothing, infeasible: see `solve_qp`.
        device, dtype: of the parameters.

    Shape:  (*B, n) -> (*B, n).
    Raises: ShapeError: sizes that do not fit, or an input whose last axis is not n. ArgumentError: an argument is
            neither learned nor given. Else as `solve_qp`.

    >>> _ = torch.manual_seed(0)
    >>> layer = QPLayer(3, n_ineq=2)
    >>> layer(torch.randn(5, 3)).shape
    torch.Size([5, 3])
    >>> projection = QPLayer(3, n_eq=1, learn=(), lb=0.0, epsilon=1.0)  # onto the probability simplex
    >>> projection(-torch.tensor([0.0, 1.0, 0.9]), A=torch.ones(1, 3), b=torch.ones(1))
    tensor([0.0000, 0.5500, 0.4500])
    """

    L: nn.Parameter | None
    p: nn.Parameter | None
    A: nn.Parameter | None
    G: nn.Parameter | None
    z0: nn.Parameter | None
    log_slack: nn.Parameter | None
    lb: Tensor | None
    ub: Tensor | None

    def __init__(
        self,
        n: int,
        n_eq: int = 0,
        n_ineq: int = 0,
        *,
        learn: Iterable[str] = ("Q", "A", "b", "G", "h"),
        lb: Tensor | float | None = None,
        ub: Tensor | float | None = None,
        epsilon: float = 1e-4,
        solver: InteriorPoint | None = None,
        on_failure: OnFailure = "raise",
        gradient: Gradient = "exact",
        smoothing: float = 1e-3,
        infeasible: Infeasible = "raise",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("n", n), ("n_eq", n_eq), ("n_ineq", n_ineq)):
            checks.integer(f"QPLayer: {name}", size)
        if n < 1 or n_eq < 0 or n_ineq < 0:
            raise ShapeError(f"QPLayer needs n >= 1, n_eq >= 0 and n_ineq >= 0, got {n=}, {n_eq=}, {n_ineq=}")
        self.learn = frozenset(learn)
        if unknown := sorted(self.learn.difference(_LEARNABLE)):
            raise ArgumentError(f"QPLayer: learn may hold {_LEARNABLE}, got {unknown}")
        if "Q" in self.learn or checks.number("epsilon", epsilon) != 0:
            checks.positive("epsilon", epsilon)
        check_choices(on_failure, gradient, smoothing, infeasible)
        if not isinstance(solver, (InteriorPoint, type(None))):
            raise ArgumentTypeError(f"QPLayer: solver must be an InteriorPoint, got {type(solver).__name__}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"QPLayer: dtype must be float32 or float64, got {dtype}; autocast may be used around it")
        self.n, self.n_eq, self.n_ineq = n, n_eq, n_ineq
        self.epsilon, self.solver, self.on_failure = float(epsilon), solver, on_failure
        self.gradient: Gradient = gradient
        self.smoothing = smoothing
        self.infeasible: Infeasible = infeasible

        def parameter(name: str, wanted: bool, *shape: int) -> None:
            value = nn.Parameter(torch.empty(*shape, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, value)

        eq, ineq = n_eq > 0, n_ineq > 0
        parameter("L", "Q" in self.learn, n, n)
        parameter("p", "p" in self.learn, n)
        parameter("A", eq and "A" in self.learn, n_eq, n)
        parameter("G", ineq and "G" in self.learn, n_ineq, n)
        parameter("z0", (eq and "b" in self.learn) or (ineq and "h" in self.learn), n)
        parameter("log_slack", ineq and "h" in self.learn, n_ineq)
        for name, bound in (("lb", lb), ("ub", ub)):
            if bound is not None:
                bound = torch.as_tensor(bound, device=device, dtype=dtype)
                if bound.shape not in ((), (n,)):
                    raise ShapeError(f"QPLayer: {name} must be a number or have shape ({n},), got {tuple(bound.shape)}")
                bound = bound.expand(n).clone()
            self.register_buffer(name, bound)
        crossed = self.lb is not None and self.ub is not None and bool((self.lb > self.ub).any())
        if crossed or any(t is not None and bool(t.isnan().any()) for t in (self.lb, self.ub)):
            raise ArgumentError(f"QPLayer: lb must be below ub and neither NaN, got {lb=}, {ub=}")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from Q near the identity, random rows of length about 1, p and z₀ 0 and slack 1."""
        with torch.no_grad():
            if self.L is not None:
                self.L.copy_(torch.eye(self.n) + 0.1 * torch.randn(self.n, self.n) / self.n**0.5)
            for rows in (self.A, self.G):
                if rows is not None:
                    nn.init.normal_(rows, std=self.n**-0.5)
            for vector in (self.p, self.z0, self.log_slack):
                if vector is not None:
                    nn.init.zeros_(vector)

    def program(
        self,
        *,
        Q: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        lb: Tensor | None = None,
        ub: Tensor | None = None,
        like: Tensor | None = None,
    ) -> QPData:
        """The data of the program but p and bounds, as keyword arguments of `solve_qp`: given ones, others as learned.

        A learned z₀ is moved between the bounds. A Q that is neither given nor learned has the dtype of `like`.
        """
        lb, ub = self.lb if lb is None else lb, self.ub if ub is None else ub
        A = self.A if A is None else A
        G = self.G if G is None else G
        device = next((t.device for t in (like, self.L, self.z0, lb) if t is not None), torch.device("cpu"))
        with transforms.full_precision(device):
            if Q is None and self.L is not None:
                lower = self.L.tril()
                Q = lower @ lower.mT + self.epsilon * torch.eye(self.n, dtype=lower.dtype, device=lower.device)
            elif Q is None:
                known = next((t for t in (like, self.p, self.A, self.G, self.z0, lb) if t is not None), None)
                dtype = None if known is None else known.dtype
                Q = self.epsilon * torch.eye(self.n, dtype=dtype, device=device)
            z0: Tensor | None = self.z0
            if z0 is not None and (lb is not None or ub is not None):
                z0 = z0.clamp(lb, ub)
            if b is None and A is not None and z0 is not None and "b" in self.learn:
                b = (A @ z0.unsqueeze(-1)).squeeze(-1)
            if h is None and G is not None and z0 is not None and self.log_slack is not None:
                h = (G @ z0.unsqueeze(-1)).squeeze(-1) + self.log_slack.exp()
        for count, given in ((self.n_eq, {"A": A, "b": b}), (self.n_ineq, {"G": G, "h": h})):
            for name, tensor in given.items():
                if count and tensor is None:
                    raise ArgumentError(f"QPLayer: {name} is not learned here, so it must be given with the call")
                if not count and tensor is not None:
                    raise ArgumentError(f"QPLayer: {name} was given, but the layer was made without such rows")
        return QPData(Q=Q, A=A, b=b, G=G, h=h)

    def solve(
        self,
        p: Tensor | None = None,  # (*B, n)
        *,
        Q: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        lb: Tensor | None = None,
        ub: Tensor | None = None,
        warm_start: QPSolution | None = None,
    ) -> QPSolution:
        """Solve the program, with duals, slack and how it went; arguments given here replace the learned ones."""
        p = self.p if p is None else p
        if p is None:
            raise ArgumentError("QPLayer: p is not learned here, so it must be given with the call")
        checks.floating_tensors(p=p)
        if p.ndim < 1 or p.shape[-1] != self.n:
            raise ShapeError(f"QPLayer: the last axis of p must have size n = {self.n}, got shape {tuple(p.shape)}")
        data = self.program(Q=Q, A=A, b=b, G=G, h=h, lb=lb, ub=ub, like=p)
        return solve_qp(
            p=p,
            **data,
            lb=self.lb if lb is None else lb,
            ub=self.ub if ub is None else ub,
            solver=self.solver,
            on_failure=self.on_failure,
            gradient=self.gradient,
            smoothing=self.smoothing,
            infeasible=self.infeasible,
            warm_start=warm_start,
        )

    def forward(
        self,
        p: Tensor | None = None,  # (*B, n)
        *,
        Q: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        lb: Tensor | None = None,
        ub: Tensor | None = None,
    ) -> Tensor:  # (*B, n)
        """Return the solution z for the linear cost `p`; arguments given here replace the learned ones."""
        return self.solve(p, Q=Q, A=A, b=b, G=G, h=h, lb=lb, ub=ub).z

    def extra_repr(self) -> str:
        """Show the sizes."""
        learned = "" if self.learn == {"Q", "A", "b", "G", "h"} else f", learn={tuple(sorted(self.learn))}"
        return f"n={self.n}, n_eq={self.n_eq}, n_ineq={self.n_ineq}, epsilon={self.epsilon:g}{learned}"
