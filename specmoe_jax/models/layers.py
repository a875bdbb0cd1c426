"""The layers that every family shares: pure functions over arrays, no cache, no offloading."""

import jax
import jax.numpy as jnp

from specmoe_jax.config import ModelConfig
from specmoe_jax.models.routing import route
from specmoe_jax.models.spec import LayerWeights, Weights
from specmoe_jax.types import Routing


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Zhang & Sennrich 2019, in float32 whatever the dtype of x [..., M]."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] times weight [out, in], the layout of checkpoints; accumulates in float32."""
    y = jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Su et al. 2021, rotating halves. x: [B, T, heads, D]; positions: [B, T] int32, logical (per row)."""
    half = x.shape[-1] // 2
    inverse_frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * inverse_frequency  # [B, T, D/2]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def embed(weights: Weights, token_ids: jax.Array) -> jax.Array:
    """[B, T] int32 -> [B, T, M]."""
    return weights.embed[token_ids]


def pre_attention(
    config: ModelConfig, weights: LayerWeights, h: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Norm, projections and RoPE ("other1" of SpecMoEOff). h [B, T, M] -> q [B, T, H, D], k and v [B, T, K, D]."""
    batch, length, _ = h.shape
    x = rms_norm(h, weights.input_norm, config.norm_eps)
    q = linear(x, weights.q).reshape(batch, length, config.num_heads, config.head_dim)
    k = linear(x, weights.k).reshape(batch, length, config.num_kv_heads, config.head_dim)
    v = linear(x, weights.v).reshape(batch, length, config.num_kv_heads, config.head_dim)
    return rope(q, positions, config.rope_theta), rope(k, positions, config.rope_theta), v


def post_attention(
    config: ModelConfig, weights: LayerWeights, h: jax.Array, attended: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array, Routing]:
    """Output projection, residual, norm and router ("other2" of SpecMoEOff).

    h: [B, T, M]; attended: [B, T, H, D]; valid: [B, T] bool, False for padding and finished rows.
    Returns h after the residual [B, T, M], the experts' input x [n, M] and the routing of its rows.
    """
    h = h + linear(attended.reshape(*h.shape[:2], -1), weights.o)
    x = rms_norm(h, weights.post_norm, config.norm_eps).reshape(-1, config.hidden_size)  # [n, M]
    return h, x, route(x, weights.router, config.experts_per_token, valid.reshape(-1))


def reroute(config: ModelConfig, weights: LayerWeights, x: jax.Array, routing: Routing, allowed: jax.Array) -> Routing:
    """The routing of the same rows x [n, M] among the allowed experts [E] bool alone."""
    return route(x, weights.router, config.experts_per_token, routing.ids[:, 0] >= 0, allowed)


def combine(h: jax.Array, expert_outputs: jax.Array, routing: Routing) -> jax.Array:
    """Adds the weighted expert outputs [n, A, M] to the residual h [B, T, M], always in the order of the choices."""
    mixed = jnp.sum(expert_outputs * routing.weights[..., None], axis=1)  # [n, M]
    return h + mixed.reshape(h.shape).astype(h.dtype)


def head(config: ModelConfig, weights: Weights, h: jax.Array) -> jax.Array:
    """Final norm and output matrix. h [B, T, M] -> logits [B, T, V] float32."""
    x = rms_norm(h, weights.final_norm, config.norm_eps)
    matrix = weights.embed if weights.lm_head is None else weights.lm_head
    return linear(x.astype(jnp.float32), matrix.astype(jnp.float32))
