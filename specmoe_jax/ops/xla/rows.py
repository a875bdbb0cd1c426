"""put_rows by a scatter, and what is made of it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def put(array: jax.Array, rows: jax.Array, at: jax.Array) -> jax.Array:
    if array.dtype == jnp.bfloat16:  # XLA:CPU converts the whole array to float32 and back; of uint16 it makes a copy
        bits = put(jax.lax.bitcast_convert_type(array, jnp.uint16), jax.lax.bitcast_convert_type(rows, jnp.uint16), at)
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    return array.at[jnp.where(at < 0, len(array), at)].set(rows, mode="drop")


def put_row(array: jax.Array, row: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(array, row, at, axis=0)


def append(cache: jax.Array, new: jax.Array, lengths: jax.Array, num_new: jax.Array, *, put: Callable = put) -> jax.Array:
    """Write new [B, T, K, ...] into cache [B, K, S, ...] at lengths[b] + t, t < num_new[b]; what falls beyond S is left out."""
    B, K, S, *line = cache.shape
    steps = jnp.arange(new.shape[1], dtype=jnp.int32)
    place = (lengths[:, None] + steps)[:, :, None]  # [B, T, 1]
    first = S * jnp.arange(B * K, dtype=jnp.int32).reshape(B, 1, K)  # of each row's head
    at = jnp.where((steps < num_new[:, None])[:, :, None] & (place < S), first + place, -1).astype(jnp.int32)
    lines = put(cache.reshape(-1, *line), new.astype(cache.dtype).reshape(-1, *line), at.reshape(-1))
    return lines.reshape(cache.shape)
