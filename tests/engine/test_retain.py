"""Leftovers: freed experts stay usable, text and accounts stay exact, and never more bytes than without."""

import numpy as np
import pytest
from engine_cases import PROMPTS, SAMPLED, plan, run
from hypothesis import given, settings
from hypothesis import strategies as st

import specmoe_jax as sm
from specmoe_jax.config.registry import RETAIN_POLICIES
from specmoe_jax.offload import retained_experts
from specmoe_jax.offload.residency import Residency, empty, plan_layer, plan_prefetch
from specmoe_jax.offload.store import ExpertStore
from specmoe_jax.testing import TINY

PLANS = {
    "on_demand": plan("on_demand"),
    "caching": plan("caching"),
    "specmoe": plan(draft_length=4, draft_experts=2),
    "prefetch": plan(draft_length=4, draft_experts=2, prefetch="draft"),
    "guard": plan(draft_length=4, draft_experts=2, prefetch="draft", guard=True),
    "accepted": plan(draft_length=3, draft_experts=2, draft_set="accepted"),
    "host": plan(draft_length=4, draft_experts=3, kv_tier="host"),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_text_is_the_same(model, name):
    expected, before = run(model, PLANS[name])
    tokens, after = run(model, PLANS[name].replace(retain=True))
    assert tokens == expected
    assert after["compilations_after_warmup"] == 0
    if name not in ("guard", "prefetch"):  # those depend on the clock
        assert after["link_bytes"] <= before["link_bytes"]


@pytest.mark.slow
def test_the_text_is_the_same_in_waves_and_sampled(model):
    a_plan = plan(draft_length=3, draft_experts=1, batch_size=8)
    expected, stats = run(model, a_plan, params=SAMPLED)
    budget = stats["peak_accelerator_bytes"] - 3 * model.expert_bytes
    waves = a_plan.replace(device_memory_bytes=budget, retain=True)
    assert run(model, waves, params=SAMPLED)[0] == expected


def test_small_batches_gain(model):
    """One row needs two of five experts a layer, and the pool of five slots may keep the other three."""
    sent = [run(model, plan("on_demand", retain=retain), PROMPTS[:1])[1]["link_bytes"] for retain in (False, True)]
    assert sent[1] < 0.8 * sent[0]


def test_slots_hold_what_the_tables_say(model, monkeypatch):
    """Owned and left over alike, after every step."""
    engine = sm.Engine(model, PLANS["prefetch"].replace(retain=True))
    state = engine.init(PROMPTS, sm.SamplingParams(max_new_tokens=12, ignore_eos=True))
    while not state.done:
        state, _ = engine.step(state)
        pool, owner, holds = np.asarray(state.memory.pool), state.memory.residency.owner, state.memory.retained_experts.holds
        assert (holds[owner >= 0] == owner[owner >= 0]).all()
        for slot in np.flatnonzero(holds >= 0):
            layer, expert = divmod(int(holds[slot]), TINY.num_experts)
            np.testing.assert_array_equal(pool[slot], np.asarray(model.experts[layer][expert]))


def test_bytes_are_those_copied(model, monkeypatch):
    copied, write = [], ExpertStore._write

    def spy(store, pool, blocks, slots):
        copied.extend(block.nbytes for block in blocks)
        return write(store, pool, blocks, slots)

    monkeypatch.setattr(ExpertStore, "_write", spy)
    _, stats = run(model, PLANS["prefetch"].replace(retain=True))
    assert stats["link_bytes"] + stats["prefill_link_bytes"] == sum(copied)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_passes_never_overwrite_what_is_in_use(data):
    """Random passes and guesses on a pool of slots: every computed expert is in its slot when it is computed."""
    draw = data.draw
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    slots = experts + draw(st.integers(0, 8))
    policy = RETAIN_POLICIES.description(draw(st.sampled_from([*RETAIN_POLICIES])))
    residency, left, pool = empty(layers, experts, slots), retained_experts.nothing(layers, experts, slots, policy), [None] * slots
    none = np.zeros(experts, bool)

    def copy(copies):
        for layer, expert, slot in copies:
            pool[slot] = (layer, expert)

    for _ in range(draw(st.integers(1, 4))):
        guesses = np.array(draw(st.lists(st.integers(0, 2), min_size=layers * experts, max_size=layers * experts)))
        for layer in range(layers):
            needed = np.array(draw(st.lists(st.booleans(), min_size=experts, max_size=experts)))
            left = retained_experts.after_pass(left, layer, needed.astype(int))
            wanted = np.zeros((layers, experts), bool)
            wanted[layer] = needed
            residency = retained_experts.revive(residency, left, wanted, slots)
            ahead = np.where(np.arange(layers)[:, None] > layer, guesses.reshape(layers, experts), 0)
            plan, residency = plan_layer(residency, layer, needed, none, retained_experts.eviction_priority(left, ahead))
            assert len(plan.waves) == 1  # the reserve held
            (wave,) = plan.waves
            copy(wave.fetch)
            left = retained_experts.after_copies(left, wave.fetch)
            residency = retained_experts.revive(residency, left, ahead > 0, int((residency.owner < 0).sum()) - experts)
            copies, residency = plan_prefetch(
                residency,
                ahead,
                reserve=experts,
                limit=9,
                in_use=wave.slots,
                eviction_priority=retained_experts.eviction_priority(left, ahead),
            )
            copy(copies)
            left = retained_experts.after_copies(left, copies)
            for expert in np.flatnonzero(needed):
                assert pool[wave.slots[expert]] == (layer, expert)
            _check(residency, left, pool, experts)


def _check(residency: Residency, left, pool, num_experts):
    for slot, (owner, held) in enumerate(zip(residency.owner, left.holds, strict=True)):
        assert pool[slot] == (None if held < 0 else divmod(int(held), num_experts))
        assert owner < 0 or (owner == held and residency.slot_of.reshape(-1)[owner] == slot)


def test_what_the_draft_says_stays_before_what_was_used():
    """Slots of layers to come that the draft foresees go last; of a policy without it, by use alone."""
    drafted, usage = (RETAIN_POLICIES.description(name) for name in ("drafted", "usage"))
    ahead = np.array([[0, 0], [0, 1]])
    orders = []
    for policy in (drafted, usage):
        left = retained_experts.nothing(2, 2, 5, policy)
        left = retained_experts.after_copies(left, [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)])
        left = retained_experts.after_pass(retained_experts.after_pass(left, 0, np.array([3, 1])), 1, np.array([2, 0]))
        orders.append(np.argsort(retained_experts.eviction_priority(left, ahead), kind="stable").tolist())
    assert orders == [[4, 1, 2, 0, 3], [4, 3, 1, 2, 0]]
