"""Grouped products over slots for NVIDIA GPUs, through Pallas' Triton backend: one program for a visit and a tile of columns."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from specmoe_jax.ops.pallas.grouped_experts import Visits, grouped, product, visit_rows

HIDDEN, DEPTH, OUT = 64, 64, 64  # columns of a tile of hidden units, depth of a product's step, columns of a tile of outputs


def experts(x: jax.Array, blocks: jax.Array, slots: jax.Array, *, interpret: bool = False, **_) -> jax.Array:
    """As ops.expert_ffn."""
    rows = visit_rows(slots.size, blocks.shape[0])
    return grouped(functools.partial(_two_products, rows, interpret), rows, x, blocks, slots)


def _two_products(rows: int, interpret: bool, visits: Visits, x: jax.Array, blocks: jax.Array) -> jax.Array:
    V, (_, _, F, M) = visits.slot.shape[0], blocks.shape
    how = {"interpret": interpret, "compiler_params": triton.CompilerParams(num_warps=4 if rows <= 64 else 8, num_stages=4)}
    numbers = (visits.slot, visits.block, visits.low, visits.high)
    hidden = pl.pallas_call(
        functools.partial(_hidden, rows), grid=(V, F // HIDDEN), out_shape=jax.ShapeDtypeStruct((len(x), F), x.dtype), **how
    )(*numbers, x, blocks)
    return pl.pallas_call(
        functools.partial(_out, rows), grid=(V, M // OUT), out_shape=jax.ShapeDtypeStruct((len(x), M), jnp.float32), **how
    )(*numbers, hidden, blocks)


def _hidden(rows: int, slot_ref, block_ref, low_ref, high_ref, x_ref, blocks_ref, out_ref) -> None:
    """silu(x gate^T) * (x up^T) of one visit and HIDDEN units."""
    v, units = pl.program_id(0), pl.ds(pl.program_id(1) * HIDDEN, HIDDEN)
    slot, here = slot_ref[v], pl.ds(block_ref[v] * rows, rows)

    def step(i, sums):
        depth = pl.ds(i * DEPTH, DEPTH)
        part = x_ref[here, depth]
        return tuple(total + product(part, _half(blocks_ref[slot, k, units, depth]), 1) for k, total in enumerate(sums))

    zeros = jnp.zeros((rows, HIDDEN), jnp.float32)
    gate, up = jax.lax.fori_loop(0, x_ref.shape[1] // DEPTH, step, (zeros, zeros))
    _store(out_ref.at[here, units], (jax.nn.silu(gate) * up).astype(out_ref.dtype), rows, low_ref[v], high_ref[v])


def _out(rows: int, slot_ref, block_ref, low_ref, high_ref, hidden_ref, blocks_ref, out_ref) -> None:
    """hidden down of one visit and OUT columns."""
    v, columns = pl.program_id(0), pl.ds(pl.program_id(1) * OUT, OUT)
    slot, here = slot_ref[v], pl.ds(block_ref[v] * rows, rows)

    def step(i, total):
        depth = pl.ds(i * DEPTH, DEPTH)
        return total + product(hidden_ref[here, depth], _half(blocks_ref[slot, 2, depth, columns]), 0)

    total = jax.lax.fori_loop(0, hidden_ref.shape[1] // DEPTH, step, jnp.zeros((rows, OUT), jnp.float32))
    _store(out_ref.at[here, columns], total, rows, low_ref[v], high_ref[v])


def _store(ref, values: jax.Array, rows: int, low, high) -> None:
    """The visit's own rows alone: the others are another visit's."""
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    triton.store(ref, values, mask=jnp.broadcast_to((row >= low) & (row < high), values.shape))


def _half(weights: jax.Array) -> jax.Array:
    return weights if weights.dtype == jnp.bfloat16 else jax.lax.bitcast_convert_type(weights, jnp.bfloat16)
