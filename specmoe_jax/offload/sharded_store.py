"""The store of several devices: one store and one link each, over pools that programs of all devices read as one."""

import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from specmoe_jax.offload.homes import most_experts, own_experts
from specmoe_jax.offload.store import Arriving, ExpertStore, Link
from specmoe_jax.offload.tiers import Tier
from specmoe_jax.types import MESH_AXIS, ShardedPool

Coming = tuple[Arriving, ...]


class ShardedStore:
    """Has the methods of `ExpertStore`; slots are numbered through all devices (homes.py), and by each store from 0.

    A device's slots are an array of its own, which programs of that device alone write in place; a pool is a view of these arrays.
    Copies to all devices are started before any is waited for.
    """

    def __init__(self, tier: Tier, links: Sequence[Link], mesh: jax.sharding.Mesh, *, room: int = 0):
        devices, experts = mesh.devices.tolist(), tier.num_experts // tier.num_layers
        self.tier, self._links, self._mesh = tier, tuple(links), mesh
        self._stores = [
            ExpertStore(tier, link, room=room, device=device, own=own_experts(number, len(devices), experts))
            for number, (link, device) in enumerate(zip(links, devices, strict=True))
        ]
        self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(MESH_AXIS))
        self._buffer_slots = most_experts(len(devices), experts)

    @property
    def links(self) -> tuple[Link, ...]:
        return self._links

    def new_pool(self, num_slots: int) -> ShardedPool:
        """num_slots: of all devices together, as many of each."""
        return self._joined([store.new_pool(num_slots // len(self._stores)) for store in self._stores])

    def fetch(self, pool: ShardedPool, copies: Sequence[tuple[int, int, int]], arriving: Coming = ()) -> tuple[ShardedPool, Coming]:
        if not copies:
            return pool, arriving
        size = self._size(pool)

        def start(number: int, shard: jax.Array, coming: Coming):
            own = [(layer, expert, slot - number * size) for layer, expert, slot in copies if slot // size == number]
            return self._stores[number].fetch(shard, own, coming)

        return self._each(pool, arriving, start)

    def finish_copies(self, pool: ShardedPool, arriving: Coming, slots: np.ndarray | None = None) -> tuple[ShardedPool, Coming]:
        size = self._size(pool)
        read = [None if slots is None else slots[slots // size == number] - number * size for number in range(len(self._stores))]
        if arriving:
            return self._each(pool, arriving, lambda n, shard, coming: self._stores[n].finish_copies(shard, coming, read[n]))
        for store, own in zip(self._stores, read, strict=True):
            store.wait_for(() if own is None else own.tolist())
        return pool, arriving

    def finish_arrived(self, pool: ShardedPool, arriving: Coming) -> tuple[ShardedPool, Coming]:
        if not arriving:
            return pool, arriving
        return self._each(pool, arriving, lambda number, shard, coming: self._stores[number].finish_arrived(shard, coming))

    def new_buffer(self) -> ShardedPool:
        """A device with fewer experts than another has slots that stay empty."""
        return self._joined([store.zeros(self._buffer_slots) for store in self._stores])

    def send_for(self, layer: int) -> int:
        for store in self._stores:
            store.send_for(layer)
        return layer

    def stream(self, buffer: ShardedPool, layer: int) -> ShardedPool:
        """Every device its own experts of the layer, at the same time."""
        shards = self._shards(buffer)
        streams = [store.stream_batches(shard, layer) for store, shard in zip(self._stores, shards, strict=True)]
        for batches in itertools.zip_longest(*streams):
            for number, batch in enumerate(batches):
                if batch is not None:
                    shards[number] = batch[0]
            for store, batch in zip(self._stores, batches, strict=True):
                if batch is not None:
                    store.link.wait(batch[1])
        return self._joined(shards)

    def copies_within(self, budget_s: float, under_way: int = 0) -> tuple[int, ...]:
        """To each device. under_way: to all of them, counted against the room of each."""
        return tuple(store.copies_within(budget_s, under_way) for store in self._stores)

    def _each(
        self, pool: ShardedPool, arriving: Coming, act: Callable[[int, jax.Array, Coming], tuple[jax.Array, Coming]]
    ) -> tuple[ShardedPool, Coming]:
        """act: with the number of each device, its slots and what is on its way into them."""
        size, shards, left = self._size(pool), self._shards(pool), []
        for number, shard in enumerate(shards):
            own = tuple(one._replace(slot=one.slot - number * size) for one in arriving if one.slot // size == number)
            shards[number], own = act(number, shard, own)
            left += [one._replace(slot=one.slot + number * size) for one in own]
        return self._joined(shards), tuple(left)

    def _size(self, pool: ShardedPool) -> int:
        """Slots of each device."""
        return len(pool.blocks) // len(self._stores)

    def _shards(self, pool: ShardedPool) -> list[jax.Array]:
        """The array of each device; the pool is consumed where one of them is donated."""
        found = {shard.device: shard.data for shard in pool.blocks.addressable_shards}
        return [found[store.device] for store in self._stores]

    def _joined(self, shards: list[jax.Array]) -> ShardedPool:
        shape = (len(shards) * len(shards[0]), *shards[0].shape[1:])
        return ShardedPool(jax.make_array_from_single_device_arrays(shape, self._sharding, shards), self._mesh)
