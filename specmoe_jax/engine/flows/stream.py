"""The experts of every layer cross the link once a pass (SpecMoEOff): one job, whose rows are filled from a queue."""

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.config.layer_config import AttentionConfig
from specmoe_jax.config.model_config import ModelConfig
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.flows.protocol import ExpertFlowExecutor, ReadStates, TargetPass
from specmoe_jax.engine.flows.stream_pass import StreamedPass, stream_pass
from specmoe_jax.engine.requests.completion import TokenEvent, step_events
from specmoe_jax.engine.requests.prepare import BatchShape
from specmoe_jax.engine.resources import empty_state
from specmoe_jax.engine.runtime import Runtime, empty_pages, new_states
from specmoe_jax.engine.scheduler import MicroBatch, admit, empty_chunk, prompt_chunks, rows_of
from specmoe_jax.engine.scoring.layout import ReadPass, ReadRow, read_passes, tree_nodes
from specmoe_jax.engine.scoring.prefixes import batches
from specmoe_jax.engine.session import Session
from specmoe_jax.engine.state import Buffers, ExpertMemory, HostKV, PassInfo, PassRouting, Request, State, StepInfo
from specmoe_jax.engine.step import Moved, moved
from specmoe_jax.kv_cache.page_table import Pages, no_pages
from specmoe_jax.kv_cache.positions import KV_PAGE, prefill_rows, staged_positions
from specmoe_jax.offload.residency import empty
from specmoe_jax.ops import PackedCache
from specmoe_jax.speculate.sampling import sampling_rows
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.processes import put
from specmoe_jax.support.timing import Stopwatch
from specmoe_jax.types import RecurrentState, Tree


class StreamFlowExecutor(ExpertFlowExecutor[Runtime, Session]):
    def resident_slots(self, config: ModelConfig, devices: int = 1) -> None:
        return None

    def first_memory(self, runtime: Runtime) -> ExpertMemory:
        """No pool: the pinned layers and the layer buffers."""
        shape = (runtime.config.num_expert_layers, runtime.config.num_experts)
        return ExpertMemory(
            slots=runtime.experts.slots,
            pool=None,
            residency=empty(*shape, 0),
            usage_scores=np.zeros(shape),
            prefetched=np.zeros(shape, bool),
            buffers=_first_buffers(runtime),
        )

    def run_pass(
        self,
        runtime: Runtime,
        state: State[HostKV],
        tokens: np.ndarray,
        num_new: np.ndarray,
        *,
        predicted: np.ndarray,
        tree: Tree | None,
    ) -> TargetPass:
        """The verification of all rows in micro-batches, and the prompts of the rows that join, in one pass.

        A micro-batch without an active row is left out; if nothing is active nor joins, all run with padding alone, to be compiled.
        """
        assert state.memory.buffers is not None
        idle, kv, memory, buffers = state.done, state.kv, state.memory, state.memory.buffers
        prompts = [empty_chunk(state)] if idle else prompt_chunks(state)
        groups = np.split(np.arange(len(num_new), dtype=np.int32), runtime.plan.micro_batches)
        running = [idle or bool(num_new[rows].any()) for rows in groups]
        decoding = [
            MicroBatch(
                tokens[rows],
                rows_of(kv, rows),
                rows,
                state.lengths[rows],
                num_new[rows],
                tree=tree and Tree(*(part[rows] for part in tree)),
            )
            for rows, runs in zip(groups, running, strict=True)
            if runs
        ]
        micro_batches = decoding + [prompt.micro_batch for prompt in prompts]
        if micro_batches:
            done = stream_pass(runtime, buffers, kv, micro_batches)
        else:  # prompts of one token alone join: there is nothing to fill a cache with
            done = StreamedPass(h=[], features=[], kv=kv, buffers=buffers)
        decoded = len(decoding)
        features = [f for f in done.features if f is not None]  # of all micro-batches or of none
        experts = runtime.config.num_experts if micro_batches else 0  # of a layer
        hits = len(runtime.experts.pinned_layers) * experts
        missed = runtime.config.num_moe_layers * experts - hits
        told = _routing_of_rows(done.routing[:decoded], running)
        return TargetPass(
            h=_all_rows(runtime, done.h[:decoded], running),
            kv=done.kv,
            memory=memory._replace(buffers=done.buffers),
            counts=np.zeros_like(memory.usage_scores, dtype=np.int64),
            info=PassInfo(
                hits=hits,
                misses=missed,
                fetched=missed,
                waves=0,
                prefetched=0,
                prefetch_hits=0,
                routing=told and told.ids,
                routing_weights=told and told.weights,
            ),
            features=_all_rows(runtime, features[:decoded], running) if features else None,
            prompts=tuple(zip(prompts, features[decoded:], strict=True)) if features else (),
            prompt_states=tuple(zip(prompts, done.h[decoded:], strict=True)) if micro_batches else (),
            prompt_routing=tuple(zip(prompts, done.routing[decoded:], strict=True)) if done.routing else (),
        )

    def init(self, session: Session, requests: list[Request], batch_shape: BatchShape) -> State[HostKV]:
        """The prompts run through one step."""
        state, _ = self._init_queue(session, [request.params for request in requests], batch_shape)
        state, waiting = admit(state, requests, session.plan.lookahead)
        if waiting:
            raise PlanError(f"{len(waiting)} of {len(requests)} prompts find no room in the KV cache; give more host memory")
        return session.step(state)[0]

    def open(self, session: Session, batch_shape: BatchShape) -> State[HostKV]:
        """Compiled for greedy and for sampled requests."""
        state, before = self._init_queue(session, (SamplingParams(), SamplingParams(temperature=1.0)), batch_shape)
        session.figures.add_prefill_bytes(before, moved(state.runtime))
        return state

    def admit(
        self, session: Session, state: State[HostKV], waiting: Sequence[Request], batch_shape: BatchShape
    ) -> tuple[State[HostKV], tuple[Request, ...]]:
        """The next pass reads their prompts."""
        return admit(state, waiting, session.plan.lookahead)

    def run(
        self, session: Session, requests: list[Request], batch_shape: BatchShape, on_step: Callable[[StepInfo], None] | None
    ) -> Generator[TokenEvent, None, None]:
        """A streamed job: rows are filled from the queue as they become free. Steps in which all rows join count as prefill."""
        params = [request.params for request in requests]
        (state, before), waiting, watches = self._init_queue(session, params, batch_shape), tuple(requests), {}
        now = moved(state.runtime)
        session.figures.add_prefill_bytes(before, now)
        while waiting or not state.done:
            state, waiting = admit(state, waiting, session.plan.lookahead)
            joining = [request for request, joins in zip(state.requests, state.joining, strict=True) if joins and request]
            watches |= {request.id: Stopwatch() for request in joining}
            computing, before = session.figures.prompt_watch(), now
            state, info = session.counted_step(state)
            now = moved(state.runtime)
            info = info._replace(below=now.below.since(before.below))  # the link's thread reads between two steps too
            if not info.active.any():
                tokens = sum(len(request.token_ids) for request in joining)
                session.figures.add_prefill(computing.watch.seconds, tokens=tokens, computing=computing)
                session.figures.add_prefill_bytes(before, now)
                continue
            session.figures.add_step(info)
            if on_step is not None:
                on_step(info)
            yield from step_events(session.model, state, info, watches)
        session.resources.put_back(state, batch_shape)

    def read(
        self, session: Session, rows: Sequence[ReadRow], batch_shape: BatchShape, watched: tuple[int, ...] = ()
    ) -> Iterator[ReadStates]:
        """All rows in one pass, so that each layer crosses the link once; in several where the cache has no pages for all."""
        runtime, account = job = session.resources.take(batch_shape)
        before, memory = moved(runtime), session.resources.expert_memory(job)
        runtime = dataclasses.replace(runtime, draft=None, watched=watched, routing=None)  # no draft is shown what is read
        kv = _new_host_kv(runtime, no_pages(1, batch_shape.positions, account.kv_pages), batch_shape.chunk, batch_shape.rows)
        nodes, most = tree_nodes(rows), batch_shape.rows if runtime.config.recurrent_layers else None
        widths = {"width": prefill_rows(len(rows), batch_shape.chunk), "tree_width": prefill_rows(len(rows), max(nodes, 1))}
        for heads, batch, pages in batches(rows, batch_shape.positions, account.kv_pages, most):
            passes = [
                one for some in (heads, batch) for one in read_passes(rows, some, chunk=batch_shape.chunk, nodes=nodes, **widths)
            ]
            assert memory.buffers is not None
            places = {number: place for place, number in enumerate(batch)}
            done = stream_pass(runtime, memory.buffers, kv, [_read_micro_batch(pages, places, one) for one in passes])
            kv, memory = done.kv, memory._replace(buffers=done.buffers)
            yield from map(ReadStates, passes, done.h, done.features)
        session.figures.add_score_bytes(before, moved(runtime))
        session.resources.keep(runtime, memory)

    def _init_queue(
        self, session: Session, params: Sequence[SamplingParams], batch_shape: BatchShape
    ) -> tuple[State[HostKV], Moved]:
        """A compiled state with no request in its rows, and what had moved before its pool was made."""
        runtime, account = job = session.resources.take(batch_shape)
        before, memory = moved(runtime), session.resources.expert_memory(job)
        pages = no_pages(batch_shape.rows, batch_shape.positions, account.kv_pages)
        kv = _new_host_kv(runtime, pages, batch_shape.chunk, batch_shape.rows)
        state = empty_state(session.resources, runtime, batch_shape, kv, memory)
        # Greedy and sampled batches run different programs.
        for kind in {p.temperature == 0: p for p in params}.values():
            state = session.warm(state._replace(rows=sampling_rows([kind] * batch_shape.rows)), batch_shape)
        return state, before


def _read_micro_batch(pages: dict[int, np.ndarray], places: dict[int, int], one: ReadPass) -> MicroBatch:
    """pages: [P] of each row. places: of each row among those of its batch."""
    nothing = np.full_like(next(iter(pages.values())), -1)
    table = np.stack([pages.get(number, nothing) for number in one.rows.tolist()])
    rows = np.array([places.get(number, -1) for number in one.rows.tolist()], np.int32)
    return MicroBatch(one.tokens, table, rows, one.lengths, one.num_new, offloaded=True, tree=one.shape_of_tree)


def _first_buffers(runtime: Runtime) -> Buffers:
    """The pinned layers, and the layer buffers: the first streamed layers are on their way into all but one of them."""
    store, index = runtime.experts.store, runtime.config.moe_layers.index
    # In the link's thread, as every stream: a disk tier has one caller, and an abandoned job's may still be at it.
    stay = [
        runtime.context.workers.link.submit(store.stream, store.new_buffer(), store.send_for(index(layer)))
        for layer in runtime.experts.pinned_layers
    ]
    pinned = tuple(stream.result() for stream in stay)
    streamed = [moe for moe, layer in enumerate(runtime.config.moe_layers) if layer not in runtime.experts.pinned_layers]
    if not streamed:
        return Buffers(spare=None, readers=(), coming=(), pinned=pinned)
    first = (streamed * runtime.plan.layer_buffers)[: runtime.plan.layer_buffers - 1]  # a model of one layer has two buffers too
    coming = tuple(runtime.context.workers.link.submit(store.stream, store.new_buffer(), store.send_for(moe)) for moe in first)
    return Buffers(spare=store.new_buffer(), readers=(), coming=coming, pinned=pinned)


def _new_host_kv(runtime: Runtime, pages: Pages, chunk: int, rows: int) -> HostKV:
    """A paged cache of zeros in host memory, in the plan's dtype, and the states of so many rows on the accelerator."""
    # A chunk below the plan's is as long as the longest prompt.
    staged = chunk if chunk < runtime.plan.prefill_chunk else staged_positions(pages.table.shape[1] * KV_PAGE, chunk)

    def cache(attention: AttentionConfig) -> PackedCache | RecurrentState:
        if attention.recurrent is not None:
            return new_states(attention.recurrent, rows, runtime.plan.tokens_per_pass - 1, runtime.context.place)
        return empty_pages(attention, len(pages.free), runtime.plan.dtype, runtime.context.host)

    caches = (cache(layer.attention) for layer in runtime.config.layers)
    return HostKV(caches=tuple(caches), pages=pages, chunk=chunk, staged=staged)


def _all_rows(runtime: Runtime, pieces: list[jax.Array], running: list[bool]) -> jax.Array | None:
    """The micro-batches in their order, zeros [b, ...] for those that were left out; None if all were."""
    if not pieces:
        return None
    given, nothing = iter(pieces), np.zeros(pieces[0].shape, pieces[0].dtype)
    return _rows([next(given) if runs else put(nothing, runtime.context.place) for runs in running])


def _routing_of_rows(pieces: Sequence[PassRouting], running: list[bool]) -> PassRouting | None:
    """All micro-batches in their order, -1 (of weight 0) for those that were left out; None where nothing is told."""
    if not pieces:
        return None

    def all_rows(told: list[np.ndarray], nothing: int) -> np.ndarray:
        given, missing = iter(told), np.full_like(told[0], nothing)
        return np.concatenate([next(given) if runs else missing for runs in running], axis=1)

    weights = [piece.weights for piece in pieces if piece.weights is not None]
    return PassRouting(all_rows([piece.ids for piece in pieces], -1), all_rows(weights, 0) if weights else None)


_rows = jax.jit(lambda pieces: jnp.concatenate(pieces) if len(pieces) > 1 else pieces[0])


FLOW = StreamFlowExecutor()
