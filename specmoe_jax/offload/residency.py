"""Which expert is in which slot, and the copies of a layer's pass. Pure: integers in, integers out.

The accelerator holds one pool of R equal slots for all layers. A layer's pass may need more experts than
there are free slots, so its plan is a sequence of waves: fetch some experts, compute them, free them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from specmoe_jax.offload.homes import homes_of
from specmoe_jax.support.errors import PlanError


class Residency(NamedTuple):
    """slot_of: [L, E] int32, the slot of each expert or -1. owner: [R] int32, layer * E + expert, -1 where free, or L * E where
    something else is there for good.

    homes: [L, E] int32, the device of each expert (offload/homes.py). devices: n, with as many slots each.
    """

    slot_of: np.ndarray
    owner: np.ndarray
    homes: np.ndarray
    devices: int = 1

    @property
    def own_slots(self) -> int:
        """Of each device."""
        return len(self.owner) // self.devices

    @property
    def free(self) -> np.ndarray:
        """[n], slots of each device that hold no expert."""
        return (self.owner < 0).reshape(self.devices, -1).sum(axis=1)


class Wave(NamedTuple):
    """One round of a layer's pass: first the copies, then the experts that are computed.

    fetch: copies (layer, expert, slot). slots: [E] int32, the slot of each expert computed in this wave, else -1.
    """

    fetch: tuple[tuple[int, int, int], ...]
    slots: np.ndarray


class LayerPlan(NamedTuple):
    """waves: at least one. hits, misses: needed experts that were resident, and that were not. fetched: copies."""

    waves: tuple[Wave, ...]
    hits: int
    misses: int
    fetched: int


def empty(
    num_layers: int,
    num_experts: int,
    num_slots: int,
    devices: int = 1,
    homes: np.ndarray | None = None,
    taken: np.ndarray | None = None,
) -> Residency:
    """Nothing resident. num_slots: of all devices together. homes: None for the modulo. taken: slots that are never free."""
    slot_of, owner = np.full((num_layers, num_experts), -1, np.int32), np.full(num_slots, -1, np.int32)
    if taken is not None:
        owner[taken] = slot_of.size
    return Residency(slot_of, owner, homes_of(slot_of.shape, devices) if homes is None else homes, devices)


def plan_layer(
    residency: Residency, layer: int, needed: np.ndarray, keep: np.ndarray, eviction_priority: np.ndarray | None = None
) -> tuple[LayerPlan, Residency]:
    """The waves of one layer's pass, and the residency after it.

    needed: [E] bool, experts that the pass computes. keep: [E] bool, experts of this layer that stay resident
    afterwards (the next draft set: SpecMoE's switch moves nothing, because they were just fetched); the others
    are freed. Each missing expert is fetched once, however many tokens asked for it (coalescing). A slot is
    freed only after the wave that computed its expert, so no slot changes while the pass still refers to it.
    eviction_priority: [R], free slots are filled in its order; None: in theirs. Raises PlanError when a wave finds no free slot.
    """
    slot_of, owner = residency.slot_of.copy(), residency.owner.copy()
    resident = slot_of[layer] >= 0
    # Needed ones first: a fetch only for the next draft set must not delay a computation.
    misses = np.flatnonzero(needed & ~resident)
    queue = misses.tolist() + np.flatnonzero(keep & ~needed & ~resident).tolist()
    waves, computed = [], ~needed
    _release(slot_of, owner, layer, computed & ~keep)
    while True:
        free = _by_eviction_priority(np.flatnonzero(owner < 0), eviction_priority)
        batch, queue = _placed(layer, queue, free, residency)
        if queue and not batch and waves:  # the first wave may compute residents and free their slots
            raise PlanError(
                f"layer {layer} has {len(queue)} experts to fetch and no free slot of {residency.own_slots}; "
                "give more device memory or pin fewer experts"
            )
        fetch = tuple((layer, expert, slot) for expert, slot in batch)
        for _, expert, slot in fetch:
            slot_of[layer, expert], owner[slot] = slot, layer * len(needed) + expert
        ready = ~computed & (slot_of[layer] >= 0)
        waves.append(Wave(fetch=fetch, slots=np.where(ready, slot_of[layer], -1).astype(np.int32)))
        computed = computed | ready
        _release(slot_of, owner, layer, computed & ~keep)
        if not queue:
            break
    plan = LayerPlan(
        waves=tuple(waves),
        hits=int((needed & resident).sum()),
        misses=len(misses),
        fetched=sum(len(wave.fetch) for wave in waves),
    )
    return plan, residency._replace(slot_of=slot_of, owner=owner)


def _placed(layer: int, experts: list[int], free: np.ndarray, residency: Residency) -> tuple[list[tuple[int, int]], list[int]]:
    """(expert, slot) of those for which their device has a free slot, filled in their order, and the experts that are left."""
    places = free // max(residency.own_slots, 1)
    slots = [iter(free[places == device].tolist()) for device in range(residency.devices)]
    own = residency.homes[layer].tolist()
    found = [(expert, next(slots[own[expert]], None)) for expert in experts]
    return [(expert, slot) for expert, slot in found if slot is not None], [expert for expert, slot in found if slot is None]


def plan_prefetch(
    residency: Residency,
    predicted: np.ndarray,
    *,
    reserve: int,
    limit: int | Sequence[int],
    in_use: np.ndarray,
    eviction_priority: np.ndarray | None = None,
) -> tuple[tuple[tuple[int, int, int], ...], Residency]:
    """Copies of experts that a pass will probably need: (layer, expert, slot), nearest layer first.

    predicted: [L, E] int, how often each expert is expected to be chosen, 0 = not. Within a layer the most
    expected come first. reserve: slots of each device that stay free for the dispatch of a layer. limit: copies to a device at
    most, or to each of several. in_use: slots of the layer that is about to be computed: its plan has freed them already, and
    overwriting one now would give silently wrong weights. A prefetched expert is a resident of its layer until that layer's pass
    frees it.
    """
    room = np.minimum(residency.free - reserve, limit)
    free = _by_eviction_priority(np.setdiff1d(np.flatnonzero(residency.owner < 0), in_use), eviction_priority)
    layers, experts = np.nonzero((predicted > 0) & (residency.slot_of < 0))
    order = np.lexsort((experts, -predicted[layers, experts], layers))
    layers, experts = layers[order], experts[order]
    slots = np.full(len(order), -1, np.int64)
    for device in range(residency.devices):
        own = np.flatnonzero(residency.homes[layers, experts] == device)
        own_free = free[free // max(residency.own_slots, 1) == device]
        count = max(min(room[device], len(own_free), len(own)), 0)
        slots[own[:count]] = own_free[:count]
    layers, experts, slots = (values[slots >= 0] for values in (layers, experts, slots))
    slot_of, owner = residency.slot_of.copy(), residency.owner.copy()
    slot_of[layers, experts] = slots
    owner[slots] = layers * predicted.shape[1] + experts
    copies = tuple((int(a), int(b), int(c)) for a, b, c in zip(layers, experts, slots, strict=True))
    return copies, residency._replace(slot_of=slot_of, owner=owner)


def _by_eviction_priority(slots: np.ndarray, eviction_priority: np.ndarray | None) -> np.ndarray:
    return slots if eviction_priority is None else slots[np.argsort(eviction_priority[slots], kind="stable")]


def _release(slot_of: np.ndarray, owner: np.ndarray, layer: int, experts: np.ndarray) -> None:
    """Frees the slots of some experts of a layer in the two (already copied) tables."""
    slots = slot_of[layer]
    gone = experts & (slots >= 0)
    owner[slots[gone]] = -1
    slots[gone] = -1
