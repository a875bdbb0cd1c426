"""MiniMax-M2, M2.1, M2.5, M2.7 (MiniMax 2025): Mixtral's names, OLMoE's norms, part of each head rotated, biased sigmoids."""

from specmoe_jax.config.layer_config import RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import mixtral
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import require, size
from specmoe_jax.models.published.parse import grouped_attention, model_config
from specmoe_jax.models.spec import LayerWeights, Weights

ARCHITECTURE = "MiniMaxM2ForCausalLM"

expert_layouts = mixtral.expert_layouts


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value.

    num_mtp_modules is of layers that no published file holds, so the model is read as having none.
    """
    built = {"hidden_act": "silu", "use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True}
    for key, value in (built | {"scoring_func": "sigmoid", "shared_intermediate_size": 0}).items():
        require(raw, key, value)
    head_dim = size(raw, "head_dim", default=128)
    router = RouterConfig(
        num_experts=size(raw, "num_local_experts", "num_experts"),
        experts_per_token=size(raw, "num_experts_per_tok"),
        rule="sigmoid",
        choice_bias=True,
        renormalise=True,
    )
    return model_config(
        raw,
        family="minimax_m2",
        attention=grouped_attention(
            raw | {"head_dim": head_dim}, default_theta=5e6, rotated=size(raw, "rotary_dim", default=head_dim) / head_dim
        ),
        router=router,
        expert_hidden=size(raw, "intermediate_size"),
        default_eps=1e-6,
    )


def weight_specs(config: ModelConfig) -> Weights:
    """Specs of everything but the experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def canonical_name(name: str) -> str:
    """The name that the specs use, of any name that this family's tensors are stored under."""
    return mixtral.canonical_name(name).replace(".mlp.e_score", ".block_sparse_moe.e_score")


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights:
    return naming.attention_specs(
        config,
        layer,
        **naming.qk_norm_specs(config, layer, full=True),
        router=naming.router_spec(config, layer, "block_sparse_moe.gate"),
        choice_bias=naming.choice_bias_spec(config, layer, "block_sparse_moe"),
    )
