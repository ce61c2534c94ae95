"""OptNet's denoising task, total variation with a learned D: `python -m benchmarks.denoising [--quick] [--out FOLDER]`.

A piecewise constant signal x of 1 to 10 pieces, heights 10 to 100, is seen as y = x + noise of size 10 and estimated by

    z = argmin_z ½|z − y|² + |D z|₁.

Total variation takes D = λ times the differences of neighbours, with the best λ. Here D is learned, from the squared
error of z, in two ways: one D for all signals, and a D that a small network makes for each one. The layer solves the
dual, which has nothing but bounds: z = y − Dᵀu, u = argmin_u ½uᵀ(DDᵀ + εI)u − (Dy)ᵀu, −1 ≤ u ≤ 1; D enters all of it.
With ε = 0.001 the corner of |·| is rounded over that width, a ten-thousandth of the noise, and u is unique for any D.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import implicit_layers as il
from benchmarks.run import RESULTS, save

LENGTH, NOISE, CORNER = 100, 10.0, 1e-3
STRENGTHS = (14.0, 16.0, 18.0, 19.0, 20.0, 21.0, 22.0, 24.0)  # λ of plain total variation, to choose from


class Signals(NamedTuple):
    """Clean and noisy signals, (N, length) each."""

    clean: Tensor
    noisy: Tensor


def signals(count: int, seed: int, length: int = LENGTH) -> Signals:
    """Pieces between distinct random cuts, each at a height of its own."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.empty(count, length, dtype=torch.float64)
    for signal in clean:
        pieces = int(torch.randint(1, 11, (), generator=generator))
        cuts = torch.randperm(length - 1, generator=generator)[: pieces - 1] + 1
        heights = 10 + 90 * torch.rand(pieces, generator=generator, dtype=torch.float64)
        piece = torch.zeros(length, dtype=torch.long)
        piece[cuts] = 1
        signal.copy_(heights[piece.cumsum(0)])
    return Signals(clean, clean + NOISE * torch.randn(clean.shape, generator=generator, dtype=torch.float64))


def differences(length: int) -> Tensor:  # (length - 1, length)
    return torch.diff(torch.eye(length, dtype=torch.float64), dim=0)


def estimate(D: Tensor, y: Tensor) -> Tensor:  # (m, n) or (N, m, n), (N, n) -> (N, n)
    """The minimiser z, through its dual; a solve that fails warns, and gives its signal no gradient."""
    one = torch.ones(D.shape[-2], dtype=torch.float64)
    p = -(D @ y.unsqueeze(-1)).squeeze(-1)
    u = il.solve_qp(D @ D.mT + CORNER * one.diag(), p, lb=-one, ub=one, gradient="least_norm", on_failure="warn").z
    return y - (u.unsqueeze(-2) @ D).squeeze(-2)


def error(z: Tensor, clean: Tensor) -> Tensor:
    return (z - clean).square().mean()


# --- what is learned --------------------------------------------------------------------------------------------------


class OneD(nn.Module):
    """One D for all signals: two banks of filters on the differences, each a row of taps moved along the signal.

    At the start the first is total variation, the second the jump over six steps, weak. Constants cost nothing.
    """

    def __init__(self, strength: float, length: int = LENGTH, reach: int = 6) -> None:
        super().__init__()
        taps = torch.zeros(2, 2 * reach + 1, dtype=torch.float64)
        taps[0, reach], taps[1, reach - 3 : reach + 3] = 0.7 * strength, 0.1 * strength
        self.taps = nn.Parameter(taps)
        place = torch.arange(length - 1)
        self.offset = place - place[:, None] + reach
        self.differences = differences(length)

    def D(self) -> Tensor:  # (2 (length - 1), length)
        last = self.taps.shape[-1] - 1
        inside = (self.offset >= 0) & (self.offset <= last)
        banks = torch.where(inside, self.taps[:, self.offset.clamp(0, last)], 0.0)
        return banks.flatten(0, 1) @ self.differences

    def forward(self, y: Tensor, first: Tensor) -> Tensor:
        return estimate(self.D(), y)


class OwnD(nn.Module):
    """A D for each signal: differences with weights by a small network that sees y and its total variation."""

    def __init__(self, strength: float, length: int = LENGTH, width: int = 16, reach: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (4, width):
            layers += [nn.Conv1d(channels, width, 2 * reach + 1, padding=reach, dtype=torch.float64), nn.ReLU()]
        last = nn.Conv1d(width, 1, 2 * reach + 1, padding=reach, dtype=torch.float64)
        nn.init.zeros_(last.weight)  # so that it starts as total variation
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*layers, last)
        self.strength, self.differences = strength, differences(length)

    def weights(self, y: Tensor, first: Tensor) -> Tensor:  # (N, n), (N, n) -> (N, n - 1)
        rest = (y - first) / NOISE
        steps, noisy = (first @ self.differences.mT) / NOISE, (y @ self.differences.mT) / NOISE
        seen = [steps.abs().sqrt(), noisy.abs(), steps, 0.5 * (rest[:, 1:] + rest[:, :-1])]
        return self.strength * self.network(torch.stack(seen, 1)).squeeze(1).exp()

    def forward(self, y: Tensor, first: Tensor) -> Tensor:
        return estimate(self.weights(y, first).unsqueeze(-1) * self.differences, y)


# --- training ---------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Signals with their total-variation estimates."""

    clean: Tensor
    noisy: Tensor
    first: Tensor


def in_parts(model: Callable[[Tensor, Tensor], Tensor], data: Data) -> Tensor:
    """The estimates of all signals, without gradient, a hundred at a time."""
    with torch.no_grad():
        parts = zip(data.noisy.split(100), data.first.split(100), strict=True)
        return torch.cat([model(y, first) for y, first in parts])


def total_variation(training: Signals, test: Signals, tuned_on: int = 500) -> tuple[float, Data, Data]:
    """The strength with the least error on training signals, and both sets with their estimates."""
    D = differences(training.clean.shape[-1])

    def estimates(strength: float, part: Signals) -> Tensor:
        return in_parts(lambda y, _: estimate(strength * D, y), Data(*part, part.noisy))

    few = Signals(*(part[:tuned_on] for part in training))
    best = min(STRENGTHS, key=lambda strength: float(error(estimates(strength, few), few.clean)))
    return best, *(Data(*part, estimates(best, part)) for part in (training, test))


def train(
    model: nn.Module, training: Data, test: Data, *, steps: int, batch: int, lr: float, seed: int, every: int = 25
) -> dict[str, Any]:
    """Adam on the mean squared error; the curve has the running training error and the test error."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    curve: list[list[float]] = []
    start, mean = time.perf_counter(), 0.0
    few = Data(*(part[:200] for part in test))
    for step in range(1, steps + 1):
        chosen = torch.randint(len(training.clean), (batch,), generator=order)
        loss = error(model(training.noisy[chosen], training.first[chosen]), training.clean[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean = loss.item() if step == 1 else 0.9 * mean + 0.1 * loss.item()
        if step % every == 0 or step == steps:
            curve.append([step, *(float(f"{v:.4g}") for v in (mean, float(error(in_parts(model, few), few.clean))))])
    found = float(error(in_parts(model, test), test.clean))
    return {
        "test_mse": found, "parameters": sum(part.numel() for part in model.parameters()), "steps": steps,
        "batch": batch, "lr": lr, "seconds": round(time.perf_counter() - start, 1), "curve": curve,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.denoising", description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="short signals and a few steps, to see that it runs")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = arguments.parse_args(argv)
    length = 30 if options.quick else LENGTH
    count, test_count, steps, batch = (60, 20, 4, 10) if options.quick else (3000, 500, options.steps, 32)
    drawn = [signals(n, options.seed + k, length) for k, n in enumerate((count, test_count))]
    strength, training, test = total_variation(*drawn)
    plain = float(error(test.first, test.clean))
    rows: list[dict[str, Any]] = [
        {"model": "no denoising", "test_mse": float(error(test.noisy, test.clean))},
        {"model": "total variation", "test_mse": plain, "strength": strength},
    ]
    for name, kind, lr in (("one learned D", OneD, 0.05), ("a learned D for each signal", OwnD, 0.01)):
        torch.manual_seed(options.seed)
        row = train(
            kind(strength, length), training, test, steps=steps, batch=batch, lr=lr, seed=options.seed, every=25
        )
        rows.append({"model": name, **row})
    for row in rows:
        row["test_signals"] = test_count
        print(
            f"{row['model']}: test error {row['test_mse']:.2f}, {row['test_mse'] / plain - 1:+.1%} of total variation"
        )
    print(save(options.out, "denoising", options.quick, rows, options.seed, length=length, noise=NOISE))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
