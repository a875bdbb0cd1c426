"""Mixtral (Jiang et al. 2024): config.json keys, tensor names and shapes. The mathematics is in layers.py."""

from specmoe_jax.config import ModelConfig
from specmoe_jax.errors import CheckpointError
from specmoe_jax.models.spec import ExpertSpec, LayerWeights, TensorSpec, Weights

ARCHITECTURE = "MixtralForCausalLM"


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    hidden, heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    config = ModelConfig(
        family="mixtral",
        vocab_size=_size(raw, "vocab_size"),
        hidden_size=hidden,
        num_layers=_size(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_size(raw, "num_key_value_heads"),
        head_dim=raw.get("head_dim") or hidden // heads,
        expert_hidden=_size(raw, "intermediate_size"),
        num_experts=_size(raw, "num_local_experts"),
        experts_per_token=_size(raw, "num_experts_per_tok"),
        max_positions=_size(raw, "max_position_embeddings"),
        rope_theta=_rope_theta(raw),
        norm_eps=float(raw.get("rms_norm_eps", 1e-5)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        sliding_window=raw.get("sliding_window"),
        eos_token_ids=_token_ids(raw.get("eos_token_id")),
    )
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        )
    if config.experts_per_token > config.num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok {config.experts_per_token} is more than num_local_experts {config.num_experts}"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act is {raw['hidden_act']!r}; this family is built with 'silu'")
    return config


def weight_specs(config: ModelConfig) -> Weights:
    """Specs of everything but the experts, in checkpoint names."""
    vocab_by_model = (config.vocab_size, config.hidden_size)
    return Weights(
        embed=TensorSpec("model.embed_tokens.weight", vocab_by_model),
        layers=tuple(_layer_specs(config, layer) for layer in range(config.num_layers)),
        final_norm=TensorSpec("model.norm.weight", (config.hidden_size,), "ones"),
        lm_head=None if config.tie_embeddings else TensorSpec("lm_head.weight", vocab_by_model),
    )


def expert_specs(config: ModelConfig, layer: int, expert: int) -> ExpertSpec:
    """Specs of one expert, in the per-expert names of published checkpoints."""
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    wide = (config.expert_hidden, config.hidden_size)
    return ExpertSpec(
        gate=TensorSpec(f"{prefix}.w1.weight", wide),
        up=TensorSpec(f"{prefix}.w3.weight", wide),
        down=TensorSpec(f"{prefix}.w2.weight", wide[::-1]),
    )


def fused_expert_specs(config: ModelConfig, layer: int) -> tuple[TensorSpec, TensorSpec]:
    """(gate_up, down) of all experts of a layer, as newer writers may fuse them (gate is the first half of gate_up)."""
    prefix = f"model.layers.{layer}.mlp.experts"
    wide = (config.num_experts, 2 * config.expert_hidden, config.hidden_size)
    narrow = (config.num_experts, config.hidden_size, config.expert_hidden)
    return TensorSpec(f"{prefix}.gate_up_proj", wide), TensorSpec(f"{prefix}.down_proj", narrow)


def canonical_name(name: str) -> str:
    """The name that the specs use, of any name that this family's tensors are stored under."""
    return name.replace(".mlp.gate.", ".block_sparse_moe.gate.")  # the router's, where experts are fused


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights:
    prefix, hidden = f"model.layers.{layer}", config.hidden_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return LayerWeights(
        input_norm=TensorSpec(f"{prefix}.input_layernorm.weight", (hidden,), "ones"),
        q=TensorSpec(f"{prefix}.self_attn.q_proj.weight", (q_width, hidden)),
        k=TensorSpec(f"{prefix}.self_attn.k_proj.weight", (kv_width, hidden)),
        v=TensorSpec(f"{prefix}.self_attn.v_proj.weight", (kv_width, hidden)),
        o=TensorSpec(f"{prefix}.self_attn.o_proj.weight", (hidden, q_width)),
        post_norm=TensorSpec(f"{prefix}.post_attention_layernorm.weight", (hidden,), "ones"),
        router=TensorSpec(f"{prefix}.block_sparse_moe.gate.weight", (config.num_experts, hidden)),
    )


def _size(raw: dict, key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}; it must be a whole number of at least 1")
    return value


def _rope_theta(raw: dict) -> float:
    """Newer configs hold rope_parameters {rope_theta, rope_type}, older ones rope_theta alone."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"config.json: rope_type is {kind!r}; this family is built with 'default'")
    return float(parameters.get("rope_theta", raw.get("rope_theta", 1e6)))


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
