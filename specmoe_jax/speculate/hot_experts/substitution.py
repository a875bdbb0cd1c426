"""Which resident expert computes for an absent one while drafting: SpecMoE's rule and its ablations."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.speculate.hot_experts.affinity import substitutes
from specmoe_jax.types import Routing

TINY = 1e-20  # beside a sum of weights that is 0 for padding


class MaskedSlots(NamedTuple):
    """`mask`: the router chooses again, among the residents alone. own: [E] int32, slots, -1 = not resident."""

    own: np.ndarray


class DistinctSlots(NamedTuple):
    """`distinct`: a token's choices take different residents. own: [E] as above; nearest: [E, N], slots of the N residents.

    Row e of `nearest` is sorted by the distance to expert e.
    """

    own: np.ndarray
    nearest: np.ndarray


Slots = np.ndarray | MaskedSlots | DistinctSlots  # of one layer; an array [E] gives the slot of each expert


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReducedSlots:
    """Of a token's choices only top_k compute, by `slots`: residents first. own: [E] int32, slots, -1 = not resident."""

    own: np.ndarray
    slots: Slots
    top_k: int = dataclasses.field(metadata={"static": True})


DraftSlots = Slots | ReducedSlots


def draft_slots(slot_of: np.ndarray, neighbours: np.ndarray | None, plan: Plan) -> list[Slots]:
    """How each layer substitutes. slot_of: [L, E] int32, -1 = not resident; at least as many resident as plan.draft_experts says.

    neighbours: [L, E, E], by distance or at random; None under `mask`, which substitutes nothing.
    """
    if plan.substitution == "mask":
        return [MaskedSlots(own=own) for own in slot_of]
    assert neighbours is not None and plan.draft_experts is not None
    if plan.substitution == "distinct":
        sizes = plan.draft_experts if isinstance(plan.draft_experts, tuple) else (plan.draft_experts,) * len(slot_of)
        nearest = _nearest(slot_of, neighbours, max(sizes))
        return [DistinctSlots(own=a, nearest=b[:, :n]) for a, b, n in zip(slot_of, nearest, sizes, strict=True)]
    return list(substitute_slots(slot_of, neighbours))


def substitute_slots(slot_of: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Slot tables [L, E] of the draft: each expert's own slot, or its nearest resident expert's (affinity).

    slot_of: [L, E] int32, -1 = not resident; at least one resident expert per layer. neighbours: [L, E, E].
    The gate's own weights stay, so two choices that land on one resident expert add up (`dup`).
    """
    stand_ins = [substitutes(order, slots >= 0) for order, slots in zip(neighbours, slot_of, strict=True)]
    return np.stack([slots[chosen] for slots, chosen in zip(slot_of, stand_ins, strict=True)]).astype(np.int32)


def choose_distinct(ids: jax.Array, slots: DistinctSlots) -> jax.Array:
    """Slots [n, A] of the chosen experts ids [n, A], -1 for padding.

    A resident stands for itself; then the others, in the order of the choices, take the nearest resident that the token
    does not use yet, or the nearest of all when it uses every one.
    """
    own, nearest = jnp.asarray(slots.own)[ids], jnp.asarray(slots.nearest)[ids]  # [n, A], [n, A, N]
    chosen = jnp.where(ids < 0, -1, own)
    for choice in range(ids.shape[1]):
        candidates = nearest[:, choice]  # [n, N]
        free = (candidates[:, :, None] != chosen[:, None, :]).all(axis=-1)
        first = jnp.take_along_axis(candidates, jnp.argmax(free, axis=1)[:, None], axis=1)[:, 0]
        absent = (own[:, choice] < 0) & (ids[:, choice] >= 0)
        chosen = chosen.at[:, choice].set(jnp.where(absent, first, chosen[:, choice]))
    return chosen


def reduced_slots(slots: list[Slots], slot_of: np.ndarray, top_k: int) -> list[DraftSlots]:
    """Those of each layer for a draft that runs top_k of a token's choices. slot_of: [L, E], as of `draft_slots`."""
    return [ReducedSlots(own, some, top_k) for own, some in zip(slot_of, slots, strict=True)]


def best_choices(routing: Routing, own: np.ndarray | jax.Array, top_k: int) -> Routing:
    """The top_k best of each token's choices: residents first (own [E] >= 0), the best first among them and among the others.

    Their weights keep their ratios and get the sum of all that the token gave.
    """
    ids, weights = routing
    place = jnp.arange(ids.shape[1])
    resident = (ids >= 0) & (jnp.asarray(own)[ids] >= 0)
    order = jnp.argsort(jnp.where(resident, place, place + ids.shape[1]), axis=1)[:, :top_k]
    ids, kept = jnp.take_along_axis(ids, order, axis=1), jnp.take_along_axis(weights, order, axis=1)
    scale = jnp.sum(weights, axis=1, keepdims=True) / (jnp.sum(kept, axis=1, keepdims=True) + TINY)
    return Routing(ids=ids, weights=kept * scale)


def random_neighbours(num_layers: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """[L, E, E] int32: itself first, then the others in random order (SpecMoE's ablation of affinity)."""
    order = np.random.default_rng(seed).random((num_layers, num_experts, num_experts))
    order[:, np.arange(num_experts), np.arange(num_experts)] = -1
    return np.argsort(order, axis=-1).astype(np.int32)


def _nearest(slot_of: np.ndarray, neighbours: np.ndarray, size: int) -> np.ndarray:
    """[L, E, size] int32: slots of the residents, those nearest to each expert first."""
    slots = np.take_along_axis(np.broadcast_to(slot_of[:, None], neighbours.shape), neighbours, axis=2)
    order = np.argsort(slots < 0, axis=2, kind="stable")[:, :, :size]
    return np.take_along_axis(slots, order, axis=2).astype(np.int32)
