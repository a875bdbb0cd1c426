"""What the planner knows of drafts: an unknown one is an error wherever it is asked about, and what is assumed says so."""

import pytest

import specmoe_jax as sm
from specmoe_jax.config.registry import DRAFTS
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.planner.calibration import ASSUMED, Acceptance, Calibration
from specmoe_jax.planner.costs import Load
from specmoe_jax.planner.drafts.protocol import described, draft_costs
from specmoe_jax.planner.drafts.search_starts import SearchStart, tree
from specmoe_jax.planner.estimate import predict
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.measured.case import Case
from specmoe_jax.planner.measured.predict import step_times
from specmoe_jax.planner.memory.account import account
from specmoe_jax.planner.memory.fit import nearest
from specmoe_jax.planner.search import search
from specmoe_jax.planner.workload import EAGLE_MIXTRAL, Workload
from specmoe_jax.testing import TINY
from specmoe_jax.testing.families import RAW_CONFIGS

UNKNOWN = sm.PRESETS["on_demand"](TINY).replace(draft="typo", draft_length=2)
LOAD = Load(2, 3, 10)
CASE = Case(rows=2, context=10, probabilities=(0.25,) * 4, slots=4, wanted_slots=4)
ASKED = {
    "validate": lambda: UNKNOWN.validate(TINY),
    "description": lambda: UNKNOWN.drafting,
    "executor": lambda: DRAFTS.executor("typo"),
    "account": lambda: account(TINY, UNKNOWN, batch_rows=1, positions=64),
    "costs": lambda: draft_costs(UNKNOWN, TINY, LOAD, skew=0.3),
    "prediction": lambda: predict(TINY, UNKNOWN, machine("a30"), Workload()),
    "measured": lambda: step_times(TINY, UNKNOWN, None, CASE, accelerator_is_cpu=True),
    "calibration": lambda: ASSUMED.workload(Workload(), UNKNOWN, TINY),
    "search": lambda: search(TINY, lambda plan: None, requests=1, drafts=("typo",)),
    "trees": lambda: described("typo_tree"),
    "trees of a draft of chains": lambda: described("ngram_tree"),
    "nearest": lambda: nearest(TINY, UNKNOWN, machine("a30"), Workload()),
}


@pytest.mark.parametrize("asked", ASKED)
def test_an_unknown_draft_is_an_error(asked):
    with pytest.raises(sm.PlanError, match=r"draft is '(typo|typo_tree|ngram_tree)'; it must be one of none, self, merged"):
        ASKED[asked]()


@pytest.mark.parametrize("name", list(DRAFTS))
def test_both_halves_are_there_and_know_their_name(name):
    assert DRAFTS.description(name).name == name
    assert DRAFTS.executor(name) is not None


def test_a_draft_without_measured_operators_is_not_free():
    assert {name for name in DRAFTS if DRAFTS.description(name).is_measured} == {"none", "self", "merged", "eagle", "ngram"}
    for name in ("custom", "model", "mtp"):
        plan = sm.PRESETS["on_demand"](TINY).replace(draft=name, draft_length=2)
        with pytest.raises(sm.PlanError, match=f"draft={name} has no measured operators; predict it from the rates"):
            step_times(TINY, plan, None, CASE, accelerator_is_cpu=True)


def test_what_was_not_measured_is_assumed():
    measured = Calibration({"ngram": Acceptance(0.9), "eagle_tree": Acceptance(0.8)}, 0.3, True)
    base = sm.PRESETS["on_demand"](TINY)

    def found(draft, **changes):
        return measured.acceptance_of(base.replace(**{"draft": draft, "draft_length": 2} | changes), TINY, 0.3)

    assert found("ngram") == Acceptance(0.9)
    assert found("merged", draft_experts=2) == Acceptance(0.3, assumed=True)
    assert found("eagle") == Acceptance(EAGLE_MIXTRAL, assumed=True)
    assert found("eagle", **tree(2)) == Acceptance(0.8)
    assert found("custom", **tree(2)) == Acceptance(0.5, assumed=True)


def test_a_calibration_of_before_is_read():
    raw = {
        "acceptance": {"self": {"rate": 0.7, "experts": 2, "unlike": 0.1}},
        "skew": 0.3,
        "measured": True,
        "row_share": 1.0,
        "run_share": 1.0,
    }
    found = Calibration.from_dict(raw)
    assert found.acceptance["self"] == Acceptance(0.7, 2, 0.1)
    assert Calibration.from_dict(found.to_dict()) == found


@pytest.mark.parametrize("name", list(DRAFTS))
def test_a_search_starts_with_plans_that_hold(name):
    for preset in ("resident", "on_demand", "caching", "streaming"):
        flow = SearchStart(sm.PRESETS[preset](TINY), ())
        start = DRAFTS.description(name).start(TINY, flow)
        gated = DRAFTS.description(name).gated and preset != "on_demand"
        assert (start is None) == (gated or name == "mtp")  # which this model has no layer for
        if start is not None:
            assert start.plan.validate(TINY).draft == name and start.plan.expert_flow == flow.plan.expert_flow


def test_a_models_own_layer_drafts_where_it_has_one():
    config = parse_config(RAW_CONFIGS["deepseek_v3"])
    start = DRAFTS.description("mtp").start(config, SearchStart(sm.PRESETS["on_demand"](config), ()))
    plan = start.plan.validate(config)
    assert plan.draft == "mtp" and not DRAFTS.description("mtp").is_measured
    spent = [sum(c.flops for c in draft_costs(plan.replace(draft_length=n), config, LOAD, skew=0.3).costs) for n in (1, 2, 3)]
    assert 0 < spent[1] - spent[0] == pytest.approx(spent[2] - spent[1], rel=0.05)
    assert predict(config, plan, machine("a30"), Workload(skew=0.1)).tokens_per_s > 0
    with pytest.raises(sm.PlanError, match="needs a model with a layer for further tokens"):
        plan.validate(parse_config(RAW_CONFIGS["glm4_moe_lite"]))
