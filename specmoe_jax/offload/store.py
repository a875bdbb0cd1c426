"""The expert store: the only place where an expert crosses the link, and where its bytes are counted."""

import functools
import math
import threading
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.models.model import to_host
from specmoe_jax.offload.tiers import Tier


class Link:
    """Host-to-accelerator link. With `bytes_per_s` it is slowed to that rate by a virtual clock.

    Emulation: every copy occupies the link for bytes / rate after the copies before it; `wait` sleeps to the
    arrival. Paced by deadline, so the real copy runs inside the time that it is said to take.
    oracle: MoE-Overlap's link, on which a copy may have started when the computation before it did.
    """

    def __init__(self, bytes_per_s: float | None = None, *, oracle: bool = False):
        self.bytes_per_s = bytes_per_s
        self.sent_bytes = 0
        self.busy_s = 0.0
        self._oracle = oracle
        self._free_at_s = self._last_wait_s = 0.0
        self._lock = threading.Lock()  # a streamed pass sends activations while another thread sends weights

    def send(self, num_bytes: int, *, since_s: float | None = None) -> float:
        """Accounts for a copy that starts now or when the link is free; the time at which it arrives.

        since_s: when the copy could have started, for one of several in a row: a late thread costs no bandwidth.
        """
        with self._lock:
            self.sent_bytes += num_bytes
            if self.bytes_per_s is not None:
                earliest = self._last_wait_s if self._oracle else since_s or time.perf_counter()
                self._free_at_s = max(earliest, self._free_at_s) + num_bytes / self.bytes_per_s
                self.busy_s += num_bytes / self.bytes_per_s
            return self._free_at_s

    @property
    def backlog_s(self) -> float:
        """Seconds until the link is free; 0 on a real link, which does not tell."""
        return max(self._free_at_s - time.perf_counter(), 0.0)

    def wait(self, arrival_s: float) -> None:
        """Returns when a copy has arrived (at once on a real link, whose order the runtime keeps)."""
        delay_s = arrival_s - time.perf_counter()
        if delay_s > 0:
            time.sleep(delay_s)
        self._last_wait_s = time.perf_counter()


class ExpertStore:
    """The copies of experts out of the tier below the accelerator. Holds no residency: plans say what goes where."""

    def __init__(self, tier: Tier, link: Link):
        self._arrival_s: dict[int, float] = {}
        self.tier, self.link = tier, link

    def new_pool(self, num_slots: int) -> jax.Array:
        """A slot pool [R, 3, F, M] of zeros on the accelerator, in the dtype of the blocks.

        One block of zeros goes the way of an expert (and is counted), so that the copy is compiled before the first
        one is timed.
        """
        zeros = jnp.zeros((num_slots, *self.tier.shape), self.tier.dtype)
        pool = jax.device_put(zeros, jax.devices()[0])
        block = to_host(np.zeros(self.tier.shape, self.tier.dtype))
        self.link.send(block.nbytes)
        return _write_slot(pool, block, np.int32(0))

    def fetch(self, pool: jax.Array, copies: Sequence[tuple[int, int, int]]) -> jax.Array:
        """Starts the copies (layer, expert, slot), in that order. The pool is consumed (donated)."""
        self.tier.request([(layer, expert) for layer, expert, _ in copies])
        for layer, expert, slot in copies:
            pool = self.put(pool, self.tier.block((layer, expert)), slot)
        return pool

    def put(self, pool: jax.Array, block: jax.Array | np.ndarray, slot: int) -> jax.Array:
        """Starts the copy of one block [3, F, M] from host memory. The pool is consumed (donated)."""
        pool = _write_slot(pool, block if isinstance(block, jax.Array) else to_host(block), np.int32(slot))
        self._arrival_s[slot] = self.link.send(block.nbytes)
        return pool

    def new_buffer(self) -> jax.Array:
        """Room for all experts of one layer, [E, 3, F, M] of zeros on the accelerator (expert_flow=stream)."""
        zeros = jnp.zeros((self.tier.num_experts // self.tier.num_layers, *self.tier.shape), self.tier.dtype)
        return jax.device_put(zeros, jax.devices()[0])

    def stream(self, buffer: jax.Array, layer: int) -> jax.Array:
        """Copies all experts of a layer into a buffer (donated), expert by expert, and returns when they have arrived.

        Each chunk waits for the one before, so what is more urgent on the link waits for one expert at most. Runs in
        the engine's link thread.
        """
        start_s = time.perf_counter()
        self.tier.request([(layer, expert) for expert in range(len(buffer))])
        for expert in range(len(buffer)):
            block = self.tier.block((layer, expert))
            arrival_s = self.link.send(block.nbytes, since_s=start_s)
            buffer = jax.block_until_ready(_write_slot(buffer, block, np.int32(expert)))
            self.link.wait(arrival_s)
        return buffer

    def copies_within(self, budget_s: float) -> int:
        """Experts that can arrive within `budget_s` from now; without an emulated rate there is no telling: all."""
        if self.link.bytes_per_s is None or budget_s == float("inf"):
            return self.tier.num_experts
        expert_s = math.prod(self.tier.shape) * self.tier.dtype.itemsize / self.link.bytes_per_s
        return max(int((budget_s - self.link.backlog_s) / expert_s), 0)

    def wait(self, slots: np.ndarray) -> None:
        """Returns when what was copied into these slots has arrived; negative slots are none."""
        self.link.wait(max((self._arrival_s.get(slot, 0.0) for slot in slots[slots >= 0].tolist()), default=0.0))


@functools.partial(jax.jit, donate_argnums=0)
def _write_slot(pool: jax.Array, block: jax.Array, slot: jax.Array) -> jax.Array:
    """One program for copy and write: in place, and three times faster on CPU than device_put and then write."""
    block = jax.device_put(block, jax.memory.Space.Device)
    return jax.lax.dynamic_update_index_in_dim(pool, block, slot, axis=0)
