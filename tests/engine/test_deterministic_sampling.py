"""Position-keyed sampling: the same tokens with speculation on or off, whatever the batch; and the target's law."""

import jax
import numpy as np
import pytest
from engine_cases import PROMPTS

import specmoe_jax as sm
from specmoe_jax.speculate.sampling import choose_coupled, coupled_keys, sampling_rows, transform_logits

PARAMS = sm.SamplingParams(max_new_tokens=12, temperature=0.8, top_p=0.95, seed=5)


def sampled(model, preset, **changes):
    plan = sm.PRESETS[preset](model.config).replace(deterministic_sampling=True, **changes)
    engine = sm.Engine(model, plan)
    return [completion.token_ids for completion in engine.generate(PROMPTS, PARAMS)], engine.stats()


@pytest.fixture(scope="module")
def expected(model):
    return sampled(model, "on_demand")[0]


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("specmoe", dict(draft_experts=2, draft_length=3)),
        ("specmoe", dict(draft_experts=3, draft_length=1, batch_size=3, prefetch="draft")),
        ("specmoe", dict(draft="ngram", draft_experts=None, batch_size=1)),
        ("resident", dict(batch_size=5)),
    ],
)
def test_same_tokens_as_without_speculation(model, expected, preset, changes):
    tokens, stats = sampled(model, preset, **changes)
    assert tokens == expected
    if changes.get("draft_experts") == 2:
        assert stats["tokens_per_step"] > 1.05  # drafts are accepted, so the equality is not trivial


def test_another_seed_draws_otherwise(model, expected):
    other = sm.Engine(model, sm.PRESETS["on_demand"](model.config).replace(deterministic_sampling=True))
    params = sm.SamplingParams(max_new_tokens=12, temperature=0.8, top_p=0.95, seed=6)
    assert [completion.token_ids for completion in other.generate(PROMPTS, params)] != expected


def test_choices_follow_the_transformed_distribution():
    draws = 40_000
    rows = sampling_rows([sm.SamplingParams(temperature=0.7, top_k=4)])
    logits = np.array([[[0.3, -1.0, 1.2, 0.0, 0.5, -2.0]]], np.float32)
    keys = coupled_keys([3], [1], np.arange(draws)[None])
    ids = choose_coupled(keys, np.broadcast_to(logits, (1, draws, 6)), rows)[0]
    p = np.asarray(transform_logits(logits, rows))[0, 0]
    counts = np.bincount(ids, minlength=6)
    assert (counts[p == 0] == 0).all()
    kept = p > 0
    chi_square = float(((counts[kept] - draws * p[kept]) ** 2 / (draws * p[kept])).sum())
    assert chi_square < 25  # 3 degrees of freedom: p-value 1.5e-5


def test_noise_depends_on_the_position_not_on_the_cut_into_steps():
    whole = coupled_keys([3, 4], [1, 2], np.array([[7, 8, 9], [0, 1, 2]]))
    part = coupled_keys([3], [1], np.array([[9]]))
    np.testing.assert_array_equal(jax.random.key_data(whole[0, 2]), jax.random.key_data(part[0, 0]))
