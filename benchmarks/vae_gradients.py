"""`python -m benchmarks.vae_gradients`: what each gradient through the inner problem costs, and how wrong it is.

Writes a JSON file, of which `python -m benchmarks.plot` makes a figure and a table: the error of the decoder's gradient
against that of the inner solution (outer = inner objective: order 1 for the envelope, 2 for implicit and unrolled), the
encoder's gradient against the number of unrolled steps (it vanishes), bytes and milliseconds against that number.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.run import environment
from implicit_layers.measure import graph_bytes, milliseconds
from implicit_layers.solvers.newton import Newton
from implicit_layers.vae import Anchor, Bernoulli, Descent, InnerProblem, LatentModel, Noise, refine

STEPS = (1, 2, 5, 10, 20, 40, 80, 160)
ORDER_STEPS = (60, 100, 140, 180, 220, 260)
CPU = torch.device("cpu")


class Setting:
    """A small Bernoulli model, a batch and frozen points, in float64."""

    def __init__(self, batch: int = 16, latent: int = 3, hidden: int = 16, size: int = 30, seed: int = 0) -> None:
        torch.manual_seed(seed)
        decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, size)).double()
        self.model = LatentModel(decoder, latent, Bernoulli())
        self.x = torch.rand(batch, size).round().double()
        self.lam0 = (0.3 * torch.randn(batch, 2 * latent)).double().requires_grad_()
        self.eps = Noise("cubature").draw(latent, (batch,), dtype=torch.float64)
        self.alive = [self.x, self.lam0, self.eps, *self.model.parameters()]

    def lam(self, problem: InnerProblem, **settings: Any) -> Tensor:
        return refine(self.model, self.x, self.lam0, self.eps, problem=problem, on_failure="ignore", **settings).value

    def loss(self, lam: Tensor) -> Tensor:
        return self.model.free_energy(lam, self.x, self.eps).sum()

    def decoder_gradient(self, lam: Tensor) -> Tensor:
        found = torch.autograd.grad(self.loss(lam), list(self.model.parameters()))
        return torch.cat([g.flatten() for g in found])


def orders(setting: Setting, step: float = 0.05, steps: Sequence[int] = ORDER_STEPS) -> dict[str, Any]:
    """Gradient errors against inner errors, and the slopes of the straight lines through their logarithms."""
    problem = InnerProblem(Anchor("none"))
    best = setting.lam(problem, solver=Newton(), grad="envelope")
    exact = setting.decoder_gradient(best)
    found: dict[str, Any] = {"inner": [], "envelope": [], "implicit": [], "unrolled": [], "encoder": []}
    for count in steps:
        descent = Descent(count, step, 0.0)
        for grad in ("envelope", "implicit", "unrolled"):
            lam = setting.lam(problem, solver=descent, grad=grad)
            found[grad].append(float((setting.decoder_gradient(lam) - exact).norm() / exact.norm()))
        found["inner"].append(float((lam - best).detach().norm() / best.norm()))
        lam = setting.lam(problem, solver=descent, grad="unrolled")
        (encoder,) = torch.autograd.grad(setting.loss(lam), setting.lam0)
        found["encoder"].append(float(encoder.norm()))
    found["steps"] = list(steps)
    found["slopes"] = {k: slope(found["inner"], found[k]) for k in ("envelope", "implicit", "unrolled", "encoder")}
    return found


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent of y as a power of x, by least squares on the logarithms."""
    a, b = ([math.log(v) for v in values] for values in (x, y))
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((u - mean_a) * (v - mean_b) for u, v in zip(a, b, strict=True)) / sum((u - mean_a) ** 2 for u in a)


def costs(setting: Setting, steps: Sequence[int] = STEPS, repeats: int = 5) -> list[dict[str, Any]]:
    """Bytes of the graph, and milliseconds forward and backward (the least of some repeats), for every way."""
    problem = InnerProblem(Anchor("l2"))
    rows = []
    ways: list[tuple[str, str, int, Any]] = [
        (f"{grad}", grad, k, Descent(k, 0.05, 0.0))
        for grad in ("unrolled", "implicit", "frozen_hessian", "envelope")
        for k in steps
    ]
    ways.append(("implicit, Newton", "implicit", 0, Newton(tol=1e-5)))
    for name, grad, k, solver in ways:

        def compute(grad: str = grad, solver: Any = solver) -> Tensor:
            return setting.loss(setting.lam(problem, solver=solver, grad=grad))

        times = []
        for _ in range(repeats):
            loss, forward = milliseconds(compute, CPU)
            _, backward = milliseconds(loss.backward, CPU)
            times.append((forward + backward, forward, backward))
        total, forward, backward = min(times)
        size = graph_bytes(compute, exclude=setting.alive)
        row = {"way": name, "steps": k, "bytes": size, "ms": total, "forward_ms": forward, "backward_ms": backward}
        rows.append({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.vae_gradients")
    arguments.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "vae-gradients.json")
    arguments.add_argument("--quick", action="store_true", help="few steps, to see that it runs; not for figures")
    options = arguments.parse_args(argv)
    setting = Setting()
    found = orders(setting)
    rows = costs(setting, STEPS[:4] if options.quick else STEPS, 1 if options.quick else 5)
    head = {"suite": "vae-gradients", "quick": options.quick, "environment": environment("cpu", 0)}
    options.result.write_text(json.dumps({**head, "orders": found, "costs": rows}, indent=1, sort_keys=True) + "\n")
    print({k: round(v, 2) for k, v in found["slopes"].items()})
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
