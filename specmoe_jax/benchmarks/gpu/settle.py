"""Does a copy over the link run while the accelerator computes? The open questions on transfers, one row each."""

import concurrent.futures
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from specmoe_jax.benchmarks.gpu.timing import busy_for, overlapped_share, seconds
from specmoe_jax.offload.store import ExpertStore, Link
from specmoe_jax.offload.tiers import HostTier
from specmoe_jax.types import Device

MB = 1 << 20


class Sizes(NamedTuple):
    """pieces: bytes of one copy. total: bytes of a measurement. matrix: side of the products that keep the accelerator busy."""

    pieces: tuple[int, ...]
    total: int
    matrix: int
    in_flight: tuple[int, ...]


FULL = Sizes(pieces=(MB, 8 * MB, 64 * MB, 336 * MB), total=2016 * MB, matrix=4096, in_flight=(1, 2, 8))
SMALL = Sizes(pieces=(MB // 4, MB), total=4 * MB, matrix=128, in_flight=(1, 2))


def rows(sizes: Sizes) -> Iterator[dict]:
    """Every question in turn; a row as soon as it is measured."""
    device = jax.devices()[0]
    for piece in sizes.pieces:
        yield load_rate(piece, sizes.total)
        for direction in ("to_device", "to_pinned", "to_cpu_device"):
            for in_flight in sizes.in_flight:
                for worker in (False, True):
                    yield transfer(direction, piece, in_flight, worker, sizes, device)
        for room in (0, 2):
            yield slot_write(room, piece, sizes, device)


def probe(sizes: Sizes) -> Iterator[dict]:
    """The few rows that are repeated under other flags."""
    piece = sizes.pieces[-1]
    yield transfer("to_device", piece, 2, True, sizes, jax.devices()[0])
    yield slot_write(2, piece, sizes, jax.devices()[0])


def pinned(piece: int, device: Device, seed: int = 0) -> jax.Array:
    """uint16 [piece / 2] in pinned host memory."""
    values = np.random.default_rng(seed).integers(0, 1 << 16, piece // 2, np.uint16)
    return jax.block_until_ready(jax.device_put(values, jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")))


def load_rate(piece: int, total: int) -> dict:
    """Ordinary host memory into pinned host memory, as a loader does it; new memory each time."""
    values = np.ones(piece // 2, np.uint16)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    start_s, kept = time.perf_counter(), []
    for _ in range(total // piece):
        kept.append(jax.block_until_ready(jax.device_put(values, sharding)))
    return {"question": "load_rate", "piece_bytes": piece, "bytes_per_s": len(kept) * piece / (time.perf_counter() - start_s)}


def transfer(direction: str, piece: int, in_flight: int, worker: bool, sizes: Sizes, device: Device) -> dict:
    """Eager device_put of pieces, alone and beside a jitted computation of about the same length.

    worker: whether another thread than the one that dispatches the computation issues the copies.
    """
    kinds = {"to_device": "device", "to_pinned": "pinned_host"}
    where = (
        jax.local_devices(backend="cpu")[0]
        if direction == "to_cpu_device"
        else jax.sharding.SingleDeviceSharding(device, memory_kind=kinds[direction])
    )
    count = max(sizes.total // piece, 1)
    pieces = [pinned(piece, device, seed) for seed in range(min(count, 4))]
    if direction != "to_device":
        pieces = [jax.device_put(a, jax.sharding.SingleDeviceSharding(device)) for a in pieces]

    def copy() -> None:
        under_way: list[jax.Array] = []
        for i in range(count):
            if len(under_way) == in_flight:
                under_way.pop(0).block_until_ready()
            under_way.append(jax.device_put(pieces[i % len(pieces)], where))
        jax.block_until_ready(under_way)

    return _beside(copy, worker, count * piece, sizes) | {
        "question": direction,
        "piece_bytes": piece,
        "in_flight": in_flight,
        "worker_thread": worker,
    }


def slot_write(room: int, piece: int, sizes: Sizes, device: Device) -> dict:
    """Experts streamed into their slots beside a computation: by one program each (room 0), or as transfers that it then writes."""
    shape = (3, piece // 2 // 3 // 128, 128)
    count = max(sizes.total // piece, 1)
    cut = lambda a: a[: int(np.prod(shape))].reshape(shape)  # noqa: E731
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    blocks = [jax.device_put(cut(np.asarray(pinned(piece, device, seed))), sharding) for seed in range(min(count, 4))]
    store = ExpertStore(HostTier((tuple(blocks),)), Link(), room=room)
    buffer, layers = [store.new_buffer()], max(count // len(blocks), 1)

    def copy() -> None:
        for _ in range(layers):
            buffer[0] = store.stream(buffer[0], 0)
        jax.block_until_ready(buffer[0])

    num_bytes = layers * len(blocks) * blocks[0].nbytes
    return _beside(copy, True, num_bytes, sizes) | {"question": "slot_write", "room": room, "piece_bytes": piece}


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
        "copy_s": copy_s,
        "compute_s": compute_s,
        "both_s": both_s,
        "bytes_per_s": num_bytes / copy_s,
        "overlapped_share": overlapped_share(copy_s, compute_s, both_s),
    }
