"""GLM-4.7-Flash (Zhipu AI 2026): DeepSeek-V3's mathematics and names; its dense layers are listed."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import deepseek_v3
from specmoe_jax.models.published.parse import listed_dense

ARCHITECTURE = "Glm4MoeLiteForCausalLM"

weight_specs, expert_layouts = deepseek_v3.weight_specs, deepseek_v3.expert_layouts


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    dense = listed_dense(raw, default=1)
    return deepseek_v3.latent_model(raw, family="glm4_moe_lite", dense=dense, scaling=1.8, default_eps=1e-5)


def canonical_name(name: str) -> str:
    return name
