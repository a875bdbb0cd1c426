"""The operations that layers are made of."""

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax import ops
from specmoe_jax.config.layer_config import Rope


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, plus: float = 0.0) -> jax.Array:
    """Zhang & Sennrich 2019, in float32 whatever the dtype of x [..., M]. plus: added to the weight, in float32."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    if plus:
        return (x32 * scale * (plus + weight.astype(jnp.float32))).astype(x.dtype)
    return (x32 * scale).astype(x.dtype) * weight


def norm(x: jax.Array, weight: jax.Array, bias: jax.Array | None, eps: float, plus: float = 0.0) -> jax.Array:
    """LayerNorm (Ba et al. 2016) in float32 where there is a bias [M], else `rms_norm`."""
    if bias is None:
        return rms_norm(x, weight, eps, plus)
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight + bias


def sinusoids(positions: jax.Array, dim: int) -> jax.Array:
    """Vaswani et al. 2017 as tensor2tensor has it: positions [...] -> [..., dim] float32, all sines before all cosines."""
    half = dim // 2
    step = np.float32(-np.log(10000) / (half - 1))
    angles = positions[..., None].astype(jnp.float32) * np.exp(np.arange(half, dtype=np.float32) * step)
    pairs = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(pairs, [(0, 0)] * positions.ndim + [(0, dim - 2 * half)])


def linear(x: jax.Array, weight: jax.Array | ops.PackedMatrix) -> jax.Array:
    """x [..., in] times weight [out, in], the layout of checkpoints, in x's dtype; accumulates in float32."""
    return linears(x, weight)[0]


def linears(x: jax.Array, *weights: jax.Array | ops.PackedMatrix) -> tuple[jax.Array, ...]:
    """`linear` by each of some weights, which are read in one go where a kernel can."""
    return tuple(y.astype(x.dtype) for y in ops.dense_products(x, weights))


def rope(x: jax.Array, positions: jax.Array, config: Rope | None) -> jax.Array:
    """Rotates the pairs of x [B, T, heads, D] by positions [B, T] int32, logical (per row). None: no positions.

    What a partial rotary config leaves out, the end of each head, is kept.
    """
    if config is None:
        return x
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(config.frequencies, jnp.float32)  # [B, T, D/2]
    cos, sin = (config.scale * f(angle)[:, :, None] for f in (jnp.cos, jnp.sin))
    x32 = x.astype(jnp.float32)
    rotated, kept = jnp.split(x32, [2 * len(config.frequencies)], axis=-1)
    x1, x2 = (rotated[..., ::2], rotated[..., 1::2]) if config.interleaved else jnp.split(rotated, 2, axis=-1)
    pairs = (x1 * cos - x2 * sin, x2 * cos + x1 * sin)
    # An interleaved rotation may leave its halves apart: queries and keys are permuted alike, and scores do not see it.
    return jnp.concatenate((*pairs, kept), axis=-1).astype(x.dtype)


def affine(x: jax.Array, weight: jax.Array | ops.PackedMatrix, bias: jax.Array | None) -> jax.Array:
    """`linear` with a bias [out], or without."""
    return biased(linear(x, weight), bias)


def biased(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias


def heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[B, T, heads * D] -> [B, T, heads, D]."""
    return x.reshape(*x.shape[:2], num_heads, -1)
