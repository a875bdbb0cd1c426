"""Kernels in interleaved rounds with cold caches, beside the machine's own limits measured in the same rounds."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from specmoe_jax.ops.cpu import _ffi

FLUSH_BYTES = 1 << 27  # read between any two calls: beyond the L3 of the machines in mind
MIN_ROUNDS = 3


class Rounds(NamedTuple):
    """count: rounds of a row; a row whose rounds would take longer than `seconds` has fewer, but at least MIN_ROUNDS.

    threads: of the limits.
    """

    count: int
    seconds: float
    threads: int


class Work(NamedTuple):
    """What one call of the kernel reads from DRAM at least (bytes) and computes (flops)."""

    num_bytes: int
    flops: int


def timed(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def flush(rounds: Rounds) -> None:
    _ffi.read_bandwidth(FLUSH_BYTES, rounds.threads)


def interleave(variants: dict[str, Callable], rounds: Rounds) -> tuple[dict, dict]:
    """(seconds of each variant, limits), lists by round; every call finds caches full of something else.

    Odd rounds run backwards, so that no variant always follows the same other one. All variants must be compiled.
    """
    each = sum(timed(call) for call in variants.values())
    count = max(MIN_ROUNDS, min(rounds.count, int(rounds.seconds / each)))
    seconds = {name: [] for name in variants}
    limits = {"read_bytes_per_s": [], "fma_flop_per_s": []}
    for i in range(count):
        for name in list(variants)[:: -1 if i % 2 else 1]:
            flush(rounds)
            seconds[name].append(timed(variants[name]))
        limits["read_bytes_per_s"].append(_ffi.read_bandwidth(2 * FLUSH_BYTES, rounds.threads))
        limits["fma_flop_per_s"].append(_ffi.fma_peak(rounds.threads))
    return seconds, limits


def ratios(seconds: dict, own: str) -> dict:
    """Median over the rounds of each variant's time over that of `own`."""
    return {name: float(np.median(np.divide(s, seconds[own]))) for name, s in seconds.items() if name != own}


def row(case: dict, variants: dict[str, Callable], work: Work | None, rounds: Rounds) -> dict:
    """One row of a table: case and figures; the first variant is the kernel that the others are compared with.

    A variant returns an array; `max_difference` is the largest difference of its values from the kernel's.
    """
    own = next(iter(variants))
    want, *others = (np.asarray(call(), np.float32) for call in variants.values())
    differences = [float(np.abs(x - want).max()) if x.shape == want.shape else None for x in others]
    seconds, limits = interleave(variants, rounds)
    figures = {
        "rounds": len(seconds[own]),
        "ms": {name: 1e3 * float(np.median(s)) for name, s in seconds.items()},
        "min_ms": {name: 1e3 * min(s) for name, s in seconds.items()},
        "times_slower": ratios(seconds, own),
        "max_difference": {n: d for n, d in zip(list(variants)[1:], differences, strict=True) if d is not None},
    }
    figures |= {name: float(np.median(x)) for name, x in limits.items()}
    if work is not None:
        s, read, fma = (np.asarray(x) for x in (seconds[own], *limits.values()))
        figures["share_of_read"] = float(np.median(work.num_bytes / s / read))
        figures["share_of_fma"] = float(np.median(work.flops / s / fma))
    return case | figures
