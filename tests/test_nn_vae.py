"""The module: every preset trains what it says it trains, the settings that contradict each other are refused."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import implicit_layers as il
from implicit_layers.measure import graph_bytes
from implicit_layers.nn import SemiAmortizedVAE
from implicit_layers.vae import (
    IWAE,
    Anchor,
    Categorical,
    Descent,
    Gaussian,
    HeldOut,
    InnerProblem,
    LatentModel,
    Noise,
    metrics,
)
from implicit_layers.vae.ppca import PPCA, learned

X = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def parts(seed: int = 0):
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    return encoder, LatentModel(decoder, 2, Gaussian(0.2, learn=True).double())


FREE = InnerProblem(Anchor("none"))
PRESETS = {
    "vae": lambda e, m: SemiAmortizedVAE.vae(e, m),
    "svi": lambda e, m: SemiAmortizedVAE.svi(m),
    "vae_svi": lambda e, m: SemiAmortizedVAE.vae_svi(e, m),
    "vae_svi_kl": lambda e, m: SemiAmortizedVAE.vae_svi_kl(e, m),
    "kl backwards": lambda e, m: SemiAmortizedVAE.vae_svi_kl(e, m, encoder_loss="kl_final_initial"),
    "sa_vae": lambda e, m: SemiAmortizedVAE.sa_vae(e, m, steps=5, step=0.05),
    "savi_implicit": lambda e, m: SemiAmortizedVAE.savi_implicit(e, m, rho=0.5),
    "savi_implicit, iwae": lambda e, m: SemiAmortizedVAE.savi_implicit(e, m, outer=IWAE(), outer_samples=3),
    "savi_moreau": lambda e, m: SemiAmortizedVAE.savi_moreau(e, m, problem=InnerProblem(Anchor("kl"))),
    "moreau, mean only": lambda e, m: SemiAmortizedVAE.savi_moreau(e, m, problem=InnerProblem(unknown="mean")),
    "potential": lambda e, m: SemiAmortizedVAE(e, m, problem=InnerProblem(Anchor("none"), energy="potential")),
    "held out": lambda e, m: SemiAmortizedVAE(e, m, outer=HeldOut(torch.tensor([1.0, 1, 0, 1, 0]).double())),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_of_every_preset_lowers_its_loss(name):
    encoder, model = parts()
    vae = PRESETS[name](encoder, model)
    optimiser = torch.optim.Adam(vae.parameters(), 1e-2)

    def loss():
        return vae(X, torch.Generator().manual_seed(1))

    before = loss()
    assert before.loss.shape == (6,) and before.lam.shape == (6, 4)
    for _ in range(5):
        optimiser.zero_grad()
        loss().loss.sum().backward()
        optimiser.step()
    assert float(loss().loss.sum().detach()) < float(before.loss.sum().detach())
    learns = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in encoder.parameters()]
    assert all(learns) if name != "svi" else not any(learns)
    assert vae.infer(X).shape == (6, 4) and not vae.infer(X).requires_grad


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_is_per_datum_and_nothing_is_averaged(name):
    encoder, model = parts()
    vae = PRESETS[name](encoder, model)
    vae.noise = Noise("cubature")
    vae.outer_noise = "inner"
    if name == "savi_implicit, iwae":
        vae.noise = Noise("cubature")
    whole = vae(X).loss
    each = torch.stack([vae(X[i]).loss for i in range(6)])
    assert torch.allclose(whole, each, atol=1e-8)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    sums = torch.autograd.grad(whole.sum(), parameters, allow_unused=True)
    single = [torch.autograd.grad(vae(X[i]).loss, parameters, allow_unused=True) for i in range(6)]
    for k, total in enumerate(sums):
        if total is not None:
            assert torch.allclose(total, sum(g[k] for g in single), atol=1e-7)


def test_the_encoders_own_loss_moves_the_encoder_alone():
    encoder, model = parts()
    vae = SemiAmortizedVAE.vae_svi(encoder, model, noise=Noise("cubature"), outer_noise="inner")
    found = torch.autograd.grad(vae(X).loss.sum(), [*encoder.parameters(), *model.parameters()])
    lam0 = encoder(X)
    eps = vae.points(lam0)
    own = torch.autograd.grad(model.free_energy(lam0, X, eps).sum(), list(encoder.parameters()))
    lam = vae.infer(X)
    refined = torch.autograd.grad(model.free_energy(lam, X, eps).sum(), list(model.parameters()))
    for ours, expected in zip(found, (*own, *refined), strict=True):
        assert torch.allclose(ours, expected, atol=1e-8)


@pytest.mark.parametrize(
    "settings",
    [
        {"rho": 0.0},
        {"problem": FREE},
        {"grad": "envelope"},
        {"problem": FREE, "outer": "anchored"},
    ],
    ids=str,
)
def test_an_encoder_that_cannot_learn_is_warned_about_and_does_not(settings):
    encoder, model = parts()
    with pytest.warns(il.ImplicitLayersWarning, match="exactly zero"):
        vae = SemiAmortizedVAE(encoder, model, noise=Noise("cubature"), outer_noise="inner", **settings)
    loss = vae(X).loss.sum()
    found = torch.autograd.grad(loss, list(encoder.parameters()), allow_unused=True)
    assert all(g is None or float(g.abs().max()) <= 1e-8 for g in found)


def test_the_others_are_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in PRESETS.values():
            make(*parts())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -1.0}, "rho"),
        ({"outer": "anchored", "problem": None}, "give one"),
        ({"encoder_loss": "own"}, "encoder_loss must be one of"),
        ({"problem": None, "encoder_loss": "kl_initial_final"}, "compares"),
        ({"problem": InnerProblem(Anchor("none"), energy="potential"), "outer": "anchored"}, "never see x"),
        ({"outer_noise": "old"}, "outer_noise"),
        ({"grad": "exact"}, "grad must be one of"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(il.ArgumentError, match=message):
        SemiAmortizedVAE(*parts(), **settings)


def test_an_input_that_is_not_finite_and_an_encoder_of_the_wrong_size():
    encoder, model = parts()
    bad = X.clone()
    bad[2, 1] = torch.nan
    with pytest.raises(il.NonFiniteError, match=r"x\[2, 1\]"):
        SemiAmortizedVAE(encoder, model)(bad)
    with pytest.raises(il.ShapeError, match="encoder must return"):
        SemiAmortizedVAE(nn.Linear(5, 3).double(), model)(X)


def test_fresh_points_of_an_iwae_are_independent():
    encoder, model = parts()
    for rule in ("cubature", "whitened"):
        vae = SemiAmortizedVAE.savi_implicit(encoder, model, outer=IWAE(), noise=Noise(rule))
        draw = torch.Generator().manual_seed(0)
        many = X.expand(20, 6, 5)  # and called again and again: independent in a batch, and from call to call
        values = torch.cat([vae(many, draw).loss.detach() for _ in range(20)])
        lam = vae(X, draw).lam.detach()
        free = Noise("iid", 4).draw(2, (400, 6), dtype=torch.float64, generator=draw)
        exact = IWAE()(model, lam.expand(400, 6, 4), X.expand(400, 6, 5), free).detach()
        error = (values.var(0) / 400 + exact.var(0) / 400).sqrt()
        assert bool(((values.mean(0) - exact.mean(0)).abs() <= 5 * error).all()) and float(values.std(0).min()) > 0


def test_class_numbers_are_data_too():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(-1, (4, 3))).double()
    model = LatentModel(decoder, 2, Categorical())
    x = torch.randint(3, (5, 4))
    result = SemiAmortizedVAE.svi(model)(x)
    result.loss.sum().backward()
    assert result.loss.dtype == torch.float64 and bool(result.info.converged.all())
    exact = metrics.evidence(model, x)
    assert float(exact.error.max()) <= 1e-8
    assert bool((exact.value >= metrics.quadrature_elbo(model, result.lam, x)).all())


@pytest.mark.parametrize("preset", ["savi_implicit", "savi_moreau", "sa_vae", "vae_svi"])
def test_autocast_around_the_module(preset):
    encoder, model = parts()
    vae = getattr(SemiAmortizedVAE, preset)(encoder.float(), model.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = vae(X.float(), torch.Generator().manual_seed(0))
    result.loss.sum().backward()
    plain = vae(X.float(), torch.Generator().manual_seed(0))
    assert result.lam.dtype == torch.float32 and all(bool(torch.isfinite(p.grad).all()) for p in vae.parameters())
    assert float(((result.loss - plain.loss) / plain.loss).detach().abs().max()) <= 0.05


def test_copies_and_state():
    vae = SemiAmortizedVAE.savi_implicit(*parts(), rho=0.5, noise=Noise("cubature"))
    loss = vae(X, torch.Generator().manual_seed(0)).loss
    other = SemiAmortizedVAE.savi_implicit(*parts(1), rho=0.5, noise=Noise("cubature"))
    other.load_state_dict(vae.state_dict())
    for twin in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae)), other):
        assert torch.equal(twin(X, torch.Generator().manual_seed(0)).loss, loss)
    assert "anchor=l2" in repr(vae)


def test_the_solution_does_not_depend_on_the_solver_and_its_gradient_neither():
    encoder, model = parts()
    losses, gradients = [], []
    for solver in (il.Newton(), il.LBFGS(), il.GradientDescent()):
        vae = SemiAmortizedVAE.savi_implicit(encoder, model, noise=Noise("cubature"), solver=solver)
        loss = vae(X).loss.sum()
        losses.append(loss.detach())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(vae.parameters()))]))
    for other in gradients[1:]:
        assert float((other - gradients[0]).norm()) <= 1e-6 * float(gradients[0].norm())


def test_memory_does_not_grow_with_the_steps_of_the_solver():
    encoder, model = parts()
    alive = [X, *encoder.parameters(), *model.parameters()]

    def size(**settings):
        vae = SemiAmortizedVAE(encoder, model, noise=Noise("cubature"), on_failure="ignore", **settings)
        return graph_bytes(lambda: vae(X).loss.sum(), exclude=alive)

    implicit = {k: size(solver=Descent(k, 0.02, 0.0)) for k in (10, 160)}
    newton = {k: size(solver=il.GradientDescent(step=0.02, max_iter=k)) for k in (10, 160)}
    unrolled = {k: size(solver=Descent(k, 0.02, 0.0), grad="unrolled") for k in (10, 20, 40)}
    assert implicit[160] <= 1.05 * implicit[10] and newton[160] <= 1.05 * newton[10]
    assert unrolled[40] - unrolled[20] == pytest.approx(2 * (unrolled[20] - unrolled[10]), rel=0.02)


@pytest.mark.parametrize("active", [0, 1, 2, 3])
def test_linear_training_reaches_the_closed_optimum(active):
    """The gap, the evidence and the number of active units, for γ between the eigenvalues of the data."""
    torch.manual_seed(0)
    x = torch.randn(60, 3, dtype=torch.float64) @ torch.diag(torch.tensor([2.0, 1.2, 0.8], dtype=torch.float64))
    x = x @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0][:3] + 0.1 * torch.randn(60, 6).double()
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    gamma = float(0.5 * (values[active - 1] + values[active]) if active else 1.5 * values[0])
    decoder, encoder = nn.Linear(3, 6).double(), nn.Linear(6, 6).double()
    model = LatentModel(decoder, 3, Gaussian(gamma).double())
    vae = SemiAmortizedVAE.savi_implicit(encoder, model, rho=1.0, noise=Noise("cubature"), outer_noise="inner")
    optimiser = torch.optim.LBFGS(
        vae.parameters(), max_iter=400, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure():
        optimiser.zero_grad()
        loss = vae(x).loss.mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    optimum = learned(x, 3, gamma)
    assert optimum.active == active
    oracle = PPCA(decoder.weight.detach(), decoder.bias.detach(), torch.tensor(gamma).double())
    assert float(optimum.log_likelihood - oracle.log_evidence(x).mean()) <= 0.01
    result = vae(x)
    assert float(result.loss.detach().mean() + optimum.log_likelihood) <= 0.01
    assert metrics.active_units(model, result.lam) == active
