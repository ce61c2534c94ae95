"""Softmax as an LP: three methods, one answer, against torch, scipy, finite differences and its own properties."""

import copy
import math

import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.gradcheck import GradcheckError
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

import implicit_layers as il
from implicit_layers import checks
from implicit_layers.errors import DtypeError, ImplicitLayersError, NonFiniteError, ShapeError
from tests.planted import planted

METHODS = ["closed", "newton", "kkt"]
INF = math.inf

every_method = pytest.mark.parametrize("method", METHODS)


def draw(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def draw_temperature(*shape, seed=1):
    return 0.3 + torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the value ------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize(
    ("shape", "dim"), [((5,), 0), ((1,), -1), ((3, 4), 0), ((2, 3, 4), 1), ((2, 3, 4), -3), ((0, 4), 1), ((4, 0), 0)]
)
def test_the_value_is_softmax_for_any_shape_and_dim(method, shape, dim):
    x = draw(*shape)
    for temperature in (1.0, 1, 0.1, 7.5):
        y = il.softmax(x, dim, temperature=temperature, method=method)
        assert y.shape == x.shape
        torch.testing.assert_close(y, torch.softmax(x / temperature, dim), rtol=1e-12, atol=1e-14)
        scipy_y = torch.from_numpy(scipy.special.softmax(x.numpy() / temperature, axis=dim)) if x.numel() else x
        torch.testing.assert_close(y, scipy_y, rtol=1e-12, atol=1e-14)


@every_method
def test_one_score(method):
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    for dim in (-1, 0):
        y = il.softmax(x, dim, temperature=0.5, method=method)
        assert y.shape == () and y == 1
        assert torch.autograd.grad(y, x)[0] == 0


@every_method
@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 4), (1, 1, 4), (1, 4), (1, 1), (5, 2, 1, 1)])
def test_a_temperature_for_each_problem_broadcasts(method, shape):
    x, tau = draw(2, 3, 4), draw_temperature(*shape)
    if tau.ndim == 1:
        x, dim = draw(2, 1, 3), -1
    else:
        dim = -2
    x, tau = x.requires_grad_(), tau.requires_grad_()
    y = il.softmax(x, dim, temperature=tau, method=method)
    assert y.shape == torch.broadcast_shapes(x.shape, tau.shape)
    torch.testing.assert_close(y, torch.softmax(x / tau, dim), rtol=1e-12, atol=1e-14)
    g = draw(*y.shape, seed=3)
    got = torch.autograd.grad(y, (x, tau), g)
    want = torch.autograd.grad(torch.softmax(x / tau, dim), (x, tau), g)  # broadcasting sums, as autograd does
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@every_method
def test_inputs_that_are_not_contiguous_or_are_expanded(method):
    x = draw(4, 6, 3)[:, ::2].transpose(0, 2)
    torch.testing.assert_close(il.softmax(x, 1, method=method), torch.softmax(x, 1), rtol=1e-12, atol=1e-14)
    x = draw(1, 3).expand(4, 3)
    torch.testing.assert_close(il.softmax(x, 0, method=method), torch.full((4, 3), 0.25).double(), rtol=1e-12, atol=0)


# --- derivatives ----------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize(("shape", "dim", "tau_shape"), [((4,), 0, ()), ((2, 3), -1, (2, 1)), ((3, 2), 0, (1, 2))])
def test_gradcheck_and_gradgradcheck_in_scores_and_temperature(method, shape, dim, tau_shape):
    x = draw(*shape, scale=1.0).requires_grad_()
    tau = draw_temperature(*tau_shape).requires_grad_()

    def function(x, tau):
        return il.softmax(x, dim, temperature=tau, method=method)

    assert torch.autograd.gradcheck(function, (x, tau), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (x, tau), check_batched_grad=True)
    assert torch.autograd.gradcheck(function, (x, tau), check_forward_ad=True, check_batched_forward_grad=True)


def test_gradcheck_sees_a_wrong_gradient():
    def wrong(y, g):
        return y * g  # forgets − y yᵀ g: the gradient of the report's spurious branch

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(planted(il.softmax, wrong), draw(4).requires_grad_())


@every_method
def test_the_jacobian_is_S_and_second_derivatives_agree(method):
    x, tau = draw(5), torch.tensor(0.7, dtype=torch.float64)

    def function(x, tau):
        return il.softmax(x, temperature=tau, method=method)

    y = torch.softmax(x / tau, -1)
    S = (torch.diag(y) - torch.outer(y, y)) / tau
    torch.testing.assert_close(jacrev(function)(x, tau), S, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(jacrev(function, 1)(x, tau), -(S @ x) / tau, rtol=1e-10, atol=1e-13)
    want = jacrev(jacrev(lambda x, tau: torch.softmax(x / tau, -1), (0, 1)), (0, 1))(x, tau)
    got = jacrev(jacrev(function, (0, 1)), (0, 1))(x, tau)
    for got_row, want_row in zip(got, want, strict=True):
        for got_block, want_block in zip(got_row, want_row, strict=True):
            torch.testing.assert_close(got_block, want_block, rtol=1e-9, atol=1e-11)


@every_method
def test_finite_differences(method):
    x, tau, g = draw(3, 6), draw_temperature(3, 1), draw(3, 6, seed=5)
    dx, dtau, step = draw(3, 6, seed=6), draw(3, 1, seed=7), 1e-6
    x, tau = x.requires_grad_(), tau.requires_grad_()
    loss = (il.softmax(x, temperature=tau, method=method) * g).sum()
    grad_x, grad_tau = torch.autograd.grad(loss, (x, tau))
    with torch.no_grad():
        plus, minus = (
            (torch.from_numpy(scipy.special.softmax(((x + h * dx) / (tau + h * dtau)).numpy(), axis=-1)) * g).sum()
            for h in (step, -step)
        )
        difference = (plus - minus) / (2 * step)
        torch.testing.assert_close((grad_x * dx).sum() + (grad_tau * dtau).sum(), difference, rtol=1e-7, atol=1e-9)


@every_method
def test_every_functional_transform(method):
    x, tau = draw(3, 4), draw_temperature(3, 1)
    x[0, 1] = -INF

    def function(x, tau):
        return il.softmax(x, temperature=tau, method=method)

    def reference(x, tau):
        return torch.softmax(x.nan_to_num(neginf=-1e5) / tau, -1)

    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(vmap(function)(x, tau), reference(x, tau), **close)
    want_tau = jacrev(reference, 1)(x, tau)
    torch.testing.assert_close(jacrev(function, 1)(x, tau), want_tau, **close)
    torch.testing.assert_close(jacfwd(function, 1)(x, tau), want_tau, **close)
    torch.testing.assert_close(jacrev(function)(x, tau), jacrev(reference)(x, tau), **close)
    tangents = (draw(3, 4, seed=4), draw(3, 1, seed=5))
    got, want = jvp(function, (x, tau), tangents), jvp(reference, (x, tau), tangents)
    torch.testing.assert_close(got, want, **close)
    per_problem = vmap(jacrev(lambda x, tau: il.softmax(x, temperature=tau, method=method)))(x, tau)
    torch.testing.assert_close(per_problem, vmap(jacrev(reference))(x, tau), **close)
    want = hessian(reference, 1)(x, tau)
    for outer in (jacrev, jacfwd):
        for inner in (jacrev, jacfwd):
            torch.testing.assert_close(outer(inner(function, 1), 1)(x, tau), want, **close)


@pytest.mark.parametrize("method", ["closed", "kkt"])
def test_compile_fullgraph_gives_the_eager_numbers(method):
    def function(x, tau):
        return il.softmax(x, 1, temperature=tau, method=method)

    x, tau = draw(2, 3, 4).requires_grad_(), draw_temperature(2, 1, 1).requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager_y, compiled_y = function(x, tau), compiled(x, tau)
    torch.testing.assert_close(compiled_y, eager_y)
    g = draw(2, 3, 4, seed=3)
    got, want = (torch.autograd.grad(y, (x, tau), g) for y in (compiled_y, eager_y))
    torch.testing.assert_close(got, want)
    mapped = torch.compile(vmap(lambda x: il.softmax(x, 0, method=method)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(mapped(x.detach()), torch.softmax(x.detach(), 1))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.compile's own, where a graph breaks
def test_newton_inside_a_compiled_function_runs_eagerly():
    def function(x):
        return 2 * il.softmax(3 * x, method="newton")

    x = draw(2, 3).requires_grad_()
    y = torch.compile(function, backend="aot_eager")(x)
    torch.testing.assert_close(y, 2 * torch.softmax(3 * x, -1))
    g = draw(2, 3, seed=1)
    torch.testing.assert_close(torch.autograd.grad(y, x, g), torch.autograd.grad(function(x), x, g))


def test_newton_refuses_nan_even_where_values_are_not_checked():
    x = draw(5, 3)
    x[2, 1] = math.nan
    with pytest.raises(NonFiniteError):
        vmap(lambda x: il.softmax(x, method="newton"))(x)


# --- masks, huge scores, low precision ------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_a_mask_gives_the_result_of_the_rest_and_no_gradient(method, temperature):
    x, keep = draw(3, 6), torch.tensor([0, 2, 5])
    masked = torch.full_like(x, -INF)
    masked[:, keep] = x[:, keep]
    masked.requires_grad_()
    tau = torch.full((3, 1), temperature, dtype=torch.float64, requires_grad=True)
    g = draw(3, 6, seed=3)
    y = il.softmax(masked, temperature=tau, method=method)
    grad, grad_tau = torch.autograd.grad(y, (masked, tau), g, create_graph=True)
    rest, rest_tau = x[:, keep].requires_grad_(), tau.detach().clone().requires_grad_()
    rest_y = torch.softmax(rest / rest_tau, -1)
    rest_grad, rest_grad_tau = torch.autograd.grad(rest_y, (rest, rest_tau), g[:, keep], create_graph=True)
    torch.testing.assert_close(y[:, keep], rest_y, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad[:, keep], rest_grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(grad_tau, rest_grad_tau, rtol=1e-10, atol=1e-13)
    off = torch.tensor([1, 3, 4])
    assert (y[:, off] == 0).all() and (grad[:, off] == 0).all()
    second = torch.autograd.grad(grad.pow(2).sum() + grad_tau.sum(), (masked, tau))
    rest_second = torch.autograd.grad(rest_grad.pow(2).sum() + rest_grad_tau.sum(), (rest, rest_tau))
    torch.testing.assert_close(second[0][:, keep], rest_second[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(second[1], rest_second[1], rtol=1e-9, atol=1e-11)
    assert (second[0][:, off] == 0).all()


@every_method
@pytest.mark.parametrize("temperature", [0.02, 1.0, 3.0])
def test_a_number_and_a_tensor_as_temperature_give_the_same(method, temperature):
    answers = []
    for tau in (temperature, torch.tensor(temperature, dtype=torch.float64)):
        x = draw(3, 5)
        x[0, 1], x[1, 3], x[2, 4] = -INF, -1e300, -1.7e308
        x.requires_grad_()
        y = il.softmax(x, temperature=tau, method=method)
        (grad,) = torch.autograd.grad(y, x, draw(3, 5, seed=1), create_graph=True)
        answers.append((y, grad, *torch.autograd.grad(grad.pow(2).sum(), x)))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-12, atol=1e-12)
    assert all(part.isfinite().all() for part in answers[0])


@every_method
def test_a_single_unmasked_score_gets_everything(method):
    x = torch.tensor([-INF, 2.0, -INF], dtype=torch.float64, requires_grad=True)
    y = il.softmax(x, temperature=0.3, method=method)
    assert y.tolist() == [0.0, 1.0, 0.0]
    (grad,) = torch.autograd.grad(y, x, draw(3))
    assert (grad == 0).all()


@every_method
@pytest.mark.parametrize("offset", [-1e8, 1e4, 1e8])
def test_an_offset_costs_no_digits(method, offset):
    x = torch.round(draw(4, 5) * 1024) / 1024  # x + offset is exact
    tau = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    y = il.softmax(x + offset, temperature=tau, method=method)
    torch.testing.assert_close(y, torch.softmax(x / tau, -1), rtol=1e-11, atol=1e-15)
    (got,) = torch.autograd.grad(y, tau, draw(4, 5, seed=3))
    (want,) = torch.autograd.grad(torch.softmax(x / tau, -1), tau, draw(4, 5, seed=3))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@every_method
@pytest.mark.parametrize("row", [[1e300, -1e300, 0.0], [-1e300, -1e300, -1e300], [1.7e308, -1.7e308, 1.7e308]])
@pytest.mark.parametrize("temperature", [1e-290, 1e-3, 1.0, 1e3, 1e300])
def test_huge_scores_stay_finite_in_value_and_derivatives(method, row, temperature):
    x = torch.tensor(row, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    y = il.softmax(x, temperature=tau, method=method)
    assert y.isfinite().all() and abs(float(y.detach().sum()) - 1) < 1e-12
    for grad in torch.autograd.grad(y, (x, tau), draw(3)):
        assert grad.isfinite().all()
    if temperature == 1:
        torch.testing.assert_close(y, torch.softmax(x, -1))


@every_method
def test_a_spread_of_ten_thousand_temperatures(method):
    x = torch.tensor([[0.0, 1e-3, -1e4, 5e3, 5e3 - 2.0]], dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y = il.softmax(x, temperature=tau, method=method)
    want = torch.softmax(x / tau, -1)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=0)
    g = draw(1, 5, seed=8)
    got = torch.autograd.grad(y, (x, tau), g)
    torch.testing.assert_close(got, torch.autograd.grad(want, (x, tau), g), rtol=1e-9, atol=1e-12)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_accumulates_in_float32_and_keeps_the_dtype(method, dtype):
    n = 64 if method == "kkt" else 32_000
    x = draw(2, n, dtype=dtype).requires_grad_()
    for temperature in (1.0, 0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=dtype)):
        y = il.softmax(x, temperature=temperature, method=method)
        exact = torch.softmax(x.detach().double() / float(temperature), -1)
        assert y.dtype == dtype
        torch.testing.assert_close(y, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps + 2e-5, atol=6e-8)
        g = draw(2, n, seed=2, dtype=dtype)
        (grad,) = torch.autograd.grad(y, x, g)
        assert grad.dtype == dtype
        exact_grad = exact * (g.double() - (g.double() * exact).sum(-1, keepdim=True)) / float(temperature)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=4 * torch.finfo(dtype).eps + 1e-4, atol=1e-6)


def test_a_float32_temperature_with_half_scores_gets_a_float32_gradient():
    tau = torch.tensor(0.7, requires_grad=True)
    il.softmax(draw(3, 4, dtype=torch.float16), temperature=tau).float().pow(2).sum().backward()
    assert tau.grad.dtype == torch.float32 and tau.grad != 0


def test_an_infinite_temperature_is_uniform_over_what_is_not_masked():
    y = il.softmax(torch.tensor([1.0, -INF, 5.0]).double(), temperature=INF)
    assert y.tolist() == [0.5, 0.0, 0.5]


# --- refusals -------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize(
    ("x", "options", "error", "says"),
    [
        (torch.tensor([1, 2]), {}, DtypeError, "int64"),
        (torch.tensor([1.0 + 0j]), {}, DtypeError, "complex64"),
        ([1.0, 2.0], {}, DtypeError, "list"),
        (torch.zeros(2, 0), {}, ShapeError, "no entries along dim=-1"),
        (torch.zeros(0), {"dim": 0}, ShapeError, "no entries"),
        (torch.zeros(2, 3), {"dim": 2}, ShapeError, r"dim must be in \[-2, 1\]"),
        (torch.zeros(2, 3), {"dim": -3}, ShapeError, "got -3"),
        (torch.zeros(2, 3), {"temperature": 0.0}, ValueError, r"got 0\.0"),
        (torch.zeros(2, 3), {"temperature": -1.5}, ValueError, r"got -1\.5"),
        (torch.zeros(2, 3), {"temperature": math.nan}, ValueError, "got nan"),
        (torch.zeros(2, 3), {"temperature": 1e-50}, ValueError, "got 1e-50"),
        (torch.zeros(2, 3), {"temperature": torch.tensor([[1.0], [-2.0]])}, ValueError, r"temperature\[1, 0\].*-2\.0"),
        (torch.zeros(2, 3), {"temperature": torch.tensor(math.nan)}, ValueError, "got nan"),
        (torch.zeros(2, 3), {"temperature": torch.tensor(0.0)}, ValueError, r"got 0\.0"),
        (torch.zeros(2, 3), {"temperature": torch.ones(3)}, ShapeError, "varies along the axis"),
        (torch.zeros(2, 3), {"temperature": torch.ones(4, 1)}, ShapeError, "does not broadcast"),
        (torch.zeros(2, 3), {"temperature": torch.ones(2, 1, dtype=torch.float64)}, DtypeError, "temperature"),
        (torch.zeros(2, 3), {"temperature": torch.tensor(1)}, DtypeError, "int64"),
        (torch.tensor([[0.0, 1.0], [0.0, math.nan]]), {}, NonFiniteError, r"x\[1, 1\] is nan"),
        (torch.tensor([[0.0, INF], [0.0, 1.0]]), {}, NonFiniteError, r"x\[0, 1\] is inf"),
        (torch.tensor([[0.0, 1.0], [-INF, -INF]]), {}, ValueError, r"first at index \[1\]"),
        (torch.tensor([-INF, -INF]), {}, ValueError, "only -inf"),
        (torch.tensor([[[0.0, -INF], [0.0, -INF]]]), {"dim": 1}, ValueError, r"\[0, 1\]"),
    ],
)
def test_bad_input_has_its_own_error(method, x, options, error, says):
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        x = x.requires_grad_()
    with pytest.raises(error, match=says) as caught:
        il.softmax(x, **options, method=method)
    if error is not ValueError:
        assert isinstance(caught.value, ImplicitLayersError)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="'sinkhorn'"):
        il.softmax(torch.zeros(2), method="sinkhorn")


@pytest.mark.parametrize("temperature", [1.0, torch.tensor(0.5)])
def test_the_checks_of_values_cost_one_host_synchronisation(monkeypatch, temperature):
    calls = []
    for name in ("host_bool", "host_nan"):
        read = getattr(checks, name)
        monkeypatch.setattr(checks, name, lambda value, read=read: calls.append(1) or read(value))
    il.softmax(draw(3, 4, dtype=torch.float32), temperature=temperature).sum()
    assert len(calls) == 1
    vmap(il.softmax)(draw(3, 4))
    torch.compile(il.softmax, fullgraph=True, backend="eager")(draw(3, 4))
    assert len(calls) == 1


@pytest.mark.parametrize("method", ["closed", "kkt"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_without_value_checks_a_bad_problem_is_nan_and_alone(method, temperature):
    x = draw(5, 3)
    x[0, 1], x[1], x[2, 0] = math.nan, -INF, INF
    y = vmap(lambda x: il.softmax(x, temperature=temperature, method=method))(x)
    assert y[:3].isnan().any(-1).all()
    torch.testing.assert_close(y[3:], torch.softmax(x[3:] / temperature, -1))


@pytest.mark.parametrize("method", ["closed", "kkt"])
def test_fake_tensors_of_another_device_pass_through(method):
    with FakeTensorMode():
        x = torch.empty(3, 4, device="meta")
        tau = torch.empty(3, 1, device="meta")
        y = il.softmax(x, temperature=tau, method=method)
        assert y.device.type == "meta" and y.shape == (3, 4)


# --- properties -----------------------------------------------------------------------------------------------------

problems = st.lists(st.floats(-50, 50), min_size=1, max_size=7)
taus = st.floats(0.05, 20)
properties = settings(derandomize=True, deadline=None, max_examples=40)


@every_method
@properties
@given(row=problems, tau=taus, shift=st.floats(-100, 100), data=st.data())
def test_a_distribution_that_ignores_shifts_and_follows_permutations(method, row, tau, shift, data):
    x = torch.tensor(row, dtype=torch.float64)
    y = il.softmax(x, temperature=tau, method=method)
    assert (y >= 0).all() and abs(float(y.sum()) - 1) < 1e-12
    rounding = 1e-12 + 1e-13 / tau  # x + shift is rounded
    torch.testing.assert_close(il.softmax(x + shift, temperature=tau, method=method), y, rtol=0, atol=rounding)
    order = torch.tensor(data.draw(st.permutations(range(len(row)))))
    torch.testing.assert_close(il.softmax(x[order], temperature=tau, method=method), y[order], rtol=1e-9, atol=1e-14)


@every_method
@properties
@given(row=problems, tau=taus)
def test_the_jacobian_is_symmetric_psd_with_kernel_one_and_bounded(method, row, tau):
    x = torch.tensor(row, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda x: il.softmax(x, temperature=tau, method=method), x)
    rounding = 1e-12 / tau
    torch.testing.assert_close(J, J.mT, rtol=0, atol=rounding)
    assert J.sum(-1).abs().max() <= rounding
    eigenvalues = torch.linalg.eigvalsh((J + J.mT) / 2)
    assert eigenvalues[0] >= -rounding
    assert eigenvalues[-1] <= 1 / (2 * tau) + rounding


@every_method
@properties
@given(row=problems, low=taus, ratio=st.floats(1.01, 10))
def test_entropy_grows_with_temperature(method, row, low, ratio):
    x = torch.tensor(row, dtype=torch.float64)
    cold, hot = (il.softmax(x, temperature=t, method=method) for t in (low, low * ratio))
    entropy_cold, entropy_hot = (torch.special.entr(y).sum() for y in (cold, hot))
    assert entropy_hot >= entropy_cold - 1e-12
    assert x @ hot <= x @ cold + 1e-10


@every_method
@properties
@given(row=problems, tau=taus, data=st.data())
def test_no_point_of_the_simplex_is_better(method, row, tau, data):
    x = torch.tensor(row, dtype=torch.float64)
    y = il.softmax(x, temperature=tau, method=method)
    weights = data.draw(st.lists(st.floats(0, 1), min_size=len(row), max_size=len(row)))
    other = torch.tensor(weights, dtype=torch.float64) + 1e-9
    other = other / other.sum()
    values = [x @ point + tau * torch.special.entr(point).sum() for point in (y, other)]
    assert values[0] >= values[1] - 1e-10 * (1 + abs(values[0]))


@properties
@given(
    rows=st.lists(st.tuples(*[st.floats(-300, 300) | st.just(-INF)] * 4), min_size=1, max_size=3).filter(
        lambda rows: all(max(row) > -INF for row in rows)
    ),
    tau=st.floats(0.01, 100),
)
def test_the_methods_agree_in_value_and_both_gradients(rows, tau):
    g = draw(len(rows), 4, seed=2)
    answers = []
    for method in METHODS:
        x = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
        temperature = torch.full((len(rows), 1), tau, dtype=torch.float64, requires_grad=True)
        y = il.softmax(x, temperature=temperature, method=method)
        answers.append((y.detach(), *torch.autograd.grad(y, (x, temperature), g)))
    for other in answers[1:]:
        for got, want, scale in zip(other, answers[0], (1, 1 / tau, 300 / tau**2), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12 * (1 + scale))


@every_method
def test_it_is_deterministic_and_leaves_its_arguments_alone(method):
    x, tau = draw(3, 4), draw_temperature(3, 1)
    x_before, tau_before = copy.deepcopy((x, tau))
    first, second = (il.softmax(x, temperature=tau, method=method) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(x, x_before) and torch.equal(tau, tau_before)
