"""DeepSeek-V3.2 (DeepSeek-AI 2025): V3 with an indexer that keeps the `index_topk` best keys of a longer context.

The indexer is not built: up to that many positions it keeps all of them, so they are the window here.
"""

import dataclasses

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import deepseek_v3
from specmoe_jax.models.published.config_json import size
from specmoe_jax.models.published.parse import first_dense

ARCHITECTURE = "DeepseekV32ForCausalLM"

weight_specs, expert_layouts = deepseek_v3.weight_specs, deepseek_v3.expert_layouts


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    dense = first_dense(raw, default=3)
    return within_index(raw, deepseek_v3.latent_model(raw, family="deepseek_v32", dense=dense, scaling=2.5, default_eps=1e-6))


def within_index(raw: dict, config: ModelConfig) -> ModelConfig:
    """The config with a window in which nothing is left out by an indexer."""
    kept = size(raw, "index_topk", default=2048)
    if kept >= config.max_positions:
        return config
    return dataclasses.replace(
        config, max_positions=kept, window_reason=f"the model is exact as plain MLA up to index_topk tokens, {kept}"
    )


def canonical_name(name: str) -> str | None:
    """None for what the indexer is made of."""
    return None if ".self_attn.indexer." in name else name
