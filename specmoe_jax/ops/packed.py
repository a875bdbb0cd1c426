"""The packed KV cache: K in blocks of 16 tokens along the SIMD lanes, V in rows; float32, bfloat16 or int8; optionally paged.

At one new token the layout decides: 1.1x over rows per head, 1.7x over rows per token.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.ops import _check
from specmoe_jax.ops.xla.rows import put

BLOCK = 16  # tokens of one K block: one AVX-512 register of 4-byte units; kBlock in cpu_ops/chunked_attention.h
DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedCache:
    """Opaque. `rows` cache rows of S tokens: one row per request, or one per page when there is a block table.

    k [rows, K, S/16, D/u, 16, u], u elements to 4 bytes; v [rows, K, S, D]; k_scale, v_scale [rows, K, S] for int8, else [0].
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array
    v_scale: jax.Array

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """rows, K, S, D"""
        rows, K, S, D = self.v.shape
        return rows, K, S, D

    @property
    def dtype(self):
        return self.v.dtype

    @property
    def num_bytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in (self.k, self.v, self.k_scale, self.v_scale))


def no_scales() -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((0,), jnp.float32), jnp.zeros((0,), jnp.float32)


def pack_rows(k: jax.Array) -> jax.Array:
    """[rows, K, S, D] -> [rows, K, S/16, D/u, 16, u]"""
    u = 4 // k.dtype.itemsize
    rows, K, S, D = k.shape
    return k.reshape(rows, K, S // BLOCK, BLOCK, D // u, u).swapaxes(3, 4)


def unpack_rows(k: jax.Array) -> jax.Array:
    rows, K, blocks, units, _, u = k.shape
    return k.swapaxes(3, 4).reshape(rows, K, blocks * BLOCK, units * u)


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., D] -> int8 [..., D] and one float32 scale [...] per token and head: the largest magnitude becomes 127."""
    x = x.astype(jnp.float32)
    top = jnp.abs(x).max(-1)
    inverse = jnp.where(top > 0, 127 / jnp.where(top > 0, top, 1), 0)
    return jnp.clip(jnp.round(x * inverse[..., None]), -127, 127).astype(jnp.int8), top * np.float32(1 / 127)


def empty_cache(rows: int, K: int, S: int, D: int, dtype=jnp.float32) -> PackedCache:
    """Zeros; S is rounded up to whole blocks."""
    dtype = jnp.dtype(dtype)
    _check.that("empty_cache", dtype in DTYPES, f"dtype is {dtype}, wanted {_check.names(DTYPES)}")
    _check.that("empty_cache", D % 8 == 0, f"D is {D}, must be a multiple of 8")
    S, u = -(-S // BLOCK) * BLOCK, 4 // dtype.itemsize
    scales = (rows, K, S) if dtype == jnp.int8 else (0,)
    return PackedCache(
        k=jnp.zeros((rows, K, S // BLOCK, D // u, BLOCK, u), dtype),
        v=jnp.zeros((rows, K, S, D), dtype),
        k_scale=jnp.zeros(scales, jnp.float32),
        v_scale=jnp.zeros(scales, jnp.float32),
    )


def pack_cache(k_cache: jax.Array, v_cache: jax.Array, dtype=None) -> PackedCache:
    """Row caches [rows, K, S, D] -> packed, in `dtype` (default: theirs); S is rounded up to whole blocks of zeros."""
    dtype = jnp.dtype(k_cache.dtype if dtype is None else dtype)
    _check.array("pack_cache", "v_cache", v_cache, k_cache.shape, (k_cache.dtype,))
    _check.that("pack_cache", dtype in DTYPES, f"dtype is {dtype}, wanted {_check.names(DTYPES)}")
    _check.that("pack_cache", k_cache.shape[3] % 8 == 0, f"D is {k_cache.shape[3]}, must be a multiple of 8")
    pad = ((0, 0), (0, 0), (0, -k_cache.shape[2] % BLOCK), (0, 0))
    k, v = jnp.pad(k_cache, pad), jnp.pad(v_cache, pad)
    if dtype != jnp.int8:
        ks, vs = no_scales()
        return PackedCache(k=pack_rows(k.astype(dtype)), v=v.astype(dtype), k_scale=ks, v_scale=vs)
    (k, ks), (v, vs) = quantise(k), quantise(v)
    return PackedCache(k=pack_rows(k), v=v, k_scale=ks, v_scale=vs)


def row_parts(cache: PackedCache) -> list[jax.Array]:
    """The cache as rows [rows, K, S, ...]: k and v, of an int8 cache also their scales with a last axis of 1."""
    scales = [cache.k_scale[..., None], cache.v_scale[..., None]] if cache.dtype == jnp.int8 else []
    return [unpack_rows(cache.k), cache.v, *scales]


def new_parts(cache: PackedCache, k_new: jax.Array, v_new: jax.Array) -> list[jax.Array]:
    """What an append adds to `row_parts`, of new keys and values [B, T, K, D]."""
    if cache.dtype != jnp.int8:
        return [k_new, v_new]
    (k, k_scale), (v, v_scale) = quantise(k_new), quantise(v_new)
    return [k, v, k_scale[..., None], v_scale[..., None]]


def floats_of(parts: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """k and v of `row_parts` as attention multiplies them."""
    return (parts[0], parts[1]) if len(parts) == 2 else (parts[0] * parts[2], parts[1] * parts[3])


def from_row_parts(parts: list[jax.Array]) -> PackedCache:
    scales = [x[..., 0] for x in parts[2:]] or no_scales()
    return PackedCache(pack_rows(parts[0]), parts[1], *scales)


def capacities(cache: PackedCache, table: jax.Array | None, B: int) -> jax.Array:
    """Tokens [B] that each request's rows hold; its pages end at its first entry outside [0, rows)."""
    if table is None:
        return jnp.full((B,), cache.shape[2])
    return jnp.cumprod((table >= 0) & (table < cache.shape[0]), axis=1).sum(1) * cache.shape[2]


def unpack_cache(cache: PackedCache, S: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Row caches [rows, K, S, D] of the first S tokens; int8 becomes float32 times its scale."""
    k, v = floats_of(row_parts(cache))
    return k[:, :, :S], v[:, :, :S]


def gather_pages(x: jax.Array, table: jax.Array) -> jax.Array:
    """The pages that table [B, P] names, one behind the other: [rows, K, S, ...] -> [B, K, P * S, ...]."""
    pages = jnp.moveaxis(x[jnp.clip(table, 0, x.shape[0] - 1)], 1, 2)  # [B, K, P, S, ...]
    return pages.reshape(*pages.shape[:2], -1, *pages.shape[4:])


def scatter_pages(x: jax.Array, rows: jax.Array, table: jax.Array) -> jax.Array:
    """x with the pages that table [B, P] names replaced by rows [B, K, P * S, ...]; entries outside [0, rows of x) are left out."""
    B, P = table.shape
    pages = jnp.moveaxis(rows.reshape(B, rows.shape[1], P, x.shape[2], *rows.shape[3:]), 2, 1)
    valid = (table >= 0) & (table < x.shape[0])
    return x.at[jnp.where(valid, table, x.shape[0])].set(pages, mode="drop")


def take_pages(cache: PackedCache, pages: jax.Array) -> PackedCache:
    """A cache of the cache rows that pages [P] int32 names, in that order; of an entry outside [0, rows) any row."""
    return jax.tree.map(lambda x: x.at[pages].get(mode="clip") if x.shape[0] else x, cache)


def put_pages(cache: PackedCache, pages: jax.Array, values: PackedCache) -> PackedCache:
    """The cache with values' rows [P] in the places pages [P] int32; those of entries outside [0, rows) are left out."""
    return jax.tree.map(lambda x, new: put(x, new, pages) if x.shape[0] else x, cache, values)


def move(cache: PackedCache, table: jax.Array, sources: jax.Array, targets: jax.Array, moved: jax.Array) -> PackedCache:
    """Tokens of each request copied within its pages: positions sources [B, N] to targets [B, N] where moved [B, N] bool.

    All are read before the first is written. A float cache only; bfloat16 goes as bits, because XLA's CPU scatter would convert
    the whole cache.
    """
    _check.that("move", cache.dtype != jnp.int8, "an int8 cache is not supported; use float32 or bfloat16")
    rows, _, page, _ = cache.shape

    def places(positions, valid):
        row = jnp.take_along_axis(table, jnp.clip(positions // page, 0, table.shape[1] - 1), axis=1)
        return jnp.where(valid & (row >= 0), row, rows), positions % page

    read_row, read_at = places(sources, moved)
    write_row, write_at = places(targets, moved)

    def shifted(x, at):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x
        values = bits.at[at(read_row, read_at)].get(mode="clip")
        bits = bits.at[at(write_row, write_at)].set(values, mode="drop")
        return jax.lax.bitcast_convert_type(bits, x.dtype) if x.dtype == jnp.bfloat16 else bits

    every = slice(None)
    k = shifted(cache.k, lambda row, at: (row, every, at // BLOCK, every, at % BLOCK))
    return dataclasses.replace(cache, k=k, v=shifted(cache.v, lambda row, at: (row, every, at)))
