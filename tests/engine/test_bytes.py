"""Every expert byte that crosses the link is counted, and the count is what routing and residency say."""

import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, plan, run, steps

import specmoe_jax as sm
from specmoe_jax.offload.store import ExpertStore
from specmoe_jax.testing import TINY, eagle_head

PLANS = {
    "on_demand": plan("on_demand"),
    "specmoe": plan(draft_length=4, draft_experts=2),
    "all experts": plan(draft_length=2, draft_experts=TINY.num_experts),
    "host": plan(draft_length=4, draft_experts=3, kv_tier="host"),
}


@pytest.fixture
def copied(monkeypatch):
    """The copies really made, as (bytes, slot)."""
    made = []
    write = ExpertStore._write

    def spy(store, pool, blocks, slots):
        made.extend((block.nbytes, int(slot)) for block, slot in zip(blocks, slots, strict=True))
        return write(store, pool, blocks, slots)

    monkeypatch.setattr(ExpertStore, "_write", spy)
    return made


@pytest.mark.parametrize("name", PLANS)
def test_a_step_sends_what_is_needed_and_not_resident(model, copied, name):
    engine = sm.Engine(model, PLANS[name])
    for before, state, info in steps(engine):  # noqa: B007 (used after the loop)
        needed = [set(ids[ids >= 0].tolist()) for ids in info.verify.routing]
        resident = [set(np.flatnonzero(slots >= 0).tolist()) for slots in before.slot_of]
        missing = sum(len(n - r) for n, r in zip(needed, resident, strict=True))
        assert info.draft_link_bytes == 0
        assert info.link_bytes == missing * model.expert_bytes
        assert info.verify.misses == info.verify.fetched == missing
        assert info.verify.hits == sum(map(len, needed)) - missing
        routed = np.broadcast_to(info.active[None, :, None, None], info.verify.routing.shape)
        assert ((info.verify.routing >= 0) == routed).all()  # finished rows choose nothing
    assert sum(size for size, _ in copied) == engine._resources.runtime.experts.store.link.sent_bytes
    assert {size for size, _ in copied} == {model.expert_bytes}
    assert state.done


def test_nothing_crosses_while_drafting(model, copied, monkeypatch):
    """Counted at the copy itself, not by the engine."""
    from specmoe_jax.engine import step

    drafting, draft = [], step.draft

    def spy(*args):
        before = len(copied)
        result = draft(*args)
        drafting.append(len(copied) - before)
        return result

    monkeypatch.setattr(step, "draft", spy)
    run(model, PLANS["specmoe"])
    assert len(drafting) > 3 and not any(drafting)


@pytest.mark.parametrize("name", PLANS)
def test_slots_hold_the_experts_that_the_table_says(model, name):
    engine = sm.Engine(model, PLANS[name])
    size = PLANS[name].draft_experts or 0
    for _, state, _ in steps(engine):
        slot_of, owner = state.memory.residency[:2]
        assert ((slot_of >= 0).sum(axis=1) == size).all()  # the next draft set, in every layer
        assert (owner >= 0).sum() == size * TINY.num_layers
    pool = np.asarray(state.memory.pool)
    for layer, expert in np.argwhere(slot_of >= 0):
        np.testing.assert_array_equal(pool[slot_of[layer, expert]], np.asarray(model.experts[layer][expert]))


def test_the_draft_set_is_what_the_pass_chose_most(model):
    """HotTemporal: no expert outside the set was chosen more often in the latest verification than one inside."""
    engine = sm.Engine(model, PLANS["specmoe"])
    for _, state, info in steps(engine):
        for layer in range(TINY.num_layers):
            ids = info.verify.routing[layer]
            counts = np.bincount(ids[ids >= 0], minlength=TINY.num_experts)
            hot = state.memory.residency.slot_of[layer] >= 0
            assert counts[hot].min() >= counts[~hot].max()


@pytest.mark.parametrize("batch_size", [8, 3])
def test_on_demand_account_is_what_on_demand_sends(model, batch_size):
    """specmoe says from its routing what plain decoding would have sent; plain decoding sends exactly that."""
    params = [sm.SamplingParams(max_new_tokens=limit) for limit in (1, 16, 3, 2, 16, 7, 9, 5)]
    _, speculating = run(model, plan(draft_length=4, draft_experts=3, batch_size=batch_size), params=params)
    _, plain = run(model, plan("on_demand", batch_size=batch_size), params=params)
    assert plain["on_demand_link_bytes_per_token"] == plain["link_bytes_per_token"]
    assert speculating["on_demand_link_bytes_per_token"] == plain["link_bytes_per_token"]
    assert speculating["new_tokens"] == plain["new_tokens"] == 1 + 16 + 3 + 2 + 16 + 7 + 9 + 5


def test_the_on_demand_account_holds_at_every_step(model):
    """A metrics file is written in the middle of a batch too."""
    engine, seen = sm.Engine(model, plan("on_demand", batch_size=3)), []
    for _ in engine.stream(PROMPTS, GREEDY):
        break  # and a batch may be given up
    engine.generate(PROMPTS, GREEDY, on_step=lambda _: seen.append(engine.stats()))
    assert len(seen) == 3 * GREEDY.max_new_tokens and engine.stats()["steps"] == len(seen) + 1
    assert all(stats["on_demand_link_bytes_per_token"] == stats["link_bytes_per_token"] for stats in seen)


def test_resident_sends_nothing_after_loading(model):
    _, stats = run(model, plan("resident"))
    assert stats["link_bytes"] == stats["draft_link_bytes"] == 0
    assert stats["on_demand_link_bytes_per_token"] is None


@pytest.mark.slow
def test_every_byte_is_in_the_figures(model, copied):
    """Decode, prefill and the first draft set: their sum is what the copies made, also over batches of other sizes."""
    engine = sm.Engine(model, plan(draft_length=2, draft_experts=2, batch_size=8))
    for count in (1, 8, 3):
        engine.generate(PROMPTS[:count], GREEDY)
    stats = engine.stats()
    assert stats["link_bytes"] + stats["prefill_link_bytes"] == sum(size for size, _ in copied)


def test_bytes_of_the_warm_up_are_counted(model, copied):
    """Its steps commit nothing, and the draft set of those accepted last is another one then."""
    a_plan = plan(draft_length=2, draft_experts=(5, 4, 1), draft_set="accepted", prefill_chunk=3, batch_size=3)
    engine = sm.Engine(model, a_plan)
    engine.generate(PROMPTS, GREEDY)
    stats = engine.stats()
    assert stats["link_bytes"] + stats["prefill_link_bytes"] == sum(size for size, _ in copied)


def test_every_byte_of_an_eagle_draft_is_counted_once(model, copied):
    """Batch after batch, though each is given a draft of its own."""
    engine = sm.Engine(model, plan("on_demand", draft="eagle", draft_length=2, batch_size=3), draft_head=eagle_head(model))
    engine.generate(PROMPTS, GREEDY)
    stats = engine.stats()
    assert stats["link_bytes"] + stats["prefill_link_bytes"] == sum(size for size, _ in copied)


@pytest.mark.parametrize("changes", [{}, {"layer_buffers": 3}, {"pinned_layers": 1}, {"pinned_layers": TINY.num_layers}], ids=str)
def test_every_streamed_byte_is_in_the_figures(model, copied, changes):
    """Also what crosses the link while whoever asked for the tokens is busy with them, over jobs of other sizes."""
    engine = sm.Engine(model, plan("streaming", batch_size=3, **changes))
    for count in (2, 8):
        for event in engine.stream(PROMPTS[:count], GREEDY):
            if event.completion:
                engine._resources.runtime.context.workers.link.submit(lambda: None).result()
    engine._resources.runtime.context.workers.link.submit(lambda: None).result()
    stats = engine.stats()
    assert stats["link_bytes"] + stats["prefill_link_bytes"] == sum(size for size, _ in copied)
    assert stats["link_bytes"] == stats["expert_misses"] * model.expert_bytes


def test_activation_bytes_of_the_host_tier(model):
    """Queries, keys and values out, attention outputs back, for every position of every row's pass."""
    engine = sm.Engine(model, plan("on_demand", kv_tier="host"))
    (_, _, info), *_ = steps(engine, PROMPTS[:1])
    width = (2 * TINY.num_heads + 2 * TINY.num_kv_heads) * TINY.head_dim
    assert info.activation_bytes == TINY.num_layers * width * 4


def test_peak_is_that_of_the_largest_batch(model):
    """The cache of a later, larger batch counts, though the pool is that of the first."""
    engine = sm.Engine(model, plan("on_demand"))
    engine.generate(PROMPTS[:1], GREEDY)
    alone = engine.stats()["peak_accelerator_bytes"]
    engine.generate(PROMPTS, GREEDY)
    together = engine.stats()["peak_accelerator_bytes"]
    engine.generate(PROMPTS[:1], GREEDY)
    assert alone < together == engine.stats()["peak_accelerator_bytes"]
    assert together == run(model, plan("on_demand"))[1]["peak_accelerator_bytes"]
