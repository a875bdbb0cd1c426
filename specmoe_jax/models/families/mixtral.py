"""Mixtral (Jiang et al. 2024): config.json keys, tensor names and shapes. The mathematics is in layers.py."""

from specmoe_jax.config.layer_config import RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import require, size, window
from specmoe_jax.models.published.parse import grouped_attention, model_config
from specmoe_jax.models.spec import LayerWeights, Layout, TensorSpec, Weights

ARCHITECTURE = "MixtralForCausalLM"


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    require(raw, "hidden_act", "silu")
    router = RouterConfig(
        num_experts=size(raw, "num_local_experts", "num_experts"),
        experts_per_token=size(raw, "num_experts_per_tok"),
        renormalise=True,
    )
    return model_config(
        raw,
        family="mixtral",
        attention=grouped_attention(raw, default_theta=1e6, window=window(raw)),
        router=router,
        expert_hidden=size(raw, "intermediate_size"),
        default_eps=1e-5,
    )


def config_json(config: ModelConfig, dtype: str) -> dict:
    """The keys of a config.json of this model as transformers reads it, weights in `dtype`: the inverse of parse_config."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "mixtral",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "sliding_window": config.sliding_window,
        "attention_dropout": 0.0,
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
    }


def weight_specs(config: ModelConfig) -> Weights:
    """Specs of everything but the experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def expert_layouts(config: ModelConfig, layer: int, expert: int) -> tuple[Layout, ...]:
    """The ways in which an expert may be stored; the first is what is published."""
    prefix = f"model.layers.{layer}"
    return (
        naming.separate_layout(config.experts, f"{prefix}.block_sparse_moe.experts.{expert}", "w1", "w3", "w2"),
        naming.fused_layout(config.experts, config.num_experts, f"{prefix}.mlp.experts", expert),
    )


def expert_specs(config: ModelConfig, layer: int, expert: int) -> tuple[TensorSpec, ...]:
    """Specs of one expert, gate, up and down, in the per-expert names of published checkpoints."""
    return tuple(part.spec for part in expert_layouts(config, layer, expert)[0])


def canonical_name(name: str) -> str:
    """The name that the specs use, of any name that this family's tensors are stored under."""
    return name.replace(".mlp.gate.", ".block_sparse_moe.gate.")  # the router's, where experts are fused


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights:
    return naming.attention_specs(config, layer, router=naming.router_spec(config, layer, "block_sparse_moe.gate"))
