"""Projections onto boxes, balls, planes and simplices, against certificates, solve_qp and differences.

The certificate: y is the projection of x onto a convex set C exactly when y lies in C and max over w in C of
⟨x − y, w − y⟩ is zero. That maximum is a linear program with a closed answer for each of these sets.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.gradcheck import GradcheckError
from torch.func import jacrev

import implicit_layers as il
from implicit_layers import projections
from implicit_layers.errors import ArgumentError, ArgumentTypeError, DtypeError, NonFiniteError, ShapeError
from implicit_layers.projections import simplices

INF = math.inf
PLANE = {"normal": torch.tensor([1.0, -2.0, 0.5]).double(), "offset": 0.3}
EACH = {
    "box": lambda x, dim=-1: projections.box(x, lb=-0.5, ub=0.7),
    "l2_ball": projections.l2_ball,
    "l1_ball": projections.l1_ball,
    "simplex": projections.simplex,
    "capped_simplex": lambda x, dim=-1: projections.capped_simplex(x, 0.5, dim, cap=0.6),
    "half_space": lambda x, dim=-1: projections.half_space(x, dim, normal=_along(x, dim), offset=0.3),
    "hyperplane": lambda x, dim=-1: projections.hyperplane(x, dim, normal=_along(x, dim), offset=0.3),
    "isotonic": projections.isotonic,
    "permutahedron": lambda x, dim=-1: projections.permutahedron(x, _along(x, dim), dim),
}
every = pytest.mark.parametrize("name", EACH)


def _along(x, dim):
    """1, 2, 3, ... along one axis."""
    n = x.shape[dim] if x.ndim else 1
    steps = torch.arange(1, n + 1, dtype=x.dtype)
    return steps.reshape([n if i == dim % x.ndim else 1 for i in range(x.ndim)]) if x.ndim else steps[0]


def draw(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, tol=1e-10):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


# --- the answer is optimal --------------------------------------------------------------------------------------------

# (x, parameters) -> y; how far y is outside; max of <d, w> over the set
SUPPORT = {
    "box": (
        lambda x, r, u: projections.box(x, lb=-r, ub=u),
        lambda y, r, u: torch.maximum(-r - y, y - u).amax(-1),
        lambda d, r, u: torch.maximum(-r * d, u * d).sum(-1),
    ),
    "l2_ball": (
        lambda x, r, u: projections.l2_ball(x, radius=r),
        lambda y, r, u: y.norm(dim=-1) - r[..., 0],
        lambda d, r, u: r[..., 0] * d.norm(dim=-1),
    ),
    "l1_ball": (
        lambda x, r, u: projections.l1_ball(x, radius=r),
        lambda y, r, u: y.abs().sum(-1) - r[..., 0],
        lambda d, r, u: r[..., 0] * d.abs().amax(-1),
    ),
    "simplex": (
        lambda x, r, u: projections.simplex(x, radius=r),
        lambda y, r, u: torch.maximum((y.sum(-1) - r[..., 0]).abs(), -y.amin(-1)),
        lambda d, r, u: r[..., 0] * d.amax(-1),
    ),
    "capped_simplex": (
        lambda x, r, u: projections.capped_simplex(x, r, cap=u),
        lambda y, r, u: torch.stack([(y.sum(-1) - r[..., 0]).abs(), -y.amin(-1), (y - u).amax(-1)]).amax(0),
        lambda d, r, u: _filled(d, r, u),
    ),
}


def _filled(d, r, u):
    """Fill the best entries to their caps until r is used up."""
    order = d.argsort(-1, descending=True)
    before = u.gather(-1, order).cumsum(-1) - u.gather(-1, order)
    share = torch.minimum((r - before).clamp(min=0), u.gather(-1, order))
    return (share * d.gather(-1, order)).sum(-1)


def check_optimal(name, x, r, u, tol=1e-13):
    project, outside, support = SUPPORT[name]
    y = project(x, r, u)
    size = 1 + x.abs().amax() + r.abs().amax()
    assert bool((outside(y, r, u) <= 4 * tol * size).all())
    d = x - y
    gap = support(d, r, u) - (d * y).sum(-1)
    assert bool((gap.abs() <= tol * size**2 * x.shape[-1]).all()), gap


@pytest.mark.parametrize("name", SUPPORT)
@pytest.mark.parametrize("n", [1, 2, 3, 17, 500])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_the_answer_is_optimal(name, n, scale):
    x, u = draw(20, n, scale=scale), 0.1 + draw(20, n, seed=1).sigmoid()
    x[1], x[2] = x[1].round(), 0.0
    x[3] = -x[3].abs()
    r = u.sum(-1, keepdim=True) * draw(20, 1, seed=2).sigmoid()
    check_optimal(name, x, r, u)


@pytest.mark.parametrize("name", SUPPORT)
@settings(max_examples=60)
@given(
    x=st.lists(st.floats(-1e3, 1e3) | st.sampled_from([0.0, 1.0, -1.0, 1e-30, 5e-324]), min_size=1, max_size=8),
    share=st.floats(0.01, 1.0),
)
def test_the_answer_is_optimal_for_ties_and_extremes(name, x, share):
    x = torch.tensor(x, dtype=torch.float64)
    u = torch.full_like(x, 0.7)
    check_optimal(name, x, share * u.sum(-1, keepdim=True), u)


@pytest.mark.parametrize("seed", range(3))
def test_the_answers_and_gradients_of_solve_qp(seed):
    x, g = draw(5, 4, seed=seed), draw(5, 4, seed=seed + 10)
    normal, r = draw(4, seed=20), torch.tensor([0.9]).double()
    eye, ones = torch.eye(4).double(), torch.ones(1, 4).double()
    k, cap = torch.tensor([1.3]).double(), 0.4 + draw(4, seed=30).sigmoid()
    cases = [
        (
            lambda x, r: projections.simplex(x, radius=r),
            (r,),
            lambda r: {"A": ones, "b": r, "G": -eye, "h": 0 * cap},
        ),
        (
            lambda x, k, cap: projections.capped_simplex(x, k, cap=cap),
            (k, cap),
            lambda k, cap: {"A": ones, "b": k, "G": torch.cat([-eye, eye]), "h": torch.cat([0 * cap, cap])},
        ),
        (
            lambda x, a, b: projections.half_space(x, normal=a, offset=b),
            (normal, r),
            lambda a, b: {"G": a.unsqueeze(0), "h": b},
        ),
        (
            lambda x, a, b: projections.hyperplane(x, normal=a, offset=b),
            (normal, r),
            lambda a, b: {"A": a.unsqueeze(0), "b": b},
        ),
    ]
    for project, parameters, program in cases:
        inputs = [t.clone().requires_grad_() for t in (x, *parameters)]
        y = project(*inputs)
        z = il.solve_qp(eye, -inputs[0], **program(*inputs[1:])).z
        close(y, z, 1e-8)
        close(torch.autograd.grad(y, inputs, g), torch.autograd.grad(z, inputs, g), 1e-7)


# --- any shape, dim, dtype --------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(("shape", "dim"), [((3,), 0), ((4, 3), 0), ((2, 3, 4), 1), ((2, 3, 4), -2), ((0, 3), 1)])
def test_any_dim(name, shape, dim):
    x = draw(*shape).requires_grad_()
    y = EACH[name](x, dim)
    expected = EACH[name](x.movedim(dim, -1).contiguous()).movedim(-1, dim)
    close(y, expected)
    g = draw(*shape, seed=1)
    close(torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g))


@every
def test_one_number(name):
    x = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for dim in (0, -1):
        y = EACH[name](x, dim)
        assert y.shape == ()
        close(y, EACH[name](x.reshape(1))[0])


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(name, dtype):
    x = draw(6, 5).to(dtype).requires_grad_()
    y = EACH[name](x)
    assert y.dtype == dtype
    expected = EACH[name](x.detach().float())
    assert torch.equal(y, expected.to(dtype))
    (g,) = torch.autograd.grad(y.float().square().sum(), x)
    assert g.dtype == dtype and bool(g.isfinite().all())


@every
def test_projecting_twice_changes_nothing_and_distances_do_not_grow(name):
    x, other = draw(50, 6), draw(50, 6, seed=1)
    y, near = EACH[name](x), EACH[name](other)
    close(EACH[name](y), y, 1e-12)
    assert bool(((y - near).norm(dim=-1) <= (x - other).norm(dim=-1) + 1e-12).all())


@every
def test_the_jacobian_is_a_symmetric_contraction(name):
    J = jacrev(EACH[name])(draw(7, seed=5))
    close(J, J.mT)
    eigenvalues = torch.linalg.eigvalsh(J)
    assert eigenvalues.min() > -1e-12 and eigenvalues.max() < 1 + 1e-12


def test_radii_and_normals_of_their_own_for_each_point_in_any_dim():
    x, r = draw(2, 3, 4), 0.5 + draw(2, 1, 4, seed=1).square()
    y = projections.simplex(x, 1, radius=r)
    for i in range(2):
        for j in range(4):
            close(y[i, :, j], projections.simplex(x[i, :, j], radius=float(r[i, 0, j])))
    a = draw(3, 1, seed=2)  # along dim 1 of x, shared over the others
    y = projections.half_space(x, 1, normal=a, offset=0.1)
    close(y[1, :, 2], projections.half_space(x[1, :, 2], normal=a[:, 0], offset=0.1))
    wide = projections.l2_ball(x[0, :, 0], radius=r[:, 0, :].reshape(8, 1))  # the radii make the batch
    assert wide.shape == (8, 3)
    assert projections.simplex(torch.zeros(()), radius=torch.ones(5, 1)).shape == (5, 1)


# --- extremes ---------------------------------------------------------------------------------------------------------


def test_simplex_keeps_its_digits_at_an_offset_and_at_any_scale():
    x = draw(100, 30)
    y = projections.simplex(x)
    close(projections.simplex(x.float() + 1e4), projections.simplex((x.float() + 1e4).double()).float(), 1e-6)
    close(projections.simplex(x * 1e30, radius=1e30), y * 1e30, 1e-12)
    close(projections.simplex(x * 1e-30, radius=1e-30) * 1e30, y, 1e-12)
    assert projections.simplex(torch.tensor([8e307, 0.0, -8e307], dtype=torch.float64)).tolist() == [1.0, 0.0, 0.0]


def test_long_rows_in_float32_are_as_good_as_their_input():
    x = torch.randn(4, 32000, generator=torch.Generator().manual_seed(0))
    for radius in (1.0, 100.0, 30000.0):
        close(projections.simplex(x, radius=radius).double(), projections.simplex(x.double(), radius=radius), 1e-5)
    close(projections.capped_simplex(x, 5000).double(), projections.capped_simplex(x.double(), 5000), 1e-4)


def test_balls_do_not_overflow():
    x = torch.tensor([3e300, 4e300], dtype=torch.float64)
    close(projections.l2_ball(x), torch.tensor([0.6, 0.8], dtype=torch.float64))
    tiny = torch.tensor([3e-320, 4e-320], dtype=torch.float64)
    assert torch.equal(projections.l2_ball(tiny, radius=1e-310), tiny)
    assert projections.l2_ball(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    close(projections.l1_ball(torch.tensor([1e308, 1e308], dtype=torch.float64)), torch.tensor([0.5, 0.5]).double())


def test_planes_do_not_care_how_their_equation_is_scaled():
    x = draw(3)
    y = projections.hyperplane(x, **PLANE)
    for scale in (1e-200, 1e200):
        close(projections.hyperplane(x, normal=scale * PLANE["normal"], offset=scale * PLANE["offset"]), y)


def test_where_a_box_is_open():
    x = draw(3, 4)
    assert torch.equal(projections.box(x, lb=-INF, ub=INF), x)
    assert torch.equal(projections.box(x, lb=0.0), x.relu())
    assert torch.equal(projections.box(x, ub=torch.zeros(4).double()), x.clamp(max=0))
    assert projections.box(x, lb=0.25, ub=0.25).eq(0.25).all()


# --- kinks: the documented element ------------------------------------------------------------------------------------


def jacobian(function, *inputs, argnum=0):
    return jacrev(function, argnum)(*(torch.tensor(t, dtype=torch.float64) for t in inputs))


def test_on_the_boundary_a_ball_and_a_half_space_are_the_identity():
    eye = torch.eye(2).double()
    close(jacobian(projections.l2_ball, [0.6, 0.8]), eye)
    close(jacobian(projections.l1_ball, [0.5, -0.5]), eye)
    close(jacobian(lambda x: projections.half_space(x, normal=torch.ones(2).double(), offset=1.0), [0.25, 0.75]), eye)
    close(jacobian(lambda x: projections.box(x, lb=0.0, ub=1.0), [0.0, 1.0]), eye)


def test_an_entry_of_the_simplex_at_zero_is_not_of_the_support():
    J = jacobian(projections.simplex, [1.0, 0.0, 0.0])  # the other two are just about to enter
    close(J, torch.zeros(3, 3).double())
    J = jacobian(projections.simplex, [0.5, 0.5, 0.0])
    close(J, torch.tensor([[0.5, -0.5, 0.0], [-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]).double())


def test_a_vertex_of_the_capped_simplex_moves_with_k_only():
    x = torch.tensor([4.0, 3.5, 0.5, 0.25, -1.0]).double()
    k = torch.tensor([2.0]).double()

    def project(x, k):
        return projections.capped_simplex(x, k)

    assert project(x, k).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    close(jacrev(project)(x, k), torch.zeros(5, 5).double())
    by_differences = (project(x, k + 1e-6) - project(x, k - 1e-6)) / 2e-6
    close(jacrev(project, 1)(x, k)[:, 0], by_differences, 1e-6)  # the mean of both sides
    close(by_differences, torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0]).double(), 1e-6)
    full, empty = torch.tensor([5.0]).double(), torch.tensor([0.0]).double()
    assert project(x, full).tolist() == [1.0] * 5 and project(x, empty).tolist() == [0.0] * 5
    close(jacrev(project, 1)(x, full)[:, 0], torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]).double())
    close(jacrev(project, 1)(x, empty)[:, 0], torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_k_of_separated_scores_is_exact_and_flat(dtype):
    x = 100 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()
    for k in (1, 7, 49):
        y = projections.capped_simplex(x, k)
        ordered = x.detach().sort(-1, descending=True).values
        clear = ordered[:, k - 1] - ordered[:, k] > 1.01  # then no entry is strictly between its bounds
        hard = torch.zeros_like(x).scatter(-1, x.topk(k).indices, 1.0)
        assert bool(clear.any()) and torch.equal(y[clear], hard[clear])
        (g,) = torch.autograd.grad((y * x.detach()).sum(), x)
        assert not g[clear].any()


def test_a_closed_box_and_capped_entries_of_zero_width():
    x, u = draw(6), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 0.0]).double().requires_grad_()
    y = projections.capped_simplex(x, 1.5, cap=u)
    close(y[u == 0], torch.zeros(3).double())
    close(y.sum(), torch.tensor(1.5).double())
    assert projections.capped_simplex(x, 0.0, cap=0.0).eq(0).all()


# --- wrong gradients are seen, wrong arguments are refused ------------------------------------------------------------


def test_a_planted_wrong_support_is_caught(monkeypatch):
    right = simplices._support
    monkeypatch.setattr(simplices, "_support", lambda z, r: right(z, 0.5 * r))
    monkeypatch.setattr(simplices, "_onto_simplex", simplices._by_sorting)
    with pytest.raises(AssertionError):
        check_optimal("simplex", draw(5, 4), torch.ones(5, 1).double(), torch.ones(5, 4).double())


@pytest.mark.parametrize("name", ["simplex", "l1_ball"])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("n", [1, 2, 33, 4096])
def test_newton_and_sort_agree_in_value_and_every_derivative(name, dtype, tol, n, monkeypatch):
    x, g, t = (draw(6, n, seed=s).to(dtype) for s in range(3))
    r = (n * draw(6, 1, seed=3).sigmoid() / 4).to(dtype)

    def everything():
        one, two = x.clone().requires_grad_(), r.clone().requires_grad_()
        y = getattr(projections, name)(one, radius=two)
        first = torch.autograd.grad(y, (one, two), g, create_graph=True)
        moved = [
            torch.autograd.functional.jvp(lambda x: getattr(projections, name)(x, radius=r), x, t)[1],
            torch.autograd.functional.jvp(lambda r: getattr(projections, name)(x, radius=r), r, t[:, :1])[1],
        ]
        with torch.autograd.forward_ad.dual_level():
            pair = torch.autograd.forward_ad.make_dual(x, t), torch.autograd.forward_ad.make_dual(r, t[:, :1])
            tangent = torch.autograd.forward_ad.unpack_dual(getattr(projections, name)(pair[0], radius=pair[1])).tangent
        turned = getattr(projections, name)(x.mT, 0, radius=r.mT).mT
        return [y.detach(), *(f.detach() for f in first), *moved, tangent, turned, y.sum(-1).detach()]

    by_newton = everything()
    monkeypatch.setattr(simplices, "_onto_simplex", simplices._by_sorting)
    for found, expected in zip(by_newton, everything(), strict=True):
        close(found, expected, tol * (1 + n**0.5))
    assert torch.equal(by_newton[0] > 0, everything()[0] > 0) or dtype == torch.float32


def test_the_simplex_is_sparsemax_at_temperature_one():
    x = draw(5, 300).float()
    assert torch.equal(projections.simplex(x), il.sparsemax(x))


def test_a_planted_wrong_gradient_is_caught(monkeypatch):
    x = draw(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(projections.simplex, x)
    right = simplices.tangent
    monkeypatch.setattr(simplices, "tangent", lambda s, v: 1.01 * right(s, v))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(projections.simplex, x)
    monkeypatch.undo()
    monkeypatch.setattr(simplices, "_onto_simplex", simplices._by_sorting)
    assert torch.autograd.gradcheck(projections.simplex, x)
    monkeypatch.setattr(simplices, "kept_within", lambda y, lower: 1.01 * y - 0.01 * y.detach())
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(projections.simplex, x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: projections.simplex(x, radius=0.0), ArgumentError, "radius.* must be positive"),
        (lambda x: projections.l2_ball(x, radius=torch.tensor([[1.0], [-1.0]])), ArgumentError, r"radius\[1, 0\]"),
        (lambda x: projections.l1_ball(x, radius=math.nan), NonFiniteError, "radius is nan"),
        (lambda x: projections.simplex(x, radius=True), ArgumentTypeError, "radius must be a number or a tensor"),
        (lambda x: projections.simplex(x, radius=torch.ones(3)), ShapeError, "radius has size 3"),
        (lambda x: projections.simplex(x, radius=torch.ones(5, 1)), ShapeError, "does not broadcast"),
        (lambda x: projections.simplex(x, radius=torch.ones(1).double()), DtypeError, "radius is torch.float64"),
        (lambda x: projections.simplex(x / 0), NonFiniteError, r"x\[0, 0\] must be finite, got inf"),
        (lambda x: projections.simplex(x.long()), DtypeError, "x must be a floating-point tensor"),
        (lambda x: projections.simplex(x, 2), ShapeError, "dim must be in"),
        (lambda x: projections.simplex(x[:, :0]), ShapeError, "no entries along dim"),
        (
            lambda x: projections.capped_simplex(x, 4),
            ArgumentError,
            "k.* must be between 0 and the sum of the caps, got 4",
        ),
        (lambda x: projections.capped_simplex(x, -1), ArgumentError, "k.* must be between 0"),
        (lambda x: projections.capped_simplex(x, 1, cap=INF), ArgumentError, "cap.* must be finite"),
        (lambda x: projections.box(x), ArgumentError, "without bounds"),
        (lambda x: projections.box(x, lb=1.0, ub=0.0), ArgumentError, "ub - lb.* must not be negative"),
        (lambda x: projections.box(x, lb=torch.ones(4)), ShapeError, "do not broadcast"),
        (lambda x: projections.box(x, lb="0"), ArgumentTypeError, "lb must be a number"),
        (lambda x: projections.half_space(x, normal=torch.zeros(3), offset=1.0), ArgumentError, "normal of zeros"),
        (lambda x: projections.hyperplane(x, normal=[1.0], offset=1.0), ArgumentTypeError, "normal must be a tensor"),
        (lambda x: projections.hyperplane(x, normal=torch.ones(4), offset=1.0), ShapeError, "normal has size 4"),
        (lambda x: projections.isotonic(x, weight=0.0), ArgumentError, "weight.* must be positive"),
        (lambda x: projections.permutahedron(x, 1.0), ArgumentTypeError, "w must be a tensor"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3))


def test_a_bad_point_spoils_no_neighbour_where_values_cannot_be_checked():
    x = draw(3, 4)
    x[1, 2] = math.nan
    for name in ("simplex", "l1_ball", "l2_ball", "capped_simplex", "half_space", "hyperplane"):
        y = torch.func.vmap(EACH[name])(x)
        assert bool(y[1].isnan().any()), name
        close(y[[0, 2]], EACH[name](x[[0, 2]]))
