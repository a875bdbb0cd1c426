"""The merged draft: the target's own pass over merged experts in slots of their own."""

import concurrent.futures
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.drafts.protocol import DraftExecutor, DraftInputs
from specmoe_jax.engine.flows.migration import wait_for_copies
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.models.model import Model, to_host
from specmoe_jax.offload.tiers import Tier
from specmoe_jax.speculate.drafts.merged import group_experts, merge
from specmoe_jax.speculate.drafts.self_draft import SelfDraft
from specmoe_jax.speculate.hot_experts.affinity_cache import affinity_table
from specmoe_jax.speculate.hot_experts.substitution import DraftSlots
from specmoe_jax.support.processes import is_local


class Merging(NamedTuple):
    """counts: [L, E], choices since the last merge began. steps: since then. pending: the merge at work, None for none."""

    counts: np.ndarray
    steps: int = 0
    pending: concurrent.futures.Future | None = None


class Merged(NamedTuple):
    """groups: [L, E] int32, the slot of the block that stands for each expert. blocks: [3, F, M] each, in the order of the merged
    slots; None for one that another process holds."""

    groups: np.ndarray
    blocks: list[jax.Array | None]


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
    tier, own_slots = runtime.experts.store.tier, runtime.experts.slots.total // runtime.plan.devices
    assert neighbours is not None
    for layer, slots in enumerate(_slots(runtime)):
        grouping = group_experts(counts[layer], neighbours[layer], len(slots), most)
        for group, slot in enumerate(slots):
            device = runtime.context.devices[slot // own_slots]
            blocks.append(to_host(merge(_reader(tier, layer), grouping, group), device) if is_local(device) else None)
        groups[layer] = slots[grouping.of]
    return Merged(groups, blocks)


def _reader(tier: Tier, layer: int) -> Callable[[int], np.ndarray]:
    return lambda expert: np.asarray(tier.block((layer, expert)))


def _installed(runtime: Runtime, memory: ExpertMemory, found: Merged) -> ExpertMemory:
    """With the blocks in their slots, over the link."""
    assert memory.pool is not None
    slots = _slots(runtime).reshape(-1)
    pool, arriving = runtime.experts.store.put(memory.pool, found.blocks, slots.tolist(), memory.arriving)
    return wait_for_copies(runtime, memory._replace(pool=pool, arriving=arriving, groups=found.groups), slots)


def _slots(runtime: Runtime) -> np.ndarray:
    """[L, K], those of merged experts."""
    slots = runtime.experts.merged_slots
    assert slots is not None
    return slots


DRAFT = MergedExecutor()
