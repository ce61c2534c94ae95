"""The benchmark of the family runs, its rows go into a file, and its gradients are the exact ones."""

import json

import torch

import implicit_layers as il
from benchmarks import simplex_family as suite


def test_gradients_are_exact_wherever_the_scores_are():
    """Relative error at most 1e-10 for a spread of one to twenty temperatures; PyTorch's own loses digits there."""
    rows = suite.gradient_truth()
    ours = [row for row in rows if row["contender"] == "ours: closed"]
    assert [row["spread"] for row in ours] == list(suite.SPREADS)
    assert max(row["largest_error"] for row in ours) < 1e-14
    others = [row for row in rows if row["contender"] in ("ours: newton", "ours: kkt") and row["spread"] <= 6]
    assert max(row["largest_error"] for row in others) < 1e-12
    assert json.loads(json.dumps(rows)) == rows


def test_the_exact_gradient_is_one():
    x, g = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    step = 1e-6 * torch.eye(3, dtype=torch.float64)
    loss = lambda x: (g * torch.softmax(x / 0.5, -1)).sum()  # noqa: E731
    numerical = torch.stack([(loss(x + d) - loss(x - d)) / 2e-6 for d in step])
    torch.testing.assert_close(suite.exact_gradient(x, g, 0.5), numerical, rtol=1e-8, atol=1e-9)


def test_quick_run_of_the_speed_suite(tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["simplex_family", "--quick", "--suite", "speed", "--out", str(out)])
    suite.main()
    result = json.loads(out.read_text())
    assert result["environment"]["torch"] == torch.__version__
    ours = {row["layer"]: row for row in result["rows"] if row["contender"] == "ours"}
    assert set(ours) == {"softmax", "softmax, temperature 0.5", "sparsemax", "entmax 1.5", "entmax 1.3"}
    assert all(row["error"] < 1e-6 and row["total_ms"] > 0 for row in ours.values())


def test_the_stored_results_keep_what_is_promised():
    results = json.loads(suite.RESULTS.read_text())
    tables = {name: [row for row in results["rows"] if row["table"] == name] for name in suite.SUITES}
    largest = {(r["contender"], r["spread"]): r["largest_error"] for r in tables["gradient_truth"]}
    assert max(v for (name, _), v in largest.items() if name == "ours: closed") < 1e-10
    entropic = {(r["contender"], r["spread"]): r["largest_error"] for r in tables["entropic_truth"]}
    assert max(v for (name, _), v in entropic.items() if name == "ours") < 1e-10
    assert (
        entropic["cvxpylayers", 6] > 1.0 and largest["cvxpylayers", 6] > 1.0
    )  # its backward pass, where the forward pass is still right
    times = {(r["layer"], r["n"], r["scale"], r["contender"]): r["total_ms"] for r in tables["speed"]}
    for (layer, n, scale, name), taken in times.items():
        if layer in ("sparsemax", "entmax 1.5") and name.startswith("entmax"):
            ours = times[layer, n, scale, "ours"]
            assert ours < taken and (name != "entmax: default" or 3 * ours < taken), (layer, n, scale, name)


def test_the_gradient_of_an_entropic_program_against_sixty_digits_and_those_against_differences():
    rows = suite.entropic_truth(quick=True)
    ours = [row for row in rows if row["contender"] == "ours"]
    assert [row["spread"] for row in ours] == list(suite.SPREADS[::2])
    assert all(row["largest_error"] < 1e-10 for row in ours), ours
    c, A, b, g = suite.entropic_program(2, 3, 10, 5, 0.5)

    def loss(c):
        return g @ il.entropic_lp(c, A=A, b=b, temperature=0.5, tol=1e-14).value

    start = il.entropic_lp(c, A=A, b=b, temperature=0.5).value
    exact = suite.exact_entropic_gradient(c, A, b, g, 0.5, start)
    numerical = torch.stack([(loss(c + d) - loss(c - d)) / 2e-5 for d in 1e-5 * torch.eye(10, dtype=torch.float64)])
    torch.testing.assert_close(exact, numerical, rtol=1e-6, atol=1e-8)
