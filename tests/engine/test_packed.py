"""Models of quantised checkpoints: every preset writes the same tokens, and what moves is the packed experts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import tokens_of

import specmoe_jax as sm
from specmoe_jax import PRESETS, Engine, SamplingParams
from specmoe_jax.models.eagle import config as eagle_config
from specmoe_jax.models.eagle import network as eagle
from specmoe_jax.models.model import random_model
from specmoe_jax.planner.memory.account import account
from specmoe_jax.support.errors import PlanError
from specmoe_jax.testing import EAGLE_JSON, TINY
from specmoe_jax.testing.families import tiny_family
from tests.packed_experts import packed_model

PROMPTS = [[5, 99, 3, 17, 64, 8, 2], [77, 6, 30]]
PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True)
SIZES = dataclasses.replace(TINY, hidden_size=64, expert_hidden=32)  # whole groups of every format
CHANGES = {
    "overlap": {"link_bytes_per_s": 1e8},
    "caching": {"draft": "ngram", "draft_length": 2},
    "specmoe": {"draft_length": 3, "draft_experts": 2, "prefetch": "draft", "retain": True},
    "specmoeoff": {"draft_length": 3},
}
KINDS = ["fp8:128x128", "mxfp4", "awq:32", "compressed:32:bfloat16", "nvfp4", "lossless"]


def head_of(model):
    raw = EAGLE_JSON | {"hidden_size": SIZES.hidden_size}
    return eagle.random_head(eagle_config.parse_config(raw, model.config, fused=False), model)


@pytest.mark.parametrize("packing", KINDS)
def test_every_preset_writes_the_same_tokens(packing):
    model, exact = packed_model(random_model(SIZES), packing)
    logits, wanted = (m.logits([PROMPTS[0]]) for m in (model, exact))
    assert jnp.abs(logits - wanted).max() <= 1e-5 * jnp.abs(wanted).max()
    expected = tokens_of(Engine(exact, PRESETS["resident"](SIZES).replace(batch_size=2)).generate(PROMPTS, PARAMS))
    for name in PRESETS:
        plan = PRESETS[name](model.config).replace(batch_size=2, **CHANGES.get(name, {}))
        head = {"draft_head": head_of(model)} if plan.drafting.given == "draft_head" else {}
        engine = Engine(model, plan, **head)
        assert tokens_of(engine.generate(PROMPTS, PARAMS)) == expected, name
        stats = engine.stats()
        assert stats["link_bytes"] % model.expert_bytes == 0 and (stats["link_bytes"] > 0 or name not in ("on_demand", "streaming"))


@pytest.mark.slow
def test_gpt_oss_in_mxfp4():
    """Biases and clamps, which the compiled kernel computes as well."""
    model, exact = packed_model(tiny_family("gpt_oss"), "mxfp4")
    tokens = [
        tokens_of(Engine(m, PRESETS[name](m.config).replace(batch_size=2)).generate(PROMPTS, PARAMS))
        for m, name in ((exact, "resident"), (model, "resident"), (model, "specmoe"))
    ]
    assert tokens[0] == tokens[1] == tokens[2]


def test_account_and_refusals():
    model, _ = packed_model(random_model(SIZES), "fp8:128x128")
    plan = PRESETS["specmoe"](model.config)
    own = account(model.config, plan, batch_rows=2, positions=64)
    assert own.expert_bytes == model.expert_bytes == np.asarray(model.experts[0][0]).nbytes
    decoded = account(model.config, plan.replace(expert_dtype="decoded"), batch_rows=2, positions=64)
    assert decoded.expert_bytes == SIZES.expert_params * 4
    with pytest.raises(PlanError, match="packed as fp8:128x128; take another draft, or expert_dtype=decoded"):
        Engine(model, sm.Plan(preset="", draft="merged", draft_experts=2, draft_length=2))
    with pytest.raises(PlanError, match="expert_dtype=decoded, the model's experts are packed as fp8:128x128"):
        Engine(model, plan.replace(expert_dtype="decoded"))
