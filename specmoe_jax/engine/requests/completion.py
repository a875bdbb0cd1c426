"""What a caller gets of a generation: the tokens of each step as events, and the completion of each request."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from specmoe_jax.checkpoints.channels import split_channels
from specmoe_jax.engine.requests.finish import final_text
from specmoe_jax.engine.requests.routing import RequestRouting, request_routing
from specmoe_jax.engine.state import Request, State, StepInfo
from specmoe_jax.models.model import Model
from specmoe_jax.support.timing import Stopwatch
from specmoe_jax.types import TokenLogprob


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished request.

    finish_reason: "stop" (end of sequence or a stop string), "length", "cancelled", or "error", whose reason is in `error`; what
    was generated before is kept. logprobs: of each new token, and prompt_logprobs: of each of the prompt's but the first, where
    SamplingParams asks for them. routing: where Engine(routing=...) asks for it.
    """

    id: int
    prompt: str | None
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    routing: RequestRouting | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def channels(self) -> dict[str, str]:
        """What gpt-oss thought ("analysis") and answered ("final"), apart; {} of a text without channels."""
        return split_channels(self.text)


_NOT_FINITE = (
    "prompt {}: the logits of new token {} hold NaN or Inf; check the weights (load_model refuses such ones by default) "
    "or compute in dtype=float32"
)
_NOT_ALLOWED = (
    "prompt {}: no token can follow its {} new ones within its {}{}; check banned_tokens, logit_bias and logits_processor beside "
    "it, and the weights (load_model refuses broken ones by default)"
)


class TokenEvent(NamedTuple):
    """Tokens that one request got in one step; completion is set with its last ones.

    elapsed_s: seconds since the prefill of the request's batch began. logprobs: of the tokens, where the request asks for them.
    """

    id: int
    token_ids: tuple[int, ...]
    completion: Completion | None
    elapsed_s: float
    logprobs: tuple[TokenLogprob, ...] | None = None


def step_events(model: Model, state: State, info: StepInfo, watches: dict[int, Stopwatch]) -> Iterator[TokenEvent]:
    """What one step gave the rows that were active in it. watches: by request id, since the prefill of each began."""
    for row in np.flatnonzero(info.active):
        request, tokens, reason = state.requests[row], state.generated[row], state.statuses[row].reason
        assert request is not None  # the row is active
        new = tokens[info.start[row] :]
        completion = None if reason is None else completion_of(model, state, int(row), reason)
        logprobs = None if request.params.logprobs is None else state.logprobs[row][info.start[row] :]
        yield TokenEvent(request.id, new, completion, watches[request.id].seconds, logprobs)


def completion_of(model: Model, state: State, row: int, reason: str) -> Completion:
    """Of the request of a row that has ended for this reason."""
    request, tokens = state.requests[row], state.generated[row]
    assert request is not None  # it has finished
    tokenizer, ends = model.tokenizer, model.config.eos_token_ids + request.stop_ids
    return Completion(
        id=request.id,
        prompt=request.prompt,
        text="" if tokenizer is None else final_text(tokens, request.params.stop, ends, tokenizer, request.token_ids),
        token_ids=tokens,
        finish_reason=reason,
        num_prompt_tokens=len(request.source or request.token_ids),
        error=_error(request, len(tokens)) if reason == "error" else None,
        logprobs=None if request.params.logprobs is None else state.logprobs[row],
        prompt_logprobs=None if request.params.prompt_logprobs is None else state.prompt_logprobs[row],
        routing=None if state.runtime.routing is None else request_routing(state.routing[row], len(tokens), model.config),
    )


def _error(request: Request, count: int) -> str:
    """Why a request has ended after so many tokens."""
    if request.grammar is None:
        return _NOT_FINITE.format(request.id, count)
    field, _ = request.params.grammar or ("", "")
    reason = f" ({request.grammar.error})" if request.grammar.error else ""
    return _NOT_ALLOWED.format(request.id, count, field, reason)
