"""What an encoder adds: its experts cross the link once per batch, in any number of waves, and batch mates change nothing."""

import re

import pytest
from engine_cases import tokens_of

from specmoe_jax import PRESETS, Engine, SamplingParams
from specmoe_jax.engine.requests.prepare import check_job
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.model import random_model
from specmoe_jax.planner.memory.account import account, cache_positions
from specmoe_jax.support.errors import PlanError, RequestError
from specmoe_jax.testing.families import ENCODER_DECODERS, tiny_family

PROMPTS = [[5, 99, 3, 17, 64, 8, 2, 120, 44, 9, 31], [77, 6, 30], [4]]
PARAMS = SamplingParams(max_new_tokens=7, ignore_eos=True)
MODEL = tiny_family("nllb_moe")
SPECMOE = PRESETS["specmoe"](MODEL.config).replace(batch_size=3, prefill_chunk=4, draft_length=3, draft_experts=2)


@pytest.fixture(scope="module")
def expected():
    return tokens_of(Engine(MODEL, PRESETS["resident"](MODEL.config).replace(batch_size=3)).generate(PROMPTS, PARAMS))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 2}, {"draft": "ngram"}], ids=str)
def test_batches_and_drafts(changes, expected):
    plan = SPECMOE.replace(**changes)
    if plan.draft == "ngram":
        plan = plan.replace(draft_experts=None)
    assert tokens_of(Engine(MODEL, plan).generate(PROMPTS, PARAMS)) == expected


@pytest.mark.slow
def test_one_free_slot_is_enough(expected):
    """The encoder's needs of a layer, all its experts, come one by one."""
    positions = cache_positions(9, SPECMOE)
    whole = account(MODEL.config, SPECMOE, batch_rows=3, positions=positions, source_positions=16)
    budget = whole.accelerator_bytes - (whole.num_slots - whole.pinned_slots - 1) * whole.expert_bytes
    engine = Engine(MODEL, SPECMOE.replace(device_memory_bytes=budget))
    assert tokens_of(engine.generate(PROMPTS, PARAMS)) == expected
    assert engine.stats()["peak_accelerator_bytes"] == budget
    assert engine.stats()["compilations_after_warmup"] == 0


def test_the_bytes_of_the_encoder_are_counted():
    """One source token: two experts of the one encoder layer that has any, beside the block that warms the copy up."""
    engine = Engine(MODEL, PRESETS["on_demand"](MODEL.config).replace(batch_size=1))
    engine.generate([[4]], PARAMS)
    assert engine.stats()["prefill_link_bytes"] == (1 + 2) * MODEL.expert_bytes


DEEP = random_model(parse_config(ENCODER_DECODERS["nllb_moe"] | {"encoder_layers": 4}), seed=0)


@pytest.mark.parametrize("changes", [{}, {"batch_size": 1, "prefill_chunk": 1}], ids=str)
@pytest.mark.parametrize("model", [MODEL, DEEP], ids=["one encoder layer with experts", "two"])
def test_resident_holds_the_experts_of_both_parts(model, changes):
    """The published NLLB-MoE has six such layers in its encoder."""
    tokens = [
        tokens_of(Engine(model, PRESETS[preset](model.config).replace(**{"batch_size": 3} | changes)).generate(PROMPTS, PARAMS))
        for preset in ("resident", "on_demand")
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("model", [MODEL, DEEP], ids=["one encoder layer with experts", "two"])
def test_the_smallest_budget_that_is_named_works(model):
    plan = PRESETS["resident"](model.config).replace(batch_size=2, device_memory_bytes=1)
    with pytest.raises(PlanError) as refused:
        check_job(model, plan, PROMPTS, PARAMS)
    (smallest,) = re.findall(r"the smallest that works is device_memory_bytes=([0-9]+)", str(refused.value))
    plan = plan.replace(device_memory_bytes=int(smallest))
    assert check_job(model, plan, PROMPTS, PARAMS).num_slots == model.config.num_expert_layers * model.config.num_experts
    assert len(Engine(model, plan).generate(PROMPTS, PARAMS)) == len(PROMPTS)


@pytest.mark.parametrize(("prompt", "message"), [([5, 1, 7], "the padding token 1"), ([5] * 96, "window is 96")])
def test_refused_prompts(prompt, message):
    with pytest.raises(RequestError, match=message):
        Engine(MODEL, SPECMOE).generate([prompt], PARAMS)


@pytest.mark.parametrize("draft", ["model", "eagle"])
def test_drafts_for_decoders_alone_are_refused(draft):
    with pytest.raises(PlanError, match=f"draft={draft} is built for decoders alone"):
        SPECMOE.replace(draft=draft, draft_experts=None).validate(MODEL.config)


def test_an_encoder_decoder_as_draft_model_is_refused():
    target = tiny_family("mixtral")
    plan = PRESETS["on_demand"](target.config).replace(draft="model", draft_length=2)
    with pytest.raises(PlanError, match="the draft model is an encoder-decoder"):
        Engine(target, plan, draft_model=MODEL)
