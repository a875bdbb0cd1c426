"""The product of activations and a dense weight matrix."""

import jax

from specmoe_jax.ops import _check, dispatch


def dense_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., M] times weight [N, M], the layout of checkpoints -> [..., N] float32, summed in float32.

    Both float32 or bfloat16. With weights in float32 no factor is rounded; with weights in bfloat16 an accelerator rounds x to it.
    """
    op = "dense_product"
    _check.array(op, "weight", weight, (None, x.shape[-1]), _check.FLOATS)
    _check.array(op, "x", x, x.shape, _check.FLOATS)
    return dispatch.call(op, x, weight)
