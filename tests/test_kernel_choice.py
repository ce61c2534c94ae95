"""The kernels that numba and C++ are compared by are Cholesky factorisations, and the comparison runs without numba."""

import json

import numpy as np
import pytest

from benchmarks import kernel_choice


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("block", [0, 1, 2, 3])
def test_the_python_of_the_kernels_factorises(block, n):
    factor = kernel_choice.functions(kernel_choice.written_out(block)) if block else kernel_choice.plain
    matrices = kernel_choice.positive_definite(n, 16)
    L = kernel_choice.lanes_of(np.zeros_like(matrices))
    factor(kernel_choice.lanes_of(matrices), L)
    np.testing.assert_allclose(kernel_choice.matrices_of(L), np.linalg.cholesky(matrices), atol=1e-13)


def test_a_quick_run_says_what_it_found(tmp_path):
    assert kernel_choice.main(["--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "kernel_choice-quick.json").read_text(encoding="utf-8"))
    measured = [row for row in result["rows"] if "ms" in row]
    absent = {row["kernel"] for row in result["rows"] if row.get("status") == "not installed"}
    assert {row["kernel"] for row in measured} | absent == {name for name in kernel_choice.KERNELS if "out" not in name}
    assert all(row["error"] < 1e-13 and row["ms"] > 0 for row in measured)
    assert {row["kernel"] for row in measured} == set(result["costs"])
