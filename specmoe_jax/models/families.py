"""The families that can be run, by the `architectures` entry of config.json."""

from types import ModuleType

from specmoe_jax.config import ModelConfig
from specmoe_jax.errors import CheckpointError
from specmoe_jax.models import mixtral

FAMILIES: dict[str, ModuleType] = {"mixtral": mixtral}


def family_of(config: ModelConfig) -> ModuleType:
    """The module with `parse_config`, `weight_specs` and `expert_specs` of a model's family."""
    return FAMILIES[config.family]


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig of a config.json. Raises CheckpointError for an architecture that is not built."""
    architectures = raw.get("architectures") or []
    for family in FAMILIES.values():
        if family.ARCHITECTURE in architectures:
            return family.parse_config(raw)
    known = ", ".join(family.ARCHITECTURE for family in FAMILIES.values())
    raise CheckpointError(f"config.json: architectures is {architectures!r}; this version runs {known}")
