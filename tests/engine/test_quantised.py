"""Quantised weights: lossless over the same quantised weights, their bytes on the link and in the account, their error told."""

import jax
import pytest
from engine_cases import tokens_of

from specmoe_jax import PRESETS, Engine, SamplingParams
from specmoe_jax.config.plan_fields import DECODED, EXPERT_DTYPES
from specmoe_jax.config.registry import DRAFTS
from specmoe_jax.jobs.job import quantised
from specmoe_jax.jobs.prompts import Prompt
from specmoe_jax.models.packing.dense import dense_itemsize, packed_as, weight_bytes
from specmoe_jax.models.quantised import logit_error, quantise
from specmoe_jax.planner import costs
from specmoe_jax.planner.memory.account import account
from specmoe_jax.support.errors import PlanError, RequestError
from specmoe_jax.testing import tiny
from specmoe_jax.testing.families import ENCODER_DECODERS, RAW_CONFIGS, tiny_family

FAMILIES = sorted(RAW_CONFIGS | ENCODER_DECODERS)
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


DENSE = [(family, "int8") for family in ("mixtral", "deepseek_v3", "deepseek_v32", "qwen3_next", "gpt_oss", "nllb_moe")]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dense_dtype"), [*DENSE, ("deepseek_v3", "int4"), ("qwen3_next", "int4")])
def test_packed_dense_matrices_change_no_token_with_speculation(family, dense_dtype):
    """Whatever the flow and the draft; the first token is that of the reference over the same weights."""
    model = quantise(tiny_family(family), dense_dtype=dense_dtype)
    expected = None
    for name in ("resident", *CASES):
        if name == "streaming" and family == "nllb_moe":
            continue
        plan = PRESETS[name](model.config).replace(batch_size=2, dense_dtype=dense_dtype).replace(**CASES.get(name, {}))
        tokens = tokens_of(Engine(model, plan).generate(PROMPTS, PARAMS))
        expected = expected or tokens
        assert tokens == expected
    if model.config.encoder is None:
        assert [row[0] for row in expected] == [int(model.logits([prompt])[0, -1].argmax()) for prompt in PROMPTS]


@pytest.mark.parametrize(("draft", "dense_dtype"), [("mtp", "int8"), ("eagle", "int8"), ("eagle", "int4")])
def test_drafts_borrow_the_packed_output_matrix(draft, dense_dtype):
    model = quantise(tiny_family("glm4_moe"), dense_dtype=dense_dtype)
    plan = PRESETS["on_demand"](model.config).replace(batch_size=2, dense_dtype=dense_dtype)
    expected = tokens_of(Engine(model, plan).generate(PROMPTS, PARAMS))
    given = DRAFTS.executor(draft).random_inputs(model)
    assert tokens_of(Engine(model, plan.replace(draft=draft, draft_length=2), **given).generate(PROMPTS, PARAMS)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_account_of_dense_matrices(family):
    """Exact, whatever the family."""
    exact = tiny_family(family)
    for dense_dtype in (None, "int8", "int4"):
        model = quantise(exact, dense_dtype=dense_dtype)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.weights))
        assert held == weight_bytes(model.config, "float32", dense_dtype)
        plan = PRESETS["on_demand"](model.config).replace(dense_dtype=dense_dtype)
        assert account(model.config, plan, batch_rows=2, positions=64).weight_bytes == held


def test_dense_matrices_cost_less_to_read():
    config = tiny().config
    plain, int8, int4 = (
        costs.head(config, 1, dense_itemsize("float32", dense_dtype)).bytes - 2 * config.vocab_size * 4
        for dense_dtype in (None, "int8", "int4")
    )
    assert int8 == plain / 4 and int4 == plain * 9 / 64


@pytest.mark.parametrize(("expert_dtype", "bound"), [("int8", 1e-3), ("int4", 0.1)])
def test_error(expert_dtype, bound):
    exact = tiny()
    error = logit_error(exact, quantise(exact, expert_dtype), PROMPTS)
    assert error["positions"] == 10 and 0 < error["kl"] < bound and 0 <= error["top1"] <= 1
    assert logit_error(exact, exact, PROMPTS) == {"kl": 0.0, "top1": 1.0, "positions": 10}


def test_an_unknown_kind_of_dense_matrices():
    with pytest.raises(RequestError, match="dense_dtype is 'int3'; it must be one of int8, int4, or None"):
        quantise(tiny(), dense_dtype="int3")


@pytest.mark.parametrize(("dense_dtype", "bound"), [("int8", 5e-3), ("int4", 0.2)])
def test_error_of_dense_matrices(dense_dtype, bound):
    exact = tiny()
    error = logit_error(exact, quantise(exact, dense_dtype=dense_dtype), PROMPTS)
    assert 0 < error["kl"] < bound


def test_account():
    model = quantise(tiny(), "int8")
    plan = PRESETS["specmoe"](model.config)
    plain, packed = (account(model.config, p, batch_rows=2, positions=64) for p in (plan, plan.replace(expert_dtype="int8")))
    assert packed.expert_bytes == model.expert_bytes == model.experts[0][0].nbytes < plain.expert_bytes / 3
    assert packed.num_slots == plain.num_slots and packed.host_bytes < plain.host_bytes / 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_dtype": "int3"}, "dense_dtype is 'int3'; it must be one of int8, int4"),
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
    with pytest.raises(PlanError, match="dense_dtype=None, the model's dense matrices are packed as int8"):
        Engine(quantise(tiny(), dense_dtype="int8"), plan)
    with pytest.raises(PlanError, match="dense_dtype=int8, the model's dense matrices are packed as None"):
        Engine(tiny(), plan.replace(dense_dtype="int8"))


def test_the_error_is_told_of_prompts_that_can_be_served():
    """The others get records of their own later, whether some or all are bad."""
    bad = Prompt(0, "a" * 200, PARAMS)  # more than the window
    for prompts, positions in (([bad, Prompt(1, "abc", PARAMS)], 3), ([bad], None)):
        model, error = quantised(tiny(), "int8", "int8", prompts)
        assert model.config.experts.packing == "int8" and packed_as(model.weights) == "int8"
        assert error.get("quantised_positions") == positions
