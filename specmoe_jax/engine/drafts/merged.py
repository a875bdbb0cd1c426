"""The merged draft: the target's own pass over merged experts in slots of their own."""

import concurrent.futures
from typing import NamedTuple

import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.drafts.protocol import DraftExecutor, DraftInputs
from specmoe_jax.engine.flows.migration import wait_for_copies
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.models.model import Model
from specmoe_jax.offload.store import ExpertStore
from specmoe_jax.speculate.drafts.merged import group_experts, merge
from specmoe_jax.speculate.drafts.self_draft import SelfDraft
from specmoe_jax.speculate.hot_experts.affinity_cache import affinity_table
from specmoe_jax.speculate.hot_experts.substitution import DraftSlots


class Merging(NamedTuple):
    """counts: [L, E], choices since the last merge began. steps: since then. pending: the merge at work, None for none."""

    counts: np.ndarray
    steps: int = 0
    pending: concurrent.futures.Future | None = None


class Merged(NamedTuple):
    """groups: [L, E] int32, the slot of the block that stands for each expert. blocks: (block [3, F, M], slot)."""

    groups: np.ndarray
    blocks: list[tuple[np.ndarray, int]]


class MergedExecutor(DraftExecutor):
    def make(self, model: Model, plan: Plan, inputs: DraftInputs) -> SelfDraft:
        return SelfDraft()

    def neighbours(self, model: Model, plan: Plan, progress: str | bool) -> np.ndarray:
        return affinity_table(model, progress=progress)

    def slots(self, runtime: Runtime, memory: ExpertMemory) -> list[DraftSlots]:
        assert memory.groups is not None
        return list(memory.groups)

    def after_prefill(self, runtime: Runtime, memory: ExpertMemory, counts: np.ndarray) -> ExpertMemory:
        """Fills the merged slots, once for each pool: the prompts of its first batch are the calibration run.

        Every expert is read once and K blocks a layer cross the link.
        """
        return memory if memory.groups is not None else _installed(runtime, memory, merged(runtime, counts))

    def after_step(self, runtime: Runtime, memory: ExpertMemory, counts: np.ndarray) -> ExpertMemory:
        """Every `merge_every` steps a merge begins in a thread of the host; the next step's draft and pass run meanwhile.

        It is installed at the end of that step, whether or not it has to be waited for, so that runs can be repeated.
        """
        every = runtime.plan.merge_every
        if not every:
            return memory
        merging = memory.merging or Merging(np.zeros_like(counts))
        if merging.pending is not None:
            memory = _installed(runtime, memory, merging.pending.result())
        merging = Merging(merging.counts + counts, merging.steps + 1)
        if merging.steps >= every:
            most = runtime.plan.merge_experts or 2 * len(_slots(runtime)[0])
            merging = Merging(
                np.zeros_like(counts), pending=runtime.context.workers.cpu.submit(merged, runtime, merging.counts, most)
            )
        return memory._replace(merging=merging)


def merged(runtime: Runtime, counts: np.ndarray, most: int | None = None) -> Merged:
    """All blocks by how often each expert was chosen [L, E]; of a layer only the `most` most used experts, None for all."""
    neighbours, groups, blocks = runtime.policies.neighbours, np.zeros(counts.shape, np.int32), []
    tier = _store(runtime).tier
    assert neighbours is not None
    for layer, slots in enumerate(_slots(runtime)):
        grouping = group_experts(counts[layer], neighbours[layer], len(slots), most)
        for group, slot in enumerate(slots):
            block = merge(lambda expert, layer=layer: np.asarray(tier.block((layer, expert))), grouping, group)
            blocks.append((block, int(slot)))
        groups[layer] = slots[grouping.of]
    return Merged(groups, blocks)


def _installed(runtime: Runtime, memory: ExpertMemory, found: Merged) -> ExpertMemory:
    """With the blocks in their slots, over the link."""
    pool, store = memory.pool, _store(runtime)
    assert pool is not None
    for block, slot in found.blocks:
        pool = store.put(pool, block, slot)
    memory = memory._replace(pool=pool, groups=found.groups)
    return wait_for_copies(runtime, memory, np.array([slot for _, slot in found.blocks]))


def _store(runtime: Runtime) -> ExpertStore:
    store = runtime.experts.store
    assert isinstance(store, ExpertStore)  # it is built for one device
    return store


def _slots(runtime: Runtime) -> np.ndarray:
    """[L, K], those of merged experts."""
    slots = runtime.experts.merged_slots
    assert slots is not None
    return slots


DRAFT = MergedExecutor()
