"""The memory account: what a plan takes, and refusals that hold a number which works."""

import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import specmoe_jax as sm
from specmoe_jax.planner.memory.account import account, cache_positions
from specmoe_jax.support.units import GIB
from specmoe_jax.testing import TINY
from tests.planner.planner_cases import MIXTRAL

ROWS, POSITIONS = 8, 128


def plan(preset="specmoe", config=TINY, **changes):
    return sm.PRESETS[preset](config).replace(**changes)


def accounted(a_plan, config=TINY, rows=ROWS, positions=POSITIONS):
    return account(config, a_plan, batch_rows=rows, positions=positions)


def smallest_bytes(refusal):
    assert "\n" not in str(refusal) and "too small for one layer's dispatch" in str(refusal)
    return int(re.search(r"device_memory_bytes=([0-9]+)", str(refusal)).group(1))


def test_weights_and_experts_are_what_the_model_holds(model):
    whole = accounted(plan())
    assert whole.weight_bytes == sum(array.nbytes for array in jax.tree.leaves(model.weights))
    assert whole.expert_bytes == model.experts[0][0].nbytes == model.expert_bytes
    assert whole.host_expert_bytes == sum(block.nbytes for layer in model.experts for block in layer)


def test_an_accelerator_of_its_own_holds_experts_beside_its_slots():
    """What is on its way, XLA's copy of the one that it multiplies, and attention's; within a budget the slots give way."""
    job = {"batch_rows": 4, "positions": 64}
    for name, moving in (("resident", 1), ("on_demand", TINY.num_experts + 1), ("streaming", 2)):  # its experts are small
        shared, own = (account(TINY, plan(name), accelerator_is_cpu=shared, **job) for shared in (True, False))
        assert (shared.moving_experts, own.moving_experts) == (0, moving)
        attention = own.activation_bytes - shared.activation_bytes  # which is jnp there, over a cache that is there too
        assert (attention > 0) == (not own.kv_on_host)
        assert own.accelerator_bytes - shared.accelerator_bytes == moving * own.expert_bytes + attention
    mixtral = plan("on_demand", MIXTRAL, dtype="bfloat16", device_memory_bytes=6 * GIB)
    shared, own = (account(MIXTRAL, mixtral, accelerator_is_cpu=shared, **job) for shared in (True, False))
    assert own.moving_experts == 3
    assert own.num_slots < shared.num_slots
    assert own.accelerator_bytes <= 6 * GIB


def test_cache_is_what_the_engine_makes(model):
    engine = sm.Engine(model, plan("on_demand"))
    state = engine.init([[1, 2]] * 3, sm.SamplingParams(max_new_tokens=80))
    shape = state.kv.k[0].shape
    made = sum(array.nbytes for array in (*state.kv.k, *state.kv.v))
    assert accounted(plan("on_demand"), rows=shape[0], positions=shape[2]).kv_bytes == made


def test_mixtral_sizes():
    """Mixtral 8x7B in bfloat16: 94 GB, nearly all of it experts."""
    whole = accounted(plan("resident", MIXTRAL, dtype="bfloat16"), MIXTRAL, rows=1, positions=64)
    assert 89e9 < whole.host_expert_bytes < 91e9
    assert 92e9 < whole.accelerator_bytes < 95e9
    assert accounted(plan("on_demand", MIXTRAL, dtype="bfloat16"), MIXTRAL, rows=1, positions=64).accelerator_bytes < 8e9


@pytest.mark.parametrize("preset", ["resident", "on_demand", "caching", "specmoe"])
@pytest.mark.parametrize("kv_tier", ["accelerator", "host"])
@pytest.mark.parametrize("config", [TINY, MIXTRAL], ids=["tiny", "large"])
def test_the_smallest_budget_that_is_named_works(preset, kv_tier, config):
    a_plan = plan(preset, config, kv_tier=kv_tier)
    with pytest.raises(sm.PlanError) as e:
        accounted(a_plan.replace(device_memory_bytes=1), config)
    smallest = smallest_bytes(e.value)
    fitted = accounted(a_plan.replace(device_memory_bytes=smallest), config)
    assert fitted.accelerator_bytes <= smallest
    assert fitted.num_slots == fitted.pinned_slots + (preset != "resident")
    least = fitted.accelerator_bytes
    assert accounted(a_plan.replace(device_memory_bytes=least), config) == fitted
    with pytest.raises(sm.PlanError):
        accounted(a_plan.replace(device_memory_bytes=least - 1), config)


@pytest.mark.parametrize("preset", ["on_demand", "specmoe"])
def test_the_named_budget_runs(model, preset):
    a_plan = plan(preset)
    with pytest.raises(sm.PlanError) as e:
        sm.Engine(model, a_plan.replace(device_memory_bytes=1))
    engine = sm.Engine(model, a_plan.replace(device_memory_bytes=smallest_bytes(e.value)))
    (done,) = engine.generate([[1, 2]], sm.SamplingParams(max_new_tokens=2, ignore_eos=True))
    assert len(done.token_ids) == 2


def test_a_batch_that_does_not_fit_is_refused_before_it_runs(model):
    """Construction knows the smallest job only; the batch has its own refusal, whose number works for it."""
    prompts, params = [[1] * 60] * 8, sm.SamplingParams(max_new_tokens=4, ignore_eos=True)
    one = account(TINY, plan("on_demand"), batch_rows=1, positions=64)
    engine = sm.Engine(model, plan("on_demand", device_memory_bytes=one.accelerator_bytes))
    with pytest.raises(sm.PlanError) as e:
        engine.generate(prompts, params)
    assert engine.stats()["steps"] == 0
    engine = sm.Engine(model, plan("on_demand", device_memory_bytes=smallest_bytes(e.value)))
    assert len(engine.generate(prompts, params)) == 8


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_monotone_in_the_budget(data):
    """More memory never gives fewer slots, nor turns an accepted plan into a refused one; no account exceeds it."""
    preset = data.draw(st.sampled_from(["on_demand", "specmoe", "caching"]))
    a_plan = plan(preset, kv_tier=data.draw(st.sampled_from(["accelerator", "host"])))
    whole = accounted(a_plan)
    budgets = sorted(data.draw(st.lists(st.integers(1, 2 * whole.accelerator_bytes), min_size=2, max_size=6)))
    slots = []
    for budget in budgets:
        try:
            fitted = accounted(a_plan.replace(device_memory_bytes=budget))
        except sm.PlanError:
            slots.append(0)
            continue
        assert fitted.accelerator_bytes <= budget
        assert fitted.pinned_slots < fitted.num_slots <= fitted.wanted_slots
        slots.append(fitted.num_slots)
    assert slots == sorted(slots)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8), st.integers(1, 5))
def test_monotone_in_the_job(rows, more, length, experts):
    a_plan = plan(draft_length=length, draft_experts=experts)
    small, large = accounted(a_plan, rows=rows), accounted(a_plan, rows=rows + more)
    assert small.accelerator_bytes <= large.accelerator_bytes
    assert accounted(a_plan.replace(draft_length=length + 1), rows=rows).accelerator_bytes >= small.accelerator_bytes


def test_the_pool_holds_every_dispatch():
    """Without a budget: the pinned experts and one layer's whole dispatch, never more than there are."""
    for rows, chunk, slots in ((1, 1, 2), (1, 2, 4), (1, 3, 5), (8, 64, 5)):
        whole = accounted(plan("on_demand", prefill_chunk=chunk), rows=rows)
        assert whole.num_slots == whole.wanted_slots == slots
    assert accounted(plan("resident")).num_slots == TINY.num_layers * TINY.num_experts
    assert accounted(plan(draft_experts=TINY.num_experts)).num_slots == TINY.num_layers * TINY.num_experts
    assert accounted(plan(draft_experts=2)).num_slots == TINY.num_layers * 2 + TINY.num_experts


def test_host_budget():
    a_plan = plan("on_demand", kv_tier="host")
    need = accounted(a_plan).host_bytes
    assert accounted(a_plan.replace(host_memory_bytes=need)).host_bytes == need
    with pytest.raises(sm.PlanError) as e:
        accounted(a_plan.replace(host_memory_bytes=need - 1))
    smallest = int(re.search(r"host_memory_bytes=([0-9]+)", str(e.value)).group(1))
    accounted(a_plan.replace(host_memory_bytes=smallest))


def test_a_disk_tier_caches_what_the_pages_of_a_streamed_plan_leave():
    """The pages that the batch can fill come first, no more of them, and one expert always finds room."""
    a_plan = plan("streaming", expert_tier="disk", host_memory_bytes=1)
    whole = accounted(a_plan.replace(host_memory_bytes=1e12))
    pages_bytes = whole.host_bytes - whole.host_expert_bytes
    with pytest.raises(sm.PlanError, match="one request of") as e:
        accounted(a_plan)
    smallest = int(re.search(r"host_memory_bytes=([0-9]+)", str(e.value)).group(1))
    assert smallest < pages_bytes
    for budget in np.linspace(smallest, 2 * whole.host_bytes, 50):
        own = accounted(a_plan.replace(host_memory_bytes=float(budget)))
        assert own.host_bytes <= budget
        if own.kv_pages == whole.kv_pages:
            assert own.host_experts == min((budget - pages_bytes) // whole.expert_bytes, whole.host_experts)
        else:
            assert own.kv_pages < whole.kv_pages and own.host_experts >= 1 and budget < pages_bytes + whole.expert_bytes


@pytest.mark.parametrize("length", [None, 1, 8, 63])
def test_cache_positions_hold_the_longest_row_and_its_drafts(length):
    a_plan = plan("on_demand") if length is None else plan(draft_length=length)
    shapes = set()
    for longest in np.unique(np.geomspace(1, 40_000, 600).astype(int)):
        positions, needed = cache_positions(int(longest), a_plan), longest + (length or 0) + 1
        assert needed <= positions < needed + max(64, positions / 8) and positions % 64 == 0
        shapes.add(positions)
    assert len(shapes) <= 16 + 8 * 6  # to 1024, and in each of the doublings beyond
