"""N that differs by layer: lossless, accounted, kept layer by layer, and the same as one number where it is one."""

import numpy as np
import pytest
from engine_cases import PROMPTS, plan, run, steps

import specmoe_jax as sm
from specmoe_jax.config.plan import Plan
from specmoe_jax.planner.memory.account import account
from specmoe_jax.support.errors import PlanError
from specmoe_jax.testing import TINY

SIZES = ((1, 3, 2), (5, 1, 4))


@pytest.fixture(scope="module")
def expected(model):
    return run(model, plan("resident"))[0]


CHANGES = ({}, {"substitution": "distinct"}, {"substitution": "mask"}, {"retain": True, "prefetch": "draft"})


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_lossless(model, expected, sizes, changes):
    a_plan = plan(draft_length=3, draft_experts=sizes, **changes)
    tokens, stats = run(model, a_plan)
    assert tokens == expected
    assert stats["draft_link_bytes"] == 0 or "prefetch" in changes
    assert stats["compilations_after_warmup"] == 0


@pytest.mark.parametrize("field", ["draft_experts", "cached_experts"])
def test_each_layer_keeps_its_own_number(model, field):
    a_plan = plan(draft_length=3, draft_experts=SIZES[0]) if field == "draft_experts" else plan("caching", cached_experts=SIZES[0])
    engine = sm.Engine(model, a_plan)
    for before, state, _ in steps(engine):
        for residency in (before, state.memory.residency):
            assert tuple((residency.slot_of >= 0).sum(axis=1)) == SIZES[0]


@pytest.mark.parametrize("substitution", ["affinity", "distinct"])
def test_equal_numbers_are_one_number(model, substitution):
    runs = [run(model, plan(draft_length=3, draft_experts=n, substitution=substitution), PROMPTS[:4]) for n in (2, (2, 2, 2))]
    assert runs[0][0] == runs[1][0]
    for figure in ("acceptance_by_position", "link_bytes", "peak_accelerator_bytes"):
        assert runs[0][1][figure] == runs[1][1][figure]


def test_account():
    of = [account(TINY, plan(draft_experts=n), batch_rows=2, positions=64) for n in ((1, 3, 2), 2, (1, 3, 3))]
    assert of[0] == of[1]
    assert (of[2].pinned_slots, of[2].num_slots) == (of[0].pinned_slots + 1, of[0].num_slots + 1)


def test_json_round_trip():
    for a_plan in (plan(draft_experts=(1, 3, 2)), plan("caching", cached_experts=(1, 1, 5)), plan(draft_experts=4)):
        assert Plan.from_json(a_plan.to_json()) == a_plan
        hash(Plan.from_json(a_plan.to_json()))


@pytest.mark.parametrize(
    "sizes, words",
    [
        ((1, 2), "has 2 numbers; the model has 3 layers"),
        ((1, 2, 6), "1 to 5"),
        ((1, 0, 2), "at least 1"),
        ((1, True, 2), "at least 1"),
        ((), "at least 1"),
        ([1, 2, 3], "at least 1"),
    ],
    ids=str,
)
def test_refusals(sizes, words):
    with pytest.raises(PlanError, match=words):
        plan(draft_experts=sizes).validate(TINY)


def test_merged_takes_one_number():
    with pytest.raises(PlanError, match="one number"):
        plan(draft="merged", draft_experts=(1, 2, 3)).validate(TINY)
    assert np.ndim(plan(draft="merged", draft_experts=2).validate(TINY).draft_experts) == 0
