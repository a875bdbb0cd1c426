"""The engine: turns prompts into completions, batch by batch. The imperative shell around `step`."""

import dataclasses
import itertools
import resource
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from specmoe_jax import metrics
from specmoe_jax.checkpoints.disk import DiskExperts
from specmoe_jax.config import Plan
from specmoe_jax.engine.draft_model import make_model_draft, resident_plan
from specmoe_jax.engine.encode import encode
from specmoe_jax.engine.finish import final_text
from specmoe_jax.engine.floor import floor_figures, predicted_figures
from specmoe_jax.engine.prefill import prefill
from specmoe_jax.engine.refill import fill
from specmoe_jax.engine.requests import Shapes, make_requests, settled, shapes_of
from specmoe_jax.engine.runtime import build, first_memory, new_cache, new_host_kv
from specmoe_jax.engine.split_draft import SplitDraft
from specmoe_jax.engine.state import Request, State, StepInfo
from specmoe_jax.engine.step import step, warm_up
from specmoe_jax.errors import PlanError
from specmoe_jax.models.eagle import EagleHead, check_head, head_bytes, position_bytes
from specmoe_jax.models.model import Model
from specmoe_jax.offload.pages import no_pages
from specmoe_jax.planner.drafts import model_memory
from specmoe_jax.planner.estimate import Prediction
from specmoe_jax.planner.fit import accounted
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.planner.memory import DraftMemory, MemoryAccount, PagedLoad, cache_positions
from specmoe_jax.progress import bar
from specmoe_jax.sampling_params import SamplingParams
from specmoe_jax.speculate.draft import Draft, FeatureDraft
from specmoe_jax.speculate.eagle import EagleDraft, tree_shape
from specmoe_jax.speculate.guard import Guard, make_guard
from specmoe_jax.speculate.sampling import sampling_rows
from specmoe_jax.tracing import Span, span
from specmoe_jax.types import KVCache


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished request.

    finish_reason: "stop" (end of sequence or a stop string), "length", or "error", whose reason is in `error`; what was
    generated before is kept.
    """

    id: int
    prompt: str | None
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int
    error: str | None = None


_NOT_FINITE = (
    "prompt {}: the logits of new token {} hold NaN or Inf; check the weights (load_model refuses such ones by default) "
    "or compute in --dtype=float32"
)


class TokenEvent(NamedTuple):
    """Tokens that one request got in one step; completion is set with its last ones.

    elapsed_s: seconds since the prefill of the request's batch began.
    """

    id: int
    token_ids: tuple[int, ...]
    completion: Completion | None
    elapsed_s: float


class Engine:
    """Generates with a model under a plan. Raises PlanError at construction for a plan that cannot run.

    draft: an own implementation of speculate.Draft, for plans with draft="custom".
    draft_model: a smaller model of the same vocabulary, for plans with draft="model".
    draft_head: an EAGLE head of this model (checkpoints.load_head), for plans with draft="eagle".
    progress: bars of affinity, compilation and prefill; a mode of progress.bar.
    spans: a list that gets the time of every task of a streamed plan (tracing.write_lanes); costs a little of the overlap.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        *,
        draft: Draft | None = None,
        draft_model: Model | None = None,
        draft_head: EagleHead | None = None,
        progress: str | bool = False,
        spans: list[Span] | None = None,
    ):
        self.model, self.plan = model, settled(plan.validate(model.config))
        if (plan.draft == "custom") != (draft is not None):
            raise PlanError(f"draft={plan.draft} and a draft object {'' if draft else 'not '}given; custom needs one")
        if spans is not None and plan.expert_flow != "stream":
            raise PlanError(f"spans have no effect with expert_flow={plan.expert_flow}, which has no lanes; leave them out")
        if plan.dtype != model.dtype:
            raise PlanError(f"the plan says dtype={plan.dtype}, the model was loaded as {model.dtype}; make them agree")
        if plan.expert_dtype != model.config.experts.packing:
            raise PlanError(
                f"the plan says expert_dtype={plan.expert_dtype}, the model's experts are packed as {model.config.experts.packing};"
                " make them agree (models.quantised.quantise)"
            )
        tier = "disk" if isinstance(model.experts, DiskExperts) else "host"
        if plan.expert_tier != tier:
            raise PlanError(f"the plan says expert_tier={plan.expert_tier}, the model was loaded with {tier}; make them agree")
        if (plan.draft == "model") != (draft_model is not None):
            raise PlanError(
                f"draft={plan.draft} and {'a' if draft_model else 'no'} draft model given; "
                "--draft=model and --draft_model=DIR go together"
            )
        if (plan.draft == "eagle") != (draft_head is not None):
            raise PlanError(
                f"draft={plan.draft} and {'a' if draft_head else 'no'} draft head given; "
                "--draft=eagle and --draft_head=DIR go together"
            )
        self._spans = spans
        self._given_draft, self._draft_model, self._progress = draft, draft_model, progress
        self._draft_head = draft_head
        if draft_head is not None:
            check_head(model, draft_head)
        self._rt = self._memory = self._account = self._accounted_peak_bytes = None
        self._guards: dict[tuple[int, int], Guard | None] = {}  # by rows and positions
        self._compiles = metrics.CompileCounter()
        self._warm_shapes, self._recompiled, self._warm_up_s = set(), 0, 0.0
        self._totals, self._prefill_s, self._on_demand_bytes = metrics.Totals(), 0.0, 0
        self._prefill_link_bytes = self._prefill_disk_bytes = 0
        self._draft_needs = _draft_needs(plan, draft_model, draft_head)
        # The smallest job must fit, so that a plan that never can is refused before anything is loaded.
        self._needed(rows=1, positions=cache_positions(2, plan))
        if draft_model is not None:
            self._given_draft = make_model_draft(model, draft_model, plan)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> list[Completion]:
        """Completions in the order of the prompts (texts or token ids). Raises RequestError before anything runs."""
        events = self.stream(prompts, params, on_step=on_step)
        done = {event.id: event.completion for event in events if event.completion is not None}
        return [done[request_id] for request_id in sorted(done)]

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        ids: Sequence[int] | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> Iterator[TokenEvent]:
        """Tokens as they are committed, batches of at most `plan.batch_size` requests one after the other.

        Under expert_flow=stream there is one batch, in which the next request takes the place of one that ended.

        ids: what events and sampling keys know the requests by; None for 0, 1, 2, ... Raises RequestError at the
        call, not when the first token is asked for.
        """
        requests = make_requests(self.model, prompts, params, ids)
        shapes = shapes_of(self.plan, requests)
        if self.plan.expert_flow == "stream":
            return self._run_queue(requests, shapes, on_step)
        starts = range(0, len(requests), shapes.rows)
        batches = (self._run_batch(requests[start : start + shapes.rows], shapes, on_step) for start in starts)
        return itertools.chain.from_iterable(batches)

    def init(self, prompts, params=None) -> State:
        """The functional face: the state after the prefill of one batch of at most `plan.batch_size` prompts."""
        requests = make_requests(self.model, prompts, params)
        if len(requests) > self.plan.batch_size:
            raise PlanError(f"{len(requests)} prompts and batch_size {self.plan.batch_size}; init takes one batch")
        shapes = shapes_of(self.plan, requests)
        if self.plan.expert_flow != "stream":
            return self._init(requests, shapes)
        state, waiting = fill(self._init_queue(requests, shapes), requests, self.plan.overshoot)
        if waiting:
            raise PlanError(f"{len(waiting)} of {len(requests)} prompts find no room in the KV cache; give more host memory")
        return self.step(state)[0]

    def step(self, state: State) -> tuple[State, StepInfo]:
        """Every active row gets 1 to N + 1 tokens. The state is consumed: its buffers are donated."""
        return step(self._rt, state, self.model.tokenizer)

    def stats(self, hardware: Hardware | None = None, prediction: Prediction | None = None) -> dict:
        """The figures of interface.md over everything generated so far.

        hardware: this machine as probed, for the floor; without it that of an emulated link alone is told. prediction: of
        this plan, to stand beside what was measured.
        """
        figures = metrics.figures(
            self._totals,
            self.plan,
            on_demand_bytes=self._on_demand_bytes if self.plan.expert_flow == "on_demand" else None,
            link_bytes_per_s=self.plan.link_bytes_per_s,
            model_stamps=self.model.synthetic,
        )
        if hardware is not None and self.model.config.encoder is None:
            figures |= floor_figures(self.model.config, self.plan, self._totals, hardware)
        if prediction is not None:
            figures |= predicted_figures(prediction, self._totals)
        return figures | {
            "prefill_s": self._prefill_s,
            "warm_up_s": self._warm_up_s,
            "prefill_link_bytes": self._prefill_link_bytes,
            "prefill_disk_bytes": self._prefill_disk_bytes,
            "compile_s": self._compiles.seconds,
            "compilations_after_warmup": self._recompiled,
            "peak_accelerator_bytes": self._peak_accelerator_bytes(),
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "plan": dataclasses.asdict(self.plan),
        }

    def _run_batch(self, requests: list[Request], shapes: Shapes, on_step) -> Iterator[TokenEvent]:
        watch = metrics.Stopwatch()
        state = self._init(requests, shapes)
        counts_on_demand = self.plan.expert_flow == "on_demand"
        on_demand = metrics.no_on_demand(self.model.config.num_moe_layers, self.model.config.num_experts)
        while not state.done:
            compiled = self._compiles.count
            state, info = self.step(state)
            self._recompiled += self._compiles.count - compiled
            self._totals = metrics.add_step(self._totals, info)
            if counts_on_demand:
                on_demand = metrics.add_on_demand(on_demand, info)
            if on_step is not None:
                on_step(info)
            yield from self._events(state, info, dict.fromkeys((request.id for request in requests), watch))
        self._memory, self._guards[shapes[:2]] = state.memory, state.guard
        self._on_demand_bytes += on_demand.experts * self.model.expert_bytes

    def _run_queue(self, requests: list[Request], shapes: Shapes, on_step) -> Iterator[TokenEvent]:
        """A streamed job: rows are filled from the queue as they become free. Steps in which all rows join count as prefill."""
        state, waiting, watches = self._init_queue(requests, shapes), tuple(requests), {}
        while waiting or not state.done:
            state, waiting = fill(state, waiting, self.plan.overshoot)
            watches |= {state.requests[row].id: metrics.Stopwatch() for row in np.flatnonzero(state.joining)}
            compiled, watch, sent = self._compiles.count, metrics.Stopwatch(), self._moved_bytes()
            state, info = self.step(state)
            self._recompiled += self._compiles.count - compiled
            if not info.active.any():
                self._prefill_s += watch.seconds
                self._count_prefill(sent)
                continue
            self._totals = metrics.add_step(self._totals, info)
            if on_step is not None:
                on_step(info)
            yield from self._events(state, info, watches)
        self._memory, self._guards[shapes[:2]] = state.memory, state.guard

    def _init_queue(self, requests: list[Request], shapes: Shapes) -> State:
        """A compiled state with no request in its rows."""
        memory = self._take_memory(shapes)
        pages = no_pages(shapes.rows, shapes.positions, self._account.kv_pages)
        params = [request.params for request in requests]
        state = State(
            requests=(None,) * shapes.rows,
            kv=new_host_kv(self._rt, pages, shapes.chunk),
            memory=memory,
            lengths=np.zeros(shapes.rows, np.int32),
            last_token=np.zeros(shapes.rows, np.int32),
            generated=((),) * shapes.rows,
            finish_reasons=("padding",) * shapes.rows,
            rows=sampling_rows([SamplingParams()] * shapes.rows),
            guard=self._new_guard(shapes),
            draft_memory=self._new_draft_memory(shapes),
        )
        for kind in {p.temperature == 0: p for p in params}.values():  # greedy and sampled batches run different programs
            state = self._warm(state._replace(rows=sampling_rows([kind] * shapes.rows)), shapes)
        return state

    def _count_prefill(self, before: tuple[int, int]) -> None:
        link_bytes, disk_bytes = self._moved_bytes()
        self._prefill_link_bytes += link_bytes - before[0]
        self._prefill_disk_bytes += disk_bytes - before[1]

    def _events(self, state: State, info: StepInfo, watches: dict[int, metrics.Stopwatch]) -> Iterator[TokenEvent]:
        for row in np.flatnonzero(info.active):
            request, tokens, reason = state.requests[row], state.generated[row], state.finish_reasons[row]
            new = tokens[info.start[row] :]
            completion = None if reason is None else self._completion(request, tokens, reason)
            yield TokenEvent(id=request.id, token_ids=new, completion=completion, elapsed_s=watches[request.id].seconds)

    def _completion(self, request: Request, tokens: tuple[int, ...], reason: str) -> Completion:
        tokenizer, eos = self.model.tokenizer, self.model.config.eos_token_ids
        return Completion(
            id=request.id,
            prompt=request.prompt,
            text="" if tokenizer is None else final_text(tokens, request.params.stop, eos, tokenizer),
            token_ids=tokens,
            finish_reason=reason,
            num_prompt_tokens=len(request.source or request.token_ids),
            error=_NOT_FINITE.format(request.id, len(tokens)) if reason == "error" else None,
        )

    def _init(self, requests: list[Request], shapes: Shapes) -> State:
        watch = metrics.Stopwatch()
        runtime, before = self._rt, self._moved_bytes()
        memory = self._take_memory(shapes)
        before = before if runtime is self._rt else (0, 0)  # a new store counts from 0
        kv = self._new_cache(shapes)
        padding = shapes.rows - len(requests)
        rows: tuple[Request | None, ...] = (*requests, *[None] * padding)
        prompts = [request.token_ids if request else () for request in rows]
        if shapes.source:
            memory, cross = encode(self._rt, memory, [request.source if request else () for request in rows], shapes.source)
            kv = kv._replace(cross=cross)
        draft_memory = self._new_draft_memory(shapes)
        with bar("prefill", max(map(len, prompts)) - 1, "position", mode=self._progress, leave=False) as shown, span("prefill"):
            memory, kv, draft_memory, _ = prefill(self._rt, memory, kv, prompts, shapes.chunk, draft_memory, on_chunk=shown.update)
            jax.block_until_ready((kv, draft_memory))
        self._prefill_s += watch.seconds
        self._count_prefill(before)
        state = State(
            requests=rows,
            kv=kv,
            memory=memory,
            lengths=np.array([max(len(prompt) - 1, 0) for prompt in prompts], np.int32),
            last_token=np.array([prompt[-1] if prompt else 0 for prompt in prompts], np.int32),
            generated=((),) * len(rows),
            finish_reasons=tuple(None if request else "padding" for request in rows),
            rows=sampling_rows([request.params if request else SamplingParams() for request in rows]),
            guard=self._new_guard(shapes),
            draft_memory=draft_memory,
        )
        return self._warm(state, shapes)

    def _moved_bytes(self) -> tuple[int, int]:
        """Over the link and from disk, since the store was made."""
        return (0, 0) if self._rt is None else (self._rt.store.link.sent_bytes, self._rt.store.tier.counts.disk_bytes)

    def _warm(self, state: State, shapes: Shapes) -> State:
        """Compiles the steps of shapes that are new; sampled and greedy rows run different programs."""
        key = (shapes, state.rows.greedy)
        if key in self._warm_shapes:
            return state
        self._warm_shapes.add(key)
        watch = metrics.Stopwatch()
        with bar("compile", None, "step", mode=self._progress, leave=False) as shown:
            state = warm_up(self._rt, state, on_step=shown.update)
        self._warm_up_s += watch.seconds
        return state

    def _take_memory(self, shapes: Shapes):
        """The pool left by the batch before, or a new one; a larger batch may need a larger pool."""
        needed = self._needed(rows=shapes.rows, positions=shapes.positions, source=shapes.source, paged=shapes.paged)
        fits = self._account is not None and needed.num_slots <= self._account.num_slots
        # A pool of the same size may hold a small batch's dispatch at once and a larger one's only in waves.
        fits = fits and self._rt.slots.single_wave == (needed.num_slots >= needed.wanted_slots)
        if not fits or self._too_big(needed):
            self._memory = None
            how = {"earlier": self._rt, "progress": self._progress, "spans": self._spans}
            self._rt = build(self.model, self.plan, needed, self._given_draft, **how)
            self._account = needed
        if self._draft_head is not None:
            self._rt = dataclasses.replace(self._rt, draft=self._eagle(needed))
        self._account = needed._replace(num_slots=self._account.num_slots)  # pages and activations are of this job
        self._accounted_peak_bytes = max(self._accounted_peak_bytes or 0, self._account.accelerator_bytes)
        memory, self._memory = self._memory, None
        return first_memory(self._rt) if memory is None else memory

    def _needed(self, *, rows: int, positions: int, source: int = 0, paged: PagedLoad | None = None) -> MemoryAccount:
        return accounted(
            self.model.config,
            self.plan,
            batch_rows=rows,
            positions=positions,
            source_positions=source,
            draft=self._draft_needs,
            paged=paged,
        )

    def _eagle(self, needed: MemoryAccount) -> FeatureDraft:
        """With its cache where the account has room for it."""
        head, tree = self._draft_head, tree_shape(self.plan)
        if not needed.draft_pages:
            return EagleDraft(head, tree)
        return SplitDraft(head=head, tree=tree, rt=self._rt, pages=needed.draft_pages, host_pages=needed.kv_pages)

    def _too_big(self, needed: MemoryAccount) -> bool:
        """Whether the pool of an earlier, smaller batch would break the budget beside this batch's cache."""
        budget = self.plan.device_memory_bytes
        return budget is not None and needed.num_slots < self._account.num_slots

    def _new_guard(self, shapes: Shapes) -> Guard | None:
        """With what an earlier batch of these rows and positions taught it: the first steps are paid once."""
        if not self.plan.guard:
            return None
        return self._guards.get(shapes[:2]) or make_guard(self.plan.draft_length)

    def _new_draft_memory(self, shapes: Shapes) -> Any:
        """What a FeatureDraft observes into; None for others, which make their own."""
        watches = isinstance(self._rt.draft, FeatureDraft)
        return self._rt.draft.new_memory(shapes.rows, shapes.positions) if watches else None

    def _new_cache(self, shapes: Shapes) -> KVCache:
        device = self._rt.host if self.plan.kv_tier == "host" else self._rt.device
        return new_cache(self.model.config, shapes.rows, shapes.positions, self.plan.dtype, device)

    def _peak_accelerator_bytes(self) -> int | None:
        """The device's own figure, or (on CPU, which has none) the account of what the engine allocated."""
        measured = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return measured or self._accounted_peak_bytes


def _draft_needs(plan: Plan, model: Model | None, head: EagleHead | None) -> DraftMemory:
    if head is not None:
        fixed, one = (head_bytes(head, batch_rows=rows, positions=0) for rows in (0, 1))
        return DraftMemory(fixed=fixed, row=one - fixed, position=position_bytes(head))
    return DraftMemory() if model is None else model_memory(model.config, resident_plan(model, plan))
