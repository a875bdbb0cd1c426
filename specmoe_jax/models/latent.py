"""Multi-head latent attention (DeepSeek-V2, 2.1), in the form that caches the compressed rows.

A key head is W_uk c + the shared rotated part, so q . (W_uk c) = (W_uk^T q) . c: the up-projections move to the query
and to the output, and attention runs over one KV head of D = rank + rope for all query heads. DeepSeek-V2-Lite caches
2 x 576 numbers a position and layer so, 2 x 16 x 192 with expanded heads.
Cost: a score takes 576 multiplications instead of 192; and the latent stands in both the key and the value cache.
"""

import jax
import jax.numpy as jnp

from specmoe_jax.config.layer_config import AttentionConfig
from specmoe_jax.models.basics import heads, linear, rms_norm, rope
from specmoe_jax.models.selection import indexer
from specmoe_jax.models.spec import LayerWeights

NORM_EPS = 1e-6  # of the two norms inside, whatever the config says of the others (transformers' default for them)


def project(
    config: AttentionConfig, weights: LayerWeights[jax.Array], x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, T, M], normed -> q [B, T, H, D], k and v [B, T, 1, D] with D = rank + rope; v is zero beyond rank.

    With an indexer its keys stand there, D has room for them, and q is [B, T, H, D + asked_dim].
    """
    latent = config.latent
    assert latent is not None and weights.kv_a is not None and weights.kv_a_norm is not None
    query_input = _query_input(weights, x)
    q = heads(linear(query_input, weights.q), config.num_heads)
    up_k, _ = _up(config, weights)
    q_latent = jnp.einsum("bthn,hnr->bthr", q[..., : latent.nope], up_k, precision="highest")
    row = linear(x, weights.kv_a)[:, :, None]  # [B, T, 1, rank + rope]
    c = rms_norm(row[..., : latent.rank], weights.kv_a_norm, NORM_EPS)
    rotated = rope((q[..., latent.nope :], row[..., latent.rank :]), positions, config.rope)
    q, k = (jnp.concatenate(pair, axis=-1) for pair in zip((q_latent, c), rotated, strict=True))
    if weights.indexer is None:
        return q, k, _wide(config, c)
    asked, index_keys = indexer.project(config, weights.indexer, x, query_input, positions)
    v = jnp.concatenate([c, index_keys], axis=-1)
    return jnp.concatenate([_wide(config, q), asked], axis=-1), _wide(config, k), _wide(config, v)


def _wide(config: AttentionConfig, a: jax.Array) -> jax.Array:
    """[..., n] -> [..., D] with zeros behind."""
    return jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, config.head_dim - a.shape[-1])))


def values(config: AttentionConfig, weights: LayerWeights[jax.Array], attended: jax.Array) -> jax.Array:
    """Mixtures of latents [B, T, H, D] -> mixtures of values [B, T, H, value]."""
    assert config.latent is not None
    _, up_v = _up(config, weights)
    return jnp.einsum("bthr,hvr->bthv", attended[..., : config.latent.rank], up_v, precision="highest")


def _query_input(weights: LayerWeights[jax.Array], x: jax.Array) -> jax.Array:
    """What queries are projected from: x [B, T, M], or its compressed row."""
    if weights.q_a is None:
        return x
    assert weights.q_a_norm is not None
    return rms_norm(linear(x, weights.q_a), weights.q_a_norm, NORM_EPS)


def _up(config: AttentionConfig, weights: LayerWeights[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """W_uk [H, nope, rank] and W_uv [H, value, rank]."""
    assert config.latent is not None and weights.kv_b is not None
    both = weights.kv_b.reshape(config.num_heads, -1, config.latent.rank)
    return both[:, : config.latent.nope], both[:, config.latent.nope :]
