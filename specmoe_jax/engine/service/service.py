"""A running batch that requests join and leave: submit, cancel, step."""

import collections
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine import figures as metrics
from specmoe_jax.engine.flows.protocol import ExpertFlowExecutor
from specmoe_jax.engine.requests.completion import Completion, TokenEvent, completion_of, step_events
from specmoe_jax.engine.requests.prepare import BatchShape, make_requests, options_of
from specmoe_jax.engine.scheduler import cancelled
from specmoe_jax.engine.service import few_rows
from specmoe_jax.engine.service.handles import Handle
from specmoe_jax.engine.service.joins import WIDTHS, prefill_chunks
from specmoe_jax.engine.service.waiting import WaitingList
from specmoe_jax.engine.session import Session
from specmoe_jax.engine.state import JobOptions, Request, State, StepInfo
from specmoe_jax.engine.step import Moved, moved
from specmoe_jax.offload.tiers import TierCounts
from specmoe_jax.planner.memory.account import cache_positions
from specmoe_jax.support.errors import PlanError, RequestError
from specmoe_jax.support.jax_settings import lenient
from specmoe_jax.support.timing import Stopwatch

USUAL_TOKENS = 2048  # of prompt and answer, where nothing is said and the model's window is longer
QUEUED_ROWS = 4  # requests that may wait for each row
IDS = 1 << 32  # ids are keys of sampling as well


class Running(NamedTuple):
    """What a service runs now. requests, waiting: in rows, and not yet."""

    requests: int
    waiting: int


class Service:
    """Requests of one engine, in a batch of `plan.batch_size` rows of at most `max_tokens` tokens.

    `submit` and `cancel` may be called from any thread; whoever calls `step`, or waits for a handle, runs all requests. Each gets
    the tokens that `Engine.generate` would give it (greedy and under deterministic_sampling; other samples have the same law).
    It takes the memory of a job until it is closed.
    """

    def __init__(
        self, session: Session, flow: ExpertFlowExecutor, *, max_tokens: int | None = None, max_waiting: int | None = None
    ):
        config, plan = session.model.config, session.plan
        if config.encoder is not None:
            raise PlanError(f"{config.family} has an encoder, and requests that join a batch are built for decoders; use generate")
        if plan.num_processes > 1:
            raise PlanError(f"num_processes={plan.num_processes} and a service's requests come to one of them; use generate")
        self.max_tokens = min(USUAL_TOKENS, config.max_positions) if max_tokens is None else max_tokens
        if not 2 <= self.max_tokens <= config.max_positions:
            said = f"2 to {config.max_positions}, the model's window"
            raise PlanError(f"max_tokens is {max_tokens}; prompt and answer together may have {said}")
        self.rows = plan.batch_size
        self.waiting = WaitingList(QUEUED_ROWS * self.rows if max_waiting is None else max_waiting)
        self._session, self._flow, self._batch_shape = session, flow, _batch_shape(plan, self.max_tokens)
        self._stepping, self._ids = threading.RLock(), itertools.count()
        self._state: State | None = None
        self._moved = Moved(np.zeros(plan.devices, np.int64), 0, TierCounts())  # when the last step ended
        self._inside: dict[int, Handle] = {}  # those that have rows, by id
        self._coming: list[Handle] = []  # those that are being given rows
        self._cancelled: collections.deque[int] = collections.deque()
        self._watches: dict[int, Stopwatch] = {}
        self._seen_options: set[tuple[JobOptions, bool]] = set()
        self._on_demand, self._offsets = _no_on_demand(session), np.zeros(self._batch_shape.rows, np.int64)

    @property
    def running(self) -> Running:
        return Running(len(self._inside), len(self.waiting))

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        sampling_id: int | None = None,
        background: bool = False,
        on_event: Callable[[TokenEvent], None] | None = None,
    ) -> Handle:
        """A request that waits for a row. Raises RequestError, and QueueFull where too many wait.

        sampling_id: what `generate` knows as `ids`: draws depend on it and the seed; None for a number of its own. background: it
        waits behind all others. on_event: called with each event, in the thread that steps; the handle then keeps none.
        """
        (handle,) = self.submit_all([prompt], params, [sampling_id], background=background, on_events=[on_event])
        return handle

    def submit_all(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | None,
        sampling_ids: Sequence[int | None],
        *,
        background: bool = False,
        on_events: Sequence[Callable[[TokenEvent], None] | None],
    ) -> list[Handle]:
        """As `submit`, all or none."""
        handles = self._handles(prompts, params, sampling_ids, background=background, on_events=on_events)
        self.waiting.add(handles)
        return handles

    def cancel(self, handle: Handle) -> None:
        """Ends a request with finish_reason "cancelled": at once if it waits, at the next step if it has a row."""
        if self.waiting.take(handle.id) is not None:
            handle.deliver(_ended(handle, "cancelled"))
        elif not handle.done:
            self._cancelled.append(handle.id)

    @lenient()
    def step(self) -> bool:
        """Gives free rows to requests that wait, and every row 1 to N + 1 tokens. False where there was nothing to do.

        An error ends the requests that have rows with finish_reason "error" and is raised; later steps serve those that wait.
        """
        with self._stepping:
            if not self._inside and not len(self.waiting):
                return False
            try:
                self._advance()
            except BaseException as e:
                self._fail(e)
                raise
            return True

    def run(self) -> None:
        """Until every request has ended."""
        while self.step():
            pass

    def warm_up(self) -> None:
        """Compiles what prompts of every length and number run, so that no request waits for it; before the first one."""
        vocab, most, numbers = self._session.model.config.vocab_size, self.max_tokens - 1, itertools.count()
        for chunk in prefill_chunks(self._session.plan.prefill_chunk):
            for width in dict.fromkeys(min(width, self.rows) for width in WIDTHS):
                prompts = [[next(numbers) % vocab] * min(chunk + 1, most) for _ in range(width)]  # no two begin alike
                self.waiting.add(self._handles(prompts, SamplingParams(max_new_tokens=1), [None] * width), bounded=False)
                self.run()

    def close(self) -> None:
        """Cancels what runs and gives the memory back to the engine."""
        with self._stepping:
            for handle in [*self.waiting.take_all(), *self._inside.values()]:
                handle.deliver(_ended(handle, "cancelled"))
            self._inside.clear()
            if self._state is not None:
                self._session.resources.put_back(self._state, self._batch_shape)
                self._session.figures.end_batch(self._on_demand)
                self._state, self._on_demand = None, _no_on_demand(self._session)

    def _handles(self, prompts, params, sampling_ids, *, background: bool = False, on_events=None) -> list[Handle]:
        requests, handles = make_requests(self._session.model, prompts, params), []
        for request, sampling_id, on_event in zip(requests, sampling_ids, on_events or [None] * len(requests), strict=True):
            self._check(request)
            request = request._replace(id=next(self._ids) % IDS, sampling_id=sampling_id)
            handles.append(Handle(self, request, on_event, background=background))
        return handles

    def _check(self, request: Request) -> None:
        """Raises RequestError for one that is longer than the rows."""
        tokens = len(request.token_ids) + request.limit
        if tokens > self.max_tokens:
            raise RequestError(
                f"the prompt has {len(request.token_ids)} tokens and max_new_tokens is {request.limit}, together {tokens}; at most "
                f"{self.max_tokens} are served: shorten one of them, or give a larger max_tokens where the service is made"
            )

    def _advance(self) -> None:
        """One step; the state is consumed and replaced."""
        session, state = self._session, self._state
        self._state = None  # until the step has gone well
        if state is None:
            state = self._flow.open(session, self._batch_shape)
            self._moved = moved(state.runtime)
        else:
            state = self._let_go(state)
        state = self._admitted(state)
        if state.done:
            self._state = state
            return
        joining = [request for request, joins in zip(state.requests, state.joining, strict=True) if joins and request]
        computing, before = session.figures.prompt_watch(), self._moved
        state, info = self._counted_step(state)
        self._moved = now = moved(state.runtime)
        if not info.active.any():  # of a streamed plan, where all rows joined
            tokens = sum(len(request.token_ids) for request in joining)
            session.figures.add_prefill(computing.watch.seconds, tokens=tokens, computing=computing)
            session.figures.add_prefill_bytes(before, now)
        elif session.plan.flow.streams_layers:  # the link's thread reads between two steps too
            self._count(info._replace(below=now.below.since(before.below)))
        else:
            self._count(info)
        self._state = state
        for event in step_events(session.model, state, info, self._watches):
            self._deliver(self._inside[event.id], event)

    def _let_go(self, state: State) -> State:
        """Without the requests that were cancelled."""
        gone = {self._cancelled.popleft() for _ in range(len(self._cancelled))} & self._inside.keys()
        rows = [row for row, request in enumerate(state.requests) if request and request.id in gone]
        for row in rows:
            request = state.requests[row]
            assert request is not None
            completion = completion_of(self._session.model, state, row, "cancelled")
            self._deliver(self._inside[request.id], TokenEvent(request.id, (), completion, self._watches[request.id].seconds))
        return cancelled(state, rows)

    def _admitted(self, state: State) -> State:
        """With requests that waited in the rows that are free."""
        due = self.waiting.due(self.rows, sum(handle.background for handle in self._inside.values()))
        self._coming = coming = due[: self.rows - len(self._inside)]
        if not coming:
            return state
        watch, requests = Stopwatch(), [handle.request for handle in coming]
        asking = [*(handle.request.params for handle in self._inside.values()), *(request.params for request in requests)]
        state = state._replace(options=_rounded(options_of(asking), self._session))
        state, left = self._flow.admit(self._session, state, requests, self._batch_shape)
        for handle in coming[: len(coming) - len(left)]:
            if self.waiting.take(handle.id) is None:  # cancelled meanwhile, and told so
                self._cancelled.append(handle.id)
            self._inside[handle.id], self._watches[handle.id] = handle, watch
        self._coming = []
        return self._aligned(state)

    def _aligned(self, state: State) -> State:
        """Where new rows stand beside the others, for what plain decoding would have fetched (figures.OnDemand)."""
        fresh = np.array([bool(request) and not tokens for request, tokens in zip(state.requests, state.generated, strict=True)])
        old = state.active & ~fresh
        made = np.array([len(tokens) for tokens in state.generated])
        end = self._on_demand.first + len(self._on_demand.needed)
        self._offsets[fresh] = (self._offsets + made)[old].min() if old.any() else end
        return state

    def _counted_step(self, state: State) -> tuple[State, StepInfo]:
        """What requests ask for first compiles programs of its own."""
        kind = (state.options, state.rows.greedy)
        known = kind in self._seen_options or state.options == JobOptions()
        self._seen_options.add(kind)
        return few_rows.step_active(state, self._session.counted_step if known else self._session.step)

    def _count(self, info: StepInfo) -> None:
        self._session.figures.add_step(info)
        if self._session.plan.flow.tells_routing:
            self._on_demand = metrics.add_on_demand(self._on_demand, info._replace(start=info.start + self._offsets))
            self._session.figures.set_running(self._on_demand)

    def _deliver(self, handle: Handle, event: TokenEvent) -> None:
        if event.completion is not None:
            del self._inside[handle.id], self._watches[handle.id]
        if not handle.done:
            handle.deliver(event)

    def _fail(self, error: BaseException) -> None:
        """The state is gone, and with it what had rows."""
        lost, self._inside, self._state = [*self._inside.values(), *self._coming], {}, None
        self._watches.clear()
        self._session.figures.end_batch(self._on_demand)
        self._on_demand = _no_on_demand(self._session)
        self._coming = []
        for handle in lost:
            self.waiting.take(handle.id)
            if not handle.done:
                handle.deliver(_ended(handle, "error", f"the step failed ({type(error).__name__}: {error})"))


def _batch_shape(plan: Plan, max_tokens: int) -> BatchShape:
    return BatchShape(
        rows=plan.flow.batch_rows(plan, plan.batch_size),
        positions=cache_positions(max_tokens, plan),
        chunk=min(plan.prefill_chunk, 1 << max(max_tokens - 2, 0).bit_length()),
        paged=plan.flow.paged_load(plan, [(max_tokens - 1, 1)] * plan.batch_size, plan.batch_size),
    )


def _no_on_demand(session: Session) -> metrics.OnDemand:
    return metrics.no_on_demand(session.model.config.num_moe_layers, session.model.config.num_experts)


def _rounded(options: JobOptions, session: Session) -> JobOptions:
    """Few different ones, since each compiles programs of its own."""

    def up(count: int | None) -> int | None:
        return count and min(1 << (count - 1).bit_length(), session.model.config.vocab_size)

    return options._replace(logprobs=up(options.logprobs), prompt_logprobs=up(options.prompt_logprobs))


def _ended(handle: Handle, reason: str, error: str | None = None) -> TokenEvent:
    """The last event of a request of which nothing is known any more."""
    request = handle.request
    completion = Completion(request.id, request.prompt, "", (), reason, len(request.token_ids), error)
    return TokenEvent(request.id, (), completion, 0.0)
