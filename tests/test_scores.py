"""The family's door: masks, problems without entries, axes and settings, the same for every member."""

import math

import pytest
import torch

import implicit_layers as il

INF = math.inf
MEMBERS = {
    "softmax": il.softmax,
    "softmax, newton": lambda x, **more: il.softmax(x, method="newton", **more),
    "softmax, kkt": lambda x, **more: il.softmax(x, method="kkt", **more),
    "softmax, float32": lambda x, **more: il.softmax(x.float(), **more).double(),
    "sparsemax": il.sparsemax,
    "entmax 1": lambda x, **more: il.entmax(x, 1.0, **more),
    "entmax 1.5": il.entmax,
    "entmax 1.3": lambda x, **more: il.entmax(x, 1.3, **more),
    "soft_top_k": lambda x, **more: il.soft_top_k(x, 1, **more),
    "soft_top_k, euclidean": lambda x, **more: il.soft_top_k(x, 1, regulariser="euclidean", **more),
    "entropy": lambda x, **more: il.regularized_argmax(x, "entropy", **more),
}
each = pytest.mark.parametrize("member", MEMBERS)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@each
def test_a_mask_takes_entries_out(member):
    function, x = MEMBERS[member], draw(3, 5).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    y = function(x, mask=mask)
    close(y, function(x.masked_fill(~mask, -INF)))
    (p,) = torch.autograd.grad(y, x, draw(3, 5, seed=1))
    assert bool((y[~mask] == 0).all()) and bool((p[~mask] == 0).all()) and bool(p.isfinite().all())
    for i in range(3):
        close(y[i, mask[i]], function(x[i, mask[i]]))
    assert float(y[1, 3].detach()) == pytest.approx(1.0) and bool((p[1].abs() < 1e-12).all())


@each
def test_a_mask_broadcasts(member):
    function, x = MEMBERS[member], draw(2, 4)
    wide, narrow = torch.rand(3, 2, 4) < 0.5, torch.tensor([True, False, True, True])
    wide[..., 0] = True
    assert function(x, mask=wide).shape == (3, 2, 4)
    close(function(x, mask=wide)[2], function(x, mask=wide[2]))
    close(function(x, mask=narrow), function(x.masked_fill(~narrow, -INF)))
    close(function(x, dim=0, mask=wide.mT[0].mT[:, :1] | True), function(x, dim=0))


@each
def test_a_problem_without_entries_is_refused_by_name(member):
    x = draw(2, 3, 4)
    x[1, 2] = -INF
    with pytest.raises(ValueError, match=r"1 of 6 problems have only -inf scores, first at index \[1, 2\].*uniform"):
        MEMBERS[member](x)
    with pytest.raises(ValueError, match=r"first at index \[1, 2\]"):
        MEMBERS[member](x.nan_to_num(neginf=0.0), mask=x.isfinite())


@each
@pytest.mark.parametrize(("empty", "value"), [("uniform", 0.25), ("zeros", 0.0)])
def test_a_problem_without_entries_gets_what_is_asked_for(member, empty, value):
    function, x = MEMBERS[member], draw(3, 4)
    x[1] = -INF
    x = x.requires_grad_()
    y = function(x, empty=empty)
    close(y[1], torch.full((4,), value, dtype=torch.float64))
    close(y[::2], function(x[::2]))
    (p,) = torch.autograd.grad(y, x, draw(3, 4, seed=1))
    assert bool((p[1] == 0).all())
    close(p[::2], torch.autograd.grad(function(x[::2]), x, draw(3, 4, seed=1)[::2])[0][::2])
    turned = function(x.mT, dim=0, empty=empty)
    close(turned, y.mT)
    tau = torch.full((2, 1, 1), 0.7, dtype=x.dtype if "float32" not in member else torch.float32, requires_grad=True)
    both = function(x, temperature=tau, empty=empty)
    assert both.shape == (2, 3, 4)
    close(both[:, 1], torch.full((2, 4), value, dtype=torch.float64))
    assert bool(torch.autograd.grad(both[:, 1].sum(), tau)[0].abs().max() == 0)


@each
def test_one_problem_without_dimensions(member):
    function = MEMBERS[member]
    for empty, value in (("uniform", 1.0), ("zeros", 0.0)):
        y = function(torch.tensor(-INF, dtype=torch.float64), dim=0, empty=empty)
        assert y.shape == () and float(y) == value
    assert float(function(torch.tensor(2.0, dtype=torch.float64))) == 1


@each
def test_bad_values_are_named_even_where_empty_problems_are_welcome(member):
    for empty in ("raise", "uniform", "zeros"):
        for bad in (math.nan, INF):
            x = draw(2, 3)
            x[1, 2] = bad
            with pytest.raises(il.NonFiniteError, match=r"x\[1, 2\]"):
                MEMBERS[member](x, empty=empty)
        with pytest.raises(ValueError, match="temperature"):
            tau = torch.tensor(-1.0, dtype=torch.float32 if "float32" in member else torch.float64)
            MEMBERS[member](draw(2, 3), empty=empty, temperature=tau)


@each
def test_bad_arguments(member):
    function, x = MEMBERS[member], draw(2, 3)
    with pytest.raises(ValueError, match="empty must be one of"):
        function(x, empty="nan")
    with pytest.raises(il.DtypeError, match="boolean"):
        function(x, mask=torch.ones(2, 3))
    with pytest.raises(il.DtypeError, match="boolean"):
        function(x, mask=[True, False, True])
    with pytest.raises(il.ShapeError, match="mask"):
        function(x, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(il.ShapeError, match="dim"):
        function(x, dim=2)
    with pytest.raises(il.ShapeError, match="no entries"):
        function(x[:, :0])
    with pytest.raises(il.ShapeError, match="temperature"):
        function(x, temperature=torch.ones(3, dtype=torch.float32 if "float32" in member else torch.float64))


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(member, dtype):
    if "float32" in member:
        member = "softmax"
    x = (3 * draw(4, 300)).to(dtype).requires_grad_()
    tau = torch.tensor(0.7, requires_grad=True)
    y = MEMBERS[member](x, temperature=tau)
    p, q = torch.autograd.grad(y.float().square().sum(), (x, tau))
    assert (y.dtype, p.dtype, q.dtype) == (dtype, dtype, torch.float32)
    torch.testing.assert_close(y, MEMBERS[member](x.detach().float(), temperature=0.7).to(dtype))
    assert float((y.detach().double().sum(-1) - 1).abs().max()) < 300 * torch.finfo(dtype).eps / 8
