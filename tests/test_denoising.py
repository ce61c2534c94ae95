"""The denoising task: its layer is the program it states, its signals are what they claim, learning D helps."""

from __future__ import annotations

import json
from pathlib import Path

import cvxpy
import numpy as np
import pytest
import torch

from benchmarks import denoising
from benchmarks.denoising import (
    NOISE,
    RESULTS,
    OneD,
    OwnD,
    differences,
    error,
    estimate,
    signals,
    total_variation,
    train,
)
from implicit_layers.testing import check_gradients


def test_the_layer_is_the_program_it_states():
    drawn = signals(3, seed=1, length=20)
    D = torch.cat([20 * differences(20), torch.randn(5, 20, dtype=torch.float64)])
    found = estimate(D, drawn.noisy)
    for z, y in zip(found.numpy(), drawn.noisy.numpy(), strict=True):
        variable = cvxpy.Variable(20)
        objective = 0.5 * cvxpy.sum_squares(variable - y) + cvxpy.norm1(D.numpy() @ variable)
        cvxpy.Problem(cvxpy.Minimize(objective)).solve(solver=cvxpy.CLARABEL)
        np.testing.assert_allclose(z, variable.value, atol=1e-2)  # the rounded corner


def test_the_derivative_in_d():
    y = torch.tensor([[0.0, 3.0, 1.0, 5.0]], dtype=torch.float64)
    D = torch.tensor([[-1.0, 1.1, 0, 0], [0, -0.9, 1, 0], [0, 0, -1, 1.2]], dtype=torch.float64)
    check_gradients(estimate, D, y, second=False, atol=1e-5)


def test_signals_are_piecewise_constant():
    drawn = signals(200, seed=2)
    jumps = (drawn.clean @ differences(100).mT).abs() > 1e-9
    assert jumps.sum(-1).max() == 9 and jumps.sum(-1).min() == 0
    assert drawn.clean.min() >= 10.0 and drawn.clean.max() <= 100.0
    assert abs(float((drawn.noisy - drawn.clean).std()) - NOISE) < 0.2
    assert torch.equal(drawn.noisy, signals(200, seed=2).noisy)
    assert not torch.equal(drawn.noisy, signals(200, seed=3).noisy)


def test_models_start_near_total_variation_and_constants_cost_nothing():
    y = signals(4, seed=5, length=30).noisy
    plain = estimate(20 * differences(30), y)
    torch.testing.assert_close(OwnD(20.0, 30)(y, plain).detach(), plain)
    D = OneD(20.0, 30).D().detach()
    assert (D.sum(-1).abs() < 1e-9).all()
    assert float((estimate(D, y) - plain).square().mean()) < 0.5 * float((y - plain).square().mean())


@pytest.mark.parametrize(("kind", "lr"), [(OneD, 0.3), (OwnD, 0.02)], ids=["one D", "own D"])
def test_a_short_training_beats_total_variation(kind, lr):
    _, training, test = total_variation(signals(150, 0, 30), signals(100, 1, 30), tuned_on=150)
    torch.manual_seed(0)
    row = train(kind(20.0, 30), training, test, steps=40, batch=25, lr=lr, seed=0, every=40)
    assert row["test_mse"] < float(error(test.first, test.clean))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert denoising.main(["--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "denoising-quick.json").read_text(encoding="utf-8"))
    assert result["quick"] and len(result["rows"]) == 4
    assert "of total variation" in capsys.readouterr().out


def test_the_committed_result_is_good():
    result = json.loads((RESULTS / "denoising.json").read_text(encoding="utf-8"))
    found = {row["model"]: row["test_mse"] for row in result["rows"]}
    assert found["one learned D"] < found["total variation"] < 0.25 * found["no denoising"]
    assert found["a learned D for each signal"] < 0.85 * found["total variation"]
