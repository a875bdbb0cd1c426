"""The CPU kernels beside their jnp references, their peers and the machine's limits, in interleaved rounds with cold caches.

Prints tables; the last stdout line is one JSON document. Ratios are medians of the ratios within a round: only those hold between
runs. A peer that does not load here is named once, with the reason, and has no column.
"""

import json
import os
import sys

import jax.numpy as jnp
from absl import flags

from specmoe_jax import ops
from specmoe_jax.benchmarks import attention_kernels, dense_kernels, expert_kernels
from specmoe_jax.benchmarks.attention_kernels import Shape
from specmoe_jax.benchmarks.cold_rounds import Rounds, row
from specmoe_jax.benchmarks.expert_kernels import Layers
from specmoe_jax.cli import common
from specmoe_jax.support.errors import UserError

TABLES = ("attention", "ffn", "packed", "dense", "overhead", "ragged")
_TABLES = flags.DEFINE_list("tables", list(TABLES), f"of {', '.join(TABLES)}")
_B = flags.DEFINE_list("batch", ["8"], "requests")
_L = flags.DEFINE_list("length", ["2048"], "cached tokens of each request")
_N = flags.DEFINE_list("new_tokens", ["1", "4", "8"], "new tokens of each request")
_DTYPE = flags.DEFINE_list("dtype", ["bfloat16", "float32"], "of queries and cache, and of the dense table")
_HEADS = flags.DEFINE_list("heads", ["32", "8", "128"], "query heads, KV heads, head dim (Mixtral)")
_ONLY = flags.DEFINE_list("only", [], "variants of the attention table to time besides the packed kernel (default: all)")
_LAYERS = flags.DEFINE_list(
    "layers",
    ["64:16:256:128", "8:8:512:1024", "2:2:4096:3584", "1:2:4096:14336"],
    "of the tables ffn and packed, layers:experts:model:hidden; all weights of one are in memory (the last one: 0.7 GB)",
)
_PACKINGS = flags.DEFINE_list("packings", ["int8", "int4"], "of the table packed: kinds of models/packing with their parameters")
_TOKENS = flags.DEFINE_list("tokens", ["1", "8", "64", "512"], "of the tables ffn and packed")
_MATRICES = flags.DEFINE_list("matrices", ["512:1024", "2048:1024", "1024:2048", "32768:1024"], "of the dense table, out:in")
_DENSE_ROWS = flags.DEFINE_list("dense_rows", ["1", "4", "16", "32", "64"], "of the dense table")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "timed rounds of a row")
_SECONDS = flags.DEFINE_float("seconds", 40, "rows that would take longer have fewer rounds, at least three")
_THREADS = flags.DEFINE_integer("threads", os.cpu_count() or 1, "threads of the limits and of the peers")


def attempt(name, make, missing):
    """The variant after one call, or None where a peer does not load; the reason is said once."""
    try:
        variant = make()
        variant()
        return variant
    except (ImportError, OSError, AttributeError) as e:
        if name not in missing:
            missing[name] = f"{type(e).__name__}: {e}"
            print(f"{name}: not measured here: {missing[name]}", file=sys.stderr)
        return None


def integers(flag):
    return [int(x) for x in flag.value]


def shapes(batches, new_tokens):
    H, K, D = integers(_HEADS)
    for dtype in map(jnp.dtype, _DTYPE.value):
        for B in batches:
            for n in new_tokens:
                yield Shape(H, K, D, B, n, dtype)


def attention_rows(rounds, missing):
    for s in shapes(integers(_B), integers(_N)):
        for L in integers(_L):
            makers = attention_kernels.variants(s, L, rounds.threads)
            wanted = {n: make for n, make in makers.items() if n == "packed" or not _ONLY.value or n in _ONLY.value}
            calls = {name: attempt(name, make, missing) for name, make in wanted.items()}
            calls = {name: call for name, call in calls.items() if call is not None}
            yield row(s.case("attention", length=L), calls, s.work([L] * s.B), rounds)


def ffn_rows(rounds, missing):
    for spec in _LAYERS.value:
        yield from expert_kernels.ffn_rows(Layers(*(int(x) for x in spec.split(":"))), integers(_TOKENS), rounds)


def packed_rows(rounds, missing):
    for spec in _LAYERS.value:
        yield from expert_kernels.packed_rows(
            Layers(*(int(x) for x in spec.split(":"))), integers(_TOKENS), rounds, _PACKINGS.value
        )


def dense_rows(rounds, missing):
    for dtype in map(jnp.dtype, _DTYPE.value):
        for spec in _MATRICES.value:
            matrix = dense_kernels.Matrix(*(int(x) for x in spec.split(":")))
            yield from dense_kernels.dense_rows(matrix, dtype, integers(_DENSE_ROWS), rounds)


def overhead_rows(rounds, missing):
    for s in shapes([1], [1]):
        yield attention_kernels.overhead(s, rounds)
    for s in shapes(integers(_B), integers(_N)):
        for L in integers(_L):
            yield attention_kernels.append(s, L, rounds)


def ragged_rows(rounds, missing):
    for s in shapes(integers(_B), integers(_N)):
        yield attention_kernels.ragged(s, rounds)


ROWS = {
    "attention": attention_rows,
    "ffn": ffn_rows,
    "packed": packed_rows,
    "dense": dense_rows,
    "overhead": overhead_rows,
    "ragged": ragged_rows,
}


def show(figures) -> None:
    if "overhead_us" in figures:
        print(
            "{case:40s} {us:8.1f} us  empty call {empty_us:.1f}  beyond the attention {overhead_us:.1f}".format(**figures),
            flush=True,
        )
        return
    slower = "  ".join(f"{name} {x:.3g}x" for name, x in figures["times_slower"].items())
    own = next(iter(figures["ms"].values()))
    shares = "read {share_of_read:.2f}  fma {share_of_fma:.2f}".format(**figures)
    print(f"{figures['case']:40s} {own:9.3f} ms  {shares}  {slower}", flush=True)


def main() -> None:
    unknown = [x for x in _TABLES.value if x not in TABLES]
    if unknown:
        common.usage_error(f"--tables has {unknown[0]!r}; it may have {', '.join(TABLES)}")
    if not ops.isas():
        raise UserError("the compiled kernels are not usable here; reinstall specmoe_jax with a C++ compiler")
    try:
        import torch

        torch.set_num_threads(_THREADS.value)
    except ImportError:
        pass
    rounds, missing = Rounds(_ROUNDS.value, _SECONDS.value, _THREADS.value), {}
    rows = []
    for table in _TABLES.value:
        for figures in ROWS[table](rounds, missing):
            show(figures)
            rows.append({"table": table} | figures)
    isa = os.environ.get("SPECMOE_ISA", "auto")
    isa = ops.isas()[0] if isa == "auto" else isa
    print(json.dumps({"isa": isa, "threads": _THREADS.value, "not_measured": missing, "rows": rows}))
