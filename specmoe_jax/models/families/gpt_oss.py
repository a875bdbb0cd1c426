"""GPT-OSS (OpenAI 2025): attention sinks, windows in every other layer, clamped SwiGLU with biases, bf16 or MXFP4 experts."""

import dataclasses

import numpy as np

from specmoe_jax.config.layer_config import AttentionConfig, RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import layer_types, num_layers, number, require, size
from specmoe_jax.models.published.parse import grouped_attention, model_config
from specmoe_jax.models.spec import LayerWeights, Layout, Part, TensorSpec, Weights, down_bias_of, outer_of

ARCHITECTURE = "GptOssForCausalLM"
MXFP4_GROUP = 32  # weights that share an exponent, two to a byte


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    require(raw, "hidden_act", "silu")
    require(raw, "attention_bias", True)
    count = num_layers(raw)
    types = layer_types(raw, count, ("full_attention", "sliding_attention"))
    sliding = types or ("sliding_attention", "full_attention") * -(-count // 2)
    router = RouterConfig(
        num_experts=size(raw, "num_local_experts", "num_experts"),
        experts_per_token=size(raw, "num_experts_per_tok", "experts_per_token"),
        renormalise=True,  # softmax over the chosen logits is softmax over all, renormalised
    )

    def attention_of(layer: int, attention: AttentionConfig) -> AttentionConfig:
        window = size(raw, "sliding_window") if sliding[layer] == "sliding_attention" else None
        return dataclasses.replace(attention, window=window)

    return model_config(
        raw,
        family="gpt_oss",
        attention=grouped_attention(raw, default_theta=150000.0),
        attention_of=attention_of,
        router=router,
        expert_hidden=size(raw, "intermediate_size"),
        default_eps=1e-5,
        activation="clamped_swiglu",
        biased=True,
        alpha=number(raw, "swiglu_alpha", 1.702),
        limit=number(raw, "swiglu_limit", 7.0),
    )


def weight_specs(config: ModelConfig) -> Weights:
    """Specs of everything but the experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def expert_layouts(config: ModelConfig, layer: int, expert: int) -> tuple[Layout, ...]:
    """bf16 as [in, out], and MXFP4 as [out, in] in groups of 32; the biases are the same."""
    experts, hidden, model = config.num_experts, config.expert_hidden, config.hidden_size
    prefix = f"model.layers.{layer}.mlp.experts"
    biases = (
        Part(TensorSpec(f"{prefix}.gate_up_proj_bias", (experts, 2 * hidden)), gate_up_bias_of, expert),
        Part(TensorSpec(f"{prefix}.down_proj_bias", (experts, model)), down_bias_of, expert),
    )
    plain = (
        Part(TensorSpec(f"{prefix}.gate_up_proj", (experts, model, 2 * hidden)), gate_up_columns_of, expert),
        Part(TensorSpec(f"{prefix}.down_proj", (experts, hidden, model)), down_rows_of, expert),
    )
    packed = (
        _packed_part(f"{prefix}.gate_up_proj", (experts, 2 * hidden, model), gate_up_rows_of, expert),
        _packed_part(f"{prefix}.down_proj", (experts, model, hidden), outer_of, expert),
    )
    return ((*plain, *biases), (*packed, *biases))


def canonical_name(name: str) -> str:
    return name


def gate_up_columns_of(block: np.ndarray) -> np.ndarray:
    """[M, F, 2]: gate and up alternate in the columns."""
    return block[:2, :-1, :-1].transpose(2, 1, 0)


def gate_up_rows_of(block: np.ndarray) -> np.ndarray:
    """[F, 2, M]: gate and up alternate in the rows."""
    return block[:2, :-1, :-1].transpose(1, 0, 2)


def down_rows_of(block: np.ndarray) -> np.ndarray:
    """[F, M]."""
    return block[2, :-1, :-1]


def gate_up_bias_of(block: np.ndarray) -> np.ndarray:
    """[F, 2]: the last column of gate and up."""
    return block[:2, :-1, -1].T


def _packed_part(name: str, shape: tuple[int, int, int], view, expert: int) -> Part:
    experts, rows, columns = shape
    groups = columns // MXFP4_GROUP
    return Part(
        TensorSpec(f"{name}_blocks", (experts, rows, groups, MXFP4_GROUP // 2)),
        view,
        expert,
        scales=TensorSpec(f"{name}_scales", (experts, rows, groups)),
    )


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights:
    prefix, num_heads = f"model.layers.{layer}", config.layers[layer].attention.num_heads
    return naming.attention_specs(
        config,
        layer,
        qkv_bias=True,
        o_bias=True,
        sinks=TensorSpec(f"{prefix}.self_attn.sinks", (num_heads,)),
        router=naming.router_spec(config, layer, "mlp.router"),
        router_bias=TensorSpec(f"{prefix}.mlp.router.bias", (config.num_experts,)),
    )
