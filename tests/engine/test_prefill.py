"""Prompts of many chunks: an expert crosses once for all of a layer's chunks, and no token changes."""

import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, plan, run

import specmoe_jax as sm
from specmoe_jax.engine.prefill import chunks_of, shared_positions
from specmoe_jax.planner.memory.account import account
from specmoe_jax.testing import TINY, eagle_head

PLANS = {
    "on_demand": plan("on_demand"),
    "caching": plan("caching"),
    "specmoe": plan(draft_length=3, draft_experts=2),
    "retain": plan(draft_length=3, draft_experts=2, retain=True),
    "prefetch": plan(draft_length=3, draft_experts=2, prefetch="draft"),
    "host": plan("on_demand", kv_tier="host"),
    "accepted": plan(draft_length=3, draft_experts=2, draft_set="accepted"),
}


@pytest.fixture(scope="module")
def resident(model):
    return run(model, plan("resident"))[0]


@pytest.mark.parametrize("name", PLANS)
def test_many_chunks_give_the_tokens_of_one(model, resident, name):
    tokens, stats = run(model, PLANS[name].replace(prefill_chunk=4))
    assert tokens == resident
    assert stats["prefill_link_bytes"] > 0


def _used(model, prompts):
    """[L] experts that the prompts but for their last tokens choose, counted in a run of one chunk."""
    _, stats = run(model, plan("on_demand"), prompts, sm.SamplingParams(max_new_tokens=1, ignore_eos=True))
    return stats["prefill_link_bytes"]


def test_an_expert_crosses_once_for_all_chunks(model):
    once = _used(model, PROMPTS)
    _, stats = run(model, plan("on_demand", prefill_chunk=4), PROMPTS, sm.SamplingParams(max_new_tokens=1, ignore_eos=True))
    assert stats["prefill_link_bytes"] == once
    assert once <= (TINY.num_layers * TINY.num_experts + 1) * model.expert_bytes


def test_a_pool_too_small_for_a_layer_takes_chunk_after_chunk(model, resident):
    a_plan = plan("on_demand", prefill_chunk=4)
    whole = account(TINY, a_plan, batch_rows=len(PROMPTS), positions=64)
    tight = a_plan.replace(device_memory_bytes=whole.accelerator_bytes - 2 * whole.expert_bytes)
    tokens, stats = run(model, tight)
    assert tokens == resident
    assert stats["prefill_link_bytes"] > run(model, a_plan)[1]["prefill_link_bytes"]


@pytest.mark.parametrize("fused", [True, False])
def test_a_draft_observes_every_chunk_in_order(model, fused):
    """What an EAGLE draft proposes depends on what it saw of the prompts: chunks must not change it."""
    common = {"draft": "eagle", "draft_length": 3}
    found = [
        run(model, plan("on_demand", prefill_chunk=chunk, **common), draft_head=eagle_head(model, fused=fused)) for chunk in (64, 4)
    ]
    (tokens, whole), (others, parts) = found
    assert tokens == others
    assert whole["acceptance_by_position"] == parts["acceptance_by_position"]
    assert whole["link_bytes"] == parts["link_bytes"]


def test_the_draft_set_is_of_the_whole_prompts(model):
    """The counts that choose it are the same, however the prompts are cut."""
    states = [
        sm.Engine(model, plan(draft_experts=2, draft_set="hot_global", prefill_chunk=chunk)).init(PROMPTS, GREEDY)
        for chunk in (64, 4)
    ]
    scores = [state.memory.usage_scores for state in states]
    assert (scores[0] == scores[1]).all()
    for state in states:
        assert ((state.memory.residency.slot_of >= 0).sum(axis=1) == 2).all()
    least = [np.sort(np.where(s.memory.residency.slot_of >= 0, s.memory.usage_scores, np.inf), axis=1)[:, 0] for s in states]
    assert (least[0] == least[1]).all()  # ties may fall differently


def test_what_waits_is_in_the_account(model):
    """Hidden states of all prompts in host memory, where they are more than a chunk."""
    size = {"batch_rows": 4, "positions": 64}
    assert account(TINY, plan("on_demand", prefill_chunk=64), **size).hidden_bytes == 0
    assert account(TINY, plan("resident", prefill_chunk=16), **size).hidden_bytes == 0
    assert account(TINY, plan("on_demand", prefill_chunk=16), **size).hidden_bytes == 4 * 64 * TINY.hidden_size * 4


HEADER = PROMPTS[4][:13]
ALIKE = tuple(HEADER + prompt[:5] for prompt in (PROMPTS[2], PROMPTS[6], PROMPTS[7], (9,)))


@pytest.fixture(scope="module")
def one_by_one(model):
    """Each prompt alone, where nothing is shared."""
    return [run(model, plan("resident"), [prompt])[0][0] for prompt in ALIKE]


@pytest.mark.parametrize("name", [*PLANS, "resident"])
def test_what_prompts_share_is_computed_for_one(model, one_by_one, name):
    a_plan = PLANS.get(name, plan("resident")).replace(prefill_chunk=4)
    assert run(model, a_plan, ALIKE)[0] == one_by_one


@pytest.mark.parametrize("fused", [True, False])
def test_a_draft_observes_what_is_shared_in_every_row(model, fused):
    shape = {"draft": "eagle", "draft_length": 3}
    runs = [
        run(model, plan("on_demand", prefill_chunk=chunk, **shape), ALIKE, draft_head=eagle_head(model, fused=fused))
        for chunk in (16, 4)
    ]
    assert runs[0][0] == runs[1][0]
    assert runs[0][1]["acceptance_by_position"] == runs[1][1]["acceptance_by_position"]


def test_what_is_shared_counts_for_every_row(model):
    """The draft set is chosen by the same counts."""
    scores = [
        sm.Engine(model, plan(draft_set="hot_global", prefill_chunk=chunk)).init(ALIKE, GREEDY).memory.usage_scores
        for chunk in (16, 4)
    ]
    assert scores[0].sum() == TINY.num_layers * 2 * sum(len(prompt) - 1 for prompt in ALIKE)
    assert (scores[0] == scores[1]).all()


def test_shared_positions():
    a, b, c = (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 9, 9), (1, 2, 3, 7, 7)
    assert shared_positions([a, b], 2) == 4
    assert shared_positions([a, b, ()], 1) == 4
    assert shared_positions([a, b, c], 2) == 2
    assert shared_positions([a], 2) == shared_positions([a, ()], 2) == 0
    assert shared_positions([a, a], 2) == 4  # the last token is the first step's
    assert shared_positions([a, b, (1,)], 2) == 0
    assert shared_positions([a, (1, 2, 3, 4)], 1) == 3


def test_chunks_of_prompts_that_begin_alike():
    first, second, third = chunks_of([(), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 9, 8)], 2, shared=4)
    assert [one.num_new.tolist() for one in (first, second, third)] == [[0, 2, 0], [0, 2, 0], [0, 1, 1]]
    assert [(one.stands_for, one.spreads_row) for one in (first, second, third)] == [(2, None), (2, 1), (1, None)]
    assert second.following.tolist() == [[0, 0], [4, 5], [4, 9]]
