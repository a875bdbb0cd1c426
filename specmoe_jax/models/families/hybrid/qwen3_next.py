"""Qwen3-Next (Qwen Team 2025): three Gated DeltaNet layers to one of gated attention, each with Qwen2-MoE's experts."""

import dataclasses
from typing import Any

from specmoe_jax.config.layer_config import AttentionConfig, Recurrence, RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import flag, layer_types, num_layers, require, size
from specmoe_jax.models.published.parse import dense_layers, grouped_attention, model_config
from specmoe_jax.models.spec import LayerWeights, TensorSpec, Weights, map_specs
from specmoe_jax.support.errors import CheckpointError

ARCHITECTURE = "Qwen3NextForCausalLM"

FURTHER = {
    "mtp.layers.0.": "", "mtp.fc.": "eh_proj.", "mtp.norm.": "shared_head.norm.", "mtp.pre_fc_norm_embedding.": "enorm.",
    "mtp.pre_fc_norm_hidden.": "hnorm.",
}  # fmt: skip

expert_layouts = naming.swiglu_layouts


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    return hybrid_model(raw, family="qwen3_next", by_key_head=True, renormalise=flag(raw, "norm_topk_prob", True))


def hybrid_model(raw: dict, *, family: str, by_key_head: bool, renormalise: bool) -> ModelConfig:
    """A decoder of this form, which Qwen3.5 has too."""
    for key, value in {"hidden_act": "silu", "attention_bias": False, "attn_output_gate": True}.items():
        require(raw, key, value)
    recurrent, recurs = _recurrent(raw, by_key_head), _recurrent_layers(raw)

    def attention_of(layer: int, attention: AttentionConfig) -> AttentionConfig:
        return recurrent if layer in recurs else attention

    router = RouterConfig(
        num_experts=size(raw, "num_experts", "num_local_experts"),
        experts_per_token=size(raw, "num_experts_per_tok"),
        renormalise=renormalise,
    )
    dense = dense_layers(raw)
    return model_config(
        raw,
        family=family,
        attention=dataclasses.replace(grouped_attention(raw, default_theta=1e7, rotated=0.25), gated=True),
        attention_of=attention_of,
        router=router,
        expert_hidden=size(raw, "moe_intermediate_size"),
        shared_hidden=size(raw, "shared_expert_intermediate_size"),
        dense=dense,
        dense_hidden=size(raw, "intermediate_size") if dense else None,
        default_eps=1e-6,
        norm_plus=1.0,
        mtp_layers=size(raw, "mtp_num_hidden_layers", default=1),
    )


def _recurrent(raw: dict, by_key_head: bool) -> AttentionConfig:
    names = {"key_heads": "num_key_heads", "value_heads": "num_value_heads", "key": "key_head_dim", "value": "value_head_dim"}
    sizes = {field: size(raw, f"linear_{key}") for field, key in names.items()}
    if sizes["value_heads"] % sizes["key_heads"]:
        raise CheckpointError(
            f"config.json: linear_num_value_heads {sizes['value_heads']} is not a multiple of linear_num_key_heads"
            f" {sizes['key_heads']}"
        )
    taps = size(raw, "linear_conv_kernel_dim", default=4)
    return AttentionConfig(
        num_heads=sizes["value_heads"],
        num_kv_heads=sizes["key_heads"],
        head_dim=sizes["value"],
        scale=sizes["key"] ** -0.5,
        rope=None,
        recurrent=Recurrence(**sizes, taps=taps, by_key_head=by_key_head),
    )


def _recurrent_layers(raw: dict) -> frozenset[int]:
    """All but every fourth, or as the config lists them."""
    count, every = num_layers(raw), size(raw, "full_attention_interval", default=4)
    types = layer_types(raw, count, ("linear_attention", "full_attention"))
    if types is None:
        types = tuple("full_attention" if (layer + 1) % every == 0 else "linear_attention" for layer in range(count))
    if "full_attention" not in types:
        raise CheckpointError("config.json: layer_types has no full_attention; this family is built with some")
    return frozenset(layer for layer, kind in enumerate(types) if kind == "linear_attention")


def weight_specs(config: ModelConfig) -> Weights[TensorSpec]:
    """Specs of everything but the routed experts, in checkpoint names."""
    return map_specs(_around_zero, naming.model_specs(config, _layer_specs))


def _around_zero(spec: TensorSpec) -> TensorSpec:
    """Random test weights of the norms that are stored less 1; that of a recurrent layer's outputs is not."""
    return spec._replace(init="normal") if spec.init == "ones" and not spec.name.endswith(".linear_attn.norm.weight") else spec


def canonical_name(name: str) -> str:
    return name


def further_name(config: ModelConfig, name: str) -> str:
    """The usual names of the layer that predicts further tokens, which stands apart here."""
    layer = f"model.layers.{config.num_layers}."
    for own, usual in FURTHER.items():
        if name.startswith(own):
            return layer + usual + name.removeprefix(own)
    return name


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights[TensorSpec]:
    kind = config.layers[layer]
    ffn: dict[str, Any] = {"mlp": naming.mlp_specs(config, layer, "mlp")}
    if kind.router is not None:
        ffn = {
            "router": naming.router_spec(config, layer),
            "mlp": naming.mlp_specs(config, layer, "mlp.shared_expert"),
            "shared_gate": TensorSpec(f"model.layers.{layer}.mlp.shared_expert_gate.weight", (1, config.hidden_size)),
        }
    if kind.attention.recurrent is not None:
        return naming.recurrent_specs(config, layer, **ffn)
    return naming.attention_specs(config, layer, **naming.qk_norm_specs(config, layer, full=False), **ffn)
