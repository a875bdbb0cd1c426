"""Grouped products over slots for TPUs (Mosaic): a visit and a tile of hidden units, all three products, are a step of the grid."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from specmoe_jax.ops.pallas.grouped_experts import Visits, grouped, product, visit_rows

TILE_BYTES = 4 << 20  # of the weights of one step, two of which are in VMEM at a time
VMEM_BYTES = 64 << 20  # of 128 MiB on v5e


def experts(x: jax.Array, blocks: jax.Array, slots: jax.Array, *, interpret: bool = False, **_) -> jax.Array:
    """As ops.expert_ffn."""
    rows = visit_rows(slots.size, blocks.shape[0])
    return grouped(functools.partial(_products, rows, interpret), rows, x, blocks, slots)


def hidden_tile(F: int, M: int) -> int:
    """Hidden units of a step: the largest multiple of 128 that divides F and keeps the weights within TILE_BYTES."""
    return max(tile for tile in range(128, F + 1, 128) if F % tile == 0 and (tile == 128 or 6 * tile * M <= TILE_BYTES))


def _products(rows: int, interpret: bool, visits: Visits, x: jax.Array, blocks: jax.Array) -> jax.Array:
    V, (_, _, F, M) = visits.slot.shape[0], blocks.shape
    tile = hidden_tile(F, M)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(V, F // tile),
        in_specs=[
            pl.BlockSpec((rows, M), lambda v, f, slot, block, *_: (block[v], 0)),
            pl.BlockSpec(
                (None, 3, tile, M), lambda v, f, slot, block, low, high, first: (slot[v], 0, _tile(f, v, low, high, F // tile), 0)
            ),
        ],
        out_specs=pl.BlockSpec((rows, M), lambda v, f, slot, block, *_: (block[v], 0)),
    )
    how = {"interpret": interpret, "compiler_params": pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES)}
    return pl.pallas_call(
        functools.partial(_step, rows), grid_spec=grid, out_shape=jax.ShapeDtypeStruct((len(x), M), jnp.float32), **how
    )(*visits, x, blocks)


def _tile(f, v, low_ref, high_ref, tiles: int):
    """The tile of a step; of a visit without rows the one that is there already."""
    return jnp.where(low_ref[v] < high_ref[v], f, tiles - 1)


def _step(rows: int, slot_ref, block_ref, low_ref, high_ref, first_ref, x_ref, weights_ref, out_ref) -> None:
    v, f = pl.program_id(0), pl.program_id(1)

    @pl.when((first_ref[v] == 1) & (f == 0))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(low_ref[v] < high_ref[v])
    def _():
        gate, up, down = (_half(weights_ref[k]) for k in range(3))
        x, row = x_ref[...], jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        hidden = jax.nn.silu(product(x, gate, 1)) * product(x, up, 1)
        own = jnp.where((row >= low_ref[v]) & (row < high_ref[v]), hidden, 0).astype(x.dtype)
        out_ref[...] += product(own, down, 0)


def _half(weights: jax.Array) -> jax.Array:
    return weights if weights.dtype == jnp.bfloat16 else pltpu.bitcast(weights, jnp.bfloat16)
