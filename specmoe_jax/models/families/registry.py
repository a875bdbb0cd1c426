"""The families that can be run, by the `architectures` entry of config.json."""

from types import ModuleType

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granite_moe,
    llama4,
    minimax_m2,
    mixtral,
    nllb_moe,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    qwen3_vl_moe,
)
from specmoe_jax.support.errors import CheckpointError

FAMILIES: dict[str, ModuleType] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "qwen2_moe": qwen2_moe,
    "olmoe": olmoe,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "glm4_moe": glm4_moe,
    "glm4_moe_lite": glm4_moe_lite,
    "minimax_m2": minimax_m2,
    "granite_moe": granite_moe,
    "qwen3_vl_moe": qwen3_vl_moe,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
    "nllb_moe": nllb_moe,
}


def family_of(config: ModelConfig) -> ModuleType:
    """The module with `parse_config`, `weight_specs` and `expert_layouts` of a model's family."""
    return FAMILIES[config.family]


def wrappers(family: ModuleType) -> tuple[str, ...]:
    """Architectures of models with other parts beside this family's text part, which stands under text_config."""
    return getattr(family, "WRAPPERS", ())


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig of a config.json. Raises CheckpointError for an architecture that is not built."""
    architectures = raw.get("architectures") or []
    text = raw.get("text_config")
    for family in FAMILIES.values():
        if isinstance(text, dict) and set(wrappers(family)).intersection(architectures):
            return family.parse_config({"tie_word_embeddings": raw.get("tie_word_embeddings")} | text)
        if family.ARCHITECTURE in architectures:
            return family.parse_config(raw)
    known = ", ".join(name for family in FAMILIES.values() for name in (family.ARCHITECTURE, *wrappers(family)))
    raise CheckpointError(f"config.json: architectures is {architectures!r}; this version runs {known}")
