"""Times and sizes that the parts share."""

import contextlib
import importlib.metadata
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from specmoe_jax.ops.cpu import _ffi
from specmoe_jax.support.host_memory import available_bytes

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "numpy", "torch", "transformers", "accelerate")


def seconds(call: Callable, repeats: int = 3) -> float:
    """Median wall time of call(), whose result is waited for; one call before the first is not counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def overlapped_share(first_s: float, second_s: float, both_s: float) -> float:
    """1 where the shorter of two tasks hides behind the other, 0 where they took as long as one after the other."""
    return (first_s + second_s - both_s) / min(first_s, second_s)


def busy_for(wanted_s: float, size: int) -> tuple[Callable, float]:
    """A jitted chain of bfloat16 products [size, size] that runs for about `wanted_s`, and its own time in seconds."""
    x = jnp.full((size, size), 1 / size, jnp.bfloat16)
    short = seconds(lambda: _chain(x, 8))
    count = max(int(8 * wanted_s / short), 1)
    return (lambda: _chain(x, count)), seconds(lambda: _chain(x, count))


@jax.jit
def _chain(x: jax.Array, n) -> jax.Array:
    return jax.lax.fori_loop(0, n, lambda _, y: (y @ x).astype(x.dtype), x)


def machine(host_bytes: int | None) -> dict:
    """What the figures were measured on. host_bytes: the memory that the machine is said to have."""
    device = jax.devices()[0]
    return {
        "question": "machine",
        "device": f"{device.platform} {device.device_kind}",
        "device_memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "cpu_count": os.cpu_count(),
        "cpu": _cpu_model(),
        "host_bytes": host_bytes,
        "available_host_bytes": available_bytes(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in PACKAGES},
        "kernels": _ffi.isas() if os.environ.get("SPECMOE_CPU_OPS") != "ref" else [],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load_average": os.getloadavg()[0],
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return None
