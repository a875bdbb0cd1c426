"""The search against all plans of a small space, what is given and what does not fit; the effects of the measured operators."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.autotune.choose import Knowledge, as_line, choose, evaluate, make_plan
from specmoe_jax.config.plan import Plan
from specmoe_jax.config.presets import PRESETS
from specmoe_jax.planner.calibration import ASSUMED, Acceptance, Calibration, counted_skew, fitted_shares, unlike_rows
from specmoe_jax.planner.drafts.search_starts import LENGTHS, WORTH
from specmoe_jax.planner.estimate import predict
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.measured.case import choosing
from specmoe_jax.planner.measured.operators import WORK, LinearCost, Operators
from specmoe_jax.planner.routing import choice_probabilities, distinct
from specmoe_jax.planner.search import EQUAL, WORTH_OF_A_DRAFT, search
from specmoe_jax.planner.workload import Workload, chance_deviation
from specmoe_jax.support.errors import PlanError
from specmoe_jax.testing import TINY, tiny

HARDWARE = machine("a30")
CPU = HARDWARE.replace(accelerator_is_cpu=True)
WORK_LOAD = Workload(prompt_tokens=20, new_tokens=20, acceptance=0.7, skew=0.3)
KNOWN = Knowledge(hardware=HARDWARE, workload=WORK_LOAD)


def all_plans(rows):
    """What the search may choose from, at one batch size."""
    for flow, length, retain in itertools.product(("resident", "on_demand"), (None, *LENGTHS), (False, True)):
        if not (flow == "resident" and retain):
            draft = {"draft": "ngram", "draft_length": length} if length else {}
            yield Plan(preset="all", expert_flow=flow, retain=retain, batch_size=rows, **draft)


@settings(max_examples=20, deadline=None)
@given(link=st.floats(1e6, 1e11), rate=st.floats(0.0, 0.98), memory=st.floats(1e8, 1e13))
def test_none_of_all_plans_is_much_faster(link, rate, memory):
    hardware = HARDWARE.replace(up_bytes_per_s=link, accelerator_bytes_per_s=memory)
    workload = Workload(prompt_tokens=20, new_tokens=20, acceptance=rate, skew=0.3)

    def speed(plan):
        return predict(TINY, plan, hardware, workload, interval=False)

    found = search(TINY, speed, requests=8, drafts=("none", "ngram"), fixed={"batch_size": 8})
    predictions = [speed(plan) for plan in all_plans(8)]
    best = max(prediction.tokens_per_s / prediction.slowest_row_factor for prediction in predictions)
    assert found.best.tokens_per_s >= best / WORTH**2 / WORTH_OF_A_DRAFT / EQUAL
    assert found.runner_up is not None and found.runner_up.plan != found.best.plan


def test_experts_on_disk_are_computed_from_the_pages_of_a_converted_checkpoint():
    """Any other's are copied. What memory does not hold is read in every pass."""
    fixed = {"expert_tier": "disk", "host_memory_bytes": 1 << 20, "batch_size": 2, "dtype": "bfloat16"}
    mapped, copied = (
        choose(TINY, KNOWN._replace(hardware=CPU, is_mapped=is_mapped), requests=2, fixed=fixed).best for is_mapped in (True, False)
    )
    assert mapped.plan.expert_flow == "host_compute" != copied.plan.expert_flow
    little, much = (
        evaluate(TINY, mapped.plan.replace(host_memory_bytes=size), KNOWN._replace(hardware=CPU, is_mapped=True))
        for size in (20_000, 1 << 30)
    )
    assert little.tokens_per_s < much.tokens_per_s
    with pytest.raises(PlanError, match="for files of specmoe convert --format=specmoe"):
        evaluate(TINY, mapped.plan, KNOWN._replace(hardware=CPU))


@pytest.mark.parametrize(("hardware", "flow"), [(HARDWARE, "resident"), (CPU, "host_compute")])
def test_what_fits_and_drafts_nothing_is_resident(hardware, flow):
    """Where the accelerator is the CPU, in host memory itself, which takes no copy."""
    plan = choose(TINY, KNOWN._replace(hardware=hardware), requests=12).best.plan
    assert plan.expert_flow == flow and plan.batch_size == 12
    assert (plan.device_memory_bytes is None) == hardware.accelerator_is_cpu


TOO_SMALL = evaluate(TINY, PRESETS["resident"](TINY).replace(batch_size=1), KNOWN).account.accelerator_bytes - 1


def test_a_budget_holds():
    found = choose(TINY, KNOWN, requests=4, fixed={"device_memory_bytes": TOO_SMALL})
    assert found.best.plan.expert_flow != "resident" and "device memory" in found.refusal
    assert found.best.prediction.account.accelerator_bytes <= TOO_SMALL
    with pytest.raises(PlanError, match=r"no plan fits: device memory .* is too small"):
        choose(TINY, KNOWN, requests=4, fixed={"device_memory_bytes": 1000})


@pytest.mark.parametrize(
    "fixed",
    [
        {"draft": "self"},
        {"draft_experts": 2},
        {"draft_stop": "union"},
        {"draft_top_k": 1},
        {"retain": True, "retain_policy": "drafted"},
        {"expert_flow": "stream"},
        {"kv_tier": "host"},
        {"link_bytes_per_s": 1e8, "retain": True},
    ],
    ids=str,
)
def test_what_is_given_is_kept(fixed):
    plan = choose(TINY, KNOWN, requests=4, fixed=fixed).best.plan
    assert all(getattr(plan, name) == value for name, value in fixed.items()) and plan.validate(TINY)


@pytest.mark.parametrize(
    ("fixed", "policy"),
    [
        ({"draft": "none"}, "expected"),
        ({"draft": "self"}, "drafted"),
        ({"draft": "none", "retain_policy": "lru"}, "lru"),
        ({"retain": False, "draft": "self"}, None),
    ],
    ids=str,
)
def test_retained_experts_go_in_the_order_that_was_measured_best(fixed, policy):
    plan = choose(TINY, KNOWN, requests=4, fixed={"link_bytes_per_s": 1e8, "retain": True} | fixed).best.plan
    assert plan.retain_policy == policy and plan.validate(TINY)


def test_drafts_where_their_acceptance_is_known():
    slow = KNOWN._replace(hardware=HARDWARE.replace(up_bytes_per_s=1e6))
    limit = {"device_memory_bytes": TOO_SMALL}
    good = slow._replace(calibration=Calibration({"ngram": Acceptance(0.95)}, 0.3, True))
    bad = slow._replace(calibration=Calibration({"ngram": Acceptance(0.0)}, 0.3, True))
    assert choose(TINY, good, requests=4, fixed=limit).best.plan.draft == "ngram"
    assert choose(TINY, bad, requests=4, fixed=limit).best.plan.draft == "none"
    guarded = choose(TINY, slow, requests=4, fixed=limit).best.plan
    assert guarded.draft == "none" or guarded.guard  # what is only assumed may be ended by the guard


def test_a_tree_where_its_nodes_are_accepted_and_the_link_binds():
    """Over a slow link the nodes cost nothing, so what is accepted decides."""
    slow = KNOWN._replace(hardware=HARDWARE.replace(up_bytes_per_s=1e6))
    limit = {"expert_flow": "stream", "pinned_layers": 0}
    for chain, trees, wins in ((0.5, 0.9, True), (0.9, 0.5, False)):
        rates = {"eagle": Acceptance(chain), "eagle_tree": Acceptance(trees)}
        known = slow._replace(calibration=Calibration(rates, 0.3, True))
        for fixed in ({}, {"draft": "eagle"}):
            plan = choose(TINY, known, requests=4, fixed=limit | fixed, head=True).best.plan
            assert plan.draft == "eagle" and bool(plan.draft_tree_top_k) == wins
            assert plan.validate(TINY) and not (wins and plan.guard)
        assert choose(TINY, known, requests=4, fixed=limit).best.plan.draft == "none"


def test_make_plan_and_its_line():
    plan = make_plan(tiny(), HARDWARE, WORK_LOAD, requests=4)
    assert plan.validate(TINY).batch_size == 4
    assert "predicted, bound by the" in as_line(choose(TINY, KNOWN, requests=4))


def test_acceptance_depends_on_the_experts():
    measured = Calibration({"self": Acceptance(0.6, experts=2)}, 0.3, True)
    plan = PRESETS["specmoe"](TINY)
    rates = [measured.workload(WORK_LOAD, plan.replace(draft_experts=n), TINY).acceptance for n in (1, 2, 3, 5)]
    assert rates == sorted(rates) and rates[1] == pytest.approx(0.6) and rates[3] == pytest.approx(1.0)
    assert Calibration.from_dict(measured.to_dict()) == measured and Calibration.from_dict({}) is None
    assert ASSUMED.workload(WORK_LOAD, plan, TINY).acceptance == 0.6
    assert ASSUMED.workload(WORK_LOAD, plan, TINY).skew == WORK_LOAD.skew
    assert measured.workload(dataclasses.replace(WORK_LOAD, skew=0.1), plan, TINY).skew == measured.skew


@settings(deadline=None, max_examples=20)
@given(skew=st.floats(0.05, 0.5), row_share=st.floats(0.1, 1.0), run_share=st.floats(0.1, 1.0))
def test_the_shares_are_found_again(skew, row_share, run_share):
    """Experts between whole numbers of tokens are interpolated, so not to the last digit."""
    probabilities = choice_probabilities(5, 2, skew)
    passes = [(1, 2), (1, 3), (2, 1), (3, 1), (2, 2)]
    seen = [(rows, new, distinct(probabilities, choosing(rows, new, row_share, run_share))) for rows, new in passes]
    found = fitted_shares(TINY, skew, seen)
    for rows, new, needed in seen:
        assert distinct(probabilities, choosing(rows, new, *found)) == pytest.approx(needed, rel=0.05)


@pytest.mark.parametrize("unlike", [0.0, 0.3])
def test_how_unlike_rows_are_is_found_again(unlike):
    """Of many rows whose steps deviate by chance and by themselves."""
    rng, rate, length, tokens = np.random.default_rng(0), 0.7, 4, 32
    deviation = np.hypot(chance_deviation(rate, length, tokens), unlike)
    steps = 12 * (1 + deviation * rng.standard_normal(4000))
    assert unlike_rows(steps, rate, length, tokens) == pytest.approx(unlike, abs=0.05)
    plan = Plan(preset="p", draft="ngram", draft_length=length)
    known = Calibration({"ngram": Acceptance(rate, unlike=unlike)}, 0.3, True)
    assert known.workload(WORK_LOAD, plan, TINY).slowest_row_factor(plan, 8) > (1.4 if unlike else 1.1)
    assert known.workload(WORK_LOAD, plan, TINY).slowest_row_factor(plan, 1) == 1.0


def test_the_skew_is_that_of_the_counts():
    assert counted_skew(TINY, np.full((3, 5), 7)) == pytest.approx(0.0, abs=1e-9)
    assert counted_skew(TINY, np.array([[0, 0, 0, 9, 9]])) == pytest.approx(0.6, abs=1e-3)


OPERATORS = Operators({name: LinearCost(work, 1e-4, (1e-7,) * len(work), 0.0) for name, work in WORK.items()}, 4000, 0.05)


@pytest.mark.parametrize("name", ["resident", "on_demand", "caching", "specmoe", "streaming", "specmoeoff"])
def test_measured_operators_replace_the_rates(name):
    plan = PRESETS[name](TINY).replace(batch_size=4)
    rough, known = evaluate(TINY, plan, KNOWN), KNOWN._replace(operators=OPERATORS)
    fine = evaluate(TINY, plan, known)
    assert fine.account == rough.account and fine.tokens_per_step == rough.tokens_per_step
    assert fine.tokens_per_s == pytest.approx(fine.rows * fine.tokens_per_step / fine.iteration_s)
    assert (fine.draft_s > 0) == (plan.draft != "none") and fine.draft_s < fine.iteration_s
    assert fine.naive_s <= fine.iteration_s * (1 + 1e-9)
    if plan.expert_flow != "resident":
        slow = evaluate(TINY, plan.replace(link_bytes_per_s=1e5), known)
        assert slow.iteration_s > 10 * fine.iteration_s and slow.binding == "link to accelerator"


def test_a_layer_that_the_host_computes_costs_what_was_measured():
    """Of the absent experts its share costs the host, and the rest the link."""
    dear = OPERATORS.costs | {"hosted_layer": LinearCost(WORK["hosted_layer"], 1e-4, (0.0, 0.0, 0.0, 1e-2), 0.0)}
    known = KNOWN._replace(operators=OPERATORS._replace(costs=dear))
    plan = PRESETS["on_demand"](TINY).replace(batch_size=4, link_bytes_per_s=1e9)
    none, half, all_of_them = (evaluate(TINY, plan.replace(host_share=share), known) for share in (None, 0.5, 1.0))
    absent = TINY.num_moe_layers * distinct(choice_probabilities(5, 2, WORK_LOAD.skew), 4)
    assert half.iteration_s == pytest.approx(none.iteration_s + absent / 2 * 1e-2, rel=0.02)
    assert all_of_them.iteration_s == pytest.approx(none.iteration_s + absent * 1e-2, rel=0.02)
    assert all_of_them.link_bytes_per_token == 0 < half.link_bytes_per_token < none.link_bytes_per_token


def test_every_share_of_the_host_is_tried():
    """Two that lose are no reason to stop."""

    def speed(plan):
        found = predict(TINY, plan, HARDWARE, WORK_LOAD, interval=False)
        return found._replace(tokens_per_s=found.tokens_per_s * {None: 1.0, 1.0: 3.0}.get(plan.host_share, 0.5))

    assert search(TINY, speed, requests=4, fixed={"expert_flow": "on_demand"}).best.plan.host_share == 1.0
