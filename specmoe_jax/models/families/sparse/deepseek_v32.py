"""DeepSeek-V3.2 (DeepSeek-AI 2025): V3 with an indexer that chooses the `index_topk` positions that a query attends."""

import dataclasses

from specmoe_jax.config.layer_config import AttentionConfig, Indexer
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import deepseek_v3
from specmoe_jax.models.published.config_json import flag, size
from specmoe_jax.models.published.parse import first_dense
from specmoe_jax.support.errors import CheckpointError

ARCHITECTURE = "DeepseekV32ForCausalLM"

weight_specs, expert_layouts = deepseek_v3.weight_specs, deepseek_v3.expert_layouts
canonical_name = deepseek_v3.canonical_name


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    return deepseek_v3.latent_model(
        raw,
        family="deepseek_v32",
        dense=first_dense(raw, default=3),
        scaling=2.5,
        default_eps=1e-6,
        attention_of=lambda layer, attention: indexed(raw, attention, heads=64, interleaved=False),
    )


def indexed(raw: dict, attention: AttentionConfig, *, heads: int, interleaved: bool) -> AttentionConfig:
    """Latent attention with the indexer. heads, interleaved: where config.json does not say; frequencies are the attention's."""
    latent, rope = attention.latent, attention.rope
    assert latent is not None and rope is not None
    size(raw, "q_lora_rank")  # the indexer reads the compressed queries
    dim = size(raw, "index_head_dim", default=128)
    if dim < latent.rope:
        raise CheckpointError(f"config.json: index_head_dim is {dim}; it must be at least qk_rope_head_dim, {latent.rope}")
    return dataclasses.replace(
        attention,
        head_dim=latent.rank + max(latent.rope, dim),
        indexer=Indexer(
            heads=size(raw, "index_n_heads", default=heads),
            dim=dim,
            kept=size(raw, "index_topk", default=2048),
            rope=dataclasses.replace(rope, interleaved=flag(raw, "indexer_rope_interleave", interleaved)),
        ),
    )
