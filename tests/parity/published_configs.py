"""Published config.json files of the families of 2025 and 2026, as far as they are read; spelled as they are published."""

COMMON = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
V3_FORM = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "kv_lora_rank": 512, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc",
    "v_head_dim": 128, "max_position_embeddings": 163840, "rope_theta": 10000, "vocab_size": 129280, "bos_token_id": 0,
    "eos_token_id": 1, "model_type": "deepseek_v3",
}  # fmt: skip
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
GLM = COMMON | {
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True, "rms_norm_eps": 1e-5,
    "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329, "head_dim": 128, "max_position_embeddings": 131072,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96,
    "num_experts_per_tok": 8, "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5,
    "rope_scaling": None, "rope_theta": 1000000, "vocab_size": 151552,
}  # fmt: skip

DEEPSEEK_V3 = V3_FORM | {"rope_scaling": YARN | {"type": "yarn"}}
KIMI_K2 = V3_FORM | {
    "model_type": "kimi_k2", "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 384,
    "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "routed_scaling_factor": 2.827,
    "max_position_embeddings": 131072, "rope_theta": 50000.0, "vocab_size": 163840, "bos_token_id": 163584,
    "eos_token_id": 163585, "rope_scaling": YARN | {"type": "yarn", "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
}  # fmt: skip
KIMI_K25 = {
    "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "tie_word_embeddings": False,
    "text_config": KIMI_K2 | {"rms_norm_eps": 1e-5, "rope_scaling": YARN | {"type": "yarn", "factor": 64.0}},
}  # fmt: skip
MOONLIGHT = V3_FORM | {
    "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16, "num_key_value_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_nextn_predict_layers": 0, "q_lora_rank": None,
    "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 50000.0,
    "rope_scaling": None, "vocab_size": 163840, "bos_token_id": 163584, "eos_token_id": 163585,
}  # fmt: skip
GLM_FLASH = COMMON | {
    "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "hidden_size": 2048, "intermediate_size": 10240,
    "moe_intermediate_size": 1536, "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20,
    "n_shared_experts": 1, "n_routed_experts": 64, "routed_scaling_factor": 1.8, "kv_lora_rank": 512, "q_lora_rank": 768,
    "qk_rope_head_dim": 64, "v_head_dim": 256, "qk_nope_head_dim": 192, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc",
    "num_experts_per_tok": 4, "norm_topk_prob": True, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
    "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "rope_theta": 1000000, "rope_scaling": None, "vocab_size": 154880,
    "eos_token_id": [154820, 154827, 154829],
}  # fmt: skip
GLM_45 = GLM | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160,
    "num_hidden_layers": 92, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "use_qk_norm": True,
}  # fmt: skip
GLM_45_AIR = GLM | {
    "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 128,
    "num_hidden_layers": 46, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "use_qk_norm": False,
}  # fmt: skip
MINIMAX_M25 = {
    "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "num_hidden_layers": 62, "hidden_size": 3072,
    "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 1536, "vocab_size": 200064,
    "num_experts_per_tok": 8, "num_local_experts": 256, "max_position_embeddings": 196608, "rope_theta": 5000000,
    "rotary_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_qk_norm": True,
    "qk_norm_type": "per_layer", "use_routing_bias": True, "use_mtp": True, "mtp_transformer_layers": 1, "num_mtp_modules": 3,
    "shared_intermediate_size": 0, "scoring_func": "sigmoid",
}  # fmt: skip
GRANITE_1B_A400M = COMMON | {
    "architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0, "hidden_size": 1024,
    "intermediate_size": 512, "max_position_embeddings": 131072, "num_attention_heads": 16, "num_experts_per_tok": 8,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "rope_scaling": None, "rope_theta": 1500000.0,
    "tie_word_embeddings": True, "vocab_size": 49155, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
QWEN3_VL_30B = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe", "tie_word_embeddings": False,
    "text_config": {
        "attention_bias": False, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 262144, "mlp_only_layers": [],
        "model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 5000000, "vocab_size": 151936,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
}  # fmt: skip

QWEN_HYBRID = {
    "attention_bias": False, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [], "moe_intermediate_size": 512,
    "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_NEXT_80B = QWEN_HYBRID | {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "bos_token_id": 151643, "eos_token_id": 151645,
    "decoder_sparse_step": 1, "intermediate_size": 5120, "norm_topk_prob": True, "num_experts": 512, "num_experts_per_tok": 10,
    "num_hidden_layers": 48, "partial_rotary_factor": 0.25, "rope_scaling": None, "rope_theta": 10000000, "vocab_size": 151936,
}  # fmt: skip
QWEN35_35B = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "tie_word_embeddings": False,
    "text_config": QWEN_HYBRID
    | {
        "attn_output_gate": True, "dtype": "bfloat16", "eos_token_id": 248044, "model_type": "qwen3_5_moe_text",
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "num_experts": 256, "num_experts_per_tok": 8,
        "num_hidden_layers": 40, "vocab_size": 248320, "mamba_ssm_dtype": "float32",
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default", "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
        },
    },
}  # fmt: skip
DEEPSEEK_V32 = V3_FORM | {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 64,
    "index_topk": 2048, "rope_scaling": YARN | {"type": "yarn"},
}  # fmt: skip
GLM_5 = COMMON | {
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "eos_token_id": [154820, 154827, 154829],
    "first_k_dense_replace": 3, "head_dim": 64, "hidden_size": 6144, "index_head_dim": 128, "index_n_heads": 32,
    "index_topk": 2048, "indexer_rope_interleave": True, "intermediate_size": 12288, "kv_lora_rank": 512,
    "max_position_embeddings": 202752, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 78,
    "num_key_value_heads": 64, "num_nextn_predict_layers": 1, "pad_token_id": 154820, "q_lora_rank": 2048, "qk_head_dim": 256,
    "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5, "rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 256, "vocab_size": 154880,
}  # fmt: skip
MIMO_V2_FLASH = {
    "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "num_hidden_layers": 48, "hidden_size": 4096,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128, "intermediate_size": 16384,
    "vocab_size": 152576, "max_position_embeddings": 262144, "rope_theta": 5000000, "swa_rope_theta": 10000,
    "partial_rotary_factor": 0.334, "sliding_window": 128, "sliding_window_size": 128, "attention_chunk_size": 128,
    "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8, "swa_head_dim": 192, "swa_v_head_dim": 128,
    "hybrid_layer_pattern": [0, 1, 1, 1, 1] + [0, 1, 1, 1, 1, 1] * 7 + [0], "moe_layer_freq": [0] + [1] * 47,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": None, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc",
    "routed_scaling_factor": None, "hidden_act": "silu", "layernorm_epsilon": 1e-05, "attention_bias": False,
    "attention_value_scale": 0.707, "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip

PUBLISHED = {
    "DeepSeek-V3": (DEEPSEEK_V3, 671e9),
    "Kimi-K2": (KIMI_K2, 1.03e12),
    "Kimi-K2.5": (KIMI_K25, 1.03e12),
    "Moonlight-16B-A3B": (MOONLIGHT, 16e9),
    "GLM-4.7-Flash": (GLM_FLASH, 30e9),
    "GLM-4.5": (GLM_45, 353e9),
    "GLM-4.5-Air": (GLM_45_AIR, 107e9),
    "MiniMax-M2.5": (MINIMAX_M25, 229e9),
    "granite-3.1-1b-a400m": (GRANITE_1B_A400M, 1.33e9),
    "Qwen3-VL-30B-A3B": (QWEN3_VL_30B, 30.5e9),
    "Qwen3-Next-80B-A3B": (QWEN3_NEXT_80B, 80e9),
    "Qwen3.5-35B-A3B": (QWEN35_35B, 35e9),
    "DeepSeek-V3.2": (DEEPSEEK_V32, 671e9),
    "GLM-5": (GLM_5, 744e9),
    "MiMo-V2-Flash": (MIMO_V2_FLASH, 309e9),
}
"""config.json, and the number of weights that the publisher states (without a tower, layers for further tokens, and an indexer)."""
