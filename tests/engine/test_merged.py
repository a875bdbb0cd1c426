"""The merged-expert draft changes no token, moves no byte while drafting, and keeps its blocks apart from the slots."""

import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, SAMPLED, plan, run, steps, tokens_of

import specmoe_jax as sm
from specmoe_jax.planner.memory.account import account
from specmoe_jax.testing import TINY


@pytest.fixture(scope="module")
def resident(model):
    return run(model, plan("resident"))[0]


def merged(experts=2, **changes):
    return plan(draft="merged", draft_experts=experts, **changes)


@pytest.mark.parametrize("kv_tier", ["accelerator", "host"])
@pytest.mark.parametrize("batch", [1, len(PROMPTS)])
@pytest.mark.parametrize("experts", [1, 3, TINY.num_experts])
def test_lossless(model, resident, experts, batch, kv_tier):
    tokens, stats = run(model, merged(experts, kv_tier=kv_tier), PROMPTS[:batch])
    assert tokens == resident[:batch]
    assert stats["draft_link_bytes"] == stats["compilations_after_warmup"] == 0
    if experts == TINY.num_experts:  # the draft is the target
        assert stats["acceptance_by_position"] == [1.0] * 4


@pytest.mark.parametrize(
    "changes",
    [{"cached_experts": 2}, {"prefetch": "draft"}, {"guard": True}, {"prefill_chunk": 2, "batch_size": 3}, {"retain": True}],
    ids=str,
)
def test_with_other_options(model, resident, changes):
    assert run(model, merged(**changes))[0] == resident


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3])
def test_waves(model, resident, slots):
    free = run(model, merged())[1]["peak_accelerator_bytes"]
    budget = free - (TINY.num_experts - slots) * model.expert_bytes
    tokens, stats = run(model, merged(device_memory_bytes=budget))
    assert tokens == resident and stats["peak_accelerator_bytes"] <= budget


def test_sampled(model):
    whole = merged(TINY.num_experts)
    assert run(model, whole, params=SAMPLED)[1]["acceptance_by_position"] == [1.0] * 4


def test_the_blocks_stay(model):
    """They are the same after every step, in slots that no expert ever gets."""
    engine, blocks = sm.Engine(model, merged()), None
    for _, state, _ in steps(engine):
        slots, owner = engine._resources.runtime.experts.merged_slots, state.memory.residency.owner
        assert np.flatnonzero(owner == TINY.num_moe_layers * TINY.num_experts).tolist() == sorted(slots.reshape(-1).tolist())
        assert owner.size == state.memory.pool.shape[0] == engine._resources.runtime.experts.slots.total
        now = np.asarray(state.memory.pool)[slots]
        blocks = now if blocks is None else blocks
        np.testing.assert_array_equal(now, blocks)
        assert set(state.memory.groups[1].tolist()) == set(slots[1].tolist())


@pytest.mark.slow
def test_one_engine_many_batches(model, resident):
    engine = sm.Engine(model, merged(batch_size=3, prefill_chunk=1))
    for count in (1, 8, 2):
        assert tokens_of(engine.generate(PROMPTS[:count], GREEDY)) == resident[:count]


def test_the_account_is_of_one_device():
    """Nine blocks, three of each layer, are dealt out."""
    slots = [account(TINY, merged(3, devices=count), batch_rows=1, positions=64).merged_slots for count in (1, 2, 4)]
    assert slots == [9, 5, 3]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"draft_set": "random"}, "draft_set"),
        ({"substitution": "mask"}, "substitution"),
        ({"draft_experts": None}, "draft_experts"),
        ({"draft_experts": TINY.num_experts + 1}, "draft_experts"),
        ({"expert_flow": "resident"}, "draft=merged has no effect"),
        ({"merge_every": 2, "devices": 2, "num_processes": 2}, "merge_every reads many experts, and each of num_processes=2"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(sm.PlanError, match=message):
        merged().replace(**changes).validate(TINY)
