"""dense_product by the compiled kernel for few rows."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from specmoe_jax.ops.cpu import _ffi
from specmoe_jax.ops.xla import dense as xla

# Where XLA's own product is as fast (Zen 4, two cores, benchmark_kernels.py --tables=dense): from about 128 rows of 1,024 or 2,048
# columns on, where rows outgrow the L2, and for matrices that take no longer than the call itself. One row in bfloat16: a router of
# 64 x 1,024 takes 5 us for XLA's 13, 256 x 1,024 12 for 61; at 16 KiB both take 3.
FEW_ROWS = 32
CACHED = 1 << 18  # elements of x that may be more rows than those
# The same in bfloat16 on a CPU with AMX, which XLA's product has too (64 rows of 1,024: as fast; 256: 0.67 of the kernel's time).
CACHED_BESIDE_TILES = 1 << 16
LEAST_BYTES = 1 << 16


def fits(x: jax.Array, *weights: jax.Array) -> bool:
    """Few rows, of matrices that are worth a call."""
    tiles = x.dtype == weights[0].dtype == jnp.bfloat16 and _ffi.has_tiles()
    few = 0 < x.size <= max(CACHED_BESIDE_TILES if tiles else CACHED, FEW_ROWS * x.shape[-1])
    return few and sum(weight.nbytes for weight in weights) >= LEAST_BYTES and _ffi.module() is not None


def fits_packed(x: jax.Array, *matrices: jax.Array) -> bool:
    """Few rows, of packed matrices that are worth a call; in int4 any, since no other product rounds as the kernel."""
    if matrices[0].dtype == jnp.uint8:
        return x.size > 0 and _ffi.module() is not None
    return fits(x, *matrices[::2])


def packed_products(x: jax.Array, *matrices: jax.Array) -> tuple[jax.Array, ...]:
    """matrices: codes and scales of each in turn."""
    return _call("specmoe_packed_few_rows_products", x, matrices, matrices[::2])


@jax.custom_jvp
def products(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    return _call("specmoe_few_rows_products", x, weights, weights)


@products.defjvp
def _differentiate(primals, tangents):
    (x, *weights), (dx, *dweights) = primals, tangents
    of_x, of_weights = xla.products(dx, *weights), xla.products(x, *dweights)
    return products(x, *weights), tuple(a + b for a, b in zip(of_x, of_weights, strict=True))


def _call(target: str, x: jax.Array, arrays: Sequence[jax.Array], matrices: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """arrays: what stands for the matrices, each of which has as many rows as its product has columns."""
    rows = x.size // x.shape[-1]
    shapes = tuple(jax.ShapeDtypeStruct((rows, matrix.shape[0]), jnp.float32) for matrix in matrices)
    call = jax.ffi.ffi_call(target, shapes, vmap_method="sequential")
    products_ = call(x.reshape(-1, x.shape[-1]), *arrays, **_ffi.choice())
    return tuple(y.reshape(*x.shape[:-1], -1) for y in products_)
