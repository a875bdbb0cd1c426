"""Products with weights or cache rows that may be of half precision, in the form that the platform is fast at."""

import jax
import jax.numpy as jnp


def as_float32(w: jax.Array) -> jax.Array:
    """w as float32; uint16 holds bfloat16 bits (a cast of a whole store would be hoisted out of a loop over its slices)."""
    if w.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)
    return w.astype(jnp.float32)


def einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum of a and b, summed in float32 -> float32. b: float32, bfloat16, or uint16 that holds bfloat16 bits.

    With b in float32 no factor is rounded. With b in half precision a CPU computes in float32 (XLA:CPU's bfloat16 products are 7 to
    10 times slower); any other platform rounds a to bfloat16 and multiplies in it, so that no float32 copy of b is ever made.
    """

    def in_float32(a, b):
        return jnp.einsum(equation, a.astype(jnp.float32), as_float32(b), precision="highest")

    def in_bfloat16(a, b):
        b = jax.lax.bitcast_convert_type(b, jnp.bfloat16) if b.dtype == jnp.uint16 else b
        return jnp.einsum(equation, a.astype(jnp.bfloat16), b, preferred_element_type=jnp.float32)

    if b.dtype == jnp.float32:
        return in_float32(a, b)
    return jax.lax.platform_dependent(a, b, cpu=in_float32, default=in_bfloat16)
