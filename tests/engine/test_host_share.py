"""The host's cores compute a share of the absent experts: the same tokens, fewer bytes over the link."""

import pytest
from engine_cases import PROMPTS, SAMPLED, plan, run

import specmoe_jax as sm
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.support.errors import PlanError
from specmoe_jax.testing import TINY, eagle_head, tiny
from specmoe_jax.testing.families import RAW_CONFIGS

PLANS = {
    "on_demand": plan("on_demand", batch_size=4, host_share=0.5),
    "on_demand, cache on the host": plan("on_demand", batch_size=4, kv_tier="host", host_share=1.0),
    "caching": plan("caching", batch_size=3, retain=True, cached_experts=2, host_share=0.5),
    "specmoe": plan("specmoe", batch_size=8, draft_length=3, draft_experts=2, host_share=1.0),
    "prefetch": plan("specmoe", batch_size=4, draft_experts=2, prefetch="draft", retain=True, spare_slots=2, host_share=0.5),
    "by row": plan(
        "specmoe", batch_size=4, draft_experts=2, draft_stop="union", retain=True, retain_policy="drafted", host_share=0.5
    ),
    "merged": plan("specmoe", batch_size=4, draft="merged", draft_experts=2, kv_tier="host", host_share=0.5),
    "tree": plan("on_demand", batch_size=4, draft="eagle", draft_length=2, draft_tree_top_k=2, draft_tree_tokens=4, host_share=0.5),
    "emulated link": plan("on_demand", batch_size=2, link_bytes_per_s=1e9, host_share=0.5),
}


@pytest.fixture(scope="module")
def expected():
    return run(tiny(), plan("resident", batch_size=8))[0]


@pytest.mark.parametrize("name", PLANS)
def test_lossless(name, expected):
    own = PLANS[name]
    given = {"draft_head": eagle_head(tiny())} if own.draft == "eagle" else {}
    tokens, stats = run(tiny(), own, **given)
    assert tokens == expected
    assert stats["compilations_after_warmup"] == 0
    assert 0 < stats["host_computed_experts"] <= stats["expert_misses"]


@pytest.mark.parametrize("slots", [1, 2])
def test_waves(slots, expected):
    """Free slots for so many experts at a time."""
    model, own = tiny(), plan("on_demand", batch_size=8, host_share=0.5)
    _, free = run(model, own)
    budget = free["peak_accelerator_bytes"] - (TINY.num_experts - slots) * model.expert_bytes
    tokens, stats = run(model, own.replace(device_memory_bytes=budget))
    assert tokens == expected
    assert stats["link_bytes"] == free["link_bytes"] and stats["host_computed_experts"] == free["host_computed_experts"]


def test_nothing_crosses_for_a_step_when_the_host_computes_all():
    _, without = run(tiny(), plan("on_demand", batch_size=4))
    _, stats = run(tiny(), plan("on_demand", batch_size=4, host_share=1.0))
    assert stats["link_bytes"] == 0 and stats["host_computed_experts"] == stats["expert_misses"] == without["expert_misses"]


def test_half_of_the_misses_cross():
    model = tiny()
    _, stats = run(model, plan("on_demand", batch_size=1, host_share=0.5), PROMPTS[:2])
    assert stats["link_bytes"] == (stats["expert_misses"] - stats["host_computed_experts"]) * model.expert_bytes
    assert 0.3 < stats["host_computed_experts"] / stats["expert_misses"] < 0.7


def test_sampled_text_is_that_of_any_plan():
    params = {"batch_size": 4, "deterministic_sampling": True}
    tokens, _ = run(tiny(), plan("specmoe", host_share=0.5, **params), params=SAMPLED)
    assert tokens == run(tiny(), plan("resident", **params), params=SAMPLED)[0]


@pytest.mark.parametrize(
    ("preset", "changes", "words"),
    [
        ("resident", {}, "expert_flow=resident"),
        ("streaming", {}, "expert_flow=stream"),
        ("on_demand", {"expert_tier": "disk", "host_memory_bytes": 1e9}, "expert_tier=disk"),
        ("on_demand", {"devices": 2}, "devices=2"),
    ],
)
def test_where_it_has_no_effect_it_is_refused(preset, changes, words):
    with pytest.raises(PlanError, match=words):
        plan(preset, host_share=0.5, **changes).validate(TINY)


def test_experts_without_a_kernel_are_refused():
    config = parse_config(RAW_CONFIGS["gpt_oss"])
    with pytest.raises(PlanError, match="no compiled kernel for the experts of gpt_oss"):
        sm.PRESETS["on_demand"](config).replace(host_share=0.5).validate(config)
