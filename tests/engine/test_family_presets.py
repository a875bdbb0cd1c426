"""The families with states, indexers or caches of several shapes: drafts with weights, or none, in their flows and tiers.

The combinations go round: of each draft, chains and trees together meet every flow and tier in some family. Of the target's own
experts, self and merged, and without a draft all families run in test_families.py and test_family_drafts.py.
"""

import functools
import itertools

import numpy as np
import pytest
from engine_cases import tokens_of

import specmoe_jax as sm
from specmoe_jax.config.registry import DRAFTS
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.model import Model, random_model
from specmoe_jax.testing.families import RAW_CONFIGS

FURTHER = {"num_nextn_predict_layers": 1}  # which other families have without saying so
FAMILIES = {"deepseek_v32": FURTHER, "qwen3_next": {}, "mimo_v2_flash": {}, "glm_moe_dsa": FURTHER, "qwen3_5_moe": {}}
PROMPTS = tuple(tuple(int(t) for t in np.random.default_rng([8, i]).integers(3, 131, n)) for i, n in enumerate((9, 1, 14)))
PARAMS = sm.SamplingParams(max_new_tokens=6, ignore_eos=True)
PLANS = {
    "on_demand": {"batch_size": 2},
    "on_demand host": {"batch_size": 1, "kv_tier": "host"},
    "caching": {"batch_size": 3, "retain": True},
    "overlap": {"batch_size": 3, "link_bytes_per_s": 1e12},
    "on_demand computed": {"batch_size": 3, "expert_flow": "host_compute"},
    "resident": {"batch_size": 2},
    "streaming": {"batch_size": 2, "micro_batches": 2},
    "streaming accelerator": {"batch_size": 3, "prefill_attention": "accelerator"},
}
TREE = {"draft_length": 2, "draft_tree_top_k": 2, "draft_tree_tokens": 4}
WORDS = "needs experts that stay|every expert is at hand|which keeps its draft experts|trees are grown by one layer"
KEEPING = ("on_demand", "on_demand host", "overlap")  # flows that keep experts of the target to draft with
DRAFTED = {
    "eagle": ({"draft_length": 2}, tuple(PLANS)),
    "eagle tree": (TREE, tuple(PLANS)),
    "mtp": ({"draft_length": 2}, tuple(PLANS)),
    "mtp tree": (TREE, tuple(PLANS)),
    "ngram": ({"draft_length": 2}, tuple(PLANS)),
    "model": ({"draft_length": 2}, tuple(PLANS)),
    "self": ({"draft_length": 2, "draft_experts": 3}, KEEPING),
    "merged": ({"draft_length": 2, "draft_experts": 2}, KEEPING),
}
REFUSED = ("mimo_v2_flash", "mtp tree")  # three layers, one token each, and trees are grown by one
CASES = [
    (family, draft, plans[(5 * place + other) % len(plans)])
    for place, (draft, (_, plans)) in enumerate(DRAFTED.items())
    for other, family in enumerate(FAMILIES)
    if plans != KEEPING and (family, draft) != REFUSED
]


@functools.cache
def model_of(family: str) -> Model:
    return random_model(parse_config(RAW_CONFIGS[family] | FAMILIES[family]))


@functools.cache
def expected(family: str) -> list[tuple[int, ...]]:
    model = model_of(family)
    return tokens_of(sm.Engine(model, sm.PRESETS["resident"](model.config).replace(batch_size=3)).generate(PROMPTS, PARAMS))


def plan_of(family: str, draft: str, case: str) -> sm.Plan:
    changes = {"prefill_chunk": 8} | PLANS[case] | DRAFTED[draft][0]
    return sm.PRESETS[case.split()[0]](model_of(family).config).replace(draft=draft.split()[0], **changes)


@pytest.mark.parametrize(("family", "draft", "case"), CASES)
def test_lossless(family, draft, case):
    model, plan = model_of(family), plan_of(family, draft, case)
    given = {"draft_model": model} if draft == "model" else DRAFTS.executor(plan.draft).random_inputs(model)
    engine = sm.Engine(model, plan, **given)
    assert tokens_of(engine.generate(PROMPTS, PARAMS)) == expected(family)
    assert engine.stats()["compilations_after_warmup"] == 0


def test_every_other_pair_is_refused():
    """With words that say what goes together; nothing else is."""
    for family, draft, case in itertools.product(FAMILIES, DRAFTED, PLANS):
        plan, config = plan_of(family, draft, case), model_of(family).config
        if (case in DRAFTED[draft][1] or (draft, case) == ("merged", "caching")) and (family, draft) != REFUSED:
            plan.validate(config)
        else:
            with pytest.raises(sm.PlanError, match=WORDS):
                plan.validate(config)
