"""Draft-set policies: one of the user's given to Engine, and a new one by one function and one registry line."""

import sys
import types

import numpy as np
import pytest
from engine_cases import GREEDY, PROMPTS, plan, run, tokens_of

import specmoe_jax as sm
from specmoe_jax.config.registry import DRAFT_SETS, Choice
from specmoe_jax.speculate import DraftSetPolicy
from specmoe_jax.testing import TINY

DRAFTING = plan(draft_length=3, draft_experts=2)


def first_experts(setting=None) -> DraftSetPolicy:
    """The experts of the smallest ids, whatever was chosen."""
    return DraftSetPolicy(
        scores=lambda usage_scores, counts, layer: -np.arange(len(counts)),
        update=lambda usage_scores, counts, accepted: usage_scores,
        name="first_experts",
    )


def test_the_engine_takes_a_policy_and_names_it(model):
    resident = run(model, plan("resident"))[0]
    engine = sm.Engine(model, DRAFTING, draft_set=first_experts())
    assert tokens_of(engine.generate(PROMPTS, GREEDY)) == resident
    assert engine.stats()["draft_set"] == "first_experts" and engine.stats()["plan"]["draft_set"] is None
    state = engine.init(PROMPTS[:2], GREEDY)
    for _ in range(2):
        state, _ = engine.step(state)
        kept = state.memory.residency.slot_of[: TINY.num_moe_layers] >= 0
        assert kept[:, :2].all() and not kept[:, 2:].any()


def test_the_figures_name_the_policy_of_the_plan(model):
    assert sm.Engine(model, DRAFTING.replace(draft_set="decay")).stats()["draft_set"] == "decay"
    assert sm.Engine(model, DRAFTING).stats()["draft_set"] is None


@pytest.mark.parametrize(
    ("a_plan", "policy", "said"),
    [
        (
            DRAFTING.replace(draft_set="decay"),
            first_experts(),
            "draft_set=decay and Engine is given",
        ),
        (plan("on_demand"), first_experts(), "has no effect with draft=none; leave it out"),
        (plan("resident"), first_experts(), "has no effect with draft=none; leave it out"),
        (DRAFTING, "hot_global", "draft_set is a str; give Engine a speculate.DraftSetPolicy"),
        (DRAFTING, first_experts, "draft_set is a function"),
    ],
)
def test_a_policy_without_effect_or_of_another_type_is_refused(model, a_plan, policy, said):
    with pytest.raises(sm.PlanError) as e:
        sm.Engine(model, a_plan, draft_set=policy)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_policy_is_added_by_one_function_and_one_registry_line(model, monkeypatch):
    module = types.ModuleType("draft_sets_of_a_test")
    module.first_experts = first_experts
    monkeypatch.setitem(sys.modules, module.__name__, module)
    place = f"{module.__name__}:first_experts"
    DRAFT_SETS.register("first_experts", Choice(place, place))
    try:
        tokens, stats = run(model, DRAFTING.replace(draft_set="first_experts"))
    finally:
        DRAFT_SETS.unregister("first_experts")
    assert tokens == run(model, plan("resident"))[0] and stats["draft_set"] == "first_experts"
    with pytest.raises(sm.PlanError, match="draft_set is 'first_experts'; it must be one of hot_temporal"):
        DRAFTING.replace(draft_set="first_experts").validate(TINY)
