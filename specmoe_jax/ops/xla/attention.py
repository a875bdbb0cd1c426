"""chunked_attention over rows and over a packed cache, and attention under a given mask: matrices of scores in full."""

import jax
import jax.numpy as jnp

from specmoe_jax.ops import packed as layout
from specmoe_jax.ops.products import einsum
from specmoe_jax.ops.xla.rows import append, put


def seen_by_new(tree_mask, lengths, num_new, T: int, S: int, *, window, chunk) -> jax.Array:
    """[B, T, S]: the cache positions that each new token attends, after the append.

    A token's position is lengths[b] plus its depth, the number of its ancestors among the new tokens (t for a chain); windows and
    chunks count positions.
    """
    mask = jnp.tril(jnp.ones((T, T), bool)) if tree_mask is None else tree_mask.astype(bool)
    exists = jnp.arange(T) < num_new[:, None]  # [B, T]
    mask = jnp.broadcast_to(mask, (len(lengths), T, T)) & exists[:, None, :] & exists[:, :, None]
    depth = jnp.maximum(mask.sum(-1) - 1, 0)
    at = jnp.arange(S)
    node = at - lengths[:, None]  # [B, S], which new token lives there
    inside, node = (node >= 0) & (node < T), jnp.clip(node, 0, T - 1)
    related = jnp.take_along_axis(mask, node[:, None, :], axis=2) & inside[:, None, :]
    related |= (at < lengths[:, None, None]) & exists[..., None]
    rows = lengths[:, None] + depth
    columns = jnp.where(inside, jnp.take_along_axis(rows, node, axis=1), at)  # [B, S]
    return related & near(rows[..., None], columns[:, None], window=window, chunk=chunk)


def near(row: jax.Array, column: jax.Array, *, window: int | None, chunk: int | None) -> jax.Array:
    """Whether the window and the chunk of a query at position `row` hold the key at position `column`, which is not after it."""
    seen = jnp.ones(jnp.broadcast_shapes(row.shape, column.shape), bool)
    if window:
        seen &= column > row - window
    if chunk:
        seen &= column // chunk == row // chunk
    return seen


def masked(q, k, v, seen, sinks, *, scale, softcap) -> jax.Array:
    """q [B, T, H, D] over keys and values [B, K, S, D] under seen [B, T, S]; rows without any position give zeros."""
    B, T, H, D = q.shape
    K = k.shape[1]
    logits = scale * einsum("btkgd,bksd->bkgts", q.reshape(B, T, K, H // K, D), k)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    mask = seen[:, None, None]
    logits = jnp.where(mask, logits, -jnp.inf)
    top = jnp.max(logits, -1, keepdims=True)
    if sinks is not None:  # one more score per head, which takes its share and has no value
        sinks = sinks.astype(jnp.float32).reshape(K, -1, 1, 1)
        top = jnp.maximum(top, sinks)
    top = jnp.where(jnp.isfinite(top), top, 0)
    p = jnp.where(mask, jnp.exp(logits - top), 0)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    p = p / jnp.where(total == 0, 1, total)
    used = mask.any((1, 2, 3))[:, None, :, None]  # [B, 1, S, 1]: 0 * NaN of a row that nobody attends is still NaN
    out = einsum("bkgts,bksd->btkgd", p, jnp.where(used, v, 0))
    return out.reshape(B, T, H, D).astype(q.dtype)


def rows(q, k_new, v_new, k_cache, v_cache, lengths, num_new, tree_mask, sinks, *, scale, window, softcap, chunk, put=put):
    """ops.chunked_attention; bits may depend on T and B."""
    T, S = q.shape[1], k_cache.shape[2]
    lengths = jnp.clip(lengths, 0, S).astype(jnp.int32)
    num_new = jnp.clip(num_new, 0, T).astype(jnp.int32)
    k_cache = append(k_cache, k_new, lengths, num_new, put=put)
    v_cache = append(v_cache, v_new, lengths, num_new, put=put)
    seen = seen_by_new(tree_mask, lengths, num_new, T, S, window=window, chunk=chunk)
    return masked(q, k_cache, v_cache, seen, sinks, scale=scale, softcap=softcap), k_cache, v_cache


def packed(q, k_new, v_new, cache, lengths, num_new, tree_mask, block_table, sinks, *, scale, window, softcap, chunk):
    """ops.chunked_attention_packed: unpack, append, attend, pack."""
    B, T = q.shape[:2]
    whole = layout.row_parts(cache)
    rows = whole if block_table is None else [layout.gather_pages(x, block_table) for x in whole]
    S, capacity = rows[0].shape[2], layout.capacities(cache, block_table, B)
    lengths = jnp.clip(lengths, 0, capacity).astype(jnp.int32)
    num_new = jnp.clip(num_new, 0, T).astype(jnp.int32)
    written = jnp.minimum(num_new, capacity - lengths).astype(jnp.int32)
    new = layout.new_parts(cache, k_new, v_new)
    rows = [append(x, n, lengths, written) for x, n in zip(rows, new, strict=True)]
    seen = seen_by_new(tree_mask, lengths, num_new, T, S, window=window, chunk=chunk)
    seen &= jnp.arange(S) < capacity[:, None, None]
    out = masked(q, *layout.floats_of(rows), seen, sinks, scale=scale, softcap=softcap)
    if block_table is not None:
        rows = [layout.scatter_pages(x, r, block_table) for x, r in zip(whole, rows, strict=True)]
    return out, layout.from_row_parts(rows)
