"""What fits: the largest batch is the largest, and the nearest plan fits and keeps what it can."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.config import GIB, PRESETS
from specmoe_jax.planner.explain import problem
from specmoe_jax.planner.fit import largest_batch, nearest, refusal
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.workload import Workload
from tests.planner.planner_cases import MIXTRAL

WORK = Workload(prompt_tokens=300, new_tokens=100)


def plan(preset, **changes):
    return PRESETS[preset](MIXTRAL).replace(**{"dtype": "bfloat16"} | changes)


def with_memory(accelerator_gib, host_gib):
    return machine("a30").replace(accelerator_memory_bytes=accelerator_gib * GIB, host_memory_bytes=host_gib * GIB)


@pytest.mark.parametrize("preset, micro_batches", [("on_demand", 1), ("specmoe", 1), ("streaming", 1), ("specmoeoff", 3)])
def test_one_more_than_the_largest_batch_does_not_fit(preset, micro_batches):
    a_plan, hardware = plan(preset, micro_batches=micro_batches), with_memory(64, 200)
    rows = largest_batch(MIXTRAL, a_plan, hardware, WORK)
    assert rows >= micro_batches and rows % micro_batches == 0
    assert refusal(MIXTRAL, a_plan.replace(batch_size=rows), hardware, WORK) is None
    assert refusal(MIXTRAL, a_plan.replace(batch_size=rows + micro_batches), hardware, WORK) is not None


@given(
    st.sampled_from(["resident", "on_demand", "caching", "specmoe", "streaming", "specmoeoff"]),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(1, 4000),
    st.floats(1, 200),
    st.floats(1, 400),
)
@settings(max_examples=40, deadline=None)
def test_the_nearest_plan_fits_or_there_is_none(preset, dtype, batch, accelerator_gib, host_gib):
    a_plan, hardware = plan(preset, dtype=dtype, batch_size=max(batch, 2)), with_memory(accelerator_gib, host_gib)
    found = nearest(MIXTRAL, a_plan, hardware, WORK)
    if refusal(MIXTRAL, a_plan, hardware, WORK) is None:
        assert found.plan == a_plan and found.flags == () and problem(MIXTRAL, a_plan, hardware, WORK) is None
    elif found is not None:
        assert refusal(MIXTRAL, found.plan.validate(MIXTRAL), hardware, WORK) is None
        assert found.flags and found.plan.batch_size <= a_plan.batch_size
    else:
        assert accelerator_gib < 8 or host_gib < 2  # weights, one expert; a row's cache and one expert
        assert "nothing near it fits" in problem(MIXTRAL, a_plan, hardware, WORK)


def test_a_smaller_batch_is_nearer_than_another_plan():
    found = nearest(MIXTRAL, plan("on_demand", batch_size=3000), with_memory(24, 200), WORK)
    assert [flag.split("=")[0] for flag in found.flags] == ["--batch_size"]


def test_where_no_batch_fits_the_dtype_changes_first():
    found = nearest(MIXTRAL, plan("on_demand", dtype="float32"), with_memory(24, 120), WORK)
    assert found.flags == ("--dtype=bfloat16",)


def test_pinned_layers_are_given_up_first():
    found = nearest(MIXTRAL, plan("streaming", pinned_layers=16, batch_size=64), with_memory(24, 200), WORK)
    assert found.flags == ("--pinned_layers=0",)


def test_experts_stay_on_disk_where_host_memory_is_short():
    found = nearest(MIXTRAL, plan("on_demand"), with_memory(24, 50), WORK)
    assert found.flags == ("--expert_tier=disk", "--host_memory_gib=50")
