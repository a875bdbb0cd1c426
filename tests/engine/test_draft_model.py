"""A separate model as the draft: no token changes, its cache follows what was committed, other vocabularies are refused."""

import dataclasses

import jax
import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, SAMPLED, plan, run, tokens_of

import specmoe_jax as sm
from specmoe_jax.engine.requests.prepare import check_job
from specmoe_jax.testing import TINY


@pytest.fixture(scope="module")
def resident(model):
    return run(model, plan("resident"))[0]


@pytest.fixture(scope="module")
def near(model):
    """The same model with noise on its attention, so that some of its tokens are accepted and some are not."""

    def noisy(layer, seed):
        noise = 0.02 * jax.random.normal(jax.random.key(seed), layer.o.shape)
        return layer.replace(o=layer.o + noise)

    layers = tuple(noisy(layer, seed) for seed, layer in enumerate(model.weights.layers))
    return dataclasses.replace(model, weights=model.weights.replace(layers=layers))


def drafting(preset="on_demand", length=4, **changes):
    return plan(preset, draft="model", draft_length=length, **changes)


CASES = {
    "plain": {},
    "one token": {"length": 1},
    "host cache": {"kv_tier": "host"},
    "resident": {"preset": "resident"},
    "guard": {"guard": True},
    "small chunks": {"prefill_chunk": 2, "batch_size": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_lossless(model, near, resident, case):
    tokens, stats = run(model, drafting(**CASES[case]), draft_model=near)
    assert tokens == resident
    assert stats["draft_link_bytes"] == stats["compilations_after_warmup"] == 0
    if case != "guard":
        assert 0 < stats["acceptance_by_position"][0] < 1


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_target_itself_is_always_accepted(model, params):
    _, stats = run(model, drafting(), params=params, draft_model=model)
    np.testing.assert_allclose(stats["acceptance_by_position"], 1.0, atol=0.02 if params is SAMPLED else 0)


@pytest.mark.slow
def test_its_cache_is_that_of_the_committed_text(model, near):
    """Every proposal is what the draft model says without a cache, whatever was accepted before."""
    engine = sm.Engine(model, drafting(length=3), draft_model=near)
    state, seen = engine.init(PROMPTS, GREEDY), []
    draft = engine._resources.runtime.draft

    def propose(view):
        proposal, kv = draft.propose(view)
        seen.append((view.history, view.active, np.asarray(proposal.tokens)))
        return proposal, kv

    object.__setattr__(engine._resources.runtime, "draft", type("Spy", (), {"propose": staticmethod(propose)})())
    while not state.done:
        state, _ = engine.step(state)
    width = max(map(len, PROMPTS)) + GREEDY.max_new_tokens + 3
    for history, active, tokens in seen[:6]:
        rows = np.zeros((len(history), width), np.int32)
        for row, text in enumerate(history):
            rows[row, : len(text) + 3] = *text, *tokens[row]
        choices = np.asarray(near.logits(rows)).argmax(-1)
        for row in np.flatnonzero(active):
            end = len(history[row])
            assert choices[row, end - 1 : end + 2].tolist() == tokens[row].tolist()
    assert len(seen) > 5


@pytest.mark.slow
def test_one_engine_many_batches(model, near, resident):
    engine = sm.Engine(model, drafting(batch_size=3, prefill_chunk=1), draft_model=near)
    for count in (1, 8, 2):
        assert tokens_of(engine.generate(PROMPTS[:count], GREEDY)) == resident[:count]


def test_it_is_in_the_memory_account(model):
    _, alone = run(model, plan("on_demand", draft="ngram", draft_length=4), PROMPTS[:1])
    _, both = run(model, drafting(), PROMPTS[:1], draft_model=model)
    assert both["peak_accelerator_bytes"] > alone["peak_accelerator_bytes"] + TINY.num_experts * model.expert_bytes
    with pytest.raises(sm.PlanError, match="device memory"):
        sm.Engine(model, drafting(device_memory_bytes=alone["peak_accelerator_bytes"]), draft_model=model).generate(PROMPTS[:1])


def test_refused(model):
    with pytest.raises(sm.PlanError, match="draft_model"):
        sm.Engine(model, drafting())
    with pytest.raises(sm.PlanError, match="draft_model"):
        sm.Engine(model, plan(), draft_model=model)
    larger = sm.random_model(dataclasses.replace(TINY, vocab_size=TINY.vocab_size + 1))
    with pytest.raises(sm.PlanError, match="vocabulary has 264 tokens, the model's 263"):
        sm.Engine(model, drafting(), draft_model=larger)
    demo = sm.load_model("demo")
    with pytest.raises(sm.PlanError, match="vocabulary"):
        sm.Engine(model, drafting(), draft_model=demo)
    other = dataclasses.replace(model, tokenizer=demo.tokenizer)
    with pytest.raises(sm.PlanError, match="other tokens"):
        sm.Engine(model, drafting(), draft_model=other)


@pytest.mark.slow
def test_a_job_without_a_draft_model_is_refused_by_its_memory_like_any_other(model):
    """Before anything is loaded, when nothing is known of the draft model (generate.py without --draft_model)."""
    with pytest.raises(sm.PlanError, match="device memory of 1 bytes is too small"):
        check_job(model, drafting(device_memory_bytes=1), PROMPTS, GREEDY)
