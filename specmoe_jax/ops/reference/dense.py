"""dense_product: both factors as float32, nothing rounded."""

import jax.numpy as jnp


def dense_product_ref(x, weight):
    """As ops.dense_product."""
    return jnp.matmul(x.astype(jnp.float32), weight.astype(jnp.float32).T, precision="highest")


def packed_product_ref(x, matrix):
    """As ops.dense_product of a PackedMatrix."""
    return dense_product_ref(x, matrix.codes) * matrix.scales
