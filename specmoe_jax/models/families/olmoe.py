"""OLMoE (Muennighoff et al. 2024): query and key norms over the whole projection, weights not renormalised."""

from specmoe_jax.config.layer_config import RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import flag, require, size
from specmoe_jax.models.published.parse import grouped_attention, model_config
from specmoe_jax.models.spec import LayerWeights, Weights

ARCHITECTURE = "OlmoeForCausalLM"

expert_layouts = naming.swiglu_layouts


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    require(raw, "hidden_act", "silu")
    require(raw, "attention_bias", False)
    require(raw, "clip_qkv", None)
    router = RouterConfig(
        num_experts=size(raw, "num_experts", "num_local_experts"),
        experts_per_token=size(raw, "num_experts_per_tok"),
        renormalise=flag(raw, "norm_topk_prob"),
    )
    return model_config(
        raw,
        family="olmoe",
        attention=grouped_attention(raw, default_theta=1e4),
        router=router,
        expert_hidden=size(raw, "intermediate_size"),
        default_eps=1e-5,
    )


def weight_specs(config: ModelConfig) -> Weights:
    """Specs of everything but the experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def canonical_name(name: str) -> str:
    return name


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights:
    norms = naming.qk_norm_specs(config, layer, full=True)
    return naming.attention_specs(config, layer, router=naming.router_spec(config, layer), **norms)
