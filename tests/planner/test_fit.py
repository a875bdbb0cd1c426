"""What fits: the largest batch is the largest, and the nearest plan fits and keeps what it can."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoe_jax.config.presets import PRESETS
from specmoe_jax.kv_cache.positions import pages_of
from specmoe_jax.planner.explain import problem
from specmoe_jax.planner.machines import machine
from specmoe_jax.planner.memory.account import account, cache_positions
from specmoe_jax.planner.memory.fit import accounted, largest_batch, nearest, refusal, what_fits
from specmoe_jax.planner.memory.memory_account import DraftMemory, PagedLoad
from specmoe_jax.planner.workload import Workload
from specmoe_jax.support.errors import BudgetError, PlanError
from specmoe_jax.support.units import GIB
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
        assert found.plan == a_plan and found.changes == () and problem(MIXTRAL, a_plan, hardware, WORK) is None
    elif found is not None:
        assert refusal(MIXTRAL, found.plan.validate(MIXTRAL), hardware, WORK) is None
        assert found.changes and found.plan.batch_size <= a_plan.batch_size
    else:
        assert accelerator_gib < 8 or host_gib < 2  # weights, one expert; a row's cache and one expert
        assert "no plan near this one fits" in problem(MIXTRAL, a_plan, hardware, WORK)


def test_a_smaller_batch_is_nearer_than_another_plan():
    found = nearest(MIXTRAL, plan("on_demand", batch_size=3000), with_memory(24, 200), WORK)
    assert [change.split("=")[0] for change in found.changes] == ["batch_size"]


def test_where_no_batch_fits_the_dtype_changes_first():
    found = nearest(MIXTRAL, plan("on_demand", dtype="float32"), with_memory(24, 120), WORK)
    assert found.changes == ("dtype=bfloat16",)


def test_pinned_layers_are_given_up_first():
    found = nearest(MIXTRAL, plan("streaming", pinned_layers=16, batch_size=64), with_memory(24, 200), WORK)
    assert found.changes == ("pinned_layers=0",)


def test_experts_stay_on_disk_where_host_memory_is_short():
    found = nearest(MIXTRAL, plan("on_demand"), with_memory(24, 50), WORK)
    assert found.changes == ("expert_tier=disk", f"host_memory_bytes={50 * GIB}")


def job(a_plan, rows, tokens):
    """A job of so many rows of so many tokens each, with a draft that takes something of everything."""
    positions = cache_positions(tokens, a_plan)
    paged = PagedLoad(pages=rows * pages_of(positions), prompt_tokens=rows * tokens) if a_plan.expert_flow == "stream" else None
    draft = DraftMemory(fixed=GIB // 2, row=8192, position=16384) if a_plan.draft == "eagle" else DraftMemory()
    return {"batch_rows": rows, "positions": positions, "paged": paged, "draft": draft}


def is_refused(a_plan, rows, tokens):
    try:
        own = account(MIXTRAL, a_plan, **job(a_plan, rows, tokens))
    except BudgetError:
        return True
    return a_plan.expert_flow == "stream" and own.kv_pages < rows * pages_of(cache_positions(tokens, a_plan))


@given(
    st.sampled_from(["resident", "on_demand", "specmoe", "streaming", "specmoeoff"]),
    st.integers(1, 4),
    st.integers(1, 200),
    st.integers(1, 20_000),
    st.floats(1, 120) | st.none(),
    st.floats(1, 120) | st.none(),
)
@settings(max_examples=150, deadline=None)
def test_what_fits_is_the_largest_batch_or_the_longest_context(preset, micro, units, tokens, accelerator_gib, host_gib):
    micro = micro if preset in ("streaming", "specmoeoff") else 1
    budgets = {
        "device_memory_bytes": accelerator_gib and int(accelerator_gib * GIB),
        "host_memory_bytes": host_gib and int(host_gib * GIB),
    }
    a_plan, rows = plan(preset, micro_batches=micro, **budgets), units * micro
    asked = job(a_plan, rows, tokens)
    found = what_fits(MIXTRAL, a_plan, **asked)
    if not is_refused(a_plan, rows, tokens):
        assert found.rows == rows and found.tokens is None
        assert accounted(MIXTRAL, a_plan, **asked) == account(MIXTRAL, a_plan, **asked)
    elif found is None:
        assert is_refused(a_plan, micro, 1)
    elif found.tokens is None:
        assert found.rows % micro == 0 and not is_refused(a_plan, found.rows, tokens)
        assert is_refused(a_plan, found.rows + micro, tokens)
    else:
        assert found.rows == micro and is_refused(a_plan, micro, tokens)
        assert not is_refused(a_plan, micro, found.tokens) and is_refused(a_plan, micro, found.tokens + 1)


def test_a_streamed_refusal_names_batch_and_context():
    a_plan = plan("specmoeoff", device_memory_bytes=int(11.5 * GIB), host_memory_bytes=300 * GIB)
    with pytest.raises(
        PlanError, match=r"device memory of 11\.5 GiB .* short; .*the largest batch that fits at this context is"
    ) as e:
        accounted(MIXTRAL, a_plan, **job(a_plan, 20_000, 1000))
    rows = int(str(e.value).split("batch_size=")[1])
    accounted(MIXTRAL, a_plan, **job(a_plan, rows, 1000))
    a_plan = plan("streaming", host_memory_bytes=85 * GIB)
    with pytest.raises(PlanError, match=r"host memory of 85\.0 GiB .* short; .*the longest context that fits is") as e:
        accounted(MIXTRAL, a_plan, **job(a_plan, 4, 20_000))
    tokens = int(str(e.value).split("that fits is ")[1].split()[0])
    accounted(MIXTRAL, a_plan, **job(a_plan, 1, tokens))
    with pytest.raises(PlanError, match="not even the shortest request fits"):
        accounted(MIXTRAL, plan("streaming", host_memory_bytes=80 * GIB), **job(a_plan, 1, 100))
