"""dense_product as one product of XLA's."""

import jax
import jax.numpy as jnp

from specmoe_jax.ops.codes import decoded_int4
from specmoe_jax.ops.products import einsum


def products(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(product(x, weight) for weight in weights)


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """ops.dense_product. bfloat16 times bfloat16 is left as it is: no copy on an accelerator, and half the time of float32 for many
    rows on a CPU that has such an instruction."""
    if x.dtype == weight.dtype == jnp.bfloat16:
        return jnp.einsum("...m,nm->...n", x, weight, preferred_element_type=jnp.float32)
    return einsum("...m,nm->...n", x, weight)


def packed_products(x: jax.Array, *matrices: jax.Array) -> tuple[jax.Array, ...]:
    """matrices: codes and scales of each in turn."""
    return tuple(packed_product(x, *matrix) for matrix in zip(matrices[::2], matrices[1::2], strict=True))


def packed_product(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """ops.dense_product of a packed matrix. Either type of x holds int8 exactly; int4 is decoded as a whole."""
    if codes.dtype == jnp.int8:
        return product(x, codes.astype(x.dtype)) * scales
    weight = decoded_int4(codes, scales, jnp)[:, : x.shape[-1]]
    if x.dtype == jnp.float32:
        return product(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=product, default=lambda x, w: product(x, w.astype(jnp.bfloat16)))
