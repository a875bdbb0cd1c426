"""The chosen experts of each token: what is accepted, and what is asked of every implementation."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from specmoe_jax.ops import _check, dispatch
from specmoe_jax.ops.cpu import experts as cpu_experts

WEIGHTS = (jnp.float32, jnp.bfloat16, jnp.uint16)


def expert_ffn_table(x, table, slots, *, hidden: int, packing: str | None = None, numbers: Mapping[str, int | float] | None = None):
    """As `expert_ffn`, for experts of `hidden` units anywhere in the memory of this process: same kernel, same bits.

    table [R, 2] uint32: addresses of blocks, low half first, which the caller keeps alive; of SwiGLUs in x's dtype, or packed.
    There is no form of it but the compiled kernels' (UserError without them).
    """
    op = "expert_ffn_table"
    _check.array(op, "x", x, (None, None), _check.FLOATS)
    _check.array(op, "table", table, (None, 2), (jnp.uint32,))
    _check.array(op, "slots", slots, (x.shape[0], None), (jnp.int32,))
    return cpu_experts.table(x, table, slots, hidden=hidden, packing=packing, numbers=numbers or {})


def expert_ffn(
    x,
    blocks,
    slots,
    *,
    activation="swiglu",
    ffn: Callable | None = None,
    packing: str | None = None,
    hidden: int | None = None,
    numbers: Mapping[str, int | float] | None = None,
):
    """Expert blocks[slots[i, a]] on x[i], for every token i and choice a, unweighted.

    x [n, M] float32 or bfloat16; blocks [R, 3, F, M]: gate, up and down transposed of a SwiGLU, each [F, M], in float32, bfloat16
    or uint16 that holds bfloat16 bits; slots [n, A] int32, -1 (or beyond R) for a choice without an expert, which gives zeros.
    ffn: (x [n, M], one block) -> [n, M] float32, for experts that are not plain SwiGLU; blocks then have its shape.
    packing: a form of ops/cpu/experts.py where blocks [R, bytes] uint8 are experts of `hidden` hidden units packed so
    (models/packing), with further `numbers` of that form; `ffn`, which unpacks, is then for platforms without a kernel that decodes
    them.
    Returns y [n, A, M] float32. Rows of one slot are done together and its weights are read once; by the compiled kernel each pair
    of token and choice is bit for bit independent of the other rows and of the thread count within one instruction set.
    """
    op = "expert_ffn"
    _check.that(op, activation == "swiglu", f"activation is {activation!r}, only 'swiglu' exists")
    _check.array(op, "x", x, (None, None), _check.FLOATS)
    n, M = x.shape
    _check.that(op, packing is None or (ffn is not None and hidden is not None), "packing needs ffn and hidden")
    if ffn is None:
        _check.array(op, "blocks", blocks, (None, 3, None, M), WEIGHTS)
    _check.array(op, "slots", slots, (n, None), (jnp.int32,))
    if slots.size == 0:
        return jnp.zeros((*slots.shape, M), jnp.float32)
    return dispatch.call(op, x, blocks, slots, ffn=ffn, packing=packing, hidden=hidden, numbers=numbers or {})
