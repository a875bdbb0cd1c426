"""Cache policies on routing traces: Belady's is the optimum (by exhaustive search), the others are not below it."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from specmoe_jax.config.registry import DRAFT_SETS
from specmoe_jax.planner.replay import link_bound_s, policies, replay, synthetic_trace
from specmoe_jax.planner.routing import choice_probabilities, distinct
from specmoe_jax.support.errors import PlanError

SMALL = st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 3)).flatmap(
    lambda shape: arrays.arrays(np.int64, shape, elements=st.integers(0, 2))
)


def optimum(trace, capacity):
    """Fewest fetches of all ways to keep at most `capacity` of what is at hand after each visit."""
    visits = [frozenset((layer, int(i)) for i in np.flatnonzero(counts)) for step in trace for layer, counts in enumerate(step)]

    @functools.cache
    def fewest(at, kept):
        if at == len(visits):
            return 0
        at_hand = kept | visits[at]
        keep = [frozenset(c) for c in itertools.combinations(sorted(at_hand), min(capacity, len(at_hand)))]
        return len(visits[at] - kept) + min(fewest(at + 1, chosen) for chosen in keep)

    return fewest(0, frozenset())


@given(SMALL, st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_belady_is_the_optimum(trace, capacity):
    capacity = min(capacity, trace.shape[1] * trace.shape[2])
    found = replay(trace, capacity)
    assert found["belady"] == optimum(trace, capacity)
    loaded = found["static"] + min(capacity, int((trace > 0).any(axis=0).sum()))  # its loading, once
    assert all(found["belady"] <= found[name] <= found["needed"] for name in policies() if name != "static")
    assert found["belady"] <= loaded


@given(SMALL)
@settings(max_examples=50, deadline=None)
def test_with_room_for_all_everything_is_fetched_once(trace):
    found = replay(trace, trace.shape[1] * trace.shape[2])
    assert found["lru"] == found["mru"] == found["frequency"] == found["belady"] == int((trace > 0).any(axis=0).sum())
    nothing = replay(trace, 0)
    assert {nothing[name] for name in policies()} == {nothing["needed"]}


def most_used(trace, capacity, counts_of):
    """Fetches of equal shares by counts_of(pass) [L, E], ties to what is there, then to the smaller id; counted the long way."""
    share, kept, fetched = capacity // trace.shape[1], np.zeros(trace.shape[1:], bool), 0
    for s, step in enumerate(trace):
        for layer, counts in enumerate(step):
            at_hand = kept[layer] | (counts > 0)
            fetched += int((at_hand & ~kept[layer]).sum())
            ranked = sorted(range(len(counts)), key=lambda e: (-counts_of(s)[layer, e], not kept[layer, e], e))
            kept[layer] = np.isin(np.arange(len(counts)), ranked[:share]) & at_hand
    return fetched


@given(SMALL, st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_the_engines_draft_sets_are_replayed(trace, capacity):
    capacity, total = min(capacity, trace.shape[1] * trace.shape[2]), np.cumsum(trace, axis=0)
    found = replay(trace, capacity)
    assert set(DRAFT_SETS) <= set(found)
    assert found["hot_temporal"] == most_used(trace, capacity, lambda s: trace[s])
    assert found["hot_global"] == most_used(trace, capacity, lambda s: total[s])


def test_hot_temporal_keeps_the_latest_and_hot_global_the_most():
    a, b = [3, 0, 0], [0, 1, 0]
    trace = np.array([[a], [a], [b], [a]])
    found = replay(trace, 1)
    assert found["hot_temporal"] == 3  # a, b, a again
    assert found["hot_global"] == 2  # a, b
    assert found["lru"] == 3 and found["belady"] == 2


def test_a_synthetic_trace_has_the_routing_models_experts():
    p = choice_probabilities(32, 2, 0.6)
    trace = synthetic_trace(p, 2, layers=3, passes=200, tokens=8)
    assert (trace.sum(axis=2) == 16).all()
    assert (trace > 0).sum(axis=2).mean() == pytest.approx(distinct(p, 8), rel=0.05)
    assert (trace.sum(axis=0).argmax(axis=1) != trace.sum(axis=0).argmax(axis=1)[0]).any()


@given(SMALL, st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_what_is_drafted_stays_until_its_layer_is_reached(trace, capacity):
    """Whether the draft says all of a pass or nothing: between the optimum and no cache."""
    capacity = min(capacity, trace.shape[1] * trace.shape[2])
    for drafted in (trace, np.zeros_like(trace)):
        found = replay(trace, capacity, drafted=drafted)
        assert found["belady"] <= found["drafted"] <= found["needed"]
    assert "drafted" not in replay(trace, capacity)


def test_drafted_demand_keeps_what_comes():
    """Two layers, room for one: the draft knows that layer 1 needs the expert of the pass before again."""
    first, second = [[1, 0], [1, 0]], [[0, 1], [1, 0]]
    trace = np.array([first, second])
    assert replay(trace, 1, drafted=trace)["drafted"] == 3
    assert replay(trace, 1)["lru"] == 4


def test_the_time_of_passes_by_hand():
    """A layer that computes for 2 s fetches 1, then 3 experts of 1 s: one after the other, or the second during the first."""
    fetched = np.array([[1, 3]])
    assert link_bound_s(fetched, expert_s=1.0, layer_s=2.0, ahead=False) == 1 + 2 + 3 + 2
    assert link_bound_s(fetched, expert_s=1.0, layer_s=2.0, ahead=True) == 1 + 3 + 2  # the copies of the second begin at 1


@pytest.mark.parametrize("trace", [np.zeros((2, 2), int), np.zeros((1, 1, 1)), -np.ones((1, 1, 1), int)])
def test_what_is_no_trace_is_refused(trace):
    with pytest.raises(PlanError, match="routing trace"):
        replay(trace, 0)
