"""The devices that an engine works on: where arrays are, how activations cross between them, and the worker threads.

Of several accelerators each has all arrays (replicated), but for the experts (`ShardedPool`) and the rows of a batch (rows.py).
They may be those of several processes (support/processes.py).
"""

import concurrent.futures
import dataclasses
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from specmoe_jax.offload.store import Link
from specmoe_jax.support.jax_settings import lenient_thread
from specmoe_jax.support.processes import chosen_devices, is_local, local, put, several
from specmoe_jax.support.tracing import Span
from specmoe_jax.types import MESH_AXIS, Device, Place

T = TypeVar("T")


class Workers(NamedTuple):
    """The workers of a streamed plan beside the engine's own thread, one thread each; they start with their first task.

    spans: receives the time of each task; None to record nothing.
    """

    cpu: concurrent.futures.ThreadPoolExecutor
    link: concurrent.futures.ThreadPoolExecutor
    spans: list[Span] | None


@dataclasses.dataclass(frozen=True)
class DeviceContext:
    """devices: of all processes. place: where arrays of the accelerator are, its device or the sharding that replicates them over
    several. host: the CPU.
    activations: counts what crosses between accelerator and host beside experts. pinned_sharding: pinned host memory, where hidden
    states wait between two layers."""

    devices: tuple[Device, ...]
    place: Place
    host: Device
    activations: Link
    pinned_sharding: jax.sharding.Sharding
    workers: Workers

    @property
    def device(self) -> Device:
        """The first, or only, accelerator of this process."""
        return next(filter(is_local, self.devices))

    def to_host(self, arrays):
        """Starts the copy of activations into host memory; a computation there obtains them through `on_host`.

        From an accelerator of its own they go to pinned memory, since a copy to the CPU device blocks this thread until the
        accelerator has computed them.
        """
        self.activations.send(sum(array.nbytes for array in jax.tree.leaves(arrays)))
        pinned = self.pinned_sharding
        if several():
            pinned = jax.sharding.SingleDeviceSharding(self.device, memory_kind="pinned_host")
        return jax.device_put(local(arrays), self.host if self.device == self.host else pinned)

    def on_host(self, arrays):
        """Arrays of `to_host` as arrays of the CPU that holds the KV cache; waits for them."""
        if self.device != self.host:  # the device alone would leave them in memory of the kind that they are in
            arrays = jax.device_put(arrays, jax.sharding.SingleDeviceSharding(self.host, memory_kind="device"))
        return jax.block_until_ready(arrays)

    def to_accelerator(self, array: jax.Array) -> jax.Array:
        """Copies attention outputs back."""
        self.activations.send(len(list(filter(is_local, self.devices))) * array.nbytes)
        return put(array, self.place)


def place_of(devices: int) -> Place:
    """Where arrays of the accelerator are, with so many."""
    chosen = chosen_devices(devices)
    if devices == 1:
        return chosen[0]
    return jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(chosen), (MESH_AXIS,)), jax.sharding.PartitionSpec())


def first_of(place: Place) -> Device:
    """The first, or only, device of a place that is this process's."""
    return next(filter(is_local, np.asarray(place.mesh.devices).flat)) if isinstance(place, jax.sharding.NamedSharding) else place


def placed(arrays: T, devices: int) -> T:
    """Arrays of the accelerator on all of so many."""
    return arrays if devices == 1 else put(arrays, place_of(devices))


def make_context(spans: list[Span] | None, devices: int = 1) -> DeviceContext:
    """This machine's, with so many of its accelerators. spans: see Workers."""
    chosen, place = chosen_devices(devices), place_of(devices)
    sharding = jax.sharding.SingleDeviceSharding(place) if devices == 1 else place
    cpu, link = (concurrent.futures.ThreadPoolExecutor(1, f"specmoe-{worker}", lenient_thread) for worker in ("cpu", "link"))
    return DeviceContext(
        devices=chosen,
        place=place,
        host=jax.local_devices(backend="cpu")[0],
        activations=Link(),
        pinned_sharding=sharding.with_memory_kind("pinned_host"),
        workers=Workers(cpu, link, spans),
    )
