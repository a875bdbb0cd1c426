"""The log-probabilities that requests ask for: of prompts while they are read, and of the tokens of each step."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specmoe_jax.engine.flows.layer_passes import fetched
from specmoe_jax.engine.flows.protocol import TargetPass
from specmoe_jax.engine.runtime import Runtime
from specmoe_jax.engine.scoring.logprobs import LogProbs, log_probs, positions_at_once, score_states
from specmoe_jax.engine.state import JobOptions, Request, State
from specmoe_jax.speculate.trees import from_root
from specmoe_jax.types import AcceptedPath, Proposal, TokenLogprob


def run_logprobs(state: State, proposal: Proposal, logits: jax.Array, decided: jax.Array) -> LogProbs | None:
    """Of the tokens that a chain commits, by the logits [B, T, V] before any edit; None where no request asks.

    decided: [3, B], see speculate.acceptance.decided.
    """
    if state.options.logprobs is None:
        return None
    num_accepted, next_token, _ = decided
    return jax.device_get(_of_run(logits, proposal.tokens, num_accepted, next_token, top=state.options.logprobs))


def path_logprobs(state: State, proposal: Proposal, logits: jax.Array, accepted: AcceptedPath) -> LogProbs | None:
    """As `run_logprobs`, of the accepted path of a tree."""
    if state.options.logprobs is None:
        return None
    return jax.device_get(_of_path(logits, proposal.tokens, accepted, top=state.options.logprobs))


@functools.partial(jax.jit, static_argnames="top")
def _of_run(logits: jax.Array, drafted: jax.Array, num_accepted: jax.Array, next_token: jax.Array, *, top: int) -> LogProbs:
    """[B, T, ...]: of the drafted token after each accepted position, and of the next token after the last."""
    following = jnp.pad(drafted, ((0, 0), (0, 1)))
    tokens = jnp.where(jnp.arange(following.shape[1]) < num_accepted[:, None], following, next_token[:, None])
    found = log_probs(logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1, 1), top)
    return LogProbs(*(x.reshape(*tokens.shape, *x.shape[1:]) for x in found))


@functools.partial(jax.jit, static_argnames="top")
def _of_path(logits: jax.Array, nodes: jax.Array, accepted: AcceptedPath, *, top: int) -> LogProbs:
    along = jnp.take_along_axis(logits, from_root(accepted.path)[..., None], axis=1)
    drafted = jnp.take_along_axis(nodes, jnp.maximum(accepted.path - 1, 0), axis=1)
    return _of_run(along, drafted, accepted.num_accepted, accepted.next_token, top=top)


def told_logprobs(runtime: Runtime, state: State, verified: TargetPass, logprobs: LogProbs | None, committed: np.ndarray) -> State:
    """The state after a step with the log-probabilities of what it committed, and of the prompts that it read."""
    if logprobs is not None:
        rows = list(state.logprobs)
        for row in np.flatnonzero(committed):
            request, count = state.requests[row], int(committed[row])
            assert request is not None  # it got tokens
            if request.params.logprobs is not None:
                tokens = state.generated[row][-count:]
                rows[row] += tuple(
                    _entry(LogProbs(*(x[row, place] for x in logprobs)), token, request.params.logprobs)
                    for place, token in enumerate(tokens)
                )
        state = state._replace(logprobs=tuple(rows))
    told = PromptLogprobs(runtime, state.requests, state.options, state.prompt_logprobs)
    if told.wanted:
        for chunk, h in verified.prompt_states:
            told.add(chunk.rows, chunk.following, h, chunk.micro_batch.num_new)
        state = state._replace(prompt_logprobs=told.rows)
    return state


class PromptLogprobs:
    """Collects those of the prompts of a batch's rows, chunk by chunk.

    rows: of each row so far, () where its request does not ask. wanted: whether any request of the job asks.
    """

    def __init__(
        self,
        runtime: Runtime,
        requests: Sequence[Request | None],
        options: JobOptions,
        before: tuple[tuple[TokenLogprob, ...], ...] | None = None,
    ):
        self._runtime, self._requests, self._top = runtime, requests, options.prompt_logprobs
        self.rows, self.wanted = before or ((),) * len(requests), options.prompt_logprobs is not None

    def add(self, rows: np.ndarray, following: np.ndarray, h: jax.Array, num_new: np.ndarray) -> None:
        """rows: [b], -1 for padding. following: [b, T], the token after each. h: [b, T, M]. num_new: [b], columns that count."""
        config, grown = self._runtime.config, list(self.rows)
        asking = [b for b, row in enumerate(rows.tolist()) if row >= 0 and self._count(row) is not None]
        places = [(b, t) for b in asking for t in range(int(num_new[b]))]
        size = min(positions_at_once(config.vocab_size), following.size)
        idle = not any(self._requests)  # a step that compiles what others run
        h = fetched(h) if places or idle else h  # once, not for every few positions
        for start in range(0, max(len(places), idle), size):
            some = places[start : start + size]
            index, tokens = np.zeros(size, np.int32), np.zeros((size, 1), np.int32)
            index[: len(some)] = [b * following.shape[1] + t for b, t in some]
            tokens[: len(some), 0] = [following[place] for place in some]
            assert self._top is not None  # a request asks
            found = jax.device_get(score_states(config.head, self._runtime.weights, h, index, tokens, self._top))
            for n, (b, _) in enumerate(some):
                row = int(rows[b])
                grown[row] += (_entry(LogProbs(*(x[n] for x in found)), int(tokens[n, 0]), self._count(row)),)
        self.rows = tuple(grown)

    def _count(self, row: int) -> int | None:
        request = self._requests[row]
        return None if request is None else request.params.prompt_logprobs


def _entry(found: LogProbs, token: int, count: int | None) -> TokenLogprob:
    """found: of one position."""
    best = zip(found.top_ids[:count].tolist(), found.top[:count].tolist(), strict=True)
    return TokenLogprob(token_id=token, logprob=float(found.of[0]), top=tuple(best))
