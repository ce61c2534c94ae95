"""Each check names the argument, what is wrong with it, and where."""

from __future__ import annotations

import functools
import inspect
import linecache

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st

from implicit_layers import checks, errors
from implicit_layers.errors import DeviceError, DtypeError, NonFiniteError, ShapeError
from implicit_layers.solution import SolveInfo, report_failure

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_floating_tensors_returns_the_common_dtype_and_device(dtype):
    Q, p = torch.eye(2, dtype=dtype), torch.nn.Parameter(torch.ones(2, dtype=dtype))
    assert checks.floating_tensors(Q=Q, p=p) == (dtype, torch.device("cpu"))


@pytest.mark.parametrize("other", [[1.0, 2.0], 1.0, None, "p"])
def test_what_is_no_tensor_is_refused(other):
    with pytest.raises(DtypeError, match=rf"p must be a torch.Tensor, got {type(other).__name__}; .*as_tensor\(p\)"):
        checks.floating_tensors(Q=torch.eye(2), p=other)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.uint8])
def test_integers_are_refused(dtype):
    with pytest.raises(DtypeError, match=rf"p must be a floating-point tensor, got {dtype}; convert it: p.double\(\)"):
        checks.floating_tensors(Q=torch.eye(2), p=torch.ones(2, dtype=dtype))


def test_complex_numbers_are_refused_without_advice_that_loses_half_of_them():
    with pytest.raises(DtypeError, match=r"Q must be real, got torch.complex64; give its real and imaginary parts"):
        checks.floating_tensors(Q=torch.eye(2, dtype=torch.complex64))


def test_mixed_dtypes_name_both():
    with pytest.raises(DtypeError, match=r"b is torch.float32 but Q is torch.float64"):
        checks.floating_tensors(Q=torch.eye(2).double(), p=torch.ones(2).double(), b=torch.ones(1))


def test_mixed_devices_name_both():
    with pytest.raises(DeviceError, match=r"p is on meta but Q is on cpu; move it, e.g. p.to\(Q.device\)"):
        checks.floating_tensors(Q=torch.eye(2), p=torch.ones(2, device="meta"))


def test_no_tensor_at_all_is_refused():
    with pytest.raises(DtypeError, match="at least one tensor"):
        checks.floating_tensors()


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.tensor([1.0, float("nan"), 2.0]), r"p\[1\] is nan: 1 of 3 entries of p is not finite"),
        (torch.tensor([[1.0, 2.0], [float("inf"), float("nan")]]), r"p\[1, 0\] is inf: 2 of 4 entries of p are not"),
        (torch.tensor([float("-inf")]), r"p\[0\] is -inf: 1 of 1 entries"),
        (torch.tensor([float("inf")], requires_grad=True), r"p\[0\] is inf: 1 of 1 entries of p is not finite"),
        (torch.tensor(float("nan")), r"p is nan: 1 of 1 entries of p is not finite"),
        (torch.tensor([1.0, float("nan")], dtype=torch.bfloat16), r"p\[1\] is nan"),
    ],
)
def test_finite_names_the_argument_and_the_first_index(tensor, says):
    with pytest.raises(NonFiniteError, match=says):
        checks.finite(Q=torch.eye(2), p=tensor)


def test_finite_accepts_numbers_empty_tensors_and_nothing():
    checks.finite(Q=torch.eye(2), p=torch.zeros(0), huge=torch.tensor(1e38), b=torch.zeros(0, 3))
    checks.finite()


def test_finite_waits_once_for_all_arguments(host_syncs):
    with host_syncs() as syncs:
        checks.finite(Q=torch.eye(2), p=torch.ones(2), G=torch.ones(3, 2), h=torch.ones(3))
    assert syncs.count == 1, syncs


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    data=st.data(),
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
def test_index_of_is_the_first_bad_entry(shape, data, bad):
    index = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    tensor = torch.zeros(shape)
    tensor[index] = bad
    assert checks.index_of(~torch.isfinite(tensor)) == f"[{', '.join(map(str, index))}]"
    tensor[tuple(size - 1 for size in shape)] = bad  # a later one does not change the answer
    assert checks.index_of(~torch.isfinite(tensor)) == f"[{', '.join(map(str, index))}]"


@pytest.mark.parametrize(
    ("Q", "p", "expected"),
    [
        ((3, 3), (3,), ()),
        ((5, 3, 3), (3,), (5,)),
        ((3, 3), (5, 3), (5,)),
        ((2, 1, 3, 3), (5, 3), (2, 5)),
        ((0, 3, 3), (1, 3), (0,)),
        ((4, 0, 3, 3), (3,), (4, 0)),
    ],
)
def test_batch_shape_broadcasts(Q, p, expected):
    assert checks.batch_shape(Q=(torch.zeros(Q), 2), p=(torch.zeros(p), 1)) == expected


def test_batch_shapes_that_do_not_broadcast_name_the_argument():
    with pytest.raises(ShapeError, match=r"\(4,\) of p \(shape \(4, 3\)\) do not broadcast with \(5,\)"):
        checks.batch_shape(Q=(torch.zeros(5, 3, 3), 2), p=(torch.zeros(4, 3), 1))


def test_too_few_dimensions_name_the_argument():
    with pytest.raises(ShapeError, match=r"Q must have at least 2 dimensions, got shape \(3,\)"):
        checks.batch_shape(Q=(torch.zeros(3), 2))


def test_trailing_shape():
    checks.trailing_shape("G", torch.zeros(7, 2, 3), (2, 3), "to match h and p")
    with pytest.raises(ShapeError, match=r"G must have shape \(\*B, 2, 3\) to match h and p, got \(7, 3, 2\)"):
        checks.trailing_shape("G", torch.zeros(7, 3, 2), (2, 3), "to match h and p")
    with pytest.raises(ShapeError, match=r"G must have shape \(\*B, 2, 3\) .* got \(3,\)"):
        checks.trailing_shape("G", torch.zeros(3), (2, 3), "to match h and p")


ERRORS = [error for _, error in inspect.getmembers(errors, inspect.isclass) if error.__module__ == errors.__name__]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_caught_by_our_base_and_by_a_builtin(error):
    assert error.__doc__
    if issubclass(error, Warning):
        assert issubclass(error, errors.ImplicitLayersWarning) and issubclass(error, UserWarning)
    else:
        assert issubclass(error, errors.ImplicitLayersError)
        builtin = (ValueError, TypeError, RuntimeError, ImportError)
        assert error is errors.ImplicitLayersError or issubclass(error, builtin)


def test_a_warning_points_at_the_users_line_through_our_code_and_pytorchs():
    failed = SolveInfo(torch.ones(1), torch.zeros(1, dtype=torch.bool), torch.ones(1), torch.ones(1))
    warn = functools.partial(report_failure, failed, "warn", what="deep", tol=1e-8, max_iter=1)
    with pytest.warns(errors.ConvergenceWarning) as caught:
        torch.utils.checkpoint.checkpoint(warn, use_reentrant=False)
    assert caught[0].filename == __file__
    assert linecache.getline(__file__, caught[0].lineno).strip().startswith("torch.utils.checkpoint")
