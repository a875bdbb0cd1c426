"""DeepSeek-V3, R1, V3.1, Kimi-K2 and Moonlight (DeepSeek-AI 2024): V2's latent attention, experts chosen by biased sigmoids."""

from collections.abc import Callable

from specmoe_jax.config.layer_config import AttentionConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import require, size
from specmoe_jax.models.published.parse import biased_router, first_dense, latent_attention, model_config, mtp_layers, query_rank
from specmoe_jax.models.spec import LayerWeights, TensorSpec, Weights

ARCHITECTURE = "DeepseekV3ForCausalLM"
WRAPPERS = ("KimiK25ForConditionalGeneration",)

expert_layouts = naming.swiglu_layouts


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    return latent_model(raw, family="deepseek_v3", dense=first_dense(raw, default=3), scaling=2.5, default_eps=1e-6)


def latent_model(
    raw: dict,
    *,
    family: str,
    dense: frozenset[int],
    scaling: float,
    default_eps: float,
    attention_of: Callable[[int, AttentionConfig], AttentionConfig] = lambda layer, attention: attention,
) -> ModelConfig:
    """A decoder of V3's form, which other families have too. scaling, default_eps: where config.json does not say.

    attention_of: (layer, attention) -> what that layer has.
    """
    require(raw, "hidden_act", "silu")
    require(raw, "attention_bias", False)
    require(raw, "moe_layer_freq", 1)
    expert_hidden = size(raw, "moe_intermediate_size")
    return model_config(
        raw,
        family=family,
        attention=latent_attention(raw),
        attention_of=attention_of,
        router=biased_router(raw, scaling=scaling),
        expert_hidden=expert_hidden,
        shared_hidden=size(raw, "n_shared_experts", default=1) * expert_hidden,
        dense=dense,
        dense_hidden=size(raw, "intermediate_size") if dense else None,
        default_eps=default_eps,
        query_rank=query_rank(raw),
        mtp_layers=mtp_layers(raw),
    )


def weight_specs(config: ModelConfig) -> Weights[TensorSpec]:
    """Specs of everything but the routed experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def canonical_name(name: str) -> str | None:
    """Without the prefix that the text part has in Kimi-K2.5; None for the parts beside it."""
    return None if name.startswith(("vision_tower.", "mm_projector.")) else name.removeprefix("language_model.")


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights[TensorSpec]:
    return naming.latent_specs(
        config,
        layer,
        router=naming.router_spec(config, layer),
        choice_bias=naming.choice_bias_spec(config, layer),
        mlp=naming.shared_expert_specs(config, layer),
    )
