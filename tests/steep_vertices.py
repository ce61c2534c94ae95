"""Quadratic programs with ill-conditioned vertices, their solutions and gradients to more than fifty digits.

About as many rows are active as there are unknowns, nearly parallel, and Q spreads over many decades. Everything is
drawn from a solution, rounded, and then solved again as the rounded numbers stand, on the known active set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BITS = 400  # behind the point of all numbers


@dataclass(frozen=True)
class Truth:
    """A solution, and the gradient of Σ weight∘(z, λ) by p and h; float64, rounded once."""

    z: Tensor  # (n,)
    lam: Tensor  # (n_ineq,)
    by_p: Tensor  # (n,)
    by_h: Tensor  # (n_ineq,)
    condition: float  # |K| |K⁻¹| on the active set, in the 1-norm


@dataclass(frozen=True)
class Steep:
    """A batch of programs without equalities, and the truth about each."""

    Q: Tensor  # (B or 1, n, n)
    p: Tensor  # (B, n)
    G: Tensor  # (B or 1, n_ineq, n)
    h: Tensor  # (B, n_ineq)
    weight: Tensor  # (n + n_ineq,): of the loss
    truths: list[Truth]

    def stacked(self, name: str) -> Tensor:
        """A field of all truths."""
        return torch.stack([getattr(truth, name) for truth in self.truths])


def steep(
    n: int,
    n_ineq: int,
    *,
    batch: int,
    seed: int,
    active: int,
    parallel: float,
    spread: float,
    shared: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Steep:
    """Draw programs: Q of condition `spread`; `active` rows, the last two within `parallel` of the span of the others.

    `shared`: one Q and G for the batch, whose programs differ in p and h.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    own = 1 if shared else batch
    V = torch.linalg.qr(normal(own, n, n))[0]
    decades = torch.tensor(spread, dtype=torch.float64).log10().item()
    Q = V * torch.logspace(0, -decades, n, dtype=torch.float64) @ V.mT
    G = normal(own, n_ineq, n)
    last = min(2, active - 1)
    first = active - last
    mixed = normal(own, last, first) @ G[:, :first] / first**0.5
    G[:, first:active] = mixed + parallel * normal(own, last, n)
    G = G / torch.linalg.vector_norm(G, dim=-1, keepdim=True)
    order = torch.randperm(n_ineq, generator=generator)
    on = torch.arange(n_ineq)[order] < active
    Q, G = (0.5 * (Q + Q.mT)).to(dtype), G[:, order].to(dtype)
    z = normal(batch, n)
    lam = torch.where(on, 0.5 + uniform(batch, n_ineq), 0.0)
    slack = torch.where(on, 0.0, 0.1 + uniform(batch, n_ineq))
    h = (G.double() @ z.unsqueeze(-1)).squeeze(-1) + slack
    p = -((Q.double() @ z.unsqueeze(-1)).squeeze(-1) + (G.double().mT @ lam.unsqueeze(-1)).squeeze(-1))
    weight = normal(n + n_ineq)
    p, h = p.to(dtype), h.to(dtype)
    return Steep(Q, p, G, h, weight, [truth(Q[i % own], p[i], G[i % own], h[i], on, weight) for i in range(batch)])


def exact(values: Tensor) -> np.ndarray:
    """The numbers of a tensor as they are, in units of 2^-BITS: whole, and fifteen times as fast as mpmath's."""
    ratios = [x.as_integer_ratio() for x in values.double().flatten().tolist()]
    return np.array([(above << BITS) // below for above, below in ratios], dtype=object).reshape(values.shape)


def product(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    return (A @ B) >> BITS


def inverted(K: np.ndarray) -> np.ndarray:
    """Eliminate with pivots."""
    n = len(K)
    both = np.concatenate([K, exact(torch.eye(n))], axis=1)
    for i in range(n):
        best = i + int(np.argmax(np.abs(both[i:, i])))
        both[[i, best]] = both[[best, i]]
        both[i] = (both[i] << BITS) // both[i, i]
        others = np.arange(n) != i
        both[others, i:] -= np.outer(both[others, i], both[i, i:]) >> BITS
    return both[:, n:]


def truth(Q: Tensor, p: Tensor, G: Tensor, h: Tensor, on: Tensor, weight: Tensor) -> Truth:
    """Solve one program on its active set, the numbers taken as they are; the set is verified."""
    n, m, rows = p.shape[0], h.shape[0], on.nonzero().flatten()
    k = rows.shape[0]
    held, curved = exact(G[rows]), exact(Q)
    K = np.block([[(curved + curved.T) // 2, held.T], [held, exact(torch.zeros(k, k))]])
    inverse = inverted(K)
    solution = product(inverse, np.concatenate([exact(-p), exact(h[rows])]))
    adjoint = product(inverse, np.concatenate([exact(weight[:n]), exact(weight[n:][rows])]))
    slack = exact(h) - product(exact(G), solution[:n])
    if min([*solution[n:], *slack[~on.numpy()]]) <= 0:
        raise ValueError("once rounded, the program has another active set than the one it was drawn from")
    condition = np.abs(K).sum(0).max() * np.abs(inverse).sum(0).max() / 4**BITS
    full, moved = ([x / 2**BITS for x in vector] for vector in (solution, adjoint))

    def spread(numbers: list[float]) -> Tensor:
        return torch.zeros(m, dtype=torch.float64).index_copy(0, rows, torch.tensor(numbers, dtype=torch.float64))

    by_p = -torch.tensor(moved[:n], dtype=torch.float64)
    return Truth(torch.tensor(full[:n], dtype=torch.float64), spread(full[n:]), by_p, spread(moved[n:]), condition)
