"""The families that can be run, by the `architectures` entry of config.json."""

from types import ModuleType

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import deepseek_v2, gpt_oss, llama4, mixtral, nllb_moe, olmoe, qwen2_moe, qwen3_moe
from specmoe_jax.support.errors import CheckpointError

FAMILIES: dict[str, ModuleType] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "qwen2_moe": qwen2_moe,
    "olmoe": olmoe,
    "deepseek_v2": deepseek_v2,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
    "nllb_moe": nllb_moe,
}


def family_of(config: ModelConfig) -> ModuleType:
    """The module with `parse_config`, `weight_specs` and `expert_layouts` of a model's family."""
    return FAMILIES[config.family]


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig of a config.json. Raises CheckpointError for an architecture that is not built."""
    architectures = raw.get("architectures") or []
    if llama4.WITH_VISION in architectures and isinstance(raw.get("text_config"), dict):
        return llama4.parse_config({"tie_word_embeddings": raw.get("tie_word_embeddings")} | raw["text_config"])
    for family in FAMILIES.values():
        if family.ARCHITECTURE in architectures:
            return family.parse_config(raw)
    known = ", ".join(family.ARCHITECTURE for family in FAMILIES.values())
    raise CheckpointError(f"config.json: architectures is {architectures!r}; this version runs {known}")
