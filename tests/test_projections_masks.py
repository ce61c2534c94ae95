"""Masks on projections and soft order: what is left out counts as absent, in value and in every derivative."""

import itertools

import pytest
import torch
from torch.func import jacrev

import implicit_layers as il
from implicit_layers import projections
from implicit_layers.errors import ArgumentError, DtypeError, InfeasibleError, ShapeError

# a function of rows x (n,), entries e (n,) and a mask
EACH = {
    "simplex": lambda x, e, mask: projections.simplex(x, radius=0.7, mask=mask),
    "l1_ball": lambda x, e, mask: projections.l1_ball(x, radius=0.7, mask=mask),
    "l2_ball": lambda x, e, mask: projections.l2_ball(x, radius=0.7, mask=mask),
    "capped_simplex": lambda x, e, mask: projections.capped_simplex(x, 0.4, cap=0.3 + e.sigmoid(), mask=mask),
    "half_space": lambda x, e, mask: projections.half_space(x, normal=e, offset=-0.5, mask=mask),
    "hyperplane": lambda x, e, mask: projections.hyperplane(x, normal=e, offset=-0.5, mask=mask),
    "isotonic": lambda x, e, mask: projections.isotonic(x, weight=e.exp(), mask=mask),
    "isotonic, decreasing": lambda x, e, mask: projections.isotonic(x, weight=e.exp(), decreasing=True, mask=mask),
    "permutahedron": lambda x, e, mask: projections.permutahedron(x, e, mask=mask),
    "soft_rank": lambda x, e, mask: il.soft_rank(x, temperature=0.6, mask=mask),
    "soft_rank, descending": lambda x, e, mask: il.soft_rank(x, temperature=0.6, descending=True, mask=mask),
    "soft_sort": lambda x, e, mask: il.soft_sort(x, temperature=0.6, mask=mask),
    "soft_sort, descending": lambda x, e, mask: il.soft_sort(x, temperature=0.6, descending=True, mask=mask),
}
every = pytest.mark.parametrize("name", EACH)


def draw(*shape, seed=0):
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, tol=1e-11):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


@every
def test_it_is_the_operation_on_what_is_left(name):
    n = 6
    x, e, g = draw(n), draw(n, seed=1), draw(n, seed=2)
    for bits in itertools.product([False, True], repeat=n):
        mask = torch.tensor(bits)
        if not mask.any():
            continue
        m = int(mask.sum())
        places = torch.arange(m) if "sort" in name else mask.nonzero().squeeze(-1)
        one, two = x.clone().requires_grad_(), e.clone().requires_grad_()
        y = EACH[name](one, two, mask)
        left_x, left_e = x[mask].requires_grad_(), e[mask].requires_grad_()
        expected = EACH[name](left_x, left_e, None)
        close(y[places], expected)
        assert int((y.detach() != 0).sum()) == int((expected.detach() != 0).sum())  # zeros elsewhere
        found = torch.autograd.grad(y, (one, two), g, allow_unused=True, materialize_grads=True)
        right = torch.autograd.grad(expected, (left_x, left_e), g[places], allow_unused=True, materialize_grads=True)
        for whole, part in zip(found, right, strict=True):
            close(whole[mask], part)
            assert not whole[~mask].any()


@every
def test_what_is_masked_may_be_anything_and_rows_have_masks_of_their_own(name):
    x, e, mask = draw(4, 1, 5), draw(5, seed=1), draw(3, 5, seed=3) > -0.5
    assert bool(mask.any(-1).all()) and not bool(mask.all())
    y = EACH[name](x, e, mask)
    assert y.shape == (4, 3, 5)
    for i, j in itertools.product(range(4), range(3)):
        close(y[i, j], EACH[name](x[i, 0], e, mask[j]))
    wild = torch.where(mask, x, float("nan")).requires_grad_()
    again = EACH[name](wild, e, mask)
    assert torch.equal(again, y)
    (gradient,) = torch.autograd.grad(again.square().sum(), wild)
    assert bool(gradient.isfinite().all()) and not gradient[(~mask).expand_as(gradient)].any()
    all_true = torch.ones(5, dtype=torch.bool)
    close(EACH[name](x, e, all_true), EACH[name](x, e, None))


@every
def test_derivatives_of_both_modes_and_maps(name):
    x, e, mask = draw(5), draw(5, seed=1), torch.tensor([True, False, True, True, False])

    def function(x):
        return EACH[name](x, e, mask)

    x.requires_grad_()
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x)
    plain = x.detach()
    by_rows = torch.stack([torch.autograd.grad(function(x), x, row)[0] for row in torch.eye(5).double()])
    close(jacrev(function)(plain), by_rows)
    masks = torch.stack([mask, ~mask, mask | True])
    close(
        torch.func.vmap(lambda m: EACH[name](plain, e, m))(masks),
        torch.stack([EACH[name](plain, e, m) for m in masks]),
    )


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_and_axes(name, dtype):
    x, e, mask = draw(3, 5), draw(5, seed=1), draw(3, 5, seed=3) > -0.5
    y = EACH[name](x.to(dtype), e.to(dtype), mask)
    assert y.dtype == dtype
    close(
        y.double(),
        EACH[name](x.to(dtype).double(), e.to(dtype).double(), mask),
        2e-3 if dtype == torch.float16 else 1e-5,
    )


@every
def test_a_mask_without_entries_or_of_another_kind_is_refused(name):
    x, e = draw(2, 3), draw(3, seed=1)
    none = torch.tensor([[True, False, True], [False, False, False]])
    with pytest.raises(ArgumentError, match=r"mask\[1, 0\] must leave at least one entry of each point"):
        EACH[name](x, e, none)
    with pytest.raises(DtypeError, match="mask must be a boolean tensor"):
        EACH[name](x, e, none.double())
    with pytest.raises(ShapeError, match=r"mask of shape \(2,\) does not broadcast with x"):
        EACH[name](x, e, none[:, 0])
    y = torch.func.vmap(lambda m: EACH[name](x[0], e, m))(none)
    close(y[0], EACH[name](x[0], e, none[0]))
    assert bool(y[1].isnan().any())


def test_any_dim():
    x, mask = draw(3, 4), draw(3, 4, seed=3) > -1
    for function in (projections.simplex, projections.l1_ball, projections.isotonic, il.soft_rank, il.soft_sort):
        close(function(x.mT, 0, mask=mask.mT).mT, function(x, mask=mask))
    assert projections.simplex(torch.tensor(3.0), mask=torch.tensor(True)).item() == 1.0


def test_modules_pass_the_mask_on():
    x, mask = draw(3, 4), draw(3, 4, seed=3) > -1
    close(il.nn.Projection(projections.simplex, radius=0.3)(x, mask), projections.simplex(x, radius=0.3, mask=mask))
    close(il.nn.SoftRank(temperature=0.3)(x, mask), il.soft_rank(x, temperature=0.3, mask=mask))
    close(il.nn.SoftSort(temperature=0.3)(x, mask=mask), il.soft_sort(x, temperature=0.3, mask=mask))


# --- the Birkhoff polytope --------------------------------------------------------------------------------------------


def qp_on_a_face(X, mask):
    """The same projection by `solve_qp` in the entries that are allowed."""
    n = len(X)
    rows, columns = mask.nonzero(as_tuple=True)
    A = torch.stack([(rows == i).double() for i in range(n)] + [(columns == j).double() for j in range(n - 1)])
    eye = torch.eye(len(rows)).double()
    z = il.solve_qp(eye, -X[mask], A=A, b=torch.ones(2 * n - 1).double(), lb=torch.zeros(len(rows)).double()).z
    return torch.zeros_like(X).masked_scatter(mask, z)


@pytest.mark.parametrize("seed", range(4))
def test_forbidden_assignments(seed):
    X, G = draw(5, 5, seed=seed) / 2, draw(5, 5, seed=seed + 10)
    mask = (draw(5, 5, seed=seed + 20) > -0.5) | torch.eye(5).bool().roll(seed, 0)
    one, two = X.clone().requires_grad_(), X.clone().requires_grad_()
    Y, expected = projections.birkhoff(one, mask=mask), qp_on_a_face(two, mask)
    close(Y, expected, 1e-8)
    assert not Y[~mask].any()
    close(*(torch.autograd.grad(y, x, G)[0] for y, x in ((Y, one), (expected, two))), 1e-6)
    assert torch.autograd.gradcheck(lambda X: projections.birkhoff(X, mask=mask), one, check_forward_ad=True)
    wild = torch.where(mask, X, float("inf"))
    close(projections.birkhoff(torch.stack([wild, X]), mask=mask)[0], Y)
    close(torch.func.vmap(lambda m: projections.birkhoff(X, mask=m))(mask.expand(2, 5, 5))[1], Y)


def test_masks_without_a_permutation_are_infeasible():
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = mask[2] = torch.tensor([True, False, False, False])  # two rows want the one column
    X = draw(4, 4)
    with pytest.raises(InfeasibleError, match="birkhoff"):
        projections.birkhoff(X, mask=mask)
    both = torch.stack([mask, torch.eye(4).bool()])
    Y = projections.birkhoff(X, mask=both, on_failure="ignore")
    close(Y[1], torch.eye(4).double())
    mask[2] = False
    with pytest.raises(ArgumentError, match=r"mask\[2\] must leave at least one entry of each row"):
        projections.birkhoff(X, mask=mask)
    with pytest.raises(ArgumentError, match=r"mask\[3\] must leave at least one entry of each column"):
        projections.birkhoff(X, mask=torch.tensor([True, True, True, False]).expand(4, 4))
