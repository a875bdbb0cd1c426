"""chunked_attention in jnp: what the kernel is checked against, and what runs where there is no kernel."""

import math

import jax
import jax.numpy as jnp

from specmoe_jax.ops.products import einsum


def append(cache: jax.Array, new: jax.Array, lengths: jax.Array, num_new: jax.Array) -> jax.Array:
    """Write new [B, T, K, D] into cache [B, K, S, D] at lengths[b] + t, t < num_new[b]; what falls beyond S is dropped."""
    S = cache.shape[2]
    steps = jnp.arange(new.shape[1])
    at = jnp.where(steps < num_new[:, None], lengths[:, None] + steps, S)  # [B, T]
    new = new.astype(cache.dtype)
    if cache.dtype == jnp.bfloat16:  # XLA:CPU converts the whole cache to float32 and back for a bfloat16 scatter; not for uint16
        bits = append(
            jax.lax.bitcast_convert_type(cache, jnp.uint16), jax.lax.bitcast_convert_type(new, jnp.uint16), lengths, num_new
        )
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    return cache.at[jnp.arange(new.shape[0])[:, None], :, at].set(new, mode="drop")


def new_mask(tree_mask: jax.Array | None, B: int, T: int, num_new: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """allow [B, T, T] among the new tokens, depth [B, T] = ancestors of each (t for a chain); the window counts depths."""
    mask = jnp.tril(jnp.ones((T, T), bool)) if tree_mask is None else tree_mask.astype(bool)
    mask = jnp.broadcast_to(mask, (B, T, T))
    exists = jnp.arange(T) < num_new[:, None]  # [B, T]
    mask = mask & exists[:, None, :] & exists[:, :, None]
    depth = jnp.maximum(mask.sum(-1) - 1, 0)
    if window:
        mask = mask & (depth[:, None, :] > depth[:, :, None] - window)
    return mask, depth


def attended(tree_mask, lengths, num_new, T: int, S: int, window) -> jax.Array:
    """[B, T, S]: the cache positions that each new token attends, after the append."""
    B = lengths.shape[0]
    allow, depth = new_mask(tree_mask, B, T, num_new, window)
    at = jnp.arange(S)
    prefix = at < lengths[:, None, None]  # [B, 1, S]
    if window:
        prefix = prefix & (at > (lengths[:, None] + depth)[..., None] - window)
    column = at - lengths[:, None]  # [B, S], which new token lives there
    inside = (column >= 0) & (column < T)
    picked = jnp.take_along_axis(allow, jnp.clip(column, 0, T - 1)[:, None, :], axis=2)
    return (prefix | (picked & inside[:, None, :])) & (jnp.arange(T) < num_new[:, None])[..., None]


def attend(q, k_cache, v_cache, mask, *, scale, softcap) -> jax.Array:
    """q [B, T, H, D] over caches [B, K, S, D] under mask [B, T, S]; rows without any position give zeros."""
    B, T, H, D = q.shape
    K = k_cache.shape[1]
    logits = scale * einsum("btkgd,bksd->bkgts", q.reshape(B, T, K, H // K, D), k_cache)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    mask = mask[:, None, None]
    logits = jnp.where(mask, logits, -jnp.inf)
    top = jnp.max(logits, -1, keepdims=True)
    p = jnp.where(mask, jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0)), 0)
    total = p.sum(-1, keepdims=True)
    p = p / jnp.where(total == 0, 1, total)
    used = mask.any((1, 2, 3))[:, None, :, None]  # [B, 1, S, 1]: 0 * NaN of a row that nobody attends is still NaN
    out = einsum("bkgts,bksd->btkgd", p, jnp.where(used, v_cache, 0))
    return out.reshape(B, T, H, D).astype(q.dtype)


def chunked_attention_ref(
    q, k_new, v_new, k_cache, v_cache, lengths, *, tree_mask=None, scale=None, window=None, softcap=None, num_new=None
):
    """As chunked_attention, in jnp only; bits may depend on T and B."""
    B, T, _, D = q.shape
    S = k_cache.shape[2]
    lengths = jnp.clip(lengths, 0, S).astype(jnp.int32)
    num_new = jnp.full((B,), T, jnp.int32) if num_new is None else jnp.clip(num_new, 0, T).astype(jnp.int32)
    k_cache = append(k_cache, k_new, lengths, num_new)
    v_cache = append(v_cache, v_new, lengths, num_new)
    mask = attended(tree_mask, lengths, num_new, T, S, window)
    out = attend(q, k_cache, v_cache, mask, scale=1 / math.sqrt(D) if scale is None else scale, softcap=softcap)
    return out, k_cache, v_cache
