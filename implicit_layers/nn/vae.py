"""The semi-amortised VAE as a module: encoder, model, and the settings of the inference between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from implicit_layers import checks
from implicit_layers.errors import ArgumentError, ImplicitLayersWarning, ShapeError, warn
from implicit_layers.solution import OnFailure, SolveInfo, check_on_failure
from implicit_layers.solvers.newton import Newton
from implicit_layers.vae.anchors import Anchor
from implicit_layers.vae.inner import InnerProblem
from implicit_layers.vae.model import LatentModel
from implicit_layers.vae.noise import Noise
from implicit_layers.vae.outer import ELBO, IWAE, HeldOut
from implicit_layers.vae.solve import Descent, GradMode, InnerSolver, refine

Outer = Callable[[LatentModel, Tensor, Tensor, Tensor], Tensor]
EncoderLoss = Literal["through", "own_elbo", "kl_initial_final", "kl_final_initial", "none"]
OuterNoise = Literal["fresh", "inner"]

_FREE = InnerProblem(Anchor("none"))


class VAELoss(NamedTuple):
    """What a forward pass returns, one entry a datum."""

    loss: Tensor  # (*B,) to be summed, or averaged, by the caller
    lam: Tensor  # (*B, size) λ*
    lam0: Tensor  # (*B, size) λ⁰
    info: SolveInfo | None  # how the inner problems went; None where there is none


class SemiAmortizedVAE(nn.Module):
    r"""A VAE whose encoder's guess λ⁰ is refined by optimisation, differentiated through in a chosen way.

    See `implicit_layers.vae.refine`. λ⁰ = encoder(x), λ* = argmin f(λ; θ) + ρ R(λ, λ⁰), loss = outer(λ*; θ).

    Args:
        encoder:      (\*B, \*E) -> (\*B, size): x to λ⁰, for a diagonal family (m, s) with s a log standard deviation.
        model:        the generative model, a `LatentModel`.
        problem:      the inner problem, an `InnerProblem`; None: no refinement, the plain VAE.
        rho:          ρ ≥ 0, the anchor's weight.
        beta:         weight of the KL term in the inner problem.
        solver, grad, on_failure: see `refine`.
        noise:        the points of the inner problem.
        outer:        an outer objective of `implicit_layers.vae`, or "anchored" (Moreau): the inner value itself, whose
                      gradient needs no linear solve. With a `HeldOut` the inner problem sees the observed entries only.
        outer_noise:  "fresh" points for the outer objective, or those of the "inner" problem. Fresh points follow the
                      rule of `noise` (those of "cubature" are always the same ones), but are independent for `IWAE`,
                      which is a bound for such points only, and where `outer_samples` is given.
        outer_samples: how many fresh points; None: as many as the inner problem has.
        encoder_loss: how the encoder learns: "through" λ*, or, λ* being detached, by its "own_elbo", by
                      KL(q_λ⁰ ‖ q_λ*) "kl_initial_final", by KL(q_λ* ‖ q_λ⁰) "kl_final_initial", or not at all, "none".

    Shape:  (\*B, \*E) -> `VAELoss`.
    Raises: ArgumentError: settings that contradict each other; else as `refine`.
        NonFiniteError: x is not finite.

    At ρ = 0, or without an anchor, the encoder's gradient through an exact λ* is exactly zero: the module warns.

    >>> encoder, decoder = nn.Linear(3, 4), nn.Linear(2, 3)
    >>> vae = SemiAmortizedVAE.savi_implicit(encoder, LatentModel(decoder, 2), rho=1.0)
    >>> result = vae(torch.rand(5, 3))
    >>> result.loss.sum().backward()
    >>> result.loss.shape, encoder.weight.grad.shape
    (torch.Size([5]), torch.Size([4, 3]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        model: LatentModel,
        *,
        problem: InnerProblem | None = InnerProblem(),  # noqa: B008  (frozen)
        rho: float = 1.0,
        beta: float = 1.0,
        solver: InnerSolver = Newton(),  # noqa: B008  (frozen)
        grad: GradMode = "implicit",
        noise: Noise = Noise(),  # noqa: B008  (frozen)
        outer: Outer | Literal["anchored"] = ELBO(),  # noqa: B008  (frozen)
        outer_noise: OuterNoise = "fresh",
        outer_samples: int | None = None,
        encoder_loss: EncoderLoss = "through",
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__()
        if not 0 <= checks.number("rho", rho) < float("inf"):
            raise ArgumentError(f"rho must be at least 0 and finite, got {rho}")
        checks.positive("beta", beta)
        check_on_failure(on_failure)
        for name, value, allowed in [
            ("encoder_loss", encoder_loss, get_args(EncoderLoss)),
            ("outer_noise", outer_noise, get_args(OuterNoise)),
            ("grad", grad, get_args(GradMode)),
        ]:
            if value not in allowed:
                raise ArgumentError(f"{name} must be one of {allowed}, got {value!r}")
        if outer == "anchored" and problem is None:
            raise ArgumentError("outer='anchored' is the value of the inner problem: give one")
        if outer == "anchored" and problem is not None and problem.energy == "potential":
            raise ArgumentError("outer='anchored' with a recognition potential would never see x; use an outer ELBO")
        if problem is None and encoder_loss.startswith("kl"):
            raise ArgumentError(f"encoder_loss={encoder_loss!r} compares λ⁰ with λ*: give an inner problem")
        self.encoder, self.model = encoder, model
        self.problem, self.rho, self.beta = problem, float(rho), float(beta)
        self.solver, self.grad, self.noise, self.on_failure = solver, grad, noise, on_failure
        self.outer, self.outer_noise, self.outer_samples = outer, outer_noise, outer_samples
        self.encoder_loss = encoder_loss
        count = noise.count(model.latent_dim) if outer_samples is None else outer_samples
        independent = outer_samples is not None or isinstance(outer, IWAE)
        self._fresh_noise = Noise("iid", count) if independent else noise
        if self._encoder_learns_nothing():
            warn(
                "SemiAmortizedVAE: the encoder's gradient is exactly zero: without an anchor an exact solution does "
                "not depend on the encoder's guess, and grad='envelope' drops the dependence. Use Anchor('l2') or "
                "Anchor('kl') with rho > 0 and grad='implicit' or outer='anchored', or give the encoder a loss of its "
                "own, e.g. encoder_loss='own_elbo'",
                ImplicitLayersWarning,
            )

    # --- presets --------------------------------------------------------------------------------------------------

    @classmethod
    def vae(cls, encoder: nn.Module, model: LatentModel, **settings: Any) -> SemiAmortizedVAE:
        """The amortised VAE: no refinement."""
        return cls(encoder, model, **{"problem": None, **settings})

    @classmethod
    def svi(cls, model: LatentModel, event_dims: int = 1, **settings: Any) -> SemiAmortizedVAE:
        """SVI: optimised from the prior, λ = 0, without an encoder; x is (*B, *E) with `event_dims` dimensions *E."""
        start = _PriorStart(model, event_dims)
        return cls(start, model, **{"problem": _FREE, "grad": "envelope", "encoder_loss": "none", **settings})

    @classmethod
    def vae_svi(cls, encoder: nn.Module, model: LatentModel, **settings: Any) -> SemiAmortizedVAE:
        """VAE+SVI: optimised from the encoder's guess; the encoder is trained by its own ELBO."""
        return cls(encoder, model, **{"problem": _FREE, "grad": "envelope", "encoder_loss": "own_elbo", **settings})

    @classmethod
    def vae_svi_kl(cls, encoder: nn.Module, model: LatentModel, **settings: Any) -> SemiAmortizedVAE:
        """VAE+SVI+KL: the encoder is trained by KL(q_λ⁰ ‖ q_λ*)."""
        trained: dict[str, Any] = {"problem": _FREE, "grad": "envelope", "encoder_loss": "kl_initial_final"}
        return cls(encoder, model, **{**trained, **settings})

    @classmethod
    def sa_vae(
        cls,
        encoder: nn.Module,
        model: LatentModel,
        steps: int = 20,
        step: float = 0.1,
        momentum: float = 0.5,
        **settings: Any,
    ) -> SemiAmortizedVAE:
        """SA-VAE: K steps from the encoder's guess, unrolled by automatic differentiation."""
        descent = Descent(steps, step, momentum)
        return cls(encoder, model, **{"problem": _FREE, "solver": descent, "grad": "unrolled", **settings})

    @classmethod
    def savi_implicit(
        cls, encoder: nn.Module, model: LatentModel, rho: float = 1.0, **settings: Any
    ) -> SemiAmortizedVAE:
        """Anchored SAVI: solved to stationarity, differentiated by the implicit function theorem."""
        return cls(encoder, model, **{"rho": rho, **settings})

    @classmethod
    def savi_moreau(cls, encoder: nn.Module, model: LatentModel, rho: float = 1.0, **settings: Any) -> SemiAmortizedVAE:
        """Moreau SAVI: trained on the anchored value, whose gradient is exact without a linear solve."""
        return cls(encoder, model, **{"rho": rho, "outer": "anchored", "grad": "envelope", **settings})

    # --- inference ------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:  # (*B, *E) -> (*B, size)
        """λ⁰."""
        (lam0,) = checks.without_autocast({"lam0": self.encoder(x)}).values()
        if lam0.shape[-1:] != (self.model.family.size,) or x.shape[: lam0.ndim - 1] != lam0.shape[:-1]:
            raise ShapeError(
                f"the encoder must return (*B, {self.model.family.size}) for x {tuple(x.shape)}, "
                f"got {tuple(lam0.shape)}"
            )
        return lam0

    def points(self, lam0: Tensor, generator: torch.Generator | None = None) -> Tensor:  # -> (S, *B, D)
        """Frozen points for the inner problem."""
        return self._draw(self.noise, lam0, generator)

    def infer(
        self, x: Tensor, generator: torch.Generator | None = None, problem: InnerProblem | None = None
    ) -> Tensor:  # (*B, *E) -> (*B, size)
        """λ for testing, without gradients: refined with the module's inner problem, or another one (β = 1)."""
        with torch.no_grad():
            lam0 = self.encode(x)
            problem = self.problem if problem is None else problem
            if problem is None:
                return lam0
            return refine(
                self.model, x, lam0, self.points(lam0, generator),
                problem=problem, rho=self.rho, solver=self.solver, grad=self.grad, on_failure=self.on_failure,
            ).value  # fmt: skip

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> VAELoss:
        """The loss of every datum, and what it was computed from."""
        if checks.readable(x):
            checks.finite(x=x)
        lam0 = self.encode(x)
        eps = self.points(lam0, generator)
        info: SolveInfo | None = None
        guess = lam0 if self.encoder_loss == "through" else lam0.detach()
        lam = guess
        if self.problem is not None:
            mask = self.outer.observed if isinstance(self.outer, HeldOut) else None
            lam, info = refine(
                self.model, x, guess, eps,
                problem=self.problem, rho=self.rho, beta=self.beta, mask=mask, solver=self.solver,
                grad="envelope" if self.outer == "anchored" else self.grad, on_failure=self.on_failure,
            )  # fmt: skip
        if self.outer == "anchored" and self.problem is not None:
            y = lam.detach() if self.problem.unknown == "all" else self.model.family.mean(lam).detach()
            loss = self.problem.value(y, self.model, x, guess, eps, self.rho, self.beta)
        else:
            fresh = self._draw(self._fresh_noise, lam, generator) if self.outer_noise == "fresh" else eps
            loss = self.outer(self.model, lam, x, fresh)  # type: ignore[operator]
        return VAELoss(loss + self._encoder_term(lam0, lam.detach(), x, eps), lam, lam0, info)

    def extra_repr(self) -> str:
        """The settings."""
        if self.problem is None:
            return "no refinement"
        outer = self.outer if isinstance(self.outer, str) else type(self.outer).__name__
        return (
            f"anchor={self.problem.anchor.kind}, rho={self.rho:g}, grad={self.grad}, outer={outer}, "
            f"encoder_loss={self.encoder_loss}"
        )

    def _encoder_term(self, lam0: Tensor, lam: Tensor, x: Tensor, eps: Tensor) -> Tensor | float:
        """What the encoder alone learns from; the model's parameters get nothing from it."""
        if self.encoder_loss == "kl_initial_final":
            return self.model.family.kl(lam0, lam)
        if self.encoder_loss == "kl_final_initial":
            return self.model.family.kl(lam, lam0)
        if self.encoder_loss == "own_elbo":
            fixed = {name: p.detach() for name, p in self.model.named_parameters()}
            return functional_call(self.model, fixed, (lam0, x, eps))
        return 0.0

    def _draw(self, noise: Noise, lam: Tensor, generator: torch.Generator | None) -> Tensor:  # (S, *B, D)
        """Points of a rule for every datum."""
        dim, batch = self.model.latent_dim, lam.shape[:-1]
        return noise.draw(dim, batch, dtype=lam.dtype, device=lam.device, generator=generator)

    def _encoder_learns_nothing(self) -> bool:
        """Whether an exact solution hands nothing on to the encoder."""
        problem = self.problem
        if problem is None or self.encoder_loss != "through" or problem.energy == "potential":
            return False
        if problem.unknown == "mean":  # the encoder's scales are used as they are
            return False
        if self.grad == "envelope" and self.outer != "anchored":
            return True
        free = problem.anchor.kind == "none" or self.rho == 0
        return free and (self.grad == "implicit" or self.outer == "anchored")


class _PriorStart(nn.Module):
    """λ = 0, the prior, for every datum, in the dtype of the model's parameters where x holds class numbers."""

    def __init__(self, model: LatentModel, event_dims: int) -> None:
        super().__init__()
        self.size, self.event_dims = model.family.size, event_dims
        self._models = (model,)  # in a tuple, so that its parameters are not counted twice

    def forward(self, x: Tensor) -> Tensor:  # (*B, *E) -> (*B, size)
        """Zeros."""
        dtype = x.dtype
        if not dtype.is_floating_point:
            floating = (p.dtype for p in self._models[0].parameters() if p.dtype.is_floating_point)
            dtype = next(floating, torch.get_default_dtype())
        return x.new_zeros(*x.shape[: x.ndim - self.event_dims], self.size, dtype=dtype)
