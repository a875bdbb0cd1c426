"""Speculation, offloading, tiers and waves change no token."""

import functools

import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, ScriptedDraft, plan, run, steps, tokens_of

import specmoe_jax as sm
from specmoe_jax.planner.memory.account import account
from specmoe_jax.testing import TINY

LENGTHS = (1, 2, 4, 8)
EXPERTS = range(1, TINY.num_experts + 1)
TIERS = ("accelerator", "host")
BATCHES = (1, len(PROMPTS))


@pytest.fixture(scope="module")
def resident(model):
    """What every other plan must give: batch of all prompts, each expert at hand, no draft."""
    return run(model, plan("resident"))[0]


def test_resident_follows_the_cacheless_reference(model, resident):
    """Independent of the engine: the argmax of model.logits over prompt and generated tokens, teacher-forced."""
    width = max(map(len, PROMPTS)) + GREEDY.max_new_tokens
    rows = np.zeros((len(PROMPTS), width), np.int32)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, resident, strict=True)):
        rows[row, : len(prompt) + len(tokens)] = prompt + tokens
    choices = np.asarray(model.logits(rows)).argmax(-1)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, resident, strict=True)):
        assert tuple(choices[row, len(prompt) - 1 :][: len(tokens)].tolist()) == tokens


@pytest.mark.parametrize("kv_tier", TIERS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("preset", ["resident", "on_demand"])
def test_no_draft(model, resident, preset, batch, kv_tier):
    tokens, stats = run(model, plan(preset, kv_tier=kv_tier), PROMPTS[:batch])
    assert tokens == resident[:batch]
    assert stats["tokens_per_step"] == 1
    assert (stats["activation_link_bytes"] > 0) == (kv_tier == "host")


@pytest.mark.slow
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kv_tier", TIERS)
@pytest.mark.parametrize("batch", BATCHES)
def test_self_draft(model, resident, batch, kv_tier, length, experts):
    tokens, stats = run(model, plan(kv_tier=kv_tier, draft_length=length, draft_experts=experts), PROMPTS[:batch])
    assert tokens == resident[:batch]
    assert stats["draft_link_bytes"] == 0
    assert len(stats["acceptance_by_position"]) == length
    if experts == TINY.num_experts:  # the draft is the target
        assert stats["acceptance_by_position"] == [1.0] * length


@pytest.mark.parametrize("kv_tier", TIERS)
@pytest.mark.parametrize("length", [1, 4])
def test_always_wrong_draft(model, resident, length, kv_tier):
    draft = ScriptedDraft(length, dict(zip(PROMPTS, resident, strict=True)), right=lambda row, start: 0)
    tokens, stats = run(model, plan("on_demand", draft="custom", draft_length=length, kv_tier=kv_tier), draft=draft)
    assert tokens == resident
    assert stats["acceptance_by_position"] == [0.0] * length
    assert stats["steps"] == GREEDY.max_new_tokens


def test_garbage_draft(model, resident):
    """Tokens outside the vocabulary are no proposal."""

    class Garbage:
        length = 3

        def propose(self, view):
            tokens = np.tile(np.array([-1, TINY.vocab_size, 2**31 - 1], np.int32), (len(view.history), 1))
            return sm.types.Proposal(tokens=tokens, probs=None), view.kv

    tokens, stats = run(model, plan("on_demand", draft="custom", draft_length=3), draft=Garbage())
    assert tokens == resident
    assert stats["acceptance_by_position"] == [0.0] * 3


@pytest.mark.parametrize("flow", ["on_demand", "resident"])
def test_scripted_ragged_acceptance(model, resident, flow):
    """Each row accepts another number of tokens in each step, exactly as many as the script says."""
    length = 4

    def right(row, start):
        return (row + start) % (length + 1)

    draft = ScriptedDraft(length, dict(zip(PROMPTS, resident, strict=True)), right)
    engine = sm.Engine(model, plan(flow, draft="custom", draft_length=length), draft=draft)
    seen = set()
    for _, state, info in steps(engine):  # noqa: B007 (used after the loop)
        for row in np.flatnonzero(info.active):
            left = GREEDY.max_new_tokens - info.start[row]
            if left > length:  # before the known text ends
                assert info.accepted[row] == right(row, info.start[row])
            assert info.committed[row] == min(info.accepted[row] + 1, left)
            seen.add(int(info.accepted[row]))
        assert not info.accepted[~info.active].any() and not info.committed[~info.active].any()
    assert list(state.generated) == resident
    assert seen == set(range(length + 1))


def test_lengths_and_last_tokens_after_each_step(model, resident):
    """The cache holds all committed tokens but the last, whatever was accepted."""
    engine = sm.Engine(model, plan(draft_length=4, draft_experts=3))
    for _, state, _ in steps(engine):
        for row, prompt in enumerate(PROMPTS):
            text = prompt + state.generated[row]
            assert state.lengths[row] == len(text) - 1
            assert state.last_token[row] == text[-1]


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("kv_tier", TIERS)
def test_waves(model, resident, slots, kv_tier):
    """A budget that leaves only `slots` slots for a layer's dispatch: more rounds, the same tokens and bytes."""
    for base in (plan("on_demand", kv_tier=kv_tier), plan(kv_tier=kv_tier, draft_length=4, draft_experts=2)):
        whole, free = run(model, base)
        pinned = TINY.num_layers * (base.draft_experts or 0)
        budget = free["peak_accelerator_bytes"] - (TINY.num_experts - slots) * model.expert_bytes
        tokens, stats = run(model, base.replace(device_memory_bytes=budget))
        assert tokens == whole == resident
        assert stats["link_bytes"] == free["link_bytes"]
        assert stats["peak_accelerator_bytes"] <= budget
        engine = sm.Engine(model, base.replace(device_memory_bytes=budget))
        for _, state, info in steps(engine):
            assert state.memory.pool.shape[0] == pinned + slots
            if not pinned:  # as many rounds as the misses of each layer fill its slots
                misses = [len(set(ids[ids >= 0].tolist())) for ids in info.verify.routing]
                assert info.verify.waves == sum(-(-count // slots) for count in misses)


@pytest.mark.slow
def test_one_engine_many_batches(model, resident):
    """Smaller and larger batches, last one padded, on one engine: pool, residency and shapes are carried over."""
    engine = sm.Engine(model, plan(draft_length=3, draft_experts=2, batch_size=3))
    for count in (1, 8, 2, 5):
        assert tokens_of(engine.generate(PROMPTS[:count], GREEDY)) == resident[:count]


@pytest.mark.slow
@pytest.mark.parametrize("kv_tier", TIERS)
def test_one_engine_many_batches_within_a_budget(model, resident, kv_tier):
    """What a batch leaves to the pool depends on its size; a pool of an earlier batch must not be taken for it."""
    alone = account(TINY, plan("on_demand", kv_tier=kv_tier), batch_rows=1, positions=64)
    for extra in range(0, 40_000, 8_000):
        budget = alone.accelerator_bytes + extra
        engine = sm.Engine(model, plan("on_demand", prefill_chunk=1, kv_tier=kv_tier, device_memory_bytes=budget))
        for count in (1, 4, 2, 4, 1):
            try:
                assert tokens_of(engine.generate(PROMPTS[:count], GREEDY)) == resident[:count]
            except sm.PlanError:  # a budget may be too small for the larger batch
                assert count > 1


def test_two_states_of_one_engine(model, resident):
    """The functional face: states of different batches may be stepped alternately."""
    engine = sm.Engine(model, plan(draft_length=2, draft_experts=2, prefill_chunk=1))
    first, second = engine.init(PROMPTS[:1], GREEDY), engine.init(PROMPTS, GREEDY)
    while not (first.done and second.done):
        if not first.done:
            first, _ = engine.step(first)
        if not second.done:
            second, _ = engine.step(second)
    assert list(first.generated) == resident[:1]
    assert list(second.generated) == resident


def test_two_states_of_one_engine_under_a_budget(model, resident):
    """A large batch computes in waves, a small one at once; each state keeps the way its own pool was made for."""
    base = plan(draft_length=2, draft_experts=2, prefill_chunk=1)
    size = functools.partial(account, TINY, base, positions=64)
    large, small = size(batch_rows=len(PROMPTS)), size(batch_rows=1)
    tight = large.accelerator_bytes - (large.num_slots - large.pinned_slots - 2) * large.expert_bytes
    engine = sm.Engine(model, base.replace(device_memory_bytes=max(tight, small.accelerator_bytes)))
    first, second = engine.init(PROMPTS, GREEDY), engine.init(PROMPTS[:1], GREEDY)
    assert not first.memory.slots.single_wave
    assert second.memory.slots.single_wave
    while not first.done:
        first, _ = engine.step(first)
    while not second.done:
        second, _ = engine.step(second)
    assert list(first.generated) == resident
    assert list(second.generated) == resident[:1]
