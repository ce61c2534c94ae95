"""`python -m benchmarks.sparse_attention [--quick]`: a small transformer on letters, with three kinds of attention.

The text is real and everywhere: the language reference that Python carries for `help()`. The same model is trained with
softmax, entmax (α = 1.5) and sparsemax attention. Scores: bits a letter on text it has not seen, how many attention
weights are exactly zero, and the time of a training step.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import implicit_layers as il
from benchmarks.run import RESULTS, save

SEEDS = (0, 1, 2)
STEPS, BATCH, CONTEXT = 600, 32, 64
WIDTH, HEADS, LAYERS = 64, 4, 2

ATTENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": il.softmax,
    "entmax 1.5": il.entmax,
    "sparsemax": il.sparsemax,
}


class Text(NamedTuple):
    """Letters as numbers; the last tenth is kept for testing."""

    training: Tensor
    test: Tensor
    letters: int


def text() -> Text:
    """The topics of Python's own help, in alphabetical order."""
    whole = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    alphabet = sorted(set(whole))
    number = {letter: i for i, letter in enumerate(alphabet)}
    letters = torch.tensor([number[letter] for letter in whole])
    cut = len(letters) * 9 // 10
    return Text(letters[:cut], letters[cut:], len(alphabet))


class Attention(nn.Module):
    """Causal attention of several heads; letters that come later are masked with −∞."""

    def __init__(self, attend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.project(x).reshape(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = self.attend((q @ k.mT / math.sqrt(WIDTH // HEADS)).masked_fill(later, -math.inf))
        self.weights = weights.detach()
        return self.out((weights @ v).movedim(1, 2).reshape(batch, length, WIDTH))


class Block(nn.Module):
    """Attention and a small network, each added to what comes in."""

    def __init__(self, attend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = Attention(attend)
        self.network = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.network(self.second(x))


class Transformer(nn.Module):
    """Letters to the scores of the letters after them."""

    def __init__(self, attend: Callable[[Tensor], Tensor], letters: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(attend) for _ in range(LAYERS)))
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters))

    def forward(self, letters: Tensor) -> Tensor:
        return self.out(self.blocks(self.letters(letters) + self.places.weight[: letters.shape[-1]]))


def windows(letters: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Pieces of the text, and the same one letter later."""
    index = starts.unsqueeze(-1) + torch.arange(CONTEXT)
    return letters[index], letters[index + 1]


def loss_of(model: Transformer, pieces: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the next letter, in nats."""
    return nn.functional.cross_entropy(model(pieces[0]).flatten(0, 1), pieces[1].flatten())


def trained(attention: str, seed: int, steps: int) -> dict[str, Any]:
    """Train with one attention from one seed."""
    data = text()
    torch.manual_seed(seed)
    model = Transformer(ATTENTIONS[attention], data.letters)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        optimiser.zero_grad()
        loss_of(model, windows(data.training, torch.randint(len(data.training) - CONTEXT, (BATCH,)))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        times.append(1e3 * (time.perf_counter() - start))
    with torch.no_grad():
        starts = torch.arange(0, len(data.test) - CONTEXT - 1, CONTEXT)
        loss = loss_of(model, windows(data.test, starts))
    seen = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()
    weights = torch.cat([block.attention.weights[..., seen].flatten() for block in model.blocks])
    return {
        "attention": attention,
        "seed": seed,
        "bits a letter": float(loss) / math.log(2),
        "weights that are zero": float((weights == 0).float().mean()),
        "ms a step": statistics.median(times),
    }


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """One row an attention and seed."""
    seeds = SEEDS[:1] if quick else SEEDS
    return [trained(attention, seed, 3 if quick else STEPS) for attention in ATTENTIONS for seed in seeds]


def main(argv: Sequence[str] | None = None) -> int:
    """Train all, print the means, write the rows."""
    arguments = argparse.ArgumentParser(
        prog="python -m benchmarks.sparse_attention", description=__doc__.splitlines()[0]
    )
    arguments.add_argument("--quick", action="store_true", help="three steps, one seed: to see that it runs")
    arguments.add_argument("--out", type=Path, default=RESULTS)
    options = arguments.parse_args(argv)
    found = rows(options.quick)
    for attention in ATTENTIONS:
        mine = [row for row in found if row["attention"] == attention]
        means = (statistics.mean(row[key] for row in mine) for key in ("bits a letter", "weights that are zero"))
        print("{:12} bits a letter {:.3f}, zero weights {:.2f}".format(attention, *means))
    save(options.out, "sparse_attention", options.quick, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
