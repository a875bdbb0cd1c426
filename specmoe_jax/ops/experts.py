"""expert_ffn: the chosen experts of each token, through the C++ kernel where the platform is a CPU."""

import jax
import jax.numpy as jnp

from specmoe_jax.ops import _check, _ffi
from specmoe_jax.ops.experts_ref import expert_ffn_ref

WEIGHTS = (jnp.float32, jnp.bfloat16, jnp.uint16)


def expert_ffn(x, blocks, slots, *, activation="swiglu"):
    """SwiGLU of expert blocks[slots[i, a]] on x[i], for every token i and choice a, unweighted.

    x [n, M] float32 or bfloat16; blocks [R, 3, F, M]: gate, up and down transposed, each [F, M], in float32, bfloat16 or uint16
    that holds bfloat16 bits; slots [n, A] int32, -1 (or beyond R) for a choice without an expert, which gives zeros.
    Returns y [n, A, M] float32. Rows of one slot are done together and its weights are read once; each (token, choice) is bit for
    bit independent of the other rows and of the thread count within one instruction set. Lowered for another platform than the CPU,
    this is expert_ffn_ref.
    """
    op = "expert_ffn"
    _check.that(op, activation == "swiglu", f"activation is {activation!r}, only 'swiglu' exists")
    _check.array(op, "x", x, (None, None), _check.FLOATS)
    n, M = x.shape
    _check.array(op, "blocks", blocks, (None, 3, None, M), WEIGHTS)
    _check.array(op, "slots", slots, (n, None), (jnp.int32,))
    if slots.size == 0:
        return jnp.zeros((*slots.shape, M), jnp.float32)
    if _ffi.module() is None:
        return expert_ffn_ref(x, blocks, slots)

    def kernel(x, blocks, slots):
        shape = jax.ShapeDtypeStruct((n, slots.shape[1], M), jnp.float32)
        return jax.ffi.ffi_call("specmoe_expert_ffn", shape, vmap_method="sequential")(x, blocks, slots, **_ffi.choice())

    return jax.lax.platform_dependent(x, blocks, slots, cpu=kernel, default=expert_ffn_ref)
