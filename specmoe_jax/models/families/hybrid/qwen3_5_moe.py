"""Qwen3.5 and Qwen3.6 MoE, text part (Qwen Team 2026): Qwen3-Next's layers, whose projections are stored apart."""

from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families.hybrid import qwen3_next

ARCHITECTURE = "Qwen3_5MoeForCausalLM"
WRAPPERS = ("Qwen3_5MoeForConditionalGeneration",)

weight_specs, expert_layouts, further_name = qwen3_next.weight_specs, qwen3_next.expert_layouts, qwen3_next.further_name


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the text_config of a config.json. Raises CheckpointError for a missing or impossible value.

    Text has the same position in all three sections of its rotary positions (mrope_section), so they are plain.
    """
    return qwen3_next.hybrid_model(raw, family="qwen3_5_moe", by_key_head=False, renormalise=True)


def canonical_name(name: str) -> str | None:
    """Without the prefix that the text part has beside the vision part; None for other parts."""
    return None if name.startswith("model.visual.") else name.replace("model.language_model.", "model.", 1)
