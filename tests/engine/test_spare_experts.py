"""Pinned layers beside the stream: the same tokens, exactly the fewer bytes, and an account of what really lies there."""

import functools

import jax
import pytest
from engine_cases import GREEDY, PROMPTS, plan, run, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

import specmoe_jax as sm
from specmoe_jax.planner.estimate import predict
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.memory.account import account
from specmoe_jax.planner.workload import Workload
from specmoe_jax.testing import TINY, eagle_head, tiny
from tests.planner.planner_cases import MIXTRAL

LAYER = TINY.num_experts * TINY.expert_params * 4
LAYERS = TINY.num_layers


@functools.cache
def expected():
    return run(tiny(), plan("resident", batch_size=8))[0]


@pytest.mark.parametrize("pinned", [0, 1, LAYERS])
@pytest.mark.parametrize("changes", [{"batch_size": 8}, {"batch_size": 3, "micro_batches": 3, "prefill_chunk": 8}])
def test_tokens_are_those_of_the_resident_preset(pinned, changes):
    got, stats = run(tiny(), plan("streaming", pinned_layers=pinned, draft="ngram", draft_length=2, **changes))
    assert got == expected()
    assert stats["compilations_after_warmup"] == 0


@pytest.mark.parametrize("tree", [{}, {"draft_tree_top_k": 2, "draft_tree_tokens": 5}])
def test_chains_and_trees_of_an_eagle_head(tree):
    a_plan = plan("specmoeoff", batch_size=4, draft_length=3, pinned_layers=1, **tree)
    got, stats = run(tiny(), a_plan, PROMPTS * 2, draft_head=eagle_head(tiny()))
    assert got == expected() * 2
    assert stats["compilations_after_warmup"] == 0


@pytest.mark.parametrize("pinned, buffers", [(0, 2), (1, 2), (0, 3), (LAYERS, 2)])
def test_each_pass_brings_exactly_the_layers_that_are_not_pinned(pinned, buffers):
    engine = sm.Engine(tiny(), plan("streaming", batch_size=8, pinned_layers=pinned, layer_buffers=buffers))
    state = engine.init(PROMPTS, GREEDY)
    before = settled_bytes(engine)
    for _ in range(5):
        state, info = engine.step(state)
        assert (info.verify.hits, info.verify.fetched) == (pinned * TINY.num_experts, (LAYERS - pinned) * TINY.num_experts)
    assert settled_bytes(engine) - before == 5 * (LAYERS - pinned) * LAYER


def settled_bytes(engine) -> int:
    """Expert bytes sent, when nothing is under way."""
    engine._resources.runtime.context.workers.link.submit(lambda: None).result()
    return engine._resources.runtime.experts.store.link.sent_bytes


@pytest.mark.parametrize("pinned", [0, 1, LAYERS])
def test_the_account_is_what_lies_on_the_accelerator(pinned):
    engine = sm.Engine(tiny(), plan("streaming", batch_size=4, pinned_layers=pinned))
    state = engine.init(PROMPTS[:4], GREEDY)
    buffers = state.memory.buffers
    arrived = [future.result() for future in buffers.coming]
    held = sum(array.nbytes for array in jax.tree.leaves((buffers.spare, arrived, buffers.pinned)))
    own = engine._resources.account
    assert held == own.num_slots * own.expert_bytes == (pinned + (2 if pinned < LAYERS else 0)) * LAYER
    assert own.spare_expert_bytes == pinned * LAYER


def test_a_budget_is_filled_with_whole_layers():
    least = account(TINY, plan("streaming", batch_size=8), batch_rows=8, positions=64).accelerator_bytes
    seen = []
    for extra in (0, LAYER - 1, LAYER, 5 * LAYER):
        engine = sm.Engine(tiny(), plan("streaming", batch_size=8, device_memory_bytes=least + extra))
        assert tokens_of(engine.generate(PROMPTS, GREEDY)) == expected()
        seen.append(len(engine._resources.runtime.experts.pinned_layers))
        assert engine.stats()["peak_accelerator_bytes"] <= least + extra
    assert seen == [0, 0, LAYERS, LAYERS]  # with two buffers of three layers, room for one more is room for all


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.integers(2, 4))
def test_no_further_layer_would_have_fitted(layers_worth, buffers):
    a_plan = sm.PRESETS["streaming"](MIXTRAL).replace(batch_size=8, dtype="bfloat16", layer_buffers=buffers)
    plain = account(MIXTRAL, a_plan, batch_rows=8, positions=1024)
    layer = MIXTRAL.num_experts * plain.expert_bytes
    budget = plain.accelerator_bytes + (layers_worth - 2) * layer + layer // 2
    filled = account(MIXTRAL, a_plan.replace(device_memory_bytes=budget), batch_rows=8, positions=1024)
    assert filled.accelerator_bytes <= budget
    streamed = MIXTRAL.num_layers - filled.pinned_layers
    assert filled.accelerator_bytes + layer > budget or streamed == 0
    assert streamed == 0 or streamed > buffers
    named = account(MIXTRAL, a_plan.replace(pinned_layers=filled.pinned_layers), batch_rows=8, positions=1024)
    assert filled.accelerator_bytes == named.accelerator_bytes


def test_predictions_count_the_fewer_bytes():
    a_plan = sm.PRESETS["streaming"](MIXTRAL).replace(batch_size=64, dtype="bfloat16")
    found = {
        pinned: predict(
            MIXTRAL,
            a_plan.replace(pinned_layers=pinned),
            machine("a30"),
            Workload(prompt_tokens=512, new_tokens=128),
            budgets=False,
        )
        for pinned in (0, 8, 16)
    }
    whole = found[0]
    for pinned, one in found.items():
        share = 1 - pinned / MIXTRAL.num_layers
        assert one.link_bytes_per_token == pytest.approx(share * whole.link_bytes_per_token)
        assert one.iteration_s == pytest.approx(share * whole.iteration_s, rel=0.03)  # the link binds
    assert whole.account.spare_expert_bytes == 0 < found[8].account.spare_expert_bytes


def test_a_prediction_fills_no_budget_that_the_plan_does_not_name():
    """The engine knows no other."""
    assert (
        predict(
            TINY, plan("streaming", batch_size=4), machine("a30"), Workload(prompt_tokens=32, new_tokens=32)
        ).account.pinned_layers
        == 0
    )


def test_a_later_job_may_need_more_pages_than_the_first():
    engine = sm.Engine(tiny(), plan("streaming", batch_size=8))
    assert tokens_of(engine.generate(PROMPTS[:2], GREEDY)) == expected()[:2]
    assert tokens_of(engine.generate(PROMPTS, GREEDY)) == expected()
    assert engine._resources.account.kv_pages >= len(PROMPTS)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"pinned_layers": -1}, "0 or more"),
        ({"pinned_layers": 2}, "give 3, which takes less, or at most 1"),
        ({"pinned_layers": 4}, "give 3, which takes less"),
        ({"pinned_layers": 1, "layer_buffers": 3}, "at most 0"),
        ({"pinned_layers": 3, "link_bytes_per_s": 1e9}, "no effect with all 3 layers pinned"),
        ({"pinned_layers": 3, "layer_buffers": 3}, "no effect with all 3 layers pinned"),
        ({"pinned_layers": 1, "expert_flow": "on_demand"}, "no effect"),
    ],
)
def test_what_has_no_effect_is_refused(changes, words):
    with pytest.raises(sm.PlanError, match=words):
        plan("streaming").replace(**changes).validate(TINY)


def test_too_many_pinned_layers_for_a_budget_are_refused():
    with pytest.raises(sm.PlanError, match=r"1 pinned layers and 2 layers' experts.*or fewer pinned layers"):
        sm.Engine(tiny(), plan("streaming", batch_size=1, pinned_layers=1, device_memory_bytes=3 * LAYER))
