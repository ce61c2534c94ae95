"""`compat.QPFunction`: qpth's calls give qpth's answers, and better ones where qpth has none."""

from __future__ import annotations

import copy
import importlib
import pickle
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

import implicit_layers as il
from implicit_layers.compat import QPFunction, QPSolvers
from implicit_layers.testing import check_gradients, kkt_certificate, random_qp

NONE = torch.Tensor()  # how qpth writes missing constraints: empty, and float32 whatever the rest is
ARGUMENTS = ("Q", "p", "G", "h", "A", "b")


def arguments(n: int = 5, n_ineq: int = 4, n_eq: int = 2, batch: tuple[int, ...] = (3,), **more) -> tuple[Tensor, ...]:
    """A random program in qpth's order."""
    Q, p, A, b, G, h, *_ = random_qp(n, n_ineq, n_eq, batch=batch, active=0.5, **more)
    return Q, p, G, h, A, b


# --- qpth's own expectations ----------------------------------------------------------------------------------------
# Its test draws L, G, A, p, z_true, z0 = N with n = 10, Q = L Lᵀ, h = G z0 + U, b = A z0, scales Q, G, A by 1 or 100,
# takes the loss ½‖z − z_true‖², and allows rtol 1e-4, atol 1e-2. The scheme is kept here, the tolerance is not.

CASES = {"p": (2, 3, 100.0), "G": (0, 3, 1.0), "h": (0, 3, 1.0), "A": (3, 1, 100.0), "b": (3, 1, 100.0)}


def qpth_case(n_eq: int, n_ineq: int, scale: float, n: int = 10) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    L, G, z0, A, p, z_true = normal(n, n), normal(n_ineq, n), normal(n), normal(n_eq, n), normal(1, n), normal(1, n)
    slack = torch.rand(n_ineq, generator=generator, dtype=torch.float64)
    Q, G, A = scale * L @ L.mT, scale * G, scale * A
    data = {"Q": Q, "p": p, "G": G, "h": G @ z0 + slack, "A": A if n_eq else NONE, "b": A @ z0 if n_eq else NONE}
    return data, z_true


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_differences(name):
    data, z_true = qpth_case(*CASES[name])

    def loss(value: Tensor) -> Tensor:
        return 0.5 * (QPFunction()(**{**data, name: value}) - z_true).square().sum()

    value = data[name].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(value), value)
    step = 1e-5 * float(value.detach().abs().max())
    for index in torch.cartesian_prod(*map(torch.arange, value.shape)).reshape(-1, value.ndim)[:12]:
        move = torch.zeros_like(value)
        move[tuple(index)] = step
        with torch.no_grad():
            difference = (loss(value + move) - loss(value - move)) / (2 * step)
        assert abs(float(gradient[tuple(index)] - difference)) < 1e-6 * float(gradient.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("name", CASES)
def test_same_answers_and_gradients_as_qpth(name):
    """Where nothing is shared by the batch and constraints are there, both agree, to qpth's accuracy."""
    if find_spec("qpth") is None:
        return
    peer = importlib.import_module("qpth.qp").QPFunction(verbose=-1)
    data, z_true = qpth_case(*CASES[name])
    results = []
    for function in (QPFunction(verbose=-1), peer):
        leaves = {key: tensor.clone().requires_grad_(tensor.numel() > 0) for key, tensor in data.items()}
        z = function(*(leaves[key] for key in ARGUMENTS))
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        results.append([z.detach(), *torch.autograd.grad(0.5 * (z - z_true).square().sum(), wanted)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- the call -------------------------------------------------------------------------------------------------------


def test_the_signature_is_qpths():
    Q, p, G, h, A, b = arguments()
    expected = il.solve_qp(Q, p, A=A, b=b, G=G, h=h).z
    torch.testing.assert_close(QPFunction()(Q, p, G, h, A, b), expected)
    torch.testing.assert_close(QPFunction(1e-12, -1, 3, 20, QPSolvers.CVXPY, False)(Q, p, G, h, A, b), expected)
    named = QPFunction(eps=1e-6, verbose=1, notImprovedLim=5, maxIter=40, check_Q_spd=True)
    torch.testing.assert_close(named(Q=Q, p=p, G=G, h=h, A=A, b=b), expected)
    torch.testing.assert_close(QPFunction(solver=il.InteriorPoint(max_iter=30))(Q, p, G, h, A, b), expected)
    if find_spec("qpth") is not None:
        theirs = importlib.import_module("qpth.qp").QPSolvers.PDIPM_BATCHED
        torch.testing.assert_close(QPFunction(solver=theirs)(Q, p, G, h, A, b), expected)


@pytest.mark.parametrize("shared", ARGUMENTS)
def test_any_argument_may_be_without_its_batch(shared):
    data = dict(zip(ARGUMENTS, arguments(n_ineq=3, n_eq=0 if shared in "Gh" else 2), strict=True))
    if shared in "Gh":
        data |= {"A": NONE, "b": NONE, "h": data["h"] + 5.0}
    elif shared in "Ab":
        data |= {"G": NONE, "h": NONE}
    one = {**data, shared: data[shared][0]}
    all_of_it = {**data, shared: data[shared][:1].expand_as(data[shared])}
    torch.testing.assert_close(QPFunction()(**one), QPFunction()(**all_of_it))
    torch.testing.assert_close(QPFunction()(**{**data, shared: data[shared][:1]}), QPFunction()(**all_of_it))


def test_the_result_has_a_batch_dimension_always():
    Q, p, G, h, A, b = arguments(batch=())
    assert QPFunction()(Q, p, G, h, A, b).shape == (1, 5)
    assert QPFunction()(Q, p[None], G, h, A, b).shape == (1, 5)
    assert QPFunction()(Q[None], p, G, h, A, b).shape == (1, 5)
    assert QPFunction()(Q, p, G, h[None].expand(4, -1), A, b).shape == (4, 5)
    assert QPFunction()(Q, p, G.new_zeros(4, 0, 5), h.new_zeros(0), A, b).shape == (4, 5)


@pytest.mark.parametrize("missing", [NONE, None], ids=["empty", "None"])
def test_constraints_may_be_missing(missing):
    Q, p, G, h, A, b = arguments(n_ineq=3, n_eq=2)
    z = QPFunction()(Q, p, missing, missing, missing, missing)
    torch.testing.assert_close(torch.einsum("bij,bj->bi", Q, z), -p)
    equality = QPFunction()(Q, p, missing, missing, A, b)
    torch.testing.assert_close(torch.einsum("bij,bj->bi", A, equality), b)
    inequality = QPFunction()(Q, p, G, h, missing, missing)
    solution = il.solve_qp(Q, p, G=G, h=h)
    assert kkt_certificate(Q, p, inequality, lam=solution.lam, G=G, h=h).max() < 1e-10
    rowless = QPFunction()(Q, p, G[:, :0], h[:, :0], A, b)
    torch.testing.assert_close(rowless, equality)


def test_an_empty_batch():
    Q, p, G, h, A, b = arguments()
    assert QPFunction()(Q[:0], p[:0], G[:0], h[:0], A[:0], b[:0]).shape == (0, 5)
    assert QPFunction()(Q[0], p[:0], G[0], h[0], A[0], b[0]).shape == (0, 5)


def test_float32_stays_float32():
    data = tuple(tensor.float() for tensor in arguments())
    z = QPFunction()(*data)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.double(), QPFunction()(*arguments()), rtol=1e-4, atol=1e-4)


# --- what differs on purpose ----------------------------------------------------------------------------------------


def test_gradients_of_shared_parameters_are_sums():
    Q, p, G, h, A, b = arguments(batch=())
    p = p + 0.01 * torch.randn(4, 5, dtype=torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in (Q, p, G, h, A, b)]
    weights = torch.randn(4, 5, dtype=torch.float64)
    shared = torch.autograd.grad((weights * QPFunction()(*leaves)).sum(), leaves)
    parts = [
        torch.autograd.grad(
            (weights[i] * QPFunction()(*leaves[:1], leaves[1][i], *leaves[2:])).sum(), leaves, materialize_grads=True
        )
        for i in range(4)
    ]
    for found, each in zip(shared, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(each).sum(0))


def test_derivatives_of_second_order_and_forward_mode():
    Q, p, G, h, A, b = arguments(3, 2, 1, batch=(2,), seed=3)
    check_gradients(lambda *tensors: QPFunction()(*tensors), Q, p, G, h, A, b)


def test_vmap_over_the_cost():
    Q, p, G, h, A, b = arguments(batch=())
    costs = p + 0.1 * torch.randn(6, 5, dtype=torch.float64)
    mapped = torch.func.vmap(lambda cost: QPFunction()(Q, cost, G, h, A, b))(costs)
    assert mapped.shape == (6, 1, 5)
    torch.testing.assert_close(mapped[:, 0], QPFunction()(Q, costs, G, h, A, b))


def test_an_infeasible_program_raises_at_any_verbosity():
    Q, p = torch.eye(1), torch.zeros(2, 1)
    G, h = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # the second: z <= -1 and z >= 1
    for verbose in (-1, 0, 1):
        with pytest.raises(il.InfeasibleError, match="index 1"):
            QPFunction(verbose=verbose)(Q, p, G, h, NONE, NONE)
    z = QPFunction(on_failure="ignore")(Q, p, G, h, NONE, NONE)
    torch.testing.assert_close(z[0], torch.zeros(1))
    with pytest.raises(il.NotPositiveDefiniteError):
        QPFunction(check_Q_spd=False)(-torch.eye(1), p, G, h.abs(), NONE, NONE)


# --- settings and refusals ------------------------------------------------------------------------------------------


def test_settings_are_checked_and_translated():
    default = il.InteriorPoint()
    assert QPFunction().solver == default
    assert QPFunction(maxIter=default.max_iter + 7).solver.max_iter == default.max_iter + 7
    assert QPFunction(maxIter=1).solver.max_iter == default.max_iter
    assert QPFunction(eps=1e-3).solver.tol == 1e-3
    assert QPFunction(eps=1e-15).solver.tol == default.tol
    for wrong in ({"eps": 0.0}, {"maxIter": 0}, {"notImprovedLim": -1}, {"on_failure": "print"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            QPFunction(**wrong)
    for wrong in ({"eps": "small"}, {"maxIter": 2.5}, {"solver": "pdipm"}, {"solver": il.Newton()}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            QPFunction(**wrong)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"Q": lambda Q: Q[None]}, il.ShapeError, "Q must have shape"),
        ({"p": lambda p: p[0, 0]}, il.ShapeError, "p must have shape"),
        ({"h": lambda h: h[:2]}, il.ShapeError, "batch of 2"),
        ({"G": lambda G: NONE}, il.ShapeError, "h was given without G"),
        ({"b": lambda b: None}, il.ShapeError, "A was given without b"),
        ({"A": lambda A: A.tolist()}, il.DtypeError, "A must be a torch.Tensor"),
        ({"G": lambda G: G.float()}, il.DtypeError, "G is torch.float32"),
        ({"G": lambda G: G[..., :-1]}, il.ShapeError, "G must have shape"),
        ({"p": lambda p: torch.full_like(p, torch.nan)}, il.NonFiniteError, "p"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, error, message):
    data = dict(zip(ARGUMENTS, arguments(), strict=True))
    for name, edit in change.items():
        data[name] = edit(data[name])
    with pytest.raises(error, match=message):
        QPFunction()(**data)


def test_it_is_copied_and_pickled():
    function = QPFunction(eps=1e-4, on_failure="warn")
    for twin in (copy.deepcopy(function), pickle.loads(pickle.dumps(function))):
        assert repr(twin) == repr(function)
        assert twin.solver == function.solver
