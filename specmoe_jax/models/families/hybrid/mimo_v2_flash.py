"""MiMo-V2-Flash (Xiaomi 2025): five layers with a window and sinks to one that attends all, of other KV heads; V3's router."""

import dataclasses

from specmoe_jax.config.layer_config import AttentionConfig, LayerConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import layer_types, named_layers, num_layers, number, require, show, size
from specmoe_jax.models.published.parse import biased_router, grouped_attention, model_config
from specmoe_jax.models.spec import LayerWeights, TensorSpec, Weights
from specmoe_jax.support.errors import CheckpointError

ARCHITECTURE = "MiMoV2FlashForCausalLM"
TYPES = ("full_attention", "sliding_attention")
FURTHER, FURTHER_LAYERS = "model.mtp.layers.", 3  # which config.json does not count
THETAS = {"full_attention": ("rope_theta", 5e6), "sliding_attention": ("swa_rope_theta", 1e4)}

expert_layouts = naming.swiglu_layouts


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    fixed = {
        "hidden_act": "silu", "attention_bias": False, "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
        "n_shared_experts": None,
    }  # fmt: skip
    for key, value in fixed.items():
        require(raw, key, value)
    kinds, attention = _types(raw), {kind: _attention(raw, kind) for kind in TYPES}
    sparse = _sparse_layers(raw)
    dense = frozenset(range(num_layers(raw))) - sparse
    return model_config(
        raw if raw.get("rms_norm_eps") is not None else raw | {"rms_norm_eps": raw.get("layernorm_epsilon")},
        family="mimo_v2_flash",
        attention=attention["full_attention"],
        attention_of=lambda layer, _: attention[kinds[layer]],
        router=biased_router(raw, scaling=1.0),
        expert_hidden=size(raw, "moe_intermediate_size"),
        dense=dense,
        dense_hidden=size(raw, "intermediate_size") if dense else None,
        default_eps=1e-5,
        mtp_layers=FURTHER_LAYERS if dense and "sliding_attention" in kinds else 0,  # what those are made of is taken from these
    )


def _types(raw: dict) -> tuple[str, ...]:
    """Of each layer: hybrid_layer_pattern has 1 for a window; left out, the first and every sixth attend all."""
    count = num_layers(raw)
    pattern = raw.get("hybrid_layer_pattern")
    if pattern is not None:
        if not isinstance(pattern, list) or len(pattern) != count or any(kind not in (0, 1) for kind in pattern):
            raise CheckpointError(f"config.json: hybrid_layer_pattern is {show(pattern)}; it must be {count} of 0 and 1")
        return tuple(TYPES[kind] for kind in pattern)
    usual = (TYPES[0 if layer == 0 or (layer + 1) % 6 == 0 else 1] for layer in range(count))
    return layer_types(raw, count, TYPES) or tuple(usual)


def _sparse_layers(raw: dict) -> frozenset[int]:
    """Layers with experts, as either key lists them; all but the first where neither does."""
    count, listed = num_layers(raw), raw.get("moe_layer_freq")
    if isinstance(listed, list) and len(listed) == count:
        return frozenset(layer for layer, sparse in enumerate(listed) if sparse)
    types = named_layers(raw, "mlp_layer_types", count, ("dense", "sparse"))
    return frozenset(range(1, count) if types is None else (i for i, kind in enumerate(types) if kind == "sparse"))


def _attention(raw: dict, kind: str) -> AttentionConfig:
    """Of layers of one type. A window is of so many positions before one's own, which `sliding_window` counts in."""
    window, heads = None, raw
    if kind == "sliding_attention":
        heads = raw | {"num_key_value_heads": raw.get("swa_num_key_value_heads") or 2 * size(raw, "num_key_value_heads")}
        for key in ("num_attention_heads", "head_dim", "v_head_dim"):
            require(raw, f"swa_{key}", raw.get(key))
        known = raw.get("sliding_window_size") is not None
        window = size(raw, "sliding_window_size") + 1 if known else size(raw, "sliding_window")
    key, theta = THETAS[kind]
    nested = (raw.get("rope_parameters") or {}).get(kind)
    rope = nested or {"rope_theta": number(raw, key, theta), "partial_rotary_factor": number(raw, "partial_rotary_factor", 0.334)}
    attention = grouped_attention(
        heads | {"rope_parameters": rope, "rope_scaling": None}, default_theta=theta, rotated=0.334, window=window
    )
    return dataclasses.replace(attention, value_dim=size(raw, "v_head_dim"), value_scale=number(raw, "attention_value_scale", 1.0))


def weight_specs(config: ModelConfig) -> Weights[TensorSpec]:
    """Specs of everything but the routed experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def canonical_name(name: str) -> str:
    """As published; newer writers say sinks."""
    return name.replace(".self_attn.sinks", ".self_attn.attention_sink_bias")


def further_name(config: ModelConfig, name: str) -> str:
    """The usual names of the layers that predict further tokens, which are counted from 0 here."""
    if not name.startswith(FURTHER):
        return name
    index, _, rest = name.removeprefix(FURTHER).partition(".")
    for own, usual in {"pre_mlp_layernorm.": "post_attention_layernorm.", "final_layernorm.": "shared_head.norm."}.items():
        rest = rest.replace(own, usual)
    return f"model.layers.{config.num_layers + int(index)}.{rest}" if index.isdigit() else name


def further_layer(config: ModelConfig) -> LayerConfig:
    """With a window, and a dense MLP as wide as that of the first layer."""
    windowed = next(layer for layer in config.layers if layer.attention.window is not None)
    return dataclasses.replace(windowed, router=None, experts=None, mlp_hidden=_dense_hidden(config))


def _dense_hidden(config: ModelConfig) -> int | None:
    return next((layer.mlp_hidden for layer in config.layers if layer.mlp_hidden is not None), None)


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights[TensorSpec]:
    attention = config.layers[layer].attention
    sinks = TensorSpec(f"model.layers.{layer}.self_attn.attention_sink_bias", (attention.num_heads,))
    return naming.attention_specs(
        config,
        layer,
        sinks=sinks if attention.window is not None else None,
        router=naming.router_spec(config, layer),
        choice_bias=naming.choice_bias_spec(config, layer),
        mlp=naming.mlp_specs(config, layer, "mlp") if config.layers[layer].router is None else None,
    )
