"""chunked_attention by the compiled kernel, over rows and over a packed cache."""

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.ops.cpu import _ffi
from specmoe_jax.ops.packed import PackedCache, no_scales

MAX_NEW = 64  # new tokens of one kernel call: the tree mask of a token is one 64-bit word


def fits(*arrays, chunk, **options) -> bool:
    """Without sinks (the last array) and chunks."""
    return arrays[-1] is None and chunk is None and _ffi.module() is not None


def rows(q, k_new, v_new, k_cache, v_cache, lengths, num_new, tree_mask, sinks, *, chunk, **options):
    outs, caches, T = [], (k_cache, v_cache, *no_scales()), q.shape[1]
    for start in range(0, max(T, 1), MAX_NEW):  # a chain longer than one call: each piece finds the ones before it in the cache
        q_part, k_part, v_part = (x[:, start : start + MAX_NEW] for x in (q, k_new, v_new))
        before = jnp.minimum(num_new, start) if start else 0
        out, *caches = _call(q_part, k_part, v_part, lengths + before, num_new - before, tree_mask, None, caches, **options)
        outs.append(out)
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1), *caches[:2]


def packed(q, k_new, v_new, cache, lengths, num_new, tree_mask, block_table, sinks, *, chunk, **options):
    caches = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    out, *caches = _call(q, k_new, v_new, lengths, num_new, tree_mask, block_table, caches, **options)
    return out, PackedCache(*caches)


def _call(q, k_new, v_new, lengths, num_new, tree_mask, table, caches, *, scale, window, softcap):
    """caches (k, v, k_scale, v_scale) are aliased: in place under donation, copied otherwise."""
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
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0),
        window=np.int64(window or 0),
        **_ffi.choice(),
    )
