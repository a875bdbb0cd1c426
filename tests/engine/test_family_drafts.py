"""Merged experts and a separate model draft for every family without changing a token."""

import pytest
from test_families import PARAMS, PROMPTS, reference_tokens

from specmoe_jax import PRESETS, Engine
from specmoe_jax.testing_families import RAW_CONFIGS, tiny_family


@pytest.mark.parametrize("draft", ["merged", "model"])
@pytest.mark.parametrize("family", RAW_CONFIGS)
def test_lossless(family, draft):
    model = tiny_family(family)
    plan = PRESETS["on_demand"](model.config).replace(batch_size=2, prefill_chunk=4, draft=draft, draft_length=3)
    engine = Engine(model, plan.replace(draft_experts=2)) if draft == "merged" else Engine(model, plan, draft_model=model)
    completions = engine.generate([list(prompt) for prompt in PROMPTS], PARAMS)
    assert tuple(completion.token_ids for completion in completions) == reference_tokens(family)
    stats = engine.stats()
    assert stats["draft_link_bytes"] == stats["compilations_after_warmup"] == 0
    if draft == "model":  # which is the target here
        assert stats["acceptance_by_position"] == [1.0] * 3
