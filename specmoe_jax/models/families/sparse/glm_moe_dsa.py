"""GLM-5, 5.1 and 5.2 (Zhipu AI 2026): DeepSeek-V3.2's mathematics and names, without groups; its dense layers may be listed."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import deepseek_v3
from specmoe_jax.models.families.sparse import deepseek_v32
from specmoe_jax.models.published.parse import listed_dense

ARCHITECTURE = "GlmMoeDsaForCausalLM"

weight_specs, expert_layouts = deepseek_v32.weight_specs, deepseek_v32.expert_layouts
canonical_name = deepseek_v32.canonical_name


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    dense = listed_dense(raw, default=3)
    config = deepseek_v3.latent_model(raw, family="glm_moe_dsa", dense=dense, scaling=2.5, default_eps=1e-5)
    return deepseek_v32.within_index(raw, config)
