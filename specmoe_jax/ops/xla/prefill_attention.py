"""Attention of one chunk of prompts over the keys and values of the chunks before it.

An online softmax over blocks of keys (FlashAttention, Dao et al. 2022, in jnp): no matrix of scores over the whole prompt. Own
code, because jax.nn.dot_product_attention takes a causal chunk behind others as a full mask only, and its fused form no float32.
"""

import jax
import jax.numpy as jnp

from specmoe_jax.ops.products import einsum
from specmoe_jax.ops.xla.attention import near


def prefill(q, k_new, v_new, k_rows, v_rows, lengths, num_new, sinks, *, scale, window, chunk):
    """ops.prefill_attention."""
    start = jnp.max(jnp.where(num_new > 0, lengths, 0))
    k_rows, v_rows = (
        jax.lax.dynamic_update_slice_in_dim(rows, new.swapaxes(1, 2).astype(rows.dtype), start, axis=2)
        for rows, new in ((k_rows, k_new), (v_rows, v_new))
    )
    out = _online_softmax(q, k_rows, v_rows, lengths, num_new, sinks, start, scale=scale, window=window, chunk=chunk)
    valid = jnp.arange(q.shape[1]) < num_new[:, None]
    return jnp.where(valid[..., None, None], out, 0).astype(q.dtype), k_rows, v_rows


def _online_softmax(q, k_rows, v_rows, lengths, num_new, sinks, start, *, scale, window, chunk) -> jax.Array:
    """-> [B, T, H, D] float32. Blocks are as long as the chunk of queries; what lies before a window is skipped."""
    batch, length, heads, dim = q.shape
    groups = k_rows.shape[1]
    grouped = q.reshape(batch, length, groups, heads // groups, dim)
    positions = (lengths[:, None] + jnp.arange(length))[..., None]  # [B, T, 1]

    def block(j, carry):
        top, total, mixed = carry
        columns = j * length + jnp.arange(length)
        keys, values = (jax.lax.dynamic_slice_in_dim(rows, j * length, length, axis=2) for rows in (k_rows, v_rows))
        own = columns < (lengths + num_new)[:, None]  # 0 * NaN of another request's left-over row is still NaN
        values = jnp.where(own[:, None, :, None], values, 0)
        scores = scale * einsum("btkgd,bksd->bkgts", grouped, keys)
        seen = (columns <= positions) & near(positions, columns, window=window, chunk=chunk)
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        higher = jnp.maximum(top, scores.max(-1))
        finite = jnp.where(jnp.isfinite(higher), higher, 0)
        p, factor = jnp.exp(scores - finite[..., None]), jnp.exp(top - finite)
        mixed = factor[..., None] * mixed + einsum("bkgts,bksd->bkgtd", p.astype(values.dtype), values)
        return higher, factor * total + p.sum(-1), mixed

    shape = (batch, groups, heads // groups, length)
    if sinks is None:
        top, total = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:  # a sink is one more score per head that has no value
        top = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(groups, -1, 1), shape)
        total = jnp.ones(shape, jnp.float32)
    first = 0 if window is None else jnp.maximum(start - window + 1, 0) // length
    carry = (top, total, jnp.zeros((*shape, dim), jnp.float32))
    _, total, mixed = jax.lax.fori_loop(first, start // length + 1, block, carry)
    out = mixed / jnp.where(total == 0, 1, total)[..., None]  # [B, K, H / K, T, D]
    return jnp.moveaxis(out, 3, 1).reshape(q.shape)
