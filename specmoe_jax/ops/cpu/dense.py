"""dense_product by the compiled kernel for few rows."""

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


def fits(x: jax.Array, weight: jax.Array) -> bool:
    """Few rows, of a matrix that is worth a call."""
    tiles = x.dtype == weight.dtype == jnp.bfloat16 and _ffi.has_tiles()
    few = 0 < x.size <= max(CACHED_BESIDE_TILES if tiles else CACHED, FEW_ROWS * x.shape[-1])
    return few and weight.size * weight.dtype.itemsize >= LEAST_BYTES and _ffi.module() is not None


def fits_packed(x: jax.Array, codes: jax.Array, scales: jax.Array) -> bool:
    """Few rows, of a packed matrix that is worth a call; in int4 any, since no other product rounds as the kernel."""
    if codes.dtype == jnp.uint8:
        return x.size > 0 and _ffi.module() is not None
    return fits(x, codes)


def packed_product(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    return _call("specmoe_packed_few_rows_product", x, codes, scales)


@jax.custom_jvp
def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _call("specmoe_few_rows_product", x, weight)


@product.defjvp
def _differentiate(primals, tangents):
    (x, weight), (dx, dweight) = primals, tangents
    return product(x, weight), xla.product(dx, weight) + xla.product(x, dweight)


def _call(target: str, x: jax.Array, *matrix: jax.Array) -> jax.Array:
    columns = matrix[0].shape[0]
    shape = jax.ShapeDtypeStruct((x.size // x.shape[-1], columns), jnp.float32)
    call = jax.ffi.ffi_call(target, shape, vmap_method="sequential")
    return call(x.reshape(-1, x.shape[-1]), *matrix, **_ffi.choice()).reshape(*x.shape[:-1], columns)
