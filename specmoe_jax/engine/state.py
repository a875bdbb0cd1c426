"""The state of a generation between two steps, and the diagnostics of a step."""

import concurrent.futures
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.requests.grammars import Grammar
from specmoe_jax.engine.requests.status import Phase, Status
from specmoe_jax.kv_cache.page_table import Pages
from specmoe_jax.offload.residency import Residency
from specmoe_jax.offload.retained_experts import RetainedExperts
from specmoe_jax.offload.store import Arriving
from specmoe_jax.offload.tiers import TierCounts
from specmoe_jax.ops import PackedCache
from specmoe_jax.speculate.adaptive_length import AdaptiveLength
from specmoe_jax.speculate.logit_edits import EditKinds
from specmoe_jax.types import KVCache, Pool, RecurrentState, SamplingRows, TokenLogprob


class Request(NamedTuple):
    """One prompt with its parameters. limit: new tokens it may get (max_new_tokens, or what the window leaves).

    token_ids: what the decoder begins with. source: what the encoder reads, empty without one. stop_ids: stop strings of
    params that are special tokens, which no text shows. sampling_id: what the keys of its draws know it by, None for `id`.
    grammar: what the answer must be, None for anything.
    """

    id: int
    prompt: str | None
    token_ids: tuple[int, ...]
    params: SamplingParams
    limit: int
    source: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    sampling_id: int | None = None
    grammar: Grammar | None = None

    @property
    def key_id(self) -> int:
        return self.id if self.sampling_id is None else self.sampling_id


class JobOptions(NamedTuple):
    """What any request of a job asks for beside its tokens, so that one program serves all steps of the job.

    logprobs, prompt_logprobs: k, None where nobody asks. edits: of logits.
    """

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    edits: EditKinds | None = None


class PoolSlots(NamedTuple):
    """The purpose of a pool's slots. total: R, of all devices and with those of merged blocks. dispatch: those of each that a layer
    can count on.

    single_wave: whether every dispatch of the batch that the pool was made for fits into them at once.
    """

    total: int
    dispatch: int
    single_wave: bool


class ExpertMemory(NamedTuple):
    """Where the experts are, and the usage scores that choose the next draft set.

    slots: what the pool was made for; it is the state's, because an engine may meanwhile serve a batch of another size.
    pool: [R, 3, F, M] slots on the accelerator, or those of several; donated by every copy. residency: what is in them.
    usage_scores: [L, E], the memory of the draft-set policy. prefetched: [L, E] bool, resident by prefetch; an encoder's layers are
    in it and in the residency, not in the usage scores. retained_experts: what free slots still hold, None where the plan does not
    retain it. groups: [L, E] int32, the slot of the merged block that stands for each expert under draft=merged, else None.
    merging: what re-merges them (engine/drafts/merged.py), else None.
    buffers: under expert_flow=stream, which has no pool, else None. resting: whether adaptive drafting pauses in this step.
    arriving: what of the residency is still on its way to the pool; `ExpertStore.finish_copies` comes before any read of its slots.
    """

    slots: PoolSlots
    pool: Pool | None
    residency: Residency
    usage_scores: np.ndarray
    prefetched: np.ndarray
    retained_experts: RetainedExperts | None = None
    groups: np.ndarray | None = None
    merging: Any = None
    buffers: "Buffers | None" = None
    resting: bool = False
    arriving: tuple[Arriving, ...] = ()


class HostKV(NamedTuple):
    """The KV cache of a streamed plan, paged in host memory: one cache of pages per layer, and which pages are whose.

    A recurrent layer has the states of all rows instead, on the accelerator.

    chunk: positions of a prompt that one micro-batch of a pass takes in. staged: S of the rows in which prompts attend on the
    accelerator.
    """

    caches: tuple[PackedCache | RecurrentState, ...]
    pages: Pages
    chunk: int
    staged: int


class Buffers(NamedTuple):
    """The layers of experts [E, 3, F, M] of a streamed plan on the accelerator, between two passes.

    spare: free once `readers` are computed; None where every layer is pinned. coming: give the other buffers, when the first
    streamed layers have arrived in them. pinned: the spare-expert cache, one for each of
    `ExpertPlaces.pinned_layers`; never written.
    """

    spare: Pool | None
    readers: tuple[jax.Array, ...]
    coming: tuple[concurrent.futures.Future, ...]
    pinned: tuple[Pool, ...] = ()


class PassRouting(NamedTuple):
    """What the routers decided. ids: [L, B, T, A] int32, -1 for padding. weights: float32, None where they are not told.

    Of a row's committed positions: ids [tokens, L, A] uint8, or uint16 where there are more experts.
    """

    ids: np.ndarray
    weights: np.ndarray | None = None


Cache = TypeVar("Cache", bound=KVCache | HostKV)


class State(NamedTuple, Generic[Cache]):
    """All that the next step needs. Arrays on the accelerator are donated: a state is used once.

    requests: B, the rows of the batch; None pads the batch to its compiled size. lengths: [B] int32, committed
    rows in the cache. last_token: [B] int32, committed but not yet in the cache. generated: per row, the new
    tokens so far. statuses: per row, where its request is.
    adaptive_length: chooses the draft length, None if it is fixed. options: of the job. logprobs, prompt_logprobs: per row, of the
    tokens in `generated` and of its prompt, where the row's request asks for them. routing:
    per row, of its committed positions in their order, where the runtime tells it.
    row_stops: what ends the rows' drafts (`Plan.draft_stop`), None where nothing does.
    draft_memory: what the draft keeps between steps. runtime: the engine.runtime.Runtime that it runs on; another job of the
    engine may meanwhile have another one.
    """

    requests: tuple[Request | None, ...]
    kv: Cache
    memory: ExpertMemory
    lengths: np.ndarray
    last_token: np.ndarray
    generated: tuple[tuple[int, ...], ...]
    statuses: tuple[Status, ...]
    rows: SamplingRows
    adaptive_length: AdaptiveLength | None
    row_stops: Any = None
    draft_memory: Any = None
    runtime: Any = None
    options: JobOptions = JobOptions()
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    routing: tuple[tuple[PassRouting, ...], ...] = ()

    @property
    def active(self) -> np.ndarray:
        """[B] bool, rows that still generate."""
        return np.array([status.phase is Phase.DECODING for status in self.statuses])

    @property
    def joining(self) -> np.ndarray:
        """[B] bool, rows whose prompt the next pass takes in (expert_flow=stream)."""
        return np.array([status.phase is Phase.PREFILLING for status in self.statuses])

    @property
    def done(self) -> bool:
        return not (self.active | self.joining).any()


class PassInfo(NamedTuple):
    """What one pass of the target through all layers did.

    hits, misses: needed experts resident or not, over all layers. fetched: experts copied. on_host: misses that the host's cores
    computed instead. waves: rounds.
    prefetched: experts copied speculatively while drafting and in the pass; prefetch_hits: those that were needed.
    routing: [L, B, T, A] int32 ids, -1 for padding; None under the resident and the streamed flow, which ask no router unless
    Engine(routing=...) does. routing_weights: [L, B, T, A] float32, where it asks for them.
    """

    hits: int
    misses: int
    fetched: int
    waves: int
    prefetched: int
    prefetch_hits: int
    routing: np.ndarray | None
    routing_weights: np.ndarray | None = None
    on_host: int = 0


class StepInfo(NamedTuple):
    """Diagnostics of one step; nothing here is needed by the next.

    accepted: [B], drafted tokens accepted (0 for finished rows). committed: [B], tokens the row got.
    active: [B] bool at the start of the step. start: [B], tokens that the row had generated before it. context: positions in
    the caches of all active rows. drafted: tokens of a chain, the depth of a tree. positions: verified of each active row, the last
    token and everything drafted. draft_moves: rows whose draft cache changed sides before the step; draft_on_cpu: active rows whose
    draft attended on the CPU (a draft cache that is split, speculate/drafts/draft_split.py).
    row_lengths: [B], drafted tokens that were verified of each row, None where those of all rows were.
    link_bytes: expert bytes sent for over the link in this step (a streamed layer may cross it a little later); device_link_bytes:
    [n], over the link of each device; draft_link_bytes: those sent for while drafting (prefetches); merge_bytes: those of a draft's
    merged experts.
    prefetch_bytes, prefetch_wasted_bytes: those sent speculatively, and the unused ones among them.
    predicted: [L, E] int64, how often the draft's gates chose each expert, where anything looks at it (`Plan.foresees`).
    below: what the tier below the link did in this step.
    activation_bytes: queries, keys, values and attention outputs between accelerator and host (kv_tier=host).
    draft_s: seconds of proposing tokens; features_s: of showing the draft the target's hidden states of what was committed.
    """

    accepted: np.ndarray
    committed: np.ndarray
    active: np.ndarray
    start: np.ndarray
    context: int
    drafted: int
    positions: int
    row_lengths: np.ndarray | None
    draft_moves: int
    draft_on_cpu: int
    verify: PassInfo
    link_bytes: int
    device_link_bytes: np.ndarray
    draft_link_bytes: int
    merge_bytes: int
    prefetch_bytes: int
    prefetch_wasted_bytes: int
    activation_bytes: int
    predicted: np.ndarray
    below: TierCounts
    draft_s: float
    features_s: float
    verify_s: float
    commit_s: float

    @property
    def drafting_s(self) -> float:
        """Seconds that the draft took: to propose, and to take in the target's features."""
        return self.draft_s + self.features_s

    @property
    def step_s(self) -> float:
        return self.drafting_s + self.verify_s + self.commit_s
