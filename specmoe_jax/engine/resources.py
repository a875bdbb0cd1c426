"""What an engine keeps from one job to the next: the pool with its account, the runtime, and the learnt draft lengths."""

import dataclasses
import logging
from typing import Any, NamedTuple

import jax
import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.drafts.executors import executor_of
from specmoe_jax.engine.drafts.protocol import DraftInputs
from specmoe_jax.engine.requests.prepare import BatchShape, accelerator_is_cpu, job_account, smallest_job
from specmoe_jax.engine.requests.status import EMPTY
from specmoe_jax.engine.runtime import Runtime, build, new_cache
from specmoe_jax.engine.state import ExpertMemory, State
from specmoe_jax.kv_cache.rows import rows_of_device
from specmoe_jax.models.model import Model
from specmoe_jax.planner.memory.memory_account import PROGRAM_BYTES, MemoryAccount
from specmoe_jax.speculate.adaptive_length import AdaptiveLength, make_adaptive_length
from specmoe_jax.speculate.drafts.protocol import FeatureDraft
from specmoe_jax.speculate.hot_experts.policies import DraftSetPolicy
from specmoe_jax.speculate.sampling import sampling_rows
from specmoe_jax.support.errors import BudgetError
from specmoe_jax.support.host_memory import available_bytes
from specmoe_jax.support.tracing import Span
from specmoe_jax.support.units import size_text
from specmoe_jax.types import KVCache

_LOG = logging.getLogger(__name__)


class Job(NamedTuple):
    """The resources of one job for its whole run, independent of the engine's other jobs."""

    runtime: Runtime
    account: MemoryAccount


class EngineResources:
    """runtime and account are those of the job that was taken last, None before the first.

    Any number of jobs may run at a time: each keeps the runtime that it was taken with, and one pool waits for the next job that
    it is large enough for; other jobs get pools of their own. A budget is that of one job.
    Raises PlanError at construction where not even the smallest job fits. Arguments: those of Engine, which has checked them.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        inputs: DraftInputs,
        *,
        draft_set: DraftSetPolicy | None,
        progress: str | bool,
        spans: list[Span] | None,
        routing: str | None,
        popularity: np.ndarray | None,
    ):
        self._model, self._plan, self._draft_set = model, plan, draft_set
        self._progress, self._spans, self._routing, self._popularity = progress, spans, routing, popularity
        self._shared: Runtime | None = None  # of all jobs until one needs more; a job's own differs in its draft alone
        _LOG.info("plan: %s", plan)
        self.runtime: Runtime | None = None
        self.account: MemoryAccount | None = None
        self._memory: ExpertMemory | None = None
        self._peak_bytes: int | None = None
        self.device_rows: tuple[int, int] | None = None  # rows of the last cache on several devices: of each, and all
        self._adaptive_lengths: dict[tuple[int, int], AdaptiveLength | None] = {}  # by rows and positions
        self._executor = executor_of(plan)
        self._draft_account = self._executor.memory(model, plan, inputs)
        # The smallest job must fit, so that a plan that never can is refused before anything is loaded.
        self._needed(smallest_job(model.config, plan))
        self._draft = self._executor.make(model, plan, inputs)

    def take(self, batch_shape: BatchShape) -> Job:
        """For a job of these shapes; a larger one may need a larger pool."""
        needed = self._needed(batch_shape)
        shared, account = self._shared, self.account
        if shared is None or account is None or not _holds(shared, account, needed) or self._too_big(account, needed):
            self._memory = None
            _check_room(self._plan, needed, held=None if shared is None else account)
            how = {"draft_set": self._draft_set, "earlier": self._shared, "progress": self._progress, "spans": self._spans}
            self._shared = shared = build(
                self._model, self._plan, needed, self._draft, routing=self._routing, popularity=self._popularity, **how
            )
            self.account = account = needed
        draft = self._executor.for_job(self._draft, shared, needed)
        self.runtime = runtime = shared if draft is self._draft else dataclasses.replace(shared, draft=draft)
        # Pages and activations are of this job; the pool and the disk tier's cache are those of the runtime.
        self.account = account = needed._replace(num_slots=account.num_slots, host_experts=account.host_experts)
        self._peak_bytes = max(self._peak_bytes or 0, account.accelerator_bytes)
        return Job(runtime, account)

    def expert_memory(self, job: Job) -> ExpertMemory:
        """The pool that an earlier job on the same runtime left, or a new one."""
        memory, self._memory = self._memory, None
        return job.runtime.flow.first_memory(job.runtime) if memory is None else memory

    def _needed(self, batch_shape: BatchShape) -> MemoryAccount:
        return job_account(self._model.config, self._plan, batch_shape, self._draft_account)

    def _too_big(self, held: MemoryAccount, needed: MemoryAccount) -> bool:
        """Whether the pool or the disk cache of an earlier, smaller batch would break a budget beside this one's KV cache."""
        budget = self._plan.device_memory_bytes
        return (budget is not None and needed.num_slots < held.num_slots) or needed.host_experts < held.host_experts

    def new_adaptive_length(self, batch_shape: BatchShape) -> AdaptiveLength | None:
        """With the estimates of an earlier batch of these rows and positions, so that the first trials are paid for once."""
        if not self._plan.guard:
            return None
        assert self._plan.draft_length is not None  # a guard is of a draft
        return self._adaptive_lengths.get(batch_shape[:2]) or make_adaptive_length(self._plan.draft_length)

    def new_cache(self, batch_shape: BatchShape) -> KVCache:
        assert self.runtime is not None  # a job has been taken
        place, replayed = self.runtime.cache_tier.place(self.runtime), self._plan.tokens_per_pass - 1
        shape = (batch_shape.rows, batch_shape.positions)
        states, several = self.runtime.context.place, self._plan.devices > 1 and not self._plan.cache_tier.on_host
        self.device_rows = (rows_of_device(batch_shape.rows, self._plan.devices), batch_shape.rows) if several else None
        return new_cache(self._model.config, *shape, self._plan.dtype, place, replayed=replayed, states=states)

    def put_back(self, state: State, batch_shape: BatchShape) -> None:
        """The adaptive length of a job that has ended, and its pool."""
        self._adaptive_lengths[batch_shape[:2]] = state.adaptive_length
        self.keep(state.runtime, state.memory)

    def keep(self, runtime: Runtime, memory: ExpertMemory) -> None:
        """For the next job, where it can take it: the pool of an earlier runtime has other slots."""
        if self._shared is not None and runtime.experts.store is self._shared.experts.store:
            self._memory = memory

    def peak_accelerator_bytes(self) -> int | None:
        """The device's own figure, or (on CPU, which has none) the account of what the engine allocated."""
        measured = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return measured or self._peak_bytes


def _holds(shared: Runtime, account: MemoryAccount, needed: MemoryAccount) -> bool:
    """Whether the pool of an earlier job is large enough.

    A pool of the same size may hold a small batch's dispatch at once and a larger one's only in waves, or keep fewer slots free of
    what is prefetched.
    """
    slots = shared.experts.slots
    if needed.num_slots > account.num_slots or needed.dispatch_slots > slots.dispatch:
        return False
    return slots.single_wave == (needed.num_slots >= needed.wanted_slots)


def empty_state(resources: EngineResources, runtime: Runtime, batch_shape: BatchShape, kv: Any, memory: ExpertMemory) -> State:
    """With no request in its rows."""
    nothing: tuple[tuple, ...] = ((),) * batch_shape.rows
    return State(
        requests=(None,) * batch_shape.rows,
        kv=kv,
        memory=memory,
        lengths=np.zeros(batch_shape.rows, np.int32),
        last_token=np.zeros(batch_shape.rows, np.int32),
        generated=nothing,
        statuses=(EMPTY,) * batch_shape.rows,
        rows=sampling_rows([SamplingParams()] * batch_shape.rows),
        adaptive_length=resources.new_adaptive_length(batch_shape),
        row_stops=runtime.plan.stopping and runtime.plan.stopping.begin(batch_shape.rows, runtime.plan.draft_length),
        draft_memory=new_draft_memory(runtime, batch_shape),
        runtime=runtime,
        options=batch_shape.options,
        logprobs=nothing,
        prompt_logprobs=nothing,
        routing=nothing,
    )


def _check_room(plan: Plan, needed: MemoryAccount, *, held: MemoryAccount | None) -> None:
    """Raises BudgetError where the CPU is the accelerator and a job would take more memory than there is, before it takes any.

    Loaded weights, and experts that the host holds, are there already; what the job before it `held` is given back.
    """
    available = available_bytes() if accelerator_is_cpu() else None
    if available is None:
        return

    def beside(own: MemoryAccount) -> int:
        loaded = own.host_expert_bytes if plan.expert_tier == "host" else 0
        return int(plan.devices // plan.num_processes * own.accelerator_bytes - own.weight_bytes + own.host_bytes - loaded)

    more = beside(needed) + PROGRAM_BYTES if held is None else beside(needed) - beside(held)
    if more > available:
        raise BudgetError(
            f"the job takes {size_text(more)} beside the loaded model, but {size_text(available)} of memory are free,"
            f" {size_text(more - available)} short; give a smaller batch, fewer resident experts, or expert_flow=host_compute"
        )


def new_draft_memory(runtime: Runtime, batch_shape: BatchShape) -> Any:
    """What a FeatureDraft observes into; None for others, which make their own."""
    if not isinstance(runtime.draft, FeatureDraft):
        return None
    return runtime.draft.new_memory(batch_shape.rows, batch_shape.positions)
