"""The policies of the host cache: what each evicts first, and that a new one is one function and one registry line."""

import sys
import types

import numpy as np
import pytest

import specmoe_jax as sm
from specmoe_jax.config.registry import HOST_CACHE_POLICIES, Choice
from specmoe_jax.offload import host_cache
from specmoe_jax.offload.host_cache_policies import Usage, eviction_order
from specmoe_jax.planner.replay import furthest_next_use, replay
from specmoe_jax.testing import TINY

# One layer of four experts: asked for last at, how often, and again at.
USAGE = Usage(last=np.array([[4, 1, 3, 2]]), count=np.array([[1, 2, 1, 3]]), following=np.array([[5, 9, 7, 5]]))


@pytest.mark.parametrize(("name", "order"), [("lru", [1, 3, 2, 0]), ("mru", [0, 2, 3, 1]), ("frequency", [2, 0, 1, 3])])
def test_eviction_order(name, order):
    policy = HOST_CACHE_POLICIES.executor(name)
    assert eviction_order(policy, USAGE, np.ones((1, 4), bool)) == [(0, expert) for expert in order]
    assert eviction_order(policy, USAGE, np.array([[True, False, False, True]])) == [(0, e) for e in order if e in (0, 3)]


def test_the_oracle_evicts_what_is_needed_last():
    assert [expert for _, expert in eviction_order(furthest_next_use, USAGE, np.ones((1, 4), bool))] == [1, 2, 0, 3]


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
    with pytest.raises(sm.PlanError, match="dram_policy is 'smallest_first'; it must be one of lru, mru, frequency"):
        plan.validate(TINY)
