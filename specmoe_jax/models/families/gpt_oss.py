"""GPT-OSS (OpenAI 2025): attention sinks, windows in every other layer, clamped SwiGLU with biases, bf16 or MXFP4 experts."""

import dataclasses

import numpy as np

from specmoe_jax.config.layer_config import AttentionConfig, RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.packing.matrices import PublishedTensor, Sections, sections_of
from specmoe_jax.models.packing.parts import PackedPart, matrix_kind, packed_part
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import layer_types, num_layers, number, require, size
from specmoe_jax.models.published.parse import grouped_attention, model_config
from specmoe_jax.models.spec import LayerWeights, Layout, Part, TensorSpec, Weights, down_bias_of

ARCHITECTURE = "GptOssForCausalLM"
FLOATS = ("BF16", "F32", "F16")  # that biases beside quantised weights are stored in


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


def weight_specs(config: ModelConfig) -> Weights[TensorSpec]:
    """Specs of everything but the experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def expert_layouts(config: ModelConfig, layer: int, expert: int) -> tuple[Layout, ...]:
    """bf16 as [in, out]."""
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
    return ((*plain, *biases),)


def packed_parts(config: ModelConfig, layer: int, expert: int) -> tuple[PackedPart, ...]:
    """Quantised as [out, in], gate and up alternating in the rows."""
    experts, hidden, model = config.experts, config.expert_hidden, config.hidden_size
    assert experts.packing is not None
    kind, prefix = matrix_kind(experts.packing), f"model.layers.{layer}.mlp.experts"
    return (
        *(
            _fused(packed_part(t, f"{prefix}.gate_up_proj"), config, expert, _gate_and_up(t))
            for t in kind.stored(2 * hidden, model)
        ),
        *(_fused(packed_part(t, f"{prefix}.down_proj", "down"), config, expert) for t in kind.stored(model, hidden)),
        PackedPart(TensorSpec(f"{prefix}.gate_up_proj_bias", (config.num_experts, 2 * hidden)), FLOATS, _inner_biases, expert),
        PackedPart(TensorSpec(f"{prefix}.down_proj_bias", (config.num_experts, model)), FLOATS, _down_biases, expert),
    )


def canonical_name(name: str) -> str:
    return name


def gate_up_columns_of(block: np.ndarray) -> np.ndarray:
    """[M, F, 2]: gate and up alternate in the columns."""
    return block[:2, :-1, :-1].transpose(2, 1, 0)


def down_rows_of(block: np.ndarray) -> np.ndarray:
    """[F, M]."""
    return block[2, :-1, :-1]


def gate_up_bias_of(block: np.ndarray) -> np.ndarray:
    """[F, 2]: the last column of gate and up."""
    return block[:2, :-1, -1].T


def _fused(part: PackedPart, config: ModelConfig, expert: int, fill=None) -> PackedPart:
    """The part as an entry of a tensor of all experts."""
    shape = (config.num_experts, *part.spec.shape)
    return part._replace(spec=part.spec._replace(shape=shape), index=expert, fill=fill or part.fill)


def _gate_and_up(stored: PublishedTensor):
    """Fills gate from the even rows, up from the odd ones."""

    def fill(parts: Sections, values: np.ndarray) -> None:
        for matrix, rows in (("gate", values[::2]), ("up", values[1::2])):
            stored.fill(sections_of(parts, matrix), rows)

    return fill


def _inner_biases(parts: Sections, values: np.ndarray) -> None:
    parts["biases"][: values.size] = values.reshape(-1, 2).T.reshape(-1)


def _down_biases(parts: Sections, values: np.ndarray) -> None:
    parts["biases"][-values.size :] = values


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights[TensorSpec]:
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
