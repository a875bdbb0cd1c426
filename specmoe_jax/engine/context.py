"""The devices that an engine works on: where arrays are, how activations cross between them, and the worker threads."""

import concurrent.futures
import dataclasses
from typing import NamedTuple

import jax

from specmoe_jax.offload.store import Link
from specmoe_jax.support.jax_settings import lenient_thread
from specmoe_jax.support.tracing import Span
from specmoe_jax.types import Device


class Workers(NamedTuple):
    """The workers of a streamed plan beside the engine's own thread, one thread each; they start with their first task.

    spans: receives the time of each task; None to record nothing.
    """

    cpu: concurrent.futures.ThreadPoolExecutor
    link: concurrent.futures.ThreadPoolExecutor
    spans: list[Span] | None


@dataclasses.dataclass(frozen=True)
class DeviceContext:
    """host: the CPU. activations: counts what crosses between accelerator and host beside experts. pinned_sharding: pinned host
    memory, where hidden states wait between two layers."""

    device: Device
    host: Device
    activations: Link
    pinned_sharding: jax.sharding.Sharding
    workers: Workers

    def to_host(self, arrays):
        """Starts the copy of activations into host memory; a computation there obtains them through `on_host`.

        From an accelerator of its own they go to pinned memory, since a copy to the CPU device blocks this thread until the
        accelerator has computed them.
        """
        self.activations.send(sum(array.nbytes for array in jax.tree.leaves(arrays)))
        return jax.device_put(arrays, self.host if self.device == self.host else self.pinned_sharding)

    def on_host(self, arrays):
        """Arrays of `to_host` as arrays of the CPU that holds the KV cache; waits for them."""
        if self.device != self.host:  # the device alone would leave them in memory of the kind that they are in
            arrays = jax.device_put(arrays, jax.sharding.SingleDeviceSharding(self.host, memory_kind="device"))
        return jax.block_until_ready(arrays)

    def to_accelerator(self, array: jax.Array) -> jax.Array:
        """Copies attention outputs back."""
        self.activations.send(array.nbytes)
        return jax.device_put(array, self.device)


def make_context(spans: list[Span] | None) -> DeviceContext:
    """This machine's. spans: see Workers."""
    device = jax.devices()[0]
    cpu, link = (concurrent.futures.ThreadPoolExecutor(1, f"specmoe-{worker}", lenient_thread) for worker in ("cpu", "link"))
    return DeviceContext(
        device=device,
        host=jax.local_devices(backend="cpu")[0],
        activations=Link(),
        pinned_sharding=jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host"),
        workers=Workers(cpu, link, spans),
    )
