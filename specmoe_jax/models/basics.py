"""The operations that layers are made of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax import ops
from specmoe_jax.config.layer_config import Rope

FEW_RESULTS = 1024  # of functions whose results are broadcast (`computed_once`): the cosines of 16 positions of heads of 128


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


def computed_once(f: Callable, *arrays: jax.Array) -> Any:
    """f(*arrays), of elementwise functions that cost much and whose results are broadcast.

    On a CPU XLA moves what is elementwise into every fusion that reads it and computes it there for each element of the broadcast:
    cosines for each head, and again for each use. It moves nothing out of a conditional; that the condition is always true stays
    hidden from it behind the barrier. A conditional takes some microseconds, so few results are left to the fusions.
    """

    def bordered(*arrays: jax.Array) -> Any:
        true = jax.lax.optimization_barrier(jnp.bool_(True))
        return jax.lax.cond(true, f, lambda *_: jax.tree.map(jnp.zeros_like, jax.eval_shape(f, *arrays)), *arrays)

    few = sum(array.size for array in arrays) < FEW_RESULTS
    return f(*arrays) if few else jax.lax.platform_dependent(*arrays, cpu=bordered, default=f)


def rope(arrays: tuple[jax.Array, ...], positions: jax.Array, config: Rope | None) -> tuple[jax.Array, ...]:
    """Rotates the pairs of arrays [B, T, heads, D] by positions [B, T] int32, logical (per row). None: no positions.

    What a partial rotary config leaves out, the end of each head, is kept.
    """
    if config is None:
        return arrays
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(config.frequencies, jnp.float32)  # [B, T, D/2]
    found = computed_once(lambda angle: (jnp.cos(angle), jnp.sin(angle)), angle)
    cos, sin = (config.scale * y[:, :, None] for y in found)
    return tuple(_rotated(x, cos, sin, config) for x in arrays)


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array, config: Rope) -> jax.Array:
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
