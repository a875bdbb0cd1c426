"""The measured rates of this machine: those of Hardware, each the median of a few short runs with its spread.

Effects: runs programs on the accelerator, writes and removes one file for the disk, keeps the result in the cache folder.
"""

import contextlib
import functools
import logging
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax import ops
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.support.cache_files import cache_folder, machine_key, read_cached, write_cached
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.host_memory import available_bytes
from specmoe_jax.support.jax_settings import lenient
from specmoe_jax.support.progress import bar
from specmoe_jax.types import Device

_LOG = logging.getLogger(__name__)
COPIED_BYTES = 1 << 26  # long against a copy's start, short against a second on any link
READ_BYTES = 1 << 29  # beyond the caches of a large server too: of an L3 of 480 MiB 128 were read at 1.4 of the memory's rate
DISK_BYTES = 1 << 26
SIZE = {"cpu": 1024, "other": 4096}  # of the square matrices of the peak
CHAIN = 50  # tiny programs and copies, one after the other
BUDGET_S, LEAST = 0.25, 5  # of the repetitions of one measurement
KEPT_S = 86_400  # a machine that is shared, or was busy while it was measured, is another one on another day


class Measured(NamedTuple):
    """Median seconds, and half of their relative middle range."""

    seconds: float
    spread: float


@lenient()
def probe(*, fresh: bool = False, progress: str | bool = False) -> Hardware:
    """This machine, measured now or by a run of the last day. fresh: measure again. progress: a bar meanwhile (progress.bar)."""
    device = jax.local_devices()[0]
    key = machine_key("hardware", 2, jax.__version__, device.device_kind, *ops.chosen_kernels())
    found = None if fresh else _read(key)
    if found is None:
        _LOG.info("measuring this machine; the result is kept in %s for a day", cache_folder() / "hardware")
        found = _measure(device, progress)
        write_cached("hardware", key, {"hardware": found.to_json(), "unix_s": time.time()})
    memories = {"host_memory_bytes": _host_memory(), "accelerator_memory_bytes": _accelerator_memory(device)}
    return found.replace(**memories, devices=len(jax.local_devices()), peer_bytes_per_s=_peer_rate(jax.local_devices()))


def _peer_rate(devices: Sequence[Device]) -> float:
    """Of copies from one accelerator to another, measured in each run: how many there are may change; 0 for one."""
    if len(devices) < 2:
        return 0.0
    block = jax.device_put(np.ones(COPIED_BYTES // 4, np.float32), devices[0])
    return COPIED_BYTES / median(lambda: jax.device_put(block, devices[1]), device=True).seconds


def _read(key: str) -> Hardware | None:
    with contextlib.suppress(PlanError, KeyError, TypeError):
        kept = read_cached("hardware", key) or {}
        if 0 <= time.time() - kept["unix_s"] < KEPT_S:
            return Hardware.from_json(kept["hardware"])
    return None


def _measure(device: Device, progress: str | bool) -> Hardware:
    cpu, on_cpu = jax.local_devices(backend="cpu")[0], device.platform == "cpu"
    with bar("probe", 7 if on_cpu else 9, "rate", mode=progress, leave=False) as shown:

        def done(measure: Callable, *args):
            found = measure(*args)
            shown.update()
            return found

        up, down = done(_copy, device)
        own = done(_peaks, device)
        host = own if on_cpu else done(_peaks, cpu)
        dram = done(_read_rate, cpu)
        memory = dram if on_cpu else done(_read_rate, device)
        task, sync = done(_dispatch, device)
        copy = done(_small_copies, device)
        disk = done(_disk)
        overlap = done(_overlap, device, up.seconds)
    return Hardware(
        name=f"{device.device_kind}, measured",
        up_bytes_per_s=COPIED_BYTES / up.seconds,
        down_bytes_per_s=COPIED_BYTES / down.seconds,
        accelerator_flops_float32=own["float32"][0],
        accelerator_flops_bfloat16=own["bfloat16"][0],
        accelerator_bytes_per_s=memory[0],
        accelerator_memory_bytes=_accelerator_memory(device),
        cpu_flops_float32=host["float32"][0],
        cpu_flops_bfloat16=host["bfloat16"][0],
        dram_bytes_per_s=dram[0],
        host_memory_bytes=_host_memory(),
        disk_bytes_per_s=DISK_BYTES / disk.seconds,
        task_s=task.seconds,
        sync_s=sync.seconds,
        copy_s=copy.seconds / CHAIN,
        step_s=5 * sync.seconds,  # acceptance, requests, bookkeeping: the time of the engine's step is in its operators
        accelerator_is_cpu=on_cpu,
        overlap=overlap,
        measured=True,
        spreads=(
            ("up_bytes_per_s", up.spread),
            ("down_bytes_per_s", down.spread),
            ("accelerator_flops_float32", own["float32"][1]),
            ("accelerator_flops_bfloat16", own["bfloat16"][1]),
            ("cpu_flops_float32", host["float32"][1]),
            ("cpu_flops_bfloat16", host["bfloat16"][1]),
            ("accelerator_bytes_per_s", memory[1]),
            ("dram_bytes_per_s", dram[1]),
            ("disk_bytes_per_s", disk.spread),
        ),
    )


def median(call: Callable, *, device: bool = False, budget_s: float = BUDGET_S, least: int = LEAST) -> Measured:
    """Of a call, after one that compiles. device: wait for what it returns."""

    def run() -> float:
        start_s = time.perf_counter()
        out = call()
        if device:
            jax.block_until_ready(out)
        return time.perf_counter() - start_s

    run()
    seconds: list[float] = []
    while len(seconds) < least or sum(seconds) < budget_s:
        seconds.append(run())
    low, middle, high = statistics.quantiles(seconds, n=4)
    return Measured(middle, (high - low) / 2 / middle)


def _pinned(device: Device):
    return jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")


def _copy(device: Device) -> tuple[Measured, Measured]:
    """From pinned host memory into a slot on the accelerator, as the expert store does, and back."""
    block = jax.device_put(np.ones(COPIED_BYTES // 4, np.float32), _pinned(device))
    slot = jax.device_put(jnp.zeros((1, COPIED_BYTES // 4), jnp.float32), device)

    def up():
        nonlocal slot
        slot = _write(slot, block)
        return slot

    there = jax.device_put(block, jax.sharding.SingleDeviceSharding(device))
    return median(up, device=True), median(lambda: jax.device_put(there, _pinned(device)), device=True)


def _overlap(device: Device, copy_s: float) -> float:
    """Share of a copy that hides behind products of about its length, which another thread may issue meanwhile."""
    block = jax.device_put(np.ones(COPIED_BYTES // 4, np.float32), _pinned(device))
    slot = jax.device_put(jnp.zeros((1, COPIED_BYTES // 4), jnp.float32), device)
    size = SIZE["cpu" if device.platform == "cpu" else "other"]
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    one_s = median(lambda: _square(matrix), device=True, budget_s=0.1).seconds
    times = max(round(copy_s / one_s), 1)

    def both():
        nonlocal slot
        slot = _write(slot, block)
        return slot, [_square(matrix) for _ in range(times)]

    products = median(lambda: [_square(matrix) for _ in range(times)], device=True)
    together = median(both, device=True)
    hidden = copy_s + products.seconds - together.seconds
    return float(np.clip(hidden / min(copy_s, products.seconds), 0.01, 1.0))


def _peaks(device: Device) -> dict[str, tuple[float, float]]:
    """flop/s and spread, by dtype, of a large product as layers take it: on a CPU by the kernels of this package or by XLA."""
    size, found = SIZE["cpu" if device.platform == "cpu" else "other"], {}
    for dtype in ("float32", "bfloat16"):
        matrix = jax.device_put(jnp.ones((size, size), dtype), device)
        run = median(lambda matrix=matrix: _square(matrix), device=True)
        found[dtype] = 2 * size**3 / run.seconds, run.spread
    return found


def _read_rate(device: Device) -> tuple[float, float]:
    """bytes/s and spread of a sum over more than the caches hold, but little of what is free."""
    size = min(READ_BYTES, int(_accelerator_memory(device)) // 8) // 4
    numbers = jax.device_put(jnp.ones(size, jnp.float32), device)
    run = median(lambda: _sum(numbers), device=True)
    return 4 * size / run.seconds, run.spread


def _dispatch(device: Device) -> tuple[Measured, Measured]:
    """Of one small program among many, and of one that the host waits for."""
    small = jax.device_put(jnp.zeros(8, jnp.float32), device)

    def chain():
        out = small
        for _ in range(CHAIN):
            out = _increment(out)
        return out

    many, one = median(chain, device=True), median(lambda: np.asarray(_increment(small)))
    return Measured(many.seconds / CHAIN, many.spread), one


def _small_copies(device: Device) -> Measured:
    """Of CHAIN tiny ones."""
    tiny = np.zeros(8, np.float32)
    return median(lambda: [jax.device_put(tiny, device) for _ in range(CHAIN)], device=True)


def _disk() -> Measured:
    """Reads of a file that was just written, its pages dropped before each; where that is refused, of the page cache."""
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        folder = pathlib.Path(tempfile.gettempdir())
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(1 << 20) * (DISK_BYTES >> 20))
        file.flush()
        os.fsync(file.fileno())

        def read() -> None:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            while os.read(file.fileno(), 1 << 22):
                pass

        return median(read, budget_s=0.5)


def _host_memory() -> float:
    """What is available to this process; without a word of the system all that the machine has."""
    return float(available_bytes() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _accelerator_memory(device: Device) -> float:
    """The memory that the runtime may use; without an accelerator that is host memory too."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return float(limit) if limit else _host_memory()


_square = jax.jit(lambda matrix: ops.dense_product(matrix, matrix))
_sum = jax.jit(jnp.sum)
_increment = jax.jit(lambda x: x + 1)


@functools.partial(jax.jit, donate_argnums=0)
def _write(slot, block):
    return ops.put_row(slot, jax.device_put(block, jax.memory.Space.Device), jnp.int32(0))
