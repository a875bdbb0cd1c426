"""Costs against the paper's table and sizes known by hand; the routing model against its own definition."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import specmoe_jax as sm
from specmoe_jax.models.families.registry import family_of, parse_config
from specmoe_jax.models.spec import spec_leaves
from specmoe_jax.offload.stream_schedule import ACCELERATOR, CPU, UP
from specmoe_jax.planner import costs, routing
from specmoe_jax.planner.costs import Cost, Load, seconds
from specmoe_jax.planner.drafts.eagle import usual_head
from specmoe_jax.planner.drafts.model import model_memory
from specmoe_jax.planner.drafts.protocol import draft_costs
from specmoe_jax.planner.hardware import Efficiency
from specmoe_jax.planner.layer_costs import layers_alike
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.memory.account import account
from specmoe_jax.planner.workload import EAGLE_MIXTRAL, Workload
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.statistics import gini
from specmoe_jax.testing.families import ENCODER_DECODERS, RAW_CONFIGS
from tests.planner.planner_cases import MIXTRAL

IDEAL = machine("a30").replace(efficiencies=(), task_s=0.0, sync_s=0.0, copy_s=0.0, step_s=0.0)
E = MIXTRAL.hidden_size * MIXTRAL.expert_hidden  # e of the paper


def test_one_layers_experts_over_the_link_as_in_the_paper():
    """2.8 GB a layer, 113 ms at 25 GB/s, 3.6 s for 32 layers."""
    layer = costs.fetch(costs.expert_bytes(MIXTRAL, sm.PRESETS["streaming"](MIXTRAL).replace(dtype="bfloat16")), 8)
    assert layer.bytes == 3 * 8 * E * 2
    assert seconds(layer, IDEAL, "bfloat16") == pytest.approx(0.113, rel=0.01)


def test_the_large_batch_row_of_the_papers_table():
    found = costs.experts(MIXTRAL, 100, 8, 2)
    assert found.flops == 2 * 3 * E * 2 * 100  # the paper counts a multiplication and an addition as one here
    assert found.bytes == pytest.approx(3 * 8 * E * 2, rel=0.01)


def test_the_attention_rows_of_the_papers_table():
    """2 b s h operations (scores and mixture, a multiply-add as one), 2 b s h / g numbers read."""
    found = costs.attention(MIXTRAL.layers[0].attention, Load(rows=10, new=1, context=999.5), 2, resource=CPU)
    assert found.flops == 2 * (2 * 10 * 1000 * 4096)
    assert found.bytes == 2 * 10 * 1000 * 4096 / 4 * 2
    assert found.operator == "cpu_attention" and found.resource == CPU


def test_the_cache_is_read_once_for_all_new_positions():
    one, six = (costs.attention(MIXTRAL.layers[0].attention, Load(8, n, 1000), 2, resource=CPU) for n in (1, 6))
    assert six.bytes == pytest.approx(one.bytes, rel=0.01) and six.flops == pytest.approx(6 * one.flops, rel=0.01)


@pytest.mark.parametrize("name", [*RAW_CONFIGS, *ENCODER_DECODERS])
def test_the_projections_of_every_family_are_its_tensors(name):
    """All matrices of the layers but the cross attention's keys and values, which are made once; norms and biases are left out."""
    config = parse_config((RAW_CONFIGS | ENCODER_DECODERS)[name])
    for sizes, weights in zip(costs.layer_sizes(config), family_of(config).weight_specs(config).layers, strict=True):
        matrices = sum(spec.size for spec in spec_leaves(weights) if len(spec.shape) == 2)
        cross = weights.cross.k.size + weights.cross.v.size if weights.cross else 0
        assert sizes.before + sizes.after == matrices - cross


@pytest.mark.parametrize("draft", ["self", "merged", "eagle", "model", "ngram"])
def test_drafts_cost_more_the_longer_they_are(draft):
    plan = sm.PRESETS["on_demand"](MIXTRAL).replace(draft=draft, dtype="bfloat16")
    plan = plan.replace(draft_experts=2) if draft in ("self", "merged") else plan

    def spent(length):
        of = draft_costs(
            plan.replace(draft_length=length),
            MIXTRAL,
            Load(8, length + 1, 500),
            skew=0.3,
            head=None,
            model=dataclasses.replace(MIXTRAL, num_layers=2),
        )
        return sum(seconds(cost, IDEAL, "bfloat16") for cost in of.costs)

    assert spent(0) == 0
    assert (spent(2) < spent(4) < spent(8)) if draft != "ngram" else spent(8) == 0


def test_a_tree_feeds_back_more_rows_than_a_chain():
    chain = sm.PRESETS["specmoeoff"](MIXTRAL).replace(dtype="bfloat16", draft_length=3)
    tree = chain.replace(draft_tree_top_k=4, draft_tree_tokens=5)
    load = Load(64, 6, 500)
    spent = [
        sum(cost.flops for cost in draft_costs(plan, MIXTRAL, load, skew=0.3, head=None, model=None).costs)
        for plan in (chain, tree)
    ]
    assert spent[1] > spent[0]
    work = Workload(acceptance=EAGLE_MIXTRAL)
    assert work.tokens_of(tree) == 2.15 and work.tokens_of(chain) == 1.78


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_split_draft_attends_on_both_sides_at_once(share):
    plan = sm.PRESETS["specmoeoff"](MIXTRAL).replace(dtype="bfloat16")
    whole, split = (
        draft_costs(plan, MIXTRAL, Load(64, 6, 1000), skew=0.3, head=None, model=None, cpu_share=part) for part in (0.0, share)
    )
    here, there = ([pair[side] for pair in split.split] for side in (0, 1))
    cpu = [cost for chain in there for cost in chain if cost.resource == CPU]
    attended = sum(cost.bytes for cost in (*here, *cpu))
    assert len(split.split) == plan.draft_length and not whole.split
    assert attended == pytest.approx(sum(cost.bytes for cost in whole.costs) - sum(cost.bytes for cost in split.costs))
    assert sum(cost.bytes for cost in cpu) == pytest.approx(share * attended)


def test_a_draft_model_takes_what_its_own_account_says():
    small = dataclasses.replace(MIXTRAL, num_layers=2)
    resident = sm.PRESETS["resident"](small).replace(dtype="bfloat16")
    of = model_memory(small, resident)
    for rows, positions in ((1, 64), (7, 1024), (64, 4096)):
        own = account(small, resident, batch_rows=rows, positions=positions).accelerator_bytes
        assert of.fixed + rows * of.row + rows * positions * of.position == own


def test_quantised_experts_cross_the_link_packed():
    plan = sm.PRESETS["streaming"](MIXTRAL).replace(dtype="bfloat16")
    plain, packed = (costs.expert_bytes(MIXTRAL, each) for each in (plan, plan.replace(expert_dtype="int8")))
    assert plain == MIXTRAL.expert_params * 2 and 0.5 <= packed / plain < 0.55


def test_cross_attention_reads_what_the_encoder_read():
    attention = MIXTRAL.layers[0].attention
    found = costs.cross_attention(attention, Load(rows=4, new=2, context=10, source=100), 2)
    assert found.flops == 4 * 8 * 100 * 4096 and found.bytes == 4 * 100 * 2 * 8 * 128 * 2


def test_the_usual_head_is_the_papers():
    """16 KiB of draft cache a token for Mixtral-8x7B."""
    assert costs.cache_row(usual_head(MIXTRAL).layer.attention) * 2 == 16 * 1024


def test_durations_take_the_slower_of_arithmetic_and_memory():
    slow = IDEAL.replace(efficiencies=(("dense", Efficiency(compute=0.5, memory=0.25, overhead_s=1.0)),), task_s=2.0)
    bound = Cost(ACCELERATOR, "dense", flops=165e12, bytes=0.0)
    assert seconds(bound, slow, "bfloat16") == pytest.approx(2 + 3)
    assert seconds(bound._replace(bytes=933e9), slow, "bfloat16") == pytest.approx(4 + 3)
    assert seconds(bound._replace(programs=3), slow, "bfloat16") == pytest.approx(2 + 9)


def test_the_floor_adds_up_what_shares_cores():
    spent = [Cost(ACCELERATOR, "dense", flops=165e12), Cost(CPU, "cpu_attention", flops=2.43e12), Cost(UP, "stream", bytes=37.5e9)]
    assert costs.bound_seconds(spent, IDEAL, "bfloat16") == pytest.approx(1.5)
    assert costs.bound_seconds(spent, IDEAL.replace(accelerator_is_cpu=True), "bfloat16") == pytest.approx(2.0)


@given(st.integers(2, 64), st.integers(1, 4), st.floats(0.0, 0.9), st.integers(1, 500))
@settings(max_examples=60, deadline=None)
def test_the_routing_model_is_a_distribution_of_the_skew_asked_for(num_experts, per_token, skew, tokens):
    per_token = min(per_token, num_experts)
    if skew > 1 - per_token / num_experts:
        with pytest.raises(PlanError, match="skew"):
            routing.choice_probabilities(num_experts, per_token, skew)
        return
    p = np.array(routing.choice_probabilities(num_experts, per_token, skew))
    assert p.sum() == pytest.approx(per_token, rel=1e-6) and (p <= 1).all() and (np.diff(p) <= 1e-12).all()
    if skew < 0.95 * (1 - per_token / num_experts):  # at the very end the tail's floating point ends first
        assert gini(p) == pytest.approx(skew, abs=1e-3)
    used = routing.distinct(tuple(p), tokens)
    assert per_token - 1e-6 <= used <= min(num_experts, per_token * tokens) + 1e-6
    left = [routing.missed(tuple(p), tokens, n / 2) for n in range(2 * num_experts + 1)]
    assert left[0] == pytest.approx(used) and left[-1] == pytest.approx(0, abs=1e-9) and (np.diff(left) <= 1e-12).all()


@given(st.integers(1, 200), st.integers(1, 200))
def test_the_assumed_skew_is_one_that_any_router_can_have(num_experts, per_token):
    per_token = min(per_token, num_experts)
    skew = routing.assumed_skew(num_experts, per_token)
    assert len(routing.choice_probabilities(num_experts, per_token, skew)) == num_experts
    assert skew == (0.4 if per_token <= num_experts / 3 else pytest.approx(0.6 * (1 - per_token / num_experts)))


def test_acceptance_as_a_probability_and_as_a_map():
    assert Workload(acceptance=0.5).tokens_per_step(2) == 1.75
    assert Workload(acceptance=EAGLE_MIXTRAL).tokens_per_step(5) == 2.15
    assert Workload(acceptance=EAGLE_MIXTRAL).accepted(7) == pytest.approx((1.24 + 1.45) / 2)
    assert Workload(acceptance=EAGLE_MIXTRAL).accepted(100) == 1.87
    assert Workload(acceptance=1.0, new_tokens=3).tokens_per_step(10) == 3


@pytest.mark.parametrize("wrong", [{"prompt_tokens": 0}, {"acceptance": 1.5}, {"acceptance": ((4, 5.0),)}, {"acceptance": ()}])
def test_what_is_no_workload_is_refused(wrong):
    with pytest.raises(PlanError):
        Workload(**wrong)


def test_so_many_operations_take_so_many_times_as_long():
    one = Cost(UP, "link", bytes=5e9, programs=2)
    (four,) = costs.times(4, [one])
    assert seconds(four, machine("a30"), "bfloat16") == pytest.approx(4 * seconds(one, machine("a30"), "bfloat16"))


def test_layers_are_alike_where_they_compute_the_same_and_keep_as_many_experts():
    config = parse_config(RAW_CONFIGS["deepseek_v3"])
    everything = layers_alike(config)
    assert sum(alike.count for alike in everything) == config.num_layers and len(everything) < config.num_layers
    assert all(config.moe_index[alike.index] == alike.moe for alike in everything)
    unlike = layers_alike(config, range(config.num_moe_layers))
    assert sum(alike.moe is not None for alike in unlike) == config.num_moe_layers
