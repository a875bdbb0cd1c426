"""Retained experts: a freed expert stays usable until its slot is overwritten, in the order of a policy. Pure.

Beyond the paper: a pool must hold one layer's whole dispatch, and most passes of small batches need a fraction of it.
"""

from typing import NamedTuple

import numpy as np

from specmoe_jax.offload.host_cache_policies import Usage, Visits, expected_wait, visited
from specmoe_jax.offload.residency import Residency
from specmoe_jax.offload.retain_policies import USAGE, RetainPolicy

DECAY = 0.9  # weight of the past per pass: a choice ten passes ago counts a third


class History(NamedTuple):
    """Of each expert. last: [L, E], visits of any layer so far when it was last chosen. count: [L, E], visits that chose it.

    now: visits so far. visits: of each layer, lately.
    """

    last: np.ndarray
    count: np.ndarray
    now: int
    visits: Visits


class RetainedExperts(NamedTuple):
    """holds: [R] int32, layer * E + expert last copied into each slot, or -1. usage: [L, E], fading counts of choices.

    policy: orders the slots. history: what it needs beside them, None where it needs nothing.
    """

    holds: np.ndarray
    usage: np.ndarray
    policy: RetainPolicy = USAGE
    history: History | None = None


def nothing(num_layers: int, num_experts: int, num_slots: int, policy: RetainPolicy = USAGE) -> RetainedExperts:
    """A new pool's."""
    zeros = np.zeros((num_layers, num_experts), np.int64)
    history = History(zeros, zeros, 0, Visits(np.zeros(zeros.shape), np.zeros(num_layers))) if policy.by_history else None
    return RetainedExperts(np.full(num_slots, -1, np.int32), np.zeros(zeros.shape), policy, history)


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


def eviction_priority(retained_experts: RetainedExperts, drafted: np.ndarray | None = None) -> np.ndarray:
    """[R], -1 for a slot that holds nothing. Slots are overwritten in this order.

    drafted: [L, E], how often the draft's gates chose each expert for what is left of this pass; None for nothing.
    """
    holds = retained_experts.holds
    if retained_experts.policy == USAGE:  # its key is the order
        return np.where(holds < 0, -1.0, retained_experts.usage.reshape(-1)[holds])
    usage = retained_experts.usage
    known = {"fading": usage, "drafted": np.zeros(usage.shape, np.int64) if drafted is None else drafted}
    last = count = np.zeros(usage.shape, np.int64)
    now = 0
    if (history := retained_experts.history) is not None:
        last, count, now = history.last, history.count, history.now
        known["wait"] = expected_wait(history.visits)
    of_slots = {name: values.reshape(-1)[holds] for name, values in known.items()}
    keys = retained_experts.policy.keys(Usage(last.reshape(-1)[holds], count.reshape(-1)[holds], now, **of_slots))
    priority = np.empty(len(holds))
    priority[np.lexsort(keys)] = np.arange(len(holds))
    return np.where(holds < 0, -1.0, priority)


def after_copies(retained_experts: RetainedExperts, copies) -> RetainedExperts:
    """With the copies (layer, expert, slot) made, in that order."""
    holds, num_experts = retained_experts.holds.copy(), retained_experts.usage.shape[1]
    for layer, expert, slot in copies:
        holds[slot] = layer * num_experts + expert
    return retained_experts._replace(holds=holds)


def after_pass(retained_experts: RetainedExperts, layer: int, counts: np.ndarray) -> RetainedExperts:
    """With the choices [E] of one layer's pass counted."""
    usage, history = retained_experts.usage.copy(), retained_experts.history
    usage[layer] = DECAY * usage[layer] + counts
    if history is not None:
        last, count, chosen = history.last.copy(), history.count.copy(), counts > 0
        last[layer, chosen] = history.now + 1
        count[layer] += chosen
        visits = visited(history.visits, layer, np.flatnonzero(chosen))
        history = History(last, count, history.now + 1, visits)
    return retained_experts._replace(usage=usage, history=history)
