"""Integers times a momentum: right to one unit, and undone to the last bit."""

import math
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicit_layers.ledger import Ledger, fraction, scales, whole

MOMENTA = (0.0, 1e-3, 0.3, 0.5, 0.8765432, 0.9, 0.99, 0.999)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.one_of(st.sampled_from(MOMENTA), st.floats(0, 1, exclude_max=True)),
    st.lists(st.integers(-(2**61) + 1, 2**61 - 1), min_size=1, max_size=6),
    st.integers(1, 150),
)
def test_every_multiplication_can_be_undone_and_is_right(momentum, values, steps):
    mu = fraction(momentum)
    start = torch.tensor(values)
    ledger = Ledger(mu, torch.zeros_like(start))
    generator = torch.Generator().manual_seed(steps)
    v, seen, added = start, [], []
    for _ in range(steps):
        seen.append(v)
        w = ledger.multiply(v)
        if mu:
            exact = [Fraction(x) * mu for x in v.tolist()]
            assert all(abs(y - e) <= 1 for y, e in zip(w.tolist(), exact, strict=True))
        added.append(torch.randint(-(2**40), 2**40, start.shape, generator=generator))
        v = (w + added[-1]).clamp(-(2**61) + 1, 2**61 - 1)
        added[-1] = v - w
    back = Ledger(mu, ledger.digits, list(ledger.aside), list(ledger.lengths))
    for expected, d in zip(reversed(seen), reversed(added), strict=True):
        v = back.divide(v - d)
        assert torch.equal(v, expected)
    assert not back.digits.any() and not back.aside


def test_momentum_as_a_fraction_is_exact_to_rounding():
    for momentum in MOMENTA:
        assert abs(fraction(momentum) - Fraction(momentum)) < Fraction(1, 2**53)


def test_powers_of_two_are_exact_and_what_does_not_fit_is_above_the_limit():
    exponents = torch.tensor([-1000, -53, 0, 1, 1000], dtype=torch.int16)
    for up, down, e in zip(*scales(exponents), exponents.tolist(), strict=True):
        assert float(up) == 2.0**e and float(down) == 2.0**-e
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e300, 0.5, -1.25], dtype=torch.float64)
    assert whole(x, torch.tensor(4.0, dtype=torch.float64)).abs().tolist() == [2**61] * 4 + [2, 5]
