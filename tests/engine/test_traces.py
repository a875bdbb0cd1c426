"""A routing trace recorded from the engine, replayed: the planner's cache policies fetch what the engine fetched."""

import numpy as np
from engine_cases import plan, steps

import specmoe_jax as sm
from specmoe_jax.planner.replay import per_layer, replay
from specmoe_jax.speculate.hot_experts.policies import make_policy
from specmoe_jax.speculate.hot_experts.usage import count_choices
from specmoe_jax.testing import TINY

E = TINY.num_experts


def record(engine):
    """-> counts [S, L, E], fetches of each step, and what was resident [L, E] before the first."""
    trace, fetched, first = [], [], None
    for before, _, info in steps(engine):
        first = before.slot_of >= 0 if first is None else first
        trace.append([count_choices(ids, E) for ids in info.verify.routing])
        fetched.append(info.verify.fetched)
    return np.array(trace), fetched, first


def test_on_demand_fetches_what_a_trace_needs(model):
    trace, fetched, _ = record(sm.Engine(model, plan("on_demand")))
    assert replay(trace, 0)["on_demand"] == sum(fetched) > 0


def test_specmoe_fetches_what_its_policy_says(model):
    """HotTemporal, from the draft set that the prefill chose."""
    trace, fetched, first = record(sm.Engine(model, plan(draft_length=3, draft_experts=2)))
    capacity = 2 * trace.shape[1]
    assert per_layer(trace, capacity, make_policy("hot_temporal", *trace.shape[1:]), first) == sum(fetched) > 0
    assert replay(trace, capacity)["belady"] <= sum(fetched) + capacity
