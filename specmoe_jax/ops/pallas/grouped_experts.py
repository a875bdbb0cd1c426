"""expert_ffn as grouped products over slots: rows sorted by slot, and kernels that read each expert where it lies in the pool.

XLA copies an expert out of the pool before it multiplies, three times the reads. Here a kernel is told by prefetched numbers which
slot, which block of sorted rows and which of its rows it works on (a visit); the weights go from the pool into the products.

SPECMOE_GROUPED says for which platform programs may have these kernels: cuda, tpu or none; left out, for that of this process.
"""

import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specmoe_jax.support.errors import UserError

HALF = (jnp.bfloat16, jnp.uint16)


class Visits(NamedTuple):
    """V pairs of a slot and a block of sorted rows, in the order of both; a block lies in several where slots meet in it.

    slot, block: [V] int32. low, high: [V] int32, the block's rows of that slot, none for a visit beyond the last one, which repeats
    its slot and block so that nothing new is read. first: [V] int32, 1 where the block is visited for the first time.
    """

    slot: jax.Array
    block: jax.Array
    low: jax.Array
    high: jax.Array
    first: jax.Array


def visit_rows(pairs: int, slots: int) -> int:
    """Rows of a block: a power of two near what a slot gets, from 16 to 128."""
    return min(max(16, 1 << (pairs // min(slots, 16)).bit_length() >> 1), 128)


def visits(ordered: jax.Array, R: int, rows: int) -> Visits:
    """ordered [P] int32: the sorted slots of all pairs, R for a pair without an expert."""
    P = ordered.shape[0]
    V = -(-P // rows) + min(P, R) - 1
    counts = jnp.zeros(R, jnp.int32).at[ordered].add(1, mode="drop")
    ends = jnp.cumsum(counts)
    starts = ends - counts
    first_block = starts // rows
    number = jnp.where(counts > 0, (ends - 1) // rows - first_block + 1, 0)  # of visits, by slot
    until = jnp.cumsum(number)
    at = jnp.minimum(jnp.arange(V), jnp.maximum(until[-1] - 1, 0))
    slot = jnp.minimum(jnp.searchsorted(until, at, side="right"), R - 1).astype(jnp.int32)
    block = first_block[slot] + at - (until - number)[slot]
    low = jnp.maximum(starts[slot] - block * rows, 0)
    high = jnp.where(jnp.arange(V) < until[-1], jnp.minimum(ends[slot] - block * rows, rows), low)
    first = jnp.concatenate([jnp.ones(1, bool), block[1:] != block[:-1]])
    return Visits(slot, *(x.astype(jnp.int32) for x in (block, low, high, first)))


def product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a [n, k] times b, whose axis `axis` has length k, summed in float32."""
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


class Kernel(NamedTuple):
    """module: its `experts` is imported when a program first has it. widths: what F and M must be multiples of."""

    module: str
    widths: tuple[int, int]


KERNELS = {
    "cuda": Kernel("specmoe_jax.ops.pallas.triton", (64, 64)),
    "tpu": Kernel("specmoe_jax.ops.pallas.tpu", (128, 128)),
}


def run(platform: str, *arrays, **options) -> jax.Array:
    """ops.expert_ffn by the kernels of a platform."""
    return importlib.import_module(KERNELS[platform].module).experts(*arrays, **options)


def fits(platform: str, x, blocks, slots, *, ffn=None, packing=None, **_) -> bool:
    """Plain SwiGLU experts in half precision, of whole tiles, where this process may have such programs."""
    if ffn is not None or packing is not None or blocks.dtype not in HALF or platform != _platform():
        return False
    return all(size % width == 0 for size, width in zip(blocks.shape[2:], KERNELS[platform].widths, strict=True))


def _platform() -> str:
    chosen = os.environ.get("SPECMOE_GROUPED") or jax.local_devices()[0].platform
    if chosen not in (known := (*KERNELS, "none", "cpu", "gpu", "rocm")):
        raise UserError(f"SPECMOE_GROUPED is {chosen!r}; it must be one of {', '.join(known[:3])}")
    return "cuda" if chosen == "gpu" else chosen


def grouped(kernel: Callable, rows: int, x: jax.Array, blocks: jax.Array, slots: jax.Array) -> jax.Array:
    """ops.expert_ffn by kernel(Visits, x [rows * n, M] bfloat16 sorted by slot, blocks) -> [rows * n, M] float32.

    What the kernel leaves in rows without an expert does not matter.
    """
    (n, A), R = slots.shape, blocks.shape[0]
    P = n * A
    flat = slots.reshape(P)
    flat = jnp.where((flat >= 0) & (flat < R), flat, R)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    padded = jnp.pad(order, (0, -P % rows))
    y = kernel(visits(flat[order], R, rows), x.astype(jnp.bfloat16)[padded // A], blocks)
    back = jnp.zeros(P, jnp.int32).at[order].set(jnp.arange(P, dtype=jnp.int32))
    return jnp.where((flat < R)[:, None], y[back], 0).reshape(n, A, -1)
