"""Where the expert store takes its blocks from: host memory that holds all, or a disk with host memory as a cache above it."""

import concurrent.futures
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from specmoe_jax.models.model import to_host
from specmoe_jax.offload import host_cache as cache
from specmoe_jax.offload.homes import home
from specmoe_jax.offload.host_cache_policies import HostCachePolicy
from specmoe_jax.support.jax_settings import lenient_thread
from specmoe_jax.support.processes import is_local
from specmoe_jax.types import Device

READERS = 2  # demanded reads in flight; one more thread reads ahead


class TierCounts(NamedTuple):
    """disk_bytes: asked of the disk. hits, misses: experts asked for that were in host memory (or on their way), or not."""

    disk_bytes: int = 0
    hits: int = 0
    misses: int = 0

    def plus(self, more: "TierCounts") -> "TierCounts":
        """Both together."""
        return TierCounts(*map(sum, zip(self, more, strict=True)))

    def since(self, before: "TierCounts") -> "TierCounts":
        """The counts since `before`."""
        return TierCounts(*(now - then for now, then in zip(self, before, strict=True)))


class Tier(Protocol):
    """Blocks [3, F, M] of experts in pinned host memory, ready to be copied over the link.

    shape, dtype: of a block, the largest where layers are packed differently. shapes: [L], of each layer's. num_layers: those with
    experts. num_experts: of all layers. counts: since it was made.
    """

    shape: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: np.dtype
    num_layers: int
    num_experts: int
    counts: "TierCounts"

    def blocks(self, keys: list[tuple[int, int]]) -> Iterable[jax.Array]:
        """The blocks of experts (layer, expert), each waited for when it is its turn; their reads start together."""
        ...

    def block(self, key: tuple[int, int]) -> jax.Array:
        """The block of an expert; waits for the disk where it has to."""
        ...

    def read_ahead(self, predicted: np.ndarray) -> None:
        """Starts reads of experts that will probably be asked for. predicted: [L, E], 0 = not expected."""
        ...

    def ready(self) -> np.ndarray:
        """[L, E] bool, experts whose `block` does not wait."""
        ...


class HostTier:
    """All experts in host memory: of several devices, those of each in memory that is pinned for it.

    Of several processes each has those of its own devices.
    """

    counts = TierCounts()

    def __init__(self, experts: Sequence[Sequence[jax.Array]], devices: Sequence[Device] = (), homes: np.ndarray | None = None):
        """devices: none where there is only the first; homes: of homes.homes_of. A block that is pinned for another device than
        its own is copied.
        """
        self._everywhere = experts
        if devices:
            experts = [
                [_pinned_for(blocks, expert, home(layer, expert, devices, homes)) for expert in range(len(blocks))]
                for layer, blocks in enumerate(experts)
            ]
        self._experts = experts
        held = [next(block for block in layer if block is not None) for layer in experts]
        self.shapes, self.dtype = tuple(block.shape for block in held), held[0].dtype
        self.shape = max(self.shapes, key=math.prod)
        self.num_layers, self.num_experts = len(experts), sum(map(len, experts))
        self._ready = np.ones((len(experts), len(experts[0])), bool)

    def blocks(self, keys: list[tuple[int, int]]) -> list[jax.Array]:
        return [self._experts[layer][expert] for layer, expert in keys]

    def block(self, key: tuple[int, int]) -> jax.Array:
        """One that another process holds is read anew."""
        own = self._experts[key[0]][key[1]]
        return self._everywhere[key[0]][key[1]] if own is None else own

    def read_ahead(self, predicted: np.ndarray) -> None:
        pass

    def ready(self) -> np.ndarray:
        return self._ready


def block_addresses(blocks: Iterable[jax.Array], *, may_be_away: bool = False) -> np.ndarray:
    """[n, 2] uint32, the low half first: where blocks that a tier holds lie in this process's memory.

    may_be_away: they are pages of files, not all of which stay in memory; the kernels then ask for a call's experts at once, which
    odd addresses tell them.
    """
    addresses = np.array([block.unsafe_buffer_pointer() for block in blocks], np.uint64) | np.uint64(may_be_away)
    return addresses.view(np.uint32).reshape(-1, 2)


def _pinned_for(layer: Sequence[jax.Array], expert: int, device: Device | None) -> Any:
    """The block of an expert; None where another process has it."""
    if not is_local(device):
        return None
    block = layer[expert]
    return block if block.sharding.device_set == {device} else to_host(block, device)


class DiskTier:
    """Experts on disk, the `capacity` most worthwhile of them in host memory (host_cache.py decides, this reads).

    All decisions are taken by the calling thread, so a run repeats them; the threads only read. An evicted block lives on
    while a copy of it is under way, so the budget may be exceeded by what is on the link.
    files: checkpoints.disk.DiskExperts. keep_pages: False drops the pages that were read, so that a miss of this cache really
    reads the disk. devices, homes: as of HostTier.
    """

    def __init__(
        self,
        files,
        *,
        capacity: int,
        policy: HostCachePolicy,
        keep_pages: bool,
        devices: Sequence[Device] = (),
        homes: np.ndarray | None = None,
    ):
        self._files, self._capacity, self._policy, self._keep_pages = files, capacity, policy, keep_pages
        self._devices, self._homes = devices, homes
        self.shapes, self.dtype, shape = files.block_shapes, files.block_dtype, files.shape
        self.shape = max(self.shapes, key=math.prod)
        self.num_layers, self.num_experts, self.counts = shape[0], shape[0] * shape[1], TierCounts()
        self._cache = cache.empty(*shape)
        self._blocks: dict[tuple[int, int], concurrent.futures.Future] = {}
        self._pending: dict[tuple[int, int], concurrent.futures.Future] = {}  # those whose read may not have ended
        self._demanded = concurrent.futures.ThreadPoolExecutor(READERS, "specmoe-read", lenient_thread)
        self._ahead = concurrent.futures.ThreadPoolExecutor(1, "specmoe-read-ahead", lenient_thread)
        if not keep_pages:
            files.drop_pages()

    def blocks(self, keys: list[tuple[int, int]]) -> Iterable[jax.Array]:
        self.request(keys)
        return map(self.block, keys)

    def request(self, keys: list[tuple[int, int]]) -> None:
        """Announces the experts to be read next, so that their reads start together."""
        self._cache = cache.touch(self._cache, keys)
        hits = sum(bool(self._cache.present[key]) for key in keys)
        self._count(hits=hits, misses=len(keys) - hits)
        for key in keys:
            self._hasten(key)
        self._admit(keys, self._reading(), self._demanded)

    def block(self, key: tuple[int, int]) -> jax.Array:
        if self._failed(key):
            self._forget(key)  # it is read again: the obstacle may be gone
        while key not in self._blocks:  # more were requested than fit, or all room was taken by reads in flight
            self._admit([key], self._reading(), self._demanded)
            if key not in self._blocks:
                concurrent.futures.wait(self._pending.values(), return_when=concurrent.futures.FIRST_COMPLETED)
        return self._blocks[key].result()

    def read_ahead(self, predicted: np.ndarray) -> None:
        """At most half of the cache is on its way at a time, and nothing that is expected itself makes room."""
        reading = self._reading()
        limit = self._capacity // 2 - int(reading.sum())
        keys = cache.by_expectation(predicted, ~self._cache.present, max(limit, 0))
        self._admit(keys, reading | (predicted > 0), self._ahead)

    def ready(self) -> np.ndarray:
        return self._cache.present & ~self._reading()

    def _admit(self, keys: list[tuple[int, int]], protected: np.ndarray, pool: concurrent.futures.Executor) -> None:
        if not keys:
            return
        admission, self._cache = cache.admit(self._cache, keys, capacity=self._capacity, policy=self._policy, protected=protected)
        for key in admission.evicted:
            del self._blocks[key]
        for key in admission.admitted:
            self._count(disk_bytes=self._files.stored_bytes(*key))
            self._start(key, pool)

    def _failed(self, key: tuple[int, int]) -> bool:
        future = self._blocks.get(key)
        return future is not None and future.done() and future.exception() is not None

    def _forget(self, key: tuple[int, int]) -> None:
        present = self._cache.present.copy()
        present[key] = False
        self._cache = self._cache._replace(present=present)
        del self._blocks[key]

    def _count(self, **more: int) -> None:
        self.counts = self.counts._replace(**{name: getattr(self.counts, name) + count for name, count in more.items()})

    def _hasten(self, key: tuple[int, int]) -> None:
        """A read ahead that has not begun must not make a demanded one wait behind others."""
        future = self._pending.get(key)
        if future is not None and future.cancel():
            self._start(key, self._demanded)

    def _start(self, key: tuple[int, int], pool: concurrent.futures.Executor) -> None:
        self._blocks[key] = self._pending[key] = pool.submit(self._read, key)

    def _read(self, key: tuple[int, int]) -> jax.Array:
        device = home(*key, self._devices, self._homes)  # of another process where a draft merges all experts of a layer
        return to_host(self._files.read(*key, keep_pages=self._keep_pages), device if is_local(device) else None)

    def _reading(self) -> np.ndarray:
        """[L, E] bool, experts whose read has not ended."""
        self._pending = {key: future for key, future in self._pending.items() if not future.done()}
        reading = np.zeros(self._cache.present.shape, bool)
        for key in self._pending:
            reading[key] = True
        return reading
