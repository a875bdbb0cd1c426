"""Granite-MoE (IBM 2024): Mixtral with multipliers of embeddings, scores, residuals and logits; experts fused."""

import dataclasses

from specmoe_jax.config.layer_config import Embedding, RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import positive, require, size
from specmoe_jax.models.published.parse import grouped_attention, model_config
from specmoe_jax.models.spec import LayerWeights, Layout, Weights

ARCHITECTURE = "GraniteMoeForCausalLM"


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value.

    What experts add to the residual is a sum by the router's weights, so its multiplier is the router's scaling.
    """
    require(raw, "hidden_act", "silu")
    require(raw, "attention_bias", False)
    residual = positive(raw, "residual_multiplier", 1.0)
    router = RouterConfig(
        num_experts=size(raw, "num_local_experts"),
        experts_per_token=size(raw, "num_experts_per_tok"),
        renormalise=True,
        scaling=residual,
    )
    attention = grouped_attention(raw, default_theta=1e4)
    config = model_config(
        raw,
        family="granite_moe",
        attention=dataclasses.replace(attention, scale=positive(raw, "attention_multiplier", 1.0)),
        router=router,
        expert_hidden=size(raw, "intermediate_size"),
        default_eps=1e-6,
        residual_scale=residual,
    )
    return dataclasses.replace(
        config,
        embedding=Embedding(scale=positive(raw, "embedding_multiplier", 1.0)),
        logits_divisor=positive(raw, "logits_scaling", 1.0),
    )


def weight_specs(config: ModelConfig) -> Weights:
    """Specs of everything but the experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def expert_layouts(config: ModelConfig, layer: int, expert: int) -> tuple[Layout, ...]:
    """The ways in which an expert may be stored; the first is what is published."""
    prefix, experts = f"model.layers.{layer}.block_sparse_moe", (config.experts, config.num_experts)
    return (
        naming.fused_layout(*experts, prefix, expert, ("input_linear.weight", "output_linear.weight")),
        naming.fused_layout(*experts, f"{prefix}.experts", expert),
    )


def canonical_name(name: str) -> str:
    """The name that the specs use, of any name that this family's tensors are stored under."""
    return name.replace(".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight")


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights:
    return naming.attention_specs(config, layer, router=naming.router_spec(config, layer, "block_sparse_moe.router.layer"))
