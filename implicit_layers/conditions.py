"""The hypotheses of the implicit function theorem, tested at a solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_layers import checks
from implicit_layers.door import enter
from implicit_layers.jacobian import opaque, pushforward, recordable
from implicit_layers.solvers.problem import GIVEN_FLOOR, Rows, Terms, norm, relative

_SHOWN = 20  # rows of the printed table
_DIRECTIONS = 3


@dataclass(frozen=True)
class IFTReport:
    """Whether z is, near θ, a differentiable function of θ: one entry a problem, shape (*B,).

    `bool(report)` is whether all problems pass; `str(report)` is a table that says in words what fails where.
    """

    residual: Tensor  # ‖F(z, θ)‖
    relative_residual: Tensor  # ‖F(z, θ)‖ relative to the size of the terms that cancel in F
    finite: Tensor  # bool: F, ∂F/∂z and ∂F/∂θ are finite
    smooth: Tensor  # bool: no kink was met along a few directions; a kink off them is not seen
    smallest_singular_value: Tensor  # of ∂F/∂z
    largest_singular_value: Tensor
    condition: Tensor  # largest/smallest
    scaled_condition: Tensor  # the same once the rows and columns of ∂F/∂z have unit length: free of units
    tol: float  # on the relative residual
    max_condition: float  # on the scaled condition
    rounding_condition: float  # on the condition itself: 1/eps, beyond which a row of ∂F/∂z may be nothing but rounding

    @property
    def solved(self) -> Tensor:
        """First condition, one entry a problem: F(z, θ) = 0."""
        return self.relative_residual <= self.tol

    @property
    def differentiable(self) -> Tensor:
        """Second condition: F is continuously differentiable there."""
        return self.finite & self.smooth

    @property
    def invertible(self) -> Tensor:
        """Third condition: ∂F/∂z is invertible."""
        return (self.scaled_condition <= self.max_condition) & (self.condition <= self.rounding_condition)

    @property
    def ok(self) -> Tensor:
        """All three conditions, one entry a problem."""
        return self.solved & self.differentiable & self.invertible

    def __bool__(self) -> bool:
        return checks.host_bool(self.ok.all())

    def __str__(self) -> str:
        ok = self.ok
        held = int(ok.sum())
        lines = [f"Implicit function theorem: {held} of {ok.numel()} problems satisfy its conditions."]
        lines.append(f"{'index':>12}  {'|F|':>8}  {'relative':>8}  {'s_min':>8}  {'s_max':>8}  {'cond':>8}  verdict")
        indices = [tuple(i) for i in torch.cat([(~ok).nonzero(), ok.nonzero()]).tolist()]
        for index in indices[:_SHOWN]:
            numbers = (
                self.residual,
                self.relative_residual,
                self.smallest_singular_value,
                self.largest_singular_value,
                self.condition,
            )
            row = "  ".join(f"{float(x[index]):8.1e}" for x in numbers)
            lines.append(f"{index if len(index) != 1 else index[0]!s:>12}  {row}  {self._verdict(index)}")
        if len(indices) > _SHOWN:
            lines.append(f"{'...':>12}  {len(indices) - _SHOWN} more")
        return "\n".join(lines)

    def _verdict(self, index: tuple[int, ...]) -> str:
        """What fails at one problem, in words."""
        words = []
        if not bool(self.solved[index]):
            words.append(f"1: z is no solution, relative residual above {self.tol:.1e}")
        if not bool(self.finite[index]):
            words.append("2: a first derivative is not finite")
        elif not bool(self.smooth[index]):
            words.append("2: F has a kink at z")
        if not bool(self.invertible[index]):
            if bool(self.scaled_condition[index] <= self.max_condition):
                words.append("3: dF/dz is singular to rounding; if only its units differ, rescale F or z")
            else:
                words.append(f"3: dF/dz is singular, scaled condition {float(self.scaled_condition[index]):.1e}")
        return "; ".join(words) or "ok"


@torch.no_grad()
def check_ift(
    residual: Callable[..., Tensor],
    z: Tensor,
    *theta: Any,
    batch_dims: int | None = None,
    tol: float | None = None,
    max_condition: float | None = None,
) -> IFTReport:
    r"""Test the conditions under which a solution z of F(z, θ) = 0 is a differentiable function of θ.

    1. F(z, θ) = 0, up to `tol` relative to the size of the terms that cancel in F.
    2. F is continuously differentiable: its first derivatives in z and θ are finite, and along three fixed directions
       its slopes to either side agree in the limit. (A kink off these directions is not seen.)
    3. ∂F/∂z is invertible: its condition number, rows and columns scaled to unit length, is below `max_condition`, and
       unscaled below 1/eps: scaling would make a row that is only rounding look like any other.

    Args:
        residual:       F(z, \*theta), as for `root`.
        z:              the solution, (\*B, n).
        theta:          as for `root`.
        batch_dims:     as for `root`; problems that are coupled are judged by their own blocks of ∂F/∂z.
        tol:            None: √eps of the dtype.
        max_condition:  None: 64/√eps, beyond which the gradients of `root` raise.

    Returns:  an `IFTReport`, which needs no gradient and has none.
    Raises:   ShapeError, DtypeError, DeviceError: an argument, or what F returns, does not fit.
    Cost:     n products to form ∂F/∂z, a singular value decomposition a problem, and some twenty evaluations of F.
    Source:   Krantz & Parks (2013), The Implicit Function Theorem, Theorem 3.3.1.

    >>> report = check_ift(lambda z, theta: z * z - theta, torch.tensor([[2.0], [0.0]]), torch.tensor([[4.0], [0.0]]))
    >>> report.ok
    tensor([ True, False])
    """
    entrance = enter("root", residual, z, theta, what="check_ift", batch_dims=batch_dims, z_name="z")
    with opaque(z.device):
        point, *leaves = recordable(entrance.z0, *entrance.leaves)
        system = entrance.system
        rows = Rows(point.shape, system.batch_dims)
        eps = torch.finfo(point.dtype).eps
        y = rows.flat(point)
        F = rows.residual(system.residual, tuple(leaves))(y)
        size = Terms(rows, system.residual, point, tuple(leaves)).size(y, F)
        J = system.jacobian(point, leaves).dense()
        regular = torch.isfinite(J).all(-1).all(-1)
        finite = torch.isfinite(F).all(-1) & regular & _finite_in_theta(rows, system.residual, point, leaves)
        J = torch.where(regular[..., None, None], J, 0.0)
        smallest, largest, condition = _singular_values(J)
        scaled = J / _positive(torch.linalg.vector_norm(J, dim=-1, keepdim=True))
        scaled = scaled / _positive(torch.linalg.vector_norm(scaled, dim=-2, keepdim=True))
        return IFTReport(
            residual=norm(F),
            relative_residual=relative(F, size, GIVEN_FLOOR),
            finite=finite,
            smooth=_smooth(rows, system.residual, y, leaves, F),
            smallest_singular_value=smallest,
            largest_singular_value=largest,
            condition=condition,
            scaled_condition=_singular_values(scaled)[2],
            tol=eps**0.5 if tol is None else tol,
            max_condition=64 / eps**0.5 if max_condition is None else max_condition,
            rounding_condition=1.0 / eps,
        )


def _positive(x: Tensor) -> Tensor:
    """x, with 1 for 0."""
    return torch.where(x == 0, 1.0, x)


def _singular_values(J: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (*B, n, n) -> (*B,) each
    """The smallest and the largest singular value and their quotient; of an empty matrix all are 1."""
    if J.shape[-1] == 0:
        one = J.new_ones(J.shape[:-2])
        return one, one, one
    values = torch.linalg.svdvals(J)
    smallest, largest = values[..., -1], values[..., 0]
    condition = torch.where(smallest > 0, largest / _positive(smallest), torch.inf)
    return smallest, largest, condition


def _finite_in_theta(
    rows: Rows, residual: Callable[..., Tensor], z: Tensor, leaves: Sequence[Tensor]
) -> Tensor:  # (*B,)
    """Whether the derivative of F along (1, ..., 1) in every floating-point tensor of θ is finite."""
    finite = torch.ones(rows.batch, dtype=torch.bool, device=z.device)
    for i, x in enumerate(leaves):
        if x.is_floating_point():

            def F(moved: Tensor, i: int = i) -> Tensor:
                return residual(z, *leaves[:i], moved, *leaves[i + 1 :])

            along = pushforward(F, [x], [torch.ones_like(x)], z)
            finite = finite & torch.isfinite(rows.flat(along)).all(-1)
    return finite


def _direction(x: Tensor, seed: int) -> Tensor:
    """A fixed direction in which no entry stands still, in the units of x."""
    count = torch.arange(1, x.numel() + 1, dtype=x.dtype, device=x.device).reshape(x.shape)
    turn = (count * (0.6180339887498949 + 0.1 * seed)).frac() - 0.5
    weight = torch.where(turn < 0, turn - 0.5, turn + 0.5)
    typical = (x**2).mean().sqrt() if x.numel() else x.sum()
    return weight * torch.where(typical > 0, x.abs() + typical, 1.0)


def _smooth(
    rows: Rows, residual: Callable[..., Tensor], y: Tensor, leaves: Sequence[Tensor], F: Tensor
) -> Tensor:  # (*B,)
    """Whether the slopes to either side approach each other as the step shrinks, along a few directions."""
    h = float(torch.finfo(y.dtype).eps ** 0.25)
    smooth = torch.ones(rows.batch, dtype=torch.bool, device=y.device)
    for seed in range(_DIRECTIONS):
        dy = _direction(y, seed)
        dtheta = [_direction(x, seed + 1) if x.is_floating_point() else None for x in leaves]

        def slope(step: float, dy: Tensor = dy, dtheta: list[Tensor | None] = dtheta) -> Tensor:
            moved = [x if d is None else x + step * d for x, d in zip(leaves, dtheta, strict=True)]
            return (rows.residual(residual, tuple(moved))(y + step * dy) - F) / step

        wide = norm(slope(h) - slope(-h))
        right, left = slope(h / 8), slope(-h / 8)
        narrow = norm(right - left)
        kink = (narrow > 0.5 * wide) & (narrow > 1e-3 * (norm(right) + norm(left)))
        smooth = smooth & ~kink & torch.isfinite(narrow)
    return smooth
