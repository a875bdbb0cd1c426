"""Requests whose logits are no numbers end with a reason; their batch mates go on as if they were alone."""

import dataclasses

import jax.numpy as jnp
import pytest
from engine_cases import GREEDY, PROMPTS, plan, run

import specmoe_jax as sm

PLANS = {
    "resident": plan("resident"),
    "on_demand": plan("on_demand"),
    "specmoe": plan(draft_length=3, draft_experts=3),
    "all accepted": plan(draft_length=5, draft_experts=5),
    "host": plan(draft_length=3, draft_experts=3, kv_tier="host"),
}


def poisoned(model, token, value):
    """The same model, whose embedding of one token is no number: from the step after it the row has no logits."""
    embed = jnp.asarray(model.weights.embed).at[token].set(value)
    return dataclasses.replace(model, weights=dataclasses.replace(model.weights, embed=embed))


@pytest.fixture(scope="module")
def resident(model):
    return run(model, plan("resident"))[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", PLANS)
def test_a_row_without_logits_ends_alone(model, resident, name, value):
    """The poison is a token that some rows write and others do not, nor have in their prompts."""
    poison = next(t for t in resident[2][4:] if t not in (*resident[2][:4], *resident[0], *PROMPTS[0], *PROMPTS[2]))
    bad = [row for row, prompt in enumerate(PROMPTS) if poison in (*prompt, *resident[row][:-1])]
    assert 2 in bad and 0 not in bad
    completions = sm.Engine(poisoned(model, poison, value), PLANS[name]).generate(PROMPTS, GREEDY)
    for row, done in enumerate(completions):
        if row not in bad:
            assert (done.token_ids, done.finish_reason, done.error) == (resident[row], "length", None)
            continue
        before = 0 if poison in PROMPTS[row] else resident[row].index(poison) + 1
        assert done.token_ids == resident[row][:before]  # what plain decoding gives before it
        assert done.finish_reason == "error"
        assert f"prompt {row}: the logits of new token {before} hold NaN or Inf" in done.error
