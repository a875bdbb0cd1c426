"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024): latent attention, first layers dense, shared experts as one ungated MLP."""

import dataclasses

from specmoe_jax.config.layer_config import AttentionConfig, Latent, RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import naming
from specmoe_jax.models.families.config_json import num_layers, number, require, show, size
from specmoe_jax.models.families.parse import model_config
from specmoe_jax.models.rope import parameters_of, read_rope, rope_type, yarn_mscale
from specmoe_jax.models.spec import LayerWeights, TensorSpec, Weights
from specmoe_jax.support.errors import CheckpointError

ARCHITECTURE = "DeepseekV2ForCausalLM"

expert_layouts = naming.swiglu_layouts


def parse_config(raw: dict) -> ModelConfig:
    """ModelConfig from the keys of a config.json. Raises CheckpointError for a missing or impossible value."""
    require(raw, "hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias", "norm_topk_prob"):
        require(raw, key, False)
    require(raw, "moe_layer_freq", 1)
    dense = raw.get("first_k_dense_replace") and range(min(size(raw, "first_k_dense_replace"), num_layers(raw)))
    expert_hidden, shared = size(raw, "moe_intermediate_size"), size(raw, "n_shared_experts")
    return model_config(
        raw,
        family="deepseek_v2",
        attention=_attention(raw),
        router=_router(raw),
        expert_hidden=expert_hidden,
        shared_hidden=shared * expert_hidden,
        dense=frozenset(dense or ()),
        dense_hidden=size(raw, "intermediate_size") if dense else None,
        default_eps=1e-6,
        query_rank=size(raw, "q_lora_rank") if raw.get("q_lora_rank") is not None else None,
    )


def weight_specs(config: ModelConfig) -> Weights:
    """Specs of everything but the routed experts, in checkpoint names."""
    return naming.model_specs(config, _layer_specs)


def canonical_name(name: str) -> str:
    return name


def _attention(raw: dict) -> AttentionConfig:
    """One latent KV head for all; yarn sharpens the scores beside scaling the rotation."""
    parts = {"nope": "qk_nope_head_dim", "rope": "qk_rope_head_dim", "value": "v_head_dim", "rank": "kv_lora_rank"}
    latent = Latent(**{part: size(raw, key) for part, key in parts.items()})
    if latent.rope % 2:
        raise CheckpointError(f"config.json: qk_rope_head_dim is {latent.rope}; rotary embeddings need an even number")
    scale = (latent.nope + latent.rope) ** -0.5
    all_dim = number(parameters_of(raw), "mscale_all_dim", 0)
    if rope_type(raw) != "default" and all_dim:
        scale *= yarn_mscale(number(parameters_of(raw), "factor", 1), all_dim) ** 2
    return AttentionConfig(
        num_heads=size(raw, "num_attention_heads"),
        num_kv_heads=1,
        head_dim=latent.rank + latent.rope,
        scale=scale,
        rope=read_rope(raw, latent.rope, default_theta=1e4, interleaved=True),
        latent=latent,
    )


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
    groups, chosen = size(raw, "n_group"), size(raw, "topk_group")
    if router.num_experts % groups or chosen > groups or router.experts_per_token > chosen * router.num_experts // groups:
        raise CheckpointError(
            f"config.json: n_group {groups} and topk_group {chosen} do not fit {router.num_experts} experts,"
            f" {router.experts_per_token} a token"
        )
    return dataclasses.replace(router, groups=(groups, chosen))


def _layer_specs(config: ModelConfig, layer: int) -> LayerWeights:
    kind, hidden = config.layers[layer], config.hidden_size
    latent, num_heads, rank = kind.attention.latent, kind.attention.num_heads, config.query_rank
    prefix = f"model.layers.{layer}"
    attention = f"{prefix}.self_attn"
    q_name, q_input = ("q_proj", hidden) if rank is None else ("q_b_proj", rank)
    return LayerWeights(
        input_norm=naming.norm_spec(f"{prefix}.input_layernorm", hidden),
        post_norm=naming.norm_spec(f"{prefix}.post_attention_layernorm", hidden),
        q_a=None if rank is None else TensorSpec(f"{attention}.q_a_proj.weight", (rank, hidden)),
        q_a_norm=None if rank is None else naming.norm_spec(f"{attention}.q_a_layernorm", rank),
        q=TensorSpec(f"{attention}.{q_name}.weight", (num_heads * (latent.nope + latent.rope), q_input)),
        k=None,
        v=None,
        kv_a=TensorSpec(f"{attention}.kv_a_proj_with_mqa.weight", (latent.rank + latent.rope, hidden)),
        kv_a_norm=naming.norm_spec(f"{attention}.kv_a_layernorm", latent.rank),
        kv_b=TensorSpec(f"{attention}.kv_b_proj.weight", (num_heads * (latent.nope + latent.value), latent.rank)),
        o=TensorSpec(f"{attention}.o_proj.weight", (hidden, num_heads * latent.value)),
        router=naming.router_spec(config, layer),
        mlp=naming.mlp_specs(config, layer, "mlp" if kind.router is None else "mlp.shared_experts"),
    )
