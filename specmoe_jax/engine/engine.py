"""The engine: turns prompts into completions, batch by batch. The imperative shell around `step`."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine import figures as metrics
from specmoe_jax.engine.drafts.protocol import DraftInputs
from specmoe_jax.engine.engine_figures import EngineFigures
from specmoe_jax.engine.flows.encode import encode
from specmoe_jax.engine.prefill import prefill
from specmoe_jax.engine.requests.completion import Completion, TokenEvent, step_events
from specmoe_jax.engine.requests.prepare import BatchShape, batch_shape_of, make_requests, resolved
from specmoe_jax.engine.resources import EngineResources, Moved, moved, new_draft_memory
from specmoe_jax.engine.runtime import new_host_kv
from specmoe_jax.engine.scheduler import admit
from specmoe_jax.engine.state import Request, State, StepInfo
from specmoe_jax.engine.step import step, warm_up
from specmoe_jax.engine.validation import validate_inputs
from specmoe_jax.kv_cache.page_table import no_pages
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.planner.estimate import Prediction
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.speculate.drafts.protocol import Draft
from specmoe_jax.speculate.hot_experts.policies import DraftSetPolicy
from specmoe_jax.speculate.sampling import sampling_rows
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.progress import bar
from specmoe_jax.support.timing import Stopwatch
from specmoe_jax.support.tracing import Span, span


class Engine:
    """Generates with a model under a plan. Raises PlanError at construction for a plan that cannot run.

    draft: an own implementation of speculate.Draft, for plans with draft="custom".
    draft_model: a smaller model of the same vocabulary, for plans with draft="model".
    draft_head: an EAGLE head of this model (checkpoints.load_head), for plans with draft="eagle".
    draft_set: an own policy of which experts stay (speculate.DraftSetPolicy), for plans with draft="self" that name none.
    Any number of streams and states may be open at a time; each takes the memory of a job, and a plan's budgets are of one job.
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
        draft_set: DraftSetPolicy | None = None,
        progress: str | bool = False,
        spans: list[Span] | None = None,
    ):
        if not isinstance(plan, Plan):
            raise PlanError(f"plan is {plan!r}; give a Plan, for example PRESETS['specmoe'](model.config)")
        self.model, self.plan = model, resolved(plan.validate(model.config))
        inputs = DraftInputs(draft=draft, draft_model=draft_model, draft_head=draft_head)
        validate_inputs(model, plan, inputs, draft_set, spans)
        self._progress = progress
        self._warm_batch_shape = set()
        self._figures = EngineFigures(model, self.plan, draft_set=draft_set.name if draft_set else self.plan.draft_set)
        self._resources = EngineResources(model, self.plan, inputs, draft_set=draft_set, progress=progress, spans=spans)

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
        batch_shape = batch_shape_of(self.plan, requests)
        if self.plan.expert_flow == "stream":
            return self._run_queue(requests, batch_shape, on_step)
        starts = range(0, len(requests), batch_shape.rows)
        batches = (self._run_batch(requests[start : start + batch_shape.rows], batch_shape, on_step) for start in starts)
        return itertools.chain.from_iterable(batches)

    def init(self, prompts, params=None) -> State:
        """The functional face: the state after the prefill of one batch of at most `plan.batch_size` prompts."""
        requests = make_requests(self.model, prompts, params)
        if len(requests) > self.plan.batch_size:
            raise PlanError(f"{len(requests)} prompts and batch_size {self.plan.batch_size}; init takes one batch")
        batch_shape = batch_shape_of(self.plan, requests)
        if self.plan.expert_flow != "stream":
            return self._init(requests, batch_shape)
        state, _ = self._init_queue(requests, batch_shape)
        state, waiting = admit(state, requests, self.plan.lookahead)
        if waiting:
            raise PlanError(f"{len(waiting)} of {len(requests)} prompts find no room in the KV cache; give more host memory")
        return self.step(state)[0]

    def step(self, state: State) -> tuple[State, StepInfo]:
        """Every active row gets 1 to N + 1 tokens. The state is consumed: its buffers are donated."""
        return step(state.runtime, state, self.model.tokenizer)

    def stats(self, hardware: Hardware | None = None, prediction: Prediction | None = None) -> dict:
        """The figures of everything generated so far, units in the names.

        hardware: this machine as probed, for the floor; without it that of an emulated link alone is told. prediction: of
        this plan, to stand beside what was measured.
        """
        return self._figures.figures(hardware, prediction, self._resources.peak_accelerator_bytes())

    def _run_batch(self, requests: list[Request], batch_shape: BatchShape, on_step) -> Iterator[TokenEvent]:
        watch = Stopwatch()
        state = self._init(requests, batch_shape)
        counts_on_demand = self.plan.expert_flow == "on_demand"
        on_demand = metrics.no_on_demand(self.model.config.num_moe_layers, self.model.config.num_experts)
        try:
            while not state.done:
                compiled = self._figures.compiles.count
                state, info = self.step(state)
                self._figures.recompiled += self._figures.compiles.count - compiled
                self._figures.totals = metrics.add_step(self._figures.totals, info)
                if counts_on_demand:
                    on_demand = self._figures.running = metrics.add_on_demand(on_demand, info)
                if on_step is not None:
                    on_step(info)
                yield from step_events(self.model, state, info, dict.fromkeys((request.id for request in requests), watch))
        finally:  # also of a batch that is given up
            self._figures.end_batch(on_demand)
        self._resources.put_back(state, batch_shape)

    def _run_queue(self, requests: list[Request], batch_shape: BatchShape, on_step) -> Iterator[TokenEvent]:
        """A streamed job: rows are filled from the queue as they become free. Steps in which all rows join count as prefill."""
        (state, before), waiting, watches = self._init_queue(requests, batch_shape), tuple(requests), {}
        now = moved(state.runtime)
        self._figures.add_prefill_bytes(before, now)
        while waiting or not state.done:
            state, waiting = admit(state, waiting, self.plan.lookahead)
            watches |= {state.requests[row].id: Stopwatch() for row in np.flatnonzero(state.joining)}
            compiled, watch, before = self._figures.compiles.count, Stopwatch(), now
            state, info = self.step(state)
            self._figures.recompiled += self._figures.compiles.count - compiled
            now = moved(state.runtime)
            info = info._replace(below=now.below.since(before.below))  # the link's thread reads between two steps too
            if not info.active.any():
                self._figures.prefill_s += watch.seconds
                self._figures.add_prefill_bytes(before, now)
                continue
            self._figures.totals = metrics.add_step(self._figures.totals, info)
            if on_step is not None:
                on_step(info)
            yield from step_events(self.model, state, info, watches)
        self._resources.put_back(state, batch_shape)

    def _init_queue(self, requests: list[Request], batch_shape: BatchShape) -> tuple[State, Moved]:
        """A compiled state with no request in its rows, and what had moved before its pool was made."""
        runtime, account = job = self._resources.take(batch_shape)
        before, memory = moved(runtime), self._resources.expert_memory(job)
        pages = no_pages(batch_shape.rows, batch_shape.positions, account.kv_pages)
        params = [request.params for request in requests]
        state = State(
            requests=(None,) * batch_shape.rows,
            kv=new_host_kv(runtime, pages, batch_shape.chunk),
            memory=memory,
            lengths=np.zeros(batch_shape.rows, np.int32),
            last_token=np.zeros(batch_shape.rows, np.int32),
            generated=((),) * batch_shape.rows,
            finish_reasons=("padding",) * batch_shape.rows,
            rows=sampling_rows([SamplingParams()] * batch_shape.rows),
            adaptive_length=self._resources.new_adaptive_length(batch_shape),
            draft_memory=new_draft_memory(runtime, batch_shape),
            runtime=runtime,
        )
        for kind in {p.temperature == 0: p for p in params}.values():  # greedy and sampled batches run different programs
            state = self._warm(state._replace(rows=sampling_rows([kind] * batch_shape.rows)), batch_shape)
        return state, before

    def _init(self, requests: list[Request], batch_shape: BatchShape) -> State:
        watch = Stopwatch()
        runtime, _ = job = self._resources.take(batch_shape)
        before, memory = moved(runtime), self._resources.expert_memory(job)
        kv = self._resources.new_cache(batch_shape)
        padding = batch_shape.rows - len(requests)
        rows: tuple[Request | None, ...] = (*requests, *[None] * padding)
        prompts = [request.token_ids if request else () for request in rows]
        if batch_shape.source:
            memory, cross = encode(runtime, memory, [request.source if request else () for request in rows], batch_shape.source)
            kv = kv._replace(cross=cross)
        draft_memory = new_draft_memory(runtime, batch_shape)
        with bar("prefill", max(map(len, prompts)) - 1, "position", mode=self._progress, leave=False) as shown, span("prefill"):
            memory, kv, draft_memory, _ = prefill(
                runtime, memory, kv, prompts, batch_shape.chunk, draft_memory, on_chunk=shown.update
            )
            jax.block_until_ready((kv, draft_memory))
        self._figures.prefill_s += watch.seconds
        state = State(
            requests=rows,
            kv=kv,
            memory=memory,
            lengths=np.array([max(len(prompt) - 1, 0) for prompt in prompts], np.int32),
            last_token=np.array([prompt[-1] if prompt else 0 for prompt in prompts], np.int32),
            generated=((),) * len(rows),
            finish_reasons=tuple(None if request else "padding" for request in rows),
            rows=sampling_rows([request.params if request else SamplingParams() for request in rows]),
            adaptive_length=self._resources.new_adaptive_length(batch_shape),
            draft_memory=draft_memory,
            runtime=runtime,
        )
        state = self._warm(state, batch_shape)
        self._figures.add_prefill_bytes(before, moved(runtime))  # to warm up may change a draft set
        return state

    def _warm(self, state: State, batch_shape: BatchShape) -> State:
        """Compiles the steps of shapes that are new; sampled and greedy rows run different programs."""
        key = (batch_shape, state.rows.greedy)
        if key in self._warm_batch_shape:
            return state
        self._warm_batch_shape.add(key)
        watch = Stopwatch()
        with bar("compile", None, "step", mode=self._progress, leave=False) as shown:
            state = warm_up(state.runtime, state, on_step=shown.update)
        self._figures.warm_up_s += watch.seconds
        return state
