"""The tables of both pages, from `results/*.json`, between their markers; `python -m benchmarks.plot` writes them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import vae_tables
from benchmarks.run import RESULTS

README = Path(__file__).parents[1] / "README.md"
PAGES = (README, Path(__file__).parent / "README.md")
OURS = "implicit_layers"

Result = dict[str, Any]


def qp(result: Result) -> str:
    """One line a case: our times, and each contender's with how many times longer it takes."""
    return _contest(result, {"problem": ("problem",), "n, n_ineq, n_eq": ("n", "n_ineq", "n_eq"), "batch": ("batch",)})


def simplex(result: Result) -> str:
    """The same for the simplex and its kin."""
    return _contest(result, {"problem": ("problem",), "n": ("n",), "batch": ("batch",)})


def scaling(result: Result) -> str:
    """The figure, and the exponents; the numbers are in the JSON."""
    exponents = "; ".join(f"{name}: {exponent:.2f}" for name, exponent in result["slopes"].items())
    picture = "![Time against size, batch and threads](benchmarks/figures/scaling.png)"
    return f"{picture}\n\nExponents over the larger half: {exponents}. {_provenance(result)}"


def _contest(result: Result, columns: dict[str, tuple[str, ...]]) -> str:
    """A line a case, a column a contender: "total (times ours)"; of those without a gradient, the forward pass."""
    rows = result["rows"]
    peers = [name for name in dict.fromkeys(row["contender"] for row in rows) if name != OURS]
    bare = {name for name in peers if not any("total_ms" in row for row in rows if row["contender"] == name)}
    bare = {name for name in bare if any("forward_ms" in row for row in rows if row["contender"] == name)}
    lines = [
        [*columns, "ours, ms, forward / total", *(f"{name}{', forward' if name in bare else ''}" for name in peers)]
    ]
    cases: dict[tuple[str, ...], dict[str, Result]] = {}
    for row in rows:
        key = tuple(", ".join(str(row[part]) for part in parts) for parts in columns.values())
        cases.setdefault(key, {})[row["contender"]] = row
    for key, found in cases.items():
        ours = found[OURS]
        lines.append([*key, _times(ours), *(_against(found.get(name), ours) for name in peers)])
    return f"{_markdown(lines, left=1)}\n\nIn brackets: how many times longer than ours. {_provenance(result)}"


def accuracy(result: Result) -> str:
    """One line a contender: answers that hold, residuals and gradient errors, median and worst."""
    groups: dict[str, list[Result]] = {}
    for row in result["rows"]:
        if row["status"] != "not run":
            groups.setdefault(row["contender"], []).append(row)
    lines = [["contender", "version", "right answers", "residual, median", "worst", "gradient error, median", "worst"]]
    for name, rows in groups.items():
        right = [row for row in rows if row["status"] == "ok"]
        line = [name, str(rows[0]["version"] or "not installed"), f"{len(right)} of {len(rows)}"]
        for figure in ("residual", "gradient_error"):
            values = [row[figure] for row in right if figure in row]
            line += [_power(statistics.median(values)), _power(max(values))] if values else ["–", "–"]
        lines.append(line)
    return (
        f"{_markdown(lines, left=2)}\n\nOver the answers that are right, to a residual of 1e-3. {_provenance(result)}"
    )


def kernel(result: Result) -> str:
    """One line a shape and batch: the kernel, and how many times longer the others take."""
    cases: dict[tuple[str, int], dict[str, Result]] = {}
    for row in result["rows"]:
        shape = f"{row['n']}, {row['n_ineq']}, {row['n_eq']}" + ", bounds" * row.get("bounds", False)
        cases.setdefault((shape, row["batch"]), {})[row["way"]] = row
    others = ("torch, float64", "kernel, one thread", "kernel, float32")
    heads = ["n, n_ineq, n_eq", "batch", "kernel, ms, forward / total", *others, "over the floor"]
    lines = [[*heads, "gradient error, float64", "float32"]]
    for (shape, batch), ways in cases.items():
        ours = ways["kernel, float64"]
        against = [_against({**ways[way], "status": "ok"}, ours) for way in others]
        errors = [_power(ways[way]["gradient_error"]) for way in ("kernel, float64", "kernel, float32")]
        over = _ratio(ours["forward_ms"]["median"] / ours["floor_ms"]) if "floor_ms" in ours else "–"
        lines.append([shape, str(batch), _times({**ours, "status": "ok"}), *against, over, *errors])
    memory = f"Peak memory at batch 512, n = 100: {result.get('peak memory over data', '–')} times the data. "
    words = "The floor: the same products and factorisations at the pace of a matrix product of 1024. "
    return f"{_markdown(lines, left=1)}\n\nKernel: {result['kernel']}. {memory}{words}{_provenance(result)}"


def memory(result: Result) -> str:
    """One line a problem and mode: memory at the fewest and the most iterations, its exponent, errors, time."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for row in result["rows"]:
        groups.setdefault((row["problem"], row["mode"]), []).append(row)
    head = ["problem", "gradient", "iterations", "saved, KiB", "grows as iterations to the", "peak, KiB"]
    lines = [[*head, "gradient error", "ms"]]
    for (problem, mode), rows in groups.items():
        rows.sort(key=lambda row: row["iterations"])
        first, last = rows[0], rows[-1]
        exponent = result["slopes"].get(f"{problem}: {mode}")
        lines.append(
            [
                problem,
                mode,
                f"{first['iterations']} – {last['iterations']}",
                f"{first['graph_bytes'] / 1024:.0f} – {last['graph_bytes'] / 1024:.0f}",
                "–" if exponent is None else f"{abs(exponent):.2f}",
                f"{first['peak_bytes'] / 1024:.0f} – {last['peak_bytes'] / 1024:.0f}",
                f"{_power(first['gradient_error'])} – {_power(last['gradient_error'])}",
                f"{_figure(first['total_ms']['median'])} – {_figure(last['total_ms']['median'])}",
            ]
        )
    bits = [row["buffer_bits"] for row in result["rows"] if row.get("buffer_bits") and row["problem"] == "ridge"]
    buffer = f"The buffer of reversible ridge takes {bits[-1]:.2f} bits a number and step. " if bits else ""
    return f"{_markdown(lines, left=2)}\n\n{buffer}{_provenance(result)}"


def bad_inputs(result: Result) -> str:
    """One line an input, a column a layer: what comes back."""
    layers = list(dict.fromkeys(row["layer"] for row in result["rows"]))
    lines = [["input", *layers]]
    cases: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        cases.setdefault(row["input"], {})[row["layer"]] = row["outcome"]
    lines += [[name, *(found.get(layer, "–") for layer in layers)] for name, found in cases.items()]
    words = (
        "refused: an error that says why; error: an obscure one; warned: zero gradient and a warning; wrong: numbers "
        "that are no answer, without a word."
    )
    return f"{_markdown(lines, left=len(layers) + 1)}\n\n{words} {_provenance(result, 'benchmarks.bad_inputs')}"


def hard_qps(result: Result) -> str:
    """One line a solver: how many of the hard programs it gets right, by the same certificate."""
    keys = ("problems", "right", "inaccurate", "failed", "wrong", "largest_residual", "median_ms")
    heads = ["programs", "right", "inaccurate", "says it failed", "wrong in silence", "largest residual", "median, ms"]
    lines = [["solver", *heads], *([row["solver"], *(str(row[key]) for key in keys)] for row in result["summary"])]
    return f"{_markdown(lines, left=1)}\n\n{_provenance(result, 'benchmarks.maros')}"


def sudoku(result: Result) -> str:
    """One line a layer: what it learned."""
    keys = ("problem", "gradient", "steps", "seconds", "test_right")
    heads = ["layer", "gradient", "steps", "training, s", "unseen boards right"]
    lines = [heads, *([str(row.get(key, "–")) for key in keys] for row in result["rows"])]
    return f"{_markdown(lines, left=2)}\n\n{_provenance(result, 'benchmarks.sudoku')}"


def gradient_truth(result: Result) -> str:
    """One line a spread of the scores: the relative error of the gradient, the median and the largest of the draws."""
    shown = (("gradient_truth", "ours: closed", "softmax"), ("entropic_truth", "ours", "entropic LP, 5 rows"))
    found = {(r["table"], r["contender"], r["spread"]): r for r in result["rows"] if r["table"].endswith("_truth")}
    columns = [(t, name, f"{what}: {label}") for t, own, what in shown for name, label in ((own, "ours"), _CVXPYLAYERS)]
    lines = [["spread of the scores / τ", *(head for _, _, head in columns)]]
    for spread in dict.fromkeys(spread for _, _, spread in found):
        rows = [found.get((table, name, spread)) for table, name, _ in columns]
        errors = ["" if r is None else f"{_power(r['median_error'])} / {_power(r['largest_error'])}" for r in rows]
        lines.append([f"{spread:g}", *errors])
    env = result.get("added", {}).get("entropic_truth", result["environment"])
    versions = f"torch {env['torch']}, cvxpylayers {env['cvxpylayers']}, diffcp {env['diffcp']}"
    return (
        f"{_markdown(lines, left=0)}\n\nn = 10, eight draws a spread; {versions}, commit {env['commit']}, "
        f"{env['date']}; float64. `python -m benchmarks.simplex_family` makes it."
    )


_CVXPYLAYERS = ("cvxpylayers", "cvxpylayers")


def denoising(result: Result) -> str:
    """One line a model: its error on unseen signals."""
    lines = [["model", "mean squared error"], *([row["model"], str(row["test_mse"])] for row in result["rows"])]
    return f"{_markdown(lines, left=1)}\n\n{_provenance(result, 'benchmarks.denoising')}"


def _means(result: Result, key: str, columns: dict[str, str]) -> str:
    """One line a way of training, the mean over its seeds and, in brackets, the least and the most."""
    names = list(dict.fromkeys(row[key] for row in result["rows"]))
    lines = [[key, *columns]]
    for name in names:
        rows = [row for row in result["rows"] if row[key] == name]
        found = [[row[column] for row in rows] for column in columns]
        shown = [
            (form.format(statistics.mean(values)) + f" ({form.format(min(values))} – {form.format(max(values))})")
            for form, values in zip(columns.values(), found, strict=True)
        ]
        lines.append([name, *shown])
    seeds = max(sum(row[key] == name for row in result["rows"]) for name in names)
    words = f"The mean of {seeds} seeds, and the least and the most."
    source = _provenance(result, f"benchmarks.{result['suite']}").replace("float64, medians", "float32")
    return f"{_markdown(lines, left=1)}\n\n{words} {source}"


def digit_pairs(result: Result) -> str:
    """One line a head: how many pictures of two digits it reads right."""
    return _means(result, "head", {"both right": "{:.3f}", "digits right": "{:.3f}", "seconds": "{:.1f}"})


def sparse_attention(result: Result) -> str:
    """One line an attention: what it predicts, what it leaves out, and how long a step takes."""
    columns = {"bits a letter": "{:.3f}", "weights that are zero": "{:.2f}", "ms a step": "{:.0f}"}
    return _means(result, "attention", columns)


def transport_forward(result: Result) -> str:
    """One line a problem: ours, and how many times longer POT takes."""
    cases: dict[tuple[str, str, str], dict[str, Result]] = {}
    for row in result["rows"]:
        if row["suite"] == "sinkhorn forward":
            cases.setdefault((row["dtype"], str(row["n"]), f"{row['tau']:g}"), {})[row["contender"]] = row
    equal = f"{OURS}, at POT's error"
    heads = ["dtype", "n", "ε", "ours, ms", "at POT's error, ms", "POT", "POT, log domain", "error: ours", "POT"]
    lines = [heads]
    for key, found in cases.items():
        ours = found.get(equal, found[OURS])
        times = [_figure(row["forward_ms"]["median"]) for row in (found[OURS], ours)]
        peers = [found.get(f"POT {method}") for method in ("sinkhorn", "sinkhorn_log")]
        against = [_against(None if row is None else {**row, "status": "ok"}, ours) for row in peers]
        errors = ["" if row is None else _power(row["marginal_error"]) for row in (ours, peers[0])]
        lines.append([*key, *times, *against, *errors])
    words = (
        "Ours with POT's threshold as the tolerance, and with the loosest power of ten that comes as near the "
        "marginals as POT, or as its threshold; in brackets: how many times longer than the latter."
    )
    source = _provenance(result, "benchmarks.transport").replace("float64, medians", "medians")
    return f"{_markdown(lines, left=1)}\n\n{words} {source}"


def transport_backward(result: Result) -> str:
    """One line a way to the gradient: time, memory, and how far it is from the exact one."""
    rows = [row for row in result["rows"] if row["suite"] == "sinkhorn backward"]
    heads = ["ε, dtype", "gradient", "iterations", "forward, ms", "backward, ms", "saved, MiB", "peak, MiB", "error"]
    lines, first = [heads], {}
    for row in rows:
        ours = first.setdefault((row["tau"], row["dtype"]), row)
        cells = [_against({**row, "status": "ok", "total_ms": row[key]}, {"total_ms": ours[key]}) for key in _BOTH]
        memory = [f"{row[key]:.3g}" for key in ("graph_MiB", "peak_MiB")]
        name = f"{row['tau']:g}, {row['dtype']}"
        lines.append([name, row["contender"], str(row["iterations"]), *cells, *memory, _power(row["gradient_error"])])
    words = (
        f"{rows[0]['batch']} problems of {rows[0]['n']} × {rows[0]['n']}; in brackets: times the first line of its ε. "
    )
    source = _provenance(result, "benchmarks.transport").replace("float64, medians", "medians")
    return f"{_markdown(lines, left=2)}\n\n{words}{source}"


_BOTH = ("forward_ms", "backward_ms")


def kernel_choice(result: Result) -> str:
    """One line a kernel: its times, how many times longer than C++ it takes, and what it costs before it runs."""
    measured = [row for row in result["rows"] if "ms" in row]
    sizes = list(dict.fromkeys(row["n"] for row in measured))
    lines = [["128 Cholesky factorisations, ms", *(f"n = {n}" for n in sizes), "error", "import, s", "compile, s"]]
    for name, cost in result["costs"].items():
        rows = {row["n"]: row for row in measured if row["kernel"] == name}
        times = [f"{rows[n]['ms']:.3g} ({_ratio(rows[n]['times_longer'])})" for n in sizes]
        error = max(row["error"] for row in rows.values())
        lines.append([name, *times, _power(error), str(cost["import_s"]), str(cost["compile_s"])])
    note = "In brackets: how many times longer than C++."
    return f"{_markdown(lines, left=1)}\n\n{note} {_provenance(result, 'benchmarks.kernel_choice')}"


def vae_comparison(result: Result) -> str:
    """One line a way of training a VAE: the fairness table."""
    return f"{_markdown(vae_tables.comparison(result), left=1)}\n\n{vae_tables.caption(result)}"


def vae_grid(result: Result) -> str:
    """One line a weight of the anchor."""
    return f"{_markdown(vae_tables.grid(result), left=1)}\n\n{vae_tables.caption(result)}"


def vae_gradients(result: Result) -> str:
    """One line a number of inner steps, the orders of the gradients' errors, and the figure."""
    picture = "![Gradient error, bytes and milliseconds of four ways](benchmarks/figures/vae-gradients.png)"
    source = _provenance(result, "benchmarks.vae_gradients").replace("medians", "least of five")
    words = f"{vae_tables.crossover(result)} {source}"
    return f"{picture}\n\n{_markdown(vae_tables.costs(result), left=0)}\n\n{words}"


# name of the table -> the suite that it shows, and how
TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "qp": ("qp", qp),
    "qp-accuracy": ("qp", accuracy),
    "kernel": ("kernel", kernel),
    "memory": ("memory", memory),
    "simplex": ("simplex", simplex),
    "gradient-truth": ("simplex_family", gradient_truth),
    "scaling": ("scaling", scaling),
    "bad-inputs": ("bad_inputs", bad_inputs),
    "hard-qps": ("maros", hard_qps),
    "sudoku": ("sudoku", sudoku),
    "denoising": ("denoising", denoising),
    "digit-pairs": ("digit_pairs", digit_pairs),
    "sparse-attention": ("sparse_attention", sparse_attention),
    "transport-forward": ("transport", transport_forward),
    "transport-backward": ("transport", transport_backward),
    "kernel-choice": ("kernel_choice", kernel_choice),
    "vae-gradients": ("vae-gradients", vae_gradients),
    "vae-sequences-fixed": ("vae-sequences-fixed", vae_comparison),
    "vae-rho": ("vae-rho", vae_grid),
    "vae-digits": ("vae-digits", vae_comparison),
    "vae-fashion-mnist": ("vae-fashion-mnist", vae_comparison),
}


def times_longer(peer: Result, ours: Result, field: str = "total_ms") -> float | None:
    """The median over the rounds of the ratio within a round; None where one of the two was not timed."""
    if field not in peer or field not in ours:
        return None
    mine, theirs = ours[field].get("repeats", []), peer[field].get("repeats", [])
    if mine and len(mine) == len(theirs):
        return statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
    return peer[field]["median"] / ours[field]["median"]


def _against(peer: Result | None, ours: Result) -> str:
    """One cell of a contest."""
    if peer is None:
        return ""
    if peer["status"] != "ok":
        return str(peer["status"]).split(":")[0]
    field = "total_ms" if "total_ms" in peer else "forward_ms"
    ratio = times_longer(peer, ours, field)
    return _figure(peer[field]["median"]) + ("" if ratio is None else f" ({_ratio(ratio)})")


def _times(row: Result) -> str:
    """Median milliseconds, or why there are none."""
    if row["status"] != "ok":
        return str(row["status"]).split(":")[0]
    return f"{_figure(row['forward_ms']['median'])} / {_figure(row['total_ms']['median'])}"


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _power(value: float) -> str:
    return f"{value:.0e}"


def _markdown(lines: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first columns are text and whose others are numbers."""
    rule = ["---" if i < left else "--:" for i in range(len(lines[0]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _provenance(result: Result, module: str | None = None) -> str:
    """Where the figures come from, and how to make them again."""
    env = result["environment"]
    threads = f"{env['threads']} thread{'s' if env['threads'] != 1 else ''}"
    return (
        f"{env['device']}, {threads}, torch {env['torch']}, commit {env['commit']}, {env['date']}; float64, medians. "
        f"`python -m {module or 'benchmarks.run ' + result['suite']}` makes it."
    )


def pattern(name: str) -> re.Pattern[str]:
    """The text between the markers of one table."""
    return re.compile(rf"(<!-- table:{name} -->\n)(.*?)(<!-- /table:{name} -->)", re.DOTALL)


def rewritten(readme: str, results: Path = RESULTS) -> str:
    """A page with each of its tables that has a result; the others are empty."""
    for name, (suite, render) in TABLES.items():
        path = results / f"{suite}.json"
        body = f"\n{render(json.loads(path.read_text(encoding='utf-8')))}\n\n" if path.exists() else ""
        readme = pattern(name).sub(lambda found, body=body: found[1] + body + found[3], readme)
    return readme
