"""Writing to some rows of an array that is donated: on a CPU XLA alone copies all of it in bfloat16."""

import jax
import jax.numpy as jnp

from specmoe_jax.ops import _check, dispatch


def put_rows(array: jax.Array, rows: jax.Array, at: jax.Array) -> jax.Array:
    """An array [N, ...] with rows [n, ...] of its type at the places [n] int32, no two alike; places beyond it are left out.

    No gradient.
    """
    _check.array("put_rows", "rows", rows, (rows.shape[0], *array.shape[1:]), (array.dtype,))
    _check.array("put_rows", "at", at, (rows.shape[0],), (jnp.int32,))
    return dispatch.call("put_rows", array, rows, at)


def put_row(array: jax.Array, row: jax.Array, at: jax.Array) -> jax.Array:
    """An array [N, ...] with a row [...] of its type in the place at, int32 [] from 0 to N - 1; a smaller one fills its front."""
    fits = row.ndim == array.ndim - 1 and all(own <= whole for own, whole in zip(row.shape, array.shape[1:], strict=True))
    _check.that("put_row", fits, f"row has shape {row.shape}, wanted at most {array.shape[1:]}")
    _check.array("put_row", "row", row, row.shape, (array.dtype,))
    return dispatch.call("put_row", array, row, at)


def append(cache: jax.Array, new: jax.Array, lengths: jax.Array, num_new: jax.Array) -> jax.Array:
    """A cache [B, K, S, D] with new [B, T, K, D] at lengths[b] + t, t < num_new[b]; what falls beyond S is left out."""
    _check.array("append", "new", new, (cache.shape[0], None, cache.shape[1], *cache.shape[3:]), _check.FLOATS)
    for name, array in (("lengths", lengths), ("num_new", num_new)):
        _check.array("append", name, array, cache.shape[:1], (jnp.int32,))
    return dispatch.call("append", cache, new, lengths, num_new)
