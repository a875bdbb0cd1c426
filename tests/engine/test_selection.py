"""Models whose indexer chooses what is attended, in texts of many times that: no flow, tier or draft changes a token."""

import functools

import numpy as np
import pytest
from engine_cases import tokens_of

import specmoe_jax as sm
from specmoe_jax.config.registry import DRAFTS
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.model import Model, random_model
from specmoe_jax.planner import costs
from specmoe_jax.planner.memory.account import account
from specmoe_jax.testing.families import RAW_CONFIGS, tiny_family

FAMILIES = ("deepseek_v32", "glm_moe_dsa")
# Ragged, of one token too; one crosses a page of 64 positions as it grows.
PROMPTS = tuple(tuple(int(t) for t in np.random.default_rng([5, i]).integers(3, 131, n)) for i, n in enumerate((59, 1, 30, 12)))
PARAMS = sm.SamplingParams(max_new_tokens=9, ignore_eos=True)
CASES = {
    "specmoe": {"draft_length": 3, "draft_experts": 3, "prefill_chunk": 16},
    "streaming": {"batch_size": 2, "micro_batches": 2, "prefill_chunk": 16, "draft": "mtp", "draft_length": 2},
    "streaming accelerator": {"batch_size": 3, "prefill_chunk": 16, "prefill_attention": "accelerator"},
    "on_demand mtp tree": {
        "draft": "mtp", "draft_length": 3, "draft_tree_top_k": 2, "draft_tree_tokens": 5, "prefill_chunk": 8,
    },
    "on_demand host tree": {
        "kv_tier": "host", "prefill_chunk": 16, "draft": "eagle", "draft_length": 3, "draft_tree_top_k": 2, "draft_tree_tokens": 5,
    },
}  # fmt: skip


@functools.cache
def model_of(family: str) -> Model:
    return random_model(parse_config(RAW_CONFIGS[family] | {"num_nextn_predict_layers": 1}))


@functools.cache
def expected(family: str) -> list[tuple[int, ...]]:
    model = model_of(family)
    return tokens_of(sm.Engine(model, sm.PRESETS["resident"](model.config).replace(batch_size=4)).generate(PROMPTS, PARAMS))


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_decoding_follows_the_definition(family):
    """The argmax of the forward with masks, without a cache."""
    model, width = model_of(family), max(map(len, PROMPTS)) + PARAMS.max_new_tokens
    rows = np.zeros((len(PROMPTS), width), np.int32)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, expected(family), strict=True)):
        rows[row, : len(prompt) + len(tokens)] = prompt + tokens
    choices = np.asarray(model.logits(rows)).argmax(-1)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, expected(family), strict=True)):
        assert tuple(choices[row, len(prompt) - 1 :][: len(tokens)].tolist()) == tokens


def test_what_is_left_out_matters():
    """The same weights with an indexer that keeps all give other tokens: the texts above are beyond what is kept."""
    raw = RAW_CONFIGS["deepseek_v32"] | {"num_nextn_predict_layers": 1, "index_topk": 96}
    model = random_model(parse_config(raw))
    found = sm.Engine(model, sm.PRESETS["resident"](model.config).replace(batch_size=4)).generate(PROMPTS, PARAMS)
    assert tokens_of(found) != expected("deepseek_v32")


@pytest.mark.parametrize(("family", "case"), [*(("glm_moe_dsa", case) for case in CASES), ("deepseek_v32", "streaming")])
def test_lossless(family, case):
    model, changes = model_of(family), CASES[case]
    plan = sm.PRESETS[case.split()[0]](model.config).replace(**{"batch_size": 4} | changes)
    engine = sm.Engine(model, plan, **DRAFTS.executor(plan.draft).random_inputs(model))
    assert tokens_of(engine.generate(PROMPTS, PARAMS)) == expected(family)
    assert engine.stats()["compilations_after_warmup"] == 0


def test_index_keys_are_in_the_account():
    """Behind the latent of the value cache, so a position is as wide as the wider of the two needs it; read at every position."""
    config = tiny_family("deepseek_v32").config
    held = account(config, sm.PRESETS["on_demand"](config), batch_rows=2, positions=64)
    assert held.kv_bytes == 2 * 64 * config.num_layers * 2 * 32 * 4  # latents of 20 and index keys of 8, stored as 32
    attention = config.layers[0].attention
    near, far = (costs.attention(attention, costs.Load(1, 1, context), 4, resource="accelerator") for context in (100, 1100))
    assert far.bytes - near.bytes == 1000 * 8 * 4  # index keys alone


def test_hidden_states_are_without_the_choice_behind_them():
    """What whoever reads takes of the layers between which a choice goes on, and what a head of three layers is made of."""
    model, layers = model_of("glm_moe_dsa"), (1, 2, 3)
    found = []
    for preset, changes in (("resident", {}), ("on_demand", {"prefill_chunk": 16}), ("streaming", {"prefill_chunk": 16})):
        engine = sm.Engine(model, sm.PRESETS[preset](model.config).replace(batch_size=2, **changes))
        found.append([one.hidden for one in engine.features(PROMPTS[2:], layers=layers)])
    for one, *others in zip(*found, strict=True):
        assert one.shape[::2] == (3, model.config.hidden_size)
        for other in others:
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_choice_is_in_the_account():
    """Three numbers a position that is kept, behind each hidden state that waits."""
    raw = RAW_CONFIGS["glm_moe_dsa"]
    shared, own = (parse_config(raw | {"indexer_types": kinds}) for kinds in (raw["indexer_types"], ["full"] * 4))
    assert shared.state_numbers - own.state_numbers == 3 * 6
    plan = sm.PRESETS["on_demand"](shared)
    waiting = [account(config, plan, batch_rows=2, positions=64).activation_bytes for config in (shared, own)]
    assert waiting[0] > waiting[1]


def test_layers_that_share_attend_what_was_chosen():
    """With an indexer in each of the same layers the text is another."""
    model = random_model(parse_config(RAW_CONFIGS["glm_moe_dsa"] | {"num_nextn_predict_layers": 1, "indexer_types": ["full"] * 4}))
    found = sm.Engine(model, sm.PRESETS["resident"](model.config).replace(batch_size=4)).generate(PROMPTS, PARAMS)
    assert tokens_of(found) != expected("glm_moe_dsa")
