"""config.json -> ModelConfig: what all families share, so that each states its differences alone."""

import dataclasses
from collections.abc import Callable

from specmoe_jax.config.layer_config import AttentionConfig, ExpertConfig, Latent, LayerConfig, RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.published import config_json as read
from specmoe_jax.models.rope import parameters_of, read_rope, rope_type, yarn_mscale
from specmoe_jax.support.errors import CheckpointError


def grouped_attention(
    raw: dict,
    *,
    default_theta: float,
    window: int | None = None,
    interleaved: bool = False,
    rotated: float | None = None,
    **variants,
) -> AttentionConfig:
    """Grouped-query attention with rotary positions, on whole heads unless the family has a share `rotated` of each.

    variants: further fields of AttentionConfig.
    """
    hidden, num_heads = read.size(raw, "hidden_size"), read.size(raw, "num_attention_heads")
    num_kv_heads = read.size(raw, "num_key_value_heads", default=num_heads)
    read.check_heads(num_heads, num_kv_heads)
    head_dim = read.head_dim(raw, hidden, num_heads)
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read_rope(raw, head_dim, default_theta=default_theta, interleaved=interleaved, rotated=rotated),
        window=window,
        **variants,
    )


def latent_attention(raw: dict) -> AttentionConfig:
    """One latent KV head for all query heads (DeepSeek-V2); yarn sharpens the scores beside scaling the rotation."""
    parts = {"nope": "qk_nope_head_dim", "rope": "qk_rope_head_dim", "value": "v_head_dim", "rank": "kv_lora_rank"}
    latent = Latent(**{part: read.size(raw, key) for part, key in parts.items()})
    if latent.rope % 2:
        raise CheckpointError(f"config.json: qk_rope_head_dim is {latent.rope}; rotary embeddings need an even number")
    scale = (latent.nope + latent.rope) ** -0.5
    all_dim = read.number(parameters_of(raw), "mscale_all_dim", 0)
    if rope_type(raw) != "default" and all_dim:
        scale *= yarn_mscale(read.number(parameters_of(raw), "factor", 1), all_dim) ** 2
    return AttentionConfig(
        num_heads=read.size(raw, "num_attention_heads"),
        num_kv_heads=1,
        head_dim=latent.rank + latent.rope,
        scale=scale,
        rope=read_rope(raw, latent.rope, default_theta=1e4, interleaved=read.flag(raw, "rope_interleave", True)),
        latent=latent,
    )


def query_rank(raw: dict) -> int | None:
    """Of compressed queries; None where they are not."""
    return None if raw.get("q_lora_rank") is None else read.size(raw, "q_lora_rank")


def biased_router(raw: dict, *, scaling: float) -> RouterConfig:
    """DeepSeek-V3's: chosen by sigmoid plus a bias, in groups that are ranked by their two best. scaling: the default."""
    read.require(raw, "topk_method", "noaux_tc")
    read.require(raw, "scoring_func", "sigmoid")
    router = RouterConfig(
        num_experts=read.size(raw, "n_routed_experts"),
        experts_per_token=read.size(raw, "num_experts_per_tok"),
        rule="sigmoid",
        choice_bias=True,
        renormalise=read.flag(raw, "norm_topk_prob", True),
        scaling=read.number(raw, "routed_scaling_factor", scaling),
    )
    return limited_to_groups(raw, router, best=2)


def limited_to_groups(raw: dict, router: RouterConfig, *, best: int) -> RouterConfig:
    """The router as n_group and topk_group limit it; groups are ranked by their `best` best experts."""
    groups, chosen = read.size(raw, "n_group"), read.size(raw, "topk_group")
    each = router.num_experts // groups
    if router.num_experts % groups or chosen > groups or router.experts_per_token > chosen * each or (groups > 1 and each < best):
        raise CheckpointError(
            f"config.json: n_group {groups} and topk_group {chosen} do not fit {router.num_experts} experts,"
            f" {router.experts_per_token} a token"
        )
    if chosen == groups:
        return router
    return dataclasses.replace(router, groups=(groups, chosen), group_best=best)


def first_dense(raw: dict, *, default: int) -> frozenset[int]:
    """DeepSeek's rule: the first first_k_dense_replace layers have no experts."""
    count = raw.get("first_k_dense_replace")
    count = default if count is None else count and read.size(raw, "first_k_dense_replace")
    return frozenset(range(min(count, read.num_layers(raw))))


def listed_dense(raw: dict, *, default: int) -> frozenset[int]:
    """The dense layers that mlp_layer_types lists; where it is left out, by DeepSeek's rule."""
    types = read.named_layers(raw, "mlp_layer_types", read.num_layers(raw), ("dense", "sparse"))
    return first_dense(raw, default=default) if types is None else frozenset(i for i, kind in enumerate(types) if kind == "dense")


def mtp_layers(raw: dict) -> int:
    """How many layers after the last predict further tokens."""
    keys = [key for key in ("num_nextn_predict_layers", "num_mtp_layers") if raw.get(key)]
    return read.num_layers(raw, keys[0]) if keys else 0


def dense_layers(raw: dict) -> frozenset[int]:
    """Qwen's rule: experts in every decoder_sparse_step-th layer that is not in mlp_only_layers."""
    step, dense = read.size(raw, "decoder_sparse_step", default=1), read.layer_numbers(raw, "mlp_only_layers")
    return frozenset(i for i in range(read.num_layers(raw)) if i in dense or (i + 1) % step)


def model_config(
    raw: dict,
    *,
    family: str,
    attention: AttentionConfig,
    router: RouterConfig,
    expert_hidden: int,
    default_eps: float,
    attention_of: Callable[[int, AttentionConfig], AttentionConfig] = lambda layer, attention: attention,
    dense: frozenset[int] = frozenset(),
    dense_hidden: int | None = None,
    shared_hidden: int | None = None,
    query_rank: int | None = None,
    mtp_layers: int = 0,
    residual_scale: float = 1.0,
    norm_plus: float = 0.0,
    **expert_options,
) -> ModelConfig:
    """A decoder whose layers differ only in `attention_of(layer, attention)` and in whether they are `dense`.

    dense_hidden, shared_hidden: widths of the dense layers' MLP and of the others' shared expert. query_rank: of
    compressed queries. mtp_layers: see ModelConfig; residual_scale, norm_plus: LayerConfig. expert_options: further fields of
    ExpertConfig.
    """
    read.check_choice(raw, router.num_experts, router.experts_per_token)
    eps, count = read.number(raw, "rms_norm_eps", default_eps), read.num_layers(raw)
    if eps <= 0:
        raise CheckpointError(f"config.json: rms_norm_eps is {eps}; it must be above 0")
    hidden = read.size(raw, "hidden_size")
    experts = ExpertConfig(hidden=expert_hidden, model=hidden, **expert_options)
    moe = LayerConfig(
        attention=attention,
        router=router,
        experts=experts,
        norm_eps=eps,
        mlp_hidden=shared_hidden,
        residual_scale=residual_scale,
        norm_plus=norm_plus,
    )
    plain = dataclasses.replace(moe, router=None, experts=None, mlp_hidden=dense_hidden)
    if len(dense.intersection(range(count))) == count:
        raise CheckpointError("config.json: no layer has experts; this engine runs mixtures of experts")

    def layer(index: int) -> LayerConfig:
        return dataclasses.replace(plain if index in dense else moe, attention=attention_of(index, attention))

    return ModelConfig(
        family=family,
        vocab_size=read.size(raw, "vocab_size"),
        hidden_size=hidden,
        num_layers=count,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        expert_hidden=expert_hidden,
        num_experts=router.num_experts,
        experts_per_token=router.experts_per_token,
        max_positions=read.size(raw, "max_position_embeddings"),
        norm_eps=eps,
        tie_embeddings=read.flag(raw, "tie_word_embeddings"),
        eos_token_ids=read.token_ids(raw.get("eos_token_id")),
        query_rank=query_rank,
        mtp_layers=mtp_layers,
        layer_configs=tuple(layer(index) for index in range(count)),
    )
