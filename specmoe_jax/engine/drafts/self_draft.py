"""The self-draft: the target's own pass over its resident experts, which stand in for those that are absent."""

import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.drafts.protocol import DraftExecutor, DraftInputs
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.state import ExpertMemory
from specmoe_jax.models.model import Model
from specmoe_jax.speculate.drafts.self_draft import SelfDraft
from specmoe_jax.speculate.hot_experts.affinity_cache import affinity_table
from specmoe_jax.speculate.hot_experts.substitution import DraftSlots, draft_slots, random_neighbours, reduced_slots


class SelfExecutor(DraftExecutor):
    def make(self, model: Model, plan: Plan, inputs: DraftInputs) -> SelfDraft:
        return SelfDraft()

    def neighbours(self, model: Model, plan: Plan, progress: str | bool) -> np.ndarray | None:
        """By affinity (SpecMoE) or at random; None where no other expert stands in."""
        if plan.substitution == "mask":
            return None
        if plan.substitution == "random":
            return random_neighbours(model.config.num_moe_layers, model.config.num_experts)
        return affinity_table(model, progress=progress)

    def slots(self, runtime: Runtime, memory: ExpertMemory) -> list[DraftSlots]:
        decoding = memory.residency.slot_of[: runtime.config.num_moe_layers]
        slots, top_k = draft_slots(decoding, runtime.policies.neighbours, runtime.plan), runtime.plan.draft_top_k
        if top_k is None or top_k >= runtime.config.experts_per_token:
            return list(slots)
        return reduced_slots(slots, decoding, top_k)


DRAFT = SelfExecutor()
