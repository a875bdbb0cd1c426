"""Times and sizes that the parts share."""

import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from specmoe_jax.support.host_memory import available_bytes


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
    chain = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: (y @ x).astype(x.dtype), x))
    short = seconds(lambda: chain(x, 8))
    count = max(int(8 * wanted_s / short), 1)
    return (lambda: chain(x, count)), seconds(lambda: chain(x, count))


def machine() -> dict:
    """What the figures were measured on."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "device_memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "cpu_count": os.cpu_count(),
        "available_host_bytes": available_bytes(),
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load_average": os.getloadavg()[0],
    }
