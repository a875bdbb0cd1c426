"""The expert store: the only place where an expert crosses the link, and where its bytes are counted."""

import functools
import itertools
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax import ops
from specmoe_jax.models.model import to_host
from specmoe_jax.offload.tiers import Tier
from specmoe_jax.types import Device, Pool

# Of blocks that go together. A program costs 20 us to call, which matters beside blocks of a few kB; several MB would only delay
# what waits for them: reads of a disk, and the link's next customer.
BATCH_BYTES = 4 << 20
BATCH_BLOCKS = 16


class Link:
    """Host-to-accelerator link. With `bytes_per_s` it is slowed to that rate by a virtual clock.

    Emulation: every copy occupies the link for bytes / rate after the copies before it; `wait` sleeps to the
    arrival. Paced by deadline, so the real copy runs within the emulated time.
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
        """Seconds until the link is free; 0 on a real link, where it is unknown."""
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


Coming = tuple[Arriving, ...]


class Store(Protocol):
    """The copies of experts to the accelerator (ExpertStore), or to several (sharded_store.ShardedStore)."""

    tier: Tier

    @property
    def links(self) -> tuple[Link, ...]: ...
    def new_pool(self, num_slots: int) -> Pool: ...
    def fetch(self, pool: Pool, copies: Sequence[tuple[int, int, int]], arriving: Coming = ()) -> tuple[Pool, Coming]: ...
    def put(self, pool: Pool, blocks: Iterable[Any], slots: Sequence[int], arriving: Coming = ()) -> tuple[Pool, Coming]: ...
    def finish_copies(self, pool: Pool, arriving: Coming, slots: np.ndarray | None = None) -> tuple[Pool, Coming]: ...
    def finish_arrived(self, pool: Pool, arriving: Coming) -> tuple[Pool, Coming]: ...
    def new_buffer(self) -> Pool: ...
    def send_for(self, layer: int) -> int: ...
    def stream(self, buffer: Pool, layer: int) -> Pool: ...
    def copies_within(self, budget_s: float, under_way: int = 0) -> int | Sequence[int]: ...


class ExpertStore:
    """The copies of experts out of the tier below the accelerator. Holds no residency: plans say what goes where.

    room: blocks that may be on their way beside a pool; 0 where the accelerator is the CPU itself, whose copies go straight into
    their slots. On an accelerator of its own a program that held the copy would keep all later programs waiting for it (one stream
    of programs runs in order), so copies are transfers beside the programs, and only what has arrived is written by one.

    Small blocks go together, up to BATCH_BYTES: one transfer and one program for several slots, whose number is a power of two, so
    that few programs are compiled.

    device: the accelerator, None for the first. Where it is one of several (sharded_store.py), own: its experts of each layer.
    """

    def __init__(self, tier: Tier, link: Link, *, room: int = 0, device: Device | None = None, own: range | None = None):
        self._arrival_s: dict[int, float] = {}
        self.tier, self.link, self._room = tier, link, room
        self.device = device or jax.local_devices()[0]
        self._own = own or range(tier.num_experts // tier.num_layers)
        self._block_bytes = math.prod(tier.shape) * tier.dtype.itemsize
        self._sizes = _batch_sizes(self._block_bytes, room // 2 if room else tier.num_experts)
        self._sharding = jax.sharding.SingleDeviceSharding(self.device, memory_kind="device")

    @property
    def links(self) -> tuple[Link, ...]:
        """Of each device."""
        return (self.link,)

    def new_pool(self, num_slots: int) -> jax.Array:
        """A slot pool [R, 3, F, M] of zeros on the accelerator, in the dtype of the blocks.

        One block of zeros of each size goes the way of an expert (and is counted), so that the copies are compiled before
        the first one is timed.
        """
        pool = self.zeros(num_slots)
        for shape in sorted(set(self.tier.shapes)):
            (block,) = self._sent((to_host(np.zeros(shape, self.tier.dtype), self.device),))
            self.link.send(block.nbytes)
            for size in self._sizes[1:]:
                pool = _write_slots(pool, (block,) * size, np.zeros(size, np.int32))
            pool = self._write(pool, (block,), [0])
        return pool

    def zeros(self, count: int) -> jax.Array:
        """So many empty slots on the accelerator."""
        with jax.default_device(self.device):  # else they are made on the first one
            return jax.device_put(jnp.zeros((count, *self.tier.shape), self.tier.dtype), self.device)

    def fetch(self, pool: jax.Array, copies: Sequence[tuple[int, int, int]], arriving: Coming = ()) -> tuple[jax.Array, Coming]:
        """Starts the copies (layer, expert, slot), in that order; the rest as of `put`."""
        blocks = self.tier.blocks([(layer, expert) for layer, expert, _ in copies])
        return self.put(pool, blocks, [slot for _, _, slot in copies], arriving)

    def put(self, pool: jax.Array, blocks: Iterable[Any], slots: Sequence[int], arriving: Coming = ()) -> tuple[jax.Array, Coming]:
        """Starts the copies of blocks [3, F, M] of pinned host memory into slots. The pool is consumed (donated).

        -> pool and what is now on its way, which `finish_copies` writes; waits for the oldest where there is no room for more.
        """
        blocks = iter(blocks)
        for start, size in _batches(len(slots), self._sizes):
            batch, places = tuple(itertools.islice(blocks, size)), slots[start : start + size]
            if self._room:
                pool, arriving = self._finish_oldest(pool, arriving, len(arriving) + size - self._room)
            for slot, block in zip(places, batch, strict=True):
                self._arrival_s[slot] = self.link.send(block.nbytes)
            if self._room:
                arriving = (*arriving, *map(Arriving, places, self._sent(batch)))
            else:
                pool = self._write(pool, batch, places)
        return pool, arriving

    def finish_copies(self, pool: jax.Array, arriving: Coming, slots: np.ndarray | None = None) -> tuple[jax.Array, Coming]:
        """Returns when what is on its way into these slots (None: all) has arrived and is being written; consumes the pool.

        Negative slots are none. What was started before it is written too: a slot may have been given away and filled again.
        """
        if slots is None:
            return self._finish_oldest(pool, arriving, len(arriving))
        read = set(slots[slots >= 0].tolist())
        last = max((i for i, one in enumerate(arriving) if one.slot in read), default=-1)
        pool, arriving = self._finish_oldest(pool, arriving, last + 1)
        self.wait_for(read)
        return pool, arriving

    def wait_for(self, slots: Iterable[int]) -> None:
        """Returns when an emulated link has brought what is on its way into these slots."""
        if self.link.bytes_per_s is not None:
            self.link.wait(max((self._arrival_s.get(slot, 0.0) for slot in slots), default=0.0))

    def finish_arrived(self, pool: jax.Array, arriving: Coming) -> tuple[jax.Array, Coming]:
        """Writes the copies that have arrived; never waits. Consumes the pool."""
        arrived = sum(1 for _ in itertools.takewhile(lambda one: _is_ready(one.block), arriving))
        return self._finish_oldest(pool, arriving, arrived)

    def _finish_oldest(self, pool: jax.Array, arriving: Coming, count: int) -> tuple[jax.Array, Coming]:
        """Writes the `count` oldest, waiting for them; none if it is not above 0."""
        oldest, others = arriving[: max(count, 0)], arriving[max(count, 0) :]
        return self._write(pool, [one.block for one in oldest], [one.slot for one in oldest]), others

    def _sent(self, blocks: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Blocks of host memory as transfers of their own; the same blocks where the program of their slots copies them."""
        return jax.device_put(blocks, self._sharding) if self._room else blocks

    def _write(self, pool: jax.Array, blocks: Sequence[jax.Array], slots: Sequence[int]) -> jax.Array:
        """Writes blocks into their slots, in that order, once they are there. The pool is consumed (donated)."""
        first = 0
        for _, run in itertools.groupby(blocks, lambda block: block.shape):  # those of layers that are packed alike, in one program
            count = len(tuple(run))
            for start, size in _batches(count, self._sizes):
                places = slice(first + start, first + start + size)
                batch = jax.block_until_ready(tuple(blocks[places]))
                pool = _write_slots(pool, batch, np.array(slots[places], np.int32))
            first += count
        return pool

    def new_buffer(self) -> jax.Array:
        """Room for all experts of one layer, [E, 3, F, M] of zeros on the accelerator (expert_flow=stream)."""
        return self.zeros(len(self._own))

    def send_for(self, layer: int) -> int:
        """Counts a layer that `stream` will bring: who asks for it knows which step it belongs to, the link's thread does not.

        -> the layer.
        """
        self.link.count(len(self._own) * math.prod(self.tier.shapes[layer]) * self.tier.dtype.itemsize)
        return layer

    def stream(self, buffer: jax.Array, layer: int) -> jax.Array:
        """Copies all experts of a layer (`send_for`) into a buffer (donated), batch by batch; returns when they have arrived.

        Each batch waits for the one before, so a more urgent transfer waits for one expert or BATCH_BYTES at most. Runs in
        the engine's link thread.
        """
        for filled, arrival_s in self.stream_batches(buffer, layer):
            buffer = filled
            self.link.wait(arrival_s)
        return buffer

    def stream_batches(self, buffer: jax.Array, layer: int) -> Iterator[tuple[jax.Array, float]]:
        """The buffer after each batch of `stream`, and the time at which the batch arrives."""
        start_s = time.perf_counter()
        blocks = iter(self.tier.blocks([(layer, expert) for expert in self._own]))
        for start, size in _batches(len(self._own), self._sizes):
            batch = tuple(itertools.islice(blocks, size))
            arrival_s = self.link.occupy(sum(block.nbytes for block in batch), since_s=start_s)
            buffer = self._write(buffer, self._sent(batch), range(start, start + size))  # not in the program: it would wait
            if not self._room:
                jax.block_until_ready(buffer)
            yield buffer, arrival_s

    def copies_within(self, budget_s: float, under_way: int = 0) -> int:
        """Experts that can be sent for now, `under_way` being so already: those that arrive within `budget_s`, for which there is
        room. Without an emulated rate arrivals are unknown.
        """
        most = self._room - under_way if self._room else self.tier.num_experts
        if self.link.bytes_per_s is None or budget_s == float("inf"):
            return most
        expert_s = self._block_bytes / self.link.bytes_per_s
        return min(most, max(int((budget_s - self.link.backlog_s) / expert_s), 0))


def _is_ready(array: Any) -> bool:
    """Whether an array has been computed: every concrete one tells, jax.Array does not say so."""
    return array.is_ready()


def _batch_sizes(block_bytes: int, most: int) -> tuple[int, ...]:
    """1, 2, 4, ...: how many blocks may go together."""
    largest = max(min(BATCH_BYTES // block_bytes, BATCH_BLOCKS, most), 1)
    return tuple(1 << i for i in range(largest.bit_length()))


def _batches(count: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, size) of consecutive batches of `count` things, the largest first."""
    start = 0
    for size in reversed(sizes):
        while count - start >= size:
            yield start, size
            start += size


@functools.partial(jax.jit, donate_argnums=0)
def _write_slots(pool: jax.Array, blocks: tuple[jax.Array, ...], slots: jax.Array) -> jax.Array:
    """One program for copy and write: in place, and three times faster on CPU than device_put and then write.

    A block that is smaller than a slot, of a layer that is packed in fewer bytes, fills its front.
    """
    for i, block in enumerate(blocks):
        block = jax.device_put(block, jax.memory.Space.Device)
        pool = ops.put_row(pool, block, slots[i])
    return pool
