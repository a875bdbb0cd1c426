"""expert_ffn by the compiled kernel."""

import jax
import jax.numpy as jnp

from specmoe_jax.ops.cpu import _ffi


def fits_plain(*arrays, ffn) -> bool:
    """Plain SwiGLU of blocks that are not packed."""
    return ffn is None and _ffi.module() is not None


def plain(x, blocks, slots, *, ffn):
    shape = jax.ShapeDtypeStruct((*slots.shape, x.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("specmoe_expert_ffn", shape, vmap_method="sequential")(x, blocks, slots, **_ffi.choice())
