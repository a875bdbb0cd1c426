"""Retained experts: a freed expert stays usable until its slot is overwritten, the least used first. Pure.

Beyond the paper: a pool must hold one layer's whole dispatch, and most passes of small batches need a fraction of it.
"""

from typing import NamedTuple

import numpy as np

from specmoe_jax.offload.residency import Residency

DECAY = 0.9  # weight of the past per pass: a choice ten passes ago counts a third


class RetainedExperts(NamedTuple):
    """holds: [R] int32, layer * E + expert last copied into each slot, or -1. usage: [L, E], fading counts of choices."""

    holds: np.ndarray
    usage: np.ndarray


def nothing(num_layers: int, num_experts: int, num_slots: int) -> RetainedExperts:
    """A new pool's."""
    return RetainedExperts(holds=np.full(num_slots, -1, np.int32), usage=np.zeros((num_layers, num_experts)))


def revive(residency: Residency, retained_experts: RetainedExperts, wanted: np.ndarray, room: int | np.ndarray) -> Residency:
    """The residency with wanted experts [L, E] back that lie in free slots: at most `room` of each device, nearest layer first."""
    slots = np.flatnonzero((residency.owner < 0) & (retained_experts.holds >= 0))
    ids = retained_experts.holds[slots]
    missing = wanted.reshape(-1)[ids] & (residency.slot_of.reshape(-1)[ids] < 0)
    ids, first = np.unique(ids[missing], return_index=True)  # an expert may have been copied twice
    slots = slots[missing][first]
    homes, most = slots // max(residency.own_slots, 1), np.broadcast_to(room, residency.devices)
    fits = np.concatenate([np.flatnonzero(homes == device)[: max(most[device], 0)] for device in range(residency.devices)])
    ids, slots = ids[fits], slots[fits]
    if not len(ids):
        return residency
    slot_of, owner = residency.slot_of.copy(), residency.owner.copy()
    slot_of.reshape(-1)[ids], owner[slots] = slots, ids
    return residency._replace(slot_of=slot_of, owner=owner)


def eviction_priority(retained_experts: RetainedExperts) -> np.ndarray:
    """[R], how much each slot's content is used; -1 for none. Slots are overwritten in this order."""
    return np.where(retained_experts.holds < 0, -1.0, retained_experts.usage.reshape(-1)[retained_experts.holds])


def after_copies(retained_experts: RetainedExperts, copies) -> RetainedExperts:
    """With the copies (layer, expert, slot) made, in that order."""
    holds, num_experts = retained_experts.holds.copy(), retained_experts.usage.shape[1]
    for layer, expert, slot in copies:
        holds[slot] = layer * num_experts + expert
    return retained_experts._replace(holds=holds)


def after_pass(retained_experts: RetainedExperts, layer: int, counts: np.ndarray) -> RetainedExperts:
    """With the choices [E] of one layer's pass counted."""
    usage = retained_experts.usage.copy()
    usage[layer] = DECAY * usage[layer] + counts
    return retained_experts._replace(usage=usage)
