"""The metrics against closed forms, dense quadrature and each other."""

from __future__ import annotations

import math

import pytest
import scipy.integrate
import torch

import implicit_layers as il
from implicit_layers.vae import (
    Anchor,
    Bernoulli,
    Categorical,
    FullGaussian,
    InnerProblem,
    LatentModel,
    Noise,
    metrics,
    refine,
)
from tests.vae_problems import close, curved_case, linear_case

FREE = InnerProblem(Anchor("none"))


def test_evidence_of_the_linear_model():
    case, oracle = linear_case(D=2)
    found = metrics.evidence(case.model, case.x)
    assert float((found.value - oracle.log_evidence(case.x)).abs().max()) <= 1e-10
    assert float(found.error.max()) <= 1e-10


def test_evidence_of_a_curved_model_is_scipys():
    case = curved_case(D=1)
    found = metrics.evidence(case.model, case.x)

    def joint(z, i):
        z = torch.full((1, 1, 1), z, dtype=torch.float64)
        return float((case.model.log_likelihood(z, case.x[i : i + 1]) - 0.5 * z.squeeze(-1) ** 2).exp().detach())

    for i in range(3):
        exact, _ = scipy.integrate.quad(joint, -12, 12, args=(i,), epsabs=1e-13, epsrel=1e-12)
        log_p = math.log(exact / math.sqrt(2 * math.pi))
        assert abs(float(found.value[i] - log_p)) <= 1e-9


def test_too_coarse_a_grid_says_so():
    case, _ = linear_case(D=2, gamma=1e-3)
    assert float(metrics.evidence(case.model, case.x, nodes=21).error.max()) > 1e-2


def test_gaps_of_the_linear_model():
    case, oracle = linear_case(D=2)
    best = refine(case.model, case.x, case.lam0, case.eps, problem=FREE).value
    assert close(
        metrics.quadrature_elbo(case.model, best, case.x), -case.model.free_energy(best, case.x, case.eps), 1e-10
    )
    assert close(metrics.approximation_gap(case.model, best, case.x), oracle.diagonal_gap().expand(5), 1e-8)
    mean, s = case.model.family.mean(best), case.model.family.log_scale(best)
    worse = torch.cat([mean + 0.1, s], -1)
    shift = torch.full((2,), 0.1, dtype=torch.float64)
    expected = 0.5 * shift @ oracle.precision @ shift
    assert close(metrics.amortisation_gap(case.model, worse, best, case.x), expected.expand(5), 1e-8)


def test_sampled_metrics_come_near_the_exact_ones():
    case, oracle = linear_case(D=2)
    best = refine(case.model, case.x, case.lam0, case.eps, problem=FREE).value
    draw = torch.Generator().manual_seed(1)
    exact = metrics.quadrature_elbo(case.model, best, case.x)
    assert float((metrics.elbo(case.model, best, case.x, 4000, draw) - exact).abs().max()) <= 0.2
    nll = metrics.iwae_nll(case.model, best, case.x, 4000, draw)
    assert float((nll + oracle.log_evidence(case.x)).abs().max()) <= 0.1
    again = metrics.iwae_nll(case.model, best, case.x, 4000, torch.Generator().manual_seed(1))
    assert not torch.equal(nll, again) and again.shape == (5,)


def test_units():
    case, _ = linear_case(D=2)
    lam = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], dtype=torch.float64)
    assert metrics.active_units(case.model, lam) == 1
    assert metrics.kl_per_unit(case.model, lam).tolist() == [0.5, 0.0]
    full, _ = linear_case(D=2, full=True)
    with pytest.raises(il.ArgumentError, match="DiagonalGaussian"):
        metrics.kl_per_unit(full.model, full.lam0)


def test_limits_of_quadrature():
    case, _ = linear_case(D=3)
    with pytest.raises(il.ArgumentError, match="at most 2"):
        metrics.evidence(case.model, case.x)
    with pytest.raises(il.ArgumentError, match="at most 2"):
        metrics.quadrature_elbo(case.model, case.lam0, case.x)
    with pytest.raises(il.ArgumentError, match="odd"):
        metrics.evidence(case.model, case.x, nodes=10)


# --- families, noise and likelihoods, against torch.distributions ------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("D", [1, 2, 4])
def test_a_family_is_the_gaussian_it_says(full, D):
    case, _ = linear_case(D=D, full=full)
    family, lam, lam0 = case.model.family, case.lam0, torch.randn_like(case.lam0)
    q, q0 = (
        torch.distributions.MultivariateNormal(family.mean(v), covariance_matrix=family.covariance(v))
        for v in (lam, lam0)
    )
    prior = torch.distributions.MultivariateNormal(torch.zeros(D, dtype=lam.dtype), torch.eye(D, dtype=lam.dtype))
    z = family.sample(lam, torch.randn(7, 5, D, dtype=lam.dtype))
    assert close(family.log_prob(lam, z), q.log_prob(z), 1e-11)
    assert close(family.entropy(lam), q.entropy(), 1e-11)
    assert close(family.kl(lam, lam0), torch.distributions.kl_divergence(q, q0), 1e-10)
    assert close(family.kl_prior(lam), torch.distributions.kl_divergence(q, prior), 1e-10)
    assert close(family.variances(lam), q.variance, 1e-12)
    if full:
        assert close(family.pack(family.mean(lam), family.factor(lam)), lam, 1e-12)
    else:
        assert close(family.kl_units(lam).sum(-1), family.kl_prior(lam), 1e-12)
        point = lam[0].clone()
        fisher = torch.func.hessian(lambda v: family.kl(v, point))(point)
        assert close(fisher, torch.diag(family.fisher(point)), 1e-10)


@pytest.mark.parametrize("rule", ["cubature", "whitened"])
@pytest.mark.parametrize("D", [1, 2, 5])
def test_points_with_exact_moments(rule, D):
    eps = Noise(rule).draw(D, (3, 2), dtype=torch.float64)
    assert eps.shape == (2 * D, 3, 2, D)
    assert float(eps.mean(0).abs().max()) <= 1e-14
    second = torch.einsum("sabi,sabj->abij", eps, eps) / len(eps)
    assert float((second - torch.eye(D, dtype=torch.float64)).abs().max()) <= 1e-13


def test_rules_for_points():
    for rule in ("antithetic", "iid", "whitened"):
        eps = Noise(rule, 12).draw(2, (500,), generator=torch.Generator().manual_seed(0))
        assert eps.shape == (12, 500, 2) and abs(float(eps.var()) - 1) < 0.05
        assert torch.equal(eps, Noise(rule, 12).draw(2, (500,), generator=torch.Generator().manual_seed(0)))
        assert (float(eps.mean(0).abs().max()) < 1e-6) == (rule != "iid")
    for rule, samples in [("cubature", 5), ("whitened", 2), ("whitened", 5), ("antithetic", 3)]:
        with pytest.raises(il.ArgumentError):
            Noise(rule, samples).draw(2, ())
    with pytest.raises(il.ArgumentError, match="rule"):
        Noise("sobol")


def test_likelihoods():
    logits, bits = torch.randn(4, 3, 6), torch.randint(2, (3, 6)).float()
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(bits.expand_as(logits))
    assert torch.allclose(Bernoulli()(logits, bits), expected, atol=1e-6)
    words = torch.randint(6, (3,))
    expected = torch.distributions.Categorical(logits=logits).log_prob(words.expand(4, 3))
    assert torch.allclose(Categorical()(logits, words), expected, atol=1e-6)


def test_a_categorical_model_and_a_callable_likelihood():
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 12), torch.nn.Unflatten(-1, (3, 4)))
    model = LatentModel(decoder, 2, Categorical())
    x, lam0 = torch.randint(4, (5, 3)), torch.zeros(5, 4)
    eps = Noise("cubature").draw(2, (5,))
    assert bool(refine(model, x, lam0, eps).info.converged.all())
    model.double()
    lam0 = lam0.double()
    assert metrics.evidence(model, torch.zeros(1, 3).double()).value.shape == (1,)

    def laplace(output, x):
        return -((x - output) ** 2 + 1e-2).sqrt().sum(-1)

    model = LatentModel(torch.nn.Linear(2, 3).double(), 2, laplace)
    assert bool(refine(model, torch.rand(5, 3).double(), lam0, eps.double()).info.converged.all())
    transposed = LatentModel(torch.nn.Linear(2, 3).double(), 2, lambda output, x: -((x - output) ** 2).movedim(0, -1))
    with pytest.raises(il.ShapeError, match="must begin with"):
        refine(transposed, torch.rand(5, 3).double(), lam0, eps.double())


def test_mutual_information_of_one_dimension_is_scipys():
    model = LatentModel(torch.nn.Linear(1, 2).double(), 1)
    lam = torch.tensor([[-1.0, -0.5], [0.5, 0.0], [2.0, -1.0]], dtype=torch.float64)

    def density(z):
        return model.family.log_prob(lam, torch.full((1, 1, 1), z, dtype=torch.float64)).squeeze(0).exp()

    def integrand(z, i):
        each = density(z)
        return float(each[i] * (each[i] / each.mean()).log())

    exact = sum(scipy.integrate.quad(integrand, -8, 8, args=(i,), epsabs=1e-10)[0] for i in range(3)) / 3
    found = metrics.mutual_information(model, lam, 20_000, torch.Generator().manual_seed(0))
    assert abs(float(found) - exact) <= 0.01


def test_mutual_information_is_log_n_for_distinct_and_zero_for_equal_codes():
    model = LatentModel(torch.nn.Linear(2, 2).double(), 2)
    far = torch.cat([100.0 * torch.arange(10.0).reshape(2, 5, 1).expand(2, 5, 2), torch.zeros(2, 5, 2)], -1).double()
    assert close(metrics.mutual_information(model, far), torch.tensor(math.log(10.0), dtype=torch.float64))
    assert float(metrics.mutual_information(model, torch.zeros(3, 4, dtype=torch.float64)).abs()) <= 1e-12
    full = LatentModel(torch.nn.Linear(2, 2).double(), 2, family=FullGaussian(2))
    same = torch.tensor([0.3, -0.2, 0.1, 0.4, 0.7], dtype=torch.float64).expand(4, 5)
    assert float(metrics.mutual_information(full, same).abs()) <= 1e-12


def test_what_does_not_fit_is_refused():
    case = curved_case()
    for metric in (metrics.elbo, metrics.iwae_nll, metrics.quadrature_elbo):
        with pytest.raises(il.ShapeError, match="DiagonalGaussian"):
            metric(case.model, case.lam0[:, :3], case.x)
        with pytest.raises(il.ShapeError, match="x must begin with"):
            metric(case.model, case.lam0, case.x[:2])
    for metric in (metrics.active_units, metrics.kl_per_unit, metrics.mutual_information):
        with pytest.raises(il.ShapeError, match="DiagonalGaussian"):
            metric(case.model, case.lam0[:, :3])
    with pytest.raises(il.ShapeError, match=r"x must be \(B, \*E\)"):
        metrics.evidence(case.model, case.x[0])
    with pytest.raises(il.ShapeError, match="batch dimension"):
        metrics.evidence(case.model, case.x[0, 0])


def test_any_number_of_data():
    case = curved_case(B=6)
    lam = case.lam0.reshape(2, 3, 4)
    assert torch.equal(metrics.kl_per_unit(case.model, lam), metrics.kl_per_unit(case.model, case.lam0))
    assert metrics.active_units(case.model, lam) == metrics.active_units(case.model, case.lam0)
    assert metrics.active_units(case.model, lam[:0]) == 0
    assert metrics.evidence(case.model, case.x[:0]).value.shape == (0,)
    assert metrics.elbo(case.model, lam, case.x.reshape(2, 3, 5)).shape == (2, 3)
