"""The expert store: the only place where an expert crosses the link, and where its bytes are counted."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.offload.residency import Wave


class Link:
    """Host-to-accelerator link. With `bytes_per_s` it is slowed to that rate by a virtual clock.

    Emulation: every copy occupies the link for bytes / rate after the copies before it; `wait` sleeps to the
    end of the last one. Paced by deadline, so the real copy runs inside the time that it is said to take.
    """

    def __init__(self, bytes_per_s: float | None = None):
        self.bytes_per_s = bytes_per_s
        self.sent_bytes = 0
        self._free_at_s = 0.0

    def send(self, num_bytes: int) -> None:
        """Accounts for a copy that starts now or when the link is free."""
        self.sent_bytes += num_bytes
        if self.bytes_per_s is not None:
            self._free_at_s = max(time.perf_counter(), self._free_at_s) + num_bytes / self.bytes_per_s

    def wait(self) -> None:
        """Returns when everything sent has arrived (at once on a real link, whose order the runtime keeps)."""
        delay_s = self._free_at_s - time.perf_counter()
        if delay_s > 0:
            time.sleep(delay_s)


class ExpertStore:
    """Experts in pinned host memory and the copies out of it. Holds no residency: plans say what goes where."""

    def __init__(self, experts: tuple[tuple[jax.Array, ...], ...], link: Link):
        self._experts = experts
        self.link = link

    def new_pool(self, num_slots: int) -> jax.Array:
        """A slot pool [R, 3, F, M] on the accelerator, in the dtype of the blocks."""
        block = self._experts[0][0]
        return jnp.zeros((num_slots, *block.shape), block.dtype)

    def fetch(self, pool: jax.Array, layer: int, wave: Wave) -> jax.Array:
        """Copies the experts of a wave into their slots. The pool is consumed (donated)."""
        for expert, slot in wave.fetch:
            block = self._experts[layer][expert]
            pool = _write_slot(pool, block, np.int32(slot))
            self.link.send(block.nbytes)
        self.link.wait()
        return pool


@functools.partial(jax.jit, donate_argnums=0)
def _write_slot(pool: jax.Array, block: jax.Array, slot: jax.Array) -> jax.Array:
    """One program for copy and write: in place, and three times faster on CPU than device_put and then write."""
    block = jax.device_put(block, jax.memory.Space.Device)
    return jax.lax.dynamic_update_index_in_dim(pool, block, slot, axis=0)
