"""Qwen3-VL-MoE, text part (Qwen Team 2025): Qwen3-MoE's layers, experts stored [in, out] beside a vision tower."""

from specmoe_jax.config.layer_config import RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import qwen3_moe
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import require, size
from specmoe_jax.models.published.parse import dense_layers, grouped_attention, model_config
from specmoe_jax.models.spec import Layout

ARCHITECTURE = "Qwen3VLMoeTextModel"
WRAPPERS = ("Qwen3VLMoeForConditionalGeneration",)

weight_specs = qwen3_moe.weight_specs


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the text_config of a config.json. Raises CheckpointError for a missing or impossible value.

    Text has the same position in all three sections of its rotary positions (mrope_section), so they are plain.
    """
    for key, value in {"hidden_act": "silu", "attention_bias": False, "norm_topk_prob": True}.items():
        require(raw, key, value)
    router = RouterConfig(
        num_experts=size(raw, "num_experts", "num_local_experts"),
        experts_per_token=size(raw, "num_experts_per_tok"),
        renormalise=True,
    )
    return model_config(
        raw,
        family="qwen3_vl_moe",
        attention=grouped_attention(raw, default_theta=5e5),
        router=router,
        expert_hidden=size(raw, "moe_intermediate_size"),
        dense=dense_layers(raw),
        dense_hidden=size(raw, "intermediate_size") if dense_layers(raw) else None,
        default_eps=1e-6,
    )


def expert_layouts(config: ModelConfig, layer: int, expert: int) -> tuple[Layout, ...]:
    """Published: all experts of a layer fused, stored [in, out]; newer writers store [out, in], or a tensor a matrix."""
    prefix = f"model.layers.{layer}.mlp.experts"
    return (
        naming.transposed_layout(config.experts, config.num_experts, prefix, expert),
        naming.fused_layout(config.experts, config.num_experts, prefix, expert),
        naming.separate_layout(config.experts, f"{prefix}.{expert}", "gate_proj", "up_proj", "down_proj"),
    )


def canonical_name(name: str) -> str | None:
    """Without the prefix that the text part has beside the vision part; None for that other part."""
    return None if name.startswith("model.visual.") else name.replace("model.language_model.", "model.", 1)
