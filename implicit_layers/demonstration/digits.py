"""The handwritten digits that scikit-learn ships: 1797 images of 8 × 8 grey values, ten classes."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_layers.errors import MissingDependencyError


class Digits(NamedTuple):
    """Images as rows of 64 numbers in [0, 1], with their labels, split for training and testing."""

    train_images: Tensor  # (1347, 64)
    train_labels: Tensor  # (1347,)
    test_images: Tensor  # (450, 64)
    test_labels: Tensor  # (450,)


def load(seed: int, dtype: torch.dtype, device: torch.device) -> Digits:
    """The digits, a quarter of each class held out for testing; the split depends on the seed."""
    images, labels = require("sklearn.datasets").load_digits(return_X_y=True)
    parts = require("sklearn.model_selection").train_test_split(
        images / 16.0, labels, test_size=0.25, random_state=seed, stratify=labels
    )
    train_images, test_images = (torch.as_tensor(part, dtype=dtype, device=device) for part in parts[:2])
    train_labels, test_labels = (torch.as_tensor(part, dtype=torch.int64, device=device) for part in parts[2:])
    return Digits(train_images, train_labels, test_images, test_labels)


def require(module: str) -> ModuleType:
    """An optional module, or an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise MissingDependencyError(
            f"the demonstration needs {package}, which cannot be imported ({error}); "
            'install it with: pip install "implicit_layers[examples]"'
        ) from error
