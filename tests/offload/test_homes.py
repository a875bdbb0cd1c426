"""Whose expert is whose: every placement shares a layer's experts out, and the one by popularity evens their load."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.config.registry import PLACEMENTS
from specmoe_jax.offload.homes import MODULO, POPULARITY, home, homes_of, loads_of, most_experts


@settings(max_examples=100, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", list(PLACEMENTS))
def test_no_device_has_more_than_its_share_of_a_layer(name, data):
    layers, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    devices = data.draw(st.integers(1, experts))
    weights = st.lists(st.floats(0, 1), min_size=experts, max_size=experts)
    known = np.array(data.draw(st.lists(weights, min_size=0, max_size=layers))).reshape(-1, experts)
    homes = homes_of((layers, experts), devices, PLACEMENTS.description(name), known)
    assert homes.shape == (layers, experts) and homes.min() >= 0
    for layer in homes:
        assert np.bincount(layer, minlength=devices).max() <= most_experts(devices, experts) and layer.max() < devices


def test_the_heaviest_go_to_the_least_loaded():
    """By hand: 9 | 7 | 6; then 5 to the one with 6, 4 to that with 7, 3 to that with 9: 12, 11, 11."""
    loads = np.array([[3.0, 9, 7, 6, 4, 5]])
    assert homes_of((1, 6), 3, POPULARITY, loads).tolist() == [[0, 0, 1, 2, 1, 2]]
    assert homes_of((1, 6), 3, MODULO, loads).tolist() == [[0, 1, 2, 0, 1, 2]]


def test_layers_that_are_alike_take_turns():
    """One expert more than devices: who gets the second one of a layer had least of those before."""
    homes = homes_of((4, 3), 2, POPULARITY)
    assert [np.bincount(layer).tolist() for layer in homes] == [[2, 1], [1, 2], [2, 1], [1, 2]]


def test_popular_experts_that_share_a_residue_are_spread():
    """Every fourth expert is popular: the modulo gives them all to one of four devices."""
    counts = np.where(np.arange(32) % 4 == 0, 50, 1)[None]
    loads = loads_of(counts, per_token=4, tokens=16)

    def balance(placement):
        sums = np.bincount(homes_of((1, 32), 4, placement, loads)[0], weights=loads[0])
        return sums.max() / sums.mean()

    assert balance(MODULO) > 1.9 and balance(POPULARITY) < 1.01


def test_a_pass_brings_an_expert_once():
    """Two of four experts a token: shares 0.5, 0.5, 1 and 0 of a token; of a layer without counts all alike."""
    loads = loads_of(np.array([[1, 1, 2, 0], [0, 0, 0, 0]]), per_token=2, tokens=3)
    assert loads == pytest.approx(np.array([[0.875, 0.875, 1, 0], [0.875] * 4]), abs=1e-6)


def test_experts_that_every_pass_needs_are_spread_by_popularity():
    """A draft keeps the four most popular; each device gets one of them."""
    counts = np.array([[90, 80, 10, 10, 95, 85, 10, 10]])
    homes = homes_of((1, 8), 4, POPULARITY, loads_of(counts, per_token=4, tokens=10_000))
    assert sorted(homes[0, [0, 1, 4, 5]].tolist()) == [0, 1, 2, 3]


def test_the_device_of_an_expert():
    devices = ("first", "second")
    assert home(0, 3, devices, None) == "second" and home(1, 3, devices, np.array([[1] * 4, [0] * 4])) == "first"
    assert home(0, 3, (), None) is None
