"""Checkpoints of every family: each layout loads to the same bits, converts there and back, and what is not built is refused."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from family_files import stored_tensors, write

from specmoe_jax.checkpoints import load_model
from specmoe_jax.checkpoints.conversion.convert import convert
from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.support.errors import CheckpointError
from specmoe_jax.testing.families import ENCODER_DECODERS, RAW_CONFIGS, WITH_TOWERS, tiny_family

ALL = RAW_CONFIGS | WITH_TOWERS | ENCODER_DECODERS


def assert_same(model, other):
    jax.tree.map(np.testing.assert_array_equal, model.weights, other.weights)
    jax.tree.map(np.testing.assert_array_equal, model.experts, other.experts)


NUM_LAYOUTS = {"llama4": 1, "gpt_oss": 1, "nllb_moe": 1, "qwen3_vl_moe": 3}
LAYOUTS = [(family, i) for family in ALL for i in range(NUM_LAYOUTS.get(family, 2))]


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_every_layout_loads_the_random_model(family, layout, tmp_path):
    model = tiny_family(family)
    path = write(tmp_path / "checkpoint", ALL[family], stored_tensors(model, layout))
    assert_same(load_model(str(path)), model)


@pytest.mark.parametrize("family", ALL)
def test_conversion_there_and_back(family, tmp_path):
    model = tiny_family(family)
    path = write(tmp_path / "checkpoint", ALL[family], stored_tensors(model, 0))
    mapped = convert(str(path), tmp_path / "mapped", to="specmoe")
    assert_same(load_model(str(mapped)), model)
    back = convert(str(mapped), tmp_path / "back", to="huggingface")
    assert_same(load_model(str(back)), model)


WRAPPED = {
    "llama4": ("Llama4ForConditionalGeneration", "language_model.{}", ("vision_model.a", "multi_modal_projector.linear_1.weight")),
    "deepseek_v3": ("KimiK25ForConditionalGeneration", "language_model.{}", ("vision_tower.a", "mm_projector.linear_1.weight")),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", "model.language_model.{}", ("model.visual.patch_embed.proj.weight",)),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        "model.language_model.{}",
        ("model.visual.patch_embed.proj.weight", "mtp.fc.weight", "mtp.layers.0.mlp.gate.weight"),
    ),
}


@pytest.mark.parametrize("family", WRAPPED)
def test_text_part_beside_a_vision_part(family, tmp_path, capsys):
    """As it is published: under text_config, names prefixed, the vision part left out with a word."""
    architecture, prefix, others = WRAPPED[family]
    model = tiny_family(family)
    tensors = {}
    for name, tensor in stored_tensors(model, 0).items():
        inner = name.removeprefix("model.") if prefix.startswith("model.") else name
        tensors[name if name == inner and prefix.startswith("model.") else prefix.format(inner)] = tensor
    tensors |= {name: np.zeros((2, 2), np.float32) for name in others}
    text = {key: value for key, value in ALL[family].get("text_config", ALL[family]).items() if key != "architectures"}
    raw = {"architectures": [architecture], "model_type": "outer", "text_config": text}
    path = write(tmp_path / "checkpoint", raw, tensors)
    assert_same(load_model(str(path)), model)
    assert capsys.readouterr().err == ""
    load_model(str(path), progress="log")
    found = capsys.readouterr().err
    assert found.startswith(f"load: {len(others)} tensors of other parts are left out: {sorted(others)[0].rsplit('.', 1)[0][:12]}")


OTHERS = {
    "qwen3_next": ("mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight"),
    "mimo_v2_flash": ("model.mtp.layers.0.eh_proj.weight",),
}


@pytest.mark.parametrize("family", OTHERS)
def test_what_is_not_built_yet_is_left_out(family, tmp_path):
    """Layers for further tokens."""
    model = tiny_family(family)
    tensors = stored_tensors(model, 0) | {name: np.zeros((2, 2), np.float32) for name in OTHERS[family]}
    assert_same(load_model(str(write(tmp_path / "checkpoint", ALL[family], tensors))), model)


def test_a_wrapper_may_be_written_flat(tmp_path):
    """Its architecture, and the text part's model_type beside the text part's keys."""
    raw = ALL["qwen3_5_moe"] | {"architectures": ["Qwen3_5MoeForConditionalGeneration"]}
    model = tiny_family("qwen3_5_moe")
    assert_same(load_model(str(write(tmp_path / "checkpoint", raw, stored_tensors(model, 1)))), model)


def test_mimo_in_the_keys_of_the_publisher():
    """hybrid_layer_pattern, moe_layer_freq, swa_*, layernorm_epsilon; the window counts what is before one's own position."""
    raw = {
        key: value for key, value in ALL["mimo_v2_flash"].items() if key not in ("layer_types", "mlp_layer_types", "rms_norm_eps")
    }
    raw |= {
        "hybrid_layer_pattern": [0, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1], "layernorm_epsilon": 1e-5, "rope_parameters": None,
        "sliding_window_size": 5, "sliding_window": 5, "swa_num_key_value_heads": 4, "swa_head_dim": 12, "rope_theta": 5e6,
        "swa_rope_theta": 1e4, "partial_rotary_factor": 0.5, "routed_scaling_factor": None,
    }  # fmt: skip
    assert parse_config(raw) == tiny_family("mimo_v2_flash").config


REFUSALS = (
    ("mixtral", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'; built are default"),
    ("mixtral", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    ("mixtral", {"rope_parameters": {"rope_type": "yarn"}}, "rope factor is None"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; this family is built with 'silu'"),
    ("mixtral", {"architectures": ["LlamaForCausalLM"]}, "this version runs MixtralForCausalLM, Qwen3MoeForCausalLM"),
    ("qwen3_moe", {"mlp_only_layers": list(range(6))}, "no layer has experts"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias is True; this family is built with False"),
    ("qwen3_moe", {"num_experts_per_tok": 8}, "num_experts_per_tok 8 is more than the number of experts, 7"),
    ("qwen2_moe", {"qkv_bias": False}, "qkv_bias is False"),
    ("qwen2_moe", {"layer_types": ["full_attention"]}, "layer_types is ['full_attention']; this family is built with 3 of"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0; this family is built with None"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, "n_group 4"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
    ("deepseek_v2", {"qk_rope_head_dim": 5}, "qk_rope_head_dim is 5"),
    ("deepseek_v3", {"topk_method": "group_limited_greedy"}, "topk_method is 'group_limited_greedy'; this family is built with"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; this family is built with 'sigmoid'"),
    ("deepseek_v3", {"n_group": 9, "topk_group": 4}, "n_group 9 and topk_group 4 do not fit 9 experts"),
    ("deepseek_v3", {"n_group": None}, "n_group is None"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ("deepseek_v3", {"num_nextn_predict_layers": 5000}, "num_nextn_predict_layers is 5000"),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types is ['dense']; this family is built with 3 of dense, sparse"),
    ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 0.3}}, "partial_rotary_factor is 0.3; of heads of 12 it must"),
    ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5"),
    ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
    ("minimax_m2", {"rotary_dim": 14}, "of heads of 12 it must leave an even number"),
    ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type is 'per_head'"),
    ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias is False"),
    ("granite_moe", {"residual_multiplier": 0}, "residual_multiplier is 0.0; it must be above 0"),
    ("granite_moe", {"attention_bias": True}, "attention_bias is True"),
    ("qwen3_next", {"layer_types": ["linear_attention"] * 4}, "layer_types has no full_attention"),
    ("qwen3_next", {"linear_num_value_heads": 3}, "linear_num_value_heads 3 is not a multiple of linear_num_key_heads 2"),
    ("qwen3_5_moe", {"attn_output_gate": False}, "attn_output_gate is False"),
    ("deepseek_v32", {"index_topk": 0}, "index_topk is 0"),
    ("deepseek_v32", {"index_head_dim": 4}, "index_head_dim is 4; it must be at least qk_rope_head_dim, 6"),
    ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank is None"),
    ("glm_moe_dsa", {"indexer_types": ["shared", "full", "full", "full"]}, "the first layer has no indexer"),
    ("glm_moe_dsa", {"indexer_types": ["full"]}, "indexer_types is ['full']; this family is built with 4 of full, shared"),
    (
        "glm_moe_dsa",
        {"indexer_types": None, "index_topk_pattern": "FX"},
        "index_topk_pattern is 'FX'; it must be 4 of the letters F and S",
    ),
    ("mimo_v2_flash", {"hybrid_layer_pattern": [0, 2, 1, 0]}, "hybrid_layer_pattern is [0, 2, 1, 0]; it must be 4 of 0 and 1"),
    ("mimo_v2_flash", {"swa_head_dim": 16}, "swa_head_dim is 16; this family is built with 12"),
    ("qwen3_vl_moe", {"text_config": None}, "num_experts is None"),
    ("gpt_oss", {"layer_types": ["linear_attention"] * 3}, "layer_types is"),
    ("llama4", {"num_experts_per_tok": 2}, "num_experts_per_tok is 2; this family is built with 1"),
    ("llama4", {"moe_layers": [9]}, "moe_layers is (9,)"),
    ("llama4", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries; there are 4 layers"),
    ("llama4", {"floor_scale": 0}, "floor_scale is 0.0"),
    (
        "nllb_moe",
        {"second_expert_policy": "random"},
        "second_expert_policy is 'random'; its routing is random, so nothing could be lossless",
    ),
    ("nllb_moe", {"second_expert_policy": "sampling"}, "second_expert_policy is 'sampling'"),
    ("nllb_moe", {"moe_eval_capacity_token_fraction": 0.5}, "moe_eval_capacity_token_fraction is 0.5; below 1, tokens lose"),
    ("nllb_moe", {"moe_eval_capacity_token_fraction": -1}, "moe_eval_capacity_token_fraction is -1.0"),
    ("nllb_moe", {"encoder_ffn_dim": 32}, "encoder_ffn_dim and decoder_ffn_dim differ"),
    ("nllb_moe", {"decoder_sparse_step": 0}, "no layer of the decoder has experts"),
    ("nllb_moe", {"encoder_sparse_step": -1}, "encoder_sparse_step is -1"),
    ("nllb_moe", {"encoder_attention_heads": 4}, "d_model is 42; it must be a multiple of encoder_attention_heads, 4"),
    ("nllb_moe", {"decoder_start_token_id": 131}, "decoder_start_token_id is 131; it must be an id of the vocabulary"),
    ("nllb_moe", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_layers_for_further_tokens_are_left_alone(family, tmp_path):
    """As published, after the last layer and with copies of the embedding; without the key in config.json they are refused."""
    model, tensors = tiny_family(family), stored_tensors(tiny_family(family), 0)
    prefix = f"model.layers.{model.config.num_layers}"
    names = ("enorm.weight", "eh_proj.weight", "embed_tokens.weight", "mlp.experts.0.up_proj.weight", "shared_head.head.weight")
    tensors |= {f"{prefix}.{name}": np.zeros((2, 2), np.float32) for name in names}
    assert_same(load_model(str(write(tmp_path / "checkpoint", ALL[family], tensors))), model)
    without = ALL[family] | {"num_nextn_predict_layers": 0}
    with pytest.raises(CheckpointError, match=rf"5 tensors that this model does not use: {prefix}\.eh_proj"):
        load_model(str(write(tmp_path / "unknown", without, tensors)))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "minimax_m2"])
def test_the_choice_bias_stays_float32(family, tmp_path):
    """Beside bfloat16 weights, in memory and after a conversion: rounded, it would choose other experts."""
    model = tiny_family(family)
    tensors = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.astype(ml_dtypes.bfloat16)
        for name, tensor in stored_tensors(model, 0).items()
    }
    path = write(tmp_path / "checkpoint", ALL[family], tensors)
    mapped = convert(str(path), tmp_path / "mapped", to="specmoe")
    assert json.loads((mapped / "config.json").read_text())["dtype"] == "bfloat16"
    back = convert(str(mapped), tmp_path / "back", to="huggingface")
    for folder in (path, mapped, back):
        loaded = load_model(str(folder), dtype="bfloat16")
        for ours, theirs in zip(loaded.weights.layers, model.weights.layers, strict=True):
            if theirs.choice_bias is not None:
                np.testing.assert_array_equal(ours.choice_bias, theirs.choice_bias, strict=True)
            assert ours.input_norm.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(("family", "changes", "message"), REFUSALS, ids=lambda value: value if isinstance(value, str) else None)
def test_what_is_not_built_is_refused(family, changes, message):
    with pytest.raises(CheckpointError) as caught:
        parse_config(ALL[family] | changes)
    assert str(caught.value).startswith("config.json: ") and message in str(caught.value)
    assert str(caught.value).isprintable()
