"""What the flows over a pool of expert slots share: prompts run before the first step, and batches one after the other."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence

import jax
import numpy as np

from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine import cache_rows
from specmoe_jax.engine import figures as metrics
from specmoe_jax.engine.flows import protocol
from specmoe_jax.engine.flows.encode import encode
from specmoe_jax.engine.flows.layer_passes import on_all
from specmoe_jax.engine.flows.protocol import Chunk, ReadStates, TargetPass
from specmoe_jax.engine.prefill import prefill
from specmoe_jax.engine.requests.completion import TokenEvent, step_events
from specmoe_jax.engine.requests.logprobs import PromptLogprobs
from specmoe_jax.engine.requests.prepare import BatchShape
from specmoe_jax.engine.requests.routing import Rows, routing_of, with_routing
from specmoe_jax.engine.resources import empty_state, new_draft_memory
from specmoe_jax.engine.rows import gathered
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.scheduler import joined, seated
from specmoe_jax.engine.scoring.layout import CHAIN, ReadRow, read_passes, tree_nodes
from specmoe_jax.engine.service import few_rows
from specmoe_jax.engine.service.joins import JOIN_ROWS, Join, plan_joins, prefill_chunk, prefill_width
from specmoe_jax.engine.session import Session
from specmoe_jax.engine.state import ExpertMemory, PassRouting, Request, State, StepInfo
from specmoe_jax.engine.step import moved
from specmoe_jax.offload import retained_experts
from specmoe_jax.offload.residency import empty, plan_layer
from specmoe_jax.speculate.drafts.protocol import FeatureDraft
from specmoe_jax.speculate.sampling import sampling_rows
from specmoe_jax.support.progress import bar, ticking
from specmoe_jax.support.timing import Stopwatch
from specmoe_jax.support.tracing import span
from specmoe_jax.types import KVCache, Tree


class PooledFlowExecutor(protocol.PooledFlowExecutor[Runtime, Session]):
    """A flow adds `resident_slots`, `target_pass` and `encoder_experts`."""

    def first_memory(self, runtime: Runtime) -> ExpertMemory:
        """A new pool with what must always be there: all experts, or a first draft set per layer that decodes."""
        shape = (runtime.config.num_expert_layers, runtime.config.num_experts)
        pool = runtime.experts.store.new_pool(runtime.experts.slots.total)
        of_all = runtime.experts.slots.total, runtime.plan.devices, runtime.experts.homes
        residency = empty(*shape, *of_all, taken=runtime.experts.merged_slots)
        none, arriving = np.zeros(shape[1], bool), ()
        usage_scores = np.zeros((runtime.config.num_moe_layers, shape[1]))
        plan, slots = runtime.plan, runtime.experts.slots.total
        retained = retained_experts.nothing(*shape, slots, plan.retaining) if plan.retain else None
        for layer in range(runtime.config.num_expert_layers):
            decodes = layer < runtime.config.num_moe_layers
            keep = (
                runtime.policies.keep(layer, usage_scores[layer], usage_scores[layer], none)
                if decodes
                else np.full(shape[1], runtime.experts.resident_slots is not None)
            )
            layer_plan, residency = plan_layer(residency, layer, none, keep)
            for wave in layer_plan.waves:
                pool, arriving = runtime.experts.store.fetch(pool, wave.fetch, arriving)
                retained = retained and retained_experts.after_copies(retained, wave.fetch)
        pool, _ = runtime.experts.store.finish_copies(pool, arriving)
        return ExpertMemory(
            slots=runtime.experts.slots,
            pool=pool,
            residency=residency,
            usage_scores=usage_scores,
            prefetched=np.zeros(shape, bool),
            retained_experts=retained,
        )

    def run_pass(
        self,
        runtime: Runtime,
        state: State[KVCache],
        tokens: np.ndarray,
        num_new: np.ndarray,
        *,
        predicted: np.ndarray,
        tree: Tree | None,
    ) -> TargetPass:
        return self.target_pass(
            runtime,
            state.memory,
            state.kv,
            tokens,
            state.lengths,
            num_new,
            earlier=np.zeros(state.memory.usage_scores.shape, np.int64),
            predicted=predicted,
            tree=tree,
        )

    def prompt_pass(self, runtime: Runtime, memory: ExpertMemory, kv: KVCache, chunks: Sequence[Chunk], observe, on_positions):
        """Chunk after chunk, each through all layers."""
        totals = np.zeros((runtime.config.num_moe_layers, runtime.config.num_experts), np.int64)
        nothing = np.zeros_like(totals)
        for chunk in chunks:
            done = self.target_pass(runtime, memory, kv, *chunk[:3], earlier=totals, predicted=nothing)
            assert done.h is not None  # of a streamed pass alone
            memory, kv = done.memory, done.kv
            totals = totals + chunk.stands_for * (done.counts - totals)
            if chunk.spreads_row is not None:
                spread = functools.partial(cache_rows.spread_row, row=np.int32(chunk.spreads_row))
                kv = kv._replace(k=tuple(map(spread, kv.k)), v=tuple(map(spread, kv.v)))
            observe(chunk, done.features, done.h, routing_of(done.info) if runtime.routing else None)
            on_positions(int(chunk.num_new.max()))
        return memory, kv, totals

    def run(
        self, session: Session, requests: list[Request], batch_shape: BatchShape, on_step: Callable[[StepInfo], None] | None
    ) -> Generator[TokenEvent, None, None]:
        for start in range(0, len(requests), batch_shape.rows):
            yield from self._run_batch(session, requests[start : start + batch_shape.rows], batch_shape, on_step)

    def read(
        self, session: Session, rows: Sequence[ReadRow], batch_shape: BatchShape, watched: tuple[int, ...] = ()
    ) -> Iterator[ReadStates]:
        """Batch after batch, rows of similar length beside each other."""
        job = session.resources.take(batch_shape)
        before, memory = moved(job.runtime), session.resources.expert_memory(job)
        runtime = dataclasses.replace(job.runtime, draft=None, watched=watched, routing=None)  # no draft is shown what is read
        kv, width, nodes = session.resources.new_cache(batch_shape), batch_shape.rows, tree_nodes(rows)
        nothing = np.zeros(memory.usage_scores.shape, np.int64)
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number].chain))
        for start in range(0, len(rows), width):
            batch = order[start : start + width]
            if batch_shape.source:
                sources = [rows[number].source for number in batch] + [()] * (width - len(batch))
                memory, cross = encode(self, runtime, memory, sources, batch_shape.source)
                kv = kv._replace(cross=cross)
            passes = read_passes(rows, batch, width=width, chunk=batch_shape.chunk, nodes=nodes)
            chains, found = [one for one in passes if one.tree == CHAIN], []
            chunks = [Chunk(one.tokens, one.lengths, one.num_new, following=one.tokens) for one in chains]
            how = (lambda chunk, features, h, routing, found=found: found.append((h, features)), lambda positions: None)
            memory, kv, _ = self.prompt_pass(runtime, memory, kv, chunks, *how)
            yield from (ReadStates(one, on_all(h), inputs) for one, (h, inputs) in zip(chains, found, strict=True))
            for one in passes[len(chains) :]:
                where = (one.tokens, one.lengths, one.num_new)
                done = self.target_pass(runtime, memory, kv, *where, earlier=nothing, predicted=nothing, tree=one.shape_of_tree)
                assert done.h is not None
                memory, kv = done.memory, done.kv
                yield ReadStates(one, on_all(done.h), done.features)
        session.figures.add_score_bytes(before, moved(runtime))
        session.resources.keep(runtime, memory)

    def open(self, session: Session, batch_shape: BatchShape) -> State[KVCache]:
        """The memory is accounted with the rows whose prompts are read beside the batch."""
        runtime, _ = job = session.resources.take(_beside(batch_shape))
        before, memory = moved(runtime), session.resources.expert_memory(job)
        kv = session.resources.new_cache(batch_shape)
        session.figures.add_prefill_bytes(before, moved(runtime))
        return empty_state(session.resources, runtime, batch_shape, kv, memory)

    def admit(
        self, session: Session, state: State[KVCache], waiting: Sequence[Request], batch_shape: BatchShape
    ) -> tuple[State[KVCache], tuple[Request, ...]]:
        """Reads their prompts in a small cache of their own, a group at a time; one group while others decode.

        What the cache of any row holds of a prompt is copied, not read again (not with a draft of features, whose cache is apart,
        nor with recurrent layers, whose states are of all that was read).
        """
        waiting = tuple(waiting)
        reuse = not isinstance(state.runtime.draft, FeatureDraft) and not state.runtime.config.recurrent_layers
        decoding = bool(state.active.any())
        while waiting and (joins := plan_joins(state, waiting, reuse=reuse)):
            computing, before = session.figures.prompt_watch(), moved(state.runtime)
            state = self._joined(session, state, joins)
            tokens = sum(len(join.request.token_ids) - join.shared for join in joins)
            session.figures.add_prefill(computing.watch.seconds, tokens=tokens, computing=computing)
            state = self._warm(session, state, batch_shape)
            session.figures.add_prefill_bytes(before, moved(state.runtime))
            waiting = waiting[len(joins) :]
            if decoding:
                break
        return state, waiting

    def _joined(self, session: Session, state: State[KVCache], joins: Sequence[Join]) -> State[KVCache]:
        """The state in which requests that took rows decode."""
        runtime, width, rows = state.runtime, prefill_width(len(joins)), len(state.requests)
        own, starts = np.full(width, -1, np.int32), np.zeros(width, np.int32)
        own[: len(joins)], starts[: len(joins)] = [join.row for join in joins], [join.shared for join in joins]
        prompts = [join.request.token_ids for join in joins] + [()] * (width - len(joins))
        longest = max(len(prompt) - 1 - int(start) for prompt, start in zip(prompts, starts, strict=True))
        state = seated(state, {join.row: join.request for join in joins})
        sources = np.zeros(width, np.int32)
        sources[: len(joins)] = [join.source for join in joins]
        some = _each_layer(lambda cache: cache_rows.take_rows(cache, sources), state.kv)
        told = PromptLogprobs(runtime, state.requests, state.options, state.prompt_logprobs)
        how = {"rows": own, "starts": starts, "on_states": told.add if told.wanted else None}
        chunk = prefill_chunk(longest, session.plan.prefill_chunk)
        with span("prefill"):
            memory, some, draft_memory = prefill(self, runtime, state.memory, some, prompts, chunk, state.draft_memory, **how)
            at = np.where(own < 0, rows, own)
            kv = _each_layer(lambda cache, new: cache_rows.put_rows(cache, jax.tree.map(gathered, new), at), state.kv, some)
            jax.block_until_ready((kv, draft_memory))
        return joined(state._replace(kv=kv, memory=memory, draft_memory=draft_memory, prompt_logprobs=told.rows))

    def _warm(self, session: Session, state: State[KVCache], batch_shape: BatchShape) -> State[KVCache]:
        """Compiled for greedy and for sampled requests, all rows and few; after the first prompts, without which some drafts
        cannot run."""
        rows, options = state.rows, state.options
        for temperature in (0.0, 1.0):
            kind = sampling_rows([SamplingParams(temperature=temperature)] * len(state.requests))
            state = session.warm(state._replace(rows=kind, options=batch_shape.options), _beside(batch_shape))
            for few in few_rows.sizes(state):
                shape = _beside(batch_shape._replace(rows=few))
                if not session.is_warm(state, shape):
                    some = np.arange(few, dtype=np.int32)
                    part = session.warm(few_rows.part_of(state, some), shape)
                    state = few_rows.with_part(state, part, some)
        return state._replace(rows=rows, options=options)

    def _run_batch(self, session: Session, requests: list[Request], batch_shape: BatchShape, on_step) -> Iterator[TokenEvent]:
        watch = Stopwatch()
        state = self.init(session, requests, batch_shape)
        on_demand = metrics.no_on_demand(session.model.config.num_moe_layers, session.model.config.num_experts)
        try:
            while not state.done:
                state, info = session.counted_step(state)
                session.figures.add_step(info)
                if session.plan.flow.tells_routing:
                    on_demand = metrics.add_on_demand(on_demand, info)
                    session.figures.set_running(on_demand)
                if on_step is not None:
                    on_step(info)
                yield from step_events(session.model, state, info, dict.fromkeys((request.id for request in requests), watch))
        finally:  # also of an abandoned batch
            session.figures.end_batch(on_demand)
        session.resources.put_back(state, batch_shape)

    def init(self, session: Session, requests: list[Request], batch_shape: BatchShape) -> State[KVCache]:
        watch = Stopwatch()
        runtime, _ = job = session.resources.take(batch_shape)
        before, memory = moved(runtime), session.resources.expert_memory(job)
        kv = session.resources.new_cache(batch_shape)
        padding = batch_shape.rows - len(requests)
        rows: tuple[Request | None, ...] = (*requests, *[None] * padding)
        prompts = [request.token_ids if request else () for request in rows]
        if batch_shape.source:
            memory, cross = encode(
                self, runtime, memory, [request.source if request else () for request in rows], batch_shape.source
            )
            kv = kv._replace(cross=cross)
        draft_memory = new_draft_memory(runtime, batch_shape)
        shown = bar("prefill", max(map(len, prompts)) - 1, "position", mode=session.progress, leave=False)
        jax.block_until_ready(memory.pool)  # so that its filling is not taken for the prompts'
        computing = session.figures.prompt_watch()
        with shown, ticking(shown), span("prefill"):
            told = PromptLogprobs(runtime, rows, batch_shape.options)
            routing: Rows = ((),) * batch_shape.rows

            def on_routing(own_rows: np.ndarray, told: PassRouting, num_new: np.ndarray) -> None:
                nonlocal routing
                routing = with_routing(routing, own_rows, told, num_new, runtime.config)

            how = {"on_positions": shown.update, "on_states": told.add if told.wanted else None, "on_routing": on_routing}
            memory, kv, draft_memory = prefill(self, runtime, memory, kv, prompts, batch_shape.chunk, draft_memory, **how)
            jax.block_until_ready((kv, draft_memory))
        session.figures.add_prefill(watch.seconds, tokens=sum(map(len, prompts)), computing=computing)
        state = empty_state(session.resources, runtime, batch_shape, kv, memory)
        state = joined(seated(state, dict(enumerate(requests))))
        state = state._replace(draft_memory=draft_memory, prompt_logprobs=told.rows, routing=routing)
        state = session.warm(state, batch_shape)
        session.figures.add_prefill_bytes(before, moved(runtime))  # to warm up may change a draft set
        return state


def _each_layer(change: Callable, *caches: KVCache) -> KVCache:
    """With every layer's keys and values changed."""
    keys, values = (tuple(map(change, *arrays)) for arrays in ((c.k for c in caches), (c.v for c in caches)))
    return caches[0]._replace(k=keys, v=values)


def _beside(batch_shape: BatchShape) -> BatchShape:
    """With the rows whose prompts are read beside a batch."""
    return batch_shape._replace(beside=JOIN_ROWS)
