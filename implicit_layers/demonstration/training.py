"""Training each model twice from the same weights, and measuring what each way of differentiating costs."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from implicit_layers.demonstration.digits import Digits, load, require
from implicit_layers.demonstration.models import Classifier, How, QPClassifier, SoftmaxClassifier
from implicit_layers.measure import graph_bytes, milliseconds, relative_error

WAYS: tuple[How, How] = ("implicit", "unrolled")
MODELS: dict[str, Callable[[], Classifier]] = {
    "softmax LP": SoftmaxClassifier,
    "QP layer": QPClassifier,
}


@dataclass(frozen=True)
class Settings:
    """What the command line sets."""

    device: str = "cpu"
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float64"
    quick: bool = False
    batch: int = 64
    learning_rate: float = 5e-3

    @property
    def epochs(self) -> int:
        """Passes over the training set."""
        return 2 if self.quick else 15


@dataclass
class Result:
    """One model differentiated in one way: how it learned, and what a step cost."""

    model: str
    how: How
    losses: list[float] = field(default_factory=list)  # mean of each epoch
    accuracies: list[float] = field(default_factory=list)  # on the test set after each epoch
    forward_ms: float = 0.0  # medians of a step
    backward_ms: float = 0.0
    graph_bytes: int = 0
    gradient_error: float = 0.0  # relative, at the same weights and batch


def run(settings: Settings) -> list[Result]:
    """Train both models both ways, with progress bars, and measure; two results a model."""
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    digits = load(settings.seed, dtype, device)
    results: list[Result] = []
    for name, build in MODELS.items():
        torch.manual_seed(settings.seed)
        model = build().to(device, dtype)
        results += _train_both_ways(name, model, digits, settings)
    return results


def _train_both_ways(name: str, model: Classifier, digits: Digits, settings: Settings) -> list[Result]:
    """Alternate between the two ways batch by batch, so that both see the same data and the same machine."""
    device = digits.train_images.device
    models = {how: copy.deepcopy(model) for how in WAYS}
    optimisers = {how: torch.optim.Adam(models[how].parameters(), lr=settings.learning_rate) for how in WAYS}
    results = {how: Result(name, how) for how in WAYS}
    times: dict[How, list[tuple[float, float]]] = {how: [] for how in WAYS}
    shuffle = torch.Generator().manual_seed(settings.seed)
    steps = len(digits.train_labels) // settings.batch
    with require("tqdm").tqdm(total=settings.epochs * steps, desc=f"{name:10}", unit="step") as bar:
        for _ in range(settings.epochs):
            losses: dict[How, list[float]] = {how: [] for how in WAYS}
            for k, (images, labels) in enumerate(_batches(digits, settings.batch, shuffle)):
                for how in WAYS if k % 2 == 0 else reversed(WAYS):
                    loss, timing = _step(models[how], optimisers[how], images, labels, how, device)
                    losses[how].append(loss)
                    times[how].append(timing)
                bar.update()
            for how in WAYS:
                results[how].losses.append(statistics.fmean(losses[how]))
                results[how].accuracies.append(_accuracy(models[how], digits, how))
            bar.set_postfix({how: f"{results[how].accuracies[-1]:.1%}" for how in WAYS})
    images, labels = digits.train_images[: settings.batch], digits.train_labels[: settings.batch]
    exact = _exact_gradient(models["implicit"], images, labels)
    for how in WAYS:
        result = results[how]
        result.forward_ms, result.backward_ms = (statistics.median(part) for part in zip(*times[how], strict=True))
        result.graph_bytes = _graph_bytes(models[how], images, labels, how)
        result.gradient_error = relative_error(_gradient(models["implicit"], images, labels, how), exact)
    return list(results.values())


def _batches(digits: Digits, batch: int, shuffle: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Full batches in a random order."""
    order = torch.randperm(len(digits.train_labels), generator=shuffle).to(digits.train_labels.device)
    for start in range(0, len(order) - batch + 1, batch):
        chosen = order[start : start + batch]
        yield digits.train_images[chosen], digits.train_labels[chosen]


def _step(
    model: Classifier,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    how: How,
    device: torch.device,
) -> tuple[float, tuple[float, float]]:
    """One training step: its loss, and the milliseconds of its forward and backward pass."""
    optimiser.zero_grad()
    loss, forward = milliseconds(lambda: model.loss(images, labels, how), device)
    _, backward = milliseconds(loss.backward, device)
    optimiser.step()
    return float(loss.detach()), (forward, backward)


def _accuracy(model: Classifier, digits: Digits, how: How) -> float:
    """Share of the test set that is guessed right."""
    with torch.no_grad():
        guess = model.scores(digits.test_images, how).argmax(-1)
    return float((guess == digits.test_labels).double().mean())


def _gradient(model: Classifier, images: Tensor, labels: Tensor, how: How) -> tuple[Tensor, ...]:
    """The gradient of the loss for every parameter."""
    parameters = tuple(model.parameters())
    return torch.autograd.grad(model.loss(images, labels, how), parameters)


def _exact_gradient(model: Classifier, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The same in float64 on the CPU by an independent exact route, at the same weights and batch."""
    exact = copy.deepcopy(model).to("cpu", torch.float64)
    return tuple(
        part.to(images.device) for part in _gradient(exact, images.to("cpu", torch.float64), labels.cpu(), "exact")
    )


def _graph_bytes(model: Classifier, images: Tensor, labels: Tensor, how: How) -> int:
    """Bytes that the graph of one step keeps, without the parameters and the batch itself."""
    alive = [*model.parameters(), images, labels]
    return graph_bytes(lambda: model.loss(images, labels, how), exclude=alive)
