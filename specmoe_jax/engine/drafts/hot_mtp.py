"""The target's layers for further tokens with a few of their experts on the accelerator: those that the texts at hand choose most.

All experts are in host memory. What the router of a layer chooses of all is counted at every position that is observed, of
prompts and of committed tokens; after 1, 2, 4 drafts and so on, at last after every REFRESH, the most chosen ones that are absent
take the places of the least chosen. The router then chooses among the experts that are there, as `substitution=mask` does for a
self-draft: of the distances of their weights nothing has to be known. Of several devices each has all of the layer, these experts
too, so a draft token is computed without a sum over devices; an expert crosses the link of each, where its bytes are counted.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax import ops
from specmoe_jax.models.mtp import MtpHead
from specmoe_jax.offload.store import Link
from specmoe_jax.speculate.drafts.mtp import MtpDraft, MtpMemory
from specmoe_jax.speculate.drafts.protocol import DraftView
from specmoe_jax.support.processes import local, put
from specmoe_jax.types import KVCache, Proposal

REFRESH = 64  # drafts: a step of a batch observes a few positions a row, so that counts change slowly
KEPT = 0.5  # of the counts at each refresh: later text counts more


class HotMemory(NamedTuple):
    """own: the layers'. pools, slots: see MtpHead, of each layer. held: [layers, n], the experts there, -1 for none.

    due: drafts until the next refresh. period: of refreshes; it doubles, since the first ones may see a part of the prompts alone,
    or nothing (a warm-up, after which it begins anew).
    """

    own: MtpMemory
    pools: tuple[jax.Array, ...]
    slots: tuple[jax.Array, ...]
    held: np.ndarray
    due: int = 0
    period: int = 1


class HotMtpDraft(NamedTuple):
    """draft: of layers without experts. blocks: of each layer, all of its experts in host memory. hot: n. links: of the devices."""

    draft: MtpDraft
    blocks: tuple[tuple[jax.Array, ...], ...]
    hot: int
    links: tuple[Link, ...]

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.draft.feature_layers

    def new_memory(self, rows: int, positions: int) -> HotMemory:
        own, experts, device = self.draft.new_memory(rows, positions), len(self.blocks[0]), self.draft.head.weights.fc.device
        counts = tuple(jnp.zeros(experts, jnp.float32, device=device) for _ in self.blocks)
        return HotMemory(
            own=own._replace(counts=counts),
            pools=tuple(jnp.zeros((self.hot, *b[0].shape), b[0].dtype, device=device) for b in self.blocks),
            slots=tuple(jnp.full(experts, -1, jnp.int32, device=device) for _ in self.blocks),
            held=np.full((len(self.blocks), self.hot), -1),
        )

    def observe(self, memory: HotMemory, rows, following, features, lengths, num_new) -> HotMemory:
        """The first positions of a job are read twice: what the router chooses of them says which experts are brought."""
        given = (rows, following, features, lengths, num_new)
        if (memory.held < 0).any():
            memory = self._refreshed(memory._replace(own=self._with(memory).observe(memory.own, *given)))
        return memory._replace(own=self._with(memory).observe(memory.own, *given))

    def propose(self, view: DraftView) -> tuple[Proposal, KVCache]:
        memory = self._refreshed(view.memory)
        proposal, kv = self._with(memory).propose(view._replace(memory=memory.own))
        return proposal._replace(memory=memory._replace(own=proposal.memory)), kv

    def _with(self, memory: HotMemory) -> MtpDraft:
        """The draft with the experts that are there."""
        chain = self.draft.head.chain
        first, *further = (
            dataclasses.replace(layer, experts=pool, slots=slots)
            for layer, pool, slots in zip(chain, memory.pools, memory.slots, strict=True)
        )
        return self.draft._replace(head=dataclasses.replace(first, further=tuple(further)))

    def _refreshed(self, memory: HotMemory) -> HotMemory:
        """With the most chosen experts of each layer, where that is due. Waits for the counts and for the copies."""
        if memory.due > 0:
            return memory._replace(due=memory.due - 1)
        counts, held = np.stack(jax.device_get(local(memory.own.counts))), memory.held.copy()
        pools, slots, arrival_s = list(memory.pools), [], 0.0
        for layer, blocks in enumerate(self.blocks):
            for place, expert in swaps(counts[layer], held[layer]):
                block = put(blocks[expert], pools[layer].sharding)
                pools[layer] = _put(pools[layer], block, np.int32(place))
                arrival_s = max(link.send(block.nbytes) for link in self.links)
                held[layer, place] = expert
            table = np.full(len(blocks), -1, np.int32)
            table[held[layer]] = np.arange(self.hot)
            slots.append(put(table, memory.slots[layer].sharding))
        for link in self.links:
            link.wait(arrival_s)
        kept = tuple(put(KEPT * own, old.sharding) for own, old in zip(counts, memory.own.counts, strict=True))
        own = memory.own._replace(counts=kept)
        period = min(2 * memory.period, REFRESH) if counts.any() else 1
        return HotMemory(own, tuple(pools), tuple(slots), held, due=memory.period - 1 if counts.any() else 0, period=period)


def swaps(counts: np.ndarray, held: np.ndarray) -> list[tuple[int, int]]:
    """(place, expert) of what has to be brought so that the len(held) most chosen experts are there; of equal ones those that are.

    counts: [E]; held: [n], the experts in the places, -1 for none.

    >>> swaps(np.array([5.0, 0, 3, 3]), np.array([1, 3]))
    [(0, 0)]
    """
    is_held = np.isin(np.arange(len(counts)), held)
    wanted = np.lexsort((~is_held, -counts))[: len(held)]
    free = [place for place, expert in enumerate(held.tolist()) if expert not in wanted]
    return list(zip(free, (int(expert) for expert in wanted if not is_held[expert]), strict=True))


@functools.partial(jax.jit, donate_argnums=0)
def _put(pool: jax.Array, block: jax.Array, place) -> jax.Array:
    return ops.put_row(pool, block, place)


def host_blocks(head: MtpHead) -> tuple[tuple[jax.Array, ...], ...] | None:
    """Of each layer; None where the experts are on the accelerator, or there are none."""
    blocks = tuple(layer.experts for layer in head.chain if isinstance(layer.experts, tuple))
    return blocks or None


def without_experts(head: MtpHead) -> MtpHead:
    first, *further = (dataclasses.replace(layer, experts=None) for layer in head.chain)
    return dataclasses.replace(first, further=tuple(further))
