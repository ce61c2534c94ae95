"""The training script: data from files, the sequence model, a run that is resumed to the same numbers."""

from __future__ import annotations

import gzip
import json
import struct

import numpy as np
import pytest
import torch

from benchmarks.train_vae import main, paired
from benchmarks.vae_data import LENGTH, WORDS, SequenceLikelihood, read
from benchmarks.vae_methods import METHODS, build
from implicit_layers.vae import metrics


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 4, 4), dtype=np.uint8)


def test_files_of_pictures(tmp_path, pictures):
    (tmp_path / "a.idx").write_bytes(idx(pictures))
    (tmp_path / "a.idx.gz").write_bytes(gzip.compress(idx(pictures)))
    np.savez(tmp_path / "a.npz", labels=np.zeros(12), images=pictures)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pictures[:9])))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pictures[9:])))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"not read")
    for source in ("a.idx", "a.idx.gz", "a.npz", "folder"):
        data = read(str(tmp_path / source), 0, None)
        assert data.train.shape == (9, 16) and data.test.shape == (3, 16) and data.side == 4
        assert set(data.train.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(
            data.train[0] == 1, torch.as_tensor(pictures[0].astype(float) / pictures.max()).flatten() > 0.5
        )
    with pytest.raises(SystemExit, match="no idx file"):
        (tmp_path / "b.idx").write_bytes(b"0123456789")
        read(str(tmp_path / "b.idx"), 0, None)


def test_digits_and_sequences():
    digits = read("digits", 0, None)
    assert digits.train.shape == (1347, 64) and digits.test.shape == (450, 64) and digits.side == 8
    found = read("sequences", 0, 50)
    assert found.train.shape == (50, LENGTH) and float(found.train.max()) < WORDS and found.side is None
    assert torch.equal(found.train, read("sequences", 0, 50).train)


def test_sequence_probabilities_sum_to_one_and_generation_follows_them():
    likelihood = SequenceLikelihood(dim=1, words=3, hidden=4, length=2).double()
    z = torch.randn(1, 1, 1).double()
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3)).double()
    p = likelihood(z.expand(1, 9, 1), every).sum(-1).exp().detach()
    assert float((p.sum() - 1).abs()) <= 1e-12
    drawn = likelihood.generate(z[0].expand(20_000, 1), torch.Generator().manual_seed(0))
    counts = torch.bincount(3 * drawn[:, 0] + drawn[:, 1], minlength=9) / 20_000
    assert float((counts - p[0]).abs().max()) <= 0.02


@pytest.mark.parametrize("fixed", [False, True])
def test_every_method_takes_a_step_on_sequences(fixed):
    data = read("sequences", 0, 8)
    for method in METHODS:
        vae = build(method, data, 2, 4, 1.0, 0, fixed)
        result = vae(data.train, torch.Generator().manual_seed(0))
        result.loss.mean().backward() if result.loss.requires_grad else None
        assert result.loss.shape == (8,) and bool(torch.isfinite(result.loss).all())
    exact = metrics.evidence(data.truth, data.test[:3], nodes=33, width=6.0)
    assert exact.value.shape == (3,) and bool((exact.value < 0).all())


def test_a_run_is_resumed_to_the_same_numbers(tmp_path, capsys):
    settings = ["--method", "vae", "savi_implicit", "--limit", "60", "--batch", "30", "--hidden", "4", "--quiet"]
    main([*settings, "--epochs", "2", "--out", str(tmp_path / "whole"), "--result", str(tmp_path / "r.json")])
    main([*settings, "--epochs", "1", "--out", str(tmp_path / "parts")])
    main([*settings, "--epochs", "2", "--out", str(tmp_path / "parts"), "--resume"])
    assert "savi_implicit" in capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["vae", "savi_implicit"] and result["quick"] is False
    for name in ("digits-vae-0", "digits-savi_implicit-0"):
        whole, parts = (json.loads((tmp_path / f / f"{name}.json").read_text())["row"] for f in ("whole", "parts"))
        for row in (whole, parts):
            del row["train_seconds"]
        assert whole == parts
        assert (tmp_path / "whole" / f"{name}.png").stat().st_size > 1000
        assert (tmp_path / "whole" / f"{name}.pt").exists()


def test_a_method_with_nothing_to_learn_is_tested_all_the_same(tmp_path, capsys):
    settings = ["--data", "sequences", "--fixed", "--limit", "8", "--hidden", "4", "--epochs", "1", "--quiet"]
    main([*settings, "--method", "vae", "svi", "--precision", "float32", "--out", str(tmp_path)])
    svi = json.loads((tmp_path / "sequences-fixed-svi-0.json").read_text())
    assert "svi" in capsys.readouterr().out and svi["history"] == []
    assert svi["row"]["gap_refined"] < 0.5 * svi["row"]["gap_plain"] and svi["row"]["information"] > 0


def test_a_grid_of_anchors(tmp_path, capsys):
    settings = ["--limit", "30", "--hidden", "4", "--epochs", "1", "--quiet", "--result", str(tmp_path / "r.json")]
    main([*settings, "--method", "vae", "savi_moreau", "--rho", "0.5", "2", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "r.json").read_text())
    assert [(row["method"], row["rho"]) for row in result["rows"]] == [("vae", 0.5)] + [
        ("savi_moreau", rho) for rho in (0.5, 2.0)
    ]
    (tmp_path / "digits-savi_moreau-rho2-0.json").unlink()
    main([*settings, "--method", "vae", "savi_moreau", "--rho", "0.5", "2", "--out", str(tmp_path), "--collect"])
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == result["rows"][:2]
    assert (
        set(result["paired"]) == {"savi_moreau, 0.5", "savi_moreau, 2"} and "savi_moreau, 2" in capsys.readouterr().out
    )


def test_paired_differences():
    rows = [{"method": m, "seed": s, "nll_plain": 10.0 + s - (m == "svi")} for s in range(3) for m in ("vae", "svi")]
    assert paired(rows) == {"svi": {"nll_plain": [-1.0, -1.0, -1.0]}}
    rows[1]["nll_plain"] += 0.3
    mean, low, high = paired(rows)["svi"]["nll_plain"]
    assert mean == pytest.approx(-0.9) and low < -0.9 < high and high - low == pytest.approx(0.8606, abs=1e-3)
