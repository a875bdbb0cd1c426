"""Drafts that end row by row or run fewer choices, eviction by drafted demand, merges while decoding: lossless, and counted."""

import numpy as np
import pytest
from engine_cases import PROMPTS, SAMPLED, plan, run, steps

import specmoe_jax as sm
from specmoe_jax.config.registry import RETAIN_POLICIES
from specmoe_jax.speculate import row_lengths
from specmoe_jax.testing import TINY

HOT = plan(draft_length=3, draft_experts=2)
PLANS = {
    "stop": HOT.replace(draft_stop="union"),
    "all": HOT.replace(draft_stop="union", retain=True, retain_policy="drafted", draft_top_k=1),
    "reduced": HOT.replace(draft_top_k=1),
    "reduced, distinct": HOT.replace(draft_top_k=1, substitution="distinct"),
    "reduced, mask": HOT.replace(draft_top_k=1, substitution="mask"),
    "drafted": HOT.replace(retain=True, retain_policy="drafted"),
    "drafted, prefetch": HOT.replace(retain=True, retain_policy="drafted", prefetch="draft", draft_stop="union"),
    "merged": plan(draft="merged", draft_length=3, draft_experts=2, merge_every=1),
    "merged, stop": plan(draft="merged", draft_length=3, draft_experts=2, merge_every=3, merge_experts=4, draft_stop="union"),
    "host": HOT.replace(kv_tier="host", draft_stop="union", retain=True, retain_policy="lfru"),
}


@pytest.fixture(scope="module")
def resident(model):
    return run(model, plan("resident"))[0]


@pytest.mark.parametrize("name", PLANS)
def test_lossless(model, resident, name):
    tokens, stats = run(model, PLANS[name])
    assert tokens == resident
    assert stats["compilations_after_warmup"] == 0


def test_sampled_text_is_the_same_where_it_depends_on_nothing_else(model):
    fixed = {"params": SAMPLED}
    expected = run(model, plan("resident", deterministic_sampling=True), **fixed)[0]
    assert run(model, PLANS["all"].replace(deterministic_sampling=True), **fixed)[0] == expected


def test_sampled_rows_that_end_early_accept_a_draft_that_is_the_target(model):
    """Its distribution is cut with its tokens: what is verified is accepted."""
    whole = HOT.replace(draft_experts=TINY.num_experts, draft_stop="union")
    engine = sm.Engine(model, whole)
    for _, _, info in steps(engine, params=SAMPLED):
        assert (info.accepted[info.active] == info.row_lengths[info.active]).all()


@pytest.mark.parametrize("fixed", [False, True])
def test_what_is_verified_of_a_sampled_row_does_not_depend_on_what_was_drawn(model, fixed, monkeypatch):
    """But where the draws are those of the target, whatever the draft: then a row may end early."""
    monkeypatch.setattr(row_lengths, "PASS_TOKENS", 0.25)  # which ends many
    engine, seen = sm.Engine(model, PLANS["stop"].replace(deterministic_sampling=fixed)), set()
    for _, _, info in steps(engine, PROMPTS[:2], params=SAMPLED):
        seen.update(info.row_lengths[info.active].tolist())
    assert len(seen) > 1 if fixed else seen == {3}


def test_rows_end_where_experts_cost_too_much(model):
    """Fewer positions are verified for fewer bytes; what is counted is what was verified."""
    fixed, (_, stats) = run(model, HOT, PROMPTS[:2])[1], run(model, PLANS["stop"], PROMPTS[:2])
    assert stats["verified_per_step"] < fixed["verified_per_step"] == 4
    engine, seen, verified, row_steps = sm.Engine(model, PLANS["stop"]), set(), 0, 0
    for _, _, info in steps(engine, PROMPTS[:2]):
        assert (info.accepted <= info.row_lengths).all() and info.row_lengths.max() <= info.positions - 1 <= 3
        seen.update(info.row_lengths[info.active].tolist())
        verified, row_steps = verified + int((info.row_lengths[info.active] + 1).sum()), row_steps + int(info.active.sum())
        routed = (info.verify.routing[0] >= 0).any(axis=-1).sum(axis=1)
        assert (routed == np.where(info.active, info.row_lengths + 1, 0)).all()
    assert len(seen) > 1 and verified / row_steps == stats["verified_per_step"]


def test_where_everything_is_held_no_row_ends(model):
    stats = run(model, HOT.replace(draft_experts=TINY.num_experts, draft_stop="union"))[1]
    assert stats["verified_per_step"] == 4 and stats["acceptance_by_position"] == [1.0] * 3


@pytest.mark.parametrize("policy", [*RETAIN_POLICIES])
def test_every_order_of_eviction(model, resident, policy):
    tokens, stats = run(model, HOT.replace(retain=True, retain_policy=policy, batch_size=2))
    assert tokens == resident
    assert (stats["foreseen_experts"] > 0) == RETAIN_POLICIES.description(policy).by_draft
    assert stats["foreseen_needed_experts"] <= stats["foreseen_experts"]


def test_the_plans_own_order_is_usage(model):
    sent = [run(model, HOT.replace(retain=True, retain_policy=policy, batch_size=1))[1]["link_bytes"] for policy in (None, "usage")]
    assert sent[0] == sent[1]


def test_all_choices_is_the_draft_of_before(model):
    found = [run(model, HOT.replace(draft_top_k=top_k))[1] for top_k in (None, TINY.experts_per_token, 1)]
    assert found[0]["acceptance_by_position"] == found[1]["acceptance_by_position"] != found[2]["acceptance_by_position"]


def test_merges_cross_the_link_and_change_the_blocks(model):
    """K blocks a layer each time; what a pass fetches is counted apart."""
    every, engine = 2, sm.Engine(model, plan(draft="merged", draft_length=3, draft_experts=2, merge_every=2))
    blocks, sent, count = None, [], 0
    for _, state, info in steps(engine):
        now = np.asarray(state.memory.pool)[engine._resources.runtime.experts.merged_slots]
        sent.append(info.merge_bytes)
        assert info.link_bytes - info.merge_bytes == info.verify.fetched * model.expert_bytes
        if blocks is not None and not np.array_equal(now, blocks):
            count += 1
            assert info.merge_bytes
        blocks = now
    assert count > 0 and set(sent) == {0, 2 * TINY.num_moe_layers * model.expert_bytes}
    assert [bool(one) for one in sent] == [step >= every and step % every == 0 for step in range(len(sent))]
    assert run(model, plan(draft="merged", draft_length=3, draft_experts=2, merge_every=0))[1]["merge_link_bytes"] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"draft_top_k": 3}, "draft_top_k is 3; a token chooses 2 experts"),
        ({"draft_stop": "union", "guard": True}, "leave one out"),
        ({"draft": "ngram", "draft_experts": None, "draft_stop": "union"}, "draft_stop=union has no effect with draft=ngram"),
        ({"retain_policy": "lru"}, "retain_policy=lru has no effect without retain"),
        ({"draft": "ngram", "draft_experts": None, "retain": True, "retain_policy": "drafted"}, "runs none of the model's"),
        ({"draft": "merged", "merge_experts": 3}, "merge_experts=3 has no effect without merge_every"),
        ({"draft": "merged", "merge_every": 2, "merge_experts": 1}, "merge_experts is 1; it must be 2"),
        ({"merge_every": 2}, "merge_every=2 has no effect with draft=self"),
    ],
    ids=str,
)
def test_refused(changes, said):
    with pytest.raises(sm.PlanError) as e:
        HOT.replace(**changes).validate(TINY)
    assert said in str(e.value) and "\n" not in str(e.value)
