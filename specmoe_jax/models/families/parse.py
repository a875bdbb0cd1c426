"""config.json -> ModelConfig: what all families share, so that each states its differences alone."""

import dataclasses
from collections.abc import Callable

from specmoe_jax.config.layer_config import AttentionConfig, ExpertConfig, LayerConfig, RouterConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.models.families import config_json as read
from specmoe_jax.models.rope import read_rope
from specmoe_jax.support.errors import CheckpointError


def grouped_attention(raw: dict, *, default_theta: float, window: int | None = None, interleaved: bool = False) -> AttentionConfig:
    """Grouped-query attention with rotary positions on whole heads."""
    hidden, num_heads = read.size(raw, "hidden_size"), read.size(raw, "num_attention_heads")
    num_kv_heads = read.size(raw, "num_key_value_heads", default=num_heads)
    read.check_heads(num_heads, num_kv_heads)
    head_dim = read.head_dim(raw, hidden, num_heads)
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=read_rope(raw, head_dim, default_theta=default_theta, interleaved=interleaved),
        window=window,
    )


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
    **expert_options,
) -> ModelConfig:
    """A decoder whose layers differ only in `attention_of(layer, attention)` and in whether they are `dense`.

    dense_hidden, shared_hidden: widths of the dense layers' MLP and of the others' shared expert. query_rank: of
    compressed queries. expert_options: further fields of ExpertConfig.
    """
    read.check_choice(raw, router.num_experts, router.experts_per_token)
    eps, count = read.number(raw, "rms_norm_eps", default_eps), read.num_layers(raw)
    if eps <= 0:
        raise CheckpointError(f"config.json: rms_norm_eps is {eps}; it must be above 0")
    hidden = read.size(raw, "hidden_size")
    experts = ExpertConfig(hidden=expert_hidden, model=hidden, **expert_options)
    moe = LayerConfig(attention=attention, router=router, experts=experts, norm_eps=eps, mlp_hidden=shared_hidden)
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
        layer_configs=tuple(layer(index) for index in range(count)),
    )
