"""expert_ffn: every resident expert on every token, and of that what was chosen."""

import jax
import jax.numpy as jnp

from specmoe_jax.ops.products import as_float32


def swiglu(x, block):
    """x [n, M] through one expert [3, F, M] (gate, up, down transposed) -> [n, M] float32."""
    gate, up, down = as_float32(block)
    x = x.astype(jnp.float32)
    product = lambda a, b: jnp.matmul(a, b, precision="highest")  # noqa: E731
    return product(jax.nn.silu(product(x, gate.T)) * product(x, up.T), down)


def expert_ffn_ref(x, blocks, slots, *, activation="swiglu", ffn=swiglu):
    """As ops.expert_ffn."""
    if activation != "swiglu":
        raise ValueError(f"expert_ffn: activation is {activation!r}, only 'swiglu' exists")
    y = jnp.zeros((*slots.shape, x.shape[1]), jnp.float32)
    for slot in range(blocks.shape[0]):
        y = jnp.where((slots == slot)[..., None], ffn(x, blocks[slot])[:, None], y)
    return y
