"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024): latent attention, first layers dense, shared experts as one ungated MLP."""

from specmoe_jax.config.layer_config import RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import naming
from specmoe_jax.models.published.config_json import number, require, show, size
from specmoe_jax.models.published.parse import first_dense, latent_attention, limited_to_groups, model_config, query_rank
from specmoe_jax.models.spec import LayerWeights, Weights
from specmoe_jax.support.errors import CheckpointError

ARCHITECTURE = "DeepseekV2ForCausalLM"

expert_layouts = naming.swiglu_layouts


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    require(raw, "hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias", "norm_topk_prob"):
        require(raw, key, False)
    require(raw, "moe_layer_freq", 1)
    dense = first_dense(raw, default=0)
    expert_hidden, shared = size(raw, "moe_intermediate_size"), size(raw, "n_shared_experts")
    return model_config(
        raw,
        family="deepseek_v2",
        attention=latent_attention(raw),
        router=_router(raw),
        expert_hidden=expert_hidden,
        shared_hidden=shared * expert_hidden,
        dense=dense,
        dense_hidden=size(raw, "intermediate_size") if dense else None,
        default_eps=1e-6,
        query_rank=query_rank(raw),
    )


def weight_specs(config: ModelConfig) -> Weights:
    """Specs of everything but the routed experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def canonical_name(name: str) -> str:
    return name


def _router(raw: dict) -> RouterConfig:
    method = raw.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(
            f"config.json: topk_method is {show(method)}; this family is built with 'greedy' and 'group_limited_greedy'"
        )
    router = RouterConfig(
        num_experts=size(raw, "n_routed_experts"),
        experts_per_token=size(raw, "num_experts_per_tok"),
        scaling=number(raw, "routed_scaling_factor", 1.0),
    )
    if method == "greedy":
        return router
    return limited_to_groups(raw, router, best=1)


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights:
    router, mlp = naming.router_spec(config, layer), naming.shared_expert_specs(config, layer)
    return naming.latent_specs(config, layer, router=router, mlp=mlp)
