"""Modules of optimal transport: they hold parameters and settings and call one function each."""

from __future__ import annotations

from torch import Tensor

from implicit_layers import checks
from implicit_layers.errors import ShapeError
from implicit_layers.nn.tempered import Tempered
from implicit_layers.solution import OnFailure, Solution, check_on_failure
from implicit_layers.transport import sinkhorn


class Sinkhorn(Tempered):
    r"""Costs to a transport plan, C ↦ argmin_P ⟨C, P⟩ − ε H(P): MINIMISED; see `implicit_layers.sinkhorn`.

    Args:
        temperature: ε > 0; the starting value if it is learned.
        learn_temperature: make the temperature a parameter. It is stored as `log_temperature`, so it stays positive,
            in the default dtype: `module.double()` for float64 costs.
        tol, max_iter, on_failure: see `sinkhorn`.

    Shape:  C (*B, n, m), and marginals a (*B, n), b (*B, m); without them 1/n and 1/m each -> (*B, n, m).
    Raises: as `sinkhorn`.

    >>> import torch
    >>> Sinkhorn(temperature=0.5)(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([[0.4404, 0.0596],
            [0.0596, 0.4404]])
    """

    def __init__(
        self,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        *,
        tol: float = 1e-9,
        max_iter: int = 10000,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        self.start_at(temperature, learn_temperature)
        checks.stopping(tol, max_iter)
        check_on_failure(on_failure)
        self.tol, self.max_iter = tol, max_iter
        self.on_failure: OnFailure = on_failure

    def solve(self, C: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Solution:
        """The plan, and how it was found."""
        checks.floating_tensors(C=C)
        if C.ndim < 2:
            raise ShapeError(f"C must have shape (*B, n, m), got {tuple(C.shape)}")
        a = C.new_ones(C.shape[-2]) / C.shape[-2] if a is None else a
        b = C.new_ones(C.shape[-1]) / C.shape[-1] if b is None else b
        return sinkhorn(
            C,
            a,
            b,
            temperature=self.temperature,
            tol=self.tol,
            max_iter=self.max_iter,
            on_failure=self.on_failure,
        )

    def forward(self, C: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """The transport plan."""
        return self.solve(C, a, b).value
