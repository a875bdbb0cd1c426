"""`check_job` and the engine count the same memory: what the first accepts the second runs, to the byte."""

import pytest
from engine_cases import plan

import specmoe_jax as sm
from specmoe_jax.engine.requests.prepare import check_job
from specmoe_jax.models.eagle.network import head_bytes
from specmoe_jax.planner.drafts.eagle import usual_head
from specmoe_jax.support.errors import UserError
from specmoe_jax.testing import eagle_head, write_tiny

PARAMS = sm.SamplingParams(max_new_tokens=20)
PROMPTS = [[1, 2, 3], [4, 5]]
HEADS = {"EAGLE-1": False, "EAGLE-3": True}


@pytest.mark.parametrize("fused", HEADS.values(), ids=list(HEADS))
def test_an_eagle_head_is_counted_alike(model, fused):
    head = eagle_head(model, fused=fused)
    a_plan = plan("on_demand", batch_size=2, draft="eagle", draft_length=2, kv_tier="host")
    memory = a_plan.drafting.memory(a_plan, model.config, head=head.config)
    for rows, positions in ((0, 0), (1, 0), (2, 64)):
        counted = memory.fixed + rows * memory.row + rows * positions * memory.position
        assert counted == head_bytes(head, batch_rows=rows, positions=positions)
    assert a_plan.drafting.memory(a_plan, model.config) == a_plan.drafting.memory(
        a_plan, model.config, head=usual_head(model.config)
    )


GIVEN = {
    "EAGLE-1": lambda model: ("eagle", {"draft_head": eagle_head(model)}),
    "EAGLE-3": lambda model: ("eagle", {"draft_head": eagle_head(model, fused=True)}),
    "model": lambda model: ("model", {"draft_model": model}),
}


@pytest.mark.slow
@pytest.mark.parametrize("given", GIVEN)
def test_the_smallest_budget_that_is_accepted_runs(model, given):
    """One byte less is refused by both, with the same shortage."""
    draft, inputs = GIVEN[given](model)
    configs = {name: value.config for name, value in inputs.items()}
    a_plan = plan("on_demand", batch_size=2, draft=draft, draft_length=2, kv_tier="host")
    exact = check_job(model, a_plan, PROMPTS, PARAMS, **configs)
    least = exact.accelerator_bytes - (exact.num_slots - 1) * exact.expert_bytes
    tight = a_plan.replace(device_memory_bytes=least)
    check_job(model, tight, PROMPTS, PARAMS, **configs)
    assert len(sm.Engine(model, tight, **inputs).generate(PROMPTS, PARAMS)) == len(PROMPTS)
    short = a_plan.replace(device_memory_bytes=least - 1)
    with pytest.raises(UserError, match="1 bytes short"):
        check_job(model, short, PROMPTS, PARAMS, **configs)
    with pytest.raises(UserError, match="1 bytes short"):
        sm.Engine(model, short, **inputs).generate(PROMPTS, PARAMS)


def least_host_bytes(check) -> int:
    """The smallest host memory that a refusal names."""
    with pytest.raises(UserError, match=r"host_memory_bytes=\d+") as refused:
        check()
    return int(str(refused.value).split("host_memory_bytes=")[1].split(";")[0])


def test_an_engine_is_built_where_its_job_was_accepted(tmp_path):
    """Short prompts that stream: the construction's own check counts no longer ones."""
    write_tiny(tmp_path)
    model = sm.load_model(str(tmp_path), expert_tier="disk")
    a_plan = plan("streaming", batch_size=2, expert_tier="disk", host_memory_bytes=1)
    least = least_host_bytes(lambda: check_job(model, a_plan, PROMPTS, PARAMS))
    tight = a_plan.replace(host_memory_bytes=least)
    check_job(model, tight, PROMPTS, PARAMS)
    assert len(sm.Engine(model, tight).generate(PROMPTS, PARAMS)) == len(PROMPTS)
