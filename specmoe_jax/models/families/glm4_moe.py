"""GLM-4.5, -Air, 4.6, 4.7 (Zhipu AI 2025): half of each head rotated, DeepSeek-V3's router and shared experts."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import flag, require, size
from specmoe_jax.models.published.parse import biased_router, first_dense, grouped_attention, model_config, mtp_layers
from specmoe_jax.models.spec import LayerWeights, Weights

ARCHITECTURE = "Glm4MoeForCausalLM"

expert_layouts = naming.swiglu_layouts


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    require(raw, "hidden_act", "silu")
    dense, expert_hidden = first_dense(raw, default=1), size(raw, "moe_intermediate_size")
    biased, normed = flag(raw, "attention_bias"), flag(raw, "use_qk_norm")
    return model_config(
        raw,
        family="glm4_moe",
        attention=grouped_attention(raw, default_theta=1e4, rotated=0.5, qkv_bias=biased, qk_norm=normed),
        router=biased_router(raw, scaling=1.0),
        expert_hidden=expert_hidden,
        shared_hidden=size(raw, "n_shared_experts", default=1) * expert_hidden,
        dense=dense,
        dense_hidden=size(raw, "intermediate_size") if dense else None,
        default_eps=1e-5,
        mtp_layers=mtp_layers(raw),
    )


def weight_specs(config: ModelConfig) -> Weights:
    """Specs of everything but the routed experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def canonical_name(name: str) -> str:
    return name


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights:
    attention = config.layers[layer].attention
    norms = naming.qk_norm_specs(config, layer, full=False) if attention.qk_norm else {}
    return naming.attention_specs(
        config,
        layer,
        qkv_bias=attention.qkv_bias,
        **norms,
        router=naming.router_spec(config, layer),
        choice_bias=naming.choice_bias_spec(config, layer),
        mlp=naming.shared_expert_specs(config, layer),
    )
