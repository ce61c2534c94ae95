"""Modules of linear programs over polytopes: they hold parameters and settings and call one function each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from implicit_layers import checks
from implicit_layers.nn.tempered import Tempered
from implicit_layers.polytope import Slack, check_slack, entropic_lp
from implicit_layers.solution import OnFailure, Solution, check_on_failure


class Polytope(Tempered):
    """What the modules over a fixed polytope share: its constraints, learned or not, and the temperature."""

    A: Tensor | None
    b: Tensor | None
    G: Tensor | None
    h: Tensor | None
    ub: Tensor | None

    def hold(
        self, temperature: float, learn_temperature: bool, tol: float, max_iter: int, **rows: Tensor | None
    ) -> None:
        """Check and keep the settings; constraints that are `nn.Parameter` are learned, the others are buffers."""
        checks.stopping(tol, max_iter)
        given = {name: x for name, x in rows.items() if x is not None}
        dtype = checks.floating_tensors(**given)[0] if given else torch.get_default_dtype()
        for name, value in rows.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        self.start_at(temperature, learn_temperature, dtype)
        self.tol, self.max_iter = tol, max_iter

    def extra_repr(self) -> str:
        """The constraints' sizes and the temperature."""
        rows = (("n_eq", self.b), ("n_ineq", self.h))
        sizes = "".join(f"{name}={x.shape[-1]}, " for name, x in rows if x is not None)
        bounds = "" if self.ub is None else "ub, "
        return f"{sizes}{bounds}{super().extra_repr()}"


class EntropicLP(Polytope):
    r"""Scores to a point of a fixed polytope, c ↦ argmax_x ⟨c, x⟩ + τ H(x), MAXIMISED; see `entropic_lp`.

    Args:
        A, b, G, h, ub: the polytope A x = b, G x ≤ h, 0 ≤ x ≤ u. What is given as `nn.Parameter` is learned (keep it
            feasible: b = A @ x0 of a learned positive x0 is safer through `entropic_lp` itself), the rest are buffers.
        temperature: τ > 0; the starting value if it is learned.
        learn_temperature: make the temperature a parameter, stored as `log_temperature`, so it stays positive. It has
            the dtype of the constraints.
        slack, tol, max_iter, on_failure: see `entropic_lp`.

    Shape:  (*B, n) -> (*B, n).
    Raises: as `entropic_lp`.

    >>> EntropicLP(A=torch.ones(1, 2), b=torch.ones(1), temperature=0.5)(torch.tensor([0.0, 1.0]))
    tensor([0.1192, 0.8808])
    """

    def __init__(
        self,
        *,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        ub: Tensor | None = None,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        slack: Slack = "hard",
        tol: float = 1e-10,
        max_iter: int = 1000,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        check_slack(slack)
        check_on_failure(on_failure)
        self.hold(temperature, learn_temperature, tol, max_iter, A=A, b=b, G=G, h=h, ub=ub)
        self.slack: Slack = slack
        self.on_failure: OnFailure = on_failure

    def solve(self, c: Tensor) -> Solution:  # (*B, n)
        """The point that the scores choose, and how it was found."""
        return entropic_lp(
            c,
            A=self.A,
            b=self.b,
            G=self.G,
            h=self.h,
            ub=self.ub,
            temperature=self.temperature,
            slack=self.slack,
            tol=self.tol,
            max_iter=self.max_iter,
            on_failure=self.on_failure,
        )

    def forward(self, c: Tensor) -> Tensor:  # (*B, n) -> (*B, n)
        """The point of the polytope that the scores choose."""
        return self.solve(c).value

    def extra_repr(self) -> str:
        """The constraints' sizes, the temperature and the slack."""
        return f"{super().extra_repr()}, slack={self.slack!r}"
