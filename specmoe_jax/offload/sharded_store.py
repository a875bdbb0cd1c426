"""The store of several devices: one store and one link each, over pools that programs of all devices read as one.

Of several processes each has the stores of its own devices. What the others send follows from the same plans, so it is counted
here too, and all tell the same bytes of every link.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from specmoe_jax.offload.homes import most_experts, own_experts
from specmoe_jax.offload.store import Coming, ExpertStore, Link
from specmoe_jax.offload.tiers import Tier
from specmoe_jax.support.processes import is_local
from specmoe_jax.types import MESH_AXIS, ShardedPool


class ShardedStore:
    """Has the methods of `ExpertStore`; slots are numbered through all devices (homes.py), and by each store from 0.

    links: of the devices of all processes. A device's slots are an array of its own, which programs of that device alone write in
    place; a pool is a view of these arrays. Copies to all devices are started before any is waited for.
    """

    def __init__(self, tier: Tier, links: Sequence[Link], mesh: jax.sharding.Mesh, *, room: int = 0):
        devices, experts = mesh.devices.tolist(), tier.num_experts // tier.num_layers
        self.tier, self._links, self._mesh = tier, tuple(links), mesh
        self._own = [own_experts(number, len(devices), experts) for number in range(len(devices))]
        self._stores = {
            number: ExpertStore(tier, links[number], room=room, device=device, own=self._own[number])
            for number, device in enumerate(devices)
            if is_local(device)
        }
        self._elsewhere = [number for number in range(len(devices)) if number not in self._stores]
        self._block_bytes = [math.prod(shape) * tier.dtype.itemsize for shape in tier.shapes]
        self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(MESH_AXIS))
        self._buffer_slots = most_experts(len(devices), experts)

    @property
    def links(self) -> tuple[Link, ...]:
        return self._links

    def new_pool(self, num_slots: int) -> ShardedPool:
        """num_slots: of all devices together, as many of each."""
        for number in self._elsewhere:  # one block of each size, to warm up
            self._links[number].count(sum(set(self._block_bytes)))
        return self._joined([store.new_pool(num_slots // len(self._links)) for store in self._stores.values()])

    def fetch(self, pool: ShardedPool, copies: Sequence[tuple[int, int, int]], arriving: Coming = ()) -> tuple[ShardedPool, Coming]:
        if not copies:
            return pool, arriving
        size = self._size(pool)
        for layer, _, slot in copies:
            if slot // size in self._elsewhere:
                self._links[slot // size].count(self._block_bytes[layer])

        def start(number: int, shard: jax.Array, coming: Coming):
            own = [(layer, expert, slot - number * size) for layer, expert, slot in copies if slot // size == number]
            return self._stores[number].fetch(shard, own, coming)

        return self._each(pool, arriving, start)

    def put(
        self, pool: ShardedPool, blocks: Iterable[Any], slots: Sequence[int], arriving: Coming = ()
    ) -> tuple[ShardedPool, Coming]:
        """Blocks are as large as slots, and None where the slot is of another process's device."""
        size, blocks = self._size(pool), list(blocks)
        for slot in slots:
            if slot // size in self._elsewhere:
                self._links[slot // size].count(max(self._block_bytes))

        def start(number: int, shard: jax.Array, coming: Coming):
            own = [place for place, slot in enumerate(slots) if slot // size == number]
            into = [slots[place] - number * size for place in own]
            return self._stores[number].put(shard, [blocks[place] for place in own], into, coming)

        return self._each(pool, arriving, start)

    def finish_copies(self, pool: ShardedPool, arriving: Coming, slots: np.ndarray | None = None) -> tuple[ShardedPool, Coming]:
        size = self._size(pool)
        read = {number: None if slots is None else slots[slots // size == number] - number * size for number in self._stores}
        if arriving:
            return self._each(pool, arriving, lambda n, shard, coming: self._stores[n].finish_copies(shard, coming, read[n]))
        for number, store in self._stores.items():
            own = read[number]
            store.wait_for(() if own is None else own.tolist())
        return pool, arriving

    def finish_arrived(self, pool: ShardedPool, arriving: Coming) -> tuple[ShardedPool, Coming]:
        if not arriving:
            return pool, arriving
        return self._each(pool, arriving, lambda number, shard, coming: self._stores[number].finish_arrived(shard, coming))

    def new_buffer(self) -> ShardedPool:
        """A device with fewer experts than another has slots that stay empty."""
        return self._joined([store.zeros(self._buffer_slots) for store in self._stores.values()])

    def send_for(self, layer: int) -> int:
        for number in self._elsewhere:
            self._links[number].count(len(self._own[number]) * self._block_bytes[layer])
        for store in self._stores.values():
            store.send_for(layer)
        return layer

    def stream(self, buffer: ShardedPool, layer: int) -> ShardedPool:
        """Every device its own experts of the layer, at the same time."""
        shards, stores = self._shards(buffer), self._stores.values()
        streams = [store.stream_batches(shard, layer) for store, shard in zip(stores, shards, strict=True)]
        for batches in itertools.zip_longest(*streams):
            for place, batch in enumerate(batches):
                if batch is not None:
                    shards[place] = batch[0]
            for store, batch in zip(stores, batches, strict=True):
                if batch is not None:
                    store.link.wait(batch[1])
        return self._joined(shards)

    def copies_within(self, budget_s: float, under_way: int = 0) -> tuple[int, ...]:
        """To each device. under_way: to all of them, counted against the room of each.

        Processes would see another clock each, and other copies under way: of several none looks, and a copy without room waits.
        """
        if self._elsewhere:
            first = next(iter(self._stores.values()))
            return (first.copies_within(float("inf")),) * len(self._links)
        return tuple(store.copies_within(budget_s, under_way) for store in self._stores.values())

    def _each(
        self, pool: ShardedPool, arriving: Coming, act: Callable[[int, jax.Array, Coming], tuple[jax.Array, Coming]]
    ) -> tuple[ShardedPool, Coming]:
        """act: with the number of each device, its slots and what is on its way into them."""
        size, shards, left = self._size(pool), self._shards(pool), []
        for place, number in enumerate(self._stores):
            own = tuple(one._replace(slot=one.slot - number * size) for one in arriving if one.slot // size == number)
            shards[place], own = act(number, shards[place], own)
            left += [one._replace(slot=one.slot + number * size) for one in own]
        return self._joined(shards), tuple(left)

    def _size(self, pool: ShardedPool) -> int:
        """Slots of each device."""
        return len(pool.blocks) // len(self._links)

    def _shards(self, pool: ShardedPool) -> list[jax.Array]:
        """The array of each device of this process; the pool is consumed where one of them is donated."""
        found = {shard.device: shard.data for shard in pool.blocks.addressable_shards}
        return [found[store.device] for store in self._stores.values()]

    def _joined(self, shards: list[jax.Array]) -> ShardedPool:
        shape = (len(self._links) * len(shards[0]), *shards[0].shape[1:])
        return ShardedPool(jax.make_array_from_single_device_arrays(shape, self._sharding, shards), self._mesh)
