"""The product of activations and a dense weight matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specmoe_jax.ops import _check, dispatch


class PackedMatrix(NamedTuple):
    """A matrix [N, M] in int8: row n is codes[n] times scales[n]."""

    codes: jax.Array  # [N, M] int8
    scales: jax.Array  # [N] float32


def dense_product(x: jax.Array, weight: jax.Array | PackedMatrix) -> jax.Array:
    """x [..., M] times weight [N, M], the layout of checkpoints -> [..., N] float32, summed in float32.

    Both float32 or bfloat16, or weight packed. With weights in float32 no factor is rounded; with weights in bfloat16 an
    accelerator rounds x to it. Packed weights are decoded exactly: sums over codes are multiplied by the scales of their rows.
    """
    op = "dense_product"
    _check.array(op, "x", x, x.shape, _check.FLOATS)
    if isinstance(weight, PackedMatrix):
        _check.array(op, "codes", weight.codes, (None, x.shape[-1]), (jnp.int8,))
        _check.array(op, "scales", weight.scales, weight.codes.shape[:1], (jnp.float32,))
        return dispatch.call("packed_product", x, *weight)
    _check.array(op, "weight", weight, (None, x.shape[-1]), _check.FLOATS)
    return dispatch.call(op, x, weight)
