"""Does a copy over the link run while the accelerator computes? The rates of the link, the most telling rows first."""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from specmoe_jax.benchmarks.gpu import record
from specmoe_jax.benchmarks.gpu.timing import busy_for, overlapped_share, seconds
from specmoe_jax.offload.store import ExpertStore, Link
from specmoe_jax.offload.tiers import HostTier

MB = 1 << 20


class Sizes(NamedTuple):
    """pieces: bytes of one copy, from small to large. total: bytes of a measurement. matrix: side of the products beside it."""

    pieces: tuple[int, ...]
    total: int
    matrix: int
    in_flight: tuple[int, ...]


FULL = Sizes(pieces=(MB, 8 * MB, 64 * MB, 336 * MB), total=2016 * MB, matrix=4096, in_flight=(1, 2, 8))
SMALL = Sizes(pieces=(MB // 4, MB), total=4 * MB, matrix=128, in_flight=(1, 2))


def rows(sizes: Sizes) -> Iterator[dict]:
    """Every question in turn; a row as soon as it is measured."""
    for question, measure in questions(sizes):
        yield from record.asked(question, lambda measure=measure: iter([measure()]))


def questions(sizes: Sizes) -> Iterator[tuple[str, Callable[[], dict]]]:
    large_first = sizes.pieces[::-1]
    for piece in large_first:
        yield f"link: copies of {piece} bytes", functools.partial(alone, "to_device", piece, 2, sizes)
    for piece in large_first:
        yield f"link: copies of {piece} bytes beside a computation", functools.partial(beside, "to_device", piece, 2, True, sizes)
        yield f"link: {piece} bytes into slots beside a computation", functools.partial(slot_write, 2, piece, sizes)
    for piece in large_first:
        yield f"link: {piece} bytes back to pinned memory", functools.partial(alone, "to_pinned", piece, 2, sizes)
    for in_flight in sizes.in_flight:
        for piece in large_first:
            if in_flight != 2:
                yield f"link: {in_flight} copies of {piece} bytes", functools.partial(alone, "to_device", piece, in_flight, sizes)
    last = sizes.pieces[-1]
    for direction in ("to_pinned", "to_cpu_device"):
        yield f"link: {direction} beside a computation", functools.partial(beside, direction, last, 2, True, sizes)
    yield "link: copies issued by the computing thread", functools.partial(beside, "to_device", last, 2, False, sizes)
    yield "link: slots written by one program each", functools.partial(slot_write, 0, last, sizes)
    yield "link: into pinned memory", functools.partial(load_rate, last, sizes.total)


def probe(sizes: Sizes) -> Iterator[dict]:
    """The few rows that are repeated under other flags."""
    yield beside("to_device", sizes.pieces[-1], 2, True, sizes)
    yield slot_write(2, sizes.pieces[-1], sizes)


@functools.lru_cache(8)
def pinned(piece: int, seed: int = 0) -> jax.Array:
    """uint16 [piece / 2] in pinned host memory."""
    values = np.arange(seed, seed + piece // 2, dtype=np.uint32).astype(np.uint16)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    return jax.block_until_ready(jax.device_put(values, sharding))


def load_rate(piece: int, total: int) -> dict:
    """Ordinary host memory into pinned host memory, as a loader does it; new memory each time."""
    values = np.ones(piece // 2, np.uint16)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    start_s, kept = time.perf_counter(), []
    for _ in range(total // piece):
        kept.append(jax.block_until_ready(jax.device_put(values, sharding)))
    return {"question": "load_rate", "piece_bytes": piece, "bytes_per_s": len(kept) * piece / (time.perf_counter() - start_s)}


def alone(direction: str, piece: int, in_flight: int, sizes: Sizes) -> dict:
    """Eager device_put of pieces with nothing beside them."""
    copy, num_bytes = copies(direction, piece, in_flight, sizes)
    copy_s = seconds(copy)
    row = {"question": direction, "piece_bytes": piece, "in_flight": in_flight, "copy_s": copy_s}
    return row | {"bytes_per_s": num_bytes / copy_s}


def beside(direction: str, piece: int, in_flight: int, worker: bool, sizes: Sizes) -> dict:
    """The same beside a jitted computation of about the same length.

    worker: whether another thread than the one that dispatches the computation issues the copies.
    """
    copy, num_bytes = copies(direction, piece, in_flight, sizes)
    row = {"question": f"{direction}_beside", "piece_bytes": piece, "in_flight": in_flight, "worker_thread": worker}
    return row | _beside(copy, worker, num_bytes, sizes)


def copies(direction: str, piece: int, in_flight: int, sizes: Sizes) -> tuple[Callable[[], None], int]:
    """A call that copies `sizes.total` bytes in pieces, and how many bytes it copies."""
    device = jax.devices()[0]
    kinds = {"to_device": "device", "to_pinned": "pinned_host"}
    where = (
        jax.local_devices(backend="cpu")[0]
        if direction == "to_cpu_device"
        else jax.sharding.SingleDeviceSharding(device, memory_kind=kinds[direction])
    )
    count = max(sizes.total // piece, 1)
    pieces = [pinned(piece, seed) for seed in range(min(count, 4))]
    if direction != "to_device":
        pieces = [jax.device_put(a, jax.sharding.SingleDeviceSharding(device, memory_kind="device")) for a in pieces]

    def copy() -> None:
        under_way: list[jax.Array] = []
        for i in range(count):
            if len(under_way) == in_flight:
                under_way.pop(0).block_until_ready()
            under_way.append(jax.device_put(pieces[i % len(pieces)], where))
        jax.block_until_ready(under_way)

    return copy, count * piece


def slot_write(room: int, piece: int, sizes: Sizes) -> dict:
    """Experts streamed into their slots beside a computation: by one program each (room 0), or as transfers that it then writes."""
    shape = (3, piece // 2 // 3 // 128, 128)
    count = max(sizes.total // piece, 1)
    cut = lambda a: a[: int(np.prod(shape))].reshape(shape)  # noqa: E731
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    blocks = [jax.device_put(cut(np.asarray(pinned(piece, seed))), sharding) for seed in range(min(count, 4))]
    store = ExpertStore(HostTier((tuple(blocks),)), Link(), room=room)
    buffer, layers = [store.new_buffer()], max(count // len(blocks), 1)

    def copy() -> None:
        for _ in range(layers):
            buffer[0] = store.stream(buffer[0], 0)
        jax.block_until_ready(buffer[0])

    num_bytes = layers * len(blocks) * blocks[0].nbytes
    return {"question": "slot_write", "room": room, "piece_bytes": piece} | _beside(copy, True, num_bytes, sizes)


def _beside(copy, worker: bool, num_bytes: int, sizes: Sizes) -> dict:
    """copy() alone, the computation alone, both at once."""
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        copy_s = seconds(copy)
        compute, compute_s = busy_for(copy_s, sizes.matrix)

        def both():
            copying = threads.submit(copy) if worker else None
            out = compute()
            copy() if copying is None else copying.result()
            return out

        both_s = seconds(both)
    return {
        "bytes_per_s": num_bytes / copy_s,
        "overlapped_share": overlapped_share(copy_s, compute_s, both_s),
        "copy_s": copy_s,
        "compute_s": compute_s,
        "both_s": both_s,
    }
