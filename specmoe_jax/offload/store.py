"""The expert store: the only place where an expert crosses the link, and where its bytes are counted."""

import functools
import math
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

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
        self.count(num_bytes)
        return self.occupy(num_bytes, since_s=since_s)

    def count(self, num_bytes: int) -> None:
        """Accounts for a copy alone, which `occupy` sends later."""
        with self._lock:
            self.sent_bytes += num_bytes

    def occupy(self, num_bytes: int, *, since_s: float | None = None) -> float:
        """As `send`, of a copy that is counted already."""
        with self._lock:
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


class Arriving(NamedTuple):
    """A block [3, F, M] on its way into a slot, in memory of the accelerator beside the pool."""

    slot: int
    block: jax.Array


class ExpertStore:
    """The copies of experts out of the tier below the accelerator. Holds no residency: plans say what goes where.

    room: blocks that may be on their way beside a pool; 0 where the accelerator is the CPU itself, whose copies go straight into
    their slots. On an accelerator of its own a program that held the copy would keep all later programs waiting for it (one stream
    of programs runs in order), so copies are transfers beside the programs, and only what has arrived is written by one.
    """

    def __init__(self, tier: Tier, link: Link, *, room: int = 0):
        self._arrival_s: dict[int, float] = {}
        self.tier, self.link, self._room = tier, link, room
        self._device = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="device")

    def new_pool(self, num_slots: int) -> jax.Array:
        """A slot pool [R, 3, F, M] of zeros on the accelerator, in the dtype of the blocks.

        One block of zeros goes the way of an expert (and is counted), so that the copy is compiled before the first
        one is timed.
        """
        zeros = jnp.zeros((num_slots, *self.tier.shape), self.tier.dtype)
        pool = jax.device_put(zeros, jax.devices()[0])
        block = to_host(np.zeros(self.tier.shape, self.tier.dtype))
        self.link.send(block.nbytes)
        return _write_slot(pool, self._copy(block), np.int32(0))

    def fetch(
        self, pool: jax.Array, copies: Sequence[tuple[int, int, int]], arriving: tuple[Arriving, ...] = ()
    ) -> tuple[jax.Array, tuple[Arriving, ...]]:
        """Starts the copies (layer, expert, slot), in that order. The pool is consumed (donated).

        -> pool and what is now on its way, which `finish_copies` writes; waits for the oldest where there is no room for more.
        """
        blocks = self.tier.blocks([(layer, expert) for layer, expert, _ in copies])
        for (_, _, slot), block in zip(copies, blocks, strict=True):
            if self._room:
                if len(arriving) >= self._room:
                    pool, arriving = self._finish_oldest(pool, arriving)
                arriving = (*arriving, Arriving(slot, self._copy(block)))
                self._arrival_s[slot] = self.link.send(block.nbytes)
            else:
                pool = self.put(pool, block, slot)
        return pool, arriving

    def put(self, pool: jax.Array, block: jax.Array | np.ndarray, slot: int) -> jax.Array:
        """Starts the copy of one block [3, F, M] from host memory into its slot. The pool is consumed (donated)."""
        block = self._copy(block if isinstance(block, jax.Array) else to_host(block))
        pool = _write_slot(pool, jax.block_until_ready(block), np.int32(slot))
        self._arrival_s[slot] = self.link.send(block.nbytes)
        return pool

    def finish_copies(
        self, pool: jax.Array, arriving: tuple[Arriving, ...], slots: np.ndarray | None = None
    ) -> tuple[jax.Array, tuple[Arriving, ...]]:
        """Returns when what is on its way into these slots (None: all) has arrived and is being written; consumes the pool.

        Negative slots are none. What was started before it is written too: a slot may have been given away and filled again.
        """
        while arriving and (slots is None or any(one.slot in slots for one in arriving)):
            pool, arriving = self._finish_oldest(pool, arriving)
        if slots is not None:
            self.link.wait(max((self._arrival_s.get(slot, 0.0) for slot in slots[slots >= 0].tolist()), default=0.0))
        return pool, arriving

    def finish_arrived(self, pool: jax.Array, arriving: tuple[Arriving, ...]) -> tuple[jax.Array, tuple[Arriving, ...]]:
        """Writes what is there already; waits for nothing. Consumes the pool."""
        while arriving and _is_ready(arriving[0].block):
            pool, arriving = self._finish_oldest(pool, arriving)
        return pool, arriving

    def _finish_oldest(self, pool: jax.Array, arriving: tuple[Arriving, ...]) -> tuple[jax.Array, tuple[Arriving, ...]]:
        oldest, *others = arriving
        return _write_slot(pool, jax.block_until_ready(oldest.block), np.int32(oldest.slot)), tuple(others)

    def _copy(self, block: jax.Array) -> jax.Array:
        """Of a block in host memory, as a transfer of its own; the same block where its slot's program copies it."""
        return jax.device_put(block, self._device) if self._room else block

    def new_buffer(self) -> jax.Array:
        """Room for all experts of one layer, [E, 3, F, M] of zeros on the accelerator (expert_flow=stream)."""
        zeros = jnp.zeros((self.tier.num_experts // self.tier.num_layers, *self.tier.shape), self.tier.dtype)
        return jax.device_put(zeros, jax.devices()[0])

    def send_for(self, layer: int) -> int:
        """Counts a layer that `stream` will bring: who asks for it knows which step it belongs to, the link's thread does not.

        -> the layer.
        """
        experts = self.tier.num_experts // self.tier.num_layers
        self.link.count(experts * math.prod(self.tier.shape) * self.tier.dtype.itemsize)
        return layer

    def stream(self, buffer: jax.Array, layer: int) -> jax.Array:
        """Copies all experts of a layer (`send_for`) into a buffer (donated), expert by expert; returns when they have arrived.

        Each chunk waits for the one before, so what is more urgent on the link waits for one expert at most. Runs in
        the engine's link thread.
        """
        start_s = time.perf_counter()
        blocks = self.tier.blocks([(layer, expert) for expert in range(len(buffer))])
        for expert, block in enumerate(blocks):
            arrival_s = self.link.occupy(block.nbytes, since_s=start_s)
            block = jax.block_until_ready(self._copy(block))  # not in the program: it would wait for the link
            buffer = _write_slot(buffer, block, np.int32(expert))
            if not self._room:
                jax.block_until_ready(buffer)
            self.link.wait(arrival_s)
        return buffer

    def copies_within(self, budget_s: float, under_way: int = 0) -> int:
        """Experts that can be sent for now, `under_way` being so already: those that arrive within `budget_s`, for which there is
        room. Without an emulated rate there is no telling when they arrive.
        """
        most = self._room - under_way if self._room else self.tier.num_experts
        if self.link.bytes_per_s is None or budget_s == float("inf"):
            return most
        expert_s = math.prod(self.tier.shape) * self.tier.dtype.itemsize / self.link.bytes_per_s
        return min(most, max(int((budget_s - self.link.backlog_s) / expert_s), 0))


def _is_ready(array: Any) -> bool:
    """Whether an array has been computed: every concrete one tells, jax.Array does not say so."""
    return array.is_ready()


@functools.partial(jax.jit, donate_argnums=0)
def _write_slot(pool: jax.Array, block: jax.Array, slot: jax.Array) -> jax.Array:
    """One program for copy and write: in place, and three times faster on CPU than device_put and then write."""
    block = jax.device_put(block, jax.memory.Space.Device)
    return jax.lax.dynamic_update_index_in_dim(pool, block, slot, axis=0)
