"""expert_ffn in tiles: pairs sorted by slot, tiles of rows, a loop over the tiles that exist (exact, no ragged_dot)."""

import functools

import jax
import jax.numpy as jnp

from specmoe_jax.ops.products import einsum

SMALL_PAIRS = 256  # up to here tiles of 8 rows, beyond of 32: half the weight reads at prefill, no wasted rows when decoding


def accelerator_rows(pairs: int) -> int:
    """Rows of a tile where products are cheap and reads are not: a power of two near pairs / 16, from 16 to 512.

    Each tile reads its expert (XLA copies the slice first); from some 200 rows on the products take longer than that.
    """
    return min(max(16, 1 << (pairs // 16).bit_length()), 512)


def block_ffn(x: jax.Array, block: jax.Array) -> jax.Array:
    """x [n, M] through one expert [3, F, M] (gate, up, down transposed) -> [n, M] float32."""
    gate, up, down = block
    hidden = jax.nn.silu(einsum("nm,fm->nf", x, gate)) * einsum("nm,fm->nf", x, up)
    return einsum("nf,fm->nm", hidden, down)


def tile_plan(slots: jax.Array, R: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sort pairs by slot and pad each slot's to whole tiles. slots [P] -> (tile_slot [Q], pair_of [Q, rows], num_tiles).

    Q = ceil(P / rows) + min(P, R) tiles are enough for any routing; pair_of is P where a row is padding.
    """
    P = slots.shape[0]
    Q = -(-P // rows) + min(P, R)
    slots = jnp.where((slots >= 0) & (slots < R), slots, R)
    order = jnp.argsort(slots, stable=True)  # [P]
    counts = jnp.zeros(R + 1, jnp.int32).at[slots].add(1)
    tiles = (-(-counts // rows)).at[R].set(0)
    first_tile = jnp.cumsum(tiles) - tiles
    first_pair = jnp.cumsum(counts) - counts
    ordered = slots[order]
    place = jnp.where(ordered < R, first_tile[ordered] * rows + jnp.arange(P) - first_pair[ordered], Q * rows)
    pair_of = jnp.full(Q * rows, P, jnp.int32).at[place].set(order.astype(jnp.int32), mode="drop")
    tile_slot = jnp.searchsorted(jnp.cumsum(tiles), jnp.arange(Q), side="right").astype(jnp.int32)
    return tile_slot, pair_of.reshape(Q, rows), tiles.sum()


def tiles(x, blocks, slots, *, ffn=None, packing=None, hidden=None, numbers=None):
    """ops.expert_ffn. A result is independent of batch mates as far as XLA's product treats the rows of one tile shape alike."""
    form, pairs = functools.partial(in_tiles, block_ffn if ffn is None else ffn), slots.size
    on_cpu = functools.partial(form, 8 if pairs <= SMALL_PAIRS else 32)
    return jax.lax.platform_dependent(x, blocks, slots, cpu=on_cpu, default=functools.partial(form, accelerator_rows(pairs)))


def in_tiles(ffn, rows: int, x, blocks, slots):
    """`tiles` of so many rows, each of one slot."""
    n, A = slots.shape
    M, R, P = x.shape[1], blocks.shape[0], n * A
    tile_slot, pair_of, num_tiles = tile_plan(slots.reshape(-1), R, rows)

    def tile(state):
        i, y = state
        pairs = pair_of[i]
        token = jnp.minimum(pairs // A, n - 1)
        block = jax.lax.dynamic_index_in_dim(blocks, jnp.minimum(tile_slot[i], R - 1), keepdims=False)
        return i + 1, y.at[pairs].set(ffn(x[token], block), mode="drop")

    start = (jnp.int32(0), jnp.zeros((P, M), jnp.float32))
    _, y = jax.lax.while_loop(lambda s: s[0] < num_tiles, tile, start)
    return y.reshape(n, A, M)
