"""Packing kinds by name."""

import dataclasses
import functools
import importlib

from specmoe_jax.config.layer_config import ExpertConfig
from specmoe_jax.config.plan_fields import DECODED
from specmoe_jax.models.packing.kind import PackingKind
from specmoe_jax.support.errors import CheckpointError

LOSSLESS = "lossless"  # the one that a conversion makes
# One line a kind: its module in kinds. ExpertConfig.packing is such a name, with the kind's parameters behind a colon if it
# has any.
KINDS = ("int8", "int4", "fp8", "fp8_rows", "mxfp4", "awq", "gptq", "compressed", "nvfp4", "gguf", LOSSLESS)


@functools.cache
def kind_of(packing: str) -> PackingKind:
    """The kind that ExpertConfig.packing names. Raises CheckpointError for an unknown one."""
    name, _, parameters = packing.partition(":")
    if name not in KINDS:
        raise CheckpointError(f"experts are packed as {packing!r}; this version knows {', '.join(KINDS)}")
    try:
        return importlib.import_module(f"{__package__}.kinds.{name}").kind(parameters)
    except ValueError as e:
        raise CheckpointError(f"experts are packed as {packing!r}, whose parameters are none of {name} ({e})") from e


def is_published(packing: str | None) -> bool:
    """Whether experts are packed as their checkpoint holds them."""
    return packing is not None and kind_of(packing).published


def planned(config: ExpertConfig, expert_dtype: str | None) -> ExpertConfig:
    """An expert under a plan: packed as it asks (Plan.expert_dtype), else as its checkpoint holds it."""
    if expert_dtype is None:
        return config if is_published(config.packing) else dataclasses.replace(config, packing=None)
    return dataclasses.replace(config, packing=None if expert_dtype == DECODED else expert_dtype)
