"""Quantised experts: lossless over the same quantised weights, their bytes on the link and in the account, their error told."""

import pytest
from engine_cases import tokens_of

from specmoe_jax import PRESETS, Engine, SamplingParams
from specmoe_jax.config.plan_fields import DECODED, EXPERT_DTYPES
from specmoe_jax.jobs.job import load_quantised
from specmoe_jax.jobs.prompts import Prompt
from specmoe_jax.models.quantised import logit_error, quantise
from specmoe_jax.planner.memory.account import account
from specmoe_jax.support.errors import PlanError
from specmoe_jax.testing import tiny
from specmoe_jax.testing.families import tiny_family

PROMPTS = [[5, 99, 3, 17, 64, 8, 2], [77, 6, 30]]
PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True)
CASES = {
    "on_demand": {},
    "specmoe": {"draft_length": 3, "draft_experts": 2, "prefetch": "draft", "retain": True},
    "caching": {"draft": "ngram", "draft_length": 2},
    "streaming": {"batch_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("expert_dtype", [name for name in EXPERT_DTYPES if name != DECODED])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nllb_moe"])
def test_speculation_changes_no_token(family, expert_dtype):
    model = quantise(tiny_family(family), expert_dtype)
    expected = None
    for name in ("resident", *CASES):
        if name == "streaming" and family != "mixtral":
            continue
        plan = PRESETS[name](model.config).replace(batch_size=2, expert_dtype=expert_dtype).replace(**CASES.get(name, {}))
        engine = Engine(model, plan)
        tokens = tokens_of(engine.generate(PROMPTS, PARAMS))
        expected = expected or tokens
        assert tokens == expected
        stats = engine.stats()
        assert stats["link_bytes"] % model.expert_bytes == 0
        if name != "streaming":
            assert stats["compilations_after_warmup"] == 0


@pytest.mark.parametrize(("expert_dtype", "bound"), [("int8", 1e-3), ("int4", 0.1)])
def test_error(expert_dtype, bound):
    exact = tiny()
    error = logit_error(exact, quantise(exact, expert_dtype), PROMPTS)
    assert error["positions"] == 10 and 0 < error["kl"] < bound and 0 <= error["top1"] <= 1
    assert logit_error(exact, exact, PROMPTS) == {"kl": 0.0, "top1": 1.0, "positions": 10}


def test_account():
    model = quantise(tiny(), "int8")
    plan = PRESETS["specmoe"](model.config)
    plain, packed = (account(model.config, p, batch_rows=2, positions=64) for p in (plan, plan.replace(expert_dtype="int8")))
    assert packed.expert_bytes == model.expert_bytes == model.experts[0][0].nbytes < plain.expert_bytes / 3
    assert packed.num_slots == plain.num_slots and packed.host_bytes < plain.host_bytes / 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_dtype": "int3"}, "expert_dtype is 'int3'; it must be one of int8, int4, decoded"),
        ({"expert_dtype": "int8", "expert_tier": "disk", "host_memory_bytes": 1 << 30}, "without expert_tier=disk"),
        ({"expert_dtype": "int4", "draft": "merged"}, "without draft=merged"),
    ],
)
def test_refused_plans(changes, message):
    with pytest.raises(PlanError, match=message):
        PRESETS["specmoe"](tiny().config).replace(**changes).validate(tiny().config)


def test_never_silently_on():
    plan = PRESETS["on_demand"](tiny().config)
    with pytest.raises(PlanError, match="expert_dtype=None, the model's experts are packed as int8"):
        Engine(quantise(tiny(), "int8"), plan)
    with pytest.raises(PlanError, match="expert_dtype=int8, the model's experts are packed as None"):
        Engine(tiny(), plan.replace(expert_dtype="int8"))


def test_the_error_is_told_of_prompts_that_can_be_served():
    """The others get records of their own later, whether some or all are bad."""

    def load(name, *, dtype, expert_tier, progress):
        return tiny()

    bad = Prompt(0, "a" * 200, PARAMS)  # more than the window
    for prompts, positions in (([bad, Prompt(1, "abc", PARAMS)], 3), ([bad], None)):
        model, error = load_quantised(load, "tiny", dtype="float32", expert_dtype="int8", prompts=prompts, progress="none")
        assert model.config.experts.packing == "int8"
        assert error.get("expert_dtype_positions") == positions
