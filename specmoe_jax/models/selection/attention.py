"""Attention over a cache of more positions than its indexer keeps: each query reads the rows that are chosen for it, no other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from specmoe_jax import ops
from specmoe_jax.config.layer_config import AttentionConfig
from specmoe_jax.models.selection import handed
from specmoe_jax.models.selection.indexer import chosen
from specmoe_jax.ops import packed
from specmoe_jax.ops.packed import BLOCK
from specmoe_jax.ops.xla.attention import seen_by_new
from specmoe_jax.types import Tree

QUERIES = 8  # of a row, whose chosen rows are gathered at once


def attend(config: AttentionConfig, q, asked, k, v, k_cache, v_cache, lengths, num_new, tree: Tree | None = None):
    """As models.attention.attend, q, k and v padded to cache_dim. asked: see indexer.asked_of.

    -> attended [B, T, H, D], behind it the choice where the next layer takes it (see handed.told), and the caches.
    """
    lengths = jnp.clip(lengths, 0, k_cache.shape[2])
    k_cache, v_cache = (ops.append(rows, new, lengths, num_new) for rows, new in ((k_cache, k), (v_cache, v)))

    def take(places: jax.Array) -> tuple[jax.Array, ...]:
        flat = places.reshape(len(places), -1, 1)
        return tuple(jnp.take_along_axis(rows[:, 0], flat, axis=1) for rows in (k_cache, v_cache))

    seen = _seen(tree, lengths, num_new, q.shape[1], k_cache.shape[2])
    choice = chosen(config, asked, v_cache[:, 0], seen)
    return handed.told(config, _over_chosen(config, q, *choice, take), choice), k_cache, v_cache


def attend_paged(config: AttentionConfig, q, asked, cache: ops.PackedCache, table, lengths, num_new, tree: Tree | None = None):
    """Over a paged cache [pages of S] to which the new rows have been appended. -> attended, as `attend`."""
    pages, _, page, _ = cache.shape
    capacity, held = packed.capacities(cache, table, len(q)), jnp.clip(table, 0, pages - 1)
    values = cache.v[held, 0]  # [B, P, S, cache_dim]

    def take(places: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat = places.reshape(len(places), -1)
        row, at = jnp.take_along_axis(held, flat // page, axis=1), flat % page
        k = cache.k[row, 0, at // BLOCK, :, at % BLOCK]
        return k.reshape(*flat.shape, -1), cache.v[row, 0, at]

    seen = _seen(tree, jnp.clip(lengths, 0, capacity), num_new, q.shape[1], table.shape[1] * page)
    seen &= jnp.arange(seen.shape[2]) < capacity[:, None, None]
    choice = chosen(config, asked, values.reshape(len(q), -1, values.shape[-1]), seen)
    return handed.told(config, _over_chosen(config, q, *choice, take), choice)


def _seen(tree: Tree | None, lengths, num_new, count: int, positions: int) -> jax.Array:
    mask = None if tree is None else tree.mask
    return seen_by_new(mask, lengths, jnp.clip(num_new, 0, count), count, positions, window=None, chunk=None)


def _over_chosen(config: AttentionConfig, q, places, there, take: Callable) -> jax.Array:
    """q [B, T, H, cache_dim] attends its own rows: places, there [B, T, n] -> [B, T, H, D].

    take: [B, t, n] -> keys and values [B, t * n, cache_dim].
    """
    batch, total, count = places.shape
    each = min(QUERIES, total)
    missing = -total % each

    def cut(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, ((0, 0), (0, missing), *((0, 0),) * (a.ndim - 2)))
        return a.reshape(batch, -1, each, *a.shape[2:]).swapaxes(0, 1)

    def some(given) -> jax.Array:
        q, places, there = given
        k, v = (rows.reshape(batch * each, 1, count, -1) for rows in take(places))
        alone = q.reshape(batch * each, 1, *q.shape[2:])
        out = ops.masked_attention(alone, k, v, there.reshape(batch * each, 1, count), scale=config.scale)
        return out.reshape(q.shape)

    out = jax.lax.map(some, (cut(q), cut(places), cut(there)))
    return out.swapaxes(0, 1).reshape(batch, -1, *q.shape[2:])[:, :total, :, : config.head_dim]
