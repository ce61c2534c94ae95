"""Settings out of their range where the host may not look: NaN for that problem alone, as for bad scores."""

import pytest
import torch

import implicit_layers as il

INF = float("inf")
OPERATIONS = {
    "softmax": (lambda x, s: il.softmax(x, temperature=s), 0.5, [-5.0, 0.0, float("nan")]),
    "sparsemax": (lambda x, s: il.sparsemax(x, temperature=s), 0.5, [-5.0, 0.0]),
    "entmax, temperature": (lambda x, s: il.entmax(x, 1.3, temperature=s), 0.5, [-5.0, 0.0]),
    "entmax, 4, temperature": (lambda x, s: il.entmax(x, 4.0, temperature=s), 0.5, [-5.0, 0.0]),
    "entmax, alpha": (lambda x, s: il.entmax(x, s), 1.7, [0.5, -1.0, INF]),
    "soft_top_k": (lambda x, s: il.soft_top_k(x, s), 1.5, [5.0, -1.0]),
    "soft_top_k, euclidean": (lambda x, s: il.soft_top_k(x, s, regulariser="euclidean"), 1.5, [5.0, -1.0]),
    "soft_top_k, temperature": (lambda x, s: il.soft_top_k(x, 1, temperature=s), 0.5, [-1.0, 0.0]),
    "capped_simplex": (lambda x, s: il.projections.capped_simplex(x, s), 1.5, [5.0, -1.0]),
    "capped_simplex, cap": (lambda x, s: il.projections.capped_simplex(x, 1.0, cap=s), 0.5, [-1.0, 0.1, INF]),
    "simplex": (lambda x, s: il.projections.simplex(x, radius=s), 0.5, [-5.0, 0.0, INF]),
    "l1_ball": (lambda x, s: il.projections.l1_ball(x, radius=s), 0.5, [-5.0, 0.0, INF]),
    "box": (lambda x, s: il.projections.box(x, lb=s, ub=0.0), -0.5, [5.0]),
    "soft_rank": (lambda x, s: il.soft_rank(x, temperature=s), 0.5, [-5.0, 0.0]),
    "soft_sort": (lambda x, s: il.soft_sort(x, temperature=s), 0.5, [-5.0, 0.0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_setting_out_of_range_under_vmap_gives_nan_for_its_problem_alone(name, dtype):
    operation, good, bad = OPERATIONS[name]
    settings = torch.tensor([good, *bad], dtype=dtype)[:, None]
    x = torch.tensor([0.3, -0.2, 1.0], dtype=dtype).expand(len(settings), 3)
    y = torch.func.vmap(operation)(x, settings)
    torch.testing.assert_close(y[0], operation(x[0], settings[0]))
    assert y[0].isfinite().all() and y[1:].isnan().all(), y
    for one in settings[1:]:
        with pytest.raises(ValueError):
            operation(x[0], one)
