"""Llama-4, text part (Meta 2025): one expert a token, gated on its input; chunked attention; layers without positions."""

import dataclasses

from specmoe_jax.config.layer_config import AttentionConfig, RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import (
    flag,
    layer_numbers,
    layer_types,
    num_layers,
    number,
    require,
    show,
    size,
    window,
)
from specmoe_jax.models.published.parse import grouped_attention, model_config
from specmoe_jax.models.spec import LayerWeights, Layout, Weights
from specmoe_jax.support.errors import CheckpointError

ARCHITECTURE = "Llama4ForCausalLM"
WRAPPERS = ("Llama4ForConditionalGeneration",)


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    for key in ("hidden_act", "attention_bias", "num_experts_per_tok"):
        require(raw, key, {"hidden_act": "silu", "attention_bias": False, "num_experts_per_tok": 1}[key])
    count = num_layers(raw)
    rotated = _rotated_layers(raw, count)
    chunked = _chunked_layers(raw, count, rotated)
    dense = frozenset(range(count)) - _moe_layers(raw, count)
    temperature = (number(raw, "floor_scale", 8192), number(raw, "attn_scale", 0.1))
    if temperature[0] <= 0:
        raise CheckpointError(f"config.json: floor_scale is {temperature[0]}; it must be above 0")
    tempered = flag(raw, "attn_temperature_tuning", True)

    def attention_of(layer: int, attention: AttentionConfig) -> AttentionConfig:
        attention = dataclasses.replace(attention, chunk=window(raw, "attention_chunk_size") if layer in chunked else None)
        if layer in rotated:
            return dataclasses.replace(attention, l2_norm=flag(raw, "use_qk_norm", True))
        return dataclasses.replace(attention, rope=None, temperature=temperature if tempered else None)

    return model_config(
        raw,
        family="llama4",
        attention=grouped_attention(raw, default_theta=5e5, interleaved=True),
        attention_of=attention_of,
        router=RouterConfig(
            num_experts=size(raw, "num_local_experts", "num_experts"), experts_per_token=1, rule="sigmoid", on_input=True
        ),
        expert_hidden=size(raw, "intermediate_size"),
        shared_hidden=size(raw, "intermediate_size"),
        dense=dense,
        dense_hidden=size(raw, "intermediate_size_mlp") if dense else None,
        default_eps=1e-5,
    )


def weight_specs(config: ModelConfig) -> Weights:
    """Specs of everything but the routed experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def expert_layouts(config: ModelConfig, layer: int, expert: int) -> tuple[Layout, ...]:
    """Always fused, stored [in, out]."""
    prefix = f"model.layers.{layer}.feed_forward.experts"
    return (naming.transposed_layout(config.experts, config.num_experts, prefix, expert),)


def canonical_name(name: str) -> str:
    return name


def _rotated_layers(raw: dict, count: int) -> frozenset[int]:
    """Layers with rotary positions: `no_rope_layers` holds a 1 for each of them, its name notwithstanding."""
    marks = layer_numbers(raw, "no_rope_layers")
    if not marks:
        interval = size(raw, "no_rope_layer_interval", default=4)
        return frozenset(i for i in range(count) if (i + 1) % interval)
    if len(marks) < count:
        raise CheckpointError(f"config.json: no_rope_layers has {len(marks)} entries; there are {count} layers")
    return frozenset(i for i in range(count) if marks[i])


def _chunked_layers(raw: dict, count: int, rotated: frozenset[int]) -> frozenset[int]:
    types = layer_types(raw, count, ("full_attention", "chunked_attention"))
    return rotated if types is None else frozenset(i for i, kind in enumerate(types) if kind == "chunked_attention")


def _moe_layers(raw: dict, count: int) -> frozenset[int]:
    if raw.get("moe_layers") is None:
        step = size(raw, "interleave_moe_layer_step", default=1)
        return frozenset(range(step - 1, count, step))
    layers = layer_numbers(raw, "moe_layers")
    if any(not 0 <= layer < count for layer in layers):
        raise CheckpointError(f"config.json: moe_layers is {show(layers)}; there are layers 0 to {count - 1}")
    return frozenset(layers)


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights:
    dense = config.layers[layer].router is None
    return naming.attention_specs(
        config,
        layer,
        router=naming.router_spec(config, layer, "feed_forward.router"),
        mlp=naming.mlp_specs(config, layer, "feed_forward" if dense else "feed_forward.shared_expert"),
    )
