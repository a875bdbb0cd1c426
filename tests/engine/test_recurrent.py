"""Models with recurrent layers: any pattern of acceptance leaves the tokens as they are, across chunks, pages and refills."""

import functools

import numpy as np
import pytest
from engine_cases import ScriptedDraft, ScriptedTree, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

import specmoe_jax as sm
from specmoe_jax.engine.runtime import new_states
from specmoe_jax.planner.memory.account import account
from specmoe_jax.testing.families import tiny_family

FAMILY = "qwen3_next"
LENGTH = 3
# Of one token; shorter and longer than a chunk; two that begin alike; one that crosses a page of 64 positions as it grows.
PROMPTS = tuple(tuple(int(t) for t in np.random.default_rng([3, i]).integers(3, 131, n)) for i, n in enumerate((1, 5, 18, 9, 58)))
PROMPTS += ((*PROMPTS[2][:9], 7, 8, 9),)
PARAMS = sm.SamplingParams(max_new_tokens=10, ignore_eos=True)
PLANS = {
    "on_demand": {"batch_size": 3, "prefill_chunk": 4},
    "on_demand host": {"batch_size": 6, "prefill_chunk": 4, "kv_tier": "host"},
    "streaming": {"batch_size": 2, "micro_batches": 2, "prefill_chunk": 8},
    "streaming accelerator": {"batch_size": 3, "prefill_chunk": 8, "prefill_attention": "accelerator"},
}


@functools.cache
def expected() -> list[tuple[int, ...]]:
    model = tiny_family(FAMILY)
    return tokens_of(sm.Engine(model, sm.PRESETS["resident"](model.config).replace(batch_size=1)).generate(PROMPTS, PARAMS))


def test_plain_decoding_follows_the_definition():
    """The argmax of the forward that runs position by position, without a cache."""
    model, width = tiny_family(FAMILY), max(map(len, PROMPTS)) + PARAMS.max_new_tokens
    rows = np.zeros((len(PROMPTS), width), np.int32)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, expected(), strict=True)):
        rows[row, : len(prompt) + len(tokens)] = prompt + tokens
    choices = np.asarray(model.logits(rows)).argmax(-1)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, expected(), strict=True)):
        assert tuple(choices[row, len(prompt) - 1 :][: len(tokens)].tolist()) == tokens


CHAINS = [(case, ScriptedDraft, {}) for case in PLANS]
TREES = [(case, ScriptedTree, {"draft_tree_tokens": 5, "draft_tree_top_k": 2}) for case in ("on_demand host", "streaming")]


@pytest.mark.parametrize(("case", "kind", "tree"), CHAINS + TREES)
def test_any_acceptance(case, kind, tree):
    model, pattern, texts = tiny_family(FAMILY), [0], dict(zip(PROMPTS, expected(), strict=True))
    size = (LENGTH, 5) if tree else (LENGTH,)
    draft = kind(*size, texts, lambda row, start: pattern[(3 * row + start) % len(pattern)])
    plan = sm.PRESETS[case.split()[0]](model.config).replace(draft="custom", draft_length=LENGTH, **PLANS[case], **tree)
    engine = sm.Engine(model, plan, draft=draft)

    @settings(max_examples=3, deadline=None)
    @given(st.lists(st.integers(0, LENGTH), min_size=7, max_size=7))
    def holds(drawn):
        pattern[:] = drawn
        assert tokens_of(engine.generate(PROMPTS, PARAMS)) == expected()

    holds()
    assert engine.stats()["compilations_after_warmup"] == 0


@pytest.mark.parametrize("draft", [{"draft": "ngram", "draft_length": 2}, {"draft_length": 4, "draft_experts": 3}])
def test_states_are_in_the_account(draft):
    model = tiny_family(FAMILY)
    plan = sm.PRESETS["specmoe" if "draft_experts" in draft else "on_demand"](model.config).replace(**draft)
    held = account(model.config, plan, batch_rows=5, positions=64)
    layers = [model.config.layers[layer].attention.recurrent for layer in model.config.recurrent_layers]
    states = [new_states(layer, 5, plan.draft_length, None) for layer in layers]
    arrays = sum(state.state.nbytes + state.rows.nbytes for state in states)
    assert held.state_bytes == arrays * (len(layers) + 1) // len(layers)  # alike; of one of them twice
    longer = account(model.config, plan, batch_rows=5, positions=128)
    assert longer.state_bytes == held.state_bytes
    attends = model.config.num_layers - len(layers)
    assert held.kv_bytes == 2 * 5 * 64 * attends * 2 * 16 * 4  # two KV heads of 12, stored as 16


def test_scores_are_read_row_by_row():
    """Texts of one context share neither a row nor a beginning: a state has no pages."""
    model = tiny_family(FAMILY)
    texts = [(PROMPTS[4], (5, 6)), (PROMPTS[4], (9,)), (PROMPTS[2], (1, 2, 3)), (PROMPTS[5], (4,))]
    found = [
        sm.Engine(model, sm.PRESETS[preset](model.config).replace(batch_size=2, prefill_chunk=8)).score(texts)
        for preset in ("on_demand", "streaming")
    ]
    for (context, continuation), *scores in zip(texts, *found, strict=True):
        logits = np.asarray(model.logits([(*context, *continuation)]))[0, len(context) - 1 : -1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for score in scores:
            np.testing.assert_allclose(score.logprobs, logprobs[np.arange(len(continuation)), continuation], atol=1e-4)


def test_what_all_prompts_begin_with_is_computed_once():
    """For one row, whose state the others get."""
    model, begun = tiny_family(FAMILY), PROMPTS[4][:11]
    prompts = [(*begun, 5, 6, 7), (*begun, 8), (*begun, 9, 9)]
    plan = sm.PRESETS["specmoe"](model.config).replace(draft_length=2, draft_experts=3, batch_size=4, prefill_chunk=4)
    alone = sm.Engine(model, sm.PRESETS["resident"](model.config).replace(batch_size=1))
    assert tokens_of(sm.Engine(model, plan).generate(prompts, PARAMS)) == tokens_of(alone.generate(prompts, PARAMS))


@pytest.mark.parametrize("preset", ["specmoe", "streaming"])
def test_requests_that_join_a_running_batch(preset):
    """One takes the row that holds its own prompt and more: it is read again, since a state cannot be cut to a beginning."""
    model = tiny_family(FAMILY)
    changes = {"draft_length": 2, "draft_experts": 3} if preset == "specmoe" else {"draft": "ngram", "draft_length": 2}
    engine = sm.Engine(model, sm.PRESETS[preset](model.config).replace(batch_size=2, prefill_chunk=8, **changes))
    service = engine.service(max_tokens=90)
    order, handles = (2, 5, 2, 3, 0), []
    for number in order:
        handles.append(service.submit(PROMPTS[number], PARAMS))
        service.step()
    while not all(handle.done for handle in handles):
        service.step()
    assert [handle.completion.token_ids for handle in handles] == [expected()[number] for number in order]
