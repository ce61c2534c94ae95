"""How wrong a gradient is for an inexact inner solution: first or second order; and what the script writes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.plot import draw
from benchmarks.vae_gradients import Setting, costs, main, orders, slope


@pytest.fixture(scope="module")
def found():
    return orders(Setting())


@pytest.mark.parametrize(
    ("way", "order", "within"), [("envelope", 1, 0.15), ("implicit", 2, 0.3), ("unrolled", 2, 0.3)]
)
def test_order_of_the_decoders_gradient(found, way, order, within):
    assert found["inner"][0] / found["inner"][-1] >= 1e3, "three decades"
    assert found["slopes"][way] == pytest.approx(order, abs=within)


def test_the_encoders_gradient_vanishes_with_the_square_of_the_inner_error(found):
    assert found["slopes"]["encoder"] == pytest.approx(2, abs=0.3)


def test_memory_is_flat_and_that_of_unrolling_a_straight_line():
    rows = costs(Setting(batch=4), steps=(10, 20, 40, 80, 160), repeats=1)
    size = {way: [row["bytes"] for row in rows if row["way"] == way] for way in {row["way"] for row in rows}}
    for way in ("implicit", "frozen_hessian", "envelope"):
        assert size[way][-1] <= 1.05 * size[way][0]
    assert np.corrcoef((10, 20, 40, 80, 160), size["unrolled"])[0, 1] ** 2 > 0.99
    assert size["unrolled"][-1] > 10 * size["unrolled"][0]


def test_slope_is_an_exponent():
    assert slope([1.0, 10.0, 100.0], [2.0, 200.0, 20_000.0]) == pytest.approx(2)


def test_the_script_writes_its_files(tmp_path, capsys):
    main(["--quick", "--result", str(tmp_path / "vae-gradients.json")])
    assert "implicit" in capsys.readouterr().out
    assert json.loads((tmp_path / "vae-gradients.json").read_text())["quick"] is True
    assert draw("vae-gradients", tmp_path, tmp_path).stat().st_size > 5000
