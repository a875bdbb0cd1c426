"""Dealing a total of draft experts to layers: whole, at least one each, and nothing covers more."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.speculate.draft_budget import spread


def covered(usage, sizes):
    shares = usage / np.maximum(usage.sum(axis=1, keepdims=True), 1)
    return sum(np.sort(layer)[::-1][:n].sum() for layer, n in zip(shares, sizes, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 4))
def test_nothing_covers_more(data, layers, experts):
    count = layers * experts
    usage = np.array(data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))).reshape(layers, experts)
    total = data.draw(st.integers(layers, layers * experts))
    sizes = spread(usage, total)
    assert sum(sizes) == total and all(1 <= n <= experts for n in sizes) and len(sizes) == layers
    others = (s for s in itertools.product(range(1, experts + 1), repeat=layers) if sum(s) == total)
    assert covered(usage, sizes) >= max(covered(usage, other) for other in others) - 1e-9


def test_a_flat_layer_gets_what_a_steep_one_leaves():
    assert spread(np.array([[100, 1, 1, 1], [10, 10, 10, 10]]), 5) == (1, 4)


@pytest.mark.parametrize("total", [1, 9])
def test_totals_that_cannot_be(total):
    with pytest.raises(ValueError, match="expected 2 to 8"):
        spread(np.ones((2, 4)), total)
