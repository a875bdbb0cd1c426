"""The merged draft: the target's own pass over merged experts in slots of their own."""

import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.drafts.protocol import DraftExecutor, DraftInputs
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.models.model import Model
from specmoe_jax.offload.store import ExpertStore
from specmoe_jax.speculate.drafts.merged import group_experts, merge
from specmoe_jax.speculate.drafts.self_draft import SelfDraft
from specmoe_jax.speculate.hot_experts.affinity_cache import affinity_table
from specmoe_jax.speculate.hot_experts.substitution import DraftSlots


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
        if memory.groups is not None:
            return memory
        groups, pool, neighbours = np.zeros(counts.shape, np.int32), memory.pool, runtime.policies.neighbours
        store = runtime.experts.store
        assert isinstance(store, ExpertStore)  # it is built for one device
        assert pool is not None and neighbours is not None and runtime.experts.merged_slots is not None
        for layer, slots in enumerate(runtime.experts.merged_slots):
            grouping = group_experts(counts[layer], neighbours[layer], len(slots))
            for group, slot in enumerate(slots):
                block = merge(lambda expert, layer=layer: np.asarray(store.tier.block((layer, expert))), grouping, group)
                pool = store.put(pool, block, int(slot))
            groups[layer] = slots[grouping.of]
        return memory._replace(pool=pool, groups=groups)


DRAFT = MergedExecutor()
