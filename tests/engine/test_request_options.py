"""What requests ask for beside tokens: edits of logits and log-probabilities, the same in every flow and with any draft."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import PROMPTS, plan, reference, tokens_of

import specmoe_jax as sm
from specmoe_jax.speculate.trees import make_tree
from specmoe_jax.testing import TINY, eagle_head
from specmoe_jax.types import Proposal


def thirds(ids, logits):
    """Depends on how many tokens there are, and on the last of them."""
    length = jnp.sum(ids >= 0)
    return jnp.where((jnp.arange(len(logits)) + length + ids[length - 1]) % 3 == 0, logits - 5.0, logits)


ASKED = (
    {},
    {"logprobs": 3, "prompt_logprobs": 2},
    {"logprobs": 0, "repetition_penalty": 1.4},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "prompt_logprobs": 0},
    {"logit_bias": {5: 9.0, 7: 3.0}, "banned_tokens": (1, 2, 69)},
    {"logits_processor": thirds, "logprobs": 5},
)
PROMPTS = PROMPTS[: len(ASKED)]
TREE = {"draft_tree_tokens": 8, "draft_tree_top_k": 3}
CASES = {
    "self draft": ("specmoe", {"draft_length": 3, "batch_size": 3}, False),
    "streaming": ("streaming", {"batch_size": 2}, False),
    "eagle": ("specmoeoff", {"draft_length": 3, "batch_size": 3}, True),
    "eagle tree": ("specmoeoff", {"draft_length": 3, "batch_size": 3} | TREE, True),
    "ngram": ("on_demand", {"draft": "ngram", "draft_length": 3, "kv_tier": "host"}, False),
}


def params(temperature):
    drawn = {"temperature": temperature, "min_p": 0.02} if temperature else {}
    return [sm.SamplingParams(max_new_tokens=12, ignore_eos=True, **drawn, **asked) for asked in ASKED]


@pytest.fixture(scope="module", params=[0.0, 0.8], ids=["greedy", "drawn"])
def plain(model, request):
    how = {"deterministic_sampling": True} if request.param else {}
    return request.param, how, sm.Engine(model, plan("resident", **how)).generate(PROMPTS, params(request.param))


@pytest.mark.every_case
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_speculation_and_flows_change_nothing(model, plain, case):
    (temperature, how, expected), (preset, changes, head) = plain, case
    engine = sm.Engine(model, plan(preset, **changes, **how), **({"draft_head": eagle_head(model)} if head else {}))
    done = engine.generate(PROMPTS, params(temperature))
    assert tokens_of(done) == tokens_of(expected)
    for own, other in zip(done, expected, strict=True):
        for name in ("logprobs", "prompt_logprobs"):
            assert_alike(getattr(own, name), getattr(other, name))
    assert engine.stats()["compilations_after_warmup"] == 0


def assert_alike(own, other):
    assert (own is None) == (other is None)
    for a, b in zip(own or (), other or (), strict=True):
        assert (a.token_id, [token for token, _ in a.top]) == (b.token_id, [token for token, _ in b.top])
        np.testing.assert_allclose([a.logprob, *dict(a.top).values()], [b.logprob, *dict(b.top).values()], atol=1e-5, rtol=0)


def test_logprobs_are_the_models_own(model, plain):
    """Before temperature, penalties and bans; of the prompt too."""
    _, _, done = plain
    for prompt, completion in zip(PROMPTS, done, strict=True):
        for told, context, tokens in (
            (completion.logprobs, prompt, completion.token_ids),
            (completion.prompt_logprobs, prompt[:1], prompt[1:]),
        ):
            if told is not None:
                assert tuple(token.token_id for token in told) == tokens
                expected, _ = reference(model, context, tokens)
                np.testing.assert_allclose([token.logprob for token in told], expected, atol=2e-5, rtol=0)
    first = done[1].logprobs[0]
    assert len(first.top) == 3 and len(done[1].prompt_logprobs[0].top) == 2 and done[2].logprobs[0].top == ()
    assert first.top[0][1] == max(value for _, value in first.top) >= first.logprob


def test_events_carry_the_logprobs_of_their_tokens(model):
    engine, told = sm.Engine(model, plan("specmoe", draft_length=3)), {}
    for event in engine.stream(PROMPTS[:2], [sm.SamplingParams(max_new_tokens=9, logprobs=1), sm.SamplingParams(max_new_tokens=9)]):
        if event.id == 1:
            assert event.logprobs is None
            continue
        assert tuple(token.token_id for token in event.logprobs) == event.token_ids
        told[event.id] = (*told.get(event.id, ()), *event.logprobs)
        if event.completion:
            assert event.completion.logprobs == told[event.id]


def test_each_edit_does_what_it_says(model):
    """Greedy, by the reference forward."""
    engine = sm.Engine(model, plan("resident"))
    base = sm.SamplingParams(max_new_tokens=12, ignore_eos=True)
    (free,) = tokens_of(engine.generate(PROMPTS[4:5], base))
    banned = tuple(set(free))
    (other,) = tokens_of(engine.generate(PROMPTS[4:5], dataclasses.replace(base, banned_tokens=banned)))
    assert not set(other) & set(banned)
    (always,) = tokens_of(engine.generate(PROMPTS[4:5], dataclasses.replace(base, logit_bias={9: 1e5})))
    assert set(always) == {9}
    (never_twice,) = tokens_of(engine.generate(PROMPTS[4:5], dataclasses.replace(base, presence_penalty=100.0)))
    assert len(set(never_twice)) == 12 > len(set(free))
    (once,) = engine.generate(PROMPTS[4:5], dataclasses.replace(base, stop_token_ids=(free[3],)))
    assert once.token_ids == free[: free.index(free[3]) + 1] and once.finish_reason == "stop"


class Zeros:
    """A tree of zeros in every row, those that join included: what such a row seems to accept must not move its cache."""

    length = 2

    def propose(self, view):
        tokens = np.zeros((len(view.history), 4), np.int32)
        return Proposal(tokens, None, tree=make_tree(jnp.asarray([[0, 0, 2, 3]] * len(tokens)), 4)), view.kv


def test_a_tree_leaves_the_cache_of_rows_that_join_alone(model):
    texts, params = PROMPTS[1:5], [sm.SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (2, 9, 5, 7)]
    expected = tokens_of(sm.Engine(model, plan("resident")).generate(texts, params))
    joining = plan("streaming", batch_size=2, draft="custom", draft_length=3, draft_tree_tokens=4, draft_tree_top_k=2)
    assert tokens_of(sm.Engine(model, joining, draft=Zeros()).generate(texts, params)) == expected


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_p": 1.0, "temperature": 1.0}, "min_p is 1.0"),
        ({"min_p": 0.1}, "min_p has no effect at temperature 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias is"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "names a token twice"),
        ({"banned_tokens": [1]}, "banned_tokens is"),
        ({"logits_processor": 3}, "logits_processor is a int"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"banned_tokens": (TINY.vocab_size,)}, "banned_tokens names token 263"),
        ({"banned_tokens": tuple(range(TINY.vocab_size))}, "bans all 263 tokens"),
        ({"stop_token_ids": (999,)}, "stop_token_ids names token 999"),
        ({"prompt_logprobs": 300}, "prompt_logprobs is 300 and the vocabulary has 263"),
    ],
)
def test_what_cannot_be_asked_is_refused(model, fields, message):
    with pytest.raises(sm.RequestError, match=message):
        sm.Engine(model, plan("resident")).generate(PROMPTS[:1], sm.SamplingParams(**fields))
