"""chunked_attention: T new tokens of each request against its long cache, through the C++ kernel where the platform is a CPU."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.ops import _check, _ffi
from specmoe_jax.ops.attention_ref import chunked_attention_ref

MAX_NEW = 64  # new tokens of one kernel call: the tree mask of a token is one 64-bit word


def check_new(op, q, k_new, v_new, lengths, tree_mask, num_new, D_multiple=8) -> tuple[int, int, int, int, int]:
    """Refuse what the cache has no part in; returns (B, T, H, K, D)."""
    _check.array(op, "q", q, (None,) * 4, _check.FLOATS)
    B, T, H, D = q.shape
    _check.array(op, "k_new", k_new, (B, T, None, D), _check.FLOATS)
    K = k_new.shape[2]
    _check.array(op, "v_new", v_new, (B, T, K, D), (k_new.dtype,))
    _check.array(op, "lengths", lengths, (B,), (jnp.int32,))
    _check.that(op, K > 0 and H % K == 0, f"H {H} must be a multiple of K {K}")
    _check.that(op, D % D_multiple == 0 and D > 0, f"D is {D}, must be a multiple of {D_multiple}")
    if num_new is not None:
        _check.array(op, "num_new", num_new, (B,), (jnp.int32,))
    if tree_mask is not None:
        shape = (T, T) if len(tree_mask.shape) == 2 else (B, T, T)
        _check.array(op, "tree_mask", tree_mask, shape, (jnp.bool_,))
        _check.that(op, T <= MAX_NEW, f"a tree mask has at most {MAX_NEW} new tokens, got T {T}")
    return B, T, H, K, D


def kernel_call(q, k_new, v_new, lengths, num_new, tree_mask, table, caches, *, scale, window, softcap):
    """The FFI call. caches (k, v, k_scale, v_scale) are aliased: in place under donation, copied otherwise."""
    B, T, _, D = q.shape
    num_new = jnp.full((B,), T, jnp.int32) if num_new is None else num_new
    tree_mask = jnp.zeros((0,), bool) if tree_mask is None else tree_mask
    table = jnp.zeros((0,), jnp.int32) if table is None else table
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *caches)]
    call = jax.ffi.ffi_call(
        "specmoe_chunked_attention", shapes, vmap_method="sequential", input_output_aliases={7 + i: 1 + i for i in range(4)}
    )
    return call(
        q,
        k_new,
        v_new,
        lengths,
        num_new,
        tree_mask,
        table,
        *caches,
        scale=np.float32(1 / math.sqrt(D) if scale is None else scale),
        softcap=np.float32(softcap or 0),
        window=np.int64(window or 0),
        **_ffi.choice(),
    )


def no_scales() -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((0,), jnp.float32), jnp.zeros((0,), jnp.float32)


def chunked_attention(
    q, k_new, v_new, k_cache, v_cache, lengths, *, tree_mask=None, scale=None, window=None, softcap=None, num_new=None
):
    """Append T new K/V rows to the cache and attend the T new queries to it (SpecMoEOff 5.1).

    q [B, T, H, D], k_new and v_new [B, T, K, D], k_cache and v_cache [B, K, S, D], float32 or bfloat16; D a multiple of 8.
    lengths [B] int32: rows already in the cache. num_new [B] int32 (default T): row t >= num_new[b] gives zeros and writes nothing.
    tree_mask [T, T] or [B, T, T] bool: new token (row) attends new token (column), itself included; None is causal. window: attend
    the last `window` positions, where a token's position is lengths[b] plus the number of its ancestors. softcap: c * tanh(x / c).
    T > 64 without a tree mask is done 64 at a time.

    Returns out [B, T, H, D] in q's dtype and the caches with the new rows at lengths[b], in place when they are donated. A row with
    lengths[b] + t >= S is not written and attended by nobody. A token that attends nothing gives zeros.

    The output of a token is bit for bit the same for any T, batch mates, thread count, and row, packed or paged layout, within one
    instruction set. Lowered for another platform than the CPU, this is chunked_attention_ref.
    """
    op = "chunked_attention"
    B, T, _, K, D = check_new(op, q, k_new, v_new, lengths, tree_mask, num_new)
    _check.array(op, "k_cache", k_cache, (B, K, None, D), _check.FLOATS)
    _check.array(op, "v_cache", v_cache, k_cache.shape, (k_cache.dtype,))
    options = dict(scale=scale, window=window, softcap=softcap)
    args = (q, k_new, v_new, k_cache, v_cache, lengths)
    if _ffi.module() is None:
        return chunked_attention_ref(*args, tree_mask=tree_mask, num_new=num_new, **options)
    if T > MAX_NEW:
        return _in_pieces(*args, num_new=num_new, **options)
    num_new = jnp.full((B,), T, jnp.int32) if num_new is None else num_new

    def kernel(q, k_new, v_new, k_cache, v_cache, lengths, num_new, *mask):
        caches = (k_cache, v_cache, *no_scales())
        return tuple(kernel_call(q, k_new, v_new, lengths, num_new, mask[0] if mask else None, None, caches, **options)[:3])

    def reference(q, k_new, v_new, k_cache, v_cache, lengths, num_new, *mask):
        mask = mask[0] if mask else None
        return chunked_attention_ref(q, k_new, v_new, k_cache, v_cache, lengths, tree_mask=mask, num_new=num_new, **options)

    mask = () if tree_mask is None else (tree_mask,)
    return jax.lax.platform_dependent(*args, num_new, *mask, cpu=kernel, default=reference)


def _in_pieces(q, k_new, v_new, k_cache, v_cache, lengths, *, num_new, **options):
    """A chain longer than one kernel call: each piece finds the ones before it in the cache."""
    T = q.shape[1]
    num_new = jnp.full_like(lengths, T) if num_new is None else num_new
    outs = []
    for t in range(0, T, MAX_NEW):
        piece = slice(t, min(t + MAX_NEW, T))
        done = jnp.minimum(num_new, t)
        out, k_cache, v_cache = chunked_attention(
            q[:, piece],
            k_new[:, piece],
            v_new[:, piece],
            k_cache,
            v_cache,
            lengths + done,
            num_new=jnp.clip(num_new - t, 0, piece.stop - t),
            **options,
        )
        outs.append(out)
    return jnp.concatenate(outs, axis=1), k_cache, v_cache
