"""Qwen2-MoE (Qwen Team 2024): a gated shared expert beside the routed ones, biases on queries, keys and values."""

import dataclasses

from specmoe_jax.config.layer_config import AttentionConfig, RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import flag, layer_types, num_layers, require, size, window
from specmoe_jax.models.published.parse import dense_layers, grouped_attention, model_config
from specmoe_jax.models.spec import LayerWeights, TensorSpec, Weights

ARCHITECTURE = "Qwen2MoeForCausalLM"

expert_layouts = naming.swiglu_layouts


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    require(raw, "hidden_act", "silu")
    require(raw, "qkv_bias", True)
    sliding = _sliding_layers(raw)
    router = RouterConfig(
        num_experts=size(raw, "num_experts", "num_local_experts"),
        experts_per_token=size(raw, "num_experts_per_tok"),
        renormalise=flag(raw, "norm_topk_prob"),
    )

    def attention_of(layer: int, attention: AttentionConfig) -> AttentionConfig:
        return dataclasses.replace(attention, window=size(raw, "sliding_window")) if layer in sliding else attention

    return model_config(
        raw,
        family="qwen2_moe",
        attention=grouped_attention(raw, default_theta=1e6),
        attention_of=attention_of,
        router=router,
        expert_hidden=size(raw, "moe_intermediate_size"),
        shared_hidden=size(raw, "shared_expert_intermediate_size"),
        dense=dense_layers(raw),
        dense_hidden=size(raw, "intermediate_size") if dense_layers(raw) else None,
        default_eps=1e-6,
    )


def weight_specs(config: ModelConfig) -> Weights:
    """Specs of everything but the routed experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def canonical_name(name: str) -> str:
    return name


def _sliding_layers(raw: dict) -> frozenset[int]:
    """Layers with a window. Older configs have no layer_types: every other of the first max_window_layers."""
    count = num_layers(raw)
    if not flag(raw, "use_sliding_window") or window(raw) is None:
        return frozenset()
    types = layer_types(raw, count, ("full_attention", "sliding_attention"))
    if types is None:
        return frozenset(range(0, min(count, size(raw, "max_window_layers", default=28)), 2))
    return frozenset(i for i, kind in enumerate(types) if kind == "sliding_attention")


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights:
    if config.layers[layer].router is None:
        return naming.attention_specs(config, layer, qkv_bias=True, mlp=naming.mlp_specs(config, layer, "mlp"))
    return naming.attention_specs(
        config,
        layer,
        qkv_bias=True,
        router=naming.router_spec(config, layer),
        mlp=naming.mlp_specs(config, layer, "mlp.shared_expert"),
        shared_gate=TensorSpec(f"model.layers.{layer}.mlp.shared_expert_gate.weight", (1, config.hidden_size)),
    )
