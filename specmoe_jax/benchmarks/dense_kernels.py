"""dense_product with cold weights: the kernel for few rows beside XLA's product, on either side of the crossover."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.benchmarks.cold_rounds import Rounds, Work, row
from specmoe_jax.ops.cpu import dense
from specmoe_jax.ops.xla import dense as xla

CALL_BYTES = 1 << 26  # weights of one program: its matrices are multiplied in turn, so that what a call costs does not show
MOST_CALLS = 64  # each is a part of the program by itself


class Matrix(NamedTuple):
    """W [N, M]."""

    N: int
    M: int


def products(form, x, weights):
    """x [n, M] times each of some weights [N, M] -> a sum of each, so that results take no time.

    They are arrays of their own, since a slice of one array would be copied, on a CPU with every number converted.
    """
    return jnp.stack([form(x, w)[0].sum() for w in weights])


def dense_rows(s: Matrix, dtype: jnp.dtype, rows: list[int], rounds: Rounds):
    """One row for each number of rows of x."""
    calls = min(max(1, CALL_BYTES // (s.N * s.M * dtype.itemsize)), MOST_CALLS)
    values = np.random.default_rng(0).standard_normal(1_000_003, np.float32)
    weights = [jnp.asarray(np.resize(values, (s.N, s.M)), dtype) for _ in range(calls)]
    for n in rows:
        x = jnp.asarray(np.resize(values, (n, s.M)), dtype)
        forms = {"kernel": dense.products, "xla": xla.products}
        jitted = {name: jax.jit(functools.partial(products, form)) for name, form in forms.items()}
        variants = {name: _ready(f, x, weights) for name, f in jitted.items()}
        case = {"case": f"dense {dtype} {s.N} x {s.M} n={n}", **s._asdict(), "dtype": str(dtype), "rows": n, "calls": calls}
        yield row(case, variants, Work(calls * weights[0].nbytes, 2 * calls * n * s.N * s.M), rounds)


def _ready(f, *args):
    return lambda: jax.block_until_ready(f(*args))
