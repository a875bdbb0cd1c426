"""The product of activations and a dense weight matrix."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specmoe_jax.ops import _check, dispatch

GROUP = 32  # columns of a row in int4 that share a scale
_OP = "dense_product"


class PackedMatrix(NamedTuple):
    """A matrix [N, M]. In int8, row n is codes[n] times scales[n]. In int4, each 32 columns of a row share a scale.

    Of two codes in a byte the even column is low, code c stands for c - 8, and a row ends with a whole group.
    """

    codes: jax.Array  # [N, M] int8, or [N, groups * 16] uint8
    scales: jax.Array  # [N] float32, or [N, groups] bfloat16

    @property
    def in_groups(self) -> bool:
        return self.codes.dtype == jnp.uint8


def dense_product(x: jax.Array, weight: jax.Array | PackedMatrix) -> jax.Array:
    """`dense_products` of one matrix."""
    return dense_products(x, (weight,))[0]


def dense_products(x: jax.Array, weights: Sequence[jax.Array | PackedMatrix]) -> tuple[jax.Array, ...]:
    """x [..., M] times each weight [N, M], the layout of checkpoints -> [..., N] float32, summed in float32.

    Those of one form are one call of the CPU kernel; what each gives does not depend on the others.

    Both float32 or bfloat16, or weight packed. With weights in float32 no factor is rounded; with weights in bfloat16 an
    accelerator rounds x to it. Weights in int8 are decoded exactly: sums over codes, times the scales of their rows.
    Weights in int4 meet 16-bit integers of x in the CPU kernel, one step to 32 columns; on an accelerator they are
    rounded to bfloat16 where x is.
    """
    _check.array(_OP, "x", x, x.shape, _check.FLOATS)
    for weight in weights:
        _check_matrix(x, weight)
    if len({_form(weight) for weight in weights}) > 1:
        return tuple(dense_product(x, weight) for weight in weights)
    if isinstance(weights[0], PackedMatrix):
        return dispatch.call("packed_product", x, *itertools.chain.from_iterable(weights))
    return dispatch.call(_OP, x, *weights)


def _form(weight: jax.Array | PackedMatrix) -> jnp.dtype:
    return (weight.codes if isinstance(weight, PackedMatrix) else weight).dtype


def _check_matrix(x: jax.Array, weight: jax.Array | PackedMatrix) -> None:
    if not isinstance(weight, PackedMatrix):
        return _check.array(_OP, "weight", weight, (None, x.shape[-1]), _check.FLOATS)
    groups, rows = -(-x.shape[-1] // GROUP), weight.codes.shape[:1]
    width, wanted = (groups * GROUP // 2, (*rows, groups)) if weight.in_groups else (x.shape[-1], rows)
    _check.array(_OP, "codes", weight.codes, (None, width), (jnp.int8, jnp.uint8))
    _check.array(_OP, "scales", weight.scales, wanted, (jnp.bfloat16 if weight.in_groups else jnp.float32,))
