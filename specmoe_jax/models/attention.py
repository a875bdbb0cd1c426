"""Attention over the cache: the kernel where it knows the layer's variant, else its jnp form."""

import jax
import jax.numpy as jnp

from specmoe_jax import ops
from specmoe_jax.config.layer_config import AttentionConfig
from specmoe_jax.ops import attention_ref, packed
from specmoe_jax.ops.products import einsum
from specmoe_jax.types import KVCache, Tree


def attend(config: AttentionConfig, q, k, v, sinks, k_cache, v_cache, lengths, num_new, tree: Tree | None = None):
    """Appends k, v [B, T, K, D] to the caches [B, K, S, cache_dim] at lengths[b] and attends q [B, T, H, D] to them.

    sinks: [H] or None. tree: of the new tokens, None for a chain.
    -> attended [B, T, H, D] and the caches. Rows t >= num_new[b] write nothing and give zeros.
    """
    dim, missing = config.head_dim, config.cache_dim - config.head_dim
    q, k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, missing))) for a in (q, k, v))  # zeros add nothing to a score
    args = (q, k, v, k_cache, v_cache, lengths)
    if sinks is None and (config.chunk is None or config.chunk >= k_cache.shape[2]):
        mask = None if tree is None else tree.mask
        out, *caches = ops.chunked_attention(*args, num_new=num_new, window=config.window, scale=config.scale, tree_mask=mask)
    else:
        out, *caches = _attend_jnp(config, *args, num_new=num_new, sinks=sinks, tree=tree)
    return out[..., :dim], *caches


def attend_rows(config: AttentionConfig, q, k, v, kv: KVCache, rows, lengths, num_new) -> tuple[jax.Array, KVCache]:
    """`attend` of b sequences to one layer of B rows of cache, of which `rows` [b] int32 are theirs; another number is padding.

    q, k, v [b, T, ..., D]; lengths, num_new [b]. -> attended [b, T, H, D] and the cache.
    """
    held = kv.k[0].shape[0]
    rows = jnp.where((rows >= 0) & (rows < held), rows, held)

    def spread(a: jax.Array) -> jax.Array:  # the cache stays where it is; only the new rows move to their places
        return jnp.zeros((held, *a.shape[1:]), a.dtype).at[rows].set(a, mode="drop")

    attended, k_cache, v_cache = attend(config, *map(spread, (q, k, v)), None, kv.k[0], kv.v[0], spread(lengths), spread(num_new))
    return attended.at[rows].get(mode="fill", fill_value=0), KVCache(k=(k_cache,), v=(v_cache,))


def attend_paged(
    config: AttentionConfig, q, k, v, sinks, cache: ops.PackedCache, table, lengths, num_new, tree: Tree | None = None
):
    """As `attend`, over a paged packed cache: rows of `table` [B, P] int32 name the pages of each row. -> attended, cache.

    What the kernel does not know (sinks, chunks) is done on unpacked rows of the whole table: right, and slow.
    """
    dim, missing = config.head_dim, config.cache_dim - config.head_dim
    q, k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, missing))) for a in (q, k, v))
    positions = table.shape[1] * cache.shape[2]
    if sinks is not None or (config.chunk is not None and config.chunk < positions):
        rows = packed.gather(cache, table)
        out, *rows = _attend_jnp(config, q, k, v, *rows, lengths, num_new=num_new, sinks=sinks, tree=tree)
        return out[..., :dim], packed.scatter(cache, table, *rows)
    outs = []
    for start in range(0, q.shape[1], ops.MAX_NEW):  # each piece finds those before it in the cache
        piece = slice(start, start + ops.MAX_NEW)
        new = jnp.clip(num_new - start, 0, q[:, piece].shape[1])
        out, cache = ops.chunked_attention_packed(
            q[:, piece],
            k[:, piece],
            v[:, piece],
            cache,
            lengths + jnp.minimum(num_new, start),
            block_table=table,
            num_new=new,
            tree_mask=None if tree is None else tree.mask,  # a tree is one piece: it has at most MAX_NEW nodes
            window=config.window,
            scale=config.scale,
        )
        outs.append(out)
    return jnp.concatenate(outs, axis=1)[..., :dim], cache


def append_paged(config: AttentionConfig, k, v, cache: ops.PackedCache, table, lengths, num_new) -> ops.PackedCache:
    """The appending of `attend_paged` alone; k, v [B, T, K, D]. -> cache.

    By the same kernel, of one query head per KV head that attends the new position itself and no other.
    """
    k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, config.cache_dim - config.head_dim))) for a in (k, v))
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


def softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Over the last axis of scores [B, H, T, S]; a sink is one more score per head that takes its share and has no value."""
    top = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is None:
        p = jnp.exp(scores - top)
        return p / jnp.sum(p, axis=-1, keepdims=True)
    sink = sinks.astype(jnp.float32)[:, None, None]
    top = jnp.maximum(top, sink)
    p = jnp.exp(scores - top)
    return p / (jnp.sum(p, axis=-1, keepdims=True) + jnp.exp(sink - top))


def scores_and_values(config: AttentionConfig, q, k, v, seen, sinks) -> jax.Array:
    """Attention in full. q [B, T, H, D]; k, v [B, K, S, D]; seen [B, T, S] bool -> [B, T, H, D]."""
    batch, length, heads, dim = q.shape
    grouped = q.reshape(batch, length, k.shape[1], -1, dim)
    scores = config.scale * einsum("btkgd,bksd->bkgts", grouped, k)
    scores = jnp.where(seen[:, None], scores.reshape(batch, heads, length, -1), -jnp.inf)
    p = softmax(scores, sinks).reshape(batch, k.shape[1], -1, length, k.shape[2])
    out = einsum("bkgts,bksd->btkgd", p, v)
    return out.reshape(q.shape).astype(q.dtype)


def _attend_jnp(config: AttentionConfig, q, k, v, k_cache, v_cache, lengths, *, num_new, sinks, tree: Tree | None = None):
    """As the kernel, for what it does not know: sinks (GPT-OSS) and chunks shorter than the cache (Llama-4)."""
    k_cache = attention_ref.append(k_cache, k, lengths, num_new)
    v_cache = attention_ref.append(v_cache, v, lengths, num_new)
    steps, columns = jnp.arange(q.shape[1]), jnp.arange(k_cache.shape[2])
    if tree is None:
        seen = allowed(config, lengths[:, None] + steps, columns)
    else:
        seen = _allowed_in_tree(config, lengths, columns, tree)
    out = scores_and_values(config, q, k_cache, v_cache, seen, sinks)
    return jnp.where((steps < num_new[:, None])[..., None, None], out, 0), k_cache, v_cache


def _allowed_in_tree(config: AttentionConfig, lengths: jax.Array, columns: jax.Array, tree: Tree) -> jax.Array:
    """`allowed` where the columns [S] after lengths [B] are the nodes of a tree, at positions by depth. -> [B, T, S] bool."""
    node = columns - lengths[:, None]  # [B, S]
    new, node = (node >= 0) & (node < tree.depths.shape[1]), jnp.clip(node, 0, tree.depths.shape[1] - 1)
    positions = lengths[:, None] + tree.depths  # [B, T]
    column_positions = jnp.where(new, jnp.take_along_axis(positions, node, axis=1), columns)
    related = jnp.take_along_axis(tree.mask, node[:, None], axis=2)  # [B, T, S]
    related = jnp.where(new[:, None], related, (columns < lengths[:, None])[:, None])
    return related & allowed(config, positions, column_positions[:, None])
