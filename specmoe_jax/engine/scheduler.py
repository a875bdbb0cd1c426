"""Continuous batching: a waiting request takes over a finished row, and its prompt is split into chunks. Pure.

A long job thus keeps its batch full (SpecMoEOff serves a fixed batch and excludes its tail from the figures). The prompts of
new requests run through the pass in which the others decode, so they cost no expert bytes of their own.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from specmoe_jax.config.sampling_params import SamplingParams
from specmoe_jax.engine.requests.status import DECODING, PREFILLING, finished
from specmoe_jax.engine.state import HostKV, Request, State
from specmoe_jax.kv_cache.page_table import admit as admit_pages
from specmoe_jax.kv_cache.page_table import release
from specmoe_jax.kv_cache.positions import prefill_rows
from specmoe_jax.speculate.sampling import sampling_rows
from specmoe_jax.support.errors import PlanError
from specmoe_jax.types import Tree


class MicroBatch(NamedTuple):
    """Some rows' new tokens, or one chunk of some rows' prompts: what a streamed pass takes through a layer at a time.

    tokens: [b, T] int32 at positions lengths[b] + t of the rows whose pages are table [b, P]; t >= num_new[b] is padding.
    rows: [b] int32, whose states are theirs in recurrent layers, -1 for padding. tree: of the new tokens, None for a chain.
    offloaded: its hidden states wait in host memory between the layers (prompts, of which there may be many).
    """

    tokens: np.ndarray
    table: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    num_new: np.ndarray
    offloaded: bool = False
    tree: Tree | None = None


class PromptChunk(NamedTuple):
    """A chunk of prompts and their rows. rows: [b] int32, -1 for padding. following: [b, T], the token after each."""

    micro_batch: MicroBatch
    rows: np.ndarray
    following: np.ndarray


def admit(state: State[HostKV], waiting: Sequence[Request], lookahead: int) -> tuple[State[HostKV], tuple[Request, ...]]:
    """Gives free rows to waiting requests, first come first served, while there are pages. -> state, requests that still wait.

    lookahead: positions that a pass may write beyond a request's last token. A row that gets a request joins: the next pass
    fills its cache, and from then on it generates. Raises PlanError when nothing runs and the first one does not fit.
    """
    pages, seats = state.kv.pages, {}
    waiting, running = list(waiting), state.active | state.joining
    for row in np.flatnonzero(~running & (pages.table[:, 0] >= 0)).tolist():
        pages = release(pages, row)
    for row in np.flatnonzero(~running).tolist():
        given = admit_pages(pages, row, _positions(waiting[0], lookahead)) if waiting else None
        if given is None:
            break
        pages, seats[row] = given, waiting.pop(0)
        running[row] = True
    if waiting and not running.any():
        raise PlanError(f"request {waiting[0].id} needs more pages than the KV cache has; give more host memory")
    return seated(state._replace(kv=state.kv._replace(pages=pages)), seats), tuple(waiting)


def seated(state: State, seats: Mapping[int, Request]) -> State:
    """With requests in rows, by row, whose prompts are yet to be read."""
    requests, generated, statuses = list(state.requests), list(state.generated), list(state.statuses)
    logprobs, prompt_logprobs = (list(told or ((),) * len(requests)) for told in (state.logprobs, state.prompt_logprobs))
    lengths, last_token, routing = state.lengths.copy(), state.last_token.copy(), list(state.routing or ((),) * len(requests))
    for row, request in seats.items():
        requests[row], generated[row], statuses[row] = request, (), PREFILLING
        lengths[row], last_token[row] = 0, request.token_ids[-1]
        logprobs[row], prompt_logprobs[row], routing[row] = (), (), ()
    return state._replace(
        requests=tuple(requests),
        generated=tuple(generated),
        statuses=tuple(statuses),
        lengths=lengths,
        last_token=last_token,
        logprobs=tuple(logprobs),
        prompt_logprobs=tuple(prompt_logprobs),
        routing=tuple(routing),
        rows=sampling_rows([request.params if request else SamplingParams() for request in requests]),
    )


def cancelled(state: State, rows: Iterable[int]) -> State:
    """With the requests of some rows ended: the next step decodes nothing in them, and they can be given away."""
    statuses = list(state.statuses)
    for row in rows:
        statuses[row] = finished("cancelled")
    return state._replace(statuses=tuple(statuses))


def joined(state: State) -> State:
    """After the pass that filled their caches: the rows that joined generate from now on."""
    lengths = np.where(state.joining, [max(len(_prompt(request)) - 1, 0) for request in state.requests], state.lengths)
    statuses = tuple(DECODING if status is PREFILLING else status for status in state.statuses)
    return state._replace(lengths=lengths.astype(np.int32), statuses=statuses)


def prompt_chunks(state: State[HostKV]) -> list[PromptChunk]:
    """All tokens but the last of the joining rows' prompts, in micro-batches of one shape; prompts of similar length share them.

    The chunks of a row come in their order: each finds the ones before it in the cache.
    """
    width, chunk = _width(state), state.kv.chunk
    counts = {row: len(_prompt(state.requests[row])) - 1 for row in np.flatnonzero(state.joining).tolist()}
    order = sorted(counts, key=lambda row: (-counts[row], row))
    groups = [order[i : i + width] for i in range(0, len(order), width)]
    return [_chunk(state, group, start) for group in groups for start in range(0, counts[group[0]], chunk)]


def empty_chunk(state: State[HostKV]) -> PromptChunk:
    """A micro-batch of the same shape in which every position is padding, to compile what real ones run."""
    return _chunk(state, [], 0)


def _width(state: State[HostKV]) -> int:
    return prefill_rows(len(state.requests), state.kv.chunk)


def _chunk(state: State[HostKV], group: list[int], start: int) -> PromptChunk:
    width, chunk = _width(state), state.kv.chunk
    rows = np.full(width, -1, np.int32)
    rows[: len(group)] = group
    tokens, following = np.zeros((2, width, chunk), np.int32)
    lengths, num_new = np.zeros((2, width), np.int32)
    for i, row in enumerate(group):
        prompt = _prompt(state.requests[row])
        piece = prompt[:-1][start : start + chunk]
        tokens[i, : len(piece)], following[i, : len(piece)] = piece, prompt[start + 1 : start + 1 + len(piece)]
        num_new[i], lengths[i] = len(piece), min(start, len(prompt) - 1)
    return PromptChunk(MicroBatch(tokens, rows_of(state.kv, rows), rows, lengths, num_new, offloaded=True), rows, following)


def rows_of(kv: HostKV, rows: np.ndarray) -> np.ndarray:
    """The pages [b, P] of some rows; none for a row of -1."""
    return np.where(rows[:, None] < 0, -1, kv.pages.table[rows])


def _positions(request: Request, lookahead: int) -> int:
    return len(request.token_ids) + request.limit + lookahead


def _prompt(request: Request | None) -> tuple[int, ...]:
    return request.token_ids if request else ()
