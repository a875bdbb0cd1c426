"""GLM-4.7-Flash (Zhipu AI 2026): DeepSeek-V3's mathematics and names; its dense layers are listed."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import deepseek_v3
from specmoe_jax.models.published.config_json import named_layers, num_layers
from specmoe_jax.models.published.parse import first_dense

ARCHITECTURE = "Glm4MoeLiteForCausalLM"

weight_specs, expert_layouts = deepseek_v3.weight_specs, deepseek_v3.expert_layouts


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    types = named_layers(raw, "mlp_layer_types", num_layers(raw), ("dense", "sparse"))
    dense = first_dense(raw, default=1) if types is None else frozenset(i for i, kind in enumerate(types) if kind == "dense")
    return deepseek_v3.latent_model(raw, family="glm4_moe_lite", dense=dense, scaling=1.8, default_eps=1e-5)


def canonical_name(name: str) -> str:
    return name
