"""Attention to long caches: what is accepted, and what is asked of every implementation."""

import math

import jax
import jax.numpy as jnp

from specmoe_jax.ops import _check, dispatch
from specmoe_jax.ops.cpu.attention import MAX_NEW
from specmoe_jax.ops.packed import BLOCK, DTYPES


def _check_new(op, q, k_new, v_new, lengths, tree_mask, num_new, sinks) -> tuple[int, int, int, int, int]:
    """Refuse what the cache has no part in; returns (B, T, H, K, D)."""
    _check.array(op, "q", q, (None,) * 4, _check.FLOATS)
    B, T, H, D = q.shape
    _check.array(op, "k_new", k_new, (B, T, None, D), _check.FLOATS)
    K = k_new.shape[2]
    _check.array(op, "v_new", v_new, (B, T, K, D), (k_new.dtype,))
    _check.array(op, "lengths", lengths, (B,), (jnp.int32,))
    _check.that(op, K > 0 and H % K == 0, f"H {H} must be a multiple of K {K}")
    _check.that(op, D % 8 == 0 and D > 0, f"D is {D}, must be a multiple of 8")
    if num_new is not None:
        _check.array(op, "num_new", num_new, (B,), (jnp.int32,))
    if tree_mask is not None:
        shape = (T, T) if len(tree_mask.shape) == 2 else (B, T, T)
        _check.array(op, "tree_mask", tree_mask, shape, (jnp.bool_,))
        _check.that(op, T <= MAX_NEW, f"a tree mask has at most {MAX_NEW} new tokens, got T {T}")
    if sinks is not None:
        _check.array(op, "sinks", sinks, (H,), _check.FLOATS)
    return B, T, H, K, D


def _check_cache(op, cache, B, K, D, table) -> None:
    rows, _, S, _ = cache.shape
    _check.array(op, "cache.v", cache.v, (None if table is not None else B, K, None, D), DTYPES)
    u = 4 // cache.dtype.itemsize
    _check.array(op, "cache.k", cache.k, (rows, K, S // BLOCK, D // u, BLOCK, u), (cache.dtype,))
    scales = (rows, K, S) if cache.dtype == jnp.int8 else (0,)
    _check.array(op, "cache.k_scale", cache.k_scale, scales, (jnp.float32,))
    _check.array(op, "cache.v_scale", cache.v_scale, scales, (jnp.float32,))
    if table is not None:
        _check.array(op, "block_table", table, (B, None), (jnp.int32,))


def _options(D: int, capacity: int, *, scale, window, softcap, chunk) -> dict:
    """With the default of scale, and without a chunk that no position of the cache is beyond."""
    chunk = None if chunk is None or chunk >= capacity else chunk
    return {"scale": 1 / math.sqrt(D) if scale is None else scale, "window": window, "softcap": softcap, "chunk": chunk}


def chunked_attention(
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
    """Append T new K/V rows to the cache and attend the T new queries to it (SpecMoEOff 5.1).

    q [B, T, H, D], k_new and v_new [B, T, K, D], k_cache and v_cache [B, K, S, D], float32 or bfloat16; D a multiple of 8.
    lengths [B] int32: rows already in the cache. num_new [B] int32 (default T): row t >= num_new[b] gives zeros and writes nothing.
    tree_mask [T, T] or [B, T, T] bool: new token (row) attends new token (column), itself included; None is causal. window: attend
    the last `window` positions, where a token's position is lengths[b] plus the number of its ancestors. softcap: c * tanh(x / c).
    sinks [H]: one more score per head that has no value (GPT-OSS). chunk: attend within position // chunk alone (Llama-4).
    T > 64 is for chains alone.

    Returns out [B, T, H, D] in q's dtype and the caches with the new rows at lengths[b], in place when they are donated. A row with
    lengths[b] + t >= S is not written and attended by nobody. A token that attends nothing gives zeros.

    Without sinks and chunks the output of a token on a CPU is bit for bit the same for any T, batch mates, thread count, and row,
    packed or paged layout, within one instruction set. Lowered for another platform, it is a composition of XLA's operations.
    """
    op = "chunked_attention"
    B, T, _, K, D = _check_new(op, q, k_new, v_new, lengths, tree_mask, num_new, sinks)
    _check.array(op, "k_cache", k_cache, (B, K, None, D), _check.FLOATS)
    _check.array(op, "v_cache", v_cache, k_cache.shape, (k_cache.dtype,))
    num_new = jnp.full((B,), T, jnp.int32) if num_new is None else num_new
    options = _options(D, k_cache.shape[2], scale=scale, window=window, softcap=softcap, chunk=chunk)
    return dispatch.call(op, q, k_new, v_new, k_cache, v_cache, lengths, num_new, tree_mask, sinks, **options)


def chunked_attention_packed(
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
    """chunked_attention over a PackedCache; returns (out, cache'), the cache in place when it is donated. T is at most 64.

    block_table [B, P] int32: token s of request b lives in cache row block_table[b, s // S] (pages of S tokens); a request's
    capacity ends at its first entry outside [0, rows). No page that is written may be shared. An int8 cache is quantised on append.
    """
    op = "chunked_attention_packed"
    B, T, _, K, D = _check_new(op, q, k_new, v_new, lengths, tree_mask, num_new, sinks)
    _check.that(op, T <= MAX_NEW, f"at most {MAX_NEW} new tokens a call, got T {T}")
    _check_cache(op, cache, B, K, D, block_table)
    num_new = jnp.full((B,), T, jnp.int32) if num_new is None else num_new
    capacity = cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    options = _options(D, capacity, scale=scale, window=window, softcap=softcap, chunk=chunk)
    return dispatch.call(op, q, k_new, v_new, cache, lengths, num_new, tree_mask, block_table, sinks, **options)


def masked_attention(q, k, v, seen, *, sinks=None, scale=None, softcap=None) -> jax.Array:
    """q [B, T, H, D] attends keys and values [B, K, S, D] where seen [B, T, S] bool; a row without any position gives zeros."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    return dispatch.call("masked_attention", q, k, v, seen, sinks, scale=scale, softcap=softcap)


def prefill_attention(q, k_new, v_new, k_rows, v_rows, lengths, num_new, *, sinks=None, scale=None, window=None, chunk=None):
    """Writes k_new, v_new [B, T, K, D] into the staged rows [B, K, S, D] and attends q [B, T, H, D] to them.

    S: a multiple of T. lengths [B] int32: all rows with new tokens are at the same multiple of T, as the chunks of prompts are.
    Returns out [B, T, H, D] and the rows. Rows t >= num_new[b] give zeros; what is beyond a row's own tokens in the staged rows is
    undefined and attended by nobody.
    """
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    arrays = (q, k_new, v_new, k_rows, v_rows, lengths, num_new, sinks)
    return dispatch.call("prefill_attention", *arrays, scale=scale, window=window, chunk=chunk)
