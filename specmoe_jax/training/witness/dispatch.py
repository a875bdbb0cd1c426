"""Rows to their experts and back, with gradients that are gathers in both directions.

Letters: types.py; n is the number of tokens, C an expert's capacity. The transpose of a gather is a scatter-add, which XLA's
CPU backend runs on one thread; but a token has at most A slots and a slot at most one token, so each direction's gradient is
the other direction, and no scatter is left.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Slots(NamedTuple):
    """Who sits where. E * C and n stand for nowhere and nobody.

    slots [n, A] int32: the slot of each choice, or E * C where it found no room; tokens [E * C] int32: whose row a slot
    holds, or n where it is empty; choices [E * C] int32: which of the n * A choices that is, or n * A.
    """

    slots: jax.Array
    tokens: jax.Array
    choices: jax.Array


def seat(ids: jax.Array, num_experts: int, capacity: int) -> Slots:
    """Slots for the choices in the order of the tokens. ids [n, A] int32."""
    num_tokens, active = ids.shape
    flat = ids.reshape(-1)  # [n * A]
    order = jnp.argsort(flat, stable=True)
    starts = jnp.searchsorted(flat[order], jnp.arange(num_experts))
    rank = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.size) - starts[flat[order]])
    slots = jnp.where(rank < capacity, flat * capacity + rank, num_experts * capacity)
    choices = jnp.full(num_experts * capacity, flat.size).at[slots].set(jnp.arange(flat.size), mode="drop")
    return Slots(slots=slots.reshape(ids.shape), tokens=jnp.minimum(choices // active, num_tokens), choices=choices)


def _take(rows: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take(rows, indices, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def spread(x: jax.Array, slots: Slots) -> jax.Array:
    """Rows of tokens to rows of slots; empty slots are zero. [n, M] -> [E * C, M]."""
    return _take(x, slots.tokens)


@jax.custom_vjp
def collect(rows: jax.Array, slots: Slots) -> jax.Array:
    """The sum of each token's slots. [E * C, M] -> [n, M]."""
    return functools.reduce(jnp.add, (_take(rows, slots.slots[:, a]) for a in range(slots.slots.shape[1])))


spread.defvjp(lambda x, slots: (spread(x, slots), slots), lambda slots, grad: (collect(grad, slots), None))
collect.defvjp(lambda rows, slots: (collect(rows, slots), slots), lambda slots, grad: (spread(grad, slots), None))


def slot_weights(weights: jax.Array, slots: Slots) -> jax.Array:
    """The router's weight of the choice in each slot, zero where it is empty. [n, A] -> [E * C]."""
    return _take(weights.reshape(-1), slots.choices)
