"""Rows are independent: a request's tokens do not depend on its batch mates, its place or who finished earlier."""

import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, SAMPLED, plan, run, tokens_of

import specmoe_jax as sm
from specmoe_jax.testing import TINY

SPECULATING = plan(draft_length=4, draft_experts=3)


@pytest.fixture(scope="module")
def together(model):
    return run(model, SPECULATING)[0]


@pytest.mark.parametrize("row", range(len(PROMPTS)))
def test_alone(model, together, row):
    assert run(model, SPECULATING, PROMPTS[row : row + 1])[0] == together[row : row + 1]


def test_at_another_place(model, together):
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    assert run(model, SPECULATING, [PROMPTS[i] for i in order])[0] == [together[i] for i in order]


def test_with_other_mates(model, together):
    mates = [tuple(reversed(prompt)) * 2 for prompt in PROMPTS[1:]]
    assert run(model, SPECULATING, [PROMPTS[0], *mates])[0][0] == together[0]


def test_mates_that_end_earlier(model, together):
    """Rows finish one after the other, and their places must not route, vote or write."""
    limits = [1, 16, 3, 2, 16, 7, 1, 5]
    params = [sm.SamplingParams(max_new_tokens=limit, ignore_eos=True) for limit in limits]
    tokens, _ = run(model, SPECULATING, params=params)
    assert tokens == [text[:limit] for text, limit in zip(together, limits, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "a_plan",
    [plan("on_demand"), plan("resident"), plan(draft_length=3, draft_experts=TINY.num_experts)],
    ids=lambda a_plan: a_plan.preset,
)
def test_sampled_in_batches_of_any_size(model, a_plan):
    """Draws are keyed by seed, number of the request and position. N = E: the draft does not depend on mates."""
    whole, _ = run(model, a_plan, params=SAMPLED)
    assert len(set(whole)) == len(whole)
    for batch_size in (1, 3):
        assert run(model, a_plan.replace(batch_size=batch_size), params=SAMPLED)[0] == whole


def test_sampled_with_other_mates(model):
    tokens, _ = run(model, plan("on_demand"), params=SAMPLED)
    others = [PROMPTS[0], *[tuple(reversed(prompt)) for prompt in PROMPTS[1:]]]
    assert run(model, plan("on_demand"), others, SAMPLED)[0][0] == tokens[0]


def test_greedy_rows_beside_sampled_ones(model, together):
    params = [GREEDY if row % 2 else SAMPLED for row in range(len(PROMPTS))]
    tokens, _ = run(model, SPECULATING, params=params)
    assert tokens[1::2] == together[1::2]
    assert tokens[::2] != together[::2]


@pytest.mark.parametrize("kv_tier", ["accelerator", "host"])
def test_sampling_is_reproducible_by_its_seed(model, kv_tier):
    a_plan = SPECULATING.replace(kv_tier=kv_tier)
    first, _ = run(model, a_plan, params=SAMPLED)
    assert run(model, a_plan, params=SAMPLED)[0] == first
    other = sm.SamplingParams(max_new_tokens=16, ignore_eos=True, temperature=0.9, top_p=0.95, seed=4)
    assert run(model, a_plan, params=other)[0] != first


def test_nearly_zero_temperature_is_greedy(model, together):
    cold = sm.SamplingParams(max_new_tokens=16, ignore_eos=True, temperature=1e-6)
    assert run(model, SPECULATING, params=cold)[0] == together


def test_top_1_is_greedy(model, together):
    only = sm.SamplingParams(max_new_tokens=16, ignore_eos=True, temperature=1.0, top_k=1)
    engine = sm.Engine(model, SPECULATING)
    assert tokens_of(engine.generate(PROMPTS, only)) == together
