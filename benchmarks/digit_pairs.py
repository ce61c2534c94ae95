"""`python -m benchmarks.digit_pairs [--quick]`: two handwritten digits a picture, and a layer that chooses two of ten.

The label of a picture is the set of its two digits, which differ. Five heads on the same small network, each trained on
the same pictures: the two usual ones, and three that know that exactly two of ten are right. Score: pictures of unseen
digits for which the two largest scores are the right two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import implicit_layers as il
from benchmarks.run import RESULTS, save
from implicit_layers.demonstration import digits

K = 2
SEEDS = (0, 1, 2, 3, 4)
TRAINING_PAIRS, TEST_PAIRS, NOISE = 4000, 2000, 0.1
EPOCHS, BATCH, WIDTH = 25, 100, 128


def pairs(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` noisy pictures of two different digits side by side, and which two, as ones among ten zeros."""
    chosen = torch.randint(len(images), (4 * count, 2), generator=generator)
    chosen = chosen[labels[chosen[:, 0]] != labels[chosen[:, 1]]][:count]
    pictures = images[chosen].reshape(count, 2, 8, 8).movedim(1, 2).reshape(count, 128)
    targets = torch.zeros(count, 10).scatter(1, labels[chosen], 1.0)
    return pictures + NOISE * torch.randn(pictures.shape, generator=generator), targets


def independent(scores: Tensor, target: Tensor) -> Tensor:
    """Ten separate yes-or-no questions."""
    return nn.functional.binary_cross_entropy_with_logits(scores, target)


def one_of_ten(scores: Tensor, target: Tensor) -> Tensor:
    """Softmax against half and half."""
    return nn.functional.cross_entropy(scores, target / K)


def top_two(scores: Tensor, target: Tensor) -> Tensor:
    """The log-likelihood of both right digits after the layer: max ⟨x, y⟩ + H(y), 0 ≤ y ≤ 1, Σy = 2."""
    y = il.soft_top_k(scores, K)
    return -(target * y.clamp(min=1e-12).log()).sum(-1).mean()


def top_two_distance(scores: Tensor, target: Tensor) -> Tensor:
    """The Fenchel–Young loss of the same layer: its gradient in the scores is y − target."""
    return il.fenchel_young_loss(scores, target, "binary_entropy", total=K).mean()


def top_two_euclidean(scores: Tensor, target: Tensor) -> Tensor:
    """The Fenchel–Young loss of the projection onto the capped simplex, written out: its gradient is y − target."""
    y = il.projections.capped_simplex(scores, K)
    return ((scores * y - 0.5 * y.square()).sum(-1) - (scores * target - 0.5 * target).sum(-1)).mean()


HEADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid, cross-entropy": independent,
    "softmax, cross-entropy": one_of_ten,
    "soft_top_k, log-likelihood": top_two,
    "soft_top_k, Fenchel-Young": top_two_distance,
    "capped_simplex, Fenchel-Young": top_two_euclidean,
}


def trained(head: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train one head from one seed, and count the pictures that it gets right."""
    data = digits.load(seed, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    pictures, targets = pairs(data.train_images, data.train_labels, TRAINING_PAIRS, generator)
    unseen, truth = pairs(data.test_images, data.test_labels, TEST_PAIRS, generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(TRAINING_PAIRS, generator=generator).split(BATCH):
            optimiser.zero_grad()
            HEADS[head](model(pictures[batch]), targets[batch]).backward()
            optimiser.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        found = torch.zeros_like(truth).scatter(1, model(unseen).topk(K).indices, 1.0)
    both = (found * truth).sum(-1)
    return {
        "head": head,
        "seed": seed,
        "both right": float((both == K).float().mean()),
        "digits right": float(both.mean() / K),
        "seconds": seconds,
    }


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """One row a head and seed."""
    return [trained(head, seed, 1 if quick else EPOCHS) for head in HEADS for seed in (SEEDS[:1] if quick else SEEDS)]


def main(argv: Sequence[str] | None = None) -> int:
    """Train all, print the means, write the rows."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.digit_pairs", description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="one epoch, one seed: to see that it runs")
    arguments.add_argument("--out", type=Path, default=RESULTS)
    options = arguments.parse_args(argv)
    found = rows(options.quick)
    for head in HEADS:
        right = [row["both right"] for row in found if row["head"] == head]
        print(f"{head:32} both right: {sum(right) / len(right):.3f}")
    save(options.out, "digit_pairs", options.quick, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
