"""No way to substitute changes a token, with either cache, prefetching or not, in one wave or several."""

import numpy as np
import pytest
from engine_cases import PROMPTS, SAMPLED, plan, run

import specmoe_jax as sm
from specmoe_jax.config.plan_fields import SUBSTITUTIONS
from specmoe_jax.testing import TINY


@pytest.fixture(scope="module")
def resident(model):
    return run(model, plan("resident"))[0]


@pytest.mark.parametrize("kv_tier", ["accelerator", "host"])
@pytest.mark.parametrize("experts", [1, 3, TINY.num_experts])
@pytest.mark.parametrize("substitution", SUBSTITUTIONS)
def test_lossless(model, resident, substitution, experts, kv_tier):
    tokens, stats = run(model, plan(substitution=substitution, draft_experts=experts, kv_tier=kv_tier))
    assert tokens == resident
    assert stats["draft_link_bytes"] == stats["compilations_after_warmup"] == 0
    if experts == TINY.num_experts:  # the draft is the target
        assert stats["acceptance_by_position"] == [1.0] * 4


@pytest.mark.parametrize("substitution", ["distinct", "mask"])
def test_with_prefetch(model, resident, substitution):
    tokens, _ = run(model, plan(substitution=substitution, draft_experts=2, prefetch="draft"))
    assert tokens == resident


@pytest.mark.parametrize("substitution", ["distinct", "mask"])
def test_sampled_rows_keep_their_draws(model, substitution):
    """The draft's own distribution is what acceptance is told, so a draft that is the target is always accepted."""
    whole = plan(substitution=substitution, draft_experts=TINY.num_experts)
    assert run(model, whole, params=SAMPLED)[1]["acceptance_by_position"] == [1.0] * 4


def test_they_differ(model):
    """Each is a draft of its own."""
    params = sm.SamplingParams(max_new_tokens=32, ignore_eos=True)
    shares = [run(model, plan(substitution=name, draft_experts=2), PROMPTS, params)[1] for name in SUBSTITUTIONS]
    assert len({tuple(np.round(stats["acceptance_by_position"], 6)) for stats in shares}) > 1
