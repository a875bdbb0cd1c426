"""Attention of a layer over its cache."""

import jax
import jax.numpy as jnp

from specmoe_jax import ops
from specmoe_jax.config.layer_config import AttentionConfig
from specmoe_jax.models.selection import attention as selection
from specmoe_jax.models.selection import handed
from specmoe_jax.models.selection.indexer import asked_of, selects
from specmoe_jax.types import Grown, KVCache, SomeRows, Tree


def attend(config: AttentionConfig, q, k, v, sinks, k_cache, v_cache, lengths, num_new, tree: Tree | None = None):
    """Appends k, v [B, T, K, D] to the caches [B, K, S, cache_dim] at lengths[b] and attends q [B, T, H, D] to them.

    sinks: [H] or None. tree: of the new tokens, None for a chain. Gated queries are [B, T, H, 2 D]. k_cache may be SomeRows.
    -> attended [B, T, H, D], behind it what was chosen where the next layer takes it (selection.handed.told), and the caches.
    Rows t >= num_new[b] write nothing and give zeros.
    """
    if isinstance(k_cache, SomeRows):
        assert tree is None  # whose nodes are moved together in whole caches
        kv, rows = KVCache(k=(k_cache.cache,), v=(v_cache,)), k_cache.rows
        attended, kv = attend_rows(config, q, k, v, kv, rows, lengths, num_new, sinks=sinks)
        return attended, SomeRows(kv.k[0], rows), kv.v[0]
    q, asked = asked_of(config, q)
    q, gate = gate_of(config, q)
    q, k, v = (_padded(config, a) for a in (q, k, v))
    if selects(config, k_cache.shape[2]):
        return selection.attend(config, q, asked, k, v, k_cache, v_cache, lengths, num_new, tree)
    mask = None if tree is None else tree.mask
    out, *caches = ops.chunked_attention(
        q, k, v, k_cache, v_cache, lengths, num_new=num_new, tree_mask=mask, sinks=sinks, **_options(config)
    )
    return handed.told(config, gated(out[..., : config.head_dim], gate), None), *caches


def attend_rows(config: AttentionConfig, q, k, v, kv: KVCache, rows, lengths, num_new, *, sinks=None) -> tuple[jax.Array, KVCache]:
    """`attend` of b sequences to one layer of B rows of cache, of which `rows` [b] int32 are theirs; another number is padding.

    q, k, v [b, T, ..., D]; lengths, num_new [b]. -> attended [b, T, H, D] and the cache.
    """
    held = kv.k[0].shape[0]
    rows = jnp.where((rows >= 0) & (rows < held), rows, held)

    def spread(a: jax.Array) -> jax.Array:  # the cache stays where it is; only the new rows move to their places
        return ops.put_rows(jnp.zeros((held, *a.shape[1:]), a.dtype), jnp.asarray(a), rows)

    q, k, v, lengths, num_new = (spread(a) for a in (q, k, v, lengths, num_new))
    attended, k_cache, v_cache = attend(config, q, k, v, sinks, kv.k[0], kv.v[0], lengths, num_new)
    return attended.at[rows].get(mode="fill", fill_value=0), KVCache(k=(k_cache,), v=(v_cache,))


def behind(grown: Grown, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A tree's last generation [B, k, ..] behind those before it, whose queries are zeros: they need no output again."""
    k, v = jnp.concatenate([grown.k, k], axis=1), jnp.concatenate([grown.v, v], axis=1)
    return jnp.pad(q, ((0, 0), (k.shape[1] - q.shape[1], 0), (0, 0), (0, 0))), k, v


def attend_paged(
    config: AttentionConfig, q, k, v, sinks, cache: ops.PackedCache, table, lengths, num_new, tree: Tree | None = None
):
    """As `attend`, over a paged packed cache: rows of `table` [B, P] int32 name the pages of each row. -> attended, cache."""
    q, asked = asked_of(config, q)
    q, gate = gate_of(config, q)
    if selects(config, table.shape[1] * cache.shape[2]):
        cache = append_paged(config, k, v, cache, table, lengths, num_new)
        return selection.attend_paged(config, _padded(config, q), asked, cache, table, lengths, num_new, tree), cache
    q, k, v = (_padded(config, a) for a in (q, k, v))
    outs = []
    for start in range(0, q.shape[1], ops.MAX_NEW):  # each piece finds those before it in the cache
        piece = slice(start, start + ops.MAX_NEW)
        out, cache = ops.chunked_attention_packed(
            q[:, piece],
            k[:, piece],
            v[:, piece],
            cache,
            lengths + jnp.minimum(num_new, start),
            block_table=table,
            num_new=jnp.clip(num_new - start, 0, q[:, piece].shape[1]),
            tree_mask=None if tree is None else tree.mask,  # a tree is one piece: it has at most MAX_NEW nodes
            sinks=sinks,
            **_options(config),
        )
        outs.append(out)
    return handed.told(config, gated(jnp.concatenate(outs, axis=1)[..., : config.head_dim], gate), None), cache


def gate_of(config: AttentionConfig, q: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Queries [B, T, H, D], and their gates where they have some."""
    return (q[..., : config.head_dim], q[..., config.head_dim :]) if config.gated else (q, None)


def gated(attended: jax.Array, gate: jax.Array | None) -> jax.Array:
    """Attention's outputs [B, T, H, D] times the sigmoids of their gates, where they have some."""
    return attended if gate is None else attended * jax.nn.sigmoid(gate)


def _padded(config: AttentionConfig, a: jax.Array) -> jax.Array:
    """[..., head_dim] -> [..., cache_dim]: zeros add nothing to a score."""
    return jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, config.cache_dim - config.head_dim)))


def _options(config: AttentionConfig) -> dict:
    return {"scale": config.scale, "window": config.window, "chunk": config.chunk}


def append_paged(config: AttentionConfig, k, v, cache: ops.PackedCache, table, lengths, num_new) -> ops.PackedCache:
    """The appending of `attend_paged` alone; k, v [B, T, K, D]. -> cache.

    By the same kernel, of one query head per KV head that attends the new position itself and no other.
    """
    k, v = _padded(config, k), _padded(config, v)
    for start in range(0, k.shape[1], ops.MAX_NEW):
        piece = slice(start, start + ops.MAX_NEW)
        _, cache = ops.chunked_attention_packed(
            k[:, piece],
            k[:, piece],
            v[:, piece],
            cache,
            lengths + jnp.minimum(num_new, start),
            block_table=table,
            num_new=jnp.clip(num_new - start, 0, k[:, piece].shape[1]),
            window=1,
        )
    return cache


def allowed(config: AttentionConfig, positions: jax.Array, columns: jax.Array) -> jax.Array:
    """Whether the query at each of `positions` [...] sees the key at each of `columns` [S] -> [..., S] bool."""
    row = positions[..., None]
    seen = columns <= row
    if config.window is not None:
        seen &= columns > row - config.window
    if config.chunk is not None:
        seen &= columns // config.chunk == row // config.chunk
    return seen


def within(lengths: jax.Array, queries: int, columns: int) -> jax.Array:
    """[B, queries, columns] bool: every query sees the first lengths[b] keys, at least one (of padding rows, which need a sum)."""
    seen = jnp.arange(columns) < jnp.maximum(lengths, 1)[:, None, None]
    return jnp.broadcast_to(seen, (len(lengths), queries, columns))


def scores_and_values(config: AttentionConfig, q, k, v, seen, sinks) -> jax.Array:
    """Attention in full. q [B, T, H, D]; k, v [B, K, S, D]; seen [B, T, S] bool -> [B, T, H, D]."""
    return ops.masked_attention(q, k, v, seen, sinks=sinks, scale=config.scale)
