"""Merged experts and a separate model draft for every family without changing a token."""

import pytest
from engine_cases import tokens_of

from specmoe_jax import PRESETS, Engine, SamplingParams
from specmoe_jax.testing.families import RAW_CONFIGS, tiny_family

PROMPTS = [[3, 8, 4, 8, 5, 9, 2, 6], [2, 7]]
PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)


CASES = [*((family, draft) for family in RAW_CONFIGS for draft in ("merged", "model")), ("nllb_moe", "merged")]


@pytest.mark.parametrize(("family", "draft"), CASES)
def test_lossless(family, draft):
    model = tiny_family(family)
    resident, plan = (PRESETS[name](model.config).replace(batch_size=2, prefill_chunk=4) for name in ("resident", "on_demand"))
    plan = plan.replace(draft=draft, draft_length=3)
    engine = Engine(model, plan.replace(draft_experts=2)) if draft == "merged" else Engine(model, plan, draft_model=model)
    assert tokens_of(engine.generate(PROMPTS, PARAMS)) == tokens_of(Engine(model, resident).generate(PROMPTS, PARAMS))
    stats = engine.stats()
    assert stats["draft_link_bytes"] == stats["compilations_after_warmup"] == 0
    if draft == "model":  # which is the target here
        assert stats["acceptance_by_position"] == [1.0] * 3
