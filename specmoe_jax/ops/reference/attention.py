"""chunked_attention, one request and one query at a time, from the definition."""

import functools

import jax
import jax.numpy as jnp

from specmoe_jax.ops import packed


def _append(cache, new, length, count, capacity):
    """cache [K, S, ...] with the first `count` of new [T, K, ...] at positions length, length + 1, ... below capacity."""
    for t in range(new.shape[0]):
        here = (jnp.arange(cache.shape[1]) == length + t) & (t < count) & (length + t < capacity)
        here = here.reshape(1, -1, *[1] * (cache.ndim - 2))
        cache = jnp.where(here, new[t][:, None].astype(cache.dtype), cache)
    return cache


def _attend(q, k, v, seen, sink, scale, softcap):
    """One query q [D] over keys and values [S, D] where seen [S]; sink: a score without a value, -inf for none."""
    logits = scale * jnp.matmul(k, q, precision="highest")
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(seen, logits, -jnp.inf)
    top = jnp.maximum(logits.max(), sink)
    weights = jnp.where(seen, jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0)), 0)
    total = weights.sum() + jnp.where(jnp.isfinite(sink), jnp.exp(sink - top), 0)
    mixed = jnp.matmul(weights, jnp.where(seen[:, None], v, 0), precision="highest")
    return mixed / jnp.where(total == 0, 1, total)


def _seen(t, tree, length, count, S, capacity, window, chunk):
    """[S] bool: what new token t attends; tree [T, T]: which new token attends which."""
    T = tree.shape[0]
    tree = tree & (jnp.arange(T) < count)  # columns that exist
    depth = jnp.maximum(tree.sum(axis=1) - 1, 0)
    node = jnp.arange(S) - length
    new = node >= 0
    node = jnp.clip(node, 0, T - 1)
    position = jnp.where(new, length + depth[node], jnp.arange(S))
    seen = jnp.where(new, tree[t, node] & (jnp.arange(S) < length + T), True) & (jnp.arange(S) < capacity) & (t < count)
    if window:
        seen &= position > length + depth[t] - window
    if chunk:
        seen &= position // chunk == (length + depth[t]) // chunk
    return seen


def _request(q, new, parts, length, count, capacity, tree, sinks, *, scale, window, softcap, chunk):
    """q [T, H, D], new: arrays [T, K, ...], parts: arrays [K, S, ...] that `packed.row_parts` names. -> out [T, H, D], parts."""
    T, H, _ = q.shape
    parts = [_append(x, n, length, count, capacity) for x, n in zip(parts, new, strict=True)]
    k, v = (jnp.repeat(x.astype(jnp.float32), H // x.shape[0], axis=0) for x in packed.floats_of(parts))
    seen = jnp.stack([_seen(t, tree, length, count, k.shape[1], capacity, window, chunk) for t in range(T)])
    one = functools.partial(_attend, scale=scale, softcap=softcap)
    heads = jax.vmap(one, in_axes=(0, 0, 0, None, 0))  # over the query heads
    out = jax.vmap(heads, in_axes=(0, None, None, 0, None))(q.astype(jnp.float32), k, v, seen, sinks)
    return out.astype(q.dtype), parts


def _batch(q, new, parts, lengths, capacity, *, tree_mask, num_new, sinks, scale, **options):
    B, T, H, D = q.shape
    num_new = jnp.full((B,), T) if num_new is None else jnp.clip(num_new, 0, T)
    tree = jnp.tril(jnp.ones((T, T), bool)) if tree_mask is None else tree_mask
    sinks = jnp.full((H,), -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    one = functools.partial(_request, scale=D**-0.5 if scale is None else scale, **options)
    rows = (q, new, parts, jnp.clip(lengths, 0, capacity), num_new, capacity, jnp.broadcast_to(tree, (B, T, T)))
    return jax.vmap(one, in_axes=(*[0] * len(rows), None))(*rows, sinks)


def chunked_attention_ref(
    q,
    k_new,
    v_new,
    k_cache,
    v_cache,
    lengths,
    *,
    tree_mask=None,
    scale=None,
    window=None,
    softcap=None,
    num_new=None,
    sinks=None,
    chunk=None,
):
    """As ops.chunked_attention."""
    options = dict(tree_mask=tree_mask, scale=scale, window=window, softcap=softcap, num_new=num_new, sinks=sinks, chunk=chunk)
    capacity = jnp.full((q.shape[0],), k_cache.shape[2])
    out, caches = _batch(q, [k_new, v_new], [k_cache, v_cache], lengths, capacity, **options)
    return out, *caches


def chunked_attention_packed_ref(
    q,
    k_new,
    v_new,
    cache,
    lengths,
    *,
    block_table=None,
    tree_mask=None,
    scale=None,
    window=None,
    softcap=None,
    num_new=None,
    sinks=None,
    chunk=None,
):
    """As ops.chunked_attention_packed."""
    options = dict(tree_mask=tree_mask, scale=scale, window=window, softcap=softcap, num_new=num_new, sinks=sinks, chunk=chunk)
    whole = packed.row_parts(cache)
    rows = whole if block_table is None else [packed.gather_pages(x, block_table) for x in whole]
    capacity = packed.capacities(cache, block_table, q.shape[0])
    out, rows = _batch(q, packed.new_parts(cache, k_new, v_new), rows, lengths, capacity, **options)
    if block_table is not None:
        rows = [packed.scatter_pages(x, r, block_table) for x, r in zip(whole, rows, strict=True)]
    return out, packed.from_row_parts(rows)
