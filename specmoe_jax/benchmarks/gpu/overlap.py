"""Does the CPU attention kernel run in a worker thread while the accelerator computes?"""

import concurrent.futures
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from specmoe_jax import ops
from specmoe_jax.benchmarks.gpu import record
from specmoe_jax.benchmarks.gpu.timing import busy_for, overlapped_share, seconds

FULL = {"batches": (256, 64), "cached": 640, "new": (1, 6), "heads": (32, 8, 128), "matrix": 4096}
SMALL = {"batches": (2,), "cached": 32, "new": (2,), "heads": (4, 2, 8), "matrix": 128}


def rows(sizes: dict) -> Iterator[dict]:
    """Per batch and new tokens: the kernel alone, a computation of its length alone, and both at once."""
    for batch in sizes["batches"]:
        for new in sizes["new"]:
            case = f"attention on the CPU: batch {batch}, {new} new tokens"
            yield from record.asked(case, lambda batch=batch, new=new: iter([beside_compute(sizes, batch, new)]))


def beside_compute(sizes: dict, batch: int, new: int) -> dict:
    H, K, D = sizes["heads"]
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        q, k = jnp.ones((batch, new, H, D), jnp.bfloat16), jnp.ones((batch, new, K, D), jnp.bfloat16)
        cache, lengths = ops.empty_cache(batch, K, sizes["cached"], D, jnp.bfloat16), jnp.full(batch, sizes["cached"] - 8)
    held = list(jax.device_put((q, k, k, cache, lengths.astype(jnp.int32)), cpu))

    def attend():
        for _ in range(8):
            out, held[3] = _step(*held)
        return jax.block_until_ready(out)

    return {"question": "cpu_attention", "batch": batch, "new_tokens": new} | _both(attend, sizes["matrix"])


_step = jax.jit(ops.chunked_attention_packed, donate_argnums=3)


def _both(attend, matrix: int) -> dict:
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        attend_s = seconds(attend)
        compute, compute_s = busy_for(attend_s, matrix)

        def both():
            attending, out = threads.submit(attend), compute()
            attending.result()
            return out

        both_s = seconds(both)
    share = overlapped_share(attend_s, compute_s, both_s)
    return {"attend_s": attend_s, "compute_s": compute_s, "both_s": both_s, "overlapped_share": share}
