"""The README's tables and figure of the semi-amortised VAE, from `results/vae-*.json`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]
NAMES = {
    "vae": "VAE",
    "svi": "SVI",
    "vae_svi": "VAE + SVI",
    "vae_svi_kl": "VAE + SVI + KL",
    "sa_vae": "SA-VAE, unrolled",
    "savi_implicit": "SAVI, implicit",
    "savi_moreau": "SAVI, Moreau",
}


def comparison(result: Result) -> list[list[str]]:
    """A line a method: tested without and with refinement, and each one's difference from the VAE so tested."""
    rows = result["rows"]
    exact, fixed = "exact_nll" in rows[0], bool(result["settings"]["fixed"])
    score = "gap" if fixed else "nll"
    what = "exact gap" if fixed else "NLL"
    head = ["trained as", f"{what}, tested without refinement", "tested with", "as trained"]
    head += ["exact NLL"] if exact and not fixed else []
    lines = [[*head, "KL", "information", "active", "training, s", "graph, KiB"]]
    for method in [name for name in NAMES if any(row["method"] == name for row in rows)]:
        mine = [row for row in rows if row["method"] == method]
        fewer = len(mine) < len({row["seed"] for row in rows})
        line = [f"{NAMES[method]} ({len(mine)} seeds)" if fewer else NAMES[method]]
        for tested in ("plain", "refined", "trained"):
            line.append(_with_interval(result, method, mine, f"{score}_{tested}"))
        if exact and not fixed:
            line.append(_with_interval(result, method, mine, "exact_nll"))
        known = [key for key in ("kl", "information", "active") if key in mine[0]]
        line += [f"{_mean(mine, key):.2f}" if key in known else "–" for key in ("kl", "information", "active")]
        learned = any(row["train_seconds"] for row in mine)
        line += [f"{_mean(mine, 'train_seconds'):.0f}", f"{_mean(mine, 'graph_kib'):.0f}"] if learned else ["–", "–"]
        lines.append(line)
    return lines


def caption(result: Result) -> str:
    """What was run, and how to run it again."""
    data, settings, rows = result["data"], result["settings"], result["rows"]
    seeds = len({row["seed"] for row in rows})
    failed = max(row["failed_share"] for row in rows)
    brackets = "In brackets: the mean difference from the VAE of the same seed and its 95 % interval. "
    brackets *= seeds > 1 and settings_rho(result) is None
    return (
        f"{data['train']} training and {data['test']} test data, {settings['epochs']} epochs, {seeds} "
        f"seed{'s' * (seeds > 1)}; nats a datum. {brackets}At most {failed:.1%} of the inner problems failed. "
        f"{_provenance(result)}"
    )


def costs(result: Result) -> list[list[str]]:
    """A line a number of steps: KiB and milliseconds of unrolling, of the same steps with the implicit derivative."""
    ways = ("unrolled", "implicit", "frozen_hessian", "envelope")
    found = {(row["way"], row["steps"]): row for row in result["costs"]}
    lines = [
        ["K", *(f"{way.replace('_', ' ')}, KiB" for way in ways), *(f"{way.replace('_', ' ')}, ms" for way in ways)]
    ]
    for steps in sorted({steps for way, steps in found if way == "unrolled"}):
        here = [found[way, steps] for way in ways]
        lines.append(
            [str(steps), *(f"{row['bytes'] / 1024:.0f}" for row in here), *(f"{row['ms']:.1f}" for row in here)]
        )
    return lines


def crossover(result: Result) -> str:
    """From which number of steps on the implicit derivative of the same steps is the faster one."""
    times: dict[str, dict[int, float]] = {}
    for row in result["costs"]:
        times.setdefault(row["way"], {})[row["steps"]] = row["ms"]
    slower = [k for k, ms in times["unrolled"].items() if times["implicit"][k] >= ms]
    faster = [k for k in times["unrolled"] if k > max(slower, default=0)]
    slopes = result["orders"]["slopes"]
    orders = ", ".join(f"{name} {slopes[name]:.2f}" for name in ("envelope", "implicit", "unrolled"))
    size = {row["steps"]: row["bytes"] for row in result["costs"] if row["way"] == "unrolled"}
    kept = {row["steps"]: row["bytes"] for row in result["costs"] if row["way"] == "implicit"}
    (newton,) = (row for row in result["costs"] if row["way"] == "implicit, Newton")
    first, last = min(set(kept) & {10}, default=min(kept)), max(kept)
    when = f"from K = {faster[0]} on" if faster else "nowhere in this range"
    return (
        f"Error of the decoder's gradient as a power of the error of λ: {orders}. Bytes at K = {last} are "
        f"{kept[last] / kept[first]:.2f} times those at K = {first} (implicit), unrolled a straight line in K with "
        f"R² = {statistics.correlation(list(size), list(size.values())) ** 2:.4f}. The implicit derivative is the "
        f"faster one {when}; solved to the end by Newton it takes {newton['ms']:.0f} ms."
    )


def grid(result: Result) -> list[list[str]]:
    """A line a weight of the anchor: exact gaps, tested without refinement and as trained."""
    lines = [["ρ", "exact gap from the guess", "as trained", "of the VAE's", "KL", "training, s"]]
    base = [row for row in result["rows"] if row["method"] == "vae"]
    for rho in sorted({row["rho"] for row in result["rows"] if row["method"] != "vae"}):
        mine = [row for row in result["rows"] if row["method"] != "vae" and row["rho"] == rho]
        lines.append(
            [
                f"{rho:g}",
                *(f"{_mean(mine, key):.3f}" for key in ("gap_plain", "gap_trained")),
                f"{_mean(mine, 'gap_trained') / _mean(base, 'gap_plain'):.2f}",
                f"{_mean(mine, 'kl'):.2f}",
                f"{_mean(mine, 'train_seconds'):.0f}",
            ]
        )
    lines.append(["∞ (VAE)", *(f"{_mean(base, 'gap_plain'):.3f}",) * 2, "1.00", f"{_mean(base, 'kl'):.2f}",
                  f"{_mean(base, 'train_seconds'):.0f}"])  # fmt: skip
    return lines


def settings_rho(result: Result) -> list[float] | None:
    """The weights of a grid of anchors; None where there is no grid."""
    found = result["settings"]["rho"]
    return found if isinstance(found, list) and len(found) > 1 else None


def gradients(result: Result, axes: Any) -> None:
    """Gradient errors against inner errors; bytes, and milliseconds, against the number of steps."""
    errors, sizes, times = axes
    found, rows = result["orders"], result["costs"]
    for name in ("envelope", "implicit", "unrolled", "encoder"):
        label = f"{name}, order {found['slopes'][name]:.2f}"
        label = label.replace("encoder", "size of encoder's gradient, unrolled")
        errors.loglog(found["inner"], found[name], "o-" if name != "encoder" else "s:", label=label)
    errors.set(xlabel="relative error of λ", ylabel="relative error of the decoder's gradient")
    for name in ("unrolled", "implicit", "frozen_hessian", "envelope"):
        mine = [row for row in rows if row["way"] == name]
        steps = [row["steps"] for row in mine]
        sizes.loglog(steps, [row["bytes"] / 1024 for row in mine], "o-", label=name)
        times.loglog(steps, [row["ms"] for row in mine], "o-", label=name)
    (newton,) = [row for row in rows if row["way"] == "implicit, Newton"]
    sizes.axhline(newton["bytes"] / 1024, color="k", lw=0.8, ls="--", label="implicit, solved by Newton")
    times.axhline(newton["ms"], color="k", lw=0.8, ls="--", label="implicit, solved by Newton")
    sizes.set(xlabel="inner steps K", ylabel="KiB kept for the backward pass")
    times.set(xlabel="inner steps K", ylabel="ms, forward and backward")
    for axis in axes:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)


def _mean(rows: Sequence[Result], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _with_interval(result: Result, method: str, rows: Sequence[Result], key: str) -> str:
    """A mean, and the paired difference from the VAE."""
    mean = f"{_mean(rows, key):.2f}"
    difference = result["paired"].get(method, {}).get(key)
    if difference is None or len(rows) < 2:
        return mean
    return f"{mean} ({difference[0]:+.2f}: {difference[1]:+.2f} to {difference[2]:+.2f})"


def _provenance(result: Result) -> str:
    env, settings = result["environment"], result["settings"]
    flags = [f"--data {result['data']['source']}", *(["--fixed"] if settings["fixed"] else [])]
    return (
        f"{env['device']}, {env['threads']} thread{'s' * (env['threads'] != 1)} (shared with other work), torch "
        f"{env['torch']}, commit {env['commit']}, {env['date']}, {settings.get('precision', 'float64')}. "
        f"`python -m benchmarks.train_vae {' '.join(flags)}` makes it; its other settings are in the file."
    )
