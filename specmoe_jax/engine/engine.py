"""The engine: turns prompts into completions, batch by batch. The imperative shell around `step`."""

from collections.abc import Callable, Generator, Sequence

import numpy as np

from specmoe_jax.config.plan import Plan
from specmoe_jax.config.registry import EXPERT_FLOWS
from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.drafts.protocol import DraftInputs
from specmoe_jax.engine.engine_figures import EngineFigures
from specmoe_jax.engine.requests.completion import Completion, TokenEvent
from specmoe_jax.engine.requests.prepare import batch_shape_of, make_requests, resolved
from specmoe_jax.engine.resources import EngineResources
from specmoe_jax.engine.scoring.features import Features, checked_layers, feature_texts, features_of
from specmoe_jax.engine.scoring.rolling import score_rolling
from specmoe_jax.engine.scoring.score import Score, score_texts
from specmoe_jax.engine.scoring.texts import Text, scored_texts
from specmoe_jax.engine.service.handles import Handle
from specmoe_jax.engine.service.service import Service
from specmoe_jax.engine.session import Session
from specmoe_jax.engine.state import State, StepInfo
from specmoe_jax.engine.step import step
from specmoe_jax.engine.validation import validate_inputs
from specmoe_jax.models.eagle.network import EagleHead
from specmoe_jax.models.model import Model
from specmoe_jax.models.mtp import MtpHead
from specmoe_jax.planner.estimate import Prediction
from specmoe_jax.planner.hardware import Hardware
from specmoe_jax.speculate.drafts.protocol import Draft
from specmoe_jax.speculate.hot_experts.policies import DraftSetPolicy
from specmoe_jax.support.errors import PlanError
from specmoe_jax.support.jax_settings import lenient, leniently, use_compile_cache
from specmoe_jax.support.tracing import Span


class Engine:
    """Generates with a model under a plan. Raises PlanError at construction for a plan that cannot run.

    draft: a custom implementation of speculate.Draft, for plans with draft="custom".
    draft_model: a smaller model of the same vocabulary, for plans with draft="model".
    draft_head: an EAGLE head of this model (checkpoints.load_head), for plans with draft="eagle".
    mtp_head: the model's own layer for further tokens (checkpoints.load_mtp), for plans with draft="mtp".
    draft_set: a custom policy of which experts stay (speculate.DraftSetPolicy), for plans with draft="self" that name none.
    Any number of streams and states may be open at a time; each takes the memory of a job, and a plan's budgets are of one job.
    progress: bars of affinity, compilation and prefill; a mode of progress.bar.
    spans: a list that gets the time of every task of a streamed plan (tracing.write_lanes); costs a little of the overlap.
    routing: "ids" or "weights" (ids and weights): what the router of every layer decided, in `Completion.routing` and in the
    `verify` of each step that `on_step` is told; None to tell it in on_demand flows alone, and of no request.
    popularity: [L, E], how often experts were chosen (jobs.routing_traces.read_popularity), for plans with placement="popularity".
    """

    @lenient()
    def __init__(
        self,
        model: Model,
        plan: Plan,
        *,
        draft: Draft | None = None,
        draft_model: Model | None = None,
        draft_head: EagleHead | None = None,
        mtp_head: MtpHead | None = None,
        draft_set: DraftSetPolicy | None = None,
        progress: str | bool = False,
        spans: list[Span] | None = None,
        routing: str | None = None,
        popularity: np.ndarray | None = None,
    ):
        use_compile_cache()
        if not isinstance(plan, Plan):
            raise PlanError(f"plan is {plan!r}; give a Plan, for example PRESETS['specmoe'](model.config)")
        self.model, self.plan = model, resolved(plan.validate(model.config))
        inputs = DraftInputs(draft=draft, draft_model=draft_model, draft_head=draft_head, mtp_head=mtp_head)
        validate_inputs(model, plan, inputs, draft_set=draft_set, spans=spans, routing=routing, popularity=popularity)
        self._figures = EngineFigures(model, self.plan, draft_set=draft_set.name if draft_set else self.plan.draft_set)
        how = {"draft_set": draft_set, "progress": progress, "spans": spans, "routing": routing, "popularity": popularity}
        self._resources = EngineResources(model, self.plan, inputs, **how)
        self._flow = EXPERT_FLOWS.executor(self.plan.flow.name)
        self._session = Session(model, self.plan, self._resources, self._figures, progress)
        self._own: Service | None = None
        self._routing = routing

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
    ) -> Generator[TokenEvent, None, None]:
        """Tokens as they are committed, batches of at most `plan.batch_size` requests one after the other.

        Under expert_flow=stream there is one batch: a waiting request takes over a finished row (continuous batching).

        ids: what events and sampling keys know the requests by; None for 0, 1, 2, ... Raises RequestError at the
        call, not when the first token is asked for. `.close()` ends the generation.
        """
        requests = make_requests(self.model, prompts, params, ids)
        return leniently(self._flow.run(self._session, requests, batch_shape_of(self.plan, requests), on_step))

    def service(self, *, max_tokens: int | None = None, max_waiting: int | None = None) -> Service:
        """A batch that requests join and leave while it runs (continuous batching in every flow), with the memory of a job.

        max_tokens: of prompt and answer together, None for the model's window and at most 2048. max_waiting: requests that may wait
        for a row before `submit` raises QueueFull, None for four times the rows. Raises PlanError.
        """
        if self._routing is not None:
            raise PlanError("routing is told of requests of generate and stream, not of a service's; make an Engine without it")
        return Service(self._session, self._flow, max_tokens=max_tokens, max_waiting=max_waiting)

    def submit(self, prompt: str | Sequence[int], params: SamplingParams | None = None, **options) -> Handle:
        """A request that joins the engine's own service at the next step. options: of Service.submit."""
        self._own = self._own or self.service()
        return self._own.submit(prompt, params, **options)

    def cancel(self, handle: Handle) -> None:
        """Ends a submitted request; its row and pages are free at the next step."""
        handle.cancel()

    def run(self) -> None:
        """Until every submitted request has ended; `Handle.result` and iterating a handle run as far as they need."""
        if self._own is not None:
            self._own.run()

    @lenient()
    def score(self, pairs: Sequence[tuple[Text, Text]]) -> list[Score]:
        """The log-probability of every continuation given its context: pairs of texts, or of lists of token ids.

        Each text is read once, whatever the draft; continuations of one context share it. Under expert_flow=stream all texts
        share each layer's crossing of the link, as far as host memory holds their keys and values. Raises RequestError.
        """
        return score_texts(self._session, self._flow, scored_texts(self.model, pairs))

    @lenient()
    def score_rolling(
        self, texts: Sequence[Text], *, prefix: int | None = None, window: int | None = None, overlap: int = 0
    ) -> list[Score]:
        """The log-probability of whole texts, of any length: windows that score every token once.

        prefix: the token that the first one is given, None for the tokenizer's BOS or else its end token. window: tokens that the
        model reads at a time, None for its own. overlap: of them at least so many were scored by the window before.
        Raises RequestError.
        """
        return score_rolling(self.model, texts, self.score, prefix=prefix, window=window, overlap=overlap)

    def features(self, texts: Sequence[Text], *, layers: Sequence[int] | None = None) -> Generator[Features, None, None]:
        """The hidden states of texts (or lists of token ids), in their order, as Hugging Face counts them.

        layers: 0 for the embeddings, i for what comes out of the i-th layer, the last after the final norm; None for that alone.
        Texts are read as `score` reads them, so under expert_flow=stream they share each layer's crossing; all that was read and
        not yet taken is in host memory (jobs.features writes many texts, shard by shard). Raises RequestError at the call.
        """
        wanted = checked_layers(self.model.config, layers)
        return leniently(features_of(self._session, self._flow, feature_texts(self.model, texts), wanted))

    @lenient()
    def init(self, prompts, params=None) -> State:
        """The functional face: the state after the prefill of one batch of at most `plan.batch_size` prompts."""
        requests = make_requests(self.model, prompts, params)
        if len(requests) > self.plan.batch_size:
            raise PlanError(f"{len(requests)} prompts and batch_size {self.plan.batch_size}; init takes one batch")
        return self._flow.init(self._session, requests, batch_shape_of(self.plan, requests))

    @lenient()
    def step(self, state: State) -> tuple[State, StepInfo]:
        """Every active row gets 1 to N + 1 tokens. The state is consumed: its buffers are donated."""
        return step(state.runtime, state, self.model.tokenizer)

    def stats(self, hardware: Hardware | None = None, prediction: Prediction | None = None) -> dict:
        """The figures of everything generated so far, units in the names.

        hardware: this machine as probed, for the roofline bound; without it only an emulated link is known. prediction: of
        this plan, reported beside the measurement.
        """
        figures = self._figures.figures(hardware, prediction, self._resources.peak_accelerator_bytes())
        return figures | {"device_rows": self._resources.device_rows}
