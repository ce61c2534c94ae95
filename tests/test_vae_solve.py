"""Refining and its gradients: finite differences, long unrolling, several solvers, the exact zero, failing data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import implicit_layers as il
from implicit_layers.vae import (
    ELBO,
    IWAE,
    Anchor,
    Bernoulli,
    Descent,
    FreeBits,
    Gaussian,
    GaussNewton,
    HeldOut,
    InnerProblem,
    LatentModel,
    Noise,
    refine,
)
from implicit_layers.vae.gauss_newton import curvature
from implicit_layers.vae.inner import expected_potential
from tests.vae_problems import close, curved_case, linear_case

PROBLEMS = {
    "none": InnerProblem(Anchor("none")),
    "l2": InnerProblem(Anchor("l2")),
    "l2 fisher": InnerProblem(Anchor("l2", "fisher")),
    "kl": InnerProblem(Anchor("kl")),
    "l2, mean only": InnerProblem(Anchor("l2"), unknown="mean"),
    "none, mean only": InnerProblem(Anchor("none"), unknown="mean"),
    "potential": InnerProblem(Anchor("none"), energy="potential"),
}
OBSERVED = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
LONG = Descent(steps=600, step=0.02, momentum=0.5)


def leaves(case, *more):
    """Everything that a gradient may be asked for; gradcheck moves the model's parameters in place."""
    rho, beta = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.8))
    x = case.x.requires_grad_()
    return (case.lam0.requires_grad_(), rho, beta, x, *case.model.parameters(), *more)


def solved(case, problem, **settings):
    """λ* as a function of the leaves."""

    def function(lam0, rho, beta, x, *_parameters):
        return refine(case.model, x, lam0, case.eps, problem=problem, rho=rho, beta=beta, **settings).value

    return function


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradcheck_of_the_solution(name):
    case = curved_case(n=3, B=2)
    assert gradcheck(solved(case, PROBLEMS[name]), leaves(case), eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("hidden", [False, True], ids=["whole", "held out"])
@pytest.mark.parametrize("anchor", ["l2", "l2 fisher", "kl"])
def test_gradcheck_of_the_outer_objectives(anchor, hidden):
    case = curved_case(n=3, B=2)
    settings = {"mask": OBSERVED} if hidden else {}
    outers = [HeldOut(OBSERVED)] if hidden else [ELBO(), ELBO(0.3), IWAE(), FreeBits(0.05)]
    fresh = Noise("iid", 4).draw(2, (2,), dtype=torch.float64)
    solution = solved(case, PROBLEMS[anchor], **settings)

    def loss(*inputs):
        lam = solution(*inputs)
        return torch.stack([outer(case.model, lam, inputs[3], fresh) for outer in outers])

    assert gradcheck(loss, leaves(case), eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("anchor", ["l2", "l2 fisher", "kl"])
def test_gradcheck_of_the_anchored_value_needs_no_implicit_term(anchor):
    case, problem = curved_case(n=3, B=2), PROBLEMS[anchor]

    def moreau(lam0, rho, beta, x, *_parameters):
        settings = {"rho": rho, "beta": beta}
        lam = refine(case.model, x, lam0, case.eps, problem=problem, grad="envelope", **settings).value
        assert not lam.requires_grad
        return problem.value(lam, case.model, x, lam0, case.eps, **settings)

    assert gradcheck(moreau, leaves(case), eps=1e-6, atol=1e-6, rtol=1e-4)


def test_a_planted_wrong_gradient_is_seen():
    case = curved_case(n=3, B=2)
    right = solved(case, PROBLEMS["l2"])

    def wrong(*inputs):
        lam = right(*inputs)
        return lam + 1e-3 * (lam.detach() - lam)

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(wrong, leaves(case), eps=1e-6, atol=1e-6, rtol=1e-4)


def test_second_derivatives():
    case = curved_case(B=1, n=3)
    inputs = leaves(case)
    function = solved(case, PROBLEMS["l2"])
    fixed = [t.detach() for t in inputs[2:]]
    assert gradgradcheck(lambda lam0, rho: function(lam0, rho, *fixed), inputs[:2], atol=1e-5)


@pytest.mark.parametrize("likelihood", [Gaussian(0.5, learn=True), Bernoulli()], ids=["gaussian", "bernoulli"])
@pytest.mark.parametrize("anchor", ["l2", "l2 fisher", "kl"])
def test_implicit_is_unrolled_to_convergence(anchor, likelihood):
    case = curved_case(likelihood=likelihood)
    inputs = leaves(case)
    weights = torch.randn(3, 4, dtype=torch.float64)
    gradients = []
    for settings in [
        {},
        {"solver": LONG, "grad": "unrolled"},
        {"solver": LONG, "grad": "frozen_hessian"},
        {"solver": LONG},
        {"solver": il.LBFGS()},
        {"solver": il.GradientDescent()},
        {"solver": GaussNewton()},
    ]:
        lam = solved(case, PROBLEMS[anchor], **settings)(*inputs)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad((weights * lam).sum(), inputs)]))
    for other in gradients[1:]:
        assert close(other, gradients[0], 1e-6)


def test_the_frozen_hessian_is_exact_where_the_energy_is_quadratic():
    case, _ = linear_case()
    problem = InnerProblem(Anchor("l2"), unknown="mean")
    lam0 = case.lam0.requires_grad_()
    few = Descent(steps=4, step=0.05, momentum=0.5)
    gradients = []
    for grad in ("unrolled", "frozen_hessian", "one_step", "straight_through"):
        lam = refine(case.model, case.x, lam0, case.eps, problem=problem, rho=0.3, solver=few, grad=grad).value
        gradients.append(torch.autograd.grad(lam[:, :3].square().sum(), lam0)[0][:, :3])
    unrolled, frozen, one_step, straight = gradients
    assert not close(one_step, unrolled, 1e-2) and not close(straight, unrolled, 1e-2)
    # the anchor's pull on every step is in T, the start's decay in S: together the unrolled derivative
    assert close(frozen, unrolled, 1e-12)


def test_the_step_rules_are_what_they_say():
    case = curved_case()
    lam0, few = case.lam0.requires_grad_(), Descent(steps=7, step=0.05)
    problem = PROBLEMS["none"]

    def jacobian(grad):
        lam = refine(case.model, case.x, lam0, case.eps, problem=problem, solver=few, grad=grad).value
        rows = [torch.autograd.grad(lam[0, i], lam0, retain_graph=True)[0][0] for i in range(4)]
        return torch.stack(rows), lam.detach()

    straight, lam = jacobian("straight_through")
    assert torch.equal(straight, torch.eye(4, dtype=torch.float64))
    one_step, _ = jacobian("one_step")
    H = torch.func.hessian(lambda y: problem.value(y, case.model, case.x, lam, case.eps)[0])(lam)[0, :, 0]
    assert close(one_step, torch.eye(4, dtype=torch.float64) - 0.05 * H, 1e-12)


def test_subspace_refinement_is_an_oblique_projection():
    case, problem = curved_case(), PROBLEMS["none, mean only"]
    lam0 = case.lam0.requires_grad_()
    lam = refine(case.model, case.x, lam0, case.eps, problem=problem).value
    rows = torch.stack([torch.autograd.grad(lam[0, i], lam0, retain_graph=True)[0][0] for i in range(4)])
    full = PROBLEMS["none"]
    H = torch.func.hessian(lambda y: full.value(y, case.model, case.x, lam0, case.eps)[0])(lam)[0, :, 0].detach()
    B = torch.eye(4, dtype=torch.float64)[:, :2]
    expected = torch.eye(4, dtype=torch.float64) - B @ torch.linalg.inv(B.T @ H @ B) @ B.T @ H
    assert close(rows, expected)


# --- the report's question ---------------------------------------------------------------------------------------


def test_without_an_anchor_the_encoder_gets_exactly_nothing():
    """dl*/dφ = dl*/dλ* · dλ*/dλ⁰ is 0 × 0 at an exact solution of a problem that does not contain λ⁰."""
    case = curved_case()
    lam0 = case.lam0.requires_grad_()
    lam = refine(case.model, case.x, lam0, case.eps, problem=PROBLEMS["none"]).value
    loss = ELBO()(case.model, lam, case.x, case.eps).sum()
    (found,) = torch.autograd.grad(loss, lam0, allow_unused=True, retain_graph=True)
    assert found is None or float(found.abs().max()) == 0.0
    (at_solution,) = torch.autograd.grad(loss, lam)
    assert float(at_solution.abs().max()) <= 1e-8


def test_unrolled_the_encoder_gradient_vanishes_quadratically():
    case = curved_case()
    lam0 = case.lam0.requires_grad_()
    sizes, errors = [], []
    exact = refine(case.model, case.x, case.lam0, case.eps, problem=PROBLEMS["none"]).value.detach()
    for steps in (40, 80, 120):
        descent = Descent(steps, 0.05, 0.0)
        lam = refine(
            case.model, case.x, lam0, case.eps, problem=PROBLEMS["none"], solver=descent, grad="unrolled"
        ).value
        (g,) = torch.autograd.grad(ELBO()(case.model, lam, case.x, case.eps).sum(), lam0)
        sizes.append(float(g.norm()))
        errors.append(float((lam - exact).detach().norm()))
    slopes = [
        torch.tensor(sizes[i + 1] / sizes[i]).log() / torch.tensor(errors[i + 1] / errors[i]).log() for i in range(2)
    ]
    assert all(1.7 <= float(slope) <= 2.3 for slope in slopes), slopes


@pytest.mark.parametrize("anchor", ["l2", "kl"])
def test_the_chain_of_bounds_holds_for_every_datum(anchor):
    case, problem = curved_case(B=40), PROBLEMS[anchor]
    solution = refine(case.model, case.x, case.lam0, case.eps, problem=problem, rho=0.5)
    lam = solution.value
    before = -case.model.free_energy(case.lam0, case.x, case.eps)
    anchored = -problem.value(lam, case.model, case.x, case.lam0, case.eps, 0.5)
    after = -case.model.free_energy(lam, case.x, case.eps)
    assert bool((before <= anchored).all()) and bool((anchored <= after).all())
    assert bool(solution.info.converged.all())


def test_strong_and_weak_anchors_are_the_vae_and_svi():
    case = curved_case()
    weak = refine(case.model, case.x, case.lam0, case.eps, rho=1e-9).value
    free = refine(case.model, case.x, case.lam0, case.eps, problem=PROBLEMS["none"]).value
    strong = refine(case.model, case.x, case.lam0, case.eps, rho=1e9).value
    assert close(weak, free, 1e-7) and close(strong, case.lam0, 1e-7)


# --- failure -----------------------------------------------------------------------------------------------------


def run_with(case, lam0, x, **settings):
    lam0 = lam0.clone().requires_grad_()
    solution = refine(case.model, x, lam0, case.eps, **settings)
    loss = ELBO()(case.model, solution.value, x, case.eps).sum()
    found = torch.autograd.grad(loss, [lam0, *case.model.parameters()])
    return solution, found


@pytest.mark.parametrize("grad", ["implicit", "unrolled", "frozen_hessian"])
def test_a_start_beyond_reach_spoils_nothing(grad):
    case = curved_case()
    solver = il.Newton() if grad == "implicit" else Descent(30, 0.05)
    bad = case.lam0.clone()
    bad[1, 2:] = 400.0  # e⁸⁰⁰ overflows
    good, (there, *_) = run_with(case, case.lam0, case.x, solver=solver, grad=grad)
    solution, (found, *parameters) = run_with(case, bad, case.x, solver=solver, grad=grad)
    assert torch.isfinite(solution.value).all() and all(bool(torch.isfinite(g).all()) for g in (found, *parameters))
    assert float(found[1].abs().max()) == 0.0
    for i in (0, 2):
        assert close(solution.value[i], good.value[i], 1e-12) and close(found[i], there[i], 1e-10)


def test_a_datum_that_does_not_converge_loses_its_implicit_term_and_is_counted():
    case = curved_case()
    case.lam0[1] = torch.tensor([4.0, -4.0, 3.0, 3.0])
    few = il.Newton(max_iter=6)
    with pytest.warns(il.ConvergenceWarning, match="1 of 3 problems did not converge"):
        solution, (found, *_) = run_with(case, case.lam0, case.x, solver=few)
    assert solution.info.converged.tolist() == [True, False, True]
    assert float(found[1].abs().max()) == 0.0
    keep = [0, 2]
    alone = refine(case.model, case.x[keep], case.lam0[keep], case.eps[:, keep])
    assert close(solution.value[keep], alone.value)
    with pytest.raises(il.ConvergenceError):
        run_with(case, case.lam0, case.x, solver=few, on_failure="raise")


def test_an_indefinite_hessian_drops_the_implicit_term():
    """x is beyond the range of a strongly curved decoder: far from the solution the energy is not convex."""
    case = curved_case()
    with torch.no_grad():
        case.model.decoder[0].weight.mul_(6)
    case.model.likelihood.log_gamma.data.fill_(-3.0)
    slow = Descent(steps=1, step=1e-6, momentum=0.0)
    lam0 = (0.4 * torch.randn(64, 4, dtype=torch.float64)).requires_grad_()
    x, eps = 3 * torch.randn(64, 5, dtype=torch.float64), Noise("cubature").draw(2, (64,), dtype=torch.float64)
    solution = refine(case.model, x, lam0, eps, rho=0.1, solver=slow, grad="implicit", on_failure="ignore")
    (found,) = torch.autograd.grad(solution.value.sum(), lam0)
    definite = solution.info.converged
    assert 0 < int(definite.sum()) < 64
    assert float(found[~definite].abs().max()) == 0.0 and bool((found[definite].abs().sum(-1) > 0).all())
    assert solution.info.status[~definite].unique().tolist() == [int(il.Status.SINGULAR)]


def test_steps_that_diverge_stay_where_they_started():
    case = curved_case()
    wild = Descent(steps=400, step=5.0, momentum=0.9)
    with pytest.warns(il.ConvergenceWarning, match="smaller step"):
        solution, found = run_with(case, case.lam0, case.x, solver=wild, grad="unrolled")
    failed = ~solution.info.converged
    assert bool(failed.any()) and torch.equal(solution.value[failed], case.lam0[failed])
    assert all(bool(torch.isfinite(g).all()) for g in found)


@pytest.mark.parametrize("grad", ["unrolled", "implicit", "straight_through"])
def test_steps_that_end_above_their_start_have_diverged(grad):
    case = curved_case()
    x = case.x.clone()
    x[1] = 1e4  # finite after three steps, and far above the start
    descent = Descent(3, 0.02)
    solution, found = run_with(case, case.lam0, x, solver=descent, grad=grad, on_failure="ignore")
    assert solution.info.converged.tolist() == [True, False, True]
    assert torch.equal(solution.value[1], case.lam0[1])
    tame = case.x[[0, 2]], case.lam0[[0, 2]], case.eps[:, [0, 2]]
    alone = refine(case.model, *tame, solver=descent, grad=grad).value
    assert close(solution.value[[0, 2]], alone, 1e-12) and all(bool(torch.isfinite(g).all()) for g in found)


# --- shapes and settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3)], ids=str)
def test_any_batch(batch):
    case = curved_case()
    x, lam0 = torch.rand(*batch, 5, dtype=torch.float64), torch.randn(*batch, 4, dtype=torch.float64).requires_grad_()
    eps = Noise("cubature").draw(2, batch, dtype=torch.float64)
    for settings in [{}, {"solver": Descent(3, 0.01), "grad": "unrolled"}, {"solver": Descent(3, 0.01)}]:
        solution = refine(case.model, x, lam0, eps, **settings)
        assert solution.value.shape == (*batch, 4) and solution.info.converged.shape == batch
        (found,) = torch.autograd.grad(ELBO()(case.model, solution.value, x, eps).sum(), lam0)
        assert found.shape == lam0.shape and bool(torch.isfinite(found).all())
    if batch == (2, 3):
        whole = refine(case.model, x, lam0, eps).value
        each = [refine(case.model, x[i, j], lam0[i, j], eps[:, i, j]).value for i in range(2) for j in range(3)]
        assert close(whole.reshape(6, 4), torch.stack(each), 1e-10)


def test_a_weight_for_every_datum_and_float32():
    case = curved_case()
    rho = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    together = refine(case.model, case.x, case.lam0, case.eps, rho=rho).value
    for i in range(3):
        alone = refine(case.model, case.x[i], case.lam0[i], case.eps[:, i], rho=float(rho[i])).value
        assert close(together[i], alone, 1e-10)
    single = refine(case.model.float(), case.x.float(), case.lam0.float(), case.eps.float(), rho=rho.float()).value
    assert single.dtype == torch.float32 and close(single.double(), together, 1e-4)


def test_nothing_is_recorded_without_grad():
    case = curved_case()
    with torch.no_grad():
        for settings in [{}, {"solver": Descent(3), "grad": "unrolled"}, {"solver": Descent(3)}]:
            assert not refine(case.model, case.x, case.lam0, case.eps, **settings).value.requires_grad


def test_per_datum_gradients_with_vmap():
    case = curved_case()

    def loss(lam0, x, eps):
        lam = refine(case.model, x, lam0, eps).value
        return ELBO()(case.model, lam, x, eps)

    for p in case.model.parameters():
        p.requires_grad_(False)
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(0, 0, 1))(case.lam0, case.x, case.eps)
    lam0 = case.lam0.clone().requires_grad_()
    (batched,) = torch.autograd.grad(loss(lam0, case.x, case.eps).sum(), lam0)
    assert close(mapped, batched, 1e-9)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"grad": "exact"}, il.ArgumentError, "grad must be one of"),
        ({"grad": "unrolled"}, il.ArgumentError, "give solver=Descent"),
        ({"on_failure": "hope"}, il.ArgumentError, "on_failure"),
        ({"eps": torch.zeros(4, 2, 2, dtype=torch.float64)}, il.ShapeError, r"eps must have shape \(S, 3, 2\)"),
        ({"lam0": torch.zeros(3, 5, dtype=torch.float64)}, il.ShapeError, "lam0"),
        ({"x": torch.zeros(2, 5)}, il.ShapeError, "x must begin with"),
        ({"model": nn.Linear(2, 2)}, il.ArgumentTypeError, "LatentModel"),
    ],
)
def test_what_does_not_fit_is_refused(settings, error, message):
    case = curved_case()
    arguments = {"model": case.model, "x": case.x, "lam0": case.lam0, "eps": case.eps, **settings}
    with pytest.raises(error, match=message):
        refine(**arguments)


def test_layers_that_break_the_inner_problem():
    x, lam0, eps = torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(1, 2, 2)
    normed = LatentModel(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), 2)
    with pytest.raises(il.ArgumentError, match="couples the data"):
        refine(normed, x, lam0, eps)
    dropping = LatentModel(nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.1)), 2)
    with pytest.raises(il.ArgumentError, match="eval mode"):
        refine(dropping, x, lam0, eps)
    for model in (normed, dropping):
        assert refine(model.eval(), x, lam0, eps).info.converged.all()
    with pytest.warns(il.ImplicitLayersWarning, match="ReLU"):
        LatentModel(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), 2)


def test_potential_is_a_quadratic():
    case = curved_case()
    z = case.model.family.sample(case.lam0, case.eps)
    h, R = case.lam0[:, :2], case.lam0[:, 2:].exp()
    expected = (z * h - 0.5 * R * z**2).sum(-1).mean(0)
    assert close(expected_potential(case.model.family, case.lam0, case.lam0), expected, 1e-12)


# --- Gauss–Newton ------------------------------------------------------------------------------------------------


def test_gauss_newton_is_newton_for_the_mean_of_a_linear_model():
    case, oracle = linear_case()
    problem = InnerProblem(Anchor("l2"), unknown="mean")
    H = curvature(problem, case.lam0[:, :3], case.model, case.x, case.lam0, case.eps, 0.7)
    assert close(H, (oracle.precision + 0.7 * torch.eye(3, dtype=torch.float64)).expand(5, 3, 3), 1e-12)
    once = GaussNewton(max_iter=1).minimise(problem, case.lam0[:, :3], case.model, case.x, case.lam0, case.eps, 0.7)
    exact = refine(case.model, case.x, case.lam0, case.eps, problem=problem, rho=0.7).value
    assert close(once, exact[:, :3], 1e-10)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gauss_newton_finds_what_newton_finds(name):
    case = curved_case(B=6)
    settings = {"problem": PROBLEMS[name], "rho": 0.3, "beta": 0.9, "mask": OBSERVED.repeat(2)[:5]}
    newton = refine(case.model, case.x, case.lam0, case.eps, **settings).value
    ours = refine(case.model, case.x, case.lam0, case.eps, solver=GaussNewton(), **settings)
    assert close(ours.value, newton, 1e-7) and bool(ours.info.converged.all())


def test_gauss_newton_needs_the_curvature_of_the_likelihood():
    case = curved_case()
    model = LatentModel(case.model.decoder, 2, lambda output, x: -((x - output) ** 2))
    with pytest.raises(il.ArgumentError, match="curvature"):
        refine(model, case.x, case.lam0, case.eps, solver=GaussNewton())


@pytest.mark.parametrize("tol", [1e-8, 1e-4, 1e-2])
def test_gauss_newton_is_judged_by_its_own_tolerance(tol):
    case = curved_case(B=6)
    lam0 = case.lam0.requires_grad_()
    solution = refine(case.model, case.x, lam0, case.eps, solver=GaussNewton(tol=tol))
    assert bool(solution.info.converged.all()) and 0 < float(solution.info.residual.max()) <= 2 * tol
    (found,) = torch.autograd.grad(solution.value.sum(), lam0)
    (exact,) = torch.autograd.grad(refine(case.model, case.x, lam0, case.eps).value.sum(), lam0)
    assert close(found, exact, 30 * tol)
    with pytest.warns(il.ConvergenceWarning):
        stopped = refine(
            case.model, case.x, lam0, case.eps, solver=GaussNewton(tol=tol, max_iter=1), rho=1e-3, on_failure="warn"
        )
    assert not bool(stopped.info.converged.all())


@pytest.mark.parametrize("settings", [{}, {"solver": Descent(5, 0.01), "grad": "unrolled"}, {"solver": GaussNewton()}])
def test_autocast_does_not_reach_the_inner_problem(settings):
    case = curved_case()
    parts = case.model.float(), case.x.float(), case.lam0.float(), case.eps.float()
    plain = refine(*parts, **settings).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = refine(*parts, **settings).value
        half = refine(parts[0], parts[1], parts[2].bfloat16(), parts[3], **settings).value
    assert found.dtype == half.dtype == torch.float32
    assert close(found, plain, 1e-2 if "grad" in settings else 1e-6) and close(half, plain, 2e-2)
