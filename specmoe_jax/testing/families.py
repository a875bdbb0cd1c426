"""A tiny config.json of every family: odd sizes, and every part of the family in use. Random weights come from a seed."""

import functools

from specmoe_jax.models.families.registry import parse_config
from specmoe_jax.models.model import Model, random_model

_COMMON = {"hidden_act": "silu", "max_position_embeddings": 96, "vocab_size": 131, "eos_token_id": 2, "tie_word_embeddings": False}
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip

_HYBRID = {
    "hidden_size": 40, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 36, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "num_experts": 7, "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-6, "attention_bias": False, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 6, "linear_value_head_dim": 10, "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip

_LATENT = {
    "hidden_size": 40, "intermediate_size": 56, "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 5,
    "num_key_value_heads": 5, "n_routed_experts": 9, "n_shared_experts": 1, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
    "kv_lora_rank": 20, "q_lora_rank": 14, "qk_nope_head_dim": 12, "qk_rope_head_dim": 6, "v_head_dim": 10,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "attention_bias": False, "index_n_heads": 7, "index_head_dim": 8,
    "index_topk": 6,
}  # fmt: skip

RAW_CONFIGS = {
    "mixtral": _COMMON
    | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 48, "intermediate_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 5,
        "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    # Two dense layers of four: one by the step, one by name.
    "qwen3_moe": _COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 40, "intermediate_size": 56,
        "moe_intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
        "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": [3],
        "rms_norm_eps": 1e-6, "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    # The second layer dense; a window in every other layer.
    "qwen2_moe": _COMMON
    | {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 40, "intermediate_size": 56,
        "moe_intermediate_size": 24, "shared_expert_intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 5,
        "num_key_value_heads": 5, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [1], "rms_norm_eps": 1e-6, "qkv_bias": True, "use_sliding_window": True,
        "sliding_window": 6, "max_window_layers": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "olmoe": _COMMON
    | {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": 48, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "num_experts": 7, "num_experts_per_tok": 3,
        "norm_topk_prob": False, "clip_qkv": None, "attention_bias": False, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": _COMMON
    | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 40, "intermediate_size": 56,
        "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 5, "num_key_value_heads": 5,
        "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "kv_lora_rank": 20,
        "q_lora_rank": None, "qk_nope_head_dim": 12, "qk_rope_head_dim": 6, "v_head_dim": 10, "topk_method": "greedy",
        "n_group": None, "topk_group": None, "norm_topk_prob": False, "routed_scaling_factor": 1.5, "attention_bias": False,
        "mlp_bias": False, "rms_norm_eps": 1e-6, "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.9},
    },
    # Two of three groups of three experts; compressed queries; the first layer dense.
    "deepseek_v3": _COMMON
    | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 40, "intermediate_size": 56,
        "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 5, "num_key_value_heads": 5,
        "n_routed_experts": 9, "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "kv_lora_rank": 20,
        "q_lora_rank": 14, "qk_nope_head_dim": 12, "qk_rope_head_dim": 6, "v_head_dim": 10, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "n_group": 3, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "attention_bias": False, "rms_norm_eps": 1e-6, "rope_interleave": True, "num_nextn_predict_layers": 1,
        "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    # Values wider than the keys without positions; the second layer dense by its type.
    "glm4_moe_lite": _COMMON
    | {
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "hidden_size": 40, "intermediate_size": 56,
        "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 5, "num_key_value_heads": 5,
        "n_routed_experts": 7, "n_shared_experts": 1, "num_experts_per_tok": 2, "kv_lora_rank": 20, "q_lora_rank": 14,
        "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 1.8, "attention_bias": False, "rms_norm_eps": 1e-5, "rope_interleave": True,
        "mlp_layer_types": ["sparse", "dense", "sparse"], "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    # Six of twelve numbers of a head rotated; biases and norms of queries and keys; the first of three layers dense.
    "glm4_moe": _COMMON
    | {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "hidden_size": 40, "intermediate_size": 56,
        "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
        "n_routed_experts": 7, "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5, "use_qk_norm": True, "attention_bias": True,
        "rms_norm_eps": 1e-5, "num_nextn_predict_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    },
    # Four of twelve numbers of a head rotated.
    "minimax_m2": _COMMON
    | {
        "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "hidden_size": 40, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "num_local_experts": 7,
        "num_experts_per_tok": 3, "rotary_dim": 4, "rms_norm_eps": 1e-6, "use_qk_norm": True, "qk_norm_type": "per_layer",
        "use_routing_bias": True, "scoring_func": "sigmoid", "shared_intermediate_size": 0, "rope_theta": 5e6,
    },
    "granite_moe": _COMMON
    | {
        "architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "hidden_size": 48, "intermediate_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "num_local_experts": 7,
        "num_experts_per_tok": 3, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4,
        "logits_scaling": 0.7, "attention_bias": False, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1.5e6},
    },
    # Two recurrent layers to one that attends; two value heads to a key head; the second layer dense by name.
    "qwen3_next": _COMMON | _HYBRID | {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "intermediate_size": 56, "mlp_only_layers": [1],
        "norm_topk_prob": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
    },
    "qwen3_5_moe": _COMMON | _HYBRID | {
        "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text", "linear_num_value_heads": 6,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 1],
            "mrope_interleaved": True,
        },
    },
    # An indexer that keeps fewer positions than the tests have; so many heads that no two scores are alike.
    "deepseek_v32": _COMMON | _LATENT | {
        "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "n_group": 3, "topk_group": 2,
        "rms_norm_eps": 1e-6, "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    # Two layers take what the first one's indexer chose; the last has one of its own.
    "glm_moe_dsa": _COMMON | _LATENT | {
        "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "n_group": 1, "topk_group": 1, "v_head_dim": 14,
        "rms_norm_eps": 1e-5, "num_hidden_layers": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "indexer_types": ["full", "shared", "shared", "full"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    # Values narrower than keys; twice the KV heads, another theta and sinks where there is a window; the first layer dense.
    "mimo_v2_flash": _COMMON
    | {
        "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "hidden_size": 40, "intermediate_size": 56,
        "moe_intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12,
        "v_head_dim": 10, "n_routed_experts": 7, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "sliding_window": 6, "attention_bias": False, "rms_norm_eps": 1e-5,
        "attention_value_scale": 0.707, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    },
    "gpt_oss": _COMMON
    | {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 5,
        "num_experts_per_tok": 2, "sliding_window": 6, "attention_bias": True, "rms_norm_eps": 1e-5, "swiglu_limit": 1.5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "rope_parameters": _YARN | {"truncate": False},
    },
    # Layers 1 and 3 have experts, layer 2 has no positions; chunks and temperature floors shorter than the prompts.
    "llama4": _COMMON
    | {
        "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "hidden_size": 40, "intermediate_size": 24,
        "intermediate_size_mlp": 56, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
        "num_local_experts": 5, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "moe_layers": [1, 3],
        "no_rope_layers": [1, 1, 0, 1], "attention_chunk_size": 5, "use_qk_norm": True, "attn_temperature_tuning": True,
        "floor_scale": 4, "attn_scale": 0.3, "attention_bias": False, "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}  # fmt: skip

WITH_TOWERS = {
    # A text part under text_config, its names prefixed; the tower is of the smallest sizes that its reference takes.
    "qwen3_vl_moe": {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe", "tie_word_embeddings": False,
        "text_config": _COMMON
        | {
            "model_type": "qwen3_vl_moe_text", "hidden_size": 40, "intermediate_size": 56, "moe_intermediate_size": 24,
            "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "num_experts": 7,
            "num_experts_per_tok": 3, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [1],
            "rms_norm_eps": 1e-6, "attention_bias": False,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 2, 2], "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl_moe_vision", "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2,
            "patch_size": 2, "spatial_merge_size": 1, "temporal_patch_size": 1, "out_hidden_size": 40,
            "num_position_embeddings": 4, "deepstack_visual_indexes": [0],
        },
    },
}  # fmt: skip

ENCODER_DECODERS = {
    # Every other layer of the decoder has experts, the second of three in the encoder.
    "nllb_moe": {
        "architectures": ["NllbMoeForConditionalGeneration"], "model_type": "nllb-moe", "vocab_size": 131,
        "max_position_embeddings": 96, "d_model": 42, "encoder_layers": 3, "decoder_layers": 4, "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24, "encoder_attention_heads": 6, "decoder_attention_heads": 3, "encoder_sparse_step": 2,
        "decoder_sparse_step": 2, "num_experts": 6, "moe_token_dropout": 0.2, "second_expert_policy": "all",
        "activation_function": "relu", "scale_embedding": False, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    },
}  # fmt: skip


@functools.cache
def tiny_family(name: str, dtype: str = "float32") -> Model:
    """The same random model for the same name and dtype; made once a process. No tokenizer."""
    return random_model(parse_config((RAW_CONFIGS | WITH_TOWERS | ENCODER_DECODERS)[name]), seed=0, dtype=dtype)
