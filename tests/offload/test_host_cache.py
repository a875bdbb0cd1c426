"""The cache of a disk tier: never over its budget, never without what was just asked for, and the policies are what they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoe_jax.config.registry import HOST_CACHE_POLICIES
from specmoe_jax.offload import host_cache as dram

L, E = 3, 4
KEYS = st.tuples(st.integers(0, L - 1), st.integers(0, E - 1))
NONE = np.zeros((L, E), bool)


def admit(cache, wanted, capacity, policy="lru", protected=NONE):
    return dram.admit(cache, wanted, capacity=capacity, policy=HOST_CACHE_POLICIES.executor(policy), protected=protected)


def filled(keys, capacity, policy="lru"):
    cache = dram.empty(L, E)
    for key in keys:
        _, cache = admit(dram.touch(cache, [key]), [key], capacity, policy)
    return cache


@given(
    requests=st.lists(st.lists(KEYS, max_size=6), max_size=12),
    capacity=st.integers(1, L * E),
    policy=st.sampled_from(list(HOST_CACHE_POLICIES)),
    protected=st.lists(KEYS, max_size=4),
)
def test_budget_and_bookkeeping(requests, capacity, policy, protected):
    cache, kept = dram.empty(L, E), NONE.copy()
    for key in protected:
        kept[key] = True
    for wanted in requests:
        before = cache.present
        (admitted, evicted), cache = admit(dram.touch(cache, wanted), wanted, capacity, policy, kept)
        assert cache.present.sum() <= capacity
        expected = before.copy()
        for key in evicted:
            assert before[key] and not kept[key] and key not in wanted
            expected[key] = False
        for key in admitted:
            assert key in wanted and not before[key]
            expected[key] = True
        np.testing.assert_array_equal(cache.present, expected)
        absent = [key for key in dict.fromkeys(wanted) if not before[key]]
        assert admitted == absent[: len(admitted)]  # in order
        assert len(evicted) == max(before.sum() + len(admitted) - capacity, 0)  # no more than needed
        if len(admitted) < len(absent):  # nothing was left that could have gone
            assert not (cache.present & ~kept & ~np.isin(np.arange(L * E), [l * E + e for l, e in wanted]).reshape(L, E)).any()


@pytest.mark.parametrize("policy", [*HOST_CACHE_POLICIES])
def test_one_wanted_always_gets_in(policy):
    cache = filled([(0, e) for e in range(E)], 2, policy)
    for key in ((1, 0), (2, 3), (0, 0)):
        (admitted, _), cache = admit(cache, [key], 2, policy)
        assert admitted == [key] and cache.present[key]


def test_lru_evicts_the_least_recently_used():
    cache = dram.touch(filled([(0, 0), (0, 1), (0, 2)], 3), [(0, 0)])
    assert admit(cache, [(1, 0), (1, 1)], 3)[0].evicted == [(0, 1), (0, 2)]


def test_mru_evicts_the_most_recently_used():
    """So that a scan over everything finds most of a cache that is nearly large enough, where lru finds nothing."""
    keys = [(layer, expert) for layer in range(L) for expert in range(E)]
    found = {}
    for policy in ("mru", "lru"):
        cache = filled(keys, L * E - 1, policy)
        found[policy] = 0
        for key in keys:
            found[policy] += bool(cache.present[key])
            _, cache = admit(dram.touch(cache, [key]), [key], L * E - 1, policy)
    assert found["mru"] >= L * E - 2 and found["lru"] == 0


def test_frequency_evicts_the_least_used_then_the_oldest():
    cache = filled([(0, 0), (0, 1), (0, 2), (0, 0)], 3, "frequency")
    assert admit(cache, [(1, 0), (1, 1)], 3, "frequency")[0].evicted == [(0, 1), (0, 2)]


def test_what_left_is_remembered():
    """An expert that comes back has kept its count, so a scan does not push the often used out."""
    cache = filled([(0, 0), (0, 0), (0, 1), (0, 2), (0, 3)], 2, "frequency")
    assert cache.present[0, 0] and cache.uses[0, 1] == 1 and not cache.present[0, 1]


def test_expectation_orders_by_layer_then_count_then_id():
    predicted = np.array([[0, 2, 2, 5], [9, 0, 0, 0], [0, 0, 0, 1]])
    absent = np.ones((L, E), bool)
    assert dram.by_expectation(predicted, absent, 99) == [(0, 3), (0, 1), (0, 2), (1, 0), (2, 3)]
    absent[0, 3] = False
    assert dram.by_expectation(predicted, absent, 2) == [(0, 1), (0, 2)]
    assert dram.by_expectation(np.zeros((L, E)), absent, 2) == []
