"""The linear-Gaussian case: the closed forms hold among themselves, and inference and its gradients meet them."""

from __future__ import annotations

import math

import pytest
import scipy.special
import torch
from torch.distributions import MultivariateNormal

from implicit_layers.vae import ELBO, IWAE, Anchor, HeldOut, InnerProblem, Noise, refine
from implicit_layers.vae.ppca import PPCA, best_gamma, learned
from tests.vae_problems import close, linear_case

NONE = InnerProblem(Anchor("none"))
L2 = InnerProblem(Anchor("l2"))
KL = InnerProblem(Anchor("kl"))


def joint(oracle: PPCA, x: torch.Tensor) -> MultivariateNormal:
    C = oracle.W @ oracle.W.T + oracle.gamma * torch.eye(oracle.W.shape[0], dtype=x.dtype)
    return MultivariateNormal(oracle.b, C)


# --- the closed forms, against a dense Gaussian and against autograd ---------------------------------------------


def test_evidence_is_that_of_the_dense_gaussian_and_the_exact_posterior_attains_it():
    case, oracle = linear_case()
    exact = joint(oracle, case.x).log_prob(case.x)
    assert close(oracle.log_evidence(case.x), exact, 1e-12)
    posterior = oracle.posterior(case.x)
    assert close(oracle.elbo(case.x, posterior.mean, posterior.covariance), exact, 1e-12)


def test_gradient_of_the_evidence_is_that_of_autograd():
    case, oracle = linear_case()
    leaves = [t.clone().requires_grad_() for t in (oracle.W, oracle.b, oracle.gamma)]
    expected = torch.autograd.grad(joint(PPCA(*leaves), case.x).log_prob(case.x).sum(), leaves)
    for ours, exact in zip(oracle.gradient(case.x), expected, strict=True):
        assert close(ours, exact, 1e-10)


def test_predictive_is_the_conditional_of_the_joint_gaussian():
    case, oracle = linear_case()
    observed = torch.tensor([True, False, True, True, False, True])
    C = joint(oracle, case.x).covariance_matrix
    oo, uo = C[observed][:, observed], C[~observed][:, observed]
    gain = uo @ torch.linalg.inv(oo)
    found = oracle.predictive(case.x, observed)
    assert close(found.mean, oracle.b[~observed] + (case.x - oracle.b)[:, observed] @ gain.T, 1e-11)
    assert close(found.covariance, C[~observed][:, ~observed] - gain @ uo.T, 1e-11)


def test_anchored_scale_is_lambert_s():
    case, oracle = linear_case()
    rho, D = 0.7, 3
    s0, curvature = case.lam0[:, D:], oracle.precision.diagonal()
    c = (1 + rho * s0) / rho
    lambert = scipy.special.lambertw((2 * curvature / rho * (2 * c).exp()).numpy()).real
    assert close(oracle.anchored_l2(case.x, case.lam0, rho)[:, D:], c - 0.5 * torch.as_tensor(lambert), 1e-12)


# --- inference ----------------------------------------------------------------------------------------------------


def test_free_energy_is_exact_with_cubature_and_with_whitened_noise():
    case, oracle = linear_case()
    family = case.model.family
    exact = -oracle.elbo(case.x, family.mean(case.lam0), family.covariance(case.lam0))
    for eps in (case.eps, Noise("whitened").draw(3, (5,), dtype=torch.float64)):
        assert close(case.model.free_energy(case.lam0, case.x, eps), exact, 1e-12)
    beta = -oracle.elbo(case.x, family.mean(case.lam0), family.covariance(case.lam0), beta=0.3)
    assert close(case.model.free_energy(case.lam0, case.x, case.eps, 0.3), beta, 1e-12)


def test_full_covariance_reaches_the_evidence():
    case, oracle = linear_case(full=True)
    lam = refine(case.model, case.x, case.lam0, case.eps, problem=NONE).value
    elbo = -case.model.free_energy(lam, case.x, case.eps).detach()
    assert float((elbo - oracle.log_evidence(case.x)).abs().max()) <= 1e-10 * case.x.shape[1]
    posterior = oracle.posterior(case.x)
    assert close(case.model.family.mean(lam), posterior.mean)
    assert close(case.model.family.covariance(lam), posterior.covariance.expand(5, 3, 3))


@pytest.mark.parametrize("beta", [1.0, 0.25, 3.0])
def test_diagonal_optimum_and_its_gap(beta):
    case, oracle = linear_case()
    lam = refine(case.model, case.x, case.lam0, case.eps, problem=NONE, beta=beta).value
    assert close(lam, oracle.diagonal_optimum(case.x, beta))
    if beta == 1.0:
        gap = oracle.log_evidence(case.x) + case.model.free_energy(lam, case.x, case.eps)
        assert close(gap, oracle.diagonal_gap().expand(5))


@pytest.mark.parametrize("rho", [0.01, 0.7, 30.0])
def test_anchored_optima(rho):
    case, oracle = linear_case()
    l2 = refine(case.model, case.x, case.lam0, case.eps, problem=L2, rho=rho).value
    assert close(l2, oracle.anchored_l2(case.x, case.lam0, rho))
    kl = refine(case.model, case.x, case.lam0, case.eps, problem=KL, rho=rho).value
    assert close(kl, oracle.anchored_kl(case.x, case.lam0, rho))


def test_anchored_optimum_with_full_covariance():
    case, oracle = linear_case(full=True)
    family = case.model.family
    lam = refine(case.model, case.x, case.lam0, case.eps, problem=KL, rho=0.7).value
    precision0 = torch.linalg.inv(family.covariance(case.lam0))
    mean, precision = oracle.anchored_kl_full(case.x, family.mean(case.lam0), precision0, 0.7)
    assert close(family.mean(lam), mean)
    assert close(torch.linalg.inv(family.covariance(lam)), precision)


def test_recognition_potential_has_its_conjugate_posterior():
    case, _ = linear_case()
    problem = InnerProblem(Anchor("none"), energy="potential")
    lam = refine(case.model, case.x, case.lam0, case.eps, problem=problem).value
    h, R = case.lam0[:, :3], case.lam0[:, 3:].exp()
    assert close(lam, torch.cat([h / (1 + R), -0.5 * (1 + R).log()], -1))


# --- gradients ----------------------------------------------------------------------------------------------------


def test_derivatives_of_the_l2_anchor():
    case, oracle = linear_case()
    rho, D = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), 3
    lam0 = case.lam0.requires_grad_()
    lam = refine(case.model, case.x, lam0, case.eps, problem=L2, rho=rho).value
    eye = torch.eye(D, dtype=torch.float64)
    A = oracle.precision + rho.detach() * eye
    jacobian = torch.stack([torch.autograd.grad(lam[0, i], lam0, retain_graph=True)[0][0] for i in range(2 * D)])
    assert close(jacobian[:D, :D], rho.detach() * torch.linalg.inv(A))
    grown = 2 * (2 * lam[0, D:]).exp() * oracle.precision.diagonal()
    assert close(jacobian[D:, D:], torch.diag(rho / (grown + rho)).detach())
    mixed = torch.cat([jacobian[:D, D:].flatten(), jacobian[D:, :D].flatten()])
    assert float(mixed.abs().max()) <= 1e-12
    along = torch.stack([torch.autograd.grad(lam[0, i], rho, retain_graph=True)[0] for i in range(D)])
    assert close(along, -(torch.linalg.inv(A) @ (lam[0, :D] - lam0[0, :D])).detach())


def test_encoder_gradients_of_the_elbo_and_of_the_anchored_value():
    case, oracle = linear_case()
    rho, D = 0.7, 3
    eye, mu = torch.eye(D, dtype=torch.float64), oracle.posterior(case.x).mean
    lam0 = case.lam0.requires_grad_()
    inverse = torch.linalg.inv(oracle.precision + rho * eye)
    lam = refine(case.model, case.x, lam0, case.eps, problem=L2, rho=rho).value
    outer = ELBO()(case.model, lam, case.x, case.eps)
    moreau = L2.value(lam.detach(), case.model, case.x, lam0, case.eps, rho)
    distance = lam0[:, :D].detach() - mu
    for loss, matrix in [
        (outer, rho**2 * inverse @ oracle.precision @ inverse),
        (moreau, rho * oracle.precision @ inverse),
    ]:
        (found,) = torch.autograd.grad(loss.sum(), lam0, retain_graph=True)
        assert close(found[:, :D], distance @ matrix)


def test_at_the_exact_posterior_the_envelope_is_the_gradient_of_the_evidence():
    case, oracle = linear_case(full=True)
    lam = refine(case.model, case.x, case.lam0, case.eps, problem=NONE, grad="envelope").value
    parameters = [case.model.decoder.weight, case.model.decoder.bias, case.model.likelihood.log_gamma]
    found = torch.autograd.grad(-case.model.free_energy(lam, case.x, case.eps).sum(), parameters)
    W, b, gamma = oracle.gradient(case.x)
    for ours, exact in zip(found, (W, b, gamma * oracle.gamma), strict=True):
        assert close(ours, exact)


def test_iwae_with_the_exact_posterior_has_no_variance():
    case, oracle = linear_case(full=True)
    lam = refine(case.model, case.x, case.lam0, case.eps, problem=NONE).value
    for k in (1, 7):
        eps = Noise("iid", k).draw(3, (5,), dtype=torch.float64)
        assert close(-IWAE()(case.model, lam, case.x, eps), oracle.log_evidence(case.x), 1e-9)


def test_held_out_entries_follow_from_the_observed_ones():
    case, oracle = linear_case(full=True)
    observed = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64)
    lam = refine(case.model, case.x, case.lam0, case.eps, problem=NONE, mask=observed).value
    seen = observed.bool()
    posterior = PPCA(oracle.W[seen], oracle.b[seen], oracle.gamma).posterior(case.x[:, seen])
    assert close(case.model.family.mean(lam), posterior.mean)
    W, b = oracle.W[~seen], oracle.b[~seen]
    error = ((case.x[:, ~seen] - posterior.mean @ W.T - b) ** 2).sum(-1) + (W @ posterior.covariance @ W.T).trace()
    expected = 0.5 * error / oracle.gamma + (2 * math.pi * oracle.gamma).log()  # two entries
    assert close(HeldOut(observed)(case.model, lam, case.x, case.eps), expected)


# --- learning -----------------------------------------------------------------------------------------------------


def test_learned_optimum_is_stationary_and_its_value_is_the_mean_evidence():
    x = torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    for gamma, active in [(0.5 * values[2], 3), (0.5 * (values[1] + values[2]), 2), (2 * values[0], 0)]:
        found = learned(x, 3, gamma)
        oracle = PPCA(found.W, found.b, gamma)
        assert found.active == active
        assert close(oracle.log_evidence(x).mean(), found.log_likelihood, 1e-11)
        assert float(oracle.gradient(x)[0].abs().max()) <= 1e-9 * x.shape[0]
    gamma = best_gamma(x, 3)
    found = learned(x, 3, gamma)
    assert float(PPCA(found.W, found.b, gamma).gradient(x)[2].abs()) <= 1e-9 * x.shape[0]
