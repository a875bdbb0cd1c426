"""Checkpoints of published sizes that are headers alone: the data are holes of a sparse file.

The configurations are those of the published models as far as sizes go, written from memory.
"""

import json
import os
import pathlib

from specmoe_jax.models.families.registry import family_of, parse_config
from specmoe_jax.models.spec import spec_leaves

_COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "eos_token_id": 2}

CONFIGS = {
    "mixtral_8x7b": _COMMON
    | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rope_theta": 1e6,
        "sliding_window": None,
    },
    "qwen3_30b_a3b": _COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960, "rope_theta": 1e6,
        "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
    },
    "deepseek_v2_lite": _COMMON
    | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "attention_bias": False, "max_position_embeddings": 163840, "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    },
    "gpt_oss_120b": _COMMON
    | {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880,
        "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128, "attention_bias": True, "swiglu_limit": 7.0,
        "max_position_embeddings": 131072, "rope_theta": 150000, "layer_types": ["sliding_attention", "full_attention"] * 18,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "nllb_moe_54b": {
        "architectures": ["NllbMoeForConditionalGeneration"], "model_type": "nllb-moe", "vocab_size": 256206,
        "max_position_embeddings": 1024, "d_model": 2048, "encoder_layers": 24, "decoder_layers": 24, "encoder_ffn_dim": 8192,
        "decoder_ffn_dim": 8192, "encoder_attention_heads": 16, "decoder_attention_heads": 16, "encoder_sparse_step": 4,
        "decoder_sparse_step": 4, "num_experts": 128, "moe_token_dropout": 0.2, "second_expert_policy": "all",
        "activation_function": "relu", "scale_embedding": True, "pad_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2,
    },
}  # fmt: skip


def write_headers(folder: pathlib.Path, raw: dict) -> pathlib.Path:
    """config.json and one safetensors file whose tensors are holes: bfloat16, and MXFP4 experts where the config says so."""
    config = parse_config(raw).with_packing("mxfp4" if "quantization_config" in raw else None)
    family, packed = family_of(config), "quantization_config" in raw
    tensors = {spec.name: ("BF16", 2, spec) for spec in spec_leaves(family.weight_specs(config))}
    for layer in config.expert_layers:
        for expert in range(config.num_experts):
            if packed:
                parts = family.packed_parts(config, layer, expert)
                tensors |= {p.spec.name: (p.dtypes[0], 1 if p.dtypes[0] == "U8" else 2, p.spec) for p in parts}
            else:
                tensors |= {p.name: ("BF16", 2, p.spec) for p in family.expert_layouts(config, layer, expert)[0]}
    header, at = {}, 0
    for name, (dtype, width, spec) in tensors.items():
        end = at + spec.size * width
        header[name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        os.ftruncate(file.fileno(), 8 + len(text) + at)
    return folder
