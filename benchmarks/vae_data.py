"""Data for the semi-amortised VAE: scikit-learn's digits, any idx or npz file, sequences of a known generator."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from implicit_layers.demonstration.digits import load
from implicit_layers.vae import LatentModel, metrics

WORDS, LENGTH, HIDDEN = 20, 5, 16  # of the generated sequences


class Data(NamedTuple):
    """Rows for training and testing; pictures have a side, sequences have none."""

    train: Tensor  # (N, n)
    test: Tensor  # (M, n)
    side: int | None
    truth: LatentModel | None  # the generator, where it is known
    true_nll: float | None = None  # the mean of −log p(x) over the test data under it


def read(source: str, seed: int, limit: int | None) -> Data:
    """digits, sequences, or a path: an idx file (may be gzipped), a folder of idx files of images, an npz.

    Pictures are binarised at half of their range, so that log-likelihoods are those of a discrete variable.
    """
    if source == "sequences":
        return sequences(seed, 1000 if limit is None else limit, min(200, limit or 200))
    if source == "digits":
        digits = load(seed, torch.float64, torch.device("cpu"))
        train, test = digits.train_images, digits.test_images
    else:
        train, test = _from_path(Path(source))
        train, test = train / train.max(), test / test.max()
    train, test = (part.flatten(1).gt(0.5).double() for part in (train[:limit], test[: limit and max(1, limit // 3)]))
    side = round(train.shape[1] ** 0.5)
    return Data(train, test, side if side * side == train.shape[1] else None, None)


def _from_path(path: Path) -> tuple[Tensor, Tensor]:
    """Training and test pictures; a single array is split three to one."""
    if path.is_dir():
        names = sorted(p for p in path.iterdir() if "images" in p.name)
        train = [p for p in names if "train" in p.name]
        test = [p for p in names if "train" not in p.name]
        if len(train) != 1 or len(test) != 1:
            raise SystemExit(f"{path}: expected one file of training and one of test images, found {names}")
        return _array(train[0]), _array(test[0])
    whole = _array(path)
    split = 3 * len(whole) // 4
    return whole[:split], whole[split:]


def _array(path: Path) -> Tensor:
    """The numbers of one file, (N, ...)."""
    if path.suffix == ".npz":
        with np.load(path) as archive:
            name = "images" if "images" in archive else archive.files[0]
            return torch.as_tensor(archive[name].astype(np.float64))
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    zero, kind, ndim = struct.unpack(">HBB", content[:4])
    if zero != 0 or kind != 8:
        raise SystemExit(f"{path} is no idx file of bytes")
    shape = struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])
    return torch.as_tensor(np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape).astype(np.float64))


class SequenceLikelihood(nn.Module):
    """p(x | z) of words, one after the other by an LSTM that sees z and the word before; the decoder is the identity.

    A cell of elementary operations, since second derivatives are needed (cuDNN's LSTM has none).
    """

    def __init__(self, dim: int = 2, words: int = WORDS, hidden: int = HIDDEN, length: int = LENGTH) -> None:
        super().__init__()
        self.words, self.hidden, self.length = words, hidden, length
        self.embed = nn.Parameter(torch.randn(words + 1, hidden) / hidden**0.5)  # the last one begins a sequence
        self.gates = nn.Linear(2 * hidden + dim, 4 * hidden)
        self.out = nn.Linear(hidden + dim, words)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:  # (S, *B, D), (*B, T) -> (S, *B, T)
        batch = torch.broadcast_shapes(z.shape[:-1], x.shape[:-1])
        z = z.expand(*batch, -1)
        words = x.long()
        h = c = z.new_zeros(*batch, self.hidden)
        before, total = self.embed[self.words], []
        for t in range(x.shape[-1]):
            h, c, log_p = self._step(z, before, h, c)
            total.append(log_p.gather(-1, words[..., t].expand(batch).unsqueeze(-1)))
            before = self.embed[words[..., t]]
        return torch.cat(total, -1)

    def _step(self, z: Tensor, before: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        i, f, o, g = self.gates(torch.cat([z, h, before.expand_as(h)], -1)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h, c, self.out(torch.cat([h, z], -1)).log_softmax(-1)

    @torch.no_grad()
    def generate(self, z: Tensor, generator: torch.Generator) -> Tensor:  # (N, D) -> (N, T)
        h = c = z.new_zeros(len(z), self.hidden)
        before, found = self.embed[self.words].expand(len(z), -1), []
        for _ in range(self.length):
            h, c, log_p = self._step(z, before, h, c)
            word = torch.multinomial(log_p.exp(), 1, generator=generator).squeeze(-1)
            before = self.embed[word]
            found.append(word)
        return torch.stack(found, -1)


def sequences(seed: int, train: int, test: int) -> Data:
    """Sequences of a random generator with two latent numbers, which is returned too."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    truth = SequenceLikelihood().double()
    with torch.no_grad():
        for parameter in truth.parameters():
            parameter.uniform_(-1.5, 1.5, generator=draw)  # strong enough for z to matter
    z = torch.randn(train + test, 2, dtype=torch.float64, generator=draw)
    x = truth.generate(z, draw).double()
    model = LatentModel(nn.Identity(), 2, truth).requires_grad_(False)
    true_nll = -float(metrics.evidence(model, x[train:], nodes=65, width=6.5).value.mean())
    return Data(x[:train], x[train:], None, model, true_nll)


def describe(source: str, data: Data) -> dict[str, Any]:
    """What a result file says about its data."""
    return {"source": Path(source).name, "train": len(data.train), "test": len(data.test), "size": data.train.shape[1]}
