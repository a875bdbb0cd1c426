"""The families that can be run, by the class that config.json names, or by its model_type where it names none."""

import importlib
from types import ModuleType

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published.config_json import show
from specmoe_jax.support.errors import CheckpointError

# One line a family: its module in this folder. Where two families could read a config, the first one does.
_MODULES = (
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "glm4_moe_lite",
    "minimax_m2",
    "granite_moe",
    "qwen3_vl_moe",
    "gpt_oss",
    "llama4",
    "nllb_moe",
    "hybrid.qwen3_next",
    "hybrid.qwen3_5_moe",
    "hybrid.mimo_v2_flash",
    "sparse.deepseek_v32",
    "sparse.glm_moe_dsa",
)
FAMILIES: dict[str, ModuleType] = {name.rpartition(".")[2]: importlib.import_module(f"{__package__}.{name}") for name in _MODULES}
OTHER_TYPES = {"granitemoe": "granite_moe", "kimi_k2": "deepseek_v3", "kimi_k25": "deepseek_v3"}  # model_type -> family


def family_of(config: ModelConfig) -> ModuleType:
    """The module with `parse_config`, `weight_specs` and `expert_layouts` of a model's family."""
    return FAMILIES[config.family]


def wrappers(family: ModuleType) -> tuple[str, ...]:
    """Architectures of models with other parts beside this family's text part, which stands under text_config."""
    return getattr(family, "WRAPPERS", ())


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig of a config.json. Raises CheckpointError for an architecture that is not built."""
    classes = raw.get("architectures") or []
    named = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
    for key, family in FAMILIES.items():
        text = {"tie_word_embeddings": raw.get("tie_word_embeddings")} | raw["text_config"] if _has_text_part(raw, family) else None
        if any(name in _class_names(family) for name in named) or (not classes and _model_type(raw) == key):
            return family.parse_config(text or raw)
        if any(name in wrappers(family) for name in named) and (text or _model_type(raw) == key):  # some are written flat
            return family.parse_config(text or raw)
    known = ", ".join(name for family in FAMILIES.values() for name in (family.ARCHITECTURE, *wrappers(family)))
    got = f"architectures is {show(classes)}" if classes else f"no architectures, and model_type is {show(raw.get('model_type'))}"
    raise CheckpointError(f"config.json: {got}; this version runs {known}")


def _class_names(family: ModuleType) -> tuple[str, ...]:
    """The class with the output matrix, and the base class that some checkpoints were saved from."""
    stem = family.ARCHITECTURE.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    return family.ARCHITECTURE, f"{stem}Model", f"{stem}TextModel"


def _model_type(raw: dict) -> str | None:
    """The key of the family that model_type names."""
    model_type = raw.get("model_type")
    key = model_type.replace("-", "_").removesuffix("_text") if isinstance(model_type, str) else None
    return None if key is None else OTHER_TYPES.get(key, key)


def _has_text_part(raw: dict, family: ModuleType) -> bool:
    """Whether the config of the language model is an object of its own, beside other parts."""
    return bool(wrappers(family)) and isinstance(raw.get("text_config"), dict)
