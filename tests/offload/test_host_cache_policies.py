"""The policies of the host cache: what each evicts first, and that a new one is one function and one registry line."""

import sys
import types

import numpy as np
import pytest

import specmoe_jax as sm
from specmoe_jax.config.registry import EXPERT_FLOWS, HOST_CACHE_POLICIES, Choice
from specmoe_jax.offload import host_cache
from specmoe_jax.offload.host_cache_policies import Usage, Visits, eviction_order, expected_wait, visited
from specmoe_jax.planner.replay import cached, furthest_next_use, replay, synthetic_trace
from specmoe_jax.testing import TINY

# One layer of four experts: asked for last at, how often, and again at.
USAGE = Usage(
    last=np.array([[4, 1, 3, 2]]),
    count=np.array([[1, 2, 1, 3]]),
    now=4,
    wait=np.array([[2, 3, 1, 3]]),
    following=np.array([[5, 9, 7, 5]]),
)


@pytest.mark.parametrize(
    ("name", "order"),
    [("lru", [1, 3, 2, 0]), ("mru", [0, 2, 3, 1]), ("frequency", [2, 0, 1, 3]), ("lfru", [1, 2, 3, 0]), ("expected", [1, 3, 0, 2])],
)
def test_eviction_order(name, order):
    policy = HOST_CACHE_POLICIES.executor(name)
    assert eviction_order(policy, USAGE, np.ones((1, 4), bool)) == [(0, expert) for expert in order]
    assert eviction_order(policy, USAGE, np.array([[True, False, False, True]])) == [(0, e) for e in order if e in (0, 3)]


def test_the_oracle_evicts_what_is_needed_last():
    assert [expert for _, expert in eviction_order(furthest_next_use, USAGE, np.ones((1, 4), bool))] == [1, 2, 0, 3]


def test_a_wait_is_the_turn_of_the_layer_and_the_recent_rate():
    seen = Visits(uses=np.zeros((2, 2)), visits=np.zeros(2))
    for experts in ([0, 1], [0], [0]):
        for layer in (0, 1):
            seen = visited(seen, layer, experts)
    wait = expected_wait(seen)
    assert np.isclose(wait[0, 0], wait[1, 0] - 0.5)  # layer 1 was visited last, so layer 0 has its turn half a pass earlier
    assert wait[0, 1] > wait[1, 0] > wait[0, 0]
    more = visited(visited(seen, 0, [0]), 0, [1])  # in two waves
    assert more.visits[0] == visited(seen, 0, [0, 1]).visits[0] and np.array_equal(more.uses, visited(seen, 0, [0, 1]).uses)


@pytest.mark.parametrize(("skew", "tokens"), [(0.5, 8), (0.2, 1), (1.0, 8)])
@pytest.mark.parametrize("share", [0.15, 0.5])
def test_the_default_is_close_to_the_best_policy(skew, tokens, share):
    """LRU and frequency find next to nothing in a scan, MRU nothing in skewed texts."""
    p = np.arange(1, 33) ** -skew
    trace = synthetic_trace(tuple(np.minimum(p / p.sum() * 4, 0.99)), 4, layers=4, passes=40, tokens=tokens)
    capacity = int(4 * 32 * share)
    fetched = {name: cached(trace, capacity, HOST_CACHE_POLICIES.description(name)) for name in HOST_CACHE_POLICIES}
    default = EXPERT_FLOWS.description("on_demand").host_cache_policy
    assert fetched[default] <= 1.1 * min(fetched.values())
    assert cached(trace, capacity, furthest_next_use) <= min(fetched.values())


@pytest.fixture
def first_in_order(monkeypatch):
    """A module with a policy of its own, and its line in the registry."""
    module = types.ModuleType("policies_of_a_test")
    module.smallest_first = lambda usage: (np.zeros(len(usage.last)),)  # ties go by layer and id
    monkeypatch.setitem(sys.modules, module.__name__, module)
    place = f"{module.__name__}:smallest_first"
    HOST_CACHE_POLICIES.register("smallest_first", Choice(place, place))
    yield "smallest_first"
    HOST_CACHE_POLICIES.unregister("smallest_first")


def test_a_policy_is_added_by_one_function_and_one_registry_line(first_in_order):
    plan = sm.PRESETS["on_demand"](TINY).replace(expert_tier="disk", host_memory_bytes=2**30, dram_policy=first_in_order)
    assert plan.validate(TINY) is plan
    trace = np.array([[[1, 1, 0]], [[0, 0, 1]], [[0, 1, 0]]])
    assert replay(trace, 2)[first_in_order] == 3  # of 0, 1 and then 2 the first leaves, so 1 is there at the end
    cache, policy = host_cache.empty(1, 3), HOST_CACHE_POLICIES.executor(first_in_order)
    for expert in (1, 0, 2):
        admission, cache = host_cache.admit(
            host_cache.touch(cache, [(0, expert)]), [(0, expert)], capacity=2, policy=policy, protected=np.zeros((1, 3), bool)
        )
    assert admission.evicted == [(0, 0)] and cache.present.tolist() == [[False, True, True]]


def test_an_unknown_policy_is_refused_with_the_names():
    plan = sm.PRESETS["on_demand"](TINY).replace(expert_tier="disk", host_memory_bytes=2**30, dram_policy="smallest_first")
    with pytest.raises(sm.PlanError, match="dram_policy is 'smallest_first'; it must be one of lru, mru, frequency, lfru, exp"):
        plan.validate(TINY)
