"""`python -m benchmarks.train_vae [--data digits|sequences|PATH] [--method ...]`: train VAEs, and compare them.

Each method is trained from the same weights, on the same batches, and tested with and without refinement. Every run
writes a log (JSON), a checkpoint from which `--resume` goes on, and a picture; a comparison of several methods or
seeds ends in one result file. The columns of the table are explained where they are made, in `evaluate`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.run import environment
from benchmarks.vae_data import Data, describe, read
from benchmarks.vae_methods import METHODS, build, refined
from implicit_layers.measure import graph_bytes
from implicit_layers.nn import SemiAmortizedVAE
from implicit_layers.vae import metrics

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 95 %, by n


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.train_vae", description=__doc__.splitlines()[0])
    arguments.add_argument("--data", default="digits", help="digits, sequences, or a path: idx, npz, a folder of idx")
    arguments.add_argument("--method", nargs="+", choices=METHODS, default=["savi_implicit"])
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--epochs", type=int, default=25)
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--rate", type=float, default=5e-3, help="of Adam")
    arguments.add_argument("--rho", type=float, nargs="+", default=[1.0], help="weight of the anchor; several: a grid")
    arguments.add_argument("--precision", choices=("float32", "float64"), default="float64", help="while training")
    arguments.add_argument("--latent", type=int, default=4)
    arguments.add_argument("--hidden", type=int, default=32)
    arguments.add_argument("--fixed", action="store_true", help="sequences: keep the true generator")
    arguments.add_argument("--limit", type=int, help="use this many training examples")
    arguments.add_argument("--out", type=Path, default=Path("vae-runs"), help="folder of logs, checkpoints, pictures")
    arguments.add_argument("--result", type=Path, help="also write the comparison to this JSON file")
    arguments.add_argument("--resume", action="store_true", help="go on from the checkpoints in the folder")
    arguments.add_argument("--collect", action="store_true", help="train nothing: the comparison of what is finished")
    arguments.add_argument("--quiet", action="store_true", help="no progress bars")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(options.seeds):
        data = read(options.data, seed, options.limit)
        for rho, method in itertools.product(options.rho, options.method):
            if method == "vae" and rho != options.rho[0]:  # the VAE has no anchor
                continue
            row = finished(method, seed, options, rho) if options.resume or options.collect else None
            if row is None and not options.collect:
                row = run(method, seed, data, options, rho)
            if row is not None:
                rows.append(row | {"rho": rho})
    print(table(rows))
    if options.result is not None:
        settings = {
            k: getattr(options, k)
            for k in ("epochs", "batch", "rate", "rho", "latent", "hidden", "seeds", "fixed", "precision")
        }
        result = {
            "suite": "vae",
            "quick": False,
            "environment": environment("cpu", 0),
            "data": describe(options.data, data),
            "settings": settings,
            "rows": rows,
            "paired": paired(rows),
        }
        options.result.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    return 0


def _name(method: str, seed: int, options: argparse.Namespace, rho: float) -> str:
    """Of the files of one run."""
    weight = f"-rho{rho:g}" if len(options.rho) > 1 and method != "vae" else ""
    return f"{Path(options.data).stem}{'-fixed' if options.fixed else ''}-{method}{weight}-{seed}"


def finished(method: str, seed: int, options: argparse.Namespace, rho: float) -> dict[str, Any] | None:
    """The row of a run that has ended; it is not tested again."""
    log_file = options.out / f"{_name(method, seed, options, rho)}.json"
    logged = json.loads(log_file.read_text()) if log_file.exists() else {"history": []}
    return dict(logged["row"]) if len(logged["history"]) == options.epochs else None


def run(method: str, seed: int, data: Data, options: argparse.Namespace, rho: float) -> dict[str, Any]:
    """Train one method on one seed, or go on with it, and test it."""
    name = _name(method, seed, options, rho)
    checkpoint, log_file = options.out / f"{name}.pt", options.out / f"{name}.json"
    dtype = getattr(torch, options.precision)
    train = data.train.to(dtype)
    vae = build(method, data, options.latent, options.hidden, rho, seed, options.fixed).to(dtype)
    optimiser = torch.optim.Adam(vae.parameters(), options.rate)
    draw = torch.Generator().manual_seed(seed)
    history: list[dict[str, float]] = []
    if options.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimiser.load_state_dict(state["optimiser"])
        draw.set_state(state["draw"])
        history = state["history"]
    epochs = options.epochs if any(p.requires_grad for p in vae.parameters()) else 0  # SVI of a known generator: none
    with tqdm(total=epochs, initial=len(history), desc=name, unit="epoch", disable=options.quiet) as bar:
        while len(history) < epochs:
            history.append(epoch(vae, optimiser, train, options.batch, draw))
            torch.save(
                {
                    "vae": vae.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "draw": draw.get_state(),
                    "history": history,
                },
                checkpoint,
            )
            bar.update()
            bar.set_postfix(loss=f"{history[-1]['loss']:.2f}", failed=int(history[-1]["failed"]))
    row = {"method": method, "seed": seed, "train_seconds": round(sum(h["seconds"] for h in history), 2)}
    row["failed_share"] = round(sum(h["failed"] for h in history) / max(1, len(history) * len(train)), 6)
    row["graph_kib"] = round(one_graph(vae, train[: options.batch]) / 1024, 1)
    row |= {k: round(v, 5) for k, v in evaluate(vae.double(), data, seed).items()}
    log_file.write_text(json.dumps({"row": row, "history": history}, indent=1) + "\n")
    if data.side is not None:
        picture(vae, data, options.out / f"{name}.png")
    return row


def epoch(
    vae: SemiAmortizedVAE, optimiser: torch.optim.Optimizer, x: Tensor, batch: int, draw: torch.Generator
) -> dict[str, float]:
    """One pass: the mean loss, the data whose inner problem failed, seconds."""
    start, total, failed = time.perf_counter(), 0.0, 0
    order = torch.randperm(len(x), generator=draw)
    for chosen in order.split(batch):
        optimiser.zero_grad()
        result = vae(x[chosen], draw)
        result.loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 5.0)
        optimiser.step()
        total += float(result.loss.detach().sum())
        failed += 0 if result.info is None else int((~result.info.converged).sum())
    return {"loss": total / len(x), "failed": failed, "seconds": time.perf_counter() - start}


def one_graph(vae: SemiAmortizedVAE, x: Tensor) -> int:
    """Bytes that the graph of one step keeps, without data and parameters."""
    return graph_bytes(lambda: vae(x).loss.sum(), exclude=[x, *vae.parameters(), *vae.buffers()])


def evaluate(vae: SemiAmortizedVAE, data: Data, seed: int) -> dict[str, float]:
    """Means over the test set, in nats a datum, with fresh points and β = 1.

    λ without refinement (`plain`), as the method was trained (`trained`), and at the free optimum (`refined`): the
    importance-weighted bound on −log p(x) with 100 points, and −ELBO. Where the latent space is a plane: the exact
    −log p(x), and each exact gap −ELBO − (−log p(x)).
    """
    draw = torch.Generator().manual_seed(1000 + seed)
    x, model = data.test, vae.model
    plain = vae.encode(x).detach()
    best = refined(vae, x, plain, draw)
    lams = {"plain": plain, "trained": vae.infer(x, draw), "refined": best}
    found: dict[str, float] = {}
    for name, lam in lams.items():
        found[f"nll_{name}"] = float(metrics.iwae_nll(model, lam, x, 100, draw).mean())
        found[f"neg_elbo_{name}"] = -float(metrics.elbo(model, lam, x, 100, draw).mean())
    found["kl"] = float(model.family.kl_prior(lams["trained"]).mean())
    found["information"] = float(metrics.mutual_information(model, lams["trained"], 10, draw))
    found["active"] = metrics.active_units(model, lams["trained"])
    if model.latent_dim <= 2:
        exact = metrics.evidence(model, x, nodes=65, width=6.5)
        found["exact_nll"] = -float(exact.value.mean())
        found["exact_nll_error"] = float(exact.error.max())
        for name, lam in lams.items():
            found[f"gap_{name}"] = float((exact.value - metrics.quadrature_elbo(model, lam, x, 12)).mean().detach())
        if data.true_nll is not None:
            found["true_nll"] = data.true_nll
    return found


def paired(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """The mean difference from the VAE of the same seed, and its 95 % interval (Student), of every figure."""
    base = {row["seed"]: row for row in rows if row["method"] == "vae"}
    found: dict[str, dict[str, list[float]]] = {}
    for method in dict.fromkeys(_label(row, rows) for row in rows if row["method"] != "vae"):
        mine = [row for row in rows if _label(row, rows) == method and row["seed"] in base]
        keys = [
            k
            for k in (mine[0] if mine else {})
            if k.startswith(("nll", "neg_elbo", "gap", "exact_nll", "kl", "information"))
        ]
        for key in keys:
            differences = [row[key] - base[row["seed"]][key] for row in mine]
            mean, n = statistics.fmean(differences), len(differences)
            half = STUDENT.get(n, 1.96) * statistics.stdev(differences) / n**0.5 if n > 1 else float("nan")
            found.setdefault(method, {})[key] = [round(v, 4) for v in (mean, mean - half, mean + half)]
    return found


def _label(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The method, and ρ where there are several."""
    several = row["method"] != "vae" and len({other.get("rho") for other in rows}) > 1
    return f"{row['method']}, {row['rho']:g}" if several else str(row["method"])


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, a line a method."""
    keys = ["nll_plain", "nll_trained", "nll_refined", "neg_elbo_plain", "neg_elbo_refined", "kl", "information"]
    keys += ["active"] + [k for k in ("exact_nll", "gap_plain", "gap_trained", "gap_refined") if k in rows[0]]
    keys += ["train_seconds", "graph_kib", "failed_share"]
    lines = ["  ".join([f"{'method':14}", *(f"{k:>16}" for k in keys)])]
    for method in dict.fromkeys(_label(row, rows) for row in rows):
        mine = [row for row in rows if _label(row, rows) == method]
        lines.append("  ".join([f"{method:14}", *(f"{statistics.fmean(r[k] for r in mine):16.4g}" for k in keys)]))
    return "\n".join(lines)


@torch.no_grad()
def picture(vae: SemiAmortizedVAE, data: Data, path: Path, count: int = 10) -> None:
    """Test pictures, their reconstructions from λ⁰ and from λ*, and samples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    x, side = data.test[:count], data.side or 1
    lams = [vae.encode(x), vae.infer(x, torch.Generator().manual_seed(0))]
    latents = [vae.model.family.mean(lam) for lam in lams]
    latents.append(torch.randn(count, vae.model.latent_dim, generator=torch.Generator().manual_seed(0)).to(x))
    panels = [x, *(vae.model.decoder(z).sigmoid() for z in latents)]
    figure, axes = plt.subplots(len(panels), count, figsize=(count * 0.7, len(panels) * 0.8))
    for line, pictures, name in zip(axes, panels, ["data", "from λ⁰", "from λ*", "samples"], strict=True):
        for axis, image in zip(line, pictures, strict=True):
            axis.imshow(image.reshape(side, side), cmap="gray_r", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, fontsize=7)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
