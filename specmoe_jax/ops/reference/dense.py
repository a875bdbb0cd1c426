"""dense_product: both factors as float32, nothing rounded."""

import jax.numpy as jnp


def dense_product_ref(x, weight):
    """As ops.dense_product."""
    return jnp.matmul(x.astype(jnp.float32), weight.astype(jnp.float32).T, precision="highest")


def packed_product_ref(x, matrix):
    """As ops.dense_product of a PackedMatrix."""
    if matrix.in_groups:
        nibbles = jnp.stack([matrix.codes & 15, matrix.codes >> 4], axis=-1).reshape(*matrix.scales.shape, -1)
        groups = (nibbles.astype(jnp.float32) - 8) * matrix.scales[..., None].astype(jnp.float32)
        return dense_product_ref(x, groups.reshape(len(groups), -1)[:, : x.shape[-1]])
    return dense_product_ref(x, matrix.codes) * matrix.scales
