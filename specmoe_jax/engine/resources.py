"""What an engine keeps from one batch to the next: the pool with its account, the runtime, and what the guards learned."""

import dataclasses
from typing import Any, NamedTuple

import jax

from specmoe_jax.config.plan import Plan
from specmoe_jax.engine.drafts.draft_model import make_model_draft
from specmoe_jax.engine.drafts.split_draft import SplitDraft
from specmoe_jax.engine.requests.prepare import BatchShape, accelerator_is_cpu
from specmoe_jax.engine.runtime import Runtime, build, first_memory, new_cache
from specmoe_jax.engine.state import ExpertMemory, State
from specmoe_jax.engine.validation import draft_needs
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.offload.tiers import TierCounts
from specmoe_jax.planner.memory.account import cache_positions
from specmoe_jax.planner.memory.fit import accounted
from specmoe_jax.planner.memory.memory_account import MemoryAccount, PagedLoad
from specmoe_jax.speculate.adaptive_length import AdaptiveLength, make_adaptive_length
from specmoe_jax.speculate.drafts.eagle import EagleDraft, tree_shape
from specmoe_jax.speculate.drafts.protocol import Draft, FeatureDraft
from specmoe_jax.speculate.hot_experts.policies import DraftSetPolicy
from specmoe_jax.support.tracing import Span
from specmoe_jax.types import KVCache


class Moved(NamedTuple):
    """Expert bytes sent for over the link, and what the tier below it did, since the engine was made."""

    link_bytes: int
    below: TierCounts


class EngineResources:
    """runtime and account are None until the first batch takes its memory; the account is of the batch that took it last.

    Raises PlanError at construction where not even the smallest job fits. Arguments: those of Engine, which has checked them.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        *,
        draft: Draft | None,
        draft_model: Model | None,
        draft_head: EagleHead | None,
        draft_set: DraftSetPolicy | None,
        progress: str | bool,
        spans: list[Span] | None,
    ):
        self._model, self._plan = model, plan
        self._given_draft, self._draft_head, self._draft_set = draft, draft_head, draft_set
        self._progress, self._spans = progress, spans
        self.runtime: Runtime | None = None
        self.account: MemoryAccount | None = None
        self._memory = self._peak_bytes = None
        self._moved_earlier = Moved(0, TierCounts())
        self._adaptive_lengths: dict[tuple[int, int], AdaptiveLength | None] = {}  # by rows and positions
        self._draft_needs = draft_needs(plan, draft_model, draft_head)
        # The smallest job must fit, so that a plan that never can is refused before anything is loaded.
        self._needed(rows=1, positions=cache_positions(2, plan))
        if draft_model is not None:
            self._given_draft = make_model_draft(model, draft_model, plan)

    def take(self, batch_shape: BatchShape) -> ExpertMemory:
        """The pool left by the batch before, or a new one; a larger batch may need a larger pool."""
        needed = self._needed(
            rows=batch_shape.rows, positions=batch_shape.positions, source=batch_shape.source, paged=batch_shape.paged
        )
        fits = self.account is not None and needed.num_slots <= self.account.num_slots
        # A pool of the same size may hold a small batch's dispatch at once and a larger one's only in waves, or keep fewer slots
        # free of what is prefetched.
        fits = fits and self.runtime.slots.single_wave == (needed.num_slots >= needed.wanted_slots)
        fits = fits and needed.dispatch_slots <= self.runtime.slots.dispatch
        if not fits or self._too_big(needed):
            self._memory, self._moved_earlier = None, self.moved()
            how = {"draft_set": self._draft_set, "earlier": self.runtime, "progress": self._progress, "spans": self._spans}
            self.runtime = build(self._model, self._plan, needed, self._given_draft, **how)
            self.account = needed
        if self._draft_head is not None:
            self.runtime = dataclasses.replace(self.runtime, draft=self._eagle(needed))
        # Pages and activations are of this job; the pool and the disk tier's cache are those of the runtime.
        self.account = needed._replace(num_slots=self.account.num_slots, host_experts=self.account.host_experts)
        self._peak_bytes = max(self._peak_bytes or 0, self.account.accelerator_bytes)
        memory, self._memory = self._memory, None
        return first_memory(self.runtime) if memory is None else memory

    def _needed(self, *, rows: int, positions: int, source: int = 0, paged: PagedLoad | None = None) -> MemoryAccount:
        return accounted(
            self._model.config,
            self._plan,
            batch_rows=rows,
            positions=positions,
            source_positions=source,
            draft=self._draft_needs,
            paged=paged,
            accelerator_is_cpu=accelerator_is_cpu(),
        )

    def _eagle(self, needed: MemoryAccount) -> FeatureDraft:
        """With its cache where the account has room for it."""
        head, tree = self._draft_head, tree_shape(self._plan)
        if not needed.draft_pages:
            return EagleDraft(head, tree)
        runtime = dataclasses.replace(self.runtime, draft=None)  # else every job's draft would hold that of the job before
        return SplitDraft(head=head, tree=tree, runtime=runtime, pages=needed.draft_pages, host_pages=needed.kv_pages)

    def _too_big(self, needed: MemoryAccount) -> bool:
        """Whether the pool or the disk cache of an earlier, smaller batch would break a budget beside this one's KV cache."""
        budget, held = self._plan.device_memory_bytes, self.account
        return (budget is not None and needed.num_slots < held.num_slots) or needed.host_experts < held.host_experts

    def new_adaptive_length(self, batch_shape: BatchShape) -> AdaptiveLength | None:
        """With what an earlier batch of these rows and positions taught it: the first steps are paid once."""
        if not self._plan.guard:
            return None
        return self._adaptive_lengths.get(batch_shape[:2]) or make_adaptive_length(self._plan.draft_length)

    def new_draft_memory(self, batch_shape: BatchShape) -> Any:
        """What a FeatureDraft observes into; None for others, which make their own."""
        watches = isinstance(self.runtime.draft, FeatureDraft)
        return self.runtime.draft.new_memory(batch_shape.rows, batch_shape.positions) if watches else None

    def new_cache(self, batch_shape: BatchShape) -> KVCache:
        device = self.runtime.host if self._plan.kv_tier == "host" else self.runtime.device
        return new_cache(self._model.config, batch_shape.rows, batch_shape.positions, self._plan.dtype, device)

    def put_back(self, state: State, batch_shape: BatchShape) -> None:
        """The pool and the adaptive length of a batch that has ended, for the next."""
        self._memory, self._adaptive_lengths[batch_shape[:2]] = state.memory, state.adaptive_length

    def moved(self) -> Moved:
        """By all stores, one of which was taken for each new runtime."""
        if self.runtime is None:
            return Moved(0, TierCounts())
        store, earlier = self.runtime.store, self._moved_earlier
        return Moved(store.link.sent_bytes + earlier.link_bytes, store.tier.counts.plus(earlier.below))

    def peak_accelerator_bytes(self) -> int | None:
        """The device's own figure, or (on CPU, which has none) the account of what the engine allocated."""
        measured = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return measured or self._peak_bytes
