"""`python -m implicit_layers` runs from anywhere, prints the table, saves the figure, and says what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from implicit_layers.__main__ import main
from implicit_layers.demonstration.digits import load, require
from implicit_layers.demonstration.models import QPClassifier, SoftmaxClassifier
from implicit_layers.demonstration.training import Settings
from implicit_layers.errors import MissingDependencyError
from implicit_layers.measure import relative_error

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


def run_main(folder: Path, *options: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "error::UserWarning", "-m", "implicit_layers", *options]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demonstration")
    return folder, run_main(folder, "--quick")


def rows(output: str) -> dict[tuple[str, str], list[str]]:
    """The table as printed, keyed by model and mode."""
    lines = [line.split() for line in output.splitlines() if line.startswith(("softmax LP ", "QP layer "))]
    return {(" ".join(cells[:2]), cells[2]): cells[3:] for cells in lines}


def test_quick_run_ends_well_with_table_and_figure(quick):
    folder, done = quick
    assert done.returncode == 0, done.stderr
    assert "gradient error" in done.stdout
    assert set(rows(done.stdout)) == {(m, h) for m in ("softmax LP", "QP layer") for h in ("implicit", "unrolled")}
    figure = (folder / "implicit_layers_demo.png").read_bytes()
    assert figure.startswith(PNG) and len(figure) > 20_000
    assert "100%" in done.stderr  # the progress bars ran to the end


def test_table_holds_what_the_layers_promise(quick):
    for (model, how), (accuracy, forward, backward, kib, error) in rows(quick[1].stdout).items():
        assert float(accuracy.rstrip("%")) > 60.0, model  # two epochs; chance is 10 %
        assert float(forward) > 0.0 and float(backward) > 0.0
        if how == "implicit":
            assert float(error) < 1e-11
            assert float(kib) < 0.2 * float(rows(quick[1].stdout)[model, "unrolled"][3])


def test_float32_run_with_another_path(tmp_path):
    done = run_main(tmp_path, "--quick", "--dtype", "float32", "--seed", "3", "--out", "other.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "other.png").read_bytes().startswith(PNG)
    assert float(rows(done.stdout)["QP layer", "implicit"][4]) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8' (choose from"),
        (["--device", "abacus"], "argument --device: 'abacus' with --dtype float64 does not work"),
        (["--device", "cuda:99"], "argument --device: 'cuda:99' with --dtype float64 does not work"),
        (["--out", "no/such/folder/figure.png"], "must be a file in a folder that exists"),
        (["--seed", "one"], "argument --seed: invalid int value: 'one'"),
    ],
)
def test_bad_options_end_at_once_with_a_message(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(options)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("module", "package"), [("sklearn.datasets", "scikit-learn"), ("tqdm", "tqdm")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(module, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf'needs {package}.*pip install "implicit_layers\[examples\]"'):
        require(module)
    assert main(["--quick"]) == 1
    assert f"needs {package}" in capsys.readouterr().err


@pytest.mark.parametrize("build", [SoftmaxClassifier, QPClassifier])
def test_three_ways_give_one_loss_and_one_gradient(build):
    torch.manual_seed(0)
    model = build().double()
    digits = load(0, torch.float64, torch.device("cpu"))
    images, labels = digits.train_images[:16], digits.train_labels[:16]
    losses = {how: model.loss(images, labels, how) for how in ("implicit", "unrolled", "exact")}
    gradients = {how: torch.autograd.grad(loss, tuple(model.parameters())) for how, loss in losses.items()}
    assert relative_error([losses["implicit"]], [losses["exact"]]) < 1e-12
    assert relative_error(gradients["implicit"], gradients["exact"]) < 1e-11
    assert relative_error(gradients["unrolled"], gradients["exact"]) < 1e-3
    planted = [gradient * 1.001 for gradient in gradients["implicit"]]
    assert relative_error(planted, gradients["exact"]) > 1e-4


def test_the_split_keeps_the_sets_apart_and_follows_the_seed():
    one, same, other = (load(seed, torch.float32, torch.device("cpu")) for seed in (0, 0, 1))
    assert len(one.train_labels) + len(one.test_labels) == 1797
    assert torch.equal(one.test_images, same.test_images)
    assert not torch.equal(one.test_images, other.test_images)
    assert one.train_images.min() >= 0.0 and one.train_images.max() <= 1.0
    assert Settings(quick=True).epochs < Settings().epochs
