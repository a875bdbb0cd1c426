"""The routing of each request: in every flow and with every draft that of the committed tokens alone, in their order."""

import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, ScriptedTree, plan, run

import specmoe_jax as sm
from specmoe_jax.testing import TINY

SHARED = tuple((9, 8, 7, 6, 5, 4, 3, 2, 1, 250 + i) for i in range(3))  # beyond the first two chunks of 4
CASES = {
    "resident": plan("resident"),
    "specmoe": plan(draft_length=3, draft_experts=2, prefill_chunk=8),
    "streaming": plan("streaming", batch_size=4, prefill_chunk=8),
    "streaming, ngram": plan("streaming", batch_size=4, draft="ngram", draft_length=2, micro_batches=2),
    "host_compute": plan("resident", expert_flow="host_compute", kv_tier="host"),
    "retain, prefetch": plan(draft_length=3, draft_experts=2, prefetch="draft", retain=True, batch_size=3),
}


@pytest.fixture(scope="module")
def expected(model):
    """The routing of whole texts as prompts, a row at a time; independent of drafts, steps and batches."""
    texts = [(*prompt, *tokens) for prompt, tokens in zip(PROMPTS, run(model, plan("resident"))[0], strict=True)]
    engine = sm.Engine(model, plan("on_demand", batch_size=1), routing="weights")
    return [done.routing for done in engine.generate(texts, sm.SamplingParams(max_new_tokens=1))]


@pytest.mark.parametrize("name", CASES)
def test_every_flow_tells_what_a_prompt_of_the_whole_text_is_told(model, expected, name):
    engine = sm.Engine(model, CASES[name], routing="weights")
    for prompt, done, whole in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), expected, strict=True):
        count = len(prompt) - 1 + len(done.token_ids)
        assert done.routing.prompt_tokens == len(prompt) - 1
        assert done.routing.ids.shape == (count, TINY.num_moe_layers, TINY.experts_per_token)
        np.testing.assert_array_equal(done.routing.ids, whole.ids[:count])
        np.testing.assert_allclose(done.routing.weights, whole.weights[:count], atol=1e-5)
    assert engine.stats()["compilations_after_warmup"] == 0


@pytest.mark.parametrize("flow", ["resident", "stream"])
def test_of_a_tree_the_accepted_path(model, expected, flow):
    texts = dict(zip(PROMPTS, run(model, plan("resident"))[0], strict=True))
    draft = ScriptedTree(3, 6, texts, right=lambda row, start: (row + start) % 4)
    preset = {"resident": plan("resident"), "stream": plan("streaming", batch_size=8)}[flow]
    a_plan = preset.replace(draft="custom", draft_length=3, draft_tree_top_k=2, draft_tree_tokens=6)
    for done, whole in zip(sm.Engine(model, a_plan, draft=draft, routing="ids").generate(PROMPTS, GREEDY), expected, strict=True):
        np.testing.assert_array_equal(done.routing.ids, whole.ids[: len(done.routing.ids)])
        assert done.routing.weights is None


def test_rows_that_begin_alike_are_told_apart(model):
    """What they share is computed for one of them."""
    together = sm.Engine(model, plan("resident", prefill_chunk=4), routing="ids").generate(SHARED, GREEDY)
    alone = sm.Engine(model, plan("resident", batch_size=1), routing="ids").generate(SHARED, GREEDY)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.routing.ids, other.routing.ids)


def test_steps_tell_it_in_flows_that_otherwise_do_not(model):
    told = []
    for routing in (None, "weights"):
        engine = sm.Engine(model, plan("resident"), routing=routing)
        engine.generate(PROMPTS, GREEDY, on_step=lambda info: told.append(info.verify))
    assert told[0].routing is None and told[0].routing_weights is None
    assert told[-1].routing.shape == told[-1].routing_weights.shape == (TINY.num_moe_layers, 8, 1, TINY.experts_per_token)


def test_what_cannot_be_told_is_refused(model):
    with pytest.raises(sm.PlanError, match="routing is 'all'; it must be one of ids, weights"):
        sm.Engine(model, plan("resident"), routing="all")
    with pytest.raises(sm.PlanError, match="not of a service's; make an Engine without it"):
        sm.Engine(model, plan("resident"), routing="ids").service()
