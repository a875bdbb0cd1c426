"""Qwen3-MoE (Qwen Team 2025): query and key norms per head, optional dense layers."""

from specmoe_jax.config.layer_config import RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import flag, require, size, window
from specmoe_jax.models.published.parse import dense_layers, grouped_attention, model_config
from specmoe_jax.models.spec import LayerWeights, Weights

ARCHITECTURE = "Qwen3MoeForCausalLM"

expert_layouts = naming.swiglu_layouts


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    require(raw, "hidden_act", "silu")
    require(raw, "attention_bias", False)
    sliding = flag(raw, "use_sliding_window")
    router = RouterConfig(
        num_experts=size(raw, "num_experts", "num_local_experts"),
        experts_per_token=size(raw, "num_experts_per_tok"),
        renormalise=flag(raw, "norm_topk_prob"),
    )
    return model_config(
        raw,
        family="qwen3_moe",
        attention=grouped_attention(raw, default_theta=1e6, window=window(raw) if sliding else None),
        router=router,
        expert_hidden=size(raw, "moe_intermediate_size"),
        dense=dense_layers(raw),
        dense_hidden=size(raw, "intermediate_size") if dense_layers(raw) else None,
        default_eps=1e-6,
    )


def weight_specs(config: ModelConfig) -> Weights:
    """Specs of everything but the routed experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def canonical_name(name: str) -> str:
    return name


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights:
    return naming.attention_specs(
        config,
        layer,
        **naming.qk_norm_specs(config, layer, full=False),
        router=naming.router_spec(config, layer),
        mlp=naming.mlp_specs(config, layer, "mlp"),
    )
